"""Make both tiny networks from nothing: `python -m samr1_mini.tiny.pretrain` (on a GPU if there is one).

Supervised training stands here for what Qwen and SAM already know before SAM-R1 begins:
    sam       Segment Anything learns to cut drawn shapes from boxes and points
    vision    the vision tower alone learns what lies under each picture token, and its box as a choice among pixel bins
    language  the whole policy learns to name and find things, in several styles and with loose boxes
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

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


# ---------------------------------------------------------------------------------------------------- SAM


def jittered_box(box, rng: np.random.Generator, spread: float) -> list[float]:
    """The box with each side moved by N(0, spread * side length) pixels."""
    x1, y1, x2, y2 = box
    scale = spread * np.array([x2 - x1, y2 - y1, x2 - x1, y2 - y1])
    return (np.array([x1, y1, x2, y2]) + rng.normal(0, 1, 4) * scale).clip(0, SIZE).tolist()


def points_on(thing: Thing, rng: np.random.Generator, positive: int, negative: int) -> list[list[int]]:
    """Random labelled points [[x, y, label], ...]: 1 on the thing, 0 inside its box and off it."""
    x1, y1, x2, y2 = thing.box
    window = thing.mask[y1:y2, x1:x2]
    chosen = []
    for label, count in ((1, positive), (0, negative)):
        ys, xs = np.where(window == bool(label))
        for i in rng.integers(len(ys), size=count if len(ys) else 0):
            chosen.append([int(xs[i]) + x1, int(ys[i]) + y1, label])
    return chosen


def shared_box(thing: Thing, scene: Scene) -> tuple[tuple[int, int, int, int], Thing]:
    """The box of the thing and its nearest neighbour together, and the neighbour."""
    other = min((t for t in scene.things if t is not thing), key=lambda t: (t.x - thing.x) ** 2 + (t.y - thing.y) ** 2)
    a, b = thing.box, other.box
    return (min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])), other


def sam_prompt(thing: Thing, scene: Scene, rng: np.random.Generator, count: int) -> tuple[list[float], list[list[int]]]:
    """A box and `count` points. Half of the boxes with points hold a neighbour too: only points tell which is meant."""
    negative, spread = int(rng.integers(0, count)) if count else 0, rng.uniform(0, 0.08)
    if count and rng.random() < 0.5:
        box, other = shared_box(thing, scene)
        off = [[x, y, 0] for x, y, _ in points_on(other, rng, negative, 0)]
        return jittered_box(box, rng, spread), points_on(thing, rng, count - negative, 0) + off
    return jittered_box(thing.box, rng, spread), points_on(thing, rng, count - negative, negative)


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


def train_sam(steps: int, out: Path, pictures: int = 16) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    sam = random_sam("tiny").train().to(DEVICE)
    optimizer = torch.optim.AdamW(sam.parameters(), lr=1e-3, weight_decay=0.01)
    schedule, bar = one_cycle(optimizer, steps), tqdm(range(steps), desc="sam")
    running = 0.0
    for step in bar:
        scenes = scenes_from(step * pictures, pictures)
        images = torch.stack([torch.from_numpy(s.image).permute(2, 0, 1).float() for s in scenes]).to(DEVICE)
        embeddings = sam.image_encoder(sam.preprocess(images))  # [B, C, h, w]
        logits, quality, truth = [], [], []
        for embedding, scene in zip(embeddings, scenes):
            # Half of the pictures are prompted with boxes alone, half with boxes and one to four points.
            count = int(rng.integers(1, 5)) if rng.random() < 0.5 else 0
            boxes, labelled = zip(*(sam_prompt(t, scene, rng, count) for t in scene.things))
            boxes, points, labels = torch.tensor(boxes, dtype=torch.float32, device=DEVICE), None, None
            if count:
                padded = [(p + [[0, 0, -1]] * count)[:count] for p in labelled]
                padded = torch.tensor(padded, dtype=torch.float32, device=DEVICE)  # [N, count, 3]
                points, labels = padded[..., :2], padded[..., 2]  # the encoder moves points to their pixel's middle
            m, q = sam_masks(sam, embedding[None], boxes, points, labels)
            logits.append(m), quality.append(q)
            truth += [torch.from_numpy(t.mask) for t in scene.things]
        logits, quality = torch.cat(logits), torch.cat(quality)  # [N, 3, H, W], [N, 3]
        truth = torch.stack(truth).to(DEVICE).float()[:, None].expand_as(logits)
        chance = logits.sigmoid()
        dice = 1 - (2 * (chance * truth).sum((2, 3)) + 1) / (chance.sum((2, 3)) + truth.sum((2, 3)) + 1)
        cross = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((2, 3))
        loss_mask = dice + 10 * cross  # [N, 3]
        with torch.no_grad():
            hard = logits > 0
            iou = (hard & (truth > 0.5)).sum((2, 3)) / (hard | (truth > 0.5)).sum((2, 3)).clamp(min=1)
        # As in SAM: only the best of the three masks learns, and the quality head learns the IoU of all three.
        loss = loss_mask.min(1).values.mean() + 0.05 * loss_mask.mean() + F.mse_loss(quality, iou)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        chosen = iou.gather(1, quality.argmax(1, keepdim=True)).mean().item()
        running = chosen if step == 0 else 0.97 * running + 0.03 * chosen
        if step % 25 == 0:
            bar.set_postfix(IoU=f"{running:.3f}", loss=f"{loss.item():.3f}")
    save_file({k: v.half().contiguous().cpu() for k, v in sam.state_dict().items()}, out)


# ---------------------------------------------------------------------------------------------------- vision tower

CELL = 28  # pixels a side of one merged picture token
GRID = SIZE // CELL


def cell_targets(scene: Scene) -> np.ndarray:
    """What lies under each picture token, int [GRID * GRID, 7]: objectness, colour, shape, x1, y1, x2, y2; row by row.

    A cell belongs to the object whose centre is in it, else to the one that covers most of it.
    """
    targets = np.zeros((GRID, GRID, 7), np.int64)
    claim = np.zeros((GRID, GRID))
    for thing in scene.things:
        cover = thing.mask.reshape(GRID, CELL, GRID, CELL).sum((1, 3)).astype(float)
        cover[int(thing.y) // CELL, int(thing.x) // CELL] += CELL * CELL
        wins = (cover > claim) & (cover >= 16)
        claim[wins] = cover[wins]
        targets[wins] = [1, list(COLOURS).index(thing.colour), SHAPES.index(thing.shape), *thing.box]
    return targets.reshape(-1, 7)


def soft_bins(position: torch.Tensor) -> torch.Tensor:
    """A pixel position [...] as probabilities of bins [..., SIZE + 1]: a bell of 1.5 px around the true one."""
    bins = torch.arange(SIZE + 1, device=position.device)
    return (-((bins - position[..., None]) ** 2) / (2 * 1.5**2)).softmax(-1)


def train_vision(steps: int, out: Path, pictures: int = 48) -> None:
    torch.manual_seed(1)
    processor = build_processor(["nothing to read yet"])
    tower = build_policy(processor.tokenizer).model.visual.train().to(DEVICE)
    width = tower.config.out_hidden_size
    head = torch.nn.Linear(width, 1 + len(COLOURS) + len(SHAPES) + 4 * (SIZE + 1)).to(DEVICE)  # thrown away afterwards
    learnt = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(learnt, lr=1e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule, bar = one_cycle(optimizer, steps), tqdm(range(steps), desc="vision")
    for step in bar:
        scenes = scenes_from(10**6 + step * pictures, pictures)
        inputs = processor.image_processor([s.image for s in scenes], return_tensors="pt").to(DEVICE)
        target = torch.from_numpy(np.concatenate([cell_targets(s) for s in scenes])).to(DEVICE)  # [B * 16, 7]
        features = tower(inputs.pixel_values, grid_thw=inputs.image_grid_thw).pooler_output  # [B * 16, width]
        there, colour, shape, box = head(features).split([1, len(COLOURS), len(SHAPES), 4 * (SIZE + 1)], -1)
        on = target[:, 0] == 1
        box = box[on].view(-1, 4, SIZE + 1)
        loss_box = F.cross_entropy(box.flatten(0, 1), soft_bins(target[on, 3:]).flatten(0, 1))
        loss_name = F.cross_entropy(colour[on], target[on, 1]) + F.cross_entropy(shape[on], target[on, 2])
        loss = F.binary_cross_entropy_with_logits(there[:, 0], target[:, 0].float()) + loss_name + loss_box
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            off = (box.argmax(-1) - target[on, 3:]).abs().float().mean().item()
            shape_right = (shape[on].argmax(-1) == target[on, 2]).float().mean().item()
            bar.set_postfix(px=f"{off:.2f}", shape=f"{shape_right:.2f}", loss=f"{loss.item():.3f}")
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
