"""Two options from later papers: dynamic sampling (DAPO) and decoupled reward terms (GDPO).

DAPO (arXiv 2503.14476), option --redraw: a group (all answers to one question) with equal rewards
teaches nothing, so a new question replaces it. GDPO (arXiv 2601.05242), option --advantage gdpo:
the answers of a group are compared in each reward term, before the terms are added.
"""

import torch

from .processes import gather, share
from .reward import Reward


def redraw(
    parts, data, rollouts: list, uniforms: torch.Tensor, asked: int, seconds: dict
) -> tuple[list, int]:
    """In `rollouts`, replace each group whose advantages are all 0 by a group of a new question.

    `uniforms` [B, G, L] are the random numbers that choose tokens: B questions of this process, G
    answers, L tokens of an answer. The new questions begin at number `asked`. After the last
    question of the data, the first comes again. A group's place in the batch of all processes
    decides which question it gets. So the new questions do not depend on the number of processes.
    The times are added to the dict `seconds`. Returns this process's new groups, and the number of
    new groups in all processes.
    """
    from .grpo import roll_out  # grpo.py imports this file

    places = share(range(parts.settings.questions))  # of this process's groups in the batch
    flat = [i for i, rollout in enumerate(rollouts) if not rollout.advantage.any()]
    everywhere = sorted(gather([places[i] for i in flat]))
    if not flat:
        return [], len(everywhere)
    numbers = [asked + everywhere.index(places[i]) for i in flat]
    samples = [data[number % len(data)] for number in numbers]
    new, more = roll_out(parts, samples, uniforms[flat])
    for i, rollout in zip(flat, new):
        rollouts[i] = rollout
    for name in more:
        seconds[name] += more[name]
    return new, len(everywhere)


def gdpo_advantages(groups: list[list[Reward]], weights: dict[str, float]) -> torch.Tensor:
    """Compare B x G answers within their groups, one reward term at a time. Returns [B, G].

    scale_to_batch is the last step of GDPO. A term without a weight has the weight 1.
    """
    from .grpo import advantages  # grpo.py imports this file

    total = torch.zeros(len(groups), len(groups[0]))  # [B, G]
    size = 0.0
    for name in groups[0][0].terms:
        term = torch.tensor([[reward.terms[name] for reward in group] for group in groups])
        weight = weights.get(name, 1.0)
        # A_i = sum_k w_k (r_ik - mean(r_k)) / std(r_k)
        total += weight * advantages(term)
        size += abs(weight)
    # Terms that cancel leave only rounding errors. Then the group teaches nothing.
    return total.masked_fill(total.abs() < 1e-5 * size, 0.0)


def scale_to_batch(rollouts: list) -> None:
    """Divide all advantages by their standard deviation over the answers of all processes.

    GDPO also subtracts their mean. It is 0 in each group here, so it is 0 in the batch.
    """
    groups = gather([rollout.advantage for rollout in rollouts])  # [G] each
    std = torch.stack(groups).std(correction=0)
    for rollout in rollouts:
        rollout.advantage = rollout.advantage / (std + 1e-6)
