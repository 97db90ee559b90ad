"""gIoU, the mean over pictures of IoU; cIoU, the sum of intersections over the sum of unions; and their intervals."""

import numpy as np


def intersection_union(
    mask: np.ndarray | None, truth: np.ndarray, ignore: np.ndarray | None = None
) -> tuple[int, int]:
    """Pixels in both and pixels in either of two bool masks [H, W], those of `ignore` left out.

    None is an answer that cannot be read. It is wrong whatever the truth, in training and in evaluation: its union is
    the true mask, and at least 1. An empty mask is something else: it comes from an answer that was read, and is right
    where nothing is to be found.
    """
    if mask is None:
        return 0, max(1, intersection_union(truth, truth, ignore)[1])
    if mask.shape != truth.shape:
        raise ValueError(f"masks of different size: {mask.shape} and {truth.shape}")
    if ignore is not None:
        mask, truth = mask & ~ignore, truth & ~ignore
    return int((mask & truth).sum()), int((mask | truth).sum())


def iou(intersection: int, union: int) -> float:
    """Intersection over union; an empty mask where nothing is to be found is right (LISA's convention), so 0/0 is 1."""
    return intersection / union if union else 1.0


def vote(masks: list[np.ndarray], agree: float = 0.85) -> tuple[int, np.ndarray]:
    """The place of the middle mask, and the mask bool [H, W] that most of `masks` (at least one) agree on.

    The middle one has the most masks with an IoU of at least `agree` to it, itself among them (the first of equals
    does); these are the cluster. A pixel is in the result if more than half of the cluster's masks hold it.
    """
    near = np.array(
        [[iou(*intersection_union(a, b)) >= agree for b in masks] for a in masks]
    )  # [n, n]
    middle = int(near.sum(1).argmax())
    cluster = [mask for mask, close in zip(masks, near[middle]) if close]
    return middle, np.sum(cluster, axis=0, dtype=np.uint16) * 2 > len(cluster)


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


def giou(pairs) -> float:
    """Mean IoU of (intersection, union) pairs [n, 2], one a picture."""
    both, either = np.asarray(pairs).T
    return float(np.mean(np.where(either > 0, both / np.maximum(either, 1), 1.0)))


def ciou(pairs) -> float:
    """Cumulative IoU of (intersection, union) pairs [n, 2]: large objects weigh more."""
    return iou(*np.asarray(pairs).sum(0).tolist())


def bootstrap_interval(
    measure,
    pairs: list[tuple[int, int]],
    pictures: list[str] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of `measure` (giou or ciou) over resampled pictures; the same numbers every time.

    `pictures` names the picture of each pair: questions about one picture are drawn together, since they are no
    independent observations. Pairs without a name, "", have a picture of their own each.
    """
    number = {}
    cluster = [
        number.setdefault(name or i, len(number))
        for i, name in enumerate(pictures or [""] * len(pairs))
    ]
    rng, values, pairs = np.random.default_rng(seed), [], np.asarray(pairs)
    for _ in range(draws):
        times = np.bincount(
            rng.integers(len(number), size=len(number)), minlength=len(number)
        )  # each picture is drawn
        values.append(measure(np.repeat(pairs, times[cluster], axis=0)))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The smallest box that holds a bool mask [H, W]; (0, 0, 0, 0) for an empty one."""
    ys, xs = np.where(mask)
    return (
        (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        if len(xs)
        else (0, 0, 0, 0)
    )
