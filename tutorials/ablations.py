"""Ablations in the miniature: `python tutorials/ablations.py` makes the runs that ablations.csv lacks, a line a run.
Stop it by Ctrl-C and start it again: runs halfway go on from there (they lie in runs/ablations).
`python tutorials/ablations.py --table` prints what is there, with 95 % intervals.

Every row differs from "base" in the options that it names. A seed draws the same questions for every row, and all runs
are tested on the same scenes, so a row is compared with base seed by seed and scene by scene: beside its line each run
leaves its gIoU of each scene, in results/ablations/ROW-seedN.json.
What the mechanism lets one expect of each row (PREDICTED) was committed before the first of these runs.
`--figure FILE` draws them. Rows of your own: add them to TABLES, and keep them and a base from your machine in a file
of their own (`--results runs/mine.csv`). Each run has one thread, so that the lines do not depend on the machine's
number of cores; as many run side by side as there are cores.
"""

import argparse
import csv
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from threading import Lock

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # Python looks in the folder of the script alone

from samr1_mini.config import parse_settings, read_settings
from tutorials.tiny_world.answers import style_of
from samr1_mini.tiny.scenes import KINDS
from samr1_mini.tiny.shapes import Shapes

FILE = ROOT / "tutorials" / "results" / "ablations.csv"
SCENES = 1000  # held-out scenes of the test, the same for all runs
# A third of the first command's questions at three times its rate: its 187 steps in 63, and five seeds a row in reach.
SAMPLES, LR = 1008, "3e-4"
FIXED = [
    "--preset",
    "tiny",
    "--device",
    "cpu",
    "--eval-every",
    "0",
    "--test-samples",
    str(SCENES),
    "--lr",
    LR,
]

# Table of the paper, or what it lacks -> row -> options. "base" is every table's first row.
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
    "KL": {"beta 0": "--beta 0", "beta 0.05": "--beta 0.05"},
    "samples": {f"{n} samples": f"--samples {n}" for n in (112, 320, 3008, 10000)},
}
PAPER = {  # its own figure for that row: gIoU on ReasonSeg test, where it prints one
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
# gIoU against base, and why; "names" and "places" are ways of thinking: see STYLES in samr1_mini/tiny/answers.py
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
}
ROWS = {"base": ""} | {
    name: options for table in TABLES.values() for name, options in table.items()
}
# on the held-out scenes, greedy; kinds are lenient
TESTED = ("gIoU", "gIoU_lenient", "cIoU", *KINDS, "format", "box_accuracy", "base_gIoU_lenient")
LAST = (
    "points",
    "length",
    "kl",
    "clip_low",
    "clip_high",
    "zero_variance",
)  # over the last ten steps of training
WAYS = (
    "names",
    "places",
)  # ways of thinking: their shares of the sampled answers in the last tenth of training
COLUMNS = ("row", "seed", "options", *TESTED, *LAST, *WAYS)
EDGE = (
    -0.35
)  # a row that lies further off is written at the figure's edge, so that the others can be told apart


def name_of(row: str, seed: int) -> str:
    """A run's name in file names."""
    return f"{re.sub(r'[^a-z0-9.]+', '-', row.lower())}-seed{seed}"


def one_run(row: str, seed: int, keep=None) -> dict:
    """Train and test once, or go on with such a run that was stopped; the CSV line, and under "scenes" the gIoU of each
    test scene, in their order. `keep` is called with it before the run's folder goes."""
    folder = ROOT / "runs" / "ablations" / name_of(row, seed)
    options = [
        *FIXED,
        "--samples",
        str(SAMPLES),
        "--seed",
        str(seed),
        "--run",
        str(folder),
        *ROWS[row].split(),
    ]
    halfway = (folder / "state.pt").exists()
    if (
        halfway
    ):  # --resume looks at the options that are named, not at one that its row has no longer
        begun, now = read_settings(folder / "settings.json"), asdict(
            parse_settings(options, "ablations.py", "")[0]
        )
        if other := [name for name, value in now.items() if begun.get(name) != value]:
            raise RuntimeError(
                f"{row}, seed {seed}: it was begun with another {', '.join(other)} (delete {folder} to "
                "begin anew)"
            )
    else:
        shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, str(ROOT / "train.py"), *options, *["--resume"] * halfway]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    if done.returncode:
        raise RuntimeError(
            f"{row}, seed {seed}: {done.stderr[-1000:]} (delete {folder} to begin anew)"
        )
    line = {"row": row, "seed": seed, "options": ROWS[row]} | figures_of(folder)
    if keep:
        keep(line)
    shutil.rmtree(folder)
    return line


def figures_of(folder: Path) -> dict:
    """What is kept of a run that is done: figures for the CSV, as text, and "scenes"."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    each = json.loads((folder / "test-trained.json").read_text(encoding="utf-8"))
    if [x["id"] for x in each] != Shapes("test", SCENES).ids:
        raise RuntimeError(
            f"{folder} was not tested on the first {SCENES} test scenes in their order, as the other runs are"
        )
    steps, answers = (
        [
            json.loads(line)
            for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for name in ("metrics", "answers")
    )
    tested = summary["trained"] | {
        kind: scores["gIoU_lenient"] for kind, scores in summary["trained"]["by_kind"].items()
    }
    tested["base_gIoU_lenient"] = summary["base"]["gIoU_lenient"]
    # without a KL (beta 0) none is measured
    last = {
        name: statistics.mean(step.get(name, math.nan) for step in steps[-10:]) for name in LAST
    }
    styles = [style_of(answer["text"]) for answer in answers[-max(1, len(answers) // 10) :]]
    values = (
        {name: tested[name] for name in TESTED}
        | last
        | {way: styles.count(way) / len(styles) for way in WAYS}
    )
    return {name: f"{value:.4g}" for name, value in values.items()} | {
        "scenes": [round(x["iou_strict"], 3) for x in each]
    }


def write(line: dict, results: Path | None = None) -> None:
    """Keep what one_run returned. Its scenes come first: a line in the CSV says that all is there."""
    results = results or FILE
    file = results.with_suffix("") / f"{name_of(line['row'], line['seed'])}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(line["scenes"], separators=(",", ":")), encoding="utf-8")
    new = not results.exists()
    with results.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerow(line)


def read(results: Path | None = None) -> list[dict]:
    """The lines that are there, numbers as numbers, with their "scenes"."""
    results = results or FILE
    if not results.exists():
        return []
    text, lines = ("row", "options"), []
    with results.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            sys.exit(
                f"ablations.py: error: {results} has other columns than these runs: name another one by --results"
            )
        for line in reader:
            if ROWS.get(line["row"]) != line["options"]:
                sys.exit(
                    f"ablations.py: error: {results} has the row {line['row']!r} with the options "
                    f"{line['options']!r}, TABLES has others: name another row, or another file by --results"
                )
            scenes = results.with_suffix("") / f"{name_of(line['row'], line['seed'])}.json"
            if not scenes.exists():
                sys.exit(
                    f"ablations.py: error: {scenes} is missing: delete the line of {line['row']}, "
                    f"seed {line['seed']}, in {results}, and it is run again"
                )
            numbers = {
                k: v if k in text else int(v) if k == "seed" else float(v) for k, v in line.items()
            }
            lines.append(numbers | {"scenes": json.loads(scenes.read_text(encoding="utf-8"))})
    return lines


def student(freedom: float) -> float:
    """How many standard errors to either side hold 95 % of Student's t: its 97.5 % quantile, by summing up its
    density."""
    x = np.linspace(0, 20, 20_001)
    height = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(
        math.pi * freedom
    )
    density = height * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    return float(np.interp(0.475, 0.001 * (np.cumsum(density) - (density + density[0]) / 2), x))


def interval(values) -> tuple[float, float]:
    """Mean of values [seeds, scenes], or of one value a seed [seeds], and half of its 95 % interval.

    The mean would be another one with other seeds, and with other scenes. All seeds share the scenes, so 5 x 1,000
    values are not 5,000 independent ones. A value is taken as: mean + what its seed adds + what its scene adds + a rest
    that belongs to this seed on this scene. The spread of the seeds' means shows the first and a part of the rest, the
    spread of the scenes' means the second and a part of the rest, so the rest is in both and is taken off once:

        variance of the mean = var(seeds' means) / seeds + var(scenes' means) / scenes - var(rest) / (seeds * scenes)

    (crossed random effects, see Searle, Casella and McCulloch, Variance Components, 1992). How sure this estimate is
    depends on which of its parts is large: five seeds tell little of their spread, a thousand scenes much.
    Satterthwaite (1946) makes one number of degrees of freedom of that, for Student's t. (A bootstrap that draws seeds
    and scenes takes the spread of five seeds for known, and so is too narrow where seeds matter.) One seed alone says
    nothing of other seeds: then the interval is over scenes only. With one value a seed it is over seeds only.
    """
    if not len(values):
        return math.nan, math.nan
    table = np.array(values, float).reshape(len(values), -1)  # [seeds, scenes]
    seeds, scenes = table.shape
    mean, by_seed, by_scene = (
        table.mean(),
        table.mean(1, keepdims=True),
        table.mean(0, keepdims=True),
    )
    rest = table - by_seed - by_scene + mean
    squares = np.array(
        [
            scenes * ((by_seed - mean) ** 2).sum(),
            seeds * ((by_scene - mean) ** 2).sum(),
            (rest**2).sum(),
        ]
    )
    freedom = np.array([seeds - 1, scenes - 1, (seeds - 1) * (scenes - 1)])
    known = freedom > 0
    if not known.any():  # one value
        return float(mean), math.nan
    squares /= np.maximum(
        freedom, 1
    )  # mean squares: each is its variance above, times seeds * scenes
    a, b, c = squares
    total = max(a + b - c, a, b)  # what seeds or scenes add is not below 0, whatever its estimate
    if not total:
        return float(mean), 0.0
    degrees = max(total**2 / (squares[known] ** 2 / freedom[known]).sum(), freedom[known].min())
    return float(mean), student(degrees) * math.sqrt(total / (seeds * scenes))


def values_of(lines: list[dict], row: str, measure: str) -> dict[int, np.ndarray]:
    """For each seed of a row: the gIoU of each scene [scenes], or its one value [1] of another measure."""
    return {
        line["seed"]: np.array(line["scenes"] if measure == "gIoU" else [line[measure]])
        for line in lines
        if line["row"] == row
    }


def differences(
    lines: list[dict], row: str, measure: str = "gIoU", base: str = "base"
) -> list[np.ndarray]:
    """A row minus base, scene by scene, for each seed that both have."""
    ours, theirs = (values_of(lines, name, measure) for name in (row, base))
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def with_interval(values: list[np.ndarray], sign: str = "") -> str:
    """Mean and interval of values [seeds, scenes] as text. One seed: a star, its interval is over scenes only. Two:
    both instead, since an interval with one degree of freedom (t = 12.7) would say nothing."""
    (mean, half), each = interval(values), ", ".join(f"{np.mean(x):{sign}.3f}" for x in values)
    spread = f"({each})" if len(values) == 2 else f"± {half:.3f}{'*' * (len(values) == 1)}"
    return f"{mean:{sign}.3f} {spread}" if len(values) else ""


def side(lines: list[dict], row: str) -> int:
    """1 or -1 where a row lies above or below base: its interval does, or, of one seed or two, each one's over scenes
    does; else 0."""
    each = differences(lines, row)
    ends = [interval(each)] if len(each) > 2 else [interval([x]) for x in each]
    return all(mean - half > 0 for mean, half in ends) - all(mean + half < 0 for mean, half in ends)


def cells(lines: list[dict], row: str) -> tuple[str, str, str, str, str]:
    """A row of a table as text: runs, mean gIoU, difference from base, the paper's figure, the prediction."""
    runs = list(values_of(lines, row, "gIoU").values())
    apart = "" if row == "base" else with_interval(differences(lines, row), "+")
    return str(len(runs)), with_interval(runs), apart, PAPER.get(row, ""), PREDICTED.get(row, "")


def rows_of(lines: list[dict], title: str) -> list[str]:
    """The rows of one table that have runs, base first."""
    there = {line["row"] for line in lines}
    return ["base", *(row for row in TABLES[title] if row in there)]


def print_table(lines: list[dict], title: str) -> None:
    """One of the TABLES on the screen, as far as its rows have runs."""
    rows = {row: cells(lines, row) for row in rows_of(lines, title)}
    print(f"\n{title:<26}{'runs':>5}{'gIoU':>22}{'against base':>24}   {'paper':<10}predicted")
    for row, (runs, mean, apart, paper, predicted) in rows.items():
        print(f"{row:<26}{runs:>5}{mean:>22}{apart:>24}   {paper:<10}{predicted}")
    if any("*" in mean + apart for _, mean, apart, *_ in rows.values()):
        print("* one seed: the interval is over scenes only, and says nothing of other seeds")


def draw(lines: list[dict], titles: list[str]):
    """A figure: for each row its difference in gIoU from base, the mean with its 95 % interval and, under it, a dot a
    seed."""
    height = 0.22 * (sum(len(rows_of(lines, title)) for title in titles)) + 1.1
    figure, axes = plt.subplots(figsize=(8, height))
    axes.axvline(0, color="0.6", lw=1)
    y, ticks = 0.0, []
    for title in titles:
        ticks.append((y, title))
        for row in rows_of(lines, title)[1:]:
            y -= 1
            apart = differences(lines, row)
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
                half = None if len(apart) == 2 else half
                axes.errorbar(mean, y, xerr=half, fmt="D", color="#D55E00", ms=5, capsize=3)
            ticks.append((y, row + "*" * (len(apart) == 1)))
        y -= 1
    axes.set_yticks(*zip(*ticks))
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in titles else "normal")
    axes.set_ylim(y + 0.4, 0.6), axes.tick_params("y", length=0), axes.grid(axis="x", alpha=0.25)
    left, right = axes.get_xlim()
    alone = "\n* one seed: over scenes only" if any("*" in name for _, name in ticks) else ""
    # one scale for every table, so that a small difference looks small
    axes.set_xlim(min(left, EDGE), max(right, -EDGE / 2))
    axes.set_xlabel(
        "gIoU minus that of base, with the same seed and on the same held-out scenes\n"
        f"dots: runs; diamond: their mean, from three runs on with a 95 % interval{alone}\n"
        f"base: {cells(lines, 'base')[1]}"
    )
    figure.tight_layout()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds a row (default 5)")
    parser.add_argument(
        "--rows", nargs="*", default=list(ROWS), choices=list(ROWS), help="only these rows"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="runs side by side (default: one a core)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=FILE,
        help="CSV file for the lines, with a folder of its name beside it (default: the committed one)",
    )
    parser.add_argument("--figure", help="write a figure of all rows to this file")
    parser.add_argument("--table", action="store_true", help="run nothing, print the tables")
    args = parser.parse_args()
    if min(args.seeds, args.workers) < 1:
        parser.error("--seeds and --workers must be at least 1")
    if args.figure and not Path(args.figure).absolute().parent.is_dir():
        parser.error(f"--figure {args.figure}: its folder is not there")
    if args.results.suffix != ".csv" or args.results.is_dir():
        parser.error(f"--results {args.results}: name a file that ends in .csv")
    if len({name_of(row, 0) for row in ROWS}) < len(
        ROWS
    ):  # by capitals or signs alone they would not differ in files
        parser.error("two rows have the same name in lower case, without signs: rename one")
    if not args.table:
        there, lock = {(line["row"], line["seed"]) for line in read(args.results)}, Lock()
        # Seed after seed: whenever it is stopped, rows have about as many runs as one another.
        missing = [
            (row, seed)
            for seed in range(args.seeds)
            for row in args.rows
            if (row, seed) not in there
        ]

        def keep(line: dict) -> None:
            with lock:
                write(line, args.results)

        with ThreadPoolExecutor(args.workers) as pool:
            try:
                for future in tqdm(
                    as_completed([pool.submit(one_run, *m, keep) for m in missing]),
                    total=len(missing),
                    desc="runs",
                ):
                    future.result()
            except KeyboardInterrupt:  # the runs get it too: each ends its step and saves
                sys.exit("stopping; the same command goes on from here")
            except (
                RuntimeError,
                OSError,
            ) as error:  # OSError: the results cannot be written; the run's folder stays
                parser.error(str(error))
            finally:
                pool.shutdown(
                    wait=False, cancel_futures=True
                )  # else those in the queue would still be started
    if not (lines := read(args.results)):
        parser.error(f"{args.results} holds no runs yet")
    titles = [title for title in TABLES if len(rows_of(lines, title)) > 1]
    for title in titles:
        print_table(lines, title)
    if args.figure:
        draw(lines, titles).savefig(args.figure, dpi=90)


if __name__ == "__main__":
    main()
