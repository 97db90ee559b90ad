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
    """Return the columns of the log that describe the sampled answers and their rewards."""
    rewards = [reward for rollout in rollouts for reward in rollout.rewards]
    answers = [answer for rollout in rollouts for answer in rollout.answers]
    flat = [not rollout.advantage.any() for rollout in rollouts]
    different = [len({answer.text for answer in rollout.answers}) for rollout in rollouts]

    def mean(values) -> float:
        return float(sum(values)) / len(rewards)

    line = {"reward": mean(r.total for r in rewards)}
    for name in rewards[0].terms:
        line[name] = mean(r.terms[name] for r in rewards)
    return line | {
        "iou": mean(r.iou for r in rewards),
        "zero_variance": sum(flat) / len(rollouts),
        "truncated": mean(a.truncated for a in answers),
        "unique": sum(different) / len(answers),
        "points": mean(len(r.answer.points) for r in rewards),
        "length": mean(len(a.ids) for a in answers),
    }


def token_mean(forwards: list[dict], name: str) -> float:
    """Return the mean of one value over the tokens of all forwards."""
    total = sum(tokens[name].sum().item() for tokens in forwards)
    return total / sum(len(tokens[name]) for tokens in forwards)


def sampling_gap(forwards: list[dict]) -> dict:
    """Return how far rounding alone moves a log-probability from sampling to the first update."""
    if not forwards:
        return {"sampling_gap": 0.0, "sampling_gap_max": 0.0}
    largest = max(tokens["sampling_gap"].max().item() for tokens in forwards)
    return {"sampling_gap": token_mean(forwards, "sampling_gap"), "sampling_gap_max": largest}


def token_means(forwards: list[dict]) -> dict:
    """Return the mean over all tokens of each value that the loss gives.

    The ratio has its extremes instead. Without a forward (all groups flat) the means are 0.
    """
    if not forwards:
        nothing = ("approx_kl", "clip_low", "clip_high", "entropy")
        return {"ratio_min": 1.0, "ratio_max": 1.0} | dict.fromkeys(nothing, 0.0)
    names = set().union(*forwards) - {"ratio", "sampling_gap"}
    log = {name: token_mean(forwards, name) for name in sorted(names)}
    if "ratio" in forwards[0]:
        log["ratio_min"] = min(1.0, *(tokens["ratio"].min().item() for tokens in forwards))
        log["ratio_max"] = max(1.0, *(tokens["ratio"].max().item() for tokens in forwards))
    return log


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
