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
from .policy import CHUNK_LOGITS, check_policy
from .sizes import FP32, Sizes, backward_bytes, forward_bytes, layer_bytes, sam_sizes
from .sizes import sampling_bytes
from .speed import CARDS, hours, known_card

CONTEXT, GAPS = 0.6, 0.1  # GiB of CUDA's libraries, share of memory lost between tensors


def staying_bytes(n: Sizes) -> dict[str, float]:
    """Return the bytes of each part that stays in memory from the first update on."""
    return {
        "language layers": n.linear_weights * n.linear_weight_bytes,
        "embeddings and head": (n.embedding_weights + n.head_weights) * n.number_bytes,
        "vision tower": n.vision_weights * n.number_bytes,
        "SAM": sam_sizes(n.s.sam).weights * FP32,
        "adapter": n.adapter_weights * FP32,
        "moments": 2 * n.adapter_weights * FP32,
    }


def phase_bytes(n: Sizes) -> dict[str, dict[str, float]]:
    """Return the bytes that each phase adds at its peak, separately for each part.

    The update has two peaks, "logits" and "layers". The higher peak counts.
    """
    s = n.s
    prompts = s.questions * n.prompt_tokens * n.vision_outputs * n.hidden_width * n.number_bytes
    phases = {"load": {}}
    for name in ("prefill", "decode", "reward", "logits", "layers"):
        phases[name] = {"encoded prompts": prompts}
    for name, parts in sampling_bytes(n).items():
        for part, size in parts.items():
            phases[name][part] = s.questions * size
    scores = 3 * sam_sizes(s.sam).scores * FP32
    phases["reward"]["SAM's attention scores, and two position terms"] = scores
    for name in ("logits", "layers"):
        phases[name]["gradients"] = n.adapter_weights * FP32
        phases[name]["activations of the forward"] = forward_bytes(n)
    chunk = min(CHUNK_LOGITS, n.row_questions * n.answer_tokens * n.vocabulary)
    phases["logits"]["a chunk of logits, and gradients"] = 5 * chunk * FP32
    phases["layers"]["gradients of activations"] = backward_bytes(n)
    if s.checkpointing:
        phases["layers"]["activations of the recomputed layer"] = layer_bytes(n)
    return phases


def peaks(n: Sizes) -> dict[str, float]:
    """Return the peak memory of the whole process in each phase, in GiB."""
    stay = staying_bytes(n)
    gib = {}
    for phase, parts in phase_bytes(n).items():
        gib[phase] = (sum(stay.values()) + sum(parts.values())) / GIB
    gib["load"] -= stay["moments"] / GIB  # they do not exist before the first update
    gib["update"] = max(gib.pop("logits"), gib.pop("layers"))
    return gib


def usable(card: float) -> float:
    """Return the GiB that tensors can use on a card with `card` GiB."""
    return (1 - GAPS) * card - CONTEXT


def has_known_shape(s: Settings) -> bool:
    """Return True if the settings are a full-size preset with the policy of this preset."""
    return s.preset in SHAPES and s.policy == PRESETS[s.preset]["policy"]


def policy_sizes(s: Settings) -> Sizes:
    """Return the sizes of these settings. Another policy than a preset's needs its config.json."""
    if has_known_shape(s):
        return Sizes(shape_config(s.preset), s)
    return Sizes(check_policy(s.policy), s)


def forecast_line(s: Settings) -> str:
    """Return one line with the forecast for this machine's GPU. See card_line."""
    free, whole = card_memory(s.memory_limit)
    return card_line(s, torch.cuda.get_device_name(), free, whole)


def card_line(s: Settings, name: str, free: float, whole: float) -> str:
    """Return one line with the forecast of a training: peak memory in GiB, and hours.

    `free` and `whole` are GiB of the card called `name`. If the peak and its gaps do not fit in
    the free memory, a second line is a warning. Raises UserError if the free memory cannot hold the
    weights.
    """
    gib = peaks(policy_sizes(s))
    check_weights(s, gib["load"], free)
    # With little free memory, a batch of the rollout has fewer questions.
    sampling = min(free * (1 - GAPS), max(gib["prefill"], gib["decode"]))
    peak = max(sampling, gib["reward"], gib["update"])
    card = known_card(name)
    time = f"no hours: {name} is none of {', '.join(CARDS)}"
    if card:
        short = policy_sizes(replace(s, max_new_tokens=128))
        time = f"about {hours(short, card):.1f} hours at answers of 128 tokens"
    line = f"forecast: peak {peak:.1f} GiB of this card's {whole:.1f}, {time}"
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
