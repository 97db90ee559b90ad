"""The assignment: the solution passes, the open file fails politely, and common mistakes are noticed."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tutorials" / "assignment"
SOLUTION = FOLDER / "solutions" / "my_samr1.py"
sys.path.insert(0, str(FOLDER))

import find_bugs
import program
import test_my_samr1
import train_mine

from samr1_mini.config import UserError, make_settings
from samr1_mini.grpo import train
from samr1_mini.runs import read_log
from samr1_mini.trace import read_trace
from tutorials.assignment.functions import load_functions


def graded(file):
    """The result of the command that grades a file, as a lecturer types it."""
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-p", "no:cacheprovider", "-q"]
    command += ["--file", str(file)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)


def test_the_solution_passes_all_tests():
    done = graded(SOLUTION)
    page = (FOLDER / "README.md").read_text()
    count, total = re.search(r"(\d+) of the (\d+) tests", page).groups()
    assert done.returncode == 0 and f"{total} passed" in done.stdout, done.stdout[-1000:]
    assert int(count) == len(test_my_samr1.FAULTS) + 4  # tests with right answers


def test_the_open_file_fails_every_test_with_one_sentence_and_without_a_traceback():
    done = graded(FOLDER / "my_samr1.py")
    assert done.returncode == 1 and "passed" not in done.stdout
    names = ("read_answer", "to_picture", "iou", "accuracy_reward", "advantages", "token_weights")
    for name in (*names, "kl", "loss", "packed_row", "one_step"):
        assert f"{name} is not written yet." in done.stdout
    assert "Traceback" not in done.stdout and "raise NotImplementedError" not in done.stdout


# Each: a line of the solution, and a common mistake in its place.
MISTAKES = {
    "text after the answer": ("FORM.fullmatch(text.strip())", "FORM.search(text)"),
    "width and height swapped": ("width / side, height / side", "height / side, width / side"),
    "labels scaled": ("[x * sx, y * sy, label]", "[x * sx, y * sy, label * sx]"),
    "empty masks": ("        return 1.0\n    return (mask", "        return 0.0\n    return (mask"),
    "tiers with >=": ("if iou > 0.7", "if iou >= 0.7"),
    "std with G - 1": ("rewards.std(correction=0)\n", "rewards.std()\n"),
    "equal rewards": ("    if std < 1e-6:\n        return torch.zeros_like(rewards)\n", ""),
    "other normaliser": ('normalise == "token"', 'normalise == "sequence"'),
    "KL the wrong way round": ("gap = reference - logp", "gap = logp - reference"),
    "symmetric clip": ("1 + eps_high)", "1 + eps_low)"),
    "maximum": ("torch.minimum(ratio", "torch.maximum(ratio"),
    "clip without minimum": ("torch.minimum(ratio * each, clipped * each)", "clipped * each"),
    "mean over answers": ('token_weights(lengths, "token")', 'token_weights(lengths, "sequence")'),
    "KL added to the objective": ("- beta * kl", "+ beta * kl"),
    "sign of the loss": ("return -(token_weights", "return (token_weights"),
    "positions go on": (
        "torch.arange(prompt, prompt + length)",
        "torch.arange(start, start + length)",
    ),
    "answers see each other": (
        "visible[start:end, start:end] = torch.ones(length, length).tril().bool()",
        "visible[start:end, prompt:end] = "
        "torch.ones(end - prompt, end - prompt).tril().bool()[start - prompt:]",
    ),
    "the first answer sees all of itself": (
        "visible[start:end, start:end] = torch.ones(length, length).tril().bool()",
        "visible[start:end, start:end] = torch.ones(length, length).tril().bool() | (start == prompt)",
    ),
    "prompt without itself": (
        "torch.ones(prompt, prompt).tril()",
        "torch.ones(prompt, prompt).tril(-1)",
    ),
    "prompt sees the next token": (
        "torch.ones(prompt, prompt).tril()",
        "torch.ones(prompt, prompt).tril(1)",
    ),
    "reversed boxes": (" or box[3] <= box[1]:", " or box[3] == box[1]:"),
    "long points": ("len(point) != 3", "len(point) < 3"),
    "text before the answer": (
        "FORM.fullmatch(text.strip())",
        're.search(FORM.pattern + "$", text, re.DOTALL)',
    ),
    "no bound": ("abs(value) < 1e6  #", "abs(value) < 1e300  #"),
    "NaN in points": (
        "not all(map(is_number, point))",
        "not all(type(x) in (int, float) for x in point)",
    ),
    "prompt sees all": (".tril().bool()\n    start = prompt", ".bool()\n    start = prompt"),
    "rewards of another answer": (
        "advantages(rewards), lengths",
        "advantages(rewards.roll(1)), lengths",
    ),
    "one update a sample": (
        "        total += rewards",
        "        tools.update()\n        total += rewards",
    ),
    "losses added up": ("(of_group / len(samples))", "of_group"),
    "first sample only": ("zip(samples, tools", "zip(samples[:1], tools"),
    "picture's size swapped": ("*sample.image.size)", "*sample.image.size[::-1])"),
    "KL without a gradient": ("- beta * kl(logp, ref", "- beta * kl(logp.detach(), ref"),
    "old and reference swapped": ("logp, old, reference = tools", "logp, reference, old = tools"),
    "one line of thought": (", re.DOTALL", ""),
    "texts as numbers": ("return type(value) in (int, float) and abs(value) < 1e6", "return True"),
    "rounded points": ("[x * sx, y * sy, label]", "[round(x * sx), round(y * sy), label]"),
    "rounded box": ("return [x1 * sx, y1 * sy,", "return [round(x1 * sx), round(y1 * sy),"),
    "IoU as a tensor": ("(mask & truth).sum().item() / union", "(mask & truth).sum() / union"),
    "flat groups skipped": (
        "        (of_group / len(samples)).backward()",
        "        if rewards.std() > 0:\n            (of_group / len(samples)).backward()",
    ),
    "deep JSON": ("(ValueError, RecursionError)", "ValueError"),
    "no backward": ("(of_group / len(samples)).backward()", "of_group / len(samples)"),
    "no update": ("    tools.update()\n", ""),
    "keys not checked": (
        'content.get("bbox"), content.get("points")',
        'content["bbox"], content["points"]',
    ),
    "points of any type": ("not isinstance(points, list) or not points", "not points"),
    "boxes of any type": ("not isinstance(box, list) or len(box)", "len(box)"),
    "objects of any type": ("    if not isinstance(content, dict):\n        return None\n", ""),
    "no lower bound": ("abs(value) < 1e6  #", "value < 1e6  #"),
    "true as a number": ("type(value) in (int, float)", "isinstance(value, (int, float))"),
    "whole numbers only": ("type(value) in (int, float)", "type(value) is int"),
    "no label 0": ("not in (0, 1)", "!= 1"),
    "no whitespace": ("text.strip()", "text"),
    "a tag twice": (" or any(text.count(tag) != 1 for tag in TAGS)", ""),
    "weights for two answers": ("(len(lengths) * length)", "(2 * length)"),
    "eps not used": ("ratio.clamp(1 - eps_low, 1 + eps_high)", "ratio.clamp(0.8, 1.3)"),
    "linear ratio": ("(logp - old).exp()", "1 + logp - old"),
    "the third answer sees the first": (
        "        start = end\n",
        "        visible[end:, prompt:start] = True\n        start = end\n",
    ),
    "points not used": ("tools.mask(sample, box, points)", "tools.mask(sample, box, [])"),
    "points not scaled": (
        "tools.mask(sample, box, points)",
        'tools.mask(sample, box, answer["points"])',
    ),
    "no reward for the format": ("return 2.0 + accuracy", "return accuracy"),
}


def failures(file):
    """The names of the grading tests that fail for a file. They run in this process."""
    mine = train_mine.load_functions(file)
    failed = []
    for name, test in vars(test_my_samr1).items():
        if not name.startswith("test_"):
            continue
        cases = [{}]
        if "fault" in inspect.signature(test).parameters:
            cases = [{"fault": fault, "text": text} for fault, text in test_my_samr1.FAULTS]
        for case in cases:
            try:
                test(mine, **case)
            except AssertionError:  # another error would not show that the test notices the mistake
                failed.append(name)
    return failed


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_common_mistake_is_noticed(mistake, tmp_path):
    right, wrong = MISTAKES[mistake]
    text = SOLUTION.read_text()
    assert right in text
    (tmp_path / "mine.py").write_text(text.replace(right, wrong, 1))
    assert failures(tmp_path / "mine.py")


def test_the_solution_makes_no_grading_test_fail():
    assert failures(SOLUTION) == []


def test_the_training_with_the_solution_makes_a_step_and_says_how_it_ended(tmp_path):
    command = [sys.executable, str(FOLDER / "train_mine.py"), "--file", str(SOLUTION)]
    command += ["--steps", "1", "--test", "4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-500:]
    assert re.search(r"gIoU before 0\.\d+, after 0\.\d+", done.stdout)
    open_file = [*command[:3], str(FOLDER / "my_samr1.py"), *command[4:]]
    done = subprocess.run(open_file, cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and "one_step is not written yet" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_training_that_does_not_reach_the_bar_ends_with_an_error(monkeypatch, capsys):
    arguments = ["--file", str(SOLUTION), "--steps", "1", "--test", "4"]
    monkeypatch.setattr(train_mine, "STEPS", 1)
    monkeypatch.setattr(train_mine, "TEST", 4)
    monkeypatch.setattr(train_mine, "BAR", 1.0)
    with pytest.raises(SystemExit) as stopped:
        train_mine.main(arguments)
    assert stopped.value.code not in (0, None)
    monkeypatch.setattr(train_mine, "BAR", 0.0)
    train_mine.main(arguments)
    assert "Passed" in capsys.readouterr().out
    monkeypatch.setattr(train_mine, "TEST", 200)
    train_mine.main(arguments)
    assert "Not graded" in capsys.readouterr().out


def test_the_bar_lies_between_the_base_model_and_all_of_20_trainings_with_the_solution():
    measured = json.loads((ROOT / "tutorials/results/train-mine.json").read_text())
    after = measured["after"].values()
    assert len(after) == 20 and measured["before"] < train_mine.BAR < min(after)
    comment = (FOLDER / "train_mine.py").read_text()
    assert f"{min(after):.3f} to {max(after):.3f}" in comment and str(measured["before"]) in comment


@pytest.mark.parametrize(
    "text, word",
    [
        ("\nimport no_such_module\n", "line 2 cannot be loaded: ModuleNotFoundError"),
        ("def f(:\n", "line 1 cannot be loaded: SyntaxError"),
        ("raise ValueError('one\\ntwo')\n", "line 1 cannot be loaded: ValueError: one"),
        ("exit(0)\n", "SystemExit"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_named_in_one_line(text, word, tmp_path, capsys):
    file = tmp_path / "mine.txt"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_functions(file)
    assert str(file) in str(caught.value) and word in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(SystemExit) as stopped:
        train_mine.main(["--file", str(file)])
    assert stopped.value.code == 2 and word in capsys.readouterr().err


def test_an_error_in_an_imported_file_names_the_line_of_the_import(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_helper.py").write_text("x = 1\ny = 2\nf(\n")
    (tmp_path / "mine.py").write_text("\n\n\n\n\nimport broken_helper\n")
    with pytest.raises(UserError, match="mine.py, line 6 cannot be loaded"):
        load_functions(tmp_path / "mine.py")


def test_a_file_with_dataclasses_is_loaded_as_it_is_now_and_leaves_no_other_file(tmp_path):
    file = tmp_path / "mine.py"
    text = (
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class A:\n"
        "    x: int = 1\n"
    )
    file.write_text(text)
    assert load_functions(file).A().x == 1
    file.write_text(text.replace("1", "2"))  # same size, same second
    assert load_functions(file).A().x == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


@pytest.mark.parametrize(
    "text, word",
    [
        ("def two_steps(tools, samples):\n    return 1.0\n", "has no function one_step"),
        ("def one_step(tools, samples):\n    pass\n", "must return the mean reward, not None"),
        ("import torch\ndef one_step(tools, samples):\n    return torch.ones(2)\n", "mean reward"),
    ],
)
def test_a_file_without_a_usable_one_step_ends_with_one_line(text, word, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        train_mine.main(["--file", str(tmp_path / "mine.py"), "--steps", "1", "--test", "1"])
    assert stopped.value.code == 2 and word in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--steps", "--test"])
def test_a_training_needs_steps_and_held_out_questions(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_mine.main(["--file", str(SOLUTION), option, "0"])
    assert stopped.value.code == 2 and option in capsys.readouterr().err


def test_grading_a_file_that_cannot_be_loaded_ends_with_one_line(tmp_path):
    (tmp_path / "mine.py").write_text("def f(:\n")
    done = graded(tmp_path / "mine.py")
    [line] = [line for line in done.stdout.splitlines() if "mine.py" in line]
    assert done.returncode == 1 and "line 1" in line and "Traceback" not in done.stdout


def test_the_program_in_one_file_computes_what_the_package_computes(tmp_path):
    """Two steps by both programs, with the same seed: rewards and tokens are equal, sums nearly."""
    ours = program.main(["--run", str(tmp_path / "one"), "--steps", "2"])
    s, _ = make_settings(
        preset="tiny",
        device="cpu",
        run=str(tmp_path / "two"),
        questions=8,
        samples=16,
        lr=5e-4,
        temperature=0.9,
        warmup=0,
        eval_every=0,
        test_samples=2,
    )
    train(s)
    theirs = read_log(tmp_path / "two")
    assert len(ours) == len(theirs) == 2 and (tmp_path / "one" / "report.html").exists()
    for a, b in zip(ours, theirs):
        for name in ("reward", "iou", "length", "zero_variance", "unique"):
            assert a[name] == pytest.approx(b[name], rel=1e-6), name
        for name in ("kl", "entropy", "grad_norm", "ratio_max"):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-6), name


# -------------------------------------------------------------------------------- the bug hunt


@pytest.fixture(scope="module")
def correct_log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("correct")
    return program.main(["--run", str(folder), "--steps", "1"])


@pytest.mark.parametrize("number", range(1, 9))
def test_a_program_with_a_bug_runs_without_an_error_and_is_noticed(number, correct_log, tmp_path):
    file = tmp_path / "program.py"
    file.write_text(find_bugs.program_with_bug(number))
    log = load_functions(file).main(["--run", str(tmp_path / "run"), "--steps", "1"])
    assert "In step 1, " in find_bugs.first_difference(log, correct_log)


@pytest.fixture
def bugs(tmp_path, monkeypatch):
    """A copy of the folder bugs, without programs that somebody has repaired."""
    copy = tmp_path / "bugs"
    shutil.copytree(find_bugs.BUGS, copy, ignore=shutil.ignore_patterns("program_*.py"))
    monkeypatch.setattr(find_bugs, "BUGS", copy)
    return copy


def test_a_bug_is_handed_out_with_its_run_and_the_repaired_program_is_accepted(bugs, capsys):
    with pytest.raises(SystemExit) as stopped:
        find_bugs.main(["7", "--check"])
    assert stopped.value.code == 2 and "without --check" in capsys.readouterr().err
    assert find_bugs.main(["7"]) == 0
    with Image.open(bugs / "run_7" / "curves.png") as picture:
        assert picture.width > 1000
    for run in ("run_7", "run_correct"):
        assert (bugs / run / "report.html").stat().st_size < 8 * 2**20
    printed = dict(re.findall(r"^(\w+) +(\d+% +\d+)%$", capsys.readouterr().out, re.M))
    assert printed.keys() == set(find_bugs.COLUMNS)
    band = json.loads((bugs / "band.json").read_text())
    for column in find_bugs.COLUMNS:
        shares = [int(share) for share in printed[column].split("%")]
        for run, share in zip(("run_7", "run_correct"), shares):
            wanted = 100 * find_bugs.outside(read_log(bugs / run), band, column)
            assert share == pytest.approx(wanted, abs=0.51)
    program_file = bugs / "program_7.py"
    [[right, wrong]] = find_bugs.read_changes()["7"]
    program_file.write_text(program_file.read_text().replace(wrong, right))
    assert find_bugs.main(["7"]) == 0  # the learner's file stays
    assert find_bugs.main(["7", "--check"]) == 0
    assert "Repaired" in capsys.readouterr().out
    program_file.write_text(program_file.read_text().replace(right, wrong))
    assert find_bugs.main(["7", "--check"]) == 1
    assert "Not repaired. In step 1, " in capsys.readouterr().out
    program_file.write_text("def main(:\n")
    with pytest.raises(SystemExit) as stopped:
        find_bugs.main(["7", "--check"])
    assert stopped.value.code == 2 and "line 1" in capsys.readouterr().err


def test_no_bug_is_made_from_a_changed_program(tmp_path, monkeypatch):
    monkeypatch.setattr(find_bugs, "HERE", tmp_path)
    (tmp_path / "program.py").write_text("print(1)\n")
    with pytest.raises(UserError, match="program.py was changed"):
        find_bugs.program_with_bug(2)


def test_a_check_against_a_changed_program_is_refused(bugs, tmp_path, monkeypatch, capsys):
    text = (FOLDER / "program.py").read_text()
    changed = text.replace("centred = rewards - rewards.mean()", "centred = rewards")
    assert changed != text
    (tmp_path / "program.py").write_text(changed)
    find_bugs.main(["2"])
    monkeypatch.setattr(find_bugs, "HERE", tmp_path)
    with pytest.raises(SystemExit) as stopped:
        find_bugs.main(["2", "--check"])
    assert stopped.value.code == 2 and "program.py was changed" in capsys.readouterr().err


def test_a_program_runs_as_a_script_where_it_is_handed_out(tmp_path):
    file = find_bugs.BUGS / f"program_{os.getpid()}.py"  # git ignores this name
    file.write_text(find_bugs.program_with_bug(3))
    try:
        command = [sys.executable, str(file), "--run", str(tmp_path / "run"), "--steps", "1"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    finally:
        file.unlink()
    assert done.returncode == 0, done.stderr[-1000:]
    assert len(read_log(tmp_path / "run")) == 1


def test_a_run_without_steps_ends_with_one_line(bugs, capsys):
    (bugs / "run_2" / "metrics.jsonl").unlink()
    with pytest.raises(SystemExit) as stopped:
        find_bugs.main(["2"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "0 steps instead of 40" in error
    assert not (bugs / "program_2.py").exists()


def test_a_program_does_not_replace_a_run(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        program.main(["--run", str(tmp_path)])
    assert stopped.value.code == 2 and "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "{}"


def test_a_log_that_lacks_a_column_or_a_step_is_not_a_repair():
    log = [{"step": 1, "reward": 2.0}]
    assert find_bugs.first_difference(log, log) == ""
    assert "column reward" in find_bugs.first_difference([{"step": 1}], log)
    assert "column reward" in find_bugs.first_difference([{"step": 1, "reward": None}], log)
    assert "0 steps" in find_bugs.first_difference([], log)
    assert "log" in find_bugs.first_difference(None, log)
    assert "column step" in find_bugs.first_difference([1], log)


@pytest.mark.parametrize("number", [*range(1, 9), "correct"])
def test_the_committed_run_of_a_bug_is_whole_and_names_no_machine(number):
    folder = find_bugs.BUGS / f"run_{number}"
    assert [line["step"] for line in read_log(folder)] == list(range(1, 41))
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["run"] == f"bugs/run_{number}" and settings["seed"] == find_bugs.RUN_SEED
    assert len(read_trace(folder)) >= 5


def test_the_band_covers_all_steps_of_a_run():
    band = json.loads((find_bugs.BUGS / "band.json").read_text())
    for column in find_bugs.COLUMNS:
        low, high = np.array(band[column]["low"]), np.array(band[column]["high"])
        assert len(low) == 36 and (low <= high).all(), column
    assert (np.array(band["reward"]["low"]) < np.array(band["reward"]["high"])).all()


def test_the_share_outside_the_band_counts_steps_on_both_sides():
    log = [{"x": float(step)} for step in range(14)]  # running means 2, 3, ... 11
    band = {"x": {"low": [4.0] * 10, "high": [9.0] * 10}}
    assert find_bugs.outside(log, band, "x") == pytest.approx(0.4)
