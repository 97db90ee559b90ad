"""Drawn scenes as a data set: `--data shapes`."""

import numpy as np
from PIL import Image

from ..config import UserError
from ..data.samples import Data, Sample
from .scenes import SPLITS, ask, make_scene

# The kinds of questions, in turn; twice as often those that an answer without a thought gets wrong.
ASKED = ("attribute", "relation", "combined", "part", "indirect", "relation", "combined")


class Shapes(Data):
    """`count` questions about drawn scenes, one a scene, their kinds as ASKED; drawn when asked for. Seeds 0 to 999
    have other scenes each."""

    def __init__(self, split: str, count: int, seed: int = 0):
        first, last = SPLITS[split]
        # Each training seed owns a million scenes; validation and test are the same for every seed, so that runs
        # compare.
        self.first = first + (seed % 1000) * 10**6 if split == "train" else first
        self.count = count
        if count > 10**6 or self.first + count > last:
            raise UserError(
                f"the {split} split of the drawn scenes has a million questions, not {count}"
            )

    def __len__(self) -> int:
        return self.count

    @property
    def ids(self) -> list[str]:
        return [f"shapes-{self.first + i}" for i in range(self.count)]

    def sample_at(self, i: int) -> Sample:
        seed = self.first + i
        scene, rng = make_scene(seed), np.random.default_rng([seed, 1])
        for turn in range(
            len(ASKED)
        ):  # a scene with no fair question of its kind gives one of the next kind
            kind = ASKED[(i + turn) % len(ASKED)]
            found = ask(scene, rng, kind)
            if found:
                name = f"shapes-{seed}"
                return Sample(
                    Image.fromarray(scene.image), found[0], found[1].mask, name, kind, picture=name
                )
        raise RuntimeError(f"scene {seed} allows no question")
