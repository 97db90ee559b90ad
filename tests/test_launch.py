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

import psutil
import pytest
import torch
from test_stops import environment, saved_state

from samr1_mini import launch, processes
from samr1_mini.config import Settings, UserError, make_settings, parse_settings
from samr1_mini.processes import join_processes

ROOT = Path(__file__).parent.parent
SHORT = shlex.split(
    "--device cpu --questions 4 --group 4 --updates 2 --eval-every 0 --test-samples 4 "
    "--max-new-tokens 60 --warmup 1"
)
CPU = Settings(device="cpu")  # 16 questions, 4 updates


@pytest.fixture(autouse=True)
def without_another_launcher(monkeypatch):
    """Undo what conftest.py sets for the other tests."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    "settings, count",
    [
        ({}, 3),
        ({"processes": 1}, 1),
        ({"processes": 4}, 4),
        ({"processes": 4, "device": "cuda"}, 1),
        ({"processes": 4, "rehearse": 1}, 1),
    ],
)
def test_only_a_training_on_a_cpu_starts_several_processes(settings, count, monkeypatch):
    monkeypatch.setattr(launch, "automatic_number", lambda s: 3)
    assert launch.choose_processes(replace(CPU, **settings)) == count


@pytest.mark.parametrize(
    "cores, gib, given, count",
    [
        (2, 16, {}, 2),
        (1, 16, {}, 1),
        (64, 64, {}, 4),
        (3, 16, {}, 2),  # 4 questions of an update are not shared by 3
        (8, 16, {"questions": 6, "updates": 2}, 3),
        (8, 3.2, {}, 2),  # each process needs 1.5 GiB
        (8, 1, {}, 1),
        (8, 16, {"policy": "a/folder"}, 1),
        (8, 16, {"sam": "vit_b"}, 1),
    ],
)
def test_the_automatic_number_fits_cores_memory_and_questions(
    cores, gib, given, count, monkeypatch
):
    monkeypatch.setattr(launch, "usable_cores", lambda: cores)
    monkeypatch.setattr(launch, "usable_ram", lambda: gib * 2**30)
    assert launch.choose_processes(replace(CPU, processes=0, **given)) == count


def test_cores_that_a_process_may_not_use_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "CPU_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None if logical else 6)
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: [0, 5], raising=False)
    assert launch.usable_cores() == 2
    monkeypatch.delattr(psutil.Process, "cpu_affinity")  # macOS
    assert launch.usable_cores() == 6
    for limit, count in (("max", 6), ("250000", 2), ("50000", 1), ("900000", 6)):  # of a container
        (tmp_path / "cpu.max").write_text(f"{limit} 100000\n")
        assert launch.usable_cores() == count
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None)  # unknown
    assert launch.usable_cores() == 1


@pytest.mark.parametrize("text, limit", [("max\n", None), ("123456789\n", 123456789)])
def test_the_limit_of_a_container_limits_the_usable_memory(text, limit, tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text(text)
    monkeypatch.setattr(launch, "LIMIT_FILES", (tmp_path / "memory.max", tmp_path / "absent"))
    monkeypatch.setattr(launch, "USED_FILE", tmp_path / "memory.stat")
    if limit:
        assert launch.usable_ram() == limit
        (tmp_path / "memory.stat").write_text("anon 1000\nfile 5000\n")
        assert launch.usable_ram() == limit - 1000
    else:
        assert launch.usable_ram() > 2**30


def test_processes_of_another_launcher_start_no_more_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.choose_processes(replace(CPU, processes=4)) == 1


@pytest.mark.parametrize(
    "given", [{"processes": -1}, {"processes": 3}, {"processes": 2, "questions": 9, "updates": 3}]
)
def test_a_number_of_processes_that_cannot_share_the_questions_is_refused(given):
    with pytest.raises(UserError, match="processes"):
        make_settings(device="cpu", **given)


def command(folder, *options):
    return [sys.executable, str(ROOT / "train.py"), "--run", str(folder), *SHORT, *options]


def train(folder, *options):
    words = command(folder, *options)
    return subprocess.run(words, capture_output=True, text=True, env=plain(), timeout=600)


def plain():
    """The environment of a user, who sets no number of threads and uses no other launcher."""
    mine = ("OMP_NUM_THREADS", "WORLD_SIZE")
    return {name: x for name, x in environment().items() if name not in mine}


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
    assert "OMP_NUM_THREADS" not in out.stderr  # accelerate would set other threads
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


def test_without_the_option_a_run_records_the_number_that_it_started(tmp_path):
    out = train(tmp_path, "--samples", "4")
    assert out.returncode == 0, out.stderr[-3000:]
    saved, _ = parse_settings(["--resume", "--run", str(tmp_path)], "train.py", "")
    assert saved.processes == launch.automatic_number(replace(saved, processes=0))
    assert (f"; {saved.processes} processes" in out.stdout) == (saved.processes > 1)


@pytest.mark.parametrize("threads, expected", [(None, 1), ("2", 2), ("0", 1), ("2,1", 1)])
def test_a_process_on_a_cpu_has_one_thread_unless_the_environment_names_a_number(threads, expected):
    code = (
        "import torch; from samr1_mini.config import Settings; "
        "from samr1_mini.processes import join_processes; "
        "join_processes(Settings(device='cpu', preset='tiny')); "
    )
    env = plain() | ({"OMP_NUM_THREADS": threads} if threads else {})
    words = [sys.executable, "-c", code + "print(torch.get_num_threads())"]
    out = subprocess.run(words, capture_output=True, text=True, env=env, timeout=120)
    assert int(out.stdout) == expected, out.stderr


def write_threads(s):
    """The work of a process: write its number of threads to a file."""
    join_processes(s)
    (Path(s.run) / os.environ["RANK"]).write_text(str(torch.get_num_threads()))


@pytest.mark.parametrize("preset, cores, expected", [("tiny", 2, 1), ("3b", 2, 2), ("3b", 1, 1)])
def test_a_large_policy_on_a_cpu_uses_all_cores(preset, cores, expected, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(processes, "usable_cores", lambda: cores)
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    join_processes(replace(CPU, preset=preset))
    assert asked == [expected]


def write_backend(s):
    """The work of a process: write whether its connection to the store needs libuv."""
    store = torch.distributed.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    (Path(s.run) / os.environ["RANK"]).write_text(str(store.libuvBackend))


def test_started_processes_find_each_other_without_libuv_which_pytorch_lacks_in_windows(
    tmp_path, monkeypatch
):
    made, store = [], torch.distributed.TCPStore
    monkeypatch.setattr(
        torch.distributed, "TCPStore", lambda *a, **k: made.append(store(*a, **k)) or made[0]
    )
    assert launch.start_processes(write_backend, replace(CPU, run=str(tmp_path)), 2) == 0
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["False", "False"]
    assert not made[0].libuvBackend


def test_each_started_process_has_one_thread_whatever_the_environment_names(tmp_path, monkeypatch):
    """PyTorch reads the environment at its import, which is before run_process changes it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert launch.start_processes(write_threads, replace(CPU, run=str(tmp_path)), 2) == 0
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["1", "1"]


def started(folder, samples):
    """Start a run with two processes, and return it after its first step."""
    words = command(folder, "--samples", str(samples), "--processes", "2")
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=plain()
    )
    log, end = folder / "metrics.jsonl", time.monotonic() + 300
    while not (log.exists() and log.read_text().count("\n")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    time.sleep(0.5)  # the state of the step is taken just after its line is written
    return process


def test_ctrl_c_saves_a_run_of_two_processes_and_the_printed_command_continues_it(
    whole_run, tmp_path
):
    process = started(tmp_path / "run", 4000)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err
    steps = saved_state(tmp_path / "run")["step"]
    assert 1 <= steps == len(log_of(tmp_path / "run"))
    [line] = [line.strip() for line in out.splitlines() if "--resume" in line]
    words = shlex.split(line)
    assert words[0] == "python"
    words[words.index("--samples") + 1] = str(4 * (steps + 1))
    again = subprocess.run(
        [sys.executable, *words[1:]], capture_output=True, text=True, env=plain(), timeout=600
    )
    assert again.returncode == 0, again.stderr[-3000:]
    log = log_of(tmp_path / "run")
    assert len(log) == steps + 1 and log[:3] == log_of(whole_run)[: len(log)]


def test_ctrl_z_stops_all_processes_and_sigterm_saves_them_after_they_continue(tmp_path):
    process = started(tmp_path / "run", 4000)
    process.send_signal(signal.SIGTSTP)
    trainings = training_processes(process)
    end = time.monotonic() + 60
    while any(one.status() != psutil.STATUS_STOPPED for one in trainings):
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in err
    assert saved_state(tmp_path / "run")["step"] == len(log_of(tmp_path / "run"))


def training_processes(process):
    """The processes of a run that train."""
    found = psutil.Process(process.pid).children(recursive=True)
    found = [one for one in found if any("spawn_main" in word for word in one.cmdline())]
    assert len(found) == 2
    return found


def test_a_signal_before_the_processes_exist_reaches_them_later():
    reached, before = [], signal.getsignal(signal.SIGTERM)

    class Process:
        pid = 0

        def is_alive(self):
            reached.append("alive?")
            return False

    processes = []
    with launch.signals_passed_on(processes) as missed:
        signal.raise_signal(signal.SIGTERM)
        assert missed == [signal.SIGTERM] and not reached
        processes.append(Process())
        signal.raise_signal(signal.SIGTERM)
        assert missed == [signal.SIGTERM] and reached == ["alive?"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_process_that_is_killed_ends_the_run_with_one_line_and_its_last_step_is_saved(tmp_path):
    process = started(tmp_path / "run", 4000)
    workers = psutil.Process(process.pid).children(recursive=True)
    max(
        training_processes(process), key=lambda one: one.pid
    ).kill()  # not the first process, which saves
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL
    assert err.count("train.py:") == 1 and "SIGKILL" in err
    assert saved_state(tmp_path / "run")["step"] == len(log_of(tmp_path / "run"))
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive


def test_a_mistake_of_the_user_is_one_line_with_several_processes_too(tmp_path):
    (tmp_path / "data.jsonl").write_text("")
    out = train(tmp_path / "run", "--data", str(tmp_path), "--samples", "4", "--processes", "2")
    assert out.returncode == 2 and "Traceback" not in out.stderr
    assert out.stderr.count("train.py: error:") == 1 and "data.jsonl" in out.stderr


@pytest.mark.parametrize("seconds", [1, 6])
def test_ctrl_c_before_the_first_step_ends_all_processes_without_a_traceback(seconds, tmp_path):
    words = command(tmp_path / "run", "--samples", "4000", "--processes", "2")
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=plain()
    )
    assert process.stdout.readline().startswith("preset tiny")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err, err
