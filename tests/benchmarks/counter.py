"""Count bytes, operations and their time, one operation after the other: where do they go?

    python tests/benchmarks/counter.py --shape 7b --tokens 128 --out counted.json

The code that trains runs on tensors with a shape, a dtype and a storage, but without numbers
(torch's FakeTensorMode). Bytes held, bytes moved and floating-point operations are counted for each
phase. Only floating-point tensors are fake. Whole numbers steer the code (lengths, masks,
positions), so they are real.
"""

import argparse
import json
import math
import shlex
import sys
import weakref
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import init_empty_weights
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Params4bit
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # Python looks for modules only in the script's own folder

from samr1_mini import attention, tokens
from samr1_mini.config import Settings, make_settings
from samr1_mini.full_size import POLICY_SIZES, empty_base, shape_config, shape_processor
from samr1_mini.grpo import Parts, new_optimizer, update
from samr1_mini.rehearse import full_rollouts
from samr1_mini.decoding import generate
from samr1_mini.policy import Policy, Prompt, add_adapter
from samr1_mini.memory import compute_dtype
from samr1_mini.segmenter import random_sam
from samr1_mini.speed import BYTE_SHARE, CARDS, FLOP_SHARE

FUSED_ROWS = 64  # to so many rows bitsandbytes multiplies from the 4 bits, beyond from a bf16 copy
LOOKUPS = ("embedding", "index", "index_select", "gather", "index_put")  # read few rows of many
FLASH = "scaled_dot_product_flash_attention_for_cpu"


def is_fake(x) -> bool:
    return isinstance(x, FakeTensor)


def tensors_in(*values) -> list[torch.Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def bytes_of(tensors: list[torch.Tensor]) -> int:
    """Return the bytes of tensors. What is expanded lies in memory once."""
    total = 0
    for x in tensors:
        sides = [n for n, step in zip(x.shape, x.stride()) if step]
        total += x.itemsize * math.prod(sides)
    return total


class Counter(TorchDispatchMode):
    """Count bytes held and moved, floating-point operations, and seconds on each card.

    With `fake`, new floating-point tensors and all made from them have no numbers.
    """

    def __init__(self, fake: FakeTensorMode | None = None):
        super().__init__()
        self.fake = fake
        self.held = {}  # bytes by storage
        self.live = 0  # bytes of all storages
        self.peak = 0  # the most since the last lap
        self.start = 0  # bytes at the last lap
        self.total = dict.fromkeys(("flops", "moved", "operations", *CARDS), 0)
        self.before = dict(self.total)  # at the last lap

    def hold(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage once, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.held:
            self.held[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.live -= self.held.pop(key)

    def lap(self) -> dict:
        """Return the counts since the last lap, and "peak": the most bytes held since then."""
        counts = {name: value - self.before[name] for name, value in self.total.items()}
        counts["peak"] = self.peak
        self.before = dict(self.total)
        self.peak = self.live
        return counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return func(*args)
        kwargs = kwargs or {}
        given = tensors_in(args, kwargs)
        out = self.run(func, given, args, kwargs)
        made = tensors_in(out)
        storages = {x.untyped_storage()._cdata for x in given}
        for x in made:
            self.hold(x)
        is_view = not func._schema.is_mutable
        for x in made:
            is_view = is_view and x.untyped_storage()._cdata in storages
        if made and not is_view and "empty" not in func._schema.name:
            self.add(func, given, args, kwargs, out, made)
        return out

    def run(self, func, given: list, args: tuple, kwargs: dict):
        """Run an operation: fake if one of its tensors is, or if it makes numbers from none."""
        if self.fake is None:
            return func(*args, **kwargs)
        if given and not any(is_fake(x) for x in given):
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:  # .item() has no number to give
            return torch.ones((), dtype=args[0].dtype).item()
        if func._schema.is_mutable and not is_fake(args[0]):
            return args[0]  # there is no number to write, so a real tensor stays as it is
        if func._schema.name in ("aten::index", "aten::index_put_"):
            args = (args[0], places(args[1]), *args[2:])
        with self.fake:
            out = func(*args, **kwargs)
        if given or (is_fake(out) and out.is_floating_point()):
            return out
        return func(*args, **kwargs)

    def add(self, func, given: list, args: tuple, kwargs: dict, out, made: list) -> None:
        """Count an operation. It takes the time of its arithmetic or its bytes, the longer one."""
        name = func._schema.name.split("::")[1].strip("_")
        moved = bytes_of(given) + bytes_of(made)
        if kwargs.get("out") is not None:  # it is written and not read
            moved -= bytes_of([kwargs["out"]])
        if name in LOOKUPS and func._schema.is_mutable:
            moved = 2 * bytes_of(given[-1:])
        elif name in LOOKUPS:
            moved = 2 * bytes_of(made)
        flops = 0
        if name == "gemm_4bit":
            x, _, shape = args[:3]
            rows = x.shape[:-1].numel()
            flops = 2 * rows * math.prod(shape)
            if rows > FUSED_ROWS:
                copy = math.prod(shape) * x.element_size()
                moved += 2 * copy
                self.peak = max(self.peak, self.live + copy)
        elif name == FLASH:
            causal = len(args) > 4 and args[4]
            flops = attention_flops(args[0], args[1], 2, causal)
        elif name == FLASH + "_backward":  # two products of the forward again, three of gradients
            flops = attention_flops(args[1], args[2], 5, args[7])
        elif func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        self.total["flops"] += flops
        self.total["moved"] += moved
        self.total["operations"] += 1
        for card, (bandwidth, half, single, _) in CARDS.items():
            rate = half  # the inputs decide: bf16 products may have fp32 sums
            if (given or made)[0].dtype == torch.float32:
                rate = single
            compute = flops / (rate * 1e12 * FLOP_SHARE)
            self.total[card] += max(compute, moved / (bandwidth * 1e9 * BYTE_SHARE))


def places(indices: list) -> list:
    """Replace real masks by the places that they mean, because a fake tensor cannot count them."""
    out = []
    for x in indices:
        if isinstance(x, torch.Tensor) and x.dtype == torch.bool and not is_fake(x):
            out += x.nonzero().unbind(1)
        else:
            out.append(x)
    return out


def attention_flops(query, key, products: int, causal: bool) -> int:
    """Count `products` products of [B, H, queries, d] and [B, KV, keys, d].

    Causal attention skips half.
    """
    flops = 2 * products * query.numel() * key.shape[2]
    if causal:
        return flops // 2
    return flops


def mask_outside_modes(*sizes):
    """Make attention's mask: two numbers and no tensor, on which a dispatch mode fails."""
    with _disable_current_modes():
        return torch.nn.attention.bias.causal_lower_right(*sizes)


@contextmanager
def counting(counter: Counter):
    """Count all operations inside. Fake tensors on the CPU stand for a GPU's."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(attention, "causal_lower_right", mask_outside_modes))
        if counter.fake:
            stack.enter_context(patch.object(tokens, "has_fp32_sums", lambda device: True))
        stack.enter_context(counter)
        yield


def fake_counter() -> Counter:
    return Counter(FakeTensorMode(allow_non_fake_inputs=True))


def fake_policy(config, s: Settings, dtype: torch.dtype, counter: Counter) -> Policy:
    """Return a policy of the real classes without numbers in its weights.

    bitsandbytes' Params4bit cannot hold a fake tensor. A plain parameter takes its place, with the
    packed weight and the statistics that the library's own quantisation gives for a fake weight.
    """
    base = empty_base(config, s.load_in, dtype)
    with init_empty_weights():
        policy = add_adapter(base, shape_processor(config), s.rank, checkpointing=s.checkpointing)
    with counting(counter):
        for module in policy.model.modules():
            for name, old in list(module.named_parameters(recurse=False)):
                if isinstance(old, Params4bit):
                    whole = torch.empty(module.out_features, module.in_features, dtype=dtype)
                    packed, state = quantize_4bit(whole, compress_statistics=True, quant_type="nf4")
                    new = torch.nn.Parameter(packed, requires_grad=False)
                    new.quant_state = state
                    new.compress_statistics = True
                    new.quant_type = "nf4"
                else:
                    value = torch.empty(old.shape, dtype=old.dtype)
                    new = torch.nn.Parameter(value, old.requires_grad)
                setattr(module, name, new)
        base.tie_weights()
        policy.banned = torch.zeros(policy.banned.shape, dtype=torch.bool)
        policy.stop = torch.zeros(0, dtype=torch.long)  # answers have the full length
    return policy


def plain_prompts(policy: Policy, count: int, tokens: int) -> list[Prompt]:
    """Return `count` prompts of `tokens` tokens without a picture."""
    config = policy.base.config.text_config
    prompts = []
    for _ in range(count):
        embeds = torch.zeros(tokens, config.hidden_size, dtype=policy.base.lm_head.weight.dtype)
        ids = torch.full((tokens,), 300)
        positions = torch.arange(tokens).expand(3, -1)
        picture = torch.zeros(tokens, dtype=torch.bool)
        prompts.append(Prompt(ids, embeds, positions, picture))
    return prompts


def count_sampling(policy: Policy, prompts: list[Prompt], s: Settings, counter: Counter) -> dict:
    """Return laps of the "prefill", and of the last "token" of all answers."""
    laps = []

    def watch(*_):
        laps.append(counter.lap())

    with policy.base.model.language_model.register_forward_pre_hook(watch):
        generate(policy, prompts, s.group, s.max_new_tokens, s.temperature)
    laps.append(counter.lap())
    decode = dict(laps[-1])
    decode["peak"] = max(lap["peak"] for lap in laps[2:])
    return {"prefill": laps[1], "decode": decode}


def count_phases(policy: Policy, counter: Counter, s: Settings, prompt_tokens: int) -> dict:
    """Return laps of prefill, decode (one token) and update (one forward and backward).

    Also returns the bytes of "weights" (call it when nothing else is held) and of AdamW's
    "moments". The update has two forwards, so that the second one holds gradients.
    """
    found = {"weights": counter.live}
    with counting(counter):
        optimizer = new_optimizer(policy, s)
        for p in policy.trained:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
        found["moments"] = counter.live - found["weights"]
        prompts = plain_prompts(policy, s.questions, prompt_tokens)
        counter.lap()
        found |= count_sampling(policy, prompts, s, counter)
        at_once = min(s.micro, max(1, s.questions // s.updates))
        rollouts = full_rollouts(policy, prompts[: 2 * at_once], s)
        counter.lap()
        once = replace(s, updates=1, passes=1)
        update(Parts(policy, None, optimizer, once), rollouts, 0)
        lap = counter.lap()
    found["update"] = {name: value / 2 for name, value in lap.items()} | {"peak": lap["peak"]}
    return found


def count_sam(s: Settings, counter: Counter) -> dict:
    """Return a lap of SAM's encoder on one picture. Its peak holds the weights too."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(compute_dtype(s.sam_dtype, s.device))
    with counting(counter), torch.no_grad():
        encoder = random_sam(s.sam).image_encoder
        pixels = torch.empty(1, 3, encoder.img_size, encoder.img_size)
        counter.lap()
        encoder(pixels)
    torch.set_default_dtype(usual)
    return counter.lap()


def step_seconds(found: dict, s: Settings, card: str) -> dict:
    """Return the seconds of the phases of a step. All tokens count like the last token."""
    tokens = s.max_new_tokens * found["decode"][card]
    return {
        "rollout": found["prefill"][card] + tokens,
        "reward": s.questions * found["reward"][card],
        "update": s.questions * found["update"][card],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="7b", choices=POLICY_SIZES, help="default 7b")
    parser.add_argument("--tokens", type=int, default=16, help="answer length (default 16)")
    parser.add_argument("--keep", type=int, default=0, help="layers with kept activations")
    parser.add_argument("--sam-dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--out", help="write the figures to this JSON file too")
    args = parser.parse_args()
    s, _ = make_settings(
        preset="7b", device="cpu", max_new_tokens=args.tokens, sam_dtype=args.sam_dtype
    )
    reward = count_sam(s, fake_counter())
    counter = fake_counter()
    policy = fake_policy(shape_config(args.shape), s, torch.bfloat16, counter)
    policy.keep_layers(args.keep)
    found = count_phases(policy, counter, s, prompt_tokens=1100) | {"reward": reward}
    print(f"weights {found['weights'] / 2**30:.2f} GiB, moments {found['moments'] / 2**30:.2f}")
    for phase in ("prefill", "decode", "reward", "update"):
        lap = found[phase]
        print(
            f"{phase:<8} peak {lap['peak'] / 2**30:6.2f} GiB, {lap['operations']:,.0f} operations, "
            f"{lap['flops'] / 1e12:.1f} TFLOP, {lap['moved'] / 1e9:.0f} GB moved, "
            f"{lap['RTX 4090']:.2f} s on an RTX 4090, {lap['H100']:.2f} s on an H100"
        )
    step = {card: step_seconds(found, s, card) for card in CARDS}
    seconds = " + ".join(f"{x:.1f}" for x in step["RTX 4090"].values())
    print(f"a step on an RTX 4090: {seconds} s")
    if args.out:
        table = {"command": shlex.join(["python", *sys.argv]), "tokens": args.tokens}
        table |= {"keep": args.keep, "counted": found, "seconds_per_step": step}
        text = json.dumps(table, indent=1)
        Path(args.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
