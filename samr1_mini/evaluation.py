"""Evaluation: greedy answers to held-out questions, by the same parser, the same SAM and the same rule as in training.

Two figures stand side by side everywhere. gIoU: an answer outside the format counts 0 (and its whole true mask goes into cIoU's
union). gIoU_lenient: a box found anywhere in the text counts, so what is gained there is not the format.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .config import Settings, UserError
from .data import Sample
from .metrics import bootstrap_interval, ciou, giou, intersection_union, iou, tight_box
from .policy import Policy, encode, sample
from .reward import Reward, Segmenter, score_group


@dataclass
class Row:
    """One evaluated question. `reward` holds the answer, SAM's mask and its IoU, read leniently."""

    sample: Sample
    text: str
    truncated: bool
    reward: Reward

    @property
    def pair(self) -> tuple[int, int]:
        """Intersection and union as the strict figures count them."""
        return self.reward.pair if self.reward.answer.in_format else intersection_union(None, self.sample.mask, self.sample.ignore)


@dataclass
class Report:
    rows: list[Row] = field(default_factory=list)

    def summary(self) -> dict:
        """Fractions, not percent: gIoU, gIoU_lenient, cIoU, format rate, share of boxes with IoU above 0.5 (REC accuracy), 95 % intervals,
        the count, and gIoU by kind of question."""
        strict, lenient = [r.pair for r in self.rows], [r.reward.pair for r in self.rows]
        summary = {
            "gIoU": giou(strict), "gIoU_lenient": giou(lenient), "cIoU": ciou(strict),
            "format": float(np.mean([r.reward.answer.in_format for r in self.rows])),
            "box_accuracy": float(np.mean([r.reward.answer.in_format and r.reward.box_iou > 0.5 for r in self.rows])),
            "truncated": float(np.mean([r.truncated for r in self.rows])),
            "gIoU_interval": bootstrap_interval(giou, strict), "gIoU_lenient_interval": bootstrap_interval(giou, lenient),
            "cIoU_interval": bootstrap_interval(ciou, strict), "count": len(self.rows),
        }
        summary["by_kind"] = {}
        for kind in dict.fromkeys(r.sample.kind for r in self.rows):
            some = [r for r in self.rows if r.sample.kind == kind]
            summary["by_kind"][kind] = {
                "gIoU": giou([r.pair for r in some]), "gIoU_lenient": giou([r.reward.pair for r in some]),
                "cIoU": ciou([r.pair for r in some]), "format": float(np.mean([r.reward.answer.in_format for r in some])),
                "count": len(some),
            }
        return summary


def policy_image(sample: Sample, size: int):
    """The square picture the policy sees, RGB [size, size]."""
    return sample.image if sample.image.size == (size, size) else sample.image.resize((size, size))


def evaluate(policy: Policy, segmenter: Segmenter, data, s: Settings, name: str = "", blank: bool = False) -> Report:
    """Answer every question of `data` greedily and score it.

    `name` is shown beside the progress bar, which is left out without one. `blank` shows the policy (not SAM) a grey picture in
    place of each: what is left of the score does not come from looking.
    """
    report, step = Report(), max(1, 16384 // ((s.image_size // 28) ** 2 + 160))  # about 16,000 prompt tokens at a time
    for i in tqdm(range(0, len(data), step), desc=f"test {name}", disable=not name, leave=False, dynamic_ncols=True):
        samples = [data[j] for j in range(i, min(i + step, len(data)))]
        if s.empty_truth == "excluded":
            samples = [x for x in samples if x.mask.any()]
        if not samples:
            continue
        images = [policy_image(x, s.image_size) for x in samples]
        if blank:
            images = [Image.new("RGB", image.size, (128, 128, 128)) for image in images]
        with torch.no_grad():
            prompts = encode(policy, images, [x.question for x in samples])
        for x, [answer] in zip(samples, sample(policy, prompts, 1, s.max_new_tokens, temperature=0)):
            [reward] = score_group(
                segmenter, x, [answer.text], policy.frame(s.image_size), s.accuracy, max_points=s.max_points, points=s.points, lenient=True
            )
            report.rows.append(Row(x, answer.text, answer.truncated, reward))
    if not report.rows:
        raise UserError(f"{s.eval_data or s.data}: every true mask is empty, and --empty-truth is excluded")
    return report


def ceiling(segmenter: Segmenter, data) -> dict:
    """What the frozen SAM makes of the true boxes: the best that boxes without points could reach."""
    values = []
    for i in range(len(data)):
        x = data[i]
        if x.box_only:
            values.append(1.0)  # boxes are compared with boxes
        elif x.mask.any():
            [mask] = segmenter.masks(np.asarray(x.image), [tight_box(x.mask)], [[]])
            values.append(iou(*intersection_union(mask, x.mask, x.ignore)))
    return {"gIoU": float(np.mean(values)), "count": len(values)}


def before_after(summary: dict) -> str:
    """The table printed at the end."""
    rows = [f"{'held-out test, greedy':<24}{'gIoU':>8}{'lenient':>9}{'cIoU':>8}{'format':>8}"]
    for name in ("base", "trained"):
        x = summary[name]
        rows.append(f"{name:<24}{x['gIoU']:>8.3f}{x['gIoU_lenient']:>9.3f}{x['cIoU']:>8.3f}{x['format']:>8.3f}")
    rows.append(f"{'true boxes through SAM':<24}{summary['ceiling']['gIoU']:>8.3f}")
    return "\n".join(rows)
