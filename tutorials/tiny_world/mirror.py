"""Score the committed adapter of seed 0 on 500 mirrored test scenes, and print the scores as JSON.

`python -m tutorials.tiny_world.mirror > tutorials/results/seed0/mirror.json` takes about a minute.
Notebook 4 uses the mirror on the policy that you have trained.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import ImageOps

from samr1_mini.config import make_settings
from samr1_mini.data import Data, Sample, load_data
from samr1_mini.evaluation import evaluate
from samr1_mini.policy import load_policy
from samr1_mini.segmenter import load_segmenter

ADAPTER = Path(__file__).parent.parent / "results" / "seed0" / "adapter"


class Mirrored(Sequence):
    """A data set in a mirror: pictures and true masks flipped, and the words left and right
    exchanged.

    A policy that uses the positions of objects should score equally on the mirrored set.
    """

    SIDES = {
        "left": "right",
        "right": "left",
        "Left": "Right",
        "Right": "Left",
        "LEFT": "RIGHT",
        "RIGHT": "LEFT",
    }

    def __init__(self, data: Data):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Sample:
        sample = self.data[i]
        words = rf"\b({'|'.join(self.SIDES)})(most|MOST|est|hand|side)?\b"
        question = re.sub(words, self.other_side, sample.question)
        image = ImageOps.mirror(sample.image)
        mask, ignore, masks = flipped(sample.mask), sample.ignore, sample.masks
        if ignore is not None:
            ignore = flipped(ignore)
        if masks is not None:
            masks = [flipped(one) for one in masks]
        new = {"image": image, "question": question, "mask": mask, "ignore": ignore}
        return replace(sample, masks=masks, **new)

    def other_side(self, found: re.Match) -> str:
        """Exchange the side in a word such as "leftmost"."""
        return self.SIDES[found[1]] + (found[2] or "")


def flipped(mask: np.ndarray) -> np.ndarray:
    """Mirror a mask [H, W] from left to right."""
    return np.ascontiguousarray(mask[:, ::-1])


def print_scores(scenes: Sequence) -> None:
    """Print the scores of the committed adapter of seed 0 on these samples, as JSON."""
    settings, _ = make_settings(preset="tiny", device="cpu")
    policy = load_policy("tiny", adapter=ADAPTER)
    report = evaluate(policy, load_segmenter("tiny"), scenes, settings)
    print(json.dumps(report.summary(), indent=1))


if __name__ == "__main__":
    print_scores(Mirrored(load_data("shapes", "test", 500)))
