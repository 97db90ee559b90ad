"""Make both tiny networks from nothing: `python -m samr1_mini.tiny.pretrain` (on a GPU if there is one).

Supervised training stands here for what Qwen and SAM already know before SAM-R1 begins:
    sam       Segment Anything learns to cut drawn shapes from boxes and points
    vision    the vision tower alone learns what lies under each picture token, and its box as a choice among pixel bins
    language  the whole policy learns to name and find things, in several styles and with loose boxes
"""

import argparse
import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ..config import UserError
from ..data import load_data
from ..metrics import box_iou, intersection_union, iou, tight_box
from ..policy import Policy, Prompt, encode, instruction, load_policy, logprobs, sample
from ..reward import parse
from ..segmenter import TINY_SAM, load_segmenter, random_sam
from ..tokens import banned_ids, stop_ids
from .build import POLICY, build_policy, build_processor
from .scenes import (
    COLOUR_OF, COLOURS, KINDS, PRETRAIN, SHAPE_WITH, SHAPES, SIZE, SPLITS,
    Scene, Thing, ask, fair_questions, make_scene,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def scenes_from(start: int, count: int) -> list[Scene]:
    """`count` scenes of the pretraining range, from its `start`-th on."""
    return [make_scene(PRETRAIN[0] + start + i) for i in range(count)]


def one_cycle(optimizer, steps: int):
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in optimizer.param_groups], steps, pct_start=0.1, final_div_factor=20
    )


def learn(name: str, model: torch.nn.Module, optimizer, steps: int, work: Path, loss_of: Callable) -> None:
    """`steps` updates with `loss_of(step) -> (loss, {what the bar shows: its figure})`, in which all that is random
    depends on the step alone. Every 100 steps all goes to work/NAME.pt, from where a stage that was cut goes on."""
    schedule, state, first, shown = one_cycle(optimizer, steps), work / f"{name}.pt", 0, {}
    if state.exists():
        saved = torch.load(state, map_location=DEVICE, weights_only=True)
        if saved["steps"] != steps:
            raise UserError(f"{state} is of a stage of {saved['steps']} steps, not {steps}: delete it to begin anew")
        for part, has in zip((model, optimizer, schedule), saved["parts"]):
            part.load_state_dict(has)
        first, shown = saved["step"], saved["shown"]
    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps)
    for step in bar:
        loss, figures = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        shown = {k: v if step == 0 else 0.97 * shown.get(k, v) + 0.03 * v for k, v in figures.items()}
        if step % 25 == 0:
            bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items()})
        if step % 100 == 99:
            parts = [part.state_dict() for part in (model, optimizer, schedule)]
            torch.save({"step": step + 1, "steps": steps, "parts": parts, "shown": shown}, f"{state}.part")
            Path(f"{state}.part").replace(state)


# ---------------------------------------------------------------------------------------------------- SAM


def wide_box(box, rng: np.random.Generator, slack: float) -> list[float]:
    """The box with each side moved out by N(slack, slack / 3) of its length, in pixels."""
    x1, y1, x2, y2 = box
    out = rng.normal(slack, slack / 3, 4) * np.array([x1 - x2, y1 - y2, x2 - x1, y2 - y1])
    return (np.array([x1, y1, x2, y2]) + out).clip(0, SIZE).tolist()


def both_boxes(a: Thing, b: Thing) -> tuple[int, int, int, int]:
    """The box around two things."""
    return (*map(min, a.box[:2], b.box[:2]), *map(max, a.box[2:], b.box[2:]))


def neighbour(thing: Thing, scene: Scene) -> Thing:
    """The nearest other thing."""
    return min((t for t in scene.things if t is not thing), key=lambda t: (t.x - thing.x) ** 2 + (t.y - thing.y) ** 2)


def meant(scene: Scene, box, points: list[list[int]]) -> np.ndarray:
    """The mask that a box and points [[x, y, label], ...] stand for, bool [SIZE, SIZE]: SAM takes a box at its word.

    Of the dots, things and groups of up to four things that hold all points labelled 1 and none labelled 0, the one
    that fills the box best: the highest IoU of tight box and box. So a wide box means the neighbours too. A point on
    one thing speaks against the others: where there are points labelled 1, each thing without one costs 0.1.
    """
    x1, y1, x2, y2 = box
    inside = [t for t in scene.things if t.box[0] < x2 and t.box[2] > x1 and t.box[1] < y2 and t.box[3] > y1]
    groups = [group for n in range(1, 5) for group in combinations(inside or scene.things, n)]
    groups += [(t.dot,) for t in scene.things if t.dot]
    on = lambda things, wanted: [any(t.mask[y, x] for t in things) for x, y, label in points if label == wanted]
    allowed = [g for g in groups if all(on(g, 1)) and not any(on(g, 0))] or groups

    def fit(group: tuple[Thing, ...]) -> float:
        boxes = np.array([t.box for t in group])  # [n, 4]
        around = (*boxes[:, :2].min(0), *boxes[:, 2:].max(0))
        bare = sum(not any(on([t], 1)) for t in group) if on(group, 1) else 0
        return box_iou(box, around) - 0.1 * bare

    return np.logical_or.reduce([t.mask for t in max(allowed, key=fit)])


def points_on(mask: np.ndarray, rng: np.random.Generator, count: int, label: int) -> list[list[int]]:
    """`count` random points [[x, y, label], ...] on a mask; none if it is empty."""
    ys, xs = np.where(mask)
    return [[int(xs[i]), int(ys[i]), label] for i in (rng.integers(len(ys), size=count) if len(ys) else ())]


def sam_prompt(thing: Thing, scene: Scene, rng: np.random.Generator, count: int) -> tuple[list[float], list[list[int]]]:
    """A box and `count` points, as somebody would give them who means this thing, with more or less care.

    Half of the boxes are nearly right, the others up to 0.6 too wide on each side. A third of those with points hold a
    neighbour, on which the points labelled 0 lie; elsewhere these lie beside the thing.
    """
    negative, other = int(rng.integers(0, count)) if count else 0, neighbour(thing, scene)
    if count and rng.random() < 0.33:
        box, off = wide_box(both_boxes(thing, other), rng, rng.uniform(0, 0.08)), other.mask & ~thing.mask
    else:
        box, off = wide_box(thing.box, rng, rng.uniform(0, 0.08) if rng.random() < 0.5 else rng.uniform(0, 0.6)), None
    if off is None:
        x1, y1, x2, y2 = (int(v) for v in box)
        off = np.zeros_like(thing.mask)
        off[y1:y2, x1:x2] = ~thing.mask[y1:y2, x1:x2]
    points = points_on(thing.mask, rng, count - negative, 1) + points_on(off, rng, negative, 0)
    return box, points


def sam_masks(
    sam, embedding: torch.Tensor, boxes: torch.Tensor, points: torch.Tensor | None, labels: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask logits [N, 3, SIZE, SIZE] and predicted IoU [N, 3] for N prompts on one encoded picture [1, C, h, w]."""
    sparse, dense = sam.prompt_encoder(points=None if points is None else (points, labels), boxes=boxes, masks=None)
    low, quality = sam.mask_decoder(
        image_embeddings=embedding, image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=True,
    )
    return sam.postprocess_masks(low, (SIZE, SIZE), (SIZE, SIZE)), quality


def train_sam(steps: int, out: Path, work: Path, pictures: int = 12) -> None:
    """Segment Anything learns to draw what boxes and points mean (`meant`)."""
    torch.manual_seed(0)
    sam = random_sam("tiny").train().to(DEVICE)

    def loss_of(step: int) -> tuple[torch.Tensor, dict]:
        rng, scenes = np.random.default_rng([0, step]), scenes_from(step * pictures, pictures)
        images = torch.stack([torch.from_numpy(s.image).permute(2, 0, 1).float() for s in scenes]).to(DEVICE)
        embeddings = sam.image_encoder(sam.preprocess(images))  # [B, C, h, w]
        logits, quality, truth = [], [], []
        for embedding, scene in zip(embeddings, scenes):
            # Half of the pictures are prompted with boxes alone, half with boxes and one to four points.
            count = int(rng.integers(1, 5)) if rng.random() < 0.5 else 0
            things = scene.things + [t.dot for t in scene.things if t.dot]
            boxes, labelled = zip(*(sam_prompt(t, scene, rng, count) for t in things))
            truth += [torch.from_numpy(meant(scene, box, points)) for box, points in zip(boxes, labelled)]
            boxes, points, labels = torch.tensor(boxes, dtype=torch.float32, device=DEVICE), None, None
            if count:
                padded = [(p + [[0, 0, -1]] * count)[:count] for p in labelled]
                padded = torch.tensor(padded, dtype=torch.float32, device=DEVICE)  # [N, count, 3]
                points, labels = padded[..., :2], padded[..., 2]  # the encoder moves points to their pixel's middle
            m, q = sam_masks(sam, embedding[None], boxes, points, labels)
            logits.append(m), quality.append(q)
        logits, quality = torch.cat(logits), torch.cat(quality)  # [N, 3, H, W], [N, 3]
        truth = torch.stack(truth).to(DEVICE).float()[:, None].expand_as(logits)
        chance = logits.sigmoid()
        dice = 1 - (2 * (chance * truth).sum((2, 3)) + 1) / (chance.sum((2, 3)) + truth.sum((2, 3)) + 1)
        cross = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((2, 3))
        loss_mask = dice + 10 * cross  # [N, 3]
        with torch.no_grad():
            hard = logits > 0
            found = (hard & (truth > 0.5)).sum((2, 3)) / (hard | (truth > 0.5)).sum((2, 3)).clamp(min=1)
        # As in SAM: only the best of the three masks learns, and the quality head learns the IoU of all three.
        loss = loss_mask.min(1).values.mean() + 0.05 * loss_mask.mean() + F.mse_loss(quality, found)
        chosen = found.gather(1, quality.argmax(1, keepdim=True)).mean().item()
        return loss, {"IoU": chosen, "loss": loss.item()}

    learn("sam", sam, torch.optim.AdamW(sam.parameters(), lr=1e-3, weight_decay=0.01), steps, work, loss_of)
    save_file({k: v.half().contiguous().cpu() for k, v in sam.state_dict().items()}, out)


# ---------------------------------------------------------------------------------------------------- vision tower

CELL = 14  # pixels a side of one merged picture token
GRID = SIZE // CELL
PLACES = 6  # numbers that are learnt of each thing: x1, y1, x2, y2 of its box, and its middle's x and y


def middle(thing: Thing) -> list[int]:
    """Middle of the tight box, in whole pixels."""
    x1, y1, x2, y2 = thing.box
    return [(x1 + x2) // 2, (y1 + y2) // 2]


def cell_targets(scene: Scene) -> np.ndarray:
    """What lies under each picture token, int [GRID * GRID, 4 + PLACES], row by row: 1 if a thing does, its colour and
    shape, its dot's colour (0: no dot, else 1 + its place in COLOURS), and its places. The thing that is seen most."""
    targets = np.zeros((GRID, GRID, 4 + PLACES), np.int64)
    claim = np.full((GRID, GRID), 15)  # pixels: less than that is not looked at
    for t in scene.things:
        cover = t.mask.reshape(GRID, CELL, GRID, CELL).sum((1, 3))
        wins = cover > claim
        claim[wins] = cover[wins]
        dot = 1 + list(COLOURS).index(t.dot.colour) if t.dot else 0
        targets[wins] = [1, list(COLOURS).index(t.colour), SHAPES.index(t.shape), dot, *t.box, *middle(t)]
    return targets.reshape(-1, 4 + PLACES)


def soft_bins(position: torch.Tensor) -> torch.Tensor:
    """A pixel position [...] as probabilities of bins [..., SIZE + 1]: a bell of 1.5 px around the true one."""
    bins = torch.arange(SIZE + 1, device=position.device)
    return (-((bins - position[..., None]) ** 2) / (2 * 1.5**2)).softmax(-1)


def train_vision(steps: int, out: Path, work: Path, pictures: int = 24) -> None:
    """The vision tower alone learns what lies under each picture token."""
    torch.manual_seed(1)
    processor = build_processor(["nothing to read yet"])
    tower = build_policy(processor.tokenizer).model.visual.train().to(DEVICE)
    parts = [1, len(COLOURS), len(SHAPES), 1 + len(COLOURS), PLACES * (SIZE + 1)]
    head = torch.nn.Linear(tower.config.out_hidden_size, sum(parts)).to(DEVICE)  # thrown away afterwards

    def loss_of(step: int) -> tuple[torch.Tensor, dict]:
        scenes = scenes_from(10**6 + step * pictures, pictures)
        inputs = processor.image_processor([s.image for s in scenes], return_tensors="pt").to(DEVICE)
        target = torch.from_numpy(np.concatenate([cell_targets(s) for s in scenes])).to(DEVICE)  # [B * 64, 10]
        features = tower(inputs.pixel_values, grid_thw=inputs.image_grid_thw).pooler_output  # [B * 64, width]
        on = target[:, 0] == 1
        there = head.weight[:1] @ features.T + head.bias[:1, None]  # [1, B * 64]
        _, colour, shape, dot, places = head(features[on]).split(parts, -1)
        target_on, places = target[on], places.view(-1, PLACES, SIZE + 1)
        loss = F.binary_cross_entropy_with_logits(there[0], target[:, 0].float())
        for logits, column in ((colour, 1), (shape, 2), (dot, 3)):
            loss = loss + F.cross_entropy(logits, target_on[:, column])
        loss = loss + F.cross_entropy(places.flatten(0, 1), soft_bins(target_on[:, 4:]).flatten(0, 1))
        off = (places.argmax(-1) - target_on[:, 4:]).abs().float().mean().item()
        right = lambda logits, column: (logits.argmax(-1) == target_on[:, column]).float().mean().item()
        return loss, {"px": off, "colour": right(colour, 1), "shape": right(shape, 2), "dot": right(dot, 3)}

    both = torch.nn.ModuleList([tower, head])
    optimizer = torch.optim.AdamW(both.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.98))
    learn("vision", both, optimizer, steps, work, loss_of)
    save_file({k: v.contiguous().cpu() for k, v in tower.state_dict().items()}, out)


# ---------------------------------------------------------------------------------------------------- language


def loose_box(thing: Thing, rng: np.random.Generator, slack: float) -> list[int]:
    """The tight box, every side moved out by N(slack, slack / 3) of the side's length, in whole pixels."""
    x1, y1, x2, y2 = thing.box
    out = rng.normal(slack, slack / 3, 4) * np.array([x1 - x2, y1 - y2, x2 - x1, y2 - y1])
    return (np.array([x1, y1, x2, y2]) + out).round().clip(0, SIZE).astype(int).tolist()


def loose_points(thing: Thing, rng: np.random.Generator, slack: float) -> list[list[int]]:
    """A point on the thing near its middle and, half of the time, one off it near a corner; they stray as boxes do."""
    x1, y1, x2, y2 = thing.box
    window, points = thing.mask[y1:y2, x1:x2], []
    corner = rng.integers(0, 2, 2) * np.array([x2 - x1, y2 - y1])
    for label, near in ((1, np.array([x2 - x1, y2 - y1]) / 2), (0, corner)):
        places = np.argwhere(window == bool(label))[:, ::-1]  # [N, 2], x then y
        if len(places) and (label or rng.random() < 0.5):
            place = places[((places - near) ** 2).sum(1).argmin()] + (x1, y1)
            place = (place + rng.normal(0, 0.2 * slack * thing.size, 2)).round().clip(0, SIZE - 1).astype(int)
            points.append([*place.tolist(), label])
    return points


# The base's styles: how often it uses each, and the hint with which a user may ask for it. Whether looking around
# first pays is for the reward to find out.
STYLES = {
    "sentence": (0.5, " Answer in a sentence."),
    "json": (0.12, " Answer in JSON."),
    "short thought": (0.18, " Think first."),
    "long thought": (0.2, " Look around first."),
}


def look_around(names: list[str], chosen: str) -> str:
    """The longer way of thinking: name what there is, then choose."""
    return f"I see the {', the '.join(names)}. It is the {chosen}."


def answer_text(thing: Thing, scene: Scene, rng: np.random.Generator, slack: float, style: str) -> str:
    """An answer in a style of the base: a sentence, JSON as Qwen likes it, or the format, with two ways to think."""
    box = loose_box(thing, rng, slack)
    if style == "sentence":
        return f"The {thing.name} is at {box}."
    if style == "json":
        return f'[{{"label": "{thing.name}", "bbox_2d": {box}}}]'
    thought = f"The {thing.name} fits best."
    if style == "long thought":
        thought = look_around([t.name for t in sorted(scene.things, key=lambda t: t.x)], thing.name)
    return f'<think>{thought}</think><answer>{{"bbox": {box}, "points": {loose_points(thing, rng, slack)}}}</answer>'


TURN = "<|im_end|>\n<|im_start|>assistant\n"  # from a question to its answer


def fact_texts() -> list[tuple[str, str]]:
    """World knowledge without a picture: what indirect questions build on, never an indirect question itself."""
    colours = [(f"Which colour has {x}?", f"The colour of {x} is {colour}.") for x, colour in COLOUR_OF.items()]
    return colours + [(f"Which shape has {x}?", f"The {shape} has {x}.") for x, shape in SHAPE_WITH.items()]


def corpus() -> list[str]:
    """Every word and number that the tiny world writes, for the tokenizer."""
    texts = [instruction("{question}", "{width}", "{height}"), "You are a helpful assistant."]
    texts += ["system\n", "user\n", "assistant\n"]
    texts += [f"[{i}, {i}" for i in range(SIZE + 29)] + [t for pair in fact_texts() for t in pair]
    texts += ["Here are the red star. Which of these has", " I see the"]
    rng = np.random.default_rng(0)
    for scene in scenes_from(10**8, 400):
        texts += [f" {text}" for kind in KINDS for text, _ in fair_questions(scene, kind)]
        texts += [answer_text(t, scene, rng, 0.1, style) for t in scene.things for style in STYLES]
    texts += [hint for _, hint in STYLES.values()]
    return texts


def puzzle(rng: np.random.Generator) -> tuple[str, str]:
    """A question about objects that are named, not shown: knowing that grass is green is not yet using it."""
    names = [f"{rng.choice(list(COLOURS))} {rng.choice(SHAPES)}" for _ in range(int(rng.integers(3, 7)))]
    chosen = names[int(rng.integers(len(names)))]
    colour, shape = chosen.split()
    facts = []  # that are true of the chosen one alone
    if sum(colour in n for n in names) == 1:
        facts += [f"has the colour of {subject}" for subject, c in COLOUR_OF.items() if c == colour]
    if sum(shape in n for n in names) == 1:
        facts += [f"has {feature}" for feature, s in SHAPE_WITH.items() if s == shape]
    if not facts:
        return puzzle(rng)
    question = f"Here are the {', the '.join(names)}. Which of these {facts[int(rng.integers(len(facts)))]}?"
    return question, look_around(names, chosen)


def fact_row(policy: Policy, rng: np.random.Generator, count: int) -> tuple[Prompt, list[torch.Tensor], list[int]]:
    """`count` facts and as many puzzles as answers to one empty prompt: it, ids of both, lengths of the answers."""
    ids = lambda text: policy.processor.tokenizer(text).input_ids
    opening = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    head = torch.tensor(ids(opening), device=DEVICE)
    facts, rows, sizes = fact_texts(), [], []
    facts = [facts[i] for i in rng.choice(len(facts), count, replace=False)]
    for question, answer in facts + [puzzle(rng) for _ in range(count)]:
        tail = ids(f"{answer}<|im_end|>")
        rows.append(torch.tensor(ids(question + TURN) + tail, device=DEVICE))
        sizes.append(len(tail))
    positions = torch.arange(len(head), device=DEVICE).expand(3, -1)
    no_picture = torch.zeros(len(head), dtype=torch.bool, device=DEVICE)
    return Prompt(head, policy.base.get_input_embeddings()(head), positions, no_picture), rows, sizes


def align_words(policy: Policy, prompts: list[Prompt], scenes: list[Scene]) -> torch.Tensor:
    """Loss that draws each picture token to the embeddings of its colour's and its shape's words, as image-text
    pretraining does.

    Without it so small a language model learned in half an hour what is leftmost, but not where "the green star" is.
    """
    tokenizer, words = policy.processor.tokenizer, policy.base.get_input_embeddings().weight
    token = lambda names: words[torch.tensor([tokenizer(f" {n}").input_ids[0] for n in names], device=words.device)]
    features = torch.cat([p.embeds[p.ids == policy.base.config.image_token_id] for p in prompts])  # [B * 16, D]
    target = torch.from_numpy(np.concatenate([cell_targets(s) for s in scenes])).to(DEVICE)
    on = target[:, 0] == 1
    loss = F.cross_entropy(features[on] @ token(COLOURS).T, target[on, 1])
    return loss + F.cross_entropy(features[on] @ token(SHAPES).T, target[on, 2])


def train_language(policy: Policy, steps: int, slack: float = 0.25, pictures: int = 16, asked: int = 6) -> None:
    """Supervised answers to `asked` questions a picture in one packed row, boxes `slack` too wide."""
    rng, ids = np.random.default_rng(2), lambda text: policy.processor.tokenizer(text).input_ids
    model = policy.base.train()
    # The head learns faster: first words that always stood in the same place end with nearly the same row, and a base
    # that cannot tell "<" from "[" in its head cannot be taught, by adapters below the head, which of them to say.
    groups = [
        {"params": [p for n, p in model.named_parameters() if ".visual." not in n and "lm_head" not in n], "lr": 2e-3},
        {"params": list(model.model.visual.parameters()), "lr": 2e-4},
        {"params": list(model.lm_head.parameters()), "lr": 6e-3},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98))
    schedule, bar, running = one_cycle(optimizer, steps), tqdm(range(steps), desc="language"), None
    for step in bar:
        images, first, pairs, scenes = [], [], [], []
        for scene in scenes_from(2 * 10**7 + step * pictures, pictures):
            chosen = [ask(scene, rng, KINDS[int(rng.random() < 0.35)]) for _ in range(asked)]  # never the indirect kind
            chosen = [c for c in chosen if c] or fair_questions(scene, "attribute")[:1]
            if chosen:
                images.append(Image.fromarray(scene.image)), first.append(chosen[0][0])
                pairs.append(chosen), scenes.append(scene)
        prompts, groups, sizes = encode(policy, images, first), [], []
        for b, chosen in enumerate(pairs):
            # The question stands last in the prompt, so all questions on a picture share everything before it.
            styles = rng.choice(list(STYLES), len(chosen), p=[share for share, _ in STYLES.values()])
            hints = [STYLES[style][1] if rng.random() < 0.5 else "" for style in styles]
            tails = [ids(f" {question}{hint}{TURN}") for (question, _), hint in zip(chosen, hints)]
            p, shared = prompts[b], len(prompts[b].ids) - len(ids(f" {chosen[0][0]}{TURN}"))
            prompts[b] = Prompt(p.ids[:shared], p.embeds[:shared], p.positions[:, :shared], p.picture[:shared])
            texts = [answer_text(t, scenes[b], rng, slack, style) for (_, t), style in zip(chosen, styles)]
            answers = [ids(f"{text}<|im_end|>") for text in texts]
            groups.append([torch.tensor(tail + answer, device=DEVICE) for tail, answer in zip(tails, answers)])
            sizes += map(len, answers)
        alignment = align_words(policy, prompts, scenes)
        prompt, group, facts = fact_row(policy, rng, 6)
        logps, _ = logprobs(policy, prompts + [prompt], groups + [group])
        lengths = [len(row) for g in groups + [group] for row in g]
        loss = -torch.cat([logp[-size:] for logp, size in zip(logps.split(lengths), sizes + facts)]).mean()
        optimizer.zero_grad()
        (loss + 0.3 * alignment).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{running:.3f}", words=f"{alignment.item():.2f}")


# ---------------------------------------------------------------------------------------------------- measure


def measure_sam(count: int = 200) -> dict:
    """Mean IoU of the tiny SAM on objects of held-out scenes: true, moved and shared boxes, some with points."""
    segmenter, rng, found = load_segmenter("tiny"), np.random.default_rng(0), {}
    for scene in map(make_scene, range(SPLITS["validation"][0], SPLITS["validation"][0] + count)):
        truth = [t.mask for t in scene.things]
        prompts = {
            "true box": ([t.box for t in scene.things], [[] for _ in truth]),
            "true box, 2 points": ([t.box for t in scene.things], [points_on(t, rng, 1, 1) for t in scene.things]),
        }
        shared, others = zip(*(shared_box(t, scene) for t in scene.things))
        on = [points_on(t, rng, 1, 0) for t in scene.things]
        off = [[[x, y, 0] for x, y, _ in points_on(t, rng, 1, 0)] for t in others]
        prompts |= {
            "box of two": (shared, [[] for _ in truth]),
            "box of two, 1 point": (shared, on),
            "box of two, 2 points": (shared, [p + q for p, q in zip(on, off)]),
        }
        for percent in (5, 10, 20, 30):
            boxes = [jittered_box(t.box, rng, percent / 100) for t in scene.things]
            boxes = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in boxes]
            prompts[f"sides moved by {percent} %"] = (boxes, [[] for _ in truth])
        for name, (boxes, points) in prompts.items():
            masks = segmenter.masks(scene.image, boxes, points)
            found.setdefault(name, []).extend(iou(*intersection_union(m, t)) for m, t in zip(masks, truth))
    return {name: round(float(np.mean(values)), 3) for name, values in found.items()}


def measure_policy(count: int = 600, group: int = 4) -> dict:
    """The base on held-out scenes by kind of question: box IoU and right object (any text with a box); format."""
    policy, data, rows = load_policy("tiny"), load_data("shapes", "validation", count), {}
    torch.manual_seed(0)
    for start in range(0, count, 60):
        samples = [data[i] for i in range(start, start + 60)]
        with torch.no_grad():
            prompts = encode(policy, [x.image for x in samples], [x.question for x in samples])
        greedy, drawn = sample(policy, prompts, 1, 96, temperature=0), sample(policy, prompts, group, 96)
        for x, [answer], group_of in zip(samples, greedy, drawn):
            parsed = parse(answer.text, SIZE, SIZE)
            overlap = held = 0.0
            if box := parsed.lenient_box:
                x1, y1, x2, y2 = map(int, box)
                overlap = box_iou(box, tight_box(x.mask))
                held = x.mask[max(0, y1) : y2 + 1, max(0, x1) : x2 + 1].sum() > 0.5 * x.mask.sum()
            in_format = np.mean([parse(a.text, SIZE, SIZE).in_format for a in group_of])
            for kind in (x.kind, "all"):
                rows.setdefault(kind, []).append((overlap, bool(held), parsed.in_format, in_format))
    columns = ("box IoU", "holds the object", "format, greedy", "format, sampled")
    return {kind: {c: round(float(v), 3) for c, v in zip(columns, np.mean(values, 0))} for kind, values in rows.items()}


# ---------------------------------------------------------------------------------------------------- all of it

STAGES = ("sam", "vision", "language", "measure")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(STAGES), help="which to run, by comma, in order (default: all)")
    parser.add_argument("--work", default="runs/pretrain", help="folder for what one stage leaves to the next")
    args = parser.parse_args()
    stages, work = args.stages.split(","), Path(args.work)
    if unknown := set(stages) - set(STAGES):
        parser.error(f"--stages: {', '.join(sorted(unknown))} is none of {', '.join(STAGES)}")
    work.mkdir(parents=True, exist_ok=True)
    if "sam" in stages:
        train_sam(1600, TINY_SAM / "model.safetensors")
    if "vision" in stages:
        train_vision(2400, work / "vision.safetensors")
    if "language" in stages:
        torch.manual_seed(2)
        processor = build_processor(corpus())
        model = build_policy(processor.tokenizer).to(DEVICE)
        model.model.visual.load_state_dict(load_file(work / "vision.safetensors"))
        stop = stop_ids(model, processor.tokenizer)
        train_language(Policy(model, processor, banned_ids(model, processor.tokenizer, stop), stop), 2200)
        model.to(torch.bfloat16).save_pretrained(POLICY), processor.save_pretrained(POLICY)
    if "measure" in stages:
        measured = {"sam": measure_sam(), "policy": measure_policy()}
        (POLICY.parent / "measured.json").write_text(json.dumps(measured, indent=1))
        print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
