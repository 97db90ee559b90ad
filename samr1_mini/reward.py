"""The reward: text -> boxes and points -> SAM's mask -> IoU with the true mask -> named terms.

    reward = accuracy (0, 2, 3 or 4) + reasoning_format (0 or 1) + segmentation_format (0 or 1)

An answer is a list of objects. With the option --objects one, the list has one object, as in the
paper. With --objects several, the answer's mask is the union of the objects' masks. Then there are
two more terms: see matching_term (0 to 1) and repeats_term (-1 to 0).

No network is trained here. In the paper's setting, the box itself gets no reward. Segment
Anything draws a mask from the box and the points. This mask gets the reward.

Coordinates of an answer go from 0 to `side`. For answers in pixels, `side` is the size of the
policy's scaled picture. For answers in thousandths, `side` is 1,000. SAM and the true mask use the
original size of the picture, [H, W].

A new term is one line in `reward_terms` and one setting NAME_weight in config.py. The log and the
curves then show the term.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from .columns import COLUMNS
from .config import Settings, UserError
from .data import Sample
from .metrics import box_iou, filled, hull, intersection_union, iou, matched_iou
from .metrics import repeated_share, tight_box
from .segmenter import Segmenter

MAX_TEXT = 20_000  # characters. A longer text is not read
MAX_OBJECTS = 16  # with --objects several. A longer list is not read

Box = tuple[float, float, float, float]  # x1, y1, x2, y2
Point = tuple[float, float, int]  # x, y, label: 1 if it is on the object, 0 if not

# ------------------------------------------------------------------------- from text to an answer


@dataclass
class Object:
    """Hold the box and the points of one object. SAM gets both as its input."""

    box: Box
    points: list[Point] = field(default_factory=list)


@dataclass
class Answer:
    """Hold one parsed answer.

    `objects` is None if the segmentation format is wrong. (lenient.py fills it for more notations.)
    An empty list says that nothing is there.
    """

    side: int  # coordinates of boxes and points go from 0 to this
    objects: list[Object] | None = None
    reasoning_format: bool = False
    segmentation_format: bool = False
    why: str = ""  # what is wrong with the format, in words
    tokens: torch.Tensor | None = None  # [L] ids of the answer's tokens, for reward terms

    @property
    def in_format(self) -> bool:
        """True if both formats are right."""
        return self.reasoning_format and self.segmentation_format


def _number(value) -> float:
    """Return a JSON number as a float. Raises ValueError for true, "3", NaN and from 1e9 on."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
        raise ValueError(f"{str(value)[:20]!r} is not a number")
    return float(value)


def _names_once(pairs: list[tuple[str, object]]) -> dict:
    """Return a dict. Raises ValueError for a repeated key, because a dict drops a value."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name comes twice in an object")
    return content


def _clip(value: float, limit: float) -> float:
    """Move a coordinate into 0 ... limit."""
    return min(max(value, 0.0), limit)


def read_box(value, side: int) -> Box:
    """Return four numbers, clipped to 0 ... side. Raises ValueError for a box without an area."""
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        raise ValueError("bbox is not a list of four numbers")
    x1, y1, x2, y2 = [_clip(_number(number), side) for number in value]
    if x2 - x1 < 1e-3 or y2 - y1 < 1e-3:
        raise ValueError("bbox is reversed, empty or outside the picture")
    # If all numbers are at most 1, they are shares of width and height. Then the box is refused.
    if x2 <= 1 and y2 <= 1:
        raise ValueError("bbox gives shares of width and height: all four numbers are at most 1")
    return x1, y1, x2, y2


def _points(value, side: int, max_points: int) -> list[Point]:
    """Return the points of a list [[x, y, 0 or 1], ...], with x and y clipped to 0 ... side - 1."""
    if not isinstance(value, list) or not value:
        raise ValueError("points is not a list of [x, y, label]")
    if len(value) > max_points:  # without a limit, the policy learns to write more and more
        raise ValueError(f"{len(value)} points, at most {max_points} are allowed")
    points = []
    for point in value:
        if not isinstance(point, list) or len(point) != 3:
            raise ValueError("a point is not [x, y, label]")
        x, y, label = map(_number, point)
        if label not in (0, 1):
            raise ValueError(f"label {label:g} is neither 0 nor 1")
        points.append((_clip(x, side - 1), _clip(y, side - 1), int(label)))
    return points


_WHOLE = re.compile(r"<think>.*</think>\s*<answer>.*</answer>", re.S)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def has_reasoning_format(text: str) -> bool:
    """Return True if the text is <think>...</think><answer>...</answer>, each tag once."""
    for tag in _TAGS:
        if text.count(tag) != 1:
            return False
    return _WHOLE.fullmatch(text) is not None


def read_objects(content, side: int, max_points: int, objects: str) -> list[Object]:
    """Return the objects of an answer's JSON. Raises ValueError if the JSON has another form.

    If `objects` is "one", the JSON describes one object. If it is "several", the JSON is a list.
    """
    wrong = "the answer is not a JSON list of objects"
    if objects == "one":
        wrong = "the answer is not a JSON object"
        content = [content]
    if not isinstance(content, list) or not all(isinstance(one, dict) for one in content):
        raise ValueError(wrong)
    if len(content) > MAX_OBJECTS:
        raise ValueError(f"{len(content)} objects, at most {MAX_OBJECTS} are allowed")
    found = []
    for one in content:
        box = read_box(one.get("bbox"), side)
        found.append(Object(box, _points(one.get("points"), side, max_points)))
    return found


def parse_answer(text: str, side: int, max_points: int, objects: str = "one") -> list[Object]:
    """Return the objects from the JSON between the answer tags.

    Raises ValueError (also for broken JSON), or RecursionError for deep nesting.
    """
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        raise ValueError("not exactly one <answer>...</answer>")
    inside, closed, _ = text.partition("<answer>")[2].partition("</answer>")
    if not closed:
        raise ValueError("</answer> stands before <answer>")
    inside = re.sub("^```(json)?", "", inside.strip(), flags=re.I).removesuffix("```")
    # json.loads accepts NaN and Infinity. For these words it calls parse_constant, which raises.
    content = json.loads(inside, object_pairs_hook=_names_once, parse_constant=_number)
    return read_objects(content, side, max_points, objects)


def read_answer(
    text: str,
    side: int,
    max_points: int = 8,
    tokens: torch.Tensor | None = None,
    objects: str = "one",
) -> Answer:
    """Read an answer with coordinates in a `side` x `side` square.

    `objects` is the setting, "one" or "several". The function never raises an error. Its time is
    linear in the length of the text. The answer's field `why` names the faults.

    >>> text = '<think>Left.</think><answer>{"bbox": [1, 2, 9, 8], "points": [[5, 5, 1]]}</answer>'
    >>> read_answer(text, 28).objects
    [Object(box=(1.0, 2.0, 9.0, 8.0), points=[(5.0, 5.0, 1)])]
    """
    answer = Answer(side, tokens=tokens)
    text = text.strip()
    if len(text) > MAX_TEXT:
        answer.why = f"longer than {MAX_TEXT} characters"
        return answer
    faults = []
    answer.reasoning_format = has_reasoning_format(text)
    if not answer.reasoning_format:
        faults.append("not <think>...</think><answer>...</answer>")
    try:
        answer.objects = parse_answer(text, side, max_points, objects)
        answer.segmentation_format = True
    except (ValueError, RecursionError) as error:
        faults.append(str(error) or "nested too deep")
    answer.why = "; ".join(faults)
    return answer


# ----------------------------------------------------------------------- from answers to rewards


@dataclass
class Reward:
    """One answer, the mask that SAM draws from it, and its reward.

    `objects` and `mask` are in the picture's own pixels. `answer` keeps the policy's coordinates.
    """

    sample: Sample
    answer: Answer
    objects: list[Object] = field(default_factory=list)
    # bool [H, W], the union of the objects' masks. None if the answer cannot be read. With
    # --objects several, also None if there are objects, but all their masks are empty.
    mask: np.ndarray | None = None
    pixels: tuple[int, int] = (0, 0)  # in the intersection and in the union with the true mask
    iou: float = 0.0  # of mask and true mask; 0 if `mask` is None
    box_iou: float = 0.0  # between the box around all objects and the tight box of the true mask
    terms: dict[str, float] = field(default_factory=dict)
    total: float = 0.0  # the reward: the weighted sum of the terms


TIERS = ((0.8, 4.0), (0.7, 3.0), (0.5, 2.0))  # limit, and reward of an IoU above it


def tiered(value: float) -> float:
    """Return the reward for an IoU, eq. (5) of the paper: 0, 2, 3 or 4."""
    # (5)  4 if IoU > 0.8, 3 if IoU > 0.7, 2 if IoU > 0.5, else 0
    for limit, reward in TIERS:
        if value > limit:
            return reward
    return 0.0


def accuracy_term(kind: str, mask_iou: float, answer_box_iou: float = 0.0) -> float:
    """Return the accuracy term, 0 to 4: eq. (5), or a variant of the ablations."""
    if kind == "tiered":
        return tiered(mask_iou)
    if kind == "box-iou":
        return tiered(answer_box_iou)
    if kind == "iou":
        return 4.0 * mask_iou
    if kind.startswith("threshold:"):
        limit = float(kind.removeprefix("threshold:"))
        return 4.0 if mask_iou > limit else 0.0
    raise ValueError(f"no accuracy term is called {kind}; see --accuracy in python train.py --help")


def matching_term(reward: Reward) -> float:
    """Return the mean IoU, 0 to 1, of pairs of an answer's box and a true box.

    Each box is in at most one pair. A missing or an extra box counts as 0. The term is 0 if the
    answer cannot be read, or if the data set has no mask for each single object.
    """
    true_masks = reward.sample.masks
    if reward.answer.objects is None or true_masks is None:
        return 0.0
    boxes = [one.box for one in reward.objects]
    return matched_iou(boxes, [tight_box(mask) for mask in true_masks])


def repeats_term(reward: Reward) -> float:
    """Return minus the share of boxes that repeat an earlier box, -1 to 0.

    A box repeats an earlier one if their IoU is above 0.5. This hardly changes the union of SAM's
    masks, so the accuracy term does not notice the repetition.
    """
    return 0.0 - repeated_share([one.box for one in reward.objects])


def reward_terms(reward: Reward, s: Settings) -> dict[str, float]:
    """Return the terms of one reward by name. The setting NAME_weight is the weight of a term.

    A term may use everything in `reward`. Examples are the true mask, the answer's tokens, SAM's
    mask, and boxes and points in the picture's pixels.
    """
    terms = {
        "accuracy": accuracy_term(s.accuracy, reward.iou, reward.box_iou),
        "reasoning_format": float(reward.answer.reasoning_format),
        "segmentation_format": float(reward.answer.segmentation_format),
    }
    if s.objects == "several":
        terms["matching"] = matching_term(reward)
        terms["repeats"] = repeats_term(reward)
    return terms


def no_terms(reward: Reward, s: Settings) -> dict[str, float]:
    """Return no terms. Evaluations need masks and IoUs alone."""
    return {}


def to_picture(answer: Answer, sample: Sample) -> list[Object]:
    """Scale boxes and points of an answer to the picture's own pixels."""
    sx = sample.image.width / answer.side
    sy = sample.image.height / answer.side
    objects = []
    for one in answer.objects:
        x1, y1, x2, y2 = one.box
        points = [(x * sx, y * sy, label) for x, y, label in one.points]
        objects.append(Object((x1 * sx, y1 * sy, x2 * sx, y2 * sy), points))
    return objects


def object_masks(segmenter: Segmenter, sample: Sample, objects: list[Object]) -> np.ndarray:
    """Return the mask of each object, bool [n, H, W], with one pass of SAM's encoder.

    If the data set has true boxes but no masks, the mask of an object is its filled box.
    """
    if not objects:
        return np.zeros((0, *sample.mask.shape), bool)
    boxes = [one.box for one in objects]
    if sample.box_only:
        return np.stack([filled(box, *sample.mask.shape) for box in boxes])
    points = [one.points for one in objects]
    masks = np.asarray(segmenter.masks(np.asarray(sample.image), boxes, points))
    if masks.dtype != bool or masks.shape != (len(boxes), *sample.mask.shape):
        raise TypeError(
            f"the segmenter gave masks {masks.dtype} {list(masks.shape)} for {len(boxes)} boxes, "
            f"and must give bool {[len(boxes), *sample.mask.shape]}"
        )
    return masks


def draw_masks(segmenter: Segmenter, sample: Sample, rewards: list[Reward]) -> None:
    """Set the mask of each reward: the union of the masks of its objects."""
    objects = [one for reward in rewards for one in reward.objects]
    masks = object_masks(segmenter, sample, objects)  # [n, H, W]
    start = 0  # index of the reward's first object
    for reward in rewards:
        end = start + len(reward.objects)
        reward.mask = masks[start:end].any(0)  # all False without objects
        start = end


def check_terms(rewards: list[Reward]) -> None:
    """Raise UserError unless all answers of a step have the same terms, with finite values.

    A term becomes a column of the log. So it must not have the name of another column, and its name
    must not end in _min or _max: processes.average treats these in another way.
    """
    names = rewards[0].terms.keys()
    for name in names - {"accuracy", "reasoning_format", "segmentation_format"}:
        if name in COLUMNS or name.endswith(("_min", "_max")):
            raise UserError(f"rename the reward term {name!r}: the log uses this name or ending")
    for reward in rewards:
        for name in names ^ reward.terms.keys():
            raise UserError(
                f"the reward term {name!r} is missing for some answers: give it a value for each, "
                "such as 0.0"
            )
        for name, value in reward.terms.items():
            if not math.isfinite(value):
                raise UserError(f"the reward term {name!r} is {value}, but must be a finite number")


def score_group(
    segmenter: Segmenter,
    sample: Sample,
    answers: list[Answer],
    s: Settings = Settings(),
    terms: Callable[[Reward, Settings], dict[str, float]] = reward_terms,
) -> list[Reward]:
    """Compute the rewards of the G answers to one question.

    `segmenter` is any object with the method `masks` of Segmenter. Raises TypeError if
    `answers` is no list of Answer objects.
    """
    if not all(isinstance(answer, Answer) for answer in answers):
        raise TypeError("score_group takes a list of Answer objects: use read_answer(text, side)")
    rewards = [Reward(sample, answer) for answer in answers]
    readable = [reward for reward in rewards if reward.answer.objects is not None]
    true_box = tight_box(sample.mask)
    for reward in readable:
        reward.objects = to_picture(reward.answer, sample)
        if not s.points:
            reward.objects = [Object(one.box) for one in reward.objects]
        reward.box_iou = box_iou(hull([one.box for one in reward.objects]), true_box)
    draw_masks(segmenter, sample, readable)
    for reward in rewards:
        if s.objects == "several" and reward.objects and not reward.mask.any():
            # Where nothing is to be found, an empty mask has IoU 1. Only the answer [] may get it.
            reward.mask = None
        reward.pixels = intersection_union(reward.mask, sample.mask, sample.ignore)
        reward.iou = iou(*reward.pixels)
        reward.terms = {name: float(value) for name, value in terms(reward, s).items()}
        reward.total = sum(s.reward_weights.get(k, 1.0) * v for k, v in reward.terms.items())
    return rewards
