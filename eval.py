"""Evaluate the base policy or an adapter: on a data set (`python eval.py --adapter runs/NAME/adapter`), or on one picture
(`python eval.py --image photo.jpg --question "the red star"`)."""

import json
import sys
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
        "coordinates", "max_new_tokens", "max_points", "points"}


def parse(argv: list[str] | None):
    """Command line -> (settings, the options of eval.py alone, a line to print)."""
    parser = Parser(prog="eval.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--adapter", help="folder of a trained adapter; its run's settings are used. Without it the base is evaluated")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"), help="split of the data set (default test)")
    parser.add_argument("--count", type=int, default=600, help="how many questions of it (default 600)")
    parser.add_argument("--blank", action="store_true", help="show the policy a grey picture: what is left of the score is guessing")
    parser.add_argument("--image", help="answer about this one picture instead of a data set")
    parser.add_argument("--question", help="what to find in that picture")
    parser.add_argument("--merge", help="write base and adapter merged, in bf16, as a model folder of this name, and evaluate nothing")
    parser.add_argument("--out", default="eval", help="folder for results.json and the pictures (default eval)")
    add_options(parser, USED)
    given = vars(parser.parse(argv))
    own = {name: given.pop(name) for name in ("adapter", "split", "count", "blank", "image", "question", "merge", "out")}
    if (own["image"] is None) != (own["question"] is None):
        parser.error("--image and --question go together")
    if own["merge"] is not None and (own["adapter"] is None or Path(own["merge"]).exists()):
        parser.error("--merge needs --adapter" if own["adapter"] is None else f"--merge {own['merge']}: this is there already")
    if own["count"] < 1:
        parser.error(f"--count must be at least 1, not {own['count']}")
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


def evaluate_set(policy, segmenter, settings, own: dict) -> None:
    """A data set -> a table, results.json, and a sheet of the best, the middling and the worst answers."""
    from samr1_mini.data import load_data
    from samr1_mini.evaluation import evaluate
    from samr1_mini.plots import sample_sheet

    out = Path(own["out"])
    data = load_data(settings.data, own["split"], own["count"], sentences=settings.sentences, coco_dir=settings.coco_dir, ignore=settings.ignore)
    report = evaluate(policy, segmenter, data, settings, own["split"], own["blank"])
    summary = report.summary()
    print(f"{'':<12}{'count':>6}{'gIoU':>8}{'lenient':>9}{'cIoU':>8}{'format':>8}")
    for name, x in [("all", summary), *summary["by_kind"].items()]:
        print(f"{name or 'no kind':<12}{x['count']:>6}{x['gIoU']:>8.3f}{x['gIoU_lenient']:>9.3f}{x['cIoU']:>8.3f}{x['format']:>8.3f}")
    low, high = summary["gIoU_interval"]
    print(f"95 % bootstrap interval of gIoU: {low:.3f} to {high:.3f}; of cIoU: {summary['cIoU_interval'][0]:.3f} to {summary['cIoU_interval'][1]:.3f}")
    print(f"boxes with IoU above 0.5 (REC accuracy): {summary['box_accuracy']:.3f}")
    if report.rows[0].sample.box_only:
        print("this data set has boxes and no masks: all of the above compares boxes")
    conventions = f"{settings.sentences} expression{'s' * (settings.sentences == 'all')} of an object, undecided pixels {settings.ignore}"
    print(f"conventions: {conventions}, questions with an empty true mask {settings.empty_truth} (correct: nothing predicted there counts as IoU 1)")
    print("greedy; an answer outside the format counts 0, or under 'lenient' by any box in its text; SAM's highest-scored mask counts")
    answers = [
        {"id": r.sample.id, "question": r.sample.question, "kind": r.sample.kind, "text": r.text, "in_format": r.reward.answer.in_format,
         "iou": r.reward.iou, "why": r.reward.answer.why} for r in report.rows
    ]
    (out / "results.json").write_text(json.dumps({**own, "summary": summary, "answers": answers}, indent=1))
    ranked, middle = sorted(report.rows, key=lambda r: -r.reward.iou), max(0, len(report.rows) // 2 - 2)
    chosen = ranked if len(ranked) <= 12 else ranked[:4] + ranked[middle : middle + 4] + ranked[-4:]
    sample_sheet(out / "sheet.png", chosen, policy.frame(settings.image_size), "Best four, middle four, worst four answers")
    print(f"answers and sheet are in {out}")


def answer_one(policy, segmenter, settings, own: dict) -> None:
    """One picture -> the policy's reasoning, and an overlay with box, points and mask."""
    import numpy as np

    from samr1_mini.data import Sample, open_picture
    from samr1_mini.evaluation import evaluate
    from samr1_mini.plots import sample_sheet

    try:
        image = open_picture(own["image"])
    except (OSError, ValueError) as error:
        raise UserError(f"--image {own['image']}: {error}") from None
    unknown = np.zeros((image.height, image.width), bool)  # no truth is known
    row = evaluate(policy, segmenter, [Sample(image, own["question"], unknown, own["image"])], settings, blank=own["blank"]).rows[0]
    print(row.text)
    if row.reward.mask is None:
        print(f"no box can be read from this: {row.reward.answer.why}")
    else:
        print(f"mask: {row.reward.mask.mean():.1%} of the picture")
    path = Path(own["out"]) / f"{Path(own['image']).stem}-overlay.png"
    sample_sheet(path, [row], policy.frame(settings.image_size), "What the policy sees in it", truth=False)
    print(f"overlay: {path}")


def main(argv: list[str] | None = None) -> None:
    settings, own, line = parse(argv)
    print(line, flush=True)
    from samr1_mini.policy import load_policy, merge  # imported late: --help and mistakes answer at once
    from samr1_mini.reward import load_segmenter

    try:
        if own["merge"] is not None:
            merge(settings.policy, own["adapter"], own["merge"])
            print(f"merged model: {own['merge']}")
            return
        Path(own["out"]).mkdir(parents=True, exist_ok=True)
        policy = load_policy(settings.policy, settings.load_in, adapter=own["adapter"], device=settings.device,
                             coordinates=settings.coordinates, image_size=settings.image_size)
        segmenter = load_segmenter(settings.sam, settings.sam_checkpoint, settings.device)
        (answer_one if own["image"] is not None else evaluate_set)(policy, segmenter, settings, own)
    except UserError as error:
        exit_with(error, "eval.py")


if __name__ == "__main__":
    main(sys.argv[1:])
