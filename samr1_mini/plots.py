"""Pictures: what the policy answered, drawn on what it was asked about, and the curves of a run.

Figures are drawn without pyplot: a process has one pyplot backend, and in a notebook the user
chooses it.
"""

import math
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure

# Questions and answers come in any script. matplotlib's own font has Latin, Greek, Cyrillic and Arabic letters; what
# it lacks is taken from those of the others that are installed.
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

BLUE, ORANGE, GREEN, PINK, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#000000",
)  # Okabe and Ito's


def legible(text: str, width: int, lines: int = 99) -> str:
    """At most so many lines of `width` characters, with … where there is more; a character that no font here has is
    written as ⟨U+5DE6⟩."""
    fonts = [font_manager.get_font(font_manager.findfont(name)) for name in FAMILIES]
    known = lambda c: c.isspace() or (
        c.isprintable() and any(font.get_char_index(ord(c)) for font in fonts)
    )
    text = "".join(c if known(c) else f"⟨U+{ord(c):04X}⟩" for c in text)
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))


def draw_answer(axes, panel, size: int) -> None:
    """One evaluated answer (evaluation.Panel) on its picture: truth as a dashed outline, SAM's mask outlined and in
    full light, box, points (dot: on the object, cross: off it)."""
    sample, answer = panel.sample, panel.reward.answer
    fine = max(
        1, max(sample.image.size) // 800
    )  # a panel is small: of a large photo every few pixels are drawn
    picture, truth = np.asarray(sample.image)[::fine, ::fine], sample.mask[::fine, ::fine]
    mask = np.zeros_like(truth) if panel.reward.mask is None else panel.reward.mask[::fine, ::fine]
    # What the mask leaves out is dimmed: a fill would hide the colours that the question may be about.
    light = np.where(mask | ~mask.any(), 1, 0.65)
    axes.imshow((picture * light[..., None]).astype(np.uint8))
    axes.set_xticks([]), axes.set_yticks([])
    sx, sy = sample.image.width / size / fine, sample.image.height / size / fine
    for area, colour, width, line in (
        (truth, "white", 1.6, "-"),
        (mask, ORANGE, 2.4, "-"),
        (truth, BLACK, 1.2, "--"),
    ):
        if (
            area.any() and not area.all() and min(area.shape) > 1
        ):  # a contour needs two rows and two columns
            axes.contour(area, [0.5], colors=colour, linewidths=width, linestyles=line)
    box = answer.box or answer.lenient_box
    if box:
        x1, y1, x2, y2 = box[0] * sx - 0.5, box[1] * sy - 0.5, box[2] * sx - 0.5, box[3] * sy - 0.5
        for colour, width in (("white", 3.2), (BLUE, 1.6)):
            axes.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=colour, lw=width)
    for x, y, label in answer.points:
        axes.plot(
            x * sx, y * sy, "o" if label else "X", color=GREEN if label else PINK, mec="white", ms=7
        )
    axes.set_aspect("equal", adjustable="datalim"), axes.set_box_aspect(
        1
    )  # one height for all, whatever their shape


def sample_sheet(path: Path, panels: list, size: int, title: str, truth: bool = True) -> None:
    """A PNG with one panel an answer: picture, masks, box, points, question, the policy's text, IoU and reward."""
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    with matplotlib.rc_context({"font.family": FAMILIES}):
        width = max(3.1 * columns, 6.4)
        figure = Figure(figsize=(width, 4.8 * lines + 0.8), layout="constrained")
        places = figure.subplots(lines, columns, squeeze=False)
        for axes in places.flat:
            axes.axis("off")
        for axes, panel in zip(places.flat, panels):
            axes.axis("on")
            draw_answer(axes, panel, size)
            axes.set_title(legible(panel.sample.question, 40, 3), fontsize=9, parse_math=False)
            verdict = (
                f"IoU {panel.reward.iou:.2f}   reward {panel.reward.total:.3g}   " if truth else ""
            )
            verdict += "" if panel.reward.answer.in_format else "outside the format"
            caption = f"{verdict}\n{legible(panel.text, 50, 7)}".strip()
            axes.set_xlabel(caption, fontsize=7.5, loc="left", parse_math=False)
        key = "in full light with an orange outline: SAM's mask; blue: the policy's box; dot and cross: its points"
        key = textwrap.fill(f"{'dashed: truth; ' if truth else ''}{key}", int(12.5 * width))
        figure.suptitle(f"{title}\n{key}", fontsize=10)
        figure.savefig(path, dpi=90)


def smooth(values: np.ndarray, window: int = 9) -> np.ndarray:
    """Running mean over up to `window` steps, the ends over what there is."""
    half = window // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def curves(path: Path, log: list[dict], summary: dict | None = None) -> None:
    """A PNG with a run's curves from the lines of metrics.jsonl; `summary` adds base and trained as squares, and
    the ceiling as a line."""
    step = np.array([line["step"] for line in log])
    column = lambda name: np.array([line.get(name, np.nan) for line in log], float)
    evaluated = [line for line in log if "validation_gIoU" in line]
    figure = Figure(figsize=(12, 6.6))
    (a, b, c), (d, e, f) = figure.subplots(2, 3)

    def mean(axes, name: str, colour: str, label: str, factor: float = 1, width: float = 1.8):
        axes.plot(step, factor * smooth(column(name)), color=colour, lw=width, label=label)

    for name, colour, label in (
        ("reward", BLUE, "total, 0 to 6"),
        ("accuracy", ORANGE, "accuracy, eq. (5), 0 to 4"),
    ):
        a.plot(step, column(name), color=colour, alpha=0.25, lw=1)
        mean(a, name, colour, label)
    a.set(title="Reward of the sampled answers", ylabel="mean reward")

    # The two lines lie one on the other once all is in the format: hence two widths.
    for name, colour, label, wide in (
        ("gIoU", BLUE, "gIoU", 2),
        ("gIoU_lenient", ORANGE, "lenient gIoU", 1),
    ):
        if evaluated:
            values = [line[f"validation_{name}"] for line in evaluated]
            b.plot(
                [line["step"] for line in evaluated],
                values,
                "o-",
                color=colour,
                lw=2 * wide,
                ms=4 * wide,
                label=f"{label}, validation",
            )
        if summary:
            values = [summary[run][name] for run in ("base", "trained")]
            b.plot(
                [0, step[-1]],
                values,
                "s",
                color=colour,
                ms=6 * wide,
                mfc="none",
                label=f"{label}, test",
            )
    if summary:
        b.axhline(
            summary["ceiling"]["gIoU"], color=BLACK, ls="--", lw=1, label="true boxes through SAM"
        )
    b.set(title="Held-out questions, greedy", ylabel="gIoU", ylim=(0, 1))

    mean(c, "reasoning_format", BLUE, "reasoning format", width=4.5)
    mean(c, "segmentation_format", ORANGE, "segmentation format")
    mean(c, "zero_variance", GREEN, "groups without variance")
    mean(c, "unique", PINK, "unique answers")
    c.set(title="Format and variety", ylabel="fraction", ylim=(-0.03, 1.03))

    # Without --kl-bound one token that the base finds far likelier than the policy lifts a whole step: hence a log
    # scale and no mean.
    d.plot(step, column("kl"), color=BLUE, lw=1.2, label="KL to the base")
    mean(d, "entropy", ORANGE, "entropy")
    d.set(title="How far, how sure", ylabel="nats a token", yscale="log")

    mean(e, "clip_low", BLUE, "lower side, 1 - eps_low", 100)
    mean(e, "clip_high", ORANGE, "upper side, 1 + eps_high", 100)
    e.set(title="Tokens held by the clip", ylabel="percent of tokens")

    mean(f, "length", BLUE, "answer length, tokens")
    mean(f, "points", ORANGE, "points an answer, x 10", 10)
    f.set(title="Answers", ylabel="tokens", ylim=(0, None))

    # In the third, lines run along the top, and those of groups without variance low.
    where = {b: dict(loc="lower right"), c: dict(loc="center right", bbox_to_anchor=(1, 0.67))}
    for axes in (a, b, c, d, e, f):
        axes.legend(fontsize=8, framealpha=0.6, **where.get(axes, {}))
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
