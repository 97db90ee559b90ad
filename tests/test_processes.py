"""More than one process: two on the CPU do what one does. Gloo carries their sums; Accelerate's own launcher starts CPU
processes by MPI only, so torchrun starts them here."""

import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from samr1_mini import grpo
from samr1_mini.config import UserError
from samr1_mini import processes

ROOT = Path(__file__).parent.parent
SHORT = [
    "--samples",
    "16",
    "--questions",
    "8",
    "--group",
    "4",
    "--updates",
    "2",
    "--eval-every",
    "0",
    "--test-samples",
    "4",
    "--max-new-tokens",
    "60",
    "--warmup",
    "1",
    "--lr",
    "1e-4",
]


def launch(count, folder, *options, script=ROOT / "train.py"):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(count),
        "--",
        str(script),
        "--device",
        "cpu",
        "--run",
        str(folder),
        *SHORT,
        *options,
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=600)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folders = {n: tmp_path_factory.mktemp("runs") / str(n) for n in (1, 2)}
    for n, folder in folders.items():
        out = launch(n, folder)
        assert out.returncode == 0, out.stderr[-3000:]
        assert out.stdout.count("held-out test, greedy") == 1  # the first process speaks
        assert out.stdout.count("preset tiny") == n  # and so many there were
    return folders


def test_two_processes_draw_the_same_answers_and_take_the_same_steps_as_one(both):
    one, two = (
        [json.loads(line) for line in (both[n] / "metrics.jsonl").read_text().splitlines()]
        for n in (1, 2)
    )
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2]
    for a, b in zip(one, two):
        # the same answers, so exactly the same
        for name in ("reward", "iou", "length", "unique", "truncated", "zero_variance", "points"):
            assert a[name] == pytest.approx(b[name], abs=1e-9), name
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3) and a[
            "loss"
        ] == pytest.approx(b["loss"], abs=1e-4)


def test_two_processes_keep_the_sampled_answers_of_both(both):
    one, two = (
        [json.loads(line) for line in (both[n] / "answers.jsonl").read_text().splitlines()]
        for n in (1, 2)
    )
    known = lambda lines: sorted((line["step"], line["id"], line["text"]) for line in lines)
    assert len(one) == 16 and known(one) == known(two)


def test_two_processes_end_with_the_adapter_of_one(both):
    one, two = (torch.load(both[n] / "state.pt", weights_only=True)["adapter"] for n in (1, 2))
    moved = apart = 0.0
    for name, value in one.items():
        if "lora_B" in name:  # starts at 0, so its size is how far it moved
            moved += value.square().sum()
            apart += (value - two[name]).square().sum()
    assert moved > 0 and (apart / moved).sqrt() < 1e-2


def test_two_processes_replace_the_same_flat_groups_and_scale_the_same_batch_as_one(tmp_path):
    """With two answers a group, most groups are flat. GDPO scales with the batch of all processes."""
    options = ("--redraw", "2", "--group", "2", "--advantage", "gdpo")
    logs, answers = [], []
    for n in (1, 2):
        out = launch(n, tmp_path / str(n), *options)
        assert out.returncode == 0, out.stderr[-3000:]
        logs.append(read_lines(tmp_path / str(n) / "metrics.jsonl"))
        lines = read_lines(tmp_path / str(n) / "answers.jsonl")
        answers.append(sorted((line["step"], line["id"], line["text"]) for line in lines))
    assert answers[0] == answers[1]
    assert [line["drawn"] for line in logs[0]] == [line["drawn"] for line in logs[1]]
    assert sum(line["drawn"] for line in logs[0]) == len(answers[0]) > 16
    for one, two in zip(*logs):
        for name in ("reward", "length", "zero_variance"):
            assert one[name] == pytest.approx(two[name], abs=1e-9), name
        assert one["flat_tokens"] == pytest.approx(two["flat_tokens"], abs=0.1)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-4)


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_an_update_in_which_nobody_has_a_gradient_moves_nothing_in_several_processes_either(
    monkeypatch,
):
    monkeypatch.setattr(processes, "PartialState", lambda: SimpleNamespace(num_processes=2))
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.0)
    monkeypatch.setattr(processes, "reduce", lambda mine, how: mine + torch.arange(5.0))
    processes.add_up_gradients(parameters)
    assert [p.grad.tolist() for p in parameters] == [[0, 1, 2], [3, 4]]
    optimizer.step(), optimizer.zero_grad()
    monkeypatch.setattr(processes, "reduce", lambda mine, how: mine)
    processes.add_up_gradients(parameters)
    before = [p.tolist() for p in parameters]
    optimizer.step()
    assert (
        all(p.grad is None for p in parameters) and [p.tolist() for p in parameters] == before
    )  # no momentum


def test_processes_share_items_and_rows_and_none_is_left_out(monkeypatch):
    shares, rows = [], []
    for i in range(3):
        state = SimpleNamespace(num_processes=3, process_index=i)
        monkeypatch.setattr(processes, "PartialState", lambda: state)
        shares.append(list(processes.share(range(7))))
        rows.append(processes.share(torch.arange(14).view(7, 2))[:, 0].tolist())
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    assert rows == [[0, 6, 12], [2, 8], [4, 10]]


def test_an_error_of_memory_lets_go_of_all_that_the_work_had_allocated():
    allocated = []

    def work():
        large = torch.zeros(1000)
        allocated.append(weakref.ref(large))
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    try:
        with processes.fail_together():
            work()
    except torch.OutOfMemoryError as error:  # while it is handled, as where the state is saved
        assert str(error) == "Tried to allocate 2.00 GiB" and allocated[0]() is None
    assert allocated


def test_questions_that_cannot_be_shared_are_refused(settings, monkeypatch):
    monkeypatch.setattr(grpo, "process_count", lambda: 2)
    with pytest.raises(UserError, match="--questions 7.* 2 .*--processes.*--updates 2"):
        grpo.train(replace(settings, questions=7))


def test_a_mean_and_an_extreme_are_those_of_the_processes_that_have_the_number(monkeypatch):
    """A process has no entropy if none of its groups takes part in the updates."""
    lines = [
        {"loss": 1.0, "entropy": 0.4, "ratio_max": 1.5, "ratio_min": 0.5},
        {"loss": 2.0, "ratio_max": 1.2},
    ]
    monkeypatch.setattr(processes, "gather_object", lambda mine: lines)
    expected = {"loss": 1.5, "entropy": 0.4, "ratio_max": 1.5, "ratio_min": 0.5}
    assert [processes.average(line) for line in lines] == [expected] * 2


FULL = """
import os, sys, torch, train
from samr1_mini import evaluation, grpo

module, name, call = {"update": (grpo, "one_update", 4), "evaluation": (evaluation, "generate", 1)}[os.environ["WHERE"]]
real, calls = getattr(module, name), []

def full(*args, **kwargs):
    calls.append(1)
    # in the second process alone; of the updates, the second of the second step
    if os.environ["RANK"] == "1" and len(calls) == call:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
    return real(*args, **kwargs)

setattr(module, name, full)
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("where", ["update", "evaluation"])
def test_memory_that_runs_out_in_one_process_ends_all_with_one_line_and_leaves_the_state_before_the_step(
    where, tmp_path, monkeypatch
):
    (tmp_path / "full.py").write_text(FULL)
    monkeypatch.setenv("WHERE", where)
    out = launch(2, tmp_path / "run", script=tmp_path / "full.py")
    assert (
        out.returncode != 0
        and out.stderr.count("train.py: error: memory ran out") == 1
        and "2.00 GiB" in out.stderr
    )
    if where == "update":
        assert (
            "step 1 is saved; continue with" in out.stdout
            and torch.load(tmp_path / "run/state.pt", weights_only=True)["step"] == 1
        )


def test_processes_wait_for_each_other_as_long_as_a_large_download_takes(tmp_path):
    (tmp_path / "wait.py").write_text(
        "import os, sys, torch, torch.distributed as d\n"
        "from samr1_mini.config import Settings\n"
        "from samr1_mini.processes import join_processes\njoin_processes(Settings(device='cpu'))\n"
        "waits = d.group.WORLD._get_backend(torch.device('cpu')).options._timeout.total_seconds()\n"
        "open(os.path.join(os.path.dirname(sys.argv[0]), 'waits' + os.environ['RANK']), 'w').write(str(waits))\n"
        "d.destroy_process_group()"
    )
    out = launch(2, tmp_path / "run", script=tmp_path / "wait.py")
    waits = [
        float(path.read_text()) for path in tmp_path.glob("waits*")
    ]  # two processes' prints may share a line
    assert len(waits) == 2 and min(waits) >= 3 * 3600, out.stderr[-2000:]
