"""Start several processes for a training on a CPU. Each process has one thread.

OpenMP's threads keep their cores busy while they wait for each other. If another program takes a
core, every small operation waits for the thread on this core. Several processes with one thread
each are faster. Each process takes its share of the questions. At the end of an update, the
gradients of all processes are added up once (processes.py).
"""

import _thread
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path

import psutil  # accelerate depends on psutil
import torch

from .config import PACKAGED, Settings, can_share
from .gpu import GIB
from .stops import handled_signals, handlers_put_back, outlive_terminal

GRACE = 60.0  # seconds: if one process has failed, the others may save the run in this time
MOST = 4  # the largest number that --processes 0 starts
PROCESS_BYTES = 1.5 * GIB  # memory of one process of the tiny preset
CRASHES = ("SIGKILL", "SIGSEGV", "SIGBUS", "SIGABRT")


def choose_processes(s: Settings) -> int:
    """Return the number of processes to start. On a GPU and in a rehearsal it is 1."""
    # torchrun and accelerate set WORLD_SIZE in the processes that they start
    if "WORLD_SIZE" in os.environ or s.device != "cpu" or s.rehearse:
        return 1
    return s.processes or automatic_number(s)


def automatic_number(s: Settings) -> int:
    """Return the number of processes for --processes 0: one for each physical core, at most 4.

    The number is smaller if the processes would not get equal shares of each update's questions, or
    would not fit in memory. Only the tiny preset's memory is known. So other models get one
    process.
    """
    if s.policy not in PACKAGED or s.sam != "tiny":
        return 1
    for count in range(min(MOST, most_processes()), 1, -1):
        if can_share(s, count):
            return count
    return 1


def most_processes() -> int:
    """Return the number of tiny processes for which there are cores and memory, at least 1."""
    return max(1, min(usable_cores(), int(usable_ram() / PROCESS_BYTES)))


# Limits of a Linux container (cgroup): CPUs, and bytes of memory in version 2 and in version 1.
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
USED_FILE = Path("/sys/fs/cgroup/memory.stat")  # "anon 1234": bytes that its programs use


def usable_cores() -> int:
    """Return the number of physical cores, but at most the number that this process may use."""
    cores = psutil.cpu_count(logical=False) or 1
    if hasattr(psutil.Process, "cpu_affinity"):  # not on macOS
        cores = min(cores, len(psutil.Process().cpu_affinity()))
    if CPU_LIMIT.is_file():
        quota, period = CPU_LIMIT.read_text(encoding="utf-8").split()  # "200000 100000": 2 CPUs
        if quota != "max":  # "max" means no limit
            cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def usable_ram() -> int:
    """Return the bytes of memory that are free, also within the limit of this container."""
    usable = psutil.virtual_memory().available
    used = 0
    if USED_FILE.is_file():
        counts = dict(line.split() for line in USED_FILE.read_text(encoding="utf-8").splitlines())
        used = int(counts.get("anon", 0))
    for file in map(Path, LIMIT_FILES):
        limit = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
        if limit.isdecimal():  # "max" means no limit
            usable = min(usable, int(limit) - used)
    return usable


def start_processes(work: Callable[[Settings], None], s: Settings, count: int) -> int:
    """Run `work(s)` in `count` new processes, and wait for them. Returns the exit code.

    The exit code is 0, or that of the first process that failed. `work` must be at the top level of
    a module, because it is pickled.
    """
    # The processes find each other by this store. The store is in this process, because the others
    # may fail. In Windows, PyTorch comes without libuv.
    store = torch.distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=False
    )
    started = []
    with signals_passed_on(started) as missed:
        with signals_held_back():  # the new processes inherit this; run_process ends it
            try:
                context = torch.multiprocessing.start_processes(
                    run_process, (work, s, count, store.port), count, join=False
                )
            except BaseException:  # some may have started
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
            started += context.processes
        for number in missed:
            signal.raise_signal(number)
        try:
            while not context.join(grace_period=GRACE):  # returns when one process has ended
                pass
        except torch.multiprocessing.ProcessExitedException as failed:
            return exit_code(failed)
    return 0


def exit_code(failed: torch.multiprocessing.ProcessExitedException) -> int:
    """Return the exit code of a failed process. Prints a line if a signal ended the process."""
    if failed.exit_code >= 0:
        return failed.exit_code
    why = f"terminated ({failed.signal_name})"
    if failed.signal_name in CRASHES:
        why = (
            f"a process was ended by {failed.signal_name}. Perhaps memory ran out. Continue with "
            "--resume --run FOLDER, or start again with --processes 1"
        )
    print(f"train.py: {why}", file=sys.stderr)
    return 128 - failed.exit_code  # its exit code is minus the signal's number


def run_process(rank: int, work: Callable, s: Settings, count: int, port: int) -> None:
    """Run `work(s)` in this process, number `rank` of `count`."""
    if hasattr(os, "setpgrp"):
        # Ctrl-C in a terminal reaches each process of its group. This process leaves the group, so
        # it gets the signal once, from start_processes.
        os.setpgrp()
    outlive_terminal()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",  # otherwise accelerate sets a larger number
    }
    if sys.platform != "win32":  # the name of this machine may point to another address
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    if sys.platform != "linux":  # in Linux, the kernel sends a signal
        threading.Thread(target=stop_without_parent, daemon=True).start()
    try:
        release_signals()
        from .processes import PATIENCE  # processes.py imports this file

        store = torch.distributed.TCPStore("127.0.0.1", port, use_libuv=False)
        torch.distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=count, timeout=PATIENCE
        )
        if rank > 0:
            import transformers

            transformers.utils.logging.disable_progress_bar()  # while weights load
        work(s)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        traceback.print_exc()  # every process prints, because often only one knows the cause
        sys.exit(1)


def stop_without_parent() -> None:
    """Wait until the parent process ends. Then act as Ctrl-C does."""
    multiprocessing.parent_process().join()
    _thread.interrupt_main()


# -------------------- signals


@contextmanager
def signals_passed_on(processes: list):
    """Context manager: send the handled signals to `processes`. They do not end this process.

    Yields a list of the signals that came before there were processes. Ctrl-Z pauses all processes
    until the shell continues this one. In Windows the signals reach all programs of a console, so
    this process ignores them.
    """
    missed = []

    def send(number):
        for process in processes:
            with suppress(ProcessLookupError):  # it has just ended
                if process.is_alive():
                    os.kill(process.pid, number)

    def pass_on(number, _):
        send(number)
        if not processes:
            missed.append(number)

    def pause(*_):
        send(signal.SIGSTOP)
        signal.raise_signal(signal.SIGSTOP)
        send(signal.SIGCONT)  # the shell has continued this process

    handlers = dict.fromkeys(handled_signals(), pass_on)
    if sys.platform == "win32":
        handlers = dict.fromkeys(handled_signals(), signal.SIG_IGN)
    elif handlers:
        handlers[signal.SIGTSTP] = pause
    with handlers_put_back(handlers):
        yield missed


@contextmanager
def signals_held_back():
    """Context manager: the handled signals wait until the end of the block (not in Windows)."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # If multiprocessing's tracker process started later, its start would release the signals.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, handled_signals())
    try:
        yield
    finally:
        release_signals()


def release_signals() -> None:
    """Stop holding signals back. Those that waited arrive now."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handled_signals())
