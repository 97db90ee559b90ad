"""Count the widths, weights, tokens and bytes of one training.

The forecasts (forecast.py, speed.py) multiply these numbers. Sampling uses them to choose the
number of questions in a batch.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from segment_anything.modeling import Sam
from transformers import AutoConfig, AutoModelForMaskGeneration

from .attention import BLOCK
from .config import Settings, cell_size
from .memory import compute_dtype
from .segmenter import SAM_FILES, random_sam, small_folder
from .tokens import CHUNK_LOGITS

BF16, FP32, FP64 = 2, 4, 8  # bytes of one number
NF4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # 64 weights share a 1-byte scale, 256 scales share 4 bytes
TEXT_TOKENS = 200  # text tokens of a prompt: 174 for the fixed text, then the question
EVALUATED_TOKENS = 16384  # prompt tokens in one batch of an evaluation, if memory holds them


class Sizes:
    """Hold the sizes of one training. Weights are counted, not loaded."""

    def __init__(self, config, s: Settings, prompt_tokens: int = 0):
        """Read the configuration of a policy and the settings.

        If `prompt_tokens` is 0, a prompt has one picture of the settings' size and 200 text tokens.
        """
        text = config.text_config
        self.s = s
        self.layers = text.num_hidden_layers
        self.hidden_width = text.hidden_size
        self.mlp_width = text.intermediate_size
        self.vocabulary = text.vocab_size
        self.heads = text.num_attention_heads
        head_width = getattr(text, "head_dim", None) or self.hidden_width // self.heads
        self.query_width = head_width * self.heads  # of one token, all heads
        self.key_width = head_width * text.num_key_value_heads
        self.number_bytes = number_bytes(s.load_in, s.device)  # of the frozen policy
        self.sam_number_bytes = number_bytes(s.sam_dtype, s.device)  # of SAM's encoder
        self.cache_token_bytes = self.layers * 2 * self.key_width * self.number_bytes
        self.count_weights(config)
        self.read_vision(config)
        picture_tokens = (s.image_size // cell_size(config)) ** 2
        self.prompt_tokens = prompt_tokens or picture_tokens + TEXT_TOKENS
        self.answer_tokens = s.group * s.max_new_tokens  # of all answers to a question
        self.row_questions = min(s.micro, math.ceil(s.questions / s.updates))  # in a forward
        self.kept_layers = self.layers  # layers whose activations a forward of an update keeps
        if s.checkpointing:
            self.kept_layers = 0

    @property
    def row_tokens(self) -> int:
        """Return the input tokens of a forward. The last token of an answer is not an input."""
        return self.row_questions * (self.prompt_tokens + self.answer_tokens - self.s.group)

    def count_weights(self, config) -> None:
        """Count the weights of the language model and of the adapter."""
        # Input and output widths of the projections of a layer, summed: q, k, v, o, gate, up, down.
        self.input_widths = 5 * self.hidden_width + self.query_width + self.mlp_width
        self.output_widths = 2 * (self.hidden_width + self.key_width + self.mlp_width)
        self.output_widths += self.query_width
        layer = 2 * self.query_width + 2 * self.key_width + 3 * self.mlp_width
        self.linear_weights = self.layers * self.hidden_width * layer
        self.linear_weight_bytes = self.number_bytes  # of one weight
        if self.s.load_in == "nf4":
            self.linear_weight_bytes = NF4
        adapter_width = self.input_widths + self.output_widths
        self.adapter_weights = self.layers * self.s.rank * adapter_width
        self.head_weights = self.vocabulary * self.hidden_width
        self.embedding_weights = self.head_weights
        if config.tie_word_embeddings:
            self.embedding_weights = 0

    def read_vision(self, config) -> None:
        """Count the weights of the vision tower (within 1 %), its outputs and its patches."""
        vision = config.vision_config
        width = getattr(vision, "embed_dim", None) or vision.hidden_size
        cell = width * vision.spatial_merge_size**2
        # Outputs for each picture token. Qwen3-VL has 4, the others have 1.
        self.vision_outputs = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
        self.vision_layers = vision.depth
        self.vision_weights = vision.depth * 12 * width**2
        self.vision_weights += self.vision_outputs * cell * (cell + self.hidden_width)
        self.patches = (self.s.image_size // vision.patch_size) ** 2


def number_bytes(choice: str, device: str) -> int:
    """Return the bytes of one number for a value of --load-in or --sam-dtype.

    4-bit weights take fewer bytes. On a CPU, the result is that of a GPU with bf16.
    """
    if device != "cuda" and choice != "fp32":
        return BF16
    return compute_dtype(choice, device).itemsize


class SamSizes(NamedTuple):
    weights: int
    tokens: int  # of one picture
    scores: int  # of one layer with global attention, in all heads


@cache
def sam_sizes(kind: str) -> SamSizes:
    """Count a SAM's weights, tokens and attention scores. `kind`: a name, a folder or a hub id."""
    # Building a SAM draws random weights. fork_rng puts the state of the generator back.
    with torch.random.fork_rng(devices=[]), init_empty_weights():
        if small_folder(kind) or kind in SAM_FILES:
            sam = random_sam(kind)
        else:
            sam = AutoModelForMaskGeneration.from_config(AutoConfig.from_pretrained(kind))
    weights = sum(p.numel() for p in sam.parameters())
    if not isinstance(sam, Sam):  # the fused attention of SAM 2 and 3 keeps no scores
        return SamSizes(weights, 64 * 64, 0)
    encoder = sam.image_encoder
    tokens = (encoder.img_size // encoder.patch_embed.proj.kernel_size[0]) ** 2
    return SamSizes(weights, tokens, encoder.blocks[-1].attn.num_heads * tokens**2)


# -------------------- the memory of sampling


def sampling_bytes(n: Sizes) -> dict[str, dict[str, float]]:
    """Return the bytes that one question with its G answers needs at the two peaks of sampling.

    The peaks are in the forward of the prompt ("prefill"), and at the last token ("decode"). Each
    peak has a dict with the bytes of its parts.
    """
    # In the prefill, a layer holds the most values when it adds the output of up_proj's adapter.
    # Then four tensors have the hidden width: prompt, input of the layer, residual, output of the
    # norm. Three have the MLP's width: output of SiLU, up_proj's output without and with adapter.
    states = (4 * n.hidden_width + 3 * n.mlp_width) * n.number_bytes
    capacity = math.ceil(n.s.max_new_tokens / BLOCK) * BLOCK  # tokens of an answer in the cache
    cached_tokens = n.prompt_tokens + n.s.group * capacity
    logit_bytes = FP32 + 2 * FP64  # log-probability, probability, running sum
    prefill = {
        "keys and values": n.prompt_tokens * n.cache_token_bytes,
        "activations of a layer": n.prompt_tokens * states,
    }
    decode = {
        "keys and values": cached_tokens * n.cache_token_bytes,
        "choice of tokens": n.s.group * n.vocabulary * logit_bytes,
    }
    return {"prefill": prefill, "decode": decode}


def question_bytes(n: Sizes) -> float:
    """Return the peak bytes of sampling G answers to one question."""
    return max(sum(parts.values()) for parts in sampling_bytes(n).values())


def questions_per_batch(model, questions: int, prompt_tokens: int, s: Settings, free: float) -> int:
    """Return the number of questions to sample in one batch.

    A batch with more than one question takes at most half of the `free` bytes. There are as few
    batches as possible, and the last one may be smaller.
    """
    fitting = free / 2 / question_bytes(Sizes(model.config, s, prompt_tokens))  # may be infinite
    most = max(1, int(min(questions, fitting)))
    batches = math.ceil(questions / most)
    return math.ceil(questions / batches)


# -------------------- the memory of an update


def layer_bytes(n: Sizes) -> int:
    """Return the bytes that one layer keeps for the backward of one forward."""
    token = n.hidden_width * (2 * FP32 + 2 * n.number_bytes)  # two norms: fp32 copy, and output
    # The attention's query, key, value, and output (twice).
    token += (3 * n.query_width + 2 * n.key_width) * n.number_bytes
    token += 4 * n.mlp_width * n.number_bytes  # gate, SiLU, up, product
    # For each answer, the keys and values of its prompt and of the answer are copied. The weights
    # of the adapter are copied too.
    copied = n.s.group * n.prompt_tokens + n.answer_tokens
    copied *= n.row_questions * 2 * n.key_width
    copied += n.adapter_weights // n.layers
    return n.row_tokens * token + copied * n.number_bytes


def backward_bytes(n: Sizes) -> int:
    """Return the bytes that the backward of a layer adds at its peak, in the MLP."""
    # One gradient has the hidden width. Three have the width of the MLP: the gradient from
    # the frozen layer, the gradient from the adapter, and their sum.
    return n.row_tokens * (n.hidden_width + 3 * n.mlp_width) * n.number_bytes


def forward_bytes(n: Sizes) -> int:
    """Return the bytes that one forward of an update keeps for its backward."""
    inputs = n.layers - n.kept_layers + 1  # of the layers to recompute, and of the last norm
    kept = inputs * n.row_tokens * n.hidden_width * n.number_bytes
    return kept + n.kept_layers * layer_bytes(n)


def update_bytes(n: Sizes) -> dict[str, dict[str, float]]:
    """Return the bytes that a forward and its backward add at their two peaks, by part.

    One peak, "logits", is at the logits of one chunk of tokens. The other peak, "layers", is in
    the backward of a layer.
    """
    both = {"gradients": n.adapter_weights * FP32, "activations of the forward": forward_bytes(n)}
    chunk = min(CHUNK_LOGITS, n.row_questions * n.answer_tokens * n.vocabulary)
    logits = both | {"a chunk of logits, and gradients": 5 * chunk * FP32}
    layers = both | {"gradients of activations": backward_bytes(n)}
    # Kept layers are the last ones. The backward needs and frees them before it recomputes others.
    if n.kept_layers == 0:
        layers["activations of the recomputed layer"] = layer_bytes(n)
    return {"logits": logits, "layers": layers}


def set_kept_layers(n: Sizes, free: float) -> None:
    """Keep the activations of as many layers as fit: an update adds at most `free` bytes.

    Without checkpointing, all layers are kept.
    """
    if not n.s.checkpointing:
        return
    n.kept_layers = n.layers
    while n.kept_layers and max(sum(p.values()) for p in update_bytes(n).values()) > free:
        n.kept_layers -= 1


def layers_to_keep(model, prompts: list[int], groups: list[list[int]], s: Settings, free: float):
    """Return the number of layers whose activations the next forward of an update can keep.

    prompts: the number of tokens of each prompt in the row. groups: for each prompt, a list with
    the number of tokens of each answer.
    """
    n = Sizes(model.config, s, math.ceil(sum(prompts) / len(prompts)))
    n.row_questions = len(prompts)
    n.answer_tokens = math.ceil(sum(sum(lengths) for lengths in groups) / len(groups))
    set_kept_layers(n, free)
    return n.kept_layers
