"""A sample, what every data set can tell, and a folder of your own."""

import json
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pycocotools import mask as coco

from ..config import UserError


@dataclass
class Sample:
    image: Image.Image  # RGB, its own size W x H
    question: str
    mask: np.ndarray  # bool [H, W]: the true mask
    id: str
    kind: str = ""  # kind of question, where the data set says one
    ignore: np.ndarray | None = None  # bool [H, W]: pixels that the data set leaves undecided
    box_only: bool = False  # the data set has boxes, no masks: `mask` is a filled box, and only the box's IoU counts
    picture: str = ""  # which picture it is: questions that share one are not independent


class Data(Sequence):
    """Samples, and what can be told about them before any picture is read. `ids` holds each sample's id."""

    box_only = False  # boxes and no masks
    download_bytes = 0  # what `fetch` has yet to download, about
    missing: Sequence[str] = ()  # pictures that could not be had; the next samples that were drawn have their places

    def fetch(self, missing: Sequence[str] = ()) -> None:
        """Download what is not here yet. Pictures in `missing` are left out, so that processes hold the same ones."""


class Mirrored(Data):
    """A data set in a mirror: pictures and true masks flipped, and the words left and right exchanged. A policy that
    sees where things are should do as well there."""

    def __init__(self, data: Data):
        self.data, self.box_only = data, data.box_only

    @property
    def ids(self) -> list[str]:
        return self.data.ids

    @property
    def download_bytes(self) -> int:
        return self.data.download_bytes

    @property
    def missing(self) -> Sequence[str]:
        return self.data.missing

    def fetch(self, missing: Sequence[str] = ()) -> None:
        self.data.fetch(missing)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Sample:
        x, flip = self.data[i], lambda mask: None if mask is None else np.ascontiguousarray(mask[:, ::-1])
        side = {"left": "right", "right": "left"}
        question = re.sub(r"\b(left|right)(most)?\b", lambda found: side[found[1]] + (found[2] or ""), x.question)
        return replace(x, image=ImageOps.mirror(x.image), question=question, mask=flip(x.mask), ignore=flip(x.ignore))


def draw(items: list, split: str, count: int, seed: int) -> Iterator:
    """Items of a split in the order in which they are used; `count` are wanted, the others stand in for lost ones.

    train: one pass after the other without end, each in a new order. validation and test: each item once, as they stand
    if all are wanted, else in an order that is the same for every seed: a file's first rows are often of one kind.
    """
    if split != "train":
        yield from items if count >= len(items) else random.Random(0).sample(items, len(items))
        return
    rng = random.Random(seed)
    while True:
        yield from rng.sample(items, len(items))


# ---------------------------------------------------------------------------------------------------- your own folder


def read_mask(value, folder: Path, height: int, width: int) -> np.ndarray:
    """A mask bool [H, W] from a PNG's path, COCO RLE {"size", "counts"}, or polygons [[x1, y1, x2, y2, ...], ...]."""
    if isinstance(value, str):
        with opened(inside(folder, value)) as image:
            single = image.mode in ("1", "L", "P") or image.mode.startswith("I")
            pixels = np.asarray(image if single else image.convert("RGB"))
        mask = pixels.any(-1) if pixels.ndim == 3 else pixels > 0  # masks come as 0/1 and as 0/255: any value counts
    elif isinstance(value, dict):
        if list(value["size"]) != [height, width]:
            raise ValueError(f"the mask's RLE has size {value['size']}, the picture [{height}, {width}]")
        rle = coco.frPyObjects(value, height, width) if isinstance(value["counts"], list) else value
        mask = coco.decode(rle).astype(bool)
    elif isinstance(value, list) and value:
        polygons = value if isinstance(value[0], list) else [value]
        pairs = all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in polygons)
        if not (pairs and all(isinstance(v, (int, float)) for p in polygons for v in p)):
            raise ValueError("a polygon of the mask is not a list of at least three x, y pairs")
        mask = coco.decode(coco.merge(coco.frPyObjects(polygons, height, width))).astype(bool)
    else:
        raise ValueError("mask is neither a PNG's path, nor COCO RLE, nor polygons")
    return of_size(mask, height, width)


def of_size(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """The mask, if it is as large as its picture."""
    if mask.shape != (height, width):
        raise ValueError(f"the mask is {mask.shape[1]} x {mask.shape[0]}, the picture {width} x {height}")
    return mask


def inside(folder: Path, name: str) -> Path:
    """`name` inside `folder`; a path that leads out of it is refused."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{name} leads out of the folder")
    return path


class Folder(Data):
    """data.jsonl in a folder: one {"image", "question", "mask"} a line, with paths in the folder; "id", "kind" and
    "split" may be given.

    Without "split", a tenth of the lines drawn with a fixed seed is held out for validation and another tenth for test.
    """

    def __init__(self, folder: str | Path, split: str, count: int, seed: int = 0):
        self.folder, self.file = Path(folder), Path(folder) / "data.jsonl"
        try:
            lines = [x for x in enumerate(self.file.read_text(encoding="utf-8").splitlines(), 1) if x[1].strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"{self.file}: {error}") from None
        if not lines:
            raise UserError(f"{self.file} is empty")
        order = list(range(len(lines)))
        random.Random(0).shuffle(order)
        tenth = max(1, len(lines) // 10)
        held = {**{i: "validation" for i in order[:tenth]}, **{i: "test" for i in order[tenth : 2 * tenth]}}
        chosen = [x for i, x in enumerate(lines) if self.checked(*x).get("split", held.get(i, "train")) == split]
        if not chosen:
            raise UserError(f"{self.file} has no line for the {split} split")
        self.lines = list(islice(draw(chosen, split, count, seed), count))  # (number, text): parsed when asked for

    def checked(self, number: int, line: str) -> dict:
        """One line parsed, and all found wrong that can be found without opening its files."""
        with self.named(number):
            try:
                row = json.loads(line)
                missing = [key for key in ("image", "question", "mask") if not row.get(key)]
            except (ValueError, AttributeError):
                raise ValueError("not a JSON object") from None
            if missing:
                raise ValueError(f"{', '.join(missing)} missing; a line needs image, question and mask")
            for name in [row["image"]] + [row["mask"]] * isinstance(row["mask"], str):
                if not inside(self.folder, name).is_file():
                    raise ValueError(f"{name}: no such file")
            return row

    @contextmanager
    def named(self, number: int):
        """What is wrong within is said with the file and the line."""
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.file} line {number}: {error}") from None

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def ids(self) -> list[str]:
        return [str(json.loads(line).get("id", f"line-{number}")) for number, line in self.lines]

    def __getitem__(self, i: int) -> Sample:
        number, line = self.lines[i]
        row = json.loads(line)
        with self.named(number):
            image = open_picture(inside(self.folder, row["image"]))
            mask = read_mask(row["mask"], self.folder, image.height, image.width)
        name, kind = str(row.get("id", f"line-{number}")), str(row.get("kind", ""))
        return Sample(image, str(row["question"]), mask, name, kind, picture=row["image"])


@contextmanager
def opened(file):
    """A picture file as Pillow opens it. Whatever Pillow meets in a broken one is an OSError or a ValueError here."""
    try:
        with Image.open(file) as image:
            yield image
    except UnidentifiedImageError:
        raise ValueError("this is no picture that can be read") from None
    except Image.DecompressionBombError as error:
        megapixels, most = (int(n) / 1e6 for n in re.findall(r"\d+", str(error))[:2])
        raise ValueError(f"{megapixels:.0f} megapixels are too many: make it smaller, {most:.0f} can be read") from None
    except (OSError, ValueError):
        raise
    except Exception as error:  # a SyntaxError from a broken PNG, struct.error, EOFError, ...: it depends on the format
        raise ValueError(f"this picture cannot be read ({error})") from None


def open_picture(file) -> Image.Image:
    """A picture as people see it, from a path or an open file: turned as its EXIF says, in RGB, read whole.

    A file that is cut off, broken, too large or no picture is an OSError or a ValueError.
    """
    with opened(file) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits of grey: Pillow's own conversion makes all above 255 white
            image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")
