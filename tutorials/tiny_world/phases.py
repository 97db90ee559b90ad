"""How one way of thinking follows another as training goes on: `python -m tutorials.tiny_world.phases RUN [RUN ...]`.

Draws the styles (answers.STYLES) of the sampled answers that a run keeps in answers.jsonl, one a question. Several
runs are taken together, as far as the shortest goes. A run that is still on its way can be looked at too.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from samr1_mini.config import Parser, UserError, exit_with
from samr1_mini.plots import BLACK, BLUE, GREEN, ORANGE, PINK, smooth
from samr1_mini.runs import read_log
from .answers import STYLES, style_of
from samr1_mini.tiny.scenes import KINDS

# Greys: styles outside the asked format.
COLOURS = dict(zip((*STYLES, "other"), ("0.75", "0.55", BLUE, ORANGE, GREEN, PINK)))
WINDOW = 9  # steps that a curve is smoothed over
FEWEST = 5  # answers in the window: a mean over fewer is not drawn


def read_run(folder: str) -> tuple[list[dict], list[dict]]:
    """A run's metrics and its answers, each of these with its "style"."""
    try:
        metrics, answers = read_log(Path(folder)), read_log(Path(folder), name="answers")
    except ValueError as error:
        raise UserError(f"{folder}: its log cannot be read ({error})") from None
    for name, lines in (("metrics", metrics), ("answers", answers)):
        if not lines:
            raise UserError(f"{folder}: there is no {name}.jsonl, or nothing in it yet")
    return metrics, [answer | {"style": style_of(answer["text"])} for answer in answers]


def ratio(top: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Sums by step over counts by step, both smoothed; nan where at that rate a whole window would hold
    fewer than FEWEST."""
    held = smooth(count, WINDOW)
    return np.where(WINDOW * held >= FEWEST, smooth(top, WINDOW) / np.maximum(held, 1e-9), np.nan)


def draw(path: Path, runs: list[tuple[list[dict], list[dict]]]) -> None:
    """A PNG with the shares of the styles, the answers' length, who measures, and what each style earns."""
    steps = min(metrics[-1]["step"] for metrics, _ in runs)
    x = np.arange(1, steps + 1)
    answers = [answer for _, answers in runs for answer in answers if answer["step"] <= steps]
    column = lambda name: np.mean(
        [[line[name] for line in metrics[:steps]] for metrics, _ in runs], axis=0
    )

    def by_step(chosen: list[dict], value=lambda answer: 1) -> np.ndarray:
        return np.bincount(
            [a["step"] - 1 for a in chosen], [value(a) for a in chosen], minlength=steps
        )

    figure = Figure(figsize=(10, 6.6))
    (a, b), (c, d) = figure.subplots(2, 2)
    styles = {style: [one for one in answers if one["style"] == style] for style in COLOURS}
    shares = [ratio(by_step(ones), by_step(answers)) for ones in styles.values()]
    a.stackplot(x, shares, labels=list(styles), colors=list(COLOURS.values()), alpha=0.85)
    a.set(
        title="Ways of thinking",
        ylabel="share of the sampled answers",
        xlim=(1, max(steps, 2)),
        ylim=(0, 1),
    )

    b.plot(x, column("length"), color=BLUE, alpha=0.25, lw=1)
    b.plot(x, smooth(column("length"), WINDOW), color=BLUE, lw=1.8, label="all sampled answers")
    b.set(title="Length", ylabel="tokens", ylim=(0, None))

    for kind, colour in zip(KINDS, (BLUE, ORANGE, GREEN, PINK, BLACK)):
        asked = [one for one in answers if one.get("kind") == kind]
        measured = [one for one in asked if one["style"] == "places"]
        c.plot(x, ratio(by_step(measured), by_step(asked)), color=colour, lw=1.8, label=kind)
    c.set(
        title="Who measures: answers with places",
        ylabel="share, by kind of question",
        ylim=(-0.03, 1.03),
    )

    d.plot(x, smooth(column("reward"), WINDOW), color=BLACK, ls="--", lw=1.2, label="all")
    for style, ones in styles.items():
        earned = ratio(by_step(ones, lambda answer: answer["reward"]), by_step(ones))
        if not np.isnan(earned).all():
            d.plot(x, earned, color=COLOURS[style], lw=1.8, label=style)
    d.set(title="What each way earns, 0 to 6", ylabel="mean reward", ylim=(-0.2, 6.2))

    for axes in (a, b, c, d):
        axes.legend(fontsize=8, framealpha=0.6, loc="best")
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="phases.py", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--out", type=Path, default=Path("phases.png"), help="file to write (default phases.png)"
    )
    options = parser.parse(argv)
    try:
        if options.out.suffix != ".png" or not options.out.parent.is_dir():
            raise UserError(f"--out {options.out}: this must be a .png in a folder that is there")
        draw(options.out, [read_run(folder) for folder in options.runs])
    except (UserError, OSError) as error:
        exit_with(error, "phases.py")
    print(options.out)


if __name__ == "__main__":
    main()
