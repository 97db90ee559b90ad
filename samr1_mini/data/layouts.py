"""Layouts of public data sets: each is one function from a published row to a line of data.jsonl
(folder.py).

    from_refcoco    jxu124's tables, and REFER's refs(...).p with instances.json; the pictures are COCO's
    from_lmms       lmms-lab/RefCOCOg: polygons
    from_masks      Ricky06662's and sj9909's sets: masks as rows of true and false
    from_boxes      boxes without masks: refCOCOg_*_840, and JSON lists as LISA-Grounding has them
    from_labelme    ReasonSeg's pairs of picture and labelme JSON, as its authors publish it

Instead of "question", a line here has "texts", the list of all expressions for its object. Its
"image" is a name, or the bytes of a picture. A broken row raises ValueError, LookupError or
TypeError. No path or address in a row is opened.
"""

import base64
import io
import json
import math
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..config import UserError
from .fetch import picture_name
from .masks import TOLERANCE, is_point, to_rle
from .pictures import child, inside, opened, read_head


def from_refcoco(row: dict, folder: Path, ignore: str) -> dict:
    """Convert a row of jxu124's tables, or of REFER's files. The picture is one of COCO's."""
    annotation, info = row["annotation"], row["info"]
    if annotation is None or info is None:
        raise ValueError("instances.json has no annotation or no picture for this row")
    return {
        "id": row["ref_id"],
        "image": picture_name(info["file_name"]),
        "size": [info["width"], info["height"]],
        "mask": annotation["segmentation"],
        "texts": [
            one if isinstance(one, str) else one.get("raw") or one["sent"]
            for one in row["sentences"]
        ],
    }


def from_tables(row: dict, folder: Path, ignore: str) -> dict:
    """Convert a row of jxu124's tables: annotation and picture are JSON texts."""
    parsed = {"annotation": json.loads(row["raw_anns"]), "info": json.loads(row["raw_image_info"])}
    return from_refcoco(row | parsed, folder, ignore)


def from_lmms(row: dict, folder: Path, ignore: str) -> dict:
    """Convert a row of lmms-lab/RefCOCOg.

    The set was made for captioning, so the column "answer" holds the expressions.
    """
    line = {
        "id": row["question_id"],
        "image": picture_bytes(row),
        "mask": row["segmentation"],
        "texts": row["answer"],
    }
    name = re.search(r"COCO_train2014_\d+", row.get("file_name") or "")
    if name:
        line["picture"] = f"{name[0]}.jpg"
    return line


def from_masks(row: dict, folder: Path, ignore: str) -> dict:
    """Convert a row with a mask [H, W] of true and false.

    These copies count undecided pixels as foreground.
    """
    refuse_excluded(ignore)
    if not isinstance(row["mask"], np.ndarray):
        raise ValueError(
            "the column mask holds no rows of true and false. To use masks that are pictures, write a folder with "
            "data.jsonl and PNG files"
        )
    return {
        "id": row.get("ann_id", row.get("id", row.get("image_id"))),
        "image": picture_bytes(row),
        "mask": to_rle(row["mask"]),
        "picture": row.get("image_id"),
        "kind": row.get("reasoning_type"),
        "texts": row["text"],
    }


def refuse_excluded(ignore: str) -> None:
    """Refuse --ignore excluded for a copy that does not mark its undecided pixels."""
    if ignore == "excluded":
        raise UserError(
            "--ignore excluded needs the authors' original files, not this copy; give their folder "
            "with --data"
        )


def from_boxes(row: dict, folder: Path, ignore: str) -> dict:
    """Convert a row with a box: four numbers, or Seg-Zero's
    <box>(x1,y1),(x2,y2)</box><points>...</points>.
    """
    box = row["solution"]
    if isinstance(box, str):
        box = [
            float(number)
            for number in re.findall(
                r"-?\d+(?:\.\d+)?", box.partition("<box>")[2].partition("</box>")[0]
            )
        ]
    if "list" in row:
        image = inside(row["list"].parent, row["image"]).relative_to(folder).as_posix()
    else:
        image = picture_bytes(row)
    return {"id": row.get("id"), "image": image, "box": box, "texts": row["problem"]}


def from_labelme(row: dict, folder: Path, ignore: str) -> dict:
    """Convert a pair of a picture and a labelme JSON with "text" and "shapes"."""
    if not isinstance(row.get("shapes"), list) or not row.get("text"):
        raise ValueError('a labelme file needs "shapes", and the questions as "text": ["...", ...]')
    picture = picture_beside(row["file"], str(row.get("imagePath")))
    size = read_head(picture).size
    width, height = row.get("imageWidth") or size[0], row.get("imageHeight") or size[1]
    if (width, height) != size:
        drawn = f"{width} x {height}"
        raise ValueError(
            f"the shapes are for {drawn} pixels, but {picture.name} has {size[0]} x {size[1]}; "
            "use the picture that was labelled"
        )
    meant, undecided = draw_shapes(row["shapes"], size)
    if not (meant | undecided).any():
        raise ValueError("the shapes cover no pixel; draw the object again")
    line = {
        "id": picture.stem,
        "image": picture.relative_to(folder).as_posix(),
        "texts": row["text"],
    }
    if ignore == "excluded":
        line["ignore"] = to_rle(undecided)
    else:
        meant |= undecided
    return line | {"mask": to_rle(meant)}


# The column by which a layout is known: it holds the truth.
LAYOUTS = {
    "raw_anns": from_tables,
    "annotation": from_refcoco,
    "mask": from_masks,
    "segmentation": from_lmms,
    "solution": from_boxes,
    "shapes": from_labelme,
}


def layout_of(columns) -> str:
    """Return the column name that identifies the layout of a table. Raises ValueError if none does."""
    for column in LAYOUTS:
        if column in columns:
            return column
    raise ValueError(
        f"columns {', '.join(map(str, columns))} are none of the published layouts. For data of your own, write a "
        "folder with data.jsonl"
    )


def convert_row(row: dict, folder: Path, sentences: str, ignore: str) -> list[dict]:
    """Convert a row to lines: one for its first text, or one for each ("all")."""
    line = LAYOUTS[layout_of(row)](row, folder, ignore)
    texts = line.pop("texts")
    if isinstance(texts, str):
        texts = [texts]
    if not texts:
        raise ValueError("the row asks for nothing")
    if sentences == "first":
        texts = texts[:1]
    name = line["id"]
    if name is None:
        name = row["place"]
    return [line | {"question": text, "id": f"{name}-{k}"} for k, text in enumerate(texts)]


# ---------------------------------------------------------------------------------------------------- pictures


def picture_bytes(row: dict) -> bytes:
    """Return the picture inside a row."""
    image = row["image"]
    if isinstance(image, dict) and image.get("bytes"):
        return image["bytes"]
    raise ValueError(
        f"the column image must hold the bytes of pictures, not {image!r:.80}; no path is opened"
    )


def picture_beside(file: Path, name: str) -> Path:
    """Find the picture of a labelme file: the same name with .jpg, .jpeg or .png, in any case.

    If several files match, `name` selects one by its ending. `name` is the file's "imagePath". It
    is only compared, never opened.
    """
    endings = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".Jpg", ".Jpeg", ".Png")
    found = [child(file.parent, f"{file.stem}{ending}") for ending in endings]
    found = [picture for picture in found if picture.is_file()]
    if not found:
        raise ValueError(f"no picture {file.stem}.jpg, .jpeg or .png is in its folder")
    meant = [picture for picture in found if picture.suffix == Path(name).suffix]
    return (meant or found)[0]


# ---------------------------------------------------------------------------------------------------- labelme


def draw_shapes(shapes: list[dict], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw labelme shapes like ReasonSeg's authors.

    Returns target and undecided pixels, each bool [H, W].

    The largest shape is drawn first, and smaller shapes overwrite larger ones. Labels that contain
    "ignore" are undecided, "flag" is skipped, and all others are targets. `size` is the picture's
    width and height.
    """
    numbers = [n for shape in shapes for point in shape["points"] for n in point]
    if max(numbers, default=2) < 2:
        raise ValueError("no coordinate reaches 2; write pixels, not fractions of width and height")
    parts = []
    for shape in shapes:
        label = str(shape["label"]).lower()
        if label != "flag":
            parts.append((draw_shape(shape, size), "ignore" in label))
    parts.sort(key=lambda part: -part[0].sum())
    meant = np.zeros(size[::-1], bool)
    undecided = np.zeros(size[::-1], bool)
    for drawn, ignored in parts:
        meant[drawn] = not ignored
        undecided[drawn] = ignored
    return meant, undecided


def draw_shape(shape: dict, size: tuple[int, int]) -> np.ndarray:
    """Draw one labelme shape as bool [H, W]: polygon, rectangle, circle or mask.

    Raises ValueError for others.

    A polygon without three points draws nothing.
    """
    kind, points = shape.get("shape_type") or "polygon", shape["points"]
    if kind not in ("polygon", "rectangle", "circle", "mask"):
        raise ValueError(
            f"a shape of type {kind!r}; only polygon, rectangle, circle and mask have an area"
        )
    if not isinstance(points, list) or not all(map(is_point, points)):
        raise ValueError("the points of a shape are not a list of [x, y]")
    check_points(points, size)
    if kind == "mask":
        return draw_labelme_mask(shape, size)
    canvas = Image.new("1", size)
    draw = ImageDraw.Draw(canvas)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if kind == "circle":
        if len(points) != 2:
            raise ValueError("a circle needs two points: its centre and a point on it")
        radius = math.dist(*points)
        (x, y), _ = points
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=1, outline=1)
    elif kind == "rectangle" and len(points) != 4:
        if len(points) != 2:
            raise ValueError("a rectangle needs two opposite corners, or all four")
        draw.rectangle([min(xs), min(ys), max(xs), max(ys)], fill=1, outline=1)
    elif len(set(map(tuple, points))) > 2:
        draw.polygon([tuple(point) for point in points], fill=1, outline=1)
    return np.array(canvas)


def check_points(points: list[list[float]], size: tuple[int, int]) -> None:
    """Refuse points that leave the picture."""
    for x, y in points:
        if not (-TOLERANCE <= x <= size[0] + TOLERANCE and -TOLERANCE <= y <= size[1] + TOLERANCE):
            raise ValueError(
                f"the point {x:g}, {y:g} of a shape leaves the picture of {size[0]} x {size[1]}"
            )


def draw_labelme_mask(shape: dict, size: tuple[int, int]) -> np.ndarray:
    """Draw a labelme shape of type mask: a PNG as base64 text, in the box of its two points."""
    (left, top), (right, bottom) = [[int(number) for number in point] for point in shape["points"]]
    with opened(io.BytesIO(base64.b64decode(shape["mask"]))) as image:
        part = np.array(image.convert("L")) > 0
    if part.shape != (bottom - top + 1, right - left + 1):
        raise ValueError(
            f"a mask shape is {part.shape[1]} x {part.shape[0]}, but its box "
            f"{right - left + 1} x {bottom - top + 1}; both must have the same size"
        )
    mask = np.zeros(size[::-1], bool)
    rows, columns = slice(max(0, top), bottom + 1), slice(max(0, left), right + 1)
    room = mask[rows, columns].shape
    mask[rows, columns] = part[max(0, -top) :, max(0, -left) :][: room[0], : room[1]]
    return mask
