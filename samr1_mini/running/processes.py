"""Several processes, one a GPU (`accelerate launch`, `torchrun`): each has its share of questions; the first writes."""

from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce

PATIENCE = timedelta(hours=12)  # how long processes wait for each other: the first one may have 19 GB to download


def join(device: str) -> PartialState:
    """This process among its like; alone where nothing launched several."""
    return PartialState(cpu=device == "cpu", timeout=PATIENCE)


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return PartialState().is_main_process


def together(work: Callable):
    """work() in every process. Where memory runs out in one, all stop with OutOfMemoryError: they would wait for it."""
    result = full = None
    try:
        result = work()
    except torch.OutOfMemoryError as error:
        full = str(error)  # no more of it: its traceback would keep all that the work has allocated
    if PartialState().num_processes > 1:
        full = next((text for text in [full, *gather_object([full])] if text is not None), None)
    if full is not None:
        raise torch.OutOfMemoryError(full)
    return result


def add_up_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Give every process the sum of the gradients of all, in one message; with one process nothing is left to do."""
    if PartialState().num_processes > 1:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total = reduce(torch.cat([g.flatten() for g in grads]), "sum")
        if not total.any():  # no group had anything to say: one process would have no gradients then, and not move
            return
        for p, gradient in zip(parameters, total.split([p.numel() for p in parameters])):
            p.grad = gradient.view_as(p)


def average(line: dict) -> dict:
    """What each process logged of a step -> one line: means, and the extremes of what ends in _min or _max. What one
    did not log is a sum that it never began: 0 there."""
    lines = gather_object([line])
    values = {name: [one[name] for one in lines if name in one] for one in lines for name in one}
    mean = lambda numbers: sum(numbers) / len(lines)
    return {name: {"_min": min, "_max": max}.get(name[-4:], mean)(numbers) for name, numbers in values.items()}
