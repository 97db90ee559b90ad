"""Draw answers on their pictures, and the curves of a run.

The figures do not use pyplot. A process has only one pyplot backend, and in a notebook the user
chooses this backend.
"""

import itertools
import math
import textwrap
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure

from .columns import COLUMNS, reward_columns
from .config import option

# Questions and answers can be in any script. matplotlib's own font, DejaVu Sans, has Latin, Greek,
# Cyrillic and Arabic letters. The other fonts are used for other letters, if they are installed.
FAMILIES = [
    name
    for name in (
        "DejaVu Sans",
        "Noto Sans CJK SC",
        "Noto Sans CJK JP",
        "Source Han Sans SC",
        "WenQuanYi Micro Hei",
        "WenQuanYi Zen Hei",
        "Droid Sans Fallback",
        "Microsoft YaHei",
        "SimHei",
        "PingFang SC",
        "Hiragino Sans GB",
        "Arial Unicode MS",
        "Noto Sans",
        "Noto Sans Devanagari",
        "Noto Sans Thai",
        "Noto Emoji",
        "Symbola",
    )
    if name in font_manager.get_font_names()
]

# Okabe and Ito's colours
BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
PINK = "#CC79A7"
BLACK = "#000000"

LEGEND = {"fontsize": 8, "framealpha": 0.6}

# ------------------------------------------------------------------------------------ answers


def legible(text: str, width: int, lines: int = 99) -> str:
    """Wrap a text into at most `lines` lines of `width` characters.

    A longer text is cut off and ends in "…". A Chinese, Japanese or Korean character counts as two.
    If no font has a character, its code is written instead, such as ⟨U+5DE6⟩.
    """
    fonts = [font_manager.get_font(font_manager.findfont(name)) for name in FAMILIES]
    shown = ""
    for character in text:
        has_glyph = any(font.get_char_index(ord(character)) for font in fonts)
        if character.isspace() or (character.isprintable() and has_glyph):
            shown += character
            if unicodedata.east_asian_width(character) in "WF":
                shown += "\0"  # textwrap counts this as the second half of a wide character
        else:
            shown += f"⟨U+{ord(character):04X}⟩"
    wrapped = textwrap.wrap(shown, width, max_lines=lines, placeholder=" …")
    return "\n".join(wrapped).replace("\0", "")


def draw_outline(axes, area: np.ndarray, colour: str, width: float, style: str = "-") -> None:
    """Draw the outline of a mask [H, W]. An empty mask and a full mask have no outline."""
    if min(area.shape) < 2:  # a contour needs two rows and two columns
        return
    if area.any() and not area.all():
        axes.contour(area, [0.5], colors=colour, linewidths=width, linestyles=style)


def draw_object(axes, one, sx: float, sy: float) -> None:
    """Draw the box and the points of one object (a reward.Object), scaled by sx and sy."""
    x1, y1, x2, y2 = one.box
    xs = np.array([x1, x2, x2, x1, x1]) * sx - 0.5
    ys = np.array([y1, y1, y2, y2, y1]) * sy - 0.5
    for colour, width in (("white", 3.2), (BLUE, 1.6)):
        axes.plot(xs, ys, color=colour, lw=width)
    for x, y, label in one.points:
        marker, colour = ("o", GREEN) if label else ("X", PINK)
        axes.plot(x * sx, y * sy, marker, color=colour, mec="white", ms=7)


def draw_answer(axes, panel, size: int) -> None:
    """Draw one evaluated answer (an evaluation.Panel) on its picture.

    The answer's coordinates refer to a square picture of `size` x `size`. The true mask has a
    dashed outline. SAM's mask has an orange outline, and the picture is darker outside this mask. A
    positive point is a dot. A negative point is a cross.
    """
    sample, answer = panel.sample, panel.reward.answer
    fine = max(1, max(sample.image.size) // 800)  # draw only every n-th pixel of a large photo
    picture = np.asarray(sample.image)[::fine, ::fine]  # [H, W, 3]
    truth = sample.mask[::fine, ::fine]
    mask = np.zeros_like(truth)
    if panel.reward.mask is not None:
        mask = panel.reward.mask[::fine, ::fine]
    # Darken the rest. A filled mask would hide colours that the question may ask for.
    light = np.where(mask | ~mask.any(), 1, 0.65)
    axes.imshow((picture * light[..., None]).astype(np.uint8))
    axes.set_xticks([])
    axes.set_yticks([])
    draw_outline(axes, truth, "white", 1.6)
    draw_outline(axes, mask, ORANGE, 2.4)
    draw_outline(axes, truth, BLACK, 1.2, "--")
    sx = sample.image.width / size / fine
    sy = sample.image.height / size / fine
    for one in answer.objects or []:
        draw_object(axes, one, sx, sy)
    # All panels have the same size, for pictures of any shape.
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_box_aspect(1)


def caption(panel, truth: bool) -> str:
    """Return the caption of an answer: its text, and with `truth` also its IoU."""
    reward = panel.reward
    verdict = ""
    if truth:
        verdict = f"IoU {reward.iou:.2f}   "
    if not reward.answer.in_format:
        verdict += "outside the format"
    return f"{verdict}\n{legible(panel.text, 50, 7)}".strip()


def sample_sheet(path: Path, panels: list, size: int, title: str, truth: bool = True) -> None:
    """Write a PNG with one panel for each answer: picture, masks, box, points, question and text.

    `size` is the side of the square that draw_answer uses. Without `truth` the sheet has no true
    mask and no IoU.
    """
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    key = (
        "orange outline = SAM's mask, blue = the policy's box, dot = positive point, "
        "cross = negative point"
    )
    if truth:
        key = f"dashed outline = true mask, {key}"
    with matplotlib.rc_context({"font.family": FAMILIES}):
        width = max(3.1 * columns, 6.4)
        figure = Figure(figsize=(width, 4.8 * lines + 0.8), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for axes, panel in zip(grid.flat, panels):
            axes.axis("on")
            draw_answer(axes, panel, size)
            axes.set_title(legible(panel.sample.question, 40, 3), fontsize=9, parse_math=False)
            axes.set_xlabel(caption(panel, truth), fontsize=7.5, loc="left", parse_math=False)
        key = textwrap.fill(key, int(12.5 * width))
        figure.suptitle(f"{title}\n{key}", fontsize=10)
        figure.savefig(path, dpi=90)


# ------------------------------------------------------------------------------------- curves


def column(log: list[dict], name: str) -> np.ndarray:
    """Return one column of a log, float [steps]. A line without this column gives NaN."""
    return np.array([line.get(name, np.nan) for line in log], float)


def smooth(values: np.ndarray, window: int = 9) -> np.ndarray:
    """Return the running mean of `values`, both [steps].

    Each mean is over `window` values, and over fewer values at both ends.
    """
    half = window // 2
    means = []
    for i in range(len(values)):
        near = values[max(0, i - half) : i + half + 1]
        means.append(near.mean())
    return np.array(means)


def draw_mean(
    axes, log: list[dict], name: str, colour: str, label: str, scale: float = 1, width: float = 1.8
) -> None:
    """Draw the running mean of a column, times `scale`."""
    values = scale * smooth(column(log, name))
    axes.plot(column(log, "step"), values, color=colour, lw=width, label=label)


def draw_reward(axes, log: list[dict]) -> None:
    """Draw the reward, its accuracy term, and your own terms. Faint lines show single steps."""
    terms = [
        ("reward", BLUE, "total (weighted sum)"),
        ("accuracy", ORANGE, "accuracy term, 0 to 4"),
    ]
    new_terms = [name for name in reward_columns(list(log[0])) if name not in COLUMNS]
    for name, colour in zip(new_terms, itertools.cycle((GREEN, PINK, BLACK))):
        terms.append((name, colour, f"{name} ({option(name)}-weight)"))
    for name, colour, label in terms:
        axes.plot(column(log, "step"), column(log, name), color=colour, alpha=0.25, lw=1)
        draw_mean(axes, log, name, colour, label)
    axes.set(title="Reward of the sampled answers", ylabel="mean reward")
    axes.legend(**LEGEND)


def draw_held_out(axes, log: list[dict], summary: dict | None) -> None:
    """Draw the gIoU of the validation questions. With a summary also draw that of the test."""
    evaluated = [line for line in log if "validation_gIoU" in line]
    when = column(evaluated, "step")
    # The two lines are equal once all answers are in the format. Two widths show both lines.
    lines = [
        ("gIoU", BLUE, "gIoU", 2),
        ("gIoU_lenient", ORANGE, "lenient gIoU", 1),
    ]
    for name, colour, label, width in lines:
        if evaluated:
            values = column(evaluated, f"validation_{name}")
            style = {"lw": 2 * width, "ms": 4 * width, "label": f"{label}, validation"}
            axes.plot(when, values, "o-", color=colour, **style)
        if summary:
            values = [summary["base"][name], summary["trained"][name]]
            style = {"ms": 6 * width, "mfc": "none", "label": f"{label}, test"}
            axes.plot([0, log[-1]["step"]], values, "s", color=colour, **style)
    if summary:
        ceiling = summary["ceiling"]["gIoU"]
        axes.axhline(ceiling, color=BLACK, ls="--", lw=1, label="true boxes through SAM")
    axes.set(title="Held-out questions, greedy", ylabel="gIoU", ylim=(0, 1))
    # Scores can be anywhere from 0 to 1. So the legend is below the panel.
    axes.legend(**LEGEND, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)


def draw_format(axes, log: list[dict]) -> None:
    """Draw the shares of both formats, of groups with equal rewards, and of unique answers."""
    draw_mean(axes, log, "reasoning_format", BLUE, "reasoning format", width=4.5)
    draw_mean(axes, log, "segmentation_format", ORANGE, "segmentation format")
    draw_mean(axes, log, "zero_variance", GREEN, "groups without variance")
    draw_mean(axes, log, "unique", PINK, "unique answers")
    axes.set(title="Format and variety", ylabel="fraction", ylim=(-0.03, 1.03))
    # Most lines are near the top. The line of the groups without variance is low.
    axes.legend(**LEGEND, loc="center right", bbox_to_anchor=(1, 0.67))


def draw_distance(axes, log: list[dict]) -> None:
    """Draw the KL to the base model and the entropy, in nats a token.

    With a large --kl-bound, a single token can dominate the KL of a step: a token with a far higher
    probability under the base model. So the scale is logarithmic, and the KL has no running mean.
    """
    axes.plot(column(log, "step"), column(log, "kl"), color=BLUE, lw=1.2, label="KL to the base")
    draw_mean(axes, log, "entropy", ORANGE, "entropy")
    axes.set(title="KL and entropy", ylabel="nats a token", yscale="log")
    axes.legend(**LEGEND)


def draw_clip(axes, log: list[dict]) -> None:
    """Draw the shares of clipped tokens, in percent."""
    draw_mean(axes, log, "clip_low", BLUE, "lower side, 1 - eps_low", scale=100)
    draw_mean(axes, log, "clip_high", ORANGE, "upper side, 1 + eps_high", scale=100)
    axes.set(title="Clipped tokens", ylabel="percent of tokens")
    axes.legend(**LEGEND)


def draw_answers(axes, log: list[dict]) -> None:
    """Draw the mean length of the answers in tokens, and their mean number of points."""
    draw_mean(axes, log, "length", BLUE, "answer length, tokens")
    draw_mean(axes, log, "points", ORANGE, "points an answer, x 10", scale=10)
    axes.set(title="Answers", ylabel="tokens", ylim=(0, None))
    axes.legend(**LEGEND)


def curves(path: Path, log: list[dict], summary: dict | None = None) -> None:
    """Write a PNG with the curves of a run. `log` holds the lines of metrics.jsonl.

    With `summary`, squares show the test scores of the base model and of the trained policy. A line
    shows the score of SAM with the true boxes.
    """
    figure = Figure(figsize=(12, 7.2))
    panels = figure.subplots(2, 3)
    draw_reward(panels[0, 0], log)
    draw_held_out(panels[0, 1], log, summary)
    draw_format(panels[0, 2], log)
    draw_distance(panels[1, 0], log)
    draw_clip(panels[1, 1], log)
    draw_answers(panels[1, 2], log)
    for axes in panels.flat:
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
