"""Evaluate the base policy or an adapter: on a data set (`python eval.py --adapter runs/NAME/adapter`), or on one
picture (`python eval.py --image photo.jpg --question "the red star"`)."""

import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from samr1_mini.config import (
    Parser,
    UserError,
    add_options,
    check,
    check_machine,
    exit_with,
    first_line,
    make_settings,
    print_anything,
    read_settings,
)

USED = {
    "preset",
    "device",
    "policy",
    "load_in",
    "sam",
    "sam_checkpoint",
    "data",
    "coco_dir",
    "sentences",
    "ignore",
    "empty_truth",
    "image_size",
    "coordinates",
    "max_new_tokens",
    "max_points",
    "points",
    "eval_batch",
}


def parse(argv: list[str] | None):
    """Command line -> (settings, the options that only eval.py has, a line to print)."""
    parser = Parser(prog="eval.py", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--adapter",
        help="folder of a trained adapter; its run's settings are used. Without it the "
        "base is evaluated",
    )
    parser.add_argument(
        "--split",
        default="test",
        choices=("train", "validation", "test"),
        help="split of the data set (default test)",
    )
    parser.add_argument(
        "--count",
        type=int,
        help="how many questions of it (default: 600 drawn scenes; of another set " "all)",
    )
    parser.add_argument(
        "--blank",
        action="store_true",
        help="show the policy a grey picture: what is left of the score is guessing",
    )
    parser.add_argument(
        "--mirror",
        action="store_true",
        help="mirror pictures, true masks and the words left and right: a policy that really sees "
        "positions scores the same",
    )
    parser.add_argument(
        "--votes",
        type=int,
        default=1,
        help="answers a question, drawn at temperature 1, that vote on a mask (default 1: one, greedy)",
    )
    parser.add_argument("--image", help="answer about this one picture instead of a data set")
    parser.add_argument("--question", help="what to find in that picture")
    parser.add_argument(
        "--merge",
        help="write base and adapter merged, in bf16, as a model folder of this name, and "
        "evaluate nothing",
    )
    parser.add_argument(
        "--out", default="eval", help="folder for results.json and the pictures (default eval)"
    )
    add_options(parser, USED)
    given = vars(parser.parse(argv))
    names = (
        "adapter",
        "split",
        "count",
        "votes",
        "blank",
        "mirror",
        "image",
        "question",
        "merge",
        "out",
    )
    options = {name: given.pop(name) for name in names}
    typed = ", ".join(f"{name} = {value}" for name, value in given.items())
    if (options["image"] is None) != (options["question"] is None):
        parser.error("--image and --question go together")
    if options["question"] is not None and not options["question"].strip():
        parser.error("--question is empty")
    if options["mirror"] and options["image"] is not None:
        parser.error("--mirror goes with a data set, not with --image")
    if options["merge"] is not None and (
        options["adapter"] is None or Path(options["merge"]).exists()
    ):
        there = f"--merge {options['merge']}: this is there already"
        parser.error("--merge needs --adapter" if options["adapter"] is None else there)
    for name in ("count", "votes"):
        if options[name] is not None and options[name] < 1:
            parser.error(f"--{name} must be at least 1, not {options[name]}")
    if options["adapter"] is not None:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (Path(options["adapter"]) / name).is_file():
                parser.error(f"--adapter {options['adapter']}: no {name} there")
    try:
        beside = Path(options["adapter"] or "").resolve().parent / "settings.json"
        if options["adapter"] is not None and beside.is_file():
            saved = read_settings(beside)
            if saved.get("eval_data") and options["split"] != "train":
                saved["data"] = saved["eval_data"]
            if given.get("preset", saved.get("preset")) != saved.get("preset"):
                raise UserError("--preset is for a base: this adapter has the settings of its run")
            given = {k: v for k, v in saved.items() if k in USED - {"device"}} | given
        settings, line = make_settings(**given)
        if options["merge"] is None:  # the CPU is enough to merge
            check_machine(settings, given.get("device"))
        check(settings)
    except UserError as error:
        parser.error(str(error))
    if options["adapter"] is not None:
        line = (
            f"adapter {options['adapter']} on policy {settings.policy}, {settings.load_in}, SAM {settings.sam}, "
            f"data {settings.data}" + (f"; you set {typed}" if typed else "")
        )
        if not beside.is_file():
            line += f"; no settings.json beside it, so all else is that of preset {settings.preset}"
    return settings, options, line


def make_folder(folder: Path, option: str) -> None:
    """The folder, and a look whether a file can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{option}: nothing can be written there ({error.strerror})") from None


def open_input(settings, options: dict):
    """What is asked about, opened before a model is loaded: the data set, or the one picture."""
    import numpy as np

    from samr1_mini.data import Mirrored, Sample, clean_question, open_data, open_picture

    make_folder(Path(options["out"]), f"--out {options['out']}")
    if options["image"] is None:
        every = 600 if settings.data == "shapes" else sys.maxsize
        data = open_data(
            settings.data,
            options["split"],
            options["count"] or every,
            None,
            settings.sentences,
            settings.coco_dir,
            settings.ignore,
        )
        return Mirrored(data) if options["mirror"] else data
    try:
        image = open_picture(options["image"])
    except (OSError, ValueError) as error:  # no picture, cut off, or far too large
        raise UserError(f"--image {options['image']}: {error}") from None
    try:
        question = clean_question(options["question"])
    except ValueError as error:
        raise UserError(f"--question: {error}") from None
    unknown = np.ones((image.height, image.width), bool)  # no truth is known, and none is drawn
    return [Sample(image, question, unknown, options["image"])]


def evaluate_set(policy, segmenter, data, settings, options: dict) -> None:
    """A data set -> a table, results.json, and a sheet of the best, the middling and the worst answers."""
    from samr1_mini.evaluation import batch_size, evaluate, shown
    from samr1_mini.plots import sample_sheet
    from samr1_mini.processes import is_first
    from samr1_mini.runs import write_json

    out, votes = Path(options["out"]), options["votes"]
    used = {name: getattr(settings, name) for name in sorted(USED)}
    weights = Path(options["adapter"] or "") / "adapter_model.safetensors"
    what = json.dumps(
        [
            options | {"out": ""},
            used,
            data.ids,
            weights.stat().st_mtime if options["adapter"] else 0,
        ]
    )
    keep = out / "answers.part", what
    batch = batch_size(policy, settings, votes)
    now = replace(settings, eval_batch=batch)
    report = evaluate(
        policy, segmenter, data, now, options["split"], options["blank"], votes=votes, keep=keep
    )
    if not is_first():
        return
    summary = report.summary()
    how = ", blanked to grey" * options["blank"] + ", mirrored" * options["mirror"]
    print(f"{options['split']} split{how}, {len(data)} questions")
    print(f"{'':<12}{'count':>6}{'gIoU':>8}{'lenient':>9}{'cIoU':>8}{'format':>8}")
    for name, x in [("all", summary), *summary["by_kind"].items()]:
        scores = f"{x['gIoU']:>8.3f}{x['gIoU_lenient']:>9.3f}{x['cIoU']:>8.3f}{x['format']:>8.3f}"
        print(f"{name or 'no kind':<12}{x['count']:>6}{scores}")
    (g_low, g_high), (c_low, c_high) = summary["gIoU_interval"], summary["cIoU_interval"]
    print(
        f"95 % bootstrap interval of gIoU: {g_low:.3f} to {g_high:.3f}; of cIoU: {c_low:.3f} to {c_high:.3f}"
    )
    print(f"boxes with IoU above 0.5 (REC accuracy): {summary['box_accuracy']:.3f}")
    if data.box_only:
        print("this data set has boxes and no masks: all of the above compares boxes")
    expressions = (
        f"{settings.sentences} expression{'s' * (settings.sentences == 'all')} of an object"
    )
    empty = f"questions with an empty true mask {settings.empty_truth} (correct: an empty mask there counts as IoU 1)"
    print(f"conventions: {expressions}, undecided pixels {settings.ignore}, {empty}")
    drawn = "greedy" if votes == 1 else f"the majority of {votes} answers at temperature 1"
    print(f"{drawn}, {batch} questions side by side; SAM's highest-scored mask counts")
    if votes > 1:
        print("'format' counts the questions with one answer in the format, at least")
    print("an answer outside the format counts 0, or under 'lenient' by its last box")
    print("an answer that cannot be read counts 0 whatever the truth is")
    results = {
        **options,
        **used,
        "missing": list(data.missing),
        "summary": summary,
        "answers": report.each(),
    }
    write_json(out / "results.json", results)
    for part in out.glob("answers.part.*"):
        part.unlink()
    ranked, middle = sorted(report.rows, key=lambda r: -r.iou), max(0, len(report.rows) // 2 - 2)
    chosen = ranked if len(ranked) <= 12 else ranked[:4] + ranked[middle : middle + 4] + ranked[-4:]
    coordinate_range = policy.coordinate_range(settings.image_size)
    panels = shown(segmenter, data, chosen, settings, coordinate_range)
    title = (
        "Best four, middle four, worst four answers"
        if len(ranked) > 12
        else "All answers, best first"
    )
    sample_sheet(out / "sheet.png", panels, coordinate_range, title + how)
    print(f"answers and sheet are in {out}")


def answer_one(policy, segmenter, data, settings, options: dict) -> None:
    """One picture -> the policy's reasoning, the mask, and an overlay with box, points and mask."""
    from PIL import Image

    from samr1_mini.evaluation import evaluate, shown
    from samr1_mini.plots import sample_sheet

    coordinate_range = policy.coordinate_range(settings.image_size)
    report = evaluate(
        policy, segmenter, data, settings, blank=options["blank"], votes=options["votes"]
    )
    [panel] = shown(segmenter, data, report.rows, settings, coordinate_range)
    print(panel.text)
    if panel.reward.mask is None:
        print(f"no box can be read from this: {panel.reward.answer.why}")
    if report.rows[0].truncated:
        print(f"the answer was cut off: raise --max-new-tokens {settings.max_new_tokens}")
    stem = Path(options["out"]) / Path(options["image"]).stem
    if panel.reward.mask is not None:
        Image.fromarray(panel.reward.mask).save(f"{stem}-mask.png")
        print(f"mask: {panel.reward.mask.mean():.1%} of the picture, {stem}-mask.png")
    sample_sheet(
        f"{stem}-overlay.png", [panel], coordinate_range, "What the policy sees in it", truth=False
    )
    print(f"overlay: {stem}-overlay.png")


def merge(name: str, adapter: str | Path, folder: str | Path) -> None:
    """Write the policy `name` with `adapter` added into its weights, in bf16, as an ordinary model folder with its
    processor. Where that fails nothing is left."""
    from safetensors import SafetensorError

    from samr1_mini.policy import load_policy

    policy, part = load_policy(name, "bf16", adapter=adapter), Path(f"{folder}.part")
    try:
        policy.model.merge_and_unload().save_pretrained(part)
        policy.processor.save_pretrained(part)
        part.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"--merge {folder}: {first_line(error)}") from None


def refuse_too_little_memory(settings) -> None:
    """Refuse weights that are larger than the GPU's free memory, before they are fetched. A check that fails is left
    out."""
    if settings.device != "cuda":
        return
    try:
        from samr1_mini.forecast import check_free_memory

        check_free_memory(settings)
    except UserError:
        raise
    except Exception as error:
        print(
            f"free memory was not checked: {type(error).__name__}: {first_line(error)}", flush=True
        )


def main(argv: list[str] | None = None) -> None:
    print_anything()
    settings, options, line = parse(argv)
    print(line, flush=True)
    from torch import (
        OutOfMemoryError,
    )  # imported late, here and below: --help and mistakes answer at once

    from samr1_mini.loading import check_models, load_parts
    from samr1_mini.memory import cap_memory
    from samr1_mini.processes import join_processes

    try:
        if options["merge"] is not None:
            make_folder(Path(options["merge"]).parent, f"--merge {options['merge']}")
            merge(settings.policy, options["adapter"], options["merge"])
            print(f"merged model: {options['merge']}")
            return
        cap_memory(settings)
        refuse_too_little_memory(settings)
        check_models(settings)
        with join_processes(
            settings.device
        ).main_process_first():  # under torchrun each process takes its own GPU
            data = open_input(settings, options)
        policy, segmenter = load_parts(
            settings, [] if options["image"] is not None else [data], options["adapter"]
        )
        (answer_one if options["image"] is not None else evaluate_set)(
            policy, segmenter, data, settings, options
        )
    except (UserError, OSError) as error:
        exit_with(error, "eval.py")
    except OutOfMemoryError as error:
        advice = "lower --eval-batch or --max-new-tokens, or take --load-in nf4"
        exit_with(UserError(f"GPU memory ran out: {advice} ({error})"), "eval.py")
    except KeyboardInterrupt:
        print("stopped; an evaluation goes on from here with the same command", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
