"""Data: a sequence of `Sample`s, from drawn scenes, a folder of your own, or a public data set (public.py)."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from pycocotools import mask as coco

from .config import UserError
from .tiny.scenes import KINDS, SPLITS, ask, make_scene


@dataclass
class Sample:
    image: Image.Image  # RGB, its own size W x H
    question: str
    mask: np.ndarray  # bool [H, W]: the true mask
    id: str
    kind: str = ""  # kind of question, where the data set says one
    ignore: np.ndarray | None = None  # bool [H, W]: pixels that the data set leaves undecided
    box_only: bool = False  # the data set has a box and no mask: `mask` is that box, filled, and only the box's IoU means something


# ---------------------------------------------------------------------------------------------------- drawn scenes


class Shapes(Sequence):
    """`count` questions about drawn scenes, one a scene, the three kinds in turn; drawn when asked for. Another seed, other scenes."""

    def __init__(self, split: str, count: int, seed: int = 0):
        first, last = SPLITS[split]
        # Each training seed owns a million scenes; validation and test are the same for every seed, so that runs compare.
        self.first = first + (seed % 1000) * 10**6 if split == "train" else first
        self.count = count
        if count > 10**6 or self.first + count > last:
            raise UserError(f"the {split} split of the drawn scenes has a million questions, not {count}")

    def __len__(self) -> int:
        return self.count

    @property
    def ids(self) -> list[str]:
        return [f"shapes-{self.first + i}" for i in range(self.count)]

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < self.count:
            raise IndexError(i)
        seed = self.first + i
        scene, rng = make_scene(seed), np.random.default_rng([seed, 1])
        for turn in range(len(KINDS)):  # a scene with no fair question of its kind gives one of the next kind
            kind = KINDS[(i + turn) % len(KINDS)]
            found = ask(scene, rng, kind)
            if found:
                return Sample(Image.fromarray(scene.image), found[0], found[1].mask, f"shapes-{seed}", kind)
        raise RuntimeError(f"scene {seed} allows no question")


# ---------------------------------------------------------------------------------------------------- a folder of your own


def read_mask(value, folder: Path, height: int, width: int) -> np.ndarray:
    """A mask bool [H, W] from a PNG's path, a COCO RLE {"size", "counts"}, or COCO polygons [[x1, y1, x2, y2, ...], ...]."""
    if isinstance(value, str):
        image = Image.open(inside(folder, value))
        pixels = np.asarray(image if image.mode in ("1", "L", "P", "I", "I;16") else image.convert("RGB"))
        mask = pixels.any(-1) if pixels.ndim == 3 else pixels > 0  # masks come as 0/1 and as 0/255: any value counts
    elif isinstance(value, dict):
        if list(value["size"]) != [height, width]:
            raise ValueError(f"the mask's RLE has size {value['size']}, the picture [{height}, {width}]")
        rle = coco.frPyObjects(value, height, width) if isinstance(value["counts"], list) else value
        mask = coco.decode(rle).astype(bool)
    elif isinstance(value, list) and value:
        polygons = value if isinstance(value[0], list) else [value]
        if not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and all(isinstance(v, (int, float)) for v in p) for p in polygons):
            raise ValueError("a polygon of the mask is not a list of at least three x, y pairs")
        mask = coco.decode(coco.merge(coco.frPyObjects(polygons, height, width))).astype(bool)
    else:
        raise ValueError("mask is neither a PNG's path, nor COCO RLE, nor polygons")
    if mask.shape != (height, width):
        raise ValueError(f"the mask is {mask.shape[1]} x {mask.shape[0]}, the picture {width} x {height}")
    return mask


def inside(folder: Path, name: str) -> Path:
    """`name` inside `folder`; a path that leads out of it is refused."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{name} leads out of the folder")
    return path


class Folder(Sequence):
    """data.jsonl in a folder: one {"image", "question", "mask"} a line, paths relative to the folder; "id", "kind" and "split" may be given.

    Without "split", a tenth of the lines drawn with a fixed seed is held out for validation and another tenth for test.
    """

    def __init__(self, folder: str | Path, split: str, count: int, seed: int = 0):
        self.folder, self.file = Path(folder), Path(folder) / "data.jsonl"
        rows = []
        for number, line in enumerate(self.file.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                rows.append((number, self._row(number, line)))
        if not rows:
            raise UserError(f"{self.file} is empty")
        order = list(range(len(rows)))
        random.Random(0).shuffle(order)
        tenth = max(1, len(rows) // 10)
        held = {**{i: "validation" for i in order[:tenth]}, **{i: "test" for i in order[tenth : 2 * tenth]}}
        mine = [r for i, r in enumerate(rows) if r[1].get("split", held.get(i, "train")) == split]
        if not mine:
            raise UserError(f"{self.file} has no line for the {split} split")
        if split == "train":  # each pass over the lines in a new order, until there are enough
            rng = random.Random(seed)
            self.rows = [r for _ in range(-(-count // len(mine))) for r in rng.sample(mine, len(mine))][:count]
        else:
            self.rows = mine[:count]

    def _row(self, number: int, line: str) -> dict:
        try:
            row = json.loads(line)
            missing = [key for key in ("image", "question", "mask") if not row.get(key)]
        except (ValueError, AttributeError):
            raise UserError(f"{self.file} line {number}: not a JSON object") from None
        if missing:
            raise UserError(f"{self.file} line {number}: {', '.join(missing)} missing; a line needs image, question and mask")
        return row

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ids(self) -> list[str]:
        return [str(row.get("id", f"line-{number}")) for number, row in self.rows]

    def __getitem__(self, i: int) -> Sample:
        number, row = self.rows[i]
        try:
            image = open_picture(inside(self.folder, row["image"]))
            mask = read_mask(row["mask"], self.folder, image.height, image.width)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.file} line {number}: {error}") from None
        return Sample(image, str(row["question"]), mask, str(row.get("id", f"line-{number}")), str(row.get("kind", "")))


def open_picture(path: str | Path) -> Image.Image:
    """A picture as people see it: turned as its EXIF says, in RGB, read whole (a cut-off file is an OSError)."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def load_data(
    name: str, split: str, count: int, seed: int = 0, sentences: str = "first", coco_dir: str = "", ignore: str = "foreground"
) -> Sequence:
    """Up to `count` samples of a split (train, validation, test) of "shapes", a public data set, or a folder.

    `sentences` ("first" or "all" of an object), `coco_dir` (a folder with COCO's train2014 pictures) and `ignore` (undecided pixels count
    as "foreground", or are "excluded") are for public data sets.
    """
    if name == "shapes":
        return Shapes(split, count, seed)
    if (Path(name) / "data.jsonl").is_file():
        return Folder(name, split, count, seed)
    from .public import HUB, load_public  # imported late: it brings a library that takes a second to load

    if name in HUB or Path(name).is_dir():
        return load_public(name, split, count, seed, sentences, coco_dir, ignore)
    raise UserError(f"--data {name}: neither 'shapes', nor a public data set ({', '.join(HUB)}), nor a folder")
