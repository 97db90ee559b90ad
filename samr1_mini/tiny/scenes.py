"""Drawn scenes with questions that have exactly one right answer.

A scene is a 112 x 112 picture with three to six coloured shapes on a varied background. Questions come in three kinds:

    attribute   "the red star", "the blue object", "the ring"
    relation    "the leftmost object", "the largest circle", "the object left of the blue ring"
    indirect    "the object with three corners", "the thing that has the colour of grass": the answer is never named

`make_scene(seed)` is a pure function of its seed, so the supply is endless, and train, validation and test scenes come
from disjoint ranges of seeds (`SPLITS`). A question is asked only where `right_objects` clearly finds one object.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw

from ..metrics import tight_box

SIZE = 112  # pixels a side: 8 x 8 patches of 14, merged two by two into 16 picture tokens
SPLITS = {"train": (0, 10**9), "validation": (10**9, 10**9 + 10**6), "test": (2 * 10**9, 2 * 10**9 + 10**6)}
PRETRAIN = (3 * 10**9, 4 * 10**9)  # the base networks learn from scenes that no split holds
KINDS = ("attribute", "relation", "indirect")

COLOURS = {
    "red": (215, 40, 40), "orange": (245, 140, 20), "yellow": (245, 225, 50), "green": (40, 165, 60),
    "blue": (40, 80, 225), "purple": (150, 50, 190), "white": (245, 245, 245), "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")

# What is never drawn or named, only known: each fact's subject stands for one colour or one shape.
COLOUR_OF = {
    "grass": "green", "a ripe tomato": "red", "the clear sky": "blue", "a lemon": "yellow",
    "fresh snow": "white", "coal": "black", "a carrot": "orange", "a plum": "purple",
}
SHAPE_WITH = {
    "three corners": "triangle", "four equal sides": "square", "a hole in the middle": "ring",
    "five sharp points": "star", "the form of a plus": "cross", "the form of a valentine": "heart",
    "two thin horns": "moon", "the form of a coin": "circle",
}


@dataclass(eq=False)
class Thing:
    """One drawn object: what it is, the centre and size it was drawn with in pixels, its mask, bool [SIZE, SIZE]."""

    shape: str
    colour: str
    x: float
    y: float
    size: float
    mask: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @cached_property
    def box(self) -> tuple[int, int, int, int]:
        """Tight box (x1, y1, x2, y2) in pixels; x2 and y2 are one past the last pixel."""
        return tight_box(self.mask)

    @property
    def extent(self) -> float:
        """Mean side of the tight box, in pixels: how far the thing reaches."""
        x1, y1, x2, y2 = self.box
        return math.sqrt((x2 - x1) * (y2 - y1))

    @cached_property
    def bulk(self) -> float:
        """Side of a square with the mask's area, in pixels: how much there is. A star reaches far and has little."""
        return math.sqrt(self.mask.sum())


@dataclass
class Scene:
    image: np.ndarray  # uint8 [SIZE, SIZE, 3], RGB
    things: list[Thing]


# ---------------------------------------------------------------------------------------------------- drawing


def _outline(shape: str, angle: float) -> np.ndarray:
    """Corners [N, 2] of a shape of radius 1 around (0, 0), turned by `angle` (radians)."""
    turn = lambda t: np.stack([np.cos(t), np.sin(t)], 1)
    up = -math.pi / 2
    if shape in ("circle", "ring", "moon"):
        return turn(np.linspace(0, 2 * math.pi, 48, endpoint=False))
    if shape == "square":
        corners = turn(np.arange(4) * math.pi / 2 + math.pi / 4)
    elif shape == "triangle":
        corners = turn(up + np.arange(3) * 2 * math.pi / 3)
    elif shape == "star":
        corners = turn(up + np.arange(10) * math.pi / 5) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]
    elif shape == "cross":
        a, b = 0.32, 0.92
        corners = np.array([(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a),
                            (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)])
    else:  # heart
        t = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        corners = np.stack([16 * np.sin(t) ** 3,
                            -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))], 1) / 17
    c, s = math.cos(angle), math.sin(angle)
    return corners @ np.array([[c, s], [-s, c]])


def _coverage(shape: str, x: float, y: float, size: float, angle: float) -> np.ndarray:
    """The share of each pixel that the shape covers, float [SIZE, SIZE], drawn at four times the size and averaged."""
    scale, radius = 4, size / 2
    canvas = Image.new("L", (SIZE * scale, SIZE * scale))
    draw = ImageDraw.Draw(canvas)
    place = lambda p: [((x + px * radius) * scale, (y + py * radius) * scale) for px, py in p]
    corners = _outline(shape, angle)
    draw.polygon(place(corners), fill=255)
    if shape == "ring":
        draw.polygon(place(corners * 0.55), fill=0)
    if shape == "moon":
        draw.polygon(place(corners * 0.85 + np.array([math.cos(angle), math.sin(angle)]) * 0.5), fill=0)
    return np.asarray(canvas.reduce(scale), dtype=np.float32) / 255


def _background(rng: np.random.Generator) -> np.ndarray:
    """Muted colours that shift smoothly from left to right and from top to bottom, blotched, float [SIZE, SIZE, 3].

    The two slopes are what tells one place from another: the vision tower's own positions are all relative.
    """
    ramp = np.linspace(-1, 1, SIZE, dtype=np.float32)
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[..., 0] = 128 + rng.uniform(30, 42) * ramp[None, :]
    image[..., 1] = 128 + rng.uniform(-12, 12)
    image[..., 2] = 128 + rng.uniform(30, 42) * ramp[:, None]
    blotches = rng.normal(0, rng.uniform(0, 9), (7, 7, 3)).astype(np.float32)
    for channel in range(3):
        blotch = Image.fromarray(blotches[..., channel]).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        image[..., channel] += np.asarray(blotch)
    return image


def make_scene(seed: int) -> Scene:
    """Draw the scene of one seed."""
    rng = np.random.default_rng(seed)
    image, things = _background(rng), []
    grain = rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(2, 7)
    wanted = int(rng.integers(3, 7))
    for _ in range(60):
        if len(things) == wanted:
            break
        shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
        size = rng.uniform(17, 40)
        x, y = rng.uniform(size / 2 + 1, SIZE - size / 2 - 1, 2)
        if any(math.hypot(x - t.x, y - t.y) < 0.5 * (size + t.size) for t in things):
            continue  # neighbours may touch each other's boxes, never each other
        if any(t.name == f"{colour} {shape}" for t in things):
            continue
        angle = rng.uniform(-0.3, 0.3) + (rng.choice([0, math.pi]) if shape == "moon" else 0)
        cover = _coverage(shape, x, y, size, angle)
        paint = np.array(COLOURS[colour], np.float32) + rng.normal(0, 8, 3).astype(np.float32)
        image = image * (1 - cover[..., None]) + paint * cover[..., None]
        things.append(Thing(shape, colour, float(x), float(y), float(size), cover > 0.5))
    return Scene((image + grain).clip(0, 255).astype(np.uint8), things)


# ---------------------------------------------------------------------------------------------------- questions

# Word: what is compared, each with the margin in pixels that makes a winner plain; the winner wins by all of them.
_EXTREMES = {
    "leftmost": ((lambda t: -t.x, 7), (lambda t: -t.box[0], 2)),
    "rightmost": ((lambda t: t.x, 7), (lambda t: t.box[2], 2)),
    "topmost": ((lambda t: -t.y, 7), (lambda t: -t.box[1], 2)),
    "bottommost": ((lambda t: t.y, 7), (lambda t: t.box[3], 2)),
    "largest": ((lambda t: t.extent, 3), (lambda t: t.bulk, 3)),
    "smallest": ((lambda t: -t.extent, 3), (lambda t: -t.bulk, 3)),
}
_SIDES = {
    "left of": lambda t, o: o.x - t.x, "right of": lambda t, o: t.x - o.x,
    "above": lambda t, o: o.y - t.y, "below": lambda t, o: t.y - o.y,
}


def _extreme(things: list[Thing], word: str) -> list[Thing]:
    """The thing that wins by every measure of the word, or all that some measure leaves in question."""
    found = []
    for measure, margin in _EXTREMES[word]:
        best = max(map(measure, things), default=0)
        found += [t for t in things if measure(t) > best - margin and t not in found]
    return found


def right_objects(scene: Scene, question: tuple) -> list[Thing]:
    """Every object that a reader could take for the answer; a question is fair when this is one object.

    `question` is (form, ...): ("is", colour, shape), ("extreme", word, colour, shape), ("side", side, name) with None
    for "any colour" and "object". For sides, an object within 7 px of the line is neither in nor out: it counts.
    """
    form, *rest = question
    if form == "side":
        side, name = rest
        anchors = [t for t in scene.things if t.name == name]
        if len(anchors) != 1:
            return []
        found = [t for t in scene.things if t is not anchors[0] and _SIDES[side](t, anchors[0]) > -7]
        return found if all(_SIDES[side](t, anchors[0]) > 7 for t in found) else found * 2
    colour, shape = rest[-2:]
    found = [t for t in scene.things if colour in (None, t.colour) and shape in (None, t.shape)]
    if form == "extreme":  # among one object there is nothing to compare
        return _extreme(found, rest[0]) if len(found) > 1 else []
    return found


def _noun(colour: str | None, shape: str | None) -> str:
    return f"{colour} {shape or 'object'}" if colour else (shape or "object")


def fair_questions(scene: Scene, kind: str) -> list[tuple[str, Thing]]:
    """All questions of one kind that have exactly one right object here: (text, object) pairs."""
    of_colour = [(c, None) for c in sorted({t.colour for t in scene.things})]
    of_shape = [(None, s) for s in sorted({t.shape for t in scene.things})]
    asked = []  # (text, formal question)
    if kind == "attribute":
        for colour, shape in [(t.colour, t.shape) for t in scene.things] + of_colour + of_shape:
            asked.append((f"the {_noun(colour, shape)}", ("is", colour, shape)))
    elif kind == "relation":
        for word in _EXTREMES:
            for colour, shape in [(None, None)] + of_colour + of_shape:
                asked.append((f"the {word} {_noun(colour, shape)}", ("extreme", word, colour, shape)))
        for side in _SIDES:
            asked += [(f"the object {side} the {t.name}", ("side", side, t.name)) for t in scene.things]
    elif kind == "indirect":
        asked += [(f"the thing that has the colour of {subject}", ("is", c, None)) for subject, c in COLOUR_OF.items()]
        asked += [(f"the object with {feature}", ("is", None, s)) for feature, s in SHAPE_WITH.items()]
    else:
        raise ValueError(f"unknown kind of question {kind!r}; known are {', '.join(KINDS)}")
    found = [(text, right_objects(scene, question)) for text, question in asked]
    return [(text, things[0]) for text, things in found if len(things) == 1]


def ask(scene: Scene, rng: np.random.Generator, kind: str) -> tuple[str, Thing] | None:
    """One fair question of this kind, or None where the scene allows none."""
    questions = fair_questions(scene, kind)
    return questions[int(rng.integers(len(questions)))] if questions else None
