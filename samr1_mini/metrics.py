"""IoU, gIoU, cIoU and their intervals. gIoU is the mean over pictures of IoU; cIoU is the sum of intersections over the sum of unions."""

import numpy as np


def intersection_union(mask: np.ndarray | None, truth: np.ndarray, ignore: np.ndarray | None = None) -> tuple[int, int]:
    """Pixels in both and pixels in either of two bool masks [H, W], those of `ignore` left out; no mask at all counts as an empty one."""
    if mask is None:
        mask = np.zeros_like(truth)
    if mask.shape != truth.shape:
        raise ValueError(f"masks of different size: {mask.shape} and {truth.shape}")
    if ignore is not None:
        mask, truth = mask & ~ignore, truth & ~ignore
    return int((mask & truth).sum()), int((mask | truth).sum())


def iou(intersection: int, union: int) -> float:
    """Intersection over union; nothing predicted where nothing is to be found is right (LISA's convention), so 0/0 is 1."""
    return intersection / union if union else 1.0


def box_iou(a: tuple, b: tuple) -> float:
    """IoU of two boxes (x1, y1, x2, y2), x2 and y2 exclusive."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def filled(box: tuple, height: int, width: int) -> np.ndarray:
    """A box (x1, y1, x2, y2) in pixels as a mask bool [height, width]."""
    x1, y1, x2, y2 = (max(0, round(v)) for v in box)
    mask = np.zeros((height, width), bool)
    mask[y1:y2, x1:x2] = True
    return mask


def giou(pairs: list[tuple[int, int]]) -> float:
    """Mean IoU of (intersection, union) pairs, one a picture."""
    return float(np.mean([iou(i, u) for i, u in pairs]))


def ciou(pairs: list[tuple[int, int]]) -> float:
    """Cumulative IoU of (intersection, union) pairs: large objects weigh more."""
    return iou(sum(i for i, _ in pairs), sum(u for _, u in pairs))


def bootstrap_interval(measure, pairs: list[tuple[int, int]], draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of `measure` (giou or ciou) over resampled pictures; the same numbers every time."""
    rng = np.random.default_rng(seed)
    values = [measure([pairs[i] for i in rng.integers(len(pairs), size=len(pairs))]) for _ in range(draws)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The smallest box that holds a bool mask [H, W]; (0, 0, 0, 0) for an empty one."""
    ys, xs = np.where(mask)
    return (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1) if len(xs) else (0, 0, 0, 0)
