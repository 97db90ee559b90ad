"""A LoRA adapter from PEFT, computed in the dtype of the policy.

A LoRA layer is a frozen layer W with a trained low-rank product: W x + s B A x. The weights A and B
are fp32. If x is bf16, PEFT turns x into fp32, computes the product, scales it, and turns it into
bf16. These operations move many bytes. Here A and B are turned into bf16 instead.

Shapes: n inputs, m outputs, rank r, T tokens.
"""

from functools import partial

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora

# Only the language model gets an adapter. Layers of the vision tower have the same names. So the
# pattern asks for "language_model".
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def new_adapter(base, rank: int) -> PeftModel:
    """Return the base model with a new adapter, which does not change the output."""
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS))


def compute_in_input_dtype(model: PeftModel) -> None:
    """Let the LoRA layers of this model use `lora_forward`. Saved files keep PEFT's format.

    LoRA layers of other kinds keep PEFT's forward.
    """
    for layer in model.modules():
        if type(layer) in (lora.Linear, lora.bnb.Linear4bit):
            layer.forward = partial(lora_forward, layer)


def lora_forward(layer, x: torch.Tensor, **options) -> torch.Tensor:
    """Compute W x + s B A x in the dtype of x, for x [..., n] -> [..., m].

    The copies of A and B in the dtype of x pass their gradients on to the fp32 weights. PEFT's own
    forward is used if adapters are off or merged, if the layer is a variant of LoRA, if B has a
    bias, or if the call has options.
    """
    other = layer.disable_adapters or layer.merged or layer.lora_variant or options
    if other or any(layer.lora_bias.values()):
        return type(layer).forward(layer, x, **options)
    out = layer.base_layer(x)
    rows = x.reshape(-1, x.shape[-1])  # [T, n]
    result = out.reshape(-1, out.shape[-1])  # [T, m]
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        a = layer.lora_A[name].weight.to(x.dtype)  # [r, n]
        b = layer.lora_B[name].weight.to(x.dtype)  # [m, r]
        low = layer.lora_dropout[name](rows) @ a.T  # [T, r]
        result = torch.addmm(result, low, b.T, alpha=layer.scaling[name])
    return result.view_as(out)
