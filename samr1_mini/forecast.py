"""Forecast the memory of a training by arithmetic. No model is loaded or run.

The forecast adds the sizes of all tensors that exist at the peak of a phase. The sum is right
within 10 %. sizes.py computes the numbers of weights and tokens. speed.py forecasts hours.
"""

from dataclasses import replace

import torch

from .config import PRESETS, Settings, UserError
from .full_size import POLICY_SIZES, shape_config
from .gpu import GIB, card_memory
from .memory import GAPS, memory_warning, smaller_weights
from .policy import check_policy
from .sizes import FP32, Sizes, sam_sizes, sampling_bytes, set_kept_layers, update_bytes
from .speed import hours, known_card

CONTEXT = 0.6  # GiB of CUDA's libraries


def staying_bytes(n: Sizes) -> dict[str, float]:
    """Return the bytes of weights and moments, which stay in memory after the first update."""
    return {
        "language layers": n.linear_weights * n.linear_weight_bytes,
        "embeddings and head": (n.embedding_weights + n.head_weights) * n.number_bytes,
        "vision tower": n.vision_weights * n.number_bytes,
        "SAM": sam_sizes(n.s.sam).weights * n.sam_number_bytes,
        "adapter": n.adapter_weights * FP32,
        "moments": 2 * n.adapter_weights * FP32,
    }


def phase_bytes(n: Sizes) -> dict[str, dict[str, float]]:
    """Return the bytes that each phase adds at its peak, separately for each part.

    The update has two peaks, "logits" and "layers". The higher peak counts.
    """
    s = n.s
    phases = {"load": {}}
    for name in ("prefill", "decode", "reward", "logits", "layers"):
        phases[name] = {"encoded prompts": prompt_bytes(n)}
    for name, parts in sampling_bytes(n).items():
        for part, size in parts.items():
            phases[name][part] = s.questions * size
    scores = 3 * sam_sizes(s.sam).scores * n.sam_number_bytes
    phases["reward"]["SAM's attention scores, and two position terms"] = scores
    for name, parts in update_bytes(n).items():
        phases[name] |= parts
    return phases


def prompt_bytes(n: Sizes) -> float:
    """Return the bytes of the encoded prompts of a step."""
    width = n.vision_outputs * n.hidden_width
    return n.s.questions * n.prompt_tokens * width * n.number_bytes


def fill_card(n: Sizes, gib: float) -> None:
    """Keep the activations of as many layers as fit. All tensors together may take `gib` GiB.

    Training makes this choice before each forward, from the free memory and the length of the
    packed row.
    """
    taken = sum(staying_bytes(n).values()) + prompt_bytes(n)
    set_kept_layers(n, gib * GIB - taken)


def peaks(n: Sizes) -> dict[str, float]:
    """Return the peak memory of the whole process in each phase, in GiB."""
    stay = staying_bytes(n)
    gib = {}
    for phase, parts in phase_bytes(n).items():
        gib[phase] = (sum(stay.values()) + sum(parts.values())) / GIB
    gib["load"] -= stay["moments"] / GIB  # moments exist from the first update on
    gib["update"] = max(gib.pop("logits"), gib.pop("layers"))
    return gib


def usable(card: float) -> float:
    """Return the GiB that tensors can use on a card with `card` GiB."""
    return (1 - GAPS) * card - CONTEXT


def has_known_shape(s: Settings) -> bool:
    """Return True for a full-size preset with its own policy, without another --policy."""
    return s.preset in POLICY_SIZES and s.policy == PRESETS[s.preset]["policy"]


def policy_sizes(s: Settings) -> Sizes:
    """Return the sizes of these settings. A policy that is in no preset needs its config.json."""
    if has_known_shape(s):
        return Sizes(shape_config(s.preset), s)
    return Sizes(check_policy(s.policy), s)


def forecast_line(s: Settings) -> str:
    """Return one or two lines with the forecast for this machine's GPU: peak GiB, and hours.

    If the peak and the gaps between tensors do not fit in the free memory, a second line warns.
    Raises UserError if the free memory cannot hold the weights.
    """
    free, whole = card_memory(s.memory_limit)
    for_tensors = free * (1 - GAPS)  # without the gaps between tensors
    n = policy_sizes(s)
    fill_card(n, for_tensors)
    gib = peaks(n)
    check_weights(s, gib["load"], free)
    # With little free memory, a batch of the rollout has fewer questions.
    sampling = min(for_tensors, max(gib["prefill"], gib["decode"]))
    peak = max(sampling, gib["reward"], gib["update"])
    name = torch.cuda.get_device_name()
    card = known_card(name)
    time = f"no forecast of hours, because the speed of {name} is not known"
    if card is not None:
        short = policy_sizes(replace(s, max_new_tokens=128))
        fill_card(short, for_tensors)
        time = f"about {hours(short, card):.1f} hours for answers of 128 tokens"
        if s.redraw:
            time += ", and more for the questions of --redraw"
    line = f"forecast: peak {peak:.1f} GiB of this card's {whole:.1f}, {time}"
    warning = memory_warning(s, peak / (1 - GAPS), free)
    if warning:
        return f"{line}\n{warning}"
    return line


def check_free_memory(s: Settings) -> None:
    """Raise UserError if the weights need more than the free memory of the GPU."""
    free, _ = card_memory(s.memory_limit)
    check_weights(s, peaks(policy_sizes(s))["load"], free)


def check_weights(s: Settings, weights: float, free: float) -> None:
    """Raise UserError if `weights` is more than `free`, the free memory of the GPU, in GiB."""
    if weights <= free:
        return
    advice = ", or ".join(smaller_weights(s))
    raise UserError(
        f"--preset {s.preset}: the weights need {weights:.1f} GiB, and {free:.1f} GiB are free on "
        f"the GPU. You can {advice}"
    )
