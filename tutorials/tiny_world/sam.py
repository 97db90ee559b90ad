"""Stage "sam": a small Segment Anything learns what boxes and points mean in drawn scenes.

The real SAM was trained on a billion masks. This stage replaces that training.
"""

from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from samr1_mini.metrics import box_iou
from samr1_mini.segmenter import random_sam, sam_logits
from samr1_mini.tiny.scenes import SIZE, Scene, Thing
from .answers import wide_box
from .training import DEVICE, learn, save_weights, scenes_from

Points = list[list[int]]  # [[x, y, label], ...], label 1: inside, 0: outside


def things_and_dots(scene: Scene) -> list[Thing]:
    """Return all things of a scene, then all dots."""
    return scene.things + [t.dot for t in scene.things if t.dot]


def box_around(*things: Thing) -> tuple[int, int, int, int]:
    """Return the tight box around all these things."""
    x1, y1, x2, y2 = zip(*(t.box for t in things))
    return min(x1), min(y1), max(x2), max(y2)


def neighbour(thing: Thing, scene: Scene) -> Thing:
    """Return the nearest other thing."""

    def distance(other: Thing) -> float:
        return (other.x - thing.x) ** 2 + (other.y - thing.y) ** 2

    return min([t for t in scene.things if t is not thing], key=distance)


def touches(box, thing: Thing) -> bool:
    """Return True if a box and a thing's box overlap."""
    x1, y1, x2, y2 = box
    left, top, right, bottom = thing.box
    return left < x2 and right > x1 and top < y2 and bottom > y1


def agrees(group: tuple[Thing, ...], points: Points) -> bool:
    """Return True if a group holds all points labelled 1 and none labelled 0."""
    for x, y, label in points:
        inside = any(thing.mask[y, x] for thing in group)
        if inside != bool(label):
            return False
    return True


def meant(scene: Scene, box, points: Points) -> np.ndarray:
    """Return the mask that a box and points stand for, bool [SIZE, SIZE].

    The candidates are the dots, the things, and groups of up to four things.
    Candidates that disagree with the points drop out. If all disagree, the points are ignored.
    Of the others the best has the highest IoU of its tight box and the box.
    So a box that is too wide also means the neighbours.
    """
    inside = [thing for thing in scene.things if touches(box, thing)]
    groups = []
    for count in range(1, 5):
        groups += combinations(inside or scene.things, count)
    groups += [(thing.dot,) for thing in scene.things if thing.dot]
    allowed = [group for group in groups if agrees(group, points)]
    if not allowed:
        return meant(scene, box, [])
    best = max(allowed, key=lambda group: box_iou(box, box_around(*group)))
    return np.logical_or.reduce([thing.mask for thing in best])


def points_on(mask: np.ndarray, rng: np.random.Generator, count: int, label: int) -> Points:
    """Return `count` random points [[x, y, label], ...] on a mask, or none if it is empty."""
    ys, xs = np.where(mask)
    if len(ys) == 0:
        return []
    chosen = rng.integers(len(ys), size=count)
    return [[int(xs[i]), int(ys[i]), label] for i in chosen]


def sam_prompt(
    thing: Thing, scene: Scene, rng: np.random.Generator, count: int
) -> tuple[list[float], Points]:
    """Return a box and `count` points for a thing, as more or less careful users give them.

    Half of the boxes are nearly right. The others are up to 0.6 too wide on each side.
    A third of the boxes with points also hold a neighbour, and the points labelled 0 lie on it.
    Otherwise the points labelled 0 lie beside the thing.
    """
    negative = 0
    if count:
        negative = int(rng.integers(0, count))
    if count and rng.random() < 0.33:
        other = neighbour(thing, scene)
        slack = rng.uniform(0, 0.08)
        box = wide_box(box_around(thing, other), rng, slack)
        off = other.mask & ~thing.mask
    else:
        widest = 0.08 if rng.random() < 0.5 else 0.6
        slack = rng.uniform(0, widest)
        box = wide_box(thing.box, rng, slack)
        x1, y1, x2, y2 = (int(v) for v in box)
        off = np.zeros_like(thing.mask)
        off[y1:y2, x1:x2] = ~thing.mask[y1:y2, x1:x2]
    points = points_on(thing.mask, rng, count - negative, 1)
    points += points_on(off, rng, negative, 0)
    return box, points


def point_tensors(labelled: list[Points], count: int) -> tuple:
    """Return points [N, count, 2] and labels [N, count], or (None, None) if `count` is 0.

    Missing points get the label -1. SAM's encoder moves points to the middle of their pixel.
    """
    if count == 0:
        return None, None
    padded = []
    for points in labelled:
        missing = count - len(points)
        padded.append(points + [[0, 0, -1]] * missing)
    padded = torch.tensor(padded, dtype=torch.float32, device=DEVICE)  # [N, count, 3]
    return padded[..., :2], padded[..., 2]


def predict(sam, embedding: torch.Tensor, scene: Scene, rng: np.random.Generator) -> tuple:
    """Prompt SAM for each thing and dot of one scene, N in all.

    Half of the scenes get boxes alone. The others get boxes and one to four points.
    Returns logits [N, 3, H, W], predicted IoUs [N, 3] and the true masks, bool [N, H, W].
    """
    count = 0
    if rng.random() < 0.5:
        count = int(rng.integers(1, 5))
    prompts = [sam_prompt(thing, scene, rng, count) for thing in things_and_dots(scene)]
    truth = np.stack([meant(scene, box, points) for box, points in prompts])
    boxes = torch.tensor([box for box, _ in prompts], dtype=torch.float32, device=DEVICE)
    points, labels = point_tensors([points for _, points in prompts], count)
    low, quality = sam_logits(sam, embedding[None], points, labels, boxes)  # [N, 3, h, w], [N, 3]
    logits = sam.postprocess_masks(low, (SIZE, SIZE), (SIZE, SIZE))
    return logits, quality, torch.from_numpy(truth)


def sam_loss(logits: torch.Tensor, quality: torch.Tensor, truth: torch.Tensor) -> tuple:
    """Return SAM's loss and the mean IoU of the masks with the highest predicted IoU.

    logits [N, 3, H, W], quality [N, 3], truth [N, 3, H, W] of 0.0 and 1.0. As in SAM, only the
    best of the three masks learns fully, and the quality head learns the IoU of all three.
    """
    probability = logits.sigmoid()
    both = 2 * (probability * truth).sum((2, 3)) + 1
    either = probability.sum((2, 3)) + truth.sum((2, 3)) + 1
    dice = 1 - both / either
    bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((2, 3))
    loss_mask = dice + 10 * bce  # [N, 3]
    with torch.no_grad():
        drawn, wanted = logits > 0, truth > 0.5
        union = (drawn | wanted).sum((2, 3)).clamp(min=1)
        overlap = (drawn & wanted).sum((2, 3)) / union
    best = loss_mask.min(1).values.mean()
    loss = best + 0.05 * loss_mask.mean() + F.mse_loss(quality, overlap)
    likeliest = quality.argmax(1, keepdim=True)
    return loss, overlap.gather(1, likeliest).mean().item()


def train_sam(steps: int, out: Path, work: Path, pictures: int = 12) -> None:
    """Train the tiny SAM from random weights to draw the masks of `meant`. Save it to `out`.

    SAM has to know this before GRPO starts, because its mask is the reward.
    """
    torch.manual_seed(0)
    sam = random_sam("tiny").train().to(DEVICE)

    def loss_of(step: int) -> tuple[torch.Tensor, dict]:
        rng = np.random.default_rng([0, step])
        scenes = scenes_from(step * pictures, pictures)
        images = [torch.from_numpy(s.image).permute(2, 0, 1).float() for s in scenes]
        images = torch.stack(images).to(DEVICE)  # [B, 3, H, W]
        embeddings = sam.image_encoder(sam.preprocess(images))  # [B, C, h, w]
        found = [predict(sam, e, scene, rng) for e, scene in zip(embeddings, scenes)]
        logits, quality, truth = (torch.cat(part) for part in zip(*found))
        truth = truth.to(DEVICE).float()[:, None].expand_as(logits)
        loss, chosen = sam_loss(logits, quality, truth)
        return loss, {"IoU": chosen, "loss": loss.item()}

    optimizer = torch.optim.AdamW(sam.parameters(), lr=1e-3, weight_decay=0.01)
    learn("sam", sam, [optimizer], steps, work, loss_of)
    save_weights(sam.half(), out)
