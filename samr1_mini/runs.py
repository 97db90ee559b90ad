"""A run's folder: the settings, the log, and the state from which --resume continues.

settings.json               all settings, and names of the classes and functions in use
samples.json                ids of the training questions, in the order in which they are asked
prompt.txt                  the prompt, if it comes from --prompt-file
missing.json                pictures that could not be fetched, if there are any
base.json, test-base.json   scores and answers of the base model on the test set
metrics.jsonl               numbers of each step, one line a step
answers.jsonl               the first sampled answer to each question
trace.jsonl                 some steps token by token, compressed (see trace.py)
report.html                 a page about the run, at its end and after Ctrl-C
state.pt                    adapter and optimizer after the last saved step
lock                        keeps other programs from training in this folder
adapter/                    the same adapter in peft's format, for eval.py
sheet-00040.png             answers to validation questions after 40 steps
test-trained.json, summary.json, sheet-test.png, curves.png
                            answers, scores and figures after the last step
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from .config import PACKAGED, Settings, Terminated, UserError, begun_settings, cause, option
from .config import parse_json, refuse_changes
from .files import AGAIN, check_content, load_json, only_program, replace_file, write_json
from .metrics import mean
from .policy import Policy
from .processes import from_first, gather, is_first, process_count
from .segmenter import SAM_FILES
from .stops import handled_signals, handlers_put_back, ignore_signals, lasting_output
from .stops import stop_on_signals

# --------------------------------------------------------------------------- state


def adapter_of(policy: Policy) -> dict[str, torch.nn.Parameter]:
    """Return the adapter's weights by name."""
    return {name: p for name, p in policy.model.named_parameters() if p.requires_grad}


def take_state(policy: Policy, optimizer, step: int, asked: int, seconds: float) -> dict:
    """Copy adapter and optimizer to host memory.

    Also keeps the numbers of steps and of asked questions, and the seconds.
    """
    state = {
        "step": step,
        "asked": asked,
        "seconds": seconds,
        "adapter": adapter_of(policy),
        "optimizer": optimizer.state_dict(),
    }
    return tree_map_only(torch.Tensor, lambda x: x.detach().to("cpu", copy=True), state)


def put_adapter(policy: Policy, state: dict) -> None:
    """Copy the adapter of a state into the policy.

    Raises UserError if the adapter belongs to another policy.
    """
    weights = adapter_of(policy)
    sizes = {name: p.shape for name, p in weights.items()}
    saved_sizes = {name: saved.shape for name, saved in state["adapter"].items()}
    if sizes != saved_sizes:
        raise UserError(
            "--resume: the adapter in state.pt does not fit this --policy. Name the policy with "
            "which the run was started"
        )
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(state["adapter"][name])


def save_state(folder: Path, policy: Policy, state: dict) -> bool:
    """Write a state to state.pt, and its adapter to the folder adapter/, which eval.py reads.

    No weight is read from the policy, because a GPU's memory cannot be read after a GPU error.
    If the disk is full, prints one line and returns False. Each of the two is
    replaced only when the new one is complete.
    """

    def write_state(part: Path) -> None:
        with part.open("wb") as file:
            torch.save(state, file)

    def write_adapter(part: Path) -> None:
        # PEFT's default asks the hub for the embeddings' size at each save. No embedding is saved.
        policy.model.save_pretrained(part, state_dict=state["adapter"], save_embedding_layers=False)

    try:
        replace_file(folder / "state.pt", write_state)
        replace_file(folder / "adapter", write_adapter)
        return True
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        # for a full disk, torch raises a RuntimeError, and safetensors a SafetensorError
        why = " ".join(str(error).split())
        tqdm.write(
            f"step {state['step']} could not be saved in {folder} ({why}). The last saved state is "
            "kept. Free some disk space there"
        )
        return False


def read_state(file: Path) -> dict:
    """Read what save_state wrote. Raises UserError if the file is damaged or has other content."""
    check_content(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can raise any exception
        # The error's own text advises weights_only=False, which would run foreign code.
        why = f"{file} is damaged or cut off ({type(error).__name__})"
        raise UserError(f"{why}: {AGAIN}, or start another run") from None
    kinds = {"step": int, "asked": int, "seconds": (int, float)}
    kinds |= {"adapter": dict, "optimizer": dict}
    for name, kind in kinds.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            raise UserError(f"{file} is not the state of a run: {AGAIN}, or start another run")
    return state


def put_state(state: dict, policy: Policy, optimizer) -> None:
    """Copy a state into the policy's adapter and the optimizer.

    Raises UserError, ValueError and others if it does not fit.
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


def load_state(folder: Path, policy: Policy, optimizer) -> tuple[int, int, float]:
    """Load the saved state. Return the steps done, the questions asked in them, and the seconds.

    All are 0 if nothing was saved yet. Raises UserError if the state is damaged or does not fit.
    """
    file = folder / "state.pt"
    if not file.exists():
        return 0, 0, 0.0
    state = read_state(file)
    try:
        put_state(state, policy, optimizer)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        why = f"{file} does not fit this run ({cause(error)})"
        raise UserError(f"{why}: {AGAIN}, or start another run") from None
    return state["step"], state["asked"], state["seconds"]


# -------------------------------------------------------------------------- folder


def open_run(s: Settings) -> Path:
    """Make a run's folder with its settings, or check the folder to continue, and return it."""
    folder = Path(s.run or next_name(s))
    if s.resume:
        check_settings(folder, s)
        # These files are read only to check them: a damaged one raises UserError here, before
        # anything is loaded.
        read_base(folder)
        read_saved(folder / "samples.json", list, [])
        read_test_answers(folder)
        known_missing(folder)
        return folder  # the class Run writes the settings later, after all checks
    # A folder without these files comes from a start that failed. It may be used again.
    if any((folder / name).exists() for name in ("metrics.jsonl", "state.pt")):
        raise UserError(
            f"--run {folder} holds a run already. Name another folder, or continue it with "
            f"{resume_command(folder, s)}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_settings(folder, s)
    except OSError as error:
        raise UserError(
            f"--run {folder}: nothing can be written there ({error}). Name another folder"
        ) from None
    return folder


@contextmanager
def opened_run(s: Settings) -> Iterator[Path]:
    """Context manager: open a run's folder and lock it. Several processes share the folder."""
    folder = from_first(open_run(s) if is_first() else None)
    with only_program(folder) if is_first() else nullcontext():
        yield folder


def next_name(s: Settings) -> str:
    """Return the first of runs/PRESET-seedN, runs/PRESET-seedN-2, ... that does not exist."""
    first = f"runs/{s.preset}-seed{s.seed}"
    name = first
    number = 1
    while Path(name).exists():
        number += 1
        name = f"{first}-{number}"
    return name


def write_settings(folder: Path, s: Settings, functions: list[str] | None = None) -> None:
    """Write settings.json: all settings, and the result of function_names if it is known."""
    content = asdict(s) | {"run": str(folder), "resume": False}
    if functions:
        content["functions"] = functions
    write_json(folder / "settings.json", content)


def check_settings(folder: Path, s: Settings) -> None:
    """Refuse to continue with another model, or with changed settings that must stay.

    A path of a policy, or of a SAM 2 or SAM 3, may change, because the model may have been moved.
    """
    begun = begun_settings(folder)
    for name, names_of_models in (("policy", PACKAGED), ("sam", ["tiny", *SAM_FILES])):
        old, new, typed = begun[name], getattr(s, name), option(name)
        if old != new and (old in names_of_models or new in names_of_models):
            raise UserError(
                f"--resume: this run was started with {typed} {old}, and {typed} {new} is another "
                f"model. Leave {typed} out, or start another run"
            )
    # For these, settings.json has the values in use, such as the real number of processes.
    differ = ("device", "processes", "prompt_file")
    refuse_changes(begun, {k: v for k, v in asdict(s).items() if k not in differ})


# Names of the classes and functions that `train` uses if its caller gives no sets, segmenter,
# reward_terms or loss.
DEFAULTS = {"Folder", "Shapes", "SamSegmenter", "Sam2Segmenter", "reward_terms", "grpo_loss"}


def function_names(parts, sets: list) -> list[str]:
    """Return the names of the training set's class, the segmenter's class, reward terms and loss.

    `parts` is a grpo.Parts.
    """
    names = []
    for one in (type(sets[0]), type(parts.segmenter), parts.reward_terms, parts.loss):
        name = getattr(one, "__name__", type(one).__name__)
        if not str(getattr(one, "__module__", "")).startswith("samr1_mini."):
            name = f"own {name}"
        names.append(name)
    return names


def begun_functions(folder: Path) -> list[str]:
    """Return the function_names with which a run was started, or []. Older runs lack them."""
    return read_saved(folder / "settings.json", dict, {}).get("functions") or []


def check_functions(folder: Path, names: list[str]) -> None:
    """Refuse to continue a run with other functions than those of its start. Compares names."""
    for begun, now in zip(begun_functions(folder), names):
        if begun != now and not DEFAULTS.issuperset((begun, now)):
            raise UserError(
                f"--resume: {folder} was started with {begun}, not with {now}. Use the "
                "script or notebook that started it, and call train with resume=True there"
            )


def resume_command(folder: Path, s: Settings) -> str:
    """Return the command that continues a run with the present number of processes."""
    if not DEFAULTS.issuperset(begun_functions(folder)):
        return (
            "the script or notebook that started it, with --resume. In Python, call train with "
            f"resume=True and run={str(folder)!r}"
        )
    script = "train.py"
    if Path(sys.argv[0]).name == script:  # as the user typed it, from any folder
        script = sys.argv[0]
    start = ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun or accelerate has started this process
        # Accelerate's launcher would start one process on a CPU. Without "--" torchrun takes
        # --run for its own option.
        count = str(process_count())
        start = ["torchrun", "--standalone", "--nproc_per_node", count, "--"]
    words = [*start, script, "--resume", "--run", str(folder), "--samples", str(s.samples)]
    if sys.platform == "win32":
        return subprocess.list2cmdline(words)
    return shlex.join(words)


# --------------------------------------------------------------------- saved files

DELETE = "restore the file, or delete it and run the same command again"


def read_saved(file: Path, kind: type | tuple, default):
    """Return the JSON value in a file of the run, or `default` if there is no file.

    Raises UserError if the file is damaged.
    """
    if not file.exists():
        return default
    return load_json(file, kind, DELETE)


def read_base(folder: Path) -> dict | None:
    """Return the base model's scores on the test set, or None if they are not saved."""
    file = folder / "base.json"
    base = read_saved(file, dict, None)
    if base is not None and not {"gIoU", "ceiling"} <= base.keys():
        raise UserError(f"{file} lacks the score gIoU or ceiling: {DELETE}")
    return base


def read_test_answers(folder: Path) -> list[dict]:
    """Return the base model's answers to the test questions, [] if they are not saved."""
    file = folder / "test-base.json"
    answers = read_saved(file, list, [])
    for answer in answers:
        if not isinstance(answer, dict) or "id" not in answer:
            raise UserError(f"{file} holds an answer without an id: {DELETE}")
    return answers


SET_NAMES = ("train", "validation", "test")  # the order of a run's three data sets


def known_missing(folder: Path) -> list[list[str]]:
    """Return the pictures that were unavailable when the run began, a list for each data set.

    Their questions were replaced. So these pictures are not requested again.
    """
    names = read_saved(folder / "missing.json", dict, {})
    return [names.get(name, []) for name in SET_NAMES]


def read_log(folder: Path, count: int | None = None, name: str = "metrics") -> list[dict]:
    """Return the first `count` lines of a log: metrics.jsonl, answers.jsonl or trace.jsonl.

    Without `count`, all whole lines are returned. Lines after `count` are not read, because a stop
    may have cut off the last one. Raises UserError for a damaged line.
    """
    file = folder / f"{name}.jsonl"
    if count == 0 or not file.exists():
        return []
    text = file.read_bytes()
    lines = text.splitlines()
    if not text.endswith(b"\n"):
        lines = lines[:-1]  # this line is still being written, or was cut off
    advice = "restore it, or delete the file: the run then continues without its earlier lines"
    log = []
    for number, line in enumerate(lines[:count], 1):
        log.append(parse_json(line, f"{file}, line {number},", dict, advice))
    return log


# ----------------------------------------------------------------------- questions


def check_questions(folder: Path, sets: list, s: Settings) -> None:
    """Refuse to continue if the training or test questions have changed since the run began.

    Ids are compared. The validation set is not checked. Nothing is learnt from it, and its
    questions come from the same data as the test set.
    """
    train, _, test = sets
    for old, new in zip(read_saved(folder / "samples.json", list, []), train.ids):
        if old != new:
            refuse_questions(s.data, folder)
    # The answers must have the order of the test set, but some questions may have no answer
    # (--empty-truth excluded). `in` takes ids from the iterator until it has found this one.
    answers = read_test_answers(folder)
    ids = iter(test.ids)
    in_order = all(answer["id"] in ids for answer in answers)
    fewer_or_more = s.empty_truth != "excluded" and 0 < len(answers) != len(test.ids)
    if fewer_or_more or not in_order:
        refuse_questions(s.eval_data or s.data, folder)


def check_first_questions(folder: Path, sets: list, s: Settings) -> None:
    """Also compare the texts of the first questions.

    Ids may be mere line numbers, which are the same in any data.
    """
    train, _, test = sets
    train_answers = read_log(folder, s.questions, "answers")
    known = (
        (train, train_answers, s.data),
        (test, read_test_answers(folder), s.eval_data or s.data),
    )
    for data, answers, name in known:
        asked = defaultdict(set)  # id -> questions, because an id may come twice
        for answer in answers:
            if "question" in answer:
                asked[answer.get("id")].add(answer["question"])
        for i in range(min(s.questions, len(data))):
            sample = data[i]
            if sample.id in asked and sample.question not in asked[sample.id]:
                refuse_questions(name, folder)


def refuse_questions(data: str, folder: Path) -> None:
    """Raise UserError for changed data."""
    raise UserError(
        f"--resume: the questions of {data} are not those with which {folder} was started, so the "
        "data has changed. If the data was moved, name its folder with --data or --eval-data. "
        "Otherwise start another run"
    )


# --------------------------------------------------------------- a run in progress


class Run:
    """A run in progress: writes the log, saves the state, and prints the progress.

    Only the first process writes and prints.
    """

    def __init__(self, folder: Path, parts, sets: list, begun: float):
        """Begin the run in `folder`, or continue it with --resume.

        `parts` is a grpo.Parts. `sets` are the data sets for training, validation and test. `begun`
        is the program's start time by time.perf_counter.
        """
        s, policy, optimizer = parts.settings, parts.policy, parts.optimizer
        self.folder = folder
        self.s = s
        self.policy = policy
        self.optimizer = optimizer
        self.functions = function_names(parts, sets)
        self.total = len(sets[0]) // s.questions  # steps
        self.start = 0  # steps done before this start of the program
        self.asked = 0  # questions asked so far, also those that --redraw has replaced
        earlier = 0.0  # seconds of these steps
        if s.resume:
            check_functions(folder, self.functions)
            check_questions(folder, sets, s)
            self.start, self.asked, earlier = load_state(folder, policy, optimizer)
        if self.start:
            check_first_questions(folder, sets, s)
        if self.start > self.total:
            least = self.start * s.questions
            raise UserError(
                f"--samples {s.samples}: {folder} has already done {self.start} steps, which is "
                f"{least} samples. Give --samples {least} or more"
            )
        self.begun = begun - earlier
        self.state = take_state(policy, optimizer, self.start, self.asked, self.seconds())
        self.last_save = time.perf_counter()
        self.first_adapter = self.state["adapter"]  # for report_first_steps
        if is_first():
            self.prepare_folder(sets)

    def prepare_folder(self, sets: list) -> None:
        """Write settings and questions, and remove the log lines after the saved state."""
        s = self.s
        if s.device == "cpu":  # a resumed run keeps its number of processes
            s = replace(s, processes=process_count())
        if s.resume:  # the name that the user gave, so that the same command works again
            begun = begun_settings(self.folder)
            s = replace(s, prompt_file=begun["prompt_file"] or s.prompt_file)
        write_settings(self.folder, s, self.functions)
        if self.s.prompt_file:
            (self.folder / "prompt.txt").write_text(self.policy.prompt, encoding="utf-8")
        for name, count in (("metrics", self.start), ("answers", self.asked)):
            lines = read_log(self.folder, count, name)
            # If the user deleted the log, the new one begins with a later step than the first.
            self.write_log(name, [x for x in lines if x.get("step", 0) <= self.start], "w")
        write_json(self.folder / "samples.json", list(sets[0].ids))
        missing = {name: sorted(set(data.missing)) for name, data in zip(SET_NAMES, sets)}
        if any(missing.values()):
            write_json(self.folder / "missing.json", missing)

    def write_log(self, name: str, lines: list[dict], mode: str = "a") -> None:
        """Append lines to metrics.jsonl or answers.jsonl. With the mode "w", replace its lines."""
        with (self.folder / f"{name}.jsonl").open(mode, encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line) + "\n")

    def seconds(self) -> float:
        """Return the run's total time, including the time before each --resume."""
        return round(time.perf_counter() - self.begun, 1)

    def steps(self) -> Iterator[int]:
        """Yield the numbers of the remaining steps, counted from 0, and show a progress bar."""
        self.bar = tqdm(
            range(self.start, self.total),
            "train",
            self.total,
            initial=self.start,
            dynamic_ncols=True,
            disable=not is_first(),
        )
        yield from self.bar

    def finish_step(self, line: dict, answers: list[dict], due: bool) -> None:
        """Log a finished step with some of its answers, and save the state if it is time.

        The state is saved if `due`, if --save-minutes have passed, or after Ctrl-C. After Ctrl-C,
        the program exits with code 130.
        """
        stopped = any(gather([self.stop.is_set()]))
        answers = gather(answers)
        if is_first():
            self.write_log("metrics", [line])
            self.write_log("answers", [{"step": line["step"]} | answer for answer in answers])
        self.asked += line.get("drawn", self.s.questions)
        self.state = take_state(
            self.policy, self.optimizer, line["step"], self.asked, self.seconds()
        )
        if line["step"] == self.start + FIRST_STEPS:
            self.report_first_steps()
        shown = ("reward", "iou", "segmentation_format", "zero_variance")
        self.bar.set_postfix({name: f"{line[name]:.2f}" for name in shown if name in line})
        if stopped:
            self.bar.close()
            self.save_to_continue()
            if is_first():
                from .report import try_report  # report.py imports this file

                try_report(self.folder)
            sys.exit(130)
        minutes = (time.perf_counter() - self.last_save) / 60
        if due or minutes > self.s.save_minutes:
            self.save()

    def report_first_steps(self) -> None:
        """After ten steps, print the time that is left, and a warning if nothing is learnt."""
        before, after = self.first_adapter, self.state["adapter"]
        self.first_adapter = None  # it is large, and not needed any more
        if not is_first():
            return
        changed = any(not torch.equal(before[name], after[name]) for name in after)
        log = [line for line in read_log(self.folder) if line["step"] > self.start]
        phases = ("seconds_rollout", "seconds_reward", "seconds_update")
        seconds = [sum(line[phase] for phase in phases) for line in log]
        tqdm.write(time_left(seconds, self.total - self.start))
        zero_variance = mean(line["zero_variance"] for line in log)
        if zero_variance > 0.9:
            tqdm.write(
                f"Warning: in {100 * zero_variance:.0f} % of the groups all answers got the same "
                f"reward (zero_variance), so almost nothing is learnt. {LEARN_MORE}"
            )
        elif not changed:
            tqdm.write(
                f"Warning: the first {FIRST_STEPS} steps have changed no weight of the adapter. Look at "
                "grad_norm and skipped_updates in metrics.jsonl, and start another run with "
                "another --lr"
            )

    def save(self) -> bool:
        """Save the state after the last whole step. Returns whether this process has saved it."""
        if not is_first():
            return False
        self.last_save = time.perf_counter()
        return save_state(self.folder, self.policy, self.state)

    def save_to_continue(self) -> None:
        """Save the state, and print the command that continues the run."""
        if self.save():
            command = resume_command(self.folder, self.s)
            print(f"step {self.state['step']} is saved; continue with:\n  {command}", flush=True)

    @contextmanager
    def saved_whatever_happens(self):
        """Context manager: if the block fails or is stopped, save the last whole step.

        --resume repeats the interrupted step. The exception is raised again, an OSError as a
        UserError.
        """
        with lasting_output(), stop_on_signals() as self.stop:
            try:
                yield
            except (Exception, KeyboardInterrupt, Terminated) as error:
                ignore_signals()
                self.save_to_continue()
                if isinstance(error, OSError):  # most likely the log's disk is full
                    raise UserError(f"{self.folder}: {error}") from None
                raise

    def finish(self) -> None:
        """Save the last state. Raises UserError if nothing was learnt, or if the disk is full."""
        adapter = self.state["adapter"]
        # LoRA's matrices B are 0 at the start.
        if not any(weight.any() for name, weight in adapter.items() if "lora_B" in name):
            raise UserError(
                "the adapter never changed, because in each group all answers got the same reward "
                f"(zero_variance in metrics.jsonl). {LEARN_MORE}"
            )
        with handlers_put_back(dict.fromkeys(handled_signals(), signal.SIG_IGN)):
            saved = self.save()
        if is_first() and not saved:
            again = resume_command(self.folder, self.s)
            raise UserError(
                f"{self.folder}: the last steps are not saved. Free some disk space there, then "
                f"run {again}"
            )


FIRST_STEPS = 10  # after so many steps Run reports the time left
LEARN_MORE = (
    "Start another run with a larger --group, a higher --temperature, other --data, or another "
    "--policy"
)


def time_left(seconds: list[float], steps: int) -> str:
    """Return an estimate of the time left in a run of `steps` steps.

    `seconds` are the times of the finished steps, at least two. The first is a warm-up.
    """
    step = mean(seconds[1:])
    hours = step * (steps - len(seconds)) / 3600
    return f"measured: {step:.1f} s a step, {hours:.1f} hours left, without evaluation"
