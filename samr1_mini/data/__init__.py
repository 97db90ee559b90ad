"""Open data sets by name: drawn scenes, a folder of your own, or a public data set."""

from pathlib import Path

from .folder import Folder

# Other modules import these names from here.
from .pictures import open_picture
from .samples import Data, Sample, clean_question


def open_data(
    name: str,
    split: str,
    count: int,
    seed: int | None = 0,
    sentences: str = "first",
    coco_dir: str = "",
    ignore: str = "foreground",
    objects: str = "one",
) -> Data:
    """Open up to `count` samples of a split (train, validation, test) of "shapes", a public data
    set, or a folder.

    A training split repeats its samples until it has `count`. With `seed` None, each sample comes
    once. If `objects` is "several", a question may mean several objects or none.

    The other arguments are for public sets. `sentences` is "first" or "all": the expressions of an
    object that are used. `coco_dir` is a folder with COCO's train2014 pictures. `ignore` is
    "foreground" or "excluded": how pixels count that the data set leaves undecided.

    Lines and file headers are checked here. Raises UserError. `Data.download` downloads pictures.
    """
    if name == "shapes":
        # Imported late, here and below: other data do not wait for these imports.
        from ..tiny.shapes import Shapes

        return Shapes(split, count, seed or 0, objects)
    if (Path(name) / "data.jsonl").is_file():
        found = Folder(Path(name), split, count, seed)
    else:
        from .public import Source, open_public

        found = open_public(Source(name, split, sentences, ignore), count, seed, coco_dir)
    found.check_headers()
    if objects == "one":
        found.refuse_nothing()
    return found


def load_data(*arguments, **options) -> Data:
    """Open data as open_data does, download what is missing, and print the warnings."""
    data = open_data(*arguments, **options)
    data.download()
    for line in data.warnings:
        print(line)
    return data
