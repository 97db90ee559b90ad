"""Evaluate on held-out questions, with the parser, the SAM and the rules of training.

An evaluation always returns a strict and a lenient score. In the strict scores gIoU and cIoU, an
answer outside the format has intersection 0, and its union is the true mask. In the lenient score
gIoU_lenient, a box in any format counts. A gain in gIoU_lenient therefore does not come from the
format.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .config import Settings, UserError, cell_size
from .data import Sample
from .memory import free_memory
from .metrics import bootstrap_interval, ciou, giou, intersection_union, iou, mean, tight_box, vote
from .plots import sample_sheet
from .decoding import Completion, generate
from .policy import Policy, Prompt, encode
from .processes import gather, is_first, join_processes, share
from .lenient import read_leniently
from .reward import Object, Reward, no_terms, object_masks, score_group
from .segmenter import Segmenter
from .sizes import EVALUATED_TOKENS, questions_per_batch

GREY = (128, 128, 128)

# ------------------------------------------------------------------------------------- scores


@dataclass
class ScoredAnswer:
    """Hold the texts and numbers of one evaluated question. See also `shown`."""

    index: int  # index of the question in the data set
    id: str
    picture: str  # name of the picture, which several questions can share
    kind: str
    question: str
    texts: list[str]  # all answers (a greedy evaluation has one)
    text: str  # the scored answer, see judge
    truncated: bool
    in_format: bool
    why: str  # the error in the format
    box_iou: float
    lenient_pixels: tuple[int, int]  # intersection and union in pixels, for the lenient score
    strict_pixels: tuple[int, int]  # the same, strict: intersection 0 outside the format
    ceiling: float | None = None  # IoU of SAM's mask from the true boxes, None without an object
    no_target: bool = False  # nothing is to be found: the true mask is empty
    nothing: bool | None = None  # the strict vote (see judge) gives an empty mask; None: no vote

    @property
    def iou(self) -> float:
        """Return the lenient IoU of the mask, 0 to 1."""
        return iou(*self.lenient_pixels)


@dataclass
class Panel:
    """Hold one evaluated question with its picture and its mask. plots.py draws it."""

    sample: Sample
    text: str
    reward: Reward


def scores(rows: list[ScoredAnswer], with_nothing: bool) -> dict:
    """Return gIoU, gIoU_lenient, cIoU and format rate, each 0 to 1, and the question count.

    With several answers to a question, one answer in the format is enough for the format rate.
    `with_nothing` adds N_acc and T_acc of gRefCOCO (arXiv 2306.00968), each 0 to 1. N_acc is the
    share of questions without a target for which the answer says that nothing is there. T_acc is
    the share of questions with a target for which the answer names an object. An answer outside the
    format is wrong in both. If there are no questions of one kind, its share is left out.
    """
    strict = [row.strict_pixels for row in rows]
    lenient = [row.lenient_pixels for row in rows]
    found = {
        "gIoU": giou(strict),
        "gIoU_lenient": giou(lenient),
        "cIoU": ciou(strict),
        "format": mean(row.in_format for row in rows),
        "count": len(rows),
    }
    if not with_nothing:
        return found
    for name, no_target in (("N_acc", True), ("T_acc", False)):
        # For an answer outside the format, `nothing` is None, which equals neither.
        correct = [row.nothing == no_target for row in rows if row.no_target == no_target]
        if correct:
            found[name] = mean(correct)
    return found


@dataclass
class Report:
    """Hold the scored answers of an evaluation, in the order of the data."""

    rows: list[ScoredAnswer]
    several: bool = False  # True with --objects several

    @property
    def with_nothing(self) -> bool:
        """True if the report needs N_acc and T_acc."""
        return self.several or any(row.no_target for row in self.rows)

    def summary(self) -> dict:
        """Return the scores of all questions with 95 % intervals, and the scores of each kind.

        The intervals come from resampled pictures. box_accuracy (REC accuracy) is a share of all
        answers: those in the format with a box IoU above 0.5. The box of several objects is the box
        around all of them. truncated is the share of answers that were cut off.
        """
        rows = self.rows
        strict = [row.strict_pixels for row in rows]
        lenient = [row.lenient_pixels for row in rows]
        pictures = [row.picture for row in rows]
        summary = scores(rows, self.with_nothing)
        summary["box_accuracy"] = mean(row.in_format and row.box_iou > 0.5 for row in rows)
        summary["truncated"] = mean(row.truncated for row in rows)
        summary["gIoU_interval"] = bootstrap_interval(giou, strict, pictures)
        summary["gIoU_lenient_interval"] = bootstrap_interval(giou, lenient, pictures)
        summary["cIoU_interval"] = bootstrap_interval(ciou, strict, pictures)
        summary["by_kind"] = {}
        for kind in dict.fromkeys(row.kind for row in rows):
            of_kind = [row for row in rows if row.kind == kind]
            summary["by_kind"][kind] = scores(of_kind, self.with_nothing)
        return summary

    def each(self) -> list[dict]:
        """Return the answer and the scores of each question. Two runs can then be compared."""
        left_out = ["index", "texts", "truncated", "ceiling"]
        if not self.with_nothing:
            left_out += ["no_target", "nothing"]
        lines = []
        for row in self.rows:
            line = asdict(row)
            for name in left_out:
                del line[name]
            lines.append(line | {"iou": row.iou, "iou_strict": iou(*row.strict_pixels)})
        return lines

    @property
    def ceiling(self) -> dict:
        """Return the gIoU of SAM's masks from the true boxes, after evaluate(with_ceiling=True).

        Answers with a box and without points can hardly score higher.
        """
        values = [r.ceiling for r in self.rows if r.ceiling is not None]
        return {"gIoU": float(np.mean(values)), "count": len(values)}


def score_table(title: str, rows: dict[str, dict]) -> str:
    """Return a table of scores as text, with one line for each row. A row may have gIoU alone.

    The table has the columns N-acc and T-acc only if a row has these scores.
    """
    more = [name for name in ("N_acc", "T_acc") if any(name in x for x in rows.values())]
    head = f"{title:<24}{'gIoU':>8}{'lenient':>9}{'cIoU':>8}{'format':>8}"
    head += "".join(f"{name.replace('_', '-'):>8}" for name in more)
    lines = [head]
    for name, x in rows.items():
        line = f"{name:<24}{x['gIoU']:>8.3f}"
        if "cIoU" in x:
            line += f"{x['gIoU_lenient']:>9.3f}{x['cIoU']:>8.3f}{x['format']:>8.3f}"
        for name in more:
            line += f"{x[name]:>8.3f}" if name in x else " " * 8
        lines.append(line.rstrip())
    return "\n".join(lines)


def before_after(summary: dict) -> str:
    """Return the table that a run prints at its end. `summary` is the content of summary.json."""
    rows = {
        "base": summary["base"],
        "trained": summary["trained"],
        "true boxes through SAM": summary["ceiling"],
    }
    return score_table("held-out test, greedy", rows)


# ------------------------------------------------------------------------------ one question


def policy_image(sample: Sample, size: int) -> Image.Image:
    """Return the square picture that the policy sees, RGB [size, size]."""
    return sample.image.resize((size, size))


@torch.no_grad()
def encode_questions(policy: Policy, samples: list[Sample], size: int) -> list[Prompt]:
    """Encode the questions and the pictures of samples. Pictures become size x size pixels."""
    images = [policy_image(sample, size) for sample in samples]
    return encode(policy, images, [sample.question for sample in samples])


def majority(rewards: list[Reward], voters: list[int]) -> tuple[int, np.ndarray | None]:
    """Return an index, and the majority mask, bool [H, W]. There is one reward for each answer.

    `voters` lists the indices of the answers that vote with their masks. The index is that of the
    answer whose mask agrees most with the majority (metrics.vote). Without voters the function
    returns 0 and None.
    """
    if not voters:
        return 0, None
    middle, mask = vote([rewards[i].mask for i in voters])
    return voters[middle], mask


@dataclass
class Verdict:
    """Hold the result of `judge` for one question."""

    chosen: int  # index of the scored answer
    reward: Reward  # the scored answer's, without terms; mask and IoU are those of the vote
    lenient_pixels: tuple[int, int]  # intersection and union, vote of all readable answers
    strict_pixels: tuple[int, int]  # the same, vote of the answers in the format
    nothing: bool | None  # the strict mask is empty; None if no answer is in the format


def judge(segmenter: Segmenter, x: Sample, texts: list[str], s: Settings, side: int) -> Verdict:
    """Score the answers to one question, with coordinates in a `side` x `side` square.

    The answers vote on a mask. In the strict vote, each answer in the format takes part. In the
    lenient vote, each answer with a readable box takes part. The scored answer is the one that
    agrees most with the strict vote. If the strict vote has no voter, the lenient vote decides. If
    that vote has no voter either, the first answer is scored.
    """
    answers = [read_leniently(text, side, s.max_points, s.objects) for text in texts]
    rewards = score_group(segmenter, x, answers, s, no_terms)
    read = [i for i, reward in enumerate(rewards) if reward.mask is not None]
    in_format = [i for i in read if rewards[i].answer.in_format]
    _, lenient_mask = majority(rewards, read)
    lenient = intersection_union(lenient_mask, x.mask, x.ignore)
    chosen, mask = majority(rewards, in_format or read)
    pixels = intersection_union(mask, x.mask, x.ignore)
    if in_format:
        strict, nothing = pixels, not mask.any()
    else:
        strict, nothing = intersection_union(None, x.mask, x.ignore), None
    reward = replace(rewards[chosen], mask=mask, pixels=pixels, iou=iou(*pixels))
    return Verdict(chosen, reward, lenient, strict, nothing)


def true_box_iou(segmenter: Segmenter, x: Sample, objects: str = "one") -> float | None:
    """Return the IoU of SAM's mask from the true box, or None if the true mask is empty.

    With `objects` "several" each true object has its own box, if the data set has its mask.
    """
    if not x.mask.any():
        return None
    true_masks = [x.mask]
    if objects == "several" and x.masks:
        true_masks = x.masks
    boxes = [Object(tight_box(mask)) for mask in true_masks if mask.any()]
    masks = object_masks(segmenter, x, boxes)  # [n, H, W]
    return iou(*intersection_union(masks.any(0), x.mask, x.ignore))


# -------------------------------------------------------------------------------- a data set


def batch_size(policy: Policy, s: Settings, votes: int = 1) -> int:
    """Return the number of questions in one batch.

    The number is --eval-batch. If --eval-batch is 0, the batch has about 16,000 prompt tokens,
    divided by `votes`. On a GPU with little free memory, the batch is smaller. On a CPU, the batch
    does not depend on free memory. Another batch has another padding, which can change greedy
    answers.
    """
    if s.eval_batch:
        return s.eval_batch
    picture_tokens = (s.image_size // cell_size(policy.base.config)) ** 2
    tokens = picture_tokens + 160  # the tiny policy's prompts have about 150 text tokens
    most = max(1, EVALUATED_TOKENS // tokens // votes)
    if s.device == "cpu":
        return most
    return questions_per_batch(policy.base, most, tokens, replace(s, group=votes), free_memory(s))


def load_samples(data, indices: Iterable[int], s: Settings) -> dict[int, Sample]:
    """Read questions by index, and leave out the questions that --empty-truth excludes."""
    samples = {i: data[i] for i in indices}
    if s.empty_truth == "excluded":
        samples = {i: x for i, x in samples.items() if x.mask.any()}
    return samples


def answer_batch(
    policy: Policy, samples: dict[int, Sample], s: Settings, blank: bool, votes: int
) -> list[list[Completion]]:
    """Answer questions in one batch.

    Each question gets one greedy answer, or `votes` answers sampled at temperature 1.
    """
    seen = list(samples.values())
    if blank:
        seen = [replace(x, image=Image.new("RGB", x.image.size, GREY)) for x in seen]
    prompts = encode_questions(policy, seen, s.image_size)
    if votes == 1:
        return generate(policy, prompts, 1, s.max_new_tokens, temperature=0)
    uniforms = []
    for i in samples:  # the seed depends on the question's index and not on the batch
        seed = torch.Generator().manual_seed(s.seed * 10**6 + i)
        uniforms.append(torch.rand(votes, s.max_new_tokens, generator=seed))
    uniforms = torch.stack(uniforms)  # [B, votes, L]
    return generate(policy, prompts, votes, s.max_new_tokens, 1.0, uniforms)


def score_batch(
    policy: Policy,
    segmenter: Segmenter,
    samples: dict[int, Sample],
    groups: list[list[Completion]],
    s: Settings,
    with_ceiling: bool,
) -> list[ScoredAnswer]:
    """Score the answers to the questions of one batch. `groups` has a list for each sample."""
    side = policy.answer_side(s.image_size)
    rows = []
    for (i, x), answers in zip(samples.items(), groups):
        texts = [answer.text for answer in answers]
        verdict = judge(segmenter, x, texts, s, side)
        answer = verdict.reward.answer
        row = ScoredAnswer(
            index=i,
            id=x.id,
            picture=x.picture,
            kind=x.kind,
            question=x.question,
            texts=texts,
            text=texts[verdict.chosen],
            truncated=answers[verdict.chosen].truncated,
            in_format=answer.in_format,
            why=answer.why,
            box_iou=verdict.reward.box_iou,
            lenient_pixels=verdict.lenient_pixels,
            strict_pixels=verdict.strict_pixels,
            no_target=not x.mask.any(),
            nothing=verdict.nothing,
        )
        if with_ceiling:
            row.ceiling = true_box_iou(segmenter, x, s.objects)
        rows.append(row)
    return rows


def open_kept_rows(file: Path, description: str) -> list[ScoredAnswer]:
    """Return the rows that an interrupted evaluation has kept in a file.

    The first line of the file is `description`. Each further line holds the rows of one batch. A
    file of another evaluation is emptied.
    """
    try:
        # A kill can leave an incomplete last line. This line is removed.
        first, *lines, _ = file.read_text(encoding="utf-8").split("\n")
        if first == description:
            file.write_text("\n".join([first, *lines, ""]), encoding="utf-8")
            return [ScoredAnswer(**row) for line in lines for row in json.loads(line)]
    except (OSError, ValueError, TypeError):
        pass  # the file holds nothing usable
    file.write_text(f"{description}\n", encoding="utf-8")
    return []


def append_rows(file: Path, rows: list[ScoredAnswer]) -> None:
    """Append the rows of one batch to a file for open_kept_rows."""
    with file.open("a", encoding="utf-8") as opened:
        opened.write(json.dumps([asdict(row) for row in rows]) + "\n")


def batches(indices: range, size: int, name: str) -> Iterator[range]:
    """Yield `indices` in batches of `size`. A `name` gives the first process a progress bar."""
    quiet = not (name and is_first())
    starts = range(0, len(indices), size)
    for start in tqdm(starts, name, disable=quiet, leave=False, dynamic_ncols=True):
        yield indices[start : start + size]


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
    """Answer every question of `data` and score the answers.

    Several processes share the questions. Arguments:
    - `name` is the label of the progress bar.
    - `blank` shows the policy a grey picture, so the score measures guessing. SAM sees the true
      picture.
    - `with_ceiling` also scores SAM's masks from the true boxes.
    - If `votes` is 1, the answer is greedy. Otherwise so many answers are sampled, at temperature
      1. The same seed gives the same answers.
    - `keep` is a pair: a path, and a line that describes the evaluation. Each process keeps its
      rows in a file: the path, followed by the number of the process. A later call with the same
      line continues an interrupted evaluation.

    Padding changes rounding, and rounding can change a greedy answer. s.eval_batch = 1 has no
    padding. Raises UserError if --empty-truth excludes every question.
    """
    processes = join_processes(s)
    size = batch_size(policy, s, votes)
    rows = []
    if keep:  # the rows of a file depend on the number of processes and on the batch size
        file = Path(f"{keep[0]}.{processes.process_index}")
        rows = open_kept_rows(file, f"{keep[1]} {processes.num_processes} {size}")
    done = {row.index for row in rows}
    for indices in batches(share(range(len(data))), size, name):
        if not done.isdisjoint(indices):
            continue
        samples = load_samples(data, indices, s)
        if not samples:
            continue
        groups = answer_batch(policy, samples, s, blank, votes)
        new = score_batch(policy, segmenter, samples, groups, s, with_ceiling)
        rows += new
        if keep:
            append_rows(file, new)
    every = sorted(gather(rows), key=lambda row: row.index)
    if not every:
        asked = s.eval_data or s.data
        raise UserError(f"{asked}: every true mask is empty, so take --empty-truth correct")
    return Report(every, s.objects == "several")


# ---------------------------------------------------------------------------------- pictures


def shown(
    segmenter: Segmenter,
    data,
    rows: Iterable[ScoredAnswer],
    s: Settings,
    side: int,
) -> list[Panel]:
    """Restore the pictures and masks of a few rows from their texts.

    For `side` see Policy.answer_side.
    """
    panels = []
    for row in rows:
        x = data[row.index]
        verdict = judge(segmenter, x, row.texts, s, side)
        panels.append(Panel(x, row.text, verdict.reward))
    return panels


def draw_sheet(
    path: Path,
    title: str,
    policy: Policy,
    segmenter: Segmenter,
    data,
    rows: Iterable[ScoredAnswer],
    s: Settings,
) -> None:
    """Write a PNG with one panel for each row. See plots.sample_sheet."""
    side = policy.answer_side(s.image_size)
    panels = shown(segmenter, data, rows, s, side)
    sample_sheet(path, panels, side, title)
