"""Count the widths, weights and tokens of one training. The forecast multiplies these numbers."""

from functools import cache

from accelerate import init_empty_weights
from segment_anything.modeling import Sam
from transformers import AutoConfig, AutoModelForMaskGeneration

from .config import Settings, cell_size, emulates_bf16
from .segmenter import SAM_FILES, random_sam, small_folder

BF16, FP32, FP64 = 2, 4, 8  # bytes of one number
NF4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # 64 weights share an 8-bit scale, 256 scales a 32-bit one
TEXT = 200  # text tokens of a prompt: 174 for the instruction, the rest for the question


class Sizes:
    """Hold the widths, weights and tokens of one training. Weights are counted, not loaded."""

    def __init__(self, config, s: Settings, text_tokens: int = TEXT):
        """Read the configuration of a policy and the settings.

        `text_tokens` is the text tokens of a prompt, without the picture tokens.
        """
        text = config.text_config
        self.s = s
        self.number = number_bytes(s)
        self.layers = text.num_hidden_layers
        self.hidden = text.hidden_size
        self.mlp = text.intermediate_size
        self.vocabulary = text.vocab_size
        self.heads = text.num_attention_heads
        head = getattr(text, "head_dim", None) or self.hidden // self.heads
        self.queries = head * self.heads  # width of a token's queries
        self.keys = head * text.num_key_value_heads
        self.count_weights(config)
        self.read_vision(config)
        self.sam, self.sam_tokens, self.sam_scores = sam_sizes(s.sam)
        self.prompt = (s.image_size // cell_size(config)) ** 2 + text_tokens
        self.answers = s.group * s.max_new_tokens  # tokens of all answers to a question
        # Questions and input tokens of one forward of an update. The last token of an answer is not
        # an input.
        self.at_once = min(s.micro, max(1, s.questions // s.updates))
        self.row = self.at_once * (self.prompt + self.answers - s.group)

    def count_weights(self, config) -> None:
        """Count the weights of the language model and of the adapter."""
        self.linear = self.layers * self.hidden * (2 * self.queries + 2 * self.keys + 3 * self.mlp)
        self.weight = self.number  # bytes of one weight
        if self.s.load_in == "nf4":
            self.weight = NF4
        # Input and output widths of the projections of a layer, summed: q, k, v, o, gate, up, down.
        self.inputs = 5 * self.hidden + self.queries + self.mlp
        self.outputs = 2 * self.hidden + self.queries + 2 * self.keys + 2 * self.mlp
        self.adapter = self.layers * self.s.rank * (self.inputs + self.outputs)
        self.head = self.vocabulary * self.hidden
        self.embeddings = self.head
        if config.tie_word_embeddings:
            self.embeddings = 0

    def read_vision(self, config) -> None:
        """Count the weights of the vision tower (within 1 %), its features and its patches."""
        vision = config.vision_config
        width = getattr(vision, "embed_dim", None) or vision.hidden_size
        cell = width * vision.spatial_merge_size**2
        self.features = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))  # Qwen3-VL: 4
        self.vision = vision.depth * 12 * width**2 + self.features * cell * (cell + self.hidden)
        self.vision_layers = vision.depth
        self.patches = (self.s.image_size // vision.patch_size) ** 2


@cache
def sam_sizes(kind: str) -> tuple[int, int, int]:
    """Return three counts of a SAM: weights, tokens of a picture, scores of a global attention."""
    with init_empty_weights():
        if small_folder(kind) or kind in SAM_FILES:
            sam = random_sam(kind)
        else:
            sam = AutoModelForMaskGeneration.from_config(AutoConfig.from_pretrained(kind))
    weights = sum(p.numel() for p in sam.parameters())
    if not isinstance(sam, Sam):  # the fused attention of SAM 2 and 3 keeps no scores
        return weights, 64 * 64, 0
    encoder = sam.image_encoder
    tokens = (encoder.img_size // encoder.patch_embed.proj.kernel_size[0]) ** 2
    return weights, tokens, encoder.blocks[-1].attn.num_heads * tokens**2


def number_bytes(s: Settings) -> int:
    """Return the bytes of one number of the frozen policy, 4-bit weights excepted.

    GPUs below compute capability 8.0 lack bf16 and need 4 bytes.
    """
    if s.load_in == "fp32" or (s.device == "cuda" and emulates_bf16()):
        return FP32
    return BF16
