"""A run's folder: its settings, what it needs to go on after a stop, and how Ctrl-C and SIGTERM stop it."""

import json
import shutil
import signal
import threading
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from ..config import Settings, Terminated, UserError
from ..policy import Policy


# ---------------------------------------------------------------------------------------------------- state


def take_state(policy: Policy, optimizer, step: int, seconds: float) -> dict:
    """A copy in host memory of all that is needed to go on after `step` whole steps."""
    trained = {n: p.detach().to("cpu", copy=True) for n, p in policy.model.named_parameters() if p.requires_grad}
    known = optimizer.state_dict()
    moments = {i: {n: v.to("cpu", copy=True) for n, v in one.items()} for i, one in known["state"].items()}
    groups = [dict(group) for group in known["param_groups"]]
    optimizer_state = {"state": moments, "param_groups": groups}
    return {"step": step, "seconds": seconds, "adapter": trained, "optimizer": optimizer_state}


def put_state(policy: Policy, optimizer, state: dict) -> None:
    """Adapter and optimizer as they were when `state` was taken."""
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state["adapter"][name])
    optimizer.load_state_dict(state["optimizer"])


def save_state(folder: Path, policy: Policy, state: dict) -> bool:
    """Write `state`, which the policy is in, and the adapter by itself. All is written beside and moved into place, so
    that a save that is cut off, or for which the disk has no room, loses nothing; the latter is said, and False comes
    back."""
    new = folder / "state.new"
    try:
        with new.open("wb") as file:
            torch.save(state, file)
        new.replace(folder / "state.pt")
        policy.model.save_pretrained(folder / "adapter.new")
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        (folder / "adapter.new").replace(folder / "adapter")
        return True
    except (OSError, RuntimeError) as error:  # torch's and safetensors' writers make RuntimeErrors of a full disk
        new.unlink(missing_ok=True)
        shutil.rmtree(folder / "adapter.new", ignore_errors=True)
        tqdm.write(f"step {state['step']} could not be saved in {folder} ({' '.join(str(error).split())}); what was "
                   "saved before stays. Free some room there")
        return False


def load_state(folder: Path, policy: Policy, optimizer) -> tuple[int, float]:
    """Put the saved state back; returns the number of steps done and their seconds: 0 where nothing was saved yet."""
    if not (folder / "state.pt").exists():
        return 0, 0.0
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    put_state(policy, optimizer, state)
    return state["step"], state["seconds"]


# ---------------------------------------------------------------------------------------------------- folder


def open_run(s: Settings) -> Path:
    """The run's folder, a new one or the one to go on with, with the settings written down."""
    folder = Path(s.run or next_name(s))
    if not s.resume and (folder / "metrics.jsonl").exists():  # a start that failed before it leaves the name free
        raise UserError(f"--run {folder} holds a run already: go on with it by --resume, or name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", asdict(s) | {"run": str(folder), "resume": False})
    except OSError as error:
        raise UserError(f"--run {folder}: nothing can be written there ({error})") from None
    return folder


def next_name(s: Settings) -> str:
    """The first of runs/PRESET-seedN, runs/PRESET-seedN-2, ... that is free."""
    names = [f"runs/{s.preset}-seed{s.seed}"] + [f"runs/{s.preset}-seed{s.seed}-{i}" for i in range(2, 10**4)]
    return next(name for name in names if not Path(name).exists())


def resume_command(folder: Path, s: Settings) -> str:
    return f"python train.py --resume --run {folder} --samples {s.samples}"


def write_json(path: Path, value) -> None:
    """Written beside and moved into place, so that whoever reads it finds it whole."""
    new = path.with_suffix(".new.json")
    new.write_text(json.dumps(value, indent=1))
    new.replace(path)


def read_log(folder: Path, steps: int | None = None) -> list[dict]:
    """The lines of metrics.jsonl, or of its first `steps` steps (a line that was cut off is beyond them)."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:steps]]


# ---------------------------------------------------------------------------------------------------- signals


@contextmanager
def stop_on_signals():
    """Within, Ctrl-C sets the event that this yields, so that the step in progress ends first; a second one stops at
    once. SIGTERM raises Terminated: whoever sends it seldom waits for a step."""
    stop = threading.Event()

    def finish_step(*_):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop.set()
        tqdm.write("stopping after this step (Ctrl-C again: at once)")

    def end_at_once(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: saving must not be cut off by a second one
        raise Terminated

    handlers = {signal.SIGINT: finish_step, signal.SIGTERM: end_at_once}
    before = {kind: signal.signal(kind, handler) for kind, handler in handlers.items()}
    try:
        yield stop
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
