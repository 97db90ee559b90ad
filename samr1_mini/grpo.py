"""Train by GRPO as in SAM-R1: sample answers (rollout), reward, compare in groups, update, save.

Equations (1) to (5) are the paper's (arXiv 2505.22596). It changes two things in GRPO, eq. (2): the
ratio's clip has unequal limits, and the loss is a mean over all tokens of a group, eq. (4).

From `train` to the gradient:

    train -> one_step -> update -> one_update -> batch_loss -> logprobs   the forward (policy.py)
                                                            -> grpo_loss  eq. (4)
    train -> one_step -> roll_out -> generate_groups, score_group, advantages

Shapes: B questions, G answers to each, at most L tokens in an answer, S tokens in all answers.
Probabilities of a token: pi (policy), pi_old (policy that sampled it), pi_ref (base model).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .config import Settings, check_share
from .data import Sample
from .decoding import Completion, generate_groups
from .evaluation import encode_questions
from .loading import load_models, open_sets
from .memory import usable_memory
from .policy import Policy, Prompt, logprobs
from .processes import add_up_gradients, average, fail_together, is_first, join_processes
from .processes import process_count, share
from .reports import check_values, count_skipped, describe, first_answers, flat_tokens
from .reports import sampling_gap, score_base, step_line, summarise, token_means, validate
from .reward import Reward, check_terms, read_answer, reward_terms, score_group
from .runs import Run, known_missing, opened_run
from .segmenter import Segmenter
from .sizes import layers_to_keep
from .trace import Trace, keep_tokens
from .variants import gdpo_advantages, redraw, scale_to_batch

# --------------------------------------------------------------------------------- the equations


def advantages(rewards: torch.Tensor, kind: str = "std") -> torch.Tensor:
    """Compare each answer with its group: rewards [B, G] -> advantages [B, G].

    A group with equal rewards gets exactly 0. The kind "mean" does not divide by std (Dr. GRPO).

    >>> advantages(torch.tensor([[6.0, 2.0], [1.0, 1.0]])).tolist()
    [[1.0, -1.0], [0.0, 0.0]]
    """
    centred = rewards - rewards.mean(1, keepdim=True)  # [B, G]
    std = rewards.std(1, keepdim=True, correction=0)  # [B, 1]
    low, high = rewards.aminmax(dim=1, keepdim=True)  # [B, 1], [B, 1]
    flat = high - low <= 1e-6 * high.abs().clamp(min=1)  # [B, 1] equal rewards, up to rounding
    if kind == "mean":
        return centred.masked_fill(flat, 0.0)
    if kind != "std":
        raise ValueError(f"the kind must be 'std' or 'mean' here, not {kind!r}")
    # (1)  A_i = (r_i - mean(r)) / std(r)
    return (centred / std.clamp(min=1e-6)).masked_fill(flat, 0.0)


def token_weights(lengths: list[list[int]], normalise: str) -> torch.Tensor:
    """Return the weight of each token [S]. `lengths` holds a list of answer lengths for each group.

    The weights of a group sum to 1 and depend only on this group. one_update divides by the number
    of questions in the update. So the size of a forward does not change the gradient.
    """
    weights = []
    for group in lengths:
        for length in group:
            if normalise == "token":  # (4)  1 / sum_i |o_i|
                weight = 1 / sum(group)
            elif normalise == "sequence":  # (2)  (1 / G) (1 / |o_i|)
                weight = 1 / (len(group) * length)
            else:
                raise ValueError(f"normalise {normalise!r} is neither token nor sequence")
            weights.append(torch.full((length,), weight))
    return torch.cat(weights)


def kl_to_base(logp: torch.Tensor, reference: torch.Tensor, bound: float) -> tuple:
    """Return two tensors [S]: each token's KL to the base model, and whether it is bounded.

    The KL of eq. (3) has no upper bound: one token with pi_ref / pi = e^16 would outweigh all
    others. So log(pi_ref / pi) is limited to `bound`. Above it, the KL of a token has no gradient.
    """
    gap = reference - logp  # [S] log(pi_ref / pi)
    bounded = gap.clamp(max=bound)
    # (3)  KL = pi_ref / pi - log(pi_ref / pi) - 1
    return bounded.expm1() - bounded, gap > bound


def grpo_loss(
    logp: torch.Tensor,
    old: torch.Tensor,
    reference: torch.Tensor | None,
    advantage: torch.Tensor,
    lengths: list[list[int]],
    s: Settings,
) -> tuple[torch.Tensor, dict]:
    """Return the loss, and values of each token [S] for the log file.

    The loss is the sum of eq. (4) over the groups, with a minus sign.

    logp       [S] log-probabilities under the policy, with gradient
    old        [S] log-probabilities under the policy that sampled the answers
    reference  [S] log-probabilities under the frozen base model, or None if beta is 0
    advantage  [S] of each token's answer
    lengths    for each group, a list with the number of tokens of each answer

    The log file gets the mean of each value over the tokens. For another loss, copy this function,
    change it, and pass it to `train`.
    """
    ratio = (logp - old).exp()  # [S] rho = pi / pi_old
    clipped = ratio.clamp(1 - s.eps_low, 1 + s.eps_high)  # [S] clip-higher: eps_high > eps_low
    # This term has no gradient if rho > 1 + eps_high and A > 0, or if rho < 1 - eps_low and A < 0.
    objective = torch.minimum(ratio * advantage, clipped * advantage)  # [S]
    values = {
        "ratio": ratio,
        "clip_low": (ratio < 1 - s.eps_low) & (advantage < 0),
        "clip_high": (ratio > 1 + s.eps_high) & (advantage > 0),
    }
    if reference is not None:
        kl, above = kl_to_base(logp, reference, s.kl_bound)  # [S], [S]
        objective = objective - s.beta * kl
        values |= {"kl": kl, "kl_bounded": above}
    weight = token_weights(lengths, s.normalise).to(logp.device)  # [S]
    # (4)  (1 / sum_i |o_i|) sum_i sum_t [ min(rho A, clip(rho) A) - beta KL ]
    return -(weight * objective).sum(), values


# --------------------------------------------------------------------------------------- rollout


@dataclass
class Parts:
    """Hold the objects that a training step uses."""

    policy: Policy
    segmenter: Segmenter
    optimizer: torch.optim.Optimizer
    settings: Settings
    reward_terms: Callable = reward_terms  # Reward, Settings -> terms by name: see reward.py
    loss: Callable = grpo_loss
    trace: Callable | None = None  # called after each step, with parts, rollouts and log line
    skipped: int = 0  # number of updates since the last one with a finite gradient


@dataclass
class Rollout:
    """Hold one question, its sampled answers, and what the update needs."""

    sample: Sample
    prompt: Prompt
    completions: list[Completion]  # G
    rewards: list[Reward]  # G
    advantage: torch.Tensor | None = None  # [G]
    reference: torch.Tensor | None = None  # [S] log-probabilities under the base model
    new: torch.Tensor | None = None  # [S] log-probabilities in the last update, for trace.py
    entropy: torch.Tensor | None = None  # [S] in the last update

    @property
    def ids(self) -> list[torch.Tensor]:
        """The tokens of each answer."""
        return [one.ids for one in self.completions]

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each answer."""
        return [len(ids) for ids in self.ids]

    @property
    def old(self) -> torch.Tensor:
        """Log-probabilities [S] of all answers under the policy that sampled them."""
        return torch.cat([one.logps for one in self.completions])

    def takes_part(self, s: Settings) -> bool:
        """Return True if the updates use this group. With equal rewards, only its KL counts."""
        has_kl = s.beta and not s.skip_flat
        return bool(has_kl or self.advantage.any())


def roll_out(
    parts: Parts, samples: list[Sample], uniforms: torch.Tensor | None = None
) -> tuple[list[Rollout], dict]:
    """Sample G answers to each question, reward them, and compare them within their group.

    `uniforms` [B, G, L] are the random numbers that choose the tokens. Returns the rollouts, and
    the seconds of sampling and of the reward.
    """
    s, policy = parts.settings, parts.policy
    start = time.perf_counter()
    prompts = encode_questions(policy, samples, s.image_size)
    if uniforms is None:
        uniforms = torch.rand(len(prompts), s.group, s.max_new_tokens)
    groups = generate_groups(policy, prompts, s, uniforms)
    middle = time.perf_counter()
    side = policy.answer_side(s.image_size)
    rollouts = []
    for sample, prompt, completions in zip(samples, prompts, groups):
        answers = [read_answer(c.text, side, s.max_points, c.ids, s.objects) for c in completions]
        rewards = score_group(parts.segmenter, sample, answers, s, parts.reward_terms)
        rollouts.append(Rollout(sample, prompt, completions, rewards))
    check_terms([reward for rollout in rollouts for reward in rollout.rewards])
    if s.advantage == "gdpo":
        each = gdpo_advantages([rollout.rewards for rollout in rollouts], s.reward_weights)
    else:
        totals = [[reward.total for reward in rollout.rewards] for rollout in rollouts]  # B x G
        each = advantages(torch.tensor(totals), s.advantage)
    for rollout, advantage in zip(rollouts, each):
        rollout.advantage = advantage  # [G]
    end = time.perf_counter()
    return rollouts, {"seconds_rollout": middle - start, "seconds_reward": end - middle}


# ---------------------------------------------------------------------------------------- update


def new_optimizer(policy: Policy, s: Settings) -> torch.optim.Optimizer:
    """Return AdamW on the adapter's weights. The base model is frozen."""
    return torch.optim.AdamW(policy.trained, lr=s.lr, betas=(0.9, 0.99), weight_decay=0.0)


@torch.no_grad()
def add_reference(policy: Policy, rollouts: list[Rollout], s: Settings) -> None:
    """Set the base model's log-probabilities in each rollout, for all updates of a step."""
    for i in range(0, len(rollouts), s.micro):
        batch = rollouts[i : i + s.micro]
        prompts = [rollout.prompt for rollout in batch]
        groups = [rollout.ids for rollout in batch]
        with policy.as_reference():
            logps, _ = logprobs(policy, prompts, groups, s.temperature)  # [S]
        sizes = [sum(rollout.lengths) for rollout in batch]
        for rollout, reference in zip(batch, logps.split(sizes)):
            rollout.reference = reference


def batch_loss(parts: Parts, rollouts: list[Rollout]) -> tuple[torch.Tensor, dict]:
    """Run one forward. Return the sum of its questions' losses, and each token's values to log."""
    s, policy = parts.settings, parts.policy
    prompts = [rollout.prompt for rollout in rollouts]
    groups = [rollout.ids for rollout in rollouts]
    lengths = [rollout.lengths for rollout in rollouts]
    if s.checkpointing and s.device == "cuda":
        tokens = [len(prompt.ids) for prompt in prompts]
        free = usable_memory(s)
        policy.keep_layers(layers_to_keep(policy.base, tokens, lengths, s, free))
    logp, entropy = logprobs(policy, prompts, groups, s.temperature)  # [S], [S]
    old = torch.cat([rollout.old for rollout in rollouts])  # [S]
    reference = None
    if s.beta:
        reference = torch.cat([rollout.reference for rollout in rollouts])  # [S]
    each = torch.cat([rollout.advantage for rollout in rollouts])  # [B * G]
    advantage = each.repeat_interleave(torch.tensor(lengths).flatten())  # [S]
    advantage = advantage.to(policy.device)
    loss, values = parts.loss(logp, old, reference, advantage, lengths, s)
    check_values(values, rollouts)
    keep_tokens(rollouts, logp.detach(), entropy)
    gap = logp - old  # [S]
    values |= {"entropy": entropy, "approx_kl": gap.expm1() - gap, "sampling_gap": gap.abs()}
    return loss, {name: value.detach() for name, value in values.items()}


def one_update(parts: Parts, rollouts: list[Rollout]) -> tuple[float, float, list[dict]]:
    """Make one optimizer step with some questions, at most `micro` in each forward.

    Returns the loss summed over the questions, the norm of the gradient, and the token values of
    each forward. If the norm is not finite, the weights stay as they are.
    """
    s, policy = parts.settings, parts.policy
    questions = len(rollouts) * process_count()  # of this update, in all processes
    used = [rollout for rollout in rollouts if rollout.takes_part(s)]  # see takes_part
    total, forwards = 0.0, []
    for i in range(0, len(used), s.micro):
        loss, values = batch_loss(parts, used[i : i + s.micro])
        (loss / questions).backward()  # the paper takes the mean over questions
        total += loss.item()
        forwards.append(values)
    add_up_gradients(policy.trained)
    norm = torch.nn.utils.clip_grad_norm_(policy.trained, s.max_grad_norm)
    if norm.isfinite():
        parts.optimizer.step()
    parts.optimizer.zero_grad()  # frees the gradients' memory for sampling
    return total, norm.item(), forwards


def update(parts: Parts, rollouts: list[Rollout], done: int) -> dict:
    """Make `passes` x `updates` optimizer steps, each with its part of the questions.

    `done` counts the optimizer steps before these. The learning rate rises from lr / warmup to lr
    in the first `warmup` optimizer steps, and then stays. Returns the columns to log.
    """
    s, policy = parts.settings, parts.policy
    begun = time.perf_counter()
    policy.model.train()
    if s.beta:
        add_reference(policy, [rollout for rollout in rollouts if rollout.takes_part(s)], s)
    steps = s.passes * s.updates
    log = {"loss": 0.0, "grad_norm": 0.0}
    forwards = []
    for k in range(steps):
        warm = (done + k + 1) / max(1, s.warmup)
        parts.optimizer.param_groups[0]["lr"] = s.lr * min(1.0, warm)
        part = k % s.updates
        start, end = part * len(rollouts) // s.updates, (part + 1) * len(rollouts) // s.updates
        total, norm, values = one_update(parts, rollouts[start:end])
        log["loss"] += total / len(rollouts) / s.passes
        if math.isfinite(norm):
            log["grad_norm"] += norm / steps
            parts.skipped = 0
        else:
            log["skipped_updates"] = log.get("skipped_updates", 0) + 1
            count_skipped(parts, done + k + 1)
        if k == 0:  # no update since sampling, so logp and old differ only by rounding
            log |= sampling_gap(values)
        forwards += values
    policy.model.eval()
    log |= token_means(forwards)
    log["lr"] = parts.optimizer.param_groups[0]["lr"]
    log["seconds_update"] = time.perf_counter() - begun
    return log


# -------------------------------------------------------------------------------------- the loop


def one_step(parts: Parts, data, step: int, asked: int) -> tuple[dict, list[dict]]:
    """Make step number `step`, counted from 0. Returns its log line and an answer to each question.

    `asked` counts the questions of earlier steps. Each process takes its share of the questions.
    The random numbers depend on the seed and the step. So a resumed run repeats them.
    """
    s = parts.settings
    torch.manual_seed(s.seed * 10**6 + step)
    # [1 + redraw, B, G, L], for all processes: first the step's questions, then those of --redraw.
    uniforms = torch.rand(1 + s.redraw, s.questions, s.group, s.max_new_tokens)
    samples = [data[i % len(data)] for i in share(range(asked, asked + s.questions))]
    rollouts, seconds = roll_out(parts, samples, share(uniforms[0]))
    described = describe(rollouts)  # before --redraw replaces groups
    answers = first_answers(rollouts)
    drawn = s.questions
    for batch in uniforms[1:]:
        new, count = redraw(parts, data, rollouts, share(batch), asked + drawn, seconds)
        drawn += count
        answers += first_answers(new)
    if s.advantage == "gdpo":
        scale_to_batch(rollouts)
    described["flat_tokens"] = flat_tokens(rollouts)
    learnt = update(parts, rollouts, step * s.updates * s.passes)
    line = {"step": step + 1} | step_line(average(described | learnt | seconds), drawn, s)
    if parts.trace:
        parts.trace(parts, rollouts, line)
    return line, answers


@fail_together()
def train(
    s: Settings,
    sets: list | None = None,
    segmenter: Segmenter | None = None,
    log: Callable[[dict], None] | None = None,
    reward_terms: Callable = reward_terms,
    loss: Callable = grpo_loss,
) -> dict:
    """Train, evaluate and save in the folder `s.run`. Returns the content of summary.json.

    `sets` (training, validation, test) and `segmenter` replace those of the settings. The paper's
    `reward_terms` and `loss` are the defaults. `log` gets each log line before it is written. See
    tutorials/notes/extend.md. A call from Python runs in one process (on a CPU, one thread).
    """
    from .rehearse import before_training  # not at the top, because rehearse.py imports this file

    begun = time.perf_counter()
    join_processes(s)
    check_share(s, process_count())
    sets = open_sets(s, sets)
    data, validation, test = sets
    with opened_run(s) as folder:
        missing = known_missing(folder) if s.resume else None
        policy, segmenter = load_models(s, sets, missing=missing, segmenter=segmenter)
        parts = Parts(policy, segmenter, new_optimizer(policy, s), s, reward_terms, loss)
        run = Run(folder, parts, sets, begun)
        if is_first():
            parts.trace = Trace(folder, s, run.start, run.total).add
        before_training(parts, data, run.start > 0)
        base = score_base(policy, segmenter, validation, test, s, folder, run.start > 0)
        with run.saved_whatever_happens():
            for step in run.steps():
                line, answers = one_step(parts, data, step, run.asked)
                due = bool(s.eval_every) and (step + 1) % s.eval_every == 0
                if due:
                    line |= validate(policy, segmenter, validation, s, folder, step + 1)
                if log and is_first():  # before finish_step, which exits after Ctrl-C
                    log(dict(line))
                run.finish_step(line, answers, due)
        run.finish()
        return summarise(policy, segmenter, test, s, folder, base, run)
