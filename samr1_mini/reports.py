"""What a run tells on its way: a first look at the base, scores and sheets on held-out questions, the summary."""

import json
from pathlib import Path

import numpy as np

from .config import Settings
from .evaluation import before_after, evaluate, shown
from .plots import curves, sample_sheet
from .policy import Policy
from .segmenter import Segmenter
from .processes import is_first
from .runs import Run, read_log, write_json


def describe(rollouts: list) -> dict:
    """What a batch of rollouts looks like, in numbers to log."""
    rewards, answers = [r for x in rollouts for r in x.rewards], [
        a for x in rollouts for a in x.answers
    ]
    mean = lambda values: float(sum(values)) / len(rewards)
    return {
        "reward": mean(r.total for r in rewards),
        "accuracy": mean(r.accuracy for r in rewards),
        "iou": mean(r.iou for r in rewards),
        "reasoning_format": mean(r.answer.reasoning_format for r in rewards),
        "segmentation_format": mean(r.answer.segmentation_format for r in rewards),
        "zero_variance": sum(not x.advantage.any() for x in rollouts) / len(rollouts),
        "truncated": mean(a.truncated for a in answers),
        "unique": sum(len({a.text for a in x.answers}) for x in rollouts) / len(answers),
        "points": mean(len(r.answer.points) for r in rewards),
        "length": mean(len(a.ids) for a in answers),
    }


def first_answers(rollouts: list) -> list[dict]:
    """The first sampled answer to each question, for answers.jsonl: what a policy comes to do shows there first."""
    return [
        {
            "id": x.sample.id,
            "kind": x.sample.kind,
            "question": x.sample.question,
            "text": x.answers[0].text,
            "tokens": len(x.answers[0].ids),
            "reward": x.rewards[0].total,
            "iou": round(x.rewards[0].iou, 3),
        }
        for x in rollouts
    ]


def base_summary(rollouts: list, s: Settings) -> str:
    """One line on a few sampled answers of the base, with a warning where nothing could be learnt from such answers."""
    answers, rewards = [a for x in rollouts for a in x.answers], [
        r for x in rollouts for r in x.rewards
    ]
    form, cut = np.mean([r.answer.in_format for r in rewards]), np.mean(
        [a.truncated for a in answers]
    )
    line = (
        f"the base's answers to {len(rollouts)} questions, {s.group} each: in the format {form:.2f}, "
        f"mean IoU {np.mean([r.iou for r in rewards]):.2f}, truncated {cut:.2f}"
    )
    if cut > 0.5:
        return (
            f"{line}. Warning: most are cut off, so they lose the reasoning format, and many "
            f"end before their box: raise --max-new-tokens {s.max_new_tokens}"
        )
    first = f"The first says: {' '.join(answers[0].text.split())[:120]!r}"
    if not any(r.answer.segmentation_format for r in rewards):
        return (
            f"{line}. Warning: none is in the asked format, so nothing can be learnt unless "
            "one turns up by uniforms: try a larger --group or --temperature, or another policy. "
            f"{first}"
        )
    if not any(r.answer.reasoning_format for r in rewards):
        return (
            f"{line}. Warning: none has the form <think>...</think><answer>...</answer>, so "
            f"the reasoning format is not rewarded. Boxes and points are rewarded. {first}"
        )
    return line


def score_base(
    policy: Policy, segmenter: Segmenter, validation, test, s: Settings, folder: Path, resumed: bool
) -> dict:
    """The base on the test set and what true boxes would reach there, kept in base.json for a run that is resumed."""
    if resumed and (folder / "base.json").exists():
        return json.loads((folder / "base.json").read_text(encoding="utf-8"))
    report = evaluate(policy, segmenter, test, s, "base", with_ceiling=True)
    base = report.summary() | {"ceiling": report.ceiling}
    if is_first():
        write_json(folder / "base.json", base), write_json(folder / "test-base.json", report.each())
    if s.eval_every:
        validate(policy, segmenter, validation, s, folder, 0)
    return base


def validate(
    policy: Policy, segmenter: Segmenter, validation, s: Settings, folder: Path, step: int
) -> dict:
    """A look at the validation set after `step` steps: figures for the log, and a sheet of answers."""
    report = evaluate(policy, segmenter, validation, s)
    if is_first():
        title = f"Validation after {step} steps" if step else "Validation before training"
        coordinate_range, path = (
            policy.coordinate_range(s.image_size),
            folder / f"sheet-{step:05d}.png",
        )
        sample_sheet(
            path,
            shown(segmenter, validation, report.rows[:12], s, coordinate_range),
            coordinate_range,
            title,
        )
    return {f"validation_{k}": v for k, v in report.summary().items() if isinstance(v, float)}


def summarise(
    policy: Policy, segmenter: Segmenter, test, s: Settings, folder: Path, base: dict, run: Run
) -> dict:
    """The trained policy on the test set, the curves, and the table that is printed; returns summary.json's content."""
    report = evaluate(policy, segmenter, test, s, "trained")
    summary = {
        "samples": run.total * s.questions,
        "seed": s.seed,
        "seconds": run.seconds(),
        "base": {k: v for k, v in base.items() if k != "ceiling"},
        "trained": report.summary(),
        "ceiling": base["ceiling"],
    }
    if is_first():
        write_json(folder / "summary.json", summary), write_json(
            folder / "test-trained.json", report.each()
        )
        coordinate_range, title = (
            policy.coordinate_range(s.image_size),
            "Held-out test questions after training",
        )
        sample_sheet(
            folder / "sheet-test.png",
            shown(segmenter, test, report.rows[:12], s, coordinate_range),
            coordinate_range,
            title,
        )
        curves(folder / "curves.png", read_log(folder), summary)
        print(before_after(summary))
        print(f"adapter, log, curves and sheets are in {folder}")
    return summary
