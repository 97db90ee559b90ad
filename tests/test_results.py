"""Figures of the committed runs and networks: the claims of README and notes that rest on them."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from samr1_mini.tiny import scenes
from samr1_mini.tiny.shapes import Shapes
from tutorials.tiny_world import phases

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tutorials" / "results"
SEEDS = range(5)  # of the committed runs of the first command


def load(name):
    return json.loads((RESULTS / name).read_text())


def log(seed):
    lines = (RESULTS / f"seed{seed}/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def committed_runs(accuracy_weight):
    for file in sorted(RESULTS.glob("seed*/summary.json")):
        settings = json.loads((file.parent / "settings.json").read_text())
        if settings["accuracy_weight"] == accuracy_weight:
            yield json.loads(file.read_text())


def whole_steps(file="benchmark-step.json"):
    """Whole steps of this project and of TRL, in pairs of equal sizes."""
    rows = load(file)["rows"]
    sizes = lambda row: {
        k: v
        for k, v in row.items()
        if k in ("image_size", "questions", "group", "max_new_tokens", "updates")
    }
    for ours in rows:
        for trl in rows:
            if (ours["way"], trl["way"]) == ("ours", "trl") and sizes(ours) == sizes(trl):
                yield ours, trl


def test_a_whole_step_is_faster_than_trl_and_grows_slowly_with_the_group():
    steps = {
        (a["image_size"], a["group"], a["max_new_tokens"]): (a["seconds"], b["seconds"])
        for a, b in whole_steps()
    }
    large = max(size for size, *_ in steps)
    tiny, tiny_trl = steps[112, 8, 48]
    long, long_trl = steps[large, 8, 48]
    assert tiny_trl >= 4 * tiny and long_trl >= 6 * long
    assert steps[large, 16, 48][0] <= 1.5 * long


def test_learning_continues_through_the_whole_run_for_each_of_five_seeds():
    runs = list(committed_runs(1.0))
    assert {run["seed"] for run in runs} == set(SEEDS)
    flat, gains = [], []
    for run in runs:
        base, trained = run["base"], run["trained"]
        gain = trained["gIoU_lenient"] - base["gIoU_lenient"]
        assert 0.30 <= base["gIoU_lenient"] <= 0.55 and base["count"] >= 500
        assert run["ceiling"]["gIoU"] >= 0.9 and run["samples"] >= 2990
        assert gain >= 0.25 and trained["format"] >= 0.98 and trained["box_accuracy"] >= 0.6
        for kind in ("relation", "combined"):
            before, after = base["by_kind"][kind], trained["by_kind"][kind]
            assert after["gIoU_lenient"] - before["gIoU_lenient"] >= 0.15
        rewards = [step["reward"] for step in log(run["seed"])]
        assert np.mean(rewards[-20:]) - np.mean(rewards[20:40]) >= 0.4
        flat.append(np.mean([step["zero_variance"] for step in log(run["seed"])[-20:]]))
        gains.append(gain)
    assert np.mean(gains) > 0.33 and np.mean(flat) < 0.4


def answers_by_run():
    """The sampled answers of the five committed runs, with "style" and "part" of the run (0 to 1)."""
    for seed in SEEDS:
        _, answers = phases.read_run(RESULTS / f"seed{seed}")
        yield [answer | {"part": answer["step"] / answers[-1]["step"]} for answer in answers]


def test_answer_styles_follow_one_another_and_lists_of_coordinates_get_reward_where_objects_are_compared():
    runs = list(answers_by_run())
    for answers in runs:
        when = {
            style: np.mean([a["part"] for a in answers if a["style"] == style])
            for style in ("sentence", "short", "places")
        }
        assert when["sentence"] < when["short"] < when["places"]
    for answers in runs[2:]:  # the seeds whose share of lists was still rising at the end
        share = lambda low, high: np.mean(
            [a["style"] == "places" for a in answers if low < a["part"] <= high]
        )
        assert share(0.9, 1) > 1.25 * share(0.5, 0.6)
    compared = ("relation", "combined")
    later = [a for answers in runs for a in answers if a["part"] > 0.2]
    reward = lambda style, comparing: np.mean(
        [a["reward"] for a in later if a["style"] == style and (a["kind"] in compared) == comparing]
    )
    assert reward("places", True) > reward("short", True) + 0.5
    assert reward("places", False) < reward("short", False)


def test_four_of_ten_groups_are_flat_late_and_most_steps_clip_no_token():
    logs = [log(seed) for seed in SEEDS]
    late = np.mean([step["zero_variance"] for lines in logs for step in lines[-40:]])
    assert 0.35 < late < 0.45
    clipped = [step["clip_low"] + step["clip_high"] > 0 for lines in logs for step in lines]
    assert np.mean(clipped) < 0.3


def things_of(sample):
    return scenes.make_scene(int(sample.id.split("-")[1])).things


@cache
def comparing():
    """The test questions that compare, and how: by a side, or by the extreme of a kind, which may be that of all things
    too."""
    found = []
    for sample in Shapes("test", 500):
        if sample.kind in ("relation", "combined"):
            word, form = sample.question.split()[1], "side"
            if word in scenes._EXTREMES:
                best = scenes._extreme(things_of(sample), word)
                form = (
                    "of all"
                    if len(best) == 1 and (best[0].mask == sample.mask).all()
                    else "of its kind"
                )
            found.append((sample, form))
    return found


def test_a_question_by_a_side_means_the_outermost_thing_and_each_run_answered_as_its_summary_says():
    side_of = {
        "left of": "leftmost",
        "right of": "rightmost",
        "above": "topmost",
        "below": "bottommost",
    }
    for sample, form in comparing():
        if form == "side":
            [word] = [
                word for side, word in side_of.items() if f" object {side} " in sample.question
            ]
            assert any(
                (t.mask == sample.mask).all() for t in scenes._extreme(things_of(sample), word)
            )
    for name, values in load("by-question.json").items():
        when, seed = ("base", 0) if name == "base" else ("trained", int(name[-1]))
        assert np.mean(values) == pytest.approx(
            load(f"seed{seed}/summary.json")[when]["gIoU_lenient"], abs=1e-3
        )


def test_blanked_and_mirrored_pictures_score_far_below_the_others():
    trained = load("seed0/summary.json")["trained"]["gIoU"]
    blank, mirrored = load("seed0/blank.json"), load("seed0/mirror.json")
    assert blank["count"] == mirrored["count"] == 500
    assert blank["gIoU"] < 0.12 < mirrored["gIoU"] < trained - 0.5


def test_without_the_accuracy_term_the_format_is_learnt_and_no_lenient_gain():
    [run] = committed_runs(0.0)
    assert (
        run["trained"]["format"] > 0.95
        and run["trained"]["gIoU_lenient"] < run["base"]["gIoU_lenient"] + 0.03
    )


def test_the_base_model_can_give_the_answers_that_get_reward_and_seldom_does():
    policy = json.loads((ROOT / "tutorials/tiny_world/measured.json").read_text())["policy"]
    styles, hinted, sampled = policy["styles"], policy["hinted"], policy["sampled"]
    # It finds what is named: 0.95 of the objects, give or take the 0.015 that some 210 questions leave open.
    assert all(kinds["attribute"] >= 0.935 and kinds["kept"] >= 0.95 for kinds in hinted.values())
    assert (
        styles["places"] < 0.015
        and styles["names"] < 0.1 < styles["short"] < 0.6
        and styles["other"] < 0.02
    )
    assert (
        hinted["places"]["relation"] > hinted["short"]["relation"] + 0.15
        and hinted["places"]["combined"] > hinted["short"]["combined"] + 0.15
    )
    assert sampled["all"]["graded"] >= 0.25
