"""Ablations that need a function of their own: two losses, a reward, and other masks.

`python tutorials/row_functions.py ROW [options of train.py]` trains one of them. ablations.py runs
this command.
"""

import sys
import zlib
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # Python looks for modules only in the script's own folder

from samr1_mini.config import Settings, UserError, exit_with, parse_settings, print_anything
from samr1_mini.data import Data, Sample
from samr1_mini.grpo import grpo_loss, kl_to_base, token_weights, train
from samr1_mini.loading import open_three
from samr1_mini.reward import Reward, reward_terms
from tutorials.ablations import BY_FUNCTION


def dr_grpo_loss(logp, old, reference, advantage, lengths, s):
    """Return the loss of Dr. GRPO (arXiv 2503.20783). Use it with --advantage mean.

    A group's sum over tokens is divided by a constant, not by the group's number of tokens. The
    constant is the largest possible number of tokens, G x --max-new-tokens. The arguments
    are those of grpo_loss.
    """
    mean = replace(s, normalise="token")  # over the tokens of one group
    total = 0.0
    logged = []
    start = 0
    for group in lengths:
        tokens = slice(start, start + sum(group))
        start = tokens.stop
        base = None if reference is None else reference[tokens]
        loss, values = grpo_loss(logp[tokens], old[tokens], base, advantage[tokens], [group], mean)
        total = total + loss * sum(group) / (len(group) * s.max_new_tokens)
        logged.append(values)
    return total, {name: torch.cat([values[name] for values in logged]) for name in logged[0]}


def gspo_loss(logp, old, reference, advantage, lengths, s):
    """Return the loss of GSPO (arXiv 2507.18071), which has one ratio for each answer."""
    sizes = [length for group in lengths for length in group]
    means = torch.stack([gap.mean() for gap in (logp - old).split(sizes)])  # one for each answer
    ratio = means.exp().repeat_interleave(torch.tensor(sizes, device=logp.device))  # [S]
    clipped = ratio.clamp(1 - 3e-4, 1 + 4e-4)
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    values = {"ratio": ratio, "clip_high": (ratio > 1 + 4e-4) & (advantage > 0)}
    values["clip_low"] = (ratio < 1 - 3e-4) & (advantage < 0)
    if reference is not None:
        values["kl"], _ = kl_to_base(logp, reference, s.kl_bound)
        objective = objective - s.beta * values["kl"]
    weight = token_weights(lengths, "sequence").to(logp.device)
    return -(weight * objective).sum(), values


def random_accuracy(reward: Reward, s: Settings) -> dict[str, float]:
    """Return the reward terms, with a random tier of eq. (5) as the accuracy.

    The tier depends only on the seed, the question and the answer, so a resumed run repeats it.
    """
    key = (s.seed, reward.sample.id, reward.answer.tokens.tolist())
    tiers = [0.0, 2.0, 3.0, 4.0]
    number = zlib.crc32(repr(key).encode()) % len(tiers)
    return reward_terms(reward, s) | {"accuracy": tiers[number]}


class OtherMasks(Data):
    """Questions, each with the mask of the next question. All pictures must have the same size."""

    def __init__(self, data: Data):
        self.data = data
        self.ids = data.ids

    def __len__(self) -> int:
        return len(self.data)

    def sample_at(self, i: int) -> Sample:
        other = self.data[(i + 1) % len(self.data)]
        return replace(self.data[i], mask=other.mask, masks=other.masks, ignore=other.ignore)


def arguments(row: str, s: Settings) -> dict:
    """Return the arguments of `train` for a row of the ablations."""
    if row == "mask of another question":
        data, validation, test = open_three(s)
        return {"sets": [OtherMasks(data), validation, test]}
    functions = {
        "Dr. GRPO": {"loss": dr_grpo_loss},
        "GSPO": {"loss": gspo_loss},
        "random reward": {"reward_terms": random_accuracy},
    }
    return functions[row]


def main(argv: list[str]) -> None:
    print_anything()
    if not argv or argv[0] not in BY_FUNCTION:
        names = ", ".join(f'"{row}"' for row in BY_FUNCTION)
        sys.exit(f"row_functions.py: error: the first argument must be one of {names}")
    settings, line = parse_settings(argv[1:], "row_functions.py", __doc__)
    print(line, flush=True)
    try:
        train(settings, **arguments(argv[0], settings))
    except (UserError, OSError) as error:
        exit_with(error, "row_functions.py")


if __name__ == "__main__":
    main(sys.argv[1:])
