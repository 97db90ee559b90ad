"""All settings of a run: a dataclass, a line of help a field, three presets. `train.py` makes each field an option."""

import argparse
import difflib
import errno
import json
import os
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch

from .gpu import card_memory, gpu_fault


def cache_folder() -> Path:
    """The folder of downloads and converted data sets: SAMR1_CACHE, or .cache/samr1_mini in the home folder."""
    if os.environ.get("SAMR1_CACHE"):
        return Path(os.environ["SAMR1_CACHE"]).absolute()
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry in the list of users, as in some containers
        home = Path(tempfile.gettempdir())
    return home / ".cache" / "samr1_mini"


CACHE = cache_folder()


class UserError(Exception):
    """A mistake that the user can mend: shown as one line, without a traceback."""


class Terminated(BaseException):
    """SIGTERM came, or the signal of a closed terminal: the state is saved at once, and the step in progress is lost.

    As KeyboardInterrupt it is no Exception, so that no `except Exception` on its way takes it for a failure.
    """

    def __init__(self, number: int = signal.SIGTERM):
        super().__init__(f"signal {int(number)}")
        self.number = int(number)


def _group(heading: str):
    """A maker of options that `--help` shows under one heading."""
    return lambda default, help, choices=None: field(
        default=default, metadata=dict(help=help, choices=choices, group=heading)
    )


_run, _model, _data, _rollout, _reward, _optimisation, _evaluation = map(
    _group, ("run", "model", "data", "rollout", "reward", "optimisation", "evaluation")
)


@dataclass(frozen=True)
class Settings:
    preset: str = _run(
        "auto", "size of everything below; auto looks at the machine", ("auto", "tiny", "3b", "7b")
    )
    samples: int = _run(3000, "training questions in all; a smaller set is gone through again")
    run: str = _run(
        "", "folder of this run: log, pictures, adapter, summary (default: a new one in runs/)"
    )
    resume: bool = _run(False, "go on with the run in that folder where it stopped")
    seed: int = _run(
        0,
        "seed of everything: on one kind of CPU, with as many threads, the same seed gives the same "
        "numbers; on a GPU the same questions and draws, while sums are rounded in another order each "
        "time",
    )
    rehearse: int = _run(
        0,
        "do not train: run this many full steps with random weights of the preset's shape; nothing "
        "is downloaded",
    )
    device: str = _run("auto", "auto, cpu or cuda", ("auto", "cpu", "cuda"))
    save_minutes: float = _run(
        10.0, "minutes between saved states, beside those at evaluations and at the end"
    )
    memory_limit: float = _run(
        0.0,
        "GiB of GPU memory this process may take; lets a larger card stand in for a "
        "smaller one (0: all)",
    )

    policy: str = _model(
        "tiny", "a Qwen2.5-VL (or Qwen2-VL, Qwen3-VL) by folder or hub id; tiny is in the package"
    )
    sam: str = _model(
        "tiny",
        "Segment Anything: tiny, vit_b, vit_l, vit_h, or a SAM 2 or SAM 3 by hub id or folder "
        "(facebook/sam2-hiera-large)",
    )
    sam_checkpoint: str = _model(
        "", "file with the weights of vit_b, vit_l or vit_h (default: downloaded once)"
    )
    load_in: str = _model("nf4", "weights of the frozen base", ("nf4", "bf16", "fp32"))
    rank: int = _model(32, "rank of the LoRA adapter")
    image_size: int = _model(
        112,
        "pixels a side of the square the policy sees, a multiple of 28 (Qwen3-VL: 32, " "tiny: 14)",
    )
    coordinates: str = _model(
        "auto",
        "what answers count in: pixels, thousandths of the picture's sides, or auto, "
        "as that kind of model is used to",
        ("auto", "pixels", "thousandths"),
    )

    data: str = _data(
        "shapes",
        "shapes (drawn scenes), a public set (refcocog, reasonseg, ...), or a folder (yours "
        "with data.jsonl, or a set's files)",
    )
    eval_data: str = _data(
        "", "the set for validation and test, such as reasonseg (default: that of --data)"
    )
    coco_dir: str = _data(
        "",
        "folder with COCO's train2014 pictures, for RefCOCO's sets; without it those that are "
        "drawn are fetched",
    )
    sentences: str = _data(
        "first", "RefCOCO's sets: the first expression of each object, or all", ("first", "all")
    )
    ignore: str = _data(
        "foreground",
        "ReasonSeg's undecided pixels: foreground, as in the hub's copies, or excluded",
        ("foreground", "excluded"),
    )
    empty_truth: str = _data(
        "correct",
        "test questions whose true mask is empty: an empty mask is correct (LISA's "
        "way), or they are excluded",
        ("correct", "excluded"),
    )

    questions: int = _rollout(16, "questions a rollout batch")
    group: int = _rollout(8, "G, answers a question (elsewhere num_generations)")
    max_new_tokens: int = _rollout(112, "longest answer, tokens")
    temperature: float = _rollout(1.0, "sampling temperature, applied in the loss too")

    accuracy: str = _reward(
        "tiered",
        "accuracy term: eq. (5), one threshold, IoU, or the tiers on the box's IoU",
        ("tiered", "threshold:0.5", "threshold:0.7", "threshold:0.8", "iou", "box-iou"),
    )
    accuracy_weight: float = _reward(1.0, "weight of the accuracy term (0 to 4)")
    reasoning_weight: float = _reward(1.0, "weight of the reasoning-format term (0 or 1)")
    segmentation_weight: float = _reward(1.0, "weight of the segmentation-format term (0 or 1)")
    points: bool = _reward(
        True, "prompt SAM with the answer's box and points, or (--no-points) with the box alone"
    )
    max_points: int = _reward(
        8, "most points an answer may give; one with more is not read, as if it had no box"
    )

    lr: float = _optimisation(1e-4, "learning rate of the adapter")
    beta: float = _optimisation(
        0.005,
        "weight of the KL to the base; 0 leaves it out, with its forward (1e-9: it is "
        "measured and moves nothing)",
    )
    kl_bound: float = _optimisation(
        5.0, "log(pi_ref / pi) counts at most this in the KL, so no token rules an update"
    )
    skip_flat: bool = _optimisation(
        False,
        "leave groups without variance (zero_variance in the log) out of the "
        "updates: they carry nothing but the KL. No others take their places",
    )
    eps_low: float = _optimisation(0.2, "the ratio is clipped at 1 - eps_low")
    eps_high: float = _optimisation(
        0.3, "the ratio is clipped at 1 + eps_high (clip-higher: above eps_low)"
    )
    normalise: str = _optimisation(
        "token",
        "loss aggregation. token: eq. (4), one normaliser for a group's tokens; "
        "sequence: eq. (2), one for each answer",
        ("token", "sequence"),
    )
    advantage: str = _optimisation(
        "std", "std: eq. (1); mean: no division by the standard deviation", ("std", "mean")
    )
    updates: int = _optimisation(
        4,
        "optimizer updates a rollout batch, each on its share of the questions; with 1 "
        "the ratio is always 1",
    )
    passes: int = _optimisation(
        1, "passes over each rollout batch, each of that many updates (elsewhere " "num_iterations)"
    )
    micro: int = _optimisation(
        8, "questions a forward of the update; lower it when memory runs out"
    )
    checkpointing: bool = _optimisation(
        False, "recompute activations in the backward: less memory, more time"
    )
    warmup: int = _optimisation(10, "updates over which the rate climbs to lr, then stays")
    max_grad_norm: float = _optimisation(1.0, "gradients are scaled down to this norm")

    eval_every: int = _evaluation(40, "steps between evaluations on the validation set; 0 for none")
    eval_samples: int = _evaluation(64, "validation questions each time")
    test_samples: int = _evaluation(500, "held-out test questions before and after training")
    eval_batch: int = _evaluation(
        0,
        "questions that are answered side by side; padding can move greedy answers "
        "(0: about 16,000 prompt tokens, and on a GPU fewer where memory is short)",
    )

    @property
    def reward_weights(self) -> tuple[float, float, float]:
        """Weights of the terms of reward.score_group, in their order."""
        return self.accuracy_weight, self.reasoning_weight, self.segmentation_weight


_FULL_SIZE = dict(
    sam="vit_h",
    data="refcocog",
    image_size=840,
    lr=2e-5,
    max_new_tokens=512,
    micro=1,
    checkpointing=True,
    eval_samples=32,
)
PRESETS = {
    "tiny": {},
    "3b": dict(policy="Qwen/Qwen2.5-VL-3B-Instruct", **_FULL_SIZE),
    "7b": dict(policy="Qwen/Qwen2.5-VL-7B-Instruct", **_FULL_SIZE),
}


# From the largest on: GiB of the whole card that a preset is for, and GiB that must be free. These
# are the forecast's peak without sampling, and 10 % that is lost between tensors.
# Cards of 24 GB report 21.9 (A10G) to 24.0 GiB, of 12 GB 11.6 to 12.
MEMORY = {"7b": (21.0, 14.7), "3b": (11.0, 10.6)}


def choose_preset(device: str, memory_limit: float = 0.0) -> tuple[str, str]:
    """Return the preset for this machine, and why. `memory_limit`, in GiB, counts as the card's memory."""
    if device == "cpu":
        return "tiny", "it is the one for a CPU"
    fault = gpu_fault()
    if fault:
        return (
            "tiny",
            f"{fault}. So the tiny policy and the tiny SAM in the package are taken, on the CPU",
        )
    name = torch.cuda.get_device_name()
    free, whole = card_memory(memory_limit)
    if emulates_bf16():
        return "tiny", (
            f"the GPU {name} ({whole:.1f} GiB) is older than compute capability 8.0 and emulates bf16; "
            "--preset 3b would keep all but the 4-bit weights in fp32: slow, and nobody has measured it"
        )
    why = f"the GPU {name} has {whole:.1f} GiB"
    if memory_limit:
        why = f"the GPU {name} may be used up to --memory-limit {memory_limit:g}"
    too_large = []
    for preset, (card, peak) in MEMORY.items():
        if whole > card and free > peak:
            return preset, why + too_little(free, too_large)
        if whole > card:
            too_large.append(f"{preset} needs {peak:g}")
    return "tiny", why + too_little(free, too_large)


def too_little(free: float, too_large: list[str]) -> str:
    """Say that the `free` GiB are less than larger presets need; "" where there are none."""
    if not too_large:
        return ""
    return f", of which {free:.1f} are free; {' and '.join(too_large)}"


def emulates_bf16() -> bool:
    """Whether this GPU is older than compute capability 8.0 (T4): it has no bf16 of its own."""
    return torch.cuda.get_device_capability() < (8, 0)


def option(name: str) -> str:
    """A field's name as it is typed: max_new_tokens -> --max-new-tokens."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists every option)\n")

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        known, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].split("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, 1)
            self.error(f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else ""))
        return known


def add_options(parser: argparse.ArgumentParser, names: set[str] | None = None) -> None:
    """An option for each field of Settings (or those in `names`), by group; the namespace holds only what is given."""
    groups = {}
    for f in fields(Settings):
        if names is not None and f.name not in names:
            continue
        heading, help = f.metadata["group"], f.metadata["help"].replace("%", "%%")
        if f.default != "":
            help += f" (default {f.default})"
        kind = dict(type=f.type, choices=f.metadata["choices"])
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        groups[heading].add_argument(option(f.name), default=argparse.SUPPRESS, help=help, **kind)
    larger = {name: value for name, value in _FULL_SIZE.items() if names is None or name in names}
    larger = ", ".join(
        f"{option(name)} {value}".removesuffix(" True") for name, value in larger.items()
    )
    parser.epilog = (
        f"Defaults are those of --preset tiny; 3b and 7b have instead: {larger}, and their policy."
    )


def parse_settings(argv: list[str] | None, prog: str, description: str) -> tuple[Settings, str]:
    """Command line -> (checked settings, a line that says which preset was chosen and what was overridden)."""
    parser = Parser(
        prog=prog, usage="%(prog)s [options]", description=description, allow_abbrev=False
    )
    add_options(parser)
    given = vars(parser.parse(argv))
    try:
        if given.get("resume"):
            settings, line = resumed_settings(given)
        else:
            settings, line = make_settings(**given)
            check_machine(settings, given.get("device"))
        check(settings)
    except UserError as error:
        parser.error(str(error))
    return settings, line


def make_settings(**given) -> tuple[Settings, str]:
    """Settings from a preset with the `given` fields on top, and a line that says so."""
    preset, why = given.get("preset", "auto"), "asked for"
    if preset == "auto":
        preset, why = choose_preset(given.get("device", "auto"), given.get("memory_limit", 0.0))
    settings = Settings(**PRESETS[preset] | given | {"preset": preset})
    if settings.device == "auto":
        settings = replace(settings, device=auto_device())
        if settings.device == "cpu" and why == "asked for":
            why += f", on the CPU: {gpu_fault()}"
    if preset != "tiny" and settings.device == "cuda" and emulates_bf16():
        why += "; the GPU emulates bf16, so all but the 4-bit weights is kept in fp32: slow, and nobody has measured it"
    changed = ", ".join(
        f"{k} = {v}" for k, v in given.items() if k not in ("preset", "run", "resume")
    )
    return settings, f"preset {preset}: {why}" + (f"; you set {changed}" if changed else "")


def auto_device() -> str:
    """Return the device that --device auto means here."""
    return "cpu" if gpu_fault() else "cuda"


def check_machine(s: Settings, typed_device: str | None) -> None:
    """Refuse a full-size policy on the CPU, which would take weeks, unless the user typed --device cpu."""
    if s.device != "cpu" or typed_device == "cpu" or s.rehearse:
        return
    full_size = {name: preset["policy"] for name, preset in PRESETS.items() if name != "tiny"}
    if s.preset in full_size:
        what = f"--preset {s.preset}"
    elif s.policy in full_size.values():
        what = f"--policy {s.policy}"
    else:
        return
    raise UserError(
        f"{what} needs a GPU, but {gpu_fault() or 'the CPU was chosen'}. Take --preset tiny, or add "
        "--device cpu if the CPU may take weeks"
    )


# A resumed run may be longer, and take less memory (with shorter answers if nothing else helps). Its data and models
# may have been moved: the folder of the run tells whether they are the same (runs.py).
MAY_CHANGE = (
    "run",
    "resume",
    "samples",
    "preset",
    "micro",
    "checkpointing",
    "memory_limit",
    "max_new_tokens",
    "save_minutes",
    "data",
    "eval_data",
    "coco_dir",
    "policy",
    "sam",
    "sam_checkpoint",
)


def read_settings(file: Path) -> dict:
    """What a run wrote down of its settings: those that still exist."""
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        return {name: value for name, value in saved.items() if name in asdict(Settings())}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} cannot be read as a run's settings ({error})") from None


def resumed_settings(given: dict) -> tuple[Settings, str]:
    """The settings that a run was started with. What would make it another run is refused."""
    if not given.get("run"):
        raise UserError("--resume needs --run with the folder of the run to go on with")
    file = Path(given["run"]) / "settings.json"
    if not file.is_file():
        raise UserError(f"--resume: {file.parent} holds no run")
    saved = asdict(Settings()) | read_settings(
        file
    )  # what an older version did not know takes its default
    for name, value in given.items():
        if name not in MAY_CHANGE and saved[name] != value:
            raise UserError(
                f"--resume: this run was started with {option(name)} {saved[name]}, not {value}"
            )
    changed = {
        name: value for name, value in given.items() if name in MAY_CHANGE and name != "preset"
    }
    settings = Settings(**saved | changed)
    if settings.device == "auto":  # no run writes this, but a hand may
        settings = replace(settings, device=auto_device())
        check_machine(settings, None)
    return settings, f"going on with {settings.run}, preset {settings.preset}"


MAY_BE_0 = (
    "rehearse",
    "memory_limit",
    "beta",
    "warmup",
    "eval_every",
    "eval_batch",
    "seed",
    "eps_low",
    "eps_high",
    "accuracy_weight",
    "reasoning_weight",
    "segmentation_weight",
)


def check(s: Settings) -> None:
    """Refuse values that cannot work, each with one line that names the option."""
    for f in fields(s):
        value, least = getattr(s, f.name), "be at least 1" if f.type is int else "be above 0"
        if f.type in (int, float) and not (
            0 < value < float("inf") or value == 0 and f.name in MAY_BE_0
        ):
            raise UserError(
                f"{option(f.name)} must {'not be below 0' if f.name in MAY_BE_0 else least}, not {value}"
            )
    if s.seed > 10**12:  # a step's own seed is made of it
        raise UserError(f"--seed must be at most 10**12, not {s.seed}")
    if s.group < 2:
        raise UserError(
            f"--group must be at least 2, not {s.group}: an answer is judged against the rest of its group"
        )
    if s.eps_low >= 1:
        raise UserError(f"--eps-low must be below 1, not {s.eps_low}")
    if s.image_size < 56:  # which multiple it must be depends on the policy: check_policy looks
        raise UserError(f"--image-size must be at least 56, not {s.image_size}")
    if s.updates > s.questions:
        raise UserError(
            f"--updates {s.updates} is more than --questions {s.questions}: an update needs a question"
        )
    if s.samples < s.questions:
        raise UserError(
            f"--samples {s.samples} is less than one rollout batch: lower --questions {s.questions}"
        )
    fault = gpu_fault() if s.device == "cuda" else ""
    if fault and s.resume:
        raise UserError(
            f"--resume: this run was started on a GPU, but here {fault}. Continue it on a machine with a "
            "GPU"
        )
    if fault:
        raise UserError(
            f"--device cuda: {fault}. Without this option the tiny preset runs on the CPU"
        )
    if s.device == "cuda" and s.load_in == "bf16" and emulates_bf16():
        raise UserError(
            f"--load-in bf16: {torch.cuda.get_device_name()} emulates bf16; take --load-in nf4"
        )
    if not any(s.reward_weights):
        raise UserError(
            "--accuracy-weight, --reasoning-weight and --segmentation-weight are 0: nothing is paid for"
        )
    if s.sam_checkpoint and not Path(s.sam_checkpoint).is_file():
        raise UserError(f"--sam-checkpoint {s.sam_checkpoint}: no such file")


def cell_size(model) -> int:
    """Pixels a side of one picture token, for a model of the configuration `model`."""
    return model.vision_config.patch_size * model.vision_config.spatial_merge_size


def check_size(model, image_size: int) -> None:
    """Refuse pictures of a size that a model of the configuration `model` cannot cut into whole tokens."""
    cell = cell_size(model)
    if image_size % cell:
        nearest = round(image_size / cell) * cell
        need = f"must be a multiple of {cell} for a {model.model_type}"
        raise UserError(f"--image-size {need}, not {image_size}: try {nearest}")


DISK_FULL = (
    errno.ENOSPC,
    getattr(errno, "EDQUOT", errno.ENOSPC),
)  # EDQUOT, a quota, is not on every system


def first_line(error: Exception) -> str:
    """What an error says, in one line; a library's message may have many."""
    if getattr(error, "errno", None) in DISK_FULL:
        return (
            "this disk is full. Make room, or name folders on another disk in the environment: HF_HOME for models, "
            "SAMR1_CACHE for pictures, tables and SAM. Then run again: the files that were fetched are kept"
        )
    return (str(error).strip() or repr(error)).splitlines()[0]


def print_anything() -> None:
    """Let print write "?" for a character that the console or the file of the output lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's stream takes every character
            stream.reconfigure(errors="replace")


def exit_with(error: Exception, prog: str) -> None:
    """Print one line and leave with status 2."""
    print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
