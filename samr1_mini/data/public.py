"""Public data sets, by name from the hub (HUB) or from a folder with their files.

A set is converted once into a folder in the cache. It holds data.jsonl, source.json, and the
pictures that were inside tables. folder.py reads it. layouts.py has the layouts. No code from data
files is run: pickles may hold plain values only.
"""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
from huggingface_hub.constants import HF_HUB_CACHE
from tqdm import tqdm

from ..config import CACHE, UserError, cause, first_line, parse_json
from ..files import Download, check_content, check_disk_space, load_json, write_json
from . import download
from .folder import BROKEN, SPLIT_NAMES, Folder, check_against_picture, check_texts
from .layouts import convert_row, layout_of, pictures_beside
from .masks import check_truth
from .pictures import read_header

SETS = CACHE / "sets"  # converted sets, so that each set is converted only once
VERSION = 1  # version of the conversion; sets of another version are converted again
TEST_A = "the test split is testA; testB is not used"
ROWS = 16  # number of rows of a table that are in memory at once, because masks are large

# Name on the command line -> split -> (id of the repository on the hub, name of the split there).
JXU124 = ("train", "validation", "test")
HUB = {
    "refcocog": {split: ("jxu124/refcocog", split) for split in JXU124},
    "refcoco": {split: ("jxu124/refcoco", split) for split in JXU124},
    "refcocoplus": {split: ("jxu124/refcocoplus", split) for split in JXU124},
    "lmms-lab/RefCOCOg": {
        "validation": ("lmms-lab/RefCOCOg", "val"),
        "test": ("lmms-lab/RefCOCOg", "test"),
    },
    "reasonseg": {
        "validation": ("Ricky06662/ReasonSeg_val", "test"),
        "test": ("Ricky06662/ReasonSeg_test", "test"),
    },
    "reasonseg-r": {"test": ("sj9909/ReasonSeg_refine", "test")},
    "reasonseg-x": {
        "train": ("sj9909/ReasonSegX_train", "train"),
        "validation": ("sj9909/ReasonSegX_val", "test"),
        "test": ("sj9909/ReasonSegX_test", "test"),
    },
    "refcoco_testA": {"test": ("Ricky06662/refcoco_testA", "test")},
    "refcocoplus_testA": {"test": ("Ricky06662/refcocoplus_testA", "test")},
    "refcocog_test": {"test": ("Ricky06662/refcocog_test", "test")},
    "refCOCOg_2k_840": {"train": ("Ricky06662/refCOCOg_2k_840", "train")},
    "refCOCOg_9k_840": {"train": ("Ricky06662/refCOCOg_9k_840", "train")},
    "refcocolvis": {
        "train": ("sj9909/visionreasoner_multi_object_refcocolvis_masks_840", "train"),
    },
}


@dataclass
class Source:
    """The arguments that identify a converted set."""

    name: str  # on the command line: a set, or a folder with its files
    split: str
    sentences: str  # of an object: "first" or "all"
    ignore: str  # undecided pixels: "foreground" or "excluded"


def open_public(source: Source, count: int, seed: int | None, coco_dir: str) -> Folder:
    """Open a public set by its name, or from a folder with its files. Convert a new set first."""
    name, split = source.name, source.split
    if coco_dir and not Path(coco_dir).is_dir():
        raise UserError(
            f"--coco-dir {coco_dir}: no such folder; give the folder of COCO's train2014 pictures"
        )
    files, doubts = find_files(name, split) if Path(name).is_dir() else ([], [])
    known = []
    for file in watched(files):
        state = file.stat()
        known.append((str(file.resolve()), state.st_size, state.st_mtime_ns))
    if files and is_labelme(files[0]):  # the splits are in the names of folders
        known.append([str(file.resolve()) for file in files])
    key = repr([VERSION, known or hub_place(name, split), source.sentences, source.ignore])
    folder = SETS / f"{Path(name).name}-{split}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    if not folder.is_dir():
        convert(source, files, folder)
    converted = load_json(folder / "source.json")
    pictures, broken = Path(converted["pictures"] or folder), converted["left_out"]
    needs_coco = converted["pictures"] == "coco"
    if needs_coco:
        pictures = Path(coco_dir or download.PICTURES)
    found = Folder(folder, split, count, seed, pictures, downloads=needs_coco and not coco_dir)
    if broken:
        found.warnings.append(
            f"--data {name}: {len(broken)} broken rows are left out. The first is {broken[0]}"
        )
    found.warnings += [f"--data {name}: {doubt}" for doubt in doubts]
    if needs_coco and coco_dir:
        check_coco_dir(found)
    return found


def check_coco_dir(data: Folder) -> None:
    """Refuse a folder of COCO's pictures that lacks pictures of the chosen questions."""
    names = sorted({line.image for line in data.distinct_lines()})
    lacking = [name for name in names if not download.is_there(data.pictures / name)]
    if lacking:
        raise UserError(
            f"--coco-dir {data.pictures} lacks {len(lacking)} pictures, for example {lacking[0]}; add "
            "them, or leave --coco-dir out"
        )


# -------------------------------------------------------------------------------- conversion


def convert(source: Source, files: list[Path], folder: Path) -> None:
    """Write a set's folder: data.jsonl, pictures and source.json, whole or not at all.

    `files` are local files of the set. Without `files`, the set is downloaded from the hub. Broken
    rows are left out and listed, if they are no more than one in a hundred. Raises UserError.
    """
    name, part = source.name, folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        (part / "pictures").mkdir(parents=True, exist_ok=True)
        rows = read_rows(files or hub_files(source), source)
        bar = tqdm(rows, f"rows of {name}", leave=False, dynamic_ncols=True)
        found = write_lines(bar, source, part)
        if not found["rows"]:
            raise UserError(
                f"--data {name} has no row in its {source.split} split; use another --data"
            )
        broken = found["left_out"]
        if 100 * len(broken) > found["rows"]:
            raise UserError(
                f"--data {name}: {len(broken)} of {found['rows']} rows are broken; repair the files. "
                f"The first is {broken[0]}"
            )
        write_json(part / "source.json", asdict(source) | found)
        try:
            part.rename(folder)
        except OSError:  # another process may have converted the set first
            if not folder.is_dir():
                raise
    except UserError:
        raise
    except Exception as error:  # libraries of the hub, of parquet and of pickles raise anything
        raise UserError(f"--data {name}, {folder.parent}: {first_line(error)}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_lines(rows: Iterator, source: Source, part: Path) -> dict:
    """Convert rows to lines of data.jsonl, and store their pictures, in the folder `part`.

    Returns the row count, the broken rows and the picture folder, for source.json. The picture
    folder is "" (the converted folder), "coco" (train2014), or the folder of the set's files.
    """
    count, left_out, place = 0, [], ""
    with (part / "data.jsonl").open("w", encoding="utf-8") as out:
        for where, row in rows:
            count += 1
            try:
                lines = convert_row(row, where, source.sentences, source.ignore)
                image = lines[0]["image"]
                for line in lines:
                    place = finish_line(line, Path(source.name))
            except BROKEN as error:
                left_out.append(f"{where}: {cause(error)}")
                continue
            if isinstance(image, bytes):
                (part / lines[0]["image"]).write_bytes(image)
            for line in lines:
                out.write(json.dumps(line | {"split": source.split}) + "\n")
    return {"rows": count, "left_out": left_out, "pictures": place}


def finish_line(line: dict, root: Path) -> str:
    """Check a line, and replace its picture by the picture's path and size.

    `root` is the folder of the set's files. Returns the picture folder in the form that write_lines
    returns. Pictures inside tables are named by their hash, so equal pictures are stored once.
    """
    if "size" in line:
        check_texts(line)
        check_truth(line, line["size"])
        return "coco"
    image = line["image"]
    if isinstance(image, bytes):
        place, header = "", read_header(io.BytesIO(image))
        name = hashlib.sha256(image).hexdigest()[:16]
        line["image"] = f"pictures/{name}.{header.format.lower()}"
    else:
        place, header = str(root.absolute()), read_header(image)
        line["image"] = image.relative_to(root).as_posix()
    check_texts(line)
    check_against_picture(line, header, root, True)
    line["size"] = header.size
    return place


# -------------------------------------------------------------------------------- rows


def read_rows(files: list, source: Source) -> Iterator[tuple[str, dict]]:
    """Yield each row of a split with its location, from any of the published file formats.

    Raises UserError, which names the file that cannot be read.
    """
    for file in map(Path, files):
        check_content(file)
        try:
            if file.suffix == ".p" or file.name.startswith("grefs("):
                yield from refer_rows(file, source.split)
            elif file.suffix == ".json":
                yield from json_rows(file)
            else:  # the hub's cache has names without an ending
                yield from parquet_rows(file, source.ignore)
        except UserError:
            raise
        except Exception as error:  # a damaged pickle or table raises anything
            raise UserError(f"{file} cannot be read ({cause(error)}); download it again") from None


def parquet_rows(file: Path, ignore: str) -> Iterator[tuple[str, dict]]:
    """Yield the rows of a table.

    A mask comes as one array for each row of pixels. Python's lists would take megabytes.
    """
    table = pyarrow.parquet.ParquetFile(file)
    columns = table.schema_arrow.names
    layout_of(columns, ignore)  # raises UserError for other columns, before any row is converted
    number = 0
    for batch in table.iter_batches(ROWS):
        for i in range(batch.num_rows):
            row = {name: cell_value(name, batch.column(name)[i]) for name in columns}
            number += 1
            yield f"{file.name} row {number}", row


def cell_value(name: str, cell: pyarrow.Scalar):
    """Return a cell of an arrow table as a Python value. A mask is one array [W] for each row."""
    if isinstance(cell, pyarrow.ListScalar) and cell.is_valid:
        if name == "mask":
            return cell.values.to_numpy(zero_copy_only=False)
        if name == "solution_mask":
            return [cell_value("mask", mask) for mask in cell.values]
    return cell.as_py()


class PlainUnpickler(pickle.Unpickler):
    """Read a pickle of plain values.

    A pickle that needs a class or a function is refused before any code runs.
    """

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(
            f"the pickle needs {module}.{name}, which may run foreign code"
        )


def refer_rows(file: Path, split: str) -> Iterator[tuple[str, dict]]:
    """Yield the rows of REFER's refs(umd).p or refs(google).p, or of gRefCOCO's grefs(unc).json,
    with the annotations of instances.json.
    """
    if file.suffix == ".json":
        refs = load_json(file, list)
    else:
        with file.open("rb") as opened_file:
            refs = PlainUnpickler(opened_file, encoding="latin1").load()
    known = load_json(file.parent / "instances.json")
    annotations = {one["id"]: one for one in known["annotations"]}
    infos = {one["id"]: one for one in known["images"]}
    wanted = "val" if split == "validation" else split
    if split == "test" and all(ref["split"] != "test" for ref in refs):
        wanted = "testA"  # RefCOCO and RefCOCO+ have testA and testB
    for number, ref in enumerate(refs, 1):
        if ref["split"] == wanted:
            row = ref | {"info": infos.get(ref.get("image_id"))}
            ids = ref.get("ann_id")
            if isinstance(ids, list):
                row["annotations"] = [annotations.get(one) for one in ids if one != -1]
            else:
                row["annotation"] = annotations.get(ids)
            yield f"{file.name} row {number}", row


def json_rows(file: Path) -> Iterator[tuple[str, dict]]:
    """Yield the row of a labelme file, or the rows of a list of boxes.

    Pictures are beside the file.
    """
    content = parse_json(read_text(file), file, (dict, list), "save the file again")
    if isinstance(content, dict) and "shapes" in content:
        yield str(file), content | {"file": file}
    elif is_box_list(content):
        for number, row in enumerate(content, 1):
            yield f"{file.name} row {number}", row | {"list": file}
    else:
        raise UserError(
            f"{file} is not a labelme file, and not a list of boxes like "
            '[{"image": "1.jpg", "problem": "the cup", "solution": [x1, y1, x2, y2]}]. '
            "For your own data, write a folder with data.jsonl"
        )


def is_box_list(content) -> bool:
    """Return True if JSON holds a list of objects as LISA-Grounding has them."""
    if not isinstance(content, list) or not content:
        return False
    keys = {"image", "problem", "solution"}
    return all(isinstance(row, dict) and keys <= set(row) for row in content)


def read_text(file: Path) -> str:
    """Read a text file as UTF-8, or as Windows-1252, which some ReasonSeg files use."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return file.read_text(encoding="cp1252", errors="replace")


# -------------------------------------------------------------------------------- files


def find_files(name: str, split: str) -> tuple[list[Path], list[str]]:
    """Return the files of a split of a set in the folder `name`, and warnings about the split.

    If the word test is in no path, the files without the name of a split are for testing. Raises
    UserError if there are no files for `split`.
    """
    folder = Path(name)
    refs = sorted(folder.glob("refs(*).p")) or sorted(folder.glob("grefs(*).json"))
    doubts = []
    if refs:
        if split == "test" and "(unc)" in refs[-1].name:
            doubts.append(TEST_A)
        return refs[-1:], doubts
    files = {}
    # In a folder with parquet files, JSON files only describe these.
    for file in files_in(folder, ".parquet") or files_in(folder, ".json"):
        named = file.relative_to(folder)
        # A labelme file is named like its picture, so only folders name the split.
        if is_labelme(file):
            named = named.parent
        if "testb" in re.split("[^a-z]+", named.as_posix().lower()):
            doubts = [TEST_A] if split == "test" else []
            continue
        files.setdefault(split_in(named), []).append(file)
    unnamed = files.pop(None, [])
    if split == "test" and unnamed and "test" not in files:
        if files:
            doubts.append(
                f"{len(unnamed)} files have no split in their path, and are used for test"
            )
        files["test"] = unnamed
    if not files:
        for other in folder.rglob("*.jsonl*"):
            raise UserError(
                f"--data {name} has no data.jsonl, but {other}. Name the folder of this file, and "
                "call the file data.jsonl"
            )
    if not files.get(split):
        raise UserError(
            f"--data {name}: this folder has neither data.jsonl nor files of a {split} split. The "
            "path of a table or labelme file, inside this folder, must contain train, validation or test"
        )
    refuse_missing_parts(files[split])
    return files[split], doubts


def refuse_missing_parts(files: list[Path]) -> None:
    """Raise UserError for tables in parts (test-00000-of-00002.parquet) that are not complete."""
    parts = {}
    for file in files:
        found = re.match(r"(.*?)(\d+)-of-(\d+)", file.name)
        if found:
            start, number, count = found.groups()
            parts.setdefault((file.parent / start, int(count)), []).append(int(number))
    for (start, count), numbers in parts.items():
        if sorted(numbers) != list(range(count)):
            raise UserError(
                f"{start}...-of-{count:05}: a part is missing, or there twice; download the parts again"
            )


def is_labelme(file: Path) -> bool:
    """Return True for a JSON file with a picture of the same name beside it."""
    return file.suffix == ".json" and bool(pictures_beside(file))


def split_in(path: Path) -> str | None:
    """Return the first split named in a path, or None. val/test.parquet is for validation.

    The words training and testing count only if there is no other word: training_data/val.json is
    for validation. The word eval can mean validation or test, so it does not count.
    """
    words = re.split("[^a-z]+", path.as_posix().lower())
    named = [word for word in words if word in SPLIT_NAMES and not word.startswith("eval")]
    sure = [word for word in named if word not in ("training", "testing")]
    for word in sure or named:
        return SPLIT_NAMES[word]
    return None


def files_in(folder: Path, ending: str) -> list[Path]:
    """Return all files with this ending in a folder tree, except hidden ones.

    Links are followed, and each file comes once. Raises UserError for a broken link.
    """
    found, seen = {}, set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen:
            folders.clear()  # a link leads back to a folder that was searched before
            continue
        seen.add(os.path.realpath(place))
        # LISA's folder "explanatory" holds answers in words.
        folders[:] = [one for one in folders if one[0] != "." and one != "explanatory"]
        for name in names:
            file = Path(place, name)
            if not name.endswith(ending) or name.startswith("."):
                continue
            if not file.is_file():
                raise UserError(f"{file} is a broken link; copy the file itself")
            found.setdefault(file.resolve(), file)
    return sorted(found.values())


def watched(files: list[Path]) -> list[Path]:
    """Return the files that a converted set depends on.

    Parquet files depend on no others. Pickles and JSON files depend on all files beside them.
    """
    if not files or files[0].suffix == ".parquet":
        return files
    found = []
    for folder in dict.fromkeys(file.parent for file in files):
        for file in sorted(folder.iterdir()):
            # Systems write hidden files such as .DS_Store.
            if file.is_file() and not file.name.startswith(".") and file.name != "Thumbs.db":
                found.append(file)
    return found


def hub_place(name: str, split: str) -> tuple[str, str]:
    """Return the set's repository id on the hub, and the hub's name for this split.

    Raises UserError for an unknown set, or a split that it lacks.
    """
    if Path(name).is_file():
        raise UserError(f"--data {name} is a file; name its folder")
    if name not in HUB:
        raise UserError(
            f"--data {name} is unknown; write shapes, a public data set ({', '.join(HUB)}), or a "
            "folder"
        )
    if split in HUB[name]:
        return HUB[name][split]
    other = ""
    if split != "train":
        other = "; in train.py name another set with --eval-data, in eval.py another --split"
    raise UserError(f"--data {name} has no {split} split, only {', '.join(HUB[name])}{other}")


def hub_files(source: Source) -> list[str]:
    """Download the parquet files of a split, and return their paths.

    If the hub has only one split, its name does not matter. Columns and disk space are checked
    before the download.
    """
    import datasets  # imported late: it takes a second to load

    hub_id, split = hub_place(source.name, source.split)
    try:
        files = datasets.load_dataset_builder(hub_id).config.data_files
    except Exception as error:  # the hub's libraries raise errors of many types
        raise UserError(
            f"--data {source.name}: cannot download {hub_id} from the hub ({first_line(error)}); check the network"
        ) from None
    splits = {str(name): list(urls) for name, urls in files.items()}
    if len(splits) == 1:
        [split] = splits
    if split not in splits:
        raise UserError(
            f"--data {source.name}: {hub_id} on the hub has no {split} split, only {', '.join(splits)}"
        )
    urls = splits[split]
    size = sum(hub.size(path) for hub, path in map(fsspec.core.url_to_fs, urls))
    with fsspec.open(urls[0]) as first:  # only the last bytes of the file are fetched
        layout_of(pyarrow.parquet.read_schema(first).names, source.ignore)
    print(f"to download: {hub_id} {size / 1e9:.2f} GB", flush=True)
    converted = Download(f"{hub_id}, converted", size, SETS)
    check_disk_space([Download(hub_id, size, Path(HF_HUB_CACHE)), converted])
    return datasets.DownloadManager().download(urls)
