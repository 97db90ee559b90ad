"""A folder of one's own: masks as people save them, splits that do not leak, and mistakes found at once."""

import io
import json
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools import mask as coco

import eval as evaluate
import train
from samr1_mini.config import UserError
from samr1_mini.data import clean_question, open_data, open_picture
from samr1_mini.data.masks import parse_mask, read_mask, run_lengths
from samr1_mini.runs import check_questions
from tutorials.tiny_world.mirror import Mirrored

SPLITS = ("train", "validation", "test")
SQUARE = [[1, 1, 9, 1, 9, 9, 1, 9]]


def folder_of(path, lines, **text):
    """A folder whose data.jsonl has these lines; what they leave out is filled in; so are pictures."""
    path.mkdir(exist_ok=True)
    rows = [{"image": "a.png", "question": "what?", "mask": SQUARE} | line for line in lines]
    for row in rows:
        if not (path / row["image"]).exists():
            Image.new("RGB", (60, 40)).save(path / row["image"], "PNG")
    (path / "data.jsonl").write_text(
        "\n".join(json.dumps(row, **text) for row in rows), encoding="utf-8"
    )
    return str(path)


def ids(folder, split):
    return open_data(folder, split, 10**6, None).ids


# ---------------------------------------------------------------------------------------------------- masks


def square():
    mask = np.zeros((40, 60), np.uint8)
    mask[5:25, 10:30] = 255
    return Image.fromarray(mask)


def voc(mask):
    """A palette as VOC's masks have it: black first."""
    image = mask.point(lambda v: v // 255).convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0])
    return image


@pytest.mark.parametrize(
    "save",
    [
        lambda m: m,
        lambda m: m.convert("1"),
        lambda m: m.convert("RGB"),
        lambda m: m.convert("RGBA"),
        voc,
        lambda m: m.convert("RGB").quantize(2),
        lambda m: ImageOps.invert(m).convert("P", palette=Image.Palette.ADAPTIVE),
    ],
)
def test_a_mask_is_what_is_not_black_in_whatever_mode_it_is_saved(save, tmp_path):
    saved, truth = save(square()), np.asarray(square()) > 0
    saved.save(tmp_path / "m.png")
    inverted = np.asarray(saved.convert("L"))[0, 0] > 0
    assert (
        read_mask("m.png", tmp_path, (60, 40)) == (truth ^ inverted)
    ).all() and 0 < truth.sum() < truth.size


@pytest.mark.parametrize(
    "kind, white", [(np.float32, 1), (np.float32, 255), (np.uint16, 4095), (np.uint16, 65535)]
)
def test_greys_of_any_depth_are_seen_from_black_to_white(kind, white, tmp_path):
    grey = (np.arange(60 * 40).reshape(40, 60) % 256 / 255 * white).astype(kind)
    Image.fromarray(grey).save(tmp_path / "grey.tiff")
    seen = np.asarray(open_picture(tmp_path / "grey.tiff")).astype(int)
    assert (
        np.abs(seen[..., 0] - grey.astype(float) / white * 255) <= 1
    ).all() and seen.max() == 255


def test_what_is_transparent_is_seen_on_white(tmp_path):
    ink = Image.new("RGB", (60, 40), "black")
    ink.putalpha(square())
    ink.save(tmp_path / "ink.png")
    assert (
        np.asarray(open_picture(tmp_path / "ink.png"))[..., 0] == 255 - np.asarray(square())
    ).all()


def test_a_mask_that_would_be_read_wrong_is_refused_and_one_is_turned_as_its_picture_is(tmp_path):
    square().save(tmp_path / "m.jpg")
    square().save(tmp_path / "m.webp", quality=50)
    for name, kind in (("m.jpg", "JPEG"), ("m.webp", "WEBP")):
        with pytest.raises(ValueError, match=f"{name}.*{kind}"):
            read_mask(name, tmp_path, (60, 40))
    white = Image.new("RGB", (60, 40), "white")
    white.putalpha(square())
    white.save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png.*transparent"):
        read_mask("a.png", tmp_path, (60, 40))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    square().save(tmp_path / "t.png", exif=exif)
    assert (read_mask("t.png", tmp_path, (60, 40)) == (np.asarray(square())[::-1, ::-1] > 0)).all()


def after_jpeg(mask):
    file = io.BytesIO()
    mask.save(file, "JPEG")
    return Image.open(file)


def with_undecided_pixels(mask):
    """A mask as VOC writes it without a palette: 0, 1, and 255 for undecided."""
    values = np.asarray(mask) // 255
    values[:5] = 255
    return Image.fromarray(values)


def with_vocs_palette(mask):
    indices = Image.fromarray(np.asarray(with_undecided_pixels(mask))).convert("P")
    indices.putpalette([0, 0, 0, 128, 0, 0] + 253 * [0, 128, 0] + [224, 224, 192])
    return indices


@pytest.mark.parametrize(
    "spoil",
    [
        with_vocs_palette,
        after_jpeg,
        lambda m: after_jpeg(m.convert("RGB")),
        lambda m: m.resize((61, 41), Image.Resampling.BICUBIC).resize((60, 40)),
        with_undecided_pixels,
    ],
)
def test_a_mask_with_grey_noise_or_undecided_pixels_is_refused(spoil, tmp_path):
    spoil(square()).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match="m.png"):
        read_mask("m.png", tmp_path, (60, 40))


def test_a_mask_in_a_colour_with_a_dark_channel_is_read(tmp_path):
    coloured = Image.new("RGB", (60, 40))
    coloured.paste((255, 20, 147), mask=square())
    coloured.save(tmp_path / "m.png")
    assert read_mask("m.png", tmp_path, (60, 40)).sum() == 400


@pytest.mark.parametrize("mode", ["L", "I;16", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("turn", [5, 6, 7, 8])
def test_a_tiff_that_exif_turns_has_the_pixels_of_its_upright_copy(mode, turn, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    picture = Image.fromarray(noise)
    if mode == "I;16":
        picture = Image.fromarray(noise[..., 0] * np.uint16(257))
    elif mode != "RGB":
        picture = picture.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = turn
    picture.save(tmp_path / "turned.tif", exif=exif)
    turns = {5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}
    picture.transpose(Image.Transpose[turns[turn]]).save(tmp_path / "upright.tif")
    seen = [np.asarray(open_picture(tmp_path / name)) for name in ("turned.tif", "upright.tif")]
    assert seen[0].shape == (60, 40, 3) and (seen[0] == seen[1]).all()


def test_pixels_in_one_list_and_label_studios_rle_are_no_polygon(tmp_path):
    size = (300, 260)
    pixels = np.zeros(size[::-1], int)
    pixels[5:25, 11:30] = 1
    count = list((4 * 300 * 260).to_bytes(4, "big"))
    for value in ((pixels * 255).ravel().tolist(), [*count, 57, 27, 252, 0, 14, 103, 80, 0]):
        with pytest.raises(ValueError):
            read_mask(value, tmp_path, size)
    pixels[:2, 11:30] = 255
    assert parse_mask(pixels.tolist(), None)
    pixels[:2] = 0
    rows = read_mask(pixels.tolist(), tmp_path, size)
    corners = read_mask([0, 0, 255, 0, 255, 255, 0, 255, 0, 0], tmp_path, size)
    assert read_mask([0, 64, 0, 0, 100, 0, 100, 64], tmp_path, (1024, 1024)).any()  # 4 x 2**20
    assert rows.sum() == 380 and corners.sum() == 255**2


@pytest.mark.parametrize("shape", [(37, 53), (1, 9), (300, 400)])
def test_compressed_runs_are_read_as_pycocotools_writes_them(shape):
    rng = np.random.default_rng(0)
    for share in (0.0, 0.001, 0.1, 0.5, 1.0):
        mask = np.asfortranarray((rng.random(shape) < share).astype(np.uint8))
        flat = mask.flatten("F")
        changes = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
        expected = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
        counts = coco.encode(mask)["counts"]
        assert run_lengths(counts) == expected
        assert sum(expected) == math.prod(shape)


GOOD = coco.encode(np.asfortranarray(np.asarray(square()) > 0).astype(np.uint8))["counts"].decode()


@pytest.mark.parametrize(
    "mask, words",
    [
        ({"size": [40, 60], "counts": [100]}, "RLE"),
        ({"size": [40, 60], "counts": []}, "RLE"),
        ({"size": [40, 60], "counts": [-1, 2401]}, "RLE"),
        ({"size": [40, 60], "counts": ""}, "RLE"),
        ({"size": [40, 60], "counts": GOOD[: len(GOOD) // 2]}, "RLE"),
        ({"size": [40, 60], "counts": GOOD + "o"}, "RLE"),
        ({"counts": GOOD}, "size.*counts"),
        ([[1, 1, 9, 1, 9, float("nan")]], "polygon"),
        ([[False, True] * 3] * 2, "6 x 2"),
        (7, "PNG"),
    ],
)
def test_a_mask_that_cannot_be_drawn_is_told_when_the_data_are_opened(mask, words, tmp_path):
    folder = folder_of(tmp_path / "mine", [{"split": "test"}, {"split": "test", "mask": mask}])
    with pytest.raises(UserError, match=f"data.jsonl line 2: .*{words}"):
        open_data(folder, "test", 1)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"mask": "small.png"}, "8 x 9.*60 x 40"),
        ({"mask": "broken.png"}, "broken.png"),
        ({"mask": {"size": [9, 8], "counts": [0, 72]}}, "8 x 9.*60 x 40"),
        ({"image": "broken.png"}, "broken.png"),
        ({"image": "huge.png"}, "huge.png.*pixels"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_when_the_data_are_opened_and_not_when_its_turn_comes(
    change, words, tmp_path, monkeypatch
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 40)  # twice as many are too many
    (tmp_path / "mine").mkdir()
    Image.new("L", (8, 9), 1).save(tmp_path / "mine/small.png")
    Image.new("L", (60, 81)).save(tmp_path / "mine/huge.png")
    (tmp_path / "mine/broken.png").write_text("no picture")
    folder = folder_of(tmp_path / "mine", [{"split": "test"}, {"split": "test"} | change])
    with pytest.raises(UserError, match=f"data.jsonl line 2: .*{words}"):
        open_data(folder, "test", 2)


def test_undecided_pixels_are_mirrored_too(samples):
    undecided = np.zeros_like(samples[0].mask)
    undecided[:, :9] = True
    [x] = Mirrored([replace(samples[0], ignore=undecided)])
    assert (x.ignore == undecided[:, ::-1]).all()


def test_all_polygons_of_a_mask_are_drawn(tmp_path):
    left, right = [5, 5, 15, 5, 15, 15, 5, 15], [30, 20, 45, 20, 45, 35, 30, 35]
    mask = read_mask([left, right], tmp_path, (60, 40))
    assert (
        mask == read_mask(left, tmp_path, (60, 40)) | read_mask(right, tmp_path, (60, 40))
    ).all()
    assert mask[6:14, 6:14].all() and mask[21:34, 31:44].all() and mask.sum() < 400


def test_the_kind_of_a_question_is_what_its_line_says(tmp_path):
    folder = folder_of(
        tmp_path / "mine", [{"split": "test", "kind": kind} for kind in ("side", None)]
    )
    Image.new("RGB", (60, 40)).save(tmp_path / "mine/a.png")
    assert [x.kind for x in open_data(folder, "test", 2)] == ["side", ""]


# ---------------------------------------------------------------------------------------------------- splits


def test_all_questions_about_a_picture_are_in_one_split_however_its_path_is_written(tmp_path):
    (tmp_path / "mine").mkdir(), (tmp_path / "mine/p").mkdir()
    ways = ("p/{}.png", "./p/{}.png", "p/../p/{}.png")
    lines = [{"id": f"{i}", "image": ways[i % 3].format(i // 3)} for i in range(90)]
    folder = folder_of(tmp_path / "mine", lines)
    pictures = {split: {int(one) // 3 for one in ids(folder, split)} for split in SPLITS}
    assert sum(map(len, pictures.values())) == 30 == len(set.union(*pictures.values())) and all(
        pictures.values()
    )
    assert sum(len(ids(folder, split)) for split in pictures) == 90


def test_a_line_without_a_split_goes_where_another_line_has_put_its_picture(tmp_path):
    lines = [
        {"id": f"{i}", "image": f"{i // 2}.png"} | ({"split": "val"} if i in (7, 30) else {})
        for i in range(40)
    ]
    held = ids(folder_of(tmp_path / "mine", lines), "validation")
    assert {"6", "7", "30", "31"} <= set(held)
    pictures = {split: {int(one) // 2 for one in ids(tmp_path / "mine", split)} for split in SPLITS}
    assert sum(map(len, pictures.values())) == 20 == len(set.union(*pictures.values()))
    lines = [
        {"id": f"{i}", "image": f"{i}.png"} | ({"split": "train"} if i > 1 else {})
        for i in range(10)
    ]
    folder = folder_of(tmp_path / "few", lines)
    assert ids(folder, "validation") + ids(folder, "test") in (
        ["0", "1"],
        ["1", "0"],
    )  # of those that are left


def test_lines_that_are_added_or_moved_leave_the_others_in_their_splits(tmp_path):
    lines = [{"id": str(i), "image": f"{i}.png"} for i in range(200)]
    where = lambda folder: {one: split for split in SPLITS for one in ids(folder, split)}
    before, after = (
        where(folder_of(tmp_path / name, some))
        for name, some in (("a", lines[:150]), ("b", lines[::-1]))
    )
    assert before == {one: after[one] for one in before} and len(after) == 200
    assert all(8 <= list(after.values()).count(split) <= 32 for split in ("validation", "test"))


@pytest.mark.parametrize("count", [3, 4, 9])
def test_few_pictures_still_make_three_splits(count, tmp_path):
    folder = folder_of(
        tmp_path / "mine", [{"id": str(i), "image": f"{i}.png"} for i in range(count)]
    )
    found = [ids(folder, split) for split in SPLITS]
    assert all(found) and sorted(sum(found, [])) == [str(i) for i in range(count)]


def test_a_split_is_one_of_three_or_left_out(tmp_path):
    folder = folder_of(
        tmp_path / "a", [{"split": s, "id": s} for s in ("train", "val", "validation", "test")]
    )
    assert [ids(folder, split) for split in SPLITS] == [["train"], ["val", "validation"], ["test"]]
    some = [{"split": None, "id": None, "kind": None, "image": f"{i}.png"} for i in range(9)]
    assert ids(folder_of(tmp_path / "b", some), "train")[0].startswith("line-")
    with pytest.raises(UserError, match="line 1: split 'held out'"):
        open_data(folder_of(tmp_path / "c", [{"split": "held out"}]), "train", 1)


@pytest.mark.parametrize("key", ["Split", "split ", " SPLIT"])
def test_a_key_in_another_case_or_with_blanks_is_refused_and_other_keys_are_not(key, tmp_path):
    assert ids(
        folder_of(tmp_path / "a", [{"source": "web", "ID": 7, "Box": 1, "split": "test"}]), "test"
    )
    with pytest.raises(UserError, match="data.jsonl line 2: .*split"):
        ids(folder_of(tmp_path / "b", [{"split": "train"}, {key: "test"}]), "train")


def test_two_names_of_one_picture_that_differ_in_case_are_refused(tmp_path):
    lines = [{"image": "a.png", "split": "train"}, {"image": "A.png", "split": "test"}]
    folder = folder_of(tmp_path / "mine", lines)
    (tmp_path / "mine/A.png").unlink(missing_ok=True)
    Image.new("RGB", (60, 40)).save(tmp_path / "mine/a.png")
    if not (tmp_path / "mine/A.png").exists():
        os.link(tmp_path / "mine/a.png", tmp_path / "mine/A.png")
    with pytest.raises(UserError, match="line 2: .*A.png.*a.png"):
        ids(folder, "train")


def test_two_pictures_whose_names_differ_in_case_are_two_pictures(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("a.png", "A.png"):
        Image.new("RGB", (60, 40)).save(tmp_path / "mine" / name)
    if (tmp_path / "mine/a.png").samefile(tmp_path / "mine/A.png"):
        pytest.skip("this disk knows no case")
    lines = [{"image": "a.png", "split": "train"}, {"image": "A.png", "split": "test"}]
    folder = folder_of(tmp_path / "mine", lines)
    assert [len(ids(folder, split)) for split in ("train", "test")] == [1, 1]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_a_picture_whose_name_is_not_utf_8_is_refused(tmp_path):
    folder = folder_of(tmp_path / "mine", [{"image": f"{i}.png"} for i in range(4)])
    with (tmp_path / "mine/data.jsonl").open("a") as file:
        row = {"image": "caf\udce9.png", "question": "what?", "mask": SQUARE}
        file.write("\n" + json.dumps(row))
    try:
        Image.new("RGB", (60, 40)).save(tmp_path / "mine" / row["image"], "PNG")
    except OSError:
        pytest.skip("this disk has no such names")
    with pytest.raises(UserError, match="line 5: .*caf"):
        ids(folder, "train")


def test_a_count_that_no_list_can_have_means_all_questions(tmp_path):
    lines = [{"image": f"{i}.png", "split": "test"} for i in range(3)]
    assert len(open_data(folder_of(tmp_path / "mine", lines), "test", 10**20, None)) == 3


def test_a_slice_is_a_list_of_samples_and_numbers_behave_as_a_lists(tmp_path):
    lines = [{"id": str(i), "split": "test"} for i in range(5)]
    own = open_data(folder_of(tmp_path / "mine", lines), "test", 5)
    for data in (own, open_data("shapes", "validation", 5)):
        ids = list(data.ids)
        for part in (slice(4), slice(-2, None), slice(None, None, -2), slice(3, 99), slice(9, 12)):
            assert isinstance(data[part], list)
            assert [sample.id for sample in data[part]] == ids[part]
        assert [data[i].id for i in (-1, -5, np.int64(2))] == [ids[-1], ids[0], ids[2]]
        for i in (5, -6):
            with pytest.raises(IndexError):
                data[i]
        with pytest.raises(TypeError):
            data["0"]


def test_without_a_seed_each_training_question_comes_once(tmp_path):
    folder = folder_of(tmp_path / "mine", [{"id": str(i), "split": "train"} for i in range(7)])
    assert (
        ids(folder, "train") == [str(i) for i in range(7)]
        and len(open_data(folder, "train", 20, 1)) == 20
    )
    assert len(set(open_data(folder, "train", 5, None).ids)) == 5


def test_a_run_does_not_go_on_with_other_questions_or_another_test(tmp_path):
    (tmp_path / "samples.json").write_text('["a", "b"]')
    (tmp_path / "test-base.json").write_text('[{"id": "x"}, {"id": "y"}]')
    sets = lambda train, test: [SimpleNamespace(ids=train), None, SimpleNamespace(ids=test)]
    s = SimpleNamespace(data="mine", eval_data="", empty_truth="correct")
    check_questions(
        tmp_path, sets(["a", "b", "c"], ["x", "y"]), s
    )  # longer, or shorter, is no other run
    check_questions(tmp_path, sets(["a"], ["x", "y"]), s)
    for other in (
        sets(["c", "a", "b"], ["x", "y"]),
        sets(["a", "b"], ["y", "x"]),
        sets(["a", "b"], ["x", "y", "z"]),
        sets(["a", "b"], ["x"]),
    ):
        with pytest.raises(UserError, match="--resume: .* mine .*--data"):
            check_questions(tmp_path, other, s)


# ---------------------------------------------------------------------------------------------------- text


def test_a_line_ends_where_json_says_and_a_byte_order_mark_is_no_part_of_it(tmp_path):
    words = "one\u2028two\u0085three"
    folder = folder_of(
        tmp_path / "mine", [{"question": words, "split": "test"}], ensure_ascii=False
    )
    file = tmp_path / "mine/data.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes() + b"\r\n\r\n")
    Image.new("RGB", (20, 20)).save(tmp_path / "mine/a.png")
    assert open_data(folder, "test", 1)[0].question == words


@pytest.mark.parametrize(
    "question, words",
    [
        ("is it <|image_pad|>?", "<.image_pad.>"),
        ("\ud83d", "surrogates not allowed"),
    ],
)
def test_a_question_that_no_model_can_read_is_told_at_once(question, words, tmp_path, capsys):
    with pytest.raises(UserError, match=f"line 1: .*{words}"):
        open_data(folder_of(tmp_path / "mine", [{"question": question}]), "test", 1)
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as left:
        evaluate.main(
            [
                "--image",
                str(tmp_path / "a.png"),
                "--question",
                question,
                "--out",
                str(tmp_path / "out"),
            ]
        )
    assert left.value.code == 2 and "--question: " in capsys.readouterr().err
    assert clean_question(" a <b> | c ") == "a <b> | c"


def test_a_line_of_a_hundred_thousand_brackets_is_named_too(tmp_path):
    (tmp_path / "data.jsonl").write_text("[" * 100_000)
    with pytest.raises(UserError, match="data.jsonl line 1 "):
        open_data(str(tmp_path), "test", 1)


def test_an_evaluation_set_that_is_not_there_is_named_by_its_own_option_and_no_run_is_begun(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for wrong in ("nosuch", "refcoco_testA"):
        with pytest.raises(SystemExit):
            train.main(["--preset", "tiny", "--device", "cpu", "--eval-data", wrong])
        assert f"train.py: error: --eval-data {wrong}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------- several

LEFT, RIGHT = [5, 5, 15, 5, 15, 15, 5, 15], [30, 20, 45, 20, 45, 35, 30, 35]


def several_folder(path):
    """A folder with several objects in all forms of a mask, with one object, and with nothing."""
    path.mkdir()
    square().save(path / "square.png")
    lines = [
        {"masks": ["square.png", [LEFT, RIGHT], RIGHT, {"size": [40, 60], "counts": GOOD}]},
        {"masks": [LEFT]},
        {"mask": [LEFT, RIGHT]},
        {"mask": []},
        {"masks": []},
    ]
    rows = [{"split": "test", "mask": None, "id": str(i)} | line for i, line in enumerate(lines)]
    return folder_of(path, rows)


def test_masks_are_single_objects_in_every_form_of_a_mask_and_the_mask_is_their_union(tmp_path):
    data = open_data(several_folder(tmp_path / "mine"), "test", 9, objects="several")
    data.check_files()
    assert not data.warnings
    several, one, parts, nothing, no_masks = data
    pixels = np.asarray(square()) > 0
    left, right = (read_mask(polygon, tmp_path, (60, 40)) for polygon in (LEFT, RIGHT))
    expected = [pixels, left | right, right, pixels]
    assert all((a == b).all() for a, b in zip(several.masks, expected, strict=True))
    assert (several.mask == (pixels | left | right)).all()
    assert len(one.masks) == 1 and (one.masks[0] == left).all() and (one.mask == left).all()
    assert parts.masks is None and (parts.mask == (left | right)).all()
    for x in (nothing, no_masks):
        assert x.masks == [] and x.mask.shape == (40, 60) and not x.mask.any()


def test_one_object_takes_the_union_of_several_and_refuses_a_line_without_an_object(tmp_path):
    folder = several_folder(tmp_path / "mine")
    with pytest.raises(UserError, match="data.jsonl line 4: .*--objects several"):
        open_data(folder, "test", 9)
    file = tmp_path / "mine/data.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[:3]))
    several, one, parts = open_data(folder, "test", 9)
    assert several.mask.sum() > parts.mask.sum() > one.mask.sum() > 0


@pytest.mark.parametrize(
    "line, words",
    [
        ({"masks": [LEFT], "mask": LEFT}, "mask and masks"),
        ({"masks": "square.png", "mask": None}, "not a list"),
        ({"masks": LEFT, "mask": None}, "PNG"),
        ({"masks": [LEFT, []], "mask": None}, "empty"),
        ({"masks": [LEFT, "black.png"], "mask": None}, "empty"),
        ({"masks": [LEFT, "no.png"], "mask": None}, "no.png"),
        ({"masks": [LEFT, "a.png"], "mask": None}, "same file"),
        ({"masks": [LEFT, [500, 5, 510, 5, 510, 15]], "mask": None}, "510"),
    ],
)
def test_a_wrong_list_of_masks_is_one_line_that_names_the_line(line, words, tmp_path):
    (tmp_path / "mine").mkdir()
    Image.new("L", (60, 40)).save(tmp_path / "mine/black.png")
    folder = folder_of(tmp_path / "mine", [{"split": "test"}, {"split": "test"} | line])
    with pytest.raises(UserError, match=f"data.jsonl line 2: .*{words}"):
        open_data(folder, "test", 2, objects="several").check_files()


def test_the_masks_of_single_objects_are_mirrored_too(tmp_path):
    data = open_data(several_folder(tmp_path / "mine"), "test", 9, objects="several")
    for x, flipped in zip(data, Mirrored(data)):
        pairs = zip(x.masks or [], flipped.masks or [], strict=True)
        assert all((a[:, ::-1] == b).all() for a, b in pairs)
