"""Find a silent bug in a training program: `python tutorials/assignment/find_bugs.py 3`.

The command writes bugs/program_3.py: a program like program.py, with one bug that gives no error.
It also writes figures of a finished run of this program. In bugs/run_3, report.html is the page of
the run, and curves.png compares the run with correct runs. bugs/run_correct/report.html is the page
of a correct run.
Find the bug and repair it. `--check` tells if the program is repaired.
"""

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from subprocess import run

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))  # Python looks for modules only in the script's own folder

from samr1_mini.config import UserError
from samr1_mini.files import load_json, write_json
from samr1_mini.report import write_report
from samr1_mini.runs import read_log
from tutorials.assignment.functions import load_functions

BUGS = HERE / "bugs"
# SHA-256 of program.py: a changed program.py would make every check wrong.
PROGRAM = "6f6080e7f5eb4566d8e495f41d1bb0e9491b05c0e4b162f9eb7acac3de80a0d2"
BAND_SEEDS = range(5)  # seeds of the correct runs that make the band
RUN_SEED = 5  # seed of the runs with a bug, and of a sixth correct run
SMOOTH = 5  # steps in a running mean
COLUMNS = ("reward", "iou", "zero_variance", "unique", "length", "entropy")
COLUMNS += ("kl", "ratio_min", "ratio_max", "clip_low", "clip_high", "grad_norm")


def read_changes() -> dict[str, list]:
    """Return the changes that make each bug: pairs of correct and wrong lines of program.py."""
    return load_json(BUGS / "changes.json")


def correct_program() -> str:
    """Return the text of program.py. Raises UserError if it was changed."""
    text = (HERE / "program.py").read_text(encoding="utf-8")
    if hashlib.sha256(text.encode()).hexdigest() != PROGRAM:
        file = "tutorials/assignment/program.py"
        raise UserError(f"{file} was changed. Restore it, for example: git checkout {file}")
    return text


def program_with_bug(number: int) -> str:
    """Return the text of program.py with one bug, and with paths that fit the folder bugs."""
    text = correct_program()
    command = "tutorials/assignment/program.py --run runs/program"
    new_command = f"tutorials/assignment/bugs/program_{number}.py --run runs/program_{number}"
    moved = [[command, new_command], ["parents[2]", "parents[3]"]]
    for right, wrong in moved + read_changes()[str(number)]:
        assert text.count(right) == 1, right
        text = text.replace(right, wrong)
    return text


# ----------------------------------------------------------------------------- the band


def curve(log: list[dict], column: str) -> np.ndarray:
    """Return the running means of one column of a run. Each mean is over SMOOTH steps."""
    values = [line[column] for line in log]
    return np.convolve(values, np.full(SMOOTH, 1 / SMOOTH), mode="valid")


def read_run(folder: Path, band: dict) -> list[dict]:
    """Return the log of a run of the bug hunt. Raises UserError if it lacks steps."""
    log = read_log(folder)
    steps = len(band["reward"]["low"]) + SMOOTH - 1
    if len(log) != steps:
        raise UserError(f"{folder} has {len(log)} steps instead of {steps}. Restore the folder")
    return log


def outside(log: list[dict], band: dict, column: str) -> float:
    """Return the share of steps whose running mean is outside the range of the correct runs."""
    values = curve(log, column)
    low, high = np.array(band[column]["low"]), np.array(band[column]["high"])
    tolerance = 1e-4 * np.abs(high) + 1e-6  # the band is rounded
    return float(((values < low - tolerance) | (values > high + tolerance)).mean())


def draw_curves(number: int, log: list[dict], band: dict, file: Path) -> None:
    """Draw the columns of a run over the band of the correct runs."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    for axes, column in zip(figure.subplots(3, 4).flat, COLUMNS):
        low, high = band[column]["low"], band[column]["high"]
        steps = np.arange(len(low)) + SMOOTH
        axes.fill_between(steps, low, high, color="0.8", label="five correct runs")
        axes.plot(steps, curve(log, column), color="#0072B2", label=f"run {number}")
        axes.set_title(column, fontsize=10)
    figure.supxlabel("step")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=100)


# ----------------------------------------------------------------------------- commands


def hand_out(number: int) -> None:
    """Write the program that has the bug, and files about its run: page, curves, a correct page."""
    band = load_json(BUGS / "band.json")
    folder = BUGS / f"run_{number}"
    correct = BUGS / "run_correct"
    log, sixth = read_run(folder, band), read_run(correct, band)
    program = BUGS / f"program_{number}.py"
    if program.exists():
        print(f"{program} exists, and stays as it is.")
    else:
        program.write_text(program_with_bug(number), encoding="utf-8")
        print(f"program: {program}")
    print("The run below is of the program as it was handed out.")
    draw_curves(number, log, band, folder / "curves.png")
    print(f"page of its run: {write_report(folder)}")
    print(f"page of a correct run: {write_report(correct)}")
    print(f"curves beside five correct runs: {folder / 'curves.png'}")
    print("\nshare of the steps outside the band")
    print(f"{'column':15}{'run ' + str(number):>10}{'a sixth correct run':>22}")
    for column in COLUMNS:
        shares = [outside(one, band, column) for one in (log, sixth)]
        print(f"{column:15}{shares[0]:>10.0%}{shares[1]:>22.0%}")


def first_difference(ours: list[dict], right: list[dict]) -> str:
    """Compare two logs. Return a sentence about the first number that differs, or nothing."""
    if not isinstance(ours, list):
        return "The function main of your program does not return the log."
    if len(ours) != len(right):
        return f"Your program logged {len(ours)} steps instead of {len(right)}."
    for mine, correct in zip(ours, right):
        for column, value in correct.items():
            if not isinstance(mine, dict) or mine.get(column) is None:
                return f"Your program does not log the column {column}."
            if not np.isclose(mine[column], value, rtol=1e-3, atol=1e-6):
                values = f"{column} is {mine[column]:.5g} in your program"
                return f"In step {correct['step']}, {values} and {value:.5g} in a correct one."
    return ""


def check(number: int) -> str:
    """Run two steps of the learner's program and of program.py. Return the first difference."""
    correct_program()
    mine = load_functions(BUGS / f"program_{number}.py", "main")
    correct = load_functions(HERE / "program.py", "main")
    with tempfile.TemporaryDirectory() as folder:
        steps = ["--steps", "2"]
        logs = [
            mine.main(["--run", f"{folder}/mine", *steps]),
            correct.main(["--run", f"{folder}/correct", *steps]),
        ]
    return first_difference(*logs)


def make_run(program: Path, folder: Path, seed: int) -> None:
    """Run a program to its end. Its page is not kept, because it can be made from the log."""
    shutil.rmtree(folder, ignore_errors=True)  # an older run of the same name
    name = Path(os.path.relpath(folder, HERE)).as_posix()  # settings.json keeps the name of the run
    command = [sys.executable, str(program), "--seed", str(seed), "--run", name]
    run(command, check=True, cwd=HERE)
    (folder / "report.html").unlink()


def make_bug_run(number: int) -> None:
    """Run the program that has the bug. Git stores this run."""
    program = BUGS / f"making_{number}.py"
    program.write_text(program_with_bug(number), encoding="utf-8")
    try:
        make_run(program, BUGS / f"run_{number}", RUN_SEED)
    finally:
        program.unlink()


def make_band() -> None:
    """Make the correct runs: five for the band, and a sixth one."""
    with tempfile.TemporaryDirectory() as folder:
        logs = []
        for seed in BAND_SEEDS:
            run_folder = Path(folder) / f"seed{seed}"
            make_run(HERE / "program.py", run_folder, seed)
            logs.append(read_log(run_folder))
    sixth = BUGS / "run_correct"
    make_run(HERE / "program.py", sixth, RUN_SEED)
    band = {}
    for column in COLUMNS:
        curves = np.stack([curve(log, column) for log in logs])
        low, high = curves.min(0), curves.max(0)
        band[column] = {
            "low": [float(f"{value:.5g}") for value in low],
            "high": [float(f"{value:.5g}") for value in high],
        }
    write_json(BUGS / "band.json", band)


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code: 1 if a checked program is not repaired."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("number", nargs="?", type=int, choices=range(1, 9), help="of the bug")
    parser.add_argument("--check", action="store_true", help="tell if the program is repaired")
    parser.add_argument(
        "--make",
        action="store_true",
        help="make the committed run of this bug again or, without a number, the correct runs",
    )
    args = parser.parse_args(argv)
    if args.number is None and not args.make:
        parser.error("give the number of a bug, 1 to 8")
    if args.check and not (BUGS / f"program_{args.number}.py").is_file():
        parser.error(f"there is no program {args.number} yet: run the command without --check")
    try:
        if args.make and args.number is None:
            make_band()
            return 0
        if args.make:
            make_bug_run(args.number)
            return 0
        if not args.check:
            hand_out(args.number)
            return 0
        difference = check(args.number)
    except (UserError, OSError) as error:
        parser.error(str(error))
    if difference:
        print(f"Not repaired. {difference}")
        return 1
    print("Repaired: the first two steps give the same numbers as a correct program.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
