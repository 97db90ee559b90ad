"""--objects several: answers that list several objects or none, their rewards and their scores."""

import json
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from test_evaluation import say
from test_reward import PIECES

import eval as command
from conftest import score
from samr1_mini import launch, plots, prompt
from samr1_mini import segmenter as segmenter_module
from samr1_mini.config import PACKAGED, Settings, UserError, make_settings
from samr1_mini.data import Sample, load_data
from samr1_mini.decoding import generate
from samr1_mini.evaluation import (
    Panel,
    Report,
    ScoredAnswer,
    encode_questions,
    evaluate,
    score_table,
    true_box_iou,
)
from samr1_mini.grpo import train
from samr1_mini.lenient import read_leniently
from samr1_mini.policy import TINY, load_policy
from samr1_mini.metrics import box_iou, filled, hull, matched_iou, repeated_share
from samr1_mini.reward import MAX_OBJECTS, Answer, Object, read_answer, score_group
from samr1_mini.segmenter import load_segmenter
from samr1_mini.tiny.scenes import make_scene
from samr1_mini.tiny.shapes import Shapes

SEVERAL, _ = make_settings(preset="tiny", device="cpu", objects="several")


def one_object(box, points=((1, 1, 1),)):
    return {"bbox": list(box), "points": [list(point) for point in points]}


def listed(*boxes):
    """The text of an answer in the format, with an object for each box."""
    content = json.dumps([one_object(box) for box in boxes])
    return f"<think>.</think><answer>{content}</answer>"


def framed(content):
    return f"<think>.</think><answer>{content}</answer>"


class BoxSegmenter:
    """A segmenter whose mask is the box. It counts its calls."""

    def __init__(self):
        self.calls = 0

    def masks(self, image, boxes, points):
        self.calls += 1
        return np.stack([filled(box, *image.shape[:2]) for box in boxes])


LEFT, RIGHT, BELOW = (0, 0, 10, 10), (20, 0, 30, 10), (0, 20, 10, 30)


def sample_of(*boxes, known=True):
    """A question about a picture of 40 x 40 pixels; each box is a true object."""
    masks = [filled(box, 40, 40) for box in boxes]
    mask = np.any([np.zeros((40, 40), bool), *masks], axis=0)
    return Sample(Image.new("RGB", (40, 40)), "?", mask, "x", masks=masks if known else None)


def rewards_of(sample, *texts, **settings):
    """Rewards of texts with coordinates in pixels of a picture of sample_of."""
    answers = [read_answer(text, 40, objects="several") for text in texts]
    return score_group(BoxSegmenter(), sample, answers, replace(SEVERAL, **settings))


# ---------------------------------------------------------------------------------- parser


def test_a_list_of_objects_is_read_with_all_boxes_and_points():
    content = [one_object(LEFT, [(5, 5, 1)]), one_object(RIGHT, [(25, 5, 1), (35, 5, 0)])]
    answer = read_answer(framed(json.dumps(content)), 40, objects="several")
    assert answer.in_format and answer.why == ""
    assert answer.objects == [
        Object(LEFT, [(5, 5, 1)]),
        Object(RIGHT, [(25, 5, 1), (35, 5, 0)]),
    ]


@pytest.mark.parametrize("content", ["[]", " [ ] ", "```json\n[]\n```"])
def test_an_empty_list_says_that_nothing_is_there_and_is_in_the_format(content):
    answer = read_answer(framed(content), 40, objects="several")
    assert answer.objects == [] and answer.in_format


GOOD = json.dumps(one_object(LEFT))


@pytest.mark.parametrize(
    "content, why",
    [
        (GOOD, "not a JSON list"),
        (f"[[{GOOD}]]", "not a JSON list of objects"),
        (f"[{GOOD}, 7]", "not a JSON list of objects"),
        (f"[{GOOD}, null]", "not a JSON list of objects"),
        ("[10, 20, 30, 40]", "not a JSON list of objects"),
        ('"nothing"', "not a JSON list"),
        ("null", "not a JSON list"),
        ("{}", "not a JSON list"),
        ("[{}]", "four numbers"),
        ("", ""),
        ("[" * 9000, ""),
        (f"[{GOOD}", ""),
        (f"[{GOOD}, {GOOD.replace('10', 'NaN')}]", "not a number"),
        (f"[{GOOD}, {GOOD.replace('10', '1e999')}]", "not a number"),
        (f"[{GOOD}, {GOOD.replace('[0, 0, 10, 10]', '[10, 0, 0, 10]')}]", "reversed"),
        (f"[{GOOD}, {json.dumps(one_object(RIGHT, []))}]", "points"),
        (f"[{GOOD}, {json.dumps(one_object(RIGHT, [(1, 1, 1)] * 9))}]", "at most 8"),
        (f"[{', '.join([GOOD] * 17)}]", "17 objects, at most 16"),
        (f"[{', '.join(['{}'] * 1000)}]", "1000 objects, at most 16"),
        (f"[{', '.join([GOOD] * 1000)}]", "longer than 20000"),
    ],
)
def test_a_broken_list_is_not_in_the_format_and_has_no_objects(content, why):
    answer = read_answer(framed(content), 40, objects="several")
    assert answer.objects is None and not answer.segmentation_format
    assert answer.why and why in answer.why


def test_the_longest_list_that_is_read_has_sixteen_objects():
    answer = read_answer(listed(*[LEFT] * MAX_OBJECTS), 40, objects="several")
    assert answer.in_format and len(answer.objects) == 16


def test_a_list_is_not_in_the_format_of_one_object():
    for content in (f"[{GOOD}]", "[]"):
        answer = read_answer(framed(content), 40)
        assert answer.objects is None and "not a JSON object" in answer.why


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=5) | st.dictionaries(st.sampled_from(["bbox", "points"]), x),
    max_leaves=20,
)
ANY_TEXT = st.text() | st.lists(st.sampled_from([*PIECES, GOOD]), max_size=60).map("".join)


@given(ANY_TEXT | JSON.map(lambda content: framed(json.dumps(content))))
@hypothesis_settings(max_examples=400, deadline=None)
def test_no_text_makes_the_reading_of_lists_raise_and_what_it_accepts_is_sound(text):
    strict = read_answer(text, 112, 3, objects="several")
    lenient = read_leniently(text, 112, 3, "several")
    assert (strict.objects is not None) == strict.segmentation_format
    for one in (strict.objects or []) + (lenient.objects or []):
        x1, y1, x2, y2 = one.box
        assert 0 <= x1 < x2 <= 112 and 0 <= y1 < y2 <= 112 and len(one.points) <= 3
    assert len(lenient.objects or []) <= MAX_OBJECTS


# --------------------------------------------------------------------------- lenient reading


def lenient_boxes(text, objects="several"):
    found = read_leniently(text, 112, objects=objects).objects
    return None if found is None else [one.box for one in found]


A, B = (10, 20, 30, 40), (50, 60, 70, 80)


@pytest.mark.parametrize(
    "text",
    [
        f'```json\n[{{"bbox_2d": {list(A)}, "label": "cup"}}, {{"bbox_2d": {list(B)}}}]\n```',
        f"The cups are at {list(A)} and {list(B)}.",
        f"<think>Two, not {[1, 1, 9, 9]}.</think><answer>[{list(A)}, {list(B)}]</answer>",
        "<|box_start|>(10,20),(30,40)<|box_end|> and <|box_start|>(50,60),(70,80)<|box_end|>",
        f'<think>a</think><answer>[{{"bbox": {list(A)}, "points": []}}, {{"bbox": {list(B)}}}]',
    ],
)
def test_lenient_reading_takes_all_boxes_of_a_text_and_of_one_object_the_last(text):
    assert lenient_boxes(text) == [A, B]
    assert lenient_boxes(text, "one") == [B]
    assert not read_leniently(text, 112, objects="several").in_format


def test_one_object_without_a_list_is_read_leniently_only():
    text = framed(json.dumps(one_object(A)))
    assert lenient_boxes(text) == [A] and read_answer(text, 112, objects="several").objects is None


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        " [ ]\n",
        "```json\n[]\n```",
        "<answer>[]",
        "<answer>[]</answer>",
        f"<think>The cup at {list(A)} is not red.</think>[]",
        f"<think>The cup at {list(A)} is not red.</think>\n```json\n[]\n```",
    ],
)
def test_a_plain_empty_list_is_nothing_in_lenient_reading(text):
    assert lenient_boxes(text) == []
    assert lenient_boxes(text, "one") in (None, [A])


@pytest.mark.parametrize("text", ["", "nothing", "[] or not", "[[]]", '{"bbox": []}', "[", "{}"])
def test_other_words_without_a_box_are_not_the_answer_nothing(text):
    assert lenient_boxes(text) is None


def test_a_text_with_more_than_sixteen_boxes_is_not_read():
    assert len(lenient_boxes(f"{list(A)} " * 16)) == 16
    assert lenient_boxes(f"{list(A)} " * 17) is None
    assert lenient_boxes(f"{list(A)} " * 17, "one") == [A]


# ------------------------------------------------------------------------------------ reward


def test_the_rewards_of_lists_are_those_computed_by_hand():
    both, half, twice, more, single = rewards_of(
        sample_of(LEFT, RIGHT),
        listed(RIGHT, LEFT),
        listed(LEFT),
        listed(LEFT, RIGHT, LEFT, LEFT),
        listed(LEFT, RIGHT, BELOW),
        framed(GOOD),
    )
    # 100 pixels of 100; both format terms; 2 of 2 boxes matched; no repeats
    assert (both.pixels, both.total) == ((200, 200), 4 + 1 + 1 + 1)
    # IoU 0.5 is in no tier; one of two true boxes is matched
    assert (half.pixels, half.iou, half.total) == ((100, 200), 0.5, 0 + 1 + 1 + 0.5)
    # the union does not change, but two of four boxes match, and two repeat the first
    assert (twice.pixels, twice.total) == ((200, 200), 4 + 1 + 1 + 0.5 - 0.5)
    # 200 / 300 is in the tier above 0.5; two of three boxes are matched
    assert (more.pixels, more.total) == ((200, 300), pytest.approx(2 + 1 + 1 + 2 / 3))
    # one object without a list has only the reasoning format
    assert (single.pixels, single.mask, single.total) == ((0, 200), None, 1)
    assert [both.terms[name] for name in ("matching", "repeats")] == [1, 0]
    assert twice.terms["repeats"] == -0.5 and single.terms["matching"] == 0


def test_nothing_is_right_where_nothing_is_and_only_there():
    nothing, something, unread = rewards_of(sample_of(), framed("[]"), listed(LEFT), "?")
    assert (nothing.iou, nothing.box_iou, nothing.total) == (1, 1, 4 + 1 + 1 + 1)
    assert not nothing.mask.any() and nothing.terms["matching"] == 1
    assert (something.iou, something.box_iou, something.total) == (0, 0, 2)
    assert (unread.iou, unread.box_iou, unread.total) == (0, 0, 0)
    [elsewhere] = rewards_of(sample_of(LEFT), framed("[]"))
    assert (elsewhere.iou, elsewhere.box_iou, elsewhere.total) == (0, 0, 2)
    assert elsewhere.pixels == (0, 100) and not elsewhere.mask.any()


def test_boxes_in_which_sam_finds_nothing_do_not_answer_nothing():
    class Blind:
        def masks(self, image, boxes, points):
            return np.zeros((len(boxes), *image.shape[:2]), bool)

    def blind(sample, text, objects):
        answer = read_answer(text, 40, objects=objects)
        [reward] = score_group(Blind(), sample, [answer], replace(SEVERAL, objects=objects))
        return reward.iou

    assert blind(sample_of(), listed(LEFT), "several") == 0
    assert blind(sample_of(), framed("[]"), "several") == 1
    assert blind(sample_of(), framed(GOOD), "one") == 1  # LISA's convention, as in the paper


def test_without_single_objects_matching_is_0_and_the_rest_of_the_reward_stays():
    known, unknown = (
        rewards_of(sample_of(LEFT, RIGHT, known=known), listed(LEFT, RIGHT), listed(LEFT, LEFT))
        for known in (True, False)
    )
    assert [r.terms["matching"] for r in known] == [1, 0.5]
    assert [r.terms["matching"] for r in unknown] == [0, 0]
    assert [r.terms["repeats"] for r in unknown] == [0, -0.5]
    for a, b in zip(known, unknown):
        assert a.total - b.total == a.terms["matching"]


def test_the_weights_of_both_terms_are_settings():
    [reward] = rewards_of(
        sample_of(LEFT, RIGHT), listed(LEFT, LEFT), matching_weight=2.0, repeats_weight=3.0
    )
    assert reward.total == 0 + 1 + 1 + 2 * 0.5 - 3 * 0.5


def test_one_object_has_no_new_terms_and_no_new_weights():
    answer = read_answer(framed(GOOD), 40)
    [reward] = score_group(BoxSegmenter(), sample_of(LEFT), [answer], Settings())
    names = {"accuracy", "reasoning_format", "segmentation_format"}
    assert set(reward.terms) == set(Settings().reward_weights) == names
    assert set(SEVERAL.reward_weights) == names | {"matching", "repeats"}
    weights = {f"{name}_weight": 0.0 for name in names}
    with pytest.raises(UserError, match="--accuracy-weight"):
        make_settings(preset="tiny", device="cpu", **weights)
    make_settings(preset="tiny", device="cpu", objects="several", **weights)


def test_boxes_and_points_of_all_objects_are_scaled_to_the_picture():
    sample = Sample(Image.new("RGB", (640, 427)), "?", np.zeros((427, 640), bool), "x")
    answer = Answer(100, [Object((0, 0, 50, 100), [(25, 100, 1)]), Object((50, 0, 100, 50))])
    [reward] = score_group(BoxSegmenter(), sample, [answer], SEVERAL)
    first, second = reward.objects
    assert first.box == pytest.approx((0, 0, 320, 427)) and second.box[3] == pytest.approx(213.5)
    assert first.points == [(160, pytest.approx(427), 1)] and second.points == []
    [alone] = score_group(BoxSegmenter(), sample, [answer], replace(SEVERAL, points=False))
    assert [one.points for one in alone.objects] == [[], []]


def test_in_a_data_set_of_boxes_the_mask_is_the_union_of_the_boxes():
    sample = replace(sample_of(LEFT, RIGHT), box_only=True)
    answers = [read_answer(text, 40, objects="several") for text in (listed(LEFT), framed("[]"))]
    half, nothing = score_group(None, sample, answers, SEVERAL)
    assert half.pixels == (100, 200) and nothing.pixels == (0, 200)


def test_all_objects_of_a_group_share_one_call_and_one_pass_of_sams_encoder(
    segmenter, samples, monkeypatch
):
    segmenter = load_segmenter("tiny")
    texts = [listed(A, B), "?", framed("[]"), listed(B), listed(A, B, (5, 5, 40, 40))]
    answers = [read_answer(text, 112, objects="several") for text in texts]
    encoded, asked = [], []
    encode, masks = segmenter.encode, segmenter.masks
    monkeypatch.setattr(segmenter, "encode", lambda x: encoded.append(1) or encode(x))
    monkeypatch.setattr(segmenter, "masks", lambda *x: asked.append(len(x[1])) or masks(*x))
    rewards = score_group(segmenter, samples[0], answers, SEVERAL)
    assert (encoded, asked) == ([1], [6])
    image = np.asarray(samples[0].image)
    for reward in rewards:
        if reward.objects:
            alone = [masks(image, [one.box], [one.points])[0] for one in reward.objects]
            assert (reward.mask == np.any(alone, axis=0)).all()
    assert rewards[1].mask is None and not rewards[2].mask.any()
    nothing = [read_answer(framed("[]"), 112, objects="several")] * 2
    score_group(segmenter, samples[1], nothing, SEVERAL)
    assert (encoded, asked) == ([1], [6])  # no box, so SAM has nothing to do


def test_many_prompts_are_decoded_in_parts_with_the_same_masks(monkeypatch):
    segmenter, scene = load_segmenter("tiny"), make_scene(3)
    boxes = [thing.box for thing in scene.things] * 2
    points = [[]] * (len(boxes) - 2) + [[(50.0, 50.0, 1)]] * 2
    whole = segmenter.masks(scene.image, boxes, points)
    sizes, predict = [], segmenter.predict
    monkeypatch.setattr(segmenter, "predict", lambda b, p: sizes.append(len(b)) or predict(b, p))
    monkeypatch.setattr(segmenter_module, "MOST_PROMPTS", 3)
    parts = segmenter.masks(scene.image, boxes, points)
    assert max(sizes) <= 3 and sum(sizes) == len(boxes) and (parts == whole).all()


# ----------------------------------------------------------------------------------- metrics


def random_boxes(rng, count):
    corners = rng.integers(0, 20, (count, 2))
    sizes = rng.integers(5, 25, (count, 2))
    return [(x, y, x + w, y + h) for (x, y), (w, h) in zip(corners.tolist(), sizes.tolist())]


def best_by_brute_force(boxes, true_boxes):
    """The mean IoU of the best of all one-to-one matchings, over all permutations."""
    few, many = sorted((boxes, true_boxes), key=len)
    if not many:
        return 1.0
    sums = []
    for order in permutations(many, len(few)):
        sums.append(sum(box_iou(a, b) for a, b in zip(few, order)))
    return max(sums) / len(many)


def test_the_matching_is_the_best_of_all_permutations():
    rng = np.random.default_rng(0)
    for _ in range(200):
        boxes, true_boxes = (random_boxes(rng, rng.integers(0, 6)) for _ in range(2))
        expected = best_by_brute_force(boxes, true_boxes)
        assert matched_iou(boxes, true_boxes) == pytest.approx(expected)
    assert matched_iou([], []) == 1 and matched_iou([], [LEFT]) == matched_iou([LEFT], []) == 0


def test_a_greedy_matching_would_be_worse():
    boxes = [(0, 0, 12, 10), (0, 0, 8, 10)]
    true_boxes = [(0, 0, 10, 10), (0, 0, 20, 10)]
    # greedy: the largest IoU first, 10 / 12, and then 8 / 20
    assert matched_iou(boxes, true_boxes) == pytest.approx((12 / 20 + 8 / 10) / 2)


def test_repeats_are_boxes_with_more_than_half_in_common_with_an_earlier_box():
    third = (0, 0, 10, 5)  # IoU with LEFT is exactly 0.5
    near = (0, 0, 10, 6)
    assert repeated_share([LEFT, third]) == 0 and repeated_share([LEFT, near]) == 0.5
    assert repeated_share([LEFT, LEFT, LEFT, RIGHT]) == 0.5
    assert repeated_share([]) == repeated_share([LEFT]) == repeated_share([LEFT, RIGHT]) == 0


def test_the_box_around_boxes_is_the_tight_box_of_their_union():
    assert hull([LEFT, RIGHT]) == (0, 0, 30, 10) and hull([]) == (0, 0, 0, 0)
    assert hull([A]) == A and box_iou(hull([]), hull([])) == 1 and box_iou(hull([]), A) == 0
    [reward] = rewards_of(sample_of(LEFT, BELOW), listed(BELOW))
    assert reward.box_iou == pytest.approx(100 / 300)


# ------------------------------------------------------------------------------------ prompt


def test_the_prompt_for_several_objects_has_an_example_that_the_parser_reads():
    text = prompt.instruction("the cups", 112, 112, prompt=prompt.choose_prompt(SEVERAL))
    assert "Question: the cups" in text and "pixels of the 112 x 112 picture" in text
    assert "[]" in text and "JSON list" in text.replace("\n", " ")
    example = text.partition("Example:\n")[2].partition("\nQuestion:")[0]
    answer = read_answer(example, 112, objects="several")
    assert answer.in_format and len(answer.objects) == 2
    assert prompt.choose_prompt(Settings()) == prompt.PROMPT


def test_a_prompt_of_ones_own_replaces_the_prompt_for_several_objects(tmp_path):
    (tmp_path / "mine.txt").write_text("Where is {question}?")
    s = replace(SEVERAL, prompt_file=str(tmp_path / "mine.txt"))
    assert prompt.choose_prompt(s) == "Where is {question}?"


# -------------------------------------------------------------------------------- evaluation


def test_the_scores_of_questions_without_a_target_are_those_of_grefcoco(policy, monkeypatch):
    data = [sample_of(), sample_of(), sample_of(), sample_of(LEFT, RIGHT), sample_of(LEFT)]
    data += [replace(sample_of(LEFT), kind="k"), replace(sample_of(RIGHT), kind="k")]
    size = 112 / 40
    scaled = lambda *boxes: listed(*[[size * v for v in box] for box in boxes])
    words = [framed("[]"), scaled(LEFT), "?", scaled(LEFT, RIGHT), framed("[]"), scaled(LEFT)]
    say(monkeypatch, [*words, "[]"])
    report = evaluate(policy, BoxSegmenter(), data, SEVERAL)
    summary = report.summary()
    # of 3 questions without a target 1 is right; of 4 with one, 2 are answered with something
    assert summary["N_acc"] == pytest.approx(1 / 3) and summary["T_acc"] == 0.5
    assert "N_acc" not in summary["by_kind"]["k"] and summary["by_kind"]["k"]["T_acc"] == 0.5
    assert summary["gIoU"] == pytest.approx((1 + 0 + 0 + 1 + 0 + 1 + 0) / 7)
    # intersections over unions: 0/0, 0/100, 0/1 (not readable), 200/200, 0/100, 100/100, 0/100
    assert summary["cIoU"] == pytest.approx(300 / (100 + 1 + 200 + 100 + 100 + 100))
    lines = report.each()
    assert [line["no_target"] for line in lines] == [True] * 3 + [False] * 4
    assert [line["nothing"] for line in lines] == [True, False, None, False, True, False, None]
    assert json.loads(json.dumps(lines)) == json.loads(json.dumps(lines))
    header, *table = score_table("title", {"all": summary, "k": summary["by_kind"]["k"]}).split(
        "\n"
    )
    assert header.split()[-2:] == ["N-acc", "T-acc"]
    assert table[0].split()[-2:] == ["0.333", "0.500"] and table[1].split()[-1] == "0.500"
    assert len(table[0]) == len(table[1]) == len(header)


def test_one_object_and_targets_everywhere_show_no_new_scores(policy, segmenter, samples):
    s = replace(SEVERAL, objects="one", max_new_tokens=2)
    one = evaluate(policy, segmenter, samples[:1], s)
    several = evaluate(policy, segmenter, samples[:1], replace(s, objects="several"))
    assert not {"N_acc", "T_acc"} & set(one.summary()) and "N-acc" not in table_of(one)
    assert not {"no_target", "nothing"} & set(one.each()[0])
    assert several.summary()["T_acc"] == 0 and "N_acc" not in several.summary()
    assert "T-acc" in table_of(several) and "N-acc" not in table_of(several)


def table_of(report):
    return score_table("", {"all": report.summary()})


def test_answers_vote_on_unions_and_nothing_has_its_votes(policy, monkeypatch):
    from samr1_mini import evaluation
    from samr1_mini.evaluation import judge

    sample = sample_of(LEFT, RIGHT)
    texts = [framed("[]"), listed(LEFT, RIGHT), listed(LEFT), listed(RIGHT, LEFT)]
    verdict = judge(BoxSegmenter(), sample, texts, SEVERAL, 40)
    assert verdict.chosen == 1 and verdict.strict_pixels == (200, 200) and verdict.nothing is False
    verdict = judge(BoxSegmenter(), sample, [*texts, framed("[]"), "[]"], SEVERAL, 40)
    # in the strict vote two say nothing and two agree, so the first of them counts
    assert verdict.chosen == 0 and verdict.strict_pixels == (0, 200) and verdict.nothing is True
    verdict = judge(BoxSegmenter(), sample_of(), ["[]", "[]", listed(LEFT)], SEVERAL, 40)
    assert verdict.lenient_pixels == (0, 0) and verdict.strict_pixels == (0, 100)


def test_the_ceiling_of_several_objects_has_a_box_for_each(segmenter):
    sample = sample_of(LEFT, RIGHT)
    assert true_box_iou(BoxSegmenter(), sample, "several") == 1
    assert true_box_iou(BoxSegmenter(), sample) == 200 / 300  # one box around both
    assert true_box_iou(BoxSegmenter(), sample_of(LEFT, RIGHT, known=False), "several") == 200 / 300
    assert true_box_iou(BoxSegmenter(), sample_of(), "several") is None


def test_rows_that_were_kept_before_this_setting_are_read():
    old = dict(index=0, id="0", picture="", kind="", question="?", texts=["."], text=".")
    old |= dict(
        truncated=False,
        in_format=True,
        why="",
        box_iou=1.0,
        lenient_pixels=[1, 1],
        strict_pixels=[1, 1],
    )
    assert "N_acc" not in Report([ScoredAnswer(**old)]).summary()


# -------------------------------------------------------------------- pictures and commands


def test_a_sheet_draws_all_boxes_and_points(segmenter, samples):
    texts = [listed(A, B, (5, 5, 40, 40)), framed("[]"), "?"]
    answers = [read_answer(text, 112, objects="several") for text in texts]
    counts = []
    for reward in score_group(segmenter, samples[0], answers, SEVERAL):
        axes = Figure().subplots()
        plots.draw_answer(axes, Panel(samples[0], "", reward), 112)
        blue = [line for line in axes.lines if line.get_color() == plots.BLUE]
        points = [line for line in axes.lines if line.get_marker() == "o"]
        counts.append((len(blue), len(points)))
    assert counts == [(3, 3), (0, 0), (0, 0)]


def test_eval_with_several_objects_scores_a_base_model_that_writes_no_lists(tmp_path, capsys):
    options = ["--preset", "tiny", "--device", "cpu", "--objects", "several"]
    options += ["--out", str(tmp_path), "--max-new-tokens", "40"]
    command.main([*options, "--count", "2"])
    out = capsys.readouterr().out
    assert "T-acc" in out and "2 questions" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["objects"] == "several" and "T_acc" in results["summary"]
    assert (tmp_path / "sheet.png").exists()


@pytest.fixture
def scene(tmp_path):
    Image.fromarray(make_scene(3).image).save(tmp_path / "scene.png")
    options = ["--preset", "tiny", "--device", "cpu", "--objects", "several"]
    options += ["--out", str(tmp_path), "--image", str(tmp_path / "scene.png")]
    return tmp_path, [*options, "--question", "the stars"]


def test_eval_prints_all_boxes_of_an_answer_about_a_picture(scene, monkeypatch, capsys):
    folder, options = scene
    say(monkeypatch, [listed(A, B)])
    command.main(options)
    out = capsys.readouterr().out
    assert "[10, 20, 30, 40]" in out and "[50, 60, 70, 80]" in out
    assert (folder / "scene-overlay.png").exists() and (folder / "scene-mask.png").exists()


def test_eval_prints_that_nothing_fits_and_its_mask_is_empty(scene, monkeypatch, capsys):
    folder, options = scene
    say(monkeypatch, [framed("[]")])
    command.main(options)
    assert "nothing in the picture" in capsys.readouterr().out
    with Image.open(folder / "scene-mask.png") as mask:
        assert not np.asarray(mask).any()


def test_an_adapter_is_evaluated_with_the_objects_of_its_run(policy, tmp_path):
    policy.model.save_pretrained(tmp_path / "adapter")
    adapter = ["--adapter", str(tmp_path / "adapter")]
    (tmp_path / "settings.json").write_text(json.dumps({"preset": "tiny", "objects": "several"}))
    assert command.parse(adapter)[0].objects == "several"
    assert command.parse([*adapter, "--objects", "one"])[0].objects == "one"
    (tmp_path / "settings.json").write_text(json.dumps({"preset": "tiny"}))
    assert command.parse(adapter)[0].objects == "one"


# ---------------------------------------------------------------------------------- training


def test_a_training_logs_and_draws_both_terms(settings, tmp_path):
    s = replace(settings, objects="several", samples=4, test_samples=2)
    train(s, [Shapes(split, 4, 0) for split in ("train", "validation", "test")])
    folder = tmp_path / "run"
    [line] = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    names = list(line)
    between = names[names.index("reward") + 1 : names.index("zero_variance")]
    assert {"matching", "repeats"} <= set(between)
    terms = ("accuracy", "reasoning_format", "segmentation_format", "matching", "repeats")
    assert line["reward"] == pytest.approx(sum(line[name] for name in terms))
    axes = Figure().subplots()
    plots.draw_reward(axes, [line])
    labels = " ".join(text.get_text() for text in axes.get_legend().get_texts())
    assert "--matching-weight" in labels and "--repeats-weight" in labels
    assert json.loads((folder / "settings.json").read_text())["objects"] == "several"


# ------------------------------------------------------------------------- the policy with lists


def test_the_tiny_preset_takes_the_policy_with_lists_only_for_several_objects():
    assert (SEVERAL.policy, SEVERAL.max_new_tokens) == ("tiny-several", 128)
    one, _ = make_settings(preset="tiny", device="cpu")
    assert (one.policy, one.max_new_tokens) == ("tiny", 112)
    typed = dict(policy="tiny", max_new_tokens=60)
    s, _ = make_settings(preset="tiny", device="cpu", objects="several", **typed)
    assert (s.policy, s.max_new_tokens) == ("tiny", 60)


def test_the_warm_start_changed_language_model_and_head_but_not_the_vision_tower():
    old, new = [
        load_file(TINY.with_name(PACKAGED[name]) / "model.safetensors") for name in PACKAGED
    ]
    assert old.keys() == new.keys()
    for name in old:
        assert torch.equal(old[name], new[name]) == name.startswith("visual."), name


def test_the_policy_with_lists_writes_lists_and_the_other_one_does_not():
    samples = list(load_data("shapes", "validation", 8, objects="several"))
    uniforms = torch.rand(8, 4, 128, generator=torch.Generator().manual_seed(0))
    shares = []
    for name in PACKAGED:
        policy = load_policy(name)
        policy.prompt = prompt.SEVERAL_PROMPT
        prompts = encode_questions(policy, samples, 112)
        groups = generate(policy, prompts, 4, 128, uniforms=uniforms)
        answers = [read_answer(one.text, 112, objects="several") for g in groups for one in g]
        shares.append(np.mean([answer.in_format for answer in answers]))
    assert shares[0] == 0 and shares[1] >= 0.9


def test_a_training_with_the_policy_with_lists_starts_as_many_processes_as_the_other(monkeypatch):
    monkeypatch.setattr(launch, "usable_cores", lambda: 4)
    monkeypatch.setattr(launch, "usable_ram", lambda: 64 * 2**30)
    one, _ = make_settings(preset="tiny", device="cpu")
    assert launch.automatic_number(SEVERAL) == launch.automatic_number(one) == 4
