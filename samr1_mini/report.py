"""Write report.html, a page about a run: `python -m samr1_mini.report RUN`.

The page shows curves, logged steps token by token (trace.py), and held-out questions before and
after training. It is one file, without server or network. Answers are shown as text, never as HTML.
"""

import base64
import hashlib
import html
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco
from scipy.ndimage import binary_dilation

from .columns import COLUMNS, explain, reward_columns
from .config import Parser, Settings, UserError, auto_device, cause, exit_with, print_anything
from .config import read_settings
from .evaluation import judge
from .files import save_text
from .loading import open_split
from .policy import COORDINATES, check_policy
from .runs import begun_functions, known_missing, read_log, read_saved, read_test_answers
from .segmenter import load_segmenter
from .trace import SIDE, described_answer, described_sample, read_trace

PAGE = Path(__file__).parent / "page"  # page.html with its style and its script
TEST_BYTES = 3_500_000  # bytes of held-out pictures on the page, at most
TEST_SIDE = 224  # pixels: the longer side of a held-out picture
SHOWN = (  # the settings that the page uses
    "seed",
    "policy",
    "sam",
    "data",
    "eval_data",
    "questions",
    "group",
    "updates",
    "lr",
    "beta",
    "eps_low",
    "eps_high",
    "accuracy",
    "advantage",
)

# ----------------------------------------------------------------------------- pictures


def enlarged(rle: dict) -> np.ndarray:
    """Decode a small mask and enlarge it by a whole factor, so that outlines look thin."""
    mask = coco.decode(rle).astype(bool)  # [H, W]
    times = max(1, SIDE // max(mask.shape))
    return mask.repeat(times, 0).repeat(times, 1)


def overlay(mask: dict | None, truth: dict) -> str:
    """Return a PNG in base64 that lies over a picture.

    `mask` and `truth` are COCO RLEs of the picture's size. The picture is darker outside the mask.
    The mask has an orange outline. The true mask has a white outline with a black border.
    """
    true = enlarged(truth)
    colours = np.zeros(true.shape, np.uint8)  # indices into the palette
    if mask is not None:
        drawn = enlarged(mask)
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


def pair_rows(before: list[dict], after: list[dict]) -> list[tuple[dict, dict]]:
    """Return the rows of the same questions before and after training.

    An id may come twice. Rows of older runs have no question.
    """
    trained = {}
    for row in after:
        trained[row["id"], None] = row
        trained[row["id"], row.get("question")] = row
    pairs = []
    for row in before:
        key = row["id"], row.get("question")
        if key in trained:
            pairs.append((row, trained[key]))
    return pairs


def sample_of(test, ids: list[str], row: dict):
    """Return the sample of a row, or None if it has changed since the run. An id may come twice.

    `ids` are those of all samples of `test`.
    """
    asked = row.get("question")  # older runs lack it
    for i, name in enumerate(ids):
        if name != row["id"]:
            continue
        sample = test[i]
        if asked in (None, sample.question):
            return sample
    return None


def held_out(test, segmenter, s: Settings, side: int, before: list, after: list) -> dict:
    """Return "scores" of all held-out questions, and "questions" with pictures and both answers.

    `before` and `after` are the contents of test-base.json and test-trained.json. Each score
    has three values: the kind, and the lenient IoU before and after training. The questions with
    pictures are those whose IoU changed most, as many as TEST_BYTES allows. Questions that have
    changed since the run have no picture.
    """
    pairs = pair_rows(before, after)
    scores = [[a["kind"], round(a["iou"], 4), round(b["iou"], 4)] for a, b in pairs]
    pairs.sort(key=lambda pair: -abs(pair[1]["iou"] - pair[0]["iou"]))
    ids = list(test.ids)
    found = []
    length = 0
    for rows in pairs:
        sample = sample_of(test, ids, rows[0])
        if sample is None:
            continue
        entry = described_sample(sample, side, TEST_SIDE, 75)
        truth = entry.pop("truth")
        for name, row in zip(("before", "after"), rows):
            reward = judge(segmenter, sample, [row["text"]], s, side).reward
            answer = described_answer(reward, entry["size"])
            entry[name] = {
                "text": row["text"],
                "iou": round(row["iou"], 4),
                "objects": answer["objects"],
                "overlay": overlay(answer["mask"], truth),
            }
        length += len(json.dumps(entry))
        if length > TEST_BYTES:
            break
        found.append(entry)
    return {"scores": scores, "questions": found}


# --------------------------------------------------------------------------------- page


NO_TEST = {"scores": [], "questions": []}


def rounded(value) -> float | None:
    """Return a number with five significant digits, or None for any other value."""
    if not isinstance(value, (int, float)):
        return None
    return float(f"{value:.5g}")


def content(folder: Path, test: dict) -> dict:
    """Return everything that the page shows. `test` is the result of held_out.

    Raises UserError for a run without a finished step.
    """
    s = Settings(**read_settings(folder / "settings.json"))
    log = read_log(folder)
    if not log:
        raise UserError(
            f"{folder} has no finished step yet (metrics.jsonl), so there is nothing to show"
        )
    last = log[-1]["step"]
    summary = read_saved(folder / "summary.json", dict, None)
    if summary and summary.get("samples", 0) < last * s.questions:
        summary, test = None, NO_TEST  # the run was continued after this summary
    names = list(dict.fromkeys(name for line in log for name in line))
    weights = s.reward_weights
    lines = [
        {"skipped_updates": 0} | line for line in log
    ]  # steps without skipped updates do not log this number
    return {
        "name": folder.resolve().name,
        "settings": {name: getattr(s, name) for name in SHOWN},
        "terms": {name: weights.get(name, 1.0) for name in reward_columns(names)},
        "columns": {name: explain(name) for name in [*COLUMNS, *names]},
        "log": {name: [rounded(line.get(name)) for line in lines] for name in names},
        "summary": summary,
        "steps": [step for step in traced_steps(folder) if step["step"] <= last],
        "test": test,
    }


def page(data: dict) -> str:
    """Return the page as HTML.

    The data are JSON without "<", so no answer can close the <script> block of the data. The
    browser runs only the script whose hash the page names.
    """
    # JSON has no NaN and no infinity: json.loads replaces the words that Python writes for them.
    finite = json.loads(json.dumps(data), parse_constant=lambda word: None)
    text = json.dumps(finite, separators=(",", ":"))
    text = text.replace("<", "\\u003c")
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


def write_report(folder: Path, test: dict = NO_TEST) -> Path:
    """Write report.html in the folder of a run. Returns its path."""
    file = folder / "report.html"
    save_text(file, page(content(folder, test)))
    return file


def try_report(folder: Path, make_test: Callable[[], dict] = NO_TEST.copy) -> None:
    """Write report.html with the result of `make_test`. Print an error instead of raising it.

    The page is an extra. So an error of the page must not change how a run ends.
    """
    try:
        write_report(folder, make_test())
    except Exception as error:
        print(f"report.html is not written: {cause(error)}", flush=True)


# ------------------------------------------------------------------------------ command


def side_of(s: Settings) -> int:
    """Return the length of a side of the square in which answers give coordinates."""
    unit = s.coordinates
    if unit == "auto":
        unit = COORDINATES[check_policy(s.policy).model_type]
    return 1000 if unit == "thousandths" else s.image_size


def test_of(folder: Path, s: Settings) -> dict:
    """Load the test set and SAM again, and return the held-out questions of a finished run."""
    if any(name.startswith("own ") for name in begun_functions(folder)[:2]):
        raise UserError(
            "this run used a data set or a segmenter of your own code, which this command cannot "
            "load. To write the page without test questions, add --without-test"
        )
    before = read_test_answers(folder)
    after = read_saved(folder / "test-trained.json", list, [])
    if not before or not after:
        return NO_TEST
    test = open_split(s, s.eval_data or s.data, "test", s.test_samples, s.seed)
    test.download(known_missing(folder)[2])
    segmenter = load_segmenter(s.sam, s.sam_checkpoint, s.device, s.sam_dtype)
    return held_out(test, segmenter, s, side_of(s), before, after)


def main(argv: list[str] | None = None) -> None:
    print_anything()
    parser = Parser(prog="report.py", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    without = "do not show the test questions. They need the data set and SAM"
    parser.add_argument("--without-test", action="store_true", help=without)
    args = parser.parse(argv)
    if not (args.run / "settings.json").is_file():
        parser.error(f"{args.run} holds no run. Name the folder of a run")
    try:
        s = Settings(**read_settings(args.run / "settings.json"))
        s = replace(s, device=auto_device())  # perhaps the run was made on another machine
        test = NO_TEST if args.without_test else test_of(args.run, s)
        file = write_report(args.run, test)
    except (UserError, OSError) as error:
        exit_with(error, "report.py")
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
