"""Start several processes for a training on a CPU. Each process has one thread.

Threads of OpenMP spin while they wait for each other. If another program takes a core, every small
operation waits for the thread on this core. Processes do not spin. Each process takes its share of
the questions. One sum of the adapter's gradients ends an update (processes.py).
"""

import _thread
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path

import psutil  # accelerate depends on psutil
import torch

from .config import Settings
from .gpu import GIB
from .stops import handled_signals, handlers_put_back, outlive_terminal

GRACE = 60.0  # seconds to save a run after one process has ended
MOST = 4  # processes that --processes 0 starts
PROCESS_BYTES = 1.5 * GIB  # memory of one process of the tiny preset
CRASHES = ("SIGKILL", "SIGSEGV", "SIGBUS", "SIGABRT")


def choose_processes(s: Settings) -> int:
    """Return the number of processes to start for these settings."""
    started_already = "WORLD_SIZE" in os.environ  # by torchrun or accelerate
    if started_already or s.device != "cpu" or s.rehearse:
        return 1
    return s.processes or automatic_number(s)


def automatic_number(s: Settings) -> int:
    """Return the number of processes for --processes 0: one for each physical core, at most 4.

    The number divides the questions of an update, and all processes fit in memory. Only the tiny
    preset's memory is known. So other models get one process.
    """
    if s.policy != "tiny" or s.sam != "tiny":
        return 1
    most = min(MOST, usable_cores(), int(usable_memory() / PROCESS_BYTES))
    for count in range(most, 1, -1):
        if s.questions % (s.updates * count) == 0:
            return count
    return 1


def usable_cores() -> int:
    """Return the number of physical cores. Cores that this process may not use do not count."""
    cores = psutil.cpu_count(logical=False) or 1
    if hasattr(psutil.Process, "cpu_affinity"):  # not on macOS
        cores = min(cores, len(psutil.Process().cpu_affinity()))
    return cores


# Limits of a container's memory in bytes, in Linux: cgroup version 2, and version 1.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def usable_memory() -> int:
    """Return the bytes of memory that programs can still take, or the container's limit if less."""
    usable = psutil.virtual_memory().available
    for file in map(Path, LIMITS):
        limit = file.read_text().strip() if file.is_file() else ""
        if limit.isdecimal():  # "max" means no limit
            usable = min(usable, int(limit))
    return usable


def start_processes(work: Callable[[Settings], None], s: Settings, count: int) -> int:
    """Run `work(s)` in `count` new processes, and wait for them. Returns the exit code.

    The exit code is that of the process that fails first, or 0. `work` is a function of a module.
    """
    # The processes find each other with this store. It lives here, so none waits for a dead one.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = []
    with signals_passed_on(started):
        with signals_held_back():  # the new processes inherit this, until they can handle signals
            context = torch.multiprocessing.start_processes(
                run_process, (work, s, count, store.port), count, join=False
            )
            started += context.processes
        try:
            while not context.join(grace_period=GRACE):
                pass
        except torch.multiprocessing.ProcessExitedException as failed:
            return exit_code(failed)
    return 0


def exit_code(failed: torch.multiprocessing.ProcessExitedException) -> int:
    """Return the exit code of a failed process. Prints a line if a signal has ended it."""
    if failed.exit_code >= 0:
        return failed.exit_code
    why = f"terminated ({failed.signal_name})"
    if failed.signal_name in CRASHES:
        why = (
            f"a process was ended by {failed.signal_name}. Perhaps the memory was full. Continue "
            "with --resume and the run's folder as --run, or start again with --processes 1"
        )
    print(f"train.py: {why}", file=sys.stderr)
    return 128 - failed.exit_code


def run_process(rank: int, work: Callable, s: Settings, count: int, port: int) -> None:
    """Run `work(s)` in this process, number `rank` of `count`."""
    if hasattr(os, "setpgrp"):
        # Ctrl-C in a terminal reaches a whole process group. In a group of its own, this process
        # gets the signal only from start_processes.
        os.setpgrp()
    outlive_terminal()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store of start_processes
        "OMP_NUM_THREADS": "1",  # otherwise accelerate sets more threads
    }
    if sys.platform != "win32":  # all processes are on this machine, whatever its name means
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    if sys.platform != "linux":  # in Linux, torch asks for a signal
        threading.Thread(target=stop_without_parent, daemon=True).start()
    try:
        release_signals()
        if rank > 0:
            import transformers

            transformers.utils.logging.disable_progress_bar()  # of the loading of weights
        work(s)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        traceback.print_exc()  # of each process: often only one of them has the cause
        sys.exit(1)


def stop_without_parent() -> None:
    """Wait until the parent process ends. Then act as Ctrl-C does."""
    multiprocessing.parent_process().join()
    _thread.interrupt_main()


# -------------------- signals


@contextmanager
def signals_passed_on(processes: list):
    """Context manager: send the handled signals to `processes`. This process itself continues.

    Ctrl-Z stops all processes until the shell continues this one. In Windows the signals reach all
    programs of a console, so this process ignores them.
    """

    def pass_on(number, _):
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def pause(_, frame):
        pass_on(signal.SIGSTOP, frame)
        os.kill(os.getpid(), signal.SIGSTOP)
        pass_on(signal.SIGCONT, frame)  # the shell has continued this process

    handler = pass_on
    if sys.platform == "win32":
        handler = signal.SIG_IGN
    elif handled_signals():  # in the main thread
        signal.signal(signal.SIGTSTP, pause)
    with handlers_put_back():
        for kind in handled_signals():
            signal.signal(kind, handler)
        yield


@contextmanager
def signals_held_back():
    """Context manager: the handled signals wait until the end of the block. Not in Windows."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # its start would release the signals
    signal.pthread_sigmask(signal.SIG_BLOCK, handled_signals())
    try:
        yield
    finally:
        release_signals()


def release_signals() -> None:
    """Handle signals that were held back, and later ones."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handled_signals())
