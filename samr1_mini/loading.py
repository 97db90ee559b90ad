"""Prepare a run: check models, open data sets, download files, and load models."""

from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image

from .config import CACHE, PACKAGED, Settings, UserError
from .data import Data, open_data
from .data.download import PICTURES
from .files import Download, check_adapter_files, check_disk_space
from .policy import Policy, check_policy, load_policy
from .prompt import choose_prompt
from .segmenter import check_segmenter, load_segmenter, sam_bytes, SAM_FILES, Segmenter
from .processes import first_before_others, from_first, is_first


def check_models(s: Settings) -> None:
    """Raise UserError if the models, the prompt or the adapter cannot be used.

    No weights are loaded. load_policy repeats some checks, because it has other callers too.
    """
    check_policy(s.policy, s.image_size)
    check_segmenter(s.sam, s.sam_checkpoint)
    choose_prompt(s)  # raises UserError for a bad --prompt-file
    if s.start_from:
        adapter = check_adapter_files(start_adapter(s), "--resume" if s.resume else "--start-from")
        rank = adapter.get("r")
        if rank != s.rank:
            raise UserError(f"--start-from {s.start_from} has rank {rank}: use --rank {rank}")
        if adapter.get("lora_dropout"):  # then pi and pi_old are different networks
            advice = "set lora_dropout to 0 in its adapter_config.json"
            raise UserError(f"--start-from {s.start_from} has dropout: {advice}")


def start_adapter(s: Settings) -> Path:
    """Return the adapter with which a run of --start-from begins.

    A resumed run takes the adapter from its own folder. This adapter has the alpha of the one in
    --start-from. Later, the weights of state.pt replace its weights.
    """
    folder = Path(s.run)
    if s.resume and (folder / "state.pt").exists() and (folder / "adapter").is_dir():
        return folder / "adapter"
    return Path(s.start_from)


def open_sets(s: Settings, sets: list | None = None) -> list:
    """Check the models, then open and check the data sets for training, validation and test.

    Returns `sets` unchanged if the argument is not empty. COCO's pictures are downloaded later. The
    first process converts a public data set. The other processes read it from the cache.
    """
    check_models(s)
    if sets:
        if len(sets) != 3 or not all(isinstance(one, Data) for one in sets):
            raise TypeError("`sets` must hold three objects of a subclass of samr1_mini.data.Data")
        if len(sets[0]) < s.questions:
            raise UserError(
                f"the training set has only {len(sets[0])} questions, so there is no step: lower "
                f"--questions (now {s.questions})"
            )
        return sets
    with first_before_others():
        return open_three(s)


def open_split(s: Settings, name: str, split: str, count: int, seed: int | None):
    """Open one split of a data set with the options of the settings. Raises UserError.

    For `seed` see open_data.
    """
    return open_data(name, split, count, seed, s.sentences, s.coco_dir, s.ignore, s.objects)


def open_three(s: Settings) -> list:
    """Open the data sets for training, validation and test in this process. Raises UserError."""
    eval_data = s.eval_data or s.data
    wanted = (
        (s.data, "train", s.samples),
        (eval_data, "validation", s.eval_samples),
        (eval_data, "test", s.test_samples),
    )
    sets = []
    for name, split, count in wanted:
        try:
            sets.append(open_split(s, name, split, count, s.seed))
        except UserError as error:  # its text always says --data
            if split == "train" or not s.eval_data:
                raise
            raise UserError(str(error).replace("--data", "--eval-data", 1)) from None
    if sets[0].box_only and s.accuracy != "box-iou" and s.accuracy_weight:
        raise UserError(
            f"--data {s.data} has boxes and no masks, so no true mask exists for SAM's mask: "
            "add --accuracy box-iou"
        )
    return sets


def hub_bytes(name: str) -> int:
    """Return the bytes of a model that are not downloaded yet. Without a network return 0."""
    if name in PACKAGED or Path(name).is_dir():
        return 0
    try:
        kinds = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
        files = huggingface_hub.snapshot_download(name, allow_patterns=kinds, dry_run=True)
    except Exception:  # the hub and its network library raise many kinds
        return 0
    return sum(f.file_size for f in files if f.will_download)


def check_downloads(s: Settings, sets: list, with_sam: bool = True) -> None:
    """Print the downloads in GB. Raises UserError if a disk has too little space."""
    hub = Path(HF_HUB_CACHE)
    coco_advice = ""
    if {s.data, s.eval_data} & {"refcoco", "refcocog", "refcocoplus"}:
        coco_advice = "use --coco-dir for a folder with COCO's pictures"
    picture_bytes = sum(one.download_bytes for one in sets)
    downloads = [
        Download(f"policy {s.policy}", hub_bytes(s.policy), hub),
        Download("pictures", picture_bytes, PICTURES, coco_advice),
    ]
    if with_sam and s.sam in SAM_FILES:
        size = sam_bytes(s.sam, s.sam_checkpoint)
        sam_advice = "use --sam-checkpoint for a file with SAM's weights"
        downloads.append(Download(f"SAM {s.sam}", size, CACHE, sam_advice))
    elif with_sam:
        downloads.append(Download(f"SAM {s.sam}", hub_bytes(s.sam), hub))
    downloads = [one for one in downloads if one.size]
    if downloads:
        sizes = [f"{one.name} {one.size / 1e9:.1f} GB" for one in downloads]
        print(f"to download: {', '.join(sizes)}", flush=True)
    check_disk_space(downloads)


def fetch_sets(s: Settings, sets: list, missing: list | None, with_sam: bool = True) -> None:
    """Download the missing files of the data sets in the first process.

    Then the other processes use the same files. For `missing` see load_models. With `with_sam`,
    SAM is counted in the downloads that are announced.
    """
    if missing is None:
        missing = [[] for _ in sets]
    if is_first():
        check_downloads(s, sets, with_sam)
        for data, names in zip(sets, missing):
            data.download(names)
            data.check_files(s.resume)
            for line in data.warnings:
                print(line, flush=True)
    missing = from_first([data.missing for data in sets])
    if not is_first():
        for data, names in zip(sets, missing):
            data.download(names)


def load_models(
    s: Settings,
    sets: list,
    adapter: str | None = None,
    missing: list | None = None,
    segmenter: Segmenter | None = None,
) -> tuple[Policy, Segmenter]:
    """Download data sets and models, then load policy and segmenter.

    `missing` lists the unavailable pictures of each data set. Their samples are left out in all
    processes, and again in a resumed run. A `segmenter` argument replaces the segmenter of the
    settings. Call check_models first.
    """
    fetch_sets(s, sets, missing, segmenter is None)
    if s.start_from:
        adapter = start_adapter(s)
    with first_before_others():
        if segmenter is None:
            segmenter = load_segmenter(s.sam, s.sam_checkpoint, s.device, s.sam_dtype)
        torch.manual_seed(s.seed)  # for the random weights of a new adapter
        policy = load_policy(
            s.policy, s.load_in, s.rank, adapter, s.device, s.checkpointing, s.coordinates
        )
    policy.prompt = choose_prompt(s)
    check_picture_size(policy, s)
    return policy, segmenter


def check_picture_size(policy: Policy, s: Settings) -> None:
    """Raise UserError if the policy's processor would change the size of the pictures.

    Then coordinates in pixels would not fit the pictures that the policy sees. Thousandths fit
    every size.
    """
    if policy.coordinates == "thousandths":
        return
    reader = policy.processor.image_processor
    picture = Image.new("RGB", (s.image_size, s.image_size))
    [[_, height, width]] = reader(images=[picture], return_tensors="pt").image_grid_thw.tolist()
    seen = (width * reader.patch_size, height * reader.patch_size)
    if seen != picture.size:
        limit = "less" if min(seen) < s.image_size else "more"
        raise UserError(
            f"--image-size {s.image_size}: the processor of --policy {s.policy} makes pictures of "
            f"{seen[0]} x {seen[1]} pixels. Take --image-size {min(seen)} or {limit}"
        )
