"""Draw the answer styles of runs: `python -m tutorials.tiny_world.phases RUN [RUN ...]`.

The figure shows how styles follow one another during training. answers.py explains the styles.
A run keeps one sampled answer to each question in answers.jsonl.
Several runs are averaged up to the last step of the shortest. An unfinished run can be drawn too.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from samr1_mini.config import Parser, UserError, exit_with
from samr1_mini.plots import BLACK, BLUE, GREEN, ORANGE, PINK, smooth
from samr1_mini.runs import read_log
from .answers import style_of

# Styles outside the asked format are grey.
STYLE_COLOURS = {
    "sentence": "0.75",
    "json": "0.55",
    "short": BLUE,
    "names": ORANGE,
    "places": GREEN,
    "other": PINK,
}
KIND_COLOURS = {
    "attribute": BLUE,
    "part": ORANGE,
    "relation": GREEN,
    "indirect": PINK,
    "combined": BLACK,
}
WINDOW = 9  # steps that a curve is smoothed over
FEWEST = 5  # answers in the window: a mean over fewer is not drawn


def read_run(folder: str) -> tuple[list[dict], list[dict]]:
    """Return a run's metrics and its answers. Each answer also gets its "style"."""
    metrics = read_log(Path(folder))
    answers = read_log(Path(folder), name="answers")
    for name, lines in (("metrics", metrics), ("answers", answers)):
        if not lines:
            raise UserError(f"{folder}: {name}.jsonl is missing or empty")
    if metrics[-1]["step"] != len(metrics):
        raise UserError(f"{folder}: metrics.jsonl lacks steps: restore it, or choose another run")
    for answer in answers:
        answer["style"] = style_of(answer["text"])
    return metrics, answers


class Curves:
    """The curves of several runs, up to the last step of the shortest run."""

    def __init__(self, runs: list[tuple[list[dict], list[dict]]]):
        self.metrics = [metrics for metrics, _ in runs]
        self.steps = min(metrics[-1]["step"] for metrics in self.metrics)
        self.x = np.arange(1, self.steps + 1)
        self.answers = []
        for _, answers in runs:
            self.answers += [answer for answer in answers if answer["step"] <= self.steps]

    def column(self, name: str) -> np.ndarray:
        """Return the mean of a metric over the runs, [steps]."""
        lines = [[line[name] for line in metrics[: self.steps]] for metrics in self.metrics]
        return np.mean(lines, axis=0)

    def count(self, answers: list[dict]) -> np.ndarray:
        """Return the number of answers in each step, [steps]."""
        steps = [answer["step"] - 1 for answer in answers]
        return np.bincount(steps, minlength=self.steps)

    def rewards(self, answers: list[dict]) -> np.ndarray:
        """Return the sum of the answers' rewards in each step, [steps]."""
        steps = [answer["step"] - 1 for answer in answers]
        return np.bincount(steps, [a["reward"] for a in answers], minlength=self.steps)

    def in_style(self, style: str) -> list[dict]:
        return [answer for answer in self.answers if answer["style"] == style]


def ratio(top: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return smoothed sums over smoothed counts, [steps].

    The ratio is nan where the window has fewer than FEWEST answers.
    """
    held = smooth(count, WINDOW)
    values = smooth(top, WINDOW) / np.maximum(held, 1e-9)
    return np.where(WINDOW * held >= FEWEST, values, np.nan)


def draw_shares(axes, curves: Curves) -> None:
    """Draw each style's share of the sampled answers."""
    total = curves.count(curves.answers)
    shares = [ratio(curves.count(curves.in_style(style)), total) for style in STYLE_COLOURS]
    colours = list(STYLE_COLOURS.values())
    axes.stackplot(curves.x, shares, labels=list(STYLE_COLOURS), colors=colours, alpha=0.85)
    axes.set_title("Answer styles")
    axes.set_ylabel("share of the sampled answers")
    axes.set_xlim(1, max(curves.steps, 2))
    axes.set_ylim(0, 1)


def draw_length(axes, curves: Curves) -> None:
    """Draw the mean length of the sampled answers."""
    length = curves.column("length")
    axes.plot(curves.x, length, color=BLUE, alpha=0.25, lw=1)
    axes.plot(curves.x, smooth(length, WINDOW), color=BLUE, lw=1.8, label="all sampled answers")
    axes.set_title("Length")
    axes.set_ylabel("tokens")
    axes.set_ylim(0, None)


def draw_lists(axes, curves: Curves) -> None:
    """Draw the share of answers that list coordinates, for each kind of question."""
    for kind, colour in KIND_COLOURS.items():
        asked = [answer for answer in curves.answers if answer.get("kind") == kind]
        places = [answer for answer in asked if answer["style"] == "places"]
        share = ratio(curves.count(places), curves.count(asked))
        axes.plot(curves.x, share, color=colour, lw=1.8, label=kind)
    axes.set_title('Answers that list coordinates ("places")')
    axes.set_ylabel("share, by kind of question")
    axes.set_ylim(-0.03, 1.03)


def draw_rewards(axes, curves: Curves) -> None:
    """Draw the mean reward of all answers and of each style."""
    reward = smooth(curves.column("reward"), WINDOW)
    axes.plot(curves.x, reward, color=BLACK, ls="--", lw=1.2, label="all")
    for style, colour in STYLE_COLOURS.items():
        answers = curves.in_style(style)
        mean = ratio(curves.rewards(answers), curves.count(answers))
        if not np.isnan(mean).all():
            axes.plot(curves.x, mean, color=colour, lw=1.8, label=style)
    axes.set_title("Reward of each style, 0 to 6")
    axes.set_ylabel("mean reward")
    axes.set_ylim(-0.2, 6.2)


def draw(path: Path, runs: list[tuple[list[dict], list[dict]]]) -> None:
    """Save a PNG with four panels. `runs` has (metrics, answers) pairs of read_run."""
    curves = Curves(runs)
    figure = Figure(figsize=(10, 6.6))
    (shares, length), (lists, rewards) = figure.subplots(2, 2)
    draw_shares(shares, curves)
    draw_length(length, curves)
    draw_lists(lists, curves)
    draw_rewards(rewards, curves)
    for axes in (shares, length, lists, rewards):
        axes.legend(fontsize=8, framealpha=0.6, loc="best")
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="phases.py", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    file_help = "file to write (default phases.png)"
    parser.add_argument("--out", type=Path, default=Path("phases.png"), help=file_help)
    options = parser.parse(argv)
    try:
        if options.out.suffix != ".png" or not options.out.parent.is_dir():
            raise UserError(f"--out {options.out}: name a .png file in an existing folder")
        draw(options.out, [read_run(folder) for folder in options.runs])
    except (UserError, OSError) as error:
        exit_with(error, "phases.py")
    print(options.out)


if __name__ == "__main__":
    main()
