"""Measure how much time the shared prompt saves, and how much 4-bit weights cost.

    python tests/benchmarks/benchmark.py             # on a GPU also --shape 3b or 7b: random weights

Rollouts, from pictures and questions: `policy.generate` against transformers' generate with
num_return_sequences=G, which encodes a picture once and reads the prompt G times. And against
generate with the prompt given G times, as in trainers that treat every answer as a row.
Updates: `policy.logprobs` on packed rows against a padded batch in which every answer has its own
copy of the prompt. The copies are encoded, or their features are given as ours are.
Attention: updates against each question in a padded row under a mask. And one decoded token, in one
layer of the 7B shape, against keys that grow by concatenation and are repeated for each query head.

Policy, prompts and numbers of tokens are the same. Seconds are the median of several rounds.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # Python looks for modules only in the script's own folder

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
from samr1_mini.full_size import POLICY_SIZES, random_policy, shape_config

from benchmark_step import device_name  # beside this file
from counter import Counter

SIDES = ((8, 8), (30, 1))  # picture tokens a side, and how many questions


def seconds(functions: dict, rounds: int) -> dict:
    """Return the median seconds of each function. They run in turn; the first round warms up."""
    taken = {name: [] for name in functions}
    on_gpu = auto_device() == "cuda"
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if on_gpu:
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in taken.items()}


def asked(count: int, size: int) -> tuple[list[Image.Image], list[str]]:
    """Return pictures of size x size pixels, and a question about each."""
    samples = list(load_data("shapes", "validation", count))
    return [policy_image(x, size) for x in samples], [x.question for x in samples]


def update_seconds(policy: Policy, functions: dict, rounds: int) -> dict:
    """Return `seconds` of forward and backward. Each function returns log-probabilities."""

    def backward(function):
        function().sum().backward()

    policy.model.train()
    steps = {name: partial(backward, function) for name, function in functions.items()}
    taken = seconds(steps, rounds)
    policy.model.eval()
    policy.model.zero_grad()
    return taken


def processed(policy: Policy, images: list, questions: list[str], copies: int):
    """Return the processor's inputs for transformers, with each prompt `copies` times."""
    texts, pictures = [], []
    for image, question in zip(images, questions):
        text = prompt_text(policy.processor, question, image.width, image.height)
        texts += [text] * copies
        pictures += [image] * copies
    inputs = policy.processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    return inputs.to(policy.device)


def compare_rollouts(
    policy: Policy, images: list, questions: list[str], group: int, tokens: int, rounds: int
) -> dict:
    """Return the seconds of each way to sample `group` answers of `tokens` tokens."""

    @torch.no_grad()
    def encoded():
        return encode(policy, images, questions)

    def of_transformers(copies: int):
        policy.base.model.rope_deltas = None
        policy.base.generate(
            **processed(policy, images, questions, copies),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=group // copies,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
        )

    functions = {
        "shared prompt": lambda: generate(policy, encoded(), group, tokens),
        "  of it, encoding the picture": encoded,
        "generate": partial(of_transformers, 1),
        "generate, prompt repeated": partial(of_transformers, group),
    }
    return seconds(functions, rounds)


def compare(
    policy: Policy, size: int, questions: int, group: int, tokens: int, rounds: int
) -> dict:
    """Return the seconds of each way for `questions` pictures of size x size pixels."""
    images, texts = asked(questions, size)
    policy.banned[policy.stop] = True  # all answers get the full length, here and below
    rollout = compare_rollouts(policy, images, texts, group, tokens, rounds)
    policy.banned[policy.stop] = False

    with torch.no_grad():
        prompts = encode(policy, images, texts)
    answers = torch.randint(300, 400, (questions * group, tokens), device=policy.device)  # [N, L]
    groups = [list(rows) for rows in answers.split(group)]
    copies = [p for p in prompts for _ in range(group)]
    single = [[ids] for ids in answers]
    inputs = processed(policy, images, texts, group)
    ones, zeros = torch.ones_like(answers), torch.zeros_like(answers)
    added = dict(input_ids=answers, attention_mask=ones, mm_token_type_ids=zeros)
    for name, more in added.items():
        inputs[name] = torch.cat([inputs[name], more], 1)

    def padded():
        policy.base.model.rope_deltas = None
        logits = policy.base(**inputs, logits_to_keep=tokens + 1).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(-1, answers[..., None])

    functions = {
        "packed": lambda: logprobs(policy, prompts, groups)[0],
        "padded": padded,
        "padded, features at hand": lambda: logprobs(policy, copies, single)[0],
    }
    return {
        "size": size,
        "questions": questions,
        "group": group,
        "answer_tokens": tokens,
        "prompt_tokens": len(prompts[0].ids),
        "rollout": rollout,
        "update": update_seconds(policy, functions, rounds),
    }


def masked_rows(policy: Policy, prompts: list, groups: list[list[torch.Tensor]]) -> torch.Tensor:
    """Return what `logprobs` returns, [S], from padded rows [B, T] under a mask.

    attention.py is not used.
    """
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
    """Return the seconds of a forward and backward, from parts and from masked rows.

    Answers have 0.6 to 1.4 times `tokens` tokens.
    """
    with torch.no_grad():
        prompts = encode(policy, *asked(questions, size))
    factors = 0.6 + 0.8 * torch.rand(questions, group, generator=torch.Generator().manual_seed(0))
    lengths = (tokens * factors).long().clamp(min=1).tolist()
    groups = [[torch.randint(300, 400, (n,), device=policy.device) for n in row] for row in lengths]
    functions = {
        "as it is": lambda: logprobs(policy, prompts, groups)[0],
        "masked row": lambda: masked_rows(policy, prompts, groups),
    }
    taken = update_seconds(policy, functions, rounds)
    return {
        "size": size,
        "questions": questions,
        "group": group,
        "answer_tokens": tokens,
        "update": taken,
    }


def compare_decoding(tokens: int, rounds: int, device: str) -> dict:
    """Measure attention of the `tokens`th decoded token of 2 x 8 answers, in a layer of the 7B.

    Returns seconds, and the bytes that are moved divided by the cache's. Prompts have 1,100 tokens.
    """
    questions, group, prompt = 2, 8, 1100
    text = POLICY_SIZES["7b"]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    heads, key_heads = text["num_attention_heads"], text["num_key_value_heads"]
    d = text["hidden_size"] // heads
    total = prompt + group * tokens

    def new(*shape):
        return torch.randn(shape, dtype=dtype, device=device)

    query, key = new(questions, heads, group, d), new(questions, key_heads, group, d)
    prompt_key = new(questions, key_heads, prompt, d)
    cache = Cache([prompt] * questions, group, device)
    cache.attend(0, new(questions, heads, prompt, d), prompt_key, prompt_key, d**-0.5)
    for _ in range(tokens):
        cache.grow()
    cache.answers[0].normal_()
    before = new(2, questions, key_heads, total - group, d)
    mask = torch.ones(questions, 1, group, total, dtype=torch.bool, device=device)
    mask[..., prompt:] = torch.eye(group, dtype=torch.bool, device=device).repeat(1, tokens)

    def repeated():
        both = []
        for x in before:
            both.append(torch.cat([x, key], 2).repeat_interleave(heads // key_heads, 1))
        return scaled_dot_product_attention(query, both[0], both[1], attn_mask=mask)

    functions = {
        "as it is": lambda: cache.attend(0, query, key, key, d**-0.5),
        "repeated and concatenated": repeated,
    }
    cache_bytes = 2 * questions * key_heads * total * d * dtype.itemsize
    result = {"answer_tokens": tokens, "cache_bytes": cache_bytes, "traffic": {}}
    with torch.no_grad():
        result["decoding"] = seconds(functions, rounds)
        for name, function in functions.items():
            with Counter() as counter:
                function()
            result["traffic"][name] = counter.total["moved"] / cache_bytes
    return result


def make_policy(shape: str, load_in: str, device: str) -> Policy:
    """Return the tiny policy, or one of a published shape with random weights."""
    if shape == "tiny":
        return load_policy("tiny", load_in, device=device)
    return random_policy(shape_config(shape), load_in, 32, device, device == "cuda")


def compare_weights(
    shape: str, formats: tuple, device: str, sizes: tuple, tokens: int, rounds: int
) -> dict:
    """Return the seconds of a rollout and of an update with the base's weights in each format.

    `sizes`: pixels of a picture, and the number of questions. Each has 8 answers.
    """
    size, questions = sizes
    functions = {}

    def scored(policy, prompts, groups):
        logprobs(policy, prompts, groups)[0].sum().backward()

    for load_in in formats:
        policy = make_policy(shape, load_in, device)
        policy.banned[policy.stop] = True
        with torch.no_grad():
            prompts = encode(policy, *asked(questions, size))
        groups = []
        for _ in prompts:
            groups.append([torch.randint(300, 400, (tokens,), device=device) for _ in range(8)])
        functions[f"{load_in}, rollout"] = partial(generate, policy, prompts, 8, tokens)
        functions[f"{load_in}, update"] = partial(scored, policy, prompts, groups)
    return seconds(functions, rounds)


def parse_options() -> argparse.Namespace:
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
        help="mean answer lengths of the updates compared with masked rows (default 48 400)",
    )
    parser.add_argument(
        "--shape",
        default="tiny",
        choices=("tiny", *POLICY_SIZES),
        help="the policy: the tiny one, or a shape with random weights (default tiny)",
    )
    parser.add_argument("--out", help="write the figures to this JSON file too")
    return parser.parse_args()


def print_comparisons(results: list[dict]) -> None:
    for r in results:
        print(
            f"\n{r['questions']} x {r['group']} answers of {r['answer_tokens']} tokens, prompts of "
            f"{r['prompt_tokens']} tokens ({r['size']} px)"
        )
        for phase in ("rollout", "update"):
            first = next(iter(r[phase].values()))
            for name, value in r[phase].items():
                print(f"  {phase:<8} {name:<28} {value:7.3f} s   {value / first:5.1f} x")


def print_updates(updates: list[dict]) -> None:
    print("\nupdate, against questions in padded rows under a mask")
    for r in updates:
        ours, masked = r["update"].values()
        print(
            f"  {r['size']:4} px, {r['questions']} x {r['group']} answers of about "
            f"{r['answer_tokens']:3} tokens: {ours:7.3f} s, masked {masked:7.3f} s   "
            f"{masked / ours:5.2f} x"
        )


def print_decoding(decoding: list[dict]) -> None:
    print(
        "\nattention of one decoded token, one layer of the 7B shape, 2 x 8 answers, prompts of "
        "1,100 tokens"
    )
    for r in decoding:
        for name, taken in r["decoding"].items():
            print(
                f"  token {r['answer_tokens']:3} {name:<26} {1000 * taken:8.1f} ms, "
                f"moves {r['traffic'][name]:5.2f} x the cache's bytes"
            )


def main() -> None:
    args = parse_options()
    device = auto_device()
    policy = make_policy(args.shape, "nf4", device)
    cell = cell_size(policy.base.config)
    (small_side, many), (large_side, few) = SIDES
    small, large = (small_side * cell, many), (large_side * cell, few)
    short, long = args.lengths
    results = [compare(policy, *sizes, 8, args.tokens, args.rounds) for sizes in (small, large)]
    print_comparisons(results)
    updates = []
    for sizes, tokens in ((small, short), (large, short), (large, long)):
        updates.append(compare_updates(policy, *sizes, 8, tokens, args.rounds))
    print_updates(updates)
    decoding = [compare_decoding(tokens, args.rounds, device) for tokens in (64, 511)]
    print_decoding(decoding)
    del policy  # a card may not hold it and the ones below
    formats, sizes = ("nf4", "bf16"), large
    if args.shape == "tiny":
        formats, sizes = ("nf4", "bf16", "fp32"), small
    weights = compare_weights(args.shape, formats, device, sizes, args.tokens, args.rounds)
    print(f"\nweights of the frozen base ({sizes[0]} px)")
    for name, value in weights.items():
        print(f"  {name:<14} {value:7.3f} s")
    if args.out:
        table = {"device": device_name(), "shape": args.shape, "results": results}
        table |= {"updates": updates, "decoding": decoding, "weights": weights}
        Path(args.out).write_text(json.dumps(table, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
