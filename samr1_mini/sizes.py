"""Widths, weights and tokens of one training: the numbers that the forecast multiplies."""

from functools import cache

from accelerate import init_empty_weights
from segment_anything.modeling import Sam
from transformers import AutoConfig, AutoModelForMaskGeneration

from .config import Settings, cell_size, emulates_bf16
from .segmenter import SAM_FILES, random_sam, small_folder

BF16, FP32, FP64 = 2, 4, 8  # bytes of a number
NF4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # 64 weights share a scale of 8 bits, 256 scales one of 32
TEXT = 200  # prompt tokens beside the picture's: 174 of instruction, and a question


class Sizes:
    """Widths, weights and tokens of one training."""

    def __init__(self, config, s: Settings, number: int | None = None, text_tokens: int = TEXT):
        """Read the configuration of a policy and the settings.

        `number`: bytes of a number of the frozen policy outside the 4-bit weights (default: those
        on this machine's GPU, or on a new one). `text_tokens`: prompt tokens beside the picture's.
        """
        text = config.text_config
        self.s = s
        self.number = number or number_bytes(s)
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
        # Questions and tokens of one forward of an update. The last tokens of answers are not read.
        self.at_once = min(s.micro, max(1, s.questions // s.updates))
        self.row = self.at_once * (self.prompt + self.answers - s.group)

    def count_weights(self, config) -> None:
        """Count the language model's weights and the adapter's."""
        self.linear = self.layers * self.hidden * (2 * self.queries + 2 * self.keys + 3 * self.mlp)
        self.weight = self.number  # bytes of one of them
        if self.s.load_in == "nf4":
            self.weight = NF4
        # Widths that the projections of a layer read and write: q, k, v, o, gate, up, down.
        self.inputs = 5 * self.hidden + self.queries + self.mlp
        self.outputs = 2 * self.hidden + self.queries + 2 * self.keys + 2 * self.mlp
        self.adapter = self.layers * self.s.rank * (self.inputs + self.outputs)
        self.head = self.vocabulary * self.hidden
        self.embeddings = self.head
        if config.tie_word_embeddings:
            self.embeddings = 0

    def read_vision(self, config) -> None:
        """Count the vision tower's weights (within 1 %), and how often features are kept."""
        vision = config.vision_config
        width = getattr(vision, "embed_dim", None) or vision.hidden_size
        cell = width * vision.spatial_merge_size**2
        self.features = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))  # Qwen3-VL: 4
        self.vision = vision.depth * 12 * width**2 + self.features * cell * (cell + self.hidden)
        self.vision_layers = vision.depth
        self.patches = (self.s.image_size // vision.patch_size) ** 2


@cache
def sam_sizes(kind: str) -> tuple[int, int, int]:
    """Return a SAM's weights, its tokens of a picture, and the scores of one global attention."""
    with init_empty_weights():
        if small_folder(kind) or kind in SAM_FILES:
            sam = random_sam(kind)
        else:
            sam = AutoModelForMaskGeneration.from_config(AutoConfig.from_pretrained(kind))
    weights = sum(p.numel() for p in sam.parameters())
    if not isinstance(sam, Sam):  # SAM 2 and 3 have fused attention, which keeps no scores
        return weights, 64 * 64, 0
    encoder = sam.image_encoder
    tokens = (encoder.img_size // encoder.patch_embed.proj.kernel_size[0]) ** 2
    return weights, tokens, encoder.blocks[-1].attn.num_heads * tokens**2


def number_bytes(s: Settings) -> int:
    """Return the bytes of a number that is not in 4 bits: 4 on GPUs before 8.0, which lack bf16."""
    if s.load_in == "fp32" or (s.device == "cuda" and emulates_bf16()):
        return FP32
    return BF16
