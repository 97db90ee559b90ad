"""GRPO as SAM-R1 trains with it: one readable loop of rollout, reward, advantage, update, log, save.

Equations (1) to (5) are the paper's (arXiv 2505.22596). What differs from textbook GRPO, eq. (2): the clip is
asymmetric and one normaliser serves all tokens of a group, eq. (4). KL stays: without it the paper saw training
collapse.

"The loss stays near 0, is it broken?" No: advantages of a group sum to 0, and in the first update of a batch the ratio
is 1 (under eq. (2) the loss is then beta times the KL; under eq. (4) long answers weigh more). The gradient is not 0.
The ratio moves, and the clip begins to matter, from the second update of a batch on.

Shapes: B questions, G answers a question, S all answer tokens of a batch, answer after answer.
"""

import time
from collections import defaultdict
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from .config import Settings, UserError
from .data import Sample
from .evaluation import policy_image
from .decoding import Completion, generate
from .policy import Policy, Prompt, encode, logprobs
from .reward import Reward, score_group
from .loading import load_parts, open_sets
from .memory import free_memory, peak_memory, questions_per_batch
from .processes import add_up_gradients, average, is_first, join_processes, together
from .reports import describe, first_answers, base_summary, score_base, summarise, validate
from .runs import Run, known_missing, open_run
from .segmenter import Segmenter

# ---------------------------------------------------------------------------------------------------- the equations


def advantages(rewards: torch.Tensor, kind: str = "std") -> torch.Tensor:
    """Rewards [B, G] -> advantages [B, G]: how much better than its group an answer is. A group without variance gets
    exactly 0.

    >>> advantages(torch.tensor([[6.0, 2.0], [1.0, 1.0]])).tolist()
    [[1.0, -1.0], [0.0, 0.0]]
    """
    centred = rewards - rewards.mean(1, keepdim=True)  # [B, G]
    std = rewards.std(1, keepdim=True, correction=0)  # [B, 1]
    # (1)  A_i = (r_i - mean(r)) / std(r)
    scaled = {"std": centred / std.clamp(min=1e-6), "mean": centred}[kind]
    return torch.where(std > 1e-6, scaled, 0.0)


def token_weights(lengths: list[list[int]], normalise: str) -> torch.Tensor:
    """Lengths of B groups of answers -> the weight of each token [S]; the weights of a group sum to 1.

    A group's weights depend on nothing outside it, so the gradient is the same however a batch is cut into forwards.
    """
    weights = []
    for group in lengths:
        if (
            normalise == "token"
        ):  # (4)  1 / sum_i |o_i|: a token counts the same in a long and in a short answer
            weights += [torch.full((n,), 1 / sum(group)) for n in group]
        elif (
            normalise == "sequence"
        ):  # (2)  (1/G) (1/|o_i|): answers count the same, so a token of a long one less
            weights += [torch.full((n,), 1 / (len(group) * n)) for n in group]
        else:
            raise ValueError(f"no weights are known for normalise {normalise!r}")
    return torch.cat(weights)


def objective(
    logp,
    old,
    reference,
    advantage,
    weight,
    eps_low: float,
    eps_high: float,
    beta: float,
    kl_bound: float = torch.inf,
) -> tuple[torch.Tensor, dict]:
    """The loss (minus eq. 4, summed over groups) from five [S] tensors, and sums over tokens to log; `reference` None
    means beta 0.

    logp: under the policy, with gradient; old: under the policy that sampled; reference: under the frozen base.
    """
    ratio = (logp - old).exp()  # [S] rho = pi / pi_old
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)  # [S] clip-higher: eps_high > eps_low
    # min, for negative advantages too: it is the pessimistic side of the clip in all four quadrants
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)  # [S]
    kl = gap = torch.zeros_like(logp)
    if reference is not None:
        # Eq. (3) has no upper bound: one drawn token that the base finds e^16 times likelier would be the whole update.
        # A token beyond the bound has no gradient.
        gap = reference - logp
        held = gap.clamp(max=kl_bound)
        kl = held.exp() - held - 1  # [S] (3)  KL = pi_ref/pi - log(pi_ref/pi) - 1, the k3 estimator
    # (4)  (1 / sum_i |o_i|) sum_i sum_t [ min(rho A, clip(rho) A) - beta KL ]
    loss = -(weight * (surrogate - beta * kl)).sum()
    with torch.no_grad():
        sums = {
            "kl": kl.sum(),
            "kl_held": (gap > kl_bound).sum(),
            "approx_kl": (ratio - 1 - (logp - old)).sum(),
            "clip_low": ((ratio < 1 - eps_low) & (advantage < 0)).sum(),
            "clip_high": ((ratio > 1 + eps_high) & (advantage > 0)).sum(),
            "sampling_gap": (logp - old).abs().sum(),
            "sampling_gap_max": (logp - old).abs().max(),
            "ratio_min": ratio.min(),
            "ratio_max": ratio.max(),
        }
        return loss, {name: value.item() for name, value in sums.items()}


# ---------------------------------------------------------------------------------------------------- one step


@dataclass
class Rollout:
    """All that a step knows of one question: between sampling and update nothing else is passed on."""

    sample: Sample
    prompt: Prompt
    answers: list[Completion]  # G
    rewards: list[Reward]  # G
    advantage: torch.Tensor | None = None  # [G]
    reference: torch.Tensor | None = (
        None  # [all tokens of the G answers] log-probabilities under the frozen base
    )


def new_optimizer(policy: Policy, s: Settings) -> torch.optim.Optimizer:
    """AdamW on the adapter's weights; the base is frozen."""
    return torch.optim.AdamW(policy.trained, lr=s.lr, betas=(0.9, 0.99), weight_decay=0.0)


@torch.no_grad()
def read_questions(policy: Policy, samples: list[Sample], s: Settings) -> list[Prompt]:
    """Pictures and questions, encoded once for all that a step does with them."""
    return encode(
        policy, [policy_image(x, s.image_size) for x in samples], [x.question for x in samples]
    )


def sample_in_turn(
    policy: Policy, prompts: list[Prompt], s: Settings, uniforms: torch.Tensor
) -> list[list[Completion]]:
    """policy.generate, with no more questions at a time than fit in memory; what comes out is the same."""
    longest, groups = max(len(p.ids) for p in prompts), []
    step = questions_per_batch(policy.base, len(prompts), longest, s, free_memory(s))
    for i in range(0, len(prompts), step):
        groups += generate(
            policy,
            prompts[i : i + step],
            s.group,
            s.max_new_tokens,
            s.temperature,
            uniforms[i : i + step],
        )
    return groups


def roll_out(
    policy: Policy,
    segmenter: Segmenter,
    samples: list[Sample],
    s: Settings,
    uniforms: torch.Tensor | None = None,
) -> tuple[list[Rollout], dict]:
    """Sample G answers to each question, reward them, compare them within their group. `uniforms`: see policy.sample."""
    start = time.perf_counter()
    prompts = read_questions(policy, samples, s)
    if uniforms is None:
        uniforms = torch.rand(len(prompts), s.group, s.max_new_tokens)  # [B, G, L]
    groups = sample_in_turn(policy, prompts, s, uniforms)
    middle = time.perf_counter()
    coordinate_range, rollouts = policy.coordinate_range(s.image_size), []
    for x, prompt, answers in zip(samples, prompts, groups):
        texts = [a.text for a in answers]
        rewards = score_group(
            segmenter,
            x,
            texts,
            coordinate_range,
            s.accuracy,
            s.reward_weights,
            s.max_points,
            s.points,
        )
        rollouts.append(Rollout(x, prompt, answers, rewards))
    totals = torch.tensor([[r.total for r in rollout.rewards] for rollout in rollouts])  # [B, G]
    for rollout, advantage in zip(rollouts, advantages(totals, s.advantage)):
        rollout.advantage = advantage
    return rollouts, {
        "seconds_rollout": middle - start,
        "seconds_reward": time.perf_counter() - middle,
    }


def add_reference(policy: Policy, rollouts: list[Rollout], s: Settings) -> None:
    """Log-probabilities of all answers under the frozen base: it never changes, so once a rollout batch is enough."""
    for i in range(0, len(rollouts), s.micro):
        batch = rollouts[i : i + s.micro]
        with torch.no_grad(), policy.reference():
            groups = [[a.ids for a in r.answers] for r in batch]
            logps, _ = logprobs(policy, [r.prompt for r in batch], groups, s.temperature)  # [S]
        for rollout, reference in zip(
            batch, logps.split([sum(len(a.ids) for a in r.answers) for r in batch])
        ):
            rollout.reference = reference


def update(policy: Policy, optimizer, rollouts: list[Rollout], s: Settings, done: int) -> dict:
    """`passes` x `updates` optimizer steps after `done` earlier ones, each on its share of questions -> what to log."""
    begun, log = time.perf_counter(), defaultdict(float, ratio_min=1.0, ratio_max=1.0)
    policy.model.train()
    if s.beta:
        together(lambda: add_reference(policy, [r for r in rollouts if takes_part(r, s)], s))
    for k in range(s.updates * s.passes):
        start, end = (i * len(rollouts) // s.updates for i in (k % s.updates, k % s.updates + 1))
        for group in optimizer.param_groups:
            group["lr"] = s.lr * min(
                1.0, (done + k + 1) / max(1, s.warmup)
            )  # warm-up, then constant
        optimizer.zero_grad()
        sums = together(lambda: backward(policy, rollouts[start:end], s))
        log["loss"] += sums["loss"] / len(rollouts) / s.passes
        if k == 0:  # nothing was updated since sampling: what differs is rounding
            log["sampling_gap"] = sums["sampling_gap"] / max(1, sums["tokens"])
            log["sampling_gap_max"] = sums["sampling_gap_max"]
        log["ratio_min"] = min(log["ratio_min"], sums["ratio_min"])
        log["ratio_max"] = max(log["ratio_max"], sums["ratio_max"])
        for name in ("tokens", *A_TOKEN):
            log[name] += sums[name]
        add_up_gradients(policy.trained)
        norm = torch.nn.utils.clip_grad_norm_(policy.trained, s.max_grad_norm)
        if norm.isfinite():
            optimizer.step()
            optimizer.skipped_in_a_row = 0
            log["grad_norm"] += norm.item() / (s.updates * s.passes)
        else:
            log["skipped_updates"] += 1
            count_skipped(optimizer, done + k + 1, s)
    policy.model.eval()
    tokens = max(1, log.pop("tokens"))
    a_token = {name: log.pop(name) / tokens for name in A_TOKEN}
    if not s.beta:  # there is no reference to measure it by
        del a_token["kl"], a_token["kl_held"]
    log |= a_token | {
        "lr": optimizer.param_groups[0]["lr"],
        "seconds_update": time.perf_counter() - begun,
    }
    return dict(log)


MOST_SKIPPED = 10  # updates in a row; a gradient that is finite again sets the count to 0


def count_skipped(optimizer, number: int, s: Settings) -> None:
    """Count update `number`, which was skipped. Raises UserError at the tenth in a row, in all processes alike.

    The count is kept at the optimizer, because it goes on from step to step. It is no part of the saved state.
    """
    if is_first():
        tqdm.write(f"update {number}: gradient not finite, skipped; if this goes on, lower --lr")
    optimizer.skipped_in_a_row = getattr(optimizer, "skipped_in_a_row", 0) + 1
    if optimizer.skipped_in_a_row >= MOST_SKIPPED:
        raise UserError(
            f"the gradients of {MOST_SKIPPED} updates in a row were not finite, so nothing is learnt any "
            f"more. Start another run with a lower --lr (this run: {s.lr})"
        )


# Logged as means over the tokens that take part: with --beta 0 or --skip-flat those of groups with variance alone.
A_TOKEN = ("kl", "kl_held", "approx_kl", "clip_low", "clip_high", "entropy")


def takes_part(rollout: Rollout, s: Settings) -> bool:
    """Whether a question takes part in the updates: a group without variance has nothing to say but the KL."""
    return bool(s.beta and not s.skip_flat) or bool(rollout.advantage.any())


def backward(policy: Policy, rollouts: list[Rollout], s: Settings) -> dict:
    """Gradients of one update, `micro` questions a forward; returns sums over its tokens, and extremes."""
    questions = len(rollouts) * PartialState().num_processes  # of this update, in all processes
    rollouts = [
        r for r in rollouts if takes_part(r, s)
    ]  # the term of what is left out is 0 in the mean
    total = defaultdict(float, ratio_min=1.0, ratio_max=1.0)
    for i in range(0, len(rollouts), s.micro):
        loss, sums = batch_loss(policy, rollouts[i : i + s.micro], s)
        (loss / questions).backward()  # eq. (4) is an expectation over questions: their mean
        for name, value in (sums | {"loss": loss.item()}).items():
            extreme = {"_min": min, "_max": max}.get(name[-4:])
            total[name] = extreme(total[name], value) if extreme else total[name] + value
    return total


def batch_loss(policy: Policy, rollouts: list[Rollout], s: Settings) -> tuple[torch.Tensor, dict]:
    """The loss of eq. (4) summed over some questions, and sums over their answer tokens to log."""
    prompts, groups = [r.prompt for r in rollouts], [[a.ids for a in r.answers] for r in rollouts]
    lengths = [[len(ids) for ids in group] for group in groups]
    logp, entropy = logprobs(policy, prompts, groups, s.temperature)  # [S], [S]
    old = torch.cat(
        [a.logps for r in rollouts for a in r.answers]
    )  # [S] from sampling: the same distribution
    reference = torch.cat([r.reference for r in rollouts]) if s.beta else None  # [S]
    each = torch.cat([r.advantage for r in rollouts])  # [B * G]
    advantage = each.repeat_interleave(torch.tensor(lengths).flatten()).to(policy.device)  # [S]
    weight = token_weights(lengths, s.normalise).to(policy.device)  # [S]
    loss, sums = objective(
        logp, old, reference, advantage, weight, s.eps_low, s.eps_high, s.beta, s.kl_bound
    )
    return loss, sums | {"entropy": entropy.sum().item(), "tokens": len(logp)}


def full_rollouts(policy: Policy, prompts: list[Prompt], s: Settings) -> list[Rollout]:
    """Rollouts as large as they can be, every answer of full length: for what an update takes, not for what it does."""
    ids = torch.full((s.max_new_tokens,), 300, device=policy.device)
    logps = torch.zeros(s.group, len(ids), device=policy.device)
    answers = [Completion(ids, row, False, "") for row in logps]
    return [
        Rollout(None, p, answers, [], torch.linspace(-1, 1, s.group), logps.flatten())
        for p in prompts
    ]


def try_largest_update(policy: Policy, samples: list[Sample], s: Settings) -> None:
    """One forward and backward with answers of full length: memory that is too small shows before the first step."""
    rollouts = full_rollouts(policy, read_questions(policy, samples, s), s)
    moments = [
        torch.zeros_like(p) for p in policy.trained for _ in range(2)
    ]  # AdamW will hold as many
    policy.model.train()
    batch_loss(policy, rollouts, s)[0].backward()
    del moments
    policy.model.zero_grad()
    policy.model.eval()


# ---------------------------------------------------------------------------------------------------- the loop


def one_step(
    policy: Policy, segmenter: Segmenter, optimizer, data, s: Settings, step: int
) -> tuple[dict, list[dict]]:
    """Step number `step`, from 0, each process on its share of the questions. Returns what to log, and one of the
    sampled answers to each question."""
    processes = PartialState()
    share = slice(processes.process_index, None, processes.num_processes)
    torch.manual_seed(
        s.seed * 10**6 + step
    )  # a step's draws depend on its number alone: a resumed run repeats them
    uniforms = torch.rand(s.questions, s.group, s.max_new_tokens)  # [B, G, L] for all processes
    batch = [data[i] for i in range(step * s.questions, (step + 1) * s.questions)[share]]
    rollouts, seconds = together(lambda: roll_out(policy, segmenter, batch, s, uniforms[share]))
    learnt = update(policy, optimizer, rollouts, s, step * s.updates * s.passes)
    line = average(
        {**describe(rollouts), **learnt, **seconds, "peak_memory_gib": peak_memory(s.device)}
    )
    tokens = line["length"] * s.questions * s.group
    return {
        "step": step + 1,
        **line,
        "tokens_per_second": tokens / line["seconds_rollout"],
    }, first_answers(rollouts)


def before_training(policy: Policy, segmenter: Segmenter, data, s: Settings, begins: bool) -> None:
    """On a GPU the largest update is tried, and a run that begins says what the base's answers are like."""
    if s.device == "cuda":
        together(
            lambda: try_largest_update(policy, [data[i] for i in range(min(s.micro, len(data)))], s)
        )
    if begins:
        few = [data[i] for i in range(min(4, len(data)))]
        uniforms = torch.rand(
            len(few), s.group, s.max_new_tokens, generator=torch.Generator().manual_seed(s.seed)
        )
        rollouts, _ = together(lambda: roll_out(policy, segmenter, few, s, uniforms))
        if is_first():
            print(base_summary(rollouts, s), flush=True)


def train(s: Settings) -> dict:
    """Train, evaluate and save in the folder `s.run`; returns what summary.json holds.

    Under `accelerate launch` or `torchrun` each process takes its share of the questions of a batch, and gradients add
    up; the first process writes.
    """
    begun, count = time.perf_counter(), join_processes(s.device).num_processes
    if count > 1 and s.questions % (s.updates * count):
        raise UserError(
            f"--questions {s.questions} is no multiple of {count} processes x --updates {s.updates}"
        )
    data, validation, test = sets = open_sets(s)
    folder = broadcast_object_list([open_run(s) if is_first() else None])[0]
    policy, segmenter = load_parts(s, sets, missing=known_missing(folder) if s.resume else [])
    optimizer = new_optimizer(policy, s)
    run = Run(folder, s, policy, optimizer, sets, begun)
    before_training(policy, segmenter, data, s, begins=run.start == 0)
    base = score_base(policy, segmenter, validation, test, s, folder, resumed=run.start > 0)
    with run.saved_whatever_happens():
        for step in run.steps():
            line, answers = one_step(policy, segmenter, optimizer, data, s, step)
            due = bool(s.eval_every) and (step + 1) % s.eval_every == 0
            if due:
                line |= validate(policy, segmenter, validation, s, folder, step + 1)
            run.keep(line, answers, due)
    run.finish()
    return summarise(policy, segmenter, test, s, folder, base, run)
