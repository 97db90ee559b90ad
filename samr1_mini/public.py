"""Public data sets, by name from the hub or from a folder with their files, in the layouts in which they are published.

    refcocog, refcoco, refcocoplus    jxu124/*: expressions and masks; the pictures are COCO train2014's, fetched one by one
    lmms-lab/RefCOCOg                 validation and test, pictures and polygons
    reasonseg                         Ricky06662/ReasonSeg_val and ReasonSeg_test
    refcoco_testA, refcocoplus_testA, refcocog_test    Ricky06662/*, one row an object with its first expression
    refCOCOg_2k_840, refCOCOg_9k_840  Ricky06662/*, boxes and no masks
    a folder    parquet files of any of these; REFER's refs(...).p and instances.json; ReasonSeg's .jpg and .json pairs; or JSON lists of
                {"image", "problem", "solution": [x1, y1, x2, y2]}, as LISA-Grounding comes

Which layout a row has is read from its columns. Nothing that comes with data is run: pickles may hold plain values only.
"""

import io
import json
import pickle
import random
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from .config import UserError
from .data import Sample, inside, open_picture, read_mask
from .metrics import filled

# Name on the command line: for each split, the hub's id and what that split is called there.
HUB = {
    **{name: {split: (f"jxu124/{name}", split) for split in ("train", "validation", "test")} for name in ("refcocog", "refcoco", "refcocoplus")},
    "lmms-lab/RefCOCOg": {"validation": ("lmms-lab/RefCOCOg", "val"), "test": ("lmms-lab/RefCOCOg", "test")},
    "reasonseg": {"validation": ("Ricky06662/ReasonSeg_val", "test"), "test": ("Ricky06662/ReasonSeg_test", "test")},
    **{name: {"test": (f"Ricky06662/{name}", "test")} for name in ("refcoco_testA", "refcocoplus_testA", "refcocog_test")},
    **{name: {"train": (f"Ricky06662/{name}", "train")} for name in ("refCOCOg_2k_840", "refCOCOg_9k_840")},
}
PICTURES = Path.home() / ".cache" / "samr1_mini" / "train2014"  # COCO's pictures that were fetched
COCO_URL = "http://images.cocodataset.org/train2014/"


class Public(Sequence):
    """Rows of a public set as samples. `items` are (row, expression) pairs; a picture and its mask are read when asked for."""

    def __init__(self, rows: Sequence, items: list[tuple[int, int]], name: str, coco_dir: Path, ignore: str):
        self.rows, self.items, self.name, self.coco_dir, self.ignore = rows, items, name, coco_dir, ignore

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Sample:
        row, expression = self.items[i]
        try:
            return read_row(self.rows[row], expression, self.coco_dir, self.ignore)
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise UserError(f"--data {self.name}, row {row}: {error!r}") from None

    @property
    def ids(self) -> list[str]:
        return [row_id(self.rows[row], expression) for row, expression in self.items]


# ---------------------------------------------------------------------------------------------------- one row


def expressions(row: dict) -> list[str]:
    """All that a row asks for."""
    if "sentences" in row:  # RefCOCO's sets; `sent` is `raw` in lower case without its signs
        return [s if isinstance(s, str) else s.get("raw") or s["sent"] for s in row["sentences"]]
    if "segmentation" in row and "answer" in row:  # lmms-lab made a captioner's task of it: the expressions are the answers
        return list(row["answer"])
    text = row["text"] if "text" in row else row["problem"]
    return text if isinstance(text, list) else [text]


def row_id(row: dict, expression: int) -> str:
    """The data set's own id of a row, and which of its expressions is meant."""
    return f"{next((row[key] for key in ('ref_id', 'ann_id', 'question_id', 'id', 'image_id') if key in row), '')}-{expression}"


def read_row(row: dict, expression: int, coco_dir: Path, ignore: str) -> Sample:
    """One sample from a row of any layout above, told by its columns."""
    question, name = str(expressions(row)[expression]).strip(), row_id(row, expression)
    if "raw_anns" in row:  # jxu124/* and REFER
        annotation, info = json.loads(row["raw_anns"]), json.loads(row["raw_image_info"])
        image = open_picture(inside(coco_dir, Path(info["file_name"]).name))
        mask = read_mask(annotation["segmentation"], coco_dir, info["height"], info["width"])
        return Sample(image, question, of_size(mask, image), name)
    image = picture_of(row["image"])
    if "shapes" in row:  # ReasonSeg as its authors publish it
        target, undecided = (draw_shapes(row["shapes"], label, image.size) for label in ("target", "ignore"))
        if ignore == "excluded":
            return Sample(image, question, target & ~undecided, name, ignore=undecided)
        return Sample(image, question, target | undecided, name)
    if "mask" in row:  # Ricky06662's evaluation sets: a list of rows of true and false, undecided pixels already true
        if ignore == "excluded":
            raise UserError("--ignore excluded: this copy of the data counts undecided pixels as foreground; name the authors' own folder as --data")
        return Sample(image, question, of_size(np.array(row["mask"], dtype=bool), image), name)
    if "segmentation" in row:
        return Sample(image, question, read_mask(row["segmentation"], coco_dir, image.height, image.width), name)
    return Sample(image, question, filled(box_of(row["solution"]), image.height, image.width), name, box_only=True)


def box_of(solution) -> tuple[float, ...]:
    """A box x1, y1, x2, y2 from four numbers or from Seg-Zero's text "<box>(x1,y1),(x2,y2)</box><points>...</points>"."""
    if isinstance(solution, str):
        solution = solution.partition("<box>")[2].partition("</box>")[0].replace("(", "").replace(")", "").split(",")
    x1, y1, x2, y2 = map(float, solution)
    if not (x1 < x2 and y1 < y2):
        raise ValueError(f"the box {x1:g}, {y1:g}, {x2:g}, {y2:g} is reversed or empty")
    return x1, y1, x2, y2


def of_size(mask: np.ndarray, image: Image.Image) -> np.ndarray:
    if mask.shape != (image.height, image.width):
        raise ValueError(f"the mask is {mask.shape[::-1]}, the picture {image.size}")
    return mask


def picture_of(value) -> Image.Image:
    """A picture from a path, or from {"bytes", "path"} as parquet files hold it."""
    return open_picture(io.BytesIO(value["bytes"]) if isinstance(value, dict) else value)


def draw_shapes(shapes: list[dict], label: str, size: tuple[int, int]) -> np.ndarray:
    """The union of all polygons of one label, bool [H, W]."""
    canvas = Image.new("1", size)
    for shape in shapes:
        if shape["label"].lower() == label and len(shape["points"]) > 1:
            ImageDraw.Draw(canvas).polygon([tuple(p) for p in shape["points"]], fill=1, outline=1)
    return np.array(canvas)


# ---------------------------------------------------------------------------------------------------- COCO's pictures


def fetch_pictures(infos: list[dict], folder: Path, workers: int = 16) -> None:
    """Fetch what `folder` lacks of some COCO pictures, `workers` at a time; a picture gets its name only once it is known to be whole."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {inside(folder, Path(info["file_name"]).name): info for info in infos}
    missing = [(path, info) for path, info in wanted.items() if not path.exists()]

    def fetch(path: Path, info: dict) -> str:
        part = path.with_suffix(".part")
        try:
            with urlopen(info.get("coco_url") or COCO_URL + path.name, timeout=60) as answer:
                part.write_bytes(answer.read())
            if open_picture(part).size != (info["width"], info["height"]):
                raise ValueError("its size is not the one that COCO states")
            part.replace(path)
            return ""
        except (OSError, ValueError) as error:
            part.unlink(missing_ok=True)
            return f"{path.name}: {error}"

    if missing:
        with ThreadPoolExecutor(workers) as pool:
            failed = [text for text in tqdm(pool.map(lambda job: fetch(*job), missing), total=len(missing), desc="pictures") if text]
        if failed:
            raise UserError(f"{len(failed)} of {len(missing)} pictures were not fetched; the others are kept, so run again to go on ({failed[0]})")


# ---------------------------------------------------------------------------------------------------- files


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, texts and numbers; a pickle that asks for a class or a function is refused before anything runs."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only plain values are read")


def refer_rows(folder: Path, refs: Path, split: str) -> list[dict]:
    """REFER's own layout, refs(umd).p or refs(google).p beside instances.json, as rows of the hub's."""
    try:
        with refs.open("rb") as file:
            every = PlainUnpickler(file, encoding="latin1").load()
        known = json.loads((folder / "instances.json").read_text())
        annotations, images = {a["id"]: a for a in known["annotations"]}, {i["id"]: i for i in known["images"]}
        return [
            {"ref_id": r["ref_id"], "sentences": r["sentences"], "raw_anns": json.dumps(annotations[r["ann_id"]]),
             "raw_image_info": json.dumps(images[r["image_id"]])} for r in every if r["split"] == split
        ]
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(f"--data {folder}: {refs.name} with instances.json cannot be read: {error!r}") from None


def json_rows(files: list[Path]) -> list[dict]:
    """ReasonSeg's pairs NAME.jpg and NAME.json, and lists of rows that name pictures beside the list."""
    rows = []
    for file in files:
        try:
            said = json.loads(file.read_text(encoding="utf-8", errors="replace"))
            if isinstance(said, dict):
                rows.append({"id": file.stem, "image": file.with_suffix(".jpg"), "text": said["text"], "shapes": said["shapes"]})
            else:
                rows += [row | {"image": inside(file.parent, row["image"])} for row in said]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: {error!r}") from None
    return rows


SPLIT_NAMES = {"train": {"train"}, "validation": {"validation", "val"}, "test": {"test"}}


def of_split(folder: Path, pattern: str, split: str) -> list[Path]:
    """Files that name the split in their folder or file name. Those that name none are test files: nothing is trained on what it is tested on."""
    files = sorted(folder.rglob(pattern))
    words = [set(re.split("[^a-z]+", str(f.relative_to(folder)).lower())) for f in files]
    mine = [f for f, w in zip(files, words) if w & SPLIT_NAMES[split]]
    return mine or [f for f, w in zip(files, words) if split == "test" and not w & set.union(*SPLIT_NAMES.values())]


def rows_of(name: str, split: str, count: int | None) -> Sequence:
    """The rows of a split, pictures not yet decoded; only the first `count` where the hub can stream them."""
    import datasets

    folder = Path(name)
    if folder.is_dir():
        if refs := sorted(folder.glob("refs(*).p")):
            return refer_rows(folder, refs[-1], {"validation": "val"}.get(split, split))
        if files := of_split(folder, "*.json", split):
            return json_rows(files)
        files = of_split(folder, "*.parquet", split)
        if not files:
            raise UserError(f"--data {name}: no data.jsonl in this folder, nor files of a public data set with a {split} split")
        rows = datasets.load_dataset("parquet", data_files=list(map(str, files)), split="train")
    elif split not in HUB[name]:
        raise UserError(f"--data {name} has no {split} split, only {', '.join(HUB[name])}" + "; train.py takes another set with --eval-data" * (split != "train"))
    else:
        hub_id, hub_split = HUB[name][split]
        try:
            rows = datasets.load_dataset(hub_id, split=hub_split, streaming=count is not None and not hub_id.startswith("jxu124/"))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"--data {name}: the hub does not give {hub_id} ({str(error).splitlines()[0]})") from None
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):  # decoded when asked for: 779 decoded pictures are gigabytes
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return list(rows.take(count)) if isinstance(rows, datasets.IterableDataset) else rows


def load_public(name: str, split: str, count: int, seed: int, sentences: str, coco_dir: str, ignore: str) -> Public:
    """`count` samples of a split: drawn with `seed` for train, else the first ones. Fetches the pictures that are COCO's."""
    rows = rows_of(name, split, None if split == "train" else count)
    if not len(rows):
        raise UserError(f"--data {name} has no row in its {split} split")
    first = rows[0]
    try:
        expressions(first)
        items = [(i, k) for i in range(len(rows)) for k in range(len(expressions(rows[i])) if sentences == "all" else 1)]
    except LookupError:
        raise UserError(f"--data {name}: columns {', '.join(first)} are none of the layouts that are known") from None
    if split == "train":  # each pass over the rows in a new order, until there are enough
        rng = random.Random(seed)
        items = [item for _ in range(-(-count // len(items))) for item in rng.sample(items, len(items))]
    items = items[:count]
    if "raw_anns" in first and not coco_dir:
        fetch_pictures([json.loads(rows[i]["raw_image_info"]) for i in dict.fromkeys(i for i, _ in items)], PICTURES)
    return Public(rows, items, name, Path(coco_dir) if coco_dir else PICTURES, ignore)
