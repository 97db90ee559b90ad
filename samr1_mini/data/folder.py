"""A folder with data.jsonl: a user's own, or one that public.py made of a public set.

All data are read here.

A line is {"image", "question", "mask"}, and optionally "id", "kind", "split" and "ignore".

    image    path of a picture in the folder
    mask     path of a PNG, COCO RLE, polygons, or rows of 0 and 1
    box      [x1, y1, x2, y2], instead of a mask
    ignore   same forms as mask; these pixels are left out of the score
    split    train, validation (or val, valid, dev) or test

Without "split", about a tenth of the pictures is for validation, and a tenth for test. With a few
dozen pictures or more, a picture keeps its split when lines are added. All coordinates are pixels
of the picture after its EXIF rotation.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from ..config import UserError
from ..metrics import filled
from .fetch import COCO_BYTES, fetch_pictures, is_there
from .masks import (
    are_numbers,
    as_polygons,
    check_truth,
    has_box,
    is_absent,
    is_rows,
    read_mask,
    refuse_lossy,
)
from .pictures import Head, inside, open_picture, plain_path, read_head
from .samples import Data, Sample, in_order, plain

SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(
    ("validation", "val", "valid", "dev"), "validation"
)
# The check of a training split stops after CHECK_SECONDS, once it has read CHECK_COUNT questions.
CHECK_SECONDS = 60
CHECK_COUNT = 1000
FEW_PICTURES = 2  # with so few, all splits hold the same questions


@dataclass
class Line:
    """A line of data.jsonl.

    The text is kept and parsed again at use, because parsed masks take much memory.
    """

    number: int
    text: str
    id: str
    image: str  # path in the folder, in its shortest form
    split: str | None
    size: tuple[int, int] | None  # width and height of the picture, in converted sets
    box_only: bool


class Folder(Data):
    """`count` questions of a split of the folder's data.jsonl.

    `pictures` is the folder of the pictures, if they are not beside data.jsonl. If `fetches` is
    true, the pictures come from COCO, and missing ones are downloaded. Lines of a `converted` set
    were checked when the set was converted.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        count: int,
        seed: int | None = 0,
        pictures: str | Path | None = None,
        fetches: bool = False,
        converted: bool = False,
    ):
        self.folder, self.file = Path(folder), Path(folder) / "data.jsonl"
        self.pictures = Path(pictures or folder)
        self.split, self.count, self.seed = split, count, seed
        self.fetches, self.converted = fetches, converted
        self.missing, self.warnings, self.replaced = [], [], set()
        lines = [self.parse(number, text) for number, text in self.read_lines()]
        self.candidates = self.of_split(lines)
        self.box_only = self.candidates[0].box_only
        if any(line.box_only != self.box_only for line in self.candidates):
            raise UserError(
                f"{self.file}: some lines have a mask and others a box; make two folders of them"
            )
        self.choose()

    # ------------------------------------------------------------------------------------------------ lines

    def read_lines(self) -> list[tuple[int, str]]:
        """Return the lines that are not empty, with their numbers."""
        try:
            text = self.file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(f"{self.file} is not in UTF-8; save the file in UTF-8") from None
        except OSError as error:
            raise UserError(f"{self.file}: {error}") from None
        # Only "\n" ends a line: JSON's strings may hold other signs that Python takes for an end.
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        if not lines:
            raise UserError(f"{self.file} is empty")
        return lines

    def parse(self, number: int, text: str) -> Line:
        """Parse a line, and check everything that needs no picture.

        Lines of converted sets are not checked again.
        """
        with self.named(number):
            row = parse_object(text)
            if not self.converted:
                check_texts(row)
                check_truth(row)
                inside(self.pictures, row["image"])
                for name in (row.get("mask"), row.get("ignore")):
                    if isinstance(name, str) and name:
                        inside(self.folder, name)
            name = row.get("id")
            if is_absent(name):
                name = f"line-{number}"
            size = row.get("size") if self.converted else None
            image = row["image"] if self.converted else plain_path(row["image"])
            return Line(number, text, str(name), image, split_of(row), size, has_box(row))

    def of_split(self, lines: list[Line]) -> list[Line]:
        """Return the lines of this split.

        A folder with one or two pictures has the same lines in all splits.
        """
        splits = split_pictures(lines)
        found = [line for line in lines if (line.split or splits[line.image]) == self.split]
        if not found and len(splits) <= FEW_PICTURES:
            found = lines
            self.warnings.append(
                f"{self.file} has only {len(splits)} pictures, so the {self.split} split has all "
                "questions. Its scores do not describe new pictures. Add pictures: separate splits need 3"
            )
        if not found:
            raise UserError(
                f"{self.file} has no line for the {self.split} split; add lines with this split"
            )
        return found

    def choose(self) -> None:
        """Choose `count` lines, and spare ones.

        A line whose picture is missing is replaced by the next.
        """
        gone = set(self.missing)
        order = in_order(self.candidates, self.split, self.count, self.seed)
        there = (line for line in order if line.image not in gone)
        if len(gone) and gone.issuperset(line.image for line in self.candidates):
            there = iter(())  # the order of a training split has no end
        self.lines = list(islice(there, self.count))
        self.spare = list(islice(there, 10 + self.allowed))

    @property
    def allowed(self) -> int:
        """Return how many questions may lose their picture: 1 % of them, but at least one."""
        return max(1, min(self.count, len(self.candidates)) // 100)

    @contextmanager
    def named(self, number: int):
        """Report an error with the file and the line."""
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(f"{self.file} line {number}: {error}") from None

    # ------------------------------------------------------------------------------------------------ files

    def check_heads(self) -> None:
        """Check the file headers of all chosen lines, and compare each mask with its picture's
        size.
        """
        turned, reach = 0, []
        for line in self.distinct_lines():
            with self.named(line.number):
                row = json.loads(line.text)
                head = read_head(inside(self.pictures, line.image))
                if line.size and tuple(line.size) != head.size:
                    raise ValueError(
                        "{} is {} x {}, but the data expect {} x {}; use the original picture".format(
                            line.image, *head.size, *line.size
                        )
                    )
                reach += reach_of(row, head)
                turned += check_against_picture(row, head, self.folder, self.converted)
        if turned:
            self.warnings.append(
                f"{self.file}: EXIF rotates {turned} pictures of the {self.split} split. Their masks "
                "must fit the rotated pictures. To be sure, save pictures and masks upright"
            )
        if is_suspect(reach):
            self.warnings.append(
                f"{self.file}: no coordinate of the {self.split} split comes near the right or lower "
                "side of its picture. Check that coordinates are pixels of these pictures"
            )

    def distinct_lines(self) -> list[Line]:
        """Return the chosen lines, each once: a training split may go through them again."""
        return list({line.number: line for line in self.lines}.values())

    def check_files(self, resumed: bool = False) -> None:
        """Read pictures and masks.

        Raises UserError for the first broken one. A resumed run has replaced questions of its
        training split before, so some may be broken there. See CHECK_SECONDS for large sets.
        """
        lines, begun, full, empty = self.distinct_lines(), time.monotonic(), 0, 0
        bar = tqdm(
            lines,
            f"pictures, {self.split}",
            leave=False,
            dynamic_ncols=True,
            disable=len(lines) < 100,
        )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [pool.submit(self.mask_share, line) for line in lines]
            try:
                for done, (line, job) in enumerate(zip(bar, jobs)):
                    late = time.monotonic() - begun > CHECK_SECONDS
                    if self.endless and late and done >= CHECK_COUNT:
                        break
                    if resumed and self.endless and job.exception():
                        self.count_broken(line, job.exception())
                        continue
                    share = job.result()
                    full += share == 1
                    empty += share == 0
            finally:
                pool.shutdown(cancel_futures=True)
        if full:
            self.warnings.append(
                f"{self.file}: {full} masks of the {self.split} split cover the whole picture. In a "
                "mask, the background must be black"
            )
        if empty:
            self.warnings.append(
                f"{self.file}: {empty} masks of the {self.split} split are empty (see --empty-truth)"
            )

    def mask_share(self, line: Line) -> float:
        """Read a line's picture and mask; return the mask's share of the picture."""
        mask = self.read_sample(line).mask
        if not mask.any() and not self.converted:
            raise UserError(
                f"{self.file} line {line.number}: the mask is empty; remove the line if the picture "
                "has no such object"
            )
        return mask.mean()

    @property
    def endless(self) -> bool:
        """Return whether the split repeats without end, so that spare questions can replace broken
        ones.
        """
        return self.split == "train" and self.seed is not None

    # ------------------------------------------------------------------------------------------------ fetching

    def wanted(self) -> dict[str, tuple[int, int]]:
        """Return the names and sizes of the pictures that must be downloaded."""
        if not self.fetches:
            return {}
        return {line.image: tuple(line.size) for line in self.lines}

    @property
    def download_bytes(self) -> int:
        return COCO_BYTES * sum(not is_there(self.pictures / name) for name in self.wanted())

    def fetch(self, missing: Sequence[str] = ()) -> None:
        """Download the pictures of the chosen lines.

        Up to 1 % of the downloads may fail, and one failure is always allowed.
        """
        self.missing = list(dict.fromkeys([*self.missing, *missing]))
        self.choose()
        failed, total = {}, len(self.wanted())
        allowed = max(1, total // 100)
        while True:  # pictures of the lines that moved up may be missing too
            new = fetch_pictures(self.wanted(), self.pictures, allowed - len(failed))
            if not new:
                break
            failed |= new
            self.missing += new
            self.choose()
        if failed:
            reasons = ", ".join(f"{name} ({reason})" for name, reason in failed.items())
            print(
                f"{self.file}: {len(failed)} of {total} pictures were not fetched. Other lines replace "
                f"them, and {len(self)} questions remain: {reasons}"
            )
        if not self.lines:
            raise UserError(f"{self.file}: no question of the {self.split} split has a picture")

    # ------------------------------------------------------------------------------------------------ samples

    @property
    def ids(self) -> list[str]:
        return [line.id for line in self.lines]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> Sample:
        """Read a sample. In training, a spare one replaces a sample that has become unreadable."""
        try:
            return self.read_sample(self.lines[i])
        except UserError as error:
            if not self.endless:
                raise
            return self.read_spare(i, error)

    def read_spare(self, i: int, error: UserError) -> Sample:
        """Read a spare sample in the place of number `i`.

        The choice depends on `i` alone, as --resume needs.
        """
        self.count_broken(self.lines[i], error)
        for k in range(len(self.spare)):
            line = self.spare[(i + k) % len(self.spare)]
            if line.number in self.replaced:
                continue
            try:
                return self.read_sample(line)
            except UserError:
                continue
        raise error

    def count_broken(self, line: Line, error: UserError) -> None:
        """Count a line that has become unreadable. Raises UserError if there are too many."""
        if line.number not in self.replaced:
            tqdm.write(f"{error}. Another question replaces this one")
        self.replaced.add(line.number)
        if len(self.replaced) > self.allowed:
            raise UserError(
                f"{error}. {len(self.replaced)} broken lines were found so far; repair the files"
            )

    def read_sample(self, line: Line) -> Sample:
        """Read a line's picture and mask. Raises UserError."""
        with self.named(line.number):
            row = json.loads(line.text)
            image = open_picture(inside(self.pictures, line.image))
            height, width = image.height, image.width
            ignore = None
            if row.get("ignore"):
                ignore = read_mask(row["ignore"], self.folder, height, width)
            if line.box_only:
                mask = filled(row["box"], height, width)
            else:
                mask = read_mask(row["mask"], self.folder, height, width)
            kind, picture = str(row.get("kind") or ""), str(row.get("picture") or line.image)
            return Sample(
                image, plain(row["question"]), mask, line.id, kind, ignore, line.box_only, picture
            )


# ---------------------------------------------------------------------------------------------------- one line


def parse_object(text: str) -> dict:
    """Parse a JSON object. Raises ValueError for anything else."""
    try:
        row = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not a JSON object ({error}); write one question a line") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object; write one question a line")
    return row


def check_texts(row: dict) -> None:
    """Check that a line has all required keys, and that text keys hold strings."""
    missing = [key for key in ("image", "question") if not row.get(key)]
    if not has_box(row) and is_absent(row.get("mask")):
        missing.append("mask")
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; a line needs image, question and mask")
    if not isinstance(row["image"], str) or not isinstance(row["question"], str):
        raise ValueError("image and question must be texts")
    if row["image"] == row.get("mask"):
        raise ValueError("image and mask are the same file")
    if not plain(row["question"]):
        raise ValueError("question is empty")


def split_of(row: dict) -> str | None:
    """Return the split that a line names, or None."""
    name = row.get("split")
    if is_absent(name):
        return None
    if str(name).lower() not in SPLITS:
        raise ValueError(f"split {name!r} is none of {', '.join(SPLITS)}")
    return SPLITS[str(name).lower()]


def split_pictures(lines: list[Line]) -> dict[str, str]:
    """Return each picture's split: the split named in its lines, or one from the hash of its path.

    Validation and test each get about a tenth of the pictures without a named split, at least one
    picture. In a folder with one or two pictures, those without a named split belong to train.
    """
    splits = {line.image: line.split for line in lines}
    splits |= {line.image: line.split for line in lines if line.split}
    free = {name: hash_number(name) for name, split in splits.items() if split is None}
    order = sorted(free, key=free.get)
    first = max(1, sum(number < 0.1 for number in free.values()))
    second = max(first + 1, sum(number < 0.2 for number in free.values()))
    if len(splits) <= FEW_PICTURES:
        first = second = 0
    splits |= dict.fromkeys(order[:first], "validation")
    splits |= dict.fromkeys(order[first:second], "test")
    splits |= dict.fromkeys(order[second:], "train")
    return splits


def hash_number(name: str) -> float:
    """Return a number from 0 to 1 that depends on a name alone."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) / 16**12


def check_against_picture(row: dict, head: Head, folder: Path, may_be_empty: bool = False) -> bool:
    """Check a line's mask or box against the head of its picture. Raises ValueError.

    Returns True if EXIF rotates only one of picture and mask, and both sizes match even so.
    """
    mask, turned = row.get("mask"), head.turned
    try:
        for name in (mask, row.get("ignore")):
            if isinstance(name, str) and name:
                mask_head = read_head(inside(folder, name))
                turned = head.turned != mask_head.turned
                refuse_lossy(mask_head, name)
                if mask_head.size != head.size:
                    has = "{} x {}, the picture {} x {}".format(*mask_head.size, *head.size)
                    raise ValueError(f"{name}: the mask is {has}")
        check_truth(row, head.size, may_be_empty)
    except ValueError as error:
        if turned:
            raise ValueError(
                f"{error}. EXIF rotates the picture or the mask, but not both; save both upright"
            ) from None
        raise
    has_size = isinstance(mask, (str, dict)) or is_rows(mask, head.size)
    return turned and not (has_size and head.size != head.stored)


def reach_of(row: dict, head: Head) -> list[tuple[float, float, int, int]]:
    """Return [(right, bottom, width, height)]: the extent of a line's polygons or box, and the
    picture size. The list is empty for other masks.
    """
    value = row.get("mask")
    if has_box(row):
        value = row["box"]
    if not isinstance(value, list) or is_rows(value, head.size):
        return []
    numbers = value
    if not are_numbers(value):
        numbers = [number for polygon in as_polygons(value) for number in polygon]
    return [(max(numbers[::2]), max(numbers[1::2]), *head.size)]


def is_suspect(reach: list[tuple[float, float, int, int]]) -> bool:
    """Return whether coordinates seem to be thousandths, percent, or pixels of a smaller picture.

    Needs ten lines, because one object near the upper left corner also has small coordinates.
    """
    if len(reach) < 10:
        return False
    if all(right < 0.5 * width and bottom < 0.5 * height for right, bottom, width, height in reach):
        return True
    for unit in (1000, 100):
        beyond = all(max(width, height) > 1.2 * unit for _, _, width, height in reach)
        if beyond and all(max(right, bottom) <= unit for right, bottom, _, _ in reach):
            return True
    return False
