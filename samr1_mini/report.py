"""Write report.html, a page about a run: `python -m samr1_mini.report RUN`.

The page shows curves, logged steps token by token (trace.py), and held-out questions before and
after training. It is one file, without server or network. Answers are shown as text, never as HTML.
"""

import base64
import hashlib
import html
import io
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco
from scipy.ndimage import binary_dilation

from .columns import COLUMNS, explain
from .config import Parser, Settings, UserError, auto_device, exit_with, print_anything
from .config import read_settings
from .evaluation import judge
from .files import replace_file
from .loading import fetch_sets, open_three
from .policy import COORDINATES, check_policy
from .runs import known_missing, read_log, read_saved, read_test_answers
from .segmenter import load_segmenter
from .trace import SIDE, read_trace, small_rle, small_size, webp

PAGE = Path(__file__).parent / "page"  # page.html with its style and its script
PICTURES = 300  # held-out questions with pictures on the page, at most
TEST_SIDE = 224  # pixels: the longer side of a held-out picture
SHOWN = (
    "preset",
    "seed",
    "policy",
    "sam",
    "data",
    "objects",
    "questions",
    "group",
    "updates",
    "lr",
    "beta",
    "eps_low",
    "eps_high",
    "accuracy",
    "normalise",
    "advantage",
    "max_new_tokens",
    "trace_every",
)

# ----------------------------------------------------------------------------- pictures


def enlarged(mask: np.ndarray) -> np.ndarray:
    """Enlarge a small mask [H, W] by a whole factor. Then an outline of one pixel looks thin."""
    times = max(1, SIDE // max(mask.shape))
    return mask.repeat(times, 0).repeat(times, 1)


def overlay(mask: dict | None, truth: dict) -> str:
    """Return a PNG in base64 that lies over a picture.

    `mask` and `truth` are COCO RLEs of the picture's size. The picture is darker outside the mask.
    The mask has an orange outline. The true mask has a white outline with a black border.
    """
    true = enlarged(coco.decode(truth).astype(bool))
    colours = np.zeros(true.shape, np.uint8)  # indices into the palette
    if mask is not None:
        drawn = enlarged(coco.decode(mask).astype(bool))
        if drawn.any():
            colours[~drawn] = 1
        colours[binary_dilation(drawn, iterations=2) & ~drawn] = 2
    edge = binary_dilation(true) & ~true
    colours[binary_dilation(edge) & ~true] = 3
    colours[edge] = 4
    image = Image.fromarray(colours)
    image.putpalette(
        [0, 0, 0, 0, 0, 0, 0, 110, 245, 158, 11, 255, 0, 0, 0, 255, 255, 255, 255, 255], "RGBA"
    )
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def traced_steps(folder: Path) -> list[dict]:
    """Return the logged steps, with an overlay in place of each mask."""
    steps = read_trace(folder)
    for step in steps:
        for group in step["groups"]:
            truth = group.pop("truth")
            for answer in group["answers"]:
                answer["overlay"] = overlay(answer.pop("mask"), truth)
    return steps


def held_out(test, segmenter, s: Settings, side: int, before: list, after: list) -> list[dict]:
    """Return held-out questions with their answers before and after training.

    `before` and `after` are the contents of test-base.json and test-trained.json. If there are more
    than PICTURES questions, those whose IoU changed most are shown.
    """
    trained = {row["id"]: row for row in after}
    pairs = [(row, trained[row["id"]]) for row in before if row["id"] in trained]
    pairs.sort(key=lambda pair: -abs(pair[1]["iou"] - pair[0]["iou"]))
    places = {name: i for i, name in enumerate(test.ids)}
    found = []
    for rows in pairs[:PICTURES]:
        if rows[0]["id"] not in places:
            continue
        sample = test[places[rows[0]["id"]]]
        scale = min(1, TEST_SIDE / max(sample.image.size))
        size = tuple(max(1, round(n * scale)) for n in sample.image.size)
        entry = {"kind": sample.kind, "question": sample.question, "side": side, "size": size}
        entry["picture"] = webp(sample.image, size)
        truth = small_rle(sample.mask, size)
        for name, row in zip(("before", "after"), rows):
            reward = judge(segmenter, sample, [row["text"]], s, side).reward
            objects = [asdict(one) for one in reward.answer.objects or []]
            entry[name] = {
                "text": row["text"],
                "iou": round(row["iou"], 4),
                "objects": objects,
                "overlay": overlay(small_rle(reward.mask, size), truth),
            }
        found.append(entry)
    return found


# --------------------------------------------------------------------------------- page


def rounded(value) -> float | None:
    """Return a number with five significant digits, or None for a number that JSON cannot hold."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")


def content(folder: Path, s: Settings, questions: list[dict]) -> dict:
    """Return everything that the page shows. `questions` is a list from held_out."""
    log = read_log(folder)
    if not log:
        raise UserError(f"{folder} has no line in metrics.jsonl, so there is nothing to show")
    names = list(dict.fromkeys(name for line in log for name in line))
    terms = names[names.index("reward") + 1 : names.index("zero_variance")]
    weights = s.reward_weights
    return {
        "name": folder.resolve().name,
        "settings": {name: getattr(s, name) for name in SHOWN},
        "terms": {name: weights.get(name, 1.0) for name in terms if name != "iou"},
        "columns": {name: explain(name) for name in [*COLUMNS, *names]},
        "log": {name: [rounded(line.get(name)) for line in log] for name in names},
        "summary": read_saved(folder / "summary.json", dict, None),
        "steps": traced_steps(folder),
        "test": questions,
    }


def page(data: dict) -> str:
    """Return the page as HTML.

    The data are JSON without "<", so no answer can close the <script> block of the data. The
    browser runs only the script whose hash the page names.
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    script = (PAGE / "page.js").read_text(encoding="utf-8")
    parts = {
        "TITLE": html.escape(data["name"]),
        "HASH": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "STYLE": (PAGE / "page.css").read_text(encoding="utf-8"),
        "SCRIPT": script,
        "DATA": text,
    }
    template = (PAGE / "page.html").read_text(encoding="utf-8")
    # All placeholders are filled in one pass. So text that looks like a placeholder stays.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


def write_report(folder: Path, s: Settings, questions: list[dict] = ()) -> Path:
    """Write report.html in the folder of a run. Returns its path."""
    file = folder / "report.html"
    text = page(content(folder, s, list(questions)))
    replace_file(file, lambda part: part.write_text(text, encoding="utf-8"))
    return file


# ------------------------------------------------------------------------------ command


def side_of(s: Settings) -> int:
    """Return the length of a side of the square in which answers give coordinates."""
    unit = s.coordinates
    if unit == "auto":
        unit = COORDINATES[check_policy(s.policy).model_type]
    return 1000 if unit == "thousandths" else s.image_size


def questions_of(folder: Path, s: Settings) -> list[dict]:
    """Load the test questions and SAM again, and return the held-out questions of a finished run."""
    before = read_test_answers(folder)
    after = read_saved(folder / "test-trained.json", list, [])
    if not before or not after:
        return []
    sets = open_three(s)
    fetch_sets(s, sets, known_missing(folder))
    segmenter = load_segmenter(s.sam, s.sam_checkpoint, s.device, s.sam_dtype)
    return held_out(sets[2], segmenter, s, side_of(s), before, after)


def main(argv: list[str] | None = None) -> None:
    print_anything()
    parser = Parser(prog="report.py", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    without = "leave out the held-out questions, which need the data set and SAM"
    parser.add_argument("--without-test", action="store_true", help=without)
    args = parser.parse(argv)
    if not (args.run / "settings.json").is_file():
        parser.error(f"{args.run} holds no run")
    try:
        s = Settings(**read_settings(args.run / "settings.json"))
        s = replace(s, device=auto_device())  # perhaps the run was made on another machine
        questions = [] if args.without_test else questions_of(args.run, s)
        file = write_report(args.run, s, questions)
    except (UserError, OSError) as error:
        exit_with(error, "report.py")
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
