"""Write files whole or not at all, lock folders, refuse damaged files, and check the disk space.

Each UserError is one line.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError, safe_open

from .config import UserError, cause, parse_json
from .memory import is_memory_error

POINTER = b"version https://git-lfs"  # the start of a pointer of git-lfs
AGAIN = "download or copy it again"
INDEX = "model.safetensors.index.json"

# The files of a policy's folder that are read. Other files in the folder do not matter.
JSON_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
    INDEX,
)
TEXT_FILES = ("chat_template.jinja", "merges.txt")
NEEDED = (  # at least one file of each tuple
    ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"),
    ("tokenizer.json", "vocab.json"),
    ("preprocessor_config.json", "processor_config.json"),
)


# ------------------------------------------------------------------------- writing


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file or a folder under a temporary name, then rename it to `path`.

    Readers never find an incomplete file. If anything fails, the old file or folder stays. Several
    processes may write the same file.
    """
    path = path.resolve()  # a link stays, and its target is replaced
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    old = path.with_name(f"{path.name}.{os.getpid()}.old")
    try:
        write(part)
        if path.is_dir():  # a rename replaces files, but no folder with files in it
            remove(old)  # left by a program that was killed
            path.rename(old)
        part.replace(path)
    except BaseException:  # also Ctrl-C
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        remove(part)
    remove(old)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def save_text(path: Path, text: str) -> None:
    """Write a text in UTF-8."""
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, value) -> None:
    """Write a value as JSON."""
    save_text(path, json.dumps(value, indent=1))


@contextmanager
def only_program(folder: Path):
    """Context manager: refuse a run's folder in which another program is training now.

    The end of a program releases its lock, even if it was killed. Raises UserError.
    """
    lock = FileLock(folder / "lock", blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{folder}: another program is training there. Wait for its end. For another training, "
            "name another folder with --run"
        ) from None
    except (OSError, NotImplementedError):  # some network disks have no locks
        pass
    try:
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------------- disk space


@dataclass
class Download:
    """A download that is still to be made."""

    name: str  # to print
    size: int  # bytes
    folder: Path
    advice: str = ""  # another way to get these files

    @property
    def variable(self) -> str:
        """Return the environment variable that chooses the folder."""
        if self.folder == Path(HF_HUB_CACHE):
            if "HF_HUB_CACHE" in os.environ:  # it has priority over HF_HOME
                return "HF_HUB_CACHE"
            return "HF_HOME"
        return "SAMR1_CACHE"

    @property
    def place(self) -> Path:
        """Return the folder, or the first folder above it that exists."""
        place = self.folder
        while not place.exists() and place != place.parent:  # Windows may lack a whole drive
            place = place.parent
        return place


def check_disk_space(downloads: list[Download]) -> None:
    """Raise UserError if a disk lacks the space for the downloads to it."""
    disks = {}  # disk -> the downloads to it
    for one in downloads:
        disks.setdefault(disk_of(one.place), []).append(one)
    for on_disk in disks.values():
        place = on_disk[0].place
        needed = sum(one.size for one in on_disk)
        free = shutil.disk_usage(place).free
        if needed > free:
            names = ", ".join(one.name for one in on_disk)
            raise UserError(
                f"{names}: {needed / 1e9:.1f} GB are needed in {place}, and {free / 1e9:.1f} GB "
                f"are free there. Delete other files, or {other_disk(on_disk)}"
            )


def disk_of(folder: Path) -> tuple[int, str]:
    """Return an identifier of a folder's disk: the device number and, on Windows, the drive letter.

    Windows gives some disks the number 0.
    """
    return folder.stat().st_dev, folder.absolute().anchor


def other_disk(downloads: list[Download]) -> str:
    """Name the environment variables and options that put the downloads on another disk."""
    variables = sorted({one.variable for one in downloads})
    advice = [one.advice for one in downloads if one.advice]
    return ", or ".join([f"set {' and '.join(variables)} to a folder on another disk", *advice])


# ------------------------------------------------------------------------- reading


def check_content(file: Path, advice: str = AGAIN) -> None:
    """Raise UserError if a file is missing, empty, or a git-lfs pointer."""
    if not file.is_file():
        raise UserError(f"{file} is missing: {advice}")
    if is_pointer(file):
        folder = file.parent
        raise UserError(f"{file} is only a git-lfs pointer: run `git lfs pull` in {folder}")
    if not file.stat().st_size:
        raise UserError(f"{file} is empty: {advice}")


def is_pointer(file: Path) -> bool:
    """Return True if a file is the pointer that git-lfs puts in the place of a large file."""
    with file.open("rb") as opened:
        return opened.read(len(POINTER)) == POINTER


def load_json(file: Path, kind: type | tuple = dict, advice: str = AGAIN):
    """Return the JSON value in a file. Raises UserError as check_content and parse_json do."""
    check_content(file, advice)
    return parse_json(file.read_bytes(), file, kind, advice)


def check_safetensors(file: Path) -> None:
    """Raise UserError if a file of weights is incomplete. No tensor is read.

    The header of the file holds the size of the whole file.
    """
    check_content(file)
    try:
        with safe_open(file, "pt"):
            pass
    except SafetensorError as error:
        raise UserError(f"{file} is damaged or cut off ({error}): {AGAIN}") from None


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold a policy's weights. Raises UserError."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not (folder / INDEX).is_file():
        return []
    shards = load_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{folder / INDEX} names no weights: {AGAIN}")
    names = {str(name) for name in shards.values()}
    for name in names:
        if not name.endswith(".safetensors") or Path(name).name != name or "\\" in name:
            raise UserError(
                f"{folder / INDEX} names {name!r}, which is no file of weights: {AGAIN}"
            )
    return [folder / name for name in sorted(names)]


def check_policy_files(folder: Path) -> None:
    """Raise UserError if a file of a policy's folder is damaged, or if the index names a missing one."""
    for name in JSON_FILES:
        if (folder / name).is_file():
            load_json(folder / name)
    for name in TEXT_FILES:
        if (folder / name).is_file():
            check_content(folder / name)
    for file in weight_files(folder):
        check_safetensors(file)


def check_policy_is_whole(folder: Path) -> None:
    """Raise UserError if a policy's folder lacks a file, or if config.json lacks the sizes of a
    part of the model.
    """
    for names in NEEDED:
        if not any((folder / name).is_file() for name in names):
            raise UserError(f"{folder} has no {' or '.join(names[:2])}: {AGAIN}")
    config = load_json(folder / "config.json")
    text = config.get("text_config", config)  # older files have no text_config
    for part, key in ((text, "hidden_size"), (config, "vision_config")):
        # Without these the library would take the sizes of a far larger model.
        if not isinstance(part, dict) or not part.get(key):
            raise UserError(f"{folder / 'config.json'} lacks {key}: {AGAIN}")


def check_adapter_files(folder: Path, option: str = "--adapter") -> dict:
    """Return the configuration of an adapter's folder. The user named the folder with `option`.

    Raises UserError if a file is missing or damaged, or if the adapter is no LoRA adapter.
    """
    if (folder / "adapter").is_dir():  # the folder of a run
        raise UserError(f"{option} {folder} is no adapter. Name {folder / 'adapter'}")
    if not folder.is_dir():
        raise UserError(
            f"{option} {folder}: there is no such folder. Name the folder adapter/ of a run"
        )
    config = folder / "adapter_config.json"
    weights = folder / "adapter_model.safetensors"
    for file in (config, weights):
        if not file.is_file():
            raise UserError(f"{option} {folder} has no {file.name}: {AGAIN}")
    content = load_json(config)
    kind = content.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{config}: peft_type must be LORA, not {kind}. Name a LoRA adapter")
    check_safetensors(weights)
    return content


def loading_error(error: Exception) -> str:
    """Return the text of a UserError for weights that could not be loaded, with advice."""
    text = f"cannot be loaded ({cause(error)})"
    if is_memory_error(error):
        return f"{text}: the memory is too small. Close other programs, or name a smaller model"
    return f"{text}: if its files are damaged, download them again"


def refuse_quantised(config, name: str) -> None:
    """Raise UserError for the configuration of a policy whose weights are already quantised."""
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"--policy {name} has quantised weights. Name the original model: --load-in nf4 "
            "quantises it"
        )


def refuse_missing_weights(found: dict, name: str) -> None:
    """Raise UserError if the files of a loaded model lack weights.

    `found` is the loading information of transformers. The error begins with `name`.
    """
    missing = found["missing_keys"]
    if missing:  # the library fills these at random, and only warns
        raise UserError(
            f"{name}: its files lack weights ({len(missing)}), such as {min(missing)}: {AGAIN}"
        )


def read_adapter(base, adapter: str | Path):
    """Return the base model with the adapter of a folder. Raises UserError if it does not fit."""
    from peft import PeftModel  # imported late, so that eval.py --help answers at once

    misfit = f"adapter {adapter} does not fit this policy. Name the policy on which it was trained"
    try:
        with warnings.catch_warnings():  # if the file lacks weights, PEFT only warns
            warnings.filterwarnings("error", "Found missing adapter keys")
            model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    except UserWarning:
        raise UserError(f"{misfit} (its layers have other names)") from None
    except Exception as error:  # a damaged configuration can raise any exception in PEFT
        if is_memory_error(error):
            raise
        raise UserError(f"{misfit} ({cause(error)})") from None
    places = sum("lora_" in name for name, _ in model.named_parameters())
    with safe_open(Path(adapter) / "adapter_model.safetensors", "pt") as file:
        if len(file.keys()) != places:  # PEFT ignores weights that have no place
            raise UserError(f"{misfit} (its layers have other names)")
    return model
