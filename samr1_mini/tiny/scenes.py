"""Drawn scenes with questions that have exactly one right answer.

A scene is a picture of 112 x 112 pixels with four to seven coloured things on a varied background.
Some things touch a neighbour of their own colour. Some hide a corner of a neighbour.
Some carry a dot, and some are faint. A box that is too wide holds a part of a neighbour.
So a predicted mask can be partly right. Questions come in five kinds:

    attribute   "the red star", "the blue object", "the ring"
    part        "the dot of the blue square"
    relation    "the leftmost object", "the largest circle", "the object left of the blue ring"
    indirect    "the object with three corners", "the thing that has the colour of grass":
                neither its colour nor its shape is named
    combined    "the object left of the thing that has the colour of grass",
                "the largest of the things with corners"

`make_scene(seed)` depends on its seed alone.
Train, validation and test scenes come from disjoint ranges of seeds (`SPLITS`).
A question is asked only if its right object is beyond doubt.

Four more kinds, for --objects several, mean several objects or none:

    all         "all red things", "all stars", "all things with corners"
    two         "the two largest things", "the two leftmost things"
    dots        "the dots of all things"
    none        "the green star" where there is none
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from ..metrics import tight_box

SIZE = 112  # pixels a side: 16 x 16 patches of 7, merged two by two into 64 picture tokens
SPLITS = {
    "train": (0, 10**9),
    "validation": (10**9, 10**9 + 10**6),
    "test": (2 * 10**9, 2 * 10**9 + 10**6),
}
PRETRAIN = (3 * 10**9, 4 * 10**9)  # the base networks learn from scenes that no split holds
KINDS = ("attribute", "part", "relation", "indirect", "combined")
GROUP_KINDS = ("all", "two", "dots", "none")
# For each kind, the numbers of right objects that a fair question can have
COUNTS = dict.fromkeys(KINDS, (1,))
COUNTS |= {"all": (2, 3), "two": (2,), "dots": (2, 3), "none": (0,)}

COLOURS = {
    "red": (215, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (245, 225, 50),
    "green": (40, 165, 60),
    "blue": (40, 80, 225),
    "purple": (150, 50, 190),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")
# Shapes that plainly have corners. For a heart and a moon the answer is open to dispute.
CORNERED = ("square", "triangle", "star", "cross")
# Shapes with space for a dot in the middle. A circle with a dot looks like a ring.
DOTTED = ("square", "triangle", "heart")

# World knowledge for indirect questions. Each subject stands for one colour or one shape.
COLOUR_OF = {
    "grass": "green",
    "a ripe tomato": "red",
    "the clear sky": "blue",
    "a lemon": "yellow",
    "fresh snow": "white",
    "coal": "black",
    "a carrot": "orange",
    "a plum": "purple",
}
SHAPE_WITH = {
    "three corners": "triangle",
    "four equal sides": "square",
    "a hole in the middle": "ring",
    "five sharp points": "star",
    "the form of a plus": "cross",
    "the form of a valentine": "heart",
    "two thin horns": "moon",
    "the form of a coin": "circle",
}


@dataclass(eq=False)
class Thing:
    """A drawn object."""

    shape: str
    colour: str
    x: float  # centre and size as drawn, in pixels
    y: float
    size: float
    mask: np.ndarray  # the visible pixels, bool [SIZE, SIZE]
    dot: "Thing | None" = None  # the dot on this thing

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @cached_property
    def box(self) -> tuple[int, int, int, int]:
        """Return the tight box (x1, y1, x2, y2) in pixels. x2 and y2 are exclusive."""
        return tight_box(self.mask)

    @property
    def extent(self) -> float:
        """Return the geometric mean of the tight box's sides, in pixels."""
        x1, y1, x2, y2 = self.box
        return math.sqrt((x2 - x1) * (y2 - y1))

    @cached_property
    def bulk(self) -> float:
        """Return the side of a square with the mask's area, in pixels.

        A star has a large extent and a small bulk.
        """
        return math.sqrt(self.mask.sum())


@dataclass
class Scene:
    """A picture and the things drawn on it."""

    image: np.ndarray  # uint8 [SIZE, SIZE, 3], RGB
    things: list[Thing]


RightObjects = list[Thing] | None  # None: a reader may doubt which objects are right
Question = tuple[str, list[Thing]]  # a text, and all objects that it means


# ------------------------------------------------------------------------------------- drawing


_UP = -math.pi / 2  # the angle of a point above the middle: y grows downwards


def _regular(count: int, start: float) -> np.ndarray:
    """Return `count` points [N, 2] at equal distances on the unit circle.

    The first point is at the angle `start` in radians.
    """
    angles = start + np.linspace(0, 2 * math.pi, count, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def _star() -> np.ndarray:
    """Return the ten corners of a star."""
    corners = _regular(10, _UP)
    corners[1::2] *= 0.42
    return corners


def _cross() -> np.ndarray:
    """Return the twelve corners of a cross: three corners, turned by 0, 90, 180 and 270 degrees."""
    near, far = 0.32, 0.92
    corners = np.array([(-far, -near), (-near, -near), (-near, -far)])
    turned = []
    for _ in range(4):
        turned.append(corners)
        corners = np.stack([-corners[:, 1], corners[:, 0]], 1)
    return np.concatenate(turned)


def _heart() -> np.ndarray:
    """Return 40 points on a heart curve."""
    t = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y], 1) / 17


_CIRCLE = _regular(48, 0)
# Corners [N, 2] of each shape. The radius is 1 and the middle is (0, 0).
_OUTLINES = {
    "circle": _CIRCLE,
    "ring": _CIRCLE,
    "moon": _CIRCLE,
    "square": _regular(4, math.pi / 4),
    "triangle": _regular(3, _UP),
    "star": _star(),
    "cross": _cross(),
    "heart": _heart(),
}


def _turned(shape: str, angle: float) -> np.ndarray:
    """Return the corners [N, 2] of a shape, turned by an angle in radians. Circles stay."""
    if shape in ("circle", "ring", "moon"):
        return _OUTLINES[shape]
    c, s = math.cos(angle), math.sin(angle)
    return _OUTLINES[shape] @ np.array([[c, s], [-s, c]])


def _coverage(shape: str, x: float, y: float, size: float, angle: float) -> np.ndarray:
    """Return the fraction of each pixel that a shape covers, float [SIZE, SIZE].

    The shape is drawn at four times the size, then averaged.
    """
    scale = 4
    canvas = Image.new("L", (SIZE * scale, SIZE * scale))
    draw = ImageDraw.Draw(canvas)

    def polygon(corners: np.ndarray, fill: int) -> None:
        pixels = (np.array([x, y]) + corners * (size / 2)) * scale
        draw.polygon(pixels.ravel().tolist(), fill=fill)

    corners = _turned(shape, angle)
    polygon(corners, 255)
    if shape == "ring":
        polygon(corners * 0.55, 0)
    if shape == "moon":
        to_the_side = np.array([math.cos(angle), math.sin(angle)])
        polygon(corners * 0.85 + to_the_side * 0.5, 0)
    return np.asarray(canvas.reduce(scale), dtype=np.float32) / 255


def _background(rng: np.random.Generator) -> np.ndarray:
    """Return a background of weak colours with soft spots, float [SIZE, SIZE, 3].

    Red rises from left to right, and blue rises from top to bottom.
    The vision tower encodes only relative positions. So only these colours tell the policy where a
    patch is in the picture.
    """
    ramp = np.linspace(-1, 1, SIZE, dtype=np.float32)
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[..., 0] = 128 + rng.uniform(30, 42) * ramp
    image[..., 1] = 128 + rng.uniform(-12, 12)
    image[..., 2] = 128 + rng.uniform(30, 42) * ramp[:, None]
    strength = rng.uniform(0, 9)
    blotches = rng.normal(0, strength, (7, 7, 3)).astype(np.float32)
    for channel in range(3):
        blotch = Image.fromarray(blotches[..., channel])
        blotch = blotch.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        image[..., channel] += np.asarray(blotch)
    return image


def _place(
    rng: np.random.Generator, things: list[Thing], size: float, colour: str
) -> tuple[float, float, str] | None:
    """Return a place (x, y) and a colour for a new thing, or None if the place is taken.

    Half of the things stand close to another thing. Some of them take the colour of that thing
    instead of `colour`. Such a pair touches, and does not overlap.
    """
    # The centre stays so far from the edge that a pixel is between the thing and the edge.
    low, high = size / 2 + 1, SIZE - size / 2 - 1
    x, y = rng.uniform(low, high, 2).tolist()
    beside = None
    if things and rng.random() < 0.5:
        beside = things[rng.integers(len(things))]
        angle = rng.uniform(0, 2 * math.pi)
        if rng.random() < 0.4:
            colour = beside.colour
            closeness = rng.uniform(0.95, 1.05)
        else:
            closeness = rng.uniform(0.6, 1.0)
        distance = closeness * (size + beside.size) / 2
        x = beside.x + distance * math.cos(angle)
        y = beside.y + distance * math.sin(angle)
        if min(x, y) < low or max(x, y) > high:
            return None
    for thing in things:
        distance = math.hypot(x - thing.x, y - thing.y)
        if thing is not beside and distance < 0.5 * (size + thing.size):
            return None
    return x, y, colour


def _allowed(things: list[Thing], new: Thing) -> bool:
    """Return True if a new thing may be drawn over the others.

    No two things have the same colour and shape. At least 0.7 of the visible part of each old
    thing stays visible. The dot of an old thing stays wholly visible.
    Things of one colour do not overlap.
    """
    for thing in things:
        visible = thing.mask & ~new.mask
        if thing.name == new.name or visible.sum() < 0.7 * thing.mask.sum():
            return False
        if thing.colour == new.colour and (thing.mask & new.mask).any():
            return False
        if thing.dot and (thing.dot.mask & new.mask).any():
            return False
    return True


def _blend(image: np.ndarray, paint: np.ndarray, cover: np.ndarray) -> None:
    """Lay a colour [3] on an image [SIZE, SIZE, 3], in place. `cover` [SIZE, SIZE] is 0 to 1."""
    cover = cover[..., None]
    image[:] = image * (1 - cover) + paint * cover


def _add_thing(rng: np.random.Generator, image: np.ndarray, things: list[Thing]) -> None:
    """Try to draw one more thing on the image. Change nothing if its place is taken.

    A drawn thing is appended to `things`. Its pixels are removed from the masks of the things
    below.
    """
    shape = str(rng.choice(SHAPES))
    colour = str(rng.choice(list(COLOURS)))
    size = rng.uniform(17, 38)
    place = _place(rng, things, size, colour)
    if place is None:
        return
    x, y, colour = place
    angle = rng.uniform(-0.3, 0.3)
    if shape == "moon":
        angle += rng.choice([0, math.pi])
    cover = _coverage(shape, x, y, size, angle)
    thing = Thing(shape, colour, x, y, size, cover > 0.5)
    if not _allowed(things, thing):
        return
    paint = np.array(COLOURS[colour], np.float32)
    paint += rng.normal(0, 8, 3).astype(np.float32)
    if rng.random() < 0.15:  # a faint thing: a third of the background shines through
        paint = 0.67 * paint + 0.33 * image[thing.mask].mean(0)
    _blend(image, paint, cover)
    if shape in DOTTED and size > 22 and rng.random() < 0.7:
        _add_dot(rng, image, thing)
    for other in things:
        other.mask &= ~thing.mask
    things.append(thing)


def _add_dot(rng: np.random.Generator, image: np.ndarray, thing: Thing) -> None:
    """Draw a dot of another colour on a thing."""
    colour = str(rng.choice([c for c in COLOURS if c != thing.colour]))
    size = 0.42 * thing.size
    cover = _coverage("circle", thing.x, thing.y, size, 0)
    mask = (cover > 0.5) & thing.mask
    thing.dot = Thing("dot", colour, thing.x, thing.y, size, mask)
    _blend(image, np.array(COLOURS[colour], np.float32), cover)


def make_scene(seed: int) -> Scene:
    """Draw the scene of a seed."""
    rng = np.random.default_rng(seed)
    image = _background(rng)
    grain = rng.standard_normal(image.shape, dtype=np.float32)
    grain *= rng.uniform(2, 7)
    things = []
    wanted = rng.integers(4, 8)
    for _ in range(80):
        if len(things) < wanted:
            _add_thing(rng, image, things)
    image = (image + grain).clip(0, 255)
    return Scene(image.astype(np.uint8), things)


# ------------------------------------------------------------------------------------- questions

_EXTREMES = ("leftmost", "rightmost", "topmost", "bottommost", "largest", "smallest")
# "left of" compares things by the same measure as "leftmost".
_SIDES = {
    "left of": "leftmost",
    "right of": "rightmost",
    "above": "topmost",
    "below": "bottommost",
}


@dataclass(frozen=True)
class Description:
    """Words for things, with the colour and the shapes that these words mean."""

    text: str
    colour: str | None = None  # None: any colour
    shapes: tuple[str, ...] = SHAPES

    def fits(self, colour: str, shape: str) -> bool:
        return self.colour in (None, colour) and shape in self.shapes


def _measures(thing: Thing, word: str) -> tuple[float, float]:
    """Return two values in pixels. Larger values fit the word ("leftmost") better.

    For a direction, they are the coordinates of the centre and of the box's edge, with the sign
    that fits the word.
    """
    x1, y1, x2, y2 = thing.box
    if word == "leftmost":
        return -thing.x, -x1
    if word == "rightmost":
        return thing.x, x2
    if word == "topmost":
        return -thing.y, -y1
    if word == "bottommost":
        return thing.y, y2
    if word == "largest":
        return thing.extent, thing.bulk
    return -thing.extent, -thing.bulk


def _extreme(things: list[Thing], word: str) -> list[Thing]:
    """Return the best thing by a word, and each thing close to it in at least one of two measures.

    If the list has only one thing, it is the clear winner.
    """
    margins = 7, 2  # pixels, for the two measures
    if word in ("largest", "smallest"):
        margins = 3, 3
    values = np.array([_measures(thing, word) for thing in things])  # [N, 2]
    near = (values > values.max(0) - margins).any(1)
    return [thing for thing, is_near in zip(things, near) if is_near]


def _found(scene: Scene, what: Description) -> tuple[list[Thing], list[Thing]]:
    """Return two lists: the things that fit a description, and the things with a dot that fits it.

    A reader may take a dot for a circle.
    """
    found = [t for t in scene.things if what.fits(t.colour, t.shape)]
    dotted = [t for t in scene.things if t.dot and what.fits(t.dot.colour, "circle")]
    return found, dotted


# Each of the next five functions returns the right objects of a question, or None if they are in
# doubt. A dot is the answer only if the question asks for a dot. `word` is "leftmost", "left of",
# or "" in a question that compares nothing. The number of objects is checked later (COUNTS).


def right_named(scene: Scene, what: Description, word: str) -> RightObjects:
    """Return the things that fit a description, or None if a dot fits it too."""
    found, dotted = _found(scene, what)
    return None if dotted else found


def right_dot(scene: Scene, what: Description, word: str) -> RightObjects:
    """Return the dots of the things of a description, if each of these things has a dot."""
    found, _ = _found(scene, what)
    dots = [thing.dot for thing in found]
    return None if None in dots else dots


def right_dots(scene: Scene, what: Description, word: str) -> RightObjects:
    """Return all dots of the scene, for any description and word."""
    return [thing.dot for thing in scene.things if thing.dot]


def right_side(scene: Scene, what: Description, word: str) -> RightObjects:
    """Return the things on one side ("left of") of the only thing that fits a description.

    Returns None if the centre of another thing is within 7 pixels of this thing's centre, measured
    in the direction of `word`.
    """
    anchors = right_named(scene, what, word)
    if anchors is None or len(anchors) != 1:
        return None
    [anchor] = anchors
    start, _ = _measures(anchor, _SIDES[word])
    beyond = []
    for thing in scene.things:
        end, _ = _measures(thing, _SIDES[word])
        distance = end - start  # pixels from the anchor's centre towards this side
        if thing is not anchor and -7 < distance <= 7:
            return None
        if distance > 7:
            beyond.append(thing)
    return beyond


def right_extreme(scene: Scene, what: Description, word: str, count: int = 1) -> RightObjects:
    """Return the `count` clear winners by `word` ("leftmost") among the things of a description.

    Each winner has to win clearly against all things that do not win. If a dot would win, the
    result is None.
    """
    found, dotted = _found(scene, what)
    if len(found) <= count:  # nothing is left to compare
        return None
    if word == "smallest" and dotted:
        return None
    rivals = found + [t.dot for t in dotted if t not in found]
    rivals.sort(key=lambda thing: _measures(thing, word)[0])
    winners, rest = rivals[-count:], rivals[:-count]
    for thing in winners:
        if thing not in found or _extreme([thing, *rest], word) != [thing]:
            return None
    return winners


class Form(NamedTuple):
    """A form of questions: all texts with the same start."""

    right: Callable  # one of the functions above
    start: str  # of the text; a "*" stands for the word
    what: list[Description]  # the ends of the texts
    words: Collection[str] = ("",)


def _fair(scene: Scene, form: Form, counts: tuple[int, ...]) -> list[Question]:
    """Return the fair questions of a form.

    In a fair question, the right objects are beyond doubt, and `counts` contains their number.
    """
    questions = []
    for word in form.words:
        for one in form.what:
            things = form.right(scene, one, word)
            if things is not None and len(things) in counts:
                questions.append((f"{form.start.replace('*', word)} {one.text}", things))
    return questions


def _of_colour(words: str) -> list[Description]:
    """Return a description for each subject of COLOUR_OF. Its text is `words` and the subject."""
    return [Description(f"{words} {subject}", c) for subject, c in COLOUR_OF.items()]


def _things_with_corners(scene: Scene) -> list[Description]:
    """Return the description "things with corners" in a list.

    Returns [] if the scene has a heart or a moon: a reader may doubt that they have corners.
    """
    if {"heart", "moon"} & {t.shape for t in scene.things}:
        return []
    return [Description("things with corners", shapes=CORNERED)]


def _forms(scene: Scene, kind: str) -> list[Form]:
    """Return the forms of a kind in KINDS, which ask for one object."""
    names = [Description(t.name, t.colour, (t.shape,)) for t in scene.things]
    of_colour = [Description(f"{colour} object", colour) for colour in sorted(COLOURS)]
    of_shape = [Description(shape, shapes=(shape,)) for shape in sorted(SHAPES)]
    if kind == "attribute":
        return [Form(right_named, "the", names), Form(right_named, "the", of_colour + of_shape)]
    if kind == "part":
        return [Form(right_dot, "the dot of the", names + of_shape)]
    if kind == "relation":
        compared = [Description("object"), *of_colour, *of_shape]
        extremes = Form(right_extreme, "the *", compared, _EXTREMES)
        return [extremes, Form(right_side, "the object * the", names, _SIDES)]
    indirect = _of_colour("thing that has the colour of")
    for feature, shape in SHAPE_WITH.items():
        indirect.append(Description(f"object with {feature}", shapes=(shape,)))
    if kind == "indirect":
        return [Form(right_named, "the", indirect)]
    compared = _of_colour("things that have the colour of")
    times = 4  # "things with corners" are asked for as often as four colours
    compared += _things_with_corners(scene) * times
    sides = Form(right_side, "the object * the", indirect, _SIDES)
    return [sides, Form(right_extreme, "the * of the", compared, _EXTREMES)]  # combined


def _group_forms(scene: Scene, kind: str) -> list[Form]:
    """Return the forms of a kind in GROUP_KINDS, which ask for several objects, or for none."""
    things = [Description("things")]
    if kind == "two":
        return [Form(partial(right_extreme, count=2), "the two *", things, _EXTREMES)]
    if kind == "dots":
        return [Form(right_dots, "the dots of all", things)]
    if kind == "none":
        names = [Description(f"{c} {shape}", c, (shape,)) for c in COLOURS for shape in SHAPES]
        return [Form(right_named, "the", names)]
    of_colour = [Description(f"{colour} things", colour) for colour in COLOURS]
    of_shape = []
    for shape in SHAPES:
        plural = shape.replace("cross", "crosse") + "s"
        of_shape.append(Description(plural, shapes=(shape,)))
    every = (of_colour, of_shape, _things_with_corners(scene))
    return [Form(right_named, "all", what) for what in every]  # all


def fair_forms(scene: Scene, kind: str) -> list[list[Question]]:
    """Return all fair questions of a kind, one list for each form."""
    if kind not in COUNTS:
        raise ValueError(f"unknown kind of question {kind!r}; known are {', '.join(COUNTS)}")
    forms = _group_forms(scene, kind) if kind in GROUP_KINDS else _forms(scene, kind)
    return [_fair(scene, form, COUNTS[kind]) for form in forms]


def ask(scene: Scene, rng: np.random.Generator, kind: str) -> Question | None:
    """Choose a random fair question of a kind, or return None if there is none.

    All forms with at least one fair question are equally likely.
    """
    forms = [form for form in fair_forms(scene, kind) if form]
    if not forms:
        return None
    questions = forms[rng.integers(len(forms))]
    return questions[rng.integers(len(questions))]
