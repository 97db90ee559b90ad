"""Refuse damaged files of a policy, an adapter or a run, each with one line that names the file."""

import json
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open

from .config import UserError, first_line

POINTER = b"version https://git-lfs"  # git-lfs puts a small text in the place of a large file
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
NEEDED = (  # one of each
    ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"),
    ("tokenizer.json", "vocab.json"),
    ("preprocessor_config.json", "processor_config.json"),
)


def cause(error: Exception) -> str:
    """Return an error's type and text in one line. A KeyError's text is only a key."""
    return f"{type(error).__name__}: {first_line(error)}"


def refuse_pointer(file: Path) -> None:
    """Raise UserError where `file` is empty, or a git-lfs pointer."""
    with file.open("rb") as opened:
        start = opened.read(len(POINTER))
    if start == POINTER:
        folder = file.parent
        raise UserError(f"{file} is only a git-lfs pointer: run `git lfs pull` in {folder}")
    if not start:
        raise UserError(f"{file} is empty: {AGAIN}")


def read_json(file: Path) -> dict:
    """The JSON object in `file`. Raises UserError where it holds anything else."""
    refuse_pointer(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # errors of JSON and of UTF-8 are ValueErrors
        raise UserError(f"{file} is not valid JSON ({error}): {AGAIN}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object: {AGAIN}")
    return content


def check_weights(file: Path) -> None:
    """Raise UserError where `file` is not whole. Its header tells its size; no tensor is read."""
    refuse_pointer(file)
    try:
        with safe_open(file, "pt"):
            pass
    except SafetensorError as error:
        raise UserError(f"{file} is damaged or cut off ({error}): {AGAIN}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a policy's weights are read from. Raises UserError for a shard
    that is missing."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not (folder / INDEX).is_file():
        return []
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{folder / INDEX} names no weights: {AGAIN}")
    files = [folder / str(name) for name in sorted(set(map(str, shards.values())))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, and {INDEX} names it: {AGAIN}")
    return files


def check_policy_files(folder: Path) -> None:
    """Raise UserError where a file of a policy's folder is damaged, or a shard is missing."""
    for name in JSON_FILES:
        if (folder / name).is_file():
            read_json(folder / name)
    for name in TEXT_FILES:
        if (folder / name).is_file():
            refuse_pointer(folder / name)
    for file in weight_files(folder):
        check_weights(file)


def check_policy_is_whole(folder: Path) -> None:
    """Raise UserError if a policy's folder lacks a file, or if config.json lacks the sizes of a
    part.
    """
    for names in NEEDED:
        if not any((folder / name).is_file() for name in names):
            raise UserError(f"{folder} has no {' or '.join(names[:2])}: {AGAIN}")
    config = read_json(folder / "config.json")
    text = config.get("text_config", config)  # older files have its sizes at the top
    for part, key in ((text, "hidden_size"), (config, "vision_config")):
        # Without these the library would take the sizes of a far larger model.
        if not isinstance(part, dict) or not part.get(key):
            raise UserError(f"{folder / 'config.json'} lacks {key}: {AGAIN}")


def check_adapter_files(folder: Path) -> None:
    """Raise UserError where an adapter lacks a file, has a damaged one, or is no LoRA adapter."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for file in (config, weights):
        if not file.is_file():
            raise UserError(f"adapter {folder} has no {file.name}: {AGAIN}")
    kind = read_json(config).get("peft_type")
    if kind != "LORA":
        raise UserError(f"{config}: peft_type must be LORA, not {kind}")
    check_weights(weights)


def read_adapter(base, adapter: str | Path) -> PeftModel:
    """Return the base model with the adapter of a folder. Raises UserError if it does not fit."""
    misfit = f"adapter {adapter} does not fit this policy"
    try:
        with warnings.catch_warnings():  # for weights that the file lacks PEFT only warns
            warnings.filterwarnings("error", "Found missing adapter keys")
            model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    except torch.OutOfMemoryError:
        raise
    except UserWarning:
        raise UserError(f"{misfit} (it is of other layers)") from None
    except Exception as error:  # for a damaged configuration PEFT raises anything
        raise UserError(f"{misfit} ({cause(error)})") from None
    places = sum("lora_" in name for name, _ in model.named_parameters())
    with safe_open(Path(adapter) / "adapter_model.safetensors", "pt") as file:
        if len(file.keys()) != places:  # PEFT ignores weights that have no place
            raise UserError(f"{misfit} (it is of other layers)")
    return model
