"""The texts of the tiny world: answers in the base model's five styles, facts, all words.

Every answer contains a box. Pretraining teaches these texts. `style_of` finds the style of an
answer that a run sampled. The logs call the five styles by these names:

    sentence  a plain sentence, outside the asked format: "The red star is at [...]."
    json      a bare JSON list, as Qwen2.5-VL likes to write it, outside the asked format
    short     the asked format. The thought names the answer at once: "The red star fits best."
    names     the asked format. The thought lists the names of all things, then concludes.
    places    the asked format. The thought lists all things with their coordinates, then concludes.
"""

from typing import NamedTuple

import numpy as np

from samr1_mini.prompt import instruction
from samr1_mini.tiny.scenes import (
    COLOUR_OF,
    KINDS,
    PRETRAIN,
    SHAPE_WITH,
    SIZE,
    Scene,
    Thing,
    fair_forms,
    make_scene,
)

ANSWER = '.</think><answer>{"bbox": ['  # from a thought to the first number


def fair_questions(scene: Scene, kind: str) -> list[tuple[str, Thing]]:
    """Return all questions of a kind that have exactly one right object."""
    return [(text, thing) for form in fair_forms(scene, kind) for text, [thing] in form]


def wide_box(box, rng: np.random.Generator, slack: float) -> list[float]:
    """Move each side of a box outwards by N(slack, slack / 3) of the box's length, in pixels."""
    x1, y1, x2, y2 = box
    outwards = np.array([x1 - x2, y1 - y2, x2 - x1, y2 - y1])
    moved = np.array([x1, y1, x2, y2]) + rng.normal(slack, slack / 3, 4) * outwards
    return moved.clip(0, SIZE).tolist()


def middle(thing: Thing) -> list[int]:
    """Return the middle [x, y] of the tight box, in whole pixels."""
    x1, y1, x2, y2 = thing.box
    return [(x1 + x2) // 2, (y1 + y2) // 2]


def loose_points(thing: Thing, rng: np.random.Generator, slack: float) -> list[list[int]]:
    """Return one or two points [[x, y, label], ...] for a thing.

    The point labelled 1 is on the thing, near its middle. Half of the answers also have a point
    labelled 0, beside the thing and near a corner of its box. Both stray more with more slack.
    """
    x1, y1, x2, y2 = thing.box
    sides = np.array([x2 - x1, y2 - y1])
    corner = rng.integers(0, 2, 2) * sides
    window = thing.mask[y1:y2, x1:x2]
    points = []
    for label, target in ((1, sides / 2), (0, corner)):
        places = np.argwhere(window == bool(label))[:, ::-1]  # [N, 2], x then y
        if len(places) == 0:
            continue
        if label == 0 and rng.random() >= 0.5:
            continue
        nearest = ((places - target) ** 2).sum(1).argmin()
        point = places[nearest] + (x1, y1) + rng.normal(0, 0.2 * slack * thing.size, 2)
        x, y = point.round().clip(0, SIZE - 1).astype(int).tolist()
        points.append([x, y, label])
    return points


class Style(NamedTuple):
    """How often the base model answers in a style, and how a user asks for the style."""

    unhinted: float  # share of the answers where no hint asks for a style
    hinted: float  # share of the hints in pretraining that ask for this style
    hint: str  # the words that ask for the style
    begins: str  # the first words of such an answer


# The best style is rare in the base model, as in a large model. Reward has to find it.
STYLES = {
    "sentence": Style(0.4, 0.15, " Answer in a sentence.", "The"),
    "json": Style(0.15, 0.1, " Answer in JSON.", '[{"label": "'),
    "short": Style(0.392, 0.2, " Think first.", "<think>The"),
    "names": Style(0.05, 0.2, " Look around first.", "<think>I see the"),
    "places": Style(0.008, 0.35, " Measure first.", "<think>I see the"),
}
LISTING = ("names", "places")  # styles that first list all things


def draw_style(rng: np.random.Generator, hinted: bool) -> str:
    """Draw a style by its share of the hints, or by its share of the answers without a hint."""
    if hinted:
        shares = [style.hinted for style in STYLES.values()]
    else:
        shares = [style.unhinted for style in STYLES.values()]
    return str(rng.choice(list(STYLES), p=shares))


def style_of(text: str) -> str:
    """Return the style of an answer, or "other" if the answer is in none of the styles."""
    if text.startswith("<think>I see the "):
        thought, _, _ = text.partition("</think>")
        return "places" if "(" in thought else "names"
    if text.startswith("<think>"):
        return "short"
    if text.startswith("The "):
        return "sentence"
    if text.startswith("[{"):
        return "json"
    return "other"


def called(thing: Thing, scene: Scene) -> str:
    """Return the name of a thing in answers. A dot is named after the thing that carries it."""
    for carrier in scene.things:
        if carrier.dot is thing:
            return f"dot of the {carrier.name}"
    return thing.name


def in_order(things: list[Thing], question: str) -> list[Thing]:
    """Sort things by what the question compares: from above, by size, or else from the left."""
    for word in question.split():
        if word in ("above", "below", "topmost", "bottommost"):
            return sorted(things, key=lambda thing: middle(thing)[1])
        if word in ("smallest", "largest"):
            return sorted(things, key=lambda thing: thing.extent)
    return sorted(things, key=lambda thing: middle(thing)[0])


def listed(scene: Scene, style: str, question: str) -> str:
    """Return the beginning of a thought that lists all things, up to the conclusion.

    The style "names" lists from left to right. The style "places" adds each thing's middle and
    follows the question's order.
    """
    if style == "names":
        names = [thing.name for thing in in_order(scene.things, "")]
    else:
        names = []
        for thing in in_order(scene.things, question):
            x, y = middle(thing)
            names.append(f"{thing.name} ({x}, {y})")
    return f"<think>I see the {', the '.join(names)}. It is the"


def answer_parts(
    thing: Thing,
    scene: Scene,
    rng: np.random.Generator,
    slack: float,
    style: str,
    question: str = "",
) -> tuple[str, str, str, str]:
    """Return an answer about a thing in a style of the base model, in four parts.

    The parts are: the first words, the list of things, the name of the answer, the numbers.
    The box is too wide by `slack` of its width or height on each side.
    """
    box = [round(side) for side in wide_box(thing.box, rng, slack)]
    name = called(thing, scene)
    begins = STYLES[style].begins
    if style == "sentence":
        return begins, "", f" {name} is at", f" {box}."
    if style == "json":
        return begins, "", f'{name}", "bbox_2d":', f" {box}}}]"
    if style in LISTING:
        listing = listed(scene, style, question).removeprefix(begins)
        conclusion = f" {name}{ANSWER}"
    else:
        listing = ""
        conclusion = f" {name} fits best{ANSWER}"
    points = loose_points(thing, rng, slack)
    sides = str(box).removeprefix("[")  # ANSWER ends with this bracket
    return begins, listing, conclusion, f'{sides}, "points": {points}}}</answer>'


def fact_texts() -> list[tuple[str, str]]:
    """Return world knowledge without a picture, as (question, answer) pairs.

    Indirect questions build on these facts. No fact is itself an indirect question.
    """
    texts = []
    for subject, colour in COLOUR_OF.items():
        texts.append((f"Which colour has {subject}?", f"The colour of {subject} is {colour}."))
    for feature, shape in SHAPE_WITH.items():
        texts.append((f"Which shape has {feature}?", f"The {shape} has {feature}."))
    return texts


def corpus() -> list[str]:
    """Return texts with every word and number of the tiny world, for the tokenizer."""
    texts = [instruction("{question}", "{width}", "{height}"), "You are a helpful assistant."]
    texts += ["system\n", "user\n", "assistant\n"]
    # Numbers go a little beyond the picture: they stay one token if an answer lies outside.
    texts += [f"[{i}, {i}" for i in range(SIZE + 29)]
    for question, answer in fact_texts():
        texts += [question, answer]
    rng = np.random.default_rng(0)
    for i in range(400):
        scene = make_scene(PRETRAIN[0] + 10**8 + i)
        for kind in KINDS:
            texts += [f" {text}" for text, _ in fair_questions(scene, kind)]
        for thing in scene.things:
            texts += ["".join(answer_parts(thing, scene, rng, 0.1, style)) for style in STYLES]
    texts += [style.hint for style in STYLES.values()]
    return texts
