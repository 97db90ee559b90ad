"""Forecast memory and hours of a training by arithmetic. Nothing is loaded, run or measured.

Memory adds the tensors that exist at the peak of a phase. It is right within 10 %. Hours divide
operations and bytes by the part of a card's published speed that code reaches. They are right
within a factor of 1.5. sizes.py counts widths, weights and tokens.
"""

import re
from dataclasses import replace

import torch

from .config import PRESETS, Settings, UserError
from .full_size import SHAPES, shape_config
from .gpu import GIB, card_memory
from .memory import memory_warning, smaller_weights
from .policy import check_policy
from .sizes import FP32, FP64, Sizes

CARDS = {  # published peaks: GB/s, TFLOP/s of bf16 (dense, sums in fp32) and of fp32
    "RTX 3090": (936, 71, 35.6),
    "RTX 4090": (1008, 165, 82.6),
    "RTX 5090": (1792, 209, 104.8),
    "A10G": (600, 70, 35),
    "L4": (300, 121, 30.3),
    "A100": (2039, 312, 19.5),
    "H100": (3350, 989, 67),
}
BYTE_SHARE, FLOP_SHARE = 0.7, 0.4  # assumed: the part of these peaks that code reaches
LAUNCH, REPLAYED = 30e-6, 3e-6  # seconds to start an operation: by Python, in a CUDA graph (H100)
OPERATIONS = 100  # of a layer in a forward
CONTEXT, GAPS = 0.6, 0.1  # GiB of CUDA's libraries; part of the memory lost between tensors


def staying_bytes(n: Sizes) -> dict[str, float]:
    """Return the bytes that stay from the first update on, by part."""
    return {
        "language layers": n.linear * n.weight,
        "embeddings and head": (n.embeddings + n.head) * n.number,
        "vision tower": n.vision * n.number,
        "SAM": n.sam * FP32,
        "adapter": n.adapter * FP32,
        "gradients": n.adapter * FP32,
        "moments": 2 * n.adapter * FP32,
    }


def phase_bytes(n: Sizes) -> dict[str, dict[str, float]]:
    """Return the bytes that each phase adds at its peak, by part."""
    s, tokens = n.s, n.s.questions * n.prompt
    encoded = {"encoded prompts": tokens * n.features * n.hidden * n.number}
    cached = n.layers * 2 * n.keys * n.number  # a token's keys and values
    # An adapter's input in fp32, four states; its output in fp32, also scaled, and gate and up.
    layer = n.hidden * (FP32 + 4 * n.number) + n.mlp * (2 * FP32 + 2 * n.number)
    chosen = n.vocabulary * (FP32 + 2 * FP64)  # log-probabilities, probabilities and their sums
    # In fp32 the inputs of six adapters and two norms, and a gradient; five more states.
    recomputed = n.hidden * (9 * FP32 + 5 * n.number)
    recomputed += n.mlp * (2 * FP32 + 3 * n.number)  # as above; gate, its SiLU, and up
    forward = {"inputs of all layers": (n.layers + 1) * n.row * n.hidden * n.number}
    if not s.checkpointing:
        layer_kept = n.hidden * (8 * FP32 + 2 * n.number) + n.mlp * (FP32 + 3 * n.number)
        forward = {"activations of all layers": n.layers * n.row * layer_kept}
        recomputed = 0
    logits = min(2**26, n.at_once * n.answers * n.vocabulary)  # policy.logprobs makes chunks
    cache = (tokens + s.questions * n.answers) * cached
    phases = {
        "load": {},
        "prefill": {"keys and values": tokens * cached, "activations of a layer": tokens * layer},
        "decode": {"keys and values": cache, "choice of tokens": s.questions * s.group * chosen},
        "reward": {"SAM's attention scores, with two position terms": 3 * n.sam_scores * FP32},
        "logits": forward | {"a chunk of logits, with gradients": 5 * logits * FP32},
        "layers": forward | {"activations of the recomputed layer": n.row * recomputed},
    }
    return {phase: encoded | parts if parts else {} for phase, parts in phases.items()}


def peaks(n: Sizes) -> dict[str, float]:
    """Return the GiB of the whole process at the peak of each phase."""
    stay = staying_bytes(n)
    peak = {name: sum(stay.values()) + sum(x.values()) for name, x in phase_bytes(n).items()}
    peak["load"] -= stay["gradients"] + stay["moments"]
    peak["update"] = max(peak.pop("logits"), peak.pop("layers"))
    return {name: value / GIB for name, value in peak.items()}


def usable(card: float) -> float:
    """Return the GiB that tensors can take on a card of so many GiB."""
    return (1 - GAPS) * card - CONTEXT


def seconds(n: Sizes, card: str, products=0.0, single=0.0, moved=0.0, weights=0.0) -> float:
    """Return the seconds of FLOPs of the base model, FLOPs in fp32, and bytes that are moved.

    The GPU reads `weights`, bytes, while it multiplies. So the longer of both counts.
    """
    bandwidth, half_peak, single_peak = CARDS[card]
    bandwidth *= 1e9 * BYTE_SHARE
    base_peak = single_peak if n.number == FP32 else half_peak
    time = max(products / (base_peak * 1e12 * FLOP_SHARE), weights / bandwidth)
    return time + single / (single_peak * 1e12 * FLOP_SHARE) + moved / bandwidth


def moved_bytes(n: Sizes) -> float:
    """Return the bytes that the small operations of a forward move for one token."""
    norms, sums, rotation = 72 * n.hidden, 12 * n.hidden, 20 * (n.queries + n.keys)
    adapters = 10 * n.inputs + 28 * n.outputs  # to fp32 and read; scale, add and back to bf16
    return n.layers * (norms + sums + rotation + 10 * n.mlp + adapters)


def prefill_seconds(n: Sizes, card: str) -> float:
    """Return the seconds in which one question is read: its picture, then its prompt."""
    vision = seconds(n, card, products=2 * n.vision * n.patches)
    vision = max(vision, n.vision_layers * OPERATIONS * LAUNCH)
    products = 2 * n.linear * n.prompt + 2 * n.layers * n.queries * n.prompt**2
    adapter = 2 * n.adapter * n.prompt
    return vision + seconds(n, card, products, adapter, n.prompt * moved_bytes(n))


def decode_seconds(n: Sizes, card: str, questions: int, group: int) -> float:
    """Return the seconds of all tokens. The mean token stands in the middle of its answer."""
    rows, middle = questions * group, n.s.max_new_tokens / 2
    weights = n.linear * n.weight + n.head * n.number
    if n.s.load_in == "nf4" and rows > 64:  # bitsandbytes then writes a copy in bf16 and reads it
        weights += 2 * n.linear * n.number
    moved = questions * (n.prompt + group * middle) * n.layers * 2 * n.keys * n.number
    moved += rows * n.layers * n.heads * (n.prompt + middle) * 30  # attention scores
    moved += rows * (moved_bytes(n) + 68 * n.vocabulary)  # logits, softmax, sums in fp64
    products = 2 * (n.linear + n.head) * rows
    token = seconds(n, card, products, 2 * n.adapter * rows, moved, weights)
    start = REPLAYED + LAUNCH * 2 / 64  # of 64 tokens one is started by Python, one is recorded
    return n.s.max_new_tokens * (token + n.layers * OPERATIONS * start)


def update_seconds(n: Sizes, card: str) -> float:
    """Return the seconds of one question: reference, forward, recomputed forward, backward."""
    reference, forwards = int(n.s.beta > 0), 1 + int(n.s.checkpointing)
    row, passes = n.row / n.at_once, reference + forwards
    pairs = n.prompt**2 / 2 + n.answers * (n.prompt + n.s.max_new_tokens / 2)
    products = 2 * n.linear * row * (passes + 1)  # frozen weights have no gradients
    products += 2 * n.head * n.answers * (reference + 3)  # logits are always recomputed
    products += 4 * n.layers * n.queries * pairs * (passes + 2.5)  # attention
    adapter = 2 * n.adapter * row * (forwards + 2)
    moved = (
        row * moved_bytes(n) * (0.2 * reference + forwards + 1.4)
    )  # the reference has no adapter
    moved += n.answers * n.vocabulary * FP32 * (11 * (reference + 2) + 18)  # logits
    operations = OPERATIONS * (passes + 2) / n.at_once + 28 * n.s.group  # of attention: 28
    return max(seconds(n, card, products, adapter, moved), n.layers * operations * LAUNCH)


def sam_seconds(n: Sizes, card: str) -> float:
    """Return the seconds of SAM on one picture."""
    work = n.sam * n.sam_tokens
    return seconds(n, card, single=2 * work, moved=work / 40)  # counted for ViT-H: 66 GB


def step_seconds(n: Sizes, card: str) -> dict[str, float]:
    """Return the seconds of one step by phase."""
    s = n.s
    return {
        "rollout": s.questions * prefill_seconds(n, card)
        + decode_seconds(n, card, s.questions, s.group),
        "reward": s.questions * sam_seconds(n, card),
        "update": s.passes * s.questions * update_seconds(n, card),
    }


def hours(n: Sizes, card: str) -> float:
    """Return the hours of all steps and all evaluations."""
    s, batch = n.s, max(1, 16384 // n.prompt)
    steps = s.samples // s.questions
    evaluated = 2 * s.test_samples
    if s.eval_every:
        evaluated += (1 + steps // s.eval_every) * s.eval_samples
    question = prefill_seconds(n, card) + sam_seconds(n, card)
    question += decode_seconds(n, card, batch, 1) / batch
    return (steps * sum(step_seconds(n, card).values()) + evaluated * question) / 3600


def known_card(name: str) -> str | None:
    """Return the row of CARDS for a name such as "NVIDIA A100-SXM4-80GB"; None for others."""
    words = set(re.split("[ -]", name))
    for card in CARDS:
        if set(card.split()) <= words and "Laptop" not in words:
            return card
    return None


def has_known_shape(s: Settings) -> bool:
    """Return True for a preset of full size with its own policy."""
    return s.preset in SHAPES and s.policy == PRESETS[s.preset]["policy"]


def policy_sizes(s: Settings) -> Sizes:
    """Return the sizes for settings. Other policies than the presets' need their config.json."""
    if has_known_shape(s):
        return Sizes(shape_config(s.preset), s)
    return Sizes(check_policy(s.policy), s)


def forecast_line(s: Settings) -> str:
    """Return a line for the start of a training on a GPU: its peak of memory, and its hours.

    A second line warns where less memory is free. Raises UserError where the free memory cannot
    hold the weights.
    """
    n = policy_sizes(s)
    gib = peaks(n)
    name, free, of = "a machine without a GPU", float("inf"), ""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        free, whole = card_memory(s.memory_limit)
        of = f" of this card's {whole:.1f}"
    check_weights(s, gib["load"], free)
    # Where memory is short, fewer questions are sampled at a time.
    sampling = min(free * (1 - GAPS), max(gib["prefill"], gib["decode"]))
    peak = max(sampling, gib["reward"], gib["update"])
    card = known_card(name)
    time = f"no hours: {name} is none of {', '.join(CARDS)}"
    if card:
        short = policy_sizes(replace(s, max_new_tokens=128))
        time = f"about {hours(short, card):.1f} hours at answers of 128 tokens"
    line = f"forecast: peak {peak:.1f} GiB{of}, {time}"
    warning = memory_warning(s, peak / (1 - GAPS), free)
    return f"{line}\n{warning}" if warning else line


def check_weights(s: Settings, weights: float, free: float) -> None:
    """Raise UserError where the weights take more than the free memory of the GPU, both in GiB."""
    if weights <= free:
        return
    ways = smaller_weights(s)
    advice = ways[-1]
    if len(ways) > 1:
        advice = f"{', '.join(ways[:-1])} or {ways[-1]}"
    raise UserError(
        f"--preset {s.preset}: the weights take {weights:.1f} GiB and {free:.1f} GiB are free on "
        f"the GPU. You can {advice}"
    )


def check_free_memory(s: Settings) -> None:
    """Refuse an evaluation where the weights take more than the GPU's free memory."""
    if s.device == "cuda":
        free, _ = card_memory(s.memory_limit)
        check_weights(s, peaks(policy_sizes(s))["load"], free)
