"""The committed weights: SAM uses points, and the adapter uses its picture."""

from pathlib import Path

import numpy as np
import pytest

from samr1_mini.config import make_settings, parse_settings
from samr1_mini.data import load_data
from samr1_mini.evaluation import evaluate
from samr1_mini.grpo import Parts, roll_out
from samr1_mini.metrics import intersection_union, iou
from samr1_mini.policy import load_policy
from tutorials.tiny_world.answers import style_of
from tutorials.tiny_world.sam import box_around, meant, neighbour, points_on
from samr1_mini.tiny.scenes import SPLITS, make_scene

ADAPTER = Path(__file__).parent.parent / "tutorials/results/seed0/adapter"


@pytest.fixture(scope="module")
def trained(segmenter):
    s, _ = make_settings(preset="tiny", device="cpu")
    policy = load_policy("tiny", adapter=ADAPTER)
    found = {}
    for blank, count in ((False, 80), (True, 40)):
        data = load_data("shapes", "test", count)
        found[blank] = evaluate(policy, segmenter, data, s, blank=blank)
    return found


def test_the_trained_policy_answers_in_the_format(trained):
    assert trained[False].summary()["format"] > 0.95


def test_a_blanked_picture_costs_the_trained_policy_most_of_its_score(trained):
    assert trained[True].summary()["gIoU_lenient"] < 0.4 * trained[False].summary()["gIoU_lenient"]


def test_the_trained_policy_lists_coordinates_for_nearly_all_questions(trained):
    places = [style_of(row.text) == "places" for row in trained[False].rows]
    assert np.mean(places) > 0.9


@pytest.mark.parametrize("options, shown", [([], True), (["--no-points"], False)])
def test_points_reach_sam_in_training_and_in_evaluation_unless_the_user_switches_them_off(
    segmenter, monkeypatch, options, shown
):
    s, _ = parse_settings(
        ["--preset", "tiny", "--device", "cpu", "--group", "2", *options], "train.py", ""
    )
    policy, data, seen, masks = (
        load_policy("tiny", adapter=ADAPTER),
        list(load_data("shapes", "train", 2)),
        [],
        segmenter.masks,
    )
    monkeypatch.setattr(
        segmenter,
        "masks",
        lambda image, boxes, points: seen.extend(points) or masks(image, boxes, points),
    )
    for scored in (
        lambda: roll_out(Parts(policy, segmenter, None, s), data),
        lambda: evaluate(policy, segmenter, data, s),
    ):
        seen.clear()
        scored()
        assert seen and any(seen) == shown


def test_in_a_box_of_two_objects_the_tiny_sam_draws_both_or_the_one_that_the_points_mean(segmenter):
    rng, found = np.random.default_rng(0), []
    for scene in map(make_scene, range(SPLITS["test"][0], SPLITS["test"][0] + 25)):
        for thing in scene.things:
            other = neighbour(thing, scene)
            box = box_around(thing, other)
            on, on_other = (
                points_on(a.mask, rng, 1, 1) + points_on(b.mask, rng, 1, 0)
                for a, b in ((thing, other), (other, thing))
            )
            prompts = [[], on, on_other]
            masks = segmenter.masks(scene.image, [box] * 3, prompts)
            wanted = [meant(scene, box, points) for points in prompts]
            found.append(
                [
                    [iou(*intersection_union(m, w)), (m & thing.mask).sum() / thing.mask.sum()]
                    for m, w in zip(masks, wanted)
                ]
            )
    (both, both_hold), (one, one_holds), (rest, rest_holds) = np.mean(found, 0)
    assert (
        both > 0.85
        and min(one, rest) > 0.6
        and min(both_hold, one_holds) > 0.85
        and rest_holds < 0.45
    )
