"""Data as people bring them on the first day.

Good files give the right pixels, and bad ones give one line before the first step.

Each case below writes a folder. The picture is 60 x 40, and the object is the square x 10 to 30, y 5 to 25.
"""

import base64
import io
import json
import unicodedata

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco
from test_public import coco_info, parquet, png, refer_folder

import eval as evaluate
import train
from samr1_mini.config import UserError
from samr1_mini.data import load_data, open_data
from samr1_mini.data import folder as folder_module
from samr1_mini.data import public
from samr1_mini.data.pictures import read_header

SIZE = WIDTH, HEIGHT = 60, 40
POLYGON = [10, 5, 30, 5, 30, 25, 10, 25]
PAIRS = [[10, 5], [30, 5], [30, 25], [10, 25]]
TURNED = Image.Exif()
TURNED[0x0112] = 6  # to be turned by 90 degrees
UPSIDE_DOWN = Image.Exif()
UPSIDE_DOWN[0x0112] = 3


def square():
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[5:25, 10:30] = True
    return mask


def grey(mask, scale=255):
    return Image.fromarray((mask * scale).astype(np.uint8))


def rle(mask):
    found = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(found["size"]), "counts": found["counts"].decode()}


def photo(size=SIZE, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write(folder, **line):
    """A data.jsonl with this line for testing, and with good lines for the other splits."""
    good = {"image": "good.png", "question": "which?", "mask": rle(square())}
    if "box" in line:
        good = {"image": "good.png", "question": "which?", "box": [10, 5, 30, 25]}
    tested = {"image": "a.png", "question": "what?", "split": "test"} | line
    lines = [good | {"split": "train"}, tested, good | {"split": "validation"}]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    photo(seed=1).save(folder / "good.png")
    if not (folder / "a.png").exists():
        photo().save(folder / "a.png")


def write_line(folder, **line):
    """As `write`, with good lines that have masks in any case."""
    write(folder, mask=POLYGON)
    lines = (folder / "data.jsonl").read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | line)
    (folder / "data.jsonl").write_text("\n".join(lines))


def mask_file(folder, name, image, **options):
    image.save(folder / name, **options)
    write(folder, mask=name)


def labelme(folder, *shapes, picture="a.jpg", **more):
    (folder / "test").mkdir()
    if picture:
        photo().save(folder / "test" / picture)
    content = {
        "text": ["what?"],
        "shapes": [{"label": "target", **shape} for shape in shapes],
    } | more
    (folder / "test/a.json").write_text(json.dumps(content))


def labelme_mask():
    file = io.BytesIO()
    grey(np.ones((20, 20))).save(file, "PNG")
    return {
        "shape_type": "mask",
        "points": [[10, 5], [29, 24]],
        "mask": base64.b64encode(file.getvalue()).decode(),
    }


def box_list(folder, **row):
    photo().save(folder / "1.png")
    row = {"image": "1.png", "problem": "what?", "solution": [10, 5, 30, 25]} | row
    (folder / "test.json").write_text(json.dumps([row]))


def turned_picture(folder, exif, mask):
    photo().save(folder / "a.png", exif=exif)
    mask.save(folder / "m.png")
    write(folder, mask="m.png")


def linked_folder(folder):
    """As the hub's cache has it: all files are links to blobs elsewhere."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    photo().save(blobs / "1", "PNG"), grey(square()).save(blobs / "2", "PNG")
    (folder / "a.png").symlink_to(blobs / "1"), (folder / "m.png").symlink_to("../blobs/2")
    write(folder, mask="m.png")


def other_unicode_form(folder):
    name = unicodedata.normalize("NFD", "caf\u00e9.png")
    photo().save(folder / name)
    write(folder, image=unicodedata.normalize("NFC", name), mask=rle(square()))


def tables(folder, mask):
    parquet(folder, "test", [{"image": png(), "text": "what?", "mask": mask, "ann_id": "1"}])


def several_pages(folder, name, **options):
    grey(square()).save(folder / name, save_all=True, append_images=[grey(~square())], **options)


GOOD = {  # name: (what writes the folder, pixels of the mask)
    "a PNG of 0 and 255": (lambda f: mask_file(f, "m.png", grey(square())), 400),
    "a PNG of 0 and 1": (lambda f: mask_file(f, "m.png", grey(square(), 1)), 400),
    "a TIFF of floats below 1": (
        lambda f: mask_file(f, "m.tiff", Image.fromarray(square() * np.float32(0.4))),
        400,
    ),
    "a TIFF of 16 bits": (
        lambda f: mask_file(f, "m.tiff", Image.fromarray(square() * np.uint16(9))),
        400,
    ),
    "a PNG whose transparency hides nothing": (
        lambda f: mask_file(f, "m.png", grey(square()).convert("RGBA")),
        400,
    ),
    "a compressed RLE": (lambda f: write(f, mask=rle(square())), 400),
    "an RLE as numbers": (
        lambda f: write(f, mask={"size": [40, 60], "counts": [405, 20] + [20, 20] * 19 + [1215]}),
        400,
    ),
    "a flat polygon": (lambda f: write(f, mask=POLYGON), 400),
    "a list of polygons": (lambda f: write(f, mask=[POLYGON]), 400),
    "a polygon of pairs": (lambda f: write(f, mask=PAIRS), 400),
    "a list of polygons of pairs": (lambda f: write(f, mask=[PAIRS]), 400),
    "a polygon beside a degenerate part": (
        lambda f: write(f, mask=[[50, 30, 52, 30], POLYGON, [1, 1] * 4]),
        400,
    ),
    "a polygon that leaves the picture by 3 pixels": (
        lambda f: write(f, mask=[-3, 5, 20, 5, 20, 25, -3, 25]),
        400,
    ),
    "rows of 0 and 1": (lambda f: write(f, mask=square().astype(int).tolist()), 400),
    "rows of true and false": (lambda f: write(f, mask=square().tolist()), 400),
    "rows of 0 and 255": (lambda f: write(f, mask=(square() * 255).tolist()), 400),
    "a box": (lambda f: write(f, box=[10, 5, 30, 25]), 400),
    "undecided pixels": (lambda f: write(f, mask=rle(square()), ignore=rle(~square())), 400),
    "a picture that EXIF turns, with a mask as people see it": (
        lambda f: turned_picture(f, TURNED, grey(square().T)),
        400,
    ),
    "links, as in the hub's cache": (linked_folder, 400),
    "a name in another Unicode form": (other_unicode_form, 400),
    "a labelme polygon": (lambda f: labelme(f, {"points": PAIRS}), 441),
    "a labelme rectangle": (
        lambda f: labelme(f, {"shape_type": "rectangle", "points": [[30, 25], [10, 5]]}),
        441,
    ),
    "a labelme rectangle of four points": (
        lambda f: labelme(f, {"shape_type": "rectangle", "points": PAIRS}),
        441,
    ),
    "a labelme circle": (
        lambda f: labelme(f, {"shape_type": "circle", "points": [[20, 15], [30, 15]]}),
        346,
    ),
    "a labelme mask": (lambda f: labelme(f, labelme_mask()), 400),
    "a labelme picture that ends in .jpeg": (
        lambda f: labelme(f, {"points": PAIRS}, picture="a.jpeg"),
        441,
    ),
    "a labelme picture that ends in .PNG": (
        lambda f: labelme(f, {"points": PAIRS}, picture="a.PNG"),
        441,
    ),
    "a labelme rectangle that is rotated": (
        lambda f: labelme(
            f, {"shape_type": "rectangle", "points": [[20, 5], [30, 15], [20, 25], [10, 15]]}
        ),
        221,
    ),
    "a labelme corner beside a polygon": (
        lambda f: labelme(f, {"points": PAIRS}, {"points": [[0, 0], [1.5, 0], [1.5, 1.5]]}),
        445,
    ),
    "the labelme picture that its file names": (
        lambda f: (
            labelme(f, {"points": PAIRS}, imagePath="x/a.png", imageWidth=60, imageHeight=40),
            photo((9, 9)).save(f / "test/a.jpg"),
            photo().save(f / "test/a.png"),
        ),
        441,
    ),
    "a TIFF that EXIF turns": (
        lambda f: (
            photo().save(f / "a.tif", exif=TURNED),
            grey(square().T).save(f / "m.png"),
            write(f, image="a.tif", mask="m.png"),
        ),
        400,
    ),
    "a picture with broken EXIF": (
        lambda f: (photo().save(f / "a.png", exif=b"Exif\0\0garbage"), write(f, mask=POLYGON)),
        400,
    ),
    "a box that is null beside a mask": (lambda f: write_line(f, mask=POLYGON, box=None), 400),
    "a mask beside a box": (lambda f: write_line(f, mask=POLYGON, box=[1, 1, 9, 9]), 400),
    "a folder in another Unicode form than its file": (
        lambda f: (
            f.joinpath("Cafe\u0301").mkdir(),
            photo().save(f / "Cafe\u0301/\u00e9.png"),
            write(f, image="Caf\u00e9/\u00e9.png", mask=POLYGON),
        ),
        400,
    ),
    "a list of boxes": (box_list, 400),
    "a table of masks": (lambda f: tables(f, square().tolist()), 400),
    "a table of masks as numbers": (lambda f: tables(f, square().astype(int).tolist()), 400),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_file_gives_the_pixels_that_it_holds(name, tmp_path):
    build, pixels = GOOD[name]
    (tmp_path / "mine").mkdir()
    build(tmp_path / "mine")
    data = load_data(str(tmp_path / "mine"), "test", 5)
    data.check_files()
    [sample] = data
    assert sample.mask.sum() == pytest.approx(pixels, rel=0.05)
    assert sample.mask.shape == (sample.image.height, sample.image.width)
    if sample.image.size == SIZE and pixels >= 400 and "leaves" not in name:
        assert (sample.mask & square()).sum() >= 380


def test_masks_in_a_table_may_be_lists_of_any_arrow_type(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for number, kind in enumerate(
        (pyarrow.large_list, pyarrow.list_, lambda item: pyarrow.list_(item, 60))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        table = pyarrow.table(
            {
                "image": [png()],
                "text": ["?"],
                "ann_id": ["1"],
                "mask": pyarrow.array([square().tolist()], pyarrow.list_(kind(pyarrow.bool_()))),
            }
        )
        pyarrow.parquet.write_table(table, folder / "test.parquet")
        assert (open_data(str(folder), "test", 1)[0].mask == square()).all()


LINE = "data.jsonl line 2"
BAD = {  # name: (what writes the folder, what the message names)
    "shares": (lambda f: write(f, mask=[0.1, 0.1, 0.5, 0.1, 0.5, 0.6, 0.1, 0.6]), LINE),
    "shares that rounding lifts above 1": (
        lambda f: write(f, mask=[0.1, 0.1, 1.004, 0.1, 1.004, 1, 0.1, 1]),
        LINE,
    ),
    "shares in pairs": (lambda f: write(f, mask=[[0.1, 0.1], [0.5, 0.1], [0.5, 0.6]]), LINE),
    "a box in shares": (lambda f: write(f, box=[0.1, 0.2, 0.5, 0.6]), LINE),
    "thousandths": (lambda f: write(f, mask=[166, 125, 500, 125, 500, 625, 166, 625]), LINE),
    "pixels of a larger copy": (
        lambda f: write(f, mask=[40, 20, 120, 20, 120, 100, 40, 100]),
        LINE,
    ),
    "an absurd coordinate": (lambda f: write(f, mask=[10, 5, 1e8, 5, 30, 25]), LINE),
    "an absurd coordinate below 0": (lambda f: write(f, mask=[10, 5, -1e8, 5, 30, 25]), LINE),
    "a box that leaves the picture": (lambda f: write(f, box=[10, 5, 80, 25]), LINE),
    "a reversed box": (lambda f: write(f, box=[30, 5, 10, 25]), LINE),
    "a box without a pixel": (lambda f: write(f, box=[10.1, 5, 10.4, 25]), LINE),
    "a polygon on a line": (lambda f: write(f, mask=[10.1, 5.1, 10.2, 5.2, 10.3, 5.3]), LINE),
    "polygons of two points": (lambda f: write(f, mask=[[10, 5, 30, 25], [1, 1, 2, 2]]), LINE),
    "an empty segmentation": (lambda f: write(f, mask=[]), LINE),
    "an empty RLE": (lambda f: write(f, mask=rle(np.zeros((HEIGHT, WIDTH)))), LINE),
    "a black PNG": (lambda f: mask_file(f, "m.png", grey(square(), 0)), LINE),
    "an RLE of swapped size": (lambda f: write(f, mask=rle(square().T)), LINE),
    "rows of another size": (lambda f: write(f, mask=square().T.astype(int).tolist()), LINE),
    "rows without a 1": (lambda f: write(f, mask=[[0] * WIDTH] * HEIGHT), LINE),
    "a mask as JPEG": (lambda f: mask_file(f, "m.jpg", grey(square())), LINE),
    "a mask as WebP": (lambda f: mask_file(f, "m.webp", grey(square())), LINE),
    "a transparent mask": (
        lambda f: mask_file(f, "m.png", Image.merge("LA", [grey(square())] * 2)),
        LINE,
    ),
    "a mask of another size": (lambda f: mask_file(f, "m.png", grey(square()[:30])), LINE),
    "a mask of several pages": (
        lambda f: (several_pages(f, "m.tiff"), write(f, mask="m.tiff")),
        LINE,
    ),
    "a picture of several pages": (
        lambda f: (several_pages(f, "a.gif"), write(f, image="a.gif", mask=rle(square()))),
        LINE,
    ),
    "a mask before the turn by EXIF": (lambda f: turned_picture(f, TURNED, grey(square())), "EXIF"),
    "an RLE before the turn by EXIF": (
        lambda f: (photo().save(f / "a.png", exif=TURNED), write(f, mask=rle(square()))),
        "EXIF",
    ),
    "a polygon before the turn by EXIF": (
        lambda f: (photo().save(f / "a.png", exif=TURNED), write(f, mask=[45, 5, 58, 5, 58, 25])),
        "EXIF",
    ),
    "a picture that is cut off": (lambda f: cut_off(f, "a.png", mask=rle(square())), LINE),
    "a mask that is cut off": (lambda f: cut_off(f, "m.png", mask="m.png"), LINE),
    "a picture that is not there": (lambda f: write(f, image="b.png", mask=POLYGON), LINE),
    "a path that leads out": (
        lambda f: (photo().save(f.parent / "a.png"), write(f, image="../a.png", mask=POLYGON)),
        LINE,
    ),
    "an absolute path": (
        lambda f: (
            photo().save(f.parent / "a.png"),
            write(f, image=str(f.parent / "a.png"), mask=POLYGON),
        ),
        LINE,
    ),
    "an unknown split": (lambda f: write(f, split="held out", mask=POLYGON), LINE),
    "no question": (lambda f: write(f, question=" ", mask=POLYGON), LINE),
    "a mask that is a number": (lambda f: write(f, mask=7), LINE),
    "boxes beside masks": (
        lambda f: (
            write(f, mask=POLYGON),
            add_line(f, image="a.png", question="?", box=[1, 1, 9, 9], split="test"),
        ),
        "data.jsonl",
    ),
    "a text in UTF-16": (
        lambda f: (f / "data.jsonl").write_text('{"image": "a.png"}', encoding="utf-16"),
        "UTF-8",
    ),
    "a mask as JPEG 2000": (
        lambda f: mask_file(f, "m.jp2", grey(square()), irreversible=True),
        LINE,
    ),
    "a mask as a TIFF with JPEG inside": (
        lambda f: mask_file(f, "m.tif", grey(square()), compression="jpeg"),
        LINE,
    ),
    "rows of a label, turned": (lambda f: write(f, mask=(square().T * 7).tolist()), LINE),
    "the picture as its own mask": (lambda f: write(f, mask="a.png"), LINE),
    "a path with backslashes": (lambda f: write(f, image="b\\a.png", mask=POLYGON), LINE),
    "a question of a whole book": (
        lambda f: write(f, question="what? " * 9000, mask=POLYGON),
        LINE,
    ),
    "an RLE without an end": (
        lambda f: write(f, mask={"size": [40, 60], "counts": "o" * 300_000}),
        LINE,
    ),
    "labelme shapes for a larger copy": (
        lambda f: labelme(f, {"points": PAIRS}, imageWidth=640, imageHeight=480),
        "a.json",
    ),
    "a link that leads nowhere": (
        lambda f: (labelme(f, {"points": PAIRS}), (f / "test/b.json").symlink_to("nowhere")),
        "b.json",
    ),
    "a table of masks with nulls": (
        lambda f: tables(f, [[None] * 60] + square().tolist()[1:]),
        "parquet row 1",
    ),
    "a table of ragged masks": (
        lambda f: tables(f, [[True] * 80, [False] * 40] * 20),
        "parquet row 1",
    ),
    "a labelme point": (
        lambda f: labelme(f, {"shape_type": "point", "points": [[10, 5]]}),
        "'point'",
    ),
    "a labelme line": (
        lambda f: labelme(f, {"shape_type": "line", "points": [[10, 5], [30, 5]]}),
        "'line'",
    ),
    "a labelme polygon in shares": (
        lambda f: labelme(f, {"points": [[0.1, 0.1], [0.5, 0.1], [0.5, 0.6]]}),
        "a.json",
    ),
    "a labelme polygon of a larger copy": (
        lambda f: labelme(f, {"points": [[10, 5], [300, 5], [30, 250]]}),
        "a.json",
    ),
    "an absurd labelme circle": (
        lambda f: labelme(f, {"shape_type": "circle", "points": [[20, 15], [1e8, 15]]}),
        "a.json",
    ),
    "labelme shapes without a pixel": (
        lambda f: labelme(f, {"points": [[10, 5], [30, 25]]}),
        "a.json",
    ),
    "a labelme file without text": (lambda f: labelme(f, {"points": PAIRS}, text=[]), "text"),
    "a labelme file without its picture": (
        lambda f: labelme(f, {"points": PAIRS}, picture=""),
        "a.jpg",
    ),
    "a list with a reversed box": (
        lambda f: box_list(f, solution=[30, 5, 10, 25]),
        "test.json row 1",
    ),
    "a list with a box in shares": (
        lambda f: box_list(f, solution=[0.1, 0.1, 0.5, 0.6]),
        "test.json row 1",
    ),
    "a list with another key": (
        lambda f: (f / "test.json").write_text('[{"image": "1.png", "bbox": [1, 2, 3, 4]}]'),
        "test.json",
    ),
    "annotations as COCO has them": (
        lambda f: (f / "test.json").write_text('{"images": [], "annotations": []}'),
        "test.json",
    ),
    "a table whose masks are pictures": (lambda f: tables(f, png()), "column mask"),
    "a table whose masks have another size": (
        lambda f: tables(f, square().T.tolist()),
        "parquet row 1",
    ),
}


def add_line(folder, **line):
    with (folder / "data.jsonl").open("a") as file:
        file.write("\n" + json.dumps(line))


def cut_off(folder, name, **line):
    write(folder, **line)
    file = folder / name
    noise = photo().convert("L") if name == "m.png" else photo()
    noise.save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_ends_the_command_with_one_line_before_the_first_step(
    name, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    build, words = BAD[name]
    (tmp_path / "mine").mkdir()
    build(tmp_path / "mine")
    common = ["--preset", "tiny", "--device", "cpu", "--data", "mine"]
    with pytest.raises(SystemExit) as left:
        if (tmp_path / "mine/data.jsonl").exists():
            small = ["--samples", "4", "--questions", "2", "--updates", "1", "--run", "run"]
            train.main([*common, *small, "--accuracy", "box-iou"])
        else:  # files of a set, which have no training split
            evaluate.main([*common, "--out", "out"])
    said = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2
    assert said[-1].startswith(("train.py: error: ", "eval.py: error: ")) and words in said[-1]
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_there_are_forty_files_and_more():
    assert len(GOOD) + len(BAD) >= 40


# ---------------------------------------------------------------------------------------------------- warnings


def test_a_mask_of_the_whole_picture_is_counted_in_one_warning(tmp_path):
    mask_file(tmp_path, "m.png", grey(square() | True))
    data = open_data(str(tmp_path), "test", 5)
    data.check_files()
    assert len(data.warnings) == 1 and "1 masks" in data.warnings[0] and "black" in data.warnings[0]


def test_a_box_of_the_whole_picture_is_no_mask_with_a_white_background(tmp_path):
    photo().save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "it", "box": [0, 0, WIDTH, HEIGHT], "split": "test"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    data = open_data(str(tmp_path), "test", 5)
    data.check_files()
    assert not data.warnings


@pytest.mark.parametrize("count, warned", [(9, False), (12, True)])
def test_masks_that_are_white_where_they_should_be_black_are_a_warning(count, warned, tmp_path):
    lines = []
    for i in range(count):
        photo().save(tmp_path / f"{i}.png")
        grey(~square()).save(tmp_path / f"m{i}.png")
        row = {"image": f"{i}.png", "question": "the square", "mask": f"m{i}.png", "split": "test"}
        lines.append(json.dumps(row))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    data = open_data(str(tmp_path), "test", count)
    data.check_files()
    assert any(f"{count} masks" in line and "black" in line for line in data.warnings) == warned


def test_a_mask_file_of_several_objects_is_refused(tmp_path):
    objects = np.zeros((HEIGHT, WIDTH), np.uint8)
    objects[5:10, 5:10], objects[20:25, 20:25] = 1, 2
    colours = Image.fromarray(objects, "P")
    colours.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])  # equally bright
    for image in (Image.fromarray(objects), colours, Image.fromarray(objects.astype(np.uint16))):
        mask_file(tmp_path, "m.png", image)
        with pytest.raises(UserError, match="line 2: m.png: .*one mask for each object"):
            open_data(str(tmp_path), "test", 5).check_files()


@pytest.mark.parametrize("name", ["a.png", "m.png", "data.jsonl"])
def test_a_pointer_of_git_lfs_is_named_with_the_command_that_fetches_the_file(name, tmp_path):
    mask_file(tmp_path, "m.png", grey(square()))
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match=f"{name}.*git lfs pull"):
        open_data(str(tmp_path), "test", 5).check_files()


def test_a_broken_link_and_a_mask_in_quotes_are_named(tmp_path):
    mask_file(tmp_path, "m.png", grey(square()))
    (tmp_path / "m.png").unlink()
    (tmp_path / "m.png").symlink_to("elsewhere.png")
    with pytest.raises(UserError, match="m.png is a broken link"):
        open_data(str(tmp_path), "test", 5)
    row = {"image": "a.png", "question": "the square", "mask": "[[1, 1, 20, 1, 20, 20]]"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="remove the quotes"):
        open_data(str(tmp_path), "test", 5)


def test_a_data_file_with_another_name_or_in_another_folder_is_named(tmp_path):
    (tmp_path / "inner").mkdir()
    mask_file(tmp_path / "inner", "m.png", grey(square()))
    file = tmp_path / "inner" / "data.jsonl"
    for name, match in ((tmp_path, "inner.data.jsonl"), (file, "is a file; name its folder")):
        with pytest.raises(UserError, match=match):
            open_data(str(name), "test", 5)
    file = file.rename(file.with_name("data.jsonl.txt"))  # as Windows Notepad saves it
    with pytest.raises(UserError, match="data.jsonl.txt"):
        open_data(str(tmp_path / "inner"), "test", 5)


def damaged_png(file, image):
    """A PNG whose pixels are damaged, but not cut off."""
    image.save(file)
    data = bytearray(file.read_bytes())
    start = data.index(b"IDAT") + 4
    middle = start + (len(data) - start) // 2
    data[middle : middle + 40] = bytes(40)
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["a.png", "m.png"])
def test_a_picture_or_a_mask_with_damaged_pixels_is_refused(name, tmp_path):
    noise = np.random.default_rng(0).integers(0, 2, (HEIGHT, WIDTH)).astype(bool)
    mask_file(tmp_path, "m.png", grey(noise))
    damaged_png(tmp_path / name, photo() if name == "a.png" else grey(noise))
    data = open_data(str(tmp_path), "test", 5)
    with pytest.raises(UserError, match=f"line 2: {name}: not a readable picture"):
        data.check_files()


def test_undecided_pixels_that_cover_the_whole_mask_are_refused(tmp_path):
    """Else every answer, even an empty one, would have the IoU 1."""
    grey(square()).save(tmp_path / "m.png")
    grey(square() | True).save(tmp_path / "i.png")
    write(tmp_path, mask="m.png", ignore="i.png")
    with pytest.raises(UserError, match="line 2: .ignore. covers the whole mask"):
        open_data(str(tmp_path), "test", 5).check_files()


def test_missing_values_of_pandas_are_no_values(tmp_path):
    nan = float("nan")
    write(tmp_path, mask=nan, masks=[POLYGON, POLYGON], kind=nan, ignore=nan, box=nan)
    sample = open_data(str(tmp_path), "test", 5, objects="several")[0]
    assert len(sample.masks) == 2 and sample.kind == "" and sample.ignore is None


def test_a_users_key_picture_does_not_change_the_intervals(tmp_path):
    write(tmp_path, mask=POLYGON, picture="holiday", kind=0)
    sample = open_data(str(tmp_path), "test", 5)[0]
    assert sample.picture == "a.png" and sample.kind == "0"


@pytest.mark.parametrize(
    "line, word",
    [
        ({"mask": ["a.png", "b.png"]}, 'write "masks"'),
        ({"mask": [], "box": [10, 5, 30, 25]}, "an empty mask and a box"),
        ({"mask": None, "masks": [], "box": [10, 5, 30, 25]}, "an empty mask and a box"),
        ({"ignore": 0}, "ignore"),
        ({"mask": "A" * 5000}, "no such file"),
    ],
)
def test_a_line_that_says_two_things_is_refused_with_advice(line, word, tmp_path):
    write_line(tmp_path, **line)
    with pytest.raises(UserError, match="line 2") as refused:
        open_data(str(tmp_path), "test", 5, objects="several")
    assert word in str(refused.value) and len(str(refused.value)) < 500


def test_a_picture_in_two_splits_is_a_warning(tmp_path):
    lines = []
    for name, split in (("a", "train"), ("a", "test"), ("b", "validation"), ("c", "train")):
        photo().save(tmp_path / f"{name}.png")
        row = {"image": f"{name}.png", "question": "what?", "mask": POLYGON, "split": split}
        lines.append(json.dumps(row))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    [warning] = open_data(str(tmp_path), "test", 5).warnings
    assert "another split too" in warning and "a.png" in warning


def test_the_name_of_a_labelme_file_is_no_split(tmp_path):
    content = {"text": ["what?"], "shapes": [{"label": "target", "points": PAIRS}]}
    for name in ("cat", "train-at-platform", "val d isere"):
        photo().save(tmp_path / f"{name}.jpg")
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert len(open_data(str(tmp_path), "test", 5)) == 3


@pytest.mark.parametrize("named, warned", [(4, True), (12, False), (0, False)])
def test_pictures_that_join_a_test_of_named_pictures_are_a_warning(named, warned, tmp_path):
    lines = []
    for i in range(40):
        photo().save(tmp_path / f"{i}.png")
        row = {"image": f"{i}.png", "question": "what?", "mask": POLYGON}
        if i < named:
            row["split"] = "test"
        elif named == 12:
            row["split"] = "train"
        lines.append(json.dumps(row))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    data = open_data(str(tmp_path), "test", 40)
    assert any("a tenth" in line for line in data.warnings) == warned
    assert warned == (len(data) > named > 0)


@pytest.mark.parametrize("mask", [grey(square()), square])
def test_a_turn_by_exif_that_sizes_do_not_tell_is_a_warning(mask, tmp_path):
    """A picture that is turned upside down has the same size, and polygons have none."""
    if mask is square:
        photo().save(tmp_path / "a.png", exif=TURNED)
        write(tmp_path, mask=POLYGON)
    else:
        turned_picture(tmp_path, UPSIDE_DOWN, mask)
    data = open_data(str(tmp_path), "test", 5)
    assert len(data.warnings) == 1 and "EXIF" in data.warnings[0]


def test_a_mask_before_the_turn_is_noticed_beside_an_upright_ignore_file(tmp_path):
    photo().save(tmp_path / "a.png", exif=UPSIDE_DOWN)
    grey(square()).save(tmp_path / "m.png")
    grey(square()).save(tmp_path / "i.png", exif=UPSIDE_DOWN)
    write(tmp_path, mask="m.png", ignore="i.png")
    data = open_data(str(tmp_path), "test", 5)
    assert any("EXIF" in line for line in data.warnings)


def many(folder, count, **options):
    """A folder with many questions for training, each about a picture of its own."""
    lines = [
        {"image": f"{i}.png", "question": "?", "mask": POLYGON, "split": "train", "id": str(i)}
        | options
        for i in range(count)
    ]
    for i in range(count):
        photo(seed=i).save(folder / f"{i}.png")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return str(folder)


def test_coordinates_that_never_reach_the_middle_of_any_picture_are_a_warning(tmp_path):
    few, wide = tmp_path / "few", tmp_path / "wide"
    few.mkdir(), wide.mkdir()
    small = [2, 2, 12, 2, 12, 12, 2, 12]
    assert len(open_data(many(few, 30, mask=small), "train", 30, None).warnings) == 1
    assert not open_data(many(wide, 30), "train", 30, None).warnings


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_pictures_are_trained_on_validated_and_tested_with_a_warning(count, tmp_path):
    lines = [
        {"image": f"{i}.png", "question": "?", "mask": POLYGON, "id": str(i)} for i in range(count)
    ]
    for i in range(count):
        photo(seed=i).save(tmp_path / f"{i}.png")
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    sets = [open_data(str(tmp_path), split, 4) for split in ("train", "validation", "test")]
    assert all(set(data.ids) == {str(i) for i in range(count)} for data in sets)
    assert len(sets[0]) == 4 and not sets[0].warnings and sets[1].warnings and sets[2].warnings


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "Val", "VALIDATION"])
def test_a_validation_split_has_any_of_its_usual_names(name, tmp_path):
    write(tmp_path, split=name, mask=POLYGON, id="mine")
    (tmp_path / "set").mkdir()
    parquet(
        tmp_path / "set" / name,
        "part",
        [{"image": png(), "text": "?", "mask": square().tolist(), "ann_id": "1"}],
    )
    assert "mine" in open_data(str(tmp_path), "validation", 9).ids
    assert open_data(str(tmp_path / "set"), "validation", 9).ids == ["1-0"]


# ---------------------------------------------------------------------------------------------------- broken later


def break_pictures(folder, *numbers):
    for i in numbers:
        (folder / f"{i}.png").write_bytes(b"broken")


def test_a_picture_that_breaks_during_training_gives_its_place_to_a_spare_question(
    tmp_path, capsys
):
    data = open_data(many(tmp_path, 250), "train", 240, seed=1)
    first = data[0]
    break_pictures(tmp_path, int(data.ids[3]))
    replaced = [data[i].id for i in (3, 3)]
    again = open_data(many(tmp_path, 250), "train", 240, seed=1)
    break_pictures(tmp_path, int(data.ids[3]))
    assert replaced == [again[3].id] * 2 and replaced[0] not in data.ids  # alike in a resumed run
    assert (np.asarray(data[0].image) == np.asarray(first.image)).all()
    assert data.ids[3] != replaced[0] and f"line {int(data.ids[3]) + 1}" in capsys.readouterr().out


def test_without_pictures_of_spare_questions_another_question_of_the_run_takes_the_place(tmp_path):
    data = open_data(many(tmp_path, 250), "train", 240, seed=1)
    break_pictures(tmp_path, int(data.ids[3]), *(int(line.id) for line in data.spare))
    assert data[3].id == data.ids[4]


def test_a_resumed_run_continues_after_a_training_picture_broke(tmp_path):
    data = open_data(many(tmp_path, 250), "train", 240, seed=1)
    break_pictures(tmp_path, int(data.ids[3]))
    with pytest.raises(UserError, match="data.jsonl line"):
        data.check_files()
    data.check_files(resumed=True)
    break_pictures(tmp_path, int(data.ids[4]), int(data.ids[5]))
    with pytest.raises(UserError, match="3 broken lines"):
        data.check_files(resumed=True)


def test_more_broken_pictures_than_one_in_a_hundred_end_the_run(tmp_path):
    data = open_data(many(tmp_path, 250), "train", 240, seed=1)
    break_pictures(tmp_path, *(int(name) for name in data.ids[:3]))
    data[0], data[1]
    with pytest.raises(UserError, match="data.jsonl line"):
        data[2]


def test_a_broken_test_picture_is_never_replaced(tmp_path):
    data = open_data(many(tmp_path, 30, split="test"), "test", 20)
    break_pictures(tmp_path, int(data.ids[3]))
    with pytest.raises(UserError, match="data.jsonl line"):
        data[3]


def test_of_a_large_training_set_the_first_questions_are_read_before_the_first_step(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(folder_module, "CHECK_SECONDS", -1)
    monkeypatch.setattr(folder_module, "CHECK_COUNT", 10)
    data = open_data(many(tmp_path, 60), "train", 60, seed=1)
    break_pictures(tmp_path, int(data.ids[40]))
    data.check_files()
    break_pictures(tmp_path, int(data.ids[4]))
    with pytest.raises(UserError, match=f"line {int(data.ids[4]) + 1}: "):
        data.check_files()


# ---------------------------------------------------------------------------------------------------- converted sets


def test_one_broken_row_in_a_hundred_is_left_out_and_named(tmp_path):
    rows = [
        {"image": png(i), "text": "?", "mask": square().tolist(), "ann_id": str(i)}
        for i in range(100)
    ]
    rows[7]["mask"] = square().T.tolist()
    data = open_data(parquet(tmp_path, "test", rows), "test", 200)
    assert len(data) == 99 and "7-0" not in data.ids
    assert len(data.warnings) == 1 and "row 8" in data.warnings[0]
    again = open_data(str(tmp_path), "test", 200)  # as it was converted
    assert again.ids == data.ids and again.warnings == data.warnings


def test_a_converted_set_can_be_read_as_a_folder_of_ones_own(tmp_path):
    rows = [
        {"image": png(i), "text": "?", "mask": square().tolist(), "ann_id": str(i)}
        for i in range(3)
    ]
    data = open_data(parquet(tmp_path, "test", rows), "test", 3)
    own = open_data(str(data.folder), "test", 3)
    assert own.ids == data.ids and (own[0].mask == data[0].mask).all()


def test_a_folder_from_elsewhere_cannot_name_where_its_pictures_are(tmp_path):
    secret, mine = tmp_path / "secret", tmp_path / "mine"
    secret.mkdir(), mine.mkdir()
    write(mine, mask=POLYGON)
    (mine / "a.png").rename(secret / "a.png")
    (mine / "source.json").write_text(json.dumps({"pictures": str(secret), "left_out": []}))
    with pytest.raises(UserError, match="a.png"):
        open_data(str(mine), "test", 1)


def test_a_set_without_a_mask_in_a_row_is_counted_in_one_warning(tmp_path):
    rows = [
        {"image": png(i), "text": "?", "mask": (square() & (i > 0)).tolist(), "ann_id": str(i)}
        for i in range(3)
    ]
    data = open_data(parquet(tmp_path, "test", rows), "test", 3)
    data.check_files()
    assert len(data) == 3 and len(data.warnings) == 1 and "--empty-truth" in data.warnings[0]


def test_pairs_and_lists_are_not_copied_into_the_cache(tmp_path):
    box_list(tmp_path)
    data = open_data(str(tmp_path), "test", 1)
    assert not list(data.folder.rglob("*.png")) and data[0].image.size == SIZE
    assert data.folder.parent == public.SETS


# ---------------------------------------------------------------------------------------------------- any value

NUMBERS = st.one_of(
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.sampled_from([0, 1, 5, 30, 0.5, 1e8, -1e300, True]),
)
VALUES = st.recursive(
    st.one_of(NUMBERS, st.none(), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=9),
        st.lists(NUMBERS, min_size=4, max_size=10),
        st.dictionaries(st.sampled_from(["size", "counts", "x"]), inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    part=st.sampled_from(["mask", "box", "ignore", "image", "question", "split", "id", "kind"]),
    value=VALUES,
)
def test_any_value_in_a_line_is_read_or_refused_in_one_line(part, value, tmp_path):
    write(tmp_path, **({"mask": POLYGON} | {part: value}))
    try:
        data = open_data(str(tmp_path), "test", 5)
        data.check_files()
        assert all(sample.mask.any() for sample in data)
    except UserError as error:
        assert "data.jsonl" in str(error) and "\n" not in str(error)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    part=st.sampled_from(["label", "points", "shape_type", "mask", "shapes", "text"]), value=VALUES
)
def test_any_value_in_a_labelme_file_is_read_or_refused_in_one_line(part, value, tmp_path):
    shape, more = {"points": PAIRS, "label": "x"}, {}
    if part in ("shapes", "text"):
        more[part] = value
    else:
        shape[part] = value
    (tmp_path / "test").mkdir(exist_ok=True)
    photo().save(tmp_path / "test/a.jpg")
    (tmp_path / "test/a.json").write_text(json.dumps({"text": ["what?"], "shapes": [shape]} | more))
    try:
        data = open_data(str(tmp_path), "test", 5)
        data.check_files()
        assert all(sample.mask.any() for sample in data)
    except UserError as error:
        assert "a.json" in str(error) or "data.jsonl" in str(error)


# ---------------------------------------------------------------------------------------------------- changed files


def test_a_set_is_converted_again_when_a_file_of_it_changes(tmp_path):
    labelme(tmp_path, {"points": PAIRS})
    assert open_data(str(tmp_path), "test", 1)[0].image.size == SIZE
    photo((90, 70)).save(tmp_path / "test/a.jpg")
    assert open_data(str(tmp_path), "test", 1)[0].image.size == (90, 70)


def test_a_set_of_refer_is_converted_again_when_its_annotations_change(tmp_path):
    refer_folder(tmp_path)
    (tmp_path / "train2014").mkdir()
    for i in range(6):
        photo(seed=i).save(tmp_path / "train2014" / coco_info(i)["file_name"])
    pixels = lambda: [
        x.mask.sum()
        for x in open_data(str(tmp_path), "train", 3, coco_dir=str(tmp_path / "train2014"))
    ]
    before = pixels()
    file = tmp_path / "instances.json"
    file.write_text(
        file.read_text().replace(
            "[[10, 5, 30, 5, 30, 25, 10, 25]]", "[[10, 5, 20, 5, 20, 25, 10, 25]]"
        )
    )
    assert pixels() == [pytest.approx(count / 2, rel=0.05) for count in before]


def test_a_picture_of_another_size_than_the_data_say_is_refused(tmp_path):
    refer_folder(tmp_path)
    for i in range(6):
        photo((120, 80), seed=i).save(tmp_path / coco_info(i)["file_name"])
    with pytest.raises(UserError, match="120 x 80.* 60 x 40"):
        open_data(str(tmp_path), "train", 3, coco_dir=str(tmp_path))


def test_a_table_that_is_there_twice_by_a_link_counts_once(tmp_path):
    tables(tmp_path, square().tolist())
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/test.parquet").symlink_to(next(tmp_path.glob("*.parquet")))
    (tmp_path / "snapshot/loop").symlink_to(tmp_path)
    assert len(open_data(str(tmp_path), "test", 9)) == 1


@pytest.mark.parametrize(
    "size, mask",
    [
        ((1280, 960), [166, 125, 500, 125, 829, 625]),
        ((200, 150), [16, 12, 96, 97, 50, 6]),
    ],
)
def test_thousandths_and_percent_of_large_pictures_are_a_warning(size, mask, tmp_path):
    lines = [
        {"image": "a.png", "question": "?", "mask": mask, "split": "test", "id": str(i)}
        for i in range(12)
    ]
    photo(size).save(tmp_path / "a.png")
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert len(open_data(str(tmp_path), "test", 12).warnings) == 1


def test_the_head_of_a_png_is_read_without_its_pixels(tmp_path, monkeypatch):
    photo().save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: 1 / 0)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: 1 / 0)
    assert read_header(tmp_path / "a.png").size == SIZE
