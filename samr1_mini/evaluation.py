"""Evaluation: greedy answers to held-out questions, by the same parser, the same SAM and the same rule as in training.

Two figures stand side by side everywhere. gIoU: an answer outside the format counts 0 (and its whole true mask goes
into cIoU's union). gIoU_lenient: a box found in any shape in the text counts, so what is gained there is not the
format.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm

from .config import Settings, UserError, cell_size
from .data import Sample
from .metrics import bootstrap_interval, ciou, giou, intersection_union, iou, tight_box, vote
from .decoding import generate
from .policy import Policy, encode
from .reward import Reward, score_group
from .memory import free_memory, questions_per_batch
from .processes import is_first, join_processes, together
from .segmenter import Segmenter


@dataclass
class Row:
    """One evaluated question in numbers and texts alone; `shown` makes its picture and mask again to be drawn."""

    index: int  # its place in the data
    id: str
    picture: str  # questions with the same one are about the same picture
    kind: str
    question: str
    texts: list[str]  # all answers; greedy there is one
    text: str  # the one that counts: the middle one of the vote
    truncated: bool
    in_format: bool
    why: str  # what broke the format
    box_iou: float
    pair: tuple[int, int]  # intersection and union, read leniently
    strict: tuple[int, int]  # the same as the strict figures count them
    ceiling: float | None = (
        None  # IoU of what SAM makes of the true box; None if not asked, or without an object
    )

    @property
    def iou(self) -> float:
        """Of the mask, read leniently."""
        return iou(*self.pair)


@dataclass
class Panel:
    """One evaluated question with its picture and its mask, to be drawn; see plots.py."""

    sample: Sample
    text: str
    reward: Reward


def scores(rows: list[Row]) -> dict:
    """Fractions, not percent: gIoU, gIoU_lenient, cIoU, format rate; and the count."""
    strict, lenient = [r.strict for r in rows], [r.pair for r in rows]
    return {
        "gIoU": giou(strict),
        "gIoU_lenient": giou(lenient),
        "cIoU": ciou(strict),
        "format": float(np.mean([r.in_format for r in rows])),
        "count": len(rows),
    }


@dataclass
class Report:
    """What an evaluation found: a row a question."""

    rows: list[Row]

    def summary(self) -> dict:
        """The scores; share of boxes with IoU above 0.5 (REC accuracy) and of answers that were cut off; 95 % intervals
        (over pictures); the scores by kind of question."""
        rows, kinds = self.rows, dict.fromkeys(r.kind for r in self.rows)
        strict, lenient, pictures = zip(*((r.strict, r.pair, r.picture) for r in rows))
        return scores(rows) | {
            "box_accuracy": float(np.mean([r.in_format and r.box_iou > 0.5 for r in rows])),
            "truncated": float(np.mean([r.truncated for r in rows])),
            "gIoU_interval": bootstrap_interval(giou, strict, pictures),
            "gIoU_lenient_interval": bootstrap_interval(giou, lenient, pictures),
            "cIoU_interval": bootstrap_interval(ciou, strict, pictures),
            "by_kind": {kind: scores([r for r in rows if r.kind == kind]) for kind in kinds},
        }

    def each(self) -> list[dict]:
        """Every question's answer and its own figures, so that two runs can be compared question by question."""
        names = (
            "id",
            "picture",
            "question",
            "kind",
            "text",
            "in_format",
            "why",
            "box_iou",
            "iou",
            "pair",
            "strict",
        )
        figures = lambda row: {name: getattr(row, name) for name in names} | {
            "iou_strict": iou(*row.strict)
        }
        return [figures(row) for row in self.rows]

    @property
    def ceiling(self) -> dict:
        """What the frozen SAM makes of the true boxes, the best that boxes without points could reach, from the same
        pass over the pictures: after evaluate(with_ceiling=True)."""
        values = [r.ceiling for r in self.rows if r.ceiling is not None]
        return {"gIoU": float(np.mean(values)), "count": len(values)}


def policy_image(sample: Sample, size: int) -> Image.Image:
    """The square picture the policy sees, RGB [size, size]."""
    return sample.image.resize((size, size))  # a copy where it has that size


def batch_size(policy: Policy, s: Settings, votes: int = 1) -> int:
    """Return how many questions are answered in one batch: --eval-batch, or about 16,000 prompt tokens.

    Votes share these tokens. On a GPU the batch is smaller where free memory is short. On a CPU the number depends on
    the settings alone, because padding can move greedy answers.
    """
    if s.eval_batch:
        return s.eval_batch
    tokens = (s.image_size // cell_size(policy.base.config)) ** 2 + 160
    most = max(1, 16384 // tokens // votes)
    if s.device == "cpu":
        return most
    return questions_per_batch(policy.base, most, tokens, replace(s, group=votes), free_memory(s))


def judge(
    segmenter: Segmenter, x: Sample, texts: list[str], s: Settings, coordinate_range: int
) -> tuple:
    """Score the answers to one question, and let them vote where there are several: in the strict figures those in the
    format, in the lenient ones all that can be read.

    Returns the number of the answer that counts (the middle one of the strict vote, else of the lenient one, else the
    first), its reward with the mask that was voted for, and (intersection, union) as the lenient and as the strict
    figures count them.
    """
    rewards = score_group(
        segmenter,
        x,
        texts,
        coordinate_range,
        s.accuracy,
        s.reward_weights,
        s.max_points,
        s.points,
        lenient=True,
    )
    chosen, mask, pairs = 0, None, []
    for strict in (False, True):
        voters = [
            i
            for i, r in enumerate(rewards)
            if r.mask is not None and (r.answer.in_format or not strict)
        ]
        voted = None
        if voters:
            middle, voted = vote([rewards[i].mask for i in voters])
            chosen, mask = voters[middle], voted
        pairs.append(intersection_union(voted, x.mask, x.ignore))
    pair = intersection_union(mask, x.mask, x.ignore)
    return chosen, replace(rewards[chosen], mask=mask, pair=pair, iou=iou(*pair)), *pairs


def kept_rows(file: Path, what: str) -> dict[int, Row]:
    """The rows in `file` by index, a line a batch, if its first line is `what`; else the file begins anew."""
    try:
        # a line that a kill has cut off stands behind the last end of line
        first, *lines, _ = file.read_text(encoding="utf-8").split("\n")
        if first == what:
            whole = "\n".join(
                [first, *lines, ""]
            )  # without it, or the next line would begin with it
            file.write_text(whole, encoding="utf-8")
            return {row["index"]: Row(**row) for line in lines for row in json.loads(line)}
    except (OSError, ValueError, TypeError):
        pass  # nothing that can be used
    file.write_text(f"{what}\n", encoding="utf-8")
    return {}


def evaluate(
    policy: Policy,
    segmenter: Segmenter,
    data,
    s: Settings,
    name: str = "",
    blank: bool = False,
    with_ceiling: bool = False,
    votes: int = 1,
    keep: tuple[Path, str] | None = None,
) -> Report:
    """Answer every question of `data` and score it: greedily, or by the vote of `votes` answers drawn at temperature
    1, the same ones every time.

    `name` is shown beside the progress bar, which is left out without one. `blank` shows the policy (not SAM) a grey
    picture in place of each: what is left of the score does not come from looking. `with_ceiling` has SAM segment the
    true boxes too, while it has the picture. `keep`, a path and a line that says what is evaluated: rows are kept there
    (with the process's number behind the name) and, under the same line, are not answered again. Several processes
    share the questions and end with the same whole report.
    Questions are answered side by side, and padding can move a greedy answer by a rounding: with s.eval_batch = 1 an
    answer depends on nothing beside it.
    """
    processes, step = join_processes(s.device), batch_size(policy, s, votes)
    share = range(len(data))[processes.process_index :: processes.num_processes]
    quiet = not (name and is_first())

    def answered() -> list[Row]:
        part = keep and Path(f"{keep[0]}.{processes.process_index}")
        # the number of processes and the size of a batch tell which questions a part holds
        rows = kept_rows(part, f"{keep[1]} {processes.num_processes} {step}") if keep else {}
        for i in tqdm(
            range(0, len(share), step),
            f"test {name}",
            disable=quiet,
            leave=False,
            dynamic_ncols=True,
        ):
            if rows.keys() & share[i : i + step]:
                continue
            samples = {j: data[j] for j in share[i : i + step]}
            if s.empty_truth == "excluded":
                samples = {j: x for j, x in samples.items() if x.mask.any()}
            if not samples:
                continue
            images = [policy_image(x, s.image_size) for x in samples.values()]
            if blank:
                images = [Image.new("RGB", image.size, (128, 128, 128)) for image in images]
            with torch.no_grad():
                prompts = encode(policy, images, [x.question for x in samples.values()])
            if votes == 1:
                groups = generate(policy, prompts, 1, s.max_new_tokens, temperature=0)
            else:  # what is drawn depends on the question's place alone
                seeds = [torch.Generator().manual_seed(s.seed * 10**6 + j) for j in samples]
                uniforms = [
                    torch.rand(votes, s.max_new_tokens, generator=seed) for seed in seeds
                ]  # B x [votes, L]
                groups = generate(
                    policy, prompts, votes, s.max_new_tokens, 1.0, torch.stack(uniforms)
                )
            for (j, x), answers in zip(samples.items(), groups):
                texts = [answer.text for answer in answers]
                chosen, reward, pair, strict = judge(
                    segmenter, x, texts, s, policy.coordinate_range(s.image_size)
                )
                rows[j] = Row(
                    j,
                    x.id,
                    x.picture,
                    x.kind,
                    x.question,
                    texts,
                    texts[chosen],
                    answers[chosen].truncated,
                    reward.answer.in_format,
                    reward.answer.why,
                    reward.box_iou,
                    pair,
                    strict,
                    true_box_iou(segmenter, x) if with_ceiling else None,
                )
            if keep:
                with part.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([asdict(rows[j]) for j in samples]) + "\n")
        return list(rows.values())

    rows = sorted(gather_object(together(answered)), key=lambda row: row.index)
    if not rows:
        raise UserError(
            f"{s.eval_data or s.data}: every true mask is empty, and --empty-truth is excluded"
        )
    return Report(rows)


def true_box_iou(segmenter: Segmenter, x: Sample) -> float | None:
    """IoU of what SAM makes of the true box; None where nothing is to be found."""
    if x.box_only:
        return 1.0  # boxes are compared with boxes
    if not x.mask.any():
        return None
    [mask] = segmenter.masks(np.asarray(x.image), [tight_box(x.mask)], [[]])
    return iou(*intersection_union(mask, x.mask, x.ignore))


def shown(
    segmenter: Segmenter, data, rows: Iterable[Row], s: Settings, coordinate_range: int
) -> list[Panel]:
    """The pictures, answers and masks of a few rows, scored again from their texts; for `coordinate_range` see Policy.coordinate_range."""
    pairs = ((row, data[row.index]) for row in rows)
    return [
        Panel(x, row.text, judge(segmenter, x, row.texts, s, coordinate_range)[1])
        for row, x in pairs
    ]


def before_after(summary: dict) -> str:
    """The table printed at the end."""
    rows = [f"{'held-out test, greedy':<24}{'gIoU':>8}{'lenient':>9}{'cIoU':>8}{'format':>8}"]
    for name in ("base", "trained"):
        x = summary[name]
        rows.append(
            f"{name:<24}{x['gIoU']:>8.3f}{x['gIoU_lenient']:>9.3f}{x['cIoU']:>8.3f}{x['format']:>8.3f}"
        )
    rows.append(f"{'true boxes through SAM':<24}{summary['ceiling']['gIoU']:>8.3f}")
    return "\n".join(rows)
