"""Ablations in the miniature: `python tutorials/ablations.py` makes the runs that ablations.csv lacks, a line a run, and can be stopped and
started again; `python tutorials/ablations.py --table` prints what is there, with 95 % intervals.

Every row differs from "base" in the options that it names. A seed draws the same questions for every row, so rows are compared seed by seed.
Each run has one thread, so that the lines do not depend on the machine's number of cores; as many run side by side as there are cores.
"""

import argparse
import csv
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

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
    "samples": {f"{n} samples": f"--samples {n}" for n in (112, 320, 1280, 3008)},
    "KL, long": {"3008 samples, beta 0": "--samples 3008 --beta 0"},
}
ROWS = {"base": ""} | {name: options for table in TABLES.values() for name, options in table.items()}
COLUMNS = ("row", "seed", "options", "gIoU", "gIoU_lenient", "cIoU", "indirect", "format", "base_gIoU_lenient", "length", "kl", "zero_variance")


def one_run(row: str, seed: int) -> dict:
    """Train and test once; the CSV line."""
    folder = Path(tempfile.mkdtemp()) / "run"
    command = [sys.executable, str(ROOT / "train.py"), *FIXED, "--samples", str(SAMPLES), "--seed", str(seed), "--run", str(folder), *ROWS[row].split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    if done.returncode:
        raise RuntimeError(f"{row}, seed {seed}: {done.stderr[-1000:]}")
    summary = json.loads((folder / "summary.json").read_text())
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-10:]
    shutil.rmtree(folder.parent)
    trained, mean = summary["trained"], lambda name: statistics.mean(line[name] for line in last)
    line = {
        "row": row, "seed": seed, "options": ROWS[row], "indirect": trained["by_kind"]["indirect"]["gIoU_lenient"],
        "base_gIoU_lenient": summary["base"]["gIoU_lenient"],
        **{name: trained[name] for name in ("gIoU", "gIoU_lenient", "cIoU", "format")}, **{name: mean(name) for name in ("length", "kl", "zero_variance")},
    }
    return {name: round(line[name], 4) if isinstance(line[name], float) else line[name] for name in COLUMNS}


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


def compare(lines: list[dict], row: str, measure: str = "gIoU") -> dict:
    """A row's mean over seeds, and its difference from the base over the seeds that both have, each with half of its 95 % interval."""
    values = {line["seed"]: line[measure] for line in lines if line["row"] == row}
    base = {line["seed"]: line[measure] for line in lines if line["row"] == "base"}
    return {"runs": len(values), "mean": interval(list(values.values())), "difference": interval([v - base[s] for s, v in values.items() if s in base])}


def print_tables(lines: list[dict]) -> None:
    there = {line["row"] for line in lines}
    for title, rows in TABLES.items():
        if there & set(rows):
            print(f"\n{title:<28}{'runs':>6}{'gIoU':>16}{'against base':>18}")
            for row in ["base", *(r for r in rows if r in there)]:
                x = compare(lines, row)
                apart = "" if row == "base" else f"{x['difference'][0]:+.3f} ± {x['difference'][1]:.3f}"
                print(f"{row:<28}{x['runs']:>6}{x['mean'][0]:>8.3f} ± {x['mean'][1]:.3f}{apart:>18}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds a row (default 5)")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), help="only these rows")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs side by side (default: one a core)")
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
            for future in tqdm([pool.submit(job, *m) for m in missing], desc="runs"):
                future.result()
    print_tables(read())


if __name__ == "__main__":
    main()
