"""SAM's encoder in bf16: nearly the same masks and rewards, half of the bytes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import score
from samr1_mini.config import make_settings
from samr1_mini.forecast import phase_bytes, policy_sizes, staying_bytes
from samr1_mini.memory import compute_dtype
from samr1_mini.segmenter import load_segmenter
from samr1_mini.speed import sam_seconds
from samr1_mini.tiny.scenes import make_scene


@pytest.fixture(scope="module")
def half():
    return load_segmenter("tiny", dtype="bf16")


@pytest.mark.parametrize(
    "choice, device, capability, dtype",
    [
        ("auto", "cpu", None, torch.float32),
        ("auto", "cuda", (8, 0), torch.bfloat16),
        ("auto", "cuda", (7, 5), torch.float32),
        ("fp32", "cuda", (9, 0), torch.float32),
        ("bf16", "cpu", None, torch.bfloat16),
    ],
)
def test_auto_takes_bf16_only_on_a_gpu_that_has_it(choice, device, capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert compute_dtype(choice, device) == dtype


def test_only_the_encoder_is_in_bf16_and_the_decoder_gets_fp32(half, segmenter):
    sam = half.predictor.model
    half.masks(make_scene(3).image, [(10, 10, 50, 50)], [[]])
    assert {p.dtype for p in sam.image_encoder.parameters()} == {torch.bfloat16}
    rest = [*sam.mask_decoder.parameters(), *sam.prompt_encoder.parameters()]
    assert {p.dtype for p in rest} == {half.predictor.features.dtype} == {torch.float32}
    on_cpu = load_segmenter("tiny").predictor.model.state_dict()
    for name, value in segmenter.predictor.model.state_dict().items():
        assert torch.equal(value, on_cpu[name])


def test_masks_agree_with_those_of_fp32_in_99_of_100_pixels(half, segmenter):
    shares = []
    for seed in range(10):
        scene = make_scene(seed)
        boxes = [thing.box for thing in scene.things]
        points = [[(*np.argwhere(thing.mask)[9][::-1], 1)] for thing in scene.things]
        for given in (points, [[] for _ in boxes]):
            found = half.masks(scene.image, boxes, given)
            expected = segmenter.masks(scene.image, boxes, given)
            assert expected.any((1, 2)).all()
            shares += list((found == expected).mean((1, 2)))
    assert min(shares) >= 0.99 and min(shares) < 1  # in fp32 they would be equal


def test_rewards_of_groups_change_little(half, segmenter, samples):
    text = '<think>It is there.</think><answer>{{"bbox": {}, "points": []}}</answer>'
    changed = []
    for sample in samples:
        rows, columns = np.nonzero(sample.mask)
        corners = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        moved = [(corners + shift).clip(0, 112).tolist() for shift in (0, 2, 4, 8, 12, 16)]
        texts = [text.format(box) for box in moved]
        pairs = zip(score(half, sample, texts), score(segmenter, sample, texts))
        for mine, theirs in pairs:
            assert mine.iou == pytest.approx(theirs.iou, abs=0.05)
            changed.append(mine.total != theirs.total)
    assert len(changed) == 36 and sum(changed) <= 2  # an IoU near a step of eq. (5)


def test_the_forecast_counts_half_of_the_bytes_and_less_time():
    s, _ = make_settings(preset="7b", device="cpu")
    full, low = policy_sizes(replace(s, sam_dtype="fp32")), policy_sizes(s)
    assert staying_bytes(low)["SAM"] == staying_bytes(full)["SAM"] / 2
    scores = [max(phase_bytes(n)["reward"].values()) for n in (low, full)]
    assert scores[0] == scores[1] / 2
    assert sam_seconds(low, "RTX 4090") < 0.6 * sam_seconds(full, "RTX 4090")
