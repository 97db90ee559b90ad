"""The drawn world: fair questions, true masks, splits that never meet."""

import itertools

import numpy as np
import pytest

from samr1_mini.data import load_data
from samr1_mini.metrics import box_iou
from samr1_mini.reward import parse
from samr1_mini.tiny.pretrain import STYLES, answer_text, fact_texts, loose_points
from samr1_mini.tiny.scenes import (
    COLOUR_OF,
    COLOURS,
    KINDS,
    PRETRAIN,
    SHAPE_WITH,
    SHAPES,
    SPLITS,
    fair_questions,
    make_scene,
)


def read_question(scene, text):
    """The objects that a text means, found again from the words alone: an independent reading of `fair_questions`."""
    words = text.removeprefix("the ").split()
    measures = {"leftmost": lambda t: -t.x, "rightmost": lambda t: t.x, "topmost": lambda t: -t.y, "bottommost": lambda t: t.y,
                "largest": lambda t: t.mask.sum(), "smallest": lambda t: -t.mask.sum()}
    named = lambda w: [t for t in scene.things if all(x in ("object", t.colour, t.shape) for x in w)]
    if "colour of" in text:
        return named([COLOUR_OF[text.split("colour of ")[1]]])
    if text.startswith("the object with "):
        return named([SHAPE_WITH[text.split("object with ")[1]]])
    if words[0] in measures:
        return [max(named(words[1:]), key=measures[words[0]])]
    for side, axis, sign in (("left of", "x", -1), ("right of", "x", 1), ("above", "y", -1), ("below", "y", 1)):
        if f" {side} the " in text:
            [anchor] = named(text.split(f" {side} the ")[1].split())
            return [t for t in scene.things if sign * (getattr(t, axis) - getattr(anchor, axis)) > 0]
    return named(words)


@pytest.mark.parametrize("kind", KINDS)
def test_every_question_has_exactly_one_right_object(kind):
    asked = 0
    for seed in range(300):
        scene = make_scene(seed)
        for text, thing in fair_questions(scene, kind):
            assert read_question(scene, text) == [thing], (seed, text)
            asked += 1
    assert asked > 1000


def test_extreme_questions_leave_room_to_spare():
    for seed in range(200):
        scene = make_scene(seed)
        for text, thing in fair_questions(scene, "relation"):
            if text == "the leftmost object":
                assert all(o.x - thing.x >= 7 for o in scene.things if o is not thing)


def test_the_largest_object_reaches_farther_and_covers_more_than_any_other():
    """What is seen decides, not the size it was drawn with: a star drawn larger than a circle may still show less."""
    asked = 0
    for seed in range(300):
        scene = make_scene(seed)
        for text, thing in fair_questions(scene, "relation"):
            if text in ("the largest object", "the smallest object"):
                sign, asked = (1 if "largest" in text else -1), asked + 1
                for other in [t for t in scene.things if t is not thing]:
                    assert sign * int(thing.mask.sum()) > sign * int(other.mask.sum())
                    area = lambda t: int(t.mask.any(0).sum() * t.mask.any(1).sum())  # of the tight box
                    assert sign * area(thing) > sign * area(other)
    assert asked > 100


def test_indirect_questions_never_name_the_answer():
    for seed in range(200):
        for text, thing in fair_questions(make_scene(seed), "indirect"):
            assert not {thing.colour, thing.shape} & set(text.split())
            assert not set(COLOURS) & set(text.split()) and not set(SHAPES) & set(text.split())


def test_the_base_never_met_an_indirect_question():
    indirect = {text for seed in range(300) for text, _ in fair_questions(make_scene(seed), "indirect")}
    assert not indirect & {text for fact in fact_texts() for text in fact}
    assert all("thing that has" not in q and "object with" not in q for q, _ in fact_texts())


def test_the_same_seed_draws_the_same_scene():
    a, b, c = make_scene(5), make_scene(5), make_scene(6)
    assert (a.image == b.image).all() and [t.name for t in a.things] == [t.name for t in b.things]
    assert (a.image != c.image).any()


def test_splits_and_pretraining_scenes_are_disjoint():
    ranges = [*SPLITS.values(), PRETRAIN]
    for (a, b), (c, d) in itertools.combinations(ranges, 2):
        assert b <= c or d <= a
    taken = [{load_data("shapes", split, 50, seed)[i].id for i in range(50)} for split, seed in
             (("train", 0), ("train", 1), ("train", 999), ("validation", 0), ("test", 0))]
    assert len(set.union(*taken)) == 250


def test_test_scenes_are_the_same_for_every_seed():
    assert [s.id for s in load_data("shapes", "test", 5, 0)] == [s.id for s in load_data("shapes", "test", 5, 7)]


def test_a_mask_lies_where_its_colour_is():
    for seed in range(50):
        scene = make_scene(seed)
        for thing in scene.things:
            inside = scene.image[thing.mask].astype(float).mean(0)
            nearest = min(COLOURS, key=lambda name: np.abs(inside - COLOURS[name]).sum())
            assert nearest == thing.colour, (seed, thing.name, inside)
            x1, y1, x2, y2 = thing.box
            assert thing.mask[y1:y2, x1:x2].sum() == thing.mask.sum() and thing.mask[y1].any() and thing.mask[:, x2 - 1].any()


def test_objects_do_not_overlap():
    for seed in range(100):
        assert sum(t.mask.astype(int) for t in make_scene(seed).things).max() == 1


def test_kinds_come_in_equal_parts():
    kinds = [s.kind for s in load_data("shapes", "test", 300)]
    assert all(90 <= kinds.count(kind) <= 110 for kind in KINDS)


def test_base_answers_in_four_styles_hold_the_loose_box_and_only_thoughts_are_in_the_format():
    rng, scene = np.random.default_rng(0), make_scene(1)
    for thing in scene.things:
        for style in STYLES:
            answer = parse(answer_text(thing, scene, rng, 0.2, style), 112, 112)
            assert answer.in_format == ("thought" in style) and 0.3 < box_iou(answer.lenient_box, thing.box) < 1


def test_points_of_base_answers_are_labelled_rightly_where_nothing_strays():
    rng = np.random.default_rng(0)
    for thing in [t for seed in range(30) for t in make_scene(seed).things]:
        for x, y, label in loose_points(thing, rng, 0.0):
            x1, y1, x2, y2 = thing.box
            assert thing.mask[y, x] == bool(label) and x1 <= x < x2 and y1 <= y < y2
