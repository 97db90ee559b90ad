"""Prepare a run: check the models, open the data sets, download, and load the models."""

from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.constants import HF_HUB_CACHE

from .config import CACHE, Settings, UserError
from .data import open_data
from .data.download import PICTURES
from .files import Download, check_adapter_files, check_disk_space
from .policy import Policy, check_policy, load_policy
from .prompt import read_prompt
from .segmenter import check_segmenter, load_segmenter, sam_bytes, SAM_FILES, Segmenter
from .processes import first_before_others, from_first, is_first


def check_models(s: Settings) -> None:
    """Raise UserError if the policy or the segmenter cannot be used. No weights are loaded."""
    check_policy(s.policy, s.image_size)
    check_segmenter(s.sam, s.sam_checkpoint)
    if s.prompt_file:
        read_prompt(s.prompt_file)
    if s.start_from and not s.resume:
        check_start(s)


def check_start(s: Settings) -> None:
    """Raise UserError if --start-from is no adapter of the rank --rank."""
    config = check_adapter_files(Path(s.start_from), "--start-from")
    rank = config.get("r")
    if rank != s.rank:
        raise UserError(f"--start-from {s.start_from} has rank {rank}: use --rank {rank}")


def open_sets(s: Settings, sets: list | None = None) -> list:
    """Check the models, then open and check the data sets for training, validation and test.

    `sets` that are given are returned as they are.
    COCO's pictures are not fetched yet. The first process converts a public set, and the others
    find it in the cache.
    """
    check_models(s)
    if sets:
        return sets
    with first_before_others():
        return open_three(s)


def open_three(s: Settings) -> list:
    """Open the data sets for training, validation and test in this process."""
    eval_data = s.eval_data or s.data
    wanted = (
        (s.data, "train", s.samples),
        (eval_data, "validation", s.eval_samples),
        (eval_data, "test", s.test_samples),
    )
    sets = []
    for name, split, count in wanted:
        try:
            sets.append(open_data(name, split, count, s.seed, s.sentences, s.coco_dir, s.ignore))
        except UserError as error:  # open_data names --data, whichever option gave the name
            if split == "train" or not s.eval_data:
                raise
            raise UserError(str(error).replace("--data", "--eval-data", 1)) from None
    if sets[0].box_only and s.accuracy != "box-iou" and s.accuracy_weight:
        raise UserError(
            f"--data {s.data} has boxes and no masks, so SAM's masks cannot be compared with them: "
            "add --accuracy box-iou"
        )
    return sets


def hub_bytes(name: str) -> int:
    """Return the bytes that are still to be downloaded for a model, 0 without a network."""
    if name == "tiny" or Path(name).is_dir():
        return 0
    try:
        kinds = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
        files = huggingface_hub.snapshot_download(name, allow_patterns=kinds, dry_run=True)
    except (OSError, ValueError):  # the hub's errors are both
        return 0
    return sum(f.file_size for f in files if f.will_download)


def downloads_of(s: Settings, sets: list) -> list[Download]:
    """List the models and pictures that are still to be downloaded."""
    hub = Path(HF_HUB_CACHE)
    coco_advice = ""
    if {s.data, s.eval_data} & {"refcoco", "refcocog", "refcocoplus"}:
        coco_advice = "name a folder with COCO's pictures as --coco-dir"
    if s.sam in SAM_FILES:
        size = sam_bytes(s.sam, s.sam_checkpoint)
        sam_advice = "name a file with SAM's weights as --sam-checkpoint"
        sam = Download(f"SAM {s.sam}", size, CACHE, sam_advice)
    else:
        sam = Download(f"SAM {s.sam}", hub_bytes(s.sam), hub)
    picture_bytes = sum(one.download_bytes for one in sets)
    downloads = [
        Download(f"policy {s.policy}", hub_bytes(s.policy), hub),
        Download("pictures", picture_bytes, PICTURES, coco_advice),
        sam,
    ]
    return [one for one in downloads if one.size]


def check_downloads(s: Settings, sets: list) -> None:
    """Print the downloads in GB. Raises UserError if a disk lacks the space for them."""
    downloads = downloads_of(s, sets)
    if downloads:
        sizes = [f"{one.name} {one.size / 1e9:.1f} GB" for one in downloads]
        print(f"to download: {', '.join(sizes)}", flush=True)
    check_disk_space(downloads)


def fetch_sets(s: Settings, sets: list, missing: list | None) -> None:
    """Download what the data sets lack, once, in the first process. Arguments as in load_parts."""
    if missing is None:
        missing = [[] for _ in sets]
    if is_first():
        check_downloads(s, sets)
        for data, names in zip(sets, missing):
            data.download(names)
            data.check_files(s.resume)
            for line in data.warnings:
                print(line, flush=True)
    missing = from_first([data.missing for data in sets])
    if not is_first():
        for data, names in zip(sets, missing):
            data.download(names)


def load_parts(
    s: Settings,
    sets: list,
    adapter: str | None = None,
    missing: list | None = None,
    segmenter: Segmenter | None = None,
) -> tuple[Policy, Segmenter]:
    """Download data sets and models, then load policy and segmenter.

    `missing` lists for each set the pictures that are known to be unavailable, so that all
    processes, and a resumed run, use the same samples. The caller has checked the models with
    check_models. A `segmenter` that is given replaces that of the settings.
    """
    fetch_sets(s, sets, missing)
    if s.start_from and not s.resume:  # a resumed run loads its own adapter
        adapter = s.start_from
    with first_before_others():
        if segmenter is None:
            segmenter = load_segmenter(s.sam, s.sam_checkpoint, s.device)
        torch.manual_seed(s.seed)  # for the random weights of a new adapter
        policy = load_policy(
            s.policy, s.load_in, s.rank, adapter, s.device, s.checkpointing, s.coordinates
        )
    if s.prompt_file:
        policy.prompt = read_prompt(s.prompt_file)
    return policy, segmenter
