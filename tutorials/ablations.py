"""Make the runs that ablations.csv lacks: `python tutorials/ablations.py`.

These ablations use the tiny policy and drawn pictures. The CSV has one line for each run. Ctrl-C
stops the command. The same command continues the runs, also in the middle of a run.
`--table` prints the runs, with 95 % intervals. `--figure FILE` draws them.

A row is a variant of "base". TABLES has the options of each row. A seed draws the same
questions for every row, and all runs are tested on the same scenes. So a row is compared with
"base" for each seed and each scene. For this, each run also leaves the IoU of each scene, in
results/ablations/ROW-seedN.json.gz (older runs: .json, without ids).
In the tables, "detects" is the smallest true difference from base that this number of seeds finds
with 80 % power. "within" is the smallest number m for which a test at the 5 % level shows that the
true difference lies between -m and m. "=" marks an m of at most 0.05. paired.py explains both.
PREDICTED holds the expected result of each row. It was committed before the first run. The
word "places" in it is the answer style that lists coordinates before it chooses an object.
`--challenge "my idea" --group 16` makes five runs of a new row, with the options of base and yours.
It prints the row of the README's table, and the difference from base. You may change the code
instead of options. Then take a new name for each change. The runs are kept in runs/challenge.csv,
or in the file of --results. If this file has no runs of base, the committed runs are used.
Each run has one thread, so that the results do not depend on the number of cores. Each core makes
one run at a time.
"""

import argparse
import csv
import gzip
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from threading import Lock

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # Python looks for modules only in the script's own folder

from samr1_mini.config import Parser, UserError, parse_settings, read_settings
from samr1_mini.files import load_json, only_program
from samr1_mini.launch import most_processes
from samr1_mini.tiny.scenes import KINDS
from samr1_mini.tiny.shapes import Shapes
from tutorials.paired import MARGIN, equivalence_bound, smallest_difference, student
from tutorials.tiny_world.answers import style_of

FILE = ROOT / "tutorials" / "results" / "ablations.csv"
SCENES = 1000  # held-out scenes of the test, the same for all runs
# The README's first command has three times the questions of base, and half its learning rate.
SAMPLES = 1008
FIXED = "--preset tiny --device cpu --processes 1 --eval-every 0 --lr 3e-4"
# Options that a row of --challenge must not change.
FIXED_BY_CHALLENGE = (
    "--data",
    "--device",
    "--eval-data",
    "--eval-every",
    "--objects",
    "--policy",
    "--preset",
    "--processes",
    "--questions",
    "--rehearse",
    "--resume",
    "--run",
    "--sam",
    "--samples",
    "--seed",
    "--start-from",
    "--test-samples",
)

# Tables of the paper, then tables that it lacks. Each has rows with their options. "base" is the
# first row of every table.
TABLES = {
    "table 3: accuracy reward": {
        "threshold 0.5": "--accuracy threshold:0.5",
        "threshold 0.7": "--accuracy threshold:0.7",
        "threshold 0.8": "--accuracy threshold:0.8",
    },
    "table 4: objective": {
        "GRPO": "--normalise sequence --eps-high 0.2",
        "GRPO + token-level": "--eps-high 0.2",
        "GRPO + clip-higher": "--normalise sequence",
    },
    "reward from": {"box IoU": "--accuracy box-iou", "continuous mask IoU": "--accuracy iou"},
    "points": {"no points": "--no-points"},
    "group": {"G = 2": "--group 2", "G = 4": "--group 4", "G = 16": "--group 16"},
    "LoRA": {
        "rank 4": "--rank 4",
        "rank 128": "--rank 128",
        "lr 1e-4": "--lr 1e-4",
        "lr 1e-3": "--lr 1e-3",
    },
    "KL": {
        "beta 0": "--beta 0",
        "beta 0.05": "--beta 0.05",
        "3008 samples, beta 0": "--samples 3008 --beta 0",  # compare with 3008 samples
    },
    "samples": {
        "112 samples": "--samples 112",
        "320 samples": "--samples 320",
        "3008 samples": "--samples 3008",
        "10000 samples": "--samples 10000",
    },
    "later objectives": {
        "Dr. GRPO": "--advantage mean",
        "GSPO": "",
        "GDPO": "--advantage gdpo",
        "redraw 2": "--redraw 2",
    },
    "controls": {"random reward": "", "mask of another question": ""},
    # Half and double the learning rate of base (3e-4): does the rate alone explain a difference?
    "learning rate": {
        "lr 1.5e-4": "--lr 1.5e-4",
        "lr 6e-4": "--lr 6e-4",
        "GRPO, lr 1.5e-4": "--normalise sequence --eps-high 0.2 --lr 1.5e-4",
        "GRPO, lr 6e-4": "--normalise sequence --eps-high 0.2 --lr 6e-4",
        "GRPO + clip-higher, lr 1.5e-4": "--normalise sequence --lr 1.5e-4",
        "GRPO + clip-higher, lr 6e-4": "--normalise sequence --lr 6e-4",
        "box IoU, lr 1.5e-4": "--accuracy box-iou --lr 1.5e-4",
        "box IoU, lr 6e-4": "--accuracy box-iou --lr 6e-4",
        "threshold 0.8, lr 1.5e-4": "--accuracy threshold:0.8 --lr 1.5e-4",
        "threshold 0.8, lr 6e-4": "--accuracy threshold:0.8 --lr 6e-4",
    },
}
# These rows also need a function: see row_functions.py, which trains them.
BY_FUNCTION = ("Dr. GRPO", "GSPO", "random reward", "mask of another question")
# The paper's result for a row: gIoU on ReasonSeg test, or the paper's words if it has no number.
PAPER = {
    "base": "60.2",
    "threshold 0.5": "56.5",
    "threshold 0.7": "56.2",
    "threshold 0.8": "58.6",
    "GRPO": "57.8",
    "GRPO + token-level": "58.0",
    "GRPO + clip-higher": "59.1",
    "10000 samples": "no gain",
    "beta 0": "collapse",
}
# The expected gIoU against base, and the reason. "names" and "places" are answer styles: see STYLES
# in tutorials/tiny_world/answers.py.
PREDICTED = {
    "base": "first the format, then names, then places; boxes get tighter all the while",
    "threshold 0.5": "lower: above 0.5 nothing more is paid, so boxes stay wide",
    "threshold 0.7": "as base: it pays for tight boxes, though half-right masks pay nothing at the start",
    "threshold 0.8": "lower: wide boxes hardly ever get there, so tight ones are found later",
    "GRPO": "lower: it lacks both changes, so places come latest",
    "GRPO + token-level": "a little lower: the clip lets a rare way of thinking grow by a fifth a step, not by 0.3",
    "GRPO + clip-higher": "lower: tokens of long answers count less, and measuring is long: places come later",
    "box IoU": "far lower: boxes as wide as the base's have an IoU of a third, so hardly any is paid at the start",
    "continuous mask IoU": "as base: the same order within a group, by finer steps",
    "no points": "lower: a box that is a little wide cannot say which thing is meant",
    "G = 2": "far lower: places hardly ever turn up, and one other answer is a poor yardstick",
    "G = 4": "lower: places turn up half as often, so they come later",
    "G = 16": "higher: places turn up twice as often, so they come sooner",
    "rank 4": "lower: room enough, but Adam moves B A less far a step, so places come later",
    "rank 128": "as base or higher: Adam moves B A further a step, as a higher rate does",
    "lr 1e-4": "lower: a third of the way a step, so hardly any names and no places (a trial)",
    "lr 1e-3": "lower: places come sooner, then the policy drifts and the KL charges for it (a trial)",
    "beta 0": "as base: so short a run does not drift; boxes a little tighter",
    "beta 0.05": "lower: places and tight boxes are rare in the base, so the KL charges for both",
    "112 samples": "far lower: seven steps teach a part of the format",
    "320 samples": "far lower: the format, and about as many names as before",
    "3008 samples": "higher: places for nearly all, and boxes still get tighter",
    "10000 samples": "as 3008 samples: nothing is left to find but tighter boxes",
    "3008 samples, beta 0": "below 3008 samples: the policy drifts, but it does not collapse",
    "Dr. GRPO": "as base or higher: a group with long answers counts more, so places come sooner",
    "GSPO": "lower: after the first update of a step, its narrow clip stops most answers",
    "GDPO": "a little lower: a rare fault in the format counts as much as a wrong mask",
    "redraw 2": "higher: a third of base's groups are flat, and most get a new question",
    "random reward": "far lower: the format is learnt, but boxes stay those of the base model",
    "mask of another question": "far lower: as random reward, because hardly any mask is rewarded",
    "lr 1.5e-4": "lower: half the step, so places come later",
    "lr 6e-4": "as base: places come sooner, but boxes are less tight",
    "GRPO, lr 1.5e-4": "below GRPO: half the step, so places come later still",
    "GRPO, lr 6e-4": "above GRPO and below base: the rate makes up for a part of the difference",
    "GRPO + clip-higher, lr 1.5e-4": "below GRPO + clip-higher: places come later still",
    "GRPO + clip-higher, lr 6e-4": "above GRPO + clip-higher and below base: as for GRPO",
    "box IoU, lr 1.5e-4": "below box IoU: the first rewards are rare, so all comes later",
    "box IoU, lr 6e-4": "as box IoU: no seed misses the places, but boxes are less tight",
    "threshold 0.8, lr 1.5e-4": "below threshold 0.8: places come in fewer seeds",
    "threshold 0.8, lr 6e-4": "above threshold 0.8: places come in more seeds",
}
ROWS = {"base": ""}  # row -> options
for table in TABLES.values():
    ROWS |= table

# Scores of greedy answers on held-out scenes. The scores of single kinds of questions are lenient.
TESTED = ("gIoU", "gIoU_lenient", "cIoU", *KINDS, "format", "box_accuracy", "base_gIoU_lenient")
# columns of the log: means over the last ten steps
LAST = ("points", "length", "kl", "clip_low", "clip_high", "zero_variance")
# shares of two answer styles in the last tenth of the sampled answers
STYLES = ("names", "places")
COLUMNS = ("row", "seed", "options", *TESTED, *LAST, *STYLES)
EDGE = -0.35  # end of the figure's axis: a lower difference is written as text there

# -------------------------------------------------------------------------------------- runs


def name_of(row: str, seed: int) -> str:
    """Return a run's name in file names."""
    plain = re.sub(r"[^a-z0-9.]+", "-", row.lower())
    return f"{plain}-seed{seed}"


def check_options(folder: Path, options: list[str], run: str) -> None:
    """Refuse to continue a run that began with other options.

    --resume compares only the options of the command line. If an option was removed from a row,
    --resume does not notice. So this function compares all settings.
    """
    begun = read_settings(folder / "settings.json")
    now = asdict(parse_settings(options, "ablations.py", "")[0])
    other = [name for name, value in now.items() if begun.get(name) != value]
    if other:
        raise RuntimeError(
            f"{run}: it was begun with another {', '.join(other)} (delete {folder} to begin anew)"
        )


def one_run(row: str, seed: int, keep: Callable | None = None) -> dict:
    """Train and test once, or continue a run that was stopped.

    Returns the CSV line as a dict. Its lists "ids", "scenes" and "lenient" have one value for each
    test scene: the id, the IoU and the lenient IoU. Before the run's folder is deleted, `keep` is
    called with the line. Raises RuntimeError if the run fails, and UserError if another program is
    making it now.
    """
    run = f"{row}, seed {seed}"
    folder = ROOT / "runs" / "ablations" / name_of(row, seed)
    options = FIXED.split()
    options += ["--test-samples", str(SCENES), "--samples", str(SAMPLES)]
    options += ["--seed", str(seed), "--run", str(folder), *shlex.split(ROWS[row])]
    program = [str(ROOT / "train.py")]
    if row in BY_FUNCTION:
        program = [str(ROOT / "tutorials" / "row_functions.py"), row]
    command = [sys.executable, *program, *options]
    with only_program(folder):
        pass  # only to raise an error, because the program below locks the folder itself
    if (folder / "state.pt").exists():
        check_options(folder, options, run)
        command.append("--resume")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    if done.returncode:
        raise RuntimeError(f"{run}: {done.stderr[-1000:]} (delete {folder} to begin anew)")
    line = {"row": row, "seed": seed, "options": ROWS[row]} | figures_of(folder)
    if keep:
        keep(line)
    shutil.rmtree(folder)
    return line


def figures_of(folder: Path) -> dict:
    """Return the columns of a finished run, as text, and the lists of its test scenes.

    Raises RuntimeError if the run used other test scenes.
    """
    from samr1_mini.runs import read_log  # imported late: it loads the models' libraries

    summary = load_json(folder / "summary.json")
    each = load_json(folder / "test-trained.json", list)
    if [x["id"] for x in each] != Shapes("test", SCENES).ids:
        raise RuntimeError(
            f"{folder} was not tested on the first {SCENES} test scenes in their order, as the "
            "other runs are"
        )
    tested = dict(summary["trained"])
    for kind, scores in tested["by_kind"].items():
        tested[kind] = scores["gIoU_lenient"]
    tested["base_gIoU_lenient"] = summary["base"]["gIoU_lenient"]
    values = {name: tested[name] for name in TESTED}
    steps = read_log(folder)[-10:]
    for name in LAST:  # with beta 0 there is no KL
        values[name] = statistics.mean(step.get(name, math.nan) for step in steps)
    answers = read_log(folder, name="answers")
    last = answers[-max(1, len(answers) // 10) :]
    styles = [style_of(answer["text"]) for answer in last]
    for style in STYLES:
        values[style] = styles.count(style) / len(styles)
    line = {name: f"{value:.4g}" for name, value in values.items()}
    line["ids"] = [x["id"] for x in each]
    line["scenes"] = [round(x["iou_strict"], 3) for x in each]
    line["lenient"] = [round(x["iou"], 3) for x in each]
    return line


# ------------------------------------------------------------------------------------- files


def scenes_file(line: dict, results: Path) -> Path:
    """Return the file with the IoU of each scene of a run. The first runs have no .gz."""
    file = results.with_suffix("") / f"{name_of(line['row'], line['seed'])}.json"
    if file.exists():
        return file
    return file.with_suffix(".json.gz")


def write_scenes(line: dict, results: Path) -> None:
    """Write ids and IoUs of the test scenes. The same lists always give the same bytes."""
    scenes_file(line, results).unlink(missing_ok=True)  # perhaps one without .gz
    file = scenes_file(line, results)
    lists = {"ids": line["ids"], "iou_strict": line["scenes"], "iou": line["lenient"]}
    text = json.dumps(lists, separators=(",", ":"))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(text.encode(), mtime=0))


def read_scenes(file: Path) -> list[float]:
    """Return the IoU of each test scene."""
    if file.suffix == ".gz":
        return json.loads(gzip.decompress(file.read_bytes()))["iou_strict"]
    return load_json(file, list)


def write(line: dict, results: Path | None = None) -> None:
    """Keep the line of one_run. The scenes are written first, so no line lacks its scenes."""
    results = results or FILE
    write_scenes(line, results)
    new = not results.exists()
    with results.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerow(line)


def read_line(line: dict, results: Path) -> dict:
    """Turn a line of the CSV into numbers, and add its "scenes".

    Exits if the line does not fit TABLES.
    """
    row, seed = line["row"], line["seed"]
    if ROWS.get(row, line["options"]) != line["options"]:  # a row of --challenge may be unknown
        sys.exit(
            f"ablations.py: error: {results} has the row {row!r} with the options "
            f"{line['options']!r}, this command has others: name another row, or another file by "
            "--results"
        )
    scenes = scenes_file(line, results)
    if not scenes.exists():
        sys.exit(
            f"ablations.py: error: {scenes} is missing: delete the line of {row}, seed {seed}, in "
            f"{results}, and it is run again"
        )
    numbers = {"row": row, "seed": int(seed), "options": line["options"]}
    for name in (*TESTED, *LAST, *STYLES):
        numbers[name] = float(line[name])
    numbers["scenes"] = read_scenes(scenes)
    return numbers


def read(results: Path | None = None) -> list[dict]:
    """Return the runs of a CSV file; none if the file does not exist."""
    results = results or FILE
    if not results.exists():
        return []
    with results.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            sys.exit(
                f"ablations.py: error: {results} has other columns than these runs: name another "
                "file by --results"
            )
        return [read_line(line, results) for line in reader]


# --------------------------------------------------------------------------------- intervals


def interval(values) -> tuple[float, float]:
    """Return the mean of values [seeds, scenes], or [seeds], and half of its 95 % interval.

    Other seeds and other scenes would give another mean. All seeds share the scenes, so 5 x 1,000
    values are not 5,000 independent ones. The model: value = mean + effect of the seed + effect of
    the scene + rest. The variance of the seeds' means contains the rest, and so does the
    variance of the scenes' means. The rest is counted twice, so it is subtracted once:

        variance of the mean = var(seeds' means) / seeds + var(scenes' means) / scenes
                               - var(rest) / (seeds * scenes)

    (crossed random effects, see Searle, Casella and McCulloch, Variance Components, 1992).
    Satterthwaite (1946) gives the degrees of freedom of this sum for Student's t. A bootstrap over
    seeds and scenes would treat the spread of five seeds as exact, and its interval would be too
    narrow. With one seed, the interval is over scenes only. With one value for each seed, it is
    over seeds only.
    """
    if len(values) == 0:
        return math.nan, math.nan
    table = np.array(values, float).reshape(len(values), -1)  # [seeds, scenes]
    seeds, scenes = table.shape
    mean = table.mean()
    by_seed = table.mean(1, keepdims=True)  # [seeds, 1]
    by_scene = table.mean(0, keepdims=True)  # [1, scenes]
    rest = table - by_seed - by_scene + mean  # [seeds, scenes]
    of_seeds = scenes * ((by_seed - mean) ** 2).sum()
    of_scenes = seeds * ((by_scene - mean) ** 2).sum()
    squares = np.array([of_seeds, of_scenes, (rest**2).sum()])
    freedom = np.array([seeds - 1, scenes - 1, (seeds - 1) * (scenes - 1)])
    known = freedom > 0
    if not known.any():  # one value
        return float(mean), math.nan
    squares /= np.maximum(freedom, 1)  # mean squares: the variances above, times seeds * scenes
    a, b, c = squares
    total = max(a + b - c, a, b)  # an estimate can be below 0, a variance cannot
    if total == 0:
        return float(mean), 0.0
    degrees = total**2 / (squares[known] ** 2 / freedom[known]).sum()
    degrees = max(degrees, freedom[known].min())
    return float(mean), student(degrees) * math.sqrt(total / (seeds * scenes))


def values_of(lines: list[dict], row: str, measure: str) -> dict[int, np.ndarray]:
    """Return an array for each seed of a row: the IoU of each scene, or one other measure."""
    values = {}
    for line in lines:
        if line["row"] == row:
            of_run = line["scenes"] if measure == "gIoU" else [line[measure]]
            values[line["seed"]] = np.array(of_run)
    return values


def differences(
    lines: list[dict], row: str, measure: str = "gIoU", base: str = "base"
) -> list[np.ndarray]:
    """Return a row minus base, scene by scene, for each seed that both have."""
    ours = values_of(lines, row, measure)
    theirs = values_of(lines, base, measure)
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def with_interval(values: list[np.ndarray], sign: str = "") -> str:
    """Write the mean and the interval of values [seeds, scenes].

    With one seed, a star marks an interval over scenes only. With two seeds, the text has
    the mean of each seed and no interval: with one degree of freedom (t = 12.7), it is too wide.
    """
    if not values:
        return ""
    mean, half = interval(values)
    text = f"{mean:{sign}.3f}"
    if len(values) == 1:
        return f"{text} ± {half:.3f}*"
    if len(values) == 2:
        each = ", ".join(f"{np.mean(x):{sign}.3f}" for x in values)
        return f"{text} ({each})"
    return f"{text} ± {half:.3f}"


def side(lines: list[dict], row: str) -> int:
    """Return 1 or -1 if the interval of a row lies above or below base, else 0.

    A row without runs gives 0. With one seed or two, the interval of each seed over scenes must lie
    on the same side.
    """
    apart = differences(lines, row)
    if not apart:
        return 0
    intervals = [interval([x]) for x in apart]
    if len(apart) > 2:
        intervals = [interval(apart)]
    if all(mean - half > 0 for mean, half in intervals):
        return 1
    if all(mean + half < 0 for mean, half in intervals):
        return -1
    return 0


# -------------------------------------------------------------------------- table and figure


def cells(lines: list[dict], row: str) -> tuple[str, str, str, str, str]:
    """Return a row as text: runs, gIoU, difference from base, the paper's result, prediction."""
    runs = list(values_of(lines, row, "gIoU").values())
    apart = ""
    if row != "base":
        apart = with_interval(differences(lines, row), "+")
    return str(len(runs)), with_interval(runs), apart, PAPER.get(row, ""), PREDICTED.get(row, "")


def paired_cells(lines: list[dict], row: str) -> tuple[str, str]:
    """Return the numbers for "detects" and "within" as text.

    Both are "" for base, and for a row with fewer than two seeds.
    """
    apart = [float(np.mean(x)) for x in differences(lines, row)]
    if row == "base" or len(apart) < 2:
        return "", ""
    bound = equivalence_bound(apart)
    mark = "=" if bound <= MARGIN else ""
    return f"{smallest_difference(len(apart), np.std(apart, ddof=1)):.3f}", f"{bound:.3f}{mark}"


def rows_of(lines: list[dict], title: str) -> list[str]:
    """Return the rows of one table that have runs, base first."""
    there = {line["row"] for line in lines}
    return ["base", *[row for row in TABLES[title] if row in there]]


def print_challenge(lines: list[dict], row: str) -> None:
    """Print a row of the README's table, and its difference from base.

    Without own runs of base, the difference is from the committed runs.
    """
    change = row if not ROWS[row] else f"{row}: `{ROWS[row]}`"
    runs, mean, *_ = cells(lines, row)
    print(f"| {change} | {mean} | {runs} |")
    if not values_of(lines, "base", "gIoU"):
        lines = lines + read()
    print(f"against base: {with_interval(differences(lines, row), '+')}")


def print_table(lines: list[dict], title: str) -> None:
    """Print one of the TABLES. Rows without runs are left out."""
    heads = f"{'gIoU':>22}{'against base':>24}{'detects':>9}{'within':>8}"
    print(f"\n{title:<30}{'runs':>5}{heads}   {'paper':<10}predicted")
    one_seed = False
    for row in rows_of(lines, title):
        runs, mean, apart, paper, predicted = cells(lines, row)
        detects, within = paired_cells(lines, row)
        numbers = f"{mean:>22}{apart:>24}{detects:>9}{within:>8}"
        print(f"{row:<30}{runs:>5}{numbers}   {paper:<10}{predicted}")
        one_seed = one_seed or "*" in mean + apart
    if one_seed:
        print("* one seed: the interval is over scenes only, and says nothing of other seeds")


def draw_row(axes, apart: list[np.ndarray], y: float) -> None:
    """Draw the differences [seeds, scenes] of one row at height y."""
    mean, half = interval(apart)
    if mean < EDGE:
        axes.annotate(
            f"← {with_interval(apart)}",
            (0.01, y),
            xycoords=("axes fraction", "data"),
            va="center",
            color="#D55E00",
            fontsize=9,
        )
    elif apart:
        axes.plot(np.mean(apart, 1), [y - 0.35] * len(apart), "o", color="#56B4E9", ms=3.5)
        if len(apart) == 2:
            half = None
        axes.errorbar(mean, y, xerr=half, fmt="D", color="#D55E00", ms=5, capsize=3)


def draw(lines: list[dict], titles: list[str]):
    """Return a figure: each row's difference from base, with an interval, and a dot for each seed."""
    count = sum(len(rows_of(lines, title)) for title in titles)
    figure, axes = plt.subplots(figsize=(8, 0.22 * count + 1.1))
    axes.axvline(0, color="0.6", lw=1)
    y = 0.0
    heights = []
    names = []
    alone = ""
    for title in titles:
        heights.append(y)
        names.append(title)
        for row in rows_of(lines, title)[1:]:
            y -= 1
            apart = differences(lines, row)
            draw_row(axes, apart, y)
            if len(apart) == 1:
                row += "*"
                alone = "\n* one seed: over scenes only"
            heights.append(y)
            names.append(row)
        y -= 1
    axes.set_yticks(heights, names)
    for label in axes.get_yticklabels():
        if label.get_text() in titles:
            label.set_fontweight("bold")
    axes.set_ylim(y + 0.4, 0.6)
    axes.tick_params("y", length=0)
    axes.grid(axis="x", alpha=0.25)
    left, right = axes.get_xlim()
    # one scale for every table, so that a small difference looks small
    axes.set_xlim(min(left, EDGE), max(right, -EDGE / 2))
    axes.set_xlabel(
        "gIoU minus that of base, with the same seed and on the same held-out scenes\n"
        f"dots: runs; diamond: their mean, from three runs on with a 95 % interval{alone}\n"
        f"base: {cells(lines, 'base')[1]}"
    )
    figure.tight_layout()
    return figure


# ----------------------------------------------------------------------------------- command


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ablations.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    rows = list(ROWS)
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each row (default 5)")
    parser.add_argument("--rows", nargs="*", choices=rows, help="only these rows")
    cores = most_processes()
    workers = "runs at a time (default: one for each core, fewer if memory is small)"
    parser.add_argument("--workers", type=int, default=cores, help=workers)
    parser.add_argument(
        "--results",
        type=Path,
        help="CSV file, with a folder of the same name beside it (default: the committed file, and "
        "runs/challenge.csv with --challenge)",
    )
    parser.add_argument(
        "--challenge",
        metavar="NAME",
        help="make the runs of a new row; other options are options of train.py for this row",
    )
    parser.add_argument("--figure", help="write a figure of all rows to this file")
    parser.add_argument("--table", action="store_true", help="run nothing, print the tables")
    return parser


def add_row(parser: argparse.ArgumentParser, args: argparse.Namespace, options: list[str]) -> None:
    """Add the row of --challenge with these options of train.py. Refuse what cannot work."""
    name = args.challenge
    if name in ROWS:
        parser.error(f"--challenge {name!r}: choose a name that TABLES does not have")
    if not re.search("[a-z0-9]", name.lower()) or "|" in name:
        parser.error(f"--challenge {name!r}: choose a name with letters or digits, and without |")
    if args.rows is not None or args.figure:
        parser.error("--rows and --figure do not go with --challenge")
    for option in options:
        if option.split("=")[0] in FIXED_BY_CHALLENGE:
            parser.error(f"{option}: the challenge sets this option for all rows")
    fixed = [*FIXED.split(), "--samples", str(SAMPLES)]
    parse_settings([*fixed, *options], "ablations.py", "")  # ends the program if an option is wrong
    ROWS[name] = shlex.join(options)
    args.rows = [name]
    args.results = args.results or ROOT / "runs" / "challenge.csv"


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read the command line, and refuse options that cannot work."""
    parser = make_parser()
    args, options = parser.parse_known_args(argv)
    if args.challenge is None and options:
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    if args.challenge is not None:
        add_row(parser, args, options)
    args.rows = args.rows or list(ROWS)
    args.results = args.results or FILE
    if min(args.seeds, args.workers) < 1:
        parser.error("--seeds and --workers must be at least 1")
    if args.figure and not Path(args.figure).absolute().parent.is_dir():
        parser.error(f"--figure {args.figure}: its folder is not there")
    if args.figure and not args.figure.endswith(".png"):
        parser.error(f"--figure {args.figure}: name a file that ends in .png")
    if args.results.suffix != ".csv" or args.results.is_dir():
        parser.error(f"--results {args.results}: name a file that ends in .csv")
    known = {*ROWS, *(line["row"] for line in read(args.results))}
    if len({name_of(row, 0) for row in known}) < len(known):
        parser.error("two rows have the same name in lower case, without signs: rename one")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    return parser, args


def make_runs(missing: list[tuple[str, int]], results: Path, workers: int) -> None:
    """Make runs (row, seed), several at a time, and keep their lines."""
    lock = Lock()

    def keep(line: dict) -> None:
        with lock:
            write(line, results)

    with ThreadPoolExecutor(workers) as pool:
        try:
            futures = [pool.submit(one_run, row, seed, keep) for row, seed in missing]
            for future in tqdm(as_completed(futures), total=len(futures), desc="runs"):
                future.result()
        finally:  # else runs in the queue would still be started
            pool.shutdown(wait=False, cancel_futures=True)


def main(argv: list[str] | None = None) -> None:
    parser, args = parse(argv)
    if not args.table:
        there = {(line["row"], line["seed"]) for line in read(args.results)}
        # All rows run with seed 0, then with seed 1, and so on. So a command that is stopped
        # has made nearly the same number of runs for each row.
        wanted = [(row, seed) for seed in range(args.seeds) for row in args.rows]
        missing = [run for run in wanted if run not in there]
        try:
            with only_program(ROOT / "runs" / "ablations"):
                make_runs(missing, args.results, args.workers)
        except KeyboardInterrupt:  # Ctrl-C reaches the runs too: each finishes its step and saves
            sys.exit("stopping: the same command continues")
        except (UserError, RuntimeError, OSError) as error:  # a run that fails keeps its folder
            parser.error(str(error))
    lines = read(args.results)
    if not lines:
        parser.error(f"{args.results} holds no runs yet")
    if args.challenge:
        if not values_of(lines, args.challenge, "gIoU"):
            parser.error(f"{args.results} holds no runs of {args.challenge!r} yet")
        print_challenge(lines, args.challenge)
        return
    titles = [title for title in TABLES if len(rows_of(lines, title)) > 1]
    for title in titles:
        print_table(lines, title)
    if not titles:
        print(f"base: {cells(lines, 'base')[1]}")
    if args.figure:
        draw(lines, titles).savefig(args.figure, dpi=90)


if __name__ == "__main__":
    main()
