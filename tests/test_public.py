"""Public data sets: small copies of each published layout, read through the same function as the real ones."""

import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from samr1_mini import public
from samr1_mini.config import UserError
from samr1_mini.data import load_data
from samr1_mini.metrics import intersection_union
from samr1_mini.reward import score_group

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
    return {"file_name": f"COCO_train2014_{number:012}.png", "height": HEIGHT, "width": WIDTH, "id": number,
            "coco_url": f"http://mscoco.org/images/{number}", "license": 1}


def coco_rows(count=6):
    """jxu124/refcocog: expressions and annotations as JSON text, no pictures; one mask as RLE, the others as polygons."""
    rle = coco.encode(np.asfortranarray(square()))
    masks = [{"size": rle["size"], "counts": rle["counts"].decode()}, [SQUARE]]
    return [
        {"ref_id": i, "split": "train", "image_id": i, "ann_id": i, "file_name": f"COCO_train2014_{i:012}_{i}.png",
         "sentences": [{"raw": f"The square, {i}.", "sent": f"the square {i}", "sent_id": i, "tokens": []}, {"raw": f"it {i}", "sent": f"it {i}", "sent_id": i, "tokens": []}],
         "raw_anns": json.dumps({"segmentation": masks[min(i, 1)], "bbox": [10, 5, 20, 20]}), "raw_image_info": json.dumps(coco_info(i))}
        for i in range(count)
    ]


@pytest.fixture(autouse=True)
def tables(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(public, "TABLES", tmp_path_factory.mktemp("tables"))


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

    folder.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}-00000-of-00001.parquet")
    return str(folder)


def test_refcocog_of_the_hub_gives_expression_picture_and_mask(tmp_path, coco_dir):
    folder = parquet(tmp_path / "set", "train", coco_rows())
    data = load_data(folder, "train", 6, seed=1, coco_dir=str(coco_dir))
    assert sorted(s.question for s in data) == [f"The square, {i}." for i in range(6)]
    for sample in data:
        number = int(sample.id.split("-")[0])
        assert (np.asarray(sample.image) == np.asarray(picture(number))).all()
        assert (sample.mask == square()).mean() > 0.98 and not sample.box_only
    again, other = (load_data(folder, "train", 6, seed=seed, coco_dir=str(coco_dir)) for seed in (1, 2))
    assert data.ids == again.ids != other.ids


def test_all_sentences_make_a_question_each(tmp_path, coco_dir):
    data = load_data(parquet(tmp_path / "set", "train", coco_rows()), "train", 12, sentences="all", coco_dir=str(coco_dir))
    assert len({s.question for s in data}) == 12 and len(set(data.ids)) == 12


def test_lmms_lab_refcocog_has_its_expressions_under_answer(tmp_path):
    rows = [{"question_id": "7", "image": png(), "question": "Describe the region.", "answer": ["a square", "it"], "segmentation": [float(v) for v in SQUARE],
             "bbox": [10.0, 5.0, 20.0, 20.0], "iscrowd": 0, "file_name": "x.png"}]
    [sample] = load_data(parquet(tmp_path / "set", "val", rows), "validation", 5)
    assert sample.question == "a square" and (sample.mask == square()).mean() > 0.98


def test_evaluation_sets_hold_masks_as_rows_of_booleans(tmp_path):
    rows = [{"image": png(3), "text": "what is square?", "mask": square().tolist(), "image_id": "a", "ann_id": "b", "img_height": HEIGHT, "img_width": WIDTH}]
    folder = parquet(tmp_path / "set", "test", rows)
    [sample] = load_data(folder, "test", 5)
    assert sample.question == "what is square?" and (sample.mask == square()).all() and sample.id == "b-0"
    with pytest.raises(UserError, match="--ignore excluded"):
        load_data(folder, "test", 5, ignore="excluded")[0]


def test_boxes_without_masks_are_marked_and_scored_as_boxes(tmp_path, segmenter):
    rows = [{"id": "1", "problem": "the square", "solution": "<box>(10,5),(30,25)</box><points>(15,10),(20,20)</points>", "image": png(),
             "img_height": 480, "img_width": 640}]
    [sample] = load_data(parquet(tmp_path / "set", "train", rows), "train", 1)
    assert sample.box_only and (sample.mask == square()).all()
    text = '<think>.</think><answer>{"bbox": [%d, 14, %d, 70], "points": [[40, 40, 1]]}</answer>'  # in a frame of 112 x 112
    good, half = score_group(segmenter, sample, [text % (18.667, 56), text % (18.667, 37)], 112, "box-iou")
    assert good.box_iou > 0.95 and good.accuracy == 4 and 0.4 < half.box_iou < 0.6
    assert good.iou == pytest.approx(good.box_iou, abs=0.05)


def test_lisa_grounding_is_a_json_list_of_boxes(tmp_path):
    picture().save(tmp_path / "1.png")
    (tmp_path / "lisa_test.json").write_text(json.dumps([{"image": "1.png", "problem": "the square", "solution": [10, 5, 30, 25]}]))
    [sample] = load_data(str(tmp_path), "test", 3)
    assert sample.box_only and sample.question == "the square" and (sample.mask == square()).all()


def test_files_that_name_no_split_are_for_testing_and_never_for_training(tmp_path):
    rows = [{"image": png(), "text": "x", "mask": square().tolist(), "ann_id": "1"}]
    folder = parquet(tmp_path / "set", "data", rows)
    assert len(load_data(folder, "test", 3)) == 1
    for split in ("train", "validation"):
        with pytest.raises(UserError, match=f"{split} split"):
            load_data(folder, split, 3)


def refer_folder(folder, coco_info=coco_info):
    refs = [{"ref_id": i, "ann_id": 10 + i, "image_id": i, "split": ["train", "val"][i % 2], "sentences": [{"raw": f"no {i}", "sent": f"no {i}"}]} for i in range(6)]
    (folder / "refs(umd).p").write_bytes(pickle.dumps(refs, protocol=2))
    annotations = [{"id": 10 + i, "image_id": i, "segmentation": [SQUARE]} for i in range(6)]
    (folder / "instances.json").write_text(json.dumps({"annotations": annotations, "images": [coco_info(i) for i in range(6)]}))


def test_the_original_refer_layout_reads_the_same(tmp_path, coco_dir):
    refer_folder(tmp_path)
    assert sorted(s.question for s in load_data(str(tmp_path), "train", 3, coco_dir=str(coco_dir))) == ["no 0", "no 2", "no 4"]
    validation = load_data(str(tmp_path), "validation", 9, coco_dir=str(coco_dir))
    assert [s.question for s in validation] == ["no 1", "no 3", "no 5"] and (validation[0].mask == square()).mean() > 0.98


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
    shapes = [{"label": "target", "points": corners}, {"label": "ignore", "points": [[20, 5], [40, 5], [40, 24], [20, 24]]}, {"label": "flag", "points": [[1, 1]]}]
    (folder / "val/a.json").write_text(json.dumps({"text": ["what is square?", "which?"], "is_sentence": True, "shapes": shapes}))


def test_undecided_pixels_are_foreground_or_excluded(tmp_path):
    reasonseg_folder(tmp_path)
    [foreground] = load_data(str(tmp_path), "validation", 5)
    [excluded] = load_data(str(tmp_path), "validation", 5, ignore="excluded")
    assert foreground.question == "what is square?" and foreground.ignore is None
    assert foreground.mask[5:25, 10:41].all() and foreground.mask.sum() == 20 * 31
    assert excluded.mask[5:25, 10:20].all() and excluded.mask.sum() == 20 * 10 and excluded.ignore.sum() == 20 * 21
    everything = np.ones((HEIGHT, WIDTH), bool)
    assert intersection_union(everything, excluded.mask, excluded.ignore) == (20 * 10, HEIGHT * WIDTH - 20 * 21)
    assert intersection_union(None, foreground.mask, excluded.ignore) == (0, 20 * 10)  # an answer that cannot be read


@pytest.mark.parametrize("name, split, part", [
    ("reasonseg", "train", "has no train split, only validation, test$"), ("refCOCOg_2k_840", "validation", "takes another set with --eval-data"), ("no-such-set", "train", "neither 'shapes'"),
])
def test_a_name_or_split_that_is_not_there_is_said(name, split, part):
    with pytest.raises(UserError, match=part):
        load_data(name, split, 1)


def test_unknown_columns_are_named(tmp_path):
    with pytest.raises(UserError, match="columns picture, words"):
        load_data(parquet(tmp_path / "set", "train", [{"picture": png(), "words": "x"}]), "train", 1)
