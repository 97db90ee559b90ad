"""Several processes, one for each GPU (`accelerate launch`, `torchrun`).

Each process takes its share of the questions. The first process writes and prints.
"""

from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce

from .config import UserError, first_line

PATIENCE = timedelta(hours=12)  # processes wait for the first one, which may download 19 GB


def join_processes(device: str) -> PartialState:
    """Join the processes that a launcher started. Without a launcher this process is alone."""
    return PartialState(cpu=device == "cpu", timeout=PATIENCE)


def process_count() -> int:
    """Return the number of processes."""
    return PartialState().num_processes


def is_first() -> bool:
    """Tell if this process is the one that writes and prints."""
    return PartialState().is_main_process


def share(items):
    """Return the items of this process: every n-th of n processes, from its own number on."""
    processes = PartialState()
    return items[processes.process_index :: processes.num_processes]


def tell_failure(error: Exception | None) -> None:
    """Exchange failures between all processes, and raise the first failure of another process.

    Every exchange of data begins with this call. So a process that fails can call it at any time:
    the others wait for it at their next exchange.
    """
    mine = None
    if isinstance(error, (torch.OutOfMemoryError, UserError)):
        mine = type(error), str(error)
    elif error is not None:
        mine = RuntimeError, f"another process failed: {first_line(error)}"
    failures = gather_object([mine])
    if error is not None:
        return
    for failure in failures:
        if failure is not None:
            kind, message = failure
            raised = kind(message)
            raised.told = True
            raise raised


@contextmanager
def one_fails_all_fail():
    """Context manager: an exception in one process ends all processes.

    OutOfMemoryError and UserError are raised in all processes. Any other exception is raised in
    its own process, and is a RuntimeError in the others. Without this, the others would wait for
    the failed process without end.
    """
    try:
        yield
    except Exception as error:
        if process_count() > 1 and not hasattr(error, "told"):
            tell_failure(error)
        raise


def gather(items: list) -> list:
    """Return the items of all processes in one list."""
    if process_count() > 1:
        tell_failure(None)
    return gather_object(items)


def add_up_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Replace the gradients of every process by their sum over all processes."""
    if process_count() == 1:
        return
    tell_failure(None)
    gradients = []
    for p in parameters:
        gradients.append(torch.zeros_like(p) if p.grad is None else p.grad)
    total = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
    if not total.any():  # no group had variance. A single process would have no gradients either
        return
    for p, gradient in zip(parameters, total.split([p.numel() for p in parameters])):
        p.grad = gradient.view_as(p)


def average(line: dict) -> dict:
    """Return the mean of the columns that each process logs of a step.

    Columns that end in _min or _max are the extremes. A process that lacks a column counts as 0.
    """
    lines = gather([line])
    values = {}
    for one in lines:
        for name, value in one.items():
            values.setdefault(name, []).append(value)
    averaged = {}
    for name, numbers in values.items():
        if name.endswith("_min"):
            averaged[name] = min(numbers)
        elif name.endswith("_max"):
            averaged[name] = max(numbers)
        else:
            averaged[name] = sum(numbers) / len(lines)
    return averaged
