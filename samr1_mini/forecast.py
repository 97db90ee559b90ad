"""Forecast the memory of a training by arithmetic. Nothing is loaded, run or measured.

The forecast adds the sizes of all tensors that exist at the peak of a phase. The sum is right
within 10 %. sizes.py counts widths, weights and tokens. speed.py forecasts hours.
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

CONTEXT, GAPS = 0.6, 0.1  # GiB of CUDA's libraries, share of memory lost between tensors


def staying_bytes(n: Sizes) -> dict[str, float]:
    """Return the bytes of each part that stays in memory from the first update on."""
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
    """Return the bytes that each phase adds at its peak, separately for each part.

    The update has two peaks, "logits" and "layers". The higher peak counts.
    """
    s = n.s
    asked = s.questions * n.prompt  # prompt tokens of a batch
    answered = s.questions * n.answers
    token = n.layers * 2 * n.keys * n.number  # keys and values of a token
    chunk = min(2**26, n.at_once * n.answers * n.vocabulary)  # logits, see policy.logprobs
    forward = forward_bytes(n)
    phases = {"load": {}, "prefill": {}, "decode": {}, "reward": {}, "logits": {}, "layers": {}}
    for name in ("prefill", "decode", "reward", "logits", "layers"):
        phases[name]["encoded prompts"] = asked * n.features * n.hidden * n.number
    phases["prefill"]["keys and values"] = asked * token
    phases["prefill"]["activations of a layer"] = asked * prefill_bytes(n)
    phases["decode"]["keys and values"] = (asked + answered) * token
    # Log-probabilities are fp32. Probabilities and their running sums are fp64.
    phases["decode"]["choice of tokens"] = s.questions * s.group * n.vocabulary * (FP32 + 2 * FP64)
    phases["reward"]["SAM's attention scores, and two position terms"] = 3 * n.sam_scores * FP32
    phases["logits"]["activations of the forward"] = forward
    phases["logits"]["a chunk of logits, and gradients"] = 5 * chunk * FP32
    phases["layers"]["activations of the forward"] = forward
    if s.checkpointing:
        phases["layers"]["activations of the recomputed layer"] = n.row * recomputed_bytes(n)
    return phases


def prefill_bytes(n: Sizes) -> int:
    """Return the peak bytes of one token in a layer of the prefill, in an adapter of the MLP."""
    inputs = n.hidden * (FP32 + 4 * n.number)  # adapter (fp32), input, residual, sum, normed
    return inputs + n.mlp * (2 * FP32 + 2 * n.number)  # output, scaled output, gate, up


def recomputed_bytes(n: Sizes) -> int:
    """Return the bytes of one token in the layer that the backward recomputes."""
    inputs = n.hidden * 9 * FP32  # of six adapters and two norms, and a gradient
    states = n.hidden * 5 * n.number  # gradient, query, seen, sum, normed
    return inputs + states + n.mlp * (2 * FP32 + 3 * n.number)  # as in the prefill, and SiLU


def forward_bytes(n: Sizes) -> int:
    """Return the bytes of a forward of the update that are kept for its backward."""
    if n.s.checkpointing:  # the embeddings, and the input of each layer
        return (n.layers + 1) * n.row * n.hidden * n.number
    token = n.hidden * (8 * FP32 + 2 * n.number)  # inputs of adapters and norms, query, seen
    token += n.mlp * (FP32 + 3 * n.number)  # an adapter's input, gate, SiLU, up
    return n.layers * n.row * token


def peaks(n: Sizes) -> dict[str, float]:
    """Return the peak memory of the whole process in each phase, in GiB."""
    stay = staying_bytes(n)
    gib = {}
    for phase, parts in phase_bytes(n).items():
        gib[phase] = (sum(stay.values()) + sum(parts.values())) / GIB
    gib["load"] -= (stay["gradients"] + stay["moments"]) / GIB  # not there before the update
    gib["update"] = max(gib.pop("logits"), gib.pop("layers"))
    return gib


def usable(card: float) -> float:
    """Return the GiB that tensors can use on a card with `card` GiB."""
    return (1 - GAPS) * card - CONTEXT


def has_known_shape(s: Settings) -> bool:
    """Return True if the settings are a full-size preset with the policy of this preset."""
    return s.preset in SHAPES and s.policy == PRESETS[s.preset]["policy"]


def policy_sizes(s: Settings) -> Sizes:
    """Return the sizes of these settings. A policy of no preset needs its config.json."""
    if has_known_shape(s):
        return Sizes(shape_config(s.preset), s)
    return Sizes(check_policy(s.policy), s)


def forecast_line(s: Settings) -> str:
    """Return one line with the forecast of a training: peak memory in GiB, and hours.

    If the free memory is smaller than the peak, a second line is a warning. Raises UserError if the
    free memory cannot hold the weights.
    """
    n = policy_sizes(s)
    gib = peaks(n)
    name = "a machine without a GPU"
    free = float("inf")
    of = ""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        free, whole = card_memory(s.memory_limit)
        of = f" of this card's {whole:.1f}"
    check_weights(s, gib["load"], free)
    # With little free memory, a batch of the rollout has fewer questions.
    sampling = min(free * (1 - GAPS), max(gib["prefill"], gib["decode"]))
    peak = max(sampling, gib["reward"], gib["update"])
    card = known_card(name)
    time = f"no hours: {name} is none of {', '.join(CARDS)}"
    if card:
        short = policy_sizes(replace(s, max_new_tokens=128))
        time = f"about {hours(short, card):.1f} hours at answers of 128 tokens"
    line = f"forecast: peak {peak:.1f} GiB{of}, {time}"
    warning = memory_warning(s, peak / (1 - GAPS), free)
    if warning:
        return f"{line}\n{warning}"
    return line


def check_weights(s: Settings, weights: float, free: float) -> None:
    """Raise UserError if `weights` is more than `free`, the free memory of the GPU, in GiB."""
    if weights <= free:
        return
    advice = ", or ".join(smaller_weights(s))
    raise UserError(
        f"--preset {s.preset}: the weights need {weights:.1f} GiB, and {free:.1f} GiB are free on "
        f"the GPU. You can {advice}"
    )


def check_free_memory(s: Settings) -> None:
    """Raise UserError if the weights need more than the free memory of the GPU."""
    if s.device == "cuda":
        free, _ = card_memory(s.memory_limit)
        check_weights(s, peaks(policy_sizes(s))["load"], free)
