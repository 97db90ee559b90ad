"""A complete training in one file. Read it before the bug hunt, and change a copy as you like.

    python tutorials/assignment/program.py --run runs/program

It makes 40 steps. A step has 8 questions, with 8 sampled answers to each. A step makes four
updates, each with two of the questions. The folder of the run gets metrics.jsonl and report.html.
This program has one process, no evaluation and no --resume. It uses only some of the settings. With
the settings in the function main, it computes the same numbers as train.py.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # Python looks for modules only in the script's own folder

from samr1_mini.config import Settings, make_settings
from samr1_mini.data import load_data
from samr1_mini.decoding import generate
from samr1_mini.evaluation import encode_questions
from samr1_mini.grpo import Parts, Rollout, kl_to_base, new_optimizer
from samr1_mini.policy import load_policy, logprobs
from samr1_mini.report import write_report
from samr1_mini.reports import describe, token_means
from samr1_mini.reward import read_answer, score_group
from samr1_mini.runs import write_settings
from samr1_mini.segmenter import load_segmenter
from samr1_mini.trace import Trace, keep_tokens

SIDE = 112  # pixels of the square that the policy sees


def sample_groups(parts: Parts, prompts: list) -> list:
    """Return a group of sampled answers to each prompt."""
    s = parts.settings
    uniforms = torch.rand(len(prompts), s.group, s.max_new_tokens)
    return generate(parts.policy, prompts, s.group, s.max_new_tokens, s.temperature, uniforms)


def rewarded(parts: Parts, samples: list, prompts: list, groups: list) -> list[Rollout]:
    """Reward each answer. Return one rollout, a group with its rewards, for each question."""
    rewards = []
    for sample, completions in zip(samples, groups):
        answers = [read_answer(one.text, SIDE, tokens=one.ids) for one in completions]
        rewards.append(score_group(parts.segmenter, sample, answers, parts.settings))
    return [Rollout(*one) for one in zip(samples, prompts, groups, rewards)]


def set_advantages(rollouts: list[Rollout]) -> None:
    """Set the advantages [G] of each group, eq. (1)."""
    for rollout in rollouts:
        rewards = torch.tensor([reward.total for reward in rollout.rewards])
        centred = rewards - rewards.mean()
        rollout.advantage = centred / rewards.std(correction=0).clamp(min=1e-6)


def set_references(parts: Parts, rollouts: list[Rollout]) -> None:
    """Set the log-probabilities [S] of each group under the base model."""
    for rollout in rollouts:
        with torch.no_grad(), parts.policy.as_reference():
            rollout.reference, _ = logprobs(
                parts.policy, [rollout.prompt], [rollout.ids], parts.settings.temperature
            )


def token_objectives(tokens: dict, logp: torch.Tensor, s: Settings) -> tuple[torch.Tensor, dict]:
    """Return two things: the objectives of all tokens [S] by eq. (4), and values [S] for the log.

    `tokens` has three tensors [S]: the log-probabilities "old" and "reference", and "advantage".
    """
    advantage = tokens["advantage"]
    ratio = (logp - tokens["old"]).exp()  # [S]
    clipped = ratio.clamp(1 - s.eps_low, 1 + s.eps_high)
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    kl, _ = kl_to_base(logp, tokens["reference"], s.kl_bound)
    values = {
        "ratio": ratio.detach(),
        "kl": kl.detach(),
        "clip_low": (ratio < 1 - s.eps_low) & (advantage < 0),
        "clip_high": (ratio > 1 + s.eps_high) & (advantage > 0),
    }
    return objective - s.beta * kl, values


def add_gradient(parts: Parts, rollout: Rollout, questions: int) -> list[dict]:
    """Add the gradient of one group. Return values of its tokens for the log.

    `questions` is the number of questions in the update. The loss is divided by it.

    Each forward has half of the group's answers, which saves memory.
    """
    s = parts.settings
    half = s.group // 2
    lengths = torch.tensor(rollout.lengths)
    values_of_tokens = {
        "old": rollout.old,
        "reference": rollout.reference,
        "advantage": rollout.advantage.repeat_interleave(lengths),
    }
    cut = sum(rollout.lengths[:half])
    first = {name: values[:cut] for name, values in values_of_tokens.items()}
    second = {name: values[cut:] for name, values in values_of_tokens.items()}
    logps, forwards = [], []
    for ids, tokens in ((rollout.ids[:half], first), (rollout.ids[half:], second)):
        logp, entropy = logprobs(parts.policy, [rollout.prompt], [ids], s.temperature)  # [S]
        objective, values = token_objectives(tokens, logp, s)
        loss = -objective.sum() / sum(rollout.lengths)
        (loss / questions).backward()
        logps.append(logp.detach())
        forwards.append(values | {"entropy": entropy})
    entropies = torch.cat([values["entropy"] for values in forwards])
    keep_tokens([rollout], torch.cat(logps), entropies)
    return forwards


def update(parts: Parts, rollouts: list[Rollout]) -> dict:
    """Make the updates of a step, each with an equal share of the questions. Return columns to log."""
    s, trained = parts.settings, parts.policy.trained
    size = len(rollouts) // s.updates
    forwards = []
    norms = []
    for start in range(0, len(rollouts), size):
        batch = rollouts[start : start + size]
        for rollout in batch:
            forwards += add_gradient(parts, rollout, len(batch))
        norms.append(torch.nn.utils.clip_grad_norm_(trained, s.max_grad_norm).item())
        parts.optimizer.step()
        parts.optimizer.zero_grad()
    return token_means(forwards) | {"grad_norm": sum(norms) / len(norms)}


def train(parts: Parts, data, folder: Path) -> list[dict]:
    """Make all steps, and write the log. Returns its lines."""
    s = parts.settings
    steps = len(data) // s.questions
    trace = Trace(folder, s, 0, steps)
    log = []
    for step in tqdm(range(steps), "steps"):
        torch.manual_seed(s.seed * 10**6 + step)
        samples = [data[step * s.questions + i] for i in range(s.questions)]
        prompts = encode_questions(parts.policy, samples, SIDE)
        groups = sample_groups(parts, prompts)
        rollouts = rewarded(parts, samples, prompts, groups)
        set_advantages(rollouts)
        set_references(parts, rollouts)
        line = {"step": step + 1} | describe(rollouts) | update(parts, rollouts)
        trace.add(parts, rollouts, line)
        log.append(line)
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return log


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder for the log and the page")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if (args.run / "metrics.jsonl").exists():
        parser.error(f"--run: {args.run} already holds a run. Choose another folder")
    torch.set_num_threads(1)
    s, _ = make_settings(
        preset="tiny",
        device="cpu",
        run=str(args.run),
        seed=args.seed,
        questions=8,
        samples=8 * args.steps,
        lr=5e-4,
        temperature=0.9,
        warmup=0,
    )
    args.run.mkdir(parents=True, exist_ok=True)
    write_settings(args.run, replace(s, processes=1))
    torch.manual_seed(s.seed)  # for the adapter's random weights
    policy = load_policy("tiny", s.load_in, s.rank)
    parts = Parts(policy, load_segmenter("tiny"), new_optimizer(policy, s), s)
    log = train(parts, load_data("shapes", "train", s.samples, s.seed), args.run)
    write_report(args.run)
    return log


if __name__ == "__main__":
    main()
