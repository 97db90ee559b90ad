"""Layouts of public data sets: each function converts a published row to a line for public.py.

    from_refcoco    jxu124's tables, and REFER's refs(...).p with instances.json; COCO's pictures
    from_grefcoco   gRefCOCO's grefs(unc).json with instances.json: several objects, one or none
    from_lmms       lmms-lab/RefCOCOg: polygons
    from_masks      Ricky06662's and sj9909's sets: masks as rows of true and false
    from_several    sj9909's sets for training: a mask for each of several objects
    from_boxes      boxes without masks: refCOCOg_*_840, and JSON lists as LISA-Grounding has them
    from_labelme    ReasonSeg's pairs of picture and labelme JSON, as its authors publish it

The lines differ from those of data.jsonl (folder.py) in two keys. "texts" has all expressions for
the object, instead of "question". "image" may also be a Path, or the bytes of a picture. A broken
row raises ValueError, LookupError or TypeError. A path is opened only if it is in the set's folder.
A web address is never opened.
"""

import base64
import io
import json
import math
import re
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..config import UserError
from .download import picture_name
from .masks import check_range, flat_polygon, has_area, to_rle
from .pictures import Size, check_size, child, inside, opened, read_header

NO_INSTANCE = "instances.json has no annotation or no picture for this row"


def from_refcoco(row: dict) -> dict:
    """Convert a row of jxu124's tables, or of REFER's files. The picture is one of COCO's."""
    annotation, info = row["annotation"], row["info"]
    if annotation is None or info is None:
        raise ValueError(NO_INSTANCE)
    line = {"id": row["ref_id"], "mask": annotation["segmentation"]}
    return line | coco_texts(row)


def from_grefcoco(row: dict) -> dict:
    """Convert a row of gRefCOCO. Its "ann_id" lists the objects; [-1] means that none is there.

    As in the authors' code, annotations of crowds are left out.
    """
    annotations = row["annotations"]
    if row["info"] is None or None in annotations:
        raise ValueError(NO_INSTANCE)
    masks = [one["segmentation"] for one in annotations if not one.get("iscrowd")]
    if annotations and not masks:
        raise ValueError("all objects of this row are crowds (iscrowd), which do not count")
    return {"id": row["ref_id"], "masks": masks} | coco_texts(row)


def coco_texts(row: dict) -> dict:
    """Return the picture's name and size, and the expressions, of a row of REFER's files."""
    info, line = row["info"], {}
    line["image"] = picture_name(info["file_name"])
    line["size"] = [info["width"], info["height"]]
    line["texts"] = [one.get("raw") or one["sent"] for one in row["sentences"]]
    return line


def from_tables(row: dict) -> dict:
    """Convert a row of jxu124's tables: JSON texts describe the annotation and the picture."""
    row["annotation"] = json.loads(row["raw_anns"])
    row["info"] = json.loads(row["raw_image_info"])
    return from_refcoco(row)


def from_lmms(row: dict) -> dict:
    """Convert a row of lmms-lab/RefCOCOg.

    The set was made for captioning, so the column "answer" holds the expressions.
    """
    name = re.search(r"COCO_train2014_\d+", row.get("file_name") or "")
    line = {"id": row["question_id"], "mask": row["segmentation"], "texts": row["answer"]}
    line["image"] = picture_bytes(row)
    if name:
        line["picture"] = f"{name[0]}.jpg"
    return line


def from_masks(row: dict) -> dict:
    """Convert a row with a mask: a list of rows of true and false.

    In the hub's copies of ReasonSeg, undecided pixels belong to the foreground.
    """
    line = {"image": picture_bytes(row), "mask": to_mask(row["mask"], "mask"), "texts": row["text"]}
    line["id"] = row.get("ann_id", row.get("id", row.get("image_id")))
    line["picture"] = row.get("image_id")
    line["kind"] = row.get("reasoning_type")
    return line


def to_mask(rows, column: str) -> np.ndarray:
    """Return the rows of a mask in a column of a table as bool [H, W]."""
    if not isinstance(rows, np.ndarray):
        raise ValueError(
            f"the column {column} holds no rows of true and false. To use masks that are pictures, "
            "write a folder with data.jsonl and PNG files"
        )
    mask = np.stack(rows)  # refuses rows of different lengths
    if mask.ndim != 2 or not np.isfinite(mask).all():  # a missing value is NaN or None
        raise ValueError(f"the column {column} holds no mask, or one with missing values")
    return mask > 0


def from_several(row: dict) -> dict:
    """Convert a row with a list of masks, one for each object."""
    masks = [to_rle(to_mask(rows, "solution_mask")) for rows in row["solution_mask"]]
    texts = row["problem"]
    return {"id": row.get("id"), "image": picture_bytes(row), "masks": masks, "texts": texts}


def from_boxes(row: dict) -> dict:
    """Convert a row with a box.

    The box is four numbers, or Seg-Zero's <box>(x1,y1),(x2,y2)</box><points>...</points>.
    """
    box = row["solution"]
    if isinstance(box, str):
        text = box.partition("<box>")[2].partition("</box>")[0]
        box = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]
    if "list" in row:
        image = inside(row["list"].parent, row["image"])
    else:
        image = picture_bytes(row)
    return {"id": row.get("id"), "image": image, "box": box, "texts": row["problem"]}


def from_labelme(row: dict) -> dict:
    """Convert a pair of a picture and a labelme JSON with "text" and "shapes"."""
    if not isinstance(row.get("shapes"), list) or not row.get("text"):
        raise ValueError('a labelme file needs "shapes", and the questions as "text": ["...", ...]')
    picture = picture_beside(row["file"], str(row.get("imagePath")))
    size = read_header(picture).size
    drawn = row.get("imageWidth") or size[0], row.get("imageHeight") or size[1]
    check_size(picture.name, size, drawn, "; use the picture that was labelled")
    target, undecided = draw_shapes(row["shapes"], size)
    if not (target | undecided).any():
        raise ValueError("the shapes cover no pixel; draw the object again")
    return {
        "id": picture.stem,
        "image": picture,
        "mask": target,
        "ignore": undecided,
        "texts": row["text"],
    }


# The column that identifies a layout: it holds the true masks.
LAYOUTS = {
    "raw_anns": from_tables,
    "annotation": from_refcoco,
    "annotations": from_grefcoco,
    "mask": from_masks,
    "segmentation": from_lmms,
    "solution_mask": from_several,
    "solution": from_boxes,
    "shapes": from_labelme,
}


def layout_of(columns, ignore: str) -> str:
    """Return the column name that identifies the layout of a table.

    Raises UserError for an unknown layout, or if undecided pixels shall be excluded and the layout
    does not mark them.
    """
    known = [column for column in LAYOUTS if column in columns]
    if not known:
        raise UserError(
            f"columns {', '.join(map(str, columns))} are none of the published layouts. For data of "
            "your own, write a folder with data.jsonl"
        )
    if known[0] == "mask" and ignore == "excluded":
        raise UserError(
            "--ignore excluded needs the authors' original files, not this copy; give their folder "
            "with --data"
        )
    return known[0]


def convert_row(row: dict, where: str, sentences: str, ignore: str) -> list[dict]:
    """Convert a row to lines: one line for the first text, or with "all" one line for each text.

    If the row has no id, the ids of its lines begin with `where`.
    """
    convert = LAYOUTS[layout_of(row, ignore)]
    line = convert(row)
    if "ignore" in line and ignore == "foreground":
        line["mask"] |= line.pop("ignore")
    for key, value in line.items():
        if isinstance(value, np.ndarray):
            line[key] = to_rle(value)
    texts, name = line.pop("texts"), line["id"]
    if isinstance(texts, str):
        texts = [texts]
    if not texts:
        raise ValueError("the row has no question")
    if sentences == "first":
        texts = texts[:1]
    if name is None:
        name = where
    return [line | {"question": text, "id": f"{name}-{k}"} for k, text in enumerate(texts)]


# -------------------------------------------------------------------------------- pictures


def picture_bytes(row: dict) -> bytes:
    """Return the picture inside a row."""
    image = row["image"]
    if isinstance(image, dict):
        image = image.get("bytes")
    if image and isinstance(image, bytes):
        return image
    raise ValueError(
        "the column image must hold the bytes of pictures (paths are not opened), not "
        f"{row['image']!r:.80}"
    )


def pictures_beside(file: Path) -> list[Path]:
    """Return the pictures beside a labelme file: the same name with .jpg, .jpeg or .png."""
    endings = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".Jpg", ".Jpeg", ".Png")
    found = [child(file.parent, f"{file.stem}{ending}") for ending in endings]
    return [picture for picture in found if picture.is_file()]


def picture_beside(file: Path, name: str) -> Path:
    """Return the picture of a labelme file.

    If several files match, `name` selects one by its ending. `name` is the file's "imagePath". It
    is only compared, never opened.
    """
    found = pictures_beside(file)
    if not found:
        raise ValueError(f"no {file.stem}.jpg, .jpeg or .png is beside it; add the picture")
    meant = [picture for picture in found if picture.suffix == Path(name).suffix]
    return (meant or found)[0]


# -------------------------------------------------------------------------------- labelme


def draw_shapes(shapes: list[dict], size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Draw labelme shapes as ReasonSeg's authors draw them.

    Returns target and undecided pixels, each bool [H, W]. The largest shape is drawn first, and
    smaller shapes overwrite larger ones. A shape is undecided if its label contains
    "ignore", and skipped if the label is "flag". All others are targets.
    """
    shapes = [shape for shape in shapes if str(shape["label"]).lower() != "flag"]
    numbers = list(chain(*[flat_polygon(shape["points"]) for shape in shapes]))
    if numbers:
        check_range(numbers, size)
    parts = []
    for shape in shapes:
        ignored = "ignore" in str(shape["label"]).lower()
        parts.append((draw_shape(shape, size), 2 if ignored else 1))
    parts.sort(key=lambda part: -part[0].sum())
    labels = np.zeros(size[::-1], np.uint8)  # 1: target, 2: undecided
    for drawn, label in parts:
        labels[drawn] = label
    return labels == 1, labels == 2


def draw_shape(shape: dict, size: Size) -> np.ndarray:
    """Draw one labelme shape as bool [H, W]: polygon, rectangle, circle or mask.

    Raises ValueError for other types. A polygon without three points draws nothing.
    """
    kind, numbers = shape.get("shape_type") or "polygon", flat_polygon(shape["points"])
    canvas = Image.new("1", size)
    draw = ImageDraw.Draw(canvas)
    xs, ys = numbers[::2], numbers[1::2]
    if kind == "rectangle" and len(xs) == 4:  # some files have all corners instead of two
        kind = "polygon"
    if kind in ("circle", "mask", "rectangle") and len(xs) != 2:
        raise ValueError(f"a {kind} needs two points, not {len(xs)}")
    if kind == "circle":
        centre, on_circle = numbers[:2], numbers[2:]
        draw.circle(centre, math.dist(centre, on_circle), fill=1)
    elif kind == "mask":
        paste_mask(canvas, shape["mask"], numbers)
    elif kind == "rectangle":
        draw.rectangle([min(xs), min(ys), max(xs), max(ys)], fill=1)
    elif kind != "polygon":
        raise ValueError(f"a shape has the type {kind!r}; draw polygon, rectangle, circle or mask")
    elif has_area(numbers):
        draw.polygon(numbers, fill=1)
    return np.array(canvas)


def paste_mask(canvas: Image.Image, text: str, corners: list[float]) -> None:
    """Paste a labelme mask: a PNG as base64 text, in a box of two corner pixels."""
    left, top, right, bottom = map(int, corners)
    with opened(io.BytesIO(base64.b64decode(text))) as image:
        part = np.array(image.convert("L")) > 0
    check_size("a mask shape", part.shape[::-1], (right - left + 1, bottom - top + 1))
    canvas.paste(Image.fromarray(part), (left, top))
