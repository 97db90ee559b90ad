"""All settings of a run: a dataclass with a line of help for each field, and three presets.

`train.py` makes an option of each field. A field named X_weight is the weight of the reward term X
(reward.py).
"""

import argparse
import difflib
import errno
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch

from .gpu import card_memory, gpu_fault


def cache_folder() -> Path:
    """Return the folder of downloads and converted data sets.

    It is SAMR1_CACHE from the environment, or .cache/samr1_mini in the home folder.
    """
    if os.environ.get("SAMR1_CACHE"):
        return Path(os.environ["SAMR1_CACHE"]).expanduser().absolute()
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry in the list of users, as in some containers
        home = Path(tempfile.gettempdir())
    return home / ".cache" / "samr1_mini"


CACHE = cache_folder()


class UserError(Exception):
    """A mistake that the user can correct. It is shown as one line, without a traceback."""


class Terminated(BaseException):
    """SIGTERM or the signal of a closed terminal: the run saves its last whole step and ends.

    Like KeyboardInterrupt, this is no Exception. So `except Exception` does not catch it.
    """

    def __init__(self, number: int):
        super().__init__(f"signal {number}")
        self.number = number


def setting(default, help: str, choices: tuple | None = None, heading: str = ""):
    """Return a field of Settings. A `heading` is printed in `--help` above this field."""
    return field(default=default, metadata=dict(help=help, choices=choices, heading=heading))


@dataclass(frozen=True)
class Settings:
    """One field for each option of train.py. Defaults are those of --preset tiny."""

    preset: str = setting(
        "auto",
        "size of policy, pictures and answers. auto takes the size that fits this machine",
        ("auto", "tiny", "3b", "7b"),
        heading="run",
    )
    samples: int = setting(3000, "number of training questions; a smaller data set is repeated")
    run: str = setting(
        "", "folder for log, pictures, adapter and summary (default: a new one in runs/)"
    )
    resume: bool = setting(False, "continue the run in the folder --run")
    seed: int = setting(
        0,
        "seed of all random numbers. On the same type of CPU with the same number of threads and "
        "processes, the same seed gives the same run. On a GPU, rounding differs from run to run",
    )
    rehearse: int = setting(
        0,
        "do not train. Measure this many full steps with random weights of the preset's shape. "
        "Nothing is downloaded",
    )
    device: str = setting("auto", "auto, cpu or cuda", ("auto", "cpu", "cuda"))
    processes: int = setting(
        0,
        "number of processes of a training on a CPU, with one thread each. Use 1 to debug. With 0, "
        "the program chooses: for the tiny policy and the tiny SAM, one process for each core, at "
        "most 4. For other models, it takes one process",
    )
    save_minutes: float = setting(
        10.0, "minutes between saved states. Evaluations and the end of a run save one too"
    )
    trace_every: int = setting(
        10,
        "number of steps after which answers are again logged token by token, for report.html (0: "
        "never)",
    )
    memory_limit: float = setting(
        0.0,
        "GiB of GPU memory that this process may use (0: all). A limit lets a large card imitate a "
        "smaller one",
    )

    policy: str = setting(
        "tiny",
        "folder or hub id of a Qwen2.5-VL, Qwen2-VL or Qwen3-VL. Two policies are in the package: "
        "tiny, and tiny-several, which answers with lists of objects",
        heading="model",
    )
    start_from: str = setting(
        "", "folder of an adapter to start from. The KL still compares with the base model"
    )
    prompt_file: str = setting(
        "",
        "text file with another prompt; it must contain {question} and may contain {unit}",
    )
    sam: str = setting(
        "tiny",
        "segmenter: tiny, vit_b, vit_l, vit_h, or the hub id or folder of a SAM 2 or SAM 3, such "
        "as facebook/sam2-hiera-large",
    )
    sam_checkpoint: str = setting(
        "", "file with the weights of vit_b, vit_l or vit_h (default: downloaded once)"
    )
    sam_dtype: str = setting(
        "auto",
        "number format of the segmenter's picture encoder. auto: bf16 on a GPU that has it, else "
        "fp32",
        ("auto", "bf16", "fp32"),
    )
    load_in: str = setting("nf4", "format of the frozen base weights", ("nf4", "bf16", "fp32"))
    rank: int = setting(32, "rank of the LoRA adapter")
    image_size: int = setting(
        112,
        "side in pixels of the square picture that the policy sees, a multiple of 28 (Qwen3-VL: "
        "32, tiny: 14)",
    )
    coordinates: str = setting(
        "auto",
        "unit of coordinates in answers: pixels, thousandths of the picture's sides, or auto for "
        "the model's own unit",
        ("auto", "pixels", "thousandths"),
    )

    data: str = setting(
        "shapes",
        "shapes (drawn scenes), a public set (refcocog, reasonseg, ...), a folder with data.jsonl, "
        "or a folder with the files of a public set",
        heading="data",
    )
    eval_data: str = setting(
        "", "data set for validation and test, such as reasonseg (default: that of --data)"
    )
    coco_dir: str = setting(
        "",
        "folder with COCO's train2014 pictures, for RefCOCO's sets (default: download the needed "
        "pictures)",
    )
    sentences: str = setting(
        "first",
        "in RefCOCO's sets, use the first expression of each object, or all",
        ("first", "all"),
    )
    ignore: str = setting(
        "foreground",
        "ReasonSeg's undecided pixels (label ignore). foreground: they belong to the object, as on "
        "the hub. excluded: they do not count",
        ("foreground", "excluded"),
    )
    empty_truth: str = setting(
        "correct",
        "test questions with an empty true mask. correct: an empty mask gets IoU 1, as in LISA's "
        "evaluation. excluded: leave these questions out",
        ("correct", "excluded"),
    )
    objects: str = setting(
        "one",
        "objects in an answer. one: exactly one, as in the paper. several: a list of objects, "
        "which is empty if nothing in the picture fits the question",
        ("one", "several"),
    )

    questions: int = setting(16, "questions in a rollout batch", heading="rollout")
    group: int = setting(8, "answers to each question, G (in TRL: num_generations)")
    redraw: int = setting(
        0,
        "replace groups with equal rewards by new questions, at most this many times in a step "
        "(dynamic sampling, DAPO). The number of steps stays --samples / --questions. Groups that "
        "still have equal rewards after the last time stay in the update",
    )
    max_new_tokens: int = setting(112, "maximum number of tokens in an answer")
    temperature: float = setting(1.0, "sampling temperature; the loss uses the same temperature")

    accuracy: str = setting(
        "tiered",
        "accuracy term: tiers of eq. (5), one threshold, 4 x IoU, or tiers of the box's IoU",
        ("tiered", "threshold:0.5", "threshold:0.7", "threshold:0.8", "iou", "box-iou"),
        heading="reward",
    )
    accuracy_weight: float = setting(1.0, "weight of the accuracy term, which is 0 to 4")
    reasoning_format_weight: float = setting(
        1.0, "weight of the reasoning-format term, which is 0 or 1"
    )
    segmentation_format_weight: float = setting(
        1.0, "weight of the segmentation-format term, which is 0 or 1"
    )
    matching_weight: float = setting(
        1.0,
        "weight of the matching term of --objects several. The term is the mean IoU of matched "
        "boxes, 0 to 1",
    )
    repeats_weight: float = setting(
        1.0,
        "weight of the repeats term of --objects several. The term is -1 to 0: minus the share of "
        "boxes that repeat an earlier box",
    )
    points: bool = setting(True, "prompt SAM with box and points (--no-points: with the box alone)")
    max_points: int = setting(8, "maximum number of points; an answer with more points is not read")

    lr: float = setting(1.5e-4, "learning rate of the adapter", heading="optimisation")
    beta: float = setting(
        0.005,
        "weight of the KL to the base model. With 0 the KL is not computed. With a tiny weight "
        "such as 1e-9, the KL is logged and has almost no effect",
    )
    kl_bound: float = setting(5.0, "upper bound of log(pi_ref / pi) in the KL of one token")
    skip_flat: bool = setting(
        False,
        "leave groups with equal rewards out of the updates. Only their KL is lost: their "
        "advantages are 0",
    )
    eps_low: float = setting(0.2, "the ratio is clipped at 1 - eps_low")
    eps_high: float = setting(
        0.3,
        "the ratio is clipped at 1 + eps_high. A value above eps_low is called clip-higher",
    )
    normalise: str = setting(
        "token",
        "mean in the loss. token: over all tokens of a group, eq. (4). sequence: within each "
        "answer, then over answers, eq. (2)",
        ("token", "sequence"),
    )
    advantage: str = setting(
        "std",
        "how rewards become advantages. std: eq. (1). mean: eq. (1) without the division by the "
        "standard deviation. gdpo: eq. (1) for each reward term. The sum of the terms is divided "
        "by its standard deviation in the batch (GDPO, arXiv 2601.05242)",
        ("std", "mean", "gdpo"),
    )
    updates: int = setting(
        4,
        "optimizer updates for each rollout batch. Each takes an equal part of the questions. With "
        "--updates 1 --passes 1, the ratio is always 1",
    )
    passes: int = setting(
        1,
        "passes over each rollout batch, with --updates updates each (in TRL: num_iterations)",
    )
    micro: int = setting(8, "questions in one forward of an update; lower it to save memory")
    checkpointing: bool = setting(
        False,
        "recompute activations in the backward: less memory, more time. On a GPU, layers whose "
        "activations fit in the free memory are not recomputed",
    )
    warmup: int = setting(10, "number of updates until the learning rate reaches --lr")
    max_grad_norm: float = setting(1.0, "maximum norm of the gradient")

    eval_every: int = setting(
        40, "steps between evaluations on the validation set (0: none)", heading="evaluation"
    )
    eval_samples: int = setting(64, "validation questions in each evaluation")
    test_samples: int = setting(500, "test questions before and after training")
    eval_batch: int = setting(
        0,
        "questions in one batch of an evaluation (0: about 16,000 prompt tokens, or less if memory "
        "is small). Because of padding, the batch size can change a few greedy answers",
    )

    @property
    def reward_weights(self) -> dict[str, float]:
        """The weight of each reward term by its name."""
        names = [f.name for f in fields(self) if f.name.endswith("_weight")]
        weights = {name.removesuffix("_weight"): getattr(self, name) for name in names}
        if self.objects == "one":  # without the terms of --objects several
            del weights["matching"], weights["repeats"]
        return weights


SETTING_NAMES = {f.name for f in fields(Settings)}

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
# Policies in the package, and their folders in samr1_mini/tiny.
PACKAGED = {"tiny": "policy", "tiny-several": "policy_several"}
# Used by the preset tiny with --objects several. The policy "tiny" cannot write lists of objects.
TINY_SEVERAL = dict(policy="tiny-several", max_new_tokens=128)
PRESETS = {
    "tiny": {},
    "3b": dict(policy="Qwen/Qwen2.5-VL-3B-Instruct", **_FULL_SIZE),
    "7b": dict(policy="Qwen/Qwen2.5-VL-7B-Instruct", **_FULL_SIZE),
}


# Each preset, the largest first: GiB of the card, and GiB that must be free. The second number is
# forecast.py's peak outside of sampling, plus 10 % for gaps between tensors.
# Cards of 24 GB report 21.9 (A10G) to 24.0 GiB. Cards of 12 GB report 11.6 to 12 GiB.
MEMORY = {"7b": (21.0, 12.9), "3b": (11.0, 8.1)}


def choose_preset(device: str, memory_limit: float) -> tuple[str, str]:
    """Return the preset for this machine, and the reason for it.

    `memory_limit`, in GiB, replaces the card's memory if it is above 0.
    """
    if device == "cpu":
        return "tiny", "this preset is for a CPU"
    fault = gpu_fault()
    if fault:
        instead = "So the run uses the package's tiny policy and tiny SAM, on the CPU"
        return "tiny", f"{fault}. {instead}"
    name = torch.cuda.get_device_name()
    free, whole = card_memory(memory_limit)
    if emulates_bf16():
        old = f"the GPU {name} ({whole:.1f} GiB) has a compute capability below 8.0"
        return "tiny", f"{old} and emulates bf16. --preset 3b would {SLOW_BF16}"
    why = f"the GPU {name} has {whole:.1f} GiB"
    if memory_limit:
        why = f"the GPU {name} may be used up to --memory-limit {memory_limit:g}"
    why += f", and {free:.1f} GiB are free"
    for preset, (card, peak) in MEMORY.items():
        if whole <= card:
            continue
        if free > peak:
            return preset, why
        why += f". --preset {preset} needs {peak:g} GiB"
    return "tiny", why


SLOW_BF16 = "use fp32, except for the 4-bit weights. This is slow, and nobody measured it"


def emulates_bf16() -> bool:
    """Tell if this GPU lacks bf16, because its compute capability is below 8.0 (T4)."""
    return torch.cuda.get_device_capability() < (8, 0)


def option(name: str) -> str:
    """Return the option of a setting: max_new_tokens -> --max-new-tokens."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """An argument parser whose error messages are one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists every option)\n")

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        known, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].split("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, 1)
            if near:
                self.error(f"unknown option {name}; did you mean {near[0]}?")
            self.error(f"unknown option {name}")
        return known


def add_options(parser: argparse.ArgumentParser, names: set[str] = SETTING_NAMES) -> None:
    """Add an option for each setting in `names`, under its heading.

    The parsed options then contain only those that the user typed.
    """
    for f in fields(Settings):
        heading = f.metadata["heading"]
        if heading:  # argparse prints no heading without options
            group = parser.add_argument_group(heading)
        if f.name not in names:
            continue
        text = f.metadata["help"].replace("%", "%%")
        if f.default != "":
            text += f" (default {f.default})"
        kind = dict(type=f.type, choices=f.metadata["choices"])
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        group.add_argument(option(f.name), default=argparse.SUPPRESS, help=text, **kind)
    larger = []
    for name, value in _FULL_SIZE.items():
        if name in names:
            larger.append(f"{option(name)} {value}".removesuffix(" True"))
    parser.epilog = (
        "Defaults are those of --preset tiny. The presets 3b and 7b set their own policy, and "
        f"{', '.join(larger)}."
    )


def parse_settings(argv: list[str] | None, prog: str, description: str) -> tuple[Settings, str]:
    """Return checked settings from a command line, and a line on the preset and typed options.

    Prints one line on stderr after a mistake, and ends with exit code 2.
    """
    parser = Parser(
        prog=prog, usage="%(prog)s [options]", description=description, allow_abbrev=False
    )
    add_options(parser)
    given = vars(parser.parse(argv))
    try:
        if given.get("resume"):
            settings, line = resumed_settings(given)
            check(settings)
        else:
            settings, line = make_settings(**given)
            check_machine(settings, given.get("device"))
    except UserError as error:
        parser.error(str(error))
    return settings, line


def make_settings(**given) -> tuple[Settings, str]:
    """Return checked settings, and a line about them. `given` replaces settings of the preset.

    Raises UserError for values that cannot work.
    """
    preset = given.get("preset", "auto")
    why = "asked for"
    if preset == "auto":
        preset, why = choose_preset(given.get("device", "auto"), given.get("memory_limit", 0.0))
    unknown = set(given) - SETTING_NAMES
    if unknown:
        raise UserError(f"no setting is called {min(unknown)}. See python train.py --help")
    defaults = PRESETS.get(preset, {})
    if preset == "tiny" and given.get("objects") == "several":
        defaults = TINY_SEVERAL
    settings = Settings(**defaults | given | {"preset": preset})
    if settings.device == "auto":
        settings = replace(settings, device=auto_device())
        if settings.device == "cpu" and why == "asked for":
            why += f", on the CPU: {gpu_fault()}"
    check(settings)
    line = f"preset {preset}: {why}"
    if preset != "tiny" and settings.device == "cuda" and emulates_bf16():
        line += f"; the GPU emulates bf16, so the run will {SLOW_BF16}"
    changed = [f"{k} = {v}" for k, v in given.items() if k not in ("preset", "run", "resume")]
    if changed:
        line += f"; you set {', '.join(changed)}"
    return settings, line


def auto_device() -> str:
    """Return the device that --device auto means here."""
    return "cpu" if gpu_fault() else "cuda"


WEEKS = "Take --preset tiny. Or add --device cpu, if you can wait for weeks"


def check_machine(s: Settings, typed_device: str | None, advice: str = WEEKS) -> None:
    """Raise UserError for a full-size policy on the CPU, which is very slow.

    A user who typed --device cpu is willing to wait.
    """
    if s.device != "cpu" or typed_device == "cpu" or s.rehearse:
        return
    full_size = {name: preset["policy"] for name, preset in PRESETS.items() if name != "tiny"}
    if s.preset in full_size:
        what = f"--preset {s.preset}"
    elif s.policy in full_size.values():
        what = f"--policy {s.policy}"
    else:
        return
    why = gpu_fault() or "the CPU was chosen"
    raise UserError(f"{what} needs a GPU, but {why}. {advice}")


# Settings that may change at --resume. A run may become longer, or use less memory. Its data and
# models may be in other folders. runs.py checks that the questions are the same, and that no
# other model of the package is named.
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
    """Read settings.json of a run. Settings that no longer exist are left out.

    Raises UserError for a value of the wrong type. A whole number is a float too.
    """
    saved = parse_json(file.read_bytes(), file, dict, "restore the file")
    known = {name: value for name, value in saved.items() if name in SETTING_NAMES}
    check_types(known, f"{file}: ")
    return known


def check_types(values: dict, where: str = "") -> None:
    """Raise UserError for a setting of the wrong type. A whole number is a float too."""
    types = {f.name: f.type for f in fields(Settings)}
    for name, value in values.items():
        kind = types[name]
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or isinstance(value, bool) and kind is not bool:
            raise UserError(f"{where}{name} must be of type {kind.__name__}, not {value!r:.80}")


def begun_settings(folder: Path) -> dict:
    """Return the settings with which a run was started. Newer settings get their defaults.

    Raises UserError if the folder holds no run.
    """
    file = folder / "settings.json"
    if not file.is_file():
        raise UserError(f"--resume: {folder} holds no run. Name another --run")
    return asdict(Settings()) | read_settings(file)


def refuse_changes(begun: dict, given: dict) -> None:
    """Raise UserError for a `given` setting that must not change at --resume."""
    for name, value in given.items():
        if name not in MAY_CHANGE and begun[name] != value:
            typed = option(name)
            raise UserError(
                f"--resume: this run was started with {typed} {begun[name]}, not {value}. Leave "
                f"{typed} out, or start another run"
            )


def resumed_settings(given: dict) -> tuple[Settings, str]:
    """Return the settings with which a run was started, and a line that describes them.

    Raises UserError for a `given` setting that must not change.
    """
    if not given.get("run"):
        raise UserError("--resume needs --run with the folder of the run to continue")
    folder = Path(given["run"])
    saved = begun_settings(folder)
    refuse_changes(saved, given)
    changed = given | {"preset": saved["preset"]}  # the run has the sizes of its preset
    prompt = folder / "prompt.txt"
    if saved["prompt_file"] and prompt.is_file():  # the user's file may have changed since
        changed["prompt_file"] = str(prompt)
    settings = Settings(**saved | changed)
    if settings.device == "auto":  # no run writes this value, but a person may
        settings = replace(settings, device=auto_device())
        check_machine(settings, None)
    return settings, f"continue {settings.run}, preset {settings.preset}"


MAY_BE_0 = (
    "trace_every",
    "rehearse",
    "redraw",
    "memory_limit",
    "beta",
    "warmup",
    "eval_every",
    "eval_batch",
    "seed",
    "eps_low",
    "eps_high",
    "processes",
)


def check_number(name: str, value: float) -> None:
    """Raise UserError for a number that is too small, infinite or NaN."""
    need = "above 0"
    valid = 0 < value < float("inf")
    if name in MAY_BE_0 or name.endswith("_weight"):
        need = "0 or more"
        valid = 0 <= value < float("inf")
    if not valid:
        raise UserError(f"{option(name)} must be {need}, not {value}")


def check(s: Settings) -> None:
    """Raise UserError for settings that cannot work. The error names the option."""
    check_types(asdict(s))
    for f in fields(s):
        value = getattr(s, f.name)
        choices = f.metadata["choices"]
        if choices and value not in choices:
            raise UserError(f"{option(f.name)} must be one of {', '.join(choices)}, not {value}")
        if f.type in (int, float):
            check_number(f.name, value)
    if s.seed > 10**12:  # the seed of each step is computed from it
        raise UserError(f"--seed must be at most 10**12, not {s.seed}")
    if s.group < 2:
        why = "an answer is compared with the rest of its group"
        raise UserError(f"--group must be at least 2, not {s.group}: {why}")
    if s.eps_low >= 1:
        raise UserError(f"--eps-low must be below 1, not {s.eps_low}")
    if s.image_size < 56:  # check_image_size also requires a multiple of the policy's cell
        raise UserError(f"--image-size must be at least 56, not {s.image_size}")
    if s.updates > s.questions:
        why = f"more than --questions {s.questions}, but each update needs a question: lower it"
        raise UserError(f"--updates {s.updates} is {why}")
    if s.samples < s.questions:
        why = f"less than one rollout batch: lower --questions (now {s.questions})"
        raise UserError(f"--samples {s.samples} is {why}")
    if not any(s.reward_weights.values()):
        options = ", ".join(option(f"{name}_weight") for name in s.reward_weights)
        raise UserError(f"{options} are all 0, so no answer gets reward. Set one of them above 0")
    if s.sam_checkpoint and not Path(s.sam_checkpoint).is_file():
        raise UserError(
            f"--sam-checkpoint {s.sam_checkpoint}: no such file. Without this option, the file is "
            "downloaded"
        )
    if s.device == "cuda":
        check_gpu(s)
    check_share(s, s.processes)


def can_share(s: Settings, count: int) -> bool:
    """Return True if `count` processes can take equal shares of the questions of an update.

    A single process needs no equal shares. The count is 0 before it is chosen.
    """
    return count <= 1 or s.questions % (s.updates * count) == 0


def check_share(s: Settings, count: int) -> None:
    """Raise UserError if `count` processes cannot share the questions."""
    if not can_share(s, count):
        need = f"{count} (--processes) x --updates {s.updates}"
        raise UserError(f"--questions {s.questions} is no multiple of {need}: change one of these")


def check_gpu(s: Settings) -> None:
    """Raise UserError if these settings cannot be used on the GPU."""
    if s.processes > 1:
        raise UserError("--processes is for a CPU: add --device cpu. Several GPUs need torchrun")
    fault = gpu_fault()
    if fault and s.resume:
        why = f"this run was started on a GPU, but here {fault}"
        raise UserError(f"--resume: {why}. Continue it on a machine with a GPU")
    if fault:
        raise UserError(
            f"--device cuda: {fault}. To use the CPU and the tiny preset, leave this option out"
        )
    process = int(os.environ.get("LOCAL_RANK", "0"))  # torchrun's number on this machine, from 0
    if process and process >= torch.cuda.device_count():
        raise UserError(
            f"there are more processes than the {torch.cuda.device_count()} GPUs of this machine: "
            "lower --nproc_per_node (torchrun) or --num_processes (accelerate)"
        )
    if s.load_in == "bf16" and emulates_bf16():
        name = torch.cuda.get_device_name()
        raise UserError(
            f"--load-in bf16: {name} only emulates bf16, which is slow. Take --load-in nf4"
        )


def cell_size(model) -> int:
    """Return the side, in pixels, of the square that one picture token covers."""
    return model.vision_config.patch_size * model.vision_config.spatial_merge_size


def check_image_size(model, image_size: int) -> None:
    """Raise UserError if this model cannot cut a picture of this size into whole tokens."""
    cell = cell_size(model)
    if image_size % cell:
        nearest = round(image_size / cell) * cell
        need = f"must be a multiple of {cell} for a {model.model_type}"
        raise UserError(f"--image-size {need}, not {image_size}: try {nearest}")


# The disk or a quota is full. Windows lacks the second code.
DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def first_line(error: Exception) -> str:
    """Return an error's message in one line. Messages of libraries may have many lines."""
    if getattr(error, "errno", None) in DISK_FULL:
        return (
            "the disk is full. Free some disk space, or set HF_HOME (models) and SAMR1_CACHE "
            "(pictures, tables, SAM) to folders on another disk. Then run again. Downloaded files "
            "are kept"
        )
    message = str(error).strip() or repr(error)
    return message.splitlines()[0]


def cause(error: Exception) -> str:
    """Return an error's type and text in one line. A KeyError's text is only a key."""
    return f"{type(error).__name__}: {first_line(error)}"


def parse_json(text: bytes, place: str | Path, kind: type | tuple, advice: str):
    """Return the value of a JSON text in UTF-8.

    Raises UserError if the text is damaged, or if its value is not of the type `kind`. The error
    names the `place` of the text.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # errors of JSON and of UTF-8 are ValueErrors
        raise UserError(f"{place} is not valid JSON ({error}): {advice}") from None
    if not isinstance(value, kind):
        raise UserError(f"{place} is JSON of the wrong kind ({type(value).__name__}): {advice}")
    return value


def print_anything() -> None:
    """Let print write "?" for a character that the output cannot show, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's stream takes every character
            stream.reconfigure(errors="replace")


def exit_with(error: Exception, prog: str) -> None:
    """Print an error in one line, and end with exit code 2."""
    message = " ".join(str(error).split())
    print(f"{prog}: error: {message}", file=sys.stderr)
    sys.exit(2)
