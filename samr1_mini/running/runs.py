"""A run's folder: its settings, its log, what it needs to go on after a stop, and how Ctrl-C and SIGTERM stop it."""

import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from ..config import Settings, Terminated, UserError
from ..policy import Policy
from .processes import is_first


# ---------------------------------------------------------------------------------------------------- state


def take_state(policy: Policy, optimizer, step: int, seconds: float) -> dict:
    """A copy in host memory of all that is needed to go on after `step` whole steps."""
    adapter = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    state = {"step": step, "seconds": seconds, "adapter": adapter, "optimizer": optimizer.state_dict()}
    return tree_map_only(torch.Tensor, lambda x: x.detach().to("cpu", copy=True), state)


def put_adapter(policy: Policy, state: dict) -> None:
    """The adapter as it was when `state` was taken."""
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state["adapter"][name])


def save_state(folder: Path, policy: Policy, state: dict) -> bool:
    """Write `state`, and by itself the adapter, which the policy holds as it is in `state`. All is written beside and
    moved into place, so that a save that is cut off, or for which the disk has no room, loses nothing; the latter is
    said, and False comes back."""
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
    put_adapter(policy, state)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


# ---------------------------------------------------------------------------------------------------- folder


def open_run(s: Settings) -> Path:
    """The run's folder, a new one with the settings written down, or the one to go on with."""
    folder = Path(s.run or next_name(s))
    if not s.resume and (folder / "metrics.jsonl").exists():  # a start that failed before it leaves the name free
        raise UserError(f"--run {folder} holds a run already: go on with it by --resume, or name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not s.resume:  # which may still be refused: see Run
            write_settings(folder, s)
    except OSError as error:
        raise UserError(f"--run {folder}: nothing can be written there ({error})") from None
    return folder


def next_name(s: Settings) -> str:
    """The first of runs/PRESET-seedN, runs/PRESET-seedN-2, ... that is free."""
    names = [f"runs/{s.preset}-seed{s.seed}"] + [f"runs/{s.preset}-seed{s.seed}-{i}" for i in range(2, 10**4)]
    return next(name for name in names if not Path(name).exists())


def resume_command(folder: Path, s: Settings) -> str:
    """What a user types to go on with the run in this folder."""
    return f"python train.py --resume --run {folder} --samples {s.samples}"


def write_json(path: Path, value) -> None:
    """Written beside and moved into place, so that whoever reads it finds it whole."""
    new = path.with_suffix(".new.json")
    new.write_text(json.dumps(value, indent=1), encoding="utf-8")
    new.replace(path)


def write_settings(folder: Path, s: Settings) -> None:
    write_json(folder / "settings.json", asdict(s) | {"run": str(folder), "resume": False})


def read_log(folder: Path, count: int | None = None, name: str = "metrics") -> list[dict]:
    """The lines of metrics.jsonl (or answers.jsonl), or its first `count` (a line that was cut off is beyond them)."""
    file = folder / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:count]] if file.exists() else []


def check_questions(folder: Path, sets: list, s: Settings) -> None:
    """Refuse to go on where other questions would be asked, or tested, than when the run began: the data has changed.
    What is written down there is a list of ids, and one of answers."""
    for name, data, option in (("samples", sets[0], s.data), ("test-base", sets[2], s.eval_data or s.data)):
        file = folder / f"{name}.json"
        if file.exists():
            known = [one if isinstance(one, str) else one["id"] for one in json.loads(file.read_text(encoding="utf-8"))]
            if any(old != new for old, new in zip(known, data.ids)):
                raise UserError(f"--resume: {option} asks other questions than when {folder} began: its data has "
                                "changed; start another run")


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


# ---------------------------------------------------------------------------------------------------- on its way


def known_missing(folder: Path) -> list[str]:
    """Pictures that could not be had when the run began: others stand in their places, nobody asks for them again."""
    file = folder / "missing.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


class Run:
    """A run on its way: its log, and its state after the last whole step, which is saved now and then."""

    def __init__(self, folder: Path, s: Settings, policy: Policy, optimizer, sets: list, begun: float):
        """`sets` are its three data sets; `begun` is when the program was, on time.perf_counter's clock."""
        self.folder, self.s, self.policy, self.optimizer = folder, s, policy, optimizer
        self.start, earlier = 0, 0.0
        if s.resume:
            check_questions(folder, sets, s)
            self.start, earlier = load_state(folder, policy, optimizer)
        self.begun, self.total, self.taken = begun - earlier, len(sets[0]) // s.questions, []
        if self.start > self.total:
            raise UserError(f"--samples {s.samples}: {folder} has gone {self.start} steps already, which is "
                            f"--samples {self.start * s.questions}")
        self.state, self.saved = take_state(policy, optimizer, self.start, self.seconds()), time.perf_counter()
        if is_first():
            write_settings(folder, s)
            for name, a_step in (("metrics", 1), ("answers", s.questions)):  # what a cut-off step wrote goes
                kept = read_log(folder, self.start * a_step, name) if self.start else []
                text = "".join(json.dumps(line) + "\n" for line in kept)
                (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
            write_json(folder / "samples.json", sets[0].ids)  # which questions this run drew
            if gone := sorted({name for one in sets for name in one.missing}):
                write_json(folder / "missing.json", gone)

    def seconds(self) -> float:
        """How long it has run, in all its parts."""
        return round(time.perf_counter() - self.begun, 1)

    def steps(self) -> Iterator[int]:
        """The steps that are left, beside a bar."""
        self.bar = tqdm(range(self.start, self.total), "train", self.total, initial=self.start, dynamic_ncols=True,
                        disable=not is_first())
        yield from self.bar

    def keep(self, line: dict, answers: list[dict], due: bool) -> None:
        """Log a step that is done, and some of its `answers`; save where that is `due`, where it is time to, and where
        Ctrl-C ends the program."""
        stopped, first, step = any(gather_object([self.stop.is_set()])), is_first(), line["step"]
        answers = gather_object(answers)
        if first:
            for name, lines in (("metrics", [line]), ("answers", [{"step": step} | one for one in answers])):
                with (self.folder / f"{name}.jsonl").open("a", encoding="utf-8") as out:
                    out.write("".join(json.dumps(one) + "\n" for one in lines))
        self.state = take_state(self.policy, self.optimizer, step, self.seconds())
        if first and (due or stopped or time.perf_counter() - self.saved > 60 * self.s.save_minutes):
            save_state(self.folder, self.policy, self.state)
            self.saved = time.perf_counter()
        self.taken.append(sum(line[f"seconds_{phase}"] for phase in ("rollout", "reward", "update")))
        if first and len(self.taken) == 10:
            tqdm.write(time_left(self.taken, self.total - self.start))
        self.bar.set_postfix({name: f"{line[name]:.2f}" for name in ("reward", "iou", "segmentation_format")})
        if stopped:
            self.bar.close()
            if first:
                print(f"stopped after step {step}; go on with:\n  {resume_command(self.folder, self.s)}")
            sys.exit(130)

    @contextmanager
    def saved_whatever_happens(self):
        """Within, the state after the last whole step is saved before anything ends the run: a step that was cut off is
        done again by --resume."""
        with stop_on_signals() as self.stop:
            try:
                yield
            except (torch.OutOfMemoryError, Terminated, UserError, OSError, KeyboardInterrupt) as error:
                put_adapter(self.policy, self.state)  # no more: memory may have run out
                if is_first() and save_state(self.folder, self.policy, self.state):
                    told = f"step {self.state['step']} is saved; go on with:\n  {resume_command(self.folder, self.s)}"
                    print(told, flush=True)
                if isinstance(error, OSError):  # the log's disk is full
                    raise UserError(f"{self.folder}: {error}") from None
                raise

    def finish(self) -> None:
        """Save the last state. Raises UserError where nothing was learnt, or where that state cannot be saved."""
        if all(not p.any() for n, p in self.policy.model.named_parameters() if "lora_B" in n):  # B starts at 0
            raise UserError("the adapter never changed: each group's answers all got the same reward (see "
                            "zero_variance)")
        if is_first() and not save_state(self.folder, self.policy, self.state):
            again = resume_command(self.folder, self.s)
            raise UserError(f"{self.folder}: the last steps are not saved; make room there, then {again}")


def time_left(seconds: list[float], steps: int) -> str:
    """A line about a run of `steps` steps from the `seconds` of those done, two at least: the first warms up."""
    step = sum(seconds[1:]) / (len(seconds) - 1)
    return f"measured: {step:.1f} s a step, {step * (steps - len(seconds)) / 3600:.1f} hours left, without evaluation"
