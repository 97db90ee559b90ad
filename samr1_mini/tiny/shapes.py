"""Drawn scenes as a data set: `--data shapes`."""

import numpy as np
from PIL import Image

from ..config import UserError
from ..data.samples import Data, Sample, union
from .scenes import SPLITS, ask, make_scene

# The kinds of questions, in turn. The harder kinds occur twice.
ASKED = ("attribute", "relation", "combined", "part", "indirect", "relation", "combined")
# With --objects several, half of the questions mean several objects, or none.
ASKED_SEVERAL = ("all", "attribute", "none", "relation", "two", "combined", "dots", "part")
ASKED_SEVERAL += ("all", "indirect", "none", "relation", "dots", "combined")


class Shapes(Data):
    """`count` questions about drawn scenes, one question a scene.

    The kinds of questions follow ASKED, or ASKED_SEVERAL if `objects` is "several". Each scene is
    drawn when its sample is read. Training seeds 0 to 999 have different scenes. Validation and
    test have the same scenes for every seed.
    """

    def __init__(self, split: str, count: int, seed: int = 0, objects: str = "one"):
        self.asked, name = ASKED, "shapes"
        if objects == "several":
            self.asked, name = ASKED_SEVERAL, "several"
        self.first, _ = SPLITS[split]
        if split == "train":  # each seed has a million scenes
            self.first += seed % 1000 * 10**6
        if count > 10**6:
            raise UserError(
                f"the {split} split of the drawn scenes has a million questions, not {count}"
            )
        self.ids = [f"{name}-{self.first + i}" for i in range(count)]

    def __len__(self) -> int:
        return len(self.ids)

    def sample_at(self, i: int) -> Sample:
        seed, name = self.first + i, self.ids[i]
        scene, rng = make_scene(seed), np.random.default_rng([seed, 1])
        for turn in range(len(self.asked)):  # a scene may lack fair questions of a kind
            kind = self.asked[(i + turn) % len(self.asked)]
            found = ask(scene, rng, kind)
            if found:
                text, things = found
                image, masks = Image.fromarray(scene.image), [thing.mask for thing in things]
                mask = union(masks, image.size)
                if self.asked is ASKED:
                    masks = None
                return Sample(image, text, mask, name, kind, picture=name, masks=masks)
        raise RuntimeError(f"scene {seed} allows no question")
