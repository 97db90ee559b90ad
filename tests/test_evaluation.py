"""The published metrics on the published layouts, against pycocotools' own arithmetic on run-length codes."""

import gc
import inspect
import json
import os
import shutil
import subprocess
import sys
import warnings
import weakref
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from pycocotools import mask as coco
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_folder import folder_of
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

import eval as command
import train
from conftest import score
from samr1_mini import evaluation, plots
from samr1_mini.columns import COLUMNS, explain
from samr1_mini.config import Settings, UserError, make_settings, resumed_settings
from samr1_mini.data import Sample, load_data
from samr1_mini.evaluation import (
    Panel,
    Report,
    ScoredAnswer,
    batch_size,
    before_after,
    evaluate,
    judge,
    shown,
    true_box_iou,
)
from samr1_mini.grpo import train as run_training
from samr1_mini.metrics import filled, intersection_union, iou, tight_box
from samr1_mini.decoding import Completion
from samr1_mini import loading, processes
from samr1_mini.segmenter import TINY_SAM
from samr1_mini.tiny.shapes import Shapes

RESULTS = Path(__file__).parent.parent / "tutorials" / "results"
SETTINGS, _ = make_settings(preset="tiny", device="cpu")
# Boxes that miss the object by more and more, in the policy's 112 x 112 square.
BOXES = [
    '<think>.</think><answer>{"bbox": [%d, 14, %d, 70], "points": [[40, 40, 1]]}</answer>'
    % (19 + 8 * i, 56 + 8 * i)
    for i in range(5)
]


def say(monkeypatch, words):
    """Let the policy answer these, in turn; all that comes after it is real."""
    words = cycle(words)
    monkeypatch.setattr(
        evaluation,
        "generate",
        lambda _, prompts, *a, **k: [
            [Completion(torch.ones(1), torch.zeros(1), False, next(words))] for _ in prompts
        ],
    )


def bool_rows(*masks):
    return [
        {
            "image": png(i),
            "text": "the largest object",
            "mask": m.tolist(),
            "image_id": str(i),
            "ann_id": str(i),
            "img_height": HEIGHT,
            "img_width": WIDTH,
        }
        for i, m in enumerate(masks)
    ]


def layouts(folder, coco_dir):  # noqa: F811
    """Small copies of three published layouts under their options."""
    yield load_data(
        parquet(folder / "a", "test", [r | {"split": "test"} for r in coco_rows()]),
        "test",
        6,
        coco_dir=str(coco_dir),
    )
    yield load_data(
        parquet(folder / "b", "test", bool_rows(square(), ~square(), square())), "test", 6
    )
    polygon = [
        {
            "question_id": str(i),
            "image": png(i),
            "question": "",
            "answer": ["the left object"],
            "segmentation": [float(v) for v in SQUARE],
        }
        for i in range(3)
    ]
    yield load_data(parquet(folder / "c", "val", polygon), "validation", 6)
    (folder / "d").mkdir()
    reasonseg_folder(folder / "d")
    for ignore in ("foreground", "excluded"):
        yield load_data(str(folder / "d"), "validation", 2, sentences="all", ignore=ignore)


def code(mask):
    return coco.encode(np.asfortranarray(mask.astype(np.uint8)))


def test_giou_and_ciou_are_those_of_pycocotools_on_every_layout(
    policy, segmenter, tmp_path, coco_dir, monkeypatch  # noqa: F811
):
    say(monkeypatch, [*BOXES, "nothing"])
    seen = 0
    for data in layouts(tmp_path, coco_dir):
        report = evaluate(policy, segmenter, data, SETTINGS)
        ious, intersections, unions = [], 0, 0
        for row, panel in zip(report.rows, shown(segmenter, data, report.rows, SETTINGS, 112)):
            truth, ignore, nothing = (
                panel.sample.mask,
                panel.sample.ignore,
                np.zeros_like(panel.sample.mask),
            )
            mask = panel.reward.mask if row.in_format else nothing
            known = ~(nothing if ignore is None else ignore)  # undecided pixels are cut out of both
            pair = [coco.merge([code(m), code(known)], intersect=True) for m in (mask, truth)]
            ious.append(coco.iou([pair[0]], [pair[1]], [0])[0, 0])
            intersections += int(coco.area(coco.merge(pair, intersect=True)))
            unions += int(coco.area(coco.merge(pair)))
            seen += row.in_format
        summary = report.summary()
        assert summary["gIoU"] == pytest.approx(np.mean(ious)) and summary["cIoU"] == pytest.approx(
            intersections / unions
        )
        assert 0 < summary["cIoU"] < 1
    assert seen == 14  # of 16: two could not be read


def test_an_empty_truth_is_right_only_if_nothing_is_predicted_or_is_left_out(
    policy, segmenter, tmp_path, monkeypatch
):
    say(monkeypatch, BOXES[:1])
    empty = np.zeros((HEIGHT, WIDTH), bool)
    data = load_data(parquet(tmp_path / "a", "test", bool_rows(square(), empty)), "test", 6)
    both, one = (
        evaluate(policy, segmenter, data, SETTINGS),
        evaluate(policy, segmenter, data, replace(SETTINGS, empty_truth="excluded")),
    )
    assert (
        len(both.rows) == 2
        and len(one.rows) == 1
        and both.summary()["count"] == 2
        and one.summary()["count"] == 1
    )
    assert (
        both.rows[1].lenient_pixels[1] > 0 == both.rows[1].iou
    )  # something was predicted where nothing is
    assert 0 < both.summary()["gIoU"] == pytest.approx(one.summary()["gIoU"] / 2)
    monkeypatch.setattr(
        segmenter,
        "masks",
        lambda image, boxes, points: np.zeros((len(boxes), *image.shape[:2]), bool),
    )
    silent = evaluate(policy, segmenter, data, SETTINGS)
    # an answer that was read, and a mask with nothing in it
    assert silent.rows[1].lenient_pixels == silent.rows[1].strict_pixels == (0, 0)
    # right about the empty one, wrong about the other
    assert silent.summary()["gIoU"] == silent.summary()["gIoU_lenient"] == 0.5
    with pytest.raises(UserError, match="--empty-truth"):
        evaluate(
            policy,
            segmenter,
            load_data(parquet(tmp_path / "b", "test", bool_rows(empty)), "test", 1),
            replace(SETTINGS, empty_truth="excluded"),
        )


def test_an_answer_that_cannot_be_read_is_wrong_whatever_the_truth_in_training_and_in_evaluation(
    policy, segmenter, monkeypatch
):
    say(monkeypatch, ["nothing"])
    data = [
        Sample(Image.new("RGB", (112, 112)), "?", truth, "x")
        for truth in (np.zeros((112, 112), bool), np.eye(112, dtype=bool))
    ]
    report = evaluate(policy, segmenter, data, SETTINGS)
    assert (
        [row.strict_pixels for row in report.rows]
        == [row.lenient_pixels for row in report.rows]
        == [(0, 1), (0, 112)]
    )
    assert (
        report.summary()["gIoU"]
        == report.summary()["gIoU_lenient"]
        == report.summary()["cIoU"]
        == 0
    )
    for x in data:
        [trained], [evaluated] = (
            score(segmenter, x, ["nothing"], 112, lenient, accuracy="iou")
            for lenient in (False, True)
        )
        assert (
            trained.iou == evaluated.iou == trained.terms["accuracy"] == 0
            and trained.pixels == evaluated.pixels
        )


# ------------------------------------------------------------------------------------------------ how it goes about it


def test_the_ceiling_is_that_of_the_true_boxes_and_each_picture_is_encoded_once(
    policy, segmenter, samples, monkeypatch
):
    say(monkeypatch, BOXES)
    calls, encode = [], segmenter.predictor.model.image_encoder.forward
    monkeypatch.setattr(
        segmenter.predictor.model.image_encoder, "forward", lambda x: calls.append(1) or encode(x)
    )
    segmenter.encoded = None
    blind = Sample(samples[0].image, "?", np.zeros_like(samples[0].mask), "no object")
    report = evaluate(policy, segmenter, [*samples, blind], SETTINGS, with_ceiling=True)
    assert len(calls) == len(samples) + 1
    masks = [segmenter.masks(np.asarray(x.image), [tight_box(x.mask)], [[]])[0] for x in samples]
    each = [(m & x.mask).sum() / (m | x.mask).sum() for m, x in zip(masks, samples)]
    assert (
        report.ceiling == {"gIoU": pytest.approx(np.mean(each)), "count": len(samples)}
        and 0.5 < np.mean(each) < 1
    )
    assert [row.ceiling is None for row in report.rows] == [False] * len(samples) + [True]


class Photos(Sequence):
    """Large pictures, made when asked for; it counts how many of its samples somebody still holds."""

    def __init__(self, count):
        self.count, self.made, self.most = count, [], 0

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if not 0 <= i < self.count:
            raise IndexError(i)
        x = Sample(
            Image.new("RGB", (600, 400), (i, 90, 30)),
            "the star",
            np.eye(400, 600, dtype=bool),
            str(i),
        )
        self.made.append([weakref.ref(part) for part in (x, x.image, x.mask)])
        self.most = max(self.most, self.held())
        return x

    def held(self):
        return max(sum(part() is not None for part in parts) for parts in zip(*self.made))


def test_a_report_holds_no_picture_and_no_mask_and_those_it_shows_are_made_again(
    policy, segmenter, monkeypatch
):
    say(monkeypatch, BOXES)
    data = Photos(12)
    report = evaluate(policy, segmenter, data, replace(SETTINGS, eval_batch=2))
    gc.collect()
    assert data.held() == 0 and data.most <= 2 * 2 and len(report.rows) == 12
    numbers = json.dumps([vars(row) for row in report.rows])  # nothing but numbers and texts
    assert len(numbers) < 12 * 1000
    first, last = shown(segmenter, data, [report.rows[11], report.rows[3]], SETTINGS, 112)
    assert (first.sample.id, last.sample.id) == ("11", "3")
    for panel, row in ((first, report.rows[11]), (last, report.rows[3])):
        assert (
            panel.text == row.text
            and panel.reward.pixels == row.lenient_pixels
            and panel.reward.mask.shape == (400, 600)
        )


def test_the_batch_of_evaluation_is_what_was_asked_for(policy, segmenter, samples, monkeypatch):
    sizes = []
    say(monkeypatch, BOXES)
    speak = evaluation.generate
    monkeypatch.setattr(
        evaluation,
        "generate",
        lambda policy, prompts, *a, **k: sizes.append(len(prompts))
        or speak(policy, prompts, *a, **k),
    )
    for batch, expected in ((0, [6]), (4, [4, 2]), (1, [1] * 6)):
        sizes.clear()
        evaluate(policy, segmenter, samples, replace(SETTINGS, eval_batch=batch))
        assert sizes == expected
    large = replace(SETTINGS, image_size=420)  # 30 x 30 tokens of 14 pixels
    assert batch_size(policy, large) == 15 and 15 * (900 + 160) <= 16384 < 16 * (900 + 160)
    assert batch_size(policy, large, votes=8) == 1


SHARED = """
import json, sys
import numpy as np, torch
from collections.abc import Sequence
from PIL import Image
from accelerate import PartialState
from samr1_mini import evaluation
from samr1_mini.config import make_settings
from samr1_mini.data import load_data
from samr1_mini.decoding import Completion
from samr1_mini.policy import load_policy
from samr1_mini import loading
from samr1_mini.segmenter import load_segmenter

class Watched(Sequence):
    def __init__(self): self.data, self.asked = load_data("shapes", "validation", 7), []
    def __len__(self): return 7
    def __getitem__(self, i): self.asked.append(i); return self.data[i]

text = '<think>.</think><answer>{"bbox": [%d, 10, 90, 90], "points": [[40, 40, 1]]}</answer>'
lefts = iter(range(0, 80, 10))
evaluation.generate = lambda _, prompts, *a, **k: [
    [Completion(torch.ones(1), torch.zeros(1), False, text % next(lefts))] for _ in prompts]
data, (settings, _) = Watched(), make_settings(preset="tiny", device="cpu", eval_batch=2)
report = evaluation.evaluate(load_policy("tiny", "fp32"), load_segmenter("tiny"), data, settings, with_ceiling=True)
rank = PartialState(cpu=True).process_index
found = {"asked": data.asked, "rows": [vars(r) for r in report.rows], "summary": report.summary(),
         "ceiling": report.ceiling}
json.dump(found, open(sys.argv[1] + f"/{rank}.json", "w"))
"""


def test_two_processes_evaluate_half_each_and_both_end_with_the_whole_report(
    policy, segmenter, tmp_path, monkeypatch
):
    (tmp_path / "shared.py").write_text(SHARED)
    root, launch = Path(__file__).parent.parent, [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--",
        str(tmp_path / "shared.py"),
    ]
    out = subprocess.run(
        [sys.executable, *launch, str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )
    assert out.returncode == 0, out.stderr[-3000:]
    a, b = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert a.pop("asked") == [0, 2, 4, 6] and b.pop("asked") == [1, 3, 5] and a == b
    # what each says to its first, second, ... question
    say(monkeypatch, [answer([10 * i, 10, 90, 90]) for i in (0, 0, 1, 1, 2, 2, 3)])
    alone = evaluate(
        policy, segmenter, load_data("shapes", "validation", 7), SETTINGS, with_ceiling=True
    )
    assert [row["index"] for row in a["rows"]] == list(range(7)) and a["ceiling"] == alone.ceiling
    assert [(row["id"], row["strict_pixels"]) for row in a["rows"]] == [
        (row.id, list(row.strict_pixels)) for row in alone.rows
    ]
    assert a["summary"] == json.loads(json.dumps(alone.summary()))


def answer(box, think="."):
    return '<think>%s</think><answer>{"bbox": %s, "points": [[40, 40, 1]]}</answer>' % (
        think,
        json.dumps(box),
    )


def test_answers_vote_strictly_among_those_in_the_format_and_leniently_among_all(
    policy, segmenter, samples, monkeypatch
):
    """The group of each question: two alike in the format, three alike that are not, one that says nothing."""
    texts = [
        answer([60, 60, 100, 100]),
        "no idea",
        answer([60, 60, 100, 100], "2"),
        *[f"At [10, 10, {x}, 50]." for x in (50, 51, 50)],
    ]
    chances = []

    def speak(_, prompts, group, length, temperature, uniforms):
        assert group == 6 and temperature == 1
        chances.extend(uniforms)
        return [
            [Completion(torch.ones(1), torch.zeros(1), False, text) for text in texts]
            for _ in prompts
        ]

    monkeypatch.setattr(evaluation, "generate", speak)
    boxes = lambda image, boxes, points: np.stack(
        [
            np.pad(
                np.ones((int(d - b), int(c - a)), bool),
                ((int(b), 112 - int(d)), (int(a), 112 - int(c))),
            )
            for a, b, c, d in boxes
        ]
    )
    monkeypatch.setattr(segmenter, "masks", boxes)
    low, high = np.zeros((2, 112, 112), bool)
    low[60:100, 60:100], high[10:50, 10:50] = True, True
    data = [
        replace(samples[0], mask=low),
        replace(samples[1], mask=high),
        replace(samples[2], mask=low | high),
    ]
    report = evaluate(policy, segmenter, data, SETTINGS, votes=6)
    # the two, wherever the object is
    assert [row.strict_pixels for row in report.rows] == [(1600, 1600), (0, 3200), (1600, 3200)]
    assert [row.lenient_pixels for row in report.rows] == [
        (0, 3200),
        (1600, 1600),
        (1600, 3200),
    ]  # the three
    assert all(row.in_format and row.text == texts[0] and row.texts == texts for row in report.rows)
    [panel] = shown(segmenter, data, report.rows[:1], SETTINGS, 112)
    assert (panel.reward.mask == low).all() and panel.reward.iou == 1
    before = torch.get_rng_state()
    again = evaluate(policy, segmenter, data[::-1], replace(SETTINGS, eval_batch=1), votes=6)
    assert len(again.rows) == 3 and (torch.get_rng_state() == before).all()
    drawn, redrawn = torch.stack(chances[:3]), torch.stack(chances[3:])
    # by the place, whatever the batch
    assert (
        (drawn == redrawn).all()
        and drawn.shape == (3, 6, 112)
        and len(drawn.flatten().unique()) > 1600
    )


def test_sampled_answers_are_the_same_every_time_and_differ_among_each_other(
    policy, segmenter, samples
):
    short = replace(SETTINGS, max_new_tokens=12)
    first, second = (evaluate(policy, segmenter, samples[:2], short, votes=3) for _ in range(2))
    assert [row.texts for row in first.rows] == [row.texts for row in second.rows]
    assert all(len(row.texts) == 3 for row in first.rows) and any(
        len(set(row.texts)) > 1 for row in first.rows
    )


def row(i, picture, lenient, strict, **more):
    given = dict(
        kind="",
        question="?",
        texts=["."],
        text=".",
        truncated=False,
        in_format=True,
        why="",
        box_iou=1.0,
    )
    return ScoredAnswer(
        i, str(i), picture, lenient_pixels=lenient, strict_pixels=strict, **given | more
    )


def test_each_interval_of_a_summary_is_over_pictures_and_of_its_own_figure():
    rows = [row(i, "a", (9, 10), (9, 10)) for i in range(30)] + [
        row(i, "b", (5, 10), (1, 10)) for i in range(30)
    ]
    summary = Report(rows).summary()
    for name, low in (("gIoU", 0.1), ("gIoU_lenient", 0.5), ("cIoU", 0.1)):
        assert summary[f"{name}_interval"] == pytest.approx((low, 0.9)), name


def test_a_box_outside_the_format_is_not_accurate_and_what_was_cut_off_is_counted():
    rows = [
        row(0, "", (1, 1), (1, 1)),
        row(1, "", (1, 1), (0, 1), in_format=False, truncated=True),
        row(2, "", (1, 2), (1, 2), box_iou=0.5),
        row(3, "", (1, 2), (1, 2), box_iou=0.51),
    ]
    summary = Report(rows).summary()
    assert (summary["box_accuracy"], summary["truncated"], summary["format"]) == (0.5, 0.25, 0.75)


def test_a_row_knows_its_picture(policy, segmenter, samples, monkeypatch):
    say(monkeypatch, BOXES)
    data = [replace(x, picture="one.jpg") for x in samples[:2]]
    assert [x.picture for x in evaluate(policy, segmenter, data, SETTINGS).rows] == ["one.jpg"] * 2


def test_the_answer_that_counts_is_the_middle_one_and_what_is_shown_is_the_mask_that_was_voted_for(
    policy, segmenter, samples, monkeypatch
):
    boxes = [[70, 10, 100, 30], [10, 10, 51, 50], [10, 10, 50, 50], [10, 10, 49, 50]]
    texts = [answer(box) for box in boxes]
    monkeypatch.setattr(
        evaluation,
        "generate",
        lambda _, prompts, *a, **k: [
            [
                Completion(torch.ones(1), torch.zeros(1), i == 0, text)
                for i, text in enumerate(texts)
            ]
            for _ in prompts
        ],
    )
    monkeypatch.setattr(
        segmenter,
        "masks",
        lambda image, boxes, points: np.stack([filled(b, 112, 112) for b in boxes]),
    )
    report = evaluate(policy, segmenter, samples[:1], SETTINGS, votes=4)
    [only] = report.rows
    assert only.text == texts[1] and only.truncated is False
    [panel] = shown(segmenter, samples, report.rows, SETTINGS, 112)
    assert (panel.reward.mask == filled(boxes[2], 112, 112)).all()


def test_undecided_pixels_are_left_out_of_the_ceiling_and_of_what_a_sheet_says(segmenter, samples):
    x = replace(samples[0], ignore=~samples[0].mask)
    [mask] = segmenter.masks(np.asarray(x.image), [tight_box(x.mask)], [[]])
    assert (
        true_box_iou(segmenter, x)
        == iou(*intersection_union(mask, x.mask, x.ignore))
        != iou(*intersection_union(mask, x.mask))
    )
    verdict = judge(segmenter, x, [answer([1, 1, 111, 111])], SETTINGS, 112)
    assert verdict.reward.pixels == verdict.lenient_pixels == verdict.strict_pixels
    assert verdict.reward.iou == iou(*verdict.strict_pixels)


def test_where_boxes_are_compared_the_ceiling_is_1(policy, segmenter, samples, monkeypatch):
    say(monkeypatch, BOXES)
    data = []
    for x in samples[:2]:  # a data set with boxes has filled boxes as masks
        box = filled(tight_box(x.mask), *x.mask.shape)
        data.append(replace(x, mask=box, box_only=True))
    assert evaluate(policy, segmenter, data, SETTINGS, with_ceiling=True).ceiling == {
        "gIoU": 1,
        "count": 2,
    }


def test_masks_of_an_own_segmenter_may_be_a_list_in_the_ceiling_too(segmenter, samples):
    def masks(image, boxes, points):
        return list(segmenter.masks(image, boxes, points))

    own = SimpleNamespace(masks=masks)
    x = next(x for x in samples if x.mask.any())
    assert true_box_iou(own, x) == true_box_iou(segmenter, x) > 0.5


def test_points_in_an_evaluation_are_those_that_its_settings_allow(segmenter, samples):
    text = '<think>.</think><answer>{"bbox": [10, 10, 90, 90], "points": [[40, 40, 1], [50, 50, 0]]}</answer>'
    seen = lambda **s: judge(segmenter, samples[0], [text], replace(SETTINGS, **s), 112).reward
    assert seen().answer.in_format and not seen(max_points=1).answer.in_format
    [alone] = segmenter.masks(np.asarray(samples[0].image), [(10, 10, 90, 90)], [[]])
    assert (seen(points=False).mask == alone).all() and (seen().mask != alone).any()


def test_the_table_at_the_end_has_each_figure_under_its_name():
    each = lambda x: {"gIoU": x, "gIoU_lenient": x + 0.01, "cIoU": x + 0.02, "format": x + 0.03}
    table = before_after(
        {"base": each(0.1), "trained": each(0.5), "ceiling": {"gIoU": 0.9}}
    ).splitlines()
    assert [line.split() for line in table] == [
        ["held-out", "test,", "greedy", "gIoU", "lenient", "cIoU", "format"],
        ["base", "0.100", "0.110", "0.120", "0.130"],
        ["trained", "0.500", "0.510", "0.520", "0.530"],
        ["true", "boxes", "through", "SAM", "0.900"],
    ]


class Stopping(Sequence):
    def __init__(self, data, until):
        self.data, self.until = data, until

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        if self.until is not None and i >= self.until:
            raise KeyboardInterrupt
        return self.data[i]


def test_an_evaluation_that_goes_on_with_another_number_of_processes_answers_each_question_once(
    policy, segmenter, tmp_path, monkeypatch
):
    data, keep = load_data("shapes", "validation", 7), (tmp_path / "answers.part", "what")

    def answered(count, until=None):
        """What `count` processes, one after the other, find in all; each ends before question `until`."""
        rows = []
        for index in range(count):
            alike = SimpleNamespace(
                process_index=index, num_processes=count, is_main_process=index == 0
            )
            monkeypatch.setattr(processes, "PartialState", lambda **_: alike)
            monkeypatch.setattr(processes, "gather_object", lambda mine: mine)
            say(monkeypatch, BOXES)
            some = Stopping(data, until)
            try:
                rows += evaluate(
                    policy, segmenter, some, replace(SETTINGS, eval_batch=2), keep=keep
                ).rows
            except KeyboardInterrupt:
                pass
        return sorted(row.index for row in rows)

    for first, then in ((2, 1), (1, 2)):
        for file in tmp_path.glob("answers.part.*"):
            file.unlink()
        answered(first, until=4)
        assert answered(then) == list(range(7)), (first, then)


# --------------------------------------------------------------------------------------------- the log and its columns


def test_every_column_of_a_log_is_explained_and_every_explained_column_is_logged(settings):
    terms = {f.name.removesuffix("_weight") for f in fields(Settings) if "_weight" in f.name}
    committed = RESULTS / "seed0/metrics.jsonl"
    run_training(replace(settings, eval_every=1, redraw=1))
    logged = set()
    for file in (committed, Path(settings.run) / "metrics.jsonl"):
        names = {name for line in file.read_text().splitlines() for name in json.loads(line)}
        assert not names - set(COLUMNS) - terms - {"kl_held"}, file  # the old name
        logged |= names
    several = {"validation_N_acc", "validation_T_acc"}
    # Only steps with such updates log the first, only runs with --objects several the others.
    assert set(COLUMNS) - logged <= {"skipped_updates"} | several


def test_a_reward_term_of_ones_own_is_drawn_and_explained_with_the_option_of_its_weight():
    log = [
        {"step": 1, "reward": 1.0, "accuracy": 0.5, "short_text": 0.1, "zero_variance": 0.0},
        {"step": 2, "reward": 1.0, "accuracy": 0.5, "short_text": 0.2, "zero_variance": 0.0},
    ]
    log = [line | {"loss_of_my_own": 0.0} for line in log]  # this is drawn nowhere
    axes = Figure().subplots()
    plots.draw_reward(axes, log)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(labels) == 3 and "short_text" in labels[2] and "--short-text-weight" in labels[2]
    assert "--short-text-weight" in explain("short_text") and explain("kl") == COLUMNS["kl"]
    [weight] = [f for f in fields(Settings) if f.name == "matching_weight"]
    assert weight.metadata["help"] in explain("matching")


@pytest.mark.parametrize("score", [0.05, 0.4, 0.95])
def test_the_legend_of_the_held_out_scores_covers_no_score(score):
    names = ("gIoU", "gIoU_lenient")
    log = [
        {"step": step} | {f"validation_{name}": score for name in names} for step in range(1, 10)
    ]
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    plots.draw_held_out(axes, log, None)
    figure.canvas.draw()
    box = axes.get_legend().get_window_extent()
    points = np.concatenate([axes.transData.transform(x.get_xydata()) for x in axes.lines])
    assert len(points) == 18 and not any(box.contains(*point) for point in points)


# ----------------------------------------------------------------------------------------- the command and its pictures


@pytest.fixture
def no_model(monkeypatch):
    """Whoever loads a model here has not looked at the user's mistake before."""

    def loaded(*a, **k):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load_policy", loaded)
    monkeypatch.setattr(loading, "load_segmenter", loaded)


def mistakes(folder):
    """Files that are no pictures, and one whose header says 361 megapixels."""
    Image.new("1", (19_000, 19_000)).save(folder / "huge.png")
    whole = folder / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    (folder / "cut.png").write_bytes(whole.read_bytes()[:500])
    (folder / "text.jpg").write_text("not a picture")
    (folder / "empty.png").touch()
    (folder / "header.png").write_bytes(whole.read_bytes()[:20] + bytes(40))
    return ["huge.png", "cut.png", "text.jpg", "empty.png", "header.png", "missing.png", "."]


def test_a_file_that_is_no_usable_picture_ends_in_one_line_before_a_model_is_loaded(
    tmp_path, no_model, capsys
):
    for name in mistakes(tmp_path):
        with pytest.raises(SystemExit) as left:
            command.main(
                [
                    "--preset",
                    "tiny",
                    "--image",
                    str(tmp_path / name),
                    "--question",
                    "the star",
                    "--out",
                    str(tmp_path / "out"),
                ]
            )
        errors = capsys.readouterr().err.splitlines()
        assert (
            left.value.code == 2
            and len(errors) == 1
            and f"--image {tmp_path / name}: " in errors[0]
            and not errors[0].endswith(": ")
        ), (name, errors)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--data", "typo"], "--data typo"),
        (
            ["--out", "taken/below"],
            "--out taken/below",
        ),
        (["--votes", "0"], "--votes"),
        (["--eval-batch", "-1"], "--eval-batch"),
        (["--data", "empty"], "--data"),
        (["--image", "a.png", "--question", " "], "--question"),
    ],
)
def test_what_can_be_checked_cheaply_is_checked_before_a_model_is_loaded(
    options, words, tmp_path, monkeypatch, no_model, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    with pytest.raises(SystemExit) as left:
        command.main(["--preset", "tiny", *options])
    errors = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and len(errors) == 1 and words in errors[0]


def test_an_adapter_without_weights_or_of_another_base_and_damaged_settings_are_one_line(
    tmp_path, policy, capsys
):
    adapter = tmp_path / "run" / "adapter"
    policy.model.save_pretrained(adapter)
    weights, settings = adapter / "adapter_model.safetensors", tmp_path / "run" / "settings.json"
    whole = load_file(weights)
    cases = [
        (
            lambda: save_file(
                {name: tensor for name, tensor in whole.items() if "layers.3." not in name}, weights
            ),
            f"adapter {adapter}",
        ),
        (
            lambda: save_file(
                {
                    name: tensor[:, :100].clone() if "lora_A" in name else tensor
                    for name, tensor in whole.items()
                },
                weights,
            ),
            f"adapter {adapter}",
        ),
        (
            lambda: settings.write_text('{"samples": 30'),
            f"{settings}",
        ),
        (lambda: weights.unlink(), f"--adapter {adapter} has no adapter_model.safetensors"),
    ]
    for break_it, words in cases:
        break_it()
        with pytest.raises(SystemExit) as left:
            command.main(
                [
                    "--preset",
                    "tiny",
                    "--device",
                    "cpu",
                    "--count",
                    "2",
                    "--adapter",
                    str(adapter),
                    "--out",
                    str(tmp_path / "out"),
                ]
            )
        errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert left.value.code == 2 and len(errors) == 1 and words in errors[0], errors


def test_a_setting_that_no_longer_exists_is_passed_over(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"samples": 48, "was_once_a_setting": 1}))
    assert resumed_settings({"run": str(tmp_path), "resume": True})[0].samples == 48


@pytest.mark.parametrize(
    "name, value",
    [
        ("image_size", "112"),
        ("image_size", None),
        ("max_points", [1]),
        ("points", "yes"),
        ("lr", True),
    ],
)
def test_a_setting_of_the_wrong_type_is_one_line_that_names_file_and_setting(
    name, value, tmp_path, policy, capsys
):
    policy.model.save_pretrained(tmp_path / "adapter")
    saved = {"preset": "tiny", "accuracy_weight": 1}  # a whole number is a float
    (tmp_path / "settings.json").write_text(json.dumps(saved))
    command.parse(["--adapter", str(tmp_path / "adapter")])
    (tmp_path / "settings.json").write_text(json.dumps(saved | {name: value}))
    with pytest.raises(SystemExit) as left:
        command.parse(["--adapter", str(tmp_path / "adapter")])
    [error] = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and str(tmp_path / "settings.json") in error and name in error


def test_results_of_an_own_folder_name_all_lines_and_excluded_pixels_as_its_rules(tmp_path):
    folder = folder_of(tmp_path / "mine", [{"split": "test", "ignore": [[1, 1, 5, 1, 5, 5, 1, 5]]}])
    small = ["--preset", "tiny", "--device", "cpu", "--max-new-tokens", "2"]
    command.main([*small, "--data", folder, "--out", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert (results["sentences"], results["ignore"]) == ("all", "excluded")


@pytest.mark.parametrize("program", [train, command])
def test_a_disk_that_is_full_ends_in_one_line(program, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "results.json")

    monkeypatch.setattr(
        ("samr1_mini.grpo.load_models" if program is train else "samr1_mini.loading.load_models"),
        full,
    )
    with pytest.raises(SystemExit) as left:
        program.main(
            [
                "--preset",
                "tiny",
                "--device",
                "cpu",
                *(
                    ["--run", str(tmp_path / "run")]
                    if program is train
                    else ["--out", str(tmp_path)]
                ),
            ]
        )
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert left.value.code == 2 and len(errors) == 1 and "No space left on device" in errors[0]


def test_votes_and_batch_are_printed_among_the_conventions_and_one_picture_can_be_voted_on(
    tmp_path, capsys
):
    options = [
        "--preset",
        "tiny",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--votes",
        "3",
        "--max-new-tokens",
        "40",
        "--eval-batch",
        "2",
    ]
    command.main([*options, "--count", "3"])
    out = capsys.readouterr().out
    assert "3 answers" in out and "2 questions" in out
    assert (
        json.loads((tmp_path / "results.json").read_text())["votes"] == 3
        and (tmp_path / "sheet.png").exists()
    )
    load_data("shapes", "test", 1)[0].image.save(tmp_path / "scene.png")
    command.main(
        [
            *options,
            "--image",
            str(tmp_path / "scene.png"),
            "--question",
            "the largest object",
            "--empty-truth",
            "excluded",
        ]
    )
    assert (tmp_path / "scene-overlay.png").exists() and "mask: " in capsys.readouterr().out
    with Image.open(tmp_path / "scene-mask.png") as mask:
        assert mask.size == (112, 112) and 0 < np.asarray(mask).mean() < 1


def test_text_of_any_script_is_drawn_without_a_warning_and_what_no_font_has_by_its_number(
    segmenter, samples, tmp_path, monkeypatch
):
    texts = [
        "左边的狗在 [10, 20, 30, 40]。",
        "الكلب على اليسار",
        "the dog \U0001f415\U0001f44d\U0001f3fd \u202e \x07",
        "it costs $5 and $6_a^b, \\frac{1}",
    ]
    panels = []
    for text in texts:
        [reward] = score(segmenter, samples[0], [text], 112, lenient=True)
        panels.append(Panel(replace(samples[0], question=text), text, reward))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.sample_sheet(tmp_path / "a.png", panels, 112, "any script")
        monkeypatch.setattr(
            plots, "FAMILIES", ["DejaVu Sans"]
        )  # the only one that is there everywhere
        plots.sample_sheet(tmp_path / "b.png", panels, 112, "any script")
    assert (
        plots.legible("a 左 狗", 40) == "a ⟨U+5DE6⟩ ⟨U+72D7⟩"
        and plots.legible("é ü Ж ∑ اليسار 😀", 40) == "é ü Ж ∑ اليسار 😀"
    )
    assert (
        plots.legible("a\x07b\u202ec", 40) == "a⟨U+0007⟩b⟨U+202E⟩c"
        and plots.legible("one two three four", 9, 1) == "one two …"
    )
    # A wide character takes two of the columns, as Chinese does.
    assert [len(line) for line in plots.legible(30 * "😀", 40).split("\n")] == [20, 10]
    with Image.open(tmp_path / "b.png") as image:
        assert image.width > 1000


def test_a_large_photo_is_drawn_by_every_few_pixels_with_all_in_its_place(segmenter, tmp_path):
    """A photo of 2400 x 1600: what is drawn is a third of it, and box, point and masks lie where they do on the small
    one."""
    import matplotlib.pyplot as plt

    mask = np.zeros((1600, 2400), bool)
    mask[400:800, 600:1200] = True
    sample = Sample(Image.new("RGB", (2400, 1600), "white"), "?", mask, "x")
    [reward] = score(segmenter, sample, [answer([28, 28, 56, 56])], 112)
    figure, axes = plt.subplots()
    plots.draw_answer(axes, Panel(sample, "", replace(reward, mask=mask)), 112)
    assert axes.images[0].get_size() == (534, 800)
    box = axes.get_lines()[1]
    assert box.get_xdata()[:2] == pytest.approx([199.5, 399.5], abs=0.6) and box.get_ydata()[
        1:3
    ] == pytest.approx([132.8, 266.2], abs=0.6)
    rows, columns = np.nonzero(
        axes.images[0].get_array()[..., 0] == 255
    )  # in full light: what SAM's mask holds
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (200, 399, 134, 266)
    plt.close(figure)


def test_an_evaluation_that_was_stopped_goes_on_and_ends_with_the_same_figures(
    tmp_path, monkeypatch, capsys
):
    options = [
        "--preset",
        "tiny",
        "--device",
        "cpu",
        "--count",
        "6",
        "--eval-batch",
        "2",
        "--max-new-tokens",
        "40",
    ]
    command.main([*options, "--out", str(tmp_path / "whole")])
    seen, read = [], Shapes.__getitem__

    def broken(self, i):
        seen.append(i)
        if i == 4 and len(seen) == 5:
            raise UserError("line 4: image file is truncated")
        return read(self, i)

    monkeypatch.setattr(Shapes, "__getitem__", broken)
    with pytest.raises(SystemExit):
        command.main([*options, "--out", str(tmp_path / "cut")])
    [kept] = (tmp_path / "cut").glob("answers-*.part.0")
    assert len(kept.read_text().splitlines()) == 3
    with kept.open("a") as file:  # a kill in the middle of a line
        file.write('[{"index": 4, "id')
    with monkeypatch.context() as again, pytest.raises(
        SystemExit
    ):  # stopped once more, before anything is added
        again.setattr(Shapes, "__getitem__", lambda *_: leave(UserError("still truncated")))
        command.main([*options, "--out", str(tmp_path / "cut")])
    assert kept.read_text().endswith("}]\n") and len(kept.read_text().splitlines()) == 3
    seen.append("again")
    with monkeypatch.context() as another:  # an evaluation in between loses nothing
        another.setattr(Shapes, "__getitem__", read)
        command.main([*options, "--blank", "--out", str(tmp_path / "cut")])
    command.main([*options, "--out", str(tmp_path / "cut")])
    assert seen[6:8] == [4, 5] and not kept.exists()
    whole, cut = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "cut")
    )
    assert cut == whole | {"out": str(tmp_path / "cut")}
    seen[:] = ["again"]
    kept.write_text("of something else\n[]\n")
    command.main([*options, "--out", str(tmp_path / "cut")])
    assert (
        seen[1:7] == list(range(6))
        and json.loads((tmp_path / "cut" / "results.json").read_text()) == cut
    )
    monkeypatch.setattr(loading, "load_models", lambda *_: leave(KeyboardInterrupt()))
    with pytest.raises(SystemExit) as left:
        command.main([*options, "--out", str(tmp_path / "cut")])
    assert left.value.code == 130 and "same command" in capsys.readouterr().err


def test_a_public_set_is_taken_whole_unless_a_count_is_given(tmp_path, no_model):
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "samr1_mini.loading.open_data", lambda *a: taken.append(a[:3]) or leave(UserError(""))
        )
        for more in ([], ["--data", "reasonseg"], ["--data", "reasonseg", "--count", "5"]):
            with pytest.raises(SystemExit):
                command.main(["--preset", "tiny", "--out", str(tmp_path), *more])
    assert taken == [
        ("shapes", "test", 600),
        ("reasonseg", "test", sys.maxsize),
        ("reasonseg", "test", 5),
    ]


def test_a_model_is_merged_whole_or_not_at_all(tmp_path, policy, monkeypatch, capsys):
    adapter, merged = tmp_path / "run/adapter", tmp_path / "merged"
    policy.model.save_pretrained(adapter)
    options = ["--device", "cpu", "--adapter", str(adapter), "--merge", str(merged)]
    full_disk = SafetensorError("I/O error: No space left on device")
    with monkeypatch.context() as full, pytest.raises(SystemExit) as left:
        full.setattr(
            type(policy.base),
            "save_pretrained",
            lambda _, name: Path(name).mkdir() or leave(full_disk),
        )
        command.main(options)
    told = capsys.readouterr()
    assert (
        left.value.code == 2 and f"--merge {merged}: I/O error: No space left on device" in told.err
    )
    assert "no settings.json" in told.out and "preset tiny" in told.out
    assert [x.name for x in tmp_path.iterdir()] == ["run"]
    command.main(options)
    assert (merged / "model.safetensors").exists() and (merged / "tokenizer.json").exists()


def leave(error):
    raise error


def test_what_is_set_beside_an_adapter_is_printed_and_another_preset_is_refused(
    tmp_path, policy, no_model, capsys
):
    policy.model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "settings.json").write_text(json.dumps({"preset": "tiny", "max_points": 3}))
    adapter = ["--adapter", str(tmp_path / "adapter")]
    settings, _, line = command.parse([*adapter, "--image-size", "224", "--preset", "tiny"])
    assert settings.max_points == 3 and "image_size = 224, preset = tiny" in line
    with pytest.raises(SystemExit):
        command.parse([*adapter, "--preset", "7b"])
    assert "--preset" in capsys.readouterr().err


def test_an_evaluation_asks_for_no_reward_term(segmenter, samples):
    s = replace(SETTINGS, accuracy="no such term")  # an error in reward_terms
    reward = judge(segmenter, samples[0], BOXES[:1], s, 112).reward
    assert reward.mask.any() and not reward.terms


@pytest.mark.parametrize("size", [(1, 100), (100, 1), (300, 100), (100, 300)])
def test_a_picture_of_any_shape_can_be_drawn(size, segmenter, tmp_path):
    mask = np.zeros(size[::-1], bool)
    mask[: size[1] // 2 + 1, : size[0] // 2 + 1] = True
    mask[-1, -1] = False
    sample = Sample(Image.new("RGB", size, "white"), "which " * 2000, mask, "x")
    [reward] = score(segmenter, sample, [answer([28, 28, 56, 56])], 112)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.sample_sheet(
            tmp_path / "sheet.png", [Panel(sample, "so " * 500, reward)] * 5, 112, "title"
        )


@pytest.fixture
def asked(policy, segmenter, monkeypatch):
    """What eval.py asks an evaluation for, each time; none is made."""
    seen, bind = [], inspect.signature(evaluation.evaluate).bind

    def note(*given, **more):
        seen.append(bind(*given, **more).arguments)
        raise UserError("enough")

    monkeypatch.setattr(evaluation, "evaluate", note)
    monkeypatch.setattr(loading, "load_models", lambda *_: (policy, segmenter))

    def ask(*options):
        with pytest.raises(SystemExit):
            command.main(["--preset", "tiny", "--device", "cpu", *map(str, options)])
        return seen.pop()

    return ask


def test_what_eval_is_told_reaches_the_data_and_the_evaluation(asked, tmp_path):
    reasonseg_folder(tmp_path)
    options = ["--data", tmp_path, "--split", "validation", "--out", tmp_path / "out"]
    plain = asked(*options)
    told = asked(*options, "--sentences", "all", "--ignore", "excluded", "--blank", "--votes", 3)
    assert (
        len(plain["data"]) == 1
        and plain["data"][0].ignore is None
        and not plain["blank"]
        and plain["votes"] == 1
    )
    assert len(told["data"]) == 2 and told["blank"] and told["votes"] == 3
    assert (
        told["data"][0].ignore[:, 30:].any()
        and (told["data"][0].mask | told["data"][0].ignore == plain["data"][0].mask).all()
    )
    one = asked(
        "--image",
        tmp_path / "val/a.jpg",
        "--question",
        "?",
        "--blank",
        "--votes",
        3,
        "--out",
        tmp_path / "o",
    )
    assert one["blank"] and one["votes"] == 3


def test_answers_that_were_kept_are_of_the_same_questions_and_the_same_adapter(
    asked, policy, tmp_path
):
    adapter = tmp_path / "run/adapter"
    policy.model.save_pretrained(adapter)
    line = lambda *more: asked(
        "--adapter", adapter, "--count", 4, "--out", tmp_path / "out", *more
    )["keep"][1]
    first = line()
    assert (
        first == line()
        and len({first, line("--votes", 2), line("--blank"), line("--split", "train")}) == 4
    )
    prompt = tmp_path / "prompt.txt"
    lines = set()
    for text in ("Find {question}", "Where is {question}?"):
        prompt.write_text(text)
        lines.add(line("--prompt-file", prompt))
    assert len(lines) == 2
    os.utime(adapter / "adapter_model.safetensors", (1, 1))  # trained on
    assert line() != first


def test_answers_that_were_kept_are_of_the_same_lines_of_data(asked, tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    Image.fromarray(np.arange(60 * 40).reshape(40, 60) < 500).save(folder / "mask.png")
    folder_of(folder, [{"mask": "mask.png"}])
    line = lambda: asked("--data", folder, "--out", tmp_path / "out")["keep"][1]
    first = line()
    assert first == line()
    text = (folder / "data.jsonl").read_text()
    (folder / "data.jsonl").write_text(text.replace("what?", "where?"))
    second = line()
    assert second != first
    for name in ("a.png", "mask.png"):
        os.utime(folder / name, (1, 1))
        assert line() != second
        second = line()


def test_answers_that_were_kept_are_of_the_same_weights_of_policy_and_sam(asked, tmp_path):
    shutil.copytree(TINY_SAM, tmp_path / "sam")
    line = lambda: asked("--count", 4, "--out", tmp_path / "out", "--sam", tmp_path / "sam")[
        "keep"
    ][1]
    first = line()
    assert first == line()
    os.utime(tmp_path / "sam/model.safetensors", (1, 1))
    assert line() != first


def test_the_train_split_of_drawn_scenes_is_that_of_the_adapters_run(asked, policy, tmp_path):
    adapter = tmp_path / "run/adapter"
    policy.model.save_pretrained(adapter)
    settings, _ = make_settings(preset="tiny", device="cpu", seed=3)
    (tmp_path / "run/settings.json").write_text(json.dumps(asdict(settings)))
    told = asked("--adapter", adapter, "--split", "train", "--count", 4, "--out", tmp_path / "out")
    assert told["data"].ids == load_data("shapes", "train", 4, 3).ids


def test_a_picture_that_is_not_there_is_named(capsys, tmp_path):
    with pytest.raises(SystemExit) as left:
        command.main(
            ["--preset", "tiny", "--device", "cpu", "--out", str(tmp_path / "out")]
            + ["--image", str(tmp_path / "none.jpg"), "--question", "the cup"]
        )
    error = capsys.readouterr().err
    assert left.value.code == 2 and "no such file" in error and "save a new" not in error


def test_the_mask_of_an_earlier_question_does_not_stay(tmp_path, samples, monkeypatch):
    samples[0].image.save(tmp_path / "scene.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/scene-mask.png").write_bytes(b"old")
    monkeypatch.setattr(evaluation, "answer_batch", lambda *_: [[Completion([], [], False, "no")]])
    command.main(
        ["--preset", "tiny", "--device", "cpu", "--out", str(tmp_path / "out")]
        + ["--image", str(tmp_path / "scene.png"), "--question", "the cup"]
    )
    assert not (tmp_path / "out/scene-mask.png").exists()


def test_a_gpu_that_runs_out_of_memory_in_any_way_gets_one_line(monkeypatch, tmp_path, capsys):
    def full(*_):
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(command, "load", full)
    with pytest.raises(SystemExit) as left:
        command.main(["--preset", "tiny", "--device", "cpu", "--out", str(tmp_path / "out")])
    assert left.value.code == 2 and "--eval-batch" in capsys.readouterr().err


def test_kept_answers_of_a_folder_go_where_its_lines_are_others(asked, tmp_path):
    lines = []
    for name in ("a", "b"):
        folder = folder_of(tmp_path / "mine", [{"split": "test", "id": name}])
        lines.append(asked("--data", folder, "--out", tmp_path / "out")["keep"][1])
    assert lines[0] != lines[1]


def test_what_eval_prints_and_draws_of_a_report(policy, segmenter, monkeypatch, tmp_path, capsys):
    rows = [
        row(i, "", (i, 20), (i, 20 + 9 * i))
        for i in np.random.default_rng(0).permutation(20).tolist()
    ]
    drawn = []
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: Report(rows))
    monkeypatch.setattr(
        evaluation, "shown", lambda segmenter, data, rows, *_: [r.index for r in rows]
    )
    monkeypatch.setattr(evaluation, "sample_sheet", lambda path, panels, *_: drawn.extend(panels))
    values = {"ids": [], "box_only": False, "missing": ["gone.jpg"], "files": lambda self: []}
    data = type("Some", (list,), values)(range(20))
    options = Namespace(out=str(tmp_path), votes=1, adapter=None, split="test", blank=False)
    command.evaluate_set(policy, segmenter, data, SETTINGS, options)
    assert drawn == [19, 18, 17, 16, 11, 10, 9, 8, 3, 2, 1, 0]  # best, middle, worst
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["missing"] == ["gone.jpg"] and [x["iou"] for x in results["answers"]] == [
        r.iou for r in rows
    ]
    (a, b), (c, d) = results["summary"]["gIoU_interval"], results["summary"]["cIoU_interval"]
    assert (
        f"gIoU: {a:.3f} to {b:.3f}; of cIoU: {c:.3f} to {d:.3f}" in capsys.readouterr().out
        and a != c
    )
