"""Two figures with sliders for notebooks.

In touch_box, you move a box and a point, and SAM draws the mask. In touch_clip, you change the
probability of a token, and see the effect of the clip.

Both first draw three fixed examples. If the package ipywidgets is installed, sliders follow.
"""

import importlib.util

import matplotlib.pyplot as plt
import numpy as np
import torch

from samr1_mini.config import Settings
from samr1_mini.grpo import grpo_loss
from samr1_mini.metrics import intersection_union, iou, tight_box
from samr1_mini.plots import BLUE, GREEN, ORANGE, PINK
from samr1_mini.reward import tiered

INSTALL = "For sliders, install the package ipywidgets, and run this cell again."


def has_widgets() -> bool:
    """Tell if ipywidgets is installed."""
    return importlib.util.find_spec("ipywidgets") is not None


# ------------------------------------------------------------------------------ box and point


def draw_box(axes, segmenter, sample, box, points) -> float:
    """Draw SAM's mask for a box (x1, y1, x2, y2) and points (x, y, label). Returns the mask's IoU.

    The white outline is the true mask. The orange outline is SAM's mask.
    """
    [mask] = segmenter.masks(np.asarray(sample.image), [box], [points])
    found = iou(*intersection_union(mask, sample.mask))
    x1, y1, x2, y2 = box
    axes.imshow(sample.image)
    axes.contour(sample.mask, [0.5], colors="white", linewidths=2)
    if mask.any():
        axes.contour(mask, [0.5], colors=ORANGE, linewidths=2)
    axes.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=BLUE)
    for x, y, label in points:
        if label:
            axes.plot(x, y, "o", color=GREEN)
        else:
            axes.plot(x, y, "x", color=PINK, markersize=9)
    axes.set_title(f"IoU {found:.2f}, accuracy reward {tiered(found):g}", fontsize=10)
    axes.axis("off")
    return found


def moved_boxes(sample) -> list:
    """Return three boxes: the true box, a moved box and a wide box."""
    x1, y1, x2, y2 = tight_box(sample.mask)
    width, height = x2 - x1, y2 - y1
    moved = (x1 + width // 2, y1, x2 + width // 2, y2)
    wide = (x1 - width // 2, y1 - height // 2, x2 + width // 2, y2 + height // 2)
    return [clipped(box, sample.image.size) for box in ((x1, y1, x2, y2), moved, wide)]


def clipped(box, size) -> tuple:
    """Cut a box at the edges of a picture. `size` is (width, height)."""
    width, height = size
    x1, y1, x2, y2 = box
    return max(0, x1), max(0, y1), min(width, x2), min(height, y2)


def touch_box(segmenter, sample) -> None:
    """Draw SAM's mask for three boxes. Then show sliders for a box and a point."""
    true, moved, wide = moved_boxes(sample)
    figure, panels = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    for axes, box in zip(panels, (true, moved, wide)):
        draw_box(axes, segmenter, sample, box, [])
    plt.show()
    if not has_widgets():
        print(INSTALL)
        return
    from ipywidgets import Dropdown, HBox, IntRangeSlider, IntSlider, VBox, interactive_output

    width, height = sample.image.size
    late = dict(continuous_update=False)  # draw only when the slider is released
    across = IntRangeSlider(value=(wide[0], wide[2]), max=width, description="box, x", **late)
    down = IntRangeSlider(value=(wide[1], wide[3]), max=height, description="box, y", **late)
    label = Dropdown(options={"no point": None, "label 1": 1, "label 0": 0}, description="point")
    x = IntSlider(value=width // 2, max=width - 1, description="point, x", **late)
    y = IntSlider(value=height // 2, max=height - 1, description="point, y", **late)

    def draw(across, down, label, x, y):
        points = []
        if label is not None:
            points = [(x, y, label)]
        box = (across[0], down[0], max(across[1], across[0] + 1), max(down[1], down[0] + 1))
        figure, axes = plt.subplots(figsize=(4, 4))
        draw_box(axes, segmenter, sample, box, points)
        plt.show()

    controls = dict(across=across, down=down, label=label, x=x, y=y)
    show(HBox([VBox(list(controls.values())), interactive_output(draw, controls)]))


# --------------------------------------------------------------------------------- the clip


def objective(old: float, new: float, advantage: float) -> tuple[float, float]:
    """Return the objective of one token, eq. (4) without KL, and its derivative by the ratio.

    `old` is the token's probability when it was sampled, and `new` its probability now.
    """
    logp = torch.tensor([new]).log().requires_grad_()
    old_logp = torch.tensor([old]).log()
    loss, _ = grpo_loss(logp, old_logp, None, torch.tensor([advantage]), [[1]], Settings())
    [gradient] = torch.autograd.grad(-loss, logp)  # d objective / d log pi
    return -loss.item(), gradient.item() * old / new  # d rho / d log pi = rho


def draw_clip(axes, old: float, new: float, advantage: float) -> None:
    """Draw the objective (y) for each ratio (x), and mark the token on this curve."""
    s = Settings()
    low, high = 1 - s.eps_low, 1 + s.eps_high
    ratio = new / old
    rho = np.linspace(0, max(2.0, ratio * 1.1), 300)
    curve = np.minimum(rho * advantage, rho.clip(low, high) * advantage)
    value, slope = objective(old, new, advantage)
    axes.plot(rho, curve, color=ORANGE, lw=2)
    axes.axvspan(low, high, color="0.9")
    axes.plot(ratio, value, "o", color=BLUE, markersize=9)
    axes.set_title(f"ratio {ratio:.2f}, objective {value:.2f}, slope {slope:.2f}", fontsize=10)
    axes.set_xlabel("ratio")


def touch_clip() -> None:
    """Draw three tokens at the clip. Then show sliders for probabilities and advantage."""
    figure, panels = plt.subplots(1, 3, figsize=(9, 2.6), layout="constrained")
    for axes, values in zip(panels, ((0.2, 0.24, 1.0), (0.2, 0.3, 1.0), (0.2, 0.3, -1.0))):
        draw_clip(axes, *values)
    panels[0].set_ylabel("objective")
    plt.show()
    if not has_widgets():
        print(INSTALL)
        return
    from ipywidgets import FloatSlider, HBox, VBox, interactive_output

    controls = {
        "old": FloatSlider(value=0.2, min=0.01, max=0.99, step=0.01, description="old prob."),
        "new": FloatSlider(value=0.3, min=0.01, max=0.99, step=0.01, description="new prob."),
        "advantage": FloatSlider(value=1, min=-2, max=2, step=0.25, description="advantage"),
    }

    def draw(old, new, advantage):
        figure, axes = plt.subplots(figsize=(5, 3))
        draw_clip(axes, old, new, advantage)
        axes.set_ylabel("objective")
        plt.show()

    show(HBox([VBox(list(controls.values())), interactive_output(draw, controls)]))


def show(widget) -> None:
    """Display a widget in the notebook."""
    from IPython.display import display

    display(widget)
