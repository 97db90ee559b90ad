"""The ablations: what the committed runs say, how they are compared, and how they are made and kept."""

import csv
import gzip
import json
import re
import shutil
import sys
from collections import Counter
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from filelock import FileLock

from samr1_mini.config import UserError, parse_settings

TUTORIALS = Path(__file__).parent.parent / "tutorials"
sys.path.insert(0, str(TUTORIALS))  # ablations.py stands there

import ablations


def test_the_committed_ablations_hold_every_seed_once_and_only_rows_that_can_be_run_again():
    with ablations.FILE.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len({(line["row"], line["seed"]) for line in lines}) == len(lines) >= 5
    for line in lines:
        assert ablations.ROWS[line["row"]] == line["options"]
    runs = Counter(line["row"] for line in lines)
    begun = ablations.TABLES["learning rate"]  # some of these rows have fewer runs
    assert len(runs) > 20 and min(n for row, n in runs.items() if row not in begun) >= 5, runs


def test_every_row_with_committed_runs_has_a_prediction_and_nothing_else_has():
    there = {line["row"] for line in ablations.read()}
    assert there <= set(ablations.PREDICTED) <= set(ablations.ROWS)


def test_ten_rows_lie_below_the_base_by_more_than_their_interval_and_3008_samples_above_320():
    lines = ablations.read()
    there = {line["row"] for line in lines}
    apart = [row for row in list(ablations.ROWS)[1:] if row in there and ablations.side(lines, row)]
    assert len(apart) >= 10
    gains = ablations.differences(lines, "3008 samples", base="320 samples")
    mean, half = ablations.interval(gains)
    assert mean - half > 0.1


def test_at_three_times_the_rate_every_seed_lists_coordinates_and_most_is_learnt_in_63_steps():
    lines = ablations.read()
    long = [line for line in lines if line["row"] == "3008 samples"]
    third = [line for line in lines if line["row"] == "base"]
    assert len(long) == 5 and min(line["places"] for line in long) > 0.8
    rise = lambda runs: np.mean([line["gIoU"] - line["base_gIoU_lenient"] for line in runs])
    assert rise(third) > 0.85 * rise(long)


def test_two_seeds_are_told_one_by_one_and_a_row_is_apart_where_both_are_or_where_its_interval_is():
    shifts = {"base": 0, "G = 2": -0.1, "G = 16": 0.1, "rank 4": 0}
    for seeds, counted in (
        (1, r"±.*\*$"),
        (2, r"^\+0\.\d{3} \(\+0\.\d{3}, \+0\.\d{3}\)$"),
        (5, r"± 0\.\d{3}$"),
    ):
        lines = ablation_lines(shifts, seeds)
        assert [ablations.side(lines, row) for row in shifts] == [0, -1, 1, 0]
        assert re.search(counted, ablations.cells(lines, "G = 16")[2])
    two = ablation_lines(shifts, 2)
    [below] = [x for x in two if (x["row"], x["seed"]) == ("G = 16", 1)]
    below["scenes"] = [x - 0.2 for x in below["scenes"]]
    assert ablations.side(two, "G = 16") == 0  # one above, one below
    assert ablations.side(two, "G = 4") == 0  # no runs


def test_every_interval_that_notebook_5_and_its_note_quote_is_that_of_its_runs():
    lines, known = ablations.read(), set()
    for base, rows in (
        ("base", list(ablations.ROWS)[1:]),
        ("G = 16", ["G = 4"]),
        ("3008 samples", ["10000 samples", "3008 samples, beta 0"]),
        ("320 samples", ["G = 2"]),
        ("lr 1.5e-4", ["GRPO, lr 1.5e-4"]),
        ("lr 6e-4", ["GRPO, lr 6e-4", "box IoU, lr 6e-4"]),
    ):
        known |= {
            ablations.with_interval(ablations.differences(lines, row, measure, base), "+")
            for row in rows
            for measure in ablations.TESTED
        }
    [notebook] = TUTORIALS.glob("5*.ipynb")
    texts = [
        cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "markdown"
    ]
    texts.append((TUTORIALS / "notes" / "ablations.md").read_text())
    signed = r"[+-]\d\.\d{3}"
    quoted = re.findall(rf"{signed} (?:± \d\.\d{{3}}\*?|\({signed}, {signed}\))", "\n".join(texts))
    assert not set(quoted) - known and len(quoted) >= 10


def test_the_papers_figures_stand_beside_the_rows_that_repeat_its_tables():
    shown = {
        row: ablations.cells([], row)[3]
        for row in ("base", "threshold 0.5", "threshold 0.7", "threshold 0.8", "G = 2")
    }
    assert shown == {
        "base": "60.2",
        "threshold 0.5": "56.5",
        "threshold 0.7": "56.2",
        "threshold 0.8": "58.6",
        "G = 2": "",
    }
    assert [
        ablations.PAPER[row] for row in ("GRPO", "GRPO + token-level", "GRPO + clip-higher")
    ] == ["57.8", "58.0", "59.1"]
    switched = {
        row: parse_settings(
            ["--preset", "tiny", "--device", "cpu", *options.split()], "train.py", ""
        )[0]
        for row, options in ablations.ROWS.items()
    }
    assert (
        switched["GRPO"].normalise,
        switched["GRPO"].eps_high,
        switched["base"].normalise,
        switched["base"].eps_high,
    ) == ("sequence", 0.2, "token", 0.3)
    assert (switched["GRPO + token-level"].normalise, switched["GRPO + token-level"].eps_high) == (
        "token",
        0.2,
    )
    assert (switched["GRPO + clip-higher"].normalise, switched["GRPO + clip-higher"].eps_high) == (
        "sequence",
        0.3,
    )


def test_an_ablation_that_was_stopped_halfway_goes_on_and_else_starts_anew_in_a_folder_of_its_own(
    tmp_path, monkeypatch
):
    commands = []
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    monkeypatch.setattr(
        ablations.subprocess,
        "run",
        lambda command, **_: commands.append(command)
        or SimpleNamespace(returncode=1, stderr="disk full"),
    )
    folder = tmp_path / "runs" / "ablations" / "112-samples-seed0"
    for saved in ("metrics.jsonl", "state.pt"):  # a run without a saved state cannot go on
        folder.mkdir(parents=True, exist_ok=True)
        (folder / saved).touch()
        if commands:  # what the first one has written down
            begun, _ = parse_settings(commands[0][2:], "train.py", "")
            (folder / "settings.json").write_text(json.dumps(asdict(begun)))
        with pytest.raises(RuntimeError, match="112 samples, seed 0: disk full"):
            ablations.one_run("112 samples", 0)
        assert ("--resume" in commands[-1]) == folder.exists() == (saved == "state.pt")
    monkeypatch.setitem(
        ablations.ROWS, "112 samples", "--samples 112 --group 4"
    )  # --resume would keep the old ones
    with pytest.raises(RuntimeError, match=f"another group .*{folder}"):
        ablations.one_run("112 samples", 0)
    for row in ablations.ROWS:
        with pytest.raises(RuntimeError):
            ablations.one_run(row, 1)
    assert len({command[command.index("--run") + 1] for command in commands}) == 1 + len(
        ablations.ROWS
    )


@pytest.mark.parametrize("saved", ["metrics.jsonl", "state.pt"])
def test_a_run_that_another_program_is_making_is_refused_and_keeps_its_files(
    saved, tmp_path, monkeypatch
):
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    folder = tmp_path / "runs" / "ablations" / "base-seed0"
    folder.mkdir(parents=True)
    (folder / saved).touch()
    with FileLock(folder / "lock"), pytest.raises(UserError, match="base-seed0: another program"):
        ablations.one_run("base", 0)
    assert (folder / saved).exists()


def test_a_runs_folder_goes_only_when_its_line_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    monkeypatch.setattr(ablations, "figures_of", lambda folder: {"scenes": [0.5]})
    folder = tmp_path / "runs" / "ablations" / "base-seed0"
    monkeypatch.setattr(
        ablations.subprocess,
        "run",
        lambda command, **_: folder.mkdir(parents=True) or SimpleNamespace(returncode=0),
    )

    def full(line):
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        ablations.one_run("base", 0, full)
    assert folder.is_dir()
    shutil.rmtree(folder)
    kept = []
    line = ablations.one_run("base", 0, kept.append)
    assert kept == [line] and line["row"] == "base" and not folder.exists()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--results", "mine"], "--results mine"),
        (["--workers", "0"], "--workers"),
        (["--figure", "no/such/folder/x.png"], "--figure no/such/folder/x.png"),
        (["--table"], "ablations.csv"),
        (["--rows", "base"], "base, seed 0: disk full"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_hours_of_runs_and_so_is_a_run_that_fails(
    options, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    monkeypatch.setattr(ablations, "FILE", tmp_path / "ablations.csv")
    monkeypatch.setattr(
        ablations.subprocess,
        "run",
        lambda command, **_: SimpleNamespace(returncode=1, stderr="disk full"),
    )
    monkeypatch.setattr(sys, "argv", ["ablations.py", "--seeds", "1", *options])
    with pytest.raises(SystemExit) as left:
        ablations.main()
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert left.value.code == 2 and len(errors) == 1 and words in errors[0]


def line_of(row, seed, giou):
    """A line as one_run returns it, with three scenes of the same gIoU."""
    names = (*ablations.TESTED, *ablations.LAST, *ablations.STYLES)
    lists = {"ids": ["a", "b", "c"], "scenes": [giou] * 3, "lenient": [giou] * 3}
    line = {"row": row, "seed": seed, "options": ablations.ROWS[row]}
    return line | dict.fromkeys(names, f"{giou:.4g}") | lists


@pytest.fixture
def rows_put_back(monkeypatch):
    monkeypatch.setattr(ablations, "ROWS", dict(ablations.ROWS))


def test_a_challenge_makes_five_runs_with_its_options_and_prints_a_row(
    tmp_path, monkeypatch, capsys, rows_put_back
):
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    monkeypatch.setattr(ablations, "FILE", tmp_path / "committed.csv")
    for seed in range(5):
        ablations.write(line_of("base", seed, 0.4 + seed / 100))

    def one_run(row, seed, keep):
        line = line_of(row, seed, 0.5 + seed / 100)
        keep(line)
        return line

    monkeypatch.setattr(ablations, "one_run", one_run)
    with redirect_stderr(StringIO()):
        ablations.main(["--challenge", "my idea", "--group", "16", "--no-points"])
    file = tmp_path / "runs" / "challenge.csv"
    lines = ablations.read(file)
    assert [line["options"] for line in lines] == ["--group 16 --no-points"] * 5
    half = 2.776 * np.std([0.5, 0.51, 0.52, 0.53, 0.54], ddof=1) / 5**0.5  # Student's t
    printed = f"| my idea: `--group 16 --no-points` | 0.520 ± {half:.3f} | 5 |\nagainst base: "
    assert capsys.readouterr().out == f"{printed}+0.100 ± 0.000\n"
    for seed in range(5):
        ablations.write(line_of("base", seed, 0.5 + seed / 100), file)
    ablations.print_challenge(ablations.read(file), "my idea")
    assert capsys.readouterr().out == f"{printed}+0.000 ± 0.000\n"  # own runs of base come first


def test_a_second_challenge_of_the_same_name_with_other_options_is_refused(
    tmp_path, monkeypatch, rows_put_back
):
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    monkeypatch.setitem(ablations.ROWS, "my idea", "--group 16")
    (tmp_path / "runs").mkdir()
    ablations.write(line_of("my idea", 0, 0.5), tmp_path / "runs" / "challenge.csv")
    del ablations.ROWS["my idea"]
    with pytest.raises(SystemExit, match="'my idea' with the options '--group 16'"):
        ablations.main(["--challenge", "my idea", "--group", "4"])


def test_two_challenges_whose_files_would_have_the_same_name_are_refused(
    tmp_path, monkeypatch, capsys, rows_put_back
):
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    monkeypatch.setitem(ablations.ROWS, "my idea", "")
    (tmp_path / "runs").mkdir()
    ablations.write(line_of("my idea", 0, 0.5), tmp_path / "runs" / "challenge.csv")
    del ablations.ROWS["my idea"]
    with pytest.raises(SystemExit):
        ablations.main(["--challenge", "My-idea"])
    assert "two rows" in capsys.readouterr().err


def test_options_of_a_challenge_with_spaces_reach_the_training(
    tmp_path, monkeypatch, rows_put_back
):
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    commands = []

    def run(command, **_):
        commands.append(command)
        return SimpleNamespace(returncode=1, stderr="stopped here")

    monkeypatch.setattr(ablations.subprocess, "run", run)
    monkeypatch.setattr(ablations, "parse_settings", lambda *_: None)
    with redirect_stderr(StringIO()), pytest.raises(SystemExit):
        ablations.main(["--challenge", "x", "--seeds", "1", "--prompt-file", "my prompt.txt"])
    assert commands[0][-2:] == ["--prompt-file", "my prompt.txt"]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--challenge", "base"], "--challenge 'base'"),
        (["--challenge", " "], "--challenge ' '"),
        (["--challenge", "猫"], "--challenge '猫'"),
        (["--challenge", "a | b"], "--challenge 'a | b'"),
        (["--challenge", "x", "--start-from", "seed0/adapter"], "--start-from"),
        (["--challenge", "x", "--rows", "base"], "--rows"),
        (["--challenge", "x", "--results", "no/such/x.txt"], "--results"),
        (["--challenge", "x", "--table"], "no runs"),
        (["--challenge", "x", "--samples=16"], "--samples=16"),
        (["--challenge", "x", "--seed", "3"], "--seed"),
        (["--challenge", "x", "--group", "0"], "group"),
        (["--challenge", "x", "--groups", "4"], "--groups"),
        (["--group", "4"], "--group 4"),
    ],
)
def test_a_mistake_in_a_challenge_is_named_before_any_run(
    options, words, tmp_path, monkeypatch, capsys, rows_put_back
):
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    with pytest.raises(SystemExit) as left:
        ablations.main(options)
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert left.value.code == 2 and len(errors) == 1 and words in errors[0]


def test_two_rows_whose_files_would_have_the_same_name_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        ablations, "ROWS", ablations.ROWS | {"Beta = 0.05": "--beta 0.05 --group 4"}
    )
    monkeypatch.setattr(sys, "argv", ["ablations.py", "--table"])
    with pytest.raises(SystemExit):
        ablations.main()
    assert "two rows" in capsys.readouterr().err


def ablation_lines(shifts, seeds=5, scenes=200):
    """Lines as ablations.read() gives them: a row's shift, what seeds and scenes add to all rows alike, and a rest of
    their own."""
    rng = np.random.default_rng(0)
    shared, rows = 0.6 + 0.03 * rng.normal(size=(seeds, 1)) + 0.2 * rng.normal(size=scenes), []
    for row, shift in shifts.items():
        table = (
            shared
            + shift
            + 0.02 * rng.normal(size=(seeds, 1))
            + 0.1 * rng.normal(size=scenes)
            + 0.1 * rng.normal(size=(seeds, scenes))
        )
        rows += [
            {"row": row, "seed": seed, "gIoU": figures.mean(), "scenes": figures.tolist()}
            for seed, figures in enumerate(table)
        ]
    return rows


def test_a_run_leaves_a_line_and_the_giou_of_each_scene_and_both_are_read_again(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    monkeypatch.setattr(ablations, "FILE", tmp_path / "results" / "ablations.csv")
    monkeypatch.setattr(ablations, "SCENES", 3)
    figures, ids = [0.25, 0.0, 0.98765], [
        "shapes-2000000000",
        "shapes-2000000001",
        "shapes-2000000002",
    ]
    texts = ["The red star"] * 36 + [
        "<think>I see the red star. It",
        "<think>I see the red star. It",
        "<think>I see the red star (3, 4). It",
        "A star",
    ]

    def train(command, **_):
        folder = ablations.Path(command[command.index("--run") + 1])
        folder.mkdir(parents=True)
        scores = {
            "gIoU": 0.41,
            "gIoU_lenient": 0.5,
            "cIoU": 0.4,
            "format": 1.0,
            "box_accuracy": 0.2,
            "by_kind": {kind: {"gIoU_lenient": 0.1 * i} for i, kind in enumerate(ablations.KINDS)},
        }
        contents = {
            "summary.json": [{"trained": scores, "base": scores | {"gIoU_lenient": 0.3}}],
            "test-trained.json": [
                [{"id": i, "iou": 1.0, "iou_strict": x} for i, x in zip(ids, figures)]
            ],
            "metrics.jsonl": [{name: step for name in ablations.LAST} for step in range(20)],
            "answers.jsonl": [{"text": text} for text in texts],
        }
        for name, lines in contents.items():
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(ablations.subprocess, "run", train)
    for seed in (0, 1):
        ablations.write(ablations.one_run("no points", seed))
    first, second = ablations.read()
    assert (
        first["scenes"] == [0.25, 0.0, 0.988]
        and second == first | {"seed": 1}
        and not list((tmp_path / "runs" / "ablations").iterdir())
    )
    assert (
        first["names"],
        first["places"],
        first["combined"],
        first["length"],
        first["base_gIoU_lenient"],
    ) == (0.5, 0.25, 0.4, 14.5, 0.3)
    told = "'no points' with the options '--no-points'"
    with monkeypatch.context() as changed, pytest.raises(SystemExit, match=told):
        changed.setitem(
            ablations.ROWS, "no points", "--no-points --group 4"
        )  # these runs are of another row
        ablations.read()
    mine = tmp_path / "mine.csv"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "ablations.py",
            "--seeds",
            "1",
            "--rows",
            "base",
            "--workers",
            "1",
            "--results",
            str(mine),
        ],
    )
    with redirect_stderr(StringIO()):
        ablations.main()
    assert len(ablations.read()) == 2 and [x["row"] for x in ablations.read(mine)] == ["base"]
    with gzip.open(tmp_path / "mine/base-seed0.json.gz") as file:
        lists = json.load(file)
    assert lists == {"ids": ids, "iou_strict": [0.25, 0.0, 0.988], "iou": [1.0, 1.0, 1.0]}
    ids.reverse()
    with pytest.raises(RuntimeError, match="3 test scenes"):
        ablations.one_run("no points", 2)
    new = tmp_path / "results" / "ablations" / "no-points-seed1.json.gz"
    old = new.with_suffix("")
    old.write_text("[0.5]")
    ablations.write_scenes(
        ablations.read()[1] | {"ids": [], "scenes": [], "lenient": []}, ablations.FILE
    )
    assert new.exists() and not old.exists()
    new.unlink()
    with pytest.raises(SystemExit, match="no-points-seed1.json"):
        ablations.read()


def test_a_figure_of_ablations_has_a_dot_a_seed_and_the_intervals_of_its_table():
    lines = ablation_lines({"base": 0, "no points": 0.02, "G = 2": -0.08})
    figure = ablations.draw(lines, ["points", "group"])
    dots = [line.get_xdata() for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    mean = {(line["row"], line["seed"]): np.mean(line["scenes"]) for line in lines}
    assert np.concatenate(dots) == pytest.approx(
        [mean[row, s] - mean["base", s] for row in ("no points", "G = 2") for s in range(5)]
    )
    lower = [
        line | {"scenes": [x - 0.4 for x in line["scenes"]]} if line["row"] == "G = 2" else line
        for line in lines
    ]
    far = ablations.draw(lower, ["points", "group"]).axes[0]
    # one scale for all tables
    assert (
        far.get_xlim()
        == figure.axes[0].get_xlim()
        == ablations.draw(lines, ["points"]).axes[0].get_xlim()
    )
    assert [text.get_text() for text in far.texts] == [
        "← " + ablations.cells(lower, "G = 2")[2]
    ] and not figure.axes[0].texts
    assert len([line for line in far.get_lines() if line.get_marker() == "o"]) == 1
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["points", "no points", "group", "G = 2"]
    alone = [line for line in lines if line["row"] != "G = 2" or not line["seed"]]
    axes = ablations.draw(alone, ["points", "group"]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "points",
        "no points",
        "group",
        "G = 2*",
    ]
    assert "one seed" in axes.get_xlabel() and "one seed" not in figure.axes[0].get_xlabel()


@pytest.mark.parametrize("count", [2, 3, 5, 8, 10])
def test_intervals_of_one_value_a_seed_hold_95_percent_of_students_t(count):
    values = np.random.default_rng(0).normal(0.7, 0.03, count)
    mean, half = ablations.interval(values.tolist())
    x = np.linspace(-1000, 1000, 4_000_001)
    density = (1 + x**2 / (count - 1)) ** (
        -count / 2
    )  # Student's t with count - 1 degrees of freedom, up to a factor
    inside = density[abs(x) <= half / (values.std(ddof=1) / np.sqrt(count))].sum() / density.sum()
    assert mean == pytest.approx(values.mean()) and inside == pytest.approx(0.95, abs=2e-3)


@pytest.mark.parametrize(
    "seeds, of_seed, of_scene, of_rest",
    [(5, 0.02, 0.3, 0.3), (5, 0.1, 0.1, 0.3), (5, 0.0, 0.5, 0.1), (1, 0.0, 0.3, 0.3)],
)
def test_an_interval_over_seeds_and_scenes_holds_the_true_mean_19_times_of_20(
    seeds, of_seed, of_scene, of_rest
):
    rng, held, tries = np.random.default_rng(0), 0, 400
    for _ in range(tries):
        table = (
            of_seed * rng.normal(size=(seeds, 1))
            + of_scene * rng.normal(size=(1, 100))
            + of_rest * rng.normal(size=(seeds, 100))
        )
        mean, half = ablations.interval(table)
        held += abs(mean) <= half
    assert 0.92 <= held / tries <= 0.98  # four standard errors of 400 tries are 0.04


def test_a_difference_is_taken_seed_by_seed_and_scene_by_scene():
    base = [line for line in ablation_lines({"base": 0})]
    moved = [
        line | {"row": "no points", "scenes": [x + 0.01 for x in line["scenes"]]}
        for line in base[::-1]
    ]
    other = (
        base + moved[:-1] + [moved[0] | {"seed": 9}]
    )  # a seed that base lacks, and one that it has alone
    apart, means = ablations.differences(other, "no points"), ablations.values_of(
        other, "no points", "gIoU"
    )
    assert ablations.interval(apart) == pytest.approx((0.01, 0.0), abs=1e-9) and len(apart) == 4
    assert ablations.interval(list(means.values()))[1] > 0.01
    back = ablations.differences(other, "base", base="no points")
    assert ablations.interval(back) == pytest.approx((-0.01, 0.0), abs=1e-9)


def test_a_table_says_where_one_seed_speaks_of_scenes_only(capsys):
    ablations.print_table(ablation_lines({"base": 0, "no points": 0.1}, seeds=1), "points")
    table = capsys.readouterr().out
    assert table.count("*") == 4 and ablations.PREDICTED["no points"] in table
    ablations.print_table(ablation_lines({"base": 0, "no points": 0.1}), "points")
    assert "*" not in capsys.readouterr().out


def test_the_variance_over_seeds_and_scenes_counts_what_belongs_to_neither_once():
    rng = np.random.default_rng(0)
    table = (
        0.2 * rng.normal(size=(5, 1))
        + 0.4 * rng.normal(size=(1, 80))
        + 0.3 * rng.normal(size=(5, 80))
    )
    rest = np.array(
        [
            [table[i, j] - table[i].mean() - table[:, j].mean() + table.mean() for j in range(80)]
            for i in range(5)
        ]
    )
    parts = np.array(
        [
            table.mean(1).var(ddof=1) / 5,
            table.mean(0).var(ddof=1) / 80,
            (rest**2).sum() / (4 * 79) / 400,
        ]
    )
    assert min(parts[:2]) > parts[2]
    variance = parts @ [1, 1, -1]
    degrees = variance**2 / (parts**2 / [4, 79, 4 * 79]).sum()  # Satterthwaite
    assert (
        ablations.interval(table)
        == pytest.approx((table.mean(), ablations.student(degrees) * variance**0.5))
        and degrees > 4
    )


def test_a_run_gets_its_rows_options_its_own_seed_and_one_thread(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(
        ablations.subprocess,
        "run",
        lambda command, env, **_: started.append((command[2:], env.get("OMP_NUM_THREADS")))
        or SimpleNamespace(returncode=1, stderr=""),
    )
    read = lambda options: replace(parse_settings(options, "train.py", "")[0], run="")
    common = [
        "--preset",
        "tiny",
        "--device",
        "cpu",
        "--processes",
        "1",
        "--eval-every",
        "0",
        "--seed",
        "3",
        "--samples",
        "1008",
        "--lr",
        "3e-4",
        "--test-samples",
        "1000",
    ]
    for row, options in ablations.ROWS.items():
        with pytest.raises(RuntimeError):
            ablations.one_run(row, 3)
        asked, threads = started.pop()
        if row in ablations.BY_FUNCTION:
            assert asked.pop(0) == row
        assert read(asked) == read(common + options.split()) and threads == "1"


def a_line(row, seed):
    return dict.fromkeys(ablations.COLUMNS, "0.5") | {
        "row": row,
        "seed": seed,
        "options": ablations.ROWS[row],
        "ids": ["a", "b", "c"],
        "scenes": [0.4, 0.5, 0.6],
        "lenient": [0.4, 0.5, 0.7],
    }


def test_only_runs_that_the_file_lacks_are_made_and_seed_after_seed(tmp_path, monkeypatch):
    made, file = [], tmp_path / "mine.csv"
    ablations.write(a_line("base", 0), file)
    monkeypatch.setattr(
        ablations,
        "one_run",
        lambda row, seed, keep: made.append((row, seed)) or keep(a_line(row, seed)),
    )
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "ablations.py",
            "--seeds",
            "2",
            "--rows",
            "base",
            "no points",
            "--workers",
            "1",
            "--results",
            str(file),
        ],
    )
    for _ in range(2):
        with redirect_stderr(StringIO()):
            ablations.main()
    assert (
        made == [("no points", 0), ("base", 1), ("no points", 1)] and len(ablations.read(file)) == 4
    )


def test_a_file_with_other_columns_is_not_taken_for_runs(tmp_path):
    (tmp_path / "mine.csv").write_text("row,seed,options\nbase,0,\n")
    with pytest.raises(SystemExit, match="mine.csv"):
        ablations.read(tmp_path / "mine.csv")
