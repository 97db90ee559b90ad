"""The figure of the answer styles: its curves are right, and errors are one line."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from tutorials.tiny_world import phases
from samr1_mini.tiny.scenes import KINDS

TEXTS = {
    "sentence": "The red star is at [1, 2, 3, 4].",
    "short": "<think>The red star fits best.</think>",
    "other": "A star.",
    "names": "<think>I see the red star. It is the red star.</think>",
    "places": "<think>I see the red star (3, 4). It is the red star.</think>",
}


def write_run(folder, steps, seed):
    """Write a run with 20 answers a step. Return its answers as (step, style, kind, reward)."""
    rng, rows = np.random.default_rng(seed), []
    for step in range(1, steps + 1):
        late = step / steps
        shares = np.array([1 - late, 0.3, 0.05, 0.2, late**3])
        for _ in range(20):
            style, kind = str(rng.choice(list(TEXTS), p=shares / shares.sum())), str(
                rng.choice(KINDS)
            )
            rows.append((step, style, kind, float(rng.integers(7))))
    folder.mkdir()
    answers = [
        {"step": step, "kind": kind, "text": TEXTS[style], "tokens": 9, "reward": reward}
        for step, style, kind, reward in rows
    ]
    metrics = [
        {
            "step": step,
            "length": 10.0 * step,
            "reward": np.mean([r for s, *_, r in rows if s == step]),
        }
        for step in range(1, steps + 1)
    ]
    for name, lines in (("answers", answers), ("metrics", metrics)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return rows


def near(rows, step, steps):
    """Return the answers of the nine steps around one."""
    return [row for row in rows if abs(row[0] - step) <= 4 and row[0] <= steps]


def test_the_curves_are_those_of_the_answers_of_all_runs_up_to_the_end_of_the_shortest(
    tmp_path, monkeypatch, capsys
):
    rows, figures = write_run(tmp_path / "a", 30, 0) + write_run(tmp_path / "b", 24, 1), []
    monkeypatch.setattr(
        phases, "Figure", lambda **given: figures.append(Figure(**given)) or figures[-1]
    )
    phases.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").exists() and capsys.readouterr().out.split() == [
        str(tmp_path / "x.png")
    ]
    shares, length, measured, earned = figures[0].axes
    for step in (1, 6, 15, 24):
        window, low = near(rows, step, 24), 0.0
        for area in shares.collections:
            at = [y for x, y in area.get_paths()[0].vertices if x == step]
            share = np.mean([style == area.get_label() for _, style, *_ in window])
            assert (min(at), max(at)) == pytest.approx((low, low + share))
            low += share
        assert low == pytest.approx(1)
        for line in measured.get_lines():
            asked = [style == "places" for _, style, kind, _ in window if kind == line.get_label()]
            assert line.get_ydata()[step - 1] == pytest.approx(np.mean(asked))
        for line in earned.get_lines():
            paid = [reward for _, style, _, reward in window if line.get_label() in ("all", style)]
            if np.isnan(drawn := line.get_ydata()[step - 1]):
                assert len(paid) < phases.FEWEST
            else:
                assert drawn == pytest.approx(np.mean(paid))
    assert {line.get_label() for line in measured.get_lines()} == set(KINDS)
    assert {line.get_label() for line in earned.get_lines()} == {"all", *TEXTS}
    assert len(length.get_lines()[-1].get_xdata()) == 24 and length.get_lines()[-1].get_ydata()[
        10
    ] == pytest.approx(110)


def test_a_style_that_hardly_any_answer_has_gets_no_mean_reward(tmp_path, monkeypatch):
    figures, seldom = [], {5: 1, 20: 8}  # step: answers with places
    answers = [
        {
            "step": s,
            "kind": "part",
            "text": TEXTS["places" if i < seldom.get(s, 0) else "short"],
            "reward": 3.0,
        }
        for s in range(1, 31)
        for i in range(16)
    ]
    monkeypatch.setattr(
        phases, "Figure", lambda **given: figures.append(Figure(**given)) or figures[-1]
    )
    styled = [answer | {"style": phases.style_of(answer["text"])} for answer in answers]
    phases.draw(
        tmp_path / "x.png",
        [([{"step": s, "reward": 3.0, "length": 9.0} for s in range(1, 31)], styled)],
    )
    [places] = [
        line.get_ydata() for line in figures[0].axes[3].get_lines() if line.get_label() == "places"
    ]
    assert [i + 1 for i, y in enumerate(places) if not np.isnan(y)] == list(
        range(16, 25)
    ) and np.nanmax(places) == pytest.approx(3)


@pytest.mark.parametrize(
    "spoil, file",
    [
        (lambda run: None, "metrics.jsonl"),
        (lambda run: run.mkdir(), "metrics.jsonl"),
        (lambda run: write_run(run, 3, 0) and (run / "answers.jsonl").unlink(), "answers.jsonl"),
        (
            lambda run: write_run(run, 3, 0)
            and (run / "answers.jsonl").write_text('{"step": 1, "te'),
            "answers.jsonl",
        ),
        (
            lambda run: write_run(run, 3, 0)
            and (run / "metrics.jsonl").write_text('{"step": 3}\n'),
            "metrics.jsonl",
        ),
    ],
)
def test_a_run_that_cannot_be_drawn_gives_one_line(tmp_path, spoil, file, capsys):
    spoil(tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        phases.main([str(tmp_path / "run"), "--out", str(tmp_path / "x.png")])
    said = capsys.readouterr().err
    assert (
        end.value.code == 2
        and said.startswith("phases.py: error: ")
        and file in said
        and said.count("\n") == 1
    )
    assert not (tmp_path / "x.png").exists()


def test_a_picture_that_cannot_be_written_gives_one_line(tmp_path, capsys):
    write_run(tmp_path / "run", 3, 0)
    for out in ("nowhere/x.png", "x.foo"):
        with pytest.raises(SystemExit) as end:
            phases.main([str(tmp_path / "run"), "--out", str(tmp_path / out)])
        error = capsys.readouterr().err
        assert end.value.code == 2 and f"--out {tmp_path / out}" in error and error.count("\n") == 1
