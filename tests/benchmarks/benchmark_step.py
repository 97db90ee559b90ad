"""Measure a whole GRPO step against TRL's GRPOTrainer, and how a step grows.

    python tests/benchmarks/benchmark_step.py     # for TRL's rows: pip install trl

Policy, pictures, questions, reward (with SAM), G, number of updates and answer length are the same.
No answer may stop early. Each row is a process of its own, so its peak memory is its own too.
Seconds are the median of the steps after the first.

On a CPU, each program runs in each of its CPU_WAYS: ours also as two processes of one thread, if
there are two questions or more. So the best setting of both programs is among the rows.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # Python looks for modules only in the script's own folder

from samr1_mini.config import Settings, make_settings
from samr1_mini.data import load_data
from samr1_mini.evaluation import policy_image
from samr1_mini.grpo import Parts, new_optimizer, roll_out, update
from samr1_mini.policy import instruction, load_policy
from samr1_mini.reward import read_answer, score_group
from samr1_mini.gpu import gpu_fault
from samr1_mini.memory import peak_memory
from samr1_mini.processes import average, is_first, join_processes, share
from samr1_mini.segmenter import load_segmenter

TINY = dict(image_size=112, questions=16, updates=4, group=8, max_new_tokens=48)
LONG = dict(image_size=420, questions=1, updates=1, group=8, max_new_tokens=48)
# The three sizes of the notes first, then more sizes of the group and of the answers.
ROWS = [
    TINY,
    LONG,
    LONG | dict(max_new_tokens=192),
    *(LONG | dict(group=g) for g in (4, 16)),
    LONG | dict(max_new_tokens=96),
]
# (processes, threads of each process)
CPU_WAYS = {"ours": [(2, 1), (1, 1), (1, 2)], "trl": [(1, 1), (1, 2)]}
PHASES = ("seconds_rollout", "seconds_reward", "seconds_update")


def ours(s: Settings, steps: int) -> list[dict]:
    """Return the seconds of each step, and of its phases: means of the processes."""
    join_processes(s)
    policy = load_policy(s.policy, s.load_in, s.rank, device=s.device)
    segmenter = load_segmenter(s.sam, device=s.device)
    policy.banned[policy.stop] = True
    parts = Parts(policy, segmenter, new_optimizer(policy, s), s)
    data = load_data("shapes", "train", steps * s.questions)
    taken = []
    for step in range(steps):
        start = time.perf_counter()
        samples = [data[step * s.questions + i] for i in share(range(s.questions))]
        rollouts, phases = roll_out(parts, samples)
        phases |= update(parts, rollouts, step * s.updates)
        if s.device == "cuda":
            torch.cuda.synchronize()
        phases = {name: phases[name] for name in PHASES}
        taken.append(average({"seconds": time.perf_counter() - start} | phases))
    return taken


def device_name() -> str:
    """Return the name of the GPU. Without a GPU, return the CPU's threads and architecture."""
    if gpu_fault():
        return f"{torch.get_num_threads()} threads, {platform.machine()}"
    return torch.cuda.get_device_name()


def trl_config(s: Settings, steps: int, folder: str):
    """Return TRL's settings for the same training. It writes to `folder`."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder,
        use_cpu=s.device == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
        max_steps=steps * s.updates,
        learning_rate=s.lr,
        max_grad_norm=s.max_grad_norm,
        per_device_train_batch_size=s.questions * s.group // s.updates,
        gradient_accumulation_steps=1,
        steps_per_generation=s.updates,
        num_generations=s.group,
        max_completion_length=s.max_new_tokens,
        generation_kwargs={"min_new_tokens": s.max_new_tokens},
        temperature=s.temperature,
        top_k=0,
        beta=s.beta,
        epsilon=s.eps_low,
        epsilon_high=s.eps_high,
    )


def trl(s: Settings, steps: int) -> list[dict]:
    """Return the seconds of each step in TRL, with as many updates, each on as many answers."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    policy = load_policy(s.policy, s.load_in, s.rank, device=s.device)
    segmenter = load_segmenter(s.sam, device=s.device)
    data, times = list(load_data("shapes", "train", steps * s.questions)), []

    def reward(completions, number, **_):
        texts, rewards = [c[0]["content"] for c in completions], []
        for i in range(0, len(number), s.group):
            answers = [read_answer(text, s.image_size) for text in texts[i : i + s.group]]
            rewards += score_group(segmenter, data[number[i]], answers, s)
        return [r.total for r in rewards]

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            times.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

    asked = [
        [{"role": "user", "content": instruction(x.question, s.image_size, s.image_size)}]
        for x in data
    ]
    images = [policy_image(x, s.image_size) for x in data]
    rows = [
        {"prompt": p, "image": image, "number": i}
        for i, (p, image) in enumerate(zip(asked, images))
    ]
    with tempfile.TemporaryDirectory() as folder:
        GRPOTrainer(
            model=policy.model,
            processing_class=policy.processor,
            reward_funcs=reward,
            args=trl_config(s, steps, folder),
            train_dataset=Dataset.from_list(rows),
            callbacks=[Clock()],
        ).train()
    return [
        {"seconds": times[i + s.updates] - times[i]} for i in range(0, len(times) - 1, s.updates)
    ]


def measure(name: str, sizes: dict, steps: int) -> None:
    """Measure one row in this process, and print its figures as JSON."""
    s, _ = make_settings(preset="tiny", **sizes)
    if name == "ours":
        taken = ours(s, steps)
    else:
        taken = trl(s, steps)
    figures = {}
    for column in taken[0]:
        figures[column] = statistics.median(one[column] for one in taken[1:])
    if name == "trl" or is_first():
        print(json.dumps(figures | {"peak_gib": peak_memory(s.device)}))


def measured_row(name: str, sizes: dict, steps: int, processes: int, threads: int) -> dict:
    """Measure one row in other processes. peak_gib is the peak of one process."""
    row = json.dumps([name, sizes])
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += [__file__, "--steps", str(steps), "--row", row]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=environment
    )
    if done.returncode:
        sys.exit(f"{name} {sizes}: {done.stderr[-2000:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    return {"way": name, "processes": processes, "threads": threads, **sizes, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=4, help="steps a row, the first of which warms up (default 4)"
    )
    parser.add_argument(
        "--sizes", type=int, default=len(ROWS), help="only the first sizes (default: all)"
    )
    parser.add_argument("--out", help="write the figures to this JSON file too")
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)  # see measured_row
    args = parser.parse_args()
    if args.row:
        measure(*args.row, args.steps)
        return
    versions = {}
    for name in ("torch", "transformers", "trl"):
        if importlib.util.find_spec(name):
            versions[name] = version(name)
    names = ["ours"]
    if "trl" in versions:
        names.append("trl")
    result = {"versions": versions, "device": device_name(), "rows": []}
    columns = ["processes", "threads", *TINY]
    print(f"{'':<8}" + "".join(f"{name:>16}" for name in [*columns, "seconds", "peak GiB"]))
    for sizes in ROWS[: args.sizes]:
        for name in names:
            ways = [(1, 1)] if torch.cuda.is_available() else CPU_WAYS[name]
            for processes, threads in ways:
                if processes > sizes["questions"]:
                    continue
                row = measured_row(name, sizes, args.steps, processes, threads)
                result["rows"].append(row)
                cells = "".join(f"{row[column]:>16}" for column in columns)
                print(
                    f"{name:<8}{cells}{row['seconds']:>16.2f}{row['peak_gib']:>16.2f}", flush=True
                )
                if args.out:
                    Path(args.out).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
