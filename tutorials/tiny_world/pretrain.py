"""Make both tiny networks from random weights: `python -m tutorials.tiny_world.pretrain`.

A GPU is used if there is one. Supervised training replaces what Qwen and SAM know before SAM-R1:

    sam       Segment Anything learns what boxes and points mean
    vision    the vision tower alone learns the content of each picture token
    ground    the whole policy learns to find things: each name is followed by its box
    language  the policy learns to answer in several styles, and to conclude from its own lists
    measure   both networks are measured on held-out scenes

An interrupted command continues where it stopped. The new weights replace those of the package.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from samr1_mini.config import Parser, UserError, exit_with, first_line
from samr1_mini.policy import TINY, load_policy
from samr1_mini.segmenter import TINY_SAM, load_segmenter
from .ground import new_policy, train_ground
from .language import train_language
from .measure import measure_policy, measure_sam
from .sam import train_sam
from .vision import train_vision

MEASURED = Path(__file__).parent / "measured.json"
STEPS = {"sam": 6000, "vision": 2400, "ground": 1500, "language": 4500}  # updates of each stage
SAM_SCENES = 200  # held-out scenes to measure SAM
POLICY_SCENES = 1500  # held-out scenes to measure the policy


def load_weights(module: torch.nn.Module, file: Path) -> None:
    """Load an earlier stage's weights. A UserError names a file that does not fit."""
    try:
        module.load_state_dict(load_file(file))
    except (RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{file} does not fit: run the stage that makes it again ({first_line(error)})"
        ) from None


def measure() -> None:
    """Measure both networks of the package, save and print the results."""
    sam = measure_sam(str(TINY_SAM), SAM_SCENES)
    segmenter = load_segmenter(str(TINY_SAM))
    policy = measure_policy(load_policy(str(TINY)), segmenter, POLICY_SCENES)
    text = json.dumps({"sam": sam, "policy": policy}, indent=1)
    MEASURED.write_text(text + "\n", encoding="utf-8")
    print(text)


def run_stage(stage: str, work: Path) -> None:
    """Run one stage. It reads from `work` what the stage before it left there."""
    if stage == "sam":
        train_sam(STEPS[stage], TINY_SAM / "model.safetensors", work)
    elif stage == "vision":
        train_vision(STEPS[stage], work / "vision.safetensors", work)
    elif stage == "ground":
        policy = new_policy()
        load_weights(policy.base.model.visual, work / "vision.safetensors")
        train_ground(policy, STEPS[stage], work / "ground.safetensors", work)
    elif stage == "language":
        policy = new_policy()
        load_weights(policy.base, work / "ground.safetensors")
        train_language(policy, STEPS[stage], work)
        policy.base.to(torch.bfloat16).save_pretrained(TINY)
        policy.processor.save_pretrained(TINY)
    else:
        measure()


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="pretrain.py", description=__doc__, formatter_class=raw)
    stages = [*STEPS, "measure"]
    stages_help = "stages to run, in order, separated by commas (default: all)"
    parser.add_argument("--stages", default=",".join(stages), help=stages_help)
    work_help = "folder for the results that one stage leaves for the next"
    parser.add_argument("--work", default="runs/pretrain", help=work_help)
    args = parser.parse(argv)
    chosen = args.stages.split(",")
    unknown = sorted(set(chosen) - set(stages))
    if unknown:
        parser.error(f"--stages: {', '.join(unknown)} is none of {', '.join(stages)}")
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    try:
        for stage in chosen:
            run_stage(stage, work)
        # All stages are done: the same command starts again from random weights.
        for stage in chosen:
            (work / f"{stage}.pt").unlink(missing_ok=True)
    except (UserError, OSError) as error:
        exit_with(error, "pretrain.py")


if __name__ == "__main__":
    main()
