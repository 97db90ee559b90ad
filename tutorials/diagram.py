"""Draw the diagram and the curve of the README: `python tutorials/diagram.py`.

loop.png shows one group of answers, from the question to the update. The answers, masks, rewards
and advantages are those of results/loop.json. The base model of the tiny preset sampled them.

iou.png shows the mean IoU of the sampled answers in the committed runs.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from pycocotools import mask as coco

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # Python searches only the folder of the script

from samr1_mini.plots import smooth
from samr1_mini.tiny.shapes import Shapes

RESULTS = ROOT / "tutorials" / "results"
WIDTH, HEIGHT = 12.4, 6.6  # inches; one unit of the drawing is an inch
ROWS = [4.55, 3.45, 2.35, 1.25]  # the middle of each answer's row
SIDE = 0.96  # of a small picture

BLUE, GREEN, RED = "#0072b2", "#00795a", "#c2410c"
INK, GREY, PALE = "#1b1f24", "#57606a", "#f3f5f8"

# The columns: the middle, the heading and the function's name
COLUMNS = [
    (3.98, "G answers", "decoding.py\ngenerate"),
    (6.46, "box and points", "reward.py\nread_answer"),
    (7.86, "SAM's mask", "segmenter.py\nmasks"),
    (9.36, "IoU and reward", "reward.py\nreward_terms"),
    (11.10, "advantage", "grpo.py\nadvantages"),
]


def read_group() -> tuple:
    """Return the question's sample and the group of loop.json."""
    group = json.loads((RESULTS / "loop.json").read_text(encoding="utf-8"))
    index = int(group["id"].removeprefix("shapes-"))
    return Shapes("train", index + 1)[index], group


def card(axes, left: float, bottom: float, width: float, height: float, face: str = PALE) -> None:
    """Draw a rounded rectangle behind other things."""
    shape = FancyBboxPatch(
        (left, bottom),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.09",
        facecolor=face,
        edgecolor="#d0d7de",
        linewidth=1,
        zorder=0,
    )
    axes.add_patch(shape)


def write(axes, x: float, y: float, text: str, **style) -> None:
    """Write a text with its middle at (x, y)."""
    style = {"ha": "center", "va": "center", "fontsize": 9.5, "color": INK} | style
    axes.text(x, y, text, **style)


def arrow(axes, points: list[tuple[float, float]]) -> None:
    """Draw a line through the points, with an arrowhead at the last one."""
    xs, ys = zip(*points[:-1])
    axes.plot(xs, ys, color=GREY, linewidth=1.6, solid_joinstyle="round")
    style = {"arrowstyle": "-|>", "color": GREY, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=style)


def picture(axes, image: np.ndarray, x: float, y: float, side: float = SIDE) -> None:
    """Draw an image [H, W, 3] with its middle at (x, y)."""
    half = side / 2
    axes.imshow(image, extent=(x - half, x + half, y - half, y + half), zorder=2)
    frame = Rectangle((x - half, y - half), side, side, fill=False, edgecolor=INK, linewidth=0.8)
    frame.set_zorder(3)
    axes.add_patch(frame)


def draw_prompt(axes, answer: dict, size: int, x: float, y: float) -> None:
    """Draw the box and the points of an answer on its small picture at (x, y)."""
    scale = SIDE / size
    left, top = x - SIDE / 2, y + SIDE / 2
    x1, y1, x2, y2 = answer["box"]
    corner = (left + x1 * scale, top - y2 * scale)
    sides = ((x2 - x1) * scale, (y2 - y1) * scale)
    for colour, line in (("white", 3), (BLUE, 1.6)):
        box = Rectangle(corner, *sides, fill=False, edgecolor=colour, linewidth=line, zorder=4)
        axes.add_patch(box)
    for px, py, label in answer["points"]:
        marker = "o" if label == 1 else "X"
        colour = GREEN if label == 1 else RED
        place = (left + px * scale, top - py * scale)
        axes.scatter(*place, s=34, marker=marker, c=colour, edgecolors="white", zorder=5)


def darkened(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the image with everything outside the mask dark."""
    return np.where(mask[..., None], image, image * 0.25).astype(np.uint8)


def draw_answer(axes, image: np.ndarray, answer: dict, y: float) -> None:
    """Draw one row: the text, the box, SAM's mask, the reward and the advantage."""
    text_x, box_x, mask_x, reward_x, advantage_x = [column[0] for column in COLUMNS]
    card(axes, 2.5, y - 0.52, 9.7, 1.04)
    text = answer["text"].replace("<answer>", "\n<answer>").replace(', "points"', ',\n "points"')
    write(axes, 2.6, y, text, ha="left", fontsize=7.6, family="monospace", linespacing=1.5)
    if answer["mask"] is None:
        write(axes, box_x, y, "no JSON answer", color=GREY)
        write(axes, mask_x, y, "no mask", color=GREY)
    else:
        picture(axes, image, box_x, y)
        draw_prompt(axes, answer, len(image), box_x, y)
        picture(axes, darkened(image, coco.decode(answer["mask"]) > 0), mask_x, y)
    write(axes, reward_x, y + 0.28, f"IoU {answer['iou']:.2f}: accuracy {answer['accuracy']:g}")
    formats = f"{answer['reasoning_format']:g} + {answer['segmentation_format']:g}"
    write(axes, reward_x, y, f"two formats: {formats}")
    write(axes, reward_x, y - 0.28, f"reward {answer['reward']:g}", fontweight="bold")
    advantage = answer["advantage"]
    colour = GREEN if advantage > 0 else RED
    length = advantage * 0.42
    axes.add_patch(Rectangle((advantage_x, y - 0.14), length, 0.28, facecolor=colour, zorder=2))
    axes.plot([advantage_x, advantage_x], [y - 0.3, y + 0.3], color=GREY, linewidth=1, zorder=3)
    side = -0.34 if advantage > 0 else 0.34
    write(axes, advantage_x + side, y, f"{advantage:+.2f}", color=colour, fontweight="bold")


def draw_question(axes, sample, image: np.ndarray) -> None:
    """Draw the question, its picture, the policy and the true mask at the left."""
    card(axes, 0.2, 3.05, 1.9, 2.94)
    write(axes, 1.15, 5.78, "question", fontweight="bold", fontsize=10.5)
    write(axes, 1.15, 5.52, "policy.py: encode", family="monospace", fontsize=7.6, color=BLUE)
    picture(axes, image, 1.15, 4.5, 1.6)
    write(axes, 1.15, 3.38, f'"{sample.question}"', style="italic")
    card(axes, 0.2, 0.73, 1.9, 1.9, "#e8f1fa")
    write(axes, 1.15, 2.36, "policy", fontweight="bold", fontsize=10.5)
    write(axes, 1.15, 1.68, "Qwen2.5-VL\nfrozen, 4 bits\n+ LoRA adapter", linespacing=1.5)
    write(axes, 1.15, 1.0, "policy.py: logprobs", family="monospace", fontsize=7.6, color=BLUE)


def draw_loop(path: Path) -> None:
    """Write the diagram as a PNG file."""
    sample, group = read_group()
    image = np.asarray(sample.image)
    figure = Figure(figsize=(WIDTH, HEIGHT), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    draw_question(axes, sample, image)
    for x, heading, function in COLUMNS:
        write(axes, x, 5.78, heading, fontweight="bold", fontsize=10.5)
        write(axes, x, 5.4, function, family="monospace", fontsize=7.6, color=BLUE)
    for answer, y in zip(group["answers"], ROWS):
        draw_answer(axes, image, answer, y)
    arrow(axes, [(1.15, 3.05), (1.15, 2.63)])
    arrow(axes, [(2.1, 1.68), (2.3, 1.68), (2.3, 2.9), (2.5, 2.9)])
    arrow(axes, [(11.10, 0.73), (11.10, 0.34), (1.15, 0.34), (1.15, 0.73)])
    label = "update of the adapter: gradient of eq. (4)"
    write(axes, 5.2, 0.34, label, fontweight="bold", fontsize=10.5, backgroundcolor="white")
    function = "grpo.py: grpo_loss, update"
    style = {"family": "monospace", "fontsize": 7.6, "color": BLUE, "backgroundcolor": "white"}
    write(axes, 8.4, 0.34, function, **style)
    title = f"One group of GRPO in SAM-R1, here with G = {group['group']} answers"
    write(axes, WIDTH / 2, 6.3, title, fontweight="bold", fontsize=13)
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(0, HEIGHT)
    figure.savefig(path, dpi=100)


def read_iou(run: str) -> np.ndarray:
    """Return the mean IoU of the sampled answers of each step of a committed run."""
    lines = (RESULTS / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return np.array([json.loads(line)["iou"] for line in lines])


def draw_curve(path: Path) -> None:
    """Write the curve of the committed runs as a PNG file."""
    figure = Figure(figsize=(8, 3.4), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    runs = np.array([read_iou(f"seed{seed}") for seed in range(5)])  # [seeds, steps]
    steps = np.arange(1, runs.shape[1] + 1)
    for run in runs:
        axes.plot(steps, smooth(run), color=BLUE, alpha=0.35, linewidth=1)
    axes.plot(steps, smooth(runs.mean(0)), color=BLUE, linewidth=2.4)
    control = smooth(read_iou("seed0-no-accuracy"))
    axes.plot(steps, control, color=RED, linewidth=2.4)
    style = {"fontsize": 10, "fontweight": "bold", "ha": "right"}
    axes.text(steps[-1], 0.78, "reward with SAM's IoU: mean of five seeds", color=BLUE, **style)
    axes.text(steps[-1], 0.24, "reward for the format alone: one seed", color=RED, **style)
    axes.set_xlabel("step (16 questions, 8 answers each)")
    axes.set_ylabel("mean IoU of sampled answers")
    axes.set_ylim(0, 0.9)
    axes.set_xlim(0, steps[-1] + 2)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: results)")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    draw_loop(folder / "loop.png")
    draw_curve(folder / "iou.png")
    print(f"loop.png and iou.png are in {folder}")


if __name__ == "__main__":
    main()
