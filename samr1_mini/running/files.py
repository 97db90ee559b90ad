"""Refuse damaged files of a policy, an adapter or a run, each with one line that names the file."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..config import UserError

POINTER = b"version https://git-lfs"  # a git-lfs pointer begins so: a small text in the place of a large file
AGAIN = "download or copy it again"

# The files of a policy's folder that are read, where they are there; what else lies in the folder does not matter.
JSON_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "chat_template.json", "model.safetensors.index.json",
)
TEXT_FILES = ("chat_template.jinja", "merges.txt")
# One of each pair must be there.
NEEDED = (
    ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    ("tokenizer.json", "vocab.json"),
    ("preprocessor_config.json", "processor_config.json"),
)


def refuse_pointer(file: Path) -> None:
    """Raise UserError where `file` is empty, or a git-lfs pointer."""
    with file.open("rb") as opened:
        start = opened.read(len(POINTER))
    if start == POINTER:
        raise UserError(f"{file} is a git-lfs pointer, not the file itself: run `git lfs pull` in {file.parent}")
    if not start:
        raise UserError(f"{file} is empty: {AGAIN}")


def read_json(file: Path) -> dict:
    """The JSON object in `file`. Raises UserError where it holds anything else."""
    refuse_pointer(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSON errors and UnicodeDecodeError are ValueErrors
        raise UserError(f"{file} is not valid JSON ({error}): {AGAIN}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object: {AGAIN}")
    return content


def check_weights(file: Path) -> None:
    """Raise UserError where `file` is not whole. Its header is read, which tells the file's size, and no tensor."""
    refuse_pointer(file)
    try:
        with safe_open(file, "pt"):
            pass
    except SafetensorError as error:
        raise UserError(f"{file} is damaged or cut off ({error}): {AGAIN}") from None


def check_policy_files(folder: Path) -> None:
    """Raise UserError where a file of a policy's folder is damaged, or a shard of its weights is missing."""
    found = {name: read_json(folder / name) for name in JSON_FILES if (folder / name).is_file()}
    for name in TEXT_FILES:
        if (folder / name).is_file():
            refuse_pointer(folder / name)
    shards = ["model.safetensors"]
    index = found.get("model.safetensors.index.json")
    if index is not None and not (folder / "model.safetensors").is_file():
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise UserError(f"{folder / 'model.safetensors.index.json'} names no weights: {AGAIN}")
        shards = sorted(set(map(str, shards.values())))
        for name in shards:
            if not (folder / name).is_file():
                raise UserError(f"{folder / name} is missing, and model.safetensors.index.json names it: {AGAIN}")
    for name in shards:
        if (folder / name).is_file():
            check_weights(folder / name)


def check_policy_is_whole(folder: Path) -> None:
    """Raise UserError where a policy's folder lacks a file, or its config.json the sizes of both parts."""
    for names in NEEDED:
        if not any((folder / name).is_file() for name in names):
            raise UserError(f"{folder} has no {' or '.join(names)}: {AGAIN}")
    config = read_json(folder / "config.json")
    text = config.get("text_config", config)  # older files have the language model's sizes at the top
    for part, key in ((text, "hidden_size"), (config, "vision_config")):
        if not isinstance(part, dict) or not part.get(key):  # a library would take the sizes of a far larger model
            raise UserError(f"{folder / 'config.json'} lacks {key}: {AGAIN}")


def check_adapter_files(folder: Path) -> None:
    """Raise UserError where an adapter's folder lacks a file, or has a damaged one, or is no LoRA adapter."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for file in (config, weights):
        if not file.is_file():
            raise UserError(f"adapter {folder} has no {file.name}: {AGAIN}")
    kind = read_json(config).get("peft_type")
    if kind != "LORA":
        raise UserError(f"{config}: peft_type must be LORA, not {kind}")
    check_weights(weights)
