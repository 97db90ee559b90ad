"""Public data sets, by name from the hub (HUB) or from a folder with their files, in the layouts in which they are
published. A layout is told by the column that holds the truth:

    raw_anns      jxu124's sets, and REFER's refs(...).p with instances.json; COCO's pictures are fetched one by one
    segmentation  lmms-lab/RefCOCOg: polygons
    mask          Ricky06662's and sj9909's sets: [H, W] of true and false
    shapes        ReasonSeg's .jpg and .json pairs, as its authors publish it
    solution      boxes and no masks: refCOCOg_*_840, and JSON lists of {"image", "problem", "solution": [x1, y1, x2,
                  y2]}, as LISA-Grounding comes

Nothing that comes with data is run: pickles may hold plain values only.
"""

import hashlib
import io
import json
import os
import pickle
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image, ImageDraw
from tqdm import tqdm

from ..config import CACHE, UserError, first_line
from ..metrics import filled
from .fetch import fetch_pictures, is_there, picture_name
from .samples import Data, Sample, draw, inside, of_size, open_picture, plain, read_mask

# Name on the command line: for each split, the hub's id and what that split is called there.
HUB = {
    **{name: {split: (f"jxu124/{name}", split) for split in ("train", "validation", "test")}
       for name in ("refcocog", "refcoco", "refcocoplus")},
    "lmms-lab/RefCOCOg": {"validation": ("lmms-lab/RefCOCOg", "val"), "test": ("lmms-lab/RefCOCOg", "test")},
    "reasonseg": {"validation": ("Ricky06662/ReasonSeg_val", "test"), "test": ("Ricky06662/ReasonSeg_test", "test")},
    "reasonseg-r": {"test": ("sj9909/ReasonSeg_refine", "test")},
    "reasonseg-x": {"train": ("sj9909/ReasonSegX_train", "train"), "validation": ("sj9909/ReasonSegX_val", "test"),
                    "test": ("sj9909/ReasonSegX_test", "test")},
    **{name: {"test": (f"Ricky06662/{name}", "test")}
       for name in ("refcoco_testA", "refcocoplus_testA", "refcocog_test")},
    **{name: {"train": (f"Ricky06662/{name}", "train")} for name in ("refCOCOg_2k_840", "refCOCOg_9k_840")},
}
PICTURES = CACHE / "train2014"  # COCO's pictures that were fetched
TABLES = CACHE / "tables"  # rows of parquet files, to be read one at a time; a set of the hub is looked up only once
COCO_URL = "http://images.cocodataset.org/train2014/"  # no address that comes with data is ever opened
COCO_BYTES = 165_000  # of a picture, on average: train2014.zip has 82,783 in 13.5 GB


class Public(Data):
    """`count` questions of a public set; a picture and its mask are read when asked for.

    `items` are (row, expression) pairs; `pictures` are each row's (name, (width, height)), if they are COCO's.
    """

    def __init__(self, name: str, split: str, count: int, seed: int | None, sentences: str, coco_dir: str, ignore: str):
        self.name, self.split, self.count, self.seed = name, split, count, seed
        self.sentences, self.ignore, self.missing = sentences, ignore, []
        self.coco_dir, self.fetches = Path(coco_dir or PICTURES), not coco_dir
        self.rows = open_rows(name, split)
        columns = self.rows.names if isinstance(self.rows, Table) else list(self.rows[0]) if self.rows else ()
        self.layout = layout_of(columns)
        self.box_only = self.layout == "solution"
        if columns and not self.layout:
            raise UserError(f"--data {name}: columns {', '.join(columns)} are none of the layouts that are known")
        if self.layout == "mask" and ignore == "excluded":
            raise UserError(f"--ignore excluded: this copy of {name} counts undecided pixels as foreground; "
                            "name the authors' own folder as --data")
        if self.layout == "raw_anns" and not self.fetches:
            if not self.coco_dir.is_dir():
                raise UserError(f"--coco-dir {coco_dir}: no such folder")
            if lacking := self.lacking():
                raise UserError(f"--coco-dir {coco_dir} lacks {len(lacking)} of the pictures wanted, as {lacking[0]}")
        if self.layout == "raw_anns" or Path(name).is_dir():  # rows that are small, or here, are looked at now
            self.items

    @cached_property
    def items(self) -> list[tuple[int, int]]:
        if not len(self.rows):
            raise UserError(f"--data {self.name} has no row in its {self.split} split")
        if self.sentences == "all":
            every = [(i, k) for i, row in enumerate(columns_of(self.rows, TEXTS)) for k in range(len(expressions(row)))]
        else:
            every = [(i, 0) for i in range(len(self.rows))]
        if not every:
            raise UserError(f"--data {self.name}: no row in its {self.split} split asks for anything")
        missing = {name for name, _ in self.pictures} & set(self.missing)
        drawn = draw(every, self.split, self.count, self.seed)
        return list(islice((x for x in drawn if not missing or self.pictures[x[0]][0] not in missing), self.count))

    @cached_property
    def pictures(self) -> list[tuple[str, tuple[int, int]]]:
        rows = columns_of(self.rows, ("raw_image_info",)) if self.layout == "raw_anns" else []
        try:
            infos = [json.loads(row["raw_image_info"]) for row in rows]
            return [(picture_name(info["file_name"]), (info["width"], info["height"])) for info in infos]
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"--data {self.name}: a row's raw_image_info cannot be used: {error!r}") from None

    def wanted(self) -> dict[str, tuple[int, int]]:
        return dict(self.pictures[row] for row, _ in self.items if self.pictures)

    def lacking(self) -> list[str]:
        return [name for name in self.wanted() if not is_there(self.coco_dir / name)]

    @property
    def download_bytes(self) -> int:
        if self.layout == "raw_anns":
            return COCO_BYTES * len(self.lacking())
        return self.rows.download_bytes if isinstance(self.rows, Table) else 0

    def fetch(self, missing: Sequence[str] = ()) -> None:
        """Download rows and pictures. Of these 1 % may be impossible to have: the next rows drawn take their places."""
        self.missing = list(dict.fromkeys([*self.missing, *missing]))
        self.__dict__.pop("items", None)
        wanted, failed = self.wanted(), {}
        allowed = len(wanted) // 100
        while self.fetches and (new := fetch_pictures(self.wanted(), self.coco_dir, COCO_URL, allowed - len(failed))):
            failed |= new
            self.missing += new
            del self.items  # drawn anew, and pictures of the rows that moved up may be missing too
        if failed:
            short = len(self) < self.count
            so = f"{len(self)} questions are left" if short else "the next rows drawn have their places"
            reasons = ", ".join(f"{name} ({reason})" for name, reason in failed.items())
            print(f"--data {self.name}: {len(failed)} of {len(wanted)} pictures could not be had, so {so}: {reasons}")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Sample:
        row, expression = self.items[i]
        try:
            return read_row(self.rows[row], expression, self.layout, self.coco_dir, self.ignore)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise UserError(f"--data {self.name}, row {row}: {error!r}") from None

    @property
    def ids(self) -> list[str]:
        names = columns_of(self.rows, IDS)
        return [row_id(names[row], expression) for row, expression in self.items]


# ---------------------------------------------------------------------------------------------------- one row


TEXTS = ("sentences", "answer", "text", "problem")  # lmms-lab made a captioning task of it: expressions are answers
IDS = ("ref_id", "ann_id", "question_id", "id", "image_id")


def layout_of(columns: Sequence[str]) -> str:
    """The column in which rows of these columns have their truth, "" where none is known."""
    whole = {*TEXTS} & {*columns} and {"image", "raw_image_info"} & {*columns}
    return next((c for c in ("raw_anns", "shapes", "mask", "segmentation", "solution") if whole and c in columns), "")


def expressions(row: dict) -> list[str]:
    """All that a row asks for."""
    if "sentences" in row:  # RefCOCO's sets; `sent` is `raw` in lower case without its signs
        return [s if isinstance(s, str) else s.get("raw") or s["sent"] for s in row["sentences"]]
    text = next(row[key] for key in TEXTS if key in row)
    return text if isinstance(text, list) else [text]


def row_id(row: dict, expression: int) -> str:
    """The data set's own id of a row, and which of its expressions is meant."""
    return f"{next((row[key] for key in IDS if key in row), '')}-{expression}"


def read_row(row: dict, expression: int, layout: str, coco_dir: Path, ignore: str) -> Sample:
    """One sample from a row of any layout above."""
    question, name = plain(expressions(row)[expression]), row_id(row, expression)
    if layout == "raw_anns":
        annotation, info = json.loads(row["raw_anns"]), json.loads(row["raw_image_info"])
        file = picture_name(info["file_name"])
        image = open_picture(coco_dir / file)
        mask = read_mask(annotation["segmentation"], coco_dir, info["height"], info["width"])
        return Sample(image, question, of_size(mask, image.height, image.width), name, picture=file)
    image, ignored = row["image"], None  # {"bytes", "path"} as parquet files hold it, or a Path from json_rows
    if isinstance(image, str):
        raise ValueError(f"a picture in a table is its bytes; no path that comes with data is opened, as {image}")
    image = open_picture(io.BytesIO(image["bytes"]) if isinstance(image, dict) else image)
    if layout == "shapes":
        mask, undecided = draw_shapes(row["shapes"], image.size)
        mask, ignored = (mask, undecided) if ignore == "excluded" else (mask | undecided, None)
    elif layout == "mask":  # undecided pixels are already true
        mask = of_size(np.asarray(row["mask"], dtype=bool), image.height, image.width)
    elif layout == "segmentation":
        mask = read_mask(row["segmentation"], coco_dir, image.height, image.width)
    else:
        mask = filled(box_of(row["solution"]), image.height, image.width)
    kind = str(row.get("reasoning_type") or "")
    return Sample(image, question, mask, name, kind, ignored, layout == "solution", picture_id(row, name))


def picture_id(row: dict, name: str) -> str:
    """What tells a row's picture from others: COCO's file name, an id or a path. Without any, it is the row's own."""
    path = row["image"]["path"] if isinstance(row["image"], dict) else row["image"]
    coco_name = re.search(r"COCO_train2014_\d+", f"{row.get('file_name', '')} {path}")
    return coco_name[0] + ".jpg" if coco_name else str(row.get("image_id") or path or name)


def box_of(solution) -> tuple[float, ...]:
    """A box x1, y1, x2, y2 from four numbers or from Seg-Zero's "<box>(x1,y1),(x2,y2)</box><points>...</points>"."""
    if isinstance(solution, str):
        solution = solution.partition("<box>")[2].partition("</box>")[0].replace("(", "").replace(")", "").split(",")
    x1, y1, x2, y2 = map(float, solution)
    if not (x1 < x2 and y1 < y2):
        raise ValueError(f"the box {x1:g}, {y1:g}, {x2:g}, {y2:g} is reversed or empty")
    return x1, y1, x2, y2


def draw_shapes(shapes: list[dict], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """What is meant and what is undecided, two bool [H, W], as ReasonSeg's authors (LISA) draw them: polygons from the
    largest to the smallest, each over those before; a label with "ignore" in it is undecided, all but "flag" is meant.
    """
    parts, labels = [], np.zeros(size[::-1], np.uint8)
    for shape in shapes:
        label, canvas = shape["label"].lower(), Image.new("1", size)
        if label != "flag" and len(shape["points"]) > 1:
            ImageDraw.Draw(canvas).polygon([tuple(p) for p in shape["points"]], fill=1, outline=1)
            parts.append((np.array(canvas), 2 if "ignore" in label else 1))
    for part, value in sorted(parts, key=lambda x: -x[0].sum()):
        labels[part] = value
    return labels == 1, labels == 2


# ---------------------------------------------------------------------------------------------------- files


class PlainUnpickler(pickle.Unpickler):
    """Reads plain values; a pickle that asks for a class or a function is refused before anything runs."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only plain values are read")


def refer_rows(folder: Path, refs: Path, split: str) -> list[dict]:
    """REFER's own layout, refs(umd).p or refs(google).p beside instances.json, as rows of the hub's."""
    try:
        with refs.open("rb") as file:
            every = PlainUnpickler(file, encoding="latin1").load()
        known = json.loads((folder / "instances.json").read_text())
        annotations, images = {a["id"]: a for a in known["annotations"]}, {i["id"]: i for i in known["images"]}
        if split == "test" and not any(r["split"] == "test" for r in every):  # RefCOCO and RefCOCO+ have two
            split = "testA"
        return [
            {"ref_id": r["ref_id"], "sentences": r["sentences"], "raw_anns": json.dumps(annotations[r["ann_id"]]),
             "raw_image_info": json.dumps(images[r["image_id"]])} for r in every if r["split"] == split
        ]
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(f"--data {folder}: {refs.name} with instances.json cannot be read: {error!r}") from None


def letters(file: Path) -> str:
    """The text of a file in UTF-8, or, as some of ReasonSeg's are, in Windows' Latin letters."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return file.read_text(encoding="cp1252")


def json_rows(files: list[Path]) -> list[dict]:
    """ReasonSeg's pairs NAME.jpg and NAME.json, and lists of rows that name pictures beside the list."""
    rows = []
    for file in files:
        try:
            content = json.loads(letters(file))
            if isinstance(content, dict):
                image = file.with_suffix(".jpg")
                new = [{"id": file.stem, "image": image, "text": content["text"], "shapes": content["shapes"]}]
            else:
                new = [row | {"image": inside(file.parent, row["image"])} for row in content]
            if lost := [row["image"] for row in new if not row["image"].is_file()]:
                raise ValueError(f"{lost[0]} is not there")
            rows += new
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is no list of a public set, nor such a picture's text ({error!r})") from None
    return rows


SPLIT_NAMES = {"train": {"train"}, "validation": {"validation", "val"}, "test": {"test"}}


def of_split(folder: Path, pattern: str, split: str) -> list[Path]:
    """Files of a split. The first part of a path that names one decides (a set that is for validation alone may call
    its only file test.parquet). Those that name none are for testing alone."""
    # LISA's explanatory answers are texts
    files = [f for f in sorted(folder.rglob(pattern)) if "explanatory" not in f.relative_to(folder).parts]
    every = set.union(*SPLIT_NAMES.values())
    words = lambda part: every & set(re.split("[^a-z]+", part.lower()))
    named = {f: next(filter(None, map(words, f.relative_to(folder).parts)), set()) for f in files}
    return ([f for f in files if named[f] & SPLIT_NAMES[split]]
            or [f for f in files if split == "test" and not named[f]])


class Table(Sequence):
    """Rows of parquet files, here or on the hub, one read at a time from an arrow file that is made of them once.

    A mask [H, W] goes straight from arrow's bits to numpy: as lists of Python's True and False it would take megabytes.
    """

    def __init__(self, name: str, files: list[str], file: Path):
        self.name, self.files, self.file = name, files, file
        if file.exists():
            self.names = self.table.column_names
        else:
            with fsspec.open(files[0]) as first:  # of a file on the hub, the last bytes alone are read
                self.names = pyarrow.parquet.read_schema(first).names

    @property
    def download_bytes(self) -> int:
        return 0 if self.file.exists() else sum(hub.size(path) for hub, path in map(fsspec.core.url_to_fs, self.files))

    @cached_property
    def table(self) -> pyarrow.Table:
        part = self.file.with_suffix(f".{os.getpid()}.part")
        try:
            if not self.file.exists():
                import datasets  # imported late: it takes a second to load

                self.file.parent.mkdir(parents=True, exist_ok=True)
                write_table(datasets.DownloadManager().download(self.files), part, self.name)
                part.replace(self.file)
            return pyarrow.ipc.open_file(pyarrow.memory_map(str(self.file))).read_all()
        except Exception as error:  # the hub's libraries raise what their own libraries raise
            raise UserError(f"--data {self.name}, {self.file.parent}: {first_line(error)}") from None
        finally:
            part.unlink(missing_ok=True)

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, i: int) -> dict:
        row = dict(zip(self.names, (column[i] for column in self.table.columns)))
        return {name: bits(value) if name == "mask" else value.as_py() for name, value in row.items()}


def bits(mask) -> np.ndarray:
    """An arrow list of H lists of W booleans as bool [H, W]."""
    lines = mask.values
    return lines.flatten().to_numpy(zero_copy_only=False).reshape(len(lines), -1)


def columns_of(rows: Sequence[dict], wanted: Sequence[str]) -> list[dict]:
    """Some columns of every row, without a look at pictures and masks."""
    if not isinstance(rows, Table):
        return rows
    return rows.table.select([name for name in rows.names if name in wanted]).to_pylist()


def write_table(files: list[str], file: Path, name: str) -> None:
    """The rows of parquet files as one arrow file, a few at a time: unpacking a hundred masks takes a gigabyte."""
    parts = [pyarrow.parquet.ParquetFile(f) for f in files]
    schema, count = parts[0].schema_arrow, sum(p.metadata.num_rows for p in parts)
    bar = tqdm(total=count, desc=f"rows of {name}", dynamic_ncols=True, leave=False)
    with bar, pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:
        for part in parts:
            for batch in part.iter_batches(batch_size=4 if "mask" in schema.names else 256):
                writer.write_batch(batch)
                bar.update(batch.num_rows)


def open_rows(name: str, split: str) -> Sequence[dict]:
    """The rows of a split, pictures not yet decoded, and not yet downloaded where they are the hub's."""
    folder = Path(name)
    if folder.is_dir():
        if refs := sorted(folder.glob("refs(*).p")):
            return refer_rows(folder, refs[-1], {"validation": "val"}.get(split, split))
        files = of_split(folder, "*.parquet", split)
        if not files and (listed := of_split(folder, "*.json", split)):  # beside parquet files they describe these
            return json_rows(listed)
        if not files:
            raise UserError(f"--data {name}: this folder has no data.jsonl, nor files of a set with a {split} split")
        known = repr([(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files])
        place, find = hashlib.sha256(known.encode()).hexdigest()[:24], lambda: list(map(str, files))
        failure = "no table can be read"
    elif split not in HUB[name]:
        other = "; train.py takes another set with --eval-data, eval.py another --split" * (split != "train")
        raise UserError(f"--data {name} has no {split} split, only {', '.join(HUB[name])}{other}")
    else:
        hub_id, hub_split = HUB[name][split]
        place, find = f"{hub_id}--{hub_split}".replace("/", "--"), lambda: hub_files(hub_id, hub_split)
        failure = f"the hub does not give {hub_id}"
    file = TABLES / f"{place}.arrow"
    try:  # a table that is there is read without a look at the hub, which may be out of reach
        return Table(name, [] if file.exists() else find(), file)
    except UserError:
        raise
    except Exception as error:  # the hub's libraries raise what their own libraries raise
        raise UserError(f"--data {name}: {failure} ({first_line(error)})") from None


def hub_files(hub_id: str, split: str) -> list[str]:
    """The parquet files of a split; those of the only split, where a repository has one and calls it otherwise."""
    import datasets

    splits = {str(name): list(files) for name, files in datasets.load_dataset_builder(hub_id).config.data_files.items()}
    if split not in splits and len(splits) > 1:
        raise UserError(f"{hub_id} on the hub has no {split} split, only {', '.join(splits)}")
    return splits.get(split) or next(iter(splits.values()))
