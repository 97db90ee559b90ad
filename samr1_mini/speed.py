"""Forecast the hours of a training by arithmetic. No model is loaded or run.

A time is the number of operations, or of bytes, divided by a speed. This speed is a share of the
card's published speed. The hours are right within a factor of 1.5.
"""

import re

from .sizes import BF16, EVALUATED_TOKENS, FP32, Sizes, sam_sizes

# Published: GB/s, TFLOP/s in bf16 (dense matrices; sums in fp32), TFLOP/s in fp32. Then GiB of
# the card.
CARDS = {
    "RTX 3090": (936, 71, 35.6, 23.6),
    "RTX 4090": (1008, 165, 82.6, 23.6),
    "RTX 5090": (1792, 209, 104.8, 31.4),
    "A10G": (600, 70, 35, 21.9),
    "L4": (300, 121, 30.3, 22.0),
    "A100": (2039, 312, 19.5, 79.1),
    "H100": (3350, 989, 67, 79.1),
}
OTHER_WORDS = {
    "NVIDIA",
    "GeForce",
    "SXM",
    "SXM4",
    "80GB",
    "HBM3",
}  # also found in the names of these cards
BYTE_SHARE, FLOP_SHARE = 0.7, 0.4  # assumed: the share of these speeds that code reaches
LAUNCH, REPLAYED = 30e-6, 3e-6  # seconds to start an operation from Python, and in a CUDA graph
OPERATIONS = 79  # number of operations of a layer in a forward


def seconds(card: str, number_bytes: int, products: float, moved=0.0, weights=0.0) -> float:
    """Return the seconds of some work on a card.

    `products` is the number of FLOPs. A number has `number_bytes` bytes. `moved` and `weights` are
    bytes. The GPU reads `weights` while it computes. So only the longer time counts: the time to
    compute, or the time to read `weights`. The time to move `moved` bytes is added.
    """
    bandwidth, half_peak, single_peak, _ = CARDS[card]
    bytes_a_second = bandwidth * 1e9 * BYTE_SHARE
    peak = single_peak if number_bytes == FP32 else half_peak
    flops_a_second = peak * 1e12 * FLOP_SHARE
    return max(products / flops_a_second, weights / bytes_a_second) + moved / bytes_a_second


def moved_bytes(n: Sizes) -> float:
    """Return the bytes that the small operations of a forward read and write for one token."""
    layer = 2 * 36 * n.hidden_width  # two norms: to fp32, square, mean, scale, to bf16, weight
    layer += 2 * 6 * n.hidden_width  # two sums with the residual
    layer += 20 * (n.query_width + n.key_width)  # rotation by position
    layer += 10 * n.mlp_width  # SiLU of the gate, times up
    layer += 2 * n.input_widths + 4 * n.output_widths  # adapters: read the input, add to the output
    return n.layers * layer * n.number_bytes / BF16


def prefill_seconds(n: Sizes, card: str) -> float:
    """Return the seconds of the prefill of one question: its picture, then its prompt."""
    vision = seconds(card, n.number_bytes, 2 * n.vision_weights * n.patches)
    vision = max(vision, n.vision_layers * OPERATIONS * LAUNCH)
    products = 2 * n.linear_weights * n.prompt_tokens
    products += 2 * n.layers * n.query_width * n.prompt_tokens**2  # causal attention
    products += 2 * n.adapter_weights * n.prompt_tokens
    moved = n.prompt_tokens * moved_bytes(n)
    return vision + seconds(card, n.number_bytes, products, moved)


def decode_seconds(n: Sizes, card: str, questions: int, group: int) -> float:
    """Return the seconds to decode all answers to the questions, in one batch.

    Each token is counted as if it were in the middle of its answer.
    """
    rows = questions * group
    middle = n.s.max_new_tokens / 2
    weights = n.linear_weights * n.linear_weight_bytes + n.head_weights * n.number_bytes
    if n.s.load_in == "nf4" and rows > 64:  # bitsandbytes writes and reads a bf16 copy
        weights += 2 * n.linear_weights * n.number_bytes
    moved = questions * (n.prompt_tokens + group * middle) * n.cache_token_bytes
    moved += rows * n.layers * n.heads * (n.prompt_tokens + middle) * 30  # attention scores
    moved += rows * n.vocabulary * 68  # logits, softmax, sums in fp64
    moved += rows * moved_bytes(n)
    moved += 8 * n.adapter_weights  # the adapter: read in fp32, written and read in bf16
    products = 2 * rows * (n.linear_weights + n.head_weights + n.adapter_weights)
    token = seconds(card, n.number_bytes, products, moved, weights)
    start = REPLAYED + LAUNCH * 2 / 64  # 2 of 64 tokens run without the CUDA graph
    return n.s.max_new_tokens * (token + n.layers * OPERATIONS * start)


def update_seconds(n: Sizes, card: str) -> float:
    """Return the seconds that an update takes for one question.

    The parts are a forward of the base model (the reference), a forward, recomputed layers, and a
    backward. With several passes over the answers, only the first pass computes the reference.
    Kept layers are not recomputed.
    """
    reference = 0.0  # forwards of the base model
    if n.s.beta > 0:
        reference = 1 / n.s.passes
    forwards = 2 - n.kept_layers / n.layers
    all_forwards = reference + forwards
    tokens = n.row_tokens / n.row_questions
    pairs = n.prompt_tokens**2 / 2  # pairs of a token and a token that it sees
    pairs += n.answer_tokens * (n.prompt_tokens + n.s.max_new_tokens / 2)
    # Frozen weights have no gradients, so a backward costs as much as one forward, not as two.
    products = 2 * n.linear_weights * tokens * (all_forwards + 1)
    products += 2 * n.head_weights * n.answer_tokens * (reference + 3)  # logits are recomputed
    products += 4 * n.layers * n.query_width * pairs * (all_forwards + 2.5)  # attention
    products += 2 * n.adapter_weights * tokens * (forwards + 2)  # the reference has no adapter
    moved = tokens * moved_bytes(n) * (0.7 * reference + forwards + 1.2)
    moved += n.answer_tokens * n.vocabulary * FP32 * (11 * (reference + 2) + 18)  # logits
    operations = OPERATIONS * (all_forwards + 2) / n.row_questions
    operations += 28 * n.s.group  # the attention of an answer
    return max(seconds(card, n.number_bytes, products, moved), n.layers * operations * LAUNCH)


def sam_seconds(n: Sizes, card: str) -> float:
    """Return the seconds of SAM for one picture."""
    sam = sam_sizes(n.s.sam)
    work = sam.weights * sam.tokens
    moved = work * n.sam_number_bytes / 160  # ViT-H in fp32 moves about 66 GB for a picture
    return seconds(card, n.sam_number_bytes, 2 * work, moved)


def step_seconds(n: Sizes, card: str) -> dict[str, float]:
    """Return the seconds of each phase of a step."""
    s = n.s
    rollout = s.questions * prefill_seconds(n, card)
    rollout += decode_seconds(n, card, s.questions, s.group)
    reward = s.questions * sam_seconds(n, card)
    update = s.passes * s.questions * update_seconds(n, card)
    return {"rollout": rollout, "reward": reward, "update": update}


def hours(n: Sizes, card: str) -> float:
    """Return the hours of all steps and all evaluations."""
    s = n.s
    steps = s.samples // s.questions
    evaluated = 2 * s.test_samples  # number of questions, before and after training
    if s.eval_every:
        evaluated += (1 + steps // s.eval_every) * s.eval_samples
    batch = max(1, EVALUATED_TOKENS // n.prompt_tokens)  # questions in one batch
    question = prefill_seconds(n, card) + sam_seconds(n, card)
    question += decode_seconds(n, card, batch, 1) / batch
    training = steps * sum(step_seconds(n, card).values())
    return (training + evaluated * question) / 3600


def known_card(name: str) -> str | None:
    """Return the key of CARDS for a name such as "NVIDIA A100-SXM4-80GB", or None.

    A name with other words, such as "PCIe", "Ti" or "40GB", gives None, because such a card has
    another speed.
    """
    words = set(re.split("[ -]", name)) - OTHER_WORDS
    for card in CARDS:
        if words == set(card.split()):
            return card
    return None
