"""A run's folder: its settings, its log, and the state from which it continues after a stop."""

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from .config import Settings, Terminated, UserError, read_settings
from .policy import Policy
from .segmenter import SAM_FILES
from .files import AGAIN, cause, refuse_pointer
from .processes import gather, is_first, process_count
from .stops import ignore_ending_signals, lasting_output, stop_on_signals

# ---------------------------------------------------------------------------------------------------- state


def take_state(policy: Policy, optimizer, step: int, seconds: float) -> dict:
    """A copy in host memory of all that is needed to go on after `step` whole steps."""
    adapter = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    state = {
        "step": step,
        "seconds": seconds,
        "adapter": adapter,
        "optimizer": optimizer.state_dict(),
    }
    return tree_map_only(torch.Tensor, lambda x: x.detach().to("cpu", copy=True), state)


def put_adapter(policy: Policy, state: dict) -> None:
    """Give the policy the adapter of `state`.

    Raises UserError where the adapter was trained on another policy.
    """
    weights = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    sizes = {name: p.shape for name, p in weights.items()}
    if sizes != {name: saved.shape for name, saved in state["adapter"].items()}:
        raise UserError(
            "--resume: the adapter in state.pt does not fit this --policy: the run began with another "
            "kind or size of policy"
        )
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(state["adapter"][name])


def save_state(folder: Path, policy: Policy, state: dict) -> bool:
    """Write `state` to state.pt, and its adapter to a folder of its own, which eval.py reads.

    No weight is read from the policy, because the GPU's memory cannot be read after a GPU error.
    Files are written under temporary names, then moved. An interrupted save, or a full disk, loses
    nothing. If the disk is full, prints this and returns False.
    """
    new = folder / "state.new"
    try:
        with new.open("wb") as file:
            torch.save(state, file)
        policy.model.save_pretrained(folder / "adapter.new", state_dict=state["adapter"])
        new.replace(folder / "state.pt")
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        (folder / "adapter.new").replace(folder / "adapter")
        return True
    except (
        OSError,
        RuntimeError,
        MemoryError,
    ) as error:  # torch and safetensors make RuntimeErrors of a full disk
        new.unlink(missing_ok=True)
        shutil.rmtree(folder / "adapter.new", ignore_errors=True)
        tqdm.write(
            f"step {state['step']} could not be saved in {folder} ({' '.join(str(error).split())}); what was "
            "saved before stays. Free some room there"
        )
        return False


def read_state(file: Path) -> dict:
    """What save_state wrote. Raises UserError where the file is damaged, or holds anything else."""
    refuse_pointer(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # for damaged bytes the reader of pickles raises anything
        # The error's own text advises weights_only=False, which would run foreign code.
        why = f"{file} is damaged or cut off ({type(error).__name__})"
        raise UserError(f"{why}: {AGAIN}, or start another run") from None
    kinds = {"step": int, "seconds": (int, float), "adapter": dict, "optimizer": dict}
    for name, kind in kinds.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            raise UserError(f"{file} is not the state of a run: {AGAIN}, or start another run")
    return state


def put_state(state: dict, policy: Policy, optimizer) -> None:
    """Put adapter and AdamW's moments back.

    Raises UserError, ValueError and others where they do not fit.
    """
    put_adapter(policy, state)
    optimizer.load_state_dict(state["optimizer"])
    for p in policy.trained:
        moments = optimizer.state.get(p)  # none before the first update
        if not moments:
            continue
        shapes = [moments[name].shape for name in ("exp_avg", "exp_avg_sq")]
        if shapes != [p.shape, p.shape] or moments["step"].numel() != 1:
            raise ValueError("the optimizer's state has other shapes")


def load_state(folder: Path, policy: Policy, optimizer) -> tuple[int, float]:
    """Put the saved state back; returns the number of steps done and their seconds.

    Both are 0 where nothing was saved yet. Raises UserError where the state is damaged or does not
    fit.
    """
    file = folder / "state.pt"
    if not file.exists():
        return 0, 0.0
    state = read_state(file)
    try:
        put_state(state, policy, optimizer)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        why = f"{file} does not fit this run ({cause(error)})"
        raise UserError(f"{why}: {AGAIN}, or start another run") from None
    return state["step"], state["seconds"]


# ---------------------------------------------------------------------------------------------------- folder


def open_run(s: Settings) -> Path:
    """Return the run's folder: a new one with the settings saved in it, or the one to continue."""
    folder = Path(s.run or next_name(s))
    if (
        not s.resume and (folder / "metrics.jsonl").exists()
    ):  # a start that failed before it leaves the name free
        raise UserError(
            f"--run {folder} holds a run already: continue it with `{resume_command(folder, s)}`, or name "
            "another folder"
        )
    if s.resume:
        check_segmenter_kind(folder, s)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not s.resume:  # which may still be refused: see Run
            write_settings(folder, s)
    except OSError as error:
        raise UserError(f"--run {folder}: nothing can be written there ({error})") from None
    return folder


def next_name(s: Settings) -> str:
    """The first of runs/PRESET-seedN, runs/PRESET-seedN-2, ... that is free."""
    names = [f"runs/{s.preset}-seed{s.seed}"] + [
        f"runs/{s.preset}-seed{s.seed}-{i}" for i in range(2, 10**4)
    ]
    return next(name for name in names if not Path(name).exists())


def check_segmenter_kind(folder: Path, s: Settings) -> None:
    """Refuse to continue with another SAM.

    The path of a SAM 2 or SAM 3 may change: it may have been moved.
    """
    begun = read_settings(folder / "settings.json").get("sam", s.sam)
    if begun != s.sam and {begun, s.sam} & {"tiny", *SAM_FILES}:
        raise UserError(
            f"--resume: this run was started with --sam {begun}, and --sam {s.sam} is another model"
        )


def resume_command(folder: Path, s: Settings) -> str:
    """Write the command that continues the run in this folder, with as many processes as there are
    now.
    """
    script = "train.py"
    if Path(sys.argv[0]).name == script:  # as it was typed, from whichever folder
        script = sys.argv[0]
    start = ["python"]
    processes = process_count()
    if processes > 1:
        # Accelerate's launcher would start one process on a CPU. Without "--" torchrun takes --run for its own option.
        start = ["torchrun", "--standalone", "--nproc_per_node", str(processes), "--"]
    words = [*start, script, "--resume", "--run", str(folder), "--samples", str(s.samples)]
    if sys.platform == "win32":
        return subprocess.list2cmdline(words)
    return shlex.join(words)


def write_json(path: Path, value) -> None:
    """Write JSON to a temporary file, then rename it. Readers never see an incomplete file."""
    new = path.with_suffix(".new.json")
    new.write_text(json.dumps(value, indent=1), encoding="utf-8")
    new.replace(path)


def write_settings(folder: Path, s: Settings) -> None:
    write_json(folder / "settings.json", asdict(s) | {"run": str(folder), "resume": False})


def read_log(folder: Path, count: int | None = None, name: str = "metrics") -> list[dict]:
    """Return all lines of `name`.jsonl, or the first `count`.

    Only a line after these can be incomplete.
    """
    file = folder / f"{name}.jsonl"
    return (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:count]]
        if file.exists()
        else []
    )


def check_questions(folder: Path, sets: list, s: Settings) -> None:
    """Refuse to continue if the training or test questions have changed since the run began.

    The folder holds a list of ids, and a list of answers with their ids. The validation set is not
    checked: nothing is learnt from it, and its data are those of the test set.
    """
    for name, data, option in (
        ("samples", sets[0], s.data),
        ("test-base", sets[2], s.eval_data or s.data),
    ):
        file = folder / f"{name}.json"
        if not file.exists():
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        if name == "samples":
            same = all(old == new for old, new in zip(content, data.ids))
        else:  # --empty-truth may have left questions out
            now = iter(data.ids)
            same = all(answer["id"] in now for answer in content[: len(data.ids)])
        if not same:
            raise UserError(other_questions(option, folder))


def check_first_questions(folder: Path, sets: list, s: Settings) -> None:
    """Also compare the texts of the first questions.

    Ids may be mere line numbers, the same in any data.
    """
    answers = {"train": read_log(folder, s.questions, "answers"), "test": []}
    if (folder / "test-base.json").exists():
        answers["test"] = json.loads((folder / "test-base.json").read_text(encoding="utf-8"))
    for split, data, option in (
        ("train", sets[0], s.data),
        ("test", sets[2], s.eval_data or s.data),
    ):
        known = defaultdict(set)  # id -> questions: an id may come twice
        for answer in answers[split]:
            if "question" in answer:
                known[answer["id"]].add(answer["question"])
        for i in range(min(s.questions, len(data))):
            sample = data[i]
            if sample.id in known and sample.question not in known[sample.id]:
                raise UserError(other_questions(option, folder))


def other_questions(data: str, folder: Path) -> str:
    """Write the line that refuses changed data."""
    return (
        f"--resume: {data} asks other questions than when {folder} began: its data has changed; start another run, "
        "or name the folder to which the run's data was moved (--data, --eval-data)"
    )


# ---------------------------------------------------------------------------------------------------- on its way


def known_missing(folder: Path) -> list[str]:
    """Return the pictures that were unavailable when the run began.

    They stay replaced and are not requested again.
    """
    file = folder / "missing.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


class Run:
    """A run in progress: its log, and the state after the last whole step.

    The state is saved regularly.
    """

    def __init__(
        self, folder: Path, s: Settings, policy: Policy, optimizer, sets: list, begun: float
    ):
        """`sets` are the run's three data sets.

        `begun` is the program's start time by time.perf_counter.
        """
        self.folder, self.s, self.policy, self.optimizer = folder, s, policy, optimizer
        self.start, earlier = 0, 0.0
        if s.resume:
            check_questions(folder, sets, s)
            self.start, earlier = load_state(folder, policy, optimizer)
            if self.start:
                check_first_questions(folder, sets, s)
        self.begun, self.total, self.taken = begun - earlier, len(sets[0]) // s.questions, []
        if self.start > self.total:
            raise UserError(
                f"--samples {s.samples}: {folder} has gone {self.start} steps already, which is "
                f"--samples {self.start * s.questions}"
            )
        self.state, self.saved = (
            take_state(policy, optimizer, self.start, self.seconds()),
            time.perf_counter(),
        )
        self.first_adapter, self.flat = self.state["adapter"], []  # for learning_warning
        if is_first():
            write_settings(folder, s)
            for name, a_step in (
                ("metrics", 1),
                ("answers", s.questions),
            ):  # what a cut-off step wrote goes
                kept = read_log(folder, self.start * a_step, name) if self.start else []
                text = "".join(json.dumps(line) + "\n" for line in kept)
                (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
            write_json(folder / "samples.json", sets[0].ids)  # which questions this run drew
            if gone := sorted({name for one in sets for name in one.missing}):
                write_json(folder / "missing.json", gone)

    def seconds(self) -> float:
        """Return the run's total time, including the parts before each --resume."""
        return round(time.perf_counter() - self.begun, 1)

    def steps(self) -> Iterator[int]:
        """Yield the remaining steps, and show a progress bar."""
        self.bar = tqdm(
            range(self.start, self.total),
            "train",
            self.total,
            initial=self.start,
            dynamic_ncols=True,
            disable=not is_first(),
        )
        yield from self.bar

    def keep(self, line: dict, answers: list[dict], due: bool) -> None:
        """Log a finished step and some `answers`.

        Save if `due`, if the save interval is over, or after Ctrl-C.
        """
        stopped, first, step = any(gather([self.stop.is_set()])), is_first(), line["step"]
        answers = gather(answers)
        if first:
            for name, lines in (
                ("metrics", [line]),
                ("answers", [{"step": step} | one for one in answers]),
            ):
                with (self.folder / f"{name}.jsonl").open("a", encoding="utf-8") as out:
                    out.write("".join(json.dumps(one) + "\n" for one in lines))
        self.state = take_state(self.policy, self.optimizer, step, self.seconds())
        whole = False
        if first and (
            due or stopped or time.perf_counter() - self.saved > 60 * self.s.save_minutes
        ):
            whole = save_state(self.folder, self.policy, self.state)
            self.saved = time.perf_counter()
        self.note(line)
        shown = ("reward", "iou", "segmentation_format", "zero_variance")
        self.bar.set_postfix({name: f"{line[name]:.2f}" for name in shown})
        if stopped:
            self.bar.close()
            if whole:
                print(
                    f"stopped after step {step}; continue with:\n  {resume_command(self.folder, self.s)}"
                )
            sys.exit(130)

    def note(self, line: dict) -> None:
        """Note a step's seconds and zero_variance.

        After ten steps print the time that is left, and a warning where nothing is learnt.
        """
        self.taken.append(
            sum(line[f"seconds_{phase}"] for phase in ("rollout", "reward", "update"))
        )
        self.flat.append(line["zero_variance"])
        if len(self.taken) != FIRST_STEPS:
            return
        changed = adapter_changed(self.first_adapter, self.state["adapter"])
        self.first_adapter = None  # it is large, and not needed any more
        if is_first():
            tqdm.write(time_left(self.taken, self.total - self.start))
            warning = learning_warning(sum(self.flat) / FIRST_STEPS, changed)
            if warning:
                tqdm.write(warning)

    @contextmanager
    def saved_whatever_happens(self):
        """Context manager: if anything ends the run, first save the state after the last whole
        step. --resume repeats the step that was interrupted.

        The exception that ends the run is raised again, so a bug keeps its traceback. An OSError
        becomes a UserError.
        """
        with lasting_output(), stop_on_signals() as self.stop:
            try:
                yield
            except (Exception, KeyboardInterrupt, Terminated) as error:
                ignore_ending_signals()
                self.save_last_step()
                if isinstance(error, OSError):  # the log's disk is full
                    raise UserError(f"{self.folder}: {error}") from None
                raise

    def save_last_step(self) -> None:
        """Save the state after the last whole step, which is a copy in host memory, and print how
        to continue.
        """
        if is_first() and save_state(self.folder, self.policy, self.state):
            command = resume_command(self.folder, self.s)
            print(f"step {self.state['step']} is saved; go on with:\n  {command}", flush=True)

    def finish(self) -> None:
        """Save the last state.

        Raises UserError where nothing was learnt, or where that state cannot be saved.
        """
        if all(
            not p.any() for n, p in self.policy.model.named_parameters() if "lora_B" in n
        ):  # B starts at 0
            raise UserError(
                "the adapter never changed: each group's answers all got the same reward (see "
                "zero_variance)"
            )
        if is_first() and not save_state(self.folder, self.policy, self.state):
            again = resume_command(self.folder, self.s)
            raise UserError(
                f"{self.folder}: the last steps are not saved; make room there, then {again}"
            )


FIRST_STEPS = 10  # after so many there is a first report


def adapter_changed(before: dict, after: dict) -> bool:
    """Compare two adapters, tensors by name.

    LoRA's matrices B start at 0. While all are 0, the adapter has no effect.
    """
    effective = any(after[name].any() for name in after if "lora_B" in name)
    return effective and any(not torch.equal(before[name], after[name]) for name in after)


def learning_warning(zero_variance: float, changed: bool) -> str:
    """Write a line of advice where nothing was learnt in the first ten steps; empty where all is
    well.

    `zero_variance` is the mean share of groups with equal rewards. `changed` is true if any adapter
    weight changed.
    """
    if zero_variance > 0.9:
        return (
            f"Warning: in {100 * zero_variance:.0f} % of the groups all answers got the same reward "
            "(zero_variance), so almost nothing is learnt. Start another run with a larger --group, a higher "
            "--temperature, other --data, or another --policy"
        )
    if not changed:
        return (
            f"Warning: {FIRST_STEPS} steps have changed no weight of the adapter. Look at grad_norm and "
            "skipped_updates in metrics.jsonl, and start another run with another --lr"
        )
    return ""


def time_left(seconds: list[float], steps: int) -> str:
    """Return an estimate for `steps` steps from the `seconds` of finished ones.

    Needs two: the first is a warm-up.
    """
    step = sum(seconds[1:]) / (len(seconds) - 1)
    return f"measured: {step:.1f} s a step, {step * (steps - len(seconds)) / 3600:.1f} hours left, without evaluation"
