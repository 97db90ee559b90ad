"""Several processes, one a GPU (`accelerate launch`, `torchrun`): each has its share of questions; the first writes."""

from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce

from .config import UserError, first_line

PATIENCE = timedelta(
    hours=12
)  # how long processes wait for each other: the first one may have 19 GB to download


def join_processes(device: str) -> PartialState:
    """This process among its like; alone where nothing launched several."""
    return PartialState(cpu=device == "cpu", timeout=PATIENCE)


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return PartialState().is_main_process


def together(work: Callable):
    """Do work() in every process. A failure in one process ends all: the others would wait for it without end.

    Raises OutOfMemoryError or UserError in all processes where one of them did. Any other exception is raised on where
    it happened, and is a RuntimeError in the other processes.
    """
    result = failure = bug = None
    several = PartialState().num_processes > 1
    try:
        result = work()
    except (torch.OutOfMemoryError, UserError) as error:
        failure = type(error), str(
            error
        )  # no more: its traceback would keep all that the work has allocated
    except Exception as error:
        if not several:
            raise
        bug = error
        failure = RuntimeError, f"another process failed: {first_line(error)}"
    failures = [failure]
    if several:
        failures = gather_object(failures)
    if bug is not None:
        raise bug
    for failure in failures:
        if failure is not None:
            kind, message = failure
            raise kind(message)
    return result


def add_up_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Give every process the sum of the gradients of all, in one message; with one process nothing is left to do."""
    if PartialState().num_processes > 1:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total = reduce(torch.cat([g.flatten() for g in grads]), "sum")
        if (
            not total.any()
        ):  # no group had anything to say: one process would have no gradients then, and not move
            return
        for p, gradient in zip(parameters, total.split([p.numel() for p in parameters])):
            p.grad = gradient.view_as(p)


def average(line: dict) -> dict:
    """What each process logged of a step -> one line: means, and the extremes of what ends in _min or _max. What one
    did not log is a sum that it never began: 0 there."""
    lines = gather_object([line])
    values = {name: [one[name] for one in lines if name in one] for one in lines for name in one}
    mean = lambda numbers: sum(numbers) / len(lines)
    return {
        name: {"_min": min, "_max": max}.get(name[-4:], mean)(numbers)
        for name, numbers in values.items()
    }
