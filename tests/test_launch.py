"""Training on a CPU with several processes of one thread: how many, how they start, and how they stop."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from test_stops import environment, saved_state

from samr1_mini import launch
from samr1_mini.config import Settings, UserError, make_settings, parse_settings

ROOT = Path(__file__).parent.parent
SHORT = shlex.split(
    "--device cpu --questions 4 --group 4 --updates 2 --eval-every 0 --test-samples 4 "
    "--max-new-tokens 60 --warmup 1"
)
CPU = Settings(device="cpu")  # 16 questions, 4 updates


@pytest.mark.parametrize(
    "cores, free, settings, count",
    [
        (1, 16, {}, 1),
        (2, 16, {}, 2),
        (3, 16, {}, 2),  # three processes cannot share four questions
        (4, 16, {}, 4),
        (16, 16, {}, 4),
        (4, 5, {}, 2),  # three processes would fit into 5 GiB
        (4, 1, {}, 1),
        (4, 16, {"updates": 8}, 2),
        (4, 16, {"questions": 6, "updates": 2}, 3),
        (4, 16, {"policy": "some/folder"}, 1),
        (4, 16, {"policy": "some/folder", "processes": 2}, 2),
        (4, 16, {"processes": 1}, 1),
        (1, 1, {"processes": 4}, 4),
        (4, 16, {"device": "cuda"}, 1),
        (4, 16, {"rehearse": 1}, 1),
    ],
)
def test_the_number_of_processes_follows_cores_memory_and_questions(
    cores, free, settings, count, monkeypatch
):
    monkeypatch.setattr(launch, "MOST", 4)
    monkeypatch.setattr(launch, "cpu_cores", lambda: cores)
    memory = SimpleNamespace(available=free * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert launch.choose_processes(replace(CPU, **settings)) == count


def test_processes_of_another_launcher_start_no_more_processes(monkeypatch):
    monkeypatch.setattr(launch, "MOST", 4)
    monkeypatch.setattr(launch, "cpu_cores", lambda: 4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.choose_processes(CPU) == 1


def test_cores_that_this_program_may_not_use_do_not_count():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system binds no program to cores")
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert launch.cpu_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(
    "given", [{"processes": -1}, {"processes": 3}, {"processes": 2, "questions": 9, "updates": 3}]
)
def test_a_number_of_processes_that_cannot_share_the_questions_is_refused(given):
    with pytest.raises(UserError, match="processes"):
        make_settings(device="cpu", **given)


def command(folder, *options):
    return [sys.executable, str(ROOT / "train.py"), "--run", str(folder), *SHORT, *options]


def train(folder, *options):
    return subprocess.run(
        command(folder, *options), capture_output=True, text=True, env=environment(), timeout=600
    )


def log_of(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "tokens_per_second", "peak_memory")
    log = []
    for line in map(json.loads, lines):
        log.append({name: x for name, x in line.items() if not name.startswith(timed)})
    return log


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run of three steps with two processes."""
    folder = tmp_path_factory.mktemp("launch") / "run"
    out = train(folder, "--samples", "12", "--processes", "2")
    assert out.returncode == 0, out.stderr[-3000:]
    assert out.stdout.count("held-out test, greedy") == 1  # only the first process prints
    return folder


def test_two_processes_compute_what_torchrun_computes_with_two(whole_run, tmp_path):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*start, "--", *command(tmp_path / "run", "--samples", "12")[1:]]
    out = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=600)
    assert out.returncode == 0, out.stderr[-3000:]
    assert len(log_of(whole_run)) == 3 and log_of(whole_run) == log_of(tmp_path / "run")


def test_a_run_keeps_its_number_of_processes(whole_run, capsys):
    saved = json.loads((whole_run / "settings.json").read_text())
    assert saved["processes"] == 2
    resume = ["--resume", "--run", str(whole_run)]
    settings, _ = parse_settings(resume, "train.py", "")
    assert launch.choose_processes(settings) == 2
    with pytest.raises(SystemExit):
        parse_settings([*resume, "--processes", "1"], "train.py", "")
    assert "--processes" in capsys.readouterr().err


def test_a_run_of_an_older_version_had_one_process(whole_run, tmp_path):
    saved = json.loads((whole_run / "settings.json").read_text())
    del saved["processes"]
    (tmp_path / "settings.json").write_text(json.dumps(saved))
    settings, _ = parse_settings(["--resume", "--run", str(tmp_path)], "train.py", "")
    assert settings.processes == 1


def started(folder, samples):
    """Start a run with two processes, and return it after its first step."""
    words = command(folder, "--samples", str(samples), "--processes", "2")
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    log, end = folder / "metrics.jsonl", time.monotonic() + 300
    while not (log.exists() and log.read_text().count("\n")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    time.sleep(0.5)  # the state of the step is taken just after its line is written
    return process


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_a_signal_saves_a_run_of_two_processes_and_the_printed_command_continues_it(
    number, code, whole_run, tmp_path
):
    process = started(tmp_path / "run", 4000)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code and "Traceback" not in err
    steps = saved_state(tmp_path / "run")["step"]
    assert 1 <= steps == len(log_of(tmp_path / "run"))
    [line] = [line.strip() for line in out.splitlines() if "--resume" in line]
    words = shlex.split(line)
    assert words[0] == "python"
    words[words.index("--samples") + 1] = str(4 * (steps + 1))
    again = subprocess.run(
        [sys.executable, *words[1:]], capture_output=True, text=True, env=environment(), timeout=600
    )
    assert again.returncode == 0, again.stderr[-3000:]
    log = log_of(tmp_path / "run")
    assert len(log) == steps + 1 and log[:3] == log_of(whole_run)[: len(log)]


def test_a_process_that_is_killed_ends_the_run_with_one_line_and_its_last_step_is_saved(tmp_path):
    process = started(tmp_path / "run", 4000)
    workers = psutil.Process(process.pid).children(recursive=True)
    trainings = [one for one in workers if any("spawn_main" in word for word in one.cmdline())]
    assert len(trainings) == 2
    max(trainings, key=lambda one: one.pid).kill()  # not the first process, which saves
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL
    assert err.count("train.py:") == 1 and "SIGKILL" in err and "Traceback" not in err
    assert saved_state(tmp_path / "run")["step"] == len(log_of(tmp_path / "run"))
    assert not any(one.is_running() for one in workers)


def test_a_mistake_of_the_user_is_one_line_with_several_processes_too(tmp_path):
    (tmp_path / "data.jsonl").write_text("")
    out = train(tmp_path / "run", "--data", str(tmp_path), "--samples", "4", "--processes", "2")
    assert out.returncode == 2 and "Traceback" not in out.stderr
    assert out.stderr.count("train.py: error:") == 1 and "data.jsonl" in out.stderr


def test_a_training_computes_with_one_thread(settings, tmp_path):
    from samr1_mini.grpo import train as train_here

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        train_here(replace(settings, run=str(tmp_path / "run")))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
