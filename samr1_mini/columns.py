"""Describe the columns of metrics.jsonl. This file has one line for each step.

A new reward term logs a column with the name of the term, between "reward" and "zero_variance".
This column needs no entry here.
"""

from dataclasses import fields

from .config import Settings, option

COLUMNS = {
    "step": "number of the step, from 1",
    "reward": "weighted sum of the reward terms, mean over the sampled answers",
    "accuracy": "accuracy term, 0 to 4: eq. (5) or --accuracy, mean over the answers",
    "iou": "IoU of SAM's mask with the true mask, 0 to 1, mean over the answers; 0 without a box",
    "reasoning_format": "share of answers <think>...</think><answer>...</answer>; a reward term",
    "segmentation_format": "share of answers with box and points in the asked JSON; a reward term",
    "zero_variance": "share of groups whose answers all have the same reward, before --redraw "
    "(with gdpo: the same value in each reward term, or terms that cancel)",
    "truncated": "share of answers cut off at --max-new-tokens",
    "unique": "share of different texts among the answers of a group, mean over groups",
    "points": "number of points in an answer, mean",
    "length": "tokens of an answer, mean",
    "flat_tokens": "share of the update's tokens, prompts included, in groups with equal rewards "
    "(after --redraw)",
    "ratio_min": "smallest ratio pi / pi_old of a token, eq. (4), at most 1",
    "ratio_max": "largest ratio pi / pi_old of a token, eq. (4), at least 1",
    "loss": "loss, which is minus eq. (4), mean over the questions",
    "sampling_gap": "rounding: nats between sampling and the first update, mean over tokens",
    "sampling_gap_max": "rounding: nats between sampling and the first update, largest of a token",
    "kl": "KL to the base model, eq. (3), nats a token",
    "kl_bounded": "share of tokens at the bound --kl-bound (older logs: kl_held)",
    "approx_kl": "estimate of KL(pi_old, pi) from the ratio, nats a token",
    "clip_low": "share of tokens clipped at 1 - eps_low",
    "clip_high": "share of tokens clipped at 1 + eps_high",
    "entropy": "entropy of the distribution of the next token, nats a token",
    "grad_norm": "norm of the gradient before it is scaled to --max-grad-norm, "
    "mean over updates (0: skipped)",
    "skipped_updates": "number of updates without a finite gradient; only in steps that have some",
    "lr": "learning rate of the last update",
    "seconds_update": "seconds of the updates",
    "seconds_rollout": "seconds of sampling the answers",
    "seconds_reward": "seconds of SAM and the reward",
    "drawn": "questions asked in this step; only with --redraw",
    "peak_memory_gib": "peak memory so far, GiB: of the GPU, or of the process on a CPU",
    "tokens_per_second": "sampled tokens in a second of the rollout",
    "validation_gIoU": "mean IoU of the validation questions; 0 outside the format",
    "validation_gIoU_lenient": "the same, and a box in any shape counts",
    "validation_cIoU": "sum of intersections over sum of unions of the validation questions",
    "validation_format": "share of validation answers in the format",
    "validation_box_accuracy": "share of validation answers in the format whose box has an IoU "
    "above 0.5",
    "validation_N_acc": "share of validation questions without an object with an empty answer",
    "validation_T_acc": "share of the other validation questions with an object in the answer",
    "validation_truncated": "share of validation answers cut off at --max-new-tokens",
}


def reward_columns(names: list[str]) -> list[str]:
    """Return the names of the reward terms among the names of a log's columns, in order."""
    first = names.index("reward") + 1
    last = names.index("zero_variance")
    return [name for name in names[first:last] if name != "iou"]


def explain(name: str) -> str:
    """Return a description of a column in one line, with its unit."""
    if name in COLUMNS:
        return COLUMNS[name]
    for f in fields(Settings):
        if f.name == f"{name}_weight":
            return f"reward term, mean over the answers. {option(f.name)}: {f.metadata['help']}"
    return f"a new column. A reward term has the weight 1 until there is {option(name)}-weight"
