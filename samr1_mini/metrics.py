"""Compute IoU, gIoU and cIoU with intervals, match boxes, and let masks vote.

gIoU is the mean IoU over questions. cIoU is the sum of all intersections over the sum of all
unions.
"""

from collections.abc import Callable, Iterable

import numpy as np


def mean(values: Iterable[float]) -> float:
    """Return the mean of numbers or booleans."""
    values = list(values)
    return sum(values) / len(values)


def intersection_union(
    mask: np.ndarray | None, truth: np.ndarray, ignore: np.ndarray | None = None
) -> tuple[int, int]:
    """Return the intersection and the union of two bool masks [H, W], in pixels.

    The pixels of `ignore`, bool [H, W], are not counted. The mask None stands for an answer that
    cannot be read. Its intersection is 0. Its union is the size of the true mask, and at least 1.
    So its IoU is 0 even if the true mask is empty. An empty mask comes from a readable answer, and
    is correct if the true mask is empty too. Raises ValueError if the masks differ in shape.
    """
    if mask is None:
        _, size = intersection_union(truth, truth, ignore)
        return 0, max(1, size)
    if mask.shape != truth.shape:
        raise ValueError(f"masks of different size: {mask.shape} and {truth.shape}")
    if ignore is not None:
        mask = mask & ~ignore
        truth = truth & ~ignore
    both = (mask & truth).sum()
    either = (mask | truth).sum()
    return int(both), int(either)


def iou(intersection: int, union: int) -> float:
    """Return intersection over union, 0 to 1.

    0/0 gives 1, so an empty mask is correct if the true mask is empty (LISA's convention).
    """
    if union == 0:
        return 1.0
    return intersection / union


AGREE = 0.85  # the smallest IoU of two neighbours


def vote(masks: list[np.ndarray]) -> tuple[int, np.ndarray]:
    """Return the index of the middle mask, and the bool mask [H, W] that most masks agree on.

    `masks` holds at least one mask. Two masks are neighbours if their IoU is at least AGREE. A
    mask is also its own neighbour. The middle mask has the most neighbours. If several masks have
    the most neighbours, the first of them is the middle mask. A pixel is in the result if more than
    half of the middle mask's neighbours contain the pixel.
    """
    middle = 0
    most = []  # the neighbours of the middle mask
    for i, mask in enumerate(masks):
        near = [other for other in masks if iou(*intersection_union(mask, other)) >= AGREE]
        if len(near) > len(most):
            middle, most = i, near
    counts = np.sum(most, axis=0, dtype=np.uint16)  # [H, W]
    return middle, counts * 2 > len(most)


def box_iou(a: tuple, b: tuple) -> float:
    """Return the IoU of two boxes (x1, y1, x2, y2). x2 and y2 are exclusive.

    Two boxes without an area stand for "nothing". Their IoU is 1.
    """
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return iou(both, area_a + area_b - both)


def hull(boxes: list[tuple]) -> tuple:
    """Return the smallest box around all boxes (x1, y1, x2, y2). No box gives (0, 0, 0, 0)."""
    if not boxes:
        return 0, 0, 0, 0
    x1, y1, x2, y2 = zip(*boxes)
    return min(x1), min(y1), max(x2), max(y2)


def matched_iou(boxes: list[tuple], true_boxes: list[tuple]) -> float:
    """Return the mean IoU of boxes that are matched one to one with true boxes, 0 to 1.

    The matching is the one with the largest sum of IoUs. The mean is over the larger number of
    boxes. So a missing box and an extra box count as 0. Without any box the result is 1.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import, and only needed here

    count = max(len(boxes), len(true_boxes))
    if count == 0:
        return 1.0
    overlaps = np.zeros((len(boxes), len(true_boxes)))
    for i, box in enumerate(boxes):
        for j, true_box in enumerate(true_boxes):
            overlaps[i, j] = box_iou(box, true_box)
    rows, columns = linear_sum_assignment(overlaps, maximize=True)
    return float(overlaps[rows, columns].sum()) / count


def repeated_share(boxes: list[tuple]) -> float:
    """Return the share of boxes whose IoU with an earlier box is above 0.5, 0 to 1."""
    repeated = 0
    for i, box in enumerate(boxes):
        repeated += any(box_iou(box, earlier) > 0.5 for earlier in boxes[:i])
    return repeated / max(1, len(boxes))


def filled(box: tuple, height: int, width: int) -> np.ndarray:
    """Return a box (x1, y1, x2, y2) in pixels as a bool mask [height, width]."""
    x1, y1, x2, y2 = [max(0, round(v)) for v in box]
    mask = np.zeros((height, width), bool)
    mask[y1:y2, x1:x2] = True
    return mask


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the smallest box (x1, y1, x2, y2) around a bool mask [H, W].

    x2 and y2 are exclusive. An empty mask gives (0, 0, 0, 0).
    """
    xs = np.flatnonzero(mask.any(0))
    ys = np.flatnonzero(mask.any(1))
    if len(xs) == 0:
        return 0, 0, 0, 0
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def giou(pairs) -> float:
    """Return the mean IoU of (intersection, union) pairs [n, 2]."""
    both, either = np.asarray(pairs).T
    each = np.where(either > 0, both / np.maximum(either, 1), 1.0)  # [n]
    return float(each.mean())


def ciou(pairs) -> float:
    """Return the cumulative IoU of (intersection, union) pairs [n, 2]. Large objects count more."""
    both, either = np.asarray(pairs).sum(0).tolist()
    return iou(both, either)


def bootstrap_interval(
    measure: Callable,
    pairs: list[tuple[int, int]],
    pictures: list[str],
) -> tuple[float, float]:
    """Return the 95 % percentile interval of `measure` (giou or ciou) over resampled pictures.

    `pictures` names the picture of each pair. Questions about one picture are drawn together,
    because they are not independent. A pair with the picture name "" has its own picture. The same
    pairs give the same interval.
    """
    number = {}  # picture -> its number
    cluster = []  # the number of each pair's picture
    for i, name in enumerate(pictures):
        cluster.append(number.setdefault(name or i, len(number)))
    pairs = np.asarray(pairs)
    count = len(number)
    rng = np.random.default_rng(0)
    values = []
    for _ in range(1000):
        drawn = rng.integers(count, size=count)
        times = np.bincount(drawn, minlength=count)  # [count], how often each picture is drawn
        values.append(measure(np.repeat(pairs, times[cluster], axis=0)))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
