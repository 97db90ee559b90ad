"""Work with several processes. On GPUs, torchrun or `accelerate launch` starts one for each GPU.
On a CPU, launch.py starts them.

Each process works on its share of the questions. The first process prints, and writes the files.
With one process these functions change nothing.
"""

import atexit
import os
import traceback
from collections.abc import Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce

from .config import Settings, UserError, cause
from .launch import usable_cores
from .memory import is_memory_error

PATIENCE = timedelta(hours=12)  # the others wait while the first process downloads 19 GB


def join_processes(s: Settings) -> PartialState:
    """Connect this process with the others that were started together with it.

    On a CPU, each process computes with one thread: launch.py says why. The presets 3b and 7b use
    all cores, because their operations are large. OMP_NUM_THREADS sets another number.
    """
    state = PartialState(cpu=s.device == "cpu", timeout=PATIENCE)
    if s.device == "cpu":  # PyTorch may have read another value before launch.py set this one
        text = os.environ.get("OMP_NUM_THREADS", "")
        threads = usable_cores() if s.preset in ("3b", "7b") else 1
        if text.isdecimal():
            threads = max(1, int(text))
        torch.set_num_threads(threads)
    return state


@atexit.register
def leave_processes() -> None:
    """End the connection. Otherwise gloo's threads sometimes abort a process at its end."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def process_count() -> int:
    """Return the number of processes."""
    return PartialState().num_processes


def is_first() -> bool:
    """Return whether this is the first process, which prints and writes the files."""
    return PartialState().is_main_process


def share(items: Sequence | torch.Tensor) -> Sequence | torch.Tensor:
    """Return this process's part of a sequence, or of a tensor's first dimension.

    Of n processes, process i takes the items i, i + n, i + 2n, and so on.
    """
    return items[PartialState().process_index :: process_count()]


# -------------------------------------------------------------------------- errors


class FailedElsewhere(Exception):
    """Another process has failed. fail_together then raises this exception's argument."""


@contextmanager
def fail_together():
    """Context manager: an exception in one process ends the block in all processes.

    Without it the other processes would wait for the failed one. OutOfMemoryError and UserError
    are raised in all processes. In the other processes, an OSError becomes a UserError, and any
    other exception becomes a RuntimeError.
    """
    try:
        yield
        wait_for_all()
    except FailedElsewhere as failed:
        raise failed.args[0] from None
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            traceback.clear_frames(error.__traceback__)  # frees the tensors that its frames hold
        exchange_errors(error)
        raise


def wait_for_all() -> None:
    """Wait until all processes are here. Raises FailedElsewhere if one of them has failed.

    Every exchange of data starts with this call, which exchanges errors. So if a process fails, the
    other processes come here too, and receive its error.
    """
    for error in exchange_errors(None):
        if error is not None:
            raise FailedElsewhere(error)


def exchange_errors(error: Exception | None) -> list[Exception | None]:
    """Send this process's error, or None, to all processes. Return the errors of all."""
    if process_count() == 1:
        return []
    return gather_object([error_for_others(error)])


def error_for_others(error: Exception | None) -> Exception | None:
    """Return the error that the other processes raise. It must be of a type that can be pickled."""
    if error is None:
        return None
    if isinstance(error, (UserError, OSError)):
        return UserError(str(error))
    if is_memory_error(error):
        return torch.OutOfMemoryError(str(error))
    return RuntimeError(f"another process failed: {cause(error)}")


# ---------------------------------------------------------------------------- data


def gather(items: list) -> list:
    """Return the items of all processes in one list, those of the first process first."""
    wait_for_all()
    return gather_object(items)


def from_first(value):
    """Return the first process's `value` in all processes."""
    return gather([value])[0]


@contextmanager
def first_before_others():
    """Context manager: the first process runs the block, then the other processes run it."""
    if not is_first():
        wait_for_all()
    yield
    if is_first():
        wait_for_all()


def add_up_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Give every process the sum of all processes' gradients.

    If the sum is 0, no gradient is set, as with one process. Gradients of 0 would let the
    optimizer's momentum move the parameters.
    """
    if process_count() == 1:
        return
    wait_for_all()
    gradients = []
    for p in parameters:
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        gradients.append(gradient.flatten())
    total = reduce(torch.cat(gradients), "sum")  # one message, not one for each parameter
    if not total.any():
        return
    sizes = [p.numel() for p in parameters]
    for p, gradient in zip(parameters, total.split(sizes)):
        p.grad = gradient.view_as(p)


def average(line: dict) -> dict:
    """Return the mean of each number of a log line over the processes.

    Names that end in _min or _max get the smallest or the largest value instead. A mean uses
    only the processes that have a value of this name. Each of them has the same weight.
    """
    lines = gather([line])
    averaged = {}
    for name in dict.fromkeys(name for one in lines for name in one):
        values = [one[name] for one in lines if name in one]
        if name.endswith("_min"):
            averaged[name] = min(values)
        elif name.endswith("_max"):
            averaged[name] = max(values)
        else:
            averaged[name] = sum(values) / len(values)
    return averaged
