"""Memory and time of a preset, known before a GPU is rented: `python train.py --preset 7b --rehearse 1` on any machine.

The code that trains runs here too, at its true shape, on tensors that have a shape, a dtype and a storage of so many bytes, but no
numbers (torch's FakeTensorMode). What is counted on the way, operation by operation, is exact for the code as it stands: bytes held,
bytes moved, floating-point operations. What is assumed is how well a card uses its published peaks (CARDS, and the shares below
it), so memory is good to about 10 % and hours are a forecast, not a measurement: take them as right within a factor of 1.5.

Numbers that steer the code (lengths, masks, positions) are whole numbers, and those are real; only floating-point tensors are fake.
"""

import copy
import math
import re
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import init_empty_weights
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Params4bit
from PIL import Image
from segment_anything import SamPredictor, sam_model_registry
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoProcessor, BitsAndBytesConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from .config import Settings
from .grpo import Rollout, new_optimizer, update
from .policy import TINY, Completion, Policy, Prompt, add_adapter, encode, prompt_text, sample
from .reward import Segmenter

GIB = 2**30

# Published peaks: GiB, GB/s, dense TFLOP/s of bf16 tensor cores with fp32 accumulation (half of the figure "with sparsity"), and of
# fp32. From NVIDIA's white papers of the architectures GA102, Ada and RTX Blackwell, and its data sheets of A10G, L4, A100 SXM, H100 SXM.
CARDS = {
    "RTX 3090": (24, 936, 71, 35.6),
    "RTX 4090": (24, 1008, 165, 82.6),
    "RTX 5090": (32, 1792, 209, 104.8),
    "A10G": (24, 600, 70, 35),
    "L4": (24, 300, 121, 30.3),
    "A100": (80, 2039, 312, 19.5),
    "H100": (80, 3350, 989, 67),
}
# Assumed. Large matrix products reach 50 to 80 % of the peak, small and thin ones far less; plain kernels read and write at 70 to 85 %.
FLOP_SHARE, BYTE_SHARE = 0.4, 0.7
LAUNCH = 8e-6  # seconds that Python needs to start one operation on the GPU: what small ones take, whatever the card
FUSED_ROWS = 64  # up to about so many rows bitsandbytes multiplies from the 4 bits; above, it writes a bf16 copy of the weight first


def usable(card: float) -> float:
    """GiB of a card's that tensors can take: 0.6 go to CUDA's context and libraries, 5 % to gaps between tensors (assumed)."""
    return 0.95 * card - 0.6


# ---------------------------------------------------------------------------------------------------- the counter

LOOKUPS = ("embedding", "index", "index_select", "gather", "index_put", "_index_put_impl")  # they touch few rows of a large tensor


def attention_flops(query, key, value, passes: int, causal: bool) -> int:
    """Multiplications and additions of `passes` products of [queries, keys] scores: 2 forward, 5 in the backward, which makes them again."""
    return 2 * passes * query.shape[:3].numel() * key.shape[2] * query.shape[3] // (2 if causal else 1)


class Counter(TorchDispatchMode):
    """While entered, counts bytes held and moved, floating-point operations, and for each card the seconds that it would need.

    With `fake`, floating-point tensors that are made have no numbers, and what is made from them neither; without, all is real.
    """

    def __init__(self, fake: FakeTensorMode | None = None):
        super().__init__()
        self.fake, self.held, self.live, self.peak, self.resident = fake, {}, 0, 0, 0
        self.total = dict.fromkeys(("flops", "moved", "operations", *CARDS), 0)
        self.before = dict(self.total)

    def hold(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor, once, until it is freed."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.held:
            self.held[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.drop, storage._cdata)

    def drop(self, storage: int) -> None:
        self.live -= self.held.pop(storage)

    def lap(self, resident: int | None = None) -> dict:
        """What was counted since the last lap, and how far the bytes held rose "over" those that stay, `resident` from here on."""
        lap = {k: v - self.before[k] for k, v in self.total.items()} | {"over": self.peak - self.resident}
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
        view = not func._schema.is_mutable and made and all(x.untyped_storage()._cdata in before for x in made)
        if made and not view and "empty" not in func._schema.name:
            self.add(func, tensors, args, kwargs, out, made)
        return out

    def run(self, func, tensors, args, kwargs):
        """The operation itself, on fake tensors where one of its tensors is fake or a floating-point one is made from nothing."""
        fakes = [x for x in tensors if isinstance(x, FakeTensor)]
        if self.fake is None or (tensors and not fakes):
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:  # .item(): there is no number to give
            return 1.0 if args[0].is_floating_point() else True if args[0].dtype == torch.bool else 1
        if func._schema.is_mutable and not isinstance(args[0], FakeTensor):
            return args[0]  # nothing to write into a real tensor: it keeps what stands in it
        if func._schema.name in ("aten::index", "aten::index_put_"):  # a mask with numbers says how many places it means
            real = lambda x: isinstance(x, torch.Tensor) and x.dtype == torch.bool and not isinstance(x, FakeTensor)
            places = [i for x in args[1] for i in (x.nonzero().unbind(1) if real(x) else [x])]
            args = (args[0], places, *args[2:])
        with self.fake:
            out = func(*args, **kwargs)
        if tensors or (isinstance(out, FakeTensor) and out.is_floating_point()):
            return out
        return func(*args, **kwargs)

    def add(self, func, tensors, args, kwargs, out, made) -> None:
        """Count one operation that does something: it takes as long as its arithmetic or its bytes need, whichever is longer."""
        name, flops = func._schema.name.split("::")[1], 0
        size = lambda xs: sum(x.numel() * x.element_size() for x in xs)
        moved = size(tensors) + size(made)
        if name.rstrip("_") in LOOKUPS:
            moved = 2 * size(tensors[-1:] if func._schema.is_mutable else made)
        if name == "gemm_4bit":
            (x, _, shape), rows = args[:3], args[0].shape[:-1].numel()
            flops = 2 * rows * math.prod(shape)
            if rows > FUSED_ROWS:
                copy = math.prod(shape) * x.element_size()
                moved += 2 * copy
                self.peak = max(self.peak, self.live + copy)
        elif name == "_scaled_dot_product_flash_attention_for_cpu":
            flops = attention_flops(*args[:3], 2, args[4] if len(args) > 4 else False)
        elif name == "_scaled_dot_product_flash_attention_for_cpu_backward":
            flops = attention_flops(*args[1:4], 5, args[7])
        elif func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        self.total["flops"] += flops
        self.total["moved"] += moved
        self.total["operations"] += 1
        for card, (_, bandwidth, half, single) in CARDS.items():
            rate = (single if made[0].dtype == torch.float32 else half) * 1e12
            self.total[card] += max(flops / rate / FLOP_SHARE, moved / bandwidth / 1e9 / BYTE_SHARE)


# ---------------------------------------------------------------------------------------------------- what is counted


def fake_policy(config: Qwen2_5_VLConfig, s: Settings, dtype: torch.dtype, counter: Counter) -> Policy:
    """The policy as it is loaded, module by module of the real classes, without numbers in its weights.

    bitsandbytes' Params4bit cannot hold a fake tensor, so a plain parameter stands in, with the packed weight and the statistics that
    the library's own quantisation gives a fake weight.
    """
    with init_empty_weights():
        base = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=dtype)
        if s.load_in == "nf4":
            nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
            replace_with_bnb_linear(base, ["model.visual", "lm_head"], nf4)
            base.is_loaded_in_4bit = True  # PEFT's question
        policy = add_adapter(base, AutoProcessor.from_pretrained(TINY), s.rank, checkpointing=s.checkpointing)
    with counter:
        for module in policy.model.modules():
            for name, old in list(module.named_parameters(recurse=False)):
                if isinstance(old, Params4bit):
                    whole = torch.empty(module.out_features, module.in_features, dtype=dtype)
                    packed, state = quantize_4bit(whole, compress_statistics=True, quant_type="nf4")
                    new = torch.nn.Parameter(packed, requires_grad=False)
                    new.quant_state, new.compress_statistics, new.quant_type = state, True, "nf4"
                else:
                    new = torch.nn.Parameter(torch.empty(old.shape, dtype=old.dtype), old.requires_grad)
                setattr(module, name, new)
        base.tie_weights()
        policy.banned = torch.zeros(policy.banned.shape, dtype=torch.bool)
    return policy


TEXT = 200  # prompt tokens beside the picture's: 174 of instruction in Qwen's vocabulary, and a question


@torch.no_grad()
def prompts_of(policy: Policy, size: int, tokens: int, number: int) -> list[Prompt]:
    """`number` encoded questions of `tokens` tokens about pictures of size x size pixels, which is a part of them."""
    cell = policy.base.config.vision_config.patch_size * policy.base.config.vision_config.spatial_merge_size
    text = lambda words: prompt_text(policy.processor, " the" * words, size, size)
    least = len(policy.processor.tokenizer(text(1)).input_ids) - 1 + (size // cell) ** 2  # the placeholder becomes the picture
    return encode(policy, [Image.new("RGB", (size, size))] * number, [" the" * max(1, 1 + tokens - least)] * number)


def count_sampling(policy: Policy, prompts: list[Prompt], s: Settings, counter: Counter) -> dict:
    """Laps of policy.sample: "prefill", and one token of every answer, the "first" and the "last".

    Four tokens are sampled. Before the third the cache grows by what the tokens between would have left in it.
    """
    language, laps, between = policy.base.model.language_model, [], max(0, s.max_new_tokens - 4)
    forward = language.forward

    def watched(*args, **kwargs):
        laps.append(counter.lap())
        if "layout" in kwargs:
            for _ in range(between if len(laps) == 3 else 0):
                kwargs["layout"].grow()
        elif len(laps) >= 3 and between:
            cache = kwargs["past_key_values"]
            for layer in range(len(cache.layers) if len(laps) == 3 else 0):
                b, heads, _, d = cache.layers[layer].keys.shape
                cache.update(*kwargs["inputs_embeds"].new_empty(2, b, heads, s.group * between, d), layer)
            kwargs["attention_mask"] = torch.nn.functional.pad(kwargs["attention_mask"], (s.group * between, 0))
        return forward(*args, **kwargs)

    language.forward = watched
    try:
        sample(policy, prompts, s.group, min(4, s.max_new_tokens), s.temperature)
    finally:
        del language.forward
    laps.append(counter.lap())
    return {"prefill": laps[1], "first": laps[2], "last": laps[-1] | {"over": max(lap["over"] for lap in laps[3:])}}


def count_update(policy: Policy, optimizer, prompts: list[Prompt], s: Settings, counter: Counter) -> dict:
    """A lap of one update, reference pass included: `s.micro` questions in one forward, G answers of full length to each."""
    answers = [Completion(torch.full((s.max_new_tokens,), 300), torch.zeros(s.max_new_tokens), False, "") for _ in range(s.group)]
    rollouts = [Rollout(None, p, answers, [], torch.linspace(-1, 1, s.group)) for p in prompts[: s.micro]]
    counter.lap()
    update(policy, optimizer, rollouts, replace(s, updates=1, passes=1), 0)
    return counter.lap()


def count_reward(segmenter: Segmenter, s: Settings, counter: Counter) -> dict:
    """A lap of SAM: one photograph encoded, and a group of answers decoded, each a box and the most points."""
    predictor, points = segmenter.predictor, torch.tensor([[[100.0, 100.0, 1.0]] * s.max_points] * s.group)  # [G, n, 3]
    counter.lap()
    predictor.set_image(np.zeros((480, 640, 3), np.uint8))  # as large as COCO's
    predictor.predict_torch(points[..., :2], points[..., 2], torch.tensor([[50.0, 50.0, 200.0, 200.0]] * s.group))
    return counter.lap()


def new_moments(policy: Policy, s: Settings, counter: Counter):
    """An optimizer as it is from the second update on: with its moments, and between updates the last gradients."""
    optimizer = new_optimizer(policy, s)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    counter.lap(resident=counter.live)
    return optimizer


def count(counter: Counter, policy: Policy, segmenter: Segmenter, loaded: dict, s: Settings) -> dict:
    """`loaded`, bytes of the optimizer, and laps of the phases of a step, one after the other.

    encode is of one picture, prefill and the tokens of `s.questions` questions at a time, reward of one question, update of `s.micro`.
    """
    with counter:
        before, tokens = counter.live, (s.image_size // 28) ** 2 + TEXT
        optimizer = new_moments(policy, s, counter)
        found = loaded | {"optimizer": counter.live - before}
        found["prompt_tokens"] = len(prompts_of(policy, s.image_size, tokens, 1)[0].ids)
        found |= {"encode": counter.lap(), "reward": count_reward(segmenter, s, counter)}
        prompts = prompts_of(policy, 56, tokens, s.questions)  # a small picture and more text: as many tokens, sooner
        counter.lap()
        found |= count_sampling(policy, prompts, s, counter)
        return found | {"update": count_update(policy, optimizer, prompts, s, counter)}


def count_updates(config: Qwen2_5_VLConfig, s: Settings, sizes: list[tuple[int, int]]) -> dict:
    """Laps of updates of other sizes (G, length), from models of one and of two layers: all layers hold, move and compute the same."""
    laps, layers = [], config.text_config.num_hidden_layers
    for depth in (1, 2):
        small = copy.deepcopy(config)
        small.text_config.num_hidden_layers = small.vision_config.depth = depth
        counter, policy, *_ = build(small, replace(s, sam="tiny"))
        with counter:
            optimizer = new_moments(policy, s, counter)
            prompts = prompts_of(policy, 56, (s.image_size // 28) ** 2 + TEXT, s.questions)
            laps.append([count_update(policy, optimizer, prompts, replace(s, group=g, max_new_tokens=n), counter) for g, n in sizes])
    return {size: {k: v + (layers - 1) * (two[k] - v) for k, v in one.items()} for size, one, two in zip(sizes, *laps)}


# ---------------------------------------------------------------------------------------------------- the forecast


def sam_kind(s: Settings) -> str:
    return s.sam if s.sam in sam_model_registry else "vit_h"  # a SAM 2 or 3 cannot be built without its files


def build(config: Qwen2_5_VLConfig, s: Settings, dtype: torch.dtype = torch.bfloat16) -> tuple[Counter, Policy, Segmenter, dict]:
    """A fake policy and a fake SAM in one process, and the bytes of each."""
    counter = Counter(FakeTensorMode(allow_non_fake_inputs=True))
    policy = fake_policy(config, s, dtype, counter)
    weights = counter.live
    with counter:
        segmenter = Segmenter(SamPredictor(sam_model_registry[sam_kind(s)]().requires_grad_(False)))
    return counter, policy, segmenter, {"weights": weights, "sam": counter.live - weights, "load": counter.peak}


def seconds(lap: dict, card: str) -> float:
    """Of a lap on a card: what the card needs, or what Python needs to start its operations, whichever is longer."""
    return max(lap[card], lap["operations"] * LAUNCH)


def step_seconds(found: dict, update: dict, s: Settings, card: str, length: int) -> dict:
    """Seconds of a step by phase with answers of `length` tokens."""
    memory, bandwidth, *_ = CARDS[card]
    room = usable(memory) * GIB - found["weights"] - found["sam"] - found["optimizer"]
    rounds = min(s.questions, max(1, math.ceil(max(found["prefill"]["over"], found["last"]["over"]) / max(room, 1))))
    share = (length / 2) / max(1, s.max_new_tokens)  # a token costs more the longer its answer is: on average as one in the middle
    token = {k: v + share * (found["last"][k] - v) for k, v in found["first"].items()}
    again = (rounds - 1) * found["weights"] / bandwidth / 1e9 / BYTE_SHARE  # each round of sampling reads the weights once more
    reading = s.questions * seconds(found["encode"], card) + seconds(found["prefill"], card)
    sampling = length * max(token[card] + again, rounds * token["operations"] * LAUNCH)
    updating = s.passes * s.questions / s.micro * seconds(update, card)
    return {"rollout": reading + sampling, "reward": s.questions * seconds(found["reward"], card), "update": updating}


LENGTHS = (128, 512)
GRID = tuple((g, n) for g in (4, 8, 16) for n in (256, 512, 1024))


def peaks(found: dict) -> dict:
    """GiB of what stays, and the peak of the whole process in each phase."""
    resident = found["weights"] + found["optimizer"] + found["sam"]
    parts = {"weights": found["weights"], "optimizer": found["optimizer"], "sam": found["sam"], "load_peak": found["load"]}
    phases = {"encode": "encode", "prefill": "prefill", "decode": "last", "reward": "reward", "update": "update"}
    parts |= {f"{phase}_peak": resident + found[lap]["over"] for phase, lap in phases.items()}
    return {f"{name}_gib": size / GIB for name, size in parts.items()}


def forecast(config: Qwen2_5_VLConfig, s: Settings) -> dict:
    """Peaks of the whole process, in GiB, and hours by card, of the preset's shape `config`; what each key means is printed."""
    found = count(*build(config, s), s)
    updates = count_updates(config, s, [*GRID, *((s.group, n) for n in LENGTHS)])
    times = {card: {str(n): step_seconds(found, updates[s.group, n], s, card, n) for n in LENGTHS} for card in CARDS}
    return peaks(found) | {
        "update_peak_gib_by_size": {f"{g} x {n}": peaks(found | {"update": updates[g, n]})["update_peak_gib"] for g, n in GRID},
        "prompt_tokens": found["prompt_tokens"],
        "decode_bytes_per_token": (found["first"]["moved"] + found["last"]["moved"]) // 2,
        "update_flops": found["update"]["flops"] // s.micro,
        "seconds_per_step": times,
        "hours": {card: {n: sum(x.values()) * (3000 // s.questions) / 3600 for n, x in by_length.items()} for card, by_length in times.items()},
    }


def forecast_lines(expected: dict, s: Settings) -> list[str]:
    """What is printed of a forecast: every line says that it is one, and how its figures come about."""
    e = expected
    phases = ("load", "encode", "prefill", "decode", "reward", "update")
    lines = [
        f"{s.preset} in {s.load_in}, {s.questions} questions x {s.group} answers of {s.max_new_tokens} tokens, prompts of "
        f"{e['prompt_tokens']} tokens, SAM {sam_kind(s)}: counted on tensors without numbers; nothing here is measured",
        f"GiB that stay: weights with adapter {e['weights_gib']:.2f}, moments and gradients {e['optimizer_gib']:.2f}, SAM {e['sam_gib']:.2f}",
        "GiB of the whole process at its peak: " + ", ".join(f"{p} {e[f'{p}_peak_gib']:.1f}" for p in phases)
        + f" (prefill and decode of all {s.questions} questions at once: with less memory fewer are taken at a time)",
    ]
    fits = lambda gib: ", ".join(f"{card} GB" for card in (24, 16, 12) if max(gib, e["reward_peak_gib"]) < usable(card)) or "none of 24, 16, 12 GB"
    for size, gib in e["update_peak_gib_by_size"].items():
        lines.append(f"update with {size} tokens: {gib:.1f} GiB at its peak, fits {fits(gib)} (usable: 95 % less 0.6 GiB)")
    lines.append(f"one token of {s.questions} x {s.group} answers moves {e['decode_bytes_per_token'] / 1e9:.0f} GB; "
                 f"the update of one question takes {e['update_flops'] / 1e12:.0f} TFLOP, with the reference and what is computed twice")
    for card, hours in e["hours"].items():
        times = e["seconds_per_step"][card]
        lines.append(f"{card}: 3,000 samples in {hours['128']:.1f} hours with answers of 128 tokens, {hours['512']:.1f} with 512 (step: "
                     + ", ".join(f"{p} {times['128'][p]:.0f} and {times['512'][p]:.0f}" for p in times["128"]) + " s)")
    lines.append(f"hours assume {FLOP_SHARE:.0%} of a card's published FLOP/s, {BYTE_SHARE:.0%} of its bytes/s and {LAUNCH * 1e6:.0f} us to start an "
                 "operation, whichever takes longest; evaluation is not in them. Right within a factor of 1.5 or so")
    return [f"forecast: {line}" for line in lines]
