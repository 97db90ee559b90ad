"""Find boxes in any common notation, for the lenient score of an evaluation.

Training never uses this file. Its rewards need the exact format (reward.py).
"""

import re
from dataclasses import replace

from .reward import MAX_OBJECTS, MAX_TEXT, Answer, Box, Object, read_box, read_answer

# Lenient reading accepts a box in any common notation. It first splits a text into numbers, words
# and signs, with a blank between them. So line breaks and quotes do not matter. No pattern reads
# any part of the text more than a few times. So the time is linear in the length of the text.
_TOKEN = re.compile(r"""-?\d+(?:\.\d+)?(?!\w)|\w+|[^\s"'\w]""")
_NUMBER = r"(-?\d+(?:\.\d+)?)"
_NUMBERS = r"[-\d.,()\[\]{ ]*"  # a sequence of numbers, brackets and commas
# <box>10 20 30 40</box>, <box>(10, 20), (30, 40)</box>, <|box_start|>(10,20),(30,40)<|box_end|>
_TAG = re.compile(rf"< (?:\| )?\w{{0,20}}box\w{{0,20}} (?:\| )?>({_NUMBERS})(?=<)", re.I)
# {"x1": 10, "y1": 20, "x2": 30, "y2": 40} in any order, and with other names of the sides. The
# model Molmo writes points as <points x1="10" ...>. They are no box.
_SIDE = rf"(?<!\S)([xy]_?(?:[12]|min|max)|left|top|right|bottom) [:=] {_NUMBER}"
_FOUR_SIDES = " [,;]? ?".join([_SIDE] * 4)
_SIDES = re.compile(rf"(?<!point )(?<!points )(?:\{{ )?{_FOUR_SIDES}(?: \}})?", re.I)
_PLACES = {"x1": 0, "xmin": 0, "left": 0, "y1": 1, "ymin": 1, "top": 1}
_PLACES |= {"x2": 2, "xmax": 2, "right": 2, "y2": 3, "ymax": 3, "bottom": 3}
# _POINTS: values of a key or a tag for points, such as "point_2d".
# _NAMED: values of a key for a box, such as "bbox_2d".
_POINTS = re.compile(rf"(?<!/ )point(?!_end)\w{{0,20}} (?:\| )?[:=>] {_NUMBERS}", re.I)
_NAMED = re.compile(rf"box\w{{0,20}} [:=] {_NUMBERS}", re.I)
# [10, 20, 30, 40] in brackets of either kind, or (10, 20), (30, 40). Two points inside a list are
# no box. Three or more points are no box either.
_FOUR = re.compile(
    r"[\[(] " + " , ".join([_NUMBER] * 4) + r" [\])]"
    rf"|(?<!\[ )(?<!\) , )\( {_NUMBER} , {_NUMBER} \) , \( {_NUMBER} , {_NUMBER} \)(?! , \()"
)


def _tag_as_key(match: re.Match) -> str:
    """Turn a tag with four numbers into a key "box" with a list. Other tags do not change."""
    numbers = re.findall(_NUMBER, match[1])
    if len(numbers) != 4:
        return match[0]
    return f"box : [ {' , '.join(numbers)} ] "


def _sides_as_list(match: re.Match) -> str:
    """Turn four named sides into [ x1 , y1 , x2 , y2 ]. If a side is repeated, return the text."""
    names = match.groups()[::2]
    numbers = match.groups()[1::2]
    sides = {}
    for name, number in zip(names, numbers):
        place = _PLACES[name.lower().replace("_", "")]
        sides[place] = number
    if len(sides) != 4:
        return match[0]
    return f"[ {sides[0]} , {sides[1]} , {sides[2]} , {sides[3]} ]"


def _boxes(spaced: str, side: int) -> list[Box]:
    """Return all valid boxes among the places with four numbers in brackets."""
    boxes = []
    for match in _FOUR.finditer(spaced):
        numbers = [float(number) for number in match.groups() if number is not None]
        try:
            boxes.append(read_box(numbers, side))
        except ValueError:
            continue
    return boxes


def lenient_boxes(text: str, side: int) -> list[Box]:
    """Find boxes in any common notation.

    Reads the text after <answer> first, then the whole text. The tag </answer> may be missing.
    Prefers boxes with a key or a tag that contains "box". Otherwise takes all boxes.
    """
    answer = text.rpartition("<answer>")[2].partition("</answer>")[0]
    for part in (answer, text):
        spaced = _TAG.sub(_tag_as_key, " ".join(_TOKEN.findall(part)))
        spaced = _SIDES.sub(_sides_as_list, spaced)
        spaced = _POINTS.sub("; ", spaced)  # never a box
        named = " ; ".join(_NAMED.findall(spaced))
        boxes = _boxes(named, side) or _boxes(spaced, side)
        if boxes:
            return boxes
    return []


def says_nothing(text: str) -> bool:
    """Return True if the text after the thinking, or after <answer>, is only an empty list []."""
    answer = text.rpartition("</think>")[2].rpartition("<answer>")[2].partition("</answer>")[0]
    return re.sub(r"\s|```(json)?", "", answer) == "[]"


def read_leniently(text: str, side: int, max_points: int = 8, objects: str = "one") -> Answer:
    """Read an answer as read_answer does. If it cannot be read, take boxes in any notation.

    With `objects` "one" the last box counts. With "several" all boxes count, and a plain [] means
    that nothing is there.
    """
    answer = read_answer(text, side, max_points, objects=objects)
    if answer.objects is not None or len(text.strip()) > MAX_TEXT:
        return answer
    if objects == "several" and says_nothing(text):
        return replace(answer, objects=[])
    boxes = lenient_boxes(text.strip(), side)
    if objects == "one":
        boxes = boxes[-1:]
    if not 1 <= len(boxes) <= MAX_OBJECTS:
        return answer
    return replace(answer, objects=[Object(box) for box in boxes])
