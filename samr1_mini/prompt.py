"""The prompt: the text that the policy reads beside the picture."""

import re
from pathlib import Path

from .config import Settings, UserError, first_line

PROMPT = """Compare the objects in the picture and find the one that the question means. \
Think inside <think> </think>, then give the final answer inside <answer> </answer> as JSON: \
one box that tightly holds the object, and points in the box, each labelled 1 on the object \
and 0 off it, all in {unit}. Example:
<think>The left cup is nearer to the plate.</think>\
<answer>{"bbox": [12, 30, 58, 94], "points": [[33, 60, 1], [16, 88, 0]]}</answer>
Question: {question}"""

# The prompt for --objects several
SEVERAL_PROMPT = """Compare the objects in the picture and find all objects that the question \
means. Think inside <think> </think>, then give the final answer inside <answer> </answer> as a \
JSON list: for each object, one box that tightly holds the object, and points in the box, each \
labelled 1 on the object and 0 off it, all in {unit}. Give an empty list [] if nothing fits. \
Example:
<think>Two cups stand on the table.</think>\
<answer>[{"bbox": [12, 30, 58, 94], "points": [[33, 60, 1], [16, 88, 0]]}, \
{"bbox": [70, 28, 104, 90], "points": [[85, 60, 1]]}]</answer>
Question: {question}"""


def load_prompt(name: str) -> str:
    """Return the text of a file for --prompt-file.

    Raises UserError if the file cannot be read, does not contain {question}, or contains a special
    token.
    """
    try:
        text = Path(name).read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise UserError(f"--prompt-file {name}: save the file in UTF-8") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--prompt-file {name}: {first_line(error)}") from None
    special = re.search(r"<\|\w+\|>", text)
    if special:
        raise UserError(
            f"--prompt-file {name}: remove {special[0]}. The chat template of the policy adds its "
            "special tokens itself"
        )
    if "{question}" not in text:
        raise UserError(f"--prompt-file {name}: write {{question}} where the question must stand")
    return text


def choose_prompt(s: Settings) -> str:
    """Return the prompt of --prompt-file, or else the prompt for --objects."""
    if s.prompt_file:
        return load_prompt(s.prompt_file)
    if s.objects == "several":
        return SEVERAL_PROMPT
    return PROMPT


def instruction(
    question: str, width: int, height: int, coordinates: str = "pixels", prompt: str = PROMPT
) -> str:
    """Return the user's text of one question about a width x height picture.

    `coordinates` is the unit of the answer: pixels, or thousandths of the picture's sides.
    """
    unit = "thousandths of the picture's width and height"
    if coordinates == "pixels":
        unit = f"pixels of the {width} x {height} picture"
    return prompt.replace("{unit}", unit).replace("{question}", question.strip())
