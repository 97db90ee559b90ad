"""Will it fit, and how long will it take? `python train.py --preset 7b --rehearse 3` finds out before anything is
downloaded.

First the forecast (forecast.py), on any machine. Then the measurement. On a GPU: the true shape with random weights,
full steps on drawn pictures of the preset's size with the longest allowed answers (rollout, reward, updates, evaluation
of one picture), with the forecast beside each figure. Without a GPU: a small shape, to see the same table; its memory
is held against its own forecast, its seconds say nothing about a GPU. What an answer says matters neither for memory
nor for time, so SAM gets well-formed answers with the most points, and rewards are drawn.
"""

import gc
import json
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from bitsandbytes.nn import Params4bit
from segment_anything import SamPredictor
from tqdm import tqdm
from transformers import Qwen2_5_VLConfig

from .config import Settings, UserError, check_size
from .evaluation import evaluate
from .grpo import (
    Rollout,
    advantages,
    full_rollouts,
    new_optimizer,
    read_questions,
    sample_in_turn,
    update,
)
from .decoding import generate
from .policy import Policy, Prompt, add_adapter
from .reward import score_group
from .memory import compute_dtype, free_memory, peak_memory, questions_per_batch
from .segmenter import SamSegmenter, Segmenter, random_sam
from .tiny.shapes import Shapes
from .forecast import (
    GIB,
    GRID,
    SHAPES,
    Counter,
    beside,
    build,
    count,
    empty_base,
    forecast,
    forecast_lines,
    known_card,
    peaks,
    sam_kind,
    shape_config,
    shape_is_known,
    shape_processor,
)


def random_policy(
    config: Qwen2_5_VLConfig, load_in: str, rank: int, device: str, checkpointing: bool
) -> Policy:
    """A policy of this shape in the classes of a real load, each weight drawn, and quantised, by itself on `device`."""
    dtype = compute_dtype(load_in, device)
    base = empty_base(config, load_in, dtype)
    for module in list(base.modules()):
        for name, empty in list(module.named_parameters(recurse=False)):
            value = torch.ones(empty.shape, dtype=dtype, device=device)
            if name != "weight" or empty.ndim > 1:  # else it is a norm's
                value.normal_(std=0.02)
            if isinstance(empty, Params4bit):
                drawn = Params4bit(value, requires_grad=False, **empty.__dict__).to(
                    device
                )  # this quantises
            else:
                drawn = torch.nn.Parameter(value)
            setattr(module, name, drawn)
    base.tie_weights()
    return add_adapter(base.to(device), shape_processor(config), rank, checkpointing)


class Meter:
    """Seconds by phase, and peak GiB of tensors in it: as CUDA counts them, else by the counter of the forecast."""

    def __init__(self, device: str):
        self.cuda, self.seconds, self.peak, self.phase, self.counter = (
            device == "cuda",
            {},
            {},
            "",
            Counter(),
        )

    def __call__(self, phase: str, work):
        self.phase = phase
        if self.cuda:
            torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
        self.counter.lap()
        start = time.perf_counter()
        with nullcontext() if self.cuda else self.counter:
            result = work()
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds.setdefault(phase, []).append(time.perf_counter() - start)
        peak = peak_memory("cuda") if self.cuda else self.counter.lap()["over"] / GIB
        self.peak[phase] = max(self.peak.get(phase, 0.0), peak)
        return result


def one_step(
    policy: Policy, segmenter: Segmenter, optimizer, data: Shapes, s: Settings, meter: Meter
) -> tuple[Prompt, int]:
    """A whole step with answers of full length; returns a prompt and the number of sampled tokens."""
    samples = [data[i] for i in range(s.questions)]

    def rollout():
        prompts = read_questions(policy, samples, s)
        return prompts, sample_in_turn(
            policy, prompts, s, torch.rand(s.questions, s.group, s.max_new_tokens)
        )

    def reward():
        size = policy.coordinate_range(s.image_size)
        third, middle = size // 3, size // 2
        answer = {
            "bbox": [third, third, 2 * third, 2 * third],
            "points": [[middle, middle, 1]] * s.max_points,
        }
        texts = [f"<think>.</think><answer>{json.dumps(answer)}</answer>"] * s.group
        return [
            score_group(segmenter, x, texts, size, s.accuracy, max_points=s.max_points)
            for x in samples
        ]

    prompts, groups = meter("rollout", rollout)
    rewards = meter("reward", reward)
    drawn = advantages(torch.rand(len(samples), s.group))
    rollouts = [Rollout(*parts) for parts in zip(samples, prompts, groups, rewards, drawn)]
    meter("update", lambda: update(policy, optimizer, rollouts, s, 0))
    meter("evaluation", lambda: evaluate(policy, segmenter, samples[:1], s))
    return prompts[0], sum(len(a.ids) for g in groups for a in g)


def token_ms(policy: Policy, prompts: list[Prompt], group: int) -> dict:
    """Milliseconds of a decoded token of all these questions, replayed as a CUDA graph and, for comparison, as it is.

    From answers of 8 and of 24 tokens: what both take (the prompts, the first tokens, the recording) cancels out.
    """
    taken, kept = {}, policy.cuda_graphs
    for way, graphs in (("graph", kept), ("eager", False)):
        seconds = {}
        policy.cuda_graphs = graphs
        for tokens in (8, 8, 24):  # the first one warms up
            start = time.perf_counter()
            generate(policy, prompts, group, tokens)[0][
                0
            ].ids.tolist()  # to ask for numbers is to wait for the GPU
            seconds[tokens] = time.perf_counter() - start
        taken[way] = 1000 * (seconds[24] - seconds[8]) / 16
    policy.cuda_graphs = kept
    return taken


def update_peak(
    policy: Policy, optimizer, prompt: Prompt, s: Settings, group: int, length: int
) -> float | None:
    """Peak GiB of an update of one question with `group` answers of `length` tokens; None where memory runs out."""
    one = replace(s, group=group, max_new_tokens=length, updates=1, passes=1, micro=1)
    try:
        torch.cuda.reset_peak_memory_stats()
        update(policy, optimizer, full_rollouts(policy, [prompt], one), one, 0)
        return peak_memory("cuda")
    except torch.OutOfMemoryError:
        return None
    finally:
        optimizer.zero_grad(set_to_none=True)
        gc.collect(), torch.cuda.empty_cache()


def rehearse(s: Settings) -> dict:
    """Run `s.rehearse` full steps, print the table, write it to the run's folder if one was named, and return it."""
    cuda = s.device == "cuda"
    shape = s.preset if s.preset in SHAPES else "small"
    if cuda and shape == "small":
        raise UserError(
            f"--rehearse is for --preset 3b or 7b, not {s.preset}: train it, it takes minutes"
        )
    if shape != "small" and not shape_is_known(s):
        raise UserError(
            f"--rehearse knows the shape of --preset {shape}'s own policy, not of --policy {s.policy}: "
            "leave that out"
        )
    check_size(shape_config(shape), s.image_size)
    expected, times = {}, {}
    if shape != "small":
        expected = forecast(shape_config(shape), s)
        print(*forecast_lines(expected, s), sep="\n", flush=True)
    if cuda:
        card = known_card(torch.cuda.get_device_name())
        times = expected["seconds_per_step"][card][str(s.max_new_tokens)] if card else {}
    else:
        shape, s = "small", replace(
            s, questions=2, updates=2, max_new_tokens=min(s.max_new_tokens, 32), sam="tiny"
        )
        print(
            "no GPU, so nothing above is measured. Measured below: a small policy, the tiny SAM, 2 questions, "
            f"{s.max_new_tokens} tokens. These figures say nothing about a GPU"
        )
    torch.manual_seed(s.seed)
    meter, data = Meter(s.device), Shapes("train", s.questions)

    def load():
        sam = random_sam(sam_kind(s)).to(s.device).requires_grad_(False)
        policy = random_policy(shape_config(shape), s.load_in, s.rank, s.device, s.checkpointing)
        return policy, SamSegmenter(SamPredictor(sam))

    try:
        policy, segmenter = meter("load", load)
        policy.banned[policy.stop] = True  # every answer gets the full length
        optimizer = new_optimizer(policy, s)
        for _ in tqdm(range(s.rehearse), desc="rehearse"):
            prompt, tokens = one_step(policy, segmenter, optimizer, data, s, meter)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"memory ran out in the phase {meter.phase}; lower --group, --max-new-tokens or --image-size, "
            f"or take --load-in nf4 ({error})"
        ) from None
    mean = {phase: sum(values) / len(values) for phase, values in meter.seconds.items()}
    step = mean["rollout"] + mean["reward"] + mean["update"]
    table = {
        "forecast": expected,
        "shape": shape,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "parameters": sum(p.numel() for p in policy.base.parameters()),
        **{
            k: getattr(s, k)
            for k in (
                "load_in",
                "questions",
                "group",
                "max_new_tokens",
                "image_size",
                "sam",
                "memory_limit",
                "rehearse",
            )
        },
        "prompt_tokens": len(prompt.ids),
        "seconds": mean,
        "peak_gib": meter.peak,
        "tokens_per_second": tokens / mean["rollout"],
        "seconds_per_step": step,
    }
    if not cuda:  # the same phases of the same small model, counted as above
        table["forecast_of_small"] = peaks(count(*build(shape_config(shape), s, torch.float32), s))
    print(
        f"\n{table['device']}, policy {shape} in {s.load_in}, {s.questions} questions x {s.group} answers of "
        f"{s.max_new_tokens} tokens, prompts of {len(prompt.ids)} tokens"
    )
    print(
        *beside(mean, meter.peak, table["forecast" if cuda else "forecast_of_small"], times),
        sep="\n",
    )
    print(f"{table['tokens_per_second']:.0f} tokens/s in the rollout")
    if cuda:
        at_once = questions_per_batch(policy.base, s.questions, len(prompt.ids), s, free_memory(s))
        table["questions_at_a_time"], table["token_ms"] = at_once, token_ms(
            policy, [prompt] * at_once, s.group
        )
        print(
            "a token of {} x {} answers: {graph:.1f} ms as a CUDA graph, {eager:.1f} ms operation by operation".format(
                at_once, s.group, **table["token_ms"]
            )
        )
        hours = table["hours_for_3000_samples"] = step * (3000 // s.questions) / 3600
        table["update_peak_gib"] = {
            f"{g} x {n}": update_peak(policy, optimizer, prompt, s, g, n) for g, n in GRID
        }
        print(f"training on 3,000 samples: about {hours:.1f} hours with answers of this length")
        for what, peak in table["update_peak_gib"].items():
            print(f"update with {what} tokens: " + (f"{peak:.1f} GiB" if peak else "does not fit"))
    if s.run:
        Path(s.run).mkdir(parents=True, exist_ok=True)
        file = Path(s.run) / "rehearsal.json"
        file.write_text(json.dumps(table, indent=1), encoding="utf-8")
    return table
