"""What the base of the tiny world says: its five styles of answering, and all the words that it knows.

An answer tells a box and points; in the asked format it thinks before, in one of three ways. The same texts are what
pretraining teaches and, by `style_of`, how a run's answers are told apart.
"""

from typing import NamedTuple

import numpy as np

from samr1_mini.policy import instruction
from samr1_mini.tiny.scenes import (
    COLOUR_OF,
    KINDS,
    PRETRAIN,
    SHAPE_WITH,
    SIZE,
    Scene,
    Thing,
    fair_questions,
    make_scene,
)

ANSWER = '.</think><answer>{"bbox": ['  # from a thought to the first number


def wide_box(box, rng: np.random.Generator, slack: float) -> list[float]:
    """The box with each side moved out by N(slack, slack / 3) of its length, in pixels."""
    x1, y1, x2, y2 = box
    out = rng.normal(slack, slack / 3, 4) * np.array([x1 - x2, y1 - y2, x2 - x1, y2 - y1])
    return (np.array([x1, y1, x2, y2]) + out).clip(0, SIZE).tolist()


def middle(thing: Thing) -> list[int]:
    """Middle of the tight box, in whole pixels."""
    x1, y1, x2, y2 = thing.box
    return [(x1 + x2) // 2, (y1 + y2) // 2]


def loose_points(thing: Thing, rng: np.random.Generator, slack: float) -> list[list[int]]:
    """A point on the thing near its middle and, half of the time, one off it near a corner; they stray as boxes do."""
    x1, y1, x2, y2 = thing.box
    window, points = thing.mask[y1:y2, x1:x2], []
    corner = rng.integers(0, 2, 2) * np.array([x2 - x1, y2 - y1])
    for label, near in ((1, np.array([x2 - x1, y2 - y1]) / 2), (0, corner)):
        places = np.argwhere(window == bool(label))[:, ::-1]  # [N, 2], x then y
        if len(places) and (label or rng.random() < 0.5):
            place = places[((places - near) ** 2).sum(1).argmin()] + (x1, y1)
            place = (
                (place + rng.normal(0, 0.2 * slack * thing.size, 2))
                .round()
                .clip(0, SIZE - 1)
                .astype(int)
            )
            points.append([*place.tolist(), label])
    return points


class Style(NamedTuple):
    unhinted: float  # how often the base uses it where no hint asks for one
    hinted: float  # which share of the hints in pretraining asks for it
    hint: str  # with which a user may ask
    begins: str  # how its answers begin


# The base's styles. As in a large model, what pays best is what it seldom does: to find that out is left to reward.
STYLES = {
    "sentence": Style(0.4, 0.15, " Answer in a sentence.", "The"),
    "json": Style(0.15, 0.1, " Answer in JSON.", '[{"label": "'),
    "short": Style(0.392, 0.2, " Think first.", "<think>The"),
    "names": Style(0.05, 0.2, " Look around first.", "<think>I see the"),
    "places": Style(0.008, 0.35, " Measure first.", "<think>I see the"),
}
LISTING = ("names", "places")  # those that list first what there is


def draw_style(rng: np.random.Generator, hinted: bool) -> str:
    """A style, as often as hints ask for it in pretraining, or as the base uses it where none does."""
    return str(
        rng.choice(list(STYLES), p=[x.hinted if hinted else x.unhinted for x in STYLES.values()])
    )


def style_of(text: str) -> str:
    """In which of the base's styles an answer is, "other" if in none."""
    thought = text.removeprefix("<think>").partition("</think>")[0]
    if text.startswith("<think>I see the "):
        return "places" if "(" in thought else "names"
    starts = {"The ": "sentence", "[{": "json", "<think>": "short"}
    return next((style for start, style in starts.items() if text.startswith(start)), "other")


def called(thing: Thing, scene: Scene) -> str:
    """What an answer calls a thing: by name, a dot by the thing that it is on."""
    return next((f"dot of the {t.name}" for t in scene.things if t.dot is thing), thing.name)


# Who measures lists things in the order of what is asked for, downwards or from small to large; else left to right.
ORDER = dict.fromkeys(("above", "below", "topmost", "bottommost"), lambda t: middle(t)[1])
ORDER |= dict.fromkeys(("smallest", "largest"), lambda t: t.extent)


def listed(scene: Scene, style: str, question: str) -> str:
    """What there is, from left to right; who measures lists each thing's middle, and in the question's order."""
    places = style == "places"
    orders = [ORDER[word] for word in question.split() if word in ORDER and places]
    things = sorted(scene.things, key=orders[0] if orders else lambda t: middle(t)[0])
    told = [t.name + f" ({', '.join(map(str, middle(t)))})" * places for t in things]
    return f"<think>I see the {', the '.join(told)}. It is the"


def answer_parts(
    thing: Thing,
    scene: Scene,
    rng: np.random.Generator,
    slack: float,
    style: str,
    question: str = "",
) -> tuple[str, str, str, str]:
    """An answer in a style of the base: a sentence, JSON as Qwen likes it, or the format, with three ways to think.

    In four parts: how it begins, what it lists, what it then names, and the numbers of box and points.
    """
    box, name, begins = (
        list(map(round, wide_box(thing.box, rng, slack))),
        called(thing, scene),
        STYLES[style].begins,
    )
    if style == "sentence":
        return begins, "", f" {name} is at", f" {box}."
    if style == "json":
        return begins, "", f'{name}", "bbox_2d":', f" {box}}}]"
    listing = listed(scene, style, question).removeprefix(begins) if style in LISTING else ""
    named = f" {name}{ANSWER}" if listing else f" {name} fits best{ANSWER}"
    return (
        begins,
        listing,
        named,
        f'{str(box)[1:]}, "points": {loose_points(thing, rng, slack)}}}</answer>',
    )


def fact_texts() -> list[tuple[str, str]]:
    """World knowledge without a picture: what indirect questions build on, never an indirect question itself."""
    colours = [
        (f"Which colour has {x}?", f"The colour of {x} is {colour}.")
        for x, colour in COLOUR_OF.items()
    ]
    return colours + [
        (f"Which shape has {x}?", f"The {shape} has {x}.") for x, shape in SHAPE_WITH.items()
    ]


def corpus() -> list[str]:
    """Every word and number that the tiny world writes, for the tokenizer."""
    texts = [instruction("{question}", "{width}", "{height}"), "You are a helpful assistant."]
    texts += ["system\n", "user\n", "assistant\n"]
    # Numbers go a little beyond the picture: an answer outside it shall not fall apart into digits.
    texts += [f"[{i}, {i}" for i in range(SIZE + 29)] + [t for pair in fact_texts() for t in pair]
    rng = np.random.default_rng(0)
    for scene in (make_scene(PRETRAIN[0] + 10**8 + i) for i in range(400)):
        texts += [f" {text}" for kind in KINDS for text, _ in fair_questions(scene, kind)]
        texts += [
            "".join(answer_parts(t, scene, rng, 0.1, style))
            for t in scene.things
            for style in STYLES
        ]
    texts += [style.hint for style in STYLES.values()]
    return texts
