"""Public data sets: small copies of each published layout, read through the same function as the real ones."""

import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from conftest import score
from samr1_mini.config import UserError
from samr1_mini.data import load_data, open_data
from samr1_mini.data import public
from samr1_mini.data.layouts import draw_shapes
from samr1_mini.metrics import filled, intersection_union

WIDTH, HEIGHT = 60, 40
SQUARE = [10, 5, 30, 5, 30, 25, 10, 25]  # a polygon: x 10 to 30, y 5 to 25


def picture(number=0):
    pixels = np.random.default_rng(number).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(number=0):
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{number}.png"}


def square():
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[5:25, 10:30] = True
    return mask


def coco_info(number):
    """As the real rows have it, with COCO v1.0's address of the picture, which leads nowhere any more."""
    return {
        "file_name": f"COCO_train2014_{number:012}.png",
        "height": HEIGHT,
        "width": WIDTH,
        "id": number,
        "coco_url": f"http://mscoco.org/images/{number}",
        "license": 1,
    }


def coco_rows(count=6):
    """jxu124/refcocog: expressions and annotations as JSON text, no pictures; one mask as RLE, the others as
    polygons."""
    rle = coco.encode(np.asfortranarray(square()))
    masks = [{"size": rle["size"], "counts": rle["counts"].decode()}, [SQUARE]]
    return [
        {
            "ref_id": i,
            "split": "train",
            "image_id": i,
            "ann_id": i,
            "file_name": f"COCO_train2014_{i:012}_{i}.png",
            "sentences": [
                {"raw": f"The square, {i}.", "sent": f"the square {i}", "sent_id": i, "tokens": []},
                {"raw": f"it {i}", "sent": f"it {i}", "sent_id": i, "tokens": []},
            ],
            "raw_anns": json.dumps({"segmentation": masks[min(i, 1)], "bbox": [10, 5, 20, 20]}),
            "raw_image_info": json.dumps(coco_info(i)),
        }
        for i in range(count)
    ]


@pytest.fixture(autouse=True)
def sets(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(public, "SETS", tmp_path_factory.mktemp("sets"))


@pytest.fixture
def coco_dir(tmp_path):
    folder = tmp_path / "train2014"
    folder.mkdir()
    for i in range(6):
        picture(i).save(folder / coco_info(i)["file_name"])
    return folder


def parquet(folder, name, rows):
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), folder / f"{name}-00000-of-00001.parquet"
    )
    return str(folder)


def test_refcocog_of_the_hub_gives_expression_picture_and_mask(tmp_path, coco_dir):
    folder = parquet(tmp_path / "set", "train", coco_rows())
    data = load_data(folder, "train", 6, seed=1, coco_dir=str(coco_dir))
    assert sorted(s.question for s in data) == [f"The square, {i}." for i in range(6)]
    for sample in data:
        number = int(sample.id.split("-")[0])
        assert (np.asarray(sample.image) == np.asarray(picture(number))).all()
        assert (sample.mask == square()).mean() > 0.98 and not sample.box_only
        assert sample.picture == coco_info(number)["file_name"]
    again, other = (
        load_data(folder, "train", 6, seed=seed, coco_dir=str(coco_dir)) for seed in (1, 2)
    )
    assert data.ids == again.ids != other.ids


def test_all_sentences_make_a_question_each(tmp_path, coco_dir):
    data = load_data(
        parquet(tmp_path / "set", "train", coco_rows()),
        "train",
        12,
        sentences="all",
        coco_dir=str(coco_dir),
    )
    assert len({s.question for s in data}) == 12 and len(set(data.ids)) == 12


def test_lmms_lab_refcocog_has_its_expressions_under_answer(tmp_path):
    rows = [
        {
            "question_id": "7",
            "image": png(),
            "question": "Describe the region.",
            "answer": ["a square", "it"],
            "segmentation": [float(v) for v in SQUARE],
            "bbox": [10.0, 5.0, 20.0, 20.0],
            "iscrowd": 0,
            "file_name": "COCO_train2014_000000000007_12.jpg",
        }
    ]
    [sample] = load_data(parquet(tmp_path / "set", "val", rows), "validation", 5)
    assert sample.picture == "COCO_train2014_000000000007.jpg"
    assert sample.question == "a square" and (sample.mask == square()).mean() > 0.98


def test_evaluation_sets_hold_masks_as_rows_of_booleans(tmp_path):
    rows = [
        {
            "image": png(3),
            "text": "what is square?",
            "mask": square().tolist(),
            "image_id": "a",
            "ann_id": "b",
            "img_height": HEIGHT,
            "img_width": WIDTH,
        }
    ]
    folder = parquet(tmp_path / "set", "test", rows)
    [sample] = load_data(folder, "test", 5)
    assert sample.question == "what is square?" and (sample.mask == square()).all()
    assert sample.id == "b-0" and sample.picture == "a"
    with pytest.raises(UserError, match="--ignore excluded"):
        open_data(folder, "test", 5, ignore="excluded")


def test_boxes_without_masks_are_marked_and_scored_as_boxes(tmp_path, segmenter):
    rows = [
        {
            "id": "1",
            "problem": "the square",
            "solution": "<box>(10,5),(30,25)</box><points>(15,10),(20,20)</points>",
            "image": png(),
            "img_height": 480,
            "img_width": 640,
        }
    ]
    data = load_data(parquet(tmp_path / "set", "train", rows), "train", 1)
    [sample] = data
    assert data.box_only and sample.box_only and (sample.mask == square()).all()
    # in a frame of 112 x 112
    text = '<think>.</think><answer>{"bbox": [%d, 14, %d, 70], "points": [[40, 40, 1]]}</answer>'
    good, half = score(
        segmenter, sample, [text % (18.667, 56), text % (18.667, 37)], 112, accuracy="box-iou"
    )
    assert good.box_iou > 0.95 and good.terms["accuracy"] == 4 and 0.4 < half.box_iou < 0.6
    assert good.iou == pytest.approx(good.box_iou, abs=0.05)


def test_lisa_grounding_is_a_json_list_of_boxes(tmp_path):
    picture().save(tmp_path / "1.png")
    (tmp_path / "lisa_test.json").write_text(
        json.dumps([{"image": "1.png", "problem": "the square", "solution": [10, 5, 30, 25]}])
    )
    [sample] = load_data(str(tmp_path), "test", 3)
    assert sample.box_only and sample.question == "the square" and (sample.mask == square()).all()


def test_files_that_name_no_split_are_for_testing_and_never_for_training(tmp_path):
    rows = [{"image": png(), "text": "x", "mask": square().tolist(), "ann_id": "1"}]
    folder = parquet(tmp_path / "set", "data", rows)
    assert len(load_data(folder, "test", 3)) == 1
    for split in ("train", "validation"):
        with pytest.raises(UserError, match=f"{split} split"):
            load_data(folder, split, 3)


def test_parts_of_a_table_that_are_missing_or_there_twice_are_refused_and_testb_is_left_out(
    tmp_path,
):
    rows = [{"image": png(), "text": "x", "mask": square().tolist(), "ann_id": "1"}]
    for name in ("test-00000-of-00003", "test-00002-of-00003"):
        parquet(tmp_path / "set", name, rows)
    with pytest.raises(UserError, match="missing"):
        load_data(str(tmp_path / "set"), "test", 9)
    parquet(tmp_path / "set", "test-00001-of-00003", rows)
    assert len(load_data(str(tmp_path / "set"), "test", 9)) == 3
    parquet(tmp_path / "set", "test-00001-of-00003 (1)", rows)
    with pytest.raises(UserError, match="twice"):
        load_data(str(tmp_path / "set"), "test", 9)
    for name, count in (("testA", 1), ("testB", 2)):
        parquet(tmp_path / "coco", name, rows * count)
    data = load_data(str(tmp_path / "coco"), "test", 9)
    assert len(data) == 1 and "testB" in data.warnings[0]


def test_two_downloads_side_by_side_are_told_apart_by_their_folders_and_not_by_what_each_calls_its_only_file(
    tmp_path,
):
    for name, count in (("ReasonSeg_val", 2), ("ReasonSeg_test", 3)):
        rows = [
            {"image": png(), "text": "x", "mask": square().tolist(), "ann_id": str(i)}
            for i in range(count)
        ]
        parquet(tmp_path / "dump" / name, "test", rows)
    assert [
        len(load_data(str(tmp_path / "dump"), split, 9)) for split in ("validation", "test")
    ] == [2, 3]


def refer_folder(folder, coco_info=coco_info):
    refs = [
        {
            "ref_id": i,
            "ann_id": 10 + i,
            "image_id": i,
            "split": ["train", "val"][i % 2],
            "sentences": [{"raw": f"no {i}", "sent": f"no {i}"}],
        }
        for i in range(6)
    ]
    (folder / "refs(umd).p").write_bytes(pickle.dumps(refs, protocol=2))
    annotations = [{"id": 10 + i, "image_id": i, "segmentation": [SQUARE]} for i in range(6)]
    (folder / "instances.json").write_text(
        json.dumps({"annotations": annotations, "images": [coco_info(i) for i in range(6)]})
    )


def test_the_original_refer_layout_reads_the_same(tmp_path, coco_dir):
    refer_folder(tmp_path)
    assert sorted(
        s.question for s in load_data(str(tmp_path), "train", 3, coco_dir=str(coco_dir))
    ) == ["no 0", "no 2", "no 4"]
    validation = load_data(str(tmp_path), "validation", 9, coco_dir=str(coco_dir))
    assert [s.question for s in validation] == ["no 1", "no 3", "no 5"] and (
        validation[0].mask == square()
    ).mean() > 0.98
    refs = pickle.loads((tmp_path / "refs(umd).p").read_bytes())
    for row in refs:  # as RefCOCO's and RefCOCO+'s
        row["split"] = ["train", "testA", "testB"][row["ref_id"] % 3]
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    assert [s.question for s in load_data(str(tmp_path), "test", 9, coco_dir=str(coco_dir))] == [
        "no 1",
        "no 4",
    ]


def test_a_test_split_without_testb_is_a_warning(tmp_path, coco_dir):
    refer_folder(tmp_path)
    refs = pickle.loads((tmp_path / "refs(umd).p").read_bytes())
    for name, others, expected in ("umd", ["test"], 0), ("unc", ["testA", "testB"], 1):
        for row in refs:
            row["split"] = ["train", *others][row["ref_id"] % (len(others) + 1)]
        (tmp_path / f"refs({name}).p").write_bytes(pickle.dumps(refs, protocol=2))
        warnings = {
            split: open_data(str(tmp_path), split, 9, coco_dir=str(coco_dir)).warnings
            for split in ("train", "test")
        }
        assert not warnings["train"] and len(warnings["test"]) == expected
        assert all("testB" in line for line in warnings["test"])


@pytest.mark.parametrize(
    "name, split",
    [
        ("training", "train"),
        ("Testing", "test"),
        ("training_data/val", "validation"),  # a short word counts more than a long one
        ("training_data/test", "test"),
    ],
)
def test_usual_words_for_a_split_are_recognised_in_the_names_of_folders(name, split, tmp_path):
    rows = [{"image": png(), "text": "x", "mask": square().tolist(), "ann_id": "1"}]
    for folder in (name, "dev" if split != "validation" else "train"):
        parquet(tmp_path / "set" / folder, "data", rows)
    data = open_data(str(tmp_path / "set"), split, 3, None)
    assert len(data) == 1 and not data.warnings


def test_files_without_a_split_beside_files_with_one_are_a_warning_of_the_test_split(tmp_path):
    rows = [{"image": png(), "text": "x", "mask": square().tolist(), "ann_id": "1"}]
    alone = parquet(tmp_path / "alone", "data", rows)
    assert not open_data(alone, "test", 9).warnings
    for name in ("train", "held-out", "more"):
        folder = parquet(tmp_path / "set" / name, "data", rows)
    folder = str(tmp_path / "set")
    [warning] = open_data(folder, "test", 9).warnings
    assert "2 files" in warning and not open_data(folder, "train", 9).warnings
    parquet(tmp_path / "set/test", "data", rows)
    assert not open_data(folder, "test", 9).warnings


def test_pictures_in_a_table_may_be_plain_bytes(tmp_path):
    rows = [{"image": png()["bytes"], "text": "x", "mask": square().tolist(), "ann_id": "1"}]
    [sample] = open_data(parquet(tmp_path / "set", "test", rows), "test", 3)
    assert (np.asarray(sample.image) == np.asarray(picture())).all()


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    refer_folder(tmp_path)
    (tmp_path / "refs(umd).p").write_bytes(pickle.dumps([Hostile()]))
    with pytest.raises(UserError, match=r"refs\(umd\).p.*exec"):
        load_data(str(tmp_path), "train", 1)


def reasonseg_folder(folder):
    (folder / "val").mkdir()
    picture().save(folder / "val/a.jpg")
    corners = [[10, 5], [29, 5], [29, 24], [10, 24]]
    shapes = [
        {"label": "target", "points": corners},
        {"label": "ignore", "points": [[20, 5], [40, 5], [40, 24], [20, 24]]},
        {"label": "flag", "points": [[1, 1]]},
    ]
    (folder / "val/a.json").write_text(
        json.dumps({"text": ["what is square?", "which?"], "is_sentence": True, "shapes": shapes})
    )


def test_undecided_pixels_are_foreground_or_excluded(tmp_path):
    reasonseg_folder(tmp_path)
    [foreground] = load_data(str(tmp_path), "validation", 5)
    [excluded] = load_data(str(tmp_path), "validation", 5, ignore="excluded")
    assert foreground.question == "what is square?" and foreground.ignore is None
    assert foreground.mask[5:25, 10:41].all() and foreground.mask.sum() == 20 * 31
    # the target is the smaller of the two, so it is drawn over what is undecided
    assert (
        excluded.mask[5:25, 10:30].all()
        and excluded.mask.sum() == 20 * 20
        and excluded.ignore.sum() == 20 * 11
    )
    everything = np.ones((HEIGHT, WIDTH), bool)
    assert intersection_union(everything, excluded.mask, excluded.ignore) == (
        20 * 20,
        HEIGHT * WIDTH - 20 * 11,
    )
    assert intersection_union(None, foreground.mask, excluded.ignore) == (
        0,
        20 * 20,
    )  # an answer that cannot be read


def test_reasonseg_is_drawn_as_its_authors_draw_it():
    """From the largest polygon to the smallest; "ignore" in a label is enough, any other label but flag is meant."""
    box = lambda x1, y1, x2, y2: [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]
    meant, undecided = draw_shapes(
        [
            {"label": "ignore_1", "points": box(4, 4, 5, 5)},
            {"label": "dog", "points": box(2, 2, 7, 7)},
            {"label": "Ignore", "points": box(0, 0, 9, 9)},
            {"label": "flag", "points": box(0, 0, 29, 29)},
        ],
        (30, 20),
    )
    assert meant.shape == (20, 30) and meant[2:8, 2:8].sum() == meant.sum() == 36 - 4
    assert undecided[4:6, 4:6].all() and undecided.sum() == 100 - 36 + 4


def test_reasonseg_as_lisa_lays_it_out_has_old_letters_and_answers_in_words_beside_it(tmp_path):
    reasonseg_folder(tmp_path)
    content = (
        (tmp_path / "val/a.json").read_text().replace("what is square?", "the dog\u2019s tail")
    )
    (tmp_path / "val/a.json").write_bytes(content.encode("cp1252"))
    (tmp_path / "explanatory").mkdir()
    (tmp_path / "explanatory/val.json").write_text(
        json.dumps([{"image": "a.jpg", "query": "x", "outputs": "y"}])
    )
    [sample] = load_data(str(tmp_path), "validation", 5)
    assert sample.question == "the dog\u2019s tail"
    inner = (
        tmp_path / "explanatory" / "mine"
    )  # what the folder itself is called, or lies in, is another matter
    inner.mkdir()
    reasonseg_folder(inner)
    assert len(load_data(str(inner), "validation", 5)) == 1


@pytest.mark.parametrize(
    "name, split, part",
    [
        ("reasonseg", "train", "--data reasonseg .*validation, test"),
        ("refCOCOg_2k_840", "validation", "--eval-data"),
        ("no-such-set", "train", "--data no-such-set"),
    ],
)
def test_a_name_or_split_that_is_not_there_is_said(name, split, part):
    with pytest.raises(UserError, match=part):
        load_data(name, split, 1)


def test_unknown_columns_are_named(tmp_path):
    with pytest.raises(UserError, match="columns picture, words"):
        load_data(
            parquet(tmp_path / "set", "train", [{"picture": png(), "words": "x"}]), "train", 1
        )


# ---------------------------------------------------------------------------------------------------- sets of the hub


def mask_rows(count=1, **more):
    return [
        {
            "image": png(i),
            "text": f"question {i}",
            "mask": (square() if i % 2 else ~square()).tolist(),
            "ann_id": f"a{i}",
            "image_id": f"picture-{i // 2}",
            "img_height": HEIGHT,
            "img_width": WIDTH,
            **more,
        }
        for i in range(count)
    ]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in the place of the hub: hub/OWNER/NAME holds a repository's files. `asked` lists what was looked up."""
    real, asked, root = datasets.load_dataset_builder, [], tmp_path / "hub"
    root.mkdir()
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda name: asked.append(name) or real(str(root / name))
    )

    def publish(name, split, rows):
        (root / name).mkdir(parents=True, exist_ok=True)
        parquet(root / name / "data", split, rows)

    return type("Hub", (), {"publish": staticmethod(publish), "asked": asked, "root": root})


@pytest.mark.parametrize(
    "name, split, hub_id, called",
    [
        ("reasonseg-x", "train", "sj9909/ReasonSegX_train", "train"),
        ("reasonseg-x", "test", "sj9909/ReasonSegX_test", "test"),
        ("reasonseg-x", "validation", "sj9909/ReasonSegX_val", "test"),
        ("reasonseg-x", "validation", "sj9909/ReasonSegX_val", "train"),
        ("reasonseg-r", "test", "sj9909/ReasonSeg_refine", "test"),
        ("reasonseg", "test", "Ricky06662/ReasonSeg_test", "test"),
    ],
)
def test_reasonseg_and_its_successors_load_by_name_with_their_kinds_of_reasoning(
    hub, name, split, hub_id, called
):
    hub.publish(
        hub_id,
        called,
        mask_rows(4, **({"reasoning_type": "spatial"} if name == "reasonseg-x" else {})),
    )
    data = load_data(name, split, 4)
    assert sorted(data.ids) == ["a0-0", "a1-0", "a2-0", "a3-0"] and hub.asked == [hub_id]
    for sample in data:
        number = int(sample.question.split()[1])
        assert (sample.mask == (square() if number % 2 else ~square())).all()
        assert (np.asarray(sample.image) == np.asarray(picture(number))).all()
        assert sample.picture == f"picture-{number // 2}"
        assert sample.kind == ("spatial" if name == "reasonseg-x" else "")


def test_before_a_download_columns_and_splits_are_checked_and_its_size_is_printed(
    hub, capsys, monkeypatch
):
    hub.publish("Ricky06662/ReasonSeg_test", "test", mask_rows(3))
    hub.publish("Ricky06662/ReasonSeg_val", "test", [{"picture": png(), "words": "x"}])
    box = {"image": png(), "problem": "x", "solution": "<box>(1,2),(3,4)</box>"}
    hub.publish("Ricky06662/refCOCOg_2k_840", "train", [box])
    for split in ("testA", "testB"):
        hub.publish("Ricky06662/refcocog_test", split, mask_rows(1))
    downloaded = []
    monkeypatch.setattr(
        datasets.DownloadManager, "download", lambda self, urls: downloaded.append(urls)
    )
    with pytest.raises(UserError, match="columns picture, words"):
        open_data("reasonseg", "validation", 1)
    with pytest.raises(UserError, match="--data refcocog_test: .*testA, testB"):
        open_data("refcocog_test", "test", 1)
    with pytest.raises(UserError, match="--ignore excluded"):
        open_data("reasonseg", "test", 1, ignore="excluded")
    with pytest.raises(UserError, match="--data refcoco_testA: .*Ricky06662/refcoco_testA"):
        open_data("refcoco_testA", "test", 1)
    assert not capsys.readouterr().out
    free = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free._replace(free=9))
    with pytest.raises(UserError, match="SAMR1_CACHE|HF_HOME"):
        open_data("reasonseg", "test", 3)
    assert "Ricky06662/ReasonSeg_test" in capsys.readouterr().out
    assert not downloaded and not list(public.SETS.iterdir())


def test_a_set_of_boxes_and_one_of_masks_are_told_apart(hub):
    hub.publish("Ricky06662/ReasonSeg_test", "test", mask_rows(3))
    box = {"image": png(), "problem": "x", "solution": "<box>(1,2),(3,4)</box>"}
    hub.publish("Ricky06662/refCOCOg_2k_840", "train", [box])
    data, boxes = open_data("reasonseg", "test", 3), open_data("refCOCOg_2k_840", "train", 1)
    assert boxes.box_only and not data.box_only and data.download_bytes == 0 and len(data) == 3


def test_what_was_downloaded_once_is_read_without_the_hub(hub, monkeypatch):
    hub.publish("Ricky06662/ReasonSeg_test", "test", mask_rows(3))
    ids = load_data("reasonseg", "test", 3).ids
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: 1 / 0)
    again = load_data("reasonseg", "test", 3)
    assert again.ids == ids and (again[1].mask == square()).all()


def test_a_disk_that_fills_up_while_rows_are_written_is_said_and_no_table_is_left(hub, monkeypatch):
    hub.publish("Ricky06662/ReasonSeg_test", "test", mask_rows(3))
    monkeypatch.setattr(public.os, "getpid", lambda: 77)
    found = load_data("reasonseg", "test", 3)
    found.folder.rename(found.folder.with_name(f"{found.folder.name}.77.part"))
    data = found.folder.with_name(f"{found.folder.name}.77.part") / "data.jsonl"
    data.unlink()
    data.symlink_to("/dev/full")
    with pytest.raises(UserError, match="sets.*: .*disk"):
        load_data("reasonseg", "test", 3)
    assert not list(public.SETS.iterdir())


def test_validation_and_test_are_drawn_with_one_seed_and_not_the_first_rows(tmp_path):
    folder = parquet(tmp_path / "set", "test", mask_rows(40))
    every = [f"a{i}-0" for i in range(40)]
    assert load_data(folder, "test", 40).ids == load_data(folder, "test", 99, seed=2).ids == every
    some = load_data(folder, "test", 10).ids
    assert (
        some == load_data(folder, "test", 10, seed=5).ids == load_data(folder, "test", 20).ids[:10]
    )
    assert len(set(some)) == 10 and max(every.index(x) for x in some) > 19


MEASURE = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import datasets
from samr1_mini.data import public
from samr1_mini.data.layouts import draw_shapes
from samr1_mini.data import load_data

public.SETS = Path({folder!r}) / "sets"
datasets.config.HF_DATASETS_CACHE = Path({folder!r}) / "cache"
public.HUB["copy"] = {{"test": ({folder!r} + "/copy", "test")}}
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024  # MiB, of this program alone
before = peak()
data = load_data("copy", "test", 100000)
pixels, ids = sum(int(data[i].mask.sum()) for i in range(len(data))), len(set(data.ids))
print(ids, pixels, peak() - before)
"""


def test_masks_of_a_whole_evaluation_set_stay_on_the_disk(tmp_path):
    """300 masks of 640 x 480 with their pictures: read through lists of Python's booleans they took 990 MiB, now 48."""
    import pyarrow as pa
    import pyarrow.parquet

    file, mask, count = io.BytesIO(), np.zeros((480, 640), bool), 300
    Image.new("RGB", (640, 480), (90, 20, 10)).save(file, "JPEG")
    mask[100:300, 100:400] = True
    starts = lambda number, length: pa.array(np.arange(number + 1, dtype=np.int32) * length)
    lines = pa.ListArray.from_arrays(
        starts(count * 480, 640), pa.array(np.tile(mask.reshape(-1), count))
    )
    masks = pa.ListArray.from_arrays(starts(count, 480), lines)
    names, images = [str(i) for i in range(count)], [
        {"bytes": file.getvalue(), "path": "x.jpg"}
    ] * count
    table = pa.table(
        {"image": images, "text": names, "mask": masks, "image_id": names, "ann_id": names}
    )
    (tmp_path / "copy").mkdir()
    pyarrow.parquet.write_table(
        table, tmp_path / "copy/test-00000-of-00001.parquet", row_group_size=100
    )
    code = MEASURE.format(root=str(Path(__file__).parent.parent), folder=str(tmp_path))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    ids, pixels, mebibytes = out.stdout.splitlines()[-1].split()
    assert int(ids) == count and int(pixels) == count * int(mask.sum()) and float(mebibytes) < 200


def test_a_folder_of_coco_pictures_is_looked_at_before_anything_is_loaded(tmp_path, coco_dir):
    rows = coco_rows()
    rows.append(rows[2] | {"ref_id": 6})  # another question about this picture
    folder = parquet(tmp_path / "set", "train", rows)
    with pytest.raises(UserError, match="--coco-dir .*nowhere"):
        open_data(folder, "train", 7, coco_dir=str(tmp_path / "nowhere"))
    (coco_dir / coco_info(2)["file_name"]).unlink()
    with pytest.raises(UserError, match=f"--coco-dir .* lacks 1 .*{coco_info(2)['file_name']}"):
        open_data(folder, "train", 7, coco_dir=str(coco_dir))


def test_no_path_that_comes_in_a_table_is_opened(tmp_path):
    picture().save(tmp_path / "secret.png")
    rows = [
        {
            "image": str(tmp_path / "secret.png"),
            "text": "x",
            "mask": square().tolist(),
            "ann_id": "1",
        }
    ]
    with pytest.raises(UserError, match="--data .*broken"):
        list(load_data(parquet(tmp_path / "set", "test", rows), "test", 3))


def test_a_description_beside_parquet_files_is_no_data(tmp_path):
    rows = [{"image": png(), "text": "x", "mask": square().tolist(), "ann_id": "1"}]
    folder = parquet(tmp_path / "set", "test", rows)
    (tmp_path / "set/dataset_infos.json").write_text('{"default": {"splits": {}}}')
    assert len(load_data(folder, "test", 3)) == 1


@pytest.mark.parametrize("sentences", ["first", "all"])
def test_rows_without_an_expression_end_in_one_line_and_not_in_a_search_without_end(
    sentences, tmp_path, coco_dir
):
    rows = [
        row | {"sentences": coco_rows(2)[0]["sentences"][:i]} for i, row in enumerate(coco_rows(2))
    ]
    folder = parquet(tmp_path / "set", "train", rows)
    with pytest.raises(UserError, match="1 of 2.*row 1: "):
        open_data(folder, "train", 3, sentences=sentences, coco_dir=str(coco_dir))


def test_a_file_that_is_no_parquet_and_a_split_without_rows_end_in_one_line(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/test-0.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match="test-0.parquet"):
        open_data(str(tmp_path / "a"), "test", 1)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/test.json").write_text("[]")
    with pytest.raises(UserError, match="test.json"):
        open_data(str(tmp_path / "b"), "test", 1)
    (tmp_path / "b/test.json").write_text(
        json.dumps([{"image": "gone.png", "problem": "x", "solution": [1, 2, 3, 4]}])
    )
    with pytest.raises(UserError, match="gone.png"):
        open_data(str(tmp_path / "b"), "test", 1)


def test_a_split_in_several_files_is_read_whole(tmp_path):
    rows = mask_rows(5)
    for i, some in enumerate((rows[:2], rows[2:])):
        folder = parquet(tmp_path / "set", f"test-{i}", some)
    data = load_data(folder, "test", 9)
    assert data.ids == [f"a{i}-0" for i in range(5)] and [x.question for x in data] == [
        f"question {i}" for i in range(5)
    ]


def test_a_file_that_has_changed_is_read_anew(tmp_path):
    for count in (2, 3):
        folder = parquet(tmp_path / "set", "test", mask_rows(count))
        assert load_data(folder, "test", 9).ids == [f"a{i}-0" for i in range(count)]


def test_two_questions_of_reasonseg_about_a_picture_are_told_to_be_about_one(tmp_path):
    reasonseg_folder(tmp_path)
    a, b = load_data(str(tmp_path), "validation", 5, sentences="all")
    assert a.picture == b.picture and a.id != b.id


@pytest.mark.parametrize(
    "box",
    [
        [30, 5, 10, 25],
        [10, 25, 30, 5],
        [10, 5, 10, 25],
        "<box>(30,5),(10,25)</box>",
        [0.1, 0.2, 0.5, 0.6],
        [10, 5, 300, 25],
        [10, 5, 1e8, 25],
        [10, 5, 30],
        ["a", 5, 30, 25],
        [10.1, 5, 10.3, 25],
        "no box",
    ],
)
def test_a_box_that_is_reversed_empty_or_not_in_pixels_is_refused_with_its_place(box, tmp_path):
    picture().save(tmp_path / "1.png")
    (tmp_path / "test.json").write_text(
        json.dumps([{"image": "1.png", "problem": "the square", "solution": box}])
    )
    with pytest.raises(UserError, match="test.json row 1: "):
        open_data(str(tmp_path), "test", 1)


def test_letters_of_a_pickle_that_python_2_wrote_are_read(tmp_path, coco_dir):
    refer_folder(tmp_path)
    file = tmp_path / "refs(umd).p"
    file.write_bytes(
        file.read_bytes().replace(b"X\x04\x00\x00\x00no 0", b"U\x04caf\xe9")
    )  # its strings are bytes
    assert "café" in [
        x.question for x in load_data(str(tmp_path), "train", 3, coco_dir=str(coco_dir))
    ]


def test_a_name_stands_for_the_repository_of_that_name():
    for name in ("refcocog", "refcoco", "refcocoplus"):
        assert public.HUB[name] == {
            s: (f"jxu124/{name}", s) for s in ("train", "validation", "test")
        }
    for name in ("refCOCOg_2k_840", "refCOCOg_9k_840"):
        assert public.HUB[name] == {"train": (f"Ricky06662/{name}", "train")}


def test_the_splits_of_lmms_labs_set_have_their_names_of_the_hub():
    assert public.HUB["lmms-lab/RefCOCOg"] == {
        "validation": ("lmms-lab/RefCOCOg", "val"),
        "test": ("lmms-lab/RefCOCOg", "test"),
    }


def test_the_corners_of_a_box_are_rounded_and_not_cut():
    assert (filled((10.6, 4.6, 30.4, 24.6), 40, 60) == filled((11, 5, 30, 25), 40, 60)).all()


# ---------------------------------------------------------------------------------- several objects


def grefcoco_folder(folder, rows=()):
    """gRefCOCO as it is published: "ann_id" lists the objects, and [-1] stands for none."""
    ids = [[10, 11], [12], [-1], [11, 13, 12], [10, 14]]
    splits = ["train", "train", "train", "val", "testA"]
    refs = []
    for i, (ann_id, split) in enumerate(zip(ids, splits)):
        sentences = [{"raw": f"Those {i}", "sent": f"those {i}", "sent_id": i, "tokens": []}]
        ref = {"ref_id": i, "ann_id": ann_id, "image_id": i, "split": split}
        ref |= {"no_target": ann_id == [-1], "sentences": sentences}
        refs.append(ref | {"file_name": f"/etc/COCO_train2014_{i:012}_{i}.jpg"})
    (folder / "grefs(unc).json").write_text(json.dumps([*refs, *rows]))
    annotations = []
    for k in range(5):
        moved = [value + k * (1 - place % 2) for place, value in enumerate(SQUARE)]
        one = {"id": 10 + k, "image_id": 0, "segmentation": [moved], "iscrowd": int(k == 4)}
        annotations.append(one)
    content = {"annotations": annotations, "images": [coco_info(i) for i in range(6)]}
    (folder / "instances.json").write_text(json.dumps(content))
    return str(folder)


def shifted(k):
    """The square, moved to the right by k pixels."""
    return np.roll(square(), k, axis=1)


def same(masks, expected):
    return all((a == b).mean() > 0.98 for a, b in zip(masks, expected, strict=True))


def test_grefcoco_gives_the_single_objects_of_a_question_or_nothing(tmp_path, coco_dir):
    folder = grefcoco_folder(tmp_path)
    options = {"coco_dir": str(coco_dir), "objects": "several"}
    train = {x.id: x for x in load_data(folder, "train", 3, None, **options)}
    assert train["0-0"].question == "Those 0"
    assert same(train["0-0"].masks, [shifted(0), shifted(1)])
    assert (train["0-0"].mask == (train["0-0"].masks[0] | train["0-0"].masks[1])).all()
    assert same(train["1-0"].masks, [shifted(2)])
    assert train["2-0"].masks == [] and not train["2-0"].mask.any()
    [validation] = load_data(folder, "validation", 3, **options)
    assert same(validation.masks, [shifted(1), shifted(3), shifted(2)])
    [test] = load_data(folder, "test", 3, **options)  # its second object is a crowd
    assert same(test.masks, [shifted(0)]) and test.picture == coco_info(4)["file_name"]


def test_grefcoco_for_one_object_is_refused_where_a_question_means_nothing(tmp_path, coco_dir):
    folder = grefcoco_folder(tmp_path)
    with pytest.raises(UserError, match="line 3: .*--objects several"):
        open_data(folder, "train", 3, coco_dir=str(coco_dir))
    [validation] = open_data(folder, "validation", 3, coco_dir=str(coco_dir))
    assert (validation.mask == validation.masks[0] | validation.masks[1]).all()


@pytest.mark.parametrize(
    "ann_id, words",
    [
        ([10, 99], "instances.json has no annotation"),
        ([14], "crowds"),
        ("x", "instances.json has no annotation"),
        (None, "instances.json has no annotation"),
    ],
)
def test_a_row_of_grefcoco_without_its_annotations_is_broken(ann_id, words, tmp_path, coco_dir):
    sentences = [{"raw": "those", "sent": "those"}]
    row = {"ref_id": 7, "ann_id": ann_id, "image_id": 1, "split": "val", "sentences": sentences}
    folder = grefcoco_folder(tmp_path, [row])
    with pytest.raises(UserError, match=rf"1 of 2 rows.*grefs\(unc\).json row 6.*{words}"):
        open_data(folder, "validation", 3, coco_dir=str(coco_dir), objects="several")


def several_rows(**more):
    """Rows with the columns of sj9909's sets for training."""
    masks = [[shifted(0), shifted(9)], [shifted(4)]]
    rows = []
    for i, objects in enumerate(masks):
        row = {"id": f"refcocolvis_{i}", "problem": f"those {i}", "image": png(i)}
        row |= {"solution": '[{"bbox_2d": [1, 2, 3, 4], "point_2d": [2, 3]}]'}
        row |= {"solution_mask": [mask.tolist() for mask in objects]}
        rows.append(row | {"img_height": 480, "img_width": 640} | more)
    return rows


def test_a_set_of_several_objects_by_its_name_has_a_mask_for_each(hub):
    hub.publish("sj9909/visionreasoner_multi_object_refcocolvis_masks_840", "train", several_rows())
    data = {x.id: x for x in load_data("refcocolvis", "train", 2, None, objects="several")}
    first, second = data["refcocolvis_0-0"], data["refcocolvis_1-0"]
    assert first.question == "those 0" and not first.box_only
    assert (np.array(first.masks) == [shifted(0), shifted(9)]).all()
    assert (np.array(second.masks) == [shifted(4)]).all()
    assert (first.mask == (shifted(0) | shifted(9))).all()
    assert (np.asarray(second.image) == np.asarray(picture(1))).all()


@pytest.mark.parametrize(
    "broken", [{"solution_mask": [[[True, False], [True]]]}, {"solution_mask": [[[True] * 9] * 9]}]
)
def test_a_broken_mask_among_several_leaves_its_row_out(broken, tmp_path):
    folder = parquet(tmp_path / "set", "train", several_rows(**broken))
    with pytest.raises(UserError, match="2 of 2 rows are broken"):
        open_data(folder, "train", 2, objects="several")
