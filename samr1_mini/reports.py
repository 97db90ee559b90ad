"""Compute and write the reports of a run: log columns, scores, sheets, curves and summary."""

from pathlib import Path

from tqdm import tqdm

from .columns import COLUMNS
from .config import Settings, UserError
from .evaluation import before_after, draw_sheet, evaluate
from .files import write_json
from .memory import peak_memory
from .metrics import mean
from .plots import curves
from .policy import Policy
from .processes import is_first
from .report import held_out, try_report
from .runs import Run, read_base, read_log, read_test_answers
from .segmenter import Segmenter

# ----------------------------------------------------------------- sampled answers


def describe(rollouts: list) -> dict:
    """Return the log columns that describe the answers of a step. Most are means over answers."""
    rewards = [reward for rollout in rollouts for reward in rollout.rewards]
    answers = [answer for rollout in rollouts for answer in rollout.completions]
    flat = [not rollout.advantage.any() for rollout in rollouts]
    texts = [{answer.text for answer in rollout.completions} for rollout in rollouts]
    points = [sum(len(one.points) for one in r.answer.objects or []) for r in rewards]
    line = {"reward": mean(r.total for r in rewards)}
    for name in rewards[0].terms:
        line[name] = mean(r.terms[name] for r in rewards)
    return line | {
        "iou": mean(r.iou for r in rewards),
        "zero_variance": mean(flat),  # share of groups with equal rewards
        "truncated": mean(a.truncated for a in answers),
        "unique": sum(len(group) for group in texts) / len(answers),
        "points": mean(points),
        "length": mean(len(a.ids) for a in answers),
    }


def flat_tokens(rollouts: list) -> float:
    """Return the share of an update's tokens in groups with advantages of 0. Prompts count too."""
    tokens = [len(rollout.prompt.ids) + sum(rollout.lengths) for rollout in rollouts]
    learnt = [n for n, rollout in zip(tokens, rollouts) if rollout.advantage.any()]
    return 1 - sum(learnt) / sum(tokens)


def saving_line(log: list[dict]) -> str:
    """Return a line about the time that --skip-flat would have saved.

    `log` holds the lines of metrics.jsonl. The time of an update is about proportional to its
    tokens.
    """
    share = mean(line["zero_variance"] for line in log)
    seconds = sum(line["seconds_update"] for line in log)
    saved = sum(line.get("flat_tokens", 0.0) * line["seconds_update"] for line in log)
    return (
        f"groups with equal rewards: {100 * share:.0f} %. With --skip-flat, the updates would have "
        f"taken about {100 * saved / seconds:.0f} % less time ({saved / 60:.1f} minutes), but "
        "these groups would have no KL"
    )


def token_mean(forwards: list[dict], name: str) -> float:
    """Return the mean of one value over the tokens of all forwards."""
    total = sum(values[name].sum().item() for values in forwards)
    return total / sum(len(values[name]) for values in forwards)


def sampling_gap(forwards: list[dict]) -> dict:
    """Return the mean and the largest error that rounding causes in log-probabilities, in nats.

    If there were no rounding, a token would have the same log-probability in the first update as in
    sampling.
    """
    if not forwards:
        return {}
    largest = max(values["sampling_gap"].max().item() for values in forwards)
    return {"sampling_gap": token_mean(forwards, "sampling_gap"), "sampling_gap_max": largest}


# columns of a step in which no process had a forward
WITHOUT_FORWARDS = {
    "ratio_min": 1.0,
    "ratio_max": 1.0,
    "approx_kl": 0.0,
    "clip_low": 0.0,
    "clip_high": 0.0,
    "entropy": 0.0,
    "sampling_gap": 0.0,
    "sampling_gap_max": 0.0,
}


def step_line(line: dict, drawn: int, s: Settings) -> dict:
    """Add the last columns to a step's log line, and return it. The step asked `drawn` questions."""
    tokens = line["length"] * drawn * s.group
    if "approx_kl" not in line:
        line |= WITHOUT_FORWARDS
    line["tokens_per_second"] = tokens / line["seconds_rollout"]
    line["peak_memory_gib"] = peak_memory(s.device)
    if s.redraw:
        line["drawn"] = drawn
    return line


def token_means(forwards: list[dict]) -> dict:
    """For each value that the loss returns, return the mean over all tokens.

    The ratio gets its minimum and maximum instead of a mean. If no group takes part in an update,
    there is no forward, and the result is empty.
    """
    if not forwards:
        return {}
    names = forwards[0].keys() - {"ratio", "sampling_gap"}
    log = {name: token_mean(forwards, name) for name in sorted(names)}
    if "ratio" in forwards[0]:
        log["ratio_min"] = min(1.0, *(values["ratio"].min().item() for values in forwards))
        log["ratio_max"] = max(1.0, *(values["ratio"].max().item() for values in forwards))
    return log


LOSS_VALUES = {"ratio", "kl", "kl_bounded", "clip_low", "clip_high"}  # of grpo_loss


def check_values(values: dict, rollouts: list) -> None:
    """Raise UserError if a loss returns a value that the log cannot take.

    A value has the shape [S], and its name is no other column of the log. For the endings _min and
    _max see reward.check_terms.
    """
    terms = {name for rollout in rollouts for reward in rollout.rewards for name in reward.terms}
    for name in values.keys() - LOSS_VALUES:
        if name in COLUMNS or name in terms or name.endswith(("_min", "_max")):
            raise UserError(
                f"rename the value {name!r} of the loss: the log uses this name or ending"
            )
        shape = getattr(values[name], "shape", ())  # a Python number has no shape
        if len(shape) != 1:
            raise UserError(
                f"the value {name!r} of the loss must have one number for each token, so its shape "
                f"is [S]. Its shape is {list(shape)}"
            )


MOST_SKIPPED = 10  # the run ends after this number of skipped updates in a row


def count_skipped(parts, number: int) -> None:
    """Count a skipped update, whose number is `number`. Raises UserError for ten in a row."""
    if is_first():
        tqdm.write(f"update {number} skipped: its gradient is not finite. If repeated, lower --lr")
    parts.skipped += 1
    if parts.skipped >= MOST_SKIPPED:
        raise UserError(
            f"the gradients of {MOST_SKIPPED} updates in a row were not finite, so the policy no "
            f"longer learns. Start another run with a lower --lr (this run: {parts.settings.lr})"
        )


def first_answers(rollouts: list) -> list[dict]:
    """Return one line of answers.jsonl for each question, with its first sampled answer."""
    lines = []
    for rollout in rollouts:
        answer = rollout.completions[0]
        reward = rollout.rewards[0]
        line = {
            "id": rollout.sample.id,
            "kind": rollout.sample.kind,
            "question": rollout.sample.question,
            "text": answer.text,
            "tokens": len(answer.ids),
            "reward": reward.total,
            "iou": round(reward.iou, 3),
        }
        lines.append(line)
    return lines


def base_summary(rollouts: list, s: Settings) -> str:
    """Return one line that summarises a few sampled answers of the base model.

    The line contains a warning if training can learn almost nothing from such answers.
    """
    means = describe(rollouts)
    answers = [reward.answer for rollout in rollouts for reward in rollout.rewards]
    in_format = mean(answer.in_format for answer in answers)
    line = (
        f"the base model's answers to {len(rollouts)} questions, {s.group} each: in the format "
        f"{in_format:.2f}, mean IoU {means['iou']:.2f}, truncated {means['truncated']:.2f}"
    )
    if means["truncated"] > 0.5:
        return (
            f"{line}. Warning: most answers are cut off. A truncated answer gets no reward for the "
            "reasoning format, and often no box. "
            f"Raise --max-new-tokens (now {s.max_new_tokens})"
        )
    text = " ".join(rollouts[0].completions[0].text.split())
    first = f"The first answer: {text[:120]!r}"
    if not any(answer.segmentation_format for answer in answers):
        return (
            f"{line}. Warning: no answer is in the requested format, so the policy cannot learn. "
            f"Try a larger --group, a higher --temperature, or another policy. {first}"
        )
    if not any(answer.reasoning_format for answer in answers):
        return (
            f"{line}. Warning: no answer has the form <think>...</think><answer>...</answer>, so "
            f"no answer gets the reward for the reasoning format. The other rewards remain. {first}"
        )
    return line


# -------------------------------------------------------------- held-out questions


def score_base(
    policy: Policy, segmenter: Segmenter, validation, test, s: Settings, folder: Path, resumed: bool
) -> dict:
    """Return the scores of the base model on the test set, and of SAM with the true boxes.

    A resumed run reads these scores from base.json, unless --max-new-tokens has changed.
    """
    base = read_base(folder) if resumed else None
    # With another --max-new-tokens, old scores cannot be compared with new ones.
    if base is not None and base.get("max_new_tokens", s.max_new_tokens) == s.max_new_tokens:
        return base
    with policy.as_reference():
        report = evaluate(policy, segmenter, test, s, "test base", with_ceiling=True)
        base = report.summary() | {"ceiling": report.ceiling}
        base["max_new_tokens"] = s.max_new_tokens
        if is_first():
            write_json(folder / "test-base.json", report.each())
            write_json(folder / "base.json", base)
        if s.eval_every:
            validate(policy, segmenter, validation, s, folder, 0)
    return base


def validate(
    policy: Policy, segmenter: Segmenter, validation, s: Settings, folder: Path, step: int
) -> dict:
    """Evaluate on the validation set after `step` steps, and draw a sheet of twelve answers.

    Returns the log columns with names that begin with validation_.
    """
    report = evaluate(policy, segmenter, validation, s)
    if is_first():
        title = f"Validation after {step} steps" if step else "Validation before training"
        path = folder / f"sheet-{step:05d}.png"
        draw_sheet(path, title, policy, segmenter, validation, report.rows[:12], s)
    scores = report.summary().items()
    return {f"validation_{name}": value for name, value in scores if isinstance(value, float)}


def summarise(
    policy: Policy, segmenter: Segmenter, test, s: Settings, folder: Path, base: dict, run: Run
) -> dict:
    """Evaluate the trained policy on the test set. Print, draw and write the results.

    Returns the content of summary.json.
    """
    report = evaluate(policy, segmenter, test, s, "test trained")
    summary = {
        "samples": run.total * s.questions,
        "seed": s.seed,
        "seconds": run.seconds(),
        "base": {k: v for k, v in base.items() if k not in ("ceiling", "max_new_tokens")},
        "trained": report.summary(),
        "ceiling": base["ceiling"],
    }
    if is_first():
        rows = report.each()
        write_json(folder / "summary.json", summary)
        write_json(folder / "test-trained.json", rows)
        path = folder / "sheet-test.png"
        title = "Held-out test questions after training"
        draw_sheet(path, title, policy, segmenter, test, report.rows[:12], s)
        log = read_log(folder)
        if log:
            curves(folder / "curves.png", log, summary)
        print(before_after(summary))
        side = policy.answer_side(s.image_size)
        before = read_test_answers(folder)
        try_report(folder, lambda: held_out(test, segmenter, s, side, before, rows))
        if log and s.beta and not s.skip_flat:
            print(saving_line(log))
        print(f"adapter, log, curves, sheets and report.html are in {folder}")
    return summary
