"""Teach the tiny policy to answer with lists: `python -m tutorials.tiny_world.warm_start`.

The base model of the package has never written a list of objects. With --objects several, no
sampled answer would be in the format, and GRPO would have nothing to reward. This command trains
the language model and its head on questions about drawn pictures for a few minutes. The vision
tower stays as it is. The package has the result: `--policy tiny-several`. The command writes a new
policy folder:

    python train.py --preset tiny --policy runs/tiny-several --objects several

On purpose, the boxes in its answers are too wide, and some answers lack an object. There are no
questions of the kinds "indirect" and "combined". So GRPO can still improve the policy. The command
saves its state every 100 updates. An interrupted command continues from there.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from samr1_mini.config import Parser, UserError, exit_with
from samr1_mini.policy import Policy, load_base, logprobs
from samr1_mini.prompt import SEVERAL_PROMPT
from samr1_mini.tiny.scenes import Scene, Thing, ask
from .answers import called, in_order, listed, loose_points, wide_box
from .ground import policy_optimizers
from .language import TURN, Written, prompts_before_question, written
from .training import DEVICE, learn, scenes_from

STEPS = 160  # updates
PICTURES = 4  # in one update
QUESTIONS = 5  # about a picture, of different kinds
# "none" is here twice, because the base model hardly ever says that nothing is there.
KINDS = ("all", "two", "dots", "none", "none", "attribute", "part", "relation")
STYLES = {"short": 0.5, "names": 0.3, "places": 0.2}  # shares of the thoughts, see answers.py
SLACK = 0.25  # a box grows on each side by this share of its size
FORGETS = 0.25  # of the answers that should list several objects, this share leaves one out
FIRST_SCENE = 2 * 10**8  # no other stage of pretraining uses scenes with such large numbers


def thought(things: list[Thing], scene: Scene, style: str, question: str) -> str:
    """Return the thought of an answer that lists these things."""
    names = ", the ".join(called(thing, scene) for thing in things)
    nothing = "Nothing fits."
    if style == "short":
        fit = "fits" if len(things) == 1 else "fit"
        conclusion = f"The {names} {fit} best." if things else nothing
        return f"<think>{conclusion}</think>"
    listing = listed(scene, style, question)  # it ends with "It is the"
    if things:
        return f"{listing} {names}.</think>"
    return f"{listing.removesuffix('It is the')}{nothing}</think>"


def list_answer(
    things: list[Thing], scene: Scene, rng: np.random.Generator, style: str, question: str
) -> str:
    """Return an answer with one entry for each thing, from left to right.

    Each box is too wide by SLACK. Each entry has one point, on the thing.
    """
    things = in_order(things, "")
    entries = []
    for thing in things:
        box = [round(side) for side in wide_box(thing.box, rng, SLACK)]
        points = [p for p in loose_points(thing, rng, SLACK) if p[2] == 1]
        entries.append(f'{{"bbox": {box}, "points": {points}}}')
    return f"{thought(things, scene, style, question)}<answer>[{', '.join(entries)}]</answer>"


def some_forgotten(things: list[Thing], rng: np.random.Generator) -> list[Thing]:
    """Return the things that an answer lists. An answer may leave out one of several things."""
    if len(things) < 2 or rng.random() >= FORGETS:
        return things
    missing = rng.integers(len(things))
    return [thing for i, thing in enumerate(things) if i != missing]


def draw_style(things: list[Thing], rng: np.random.Generator) -> str:
    """Choose a random style. With several objects, the style "places" would be too long."""
    style = str(rng.choice(list(STYLES), p=list(STYLES.values())))
    if style == "places" and len(things) > 1:
        return "names"
    return style


def rows_about(policy: Policy, scene: Scene, rng: np.random.Generator) -> list[Written]:
    """Return up to QUESTIONS questions about a scene with their answers. The answers are learnt."""
    rows = []
    for kind in rng.permutation(KINDS):
        found = ask(scene, rng, str(kind))
        if found and len(rows) < QUESTIONS:
            question, things = found
            answered = some_forgotten(things, rng)
            style = draw_style(things, rng)
            answer = list_answer(answered, scene, rng, style, question)
            texts = (f" {question}{TURN}", False), (f"{answer}<|im_end|>", True)
            rows.append(written(policy, *texts))
    return rows


def warm_start(policy: Policy, steps: int, seed: int, work: Path) -> None:
    """Train language model and head of a policy to answer with lists.

    All questions about a picture are in one packed row and share the picture's tokens.
    """
    model = policy.base.train()
    model.model.visual.requires_grad_(False)

    def loss_of(step: int) -> tuple[torch.Tensor, dict]:
        rng = np.random.default_rng([4, seed, step])
        scenes = scenes_from(FIRST_SCENE + (seed * steps + step) * PICTURES, PICTURES)
        prompts = prompts_before_question(policy, scenes)
        groups = [rows_about(policy, scene, rng) for scene in scenes]
        logps, _ = logprobs(policy, prompts, [[row.ids for row in rows] for rows in groups])
        learnt = torch.cat([row.learnt for rows in groups for row in rows])
        loss = -logps[learnt].mean()
        return loss, {"loss": loss.item()}

    learn(f"warm-start-{seed}", model, policy_optimizers(model), steps, work, loss_of)


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="warm_start.py", description=__doc__, formatter_class=raw)
    parser.add_argument("--out", default="runs/tiny-several", help="folder for the policy")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"updates (default {STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes and answers")
    args = parser.parse(argv)
    if args.steps < 1 or args.seed < 0:
        parser.error("--steps must be 1 or more, and --seed 0 or more")
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        base, processor = load_base("tiny", "fp32", DEVICE)
        policy = Policy(base, processor, prompt=SEVERAL_PROMPT)
        warm_start(policy, args.steps, args.seed, out)
        base.to(torch.bfloat16).save_pretrained(out)
        processor.save_pretrained(out)
        (out / f"warm-start-{args.seed}.pt").unlink(missing_ok=True)
    except (UserError, OSError) as error:
        exit_with(error, "warm_start.py")


if __name__ == "__main__":
    main()
