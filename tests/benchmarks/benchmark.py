"""What sharing the prompt saves, and what 4-bit weights cost, in one run: `python tests/benchmarks/benchmark.py`;
on a GPU, `--shape 3b` or `7b` takes a policy of that true shape with random weights.

Rollouts, from pictures and questions: `decoding.generate` against transformers' generate with num_return_sequences=G, which
encodes a picture once and reads the prompt G times, and with the prompt given G times, as trainers do that treat every
answer as a row. Updates: `policy.logprobs` on packed rows against a padded batch in which every answer has its own copy
of the prompt, pictures and all, or their features at hand as ours are. Attention: updates against each question in a
padded row under a mask; and one decoded token, in one layer of the 7B shape, against keys that grow by concatenation
and are repeated for every query head. Same policy, prompts and numbers of tokens; the median of several rounds in turn.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # Python looks only in the folder of the script

from samr1_mini.config import auto_device, cell_size
from samr1_mini.data import load_data
from samr1_mini.decoding import Cache, generate
from samr1_mini.evaluation import policy_image
from samr1_mini.policy import (
    Policy,
    chosen_logprobs,
    encode,
    load_policy,
    logprobs,
    pack,
    prompt_text,
)
from samr1_mini.gpu import gpu_is_usable
from samr1_mini.memory import device_name
from samr1_mini.forecast import SHAPES, Counter, shape_config
from samr1_mini.rehearse import random_policy

SIDES = ((8, 8), (30, 1))  # picture tokens a side, and how many questions


def seconds(functions: dict, rounds: int) -> dict:
    """Median seconds of each function, run in turn so that a busy moment hits all alike; the first round warms up."""
    taken = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if gpu_is_usable():
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in taken.items()}


def asked(count: int, size: int) -> tuple[list[Image.Image], list[str]]:
    """Pictures of size x size pixels, and a question about each."""
    samples = list(load_data("shapes", "validation", count))
    return [policy_image(x, size) for x in samples], [x.question for x in samples]


def update_seconds(policy: Policy, ways: dict, rounds: int) -> dict:
    """`seconds` of forward and backward, in training mode; each way returns log-probabilities."""
    policy.model.train()
    taken = seconds(
        {name: lambda way=way: way().sum().backward() for name, way in ways.items()}, rounds
    )
    policy.model.eval()
    policy.model.zero_grad()
    return taken


def compare(
    policy: Policy, size: int, questions: int, group: int, tokens: int, rounds: int
) -> dict:
    """Seconds of each way for `questions` pictures of size x size pixels with `group` answers of `tokens` tokens."""
    images, texts = asked(questions, size)
    policy.banned[policy.stop] = True  # all answers get the full length, here and below

    def read(copies: int):
        prompts = [
            prompt_text(policy.processor, q, size, size) for q in texts for _ in range(copies)
        ]
        pictures = [x for x in images for _ in range(copies)]
        return policy.processor(
            text=prompts, images=pictures, padding=True, return_tensors="pt"
        ).to(policy.device)

    @torch.no_grad()
    def encoded():
        return encode(policy, images, texts)

    def library(copies: int):
        policy.base.model.rope_deltas = None
        plain = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        policy.base.generate(
            **read(copies),
            **plain,
            num_return_sequences=group // copies,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
        )

    rollout = seconds(
        {
            "shared prompt": lambda: generate(policy, encoded(), group, tokens),
            "  of it, encoding the picture": encoded,
            "generate": lambda: library(1),
            "generate, prompt repeated": lambda: library(group),
        },
        rounds,
    )
    policy.banned[policy.stop] = False

    prompts, everyone = encoded(), read(group)
    answers = torch.randint(300, 400, (questions * group, tokens), device=policy.device)  # [N, L]
    groups = [list(rows) for rows in answers.split(group)]
    alone = [p for p in prompts for _ in range(group)], [[ids] for ids in answers]
    ones, zeros = torch.ones_like(answers), torch.zeros_like(answers)
    for name, more in dict(input_ids=answers, attention_mask=ones, mm_token_type_ids=zeros).items():
        everyone[name] = torch.cat([everyone[name], more], 1)

    def padded():
        policy.base.model.rope_deltas = None
        logits = policy.base(**everyone, logits_to_keep=tokens + 1).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(-1, answers[..., None])

    update = update_seconds(
        policy,
        {
            "packed": lambda: logprobs(policy, prompts, groups)[0],
            "padded": padded,
            "padded, features at hand": lambda: logprobs(policy, *alone)[0],
        },
        rounds,
    )
    return {
        "size": size,
        "questions": questions,
        "group": group,
        "answer_tokens": tokens,
        "prompt_tokens": len(prompts[0].ids),
        "rollout": rollout,
        "update": update,
    }


def masked_rows(policy: Policy, prompts: list, groups: list[list[torch.Tensor]]) -> torch.Tensor:
    """What `logprobs` gives [S], each question in a padded row [B, T] under a mask, without attention.py."""
    rows = [pack(policy, [prompt], [group]) for prompt, group in zip(prompts, groups)]
    sizes = [torch.tensor(inputs["layout"].sizes, device=policy.device) for inputs, _, _ in rows]
    parts = [torch.arange(len(n), device=n.device).repeat_interleave(n) for n in sizes]
    segment = pad_sequence(parts, True, -1)  # [B, T]
    causal = torch.ones(2 * segment.shape[1:], dtype=torch.bool, device=policy.device).tril()
    mask = causal & (
        (segment[:, :, None] == segment[:, None]) | (segment[:, None] == 0)
    )  # [B, T, T]
    embeds = pad_sequence([inputs["inputs_embeds"][0] for inputs, _, _ in rows], True)  # [B, T, D]
    places = [inputs["position_ids"][:, 0].T for inputs, _, _ in rows]
    positions = pad_sequence(places, True).permute(2, 0, 1)  # [3, B, T]
    hidden = policy.base.model.language_model(
        inputs_embeds=embeds, attention_mask=mask[:, None], position_ids=positions, use_cache=False
    ).last_hidden_state  # [B, T, D]
    hidden = torch.cat(
        [h.index_select(0, index) for h, (_, index, _) in zip(hidden, rows)]
    )  # [S, D]
    return chosen_logprobs(policy, hidden, torch.cat([target for _, _, target in rows]), 1.0)[0]


def compare_updates(
    policy: Policy, size: int, questions: int, group: int, tokens: int, rounds: int
) -> dict:
    """Seconds of a forward and backward, masked and as it is done, with answers of 0.6 to 1.4 times `tokens` tokens."""
    with torch.no_grad():
        prompts = encode(policy, *asked(questions, size))
    factors = 0.6 + 0.8 * torch.rand(questions, group, generator=torch.Generator().manual_seed(0))
    lengths = (tokens * factors).long().clamp(min=1).tolist()
    groups = [[torch.randint(300, 400, (n,), device=policy.device) for n in row] for row in lengths]
    taken = update_seconds(
        policy,
        {
            "as it is": lambda: logprobs(policy, prompts, groups)[0],
            "masked row": lambda: masked_rows(policy, prompts, groups),
        },
        rounds,
    )
    return {
        "size": size,
        "questions": questions,
        "group": group,
        "answer_tokens": tokens,
        "update": taken,
    }


def compare_decoding(
    tokens: int, rounds: int, device: str, questions: int = 2, group: int = 8, prompt: int = 1100
) -> dict:
    """Attention of the `tokens`th decoded token, a layer of the 7B shape: seconds, and bytes moved over the cache's."""
    text, dtype = SHAPES["7b"], torch.bfloat16 if device == "cuda" else torch.float32
    heads, shared = text["num_attention_heads"], text["num_key_value_heads"]
    d, total = text["hidden_size"] // heads, prompt + group * tokens
    new = lambda *shape: torch.randn(shape, dtype=dtype, device=device)
    query, key = new(questions, heads, group, d), new(questions, shared, group, d)
    read = new(questions, shared, prompt, d)
    cache = Cache([prompt] * questions, group, device)
    cache.attend(0, new(questions, heads, prompt, d), read, read, d**-0.5)
    for _ in range(tokens):
        cache.grow()
    cache.answers[0].normal_()
    before = new(2, questions, shared, total - group, d)
    mask = torch.ones(questions, 1, group, total, dtype=torch.bool, device=device)
    mask[..., prompt:] = torch.eye(group, dtype=torch.bool, device=device).repeat(1, tokens)

    def repeated():
        k, v = (torch.cat([x, key], 2).repeat_interleave(heads // shared, 1) for x in before)
        return scaled_dot_product_attention(query, k, v, attn_mask=mask)

    result = {
        "answer_tokens": tokens,
        "cache_bytes": 2 * questions * shared * total * d * dtype.itemsize,
    }
    ways = {
        "as it is": lambda: cache.attend(0, query, key, key, d**-0.5),
        "repeated and concatenated": repeated,
    }
    with torch.no_grad():
        result["decoding"] = seconds(ways, rounds)
        result["traffic"] = {}
        for name, way in ways.items():
            with Counter() as counter:
                way()
            result["traffic"][name] = counter.total["moved"] / result["cache_bytes"]
    return result


def make_policy(shape: str, load_in: str, device: str) -> Policy:
    """The tiny policy, or one of a true shape with random weights."""
    if shape == "tiny":
        return load_policy("tiny", load_in, device=device)
    return random_policy(shape_config(shape), load_in, 32, device, device == "cuda")


def compare_weights(
    shape: str,
    formats: tuple,
    device: str,
    size: int,
    questions: int,
    group: int,
    tokens: int,
    rounds: int,
) -> dict:
    """Seconds of a rollout and of an update with the base's weights in each format."""
    functions = {}
    for load_in in formats:
        policy = make_policy(shape, load_in, device)
        policy.banned[policy.stop] = True
        with torch.no_grad():
            prompts = encode(policy, *asked(questions, size))
        groups = [
            [torch.randint(300, 400, (tokens,), device=device) for _ in range(group)]
            for _ in prompts
        ]
        functions[f"{load_in}, rollout"] = lambda p=policy, x=prompts: generate(p, x, group, tokens)
        functions[f"{load_in}, update"] = (
            lambda p=policy, x=prompts, g=groups: logprobs(p, x, g)[0].sum().backward()
        )
    return seconds(functions, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds after the warm-up (default 5)"
    )
    parser.add_argument("--tokens", type=int, default=40, help="answer length, tokens (default 40)")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs=2,
        default=(48, 400),
        metavar="TOKENS",
        help="mean answer lengths of the updates that are compared with masked rows (default 48 400)",
    )
    parser.add_argument(
        "--shape",
        default="tiny",
        choices=("tiny", *SHAPES),
        help="the policy: the tiny one, or a shape with random weights (default tiny)",
    )
    parser.add_argument("--out", help="write the figures to this JSON file too")
    args = parser.parse_args()
    device = auto_device()
    policy = make_policy(args.shape, "nf4", device)
    (small, large), (short, long) = [
        (side * cell_size(policy.base.config), n) for side, n in SIDES
    ], args.lengths
    results = [compare(policy, *sizes, 8, args.tokens, args.rounds) for sizes in (small, large)]
    rows = ((*small, 8, short), (*large, 8, short), (*large, 8, long))
    updates = [compare_updates(policy, *row, args.rounds) for row in rows]
    decoding = [compare_decoding(tokens, args.rounds, device) for tokens in (64, 511)]
    del policy  # a card may not hold it and the ones below
    for r in results:
        print(
            f"\n{r['questions']} x {r['group']} answers of {r['answer_tokens']} tokens, prompts of "
            f"{r['prompt_tokens']} tokens ({r['size']} px)"
        )
        for phase, taken in (("rollout", r["rollout"]), ("update", r["update"])):
            base = next(iter(taken.values()))
            for name, value in taken.items():
                print(f"  {phase:<8} {name:<28} {value:7.3f} s   {value / base:5.1f} x")
    print("\nupdate, against questions in padded rows under a mask")
    for r in updates:
        ours, masked = r["update"].values()
        print(
            f"  {r['size']:4} px, {r['questions']} x {r['group']} answers of about {r['answer_tokens']:3} tokens: "
            f"{ours:7.3f} s, masked {masked:7.3f} s   {masked / ours:5.2f} x"
        )
    print(
        "\nattention of one decoded token, one layer of the 7B shape, 2 x 8 answers, prompts of 1,100 tokens"
    )
    for r in decoding:
        for name, taken in r["decoding"].items():
            print(
                f"  token {r['answer_tokens']:3} {name:<26} {1000 * taken:8.1f} ms, "
                f"moves {r['traffic'][name]:5.2f} x the cache's bytes"
            )
    formats, sizes = (
        (("nf4", "bf16", "fp32"), small) if args.shape == "tiny" else (("nf4", "bf16"), large)
    )
    weights = compare_weights(args.shape, formats, device, *sizes, 8, args.tokens, args.rounds)
    print(f"\nweights of the frozen base ({sizes[0]} px)")
    for name, value in weights.items():
        print(f"  {name:<14} {value:7.3f} s")
    if args.out:
        figures = dict(results=results, updates=updates, decoding=decoding, weights=weights)
        table = {"device": device_name(), "shape": args.shape} | figures
        Path(args.out).write_text(json.dumps(table, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
