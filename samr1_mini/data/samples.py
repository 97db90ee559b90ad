"""A sample, what every data set can tell, and a folder of your own."""

import hashlib
import json
import math
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


class Mirrored(Sequence):
    """A data set in a mirror: pictures and true masks flipped, and the words left and right exchanged. A policy that
    sees where things are should do as well there."""

    def __init__(self, data: Data):
        self.data = data

    def __getattr__(self, name: str):  # ids, missing, fetch, ...: those of the set itself
        return getattr(self.data, name)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Sample:
        x, flip = self.data[i], lambda mask: None if mask is None else np.ascontiguousarray(mask[:, ::-1])
        side = {"left": "right", "right": "left", "Left": "Right", "Right": "Left", "LEFT": "RIGHT", "RIGHT": "LEFT"}
        words = rf"\b({'|'.join(side)})(most|MOST|est|hand|side)?\b"
        question = re.sub(words, lambda found: side[found[1]] + (found[2] or ""), x.question)
        return replace(x, image=ImageOps.mirror(x.image), question=question, mask=flip(x.mask), ignore=flip(x.ignore))


def draw(items: list, split: str, count: int, seed: int | None) -> Iterator:
    """Items of a split in the order in which they are used; `count` are wanted, the others stand in for lost ones.

    train: one pass after the other without end, each in a new order. validation and test, and train without a seed:
    each item once, as they stand if all are wanted, else in an order that is the same for every seed: a file's first
    rows are often of one kind.
    """
    if split != "train" or seed is None:
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
            if image.format in ("JPEG", "WEBP"):
                raise ValueError(f"{value}: {image.format} may blur a mask's border; save it as PNG")
            if "A" in image.mode and image.getchannel("A").getextrema() != (255, 255):
                raise ValueError(f"{value}: a mask with transparent parts; save it in black and white")
            image = ImageOps.exif_transpose(image)
            single = image.mode in ("1", "L") or image.mode.startswith("I")  # a palette may have black anywhere
            pixels = np.asarray(image if single else image.convert("RGB"))
        mask = pixels.any(-1) if pixels.ndim == 3 else pixels > 0  # masks come as 0/1 and as 0/255: any value counts
    else:
        value = drawable(value)
        if isinstance(value, dict):
            if list(value["size"]) != [height, width]:
                raise ValueError(f"the mask's RLE has size {value['size']}, the picture [{height}, {width}]")
            rle = coco.frPyObjects(value, height, width) if isinstance(value["counts"], list) else value
        else:
            rle = coco.merge(coco.frPyObjects(value, height, width))
        mask = coco.decode(rle).astype(bool)
    return of_size(mask, height, width)


def drawable(value) -> dict | list[list]:
    """An RLE, or a list of polygons; what cannot be drawn is refused. pycocotools draws what is in memory where runs
    are too short."""
    if isinstance(value, dict):
        if not {"size", "counts"} <= set(value):
            raise ValueError("the mask's RLE needs size and counts")
        runs = value["counts"] if isinstance(value["counts"], list) else run_lengths(value["counts"])
        if not all(isinstance(n, int) and n >= 0 for n in runs) or sum(runs) != math.prod(value["size"]):
            raise ValueError("the runs of the mask's RLE do not fill its size")
        return value
    elif isinstance(value, list) and value:
        polygons = value if isinstance(value[0], list) else [value]
        pairs = all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in polygons)
        if not (pairs and all(type(v) in (int, float) and math.isfinite(v) for p in polygons for v in p)):
            raise ValueError("a polygon of the mask is not a list of at least three x, y pairs")
        return polygons
    raise ValueError("mask is neither a PNG's path, nor COCO RLE, nor polygons")


def run_lengths(counts: str | bytes) -> list[int]:
    """COCO's compressed runs as numbers: five bits a sign, the lowest first; from the third on less the one before the
    last."""
    runs, value, bits = [], 0, 0
    for sign in counts.encode() if isinstance(counts, str) else counts:
        value, bits = value | (sign - 48 & 31) << bits, bits + 5
        if not sign - 48 & 32:  # the number ends here; its highest bit is its sign
            value -= (value >> bits - 1) << bits
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, bits = 0, 0
    return runs + [-1] * (bits > 0)  # cut off within a number


def plain(question) -> str:
    """A question as a model can read it. A special token in it, as <|image_pad|>, would make another prompt of it."""
    text = str(question).strip()
    if token := re.search(r"<\|\w+\|>", text):
        raise ValueError(f"the question holds {token[0]}, a special token of the model")
    text.encode()  # half a surrogate pair cannot be: a ValueError
    return text


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

    Without "split", about a tenth of the pictures is held out for validation and another tenth for test. A picture is
    in one split with all its questions (in that which one of its lines names), and, where there are many, stays there
    when lines are added or moved.
    """

    def __init__(self, folder: str | Path, split: str, count: int, seed: int | None = 0):
        self.folder, self.file = Path(folder), Path(folder) / "data.jsonl"
        try:  # only "\n" ends a line: JSON's strings may hold other signs that Python takes for an end
            text = self.file.read_text(encoding="utf-8-sig")
            lines = [x for x in enumerate(text.split("\n"), 1) if x[1].strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"{self.file}: {error}") from None
        if not lines:
            raise UserError(f"{self.file} is empty")
        rows = (self.checked(*x) for x in lines)  # one at a time: their masks may be large
        belongs = [(row["split"], self.picture(row), row["id"]) for row in rows]
        told = {name: given for given, name, _ in belongs if given}
        number = lambda name: int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) / 16**12  # from 0 to 1
        chance = {name: number(name) for _, name, _ in belongs if name not in told}  # wherever its line stands
        order = sorted(chance, key=chance.get)
        first = max(1, sum(c < 0.1 for c in chance.values()))  # one picture at least, however few there are
        second = max(first + 1, sum(c < 0.2 for c in chance.values()))
        held = dict.fromkeys(order[:first], "validation") | dict.fromkeys(order[first:second], "test") | told
        where = [given or held.get(name, "train") for given, name, _ in belongs]
        chosen = [(*x, name) for x, its, (*_, name) in zip(lines, where, belongs) if its == split]
        if not chosen:
            raise UserError(f"{self.file} has no line for the {split} split")
        self.lines = list(islice(draw(chosen, split, count, seed), count))  # (number, text, id): parsed when asked for
        self.ids = [name for *_, name in self.lines]
        for number, line in dict.fromkeys(x[:2] for x in self.lines):  # a run must not end at its last picture
            self.look(number, json.loads(line))

    def picture(self, row: dict) -> str:
        """The path of a row's picture in the folder, by which it is known however it is written."""
        return inside(self.folder, row["image"]).relative_to(self.folder.resolve()).as_posix()

    def checked(self, number: int, line: str) -> dict:
        """One line parsed, and all found wrong that can be found without opening its files."""
        with self.named(number):
            try:
                row = json.loads(line)
                missing = [key for key in ("image", "question", "mask") if not str(row.get(key) or "").strip()]
            except (ValueError, AttributeError):
                raise ValueError("not a JSON object") from None
            if missing:
                raise ValueError(f"{', '.join(missing)} missing; a line needs image, question and mask")
            if not (isinstance(row["image"], str) and isinstance(row["question"], str)):
                raise ValueError("image and question must be texts")
            for name in self.files(row):
                if not inside(self.folder, name).is_file():
                    raise ValueError(f"{name}: no such file")
            if not isinstance(row["mask"], str):
                drawable(row["mask"])
            split = "validation" if row.get("split") == "val" else row.get("split")
            if (split or "train") not in ("train", "validation", "test"):
                raise ValueError(f"split {split!r} is none of train, validation and test")
            plain(row["question"])
            return row | {"id": f"line-{number}" if row.get("id") is None else str(row["id"]), "split": split}

    def files(self, row: dict) -> list[str]:
        return [row["image"]] + [row["mask"]] * isinstance(row["mask"], str)

    def look(self, number: int, row: dict) -> None:
        """A row's files, as far as their heads tell: pictures that are none or too large, masks of another size."""
        with self.named(number):
            sizes = []  # width, height: the picture's, then the mask's
            for name in self.files(row):
                with opened(inside(self.folder, name)) as file:
                    sizes.append(file.size)
            sizes += [row["mask"]["size"][::-1]] if isinstance(row["mask"], dict) else []
            if sorted(sizes[0]) != sorted(sizes[-1]):  # EXIF may yet turn either
                raise ValueError("the mask is {} x {}, the picture {} x {}".format(*sizes[-1], *sizes[0]))

    @contextmanager
    def named(self, number: int):
        """What is wrong within is said with the file and the line."""
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(f"{self.file} line {number}: {error}") from None

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> Sample:
        number, line, name = self.lines[i]
        row = json.loads(line)
        with self.named(number):
            image = open_picture(inside(self.folder, row["image"]))
            mask = read_mask(row["mask"], self.folder, image.height, image.width)
            if isinstance(row["mask"], list) and not mask.any():
                raise ValueError("the mask's polygons hold no pixel: they are in pixels, not in shares of the sides")
        return Sample(image, plain(row["question"]), mask, name, str(row.get("kind") or ""), picture=self.picture(row))


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
        if max(image.size) > 100 * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels are too narrow a picture")
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # Pillow's own conversion makes all above 255 white
            grey = np.nan_to_num(np.asarray(image, float)).clip(0)
            white = next((white for white in (1, 255, 4095, 65535) if grey.max() <= white), grey.max())
            image = Image.fromarray((grey / white * 255).astype(np.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
