"""Ablations in the miniature: `python tutorials/ablations.py` makes the runs that ablations.csv lacks, a line a run. Stop it by Ctrl-C and start it
again: runs halfway go on from there (they lie in runs/ablations). `python tutorials/ablations.py --table` prints what is there, with 95 % intervals.

Every row differs from "base" in the options that it names. A seed draws the same questions for every row, so rows are compared seed by seed.
`--figure FILE` draws them. Each run has one thread, so that the lines do not depend on the machine's number of cores; as many run side by side as there are cores.
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
from pathlib import Path
from threading import Lock

import matplotlib.pyplot as plt
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "tutorials" / "results" / "ablations.csv"
FIXED = ["--preset", "tiny", "--device", "cpu", "--eval-every", "0", "--test-samples", "300"]
SAMPLES = 640

# Table of the paper, or what it lacks -> row -> options. "base" is every table's first row.
TABLES = {
    "table 3: accuracy reward": {
        "threshold 0.5": "--accuracy threshold:0.5", "threshold 0.7": "--accuracy threshold:0.7", "threshold 0.8": "--accuracy threshold:0.8",
    },
    "table 4: objective": {
        "GRPO": "--normalise sequence --eps-high 0.2", "GRPO + token-level": "--eps-high 0.2", "GRPO + clip-higher": "--normalise sequence",
    },
    "reward from": {"box IoU": "--accuracy box-iou", "continuous mask IoU": "--accuracy iou"},
    "points": {"no points": "--no-points"},
    "group": {"G = 2": "--group 2", "G = 4": "--group 4", "G = 16": "--group 16"},
    "LoRA": {"rank 4": "--rank 4", "rank 128": "--rank 128", "lr 1e-4": "--lr 1e-4", "lr 2e-3": "--lr 2e-3"},
    "KL": {"beta 0": "--beta 0", "beta 0.05": "--beta 0.05"},
    "samples": {f"{n} samples": f"--samples {n}" for n in (112, 320, 1280, 3008, 10000)},
    "KL, against 3008 samples": {"3008 samples, beta 0": "--samples 3008 --beta 0"},
}
PAPER = {  # its own figure for that row: gIoU on ReasonSeg test, where it prints one
    "base": "60.2", "threshold 0.5": "56.5", "threshold 0.7": "56.2", "threshold 0.8": "58.6",
    "GRPO": "57.8", "GRPO + token-level": "58.0", "GRPO + clip-higher": "59.1", "3008 samples": "60.2", "10000 samples": "no gain",
    "beta 0": "collapse", "3008 samples, beta 0": "collapse",
}
BASE = {"3008 samples, beta 0": "3008 samples"}  # what a row is compared with where that is not "base"
ROWS = {"base": ""} | {name: options for table in TABLES.values() for name, options in table.items()}
TESTED = ("gIoU", "gIoU_lenient", "cIoU", "attribute", "relation", "indirect", "format", "box_accuracy", "base_gIoU_lenient")  # on 300 held-out scenes, greedy
LAST = ("points", "length", "kl", "clip_low", "clip_high", "zero_variance")  # over the last ten steps of training
COLUMNS = ("row", "seed", "options", *TESTED, *LAST)
EDGE = -0.15  # a row that lies further off is written at the figure's edge, so that the others can be told apart


def one_run(row: str, seed: int) -> dict:
    """Train and test once, or go on with such a run that was stopped; the CSV line."""
    folder = ROOT / "runs" / "ablations" / f"{re.sub(r'[^a-z0-9.]+', '-', row.lower())}-seed{seed}"
    halfway = (folder / "state.pt").exists()
    if not halfway:
        shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, str(ROOT / "train.py"), *FIXED, "--samples", str(SAMPLES), "--seed", str(seed), "--run", str(folder), *ROWS[row].split()]
    command += ["--resume"] * halfway
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    if done.returncode:
        raise RuntimeError(f"{row}, seed {seed}: {done.stderr[-1000:]}")
    summary = json.loads((folder / "summary.json").read_text())
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-10:]
    shutil.rmtree(folder)
    tested = summary["trained"] | {kind: scores["gIoU_lenient"] for kind, scores in summary["trained"]["by_kind"].items()}
    tested["base_gIoU_lenient"] = summary["base"]["gIoU_lenient"]
    line = {"row": row, "seed": seed, "options": ROWS[row]} | {name: f"{tested[name]:.4g}" for name in TESTED}
    middle = lambda name: statistics.median if name == "kl" else statistics.mean  # one token can make the KL of a step a thousand: eq. (3) has no bound
    return line | {name: f"{middle(name)(step[name] for step in last):.4g}" for name in LAST}


def read() -> list[dict]:
    """The lines that are there, numbers as numbers."""
    if not FILE.exists():
        return []
    text = ("row", "options")
    with FILE.open(newline="") as file:
        return [{k: v if k in text else int(v) if k == "seed" else float(v) for k, v in line.items()} for line in csv.DictReader(file)]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval (Student's t)."""
    t = (0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)[len(values) - 1] if len(values) <= 10 else 1.96
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")


def differences(lines: list[dict], row: str, measure: str = "gIoU") -> list[float]:
    """A row minus its base, a number for each seed that both have."""
    base = {line["seed"]: line[measure] for line in lines if line["row"] == BASE.get(row, "base")}
    return [line[measure] - base[line["seed"]] for line in lines if line["row"] == row and line["seed"] in base]


def compare(lines: list[dict], row: str, measure: str = "gIoU") -> dict:
    """A row's mean over seeds, and its difference from its base seed by seed, each with half of its 95 % interval."""
    values = [line[measure] for line in lines if line["row"] == row]
    return {"runs": len(values), "mean": interval(values), "difference": interval(differences(lines, row, measure))}


def cells(lines: list[dict], row: str) -> tuple[str, str, str, str]:
    """A row of a table as text: runs, mean gIoU, difference from base, the paper's figure."""
    x = compare(lines, row)
    mean, apart = (f"{value:{sign}.3f} ± {half:.3f}" for (value, half), sign in ((x["mean"], ""), (x["difference"], "+")))
    apart += f" against {BASE[row]}" if row in BASE else ""
    return str(x["runs"]), mean, "" if row == "base" else apart, PAPER.get(row, "")


def rows_of(lines: list[dict], title: str) -> list[str]:
    """The rows of one table that have runs, what they are compared with first."""
    there = {line["row"] for line in lines}
    return [BASE.get(next(iter(TABLES[title])), "base"), *(row for row in TABLES[title] if row in there)]


def print_table(lines: list[dict], title: str) -> None:
    first, *_ = rows = rows_of(lines, title)
    print(f"\n{title:<28}{'runs':>5}{'gIoU':>16}{'against ' + first:>22}   paper")
    for row in rows:
        runs, mean, apart, paper = cells(lines, row)
        apart = "" if row == first else apart.removesuffix(f" against {first}")
        print(f"{row:<28}{runs:>5}{mean:>16}{apart:>22}   {paper}")


def draw(lines: list[dict], titles: list[str]):
    """A figure: for each row its difference in gIoU from its base, the mean with its 95 % interval and, under it, a dot a seed."""
    rows = [(title, row) for title in titles for row in rows_of(lines, title)[1:]]
    height = 0.22 * (len(rows) + len(titles)) + 0.9
    figure, axes = plt.subplots(figsize=(8, height))
    axes.axvline(0, color="0.6", lw=1)
    y, ticks = 0.0, []
    for title in titles:
        ticks.append((y, title))
        for row in rows_of(lines, title)[1:]:
            y -= 1
            seeds = differences(lines, row)
            mean, half = interval(seeds)
            if mean < EDGE:
                axes.annotate(f"← {mean:.3f} ± {half:.3f}", (0.01, y), xycoords=("axes fraction", "data"), va="center", color="#D55E00", fontsize=9)
            else:
                axes.plot(seeds, [y - 0.35] * len(seeds), "o", color="#56B4E9", ms=3.5)
                axes.errorbar(mean, y, xerr=half, fmt="D", color="#D55E00", ms=5, capsize=3)
            ticks.append((y, row))
        y -= 1
    axes.set_yticks(*zip(*ticks))
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in titles else "normal")
    axes.set_ylim(y + 0.4, 0.6), axes.tick_params("y", length=0), axes.grid(axis="x", alpha=0.25)
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, EDGE), max(right, -EDGE / 2))  # one scale for every table, so that a small difference looks small
    first, *others = dict.fromkeys(rows_of(lines, title)[0] for title in titles)
    axes.set_xlabel(
        f"gIoU on held-out scenes minus that of {first} with the same seed\n" + "".join(f"(last block: minus that of {other})\n" for other in others)
        + f"dots: runs; diamond: mean with its 95 % interval; {first}: {cells(lines, first)[1]}"
    )
    figure.tight_layout()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds a row (default 5)")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), help="only these rows")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs side by side (default: one a core)")
    parser.add_argument("--figure", help="write a figure of all rows to this file")
    parser.add_argument("--table", action="store_true", help="run nothing, print the tables")
    args = parser.parse_args()
    if not args.table:
        FILE.parent.mkdir(exist_ok=True)
        there, lock = {(line["row"], line["seed"]) for line in read()}, Lock()
        missing = [(row, seed) for row in args.rows for seed in range(args.seeds) if (row, seed) not in there]

        def job(row: str, seed: int) -> None:
            line = one_run(row, seed)
            with lock:
                new = not FILE.exists()
                with FILE.open("a", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS)
                    if new:
                        writer.writeheader()
                    writer.writerow(line)

        with ThreadPoolExecutor(args.workers) as pool:
            try:
                for future in tqdm(as_completed([pool.submit(job, *m) for m in missing]), total=len(missing), desc="runs"):
                    future.result()
            except KeyboardInterrupt:  # the runs get it too: each ends its step and saves
                sys.exit("stopping; the same command goes on from here")
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # else those in the queue would still be started
    lines = read()
    titles = [title for title in TABLES if len(rows_of(lines, title)) > 1]
    for title in titles:
        print_table(lines, title)
    if args.figure:
        draw(lines, titles).savefig(args.figure, dpi=90)


if __name__ == "__main__":
    main()
