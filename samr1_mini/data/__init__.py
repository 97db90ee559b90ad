"""Data: sequences of `Sample`s by name, from drawn scenes, a folder of your own, or a public data set."""

from pathlib import Path

from ..config import UserError
from .samples import Data, Folder, Mirrored, Sample, open_picture, plain, read_mask

__all__ = ["Data", "Folder", "Mirrored", "Sample", "load_data", "open_data", "open_picture", "plain", "read_mask"]


def open_data(
    name: str, split: str, count: int, seed: int | None = 0, sentences: str = "first", coco_dir: str = "",
    ignore: str = "foreground",
) -> Data:
    """Up to `count` samples of a split (train, validation, test) of "shapes", a public data set, or a folder. Of a
    training split as many as are asked for, one pass after the other; with `seed` None each sample once.

    For public sets: `sentences`, "first" or "all" of an object; `coco_dir`, a folder with COCO's train2014 pictures;
    `ignore`, undecided pixels count as "foreground", or are "excluded".

    What can be checked cheaply is checked here; a mistake is a UserError. What is large is downloaded by `fetch`.
    """
    if name == "shapes":
        from ..tiny.shapes import Shapes  # imported late, here and below: what is not asked for takes no time

        return Shapes(split, count, seed or 0)
    if (Path(name) / "data.jsonl").is_file():
        return Folder(name, split, count, seed)
    from .public import HUB, Public

    if name in HUB or Path(name).is_dir():
        return Public(name, split, count, seed, sentences, coco_dir, ignore)
    raise UserError(f"--data {name}: neither 'shapes', nor a public data set ({', '.join(HUB)}), nor a folder")


def load_data(*arguments, **options) -> Data:
    """`open_data`, with all that has to be downloaded."""
    data = open_data(*arguments, **options)
    data.fetch()
    return data
