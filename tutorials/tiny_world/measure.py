"""Stage "measure": both networks on held-out scenes. The results are in measured.json."""

from collections import defaultdict

import numpy as np
import torch

from samr1_mini.data import load_data
from samr1_mini.metrics import box_iou, intersection_union, iou, tight_box
from samr1_mini.decoding import generate
from samr1_mini.policy import Policy, encode
from samr1_mini.lenient import read_leniently
from samr1_mini.reward import score_group
from samr1_mini.segmenter import load_segmenter
from samr1_mini.tiny.scenes import SIZE, SPLITS, Scene, make_scene
from .answers import STYLES, style_of, wide_box
from .sam import box_around, meant, neighbour, points_on

MAX_TOKENS = 112  # of an answer
CHUNK = 50  # questions in one batch


def held_out(count: int) -> list[Scene]:
    """Return the first `count` validation scenes."""
    return [make_scene(SPLITS["validation"][0] + i) for i in range(count)]


def mean(values: list) -> float:
    return round(float(np.mean(values)), 3)


def sam_prompts(scene: Scene, rng: np.random.Generator) -> dict:
    """Return the prompts of a scene by name: (things, boxes, points of each thing)."""
    things = scene.things
    dots = [t.dot for t in things if t.dot]
    exact = [t.box for t in things]
    shared = [box_around(t, neighbour(t, scene)) for t in things]
    on = [points_on(t.mask, rng, 1, 1) for t in things]
    both = []
    for points, thing in zip(on, things):
        both.append(points + points_on(neighbour(thing, scene).mask, rng, 1, 0))
    none = [[] for _ in things]
    prompts = {}
    prompts["true box"] = (things, exact, none)
    prompts["true box, 1 point"] = (things, exact, on)
    prompts["dot"] = (dots, [t.box for t in dots], [[] for _ in dots])
    prompts["box of two"] = (things, shared, none)
    prompts["box of two, 1 point"] = (things, shared, on)
    prompts["box of two, 1 on the thing, 0 on the other"] = (things, shared, both)
    for percent in (10, 20, 40):
        wide = [wide_box(t.box, rng, percent / 100) for t in things]
        prompts[f"sides {percent} % out"] = (things, wide, none)
    prompts["sides 40 % out, 1 point"] = (things, wide, on)  # the last boxes above
    return prompts


def mask_ious(masks: list[np.ndarray], truths: list[np.ndarray]) -> list[float]:
    return [iou(*intersection_union(mask, truth)) for mask, truth in zip(masks, truths)]


def measure_sam(folder: str = "tiny", count: int = 200) -> dict:
    """Return the mean IoU of the tiny SAM's masks on held-out scenes, by sort of prompt.

    The truth is the object's mask. Names that end with "meant" compare with the mask of `meant`.
    """
    segmenter = load_segmenter(folder)
    rng = np.random.default_rng(0)
    found = defaultdict(list)
    for scene in held_out(count):
        for name, (things, boxes, points) in sam_prompts(scene, rng).items():
            masks = []
            if things:
                masks = segmenter.masks(scene.image, boxes, points)
            found[name] += mask_ious(masks, [thing.mask for thing in things])
            if "40 %" in name or "two" in name:
                truths = [meant(scene, box, p) for box, p in zip(boxes, points)]
                found[f"{name}: meant"] += mask_ious(masks, truths)
    return {name: mean(values) for name, values in found.items()}


def about(box, mask: np.ndarray, scene: Scene) -> bool:
    """Return True if a box is about the object of this mask.

    The box holds most of the object's pixels and fits no other thing better.
    For a dot, the thing that carries the dot does not count as another thing.
    """
    if box is None:
        return False
    x1, y1, x2, y2 = map(round, box)
    if 2 * mask[y1:y2, x1:x2].sum() <= mask.sum():
        return False
    others = [t for t in scene.things if not (t.mask & mask).any()]
    best = max([box_iou(box, t.box) for t in others], default=0)
    return bool(box_iou(box, tight_box(mask)) >= best)


def answers(policy: Policy, samples: list, hint: str, group: int, temperature: float) -> list:
    """Return `group` answers to each question, with the hint behind the question."""
    questions = [sample.question + hint for sample in samples]
    with torch.no_grad():
        prompts = encode(policy, [sample.image for sample in samples], questions)
    return generate(policy, prompts, group, MAX_TOKENS, temperature=temperature)


def last_box(answer):
    """Return the box of the last object of an answer (reward.Answer), or None."""
    if not answer.objects:
        return None
    return answer.objects[-1].box


def score_sampled(segmenter, sample, scene: Scene, texts: list[str]) -> list[tuple]:
    """Return (about the object, box IoU, mask IoU) of each answer. Any text with a box counts."""
    rows = []
    read = [read_leniently(text, SIZE) for text in texts]
    for reward in score_group(segmenter, sample, read):
        right = about(last_box(reward.answer), sample.mask, scene)
        rows.append((right, reward.box_iou, reward.iou))
    return rows


def summarise(rows: list[tuple]) -> dict:
    """Return the means of the rows of score_sampled, and the share of partly correct masks."""
    right, overlap, score = np.array(rows, float).T  # [answers] each
    graded = ((score > 0.2) & (score < 0.8))[right == 1]
    if len(graded) == 0:
        graded = [0.0]
    return {
        "about": mean(right),
        "box IoU": mean(overlap),
        "mask IoU": mean(score),
        "graded": mean(graded),
    }


def measure_policy(policy: Policy, segmenter, count: int = 500, group: int = 4) -> dict:
    """Measure the base model on `count` held-out scenes.

    "styles": the share of each style among sampled answers without a hint.
    "sampled", by kind of question, of the same answers: the share `about` the object, box IoU and
    mask IoU; "graded": the share of masks with an IoU of 0.2 to 0.8 among those about the object.
    "hinted", by style and kind: the share of greedy answers about the object with the style's
    hint; "kept": the share of these answers in the style.
    """
    data, scenes = load_data("shapes", "validation", count), held_out(count)
    styles, sampled = [], defaultdict(list)
    hinted = {style: defaultdict(list) for style in STYLES}
    torch.manual_seed(0)
    for start in range(0, count, CHUNK):
        samples = [data[i] for i in range(start, min(start + CHUNK, count))]
        chunk = scenes[start : start + CHUNK]
        groups = answers(policy, samples, "", group, 1.0)
        for sample, scene, found in zip(samples, chunk, groups):
            texts = [answer.text for answer in found]
            styles += [style_of(text) for text in texts]
            rows = score_sampled(segmenter, sample, scene, texts)
            sampled[sample.kind] += rows
            sampled["all"] += rows
        for style, kinds in hinted.items():
            measure_hint(policy, samples, chunk, style, kinds)
    shares = {style: mean([s == style for s in styles]) for style in (*STYLES, "other")}
    by_style = {}
    for style, kinds in hinted.items():
        by_style[style] = {kind: mean(values) for kind, values in kinds.items()}
    by_kind = {kind: summarise(rows) for kind, rows in sampled.items()}
    return {"styles": shares, "sampled": by_kind, "hinted": by_style}


def measure_hint(policy, samples: list, scenes: list[Scene], style: str, kinds: dict) -> None:
    """Add the greedy answers with a style's hint to `kinds`, a dict of lists of booleans."""
    groups = answers(policy, samples, STYLES[style].hint, 1, 0.0)
    for sample, scene, [answer] in zip(samples, scenes, groups):
        box = last_box(read_leniently(answer.text, SIZE))
        right = about(box, sample.mask, scene)
        kinds[sample.kind].append(right)
        kinds["all"].append(right)
        kinds["kept"].append(style_of(answer.text) == style)
