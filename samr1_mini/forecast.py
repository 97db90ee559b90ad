"""Forecast the memory of a training by arithmetic. Nothing is loaded, run or measured.

The tensors that exist at the peak of a phase are added. The sum is right within 10 %. sizes.py
counts widths, weights and tokens. speed.py forecasts hours.
"""

from dataclasses import replace

import torch

from .config import PRESETS, Settings, UserError
from .full_size import SHAPES, shape_config
from .gpu import GIB, card_memory
from .memory import memory_warning, smaller_weights
from .policy import check_policy
from .sizes import FP32, FP64, Sizes
from .speed import CARDS, hours, known_card

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
