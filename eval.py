"""Evaluate the base model or an adapter on a data set, or ask one question about one picture.

`python eval.py --adapter runs/NAME/adapter`
`python eval.py --image photo.jpg --question "the red star"`
"""

import hashlib
import json
import sys
import tempfile
from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

# Functions import the modules with models. So --help and wrong options are answered at once.
from samr1_mini.config import (
    Parser,
    Settings,
    UserError,
    add_options,
    cause,
    check_machine,
    exit_with,
    first_line,
    make_settings,
    print_anything,
    read_settings,
)
from samr1_mini.data import Folder, Sample, clean_question, open_picture
from samr1_mini.files import check_adapter_files, replace_file, write_json
from samr1_mini.memory import cap_memory, is_memory_error
from samr1_mini.processes import fail_together, first_before_others, is_first, join_processes
from samr1_mini.prompt import choose_prompt

USED = {  # the settings that an evaluation uses
    "preset",
    "device",
    "policy",
    "load_in",
    "sam",
    "sam_checkpoint",
    "sam_dtype",
    "data",
    "coco_dir",
    "sentences",
    "ignore",
    "empty_truth",
    "objects",
    "image_size",
    "coordinates",
    "max_new_tokens",
    "max_points",
    "points",
    "prompt_file",
    "eval_batch",
}
SLOW = "Add --device cpu if you can wait: an answer then takes minutes"

# ------------------------------------------------------------------------------------- parse


def make_parser() -> Parser:
    """Return a parser for the options of eval.py and for the settings in USED."""
    parser = Parser(prog="eval.py", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    adapter = "folder of an adapter. The settings of its run are used (default: the base model)"
    add("--adapter", help=adapter)
    splits = ("train", "validation", "test")
    add("--split", default="test", choices=splits, help="split of the data set (default test)")
    add(
        "--count",
        type=int,
        help="number of questions (default: 600 of the drawn scenes, all of other data)",
    )
    blank = "show the policy a grey picture, to measure the score of guessing"
    add("--blank", action="store_true", help=blank)
    votes = "number of answers that vote on a mask. They are sampled, but a single answer is greedy (default 1)"
    add("--votes", type=int, default=1, help=votes)
    add("--image", help="ask about one picture instead of a data set")
    add("--question", help="question about the picture of --image")
    add("--merge", help="write base model and adapter as one bf16 model folder, without evaluation")
    add("--out", default="eval", help="folder for results.json and pictures (default eval)")
    add_options(parser, USED)
    return parser


def check_options(options: Namespace) -> None:
    """Raise UserError if options of eval.py are invalid."""
    if (options.image is None) != (options.question is None):
        raise UserError("use --image and --question together")
    if options.question is not None and not options.question.strip():
        raise UserError("--question is empty")
    if options.merge is not None and options.adapter is None:
        raise UserError("--merge needs --adapter")
    if options.merge is not None and Path(options.merge).exists():
        raise UserError(
            f"--merge {options.merge}: this folder or file exists already. Name another one"
        )
    if options.count is not None and options.count < 1:
        raise UserError(f"--count must be at least 1, not {options.count}")
    if options.votes < 1:
        raise UserError(f"--votes must be at least 1, not {options.votes}")
    if options.adapter is not None:
        check_adapter_files(Path(options.adapter))


def settings_file(adapter: str) -> Path:
    """Return the path of the settings file of the adapter's run."""
    return Path(adapter).resolve().parent / "settings.json"


def saved_settings(options: Namespace) -> dict:
    """Return the content of the settings file of the adapter's run, or {} if there is none."""
    if options.adapter is None or not settings_file(options.adapter).is_file():
        return {}
    return read_settings(settings_file(options.adapter))


def settings_of_run(options: Namespace, typed: dict) -> dict:
    """Return the settings in USED from the adapter's run, or {} without its settings file.

    Raises UserError if --preset differs from the preset of the run.
    """
    saved = saved_settings(options)
    if not saved:
        return {}
    if saved.get("eval_data") and options.split != "train":
        saved["data"] = saved["eval_data"]
    if saved.get("prompt_file"):
        saved["prompt_file"] = str(settings_file(options.adapter).with_name("prompt.txt"))
    if "preset" in typed and typed["preset"] != saved.get("preset"):
        raise UserError(
            "--preset is only for base models. An adapter has the settings of its run: leave --preset out"
        )
    return {name: saved[name] for name in USED - {"device"} if name in saved}


def describe_adapter(settings: Settings, options: Namespace, typed: dict) -> str:
    """Return the line that describes the adapter and its settings."""
    line = (
        f"adapter {options.adapter} on policy {settings.policy}, {settings.load_in}, "
        f"SAM {settings.sam}, data {settings.data}"
    )
    if typed:
        line += "; you set " + ", ".join(f"{name} = {value}" for name, value in typed.items())
    if not settings_file(options.adapter).is_file():
        line += f"; no settings.json was found, so the rest is from preset {settings.preset}"
    return line


def parse(argv: list[str] | None) -> tuple[Settings, Namespace, str]:
    """Read the command line. Return the settings, the options of eval.py, and a line to print."""
    parser = make_parser()
    given = vars(parser.parse(argv))
    options = Namespace(**{name: given[name] for name in given if name not in USED})
    typed = {name: given[name] for name in given if name in USED}
    try:
        check_options(options)
        settings, line = make_settings(**settings_of_run(options, typed) | typed)
        if options.merge is None:  # a merge needs no GPU
            check_machine(settings, typed.get("device"), SLOW)
    except UserError as error:
        parser.error(str(error))
    if options.adapter is not None:
        line = describe_adapter(settings, options, typed)
    return settings, options, line


# -------------------------------------------------------------------------------------- load


def make_folder(folder: Path, option: str) -> None:
    """Make a folder. Raise UserError with the name of `option` if no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"{option}: nothing can be written there ({error.strerror}). Name another"
        ) from None


def read_picture(options: Namespace) -> list:
    """Return one sample from --image and --question. Raise UserError if one of them is invalid."""
    if not Path(options.image).is_file():
        raise UserError(f"--image {options.image}: there is no such file. Name a picture")
    try:
        image = open_picture(Path(options.image))
    except ValueError as error:  # no picture, truncated or far too large
        raise UserError(f"--image {options.image}: {error}") from None
    try:
        question = clean_question(options.question)
    except ValueError as error:
        raise UserError(f"--question: {error}") from None
    unknown = np.ones((image.height, image.width), bool)  # no true mask: a placeholder
    return [Sample(image, question, unknown, options.image)]


def open_input(settings: Settings, options: Namespace):
    """Open the data set or the single picture. No model is loaded yet."""
    from samr1_mini.loading import open_split

    make_folder(Path(options.out), f"--out {options.out}")
    if options.image is not None:
        return read_picture(options)
    count = sys.maxsize
    seed = None
    if settings.data == "shapes":
        count = 600
        seed = saved_settings(options).get("seed", 0)  # it chooses the scenes of the train split
    if options.count is not None:
        count = options.count
    return open_split(settings, settings.data, options.split, count, seed)


def refuse_too_little_memory(settings: Settings) -> None:
    """Raise UserError if the weights need more than the GPU's free memory.

    This check is before the download. If the check itself fails, one line prints the error, and the
    program continues.
    """
    if settings.device != "cuda":
        return
    try:
        from samr1_mini.forecast import check_free_memory

        check_free_memory(settings)
    except UserError:
        raise
    except Exception as error:
        print(f"free memory was not checked: {cause(error)}", flush=True)


def load(settings: Settings, options: Namespace) -> tuple:
    """Return policy, segmenter and data."""
    from samr1_mini.loading import check_models, load_models

    cap_memory(settings)
    refuse_too_little_memory(settings)
    check_models(settings)
    with first_before_others():
        data = open_input(settings, options)
    sets = [data] if options.image is None else []
    policy, segmenter = load_models(settings, sets, options.adapter)
    return policy, segmenter, data


# --------------------------------------------------------------------- evaluate, print, save


def describe_evaluation(settings: Settings, options: Namespace, data) -> str:
    """Return all that the answers of an evaluation depend on, as one line of JSON.

    These are settings, prompt, questions, and the times of the last change of data and weights.
    """
    used = {name: getattr(settings, name) for name in sorted(USED)}
    used["prompt"] = choose_prompt(settings)
    files = data.files()
    for folder in (options.adapter, settings.policy, settings.sam):
        if folder:
            files += sorted(Path(folder).glob("*.safetensors"))
    if settings.sam_checkpoint:
        files.append(Path(settings.sam_checkpoint))
    times = [file.stat().st_mtime_ns for file in files if file.is_file()]
    used["times"] = hashlib.sha256(repr(times).encode()).hexdigest()
    return json.dumps([vars(options) | {"out": ""}, used, list(data.ids)])


def print_scores(summary: dict, data, settings: Settings, options: Namespace, batch: int) -> None:
    """Print the table of scores and their conventions."""
    from samr1_mini.evaluation import score_table

    print(f"{options.split} split{blanked(options)}, {summary['count']} questions")
    rows = {}
    for name, scores in [("all questions", summary), *summary["by_kind"].items()]:
        rows[f"{name or 'no kind':<15}{scores['count']:>9}"] = scores
    print(score_table(f"{'questions':>24}", rows))
    g_low, g_high = summary["gIoU_interval"]
    c_low, c_high = summary["cIoU_interval"]
    interval = f"of gIoU: {g_low:.3f} to {g_high:.3f}; of cIoU: {c_low:.3f} to {c_high:.3f}"
    print(f"95 % bootstrap interval {interval}")
    print(f"boxes with IoU above 0.5 (REC accuracy): {summary['box_accuracy']:.3f}")
    if data.box_only:
        print("this data set has boxes and no masks, so all scores above compare boxes")
    expressions = "all expressions" if settings.sentences == "all" else "first expression"
    print(
        f"conventions: {expressions} of an object; --ignore {settings.ignore} (undecided pixels); "
        f"--empty-truth {settings.empty_truth} (questions with an empty true mask)"
    )
    answers = "greedy"
    if options.votes > 1:
        answers = f"the majority of {options.votes} answers at temperature 1"
    print(f"{answers}, {batch} questions in one batch. SAM's mask with the highest score counts")
    if options.votes > 1:
        print("'format' is the share of questions with at least one answer in the format")
    if "N_acc" in summary or "T_acc" in summary:
        print("N-acc: questions without a target that are answered with nothing")
        print("T-acc: questions with a target that are answered with something")
    print("an answer outside the format counts 0. 'lenient' uses boxes in any notation instead")
    print("an answer that cannot be read counts 0 for every true mask")


def blanked(options: Namespace) -> str:
    """Return the words about --blank in titles, or ""."""
    return ", blanked to grey" if options.blank else ""


def best_middle_worst(rows: list) -> tuple[list, str]:
    """Return up to twelve rows for the sheet, and its title."""
    ranked = sorted(rows, key=lambda row: row.iou, reverse=True)
    if len(ranked) <= 12:
        return ranked, "All answers, best first"
    middle = len(ranked) // 2 - 2
    chosen = ranked[:4] + ranked[middle : middle + 4] + ranked[-4:]
    return chosen, "Best four, middle four, worst four answers"


def evaluate_set(policy, segmenter, data, settings: Settings, options: Namespace) -> None:
    """Evaluate a data set, print a table, and write results.json and a sheet of answers."""
    from samr1_mini.evaluation import batch_size, draw_sheet, evaluate

    if isinstance(data, Folder) and not data.converted:  # these have no effect on an own folder
        settings = replace(settings, sentences="all", ignore="excluded")
    out = Path(options.out)
    batch = batch_size(policy, settings, options.votes)
    inputs = describe_evaluation(settings, options, data)
    # Each evaluation has its own file. So an interrupted one keeps its answers if another one runs.
    kept = out / f"answers-{hashlib.sha256(inputs.encode()).hexdigest()[:8]}.part"
    report = evaluate(
        policy,
        segmenter,
        data,
        replace(settings, eval_batch=batch),
        options.split,
        options.blank,
        votes=options.votes,
        keep=(kept, inputs),
    )
    if not is_first():
        return
    summary = report.summary()
    print_scores(summary, data, settings, options, batch)
    results = vars(options) | {name: getattr(settings, name) for name in sorted(USED)}
    results |= {"missing": list(data.missing), "summary": summary, "answers": report.each()}
    write_json(out / "results.json", results)
    for part in out.glob(f"{kept.name}.*"):
        part.unlink()
    rows, title = best_middle_worst(report.rows)
    title += blanked(options)
    draw_sheet(out / "sheet.png", title, policy, segmenter, data, rows, settings)
    print(f"answers and sheet are in {out}")


def print_objects(objects: list) -> None:
    """Print the boxes of an answer's objects, in pixels of the picture."""
    if not objects:
        print("the answer says that nothing in the picture fits the question")
    for one in objects:
        box = ", ".join(f"{value:.0f}" for value in one.box)
        print(f"box in pixels of the picture: [{box}], with {len(one.points)} points")


def answer_one(policy, segmenter, data, settings: Settings, options: Namespace) -> None:
    """Ask about one picture, print the answer, and write its mask and an overlay."""
    from samr1_mini.evaluation import evaluate, shown
    from samr1_mini.plots import sample_sheet

    report = evaluate(policy, segmenter, data, settings, blank=options.blank, votes=options.votes)
    if not is_first():
        return
    size = policy.answer_side(settings.image_size)
    [panel] = shown(segmenter, data, report.rows, settings, size)
    reward = panel.reward
    mask = reward.mask
    stem = Path(options.out) / Path(options.image).stem
    mask_file = Path(f"{stem}-mask.png")
    print(panel.text)
    if reward.answer.objects is None:
        print(f"no box can be read from this answer: {reward.answer.why}")
    elif settings.objects == "several":
        print_objects(reward.objects)
    if report.rows[0].truncated:
        print(f"the answer was cut off: raise --max-new-tokens (now {settings.max_new_tokens})")
    if mask is None:
        with suppress(OSError):
            mask_file.unlink()  # of an earlier question
    else:
        Image.fromarray(mask).save(mask_file)
        print(f"mask: {mask.mean():.1%} of the picture, {mask_file}")
    overlay = f"{stem}-overlay.png"
    sample_sheet(overlay, [panel], size, "Answer of the policy", truth=False)
    print(f"overlay: {overlay}")


def merge(name: str, adapter: str, folder: str) -> None:
    """Add an adapter to the weights of the policy `name`, and write a bf16 model folder.

    Raises UserError if the folder cannot be written. Then no partial folder remains.
    """
    from safetensors import SafetensorError

    from samr1_mini.policy import load_policy

    make_folder(Path(folder).parent, f"--merge {folder}")
    policy = load_policy(name, "bf16", adapter=adapter)

    def write(part: Path) -> None:
        policy.model.merge_and_unload().save_pretrained(part)
        policy.processor.save_pretrained(part)

    try:
        replace_file(Path(folder), write)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--merge {folder}: {first_line(error)}") from None
    print(f"merged model: {folder}")


def main(argv: list[str] | None = None) -> None:
    print_anything()
    settings, options, line = parse(argv)
    print(line, flush=True)
    try:
        if options.merge is not None:
            merge(settings.policy, options.adapter, options.merge)
            return
        join_processes(settings)  # under torchrun each process takes its own GPU
        with fail_together():
            policy, segmenter, data = load(settings, options)
            if options.image is None:
                evaluate_set(policy, segmenter, data, settings, options)
            else:
                answer_one(policy, segmenter, data, settings, options)
    except (UserError, OSError) as error:
        exit_with(error, "eval.py")
    except (RuntimeError, MemoryError) as error:  # most of PyTorch's errors are RuntimeErrors
        if not is_memory_error(error):
            raise  # an error of the GPU or of the code, which needs its traceback
        advice = "lower --eval-batch or --max-new-tokens, or take --load-in nf4"
        exit_with(UserError(f"memory ran out: {advice} ({error})"), "eval.py")
    except KeyboardInterrupt:
        if options.image is None and options.merge is None:
            print("stopped: the same command continues the evaluation", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
