"""Build policies of the published full sizes with random weights. Nothing is downloaded.

The shapes "3b" and "7b" are from config.json of Qwen/Qwen2.5-VL-3B-Instruct and -7B-Instruct. The
shape "small" runs on two CPU cores.
"""

import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Params4bit
from transformers import (
    AutoProcessor,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from .attention import IMPLEMENTATION
from .memory import compute_dtype
from .policy import TINY, Policy, add_adapter, four_bits

POLICY_SIZES = {
    "3b": dict(
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151936,
    ),
    "7b": dict(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    ),
    "small": dict(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=16384,
    ),
}
MOST_PIXELS = 16384 * 28 * 28  # Qwen2.5-VL takes at most 16,384 picture tokens of 28 x 28 pixels
VISION = dict(
    depth=32,
    hidden_size=1280,
    intermediate_size=3420,
    num_heads=16,
    patch_size=14,
    spatial_merge_size=2,
    window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31],
)
SMALL_VISION = VISION | dict(
    depth=4, hidden_size=160, intermediate_size=428, num_heads=4, fullatt_block_indexes=[1, 3]
)


def shape_config(shape: str) -> Qwen2_5_VLConfig:
    """Return the configuration of "3b", "7b" or "small".

    The special tokens are from the tiny tokenizer, because Qwen's tokenizer needs a download.
    """
    token_id = AutoProcessor.from_pretrained(TINY).tokenizer.convert_tokens_to_ids
    text = dict(POLICY_SIZES[shape])
    head = text["hidden_size"] // text["num_attention_heads"]
    frequencies = head // 2  # rotary frequencies: 1/4 for time, then height, width
    sections = [frequencies // 4, frequencies * 3 // 8, frequencies * 3 // 8]
    text["rope_parameters"] = dict(rope_type="default", rope_theta=1e6, mrope_section=sections)
    text["max_position_embeddings"] = 32768
    text["eos_token_id"] = token_id("<|im_end|>")
    text["bos_token_id"] = text["pad_token_id"] = token_id("<|endoftext|>")
    vision = VISION
    if shape == "small":
        vision = SMALL_VISION
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision | dict(out_hidden_size=text["hidden_size"]),
        tie_word_embeddings=shape == "3b",
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )


def shape_processor(config: Qwen2_5_VLConfig) -> ProcessorMixin:
    """Return the processor of the tiny policy, with the patch size of this shape."""
    processor = AutoProcessor.from_pretrained(TINY)
    processor.image_processor.patch_size = config.vision_config.patch_size
    processor.image_processor.size["longest_edge"] = MOST_PIXELS
    return processor


def empty_base(
    config: Qwen2_5_VLConfig, load_in: str, dtype: torch.dtype
) -> Qwen2_5_VLForConditionalGeneration:
    """Return a model on the meta device. Its layers have the classes of a downloaded model."""
    with init_empty_weights():
        base = Qwen2_5_VLForConditionalGeneration._from_config(
            config, attn_implementation=IMPLEMENTATION, dtype=dtype
        )
    if load_in == "nf4":
        plan = four_bits(dtype)
        replace_with_bnb_linear(base, plan.llm_int8_skip_modules, plan)
        base.is_loaded_in_4bit = True  # so PEFT treats it like a model of from_pretrained
    return base


def random_policy(
    config: Qwen2_5_VLConfig, load_in: str, rank: int, device: str, checkpointing: bool
) -> Policy:
    """Return a policy with random weights. Its layers have the classes of a downloaded model.

    Each weight is drawn and quantised separately on `device`. This needs little memory.
    """
    dtype = compute_dtype(load_in, device)
    base = empty_base(config, load_in, dtype)
    for module in list(base.modules()):
        for name, empty in list(module.named_parameters(recurse=False)):
            value = torch.ones(empty.shape, dtype=dtype, device=device)
            is_norm = name == "weight" and empty.ndim == 1
            if not is_norm:
                value.normal_(std=0.02)
            if isinstance(empty, Params4bit):
                drawn = Params4bit(value, requires_grad=False, **empty.__dict__)
                drawn = drawn.to(device)  # this quantises
            else:
                drawn = torch.nn.Parameter(value)
            setattr(module, name, drawn)
    base.tie_weights()
    return add_adapter(base.to(device), shape_processor(config), rank, checkpointing=checkpointing)
