"""Evaluate the base policy or an adapter: on a data set (`python eval.py --adapter runs/NAME/adapter`), or on one picture
(`python eval.py --image photo.jpg --question "the red star"`)."""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from samr1_mini.config import (
    Parser,
    UserError,
    add_options,
    check,
    exit_with,
    make_settings,
)

USED = {"preset", "device", "policy", "load_in", "sam", "sam_checkpoint", "data", "coco_dir", "sentences", "ignore", "empty_truth", "image_size",
        "coordinates", "max_new_tokens", "max_points", "points", "eval_batch"}


def parse(argv: list[str] | None):
    """Command line -> (settings, the options of eval.py alone, a line to print)."""
    parser = Parser(prog="eval.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--adapter", help="folder of a trained adapter; its run's settings are used. Without it the base is evaluated")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"), help="split of the data set (default test)")
    parser.add_argument("--count", type=int, default=600, help="how many questions of it (default 600)")
    parser.add_argument("--blank", action="store_true", help="show the policy a grey picture: what is left of the score is guessing")
    parser.add_argument("--votes", type=int, default=1,
                        help="answers a question, drawn at temperature 1, that vote on a mask (default 1: one, greedy)")
    parser.add_argument("--image", help="answer about this one picture instead of a data set")
    parser.add_argument("--question", help="what to find in that picture")
    parser.add_argument("--merge", help="write base and adapter merged, in bf16, as a model folder of this name, and evaluate nothing")
    parser.add_argument("--out", default="eval", help="folder for results.json and the pictures (default eval)")
    add_options(parser, USED)
    given = vars(parser.parse(argv))
    names = ("adapter", "split", "count", "votes", "blank", "image", "question", "merge", "out")
    own = {name: given.pop(name) for name in names}
    if (own["image"] is None) != (own["question"] is None):
        parser.error("--image and --question go together")
    if own["merge"] is not None and (own["adapter"] is None or Path(own["merge"]).exists()):
        parser.error("--merge needs --adapter" if own["adapter"] is None else f"--merge {own['merge']}: this is there already")
    for name in ("count", "votes"):
        if own[name] < 1:
            parser.error(f"--{name} must be at least 1, not {own[name]}")
    if own["adapter"] is not None:
        if not (Path(own["adapter"]) / "adapter_config.json").is_file():
            parser.error(f"--adapter {own['adapter']}: no adapter_config.json there")
        beside = Path(own["adapter"]).resolve().parent / "settings.json"
        if beside.is_file():
            given = {k: v for k, v in json.loads(beside.read_text()).items() if k in USED - {"device"}} | given
    settings, line = make_settings(**given)
    if own["adapter"] is not None:
        line = f"adapter {own['adapter']} on policy {settings.policy}, {settings.load_in}, SAM {settings.sam}"
    try:
        check(settings)
    except UserError as error:
        parser.error(str(error))
    return settings, own, line


def open_input(settings, own: dict):
    """What is asked about, opened before a model is loaded: the data set, or the one picture."""
    import numpy as np

    from samr1_mini.data import Sample, open_data, open_picture

    try:
        Path(own["out"]).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=own["out"]).close()
    except OSError as error:
        raise UserError(f"--out {own['out']}: nothing can be written there ({error.strerror})") from None
    if own["image"] is None:
        choices = {name: getattr(settings, name) for name in ("sentences", "coco_dir", "ignore")}
        return open_data(settings.data, own["split"], own["count"], **choices)
    try:
        image = open_picture(own["image"])
    except (OSError, ValueError) as error:  # no picture, cut off, or far too large
        raise UserError(f"--image {own['image']}: {error}") from None
    unknown = np.zeros((image.height, image.width), bool)  # no truth is known
    return [Sample(image, own["question"], unknown, own["image"])]


def evaluate_set(policy, segmenter, data, settings, own: dict) -> None:
    """A data set -> a table, results.json, and a sheet of the best, the middling and the worst answers."""
    from accelerate import PartialState

    from samr1_mini.evaluation import batch_size, evaluate, shown
    from samr1_mini.plots import sample_sheet

    out, first = Path(own["out"]), PartialState().is_main_process
    report = evaluate(policy, segmenter, data, settings, own["split"] * first, own["blank"], votes=own["votes"])
    if not first:
        return
    summary = report.summary()
    print(f"{'':<12}{'count':>6}{'gIoU':>8}{'lenient':>9}{'cIoU':>8}{'format':>8}")
    for name, x in [("all", summary), *summary["by_kind"].items()]:
        print(f"{name or 'no kind':<12}{x['count']:>6}{x['gIoU']:>8.3f}{x['gIoU_lenient']:>9.3f}{x['cIoU']:>8.3f}{x['format']:>8.3f}")
    low, high = summary["gIoU_interval"]
    print(f"95 % bootstrap interval of gIoU: {low:.3f} to {high:.3f}; of cIoU: {summary['cIoU_interval'][0]:.3f} to {summary['cIoU_interval'][1]:.3f}")
    print(f"boxes with IoU above 0.5 (REC accuracy): {summary['box_accuracy']:.3f}")
    if report.rows[0].box_only:
        print("this data set has boxes and no masks: all of the above compares boxes")
    conventions = f"{settings.sentences} expression{'s' * (settings.sentences == 'all')} of an object, undecided pixels {settings.ignore}"
    empty = f"questions with an empty true mask {settings.empty_truth} (correct: an empty mask there counts as IoU 1)"
    print(f"conventions: {conventions}, {empty}")
    how = "greedy" if own["votes"] == 1 else f"the majority of {own['votes']} answers at temperature 1"
    print(f"{how}, {batch_size(settings, own['votes'])} questions side by side; SAM's highest-scored mask counts")
    print("an answer outside the format counts 0, or under 'lenient' by its last box")
    print("an answer that cannot be read counts 0 whatever the truth is")
    answers = [
        {name: getattr(row, name) for name in ("id", "question", "kind", "text", "in_format", "iou", "why")}
        for row in report.rows
    ]
    (out / "results.json").write_text(json.dumps({**own, "missing": list(data.missing), "summary": summary, "answers": answers}, indent=1))
    ranked, middle = sorted(report.rows, key=lambda r: -r.iou), max(0, len(report.rows) // 2 - 2)
    chosen = ranked if len(ranked) <= 12 else ranked[:4] + ranked[middle : middle + 4] + ranked[-4:]
    frame = policy.frame(settings.image_size)
    panels = shown(segmenter, data, chosen, settings, frame)
    sample_sheet(out / "sheet.png", panels, frame, "Best four, middle four, worst four answers")
    print(f"answers and sheet are in {out}")


def answer_one(policy, segmenter, data, settings, own: dict) -> None:
    """One picture -> the policy's reasoning, and an overlay with box, points and mask."""
    from samr1_mini.evaluation import evaluate, shown
    from samr1_mini.plots import sample_sheet

    settings = replace(settings, empty_truth="correct")  # the true mask that nobody knows is empty here
    frame = policy.frame(settings.image_size)
    report = evaluate(policy, segmenter, data, settings, blank=own["blank"], votes=own["votes"])
    [panel] = shown(segmenter, data, report.rows, settings, frame)
    print(panel.text)
    if panel.reward.mask is None:
        print(f"no box can be read from this: {panel.reward.answer.why}")
    else:
        print(f"mask: {panel.reward.mask.mean():.1%} of the picture")
    path = Path(own["out"]) / f"{Path(own['image']).stem}-overlay.png"
    sample_sheet(path, [panel], frame, "What the policy sees in it", truth=False)
    print(f"overlay: {path}")


def merge(name: str, adapter: str | Path, folder: str | Path) -> None:
    """Write the policy `name` with `adapter` added into its weights, in bf16, as an ordinary model folder with its
    processor."""
    from samr1_mini.policy import load_policy

    policy = load_policy(name, "bf16", adapter=adapter)
    policy.model.merge_and_unload().save_pretrained(folder)
    policy.processor.save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    settings, own, line = parse(argv)
    print(line, flush=True)
    from torch import OutOfMemoryError  # imported late, here and below: --help and mistakes answer at once

    from samr1_mini.running.loading import load_parts
    from samr1_mini.running.processes import join

    try:
        if own["merge"] is not None:
            merge(settings.policy, own["adapter"], own["merge"])
            print(f"merged model: {own['merge']}")
            return
        join(settings.device)  # under torchrun each process takes its own GPU
        data = open_input(settings, own)
        policy, segmenter = load_parts(settings, [] if own["image"] is not None else [data], own["adapter"])
        (answer_one if own["image"] is not None else evaluate_set)(policy, segmenter, data, settings, own)
    except UserError as error:
        exit_with(error, "eval.py")
    except OutOfMemoryError as error:
        exit_with(UserError(f"GPU memory ran out: lower --eval-batch or --max-new-tokens, or take --load-in nf4 ({error})"), "eval.py")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
