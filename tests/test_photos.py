"""Photographs of their own sizes, Qwen2.5-VL's real vocabulary and 840 x 840 pixels: from file to figure, where photos
are at hand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as eval_command
from samr1_mini import decoding, evaluation
from samr1_mini.config import make_settings
from samr1_mini.data import load_data
from samr1_mini.evaluation import evaluate, policy_image, shown
from samr1_mini.grpo import train
from samr1_mini.metrics import filled, intersection_union, iou, tight_box
from samr1_mini.policy import encode, load_policy

PHOTOS = Path(__file__).parent.parent.parent / "shared" / "photos"
pytestmark = pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photographs are not at hand")


class BoxFiller:
    """Stands in for SAM: the mask of a box is that box."""

    def masks(self, image, boxes, points):
        return np.stack([filled(box, *image.shape[:2]) for box in boxes])


def true_answer(x, size=840):
    """The true box in the policy's pixels, as a policy that is always right would write it."""
    sx, sy = size / x.image.width, size / x.image.height
    x1, y1, x2, y2 = tight_box(x.mask)
    box = [round(v, 2) for v in (x1 * sx, y1 * sy, x2 * sx, y2 * sy)]
    return f'<think>It is there.</think><answer>{{"bbox": {box}, "points": [[{box[0] + 1}, {box[1] + 1}, 1]]}}</answer>'


def photo_settings(policy, run, **others):
    """Settings of two steps with photographs, at the size of a full picture."""
    return make_settings(
        preset="tiny",
        device="cpu",
        policy=str(policy),
        load_in="fp32",
        data=str(PHOTOS),
        image_size=840,
        rank=2,
        run=str(run),
        samples=4,
        questions=2,
        warmup=1,
        eval_every=0,
        eval_samples=2,
        **others,
    )[0]


@pytest.fixture
def settings(real_vocabulary, tmp_path):
    return photo_settings(
        real_vocabulary, tmp_path / "run", max_new_tokens=8, group=2, updates=1, test_samples=2
    )


def test_true_boxes_come_back_from_840_pixels_to_each_photographs_own_size(
    settings, real_vocabulary, monkeypatch
):
    policy, data = load_policy(real_vocabulary, "fp32", rank=2), load_data(str(PHOTOS), "test", 4)
    answers = iter([true_answer(x) for x in data])
    real = evaluation.generate

    def right(*arguments, **options):
        groups = real(*arguments, **options)
        for [answer] in groups:
            answer.text = next(answers)
        return groups

    monkeypatch.setattr(evaluation, "generate", right)
    report = evaluate(policy, BoxFiller(), data, settings)
    assert len({x.image.size for x in data}) > 1 and all(x.image.size != (840, 840) for x in data)
    for row, x in zip(report.rows, data):
        # of the box itself, filled, on the photograph
        best = iou(*intersection_union(filled(tight_box(x.mask), *x.mask.shape), x.mask))
        assert row.in_format and row.iou == pytest.approx(best, abs=0.01) and row.box_iou > 0.99
    panels = shown(BoxFiller(), data, report.rows, settings, 840)
    assert all(p.reward.mask.shape == p.sample.mask.shape for p in panels)


def test_a_photographs_prompt_has_900_picture_tokens_and_the_words_of_the_real_vocabulary(
    real_vocabulary,
):
    policy, [x] = load_policy(real_vocabulary, "fp32", rank=2), load_data(str(PHOTOS), "test", 1)
    with torch.no_grad():
        [prompt] = encode(policy, [policy_image(x, 840)], [x.question])
    assert prompt.picture.sum() == 900 and 1000 < len(prompt.ids) < 1150
    assert x.question in policy.processor.tokenizer.decode(prompt.ids)


def test_evaluation_of_photographs_from_the_command_line(
    settings, real_vocabulary, tmp_path, capsys
):
    common = [
        "--preset",
        "tiny",
        "--policy",
        str(real_vocabulary),
        "--load-in",
        "fp32",
        "--device",
        "cpu",
        "--image-size",
        "840",
        "--max-new-tokens",
        "8",
        "--out",
        str(tmp_path / "out"),
    ]
    eval_command.main([*common, "--data", str(PHOTOS), "--count", "2"])
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert (
        results["summary"]["count"] == 2
        and "truncated" in results["summary"]
        and "conventions" in capsys.readouterr().out
    )
    photo = sorted((PHOTOS / "pictures").iterdir())[0]
    eval_command.main([*common, "--image", str(photo), "--question", "the cup"])
    for name in ("sheet.png", f"{photo.stem}-overlay.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert (
                picture.width > 400 and np.asarray(picture.convert("L")).std() > 20
            )  # something is drawn


def test_training_on_photographs(settings, monkeypatch, tmp_path):
    """A random policy never finds the format, so every second answer is given one; all else is real."""
    real, asked = decoding.generate, []

    def half_right(policy, prompts, *rest):
        groups = real(policy, prompts, *rest)
        asked.extend(len(p.ids) for p in prompts)
        for group in groups:
            group[0].text = (
                '<think>There.</think><answer>{"bbox": [210, 210, 630, 630], "points": [[420, 420, 1]]}</answer>'
            )
        return groups

    monkeypatch.setattr(decoding, "generate", half_right)
    summary = train(replace(settings, beta=0.0))
    assert summary["samples"] == 4 and summary["trained"]["count"] == 2 and min(asked) > 1000
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["segmentation_format"] for line in lines] == [0.5, 0.5] and lines[0][
        "zero_variance"
    ] == 0
    assert (tmp_path / "run/sheet-test.png").exists()
