"""Stage "ground": the whole policy learns to find things in a picture.

Also the policy itself: its random weights, its optimizers, and a loss that later stages share.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from samr1_mini.policy import Policy, Prompt, encode, logprobs
from samr1_mini.tiny.scenes import COLOURS, SHAPES, SIZE, Scene, Thing
from .answers import called, corpus, in_order, middle
from .build import build_policy, build_processor
from .sam import things_and_dots
from .training import DEVICE, learn, save_weights, scenes_from
from .vision import PLACES, batch_targets


def number_ids(tokenizer) -> list[int]:
    """Return the tokens of the numbers 0 to SIZE."""
    return [tokenizer.convert_tokens_to_ids(str(n)) for n in range(SIZE + 1)]


def line_up_numbers(model, tokenizer, waves: int = 16) -> None:
    """Put the numbers on a smooth curve in the embeddings and in the head.

    Neighbouring numbers then have similar vectors, and a lesson about 34 also holds for 35.
    """
    ids = torch.tensor(number_ids(tokenizer), device=DEVICE)
    wave = torch.arange(1, waves + 1, device=DEVICE)
    position = torch.arange(SIZE + 1, device=DEVICE)[:, None] / SIZE
    curve = torch.cos(position * torch.pi * wave) / wave.sqrt()
    curve = 0.5 * F.normalize(curve, dim=1)  # [SIZE + 1, waves]
    for table in (model.get_input_embeddings().weight, model.lm_head.weight):
        directions = torch.randn(table.shape[1], waves, device=DEVICE)
        basis = torch.linalg.qr(directions).Q
        table.data[ids] = curve @ basis.T


def new_policy() -> Policy:
    """Return the policy with random weights and a tokenizer for all texts of the tiny world."""
    torch.manual_seed(2)
    processor = build_processor(corpus())
    model = build_policy(processor.tokenizer).to(DEVICE)
    line_up_numbers(model, processor.tokenizer)
    return Policy(model, processor)


def policy_optimizers(model) -> list:
    """Return Muon for the language model's matrices and AdamW for all other weights.

    Muon moves a matrix equally far in all directions, also in rare ones.
    It needs fewer steps than AdamW alone.
    """
    matrices, vectors = [], []
    for name, weight in model.named_parameters():
        if ".visual." in name or "lm_head" in name:
            continue
        if weight.ndim == 2 and "embed" not in name:
            matrices.append(weight)
        elif weight.ndim == 1 or "embed" in name:
            vectors.append(weight)
    # The head learns faster. Otherwise first words that always stand in the same place get nearly
    # the same row. Adapters below the head then cannot teach the choice between "<" and "[".
    groups = [
        {"params": vectors, "lr": 1.5e-3},
        {"params": list(model.model.visual.parameters()), "lr": 2e-4},
        {"params": list(model.lm_head.parameters()), "lr": 5e-3},
    ]
    adamw = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98))
    muon = torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


def cut(prompt: Prompt, length: int) -> Prompt:
    """Return the first `length` tokens of a prompt."""
    return Prompt(
        prompt.ids[:length],
        prompt.embeds[:length],
        prompt.positions[:, :length],
        prompt.picture[:length],
    )


def word_embeddings(policy: Policy, words: list[str]) -> torch.Tensor:
    """Return the embeddings [N, D] of the words' first tokens."""
    tokenizer = policy.processor.tokenizer
    table = policy.base.get_input_embeddings().weight
    ids = [tokenizer(f" {word}").input_ids[0] for word in words]
    return table[torch.tensor(ids, device=table.device)]


def align_words(policy: Policy, prompts: list[Prompt], scenes: list[Scene]) -> torch.Tensor:
    """Return a loss that draws picture tokens to the words of their colour and their shape.

    Image-text pretraining does the same. Without this loss, half an hour taught so small a model
    the word "leftmost", but not the place of "the green star".
    """
    features = torch.cat([p.embeds[p.picture] for p in prompts])  # [B * 64, D]
    target = batch_targets(scenes)
    on = target[:, 0] == 1
    colour = features[on] @ word_embeddings(policy, list(COLOURS)).T
    shape = features[on] @ word_embeddings(policy, list(SHAPES)).T
    loss = F.cross_entropy(colour, target[on, 1])
    return loss + F.cross_entropy(shape, target[on, 2])


def shuffled(scene: Scene, rng: np.random.Generator) -> list[Thing]:
    """Return all things and dots, half of the time from left to right, otherwise at random."""
    things = things_and_dots(scene)
    if rng.random() < 0.5:
        return in_order(things, "")
    return list(rng.permutation(things))


def name_and_numbers(thing: Thing, scene: Scene, tokenizer, numbers: list[int]) -> tuple:
    """Return the tokens of a thing's name, and of its box and its middle."""
    name = tokenizer(f" {called(thing, scene)}").input_ids
    return name, [numbers[value] for value in (*thing.box, *middle(thing))]


def train_ground(policy: Policy, steps: int, out: Path, work: Path, pictures: int = 16) -> None:
    """Train the policy to list the things of a picture. Save its weights to `out`.

    Each name is followed at once by the numbers of its box and its middle. In this form four
    layers learn within some hundred steps to find a thing and to read off its place.
    In sentences, with words between name and numbers, a thousand steps taught neither.
    """
    tokenizer = policy.processor.tokenizer
    model = policy.base.train()
    numbers = number_ids(tokenizer)

    def loss_of(step: int) -> tuple[torch.Tensor, dict]:
        rng = np.random.default_rng([3, step])
        scenes = scenes_from(5 * 10**7 + step * pictures, pictures)
        images = [Image.fromarray(scene.image) for scene in scenes]
        prompts = encode(policy, images, ["?"] * pictures)
        # The prompt ends with the picture.
        prompts = [cut(p, int(p.picture.nonzero()[-1]) + 2) for p in prompts]
        rows, is_number = [], []
        for scene in scenes:
            row = []
            for thing in shuffled(scene, rng):
                name, places = name_and_numbers(thing, scene, tokenizer, numbers)
                row += name + places
                is_number += [False] * len(name) + [True] * PLACES
            rows.append([torch.tensor(row, device=DEVICE)])
        alignment = align_words(policy, prompts, scenes)
        logps, _ = logprobs(policy, prompts, rows)
        is_number = torch.tensor(is_number, device=DEVICE)
        by_place = -logps[is_number].detach().view(-1, PLACES).mean(0)
        figures = {"loss": -logps.mean().item()}
        for name, column in (("x1", 0), ("y1", 1), ("x", 4)):
            figures[name] = by_place[column].item()
        return -logps.mean() + 0.3 * alignment, figures

    learn("ground", model, policy_optimizers(model), steps, work, loss_of)
    save_weights(model, out)
