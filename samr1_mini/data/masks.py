"""Read true masks: PNG files, COCO's RLE, polygons, rows of 0 and 1, and boxes.

`truth_of` lists the masks of a line. `check_truth` checks them without reading any pixels.
`read_mask` returns pixels. Before, folder.py removes missing values: null, empty text, and NaN.
"""

import math
from itertools import chain
from pathlib import Path

import numpy as np
from pycocotools import mask as coco

from .pictures import Header, Size, check_size, inside, opened, read_header, upright

TOLERANCE = 5  # annotators' coordinates may be so many pixels outside the picture
EMPTY = (
    "the mask is empty; if the picture has no such object, remove the line, or write "
    '"mask": [] and use --objects several'
)


# -------------------------------------------------------------------------------- check


def truth_of(row: dict) -> list:
    """Return the masks of a line, in any form: all of "masks", or the single "mask".

    An empty list in the line means that the picture has no such object. Raises ValueError for a
    line with both keys.
    """
    if "masks" not in row:
        mask = row.get("mask")
        masks = [] if mask == [] else [mask]
    elif "mask" in row:
        raise ValueError("the line has mask and masks; remove one of them")
    else:
        masks = row["masks"]
    if not isinstance(masks, list):
        raise ValueError("masks is not a list; write one mask for each object: [mask, mask]")
    if not masks and "box" in row:
        raise ValueError("the line has an empty mask and a box; remove one of them")
    return masks


def check_truth(row: dict, size: Size | None = None, may_be_empty: bool = False) -> list[float]:
    """Check the masks or the box of a line, and its key "ignore" (pixels that do not count).

    Raises ValueError. Without the picture's size, the range of coordinates is not checked. Returns
    the coordinates x, y, x, y, ... of the box or the polygons, and [] for other masks. The pixels of
    a PNG are not read here.
    """
    if "ignore" in row and row["ignore"] != []:
        try:
            parse_mask(row["ignore"], size)
        except ValueError as error:
            raise ValueError(f"ignore: {error}") from None
    if has_box(row):
        check_box(row["box"], size)
        return row["box"]
    numbers = []
    for value in truth_of(row):
        mask = parse_mask(value, size)
        if isinstance(mask, list):
            numbers += chain(*mask)
        if may_be_empty:
            continue
        if isinstance(mask, list) and size:
            mask = draw_polygons(mask, size)
        if isinstance(mask, dict) and not coco.area(mask):
            raise ValueError(EMPTY)
    return numbers


def has_box(row: dict) -> bool:
    """Return True if a line has a box instead of a mask."""
    return "box" in row and "mask" not in row and "masks" not in row


def check_box(box, size: Size | None) -> None:
    """Refuse a box that is not [x1, y1, x2, y2] in pixels of a picture of this size."""
    if not are_numbers(box) or len(box) != 4:
        raise ValueError("the box is not a list of four numbers x1, y1, x2, y2")
    x1, y1, x2, y2 = box
    written = f"the box {x1:g}, {y1:g}, {x2:g}, {y2:g}"
    if x1 >= x2 or y1 >= y2:
        raise ValueError(f"{written} is reversed or empty; write x1, y1, x2, y2")
    check_range(box, size)
    if round(x1) == round(x2) or round(y1) == round(y2):
        raise ValueError(f"{written} holds no pixel; make the box larger")


def check_range(numbers: list[float], size: Size | None) -> None:
    """Refuse normalised coordinates (fractions of width and height) and coordinates outside the
    picture. `numbers` are x, y, x, y, ...
    """
    if max(numbers) < 2:  # fractions, or fractions that rounding has lifted above 1
        raise ValueError("no coordinate reaches 2; write pixels, not fractions of width and height")
    if not size:
        return
    right, bottom = max(numbers[::2]), max(numbers[1::2])
    if min(numbers) < -TOLERANCE or right > size[0] + TOLERANCE or bottom > size[1] + TOLERANCE:
        raise ValueError(
            f"coordinates from {min(numbers):g} to {right:g}, {bottom:g} are outside the picture of "
            f"{size[0]} x {size[1]}; write pixels of this picture"
        )


# -------------------------------------------------------------------------------- forms


def parse_mask(value, size: Size | None) -> str | list[list[float]] | dict:
    """Check a mask in any form, for a picture of this size. Raises ValueError.

    Returns the path of a file, polygons as flat lists, or a COCO RLE for all other forms.
    """
    if value in (None, ""):
        raise ValueError("mask missing; a line needs image, question, and mask or box")
    if isinstance(value, str):
        if value[0] in "[{":
            raise ValueError("the mask is a list or an RLE in quotes; remove the quotes")
        return value
    if isinstance(value, dict):
        return parse_rle(value, size)
    if is_rows(value, size):
        pixels = np.asarray(value) > 0
        check_size("the mask", pixels.shape[::-1], size)
        return to_rle(pixels)
    if are_numbers(value):
        refuse_pixels(value, size)
    polygons = parse_polygons(value)
    check_range(list(chain(*polygons)), size)
    return polygons


def parse_rle(rle: dict, size: Size | None) -> dict:
    """Check a COCO RLE and return it compressed.

    pycocotools reads and writes outside its memory if the runs do not fit the size.
    """
    if not {"size", "counts"} <= set(rle):
        raise ValueError("the mask's RLE needs both keys, size and counts")
    sides, runs = rle["size"], rle["counts"]
    if not are_whole(sides) or len(sides) != 2:
        raise ValueError("the size of the mask's RLE is not [height, width]")
    check_size("the mask", sides[::-1], size, "; write an RLE's size as [height, width]")
    if isinstance(runs, str):
        runs = run_lengths(runs.encode())
    if not are_whole(runs) or sum(runs) != math.prod(sides):
        raise ValueError("the counts of the mask's RLE must add up to height x width")
    return coco.frPyObjects({"size": sides, "counts": runs}, *sides)


def run_lengths(counts: bytes) -> list[int]:
    """Read the lengths of the runs of 0 and 1 from COCO's compressed counts.

    A run that is cut off or too long becomes -1. Each character holds five bits of a number, and
    the lowest bits come first. From the fourth run on, the numbers are differences from the run two
    places earlier.
    """
    runs, value, bits = [], 0, 0
    for sign in counts:
        sign -= 48
        value |= (sign & 31) << bits
        bits += 5
        if bits > 60:  # no run is that long
            return [-1]
        if sign & 32:  # the number continues
            continue
        if value >> (bits - 1):  # the highest bit of the last character is the sign
            value -= 1 << bits
        if len(runs) > 2:
            value += runs[-2]
        runs.append(value)
        value, bits = 0, 0
    if bits:
        runs.append(-1)
    return runs


def parse_polygons(value) -> list[list[float]]:
    """Return polygons as COCO writes them: lists x1, y1, x2, y2, ...

    A single polygon does not need an outer list. Points may be pairs: [[x, y], [x, y], ...].
    Polygons with fewer than three points are dropped if others are left.
    """
    if not isinstance(value, list):
        raise ValueError(
            "the mask must be the path of a PNG, a COCO RLE, polygons, or rows of 0 and 1"
        )
    if not value:
        raise ValueError(EMPTY)
    if isinstance(value[0], (str, dict)):
        raise ValueError('the mask is a list of masks; write "masks" for several objects')
    if not isinstance(value[0], list) or is_point(value[0]):
        value = [value]
    polygons = [polygon for polygon in map(flat_polygon, value) if has_area(polygon)]
    if not polygons:
        raise ValueError("no polygon of the mask has three points; draw the object again")
    return polygons


def has_area(polygon: list[float]) -> bool:
    """Return True if a flat polygon has three different points."""
    return len(set(zip(polygon[::2], polygon[1::2]))) > 2


def is_point(value) -> bool:
    """Return True if a value is [x, y]."""
    return are_numbers(value) and len(value) == 2


def refuse_pixels(numbers: list, size: Size | None) -> None:
    """Refuse a flat list of pixels or of Label Studio's bytes. It would be read as a polygon."""
    if len(numbers) > 10 and set(numbers) <= {0, 1, 255}:
        raise ValueError("a list of only 0, 1 or 255 is no polygon; write one list for each row")
    # Label Studio's RLE has bytes. The first four are a number: 4 x width x height.
    start = list((4 * math.prod(size or (0, 0)) % 2**32).to_bytes(4, "big"))
    bytes_only = len(numbers) > 10 and set(numbers) <= set(range(256))
    if size and bytes_only and numbers[:4] == start:
        raise ValueError("the mask is an RLE of Label Studio; export the masks as PNG")


def flat_polygon(polygon) -> list[float]:
    """Convert a flat list or a list of pairs to one flat polygon [x1, y1, x2, y2, ...]."""
    if isinstance(polygon, list) and all(map(is_point, polygon)):
        return list(chain(*polygon))
    if are_numbers(polygon) and len(polygon) % 2 == 0:
        return polygon
    raise ValueError("one polygon is not a list of x, y pairs; write [[x1, y1, x2, y2, ...]]")


def are_numbers(values) -> bool:
    """Return True for a list of finite numbers. Booleans do not count as numbers."""
    if not isinstance(values, list):
        return False
    return set(map(type, values)) <= {int, float} and math.isfinite(sum(values))


def are_whole(values) -> bool:
    """Return True for a list of whole numbers from 0 on."""
    return isinstance(values, list) and all(type(one) is int and one >= 0 for one in values)


def is_rows(value, size: Size | None) -> bool:
    """Return True if a mask is a list of rows of pixels, and not a list of polygons.

    A list with another size than the picture counts as rows only if it holds 0 and one other value.
    """
    try:
        rows = np.array(value)
    except ValueError:  # lists of different lengths
        return False
    if rows.ndim != 2 or rows.dtype.kind not in "bif" or len(rows) < 2 or len(rows[0]) < 3:
        return False
    if size and sorted(size) == sorted(rows.shape):
        return True  # exchanged width and height are refused later
    numbers = set(np.unique(rows))
    return numbers <= {0, 1} or (0 in numbers and len(numbers) == 2 and len(rows) > 2)


# -------------------------------------------------------------------------------- pixels


def to_rle(mask: np.ndarray) -> dict:
    """Return a mask bool [H, W] as a COCO RLE that JSON can hold."""
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return rle | {"counts": rle["counts"].decode()}


def draw_polygons(polygons: list[list[float]], size: Size) -> dict:
    """Return polygons as one RLE of a picture of this size."""
    width, height = size
    return coco.merge(coco.frPyObjects(polygons, height, width))


def read_mask(value, folder: Path, size: Size) -> np.ndarray:
    """Read a mask bool [H, W] of a picture of this size, in any of the forms above.

    Raises OSError or ValueError.
    """
    mask = parse_mask(value, size)
    if isinstance(mask, str):
        pixels = read_mask_file(inside(folder, mask))
        check_size(f"{mask}: the mask", pixels.shape[::-1], size)
        return pixels
    if isinstance(mask, list):
        mask = draw_polygons(mask, size)
    return coco.decode(mask).astype(bool)


def read_mask_file(file: Path) -> np.ndarray:
    """Read a mask bool [H, W] from a picture: all pixels that are not black.

    A mask has black and one other colour or number. A mask with more is refused: it has several
    objects, undecided pixels, soft borders, or noise of a JPEG.
    """
    refuse_lossy(read_header(file), file.name)
    with opened(file) as image:
        if image.has_transparency_data:
            alpha = image.convert("RGBA").getchannel("A")
            if alpha.getextrema() != (255, 255):
                raise ValueError("a mask with transparent parts; save it in black and white")
        image = upright(image)
        deep = image.mode[0] in "IF"  # numbers of 16 or 32 bits
        too_many = not deep and image.getcolors(2) is None
        if image.mode not in ("1", "L") and not deep:
            image = image.convert("RGB")  # black may have any number in a palette
        pixels = np.asarray(image)
    if pixels.ndim == 3:
        pixels = pixels.max(-1)
    bright = pixels[pixels > 0]
    if too_many or bright.size and bright.min() != bright.max():
        raise ValueError(
            f"{file.name}: a mask with more colours than black and one other. Save one mask for each "
            'object, with two colours. JPEG and resizing add colours. Undecided pixels belong in "ignore"'
        )
    return pixels > 0


def refuse_lossy(header: Header, name: str) -> None:
    """Refuse a mask whose compression changes pixels."""
    if header.lossy:
        raise ValueError(
            f"{name}: {header.format} may change a mask's pixels, so this file may be wrong. A "
            "converted copy has the same pixels. Export the mask again, as PNG"
        )
