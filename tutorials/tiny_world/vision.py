"""Stage "vision": the vision tower alone learns the content of each picture token.

Qwen's vision tower was pretrained on pictures. This stage replaces that training.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from samr1_mini.tiny.scenes import COLOURS, SHAPES, SIZE, Scene, Thing
from .answers import middle
from .build import build_policy, build_processor
from .training import DEVICE, learn, save_weights, scenes_from

CELL = 14  # pixels a side of one merged picture token
CELLS = SIZE // CELL  # picture tokens a side
PLACES = (
    6  # coordinates that are learnt of each thing: x1, y1, x2, y2 of its box, its middle's x, y
)
# Outputs of the head: thing or not, colour, shape, dot, and a bin a pixel for each coordinate.
PARTS = [1, len(COLOURS), len(SHAPES), 1 + len(COLOURS), PLACES * (SIZE + 1)]


def facts(thing: Thing) -> list[int]:
    """Return [1, colour, shape, dot's colour, 6 coordinates] of a thing. Dot 0 means no dot."""
    colours = list(COLOURS)
    dot = 0
    if thing.dot:
        dot = 1 + colours.index(thing.dot.colour)
    colour = colours.index(thing.colour)
    return [1, colour, SHAPES.index(thing.shape), dot, *thing.box, *middle(thing)]


def cell_targets(scene: Scene) -> np.ndarray:
    """Return the `facts` of the most visible thing under each picture token.

    The result is int [CELLS * CELLS, 4 + PLACES], row by row, and 0 where there is no thing.
    """
    targets = np.zeros((CELLS, CELLS, 4 + PLACES), np.int64)
    most = np.full((CELLS, CELLS), 15)  # pixels: a thing with fewer pixels is ignored
    for thing in scene.things:
        cover = thing.mask.reshape(CELLS, CELL, CELLS, CELL).sum((1, 3))
        wins = cover > most
        most[wins] = cover[wins]
        targets[wins] = facts(thing)
    return targets.reshape(-1, 4 + PLACES)


def batch_targets(scenes: list[Scene]) -> torch.Tensor:
    """Return the targets of all picture tokens, int [B * CELLS * CELLS, 4 + PLACES]."""
    targets = np.concatenate([cell_targets(scene) for scene in scenes])
    return torch.from_numpy(targets).to(DEVICE)


def soft_bins(position: torch.Tensor) -> torch.Tensor:
    """Return positions in pixels [...] as probabilities of bins [..., SIZE + 1].

    The probabilities are a bell of 1.5 px around the true bin.
    """
    bins = torch.arange(SIZE + 1, device=position.device)
    squared = (bins - position[..., None]) ** 2
    return (-squared / (2 * 1.5**2)).softmax(-1)


def vision_loss(head, features: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Return the loss and figures of the head's predictions.

    features [B * 64, width], target int [B * 64, 4 + PLACES]. A token without a thing learns only
    that there is none. Coordinates are a choice among pixel bins.
    """
    on = target[:, 0] == 1
    there = head.weight[:1] @ features.T + head.bias[:1, None]  # [1, B * 64]
    _, colour, shape, dot, places = head(features[on]).split(PARTS, -1)
    places = places.view(-1, PLACES, SIZE + 1)
    wanted = target[on]
    loss = F.binary_cross_entropy_with_logits(there[0], target[:, 0].float())
    off = (places.argmax(-1) - wanted[:, 4:]).abs()
    figures = {"px": off.float().mean().item()}
    choices = {"colour": colour, "shape": shape, "dot": dot}
    for column, (name, logits) in enumerate(choices.items(), 1):
        loss = loss + F.cross_entropy(logits, wanted[:, column])
        right = logits.argmax(-1) == wanted[:, column]
        figures[name] = right.float().mean().item()
    bins = soft_bins(wanted[:, 4:])
    loss = loss + F.cross_entropy(places.flatten(0, 1), bins.flatten(0, 1))
    return loss, figures


def train_vision(steps: int, out: Path, work: Path, pictures: int = 24) -> None:
    """Train the vision tower to name each picture token's thing and coordinates. Save it to `out`.

    A supervised tower spares the language model from learning to see and to speak at once.
    """
    torch.manual_seed(1)
    processor = build_processor(["nothing to read yet"])
    tower = build_policy(processor.tokenizer).model.visual.train().to(DEVICE)
    head = torch.nn.Linear(tower.config.out_hidden_size, sum(PARTS)).to(DEVICE)  # not saved

    def loss_of(step: int) -> tuple[torch.Tensor, dict]:
        scenes = scenes_from(10**6 + step * pictures, pictures)
        images = [scene.image for scene in scenes]
        inputs = processor.image_processor(images, return_tensors="pt").to(DEVICE)
        seen = tower(inputs.pixel_values, grid_thw=inputs.image_grid_thw)
        return vision_loss(head, seen.pooler_output, batch_targets(scenes))

    both = torch.nn.ModuleList([tower, head])
    optimizer = torch.optim.AdamW(both.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.98))
    learn("vision", both, [optimizer], steps, work, loss_of)
    save_weights(tower, out)
