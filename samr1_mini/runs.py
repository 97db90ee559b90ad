"""A run's folder: its settings, what it needs to go on after a stop, and how Ctrl-C stops it."""

import json
import signal
import threading
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from .config import Settings, UserError
from .policy import Policy


def save_state(folder: Path, policy: Policy, optimizer, step: int, seconds: float) -> None:
    """Everything needed to go on after `step` steps. Written beside and moved into place: a cut-off save loses nothing."""
    adapter = {n: p.detach().cpu() for n, p in policy.model.named_parameters() if p.requires_grad}
    torch.save({"step": step, "seconds": seconds, "adapter": adapter, "optimizer": optimizer.state_dict()}, folder / "state.new")
    (folder / "state.new").replace(folder / "state.pt")
    policy.model.save_pretrained(folder / "adapter")


def load_state(folder: Path, policy: Policy, optimizer) -> tuple[int, float]:
    """Put adapter and optimizer back; returns the number of steps done and the seconds they took."""
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state["adapter"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


def open_run(s: Settings) -> Path:
    """The run's folder, a new one or the one to go on with, with the settings written down."""
    folder = Path(s.run or next_name(s))
    if s.resume:
        if not (folder / "state.pt").exists():
            raise UserError(f"--resume: {folder} was stopped before its first saved state; start it again in another folder")
    elif (folder / "metrics.jsonl").exists():  # written once all was loaded: a start that failed before leaves the name free
        raise UserError(f"--run {folder} holds a run already: go on with it by --resume, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", asdict(s) | {"run": str(folder), "resume": False})
    return folder


def next_name(s: Settings) -> str:
    """The first of runs/PRESET-seedN, runs/PRESET-seedN-2, ... that is free."""
    names = [f"runs/{s.preset}-seed{s.seed}"] + [f"runs/{s.preset}-seed{s.seed}-{i}" for i in range(2, 10**4)]
    return next(name for name in names if not Path(name).exists())


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1))


@contextmanager
def stop_on_ctrl_c():
    """Within, Ctrl-C sets the event that this yields, and the step in progress ends; a second one stops at once."""
    stop = threading.Event()

    def handler(*_):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop.set()
        tqdm.write("stopping after this step (Ctrl-C again: at once)")

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
