"""The published metrics on the published layouts, against pycocotools' own arithmetic on run-length codes."""

from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from test_public import (
    HEIGHT,
    SQUARE,
    WIDTH,
    coco_dir,  # noqa: F401 (a fixture)
    coco_rows,
    parquet,
    png,
    reasonseg_folder,
    square,
)

from samr1_mini import evaluation
from samr1_mini.config import UserError, make_settings
from samr1_mini.data import Sample, load_data
from samr1_mini.evaluation import evaluate, shown
from samr1_mini.policy import Completion
from samr1_mini.reward import score_group

SETTINGS, _ = make_settings(preset="tiny", device="cpu")
# Boxes that miss the object by more and more, in the policy's 112 x 112 square.
BOXES = ['<think>.</think><answer>{"bbox": [%d, 14, %d, 70], "points": [[40, 40, 1]]}</answer>' % (19 + 8 * i, 56 + 8 * i) for i in range(5)]


def say(monkeypatch, words):
    """Let the policy answer these, in turn; all that comes after it is real."""
    words = cycle(words)
    monkeypatch.setattr(evaluation, "sample", lambda _, prompts, *a, **k: [[Completion(torch.ones(1), torch.zeros(1), False, next(words))] for _ in prompts])


def bool_rows(*masks):
    return [{"image": png(i), "text": "the largest object", "mask": m.tolist(), "image_id": str(i), "ann_id": str(i), "img_height": HEIGHT, "img_width": WIDTH}
            for i, m in enumerate(masks)]


def layouts(folder, coco_dir):  # noqa: F811
    """Small copies of three published layouts under their options."""
    yield load_data(parquet(folder / "a", "test", [r | {"split": "test"} for r in coco_rows()]), "test", 6, coco_dir=str(coco_dir))
    yield load_data(parquet(folder / "b", "test", bool_rows(square(), ~square(), square())), "test", 6)
    polygon = [{"question_id": str(i), "image": png(i), "question": "", "answer": ["the left object"], "segmentation": [float(v) for v in SQUARE]} for i in range(3)]
    yield load_data(parquet(folder / "c", "val", polygon), "validation", 6)
    (folder / "d").mkdir()
    reasonseg_folder(folder / "d")
    for ignore in ("foreground", "excluded"):
        yield load_data(str(folder / "d"), "validation", 2, sentences="all", ignore=ignore)


def code(mask):
    return coco.encode(np.asfortranarray(mask.astype(np.uint8)))


def test_giou_and_ciou_are_those_of_pycocotools_on_every_layout(policy, segmenter, tmp_path, coco_dir, monkeypatch):  # noqa: F811
    say(monkeypatch, [*BOXES, "nothing"])
    seen = 0
    for data in layouts(tmp_path, coco_dir):
        report = evaluate(policy, segmenter, data, SETTINGS)
        ious, intersections, unions = [], 0, 0
        for row, panel in zip(report.rows, shown(segmenter, data, report.rows, SETTINGS, 112)):
            truth, ignore, nothing = panel.sample.mask, panel.sample.ignore, np.zeros_like(panel.sample.mask)
            mask = panel.reward.mask if row.in_format else nothing
            known = ~(nothing if ignore is None else ignore)  # undecided pixels are cut out of both
            pair = [coco.merge([code(m), code(known)], intersect=True) for m in (mask, truth)]
            ious.append(coco.iou([pair[0]], [pair[1]], [0])[0, 0])
            intersections += int(coco.area(coco.merge(pair, intersect=True)))
            unions += int(coco.area(coco.merge(pair)))
            seen += row.in_format
        summary = report.summary()
        assert summary["gIoU"] == pytest.approx(np.mean(ious)) and summary["cIoU"] == pytest.approx(intersections / unions)
        assert 0 < summary["cIoU"] < 1
    assert seen == 14  # of 16: two could not be read


def test_an_empty_truth_is_right_only_if_nothing_is_predicted_or_is_left_out(policy, segmenter, tmp_path, monkeypatch):
    say(monkeypatch, BOXES[:1])
    empty = np.zeros((HEIGHT, WIDTH), bool)
    data = load_data(parquet(tmp_path / "a", "test", bool_rows(square(), empty)), "test", 6)
    both, one = evaluate(policy, segmenter, data, SETTINGS), evaluate(policy, segmenter, data, replace(SETTINGS, empty_truth="excluded"))
    assert len(both.rows) == 2 and len(one.rows) == 1 and both.summary()["count"] == 2 and one.summary()["count"] == 1
    assert both.rows[1].pair[1] > 0 == both.rows[1].iou  # something was predicted where nothing is
    assert 0 < both.summary()["gIoU"] == pytest.approx(one.summary()["gIoU"] / 2)
    monkeypatch.setattr(segmenter, "masks", lambda image, boxes, points: np.zeros((len(boxes), *image.shape[:2]), bool))
    silent = evaluate(policy, segmenter, data, SETTINGS)
    assert silent.rows[1].pair == silent.rows[1].strict == (0, 0)  # an answer that was read, and a mask with nothing in it
    assert silent.summary()["gIoU"] == silent.summary()["gIoU_lenient"] == 0.5  # right about the empty one, wrong about the other
    with pytest.raises(UserError, match="--empty-truth"):
        evaluate(policy, segmenter, load_data(parquet(tmp_path / "b", "test", bool_rows(empty)), "test", 1), replace(SETTINGS, empty_truth="excluded"))


def test_an_answer_that_cannot_be_read_is_wrong_whatever_the_truth_in_training_and_in_evaluation(policy, segmenter, monkeypatch):
    say(monkeypatch, ["nothing"])
    data = [Sample(Image.new("RGB", (112, 112)), "?", truth, "x") for truth in (np.zeros((112, 112), bool), np.eye(112, dtype=bool))]
    report = evaluate(policy, segmenter, data, SETTINGS)
    assert [row.strict for row in report.rows] == [row.pair for row in report.rows] == [(0, 1), (0, 112)]
    assert report.summary()["gIoU"] == report.summary()["gIoU_lenient"] == report.summary()["cIoU"] == 0
    for x in data:
        [trained], [evaluated] = (score_group(segmenter, x, ["nothing"], 112, "iou", lenient=lenient) for lenient in (False, True))
        assert trained.iou == evaluated.iou == trained.accuracy == 0 and trained.pair == evaluated.pair
