"""The tiny policy's tokenizer and shape: the public Qwen2.5-VL classes with small numbers.

The tiny SAM's numbers are in samr1_mini/tiny/sam/sam.json.
"""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from samr1_mini.attention import IMPLEMENTATION

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

# Qwen's chat layout: a default system line, one block a turn, one placeholder a picture.
CHAT_TEMPLATE = """{%- if messages[0].role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% else %}{{ part.text }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer.

    Every word and every number of `texts` becomes one token. Other words become several tokens.
    """
    bpe = Tokenizer(models.BPE())
    # Whole words, whole numbers, and what stands between them.
    words = r" ?\p{L}+|\p{N}+|[^\p{L}\p{N}]+?(?= \p{L})|[^\p{L}\p{N}]+"
    split = pre_tokenizers.Split(Regex(words), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=10**5,
        show_progress=False,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL,
        padding_side="left",
    )


def build_processor(texts: list[str]) -> Qwen2_5_VLProcessor:
    """Return Qwen2.5-VL's processor with patches of 7 pixels and a tokenizer for `texts`."""
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 14 * 14 * 1280}
    images = Qwen2VLImageProcessor(size=pixels, patch_size=7)
    videos = Qwen2VLVideoProcessor(size=pixels)
    tokenizer = build_tokenizer(texts)
    return Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=CHAT_TEMPLATE)


VISION = {
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_heads": 4,
    "out_hidden_size": 192,
    "patch_size": 7,
    "spatial_merge_size": 2,
    "window_size": 56,
    "fullatt_block_indexes": [1, 3],
}
LANGUAGE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}


def build_policy(tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Return Qwen2.5-VL with random weights and the small numbers above."""
    token = tokenizer.convert_tokens_to_ids
    language = LANGUAGE | {
        "vocab_size": len(tokenizer),
        "rope_parameters": dict(ROPE),
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
    }
    config = Qwen2_5_VLConfig(
        vision_config=VISION,
        text_config=language,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration._from_config(
        config, attn_implementation=IMPLEMENTATION
    )
