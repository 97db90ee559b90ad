"""Start several processes for a training on a CPU. Each process has one thread.

Threads of OpenMP spin while they wait for each other. If another program takes a core, thousands of
small operations wait for this core. Processes do not spin. Each process takes its share of the
questions. One sum of the adapter's gradients ends an update (processes.py).
"""

import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import contextmanager

import psutil
import torch.multiprocessing as multiprocessing
import transformers

from .config import Settings
from .gpu import GIB
from .stops import handled_signals, handlers_put_back, outlive_terminal

MOST = 4  # processes, because an update of the default settings has four questions
PROCESS_GIB = 1.5  # memory of one process with the tiny policy
GRACE = 600.0  # seconds to save a run after one process has ended


def cpu_cores() -> int:
    """Return the number of physical cores that this program may use."""
    cores = psutil.cpu_count(logical=False) or 1
    program = psutil.Process()
    if hasattr(program, "cpu_affinity"):  # macOS has no such list
        cores = min(cores, len(program.cpu_affinity()))
    return cores


def choose_processes(s: Settings) -> int:
    """Return the number of processes to start for these settings.

    The default is one for each physical core, at most MOST. Each process gets the same number of
    questions, and its memory must be free. Only the tiny policy gets several processes by default,
    because the memory of other policies is not known.
    """
    started_already = "WORLD_SIZE" in os.environ  # by torchrun or accelerate
    if started_already or s.device != "cpu" or s.rehearse:
        return 1
    if s.processes:
        return s.processes
    if s.policy != "tiny":
        return 1
    fitting = int(psutil.virtual_memory().available / GIB / PROCESS_GIB)
    for count in range(min(MOST, cpu_cores(), fitting), 1, -1):
        if s.questions % (s.updates * count) == 0:
            return count
    return 1


def free_port() -> int:
    """Return a free port of this machine. The processes find each other there."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_processes(work: Callable[[Settings], None], s: Settings, count: int) -> int:
    """Run `work(s)` in `count` new processes, and wait for them. Returns the exit code.

    The exit code is that of the first process that fails, or 0. `work` is a function of a module.
    """
    started = []
    with signals_passed_on(started):
        context = multiprocessing.start_processes(
            run_process, (work, s, count, free_port()), count, join=False
        )
        started += context.processes
        try:
            while not context.join(grace_period=GRACE):
                pass
        except multiprocessing.ProcessExitedException as failed:
            return exit_code(failed)
        except multiprocessing.ProcessRaisedException as failed:
            print(failed, file=sys.stderr)  # with the traceback in that process
            return 1
    return 0


def exit_code(failed: multiprocessing.ProcessExitedException) -> int:
    """Return the exit code of a failed process. Prints a line if a signal has ended it."""
    if failed.exit_code >= 0:
        return failed.exit_code
    print(
        f"train.py: a process was ended by {failed.signal_name}. Perhaps the memory was full: "
        "continue with --resume --run and the run's folder, or start again with --processes 1",
        file=sys.stderr,
    )
    return 128 - failed.exit_code


def run_process(rank: int, work: Callable, s: Settings, count: int, port: int) -> None:
    """Run `work(s)` in this process, number `rank` of `count`."""
    if hasattr(os, "setpgrp"):
        # Ctrl-C in a terminal reaches a whole process group. In a group of its own, this process
        # gets the signal once, from start_processes.
        os.setpgrp()
    outlive_terminal()
    if rank > 0:
        transformers.utils.logging.disable_progress_bar()  # of the loading of weights
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    work(s)


@contextmanager
def signals_passed_on(processes: list):
    """Context manager: send Ctrl-C and ending signals to `processes`, and do not handle them here.

    In Windows these signals reach all programs of a console, so nothing is sent.
    """

    def pass_on(number, _):
        if sys.platform == "win32":
            return
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number)

    with handlers_put_back():
        for kind in handled_signals():
            signal.signal(kind, pass_on)
        yield
