"""What sharing the prompt saves, and what 4-bit weights cost, in one run: `python -m samr1_mini.benchmark`; on a GPU, `--shape 3b` or `7b`
takes a policy of that true shape with random weights.

Rollouts: `policy.sample` against transformers' generate, (a) with num_return_sequences=G, which encodes a picture once and reads the
prompt G times, and (b) with the prompt given G times, as trainers do that treat every answer as a row. Both start from pictures and
questions. Update: `policy.logprobs` on packed rows against a padded batch in which every answer carries its own copy of the prompt,
(a) through the model's own forward, pictures and all, and (b) with the pictures' features at hand as ours are.
Same policy, prompts and numbers of tokens; the median of several rounds in turn.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from .data import load_data
from .memory import device_name
from .policy import Policy, encode, load_policy, logprobs, prompt_text, sample
from .rehearse import SHAPES, random_policy, shape_config


def seconds(functions: dict, rounds: int) -> dict:
    """Median seconds of each function, run in turn so that a busy moment hits all alike; the first round warms up."""
    taken = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in taken.items()}


def compare(policy: Policy, size: int, questions: int, group: int, tokens: int, rounds: int) -> dict:
    """Seconds of each way for `questions` pictures of size x size pixels with `group` answers of `tokens` tokens."""
    samples = list(load_data("shapes", "validation", questions))
    images, asked = [x.image.resize((size, size)) for x in samples], [x.question for x in samples]
    policy.banned[policy.stop] = True  # all answers get the full length, here and below

    def read(asked, images):
        texts = [prompt_text(policy.processor, q, size, size) for q in asked]
        return policy.processor(text=texts, images=images, padding=True, return_tensors="pt").to(policy.device)

    def encoded():
        with torch.no_grad():
            return encode(policy, images, asked)

    def generate(copies: int):
        policy.base.model.rope_deltas = None
        inputs = read([q for q in asked for _ in range(copies)], [x for x in images for _ in range(copies)])
        policy.base.generate(**inputs, num_return_sequences=group // copies, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                             max_new_tokens=tokens, min_new_tokens=tokens)

    result = {"rollout": seconds({
        "shared prompt": lambda: sample(policy, encoded(), group, tokens), "  of it, encoding the picture": encoded,
        "generate": lambda: generate(1), "generate, prompt repeated": lambda: generate(group),
    }, rounds)}
    policy.banned[policy.stop] = False

    prompts = encoded()
    groups = [[torch.randint(300, 400, (tokens,), device=policy.device) for _ in range(group)] for _ in prompts]
    everyone = read([q for q in asked for _ in range(group)], [x for x in images for _ in range(group)])
    answers = torch.stack([ids for g in groups for ids in g])  # [N, L]
    everyone["input_ids"] = torch.cat([everyone["input_ids"], answers], 1)
    everyone["attention_mask"] = torch.cat([everyone["attention_mask"], torch.ones_like(answers)], 1)
    everyone["mm_token_type_ids"] = torch.cat([everyone["mm_token_type_ids"], torch.zeros_like(answers)], 1)

    def packed():
        logprobs(policy, prompts, groups)[0].sum().backward()

    def padded():
        policy.base.model.rope_deltas = None
        logits = policy.base(**everyone, logits_to_keep=tokens + 1).logits[:, :-1].float()
        logits.log_softmax(-1).gather(-1, answers[..., None]).sum().backward()

    def padded_features():
        logprobs(policy, [p for p in prompts for _ in range(group)], [[ids] for g in groups for ids in g])[0].sum().backward()

    policy.model.train()
    result["update"] = seconds({"packed": packed, "padded": padded, "padded, features at hand": padded_features}, rounds)
    policy.model.eval()
    policy.model.zero_grad()
    return {"size": size, "questions": questions, "group": group, "prompt_tokens": len(prompts[0].ids), "answer_tokens": tokens, **result}


def make_policy(shape: str, load_in: str, device: str) -> Policy:
    """The tiny policy, or one of a true shape with random weights."""
    return load_policy("tiny", load_in, device=device) if shape == "tiny" else random_policy(shape_config(shape), load_in, 32, device, device == "cuda")


def compare_weights(shape: str, formats: tuple, device: str, size: int, questions: int, group: int, tokens: int, rounds: int) -> dict:
    """Seconds of a rollout and of an update with the base's weights in each format."""
    samples, functions = list(load_data("shapes", "validation", questions)), {}
    images, asked = [x.image.resize((size, size)) for x in samples], [x.question for x in samples]
    for load_in in formats:
        policy = make_policy(shape, load_in, device)
        policy.banned[policy.stop] = True
        with torch.no_grad():
            prompts = encode(policy, images, asked)
        groups = [[torch.randint(300, 400, (tokens,), device=device) for _ in range(group)] for _ in prompts]
        functions[f"{load_in}, rollout"] = lambda p=policy, x=prompts: sample(p, x, group, tokens)
        functions[f"{load_in}, update"] = lambda p=policy, x=prompts, g=groups: logprobs(p, x, g)[0].sum().backward()
    return seconds(functions, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the warm-up (default 5)")
    parser.add_argument("--tokens", type=int, default=40, help="answer length, tokens (default 40)")
    parser.add_argument("--shape", default="tiny", choices=("tiny", *SHAPES), help="the policy: the tiny one, or a shape with random weights (default tiny)")
    parser.add_argument("--out", help="write the figures to this JSON file too")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = args.shape == "tiny"
    policy = make_policy(args.shape, "nf4", device)
    results = [compare(policy, 112, 8, 8, args.tokens, args.rounds), compare(policy, 840, 1, 8, args.tokens, args.rounds)]
    del policy  # a card may not hold it and the ones below
    for r in results:
        print(f"\n{r['questions']} x {r['group']} answers of {r['answer_tokens']} tokens, prompts of {r['prompt_tokens']} tokens ({r['size']} px)")
        for phase, taken in (("rollout", r["rollout"]), ("update", r["update"])):
            base = next(iter(taken.values()))
            for name, value in taken.items():
                print(f"  {phase:<8} {name:<28} {value:7.3f} s   {value / base:5.1f} x")
    formats, size = (("nf4", "bf16", "fp32"), 112) if small else (("nf4", "bf16"), 840)
    weights = compare_weights(args.shape, formats, device, size, 8 if small else 1, 8, args.tokens, args.rounds)
    print(f"\nweights of the frozen base ({size} px)")
    for name, value in weights.items():
        print(f"  {name:<14} {value:7.3f} s")
    if args.out:
        Path(args.out).write_text(json.dumps({"device": device_name(), "shape": args.shape, "results": results, "weights": weights}, indent=1))


if __name__ == "__main__":
    main()
