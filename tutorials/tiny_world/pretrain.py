"""Make both tiny networks from nothing: `python -m tutorials.tiny_world.pretrain` (on a GPU if there is one).

Supervised training stands here for what Qwen and SAM already know before SAM-R1 begins:
    sam       Segment Anything learns to draw what boxes and points mean
    vision    the vision tower alone learns what lies under each picture token, and its box as a choice among pixel bins
    ground    the whole policy learns to find things: names, each at once followed by the numbers of its box
    language  it learns to answer questions, in several styles and in the end with wide boxes, and to conclude from
              what it has said
A command that was cut goes on where it was. What is made replaces the weights in the package.
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from samr1_mini.config import Parser, UserError, auto_device, exit_with, first_line
from samr1_mini.data import load_data
from samr1_mini.metrics import box_iou, intersection_union, iou, tight_box
from samr1_mini.decoding import generate
from samr1_mini.policy import TINY, Policy, Prompt, encode, load_policy, logprobs
from samr1_mini.reward import parse, score_group
from samr1_mini.segmenter import TINY_SAM, load_segmenter, random_sam, sam_logits
from .answers import (
    ANSWER,
    LISTING,
    STYLES,
    answer_parts,
    called,
    corpus,
    draw_style,
    fact_texts,
    listed,
    middle,
    style_of,
    wide_box,
)
from .build import build_policy, build_processor
from samr1_mini.tiny.scenes import (
    COLOURS,
    PRETRAIN,
    SHAPES,
    SIZE,
    SPLITS,
    Scene,
    Thing,
    ask,
    fair_questions,
    make_scene,
)

DEVICE = auto_device()
MEASURED = Path(__file__).parent / "measured.json"


def scenes_from(start: int, count: int) -> list[Scene]:
    """`count` scenes of the pretraining range, from its `start`-th on."""
    return [make_scene(PRETRAIN[0] + start + i) for i in range(count)]


def learn(
    name: str, model: torch.nn.Module, optimizers: list, steps: int, work: Path, loss_of: Callable
) -> None:
    """`steps` updates with `loss_of(step) -> (loss, {what the bar shows: its figure})`, in which all that is random
    depends on the step alone. Every 100 steps all goes to work/NAME.pt, from where a stage that was cut goes on.
    """
    # Rates rise for a tenth of the steps and fall to nearly 0; Adam's first beta (Muon has none) goes from 0.95 to 0.85
    # and back.
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            x,
            [g["lr"] for g in x.param_groups],
            steps,
            pct_start=0.1,
            final_div_factor=20,
            cycle_momentum="betas" in x.defaults,
        )
        for x in optimizers
    ]
    state, first, shown = work / f"{name}.pt", 0, {}
    parts = [model, *optimizers, *schedules]
    if state.exists():
        saved = torch.load(state, map_location=DEVICE, weights_only=True)
        if saved["steps"] != steps:
            raise UserError(
                f"{state} is of a stage of {saved['steps']} steps, not {steps}: delete it to begin anew"
            )
        try:
            for part, has in zip(parts, saved["parts"], strict=True):
                part.load_state_dict(has)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{state} is of another network: delete it to begin anew ({first_line(error)})"
            ) from None
        first, shown = saved["step"], saved["shown"]
    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps)
    for step in bar:
        loss, figures = loss_of(step)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in optimizers + schedules:
            each.step()
        shown = {
            k: v if step == 0 else 0.97 * shown.get(k, v) + 0.03 * v for k, v in figures.items()
        }
        if step % 25 == 0:
            bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items()})
        if step % 100 == 99:
            has = [part.state_dict() for part in parts]
            torch.save(
                {"step": step + 1, "steps": steps, "parts": has, "shown": shown}, f"{state}.part"
            )
            Path(f"{state}.part").replace(state)


# ---------------------------------------------------------------------------------------------------- SAM


def box_around(*things: Thing) -> tuple[int, int, int, int]:
    """The box that holds all of these."""
    x1, y1, x2, y2 = zip(*(t.box for t in things))
    return min(x1), min(y1), max(x2), max(y2)


def neighbour(thing: Thing, scene: Scene) -> Thing:
    """The nearest other thing."""
    return min(
        (t for t in scene.things if t is not thing),
        key=lambda t: (t.x - thing.x) ** 2 + (t.y - thing.y) ** 2,
    )


def meant(scene: Scene, box, points: list[list[int]]) -> np.ndarray:
    """The mask that a box and points [[x, y, label], ...] stand for, bool [SIZE, SIZE]: SAM takes a box at its word.

    Of the dots, things and groups of up to four things that hold all points labelled 1 and none labelled 0, the one
    that fills the box best: the highest IoU of tight box and box. So a wide box means the neighbours too.
    """
    x1, y1, x2, y2 = box
    inside = [
        t
        for t in scene.things
        if t.box[0] < x2 and t.box[2] > x1 and t.box[1] < y2 and t.box[3] > y1
    ]
    groups = [group for n in range(1, 5) for group in combinations(inside or scene.things, n)]
    groups += [(t.dot,) for t in scene.things if t.dot]
    on = lambda things, wanted: [
        any(t.mask[y, x] for t in things) for x, y, label in points if label == wanted
    ]
    allowed = [g for g in groups if all(on(g, 1)) and not any(on(g, 0))]
    if not allowed:  # nothing is as the points say
        return meant(scene, box, [])
    best = max(allowed, key=lambda group: box_iou(box, box_around(*group)))
    return np.logical_or.reduce([t.mask for t in best])


def points_on(
    mask: np.ndarray, rng: np.random.Generator, count: int, label: int
) -> list[list[int]]:
    """`count` random points [[x, y, label], ...] on a mask; none if it is empty."""
    ys, xs = np.where(mask)
    return [
        [int(xs[i]), int(ys[i]), label]
        for i in (rng.integers(len(ys), size=count) if len(ys) else ())
    ]


def sam_prompt(
    thing: Thing, scene: Scene, rng: np.random.Generator, count: int
) -> tuple[list[float], list[list[int]]]:
    """A box and `count` points, as somebody would give them who means this thing, with more or less care.

    Half of the boxes are nearly right, the others up to 0.6 too wide on each side. A third of those with points hold a
    neighbour, on which the points labelled 0 lie; elsewhere these lie beside the thing.
    """
    negative, other = int(rng.integers(0, count)) if count else 0, neighbour(thing, scene)
    if count and rng.random() < 0.33:
        box, off = (
            wide_box(box_around(thing, other), rng, rng.uniform(0, 0.08)),
            other.mask & ~thing.mask,
        )
    else:
        box = wide_box(
            thing.box, rng, rng.uniform(0, 0.08) if rng.random() < 0.5 else rng.uniform(0, 0.6)
        )
        x1, y1, x2, y2 = (int(v) for v in box)
        off = np.zeros_like(thing.mask)
        off[y1:y2, x1:x2] = ~thing.mask[y1:y2, x1:x2]
    points = points_on(thing.mask, rng, count - negative, 1) + points_on(off, rng, negative, 0)
    return box, points


def train_sam(steps: int, out: Path, work: Path, pictures: int = 12) -> None:
    """Segment Anything learns to draw what boxes and points mean (`meant`)."""
    torch.manual_seed(0)
    sam = random_sam("tiny").train().to(DEVICE)

    def loss_of(step: int) -> tuple[torch.Tensor, dict]:
        rng, scenes = np.random.default_rng([0, step]), scenes_from(step * pictures, pictures)
        images = torch.stack(
            [torch.from_numpy(s.image).permute(2, 0, 1).float() for s in scenes]
        ).to(DEVICE)
        embeddings = sam.image_encoder(sam.preprocess(images))  # [B, C, h, w]
        logits, quality, truth = [], [], []
        for embedding, scene in zip(embeddings, scenes):
            # Half of the pictures are prompted with boxes alone, half with boxes and one to four points.
            count = int(rng.integers(1, 5)) if rng.random() < 0.5 else 0
            things = scene.things + [t.dot for t in scene.things if t.dot]
            boxes, labelled = zip(*(sam_prompt(t, scene, rng, count) for t in things))
            truth += [
                torch.from_numpy(meant(scene, box, points)) for box, points in zip(boxes, labelled)
            ]
            boxes, points, labels = (
                torch.tensor(boxes, dtype=torch.float32, device=DEVICE),
                None,
                None,
            )
            if count:
                padded = [(p + [[0, 0, -1]] * count)[:count] for p in labelled]
                padded = torch.tensor(padded, dtype=torch.float32, device=DEVICE)  # [N, count, 3]
                points, labels = (
                    padded[..., :2],
                    padded[..., 2],
                )  # the encoder moves points to their pixel's middle
            low, q = sam_logits(sam, embedding[None], points, labels, boxes)  # [N, 3, h, w], [N, 3]
            logits.append(sam.postprocess_masks(low, (SIZE, SIZE), (SIZE, SIZE))), quality.append(q)
        logits, quality = torch.cat(logits), torch.cat(quality)  # [N, 3, H, W], [N, 3]
        truth = torch.stack(truth).to(DEVICE).float()[:, None].expand_as(logits)
        probability = logits.sigmoid()
        dice = 1 - (2 * (probability * truth).sum((2, 3)) + 1) / (
            probability.sum((2, 3)) + truth.sum((2, 3)) + 1
        )
        bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((2, 3))
        loss_mask = dice + 10 * bce  # [N, 3]
        with torch.no_grad():
            hard = logits > 0
            overlap = (hard & (truth > 0.5)).sum((2, 3)) / (hard | (truth > 0.5)).sum((2, 3)).clamp(
                min=1
            )
        # As in SAM: only the best of the three masks learns, and the quality head learns the IoU of all three.
        loss = (
            loss_mask.min(1).values.mean() + 0.05 * loss_mask.mean() + F.mse_loss(quality, overlap)
        )
        chosen = overlap.gather(1, quality.argmax(1, keepdim=True)).mean().item()
        return loss, {"IoU": chosen, "loss": loss.item()}

    learn(
        "sam",
        sam,
        [torch.optim.AdamW(sam.parameters(), lr=1e-3, weight_decay=0.01)],
        steps,
        work,
        loss_of,
    )
    save_file({k: v.half().contiguous().cpu() for k, v in sam.state_dict().items()}, out)


# ---------------------------------------------------------------------------------------------------- vision tower

CELL = 14  # pixels a side of one merged picture token
GRID = SIZE // CELL
PLACES = (
    6  # numbers that are learnt of each thing: x1, y1, x2, y2 of its box, and its middle's x and y
)


def cell_targets(scene: Scene) -> np.ndarray:
    """What lies under each picture token, int [GRID * GRID, 4 + PLACES], row by row: 1 if a thing does, its colour and
    shape, its dot's colour (0: no dot, else 1 + its place in COLOURS), and its places. The thing that is seen most.
    """
    targets = np.zeros((GRID, GRID, 4 + PLACES), np.int64)
    claim = np.full((GRID, GRID), 15)  # pixels: less than that is not looked at
    for t in scene.things:
        cover = t.mask.reshape(GRID, CELL, GRID, CELL).sum((1, 3))
        wins = cover > claim
        claim[wins] = cover[wins]
        dot = 1 + list(COLOURS).index(t.dot.colour) if t.dot else 0
        targets[wins] = [
            1,
            list(COLOURS).index(t.colour),
            SHAPES.index(t.shape),
            dot,
            *t.box,
            *middle(t),
        ]
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
    head = torch.nn.Linear(tower.config.out_hidden_size, sum(parts)).to(
        DEVICE
    )  # thrown away afterwards

    def loss_of(step: int) -> tuple[torch.Tensor, dict]:
        scenes = scenes_from(10**6 + step * pictures, pictures)
        inputs = processor.image_processor([s.image for s in scenes], return_tensors="pt").to(
            DEVICE
        )
        target = torch.from_numpy(np.concatenate([cell_targets(s) for s in scenes])).to(
            DEVICE
        )  # [B * 64, 10]
        features = tower(
            inputs.pixel_values, grid_thw=inputs.image_grid_thw
        ).pooler_output  # [B * 64, width]
        on = target[:, 0] == 1
        there = head.weight[:1] @ features.T + head.bias[:1, None]  # [1, B * 64]
        _, colour, shape, dot, places = head(features[on]).split(parts, -1)
        target_on, places = target[on], places.view(-1, PLACES, SIZE + 1)
        loss = F.binary_cross_entropy_with_logits(there[0], target[:, 0].float())
        for logits, column in ((colour, 1), (shape, 2), (dot, 3)):
            loss = loss + F.cross_entropy(logits, target_on[:, column])
        loss = loss + F.cross_entropy(
            places.flatten(0, 1), soft_bins(target_on[:, 4:]).flatten(0, 1)
        )
        off = (places.argmax(-1) - target_on[:, 4:]).abs().float().mean().item()
        right = (
            lambda logits, column: (logits.argmax(-1) == target_on[:, column]).float().mean().item()
        )
        return loss, {
            "px": off,
            "colour": right(colour, 1),
            "shape": right(shape, 2),
            "dot": right(dot, 3),
        }

    both = torch.nn.ModuleList([tower, head])
    optimizer = torch.optim.AdamW(both.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.98))
    learn("vision", both, [optimizer], steps, work, loss_of)
    save_file({k: v.contiguous().cpu() for k, v in tower.state_dict().items()}, out)


# ---------------------------------------------------------------------------------------------------- language

TURN = "<|im_end|>\n<|im_start|>assistant\n"  # from a question to its answer
A_WORD = "the"  # stands where questions will: they begin with a word, so the prompt before them has the same tokens


def told_rows(
    rng: np.random.Generator, scene: Scene, count: int
) -> list[tuple[str, str, str, str]]:
    """Up to `count` questions about a scene that is told, not shown: (question, hint, what is told, conclusion).

    The base learns here to conclude from what it has said, of all kinds but part: those too that it never meets about a
    picture. From names it concludes what has the colour or the shape of something; to compare, it measures.
    """
    rows = []
    for _ in range(count):
        kind = str(
            rng.choice(["attribute", "relation", "indirect", "combined"], p=[0.05, 0.15, 0.3, 0.5])
        )
        style = "places" if kind in ("relation", "combined") or rng.random() < 0.6 else "names"
        if found := ask(scene, rng, kind):
            question, thing = found
            hint = STYLES[style].hint if rng.random() < 0.5 else ""
            rows.append((question, hint, listed(scene, style, question), thing.name))
    return rows


Written = tuple[
    torch.Tensor, torch.Tensor
]  # a row's ids [t], and which of them are learnt, bool [t]


def written(policy: Policy, *texts: tuple[str, bool]) -> Written:
    """Texts one behind another, each with whether it is learnt. Each begins where a word does."""
    ids = [policy.processor.tokenizer(text).input_ids for text, _ in texts]
    learnt = [[wanted] * len(row) for row, (_, wanted) in zip(ids, texts)]
    return torch.tensor(sum(ids, []), device=DEVICE), torch.tensor(sum(learnt, []), device=DEVICE)


def shown_row(
    policy: Policy, kind: str, question: str, thing: Thing, scene: Scene, rng, slack: float
) -> Written:
    """A question on a picture and its answer, in six of ten cases in the style for which its hint asks.

    The base learns to compare only where the answer first measures what it compares. Other answers to such questions
    learn how they begin, or what they list, and no more.
    """
    hinted, compares = rng.random() < 0.6, kind == "relation"
    style = "places" if hinted and compares else draw_style(rng, hinted)
    hint = STYLES[style].hint * hinted
    begins, listing, named, numbers = answer_parts(thing, scene, rng, slack, style, question)
    whole = hinted or not compares
    return written(
        policy,
        (f" {question}{hint}{TURN}", False),
        (begins + listing, True),
        (f"{named}{numbers}<|im_end|>", whole),
    )


def astray_row(policy: Policy, scene: Scene, other: Scene, rng, slack: float) -> Written:
    """A question of any kind about another scene, and an answer about some thing in this picture.

    Learnt is what the answer lists and, of the thing that its thought names, the box and the points; not which thing it
    names. So a list is of what is seen and a box of what was said, whatever was asked. Without such rows, lists and
    boxes went wrong under the questions that the base never meets with a picture that they are about.
    """
    kinds = rng.permutation(["attribute", "relation", "indirect", "combined"])
    question, _ = next(found for kind in kinds if (found := ask(other, rng, kind)))
    hinted, thing, style = rng.random() < 0.75, scene.things[rng.integers(len(scene.things))], ""
    while style not in ("short", *LISTING):
        style = draw_style(rng, hinted)
    begins, listing, named, numbers = answer_parts(thing, scene, rng, slack, style, question)
    return written(
        policy,
        (f" {question}{STYLES[style].hint * hinted}{TURN}{begins}", False),
        (listing, True),
        (named, False),
        (f"{numbers}<|im_end|>", True),
    )


def text_rows(policy: Policy, rng: np.random.Generator, scene: Scene, count: int) -> list[Written]:
    """A fact, and conclusions from up to `count` questions about a scene that is told.

    They stand under the picture of another scene, which says nothing of it. When these rows had no picture, or a grey
    one, the policy did not use what it learnt from them once there was a picture. The loss covers the conclusion up to
    the first number, and where a hint asks for a list also its beginning; without these, conclusions were repeated and
    lists broke off. Of half of the rows without a hint only the beginning of an answer is learnt, and nothing is told.
    """
    question, answer = fact_texts()[rng.integers(len(fact_texts()))]
    rows = [written(policy, (f" {question}{TURN}", False), (f"{answer}<|im_end|>", True))]
    for question, hint, told, conclusion in told_rows(rng, scene, count):
        if (
            not hint and rng.random() < 0.5
        ):  # else the base would list at once wherever nothing is named
            rows.append(
                written(
                    policy,
                    (f" {question}{TURN}", False),
                    (STYLES[draw_style(rng, False)].begins, True),
                )
            )
            continue
        begins = STYLES["places"].begins
        parts = (
            (begins, bool(hint)),
            (told.removeprefix(begins), False),
            (f" {conclusion}{ANSWER}", True),
        )
        rows.append(written(policy, (f" {question}{hint}{TURN}", False), *parts))
    return rows


def align_words(policy: Policy, prompts: list[Prompt], scenes: list[Scene]) -> torch.Tensor:
    """Loss that draws each picture token to the embeddings of its colour's and its shape's words, as image-text
    pretraining does.

    Without it so small a language model learned in half an hour what is leftmost, but not where "the green star" is.
    """
    tokenizer, words = policy.processor.tokenizer, policy.base.get_input_embeddings().weight
    token = lambda names: words[
        torch.tensor([tokenizer(f" {n}").input_ids[0] for n in names], device=words.device)
    ]
    features = torch.cat([p.embeds[p.picture] for p in prompts])  # [B * 64, D]
    target = torch.from_numpy(np.concatenate([cell_targets(s) for s in scenes])).to(DEVICE)
    on = target[:, 0] == 1
    loss = F.cross_entropy(features[on] @ token(COLOURS).T, target[on, 1])
    return loss + F.cross_entropy(features[on] @ token(SHAPES).T, target[on, 2])


def line_up_numbers(model, tokenizer, waves: int = 16) -> None:
    """Numbers start on a smooth curve in the embeddings and in the head, so that what is learnt of 34 holds for 35."""
    ids = torch.tensor(
        [tokenizer.convert_tokens_to_ids(str(n)) for n in range(SIZE + 1)], device=DEVICE
    )
    wave = torch.arange(1, waves + 1, device=DEVICE)
    curve = (
        torch.cos(torch.arange(SIZE + 1, device=DEVICE)[:, None] / SIZE * torch.pi * wave)
        / wave.sqrt()
    )
    curve = 0.5 * F.normalize(curve, dim=1)  # [SIZE + 1, waves]
    for table in (model.get_input_embeddings().weight, model.lm_head.weight):
        basis = torch.linalg.qr(torch.randn(table.shape[1], waves, device=DEVICE)).Q
        table.data[ids] = curve @ basis.T


def new_policy() -> Policy:
    """The policy with random weights, and a tokenizer for all that the tiny world writes."""
    torch.manual_seed(2)
    processor = build_processor(corpus())
    model = build_policy(processor.tokenizer).to(DEVICE)
    line_up_numbers(model, processor.tokenizer)
    return Policy(model, processor)


def policy_optimizers(model) -> list:
    """Muon for the language model's matrices, AdamW for all else.

    Muon moves a matrix in all directions alike, rare ones too: it learns in fewer steps than AdamW alone.
    """
    language = {
        n: p for n, p in model.named_parameters() if ".visual." not in n and "lm_head" not in n
    }
    matrices = [p for n, p in language.items() if p.ndim == 2 and "embed" not in n]
    # The head learns faster: first words that always stood in the same place end with nearly the same row, and a base
    # that cannot tell "<" from "[" in its head cannot be taught, by adapters below the head, which of them to say.
    groups = [
        {"params": [p for n, p in language.items() if p.ndim == 1 or "embed" in n], "lr": 1.5e-3},
        {"params": list(model.model.visual.parameters()), "lr": 2e-4},
        {"params": list(model.lm_head.parameters()), "lr": 5e-3},
    ]
    muon = torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98)), muon]


def cut(prompt: Prompt, length: int) -> Prompt:
    """The first `length` tokens of a prompt."""
    return Prompt(
        prompt.ids[:length],
        prompt.embeds[:length],
        prompt.positions[:, :length],
        prompt.picture[:length],
    )


def train_ground(policy: Policy, steps: int, out: Path, work: Path, pictures: int = 16) -> None:
    """Behind a picture stand the things in it, each name at once followed by the numbers of its box and its middle.

    Right behind a name a network of four layers learns within some hundred steps to find a thing and to read off where
    it is. In sentences, where words stand between, it had not begun to after a thousand.
    """
    tokenizer, model = policy.processor.tokenizer, policy.base.train()
    number = [tokenizer.convert_tokens_to_ids(str(n)) for n in range(SIZE + 1)]

    def loss_of(step: int) -> tuple[torch.Tensor, dict]:
        rng, rows, places = np.random.default_rng([3, step]), [], []
        scenes = scenes_from(5 * 10**7 + step * pictures, pictures)
        prompts = encode(
            policy, [Image.fromarray(scene.image) for scene in scenes], ["?"] * pictures
        )
        prompts = [
            cut(p, int(p.picture.nonzero()[-1]) + 2) for p in prompts
        ]  # up to the picture's end
        for scene in scenes:
            things = scene.things + [t.dot for t in scene.things if t.dot]
            things = (
                sorted(things, key=lambda t: middle(t)[0])
                if rng.random() < 0.5
                else rng.permutation(things)
            )
            rows.append([])
            for thing in things:
                name = tokenizer(f" {called(thing, scene)}").input_ids
                rows[-1] += name + [number[v] for v in (*thing.box, *middle(thing))]
                places += [False] * len(name) + [True] * PLACES
        alignment = align_words(policy, prompts, scenes)
        logps, _ = logprobs(policy, prompts, [[torch.tensor(row, device=DEVICE)] for row in rows])
        where = -logps[torch.tensor(places, device=DEVICE)].detach().view(-1, PLACES).mean(0)
        figures = {
            "loss": -logps.mean().item(),
            "x1": where[0].item(),
            "y1": where[1].item(),
            "x": where[4].item(),
        }
        return -logps.mean() + 0.3 * alignment, figures

    learn("ground", model, policy_optimizers(model), steps, work, loss_of)
    save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, out)


def train_language(
    policy: Policy,
    steps: int,
    work: Path,
    slack: float = 0.4,
    pictures: int = 8,
    questions: int = 7,
    others: int = 2,
) -> None:
    """Supervised answers to `questions` questions a picture in one packed row; beside them `others` about another scene
    that go astray, and up to as many about that scene as it is told.

    In the first half of the steps boxes are exact: a network this small learns where things are only from figures
    without noise. In the second half the base becomes what it shall be, boxes `slack` too wide.
    """
    model, tail = policy.base.train(), len(policy.processor.tokenizer(f" {A_WORD}{TURN}").input_ids)

    def questions_on(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str, Thing]]:
        kinds = rng.choice(
            ["attribute", "part", "relation"], questions, p=[0.4, 0.1, 0.5]
        )  # the other two never
        chosen = [(str(kind), ask(scene, rng, str(kind))) for kind in kinds]
        return [(kind, *c) for kind, c in chosen if c] or [
            ("attribute", *fair_questions(scene, "attribute")[0])
        ]

    def loss_of(step: int) -> tuple[torch.Tensor, dict]:
        rng, wide = np.random.default_rng([2, step]), slack if step >= steps // 2 else 0.0
        scenes = scenes_from(2 * 10**7 + step * pictures, pictures)
        pairs = [questions_on(scene, rng) for scene in scenes]
        images = [Image.fromarray(scene.image) for scene in scenes]
        # The question stands last in the prompt, so all questions on a picture share everything before it.
        prompts = encode(policy, images, [A_WORD] * pictures)
        prompts = [cut(p, len(p.ids) - tail) for p in prompts]
        groups = [
            [shown_row(policy, *row, s, rng, wide) for row in chosen]
            for s, chosen in zip(scenes, pairs)
        ]
        strangers = scenes_from(3 * 10**7 + step * pictures, pictures)
        for group, scene, other in zip(groups, scenes, strangers):
            group += [astray_row(policy, scene, other, rng, wide) for _ in range(others)]
        told = [text_rows(policy, rng, other, others) for other in strangers]
        alignment = align_words(policy, prompts, scenes)
        rows = [
            [(*x, False) for x in group] + [(*x, True) for x in texts]
            for group, texts in zip(groups, told)
        ]
        logps, _ = logprobs(
            policy, prompts, [[ids for ids, *_ in row] for row in rows]
        )  # [all rows' tokens]
        learnt = torch.cat([mask for row in rows for _, mask, _ in row])
        is_told = torch.cat(
            [torch.full_like(mask, heard) for row in rows for _, mask, heard in row]
        )
        shown, heard = -logps[learnt & ~is_told].mean(), -logps[learnt & is_told].mean()
        figures = {"shown": shown.item(), "told": heard.item(), "words": alignment.item()}
        return shown + 0.5 * heard + 0.3 * alignment, figures

    learn("language", model, policy_optimizers(model), steps, work, loss_of)


# ---------------------------------------------------------------------------------------------------- measure


def held_out(count: int) -> list[Scene]:
    """The first `count` validation scenes."""
    return [make_scene(SPLITS["validation"][0] + i) for i in range(count)]


def measure_sam(folder: str = "tiny", count: int = 200) -> dict:
    """Mean IoU of the tiny SAM's mask with the object on held-out scenes: exact, wide and shared boxes, with points
    and without; under "meant", of its masks with those that the wide boxes mean."""
    segmenter, rng, found = load_segmenter(folder), np.random.default_rng(0), {}
    for scene in held_out(count):
        things = scene.things
        dots = [t.dot for t in things if t.dot]
        shared = [box_around(t, neighbour(t, scene)) for t in things]
        on = [points_on(t.mask, rng, 1, 1) for t in things]
        beside = [p + points_on(neighbour(t, scene).mask, rng, 1, 0) for p, t in zip(on, things)]
        none = [[] for _ in things]
        wide = {
            percent: [wide_box(t.box, rng, percent / 100) for t in things]
            for percent in (10, 20, 40)
        }
        prompts = {
            "true box": (things, [t.box for t in things], none),
            "true box, 1 point": (things, [t.box for t in things], on),
            "dot": (dots, [t.box for t in dots], [[] for _ in dots]),
            "box of two": (things, shared, none),
            "box of two, 1 point": (things, shared, on),
            "box of two, 1 on the thing, 0 on the other": (things, shared, beside),
        }
        prompts |= {
            f"sides {percent} % out": (things, boxes, none) for percent, boxes in wide.items()
        }
        prompts["sides 40 % out, 1 point"] = (things, wide[40], on)
        for name, (wanted, boxes, points) in prompts.items():
            masks = segmenter.masks(scene.image, boxes, points) if wanted else []
            score = lambda truth: [iou(*intersection_union(m, t)) for m, t in zip(masks, truth)]
            found.setdefault(name, []).extend(score([t.mask for t in wanted]))
            if "40 %" in name or "two" in name:
                said = [meant(scene, box, p) for box, p in zip(boxes, points)]
                found.setdefault(f"{name}: meant", []).extend(score(said))
    return {name: round(float(np.mean(values)), 3) for name, values in found.items()}


def about(box, mask: np.ndarray, scene: Scene) -> bool:
    """Whether a box is about the object of this mask: it holds most of its pixels, and fits no other thing better. The
    thing that a dot is on does not count as another."""
    if box is None:
        return False
    x1, y1, x2, y2 = map(round, box)
    others = [box_iou(box, t.box) for t in scene.things if not (t.mask & mask).any()]
    return bool(
        2 * mask[y1:y2, x1:x2].sum() > mask.sum()
        and box_iou(box, tight_box(mask)) >= max(others, default=0)
    )


def measure_policy(policy: Policy, segmenter, count: int = 500, group: int = 4) -> dict:
    """The base on held-out scenes.

    "styles": how often each is drawn without a hint. "sampled", by kind of question: the share of drawn answers whose
    box is `about` the object, their box IoU, and IoU of the mask from any text with a box; "graded": the share of masks
    between 0.2 and 0.8 among answers about the object. "hinted", by style and kind: the share of greedy answers about
    the object, where the style's hint is given; "kept": the share in that style.
    """
    data, all_scenes = load_data("shapes", "validation", count), held_out(count)
    styles, sampled, hinted = [], {}, {style: {} for style in STYLES}
    torch.manual_seed(0)
    for start in range(0, count, 50):
        samples = [data[i] for i in range(start, min(start + 50, count))]
        scenes = all_scenes[start : start + 50]

        def answers(hint: str, group: int, temperature: float) -> list:
            with torch.no_grad():
                prompts = encode(
                    policy, [x.image for x in samples], [x.question + hint for x in samples]
                )
            return generate(policy, prompts, group, 112, temperature=temperature)

        for x, scene, drawn in zip(samples, scenes, answers("", group, 1.0)):
            texts = [answer.text for answer in drawn]
            styles += map(style_of, texts)
            for reward in score_group(segmenter, x, texts, SIZE, lenient=True):
                row = about(reward.answer.lenient_box, x.mask, scene), reward.box_iou, reward.iou
                for kind in (x.kind, "all"):
                    sampled.setdefault(kind, []).append(row)
        for style, how in STYLES.items():
            for x, scene, [answer] in zip(samples, scenes, answers(how.hint, 1, 0.0)):
                right = about(parse(answer.text, SIZE, SIZE).lenient_box, x.mask, scene)
                for kind, value in (
                    (x.kind, right),
                    ("all", right),
                    ("kept", style_of(answer.text) == style),
                ):
                    hinted[style].setdefault(kind, []).append(value)
    share = lambda values: round(float(np.mean(values)), 3)
    found = {
        "styles": {style: share([s == style for s in styles]) for style in (*STYLES, "other")},
        "sampled": {},
    }
    for kind, rows in sampled.items():
        right, overlap, score = np.array(rows, float).T  # [answers] each
        graded = ((score > 0.2) & (score < 0.8))[right == 1]
        row = {
            "about": right,
            "box IoU": overlap,
            "mask IoU": score,
            "graded": graded if len(graded) else 0.0,
        }
        found["sampled"][kind] = {name: share(values) for name, values in row.items()}
    found["hinted"] = {
        style: {kind: share(v) for kind, v in kinds.items()} for style, kinds in hinted.items()
    }
    return found


# ---------------------------------------------------------------------------------------------------- all of it

STEPS = {"sam": 6000, "vision": 2400, "ground": 1500, "language": 4500}  # updates of each stage
SCENES = 1500  # held-out ones that the policy is measured on


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="pretrain.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stages = (*STEPS, "measure")
    parser.add_argument(
        "--stages", default=",".join(stages), help="which to run, by comma, in order (default: all)"
    )
    parser.add_argument(
        "--work", default="runs/pretrain", help="folder for what one stage leaves to the next"
    )
    args = parser.parse(argv)
    chosen, work = args.stages.split(","), Path(args.work)
    if unknown := set(chosen) - set(stages):
        parser.error(f"--stages: {', '.join(sorted(unknown))} is none of {', '.join(stages)}")
    work.mkdir(parents=True, exist_ok=True)
    try:
        for stage in chosen:
            run_stage(stage, work)
        for stage in chosen:  # all is done: the same command begins anew
            (work / f"{stage}.pt").unlink(missing_ok=True)
    except (UserError, OSError) as error:
        exit_with(error, "pretrain.py")


def load_weights(module: torch.nn.Module, file: Path) -> None:
    try:
        module.load_state_dict(load_file(file))
    except (RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{file} does not fit: run the stage that makes it again ({first_line(error)})"
        ) from None


def run_stage(stage: str, work: Path) -> None:
    """One stage, from what the one before left in `work`."""
    if stage == "sam":
        train_sam(STEPS[stage], TINY_SAM / "model.safetensors", work)
    elif stage == "vision":
        train_vision(STEPS[stage], work / "vision.safetensors", work)
    elif stage == "ground":
        policy = new_policy()
        load_weights(policy.base.model.visual, work / "vision.safetensors")
        train_ground(policy, STEPS[stage], work / "ground.safetensors", work)
    elif stage == "language":
        policy = new_policy()
        load_weights(policy.base, work / "ground.safetensors")
        train_language(policy, STEPS[stage], work)
        policy.base.to(torch.bfloat16).save_pretrained(TINY), policy.processor.save_pretrained(TINY)
    else:
        sam, policy = measure_sam(str(TINY_SAM)), load_policy(str(TINY))
        measured = {
            "sam": sam,
            "policy": measure_policy(policy, load_segmenter(str(TINY_SAM)), SCENES),
        }
        MEASURED.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
