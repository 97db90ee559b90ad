"""What a preset needs, known before a GPU is rented: `python train.py --preset 7b --rehearse 1` on any machine.

The code that trains runs here too, at its true shape, on tensors with a shape, a dtype and a storage but no numbers
(torch's FakeTensorMode). Counted on the way, operation by operation, for the code as it stands: bytes held, bytes
moved, floating-point operations. Assumed: how much of its published peaks (CARDS) a card reaches. So memory is good to
about 10 %, hours are right within a factor of 1.5 or so. Nothing is measured: every printed line begins with the word
forecast.

Only floating-point tensors are fake. Whole numbers, which steer the code (lengths, masks, positions), are real.
"""

import copy
import math
import re
import weakref
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch
from accelerate import init_empty_weights
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Params4bit
from PIL import Image
from segment_anything import SamPredictor
from torch.nn.attention.bias import causal_lower_right
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import (
    AutoProcessor,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from . import attention, tokens
from .attention import BLOCK, IMPLEMENTATION
from .config import PRESETS, Settings, UserError, cell_size
from .grpo import full_rollouts, new_optimizer, update
from .decoding import generate
from .policy import TINY, Policy, Prompt, add_adapter, encode, four_bits, prompt_text
from .gpu import card_memory
from .memory import memory_warning, smaller_weights
from .segmenter import SAM_FILES, SamSegmenter, Segmenter, random_sam, sam_logits, small_folder

# The published shapes (config.json of Qwen/Qwen2.5-VL-3B-Instruct and -7B-Instruct), and one that two CPU cores run.
SHAPES = {
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
    """The configuration of "3b", "7b" or "small", with special tokens of the tiny tokenizer: Qwen's is a download."""
    text, token = SHAPES[shape], AutoProcessor.from_pretrained(TINY).tokenizer.convert_tokens_to_ids
    half = (
        text["hidden_size"] // text["num_attention_heads"] // 2
    )  # rotary frequencies: 1/4 time, then height, width
    rope = dict(
        rope_type="default", rope_theta=1e6, mrope_section=[half // 4, half * 3 // 8, half * 3 // 8]
    )
    ends = dict(eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>"))
    return Qwen2_5_VLConfig(
        text_config=text | dict(max_position_embeddings=32768, rope_parameters=rope, **ends),
        vision_config=(SMALL_VISION if shape == "small" else VISION)
        | dict(out_hidden_size=text["hidden_size"]),
        tie_word_embeddings=shape == "3b",
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )


def shape_processor(config: Qwen2_5_VLConfig) -> ProcessorMixin:
    """The tiny policy's processor, which cuts pictures as a model of this shape does."""
    processor, cell = AutoProcessor.from_pretrained(TINY), cell_size(config)
    processor.image_processor.patch_size = config.vision_config.patch_size
    processor.image_processor.size["longest_edge"] = cell * cell * 1280  # pixels
    return processor


def empty_base(
    config: Qwen2_5_VLConfig, load_in: str, dtype: torch.dtype
) -> Qwen2_5_VLForConditionalGeneration:
    """A model of that shape in the classes of a real load in `load_in`, its weights on the meta device."""
    with init_empty_weights():
        base = Qwen2_5_VLForConditionalGeneration._from_config(
            config, attn_implementation=IMPLEMENTATION, dtype=dtype
        )
    if load_in == "nf4":
        plan = four_bits(dtype)
        replace_with_bnb_linear(base, plan.llm_int8_skip_modules, plan)
        base.is_loaded_in_4bit = True  # so PEFT wraps these layers as it does after from_pretrained
    return base


GIB = 2**30

# Published peaks: GiB, GB/s, TFLOP/s of bf16 tensor cores, dense (half of the figure "with sparsity") with fp32
# accumulation, and TFLOP/s of fp32. From NVIDIA's white papers on GA102, Ada and RTX Blackwell, and its data sheets of
# A10G, L4, A100 SXM (80 GB) and H100 SXM.
CARDS = {
    "RTX 3090": (24, 936, 71, 35.6),
    "RTX 4090": (24, 1008, 165, 82.6),
    "RTX 5090": (32, 1792, 209, 104.8),
    "A10G": (24, 600, 70, 35),
    "L4": (24, 300, 121, 30.3),
    "A100": (80, 2039, 312, 19.5),
    "H100": (80, 3350, 989, 67),
}
# Assumed: large products reach 50 to 80 % of a card's FLOP/s, thin ones far less; plain kernels 70 to 85 % of bytes/s.
FLOP_SHARE, BYTE_SHARE = 0.4, 0.7
# Seconds that an operation takes however small it is: started by Python, or within a CUDA graph (decoding.py).
# Measured on one server with an H100; on other cards and processors assumed to be the same.
LAUNCH, REPLAYED = 30e-6, 2.2e-6
FUSED_ROWS = 64  # to so many rows (by card: 16 to 256) bitsandbytes multiplies from the 4 bits, beyond from a bf16 copy


def usable(card: float) -> float:
    """GiB of a card's that tensors can take. Assumed: CUDA and its libraries take 0.6, gaps between tensors 5 %."""
    return 0.95 * card - 0.6


# ---------------------------------------------------------------------------------------------------- the counter

LOOKUPS = (
    "embedding",
    "index",
    "index_select",
    "gather",
    "index_put",
)  # they touch few rows of a large tensor


def attention_flops(query, key, products: int, causal: bool) -> int:
    """Of `products` matrix products between [B, H, queries, d] and [B, KV, keys, d]; causal attention skips half."""
    return 2 * products * query.numel() * key.shape[2] // (2 if causal else 1)


def unwatched_mask(*size):
    """causal_lower_right outside of any mode: its mask is two numbers and no tensor, on which modes fail."""
    with _disable_current_modes():
        return causal_lower_right(*size)


class Counter(TorchDispatchMode):
    """While entered, counts bytes held and moved, floating-point operations, and the seconds that each card would need.

    With `fake`, new floating-point tensors have no numbers, nor has what is made from them; without, all is real.
    """

    def __init__(self, fake: FakeTensorMode | None = None):
        super().__init__()
        self.fake, self.held, self.live, self.peak, self.resident = fake, {}, 0, 0, 0
        self.total = dict.fromkeys(("flops", "moved", "operations", *CARDS), 0)
        self.before = dict(self.total)

    def __enter__(self):
        self.patches = ExitStack()
        self.patches.enter_context(patch.object(attention, "causal_lower_right", unwatched_mask))
        if self.fake:  # tensors without numbers stand for a GPU's
            gpu = patch.object(tokens, "has_fp32_sums", lambda device: True)
            self.patches.enter_context(gpu)
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.close()
        return super().__exit__(*error)

    def hold(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.held:
            self.held[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.live -= self.held.pop(key)

    def lap(self, resident: int | None = None) -> dict:
        """What was counted since the last lap, and how far bytes rose "over" those that stay, `resident` from now."""
        lap = {k: v - self.before[k] for k, v in self.total.items()} | {
            "over": self.peak - self.resident
        }
        self.resident = self.resident if resident is None else resident
        self.before, self.peak = dict(self.total), self.live
        return lap

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return func(*args)
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        out = self.run(func, tensors, args, kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        before = {x.untyped_storage()._cdata for x in tensors}
        for x in made:
            self.hold(x)
        view = not func._schema.is_mutable and all(
            x.untyped_storage()._cdata in before for x in made
        )
        if made and not view and "empty" not in func._schema.name:
            self.add(func, tensors, args, kwargs, out, made)
        return out

    def run(self, func, tensors, args, kwargs):
        """The operation itself, fake where one of its tensors is, or where it makes a floating-point one from none."""
        is_fake = lambda x: isinstance(x, FakeTensor)
        if self.fake is None or (tensors and not any(map(is_fake, tensors))):
            return func(*args, **kwargs)
        if (
            func is torch.ops.aten._local_scalar_dense.default
        ):  # .item(): there is no number to give
            return (
                1.0 if args[0].is_floating_point() else True if args[0].dtype == torch.bool else 1
            )
        if func._schema.is_mutable and not is_fake(args[0]):
            return args[0]  # no number to write into a real tensor: it keeps what stands in it
        if func._schema.name in (
            "aten::index",
            "aten::index_put_",
        ):  # a real mask tells how many places it means
            mask = (
                lambda x: isinstance(x, torch.Tensor) and x.dtype == torch.bool and not is_fake(x)
            )
            args = (
                args[0],
                [i for x in args[1] for i in (x.nonzero().unbind(1) if mask(x) else [x])],
                *args[2:],
            )
        with self.fake:
            out = func(*args, **kwargs)
        return (
            out if tensors or (is_fake(out) and out.is_floating_point()) else func(*args, **kwargs)
        )

    def add(self, func, tensors, args, kwargs, out, made) -> None:
        """Count an operation that does something; it takes what its arithmetic or its bytes need, the longer."""
        name, flops = func._schema.name.split("::")[1].strip("_"), 0
        # what is expanded lies in memory once; what is given as `out` is written, not read
        size = lambda xs: sum(
            x.itemsize * math.prod(n for n, step in zip(x.shape, x.stride()) if step) for x in xs
        )
        moved = (
            size(tensors)
            + size(made)
            - size([kwargs["out"]] if kwargs.get("out") is not None else [])
        )
        if name in LOOKUPS:
            moved = 2 * size(tensors[-1:] if func._schema.is_mutable else made)
        if name == "gemm_4bit":
            (x, _, shape), rows = args[:3], args[0].shape[:-1].numel()
            flops, copied = 2 * rows * math.prod(shape), math.prod(shape) * x.element_size()
            if rows > FUSED_ROWS:
                moved += 2 * copied
                self.peak = max(self.peak, self.live + copied)
        elif name == "scaled_dot_product_flash_attention_for_cpu":
            flops = attention_flops(*args[:2], 2, len(args) > 4 and args[4])
        elif name == "scaled_dot_product_flash_attention_for_cpu_backward":
            flops = attention_flops(
                *args[1:3], 5, args[7]
            )  # two of the forward again, three for the gradients
        elif func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        for key, value in (("flops", flops), ("moved", moved), ("operations", 1)):
            self.total[key] += value
        for card, (_, bandwidth, half, single) in CARDS.items():
            rate = single if made[0].dtype == torch.float32 else half
            self.total[card] += max(
                flops / (rate * 1e12 * FLOP_SHARE), moved / (bandwidth * 1e9 * BYTE_SHARE)
            )


# ---------------------------------------------------------------------------------------------------- what is counted


LOADED = {
    "nf4": torch.bfloat16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}  # on a GPU, what is not in 4 bits


def fake_policy(
    config: Qwen2_5_VLConfig, s: Settings, dtype: torch.dtype, counter: Counter
) -> Policy:
    """The policy as it is loaded, of the real classes, without numbers in its weights.

    bitsandbytes' Params4bit cannot hold a fake tensor: a plain parameter stands in, with the packed weight and the
    statistics that the library's own quantisation gives for a fake weight. All that reads it is the library's code.
    """
    base = empty_base(config, s.load_in, dtype)
    with init_empty_weights():
        policy = add_adapter(base, shape_processor(config), s.rank, s.checkpointing)
    with counter:
        for module in policy.model.modules():
            for name, old in list(module.named_parameters(recurse=False)):
                if isinstance(old, Params4bit):
                    whole = torch.empty(module.out_features, module.in_features, dtype=dtype)
                    packed, state = quantize_4bit(whole, compress_statistics=True, quant_type="nf4")
                    new = torch.nn.Parameter(packed, requires_grad=False)
                    new.quant_state, new.compress_statistics, new.quant_type = state, True, "nf4"
                else:
                    new = torch.nn.Parameter(
                        torch.empty(old.shape, dtype=old.dtype), old.requires_grad
                    )
                setattr(module, name, new)
        base.tie_weights()
        policy.banned = torch.zeros(policy.banned.shape, dtype=torch.bool)
    return policy


def sam_kind(s: Settings) -> str:
    """The segmenter that is counted: a SAM 2 or 3 cannot be built without its files."""
    return s.sam if small_folder(s.sam) or s.sam in SAM_FILES else "vit_h"


def build(
    config: Qwen2_5_VLConfig, s: Settings, dtype=None
) -> tuple[Counter, Policy, Segmenter, dict]:
    """A fake policy and a fake SAM in one process, and the bytes of each."""
    counter, dtype = Counter(FakeTensorMode(allow_non_fake_inputs=True)), dtype or LOADED[s.load_in]
    policy = fake_policy(config, s, dtype, counter)
    weights = counter.live
    with counter:
        segmenter = SamSegmenter(SamPredictor(random_sam(sam_kind(s)).requires_grad_(False)))
    return (
        counter,
        policy,
        segmenter,
        {"weights": weights, "sam": counter.live - weights, "load": counter.peak},
    )


TEXT = 200  # prompt tokens beside the picture's: 174 of instruction in Qwen's vocabulary, and a question


@torch.no_grad()
def read_pictures(policy: Policy, s: Settings) -> list[Prompt]:
    """The questions of a batch, each of TEXT tokens and a picture: one is encoded, the others are copies of it."""
    text = lambda words: prompt_text(policy.processor, " the" * words, s.image_size, s.image_size)
    least = (
        len(policy.processor.tokenizer(text(1)).input_ids) - 1
    )  # without the placeholder of the picture
    question = " the" * max(1, 1 + TEXT - least)
    prompt = encode(policy, [Image.new("RGB", (s.image_size, s.image_size))], [question])[0]
    return [replace(prompt, embeds=prompt.embeds.clone()) for _ in range(s.questions)]


def count_sampling(policy: Policy, prompts: list[Prompt], s: Settings, counter: Counter) -> dict:
    """Laps of policy.sample: "prefill", and one token of every answer, the "first" and the "last".

    Without numbers four tokens are sampled: before the third the cache grows as the tokens between would grow it.
    """
    language, laps = policy.base.model.language_model, []
    between = max(0, s.max_new_tokens - 4) if counter.fake else 0

    def watch(model, args, kwargs):
        laps.append(counter.lap())
        for _ in range(between if len(laps) == 3 else 0):
            kwargs["layout"].grow()

    with language.register_forward_pre_hook(watch, with_kwargs=True):
        generate(policy, prompts, s.group, s.max_new_tokens - between, s.temperature)
    laps.append(counter.lap())
    return {
        "prefill": laps[1],
        "first": laps[2],
        "last": laps[-1] | {"over": max(lap["over"] for lap in laps[3:])},
    }


def questions_per_forward(s: Settings) -> int:
    """Questions in one forward of an update."""
    return min(s.micro, max(1, s.questions // s.updates))


def count_update(
    policy: Policy, optimizer, prompts: list[Prompt], s: Settings, counter: Counter
) -> dict:
    """A lap of one forward and backward of an update, with its reference pass; G answers of full length a question."""
    rollouts = full_rollouts(policy, prompts[: questions_per_forward(s)], s)
    counter.lap()
    update(policy, optimizer, rollouts, replace(s, updates=1, passes=1), 0)
    return counter.lap()


def count_reward(segmenter: Segmenter, s: Settings, counter: Counter) -> dict:
    """A lap of SAM: one photograph encoded, and a group of answers decoded, each a box and the most points."""
    predictor, points = segmenter.predictor, torch.tensor(
        [[[100.0, 100.0, 1.0]] * s.max_points] * s.group
    )  # [G, n, 3]
    counter.lap()
    predictor.set_image(np.zeros((480, 640, 3), np.uint8))  # as large as COCO's
    boxes = torch.tensor([[50.0, 50.0, 200.0, 200.0]] * s.group)
    sam, features = predictor.model, predictor.features
    logits, _ = sam_logits(sam, features, points[..., :2], points[..., 2], boxes)  # [G, 3, h, w]
    for logit in logits[:, :1]:  # [1, h, w] the best of three, one answer after the other
        predictor.model.postprocess_masks(
            logit[None], predictor.input_size, predictor.original_size
        )
    return counter.lap()


def count(
    counter: Counter,
    policy: Policy,
    segmenter: Segmenter,
    loaded: dict,
    s: Settings,
    sizes: tuple = (),
) -> dict:
    """`loaded`, bytes of the optimizer, and laps of the phases of a step, one after the other.

    encode is of one picture, prefill and the tokens of `s.questions` questions at a time, reward of one question,
    update of one forward; "updates" are those of other `sizes` (G, length).
    """
    with counter:
        before, optimizer = counter.live, new_optimizer(policy, s)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        optimizer.step()  # from the second update on there are moments, and until the next update the last gradients
        found = loaded | {"optimizer": counter.live - before}
        counter.lap(resident=counter.live)
        prompts = read_pictures(policy, s)
        found |= {"prompt_tokens": len(prompts[0].ids), "encode": counter.lap()}
        found["reward"] = count_reward(segmenter, s, counter)
        found |= count_sampling(policy, prompts, s, counter)
        one = lambda g, n: count_update(
            policy, optimizer, prompts, replace(s, group=g, max_new_tokens=n), counter
        )
        return found | {
            "update": one(s.group, s.max_new_tokens),
            "updates": {size: one(*size) for size in sizes},
        }


def grow(found, two, three, layers: int):
    """`found` and what `layers` more layers add: all hold, move and compute what the third of three does."""
    if isinstance(found, dict):
        return {k: grow(v, two[k], three[k], layers) for k, v in found.items()}
    return found + layers * (three - two)


def counts(config: Qwen2_5_VLConfig, s: Settings, sizes: tuple, whole: bool) -> dict:
    """As `count`; updates of other sizes, and without `whole` everything, from models of two and of three layers.

    (Not of one and of two: when the first layer ends nothing of an earlier one is left, so its peak lies lower.)
    """

    def cut(layers: int, blocks: int) -> Qwen2_5_VLConfig:
        shallow = copy.deepcopy(config)
        shallow.text_config.num_hidden_layers, shallow.vision_config.depth = layers, blocks
        return shallow

    layers, blocks, tiny = (
        config.text_config.num_hidden_layers,
        config.vision_config.depth,
        replace(s, sam="tiny"),
    )
    two, three = (count(*build(cut(n, 1), tiny), tiny, sizes) for n in (2, 3))
    found = count(*build(cut(layers if whole else 2, blocks), s), s)
    updates = grow(two["updates"], two["updates"], three["updates"], layers - 2)
    return grow(found | {"updates": {}}, two, three, 0 if whole else layers - 2) | {
        "updates": updates
    }


# ---------------------------------------------------------------------------------------------------- the forecast

GRID = tuple((g, n) for g in (4, 8, 16) for n in (256, 512, 1024))


def peaks(found: dict) -> dict:
    """GiB of what stays, and the peak of the whole process in each phase."""
    resident = found["weights"] + found["optimizer"] + found["sam"]
    size = {name: found[name] for name in ("weights", "optimizer", "sam")} | {
        "load_peak": found["load"]
    }
    for phase, lap in dict(
        encode="encode", prefill="prefill", decode="last", reward="reward", update="update"
    ).items():
        size[f"{phase}_peak"] = resident + found[lap]["over"]
    return {f"{name}_gib": value / GIB for name, value in size.items()}


def seconds(lap: dict, card: str) -> float:
    """Of a lap: what the card needs, or what Python needs to start its operations, whichever is longer."""
    return max(lap[card], lap["operations"] * LAUNCH)


def step_seconds(found: dict, s: Settings, card: str, length: int) -> dict:
    """Seconds of a step by phase with answers of `length` tokens."""
    memory, bandwidth, *_ = CARDS[card]
    room = max(1, usable(memory) * GIB - found["weights"] - found["sam"] - found["optimizer"])
    rounds = min(
        s.questions, math.ceil(max(found["prefill"]["over"], found["last"]["over"]) / room)
    )
    again = (
        (rounds - 1) * found["weights"] / (bandwidth * 1e9 * BYTE_SHARE)
    )  # each round reads the weights once more
    middle = (
        length / 2 / s.max_new_tokens
    )  # a token costs more the more stand before it: on average as the middle one
    token = {k: v + middle * (found["last"][k] - v) for k, v in found["first"].items()}
    recorded = 2 * math.ceil(
        length / BLOCK
    )  # tokens that Python starts: one as it is and one to record, a size
    sampling = length * (token[card] + again) + rounds * token["operations"] * (
        length * REPLAYED + recorded * LAUNCH
    )
    return {
        "rollout": s.questions * seconds(found["encode"], card)
        + seconds(found["prefill"], card)
        + sampling,
        "reward": s.questions * seconds(found["reward"], card),
        "update": s.passes
        * s.questions
        / questions_per_forward(s)
        * seconds(found["updates"][s.group, length], card),
    }


def hours(step: dict, samples: int, s: Settings) -> float:
    return sum(step.values()) * (samples // s.questions) / 3600


def forecast(config: Qwen2_5_VLConfig, s: Settings) -> dict:
    """GiB at the peaks, and hours by card, of a model of the shape `config`; forecast_lines tells what is what."""
    lengths = sorted({128, 512, s.max_new_tokens})
    found = counts(config, s, (*GRID, *((s.group, n) for n in lengths)), whole=True)
    step = {card: {str(n): step_seconds(found, s, card, n) for n in lengths} for card in CARDS}
    by_size = {
        size: peaks(found | {"update": lap})["update_peak_gib"]
        for size, lap in found["updates"].items()
    }
    return peaks(found) | {
        "update_peak_gib_by_size": {f"{g} x {n}": by_size[g, n] for g, n in GRID},
        "prompt_tokens": found["prompt_tokens"],
        "decode_bytes_per_token": (found["first"]["moved"] + found["last"]["moved"]) // 2,
        "update_flops": found["update"]["flops"] // questions_per_forward(s),
        "seconds_per_step": step,
        "hours": {
            card: {n: hours(times[n], 3000, s) for n in ("128", "512")}
            for card, times in step.items()
        },
    }


def forecast_lines(expected: dict, s: Settings) -> list[str]:
    """What is printed of a forecast: every line says that it is one, and how its figures come about."""
    e, gib = expected, lambda *names: ", ".join(
        f"{n} {expected[f'{n}_peak_gib']:.1f}" for n in names
    )
    fits = lambda peak: [
        f"{card} GB" for card in (24, 16, 12) if max(peak, e["reward_peak_gib"]) < usable(card)
    ]
    lines = [
        f"{s.preset} in {s.load_in}, {s.questions} questions x {s.group} answers of {s.max_new_tokens} tokens, prompts "
        f"of {e['prompt_tokens']} tokens, SAM {sam_kind(s)}; counted on tensors without numbers, nothing is measured",
        f"GiB that stay: weights with adapter {e['weights_gib']:.2f}, moments and gradients {e['optimizer_gib']:.2f}, "
        f"SAM {e['sam_gib']:.2f}",
        "GiB of the whole process at the peak of a phase: "
        + gib("load", "encode", "prefill", "decode", "reward", "update"),
        f"prefill and decode are of all {s.questions} questions at once; where memory is short, fewer are taken",
        "updates of other sizes, and cards that hold them (usable: 95 % less 0.6 GiB):",
        *(
            f"  {size} tokens: {peak:.1f} GiB, {', '.join(fits(peak)) or 'none of 24, 16 and 12 GB'}"
            for size, peak in e["update_peak_gib_by_size"].items()
        ),
        f"a token of {s.questions} x {s.group} answers moves {e['decode_bytes_per_token'] / 1e9:.1f} GB, the mean of "
        f"first and last; the update of a question takes {e['update_flops'] / 1e12:.1f} TFLOP, reference and recompute "
        "included",
        "hours for 3,000 samples with answers of 128 and of 512 tokens (seconds of a step: rollout + reward + update):",
    ]
    for card, times in e["hours"].items():
        step = (
            " + ".join(f"{x:.1f}" for x in e["seconds_per_step"][card][n].values())
            for n in ("128", "512")
        )
        lines.append(
            f"  {card}: " + ", ".join(f"{h:.1f} ({x})" for h, x in zip(times.values(), step))
        )
    lines.append(
        f"assumed: {FLOP_SHARE:.0%} of a card's published FLOP/s, {BYTE_SHARE:.0%} of its bytes/s, "
        f"{LAUNCH * 1e6:.0f} us to start an operation, whichever takes longest (in decoding "
        f"{REPLAYED * 1e6:.1f} us more for each); evaluation is left out; right within a factor of 1.5 or so"
    )
    return [f"forecast: {line}" for line in lines]


def known_card(name: str) -> str | None:
    """The row of CARDS for a device such as "NVIDIA GeForce RTX 4090" or "NVIDIA A100-SXM4-80GB"; None for others."""
    words = re.split("[ -]", name)
    return next(
        (card for card in CARDS if set(card.split()) <= set(words) and "Laptop" not in words), None
    )


def shape_is_known(s: Settings) -> bool:
    """Whether SHAPES has what will be trained: a preset's own policy, no other one in its place."""
    return s.preset in SHAPES and s.policy == PRESETS[s.preset]["policy"]


def forecast_line(s: Settings) -> str:
    """One line for the start of a training on a GPU: its peak of memory, and hours, of a shape that is known.

    A second line warns where less memory is free. Raises UserError where the free memory cannot hold the weights.
    Takes seconds, because two and three layers are counted and multiplied; the run's random numbers stay as they are.
    """
    if not shape_is_known(s):
        return "no forecast: it knows the policies of --preset 3b and 7b alone"
    with torch.random.fork_rng(devices=[]):
        found = counts(shape_config(s.preset), s, ((s.group, 128),), whole=False)
    gib, name, free, of = peaks(found), "a machine without a GPU", math.inf, ""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        free, whole = card_memory(s.memory_limit)
        of = f" of this card's {whole:.1f}"
    sampling = min(
        free, max(gib["prefill_peak_gib"], gib["decode_peak_gib"])
    )  # fewer questions where it is short
    peak = max(sampling, *(gib[f"{p}_peak_gib"] for p in ("load", "encode", "reward", "update")))
    card = known_card(name)
    time = f"no hours: {name} is none of {', '.join(CARDS)}"
    if card:
        time = f"about {hours(step_seconds(found, s, card, 128), s.samples, s):.1f} hours at answers of 128 tokens"
    line = f"forecast: peak {peak:.1f} GiB{of}, {time}"
    check_weights(s, gib["weights_gib"] + gib["sam_gib"], free)
    warning = memory_warning(s, peak, free)
    return f"{line}\n{warning}" if warning else line


def check_weights(s: Settings, weights: float, free: float) -> None:
    """Refuse a start where the `weights` of policy and SAM take more than the `free` memory of the GPU, both in GiB."""
    if weights > free:
        ways = smaller_weights(s)
        advice = f"{', '.join(ways[:-1])} or {ways[-1]}" if len(ways) > 1 else ways[0]
        raise UserError(
            f"--preset {s.preset}: the weights take {weights:.1f} GiB and {free:.1f} GiB are free on the "
            f"GPU. You can {advice}"
        )


def check_free_memory(s: Settings) -> None:
    """Refuse an evaluation where the weights of a shape that is known take more than the GPU's free memory."""
    if s.device != "cuda" or not shape_is_known(s):
        return
    with torch.random.fork_rng(devices=[]):
        *_, loaded = build(shape_config(s.preset), s)
    check_weights(s, (loaded["weights"] + loaded["sam"]) / GIB, card_memory(s.memory_limit)[0])


def beside(seconds: dict, gib: dict, expected: dict, times: dict) -> list[str]:
    """Lines of a table: measured seconds and peak GiB by phase, and beside each the forecast, where there is one."""
    phases = dict(
        load=("load",),
        rollout=("encode", "prefill", "decode"),
        reward=("reward",),
        update=("update",),
    )
    show = lambda value, digits: "-" if value is None else f"{value:.{digits}f}"
    lines = [f"{'phase':<12}{'seconds':>10}{'forecast':>10}{'peak GiB':>12}{'forecast':>10}"]
    for phase, value in seconds.items():
        peak = max((expected[f"{p}_peak_gib"] for p in phases.get(phase, ())), default=None)
        lines.append(
            f"{phase:<12}{value:>10.1f}{show(times.get(phase), 1):>10}{gib[phase]:>12.3f}{show(peak, 3):>10}"
        )
    return lines
