"""Power and equivalence of paired runs, and the functions behind four rows of the ablations."""

import inspect
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from samr1_mini.config import Settings, parse_settings
from samr1_mini.data import Sample
from samr1_mini.reward import Answer, Reward
from samr1_mini.tiny.shapes import Shapes
from tutorials import ablations, paired, row_functions

NOTES = Path(__file__).parent.parent / "tutorials" / "notes"


def t_values(tables):
    """The statistic of a paired t test for each row of differences [tries, seeds]."""
    count = tables.shape[1]
    return tables.mean(1) / (tables.std(1, ddof=1) / math.sqrt(count))


@pytest.mark.parametrize("count, effect", [(3, 3.26), (5, 1.68), (10, 1.00), (20, 0.66)])
def test_the_smallest_difference_is_found_in_80_of_100_experiments(count, effect):
    """The effects, in standard deviations, are those of published power tables (two-sided, 5 %)."""
    found = paired.smallest_difference(count, 2.0)
    assert found / 2 == pytest.approx(effect, abs=0.012)
    rng = np.random.default_rng(0)
    tables = found + 2.0 * rng.normal(size=(100_000, count))
    hits = abs(t_values(tables)) > paired.student(count - 1)
    assert hits.mean() == pytest.approx(0.8, abs=0.005)


def test_without_a_difference_the_power_is_the_level():
    for freedom in (1, 4, 30):
        assert paired.power(0.0, freedom) == pytest.approx(0.05, abs=2e-3)


def test_quantiles_of_student_are_those_of_the_tables():
    for freedom, one_sided, two_sided in (
        (1, 6.314, 12.706),
        (4, 2.132, 2.776),
        (30, 1.697, 2.042),
    ):
        assert paired.student(freedom, 0.95) == pytest.approx(one_sided, abs=2e-3)
        assert paired.student(freedom) == pytest.approx(two_sided, abs=2e-3)


@pytest.mark.parametrize("mean", [0.05, -0.05])
def test_settings_at_the_margin_are_called_equivalent_in_5_of_100_experiments(mean):
    rng = np.random.default_rng(1)
    tables = mean + 0.01 * rng.normal(size=(20_000, 5))
    called = [paired.equivalence_bound(row) <= 0.05 for row in tables]
    assert np.mean(called) == pytest.approx(0.05, abs=0.006)


def test_the_bound_is_where_the_two_one_sided_tests_stop_rejecting():
    row = np.array([0.01, -0.02, 0.03, 0.0, 0.015])
    bound = paired.equivalence_bound(row)
    limit = paired.student(4, 0.95)
    for margin, rejected in ((bound * 1.001, True), (bound * 0.999, False)):
        lower, upper = t_values(np.array([row + margin, margin - row]))
        assert (min(lower, upper) > limit) == rejected


def test_the_table_shows_both_numbers_and_marks_equivalent_rows(capsys):
    lines = []
    for seed in range(5):
        for row, shift in (("base", 0), ("no points", 0.01 * seed - 0.02)):
            scenes = [0.5 + shift, 0.7 + shift]
            lines.append({"row": row, "seed": seed, "gIoU": 0.6 + shift, "scenes": scenes})
    ablations.print_table(lines, "points")
    head, base, row = capsys.readouterr().out.strip().splitlines()
    apart = [-0.02, -0.01, 0.0, 0.01, 0.02]
    found = paired.smallest_difference(5, np.std(apart, ddof=1))
    bound = paired.equivalence_bound(apart)
    assert "detects" in head and "within" in head and "=" not in base
    assert f"{found:.3f}" in row and f"{bound:.3f}=" in row and bound < 0.05
    assert ablations.paired_cells(lines[:2], "no points") == ("", "")  # one seed


# ----------------------------------------------------------------------------- rows by function


def test_rows_without_runs_have_predictions_and_are_in_no_table(capsys):
    assert set(ablations.PREDICTED) == set(ablations.ROWS)
    lines = [line for line in ablations.read() if line["row"] in ("base", "beta 0")]
    ablations.print_table(lines, "KL")
    shown = capsys.readouterr().out
    assert "beta 0 " in shown and "beta 0.05" not in shown
    assert ablations.rows_of(lines, "controls") == ["base"]


def test_each_row_by_function_has_one_and_no_other_row_has(monkeypatch):
    monkeypatch.setattr(row_functions, "open_three", lambda s: [Shapes("train", 4), "b", "c"])
    changed = [row_functions.arguments(row, Settings()) for row in ablations.BY_FUNCTION]
    assert [set(names) for names in changed] == [{"loss"}, {"loss"}, {"reward_terms"}, {"sets"}]
    assert set(ablations.BY_FUNCTION) <= set(ablations.ROWS)
    with pytest.raises(KeyError):
        row_functions.arguments("base", Settings())


def test_the_notes_show_the_gspo_loss_of_the_ablations():
    assert inspect.getsource(row_functions.gspo_loss) in (NOTES / "extend.md").read_text()


def test_rows_of_half_and_double_the_rate_change_only_the_rate():
    rows = {"lr": "base"}
    rows |= {name: name for name in ("GRPO", "GRPO + clip-higher", "box IoU", "threshold 0.8")}
    read = lambda row: parse_settings(
        (ablations.FIXED + " " + ablations.ROWS[row]).split(), "train.py", ""
    )[0]
    for name, base in rows.items():
        for rate, value in (("1.5e-4", 1.5e-4), ("6e-4", 6e-4)):
            row = f"lr {rate}" if name == "lr" else f"{name}, lr {rate}"
            assert read(row) == replace(read(base), lr=value)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_dr_grpo_loss_is_its_papers_formula(beta):
    """In plain loops: the sum over all tokens of a group, divided by G and the largest length."""
    rng = np.random.default_rng(0)
    lengths = [[3, 7], [1, 5]]
    total = 16
    logp, old, reference = rng.normal(-1, 0.3, (3, total))
    advantage = np.repeat([1.5, -1.5, 0.5, -0.5], [3, 7, 1, 5])
    expected = 0.0
    for t in range(total):
        ratio = np.exp(logp[t] - old[t])
        gap = reference[t] - logp[t]
        clipped = min(max(ratio, 0.8), 1.3)
        term = min(ratio * advantage[t], clipped * advantage[t])
        expected -= (term - beta * (np.exp(gap) - gap - 1)) / (2 * 40)
    s = Settings(group=2, max_new_tokens=40, beta=beta, kl_bound=100.0)
    tensors = [torch.tensor(x) for x in (logp, old, reference)]
    if not beta:
        tensors[2] = None
    loss, values = row_functions.dr_grpo_loss(*tensors, torch.tensor(advantage), lengths, s)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert len(values["ratio"]) == total and ("kl" in values) == bool(beta)


def test_a_random_accuracy_depends_on_seed_question_and_answer_alone_and_has_all_tiers():
    def accuracy(seed, name, tokens):
        answer = Answer(112, reasoning_format=True, tokens=torch.tensor(tokens))
        reward = Reward(SimpleNamespace(id=name), answer, iou=0.9)
        return row_functions.random_accuracy(reward, Settings(seed=seed))

    terms = accuracy(0, "a", [1, 2])
    assert terms["reasoning_format"] == 1 and terms == accuracy(0, "a", [1, 2])
    tiers = [accuracy(0, "a", [n])["accuracy"] for n in range(400)]
    assert set(tiers) == {0.0, 2.0, 3.0, 4.0} and np.mean(tiers) == pytest.approx(2.25, abs=0.25)
    for seed, name in ((1, "a"), (0, "b")):
        assert tiers != [accuracy(seed, name, [n])["accuracy"] for n in range(400)]


def test_the_mask_of_another_question_leaves_everything_else():
    data = Shapes("train", 3)
    other = row_functions.OtherMasks(data)
    assert len(other) == 3 and other.ids == data.ids
    for i in range(3):
        assert other[i].question == data[i].question and other[i].id == data[i].id
        assert (other[i].mask == data[(i + 1) % 3].mask).all()
    assert (other[0].mask != data[0].mask).any()


def test_the_masks_of_another_question_come_with_their_objects_and_undecided_pixels():
    ignored = np.ones((2, 2), bool)
    data = [
        Sample(None, "a", np.zeros((2, 2), bool), "1", masks=[]),
        Sample(None, "b", ignored, "2", masks=[ignored], ignore=ignored),
    ]
    stand_in = SimpleNamespace(ids=["1", "2"], __len__=lambda: 2)
    other = row_functions.OtherMasks.__new__(row_functions.OtherMasks)
    other.data, other.ids = data, stand_in.ids
    first = other.sample_at(0)
    assert first.question == "a" and first.mask is ignored
    assert first.masks == [ignored] and first.ignore is ignored
    assert other.sample_at(1).masks == []


def test_the_loss_of_dr_grpo_is_the_same_under_both_normalisers():
    logp = torch.linspace(-2, -1, 10)
    terms = (logp, logp - 0.1, None, torch.linspace(-1, 1, 10), [[2, 3], [4, 1]])
    both = []
    for name in ("token", "sequence"):
        s = Settings(normalise=name, max_new_tokens=8)
        both.append(row_functions.dr_grpo_loss(*terms, s)[0])
    assert both[0] == both[1]


@pytest.mark.parametrize("argv", [[], ["--help"], ["no such row"]])
def test_a_row_that_needs_no_function_is_refused_in_one_line(argv):
    with pytest.raises(SystemExit, match="one of") as refused:
        row_functions.main(argv)
    assert "Dr. GRPO" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("row", ablations.BY_FUNCTION)
def test_a_row_by_function_trains_by_its_command(row, tmp_path):
    import subprocess

    script = NOTES.parent / "row_functions.py"
    options = f"{ablations.FIXED} --samples 4 --questions 4 --group 4 --updates 2 --test-samples 2"
    command = [sys.executable, str(script), row, *options.split(), "--run", str(tmp_path / "run")]
    command += ablations.ROWS[row].split()
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    [line] = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["grad_norm"] > 0
