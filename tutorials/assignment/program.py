"""A complete training in one file. Read it after the assignment, and change it as you like.

    python tutorials/assignment/program.py --run runs/program

It makes 40 steps of 8 questions with 8 answers. A step has several updates, each with a part of the
questions. The folder of the run gets metrics.jsonl and report.html. This program has one process,
no evaluation and no --resume. Otherwise it computes the same as train.py.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # Python looks only in the script's own folder

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
    """Reward each answer, and return one rollout for each question."""
    rollouts = []
    for sample, prompt, completions in zip(samples, prompts, groups):
        answers = [read_answer(one.text, SIDE, tokens=one.ids) for one in completions]
        rewards = score_group(parts.segmenter, sample, answers, parts.settings)
        rollouts.append(Rollout(sample, prompt, completions, rewards))
    return rollouts


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
            rollout.reference, _ = logprobs(parts.policy, [rollout.prompt], [rollout.ids])


def group_loss(rollout: Rollout, logp: torch.Tensor, s: Settings) -> tuple[torch.Tensor, dict]:
    """Return minus eq. (4) for one group, and values of each token [S] for the log."""
    lengths = torch.tensor(rollout.lengths)
    advantage = rollout.advantage.repeat_interleave(lengths)  # [S]
    ratio = (logp - rollout.old).exp()  # [S]
    clipped = ratio.clamp(1 - s.eps_low, 1 + s.eps_high)
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    kl, _ = kl_to_base(logp, rollout.reference, s.kl_bound)
    values = {
        "ratio": ratio,
        "kl": kl,
        "clip_low": (ratio < 1 - s.eps_low) & (advantage < 0),
        "clip_high": (ratio > 1 + s.eps_high) & (advantage > 0),
    }
    return -(objective - s.beta * kl).mean(), values


def update(parts: Parts, rollouts: list[Rollout]) -> dict:
    """Make the updates of a step, each with an equal share of the questions. Return columns to log."""
    s, trained = parts.settings, parts.policy.trained
    size = len(rollouts) // s.updates
    forwards = []
    norms = []
    for start in range(0, len(rollouts), size):
        batch = rollouts[start : start + size]
        for rollout in batch:
            logp, entropy = logprobs(parts.policy, [rollout.prompt], [rollout.ids], s.temperature)
            loss, values = group_loss(rollout, logp, s)
            (loss / len(batch)).backward()
            keep_tokens([rollout], logp.detach(), entropy)
            forwards.append({name: v.detach() for name, v in values.items()} | {"entropy": entropy})
        norms.append(torch.nn.utils.clip_grad_norm_(trained, s.max_grad_norm).item())
        parts.optimizer.step()
        parts.optimizer.zero_grad()
    return token_means(forwards) | {"grad_norm": sum(norms) / len(norms)}


def train(parts: Parts, data, folder: Path) -> list[dict]:
    """Make all steps, and write the log. Returns its lines."""
    s = parts.settings
    steps = len(data) // s.questions
    (folder / "metrics.jsonl").unlink(missing_ok=True)
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
    torch.set_num_threads(1)
    s, _ = make_settings(
        preset="tiny",
        device="cpu",
        run=str(args.run),
        seed=args.seed,
        questions=8,
        samples=8 * args.steps,
        lr=5e-4,
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
