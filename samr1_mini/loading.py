"""Prepare a run: check settings and files first, then download, then load the models."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from huggingface_hub.constants import HF_HUB_CACHE

from .config import Settings, UserError
from .data import open_data
from .data.download import PICTURES
from .policy import Policy, check_policy, load_policy
from .segmenter import check_segmenter, load_segmenter, sam_bytes, SAM_FILES, SAM_FOLDER, Segmenter
from .processes import is_first


def check_models(s: Settings) -> None:
    """Refuse a policy or a segmenter that cannot be used. No weights are loaded."""
    check_policy(s.policy, s.image_size)
    check_segmenter(s.sam, s.sam_checkpoint)


def open_sets(s: Settings) -> list:
    """Open and check the data sets for training, validation and test.

    COCO's pictures are not fetched yet.

    A public set is converted by the first process. The others find it in the cache.
    """
    check_models(s)
    with PartialState().main_process_first():
        return open_three(s)


def open_three(s: Settings) -> list:
    """Open the data sets for training, validation and test, in this process."""
    held = s.eval_data or s.data
    wanted = (
        (s.data, "train", s.samples),
        (held, "validation", s.eval_samples),
        (held, "test", s.test_samples),
    )
    sets = []
    for name, split, count in wanted:
        try:
            sets.append(open_data(name, split, count, s.seed, s.sentences, s.coco_dir, s.ignore))
        except UserError as error:  # it knows the name, and not which option gave it
            if split == "train" or not s.eval_data:
                raise
            raise UserError(str(error).replace("--data", "--eval-data", 1)) from None
    if sets[0].box_only and s.accuracy != "box-iou" and s.accuracy_weight:
        raise UserError(
            f"--data {s.data} has boxes and no masks, so there is nothing to compare SAM's masks with: add "
            "--accuracy box-iou"
        )
    return sets


def hub_bytes(name: str) -> int:
    """Return the bytes left to download for a model. Return 0 for folders and without a network."""
    if name == "tiny" or Path(name).is_dir():
        return 0
    try:
        kinds = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
        files = huggingface_hub.snapshot_download(name, allow_patterns=kinds, dry_run=True)
    except (OSError, ValueError):  # the hub's errors are both
        return 0
    return sum(f.file_size for f in files if f.will_download)


def check_room(s: Settings, sets: list) -> None:
    """Say in GB what will be downloaded, and refuse where a disk lacks the room for it."""
    wanted = [
        (f"policy {s.policy}", hub_bytes(s.policy), Path(HF_HUB_CACHE)),
        ("pictures", sum(x.download_bytes for x in sets), PICTURES),
        (f"SAM {s.sam}", sam_bytes(s.sam, s.sam_checkpoint), SAM_FOLDER),
        (f"SAM {s.sam}", 0 if s.sam in SAM_FILES else hub_bytes(s.sam), Path(HF_HUB_CACHE)),
    ]
    wanted = [one for one in wanted if one[1]]
    if wanted:
        sizes = [f"{what} {size / 1e9:.1f} GB" for what, size, _ in wanted]
        print(f"to download: {', '.join(sizes)}", flush=True)
    disks = {}  # disk -> what is downloaded to it, and a folder on it
    for what, size, folder in wanted:
        there = next(p for p in (folder, *folder.parents) if p.exists())
        parts, _ = disks.setdefault(disk_of(there), ([], there))
        parts.append((what, size, folder))
    for parts, there in disks.values():
        total, free = sum(size for _, size, _ in parts), shutil.disk_usage(there).free
        if total > free:
            raise UserError(
                f"{total / 1e9:.1f} GB are to be downloaded to {there}, and {free / 1e9:.1f} GB are free "
                f"there: make room, or {other_disk(s, parts)}"
            )


def disk_of(folder: Path) -> tuple[int, str]:
    """Return an identifier of the disk that holds a folder: device number, plus drive letter on
    Windows.

    Windows gives some disks the number 0.
    """
    return folder.stat().st_dev, folder.absolute().anchor


def other_disk(s: Settings, parts: list[tuple[str, int, Path]]) -> str:
    """Name the options that put `parts` on another disk or read them from elsewhere.

    A part is (name, bytes, folder).
    """
    folders, names = [folder for *_, folder in parts], [name for name, *_ in parts]
    ways = []
    if Path(HF_HUB_CACHE) in folders:
        ways.append("set HF_HOME, the folder of models,")
    if any(folder != Path(HF_HUB_CACHE) for folder in folders):
        ways.append("set SAMR1_CACHE, the folder of pictures, tables and SAM,")
    advice = " and ".join(ways) + " to a folder on another disk"
    if "pictures" in names and {s.data, s.eval_data} & {"refcoco", "refcocog", "refcocoplus"}:
        advice += "; if you have COCO's pictures, give their folder with --coco-dir"
    if s.sam in SAM_FILES and f"SAM {s.sam}" in names:
        advice += "; if you have SAM's weights, give their file with --sam-checkpoint"
    return advice


def load_parts(
    s: Settings, sets: list, adapter: str | None = None, missing: Sequence[str] = ()
) -> tuple[Policy, Segmenter]:
    """Download the data sets, then load and return policy and segmenter.

    Mistakes that are cheap to detect are reported before any download.
    """
    check_models(s)
    if is_first():  # what has to be downloaded is downloaded once
        check_room(s, sets)
        for one in sets:
            one.download(missing)
            one.check_files(s.resume)
            for line in one.warnings:
                print(line, flush=True)
    missing = broadcast_object_list([[one.missing for one in sets]])[
        0
    ]  # so that all hold the same samples
    if not is_first():
        for one, gone in zip(sets, missing):
            one.download(gone)
    with PartialState().main_process_first():
        segmenter = load_segmenter(s.sam, s.sam_checkpoint, s.device)
        torch.manual_seed(s.seed)  # a new adapter is drawn
        policy = load_policy(
            s.policy, s.load_in, s.rank, adapter, s.device, s.checkpointing, s.coordinates
        )
    return policy, segmenter
