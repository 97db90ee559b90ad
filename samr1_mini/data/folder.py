"""Read a folder with data.jsonl: a user's own folder, or one that public.py made of a public set.

A line is {"image", "question", "mask"}, and optionally "id", "kind", "split" and "ignore".

    image    path of a picture in the folder
    mask     path of a PNG, COCO RLE, polygons, or rows of 0 and 1. [] means that the picture has
             no object that fits the question
    masks    [mask, mask, ...], one for each of several objects, instead of a mask
    box      [x1, y1, x2, y2], instead of a mask
    ignore   same forms as mask; these pixels are left out of the score
    split    train, validation or test, or another name in SPLIT_NAMES

Lines with "masks" or with "mask": [] are for --objects several. With --objects one, the true mask
is the union of "masks", and a line with "mask": [] is refused.

Without "split", about a tenth of the pictures is for validation, and a tenth for test. With 60
pictures or more, a picture almost always keeps its split when lines are added. All coordinates are
pixels of the picture after its EXIF rotation.
"""

import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..config import UserError, parse_json
from ..files import check_content
from ..launch import usable_cores
from ..metrics import filled
from .download import COCO_BYTES, download_pictures, is_there
from .masks import EMPTY, check_truth, has_box, read_mask, refuse_lossy, truth_of
from .pictures import (
    Header,
    Size,
    check_size,
    inside,
    normal_path,
    open_picture,
    read_header,
)
from .samples import Data, Sample, clean_question, union

SPLIT_NAMES = (  # the words of Hugging Face's datasets
    dict.fromkeys(("train", "training"), "train")
    | dict.fromkeys(("validation", "val", "valid", "dev"), "validation")
    | dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
)
# Errors that broken data raise.
BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError)
# The check of a training split stops when it has taken CHECK_SECONDS, and has read CHECK_COUNT
# questions.
CHECK_SECONDS = 60
CHECK_COUNT = 1000
KEYS = {"image", "question", "mask", "masks", "box", "ignore", "split", "id", "kind"}
FEW_PICTURES = 2  # with so few pictures, a split without questions gets all questions


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
    size: Size | None  # of the picture, in converted sets
    box_only: bool
    nothing: bool  # the picture has no such object

    @property
    def row(self) -> dict:
        """Return the keys and values of the line, without missing values."""
        return present(json.loads(self.text))


class Folder(Data):
    """`count` questions of a split of the folder's data.jsonl.

    `pictures` is the folder of a converted set's pictures. The lines of such a set were checked
    when the set was converted. If `downloads` is true, missing pictures are downloaded from COCO.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        count: int,
        seed: int | None,
        pictures: Path | None = None,
        downloads: bool = False,
    ):
        self.folder, self.file = folder, folder / "data.jsonl"
        self.pictures = pictures or folder
        self.converted, self.downloads = pictures is not None, downloads
        self.split, self.count, self.seed = split, min(count, sys.maxsize), seed
        self.repeats = split == "train" and seed is not None
        self.missing, self.warnings, self.broken = [], [], set()
        self.names = {}  # name of a picture after casefold() -> its name
        self.candidates = self.lines_of_split(self.read_lines())
        self.box_only = self.candidates[0].box_only
        if any(line.box_only != self.box_only for line in self.candidates):
            raise UserError(
                f"{self.file}: some lines have a mask and others a box; make two folders of them"
            )
        self.choose()

    # -------------------------------------------------------------------------------- lines

    def read_lines(self) -> list[Line]:
        """Parse all lines that are not empty."""
        check_content(self.file, "write one question a line")
        try:
            text = self.file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.file}: {error}; save the file in UTF-8") from None
        except OSError as error:
            raise UserError(f"{self.file} cannot be read ({error.strerror}): check it") from None
        lines = []
        # Only "\n" ends a line. Python's splitlines would also split at other characters.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                lines.append(self.parse(number, line))
        if not lines:
            raise UserError(f"{self.file} is empty; write one question a line")
        return lines

    def parse(self, number: int, text: str) -> Line:
        """Parse a line, and check everything that needs no picture.

        Lines of converted sets are not checked again.
        """
        row = parse_json(text, f"{self.file} line {number}", dict, "write one question a line")
        row = present(row)
        with self.named(number):
            if not self.converted:
                row.pop("size", None)
                check_texts(row)
                check_truth(row)
                for name in mask_files(row):
                    inside(self.folder, name)
                row["image"] = normal_path(row["image"])
                self.check_case(row["image"], inside(self.folder, row["image"]))
            name = row.get("id", f"line-{number}")
            split, size, box_only = split_of(row), row.get("size"), has_box(row)
            nothing = not box_only and not truth_of(row)
            return Line(number, text, str(name), row["image"], split, size, box_only, nothing)

    def check_case(self, name: str, file: Path) -> None:
        """Refuse two names of one file. In Windows, A.jpg and a.jpg are the same file."""
        other = self.names.setdefault(name.casefold(), name)
        if other != name and file.samefile(inside(self.folder, other)):
            raise ValueError(f"{name} and {other} are the same file; write one name in all lines")

    def lines_of_split(self, lines: list[Line]) -> list[Line]:
        """Return the lines of this split.

        A folder with one or two pictures has too few for three splits. If this split has no line,
        it gets all lines.
        """
        splits = split_pictures(lines)
        few = len(splits) <= FEW_PICTURES
        found, others = [], set()
        for line in lines:
            if (line.split or splits[line.image]) == self.split:
                found.append(line)
            else:
                others.add(line.image)
        if few and not found:
            found = lines
            self.warn(
                f"the folder has only {len(splits)} pictures, so this split has the questions of all. "
                "The scores say nothing about new pictures. Separate splits need at least 3 pictures"
            )
        if not found:
            raise UserError(
                f"{self.file} has no line for the {self.split} split; add lines with this split"
            )
        if self.split == "test" and not few:
            self.warn_about_test(lines, sorted(others & {line.image for line in found}))
        return found

    def warn_about_test(self, lines: list[Line], shared: list[str]) -> None:
        """Add warnings about the test split. Its pictures `shared` are in another split too."""
        if len({bool(line.split) for line in lines}) == 2:
            self.warn(
                "some lines name a split, and others do not. About a tenth of the other pictures "
                "is for validation, and a tenth for test"
            )
        if shared:
            self.warn(
                f"{len(shared)} pictures, such as {shared[0]}, are in another split too. For a fair "
                "test, give each picture one split"
            )

    def in_order(self) -> Iterator[Line]:
        """Yield the lines of this split in the order of their use.

        A training split with a seed repeats all lines without end, each time in a new order.
        Otherwise each line comes once: in file order if all are used, or in one fixed random order.
        """
        lines = self.candidates
        if self.repeats:
            rng = random.Random(self.seed)
            while True:
                yield from rng.sample(lines, len(lines))
        if self.count < len(lines):  # the first lines of a file are often of one kind
            lines = random.Random(0).sample(lines, len(lines))
        yield from lines

    def choose(self) -> None:
        """Choose `count` lines, and some spare lines. A spare line replaces an unreadable one.

        Lines whose pictures are missing are left out here.
        """
        missing, order = set(self.missing), self.in_order()
        if missing.issuperset(line.image for line in self.candidates):
            order = iter(())  # the order of a training split has no end
        remaining = (line for line in order if line.image not in missing)
        self.lines = list(islice(remaining, self.count))
        self.spare = list(islice(remaining, 10 + self.most_broken))

    @property
    def most_broken(self) -> int:
        """Return how many questions may be broken: 1 % of them, but at least one."""
        return max(1, min(self.count, len(self.candidates)) // 100)

    def warn(self, text: str) -> None:
        """Add a warning about this split."""
        self.warnings.append(f"{self.file}, {self.split} split: {text}")

    @contextmanager
    def named(self, number: int):
        """Report an error with the file and the line."""
        try:
            yield
        except BROKEN as error:
            raise UserError(f"{self.file} line {number}: {error}") from None

    # -------------------------------------------------------------------------------- files

    def check_headers(self) -> None:
        """Check the file headers of all chosen lines, and compare each mask with its picture's
        size. Pictures that will be downloaded are not checked.
        """
        if self.downloads:
            return
        turned, corners = set(), []
        for line in self.distinct_lines():
            with self.named(line.number):
                header = read_header(inside(self.pictures, line.image))
                check_size(line.image, header.size, line.size, "; use the original picture")
                unsure, numbers = check_against_picture(
                    line.row, header, self.folder, self.converted
                )
            if unsure:
                turned.add(line.image)
            if numbers:
                corners.append((max(numbers[::2]), max(numbers[1::2]), *header.size))
        if turned:
            self.warn(
                f"EXIF rotates {len(turned)} pictures. Their masks must fit the rotated pictures. To be "
                "sure, save pictures and masks upright"
            )
        if are_suspect(corners):
            self.warn(
                "no coordinate comes near the right or lower side of its picture. Check that "
                "coordinates are pixels of these pictures"
            )

    def refuse_nothing(self) -> None:
        """Refuse questions without an object. Raises UserError for the first one."""
        for line in self.candidates:
            if line.nothing:
                raise UserError(
                    f"{self.file} line {line.number}: the picture has no such object; use "
                    "--objects several, or remove such lines"
                )

    def distinct_lines(self) -> list[Line]:
        """Return the chosen lines, each once. A training split may repeat them."""
        return list({line.number: line for line in self.lines}.values())

    def files(self) -> list[Path]:
        """Return data.jsonl, and the pictures and mask files of all chosen lines."""
        found = [self.file]
        for line in self.distinct_lines():
            found.append(self.pictures / line.image)
            found += [self.folder / name for name in mask_files(line.row)]
        return found

    def check_files(self, resumed: bool = False) -> None:
        """Read pictures and masks.

        Raises UserError for the first broken one. A resumed run accepts broken training questions,
        up to `most_broken`: sample_at replaces them. See CHECK_SECONDS for large sets.
        """
        lines, begun, shares = self.distinct_lines(), time.monotonic(), []
        title, few = f"pictures, {self.split}", len(lines) < 100
        bar = tqdm(lines, title, leave=False, dynamic_ncols=True, disable=few)
        with ThreadPoolExecutor(min(8, usable_cores())) as pool:  # a photo may take 0.5 GiB
            jobs = [pool.submit(self.mask_share, line) for line in lines]
            try:
                for done, (line, job) in enumerate(zip(bar, jobs)):
                    late = time.monotonic() - begun > CHECK_SECONDS
                    if self.repeats and late and done >= CHECK_COUNT:
                        break
                    if resumed and self.repeats and isinstance(job.exception(), UserError):
                        self.count_broken(line, job.exception())
                    else:
                        shares.append(job.result())
            finally:
                pool.shutdown(cancel_futures=True)
        large = sum(share is not None and share > 0.5 for share in shares)
        if not self.box_only and (1 in shares or len(shares) >= 10 and large > len(shares) / 2):
            self.warn(
                f"{large} masks cover more than half of their pictures. In a mask, the background "
                "must be black"
            )
        if 0 in shares:
            self.warn(f"{shares.count(0)} masks are empty (see --empty-truth)")

    def mask_share(self, line: Line) -> float | None:
        """Read a line's picture and mask, and return the mask's share of the picture.

        Returns None if the picture has no such object.
        """
        sample = self.read_sample(line)
        if line.nothing:
            return None
        masks = sample.masks or [sample.mask]
        if not self.converted and not all(mask.any() for mask in masks):
            raise UserError(f"{self.file} line {line.number}: {EMPTY}")
        hidden = sample.ignore is not None and not (sample.mask & ~sample.ignore).any()
        if hidden and not self.converted:
            raise UserError(
                f'{self.file} line {line.number}: "ignore" covers the whole mask. In it, only '
                "undecided pixels may be white"
            )
        return sample.mask.mean()

    # -------------------------------------------------------------------------------- download

    def wanted(self) -> dict[str, Size]:
        """Return the names and sizes of the pictures that are downloaded if they are missing."""
        if not self.downloads:
            return {}
        return {line.image: line.size for line in self.lines}

    @property
    def download_bytes(self) -> int:
        absent = [name for name in self.wanted() if not is_there(self.pictures / name)]
        return COCO_BYTES * len(absent)

    def download(self, missing: Sequence[str] = ()) -> None:
        """Download the pictures of the chosen lines.

        Up to 1 % of the downloads may fail, and one failure is always allowed.
        """
        self.missing = list(dict.fromkeys([*self.missing, *missing]))
        self.choose()
        failed, total = {}, len(self.wanted())
        most_failures = max(1, total // 100)
        # The lines that replace missing ones may lack their pictures too.
        while new := download_pictures(self.wanted(), self.pictures, most_failures - len(failed)):
            failed |= new
            self.missing += new
            self.choose()
        if failed:
            reasons = ", ".join(f"{name} ({reason})" for name, reason in failed.items())
            print(
                f"{self.file}: {len(failed)} of {total} pictures were not downloaded: {reasons}. "
                f"Their questions are replaced where possible. The split has {len(self)} questions"
            )
        if not self.lines:
            raise UserError(
                f"{self.file}: no question of the {self.split} split has a picture; run again to "
                "download the pictures"
            )

    # -------------------------------------------------------------------------------- samples

    @property
    def ids(self) -> list[str]:
        return [line.id for line in self.lines]

    def __len__(self) -> int:
        return len(self.lines)

    def sample_at(self, i: int) -> Sample:
        """Read sample number `i`. In training, another sample replaces an unreadable one.

        It is a spare sample. Spare samples are not downloaded, so perhaps none can be read. Then
        the next readable sample of the split is used. The choice depends only on `i`, because
        --resume must find the same sample again.
        """
        try:
            return self.read_sample(self.lines[i])
        except UserError as error:
            if not self.repeats:
                raise
            self.count_broken(self.lines[i], error)
            for lines, start in ((self.spare, i), (self.lines, i + 1)):
                for k in range(min(100, len(lines))):
                    with suppress(UserError):
                        return self.read_sample(lines[(start + k) % len(lines)])
            raise

    def count_broken(self, line: Line, error: UserError) -> None:
        """Count a line that became unreadable. Raises UserError if there are too many."""
        if line.number not in self.broken:
            tqdm.write(f"{error}. Another question replaces this one")
        self.broken.add(line.number)
        if len(self.broken) > self.most_broken:
            raise UserError(
                f"{error}. {len(self.broken)} broken lines were found so far; repair the files"
            )

    def read_sample(self, line: Line) -> Sample:
        """Read a line's picture and mask. Raises UserError."""
        with self.named(line.number):
            row = line.row
            image = open_picture(inside(self.pictures, line.image))
            question = clean_question(row["question"])
            kind, picture = str(row.get("kind", "")), line.image
            if self.converted:  # its pictures have new names
                picture = str(row.get("picture", picture))
            ignore = None
            if row.get("ignore"):
                ignore = read_mask(row["ignore"], self.folder, image.size)
            masks = None  # the single objects are unknown
            if line.box_only:
                mask = filled(row["box"], image.height, image.width)
            else:
                found = [read_mask(value, self.folder, image.size) for value in truth_of(row)]
                mask = union(found, image.size)
                if not row.get("mask"):  # "masks", or "mask": []
                    masks = found
        return Sample(image, question, mask, line.id, kind, ignore, line.box_only, picture, masks)


# -------------------------------------------------------------------------------- one line


def present(row: dict) -> dict:
    """Return a line without missing values: null, an empty text, or NaN, as pandas writes it."""
    kept = {}
    for name, value in row.items():
        is_nan = value != value  # only NaN differs from itself
        if value not in (None, "") and not is_nan:
            kept[name] = value
    return kept


def check_texts(row: dict) -> None:
    """Check the keys of a line, and its picture's path and question. Raises ValueError."""
    truths = {"mask", "masks", "box"}
    needed = KEYS - {"id", "kind", *row} - (truths if truths & row.keys() else set())
    for key in row:
        meant = key.strip().lower()
        if key not in KEYS and meant in needed:
            raise ValueError(f"unknown key {key!r}; write {meant!r}")
    for key in ("image", "question"):
        text = row.get(key)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{key} missing; write a text in quotes, or remove the line")
    try:
        row["image"].encode()
    except UnicodeEncodeError:
        raise ValueError(f"{row['image']!a} is not UTF-8; rename the file") from None
    clean_question(row["question"])
    if row["image"] in mask_files(row):
        raise ValueError("image and mask are the same file; name the file of the mask")


def mask_files(row: dict) -> list[str]:
    """Return the paths of the files that hold a line's masks and its undecided pixels."""
    values = (*truth_of(row), row.get("ignore"))
    return [value for value in values if isinstance(value, str)]


def split_of(row: dict) -> str | None:
    """Return the split that a line names, or None."""
    if "split" not in row:
        return None
    split = SPLIT_NAMES.get(str(row["split"]).lower())
    if split is None:
        raise ValueError(f"split {row['split']!r} is none of {', '.join(SPLIT_NAMES)}")
    return split


def split_pictures(lines: list[Line]) -> dict[str, str]:
    """Return each picture's split: the split named in its lines, or one from the hash of its path.

    Validation and test each get about a tenth of the pictures without a named split, and at least
    one if there are enough. In a folder with one or two pictures, those without a named split
    belong to train.
    """
    splits = {}
    for line in lines:
        splits[line.image] = line.split or splits.get(line.image)
    free = {name: hash_number(name) for name, split in splits.items() if split is None}
    order = sorted(free, key=free.get)
    first = max(1, sum(number < 0.1 for number in free.values()))
    second = max(first + 1, sum(number < 0.2 for number in free.values()))
    if len(splits) <= FEW_PICTURES:
        first, second = 0, 0
    splits |= dict.fromkeys(order[:first], "validation")
    splits |= dict.fromkeys(order[first:second], "test")
    splits |= dict.fromkeys(order[second:], "train")
    return splits


def hash_number(name: str) -> float:
    """Return a number from 0 to 1 that depends on a name alone."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) / 16**12


def check_against_picture(
    row: dict, header: Header, folder: Path, may_be_empty: bool
) -> tuple[bool, list[float]]:
    """Check a line's mask or box against the header of its picture. Raises ValueError.

    Returns True in a doubtful case: EXIF rotates the picture or the mask, but not both. A rotation
    that exchanges width and height leaves no doubt, because a wrong one raises an error.
    Also returns the coordinates of the box or the polygons, as check_truth does.
    """
    files = mask_files(row)
    unclear = header.turned and not files
    try:
        for name in files:
            mask = read_header(inside(folder, name))
            unclear = unclear or header.turned != mask.turned
            refuse_lossy(mask, name)
            check_size(f"{name}: the mask", mask.size, header.size)
        numbers = check_truth(row, header.size, may_be_empty)
    except ValueError as error:
        if unclear:
            raise ValueError(
                f"{error}. EXIF rotates the picture or the mask, but not both; save both upright"
            ) from None
        raise
    width, height = header.size
    if not numbers and header.sideways and width != height:
        unclear = False  # a wrong rotation would have raised an error above
    return unclear, numbers


def are_suspect(corners: list[tuple[float, float, int, int]]) -> bool:
    """Return True if coordinates seem to be thousandths, percent, or pixels of a smaller picture.

    A corner is (right, bottom, width, height): the largest coordinates in one line of data.jsonl,
    and the size of its picture. Needs ten lines, because one object near the upper left corner
    also has small coordinates.
    """
    if len(corners) < 10:
        return False
    right, bottom, width, height = np.array(corners).T
    if np.all((right < 0.5 * width) & (bottom < 0.5 * height)):
        return True
    reach, side = max(right.max(), bottom.max()), np.maximum(width, height).min()
    return any(reach <= unit < side / 1.2 for unit in (1000, 100))
