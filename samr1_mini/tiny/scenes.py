"""Drawn scenes with questions that have exactly one right answer.

A scene is a 112 x 112 picture with four to seven coloured things on a varied background. They stand in groups: some
touch a neighbour of their own colour, some hide a corner of one, some carry a dot, some are faint. So a mask can be
right by degrees, and a box that is too wide takes in a neighbour. Questions come in five kinds:

    attribute   "the red star", "the blue object", "the ring"
    part        "the dot of the blue square"
    relation    "the leftmost object", "the largest circle", "the object left of the blue ring"
    indirect    "the object with three corners", "the thing that has the colour of grass": the answer is never named
    combined    "the object left of the thing that has the colour of grass", "the largest of the things with corners"

`make_scene(seed)` is a pure function of its seed, so the supply is endless, and train, validation and test scenes come
from disjoint ranges of seeds (`SPLITS`). A question is asked only where `right_objects` clearly finds one object.
"""

import math
from dataclasses import dataclass
from functools import cached_property

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
CORNERED = (
    "square",
    "triangle",
    "star",
    "cross",
)  # plainly with corners; of a heart and a moon one could argue
DOTTED = (
    "square",
    "triangle",
    "heart",
)  # have room for a dot in their middle; a circle with one looks like a ring

# What is never drawn or named, only known: each fact's subject stands for one colour or one shape.
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
    """One drawn object: what it is, the centre and size it was drawn with in pixels, what is seen of it, bool [SIZE,
    SIZE], and its dot, a part of it, if it has one."""

    shape: str
    colour: str
    x: float
    y: float
    size: float
    mask: np.ndarray
    dot: "Thing | None" = None

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
    """A picture, and what is drawn on it."""

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
        corners = (
            turn(up + np.arange(10) * math.pi / 5) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]
        )
    elif shape == "cross":
        a, b = 0.32, 0.92
        corners = np.array(
            [
                (-a, -b),
                (a, -b),
                (a, -a),
                (b, -a),
                (b, a),
                (a, a),
                (a, b),
                (-a, b),
                (-a, a),
                (-b, a),
                (-b, -a),
                (-a, -a),
            ]
        )
    else:  # heart
        t = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        corners = (
            np.stack(
                [
                    16 * np.sin(t) ** 3,
                    -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)),
                ],
                1,
            )
            / 17
        )
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
        draw.polygon(
            place(corners * 0.85 + np.array([math.cos(angle), math.sin(angle)]) * 0.5), fill=0
        )
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
        blotch = Image.fromarray(blotches[..., channel]).resize(
            (SIZE, SIZE), Image.Resampling.BICUBIC
        )
        image[..., channel] += np.asarray(blotch)
    return image


def _place(
    rng: np.random.Generator, things: list[Thing], size: float
) -> tuple[float, float, str | None] | None:
    """Where a new thing of this size may stand: free, or close to one that is there. The colour, where it must be that
    one's: two of a colour touch, they never overlap."""
    x, y = rng.uniform(size / 2 + 1, SIZE - size / 2 - 1, 2)
    beside, colour = None, None
    if things and rng.random() < 0.5:
        beside, angle = things[rng.integers(len(things))], rng.uniform(0, 2 * math.pi)
        alike = rng.random() < 0.4
        colour = beside.colour if alike else None
        away = (
            (rng.uniform(0.95, 1.05) if alike else rng.uniform(0.6, 1.0)) * (size + beside.size) / 2
        )
        x, y = beside.x + away * math.cos(angle), beside.y + away * math.sin(angle)
        if not all(size / 2 + 1 <= v <= SIZE - size / 2 - 1 for v in (x, y)):
            return None
    if any(math.hypot(x - t.x, y - t.y) < 0.5 * (size + t.size) for t in things if t is not beside):
        return None
    return x, y, colour


def make_scene(seed: int) -> Scene:
    """Draw the scene of one seed."""
    rng = np.random.default_rng(seed)
    image, things = _background(rng), []
    grain = rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(2, 7)
    wanted = int(rng.integers(4, 8))
    for _ in range(80):
        if len(things) == wanted:
            break
        shape, colour, size = (
            str(rng.choice(SHAPES)),
            str(rng.choice(list(COLOURS))),
            rng.uniform(17, 38),
        )
        if (place := _place(rng, things, size)) is None:
            continue
        x, y, colour = float(place[0]), float(place[1]), place[2] or colour
        angle = rng.uniform(-0.3, 0.3) + (rng.choice([0, math.pi]) if shape == "moon" else 0)
        cover = _coverage(shape, x, y, size, angle)
        solid = cover > 0.5
        clash = any(
            t.name == f"{colour} {shape}" or t.colour == colour and (t.mask & solid).any()
            for t in things
        )
        if clash or not all(_still_seen(t, solid) for t in things):
            continue
        paint = np.array(COLOURS[colour], np.float32) + rng.normal(0, 8, 3).astype(np.float32)
        if rng.random() < 0.15:  # faint: a third of what lies behind shines through
            paint = 0.67 * paint + 0.33 * image[solid].mean(0)
        image = image * (1 - cover[..., None]) + paint * cover[..., None]
        thing = Thing(shape, colour, x, y, float(size), solid)
        if shape in DOTTED and size > 22 and rng.random() < 0.7:
            dot_colour = str(rng.choice([c for c in COLOURS if c != colour]))
            cover = _coverage("circle", x, y, 0.42 * size, 0)
            image = (
                image * (1 - cover[..., None])
                + np.array(COLOURS[dot_colour], np.float32) * cover[..., None]
            )
            thing.dot = Thing("dot", dot_colour, x, y, 0.42 * float(size), (cover > 0.5) & solid)
        for other in things:
            other.mask &= ~solid
        things.append(thing)
    return Scene((image + grain).clip(0, 255).astype(np.uint8), things)


def _still_seen(thing: Thing, solid: np.ndarray) -> bool:
    """A thing under a new one shows at least seven tenths of what it showed, and all of its dot."""
    kept = (thing.mask & ~solid).sum() >= 0.7 * thing.mask.sum()
    return bool(kept and not (thing.dot and (thing.dot.mask & solid).any()))


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
    "left of": lambda t, o: o.x - t.x,
    "right of": lambda t, o: t.x - o.x,
    "above": lambda t, o: o.y - t.y,
    "below": lambda t, o: t.y - o.y,
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

    `question` is (form, ...): ("is", colour, shape), ("dot", colour, shape), ("extreme", word, colour, shape), ("side",
    side, colour, shape), with None for any colour or shape and a tuple for one of these shapes. An object within
    7 px of the line of a side makes the question unfair. A dot is a part and no object, so it is never the answer
    but where it is asked for; where a reader may take it for a small circle, nothing is.
    """
    form, *rest, colour, shape = question
    shapes = SHAPES if shape is None else (shape,) if isinstance(shape, str) else shape
    found = [t for t in scene.things if colour in (None, t.colour) and t.shape in shapes]
    if form == "dot":
        return [t.dot for t in found if t.dot] * len(
            found
        )  # unfair where two could be meant, though one has no dot
    dotted = [
        t for t in scene.things if t.dot and colour in (None, t.dot.colour) and "circle" in shapes
    ]
    if form == "is":
        return [] if dotted else found
    if form == "side":
        if len(found) != 1 or dotted:
            return []
        measure, anchor = _SIDES[rest[0]], found[0]
        found = [t for t in scene.things if t is not anchor and measure(t, anchor) > -7]
        return (
            found if all(measure(t, anchor) > 7 for t in found) else found * 2
        )  # twice: not one object
    if (
        len(found) < 2 or rest[0] == "smallest" and dotted
    ):  # among one object there is nothing to compare
        return []
    best = _extreme(found + [t.dot for t in dotted if t not in found], rest[0])
    return best if all(t in found for t in best) else []


def _noun(colour: str | None, shape: str | None) -> str:
    return f"{colour} {shape or 'object'}" if colour else (shape or "object")


def _forms(scene: Scene, kind: str) -> list[list[tuple[str, tuple]]]:
    """What could be asked of a scene, (text, formal question) pairs, one list for each form of a kind."""
    of_colour = [(c, None) for c in sorted({t.colour for t in scene.things})]
    of_shape = [(None, s) for s in sorted({t.shape for t in scene.things})]
    named = [(t.colour, t.shape) for t in scene.things]
    if kind == "attribute":
        return [
            [(f"the {_noun(*what)}", ("is", *what)) for what in form]
            for form in (named, of_colour + of_shape)
        ]
    if kind == "part":
        return [[(f"the dot of the {_noun(*what)}", ("dot", *what)) for what in named + of_shape]]
    if kind == "relation":
        extremes = [
            (f"the {word} {_noun(*what)}", ("extreme", word, *what))
            for word in _EXTREMES
            for what in [(None, None)] + of_colour + of_shape
        ]
        sides = [
            (f"the object {side} the {_noun(*what)}", ("side", side, *what))
            for side in _SIDES
            for what in named
        ]
        return [extremes, sides]
    things = [
        (f"thing that has the colour of {subject}", (c, None)) for subject, c in COLOUR_OF.items()
    ]
    things += [(f"object with {feature}", (None, s)) for feature, s in SHAPE_WITH.items()]
    if kind == "indirect":
        return [[(f"the {text}", ("is", *what)) for text, what in things]]
    if kind == "combined":
        sides = [
            (f"the object {side} the {text}", ("side", side, *what))
            for side in _SIDES
            for text, what in things
        ]
        groups = [
            (f"things that have the colour of {subject}", (c, None))
            for subject, c in COLOUR_OF.items()
        ]
        if not {"heart", "moon"} & {t.shape for t in scene.things}:
            groups += [("things with corners", (None, CORNERED))] * 4
        return [
            sides,
            [
                (f"the {word} of the {text}", ("extreme", word, *what))
                for word in _EXTREMES
                for text, what in groups
            ],
        ]
    raise ValueError(f"unknown kind of question {kind!r}; known are {', '.join(KINDS)}")


def _fair(scene: Scene, form: list[tuple[str, tuple]]) -> list[tuple[str, Thing]]:
    found = [(text, right_objects(scene, question)) for text, question in form]
    return [(text, things[0]) for text, things in found if len(things) == 1]


def fair_questions(scene: Scene, kind: str) -> list[tuple[str, Thing]]:
    """All questions of one kind that have exactly one right object here: (text, object) pairs."""
    return [question for form in _forms(scene, kind) for question in _fair(scene, form)]


def ask(scene: Scene, rng: np.random.Generator, kind: str) -> tuple[str, Thing] | None:
    """One fair question of this kind, its forms equally often, or None where the scene allows none."""
    forms = [fair for form in _forms(scene, kind) if (fair := _fair(scene, form))]
    if not forms:
        return None
    questions = forms[int(rng.integers(len(forms)))]
    return questions[int(rng.integers(len(questions)))]
