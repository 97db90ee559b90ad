"""Measure full steps with random weights of a preset's shape. Nothing is downloaded.

`python train.py --preset 7b --rehearse 3` first prints the forecast (forecast.py), on any machine.
On a GPU the command then runs three steps. The pictures are drawn scenes of the preset's size, and
all answers have the longest allowed length. A table compares measured figures with their forecasts.
Without a GPU a small shape runs and prints the same table. These figures say nothing about a GPU.

A random policy writes no boxes. So SAM gets an invented answer with the largest number of points,
and the rewards are random numbers.
"""

import gc
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from .config import Settings, UserError, check_image_size
from .data import Sample
from .decoding import Completion, generate
from .evaluation import encode_questions, evaluate
from .files import write_json
from .forecast import GAPS, GIB, fill_card, has_known_shape, peaks, staying_bytes, usable
from .full_size import POLICY_SIZES, random_policy, shape_config
from .gpu import card_memory
from .grpo import Parts, Rollout, advantages, batch_loss, new_optimizer, roll_out, update
from .memory import free_memory, peak_memory
from .policy import Policy, Prompt
from .processes import is_first, process_count
from .reports import base_summary
from .reward import Answer, Object, no_terms, score_group
from .segmenter import SAM_FILES, frozen_segmenter, random_sam, small_folder
from .sizes import Sizes, questions_per_batch
from .speed import BYTE_SHARE, CARDS, FLOP_SHARE, hours, known_card, step_seconds
from .tiny.shapes import Shapes

# Nominal gigabytes of a card -> the least GiB that such cards report (A10G: 21.9).
REPORTED_GIB = {24: 21.9, 16: 15.6, 12: 11.6}
GRID = [(group, tokens) for group in (4, 8, 16) for tokens in (256, 512, 1024)]


# -------------------- the forecast as a table


def forecast(config, s: Settings) -> dict:
    """Return the forecast: GiB of each part and phase, and times by card.

    It also has the GiB of updates with other numbers of answers and tokens (GRID). The hours are
    for `s.samples` samples and all evaluations. Answers have 128, 512 or `s.max_new_tokens` tokens.
    """
    n = Sizes(config, s)
    if s.device == "cuda":
        fill_card(n, card_memory(s.memory_limit)[0] * (1 - GAPS))
    table = {
        "prompt_tokens": n.prompt_tokens,
        "staying_gib": {name: size / GIB for name, size in staying_bytes(n).items()},
        "peak_gib": peaks(n),
        "update_peak_gib": {},
        "seconds_per_step": {},
        "hours": {},
    }
    for group, tokens in GRID:
        other = Sizes(config, replace(s, group=group, max_new_tokens=tokens))
        table["update_peak_gib"][f"{group} x {tokens}"] = peaks(other)["update"]
    for card, (*_, gib) in CARDS.items():
        if s.memory_limit:
            gib = min(gib, s.memory_limit)
        table["seconds_per_step"][card] = {}
        table["hours"][card] = {}
        for tokens in sorted({128, 512, s.max_new_tokens}):
            other = Sizes(config, replace(s, max_new_tokens=tokens))
            fill_card(other, usable(gib))
            table["seconds_per_step"][card][str(tokens)] = step_seconds(other, card)
            table["hours"][card][str(tokens)] = hours(other, card)
    return table


def forecast_lines(table: dict, s: Settings) -> list[str]:
    """Return a forecast as lines of text. Each line begins with "forecast:"."""
    lines = [
        f"{s.preset} in {s.load_in}, {s.questions} questions x {s.group} answers of "
        f"{s.max_new_tokens} tokens, prompts of {table['prompt_tokens']} tokens, SAM "
        f"{s.sam}; by arithmetic, nothing is measured",
        "GiB that stay: " + gib_list(table["staying_gib"], 2),
        "GiB of the whole process at the peak of a phase: " + gib_list(table["peak_gib"], 1),
        f"prefill and decode: for all {s.questions} questions at once. A run takes fewer questions "
        "at once if memory is short",
        "GiB of an update, and the cards with enough memory. A line is for one number of answers x "
        f"tokens. {GAPS:.0%} of a card's memory is counted as lost in gaps:",
    ]
    for size, peak in table["update_peak_gib"].items():
        largest = max(peak, table["peak_gib"]["reward"])
        cards = [f"{sold} GB" for sold, gib in REPORTED_GIB.items() if largest < usable(gib)]
        fits = ", ".join(cards) or "none of 24, 16 and 12 GB"
        lines.append(f"  {size} tokens: {peak:.1f} GiB, {fits}")
    uncounted = ""
    if s.redraw:
        uncounted = " but without those of --redraw"
    lines.append(
        f"hours for {s.samples:,} samples{uncounted}, with all evaluations. In brackets, the "
        "seconds of a step: rollout + reward + update"
    )
    for card, times in table["hours"].items():
        parts = []
        for tokens, value in times.items():
            step = table["seconds_per_step"][card][tokens].values()
            step = " + ".join(f"{x:.1f}" for x in step)
            parts.append(f"{tokens} tokens {value:.1f} ({step})")
        lines.append(f"  {card}: " + ", ".join(parts))
    lines.append(
        f"assumed: {FLOP_SHARE:.0%} of a card's published FLOP/s and {BYTE_SHARE:.0%} of its "
        "bytes/s. Times are right within a factor of 1.5"
    )
    return [f"forecast: {line}" for line in lines]


def gib_list(sizes: dict, digits: int) -> str:
    """Return names and sizes in GiB as one line of text."""
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in sizes.items())


def comparison_table(
    seconds: dict, gib: dict, forecast_gib: dict, forecast_seconds: dict
) -> list[str]:
    """Return a table that compares measured seconds and peak GiB of each phase with the forecast.

    The forecast describes the second step and later steps. During rollout and reward of the first
    step, AdamW's moments do not exist yet.
    """
    if forecast_gib:
        rollout = max(forecast_gib["prefill"], forecast_gib["decode"])
        forecast_gib = forecast_gib | {"rollout": rollout}
    times = {phase: f"{value:.1f}" for phase, value in forecast_seconds.items()}
    sizes = {phase: f"{value:.3f}" for phase, value in forecast_gib.items()}
    lines = [f"{'phase':<12}{'seconds':>10}{'forecast':>10}{'peak GiB':>12}{'forecast':>10}"]
    for phase, value in seconds.items():
        time_cells = f"{value:>10.1f}{times.get(phase, '-'):>10}"
        memory_cells = f"{gib[phase]:>12.3f}{sizes.get(phase, '-'):>10}"
        lines.append(f"{phase:<12}{time_cells}{memory_cells}")
    return lines


# -------------------- the measurement


class Meter:
    """Measure the seconds and the peak GiB of phases.

    On a GPU the peak is that of the GPU's tensors. Otherwise it is the peak of the process.
    """

    def __init__(self, device: str):
        self.device = device
        self.seconds = {}  # phase -> seconds of each run of the phase
        self.peak = {}  # phase -> peak GiB
        self.phase = ""  # the current or last phase

    def __call__(self, phase: str, work, *args):
        """Run `work(*args)`, count its time and memory for `phase`, and return its result."""
        self.phase = phase
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = work(*args)
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds.setdefault(phase, []).append(time.perf_counter() - start)
        self.peak[phase] = max(self.peak.get(phase, 0.0), peak_memory(self.device))
        return result

    def means(self) -> dict[str, float]:
        """Return the mean seconds of each phase."""
        return {phase: sum(values) / len(values) for phase, values in self.seconds.items()}


def forecast_sam(s: Settings) -> str:
    """Return the name of the SAM to build with random weights.

    A SAM 2 or 3 cannot be built without its files. ViT-H then takes its place.
    """
    if small_folder(s.sam) or s.sam in SAM_FILES:
        return s.sam
    return "vit_h"


def random_parts(shape: str, s: Settings) -> Parts:
    """Return policy, SAM and optimizer with random weights. No answer can stop early."""
    segmenter = frozen_segmenter(random_sam(forecast_sam(s)), s.device, s.sam_dtype)
    policy = random_policy(shape_config(shape), s.load_in, s.rank, s.device, s.checkpointing)
    policy.banned[policy.stop] = True
    return Parts(policy, segmenter, new_optimizer(policy, s), s)


def reward_full_answers(parts: Parts, samples: list[Sample]) -> None:
    """Compute the rewards of full groups. All answers are equal: a box and the most points."""
    s = parts.settings
    side = parts.policy.answer_side(s.image_size)
    third, middle = side // 3, side // 2
    points = [(middle, middle, 1)] * s.max_points
    one = Object((third, third, 2 * third, 2 * third), points)
    answer = Answer(side, [one])
    for sample in samples:
        score_group(parts.segmenter, sample, [answer] * s.group, s, no_terms)


def measure_step(parts: Parts, samples: list[Sample], meter: Meter) -> Prompt:
    """Run a whole step with answers of full length. Returns a prompt."""
    # SAM does not run in roll_out, because the text of a random policy contains no box.
    rollouts, _ = meter("rollout", roll_out, parts, samples)
    meter("reward", reward_full_answers, parts, samples)
    random = advantages(torch.rand(len(samples), parts.settings.group))
    for rollout, advantage in zip(rollouts, random):
        rollout.advantage = advantage
    meter("update", update, parts, rollouts, 0)
    meter("evaluation", evaluate, parts.policy, parts.segmenter, samples[:1], parts.settings)
    return rollouts[0].prompt


def token_ms(policy: Policy, prompts: list[Prompt], group: int) -> dict:
    """Return the milliseconds of a decoded token, with and without CUDA graphs.

    The time comes from the difference between answers of 24 tokens and of 8 tokens. This difference
    does not contain the fixed costs: the prefill, the first token and the recording of the graph.
    """
    taken = {}
    for name in ("graph", "eager"):
        policy.cuda_graphs = name == "graph"
        seconds = {}
        for tokens in (8, 8, 24):  # the first run is a warm-up
            start = time.perf_counter()
            generate(policy, prompts, group, tokens)  # waits for the GPU, to decode the text
            seconds[tokens] = time.perf_counter() - start
        taken[name] = 1000 * (seconds[24] - seconds[8]) / 16
    policy.cuda_graphs = True
    return taken


def update_peak(parts: Parts, prompt: Prompt, group: int, length: int) -> float | None:
    """Return the peak GiB of an update of one question with `group` answers of `length` tokens.

    Returns None if memory runs out.
    """
    s = replace(parts.settings, group=group, max_new_tokens=length, updates=1, passes=1)
    s = replace(s, memory_limit=0.001)  # no free memory, so no activations are kept
    try:
        torch.cuda.reset_peak_memory_stats()
        update(replace(parts, settings=s), full_rollouts(parts.policy, [prompt], s), 0)
        return peak_memory("cuda")
    except torch.OutOfMemoryError:
        return None
    finally:
        parts.optimizer.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()


# -------------------- the rehearsal


def checked_shape(s: Settings) -> str:
    """Return the name of the shape of these settings. Raises UserError if the shape is unknown."""
    if s.preset not in POLICY_SIZES:
        if s.device == "cuda":
            raise UserError(
                f"--rehearse on a GPU needs --preset 3b or 7b. With --preset {s.preset}, a training "
                "takes only minutes"
            )
        return "small"
    if not has_known_shape(s):
        raise UserError(
            f"--rehearse knows the shape of --preset {s.preset}'s own policy, not of --policy "
            f"{s.policy}: leave --policy out"
        )
    return s.preset


def measure_steps(shape: str, s: Settings, meter: Meter) -> tuple[Parts, Prompt]:
    """Run `s.rehearse` steps. Returns the parts and a prompt.

    Raises UserError if memory runs out.
    """
    torch.manual_seed(s.seed)
    samples = list(Shapes("train", s.questions))
    try:
        parts = meter("load", random_parts, shape, s)
        for _ in tqdm(range(s.rehearse), desc="rehearse"):
            prompt = measure_step(parts, samples, meter)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"memory ran out in the phase {meter.phase}; lower --group, --max-new-tokens or "
            f"--image-size, or take --load-in nf4 ({error})"
        ) from None
    return parts, prompt


def measure_gpu(parts: Parts, prompt: Prompt) -> dict:
    """Print and return measurements that need a GPU: time of a token, peaks of other updates."""
    s, policy = parts.settings, parts.policy
    free = free_memory(s)
    at_once = questions_per_batch(policy.base, s.questions, len(prompt.ids), s, free)
    milliseconds = token_ms(policy, [prompt] * at_once, s.group)
    print(
        f"one more token in each of {at_once} x {s.group} answers takes {milliseconds['graph']:.1f} ms with "
        f"a CUDA graph, and {milliseconds['eager']:.1f} ms without it"
    )
    updates = {}
    for group, tokens in GRID:
        size = f"{group} x {tokens}"
        updates[size] = update_peak(parts, prompt, group, tokens)
        fits = "does not fit" if updates[size] is None else f"{updates[size]:.1f} GiB"
        print(f"update with {size} tokens: {fits}")
    return {"questions_at_a_time": at_once, "token_ms": milliseconds, "update_peak_gib": updates}


REPORTED = (
    "load_in",
    "questions",
    "group",
    "max_new_tokens",
    "image_size",
    "sam",
    "memory_limit",
    "rehearse",
)


def step_table(shape: str, parts: Parts, prompt: Prompt, meter: Meter) -> dict:
    """Return settings and measurements of the steps."""
    s = parts.settings
    device = "cpu"
    if s.device == "cuda":
        device = torch.cuda.get_device_name()
    mean = meter.means()
    tokens = s.questions * s.group * s.max_new_tokens  # no answer can stop early
    return {
        "shape": shape,
        "device": device,
        "parameters": sum(p.numel() for p in parts.policy.base.parameters()),
        **{name: getattr(s, name) for name in REPORTED},
        "prompt_tokens": len(prompt.ids),
        "seconds": mean,
        "peak_gib": meter.peak,
        "tokens_per_second": tokens / mean["rollout"],
        "seconds_per_step": mean["rollout"] + mean["reward"] + mean["update"],
    }


def print_steps(table: dict) -> None:
    """Print the measurements, on a GPU with their forecast. On a CPU, "-" stands for the forecast."""
    print(
        f"\n{table['device']}, policy {table['shape']} in {table['load_in']}, "
        f"{table['questions']} questions x {table['group']} answers of {table['max_new_tokens']} "
        f"tokens, prompts of {table['prompt_tokens']} tokens"
    )
    gib, times = {}, {}
    if table["device"] != "cpu":
        gib = table["forecast"]["peak_gib"]
    card = known_card(table["device"])
    if card:
        times = table["forecast"]["seconds_per_step"][card][str(table["max_new_tokens"])]
    print(*comparison_table(table["seconds"], table["peak_gib"], gib, times), sep="\n")
    print(f"{table['tokens_per_second']:.0f} tokens/s in the rollout")


def rehearse(s: Settings) -> dict:
    """Run full steps, print the table, and return it. With --run also write rehearsal.json."""
    shape = checked_shape(s)
    check_image_size(shape_config(shape), s.image_size)
    expected = {}
    if shape != "small":
        known = replace(s, sam=forecast_sam(s))
        expected = forecast(shape_config(shape), known)
        print(*forecast_lines(expected, known), sep="\n", flush=True)
    if s.device != "cuda":
        shape, tokens = "small", min(s.max_new_tokens, 32)
        s = replace(s, questions=2, updates=2, max_new_tokens=tokens, sam="tiny")
        above = "no GPU, so the lines above are not measured. "
        if not expected:
            above = "no GPU. For a forecast, add --preset 3b or --preset 7b. "
        print(
            f"{above}The table below measures a small policy and the tiny SAM with 2 questions and "
            f"{tokens} tokens. Its memory is that of the whole process. These figures say nothing "
            "about a GPU"
        )
    meter = Meter(s.device)
    parts, prompt = measure_steps(shape, s, meter)
    table = step_table(shape, parts, prompt, meter) | {"forecast": expected}
    print_steps(table)
    if s.device == "cuda":
        table |= measure_gpu(parts, prompt)
        total = table["seconds_per_step"] * (3000 // s.questions) / 3600
        table["hours_for_3000_samples"] = total
        print(f"training on 3,000 samples: about {total:.1f} hours with answers of this length")
    if s.run:
        Path(s.run).mkdir(parents=True, exist_ok=True)
        write_json(Path(s.run) / "rehearsal.json", table)
    return table


# -------------------- before a training


def full_rollouts(policy: Policy, prompts: list[Prompt], s: Settings) -> list[Rollout]:
    """Return rollouts with answers of full length, for the largest possible update."""
    ids = torch.full((s.max_new_tokens,), 300, device=policy.device)
    logps = torch.zeros(s.max_new_tokens, device=policy.device)
    answers = [Completion(ids, logps, False, "")] * s.group
    advantage = torch.linspace(-1, 1, s.group)
    reference = logps.repeat(s.group)
    return [Rollout(None, prompt, answers, [], advantage, reference) for prompt in prompts]


def try_largest_update(parts: Parts, samples: list[Sample]) -> None:
    """Run one forward and backward with answers of full length.

    If memory is too small, this update fails before the first step.
    """
    s, policy = parts.settings, parts.policy
    rollouts = full_rollouts(policy, encode_questions(policy, samples, s.image_size), s)
    moments = []
    if not parts.optimizer.state:  # AdamW has no moments before the first update
        moments = [torch.zeros_like(p) for p in policy.trained for _ in range(2)]
    policy.model.train()
    loss, _ = batch_loss(parts, rollouts)
    loss.backward()
    del moments
    policy.model.zero_grad()
    policy.model.eval()


def before_training(parts: Parts, data, resumed: bool) -> None:
    """Try the largest update on a GPU. For a new run, print a summary of sampled answers."""
    s = parts.settings
    if s.device == "cuda":
        share = math.ceil(s.questions / s.updates / process_count())  # questions of an update
        try_largest_update(parts, [data[i] for i in range(min(s.micro, share, len(data)))])
    if resumed:
        return
    samples = [data[i] for i in range(min(4, len(data)))]
    generator = torch.Generator().manual_seed(s.seed)
    sizes = (len(samples), s.group, s.max_new_tokens)
    rollouts, _ = roll_out(parts, samples, torch.rand(sizes, generator=generator))
    if is_first():
        print(base_summary(rollouts, s), flush=True)
