"""Score the committed adapter of seed 0 on 500 test scenes with a plain grey background.

`python -m tutorials.tiny_world.grey > tutorials/results/seed0/grey.json` prints the scores as
JSON. The objects, questions and masks are those of the test scenes.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from samr1_mini.data import Sample, load_data
from samr1_mini.tiny.scenes import make_scene

from .mirror import print_scores

GREY = 128


class OnGrey(Sequence):
    """A set of drawn scenes in which every pixel outside the objects is grey."""

    def __init__(self, data):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Sample:
        sample = self.data[i]
        scene = make_scene(int(sample.id.removeprefix("shapes-")))
        objects = np.logical_or.reduce([thing.mask for thing in scene.things])  # bool [H, W]
        pixels = np.full_like(scene.image, GREY)
        pixels[objects] = scene.image[objects]
        return replace(sample, image=Image.fromarray(pixels))


if __name__ == "__main__":
    print_scores(OnGrey(load_data("shapes", "test", 500)))
