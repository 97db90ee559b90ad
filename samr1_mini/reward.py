"""The reward: text -> answer (box, points) -> SAM's mask -> IoU with the true mask -> eq. (5), and two terms for the
format.

    reward = accuracy (0, 2, 3 or 4) + reasoning format (0 or 1) + segmentation format (0 or 1)

No network is trained here and nothing is learnt from boxes: the policy is paid for what Segment Anything makes of its
prompt. Frames: answers count pixels of the square picture the policy sees; SAM and the true mask keep the picture's
own size [H, W].
"""

import json
import re
from dataclasses import dataclass, field

import numpy as np

from .data import Sample
from .metrics import box_iou, filled, intersection_union, iou, tight_box
from .segmenter import Segmenter

MAX_TEXT = 20_000  # characters; nothing that long is an answer


# ---------------------------------------------------------------------------------------------------- parse


@dataclass
class Answer:
    """What a text says. `box` and `points`, in the policy's pixels, are set where the segmentation format holds."""

    box: tuple[float, float, float, float] | None = None
    points: list[tuple[float, float, int]] = field(default_factory=list)
    reasoning_format: bool = False
    segmentation_format: bool = False
    why: str = ""  # what broke the format, for people
    lenient_box: tuple[float, float, float, float] | None = (
        None  # a box found in any shape, for gIoU_lenient
    )

    @property
    def in_format(self) -> bool:
        return self.reasoning_format and self.segmentation_format


def _number(value) -> float:
    """A finite JSON number as a float; anything else (true, "3", NaN, 1e999) is a ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
        raise ValueError(f"{str(value)[:20]!r} is not a number")
    return float(value)


def _object(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object. A name that comes twice would hide what came first."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name comes twice in an object")
    return dict(pairs)


def _box(value, width: int, height: int) -> tuple[float, float, float, float]:
    """Four numbers, clipped to the picture; reversed boxes, empty ones and shares are refused."""
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        raise ValueError("bbox is not a list of four numbers")
    x1, y1, x2, y2 = map(_number, value)
    x1, x2 = min(max(x1, 0.0), width), min(max(x2, 0.0), width)
    y1, y2 = min(max(y1, 0.0), height), min(max(y2, 0.0), height)
    if x2 - x1 < 1e-3 or y2 - y1 < 1e-3:
        raise ValueError("bbox is reversed, empty or outside the picture")
    if x2 <= 1 and y2 <= 1:  # in pixels or thousandths it would lie within the first one
        raise ValueError("bbox is in shares of the picture: all four numbers are at most 1")
    return x1, y1, x2, y2


def _points(value, width: int, height: int, max_points: int) -> list[tuple[float, float, int]]:
    """Labelled points [[x, y, 0 or 1], ...], clipped to the picture."""
    if not isinstance(value, list) or not value:
        raise ValueError("points is not a list of [x, y, label]")
    if len(value) > max_points:  # without a cap a trained policy emits ever more of them
        raise ValueError(f"{len(value)} points, at most {max_points} are allowed")
    points = []
    for point in value:
        if not isinstance(point, list) or len(point) != 3:
            raise ValueError("a point is not [x, y, label]")
        x, y, label = map(_number, point)
        if label not in (0, 1):
            raise ValueError(f"label {label:g} is neither 0 nor 1")
        points.append((min(max(x, 0.0), width - 1), min(max(y, 0.0), height - 1), int(label)))
    return points


# The lenient reading cuts a text into numbers, words and signs, with a blank between them. So line
# breaks and quotes do not matter. A pattern reads no part of the text more than a few times, so the
# time is linear.
_TOKEN = re.compile(r"""-?\d+(?:\.\d+)?(?!\w)|\w+|[^\s"'\w]""")
_NUMBER = r"(-?\d+(?:\.\d+)?)"
_NUMBERS = r"[-\d.,()\[\]{ ]*"  # a stretch of numbers, brackets and commas
# <box>10 20 30 40</box>, <box>(10, 20), (30, 40)</box>, <|box_start|>(10,20),(30,40)<|box_end|>
_TAG = re.compile(rf"< (?:\| )?\w{{0,20}}box\w{{0,20}} (?:\| )?>({_NUMBERS})(?=<)", re.I)
# {"x1": 10, "y1": 20, "x2": 30, "y2": 40} in any order, and with other names of the sides. Molmo's
# <points x1="10" ...> is no box.
_SIDE = rf"(?<!\S)([xy]_?(?:[12]|min|max)|left|top|right|bottom) [:=] {_NUMBER}"
_FOUR_SIDES = " [,;]? ?".join([_SIDE] * 4)
_SIDES = re.compile(rf"(?<!point )(?<!points )(?:\{{ )?{_FOUR_SIDES}(?: \}})?", re.I)
_PLACES = {"x1": 0, "xmin": 0, "left": 0, "y1": 1, "ymin": 1, "top": 1}
_PLACES |= {"x2": 2, "xmax": 2, "right": 2, "y2": 3, "ymax": 3, "bottom": 3}
# values of a key or a tag that names points, such as "point_2d"; values of a key such as "bbox_2d"
_POINTS = re.compile(rf"(?<!/ )point(?!_end)\w{{0,20}} (?:\| )?[:=>] {_NUMBERS}", re.I)
_NAMED = re.compile(rf"box\w{{0,20}} [:=] {_NUMBERS}", re.I)
# [10, 20, 30, 40] in brackets of either kind, or (10, 20), (30, 40). Two points in a list are no
# box, nor are more than two points.
_FOUR = re.compile(
    r"[\[(] " + " , ".join([_NUMBER] * 4) + r" [\])]"
    rf"|(?<!\[ )(?<!\) , )\( {_NUMBER} , {_NUMBER} \) , \( {_NUMBER} , {_NUMBER} \)(?! , \()"
)


def _tag_as_key(match: re.Match) -> str:
    """Write four numbers in a tag as the value of a key "box"; leave other content as it is."""
    numbers = re.findall(_NUMBER, match[1])
    if len(numbers) != 4:
        return match[0]
    return f"box : [ {' , '.join(numbers)} ] "


def _sides_as_list(match: re.Match) -> str:
    """Write four named sides as [ x1 , y1 , x2 , y2 ]; leave other pairs as they are."""
    names, numbers = match.groups()[::2], match.groups()[1::2]
    sides = {_PLACES[name.lower().replace("_", "")]: number for name, number in zip(names, numbers)}
    if len(sides) != 4:
        return match[0]
    return f"[ {' , '.join(sides[i] for i in range(4))} ]"


def _last_box(spaced: str, width: int, height: int) -> tuple[float, float, float, float] | None:
    """Return the last four numbers in brackets that are a proper box."""
    for match in reversed(list(_FOUR.finditer(spaced))):
        try:
            return _box([float(v) for v in match.groups() if v is not None], width, height)
        except ValueError:
            continue
    return None


def lenient_box(text: str, width: int, height: int) -> tuple[float, float, float, float] | None:
    """Find a box written in any common shape.

    The answer part, which need not be closed, is read before the whole text. In each of them the
    last box that a key or a tag names is taken, else the last one of all.
    """
    answer = text.rpartition("<answer>")[2].partition("</answer>")[0]
    for part in (answer, text):
        spaced = _TAG.sub(_tag_as_key, " ".join(_TOKEN.findall(part)))
        spaced = _SIDES.sub(_sides_as_list, spaced)
        spaced = _POINTS.sub("; ", spaced)  # never a box
        named = " ; ".join(_NAMED.findall(spaced))
        box = _last_box(named, width, height) or _last_box(spaced, width, height)
        if box is not None:
            return box
    return None


def parse(text: str, width: int, height: int, max_points: int = 8) -> Answer:
    """Read an answer to a `width` x `height` picture. Never raises, runs in linear time; `why` says what is wrong.

    >>> parse('<think>Left.</think><answer>{"bbox": [1, 2, 9, 8], "points": [[5, 5, 1]]}</answer>', 28, 28).box
    (1.0, 2.0, 9.0, 8.0)
    """
    answer, text = Answer(), text.strip()
    if len(text) > MAX_TEXT:
        return Answer(why=f"longer than {MAX_TEXT} characters")
    answer.lenient_box = lenient_box(text, width, height)
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    places = [text.find(tag) for tag in tags]
    whole = all(text.count(tag) == 1 for tag in tags) and places == sorted(places)
    between = text[places[1] + len(tags[1]) : places[2]].strip() if whole else ""
    answer.reasoning_format = (
        whole and text.startswith(tags[0]) and text.endswith(tags[3]) and not between
    )
    if not answer.reasoning_format:
        answer.why = "not <think>...</think><answer>...</answer>"
    try:
        if text.count(tags[2]) != 1 or text.count(tags[3]) != 1 or places[3] < places[2]:
            raise ValueError("not exactly one <answer>...</answer>")
        inside = text[places[2] + len(tags[2]) : places[3]].strip()
        inside = re.sub("^```(json)?", "", inside, flags=re.I).removesuffix("```")
        content = json.loads(
            inside, object_pairs_hook=_object, parse_constant=_number
        )  # NaN is no number
        if not isinstance(content, dict):
            raise ValueError("the answer is not a JSON object")
        box = _box(content.get("bbox"), width, height)
        points = _points(content.get("points"), width, height, max_points)
        answer.box, answer.points, answer.segmentation_format, answer.lenient_box = (
            box,
            points,
            True,
            box,
        )
    except (
        ValueError,
        RecursionError,
    ) as error:  # JSON errors are ValueErrors; deep nesting is a RecursionError
        answer.why = "; ".join(filter(None, [answer.why, str(error) or "nested too deep"]))
    return answer


# ---------------------------------------------------------------------------------------------------- reward


@dataclass
class Reward:
    """The reward of one answer, its terms, and what they were computed from."""

    total: float
    accuracy: float
    answer: Answer
    iou: float  # of SAM's mask; 0 where the answer cannot be read, whatever the truth is
    box_iou: float  # of the answer's box and the tight box of the true mask
    pair: tuple[int, int]  # its intersection and union, pixels
    mask: np.ndarray | None  # bool [H, W]


def accuracy_term(kind: str, mask_iou: float, answer_box_iou: float = 0.0) -> float:
    """Eq. (5), 0 to 4, and what it is compared with; "box-iou" puts the box's IoU through the same tiers."""
    if kind.startswith("threshold:"):
        return 4.0 * (mask_iou > float(kind.split(":")[1]))
    if kind == "iou":
        return 4.0 * mask_iou
    if kind not in ("tiered", "box-iou"):
        raise ValueError(f"no accuracy term is called {kind}")
    value = answer_box_iou if kind == "box-iou" else mask_iou
    return 4.0 if value > 0.8 else 3.0 if value > 0.7 else 2.0 if value > 0.5 else 0.0  # eq. (5)


def to_picture(
    answer_box: tuple, points: list[tuple], sample: Sample, size: int
) -> tuple[tuple, list[tuple]]:
    """An answer's coordinates from the policy's size x size square to the picture's own pixels."""
    sx, sy = sample.image.width / size, sample.image.height / size
    x1, y1, x2, y2 = answer_box
    return (x1 * sx, y1 * sy, x2 * sx, y2 * sy), [(x * sx, y * sy, label) for x, y, label in points]


def score_group(
    segmenter: Segmenter,
    sample: Sample,
    texts: list[str],
    size: int,
    accuracy: str = "tiered",
    weights=(1.0, 1.0, 1.0),
    max_points: int = 8,
    points: bool = True,
    lenient: bool = False,
) -> list[Reward]:
    """Reward G texts that answer one sample, in coordinates of a `size` x `size` square (Policy.coordinate_range).

    `weights` are those of accuracy, reasoning format and segmentation format. Without `points` SAM gets the box alone.
    `lenient` segments with a box found anywhere in the text where there is no proper answer: for evaluation beside the
    strict figure, never for training.
    """
    answers = [parse(text, size, size, max_points) for text in texts]
    boxes = [a.lenient_box if lenient else a.box for a in answers]
    read = [i for i, box in enumerate(boxes) if box is not None]
    prompts = [
        to_picture(boxes[i], answers[i].points if points else [], sample, size) for i in read
    ]
    if (
        sample.box_only
    ):  # no true mask to compare with, so boxes stand for masks and SAM has nothing to do
        masks = {i: filled(box, *sample.mask.shape) for i, (box, _) in zip(read, prompts)}
    else:
        masks = (
            dict(zip(read, segmenter.masks(np.asarray(sample.image), *map(list, zip(*prompts)))))
            if read
            else {}
        )
    prompted, rewards = dict(zip(read, prompts)), []
    for i, answer in enumerate(answers):
        pair = intersection_union(masks.get(i), sample.mask, sample.ignore)
        mask_iou = iou(*pair)
        answer_box_iou = box_iou(prompted[i][0], tight_box(sample.mask)) if i in masks else 0.0
        earned = accuracy_term(accuracy, mask_iou, answer_box_iou)
        terms = (earned, float(answer.reasoning_format), float(answer.segmentation_format))
        total = sum(w * t for w, t in zip(weights, terms, strict=True))
        rewards.append(Reward(total, earned, answer, mask_iou, answer_box_iou, pair, masks.get(i)))
    return rewards
