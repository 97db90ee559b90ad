"""Log some steps token by token, in trace.jsonl. report.py shows them on a page.

A group is a question with its answers. The log has at most two groups of a step. The first is the
group whose rewards differ most. The second is the last group of the batch. It belongs to the last
update, and earlier updates have already changed the policy. So its ratios are not 1, and the clip
can act.
With several processes, these are groups of the first process.
The first and the last step are logged, and every step at the interval --trace-every. After the
first interval, a step is also logged if its gradient norm or its share of clipped tokens is the
largest so far. The file has at most about 2 MB. If it would get longer, the interval is doubled.
"""

import base64
import io
import json
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .config import Settings, UserError
from .data.masks import to_rle
from .files import save_text
from .policy import logprobs
from .runs import read_log

BUDGET = 2_000_000  # bytes of trace.jsonl
NATS = 10_000  # log-probabilities are stored as integers, in units of 0.0001 nat
SIDE = 336  # pixels: the longer side of a logged picture


# ------------------------------------------------------------------------------- the log


class Trace:
    """Decide which steps are logged, and log them."""

    def __init__(self, folder: Path, s: Settings, start: int, total: int):
        """Begin the log of a run of `total` steps, of which the first `start` are done.

        Lines of later steps are removed from the log.
        """
        self.file = folder / "trace.jsonl"
        self.every = s.trace_every
        self.total = total
        self.largest = {"gradient": 0.0, "clip": 0.0}
        if not self.every:
            return
        kept = [line for line in read_log(folder, name="trace") if line.get("step", 0) <= start]
        save_text(self.file, "".join(json.dumps(line) + "\n" for line in kept))
        for line in read_log(folder, start):  # for the largest values of these steps
            self.reasons(line)

    def reasons(self, line: dict) -> list[str]:
        """Return the reasons to log the step of this log line: "interval", "gradient", "clip".

        Call it once for each step, because it also keeps the largest values so far.
        """
        step = line["step"]
        found = []
        if step in (1, self.total) or step % self.every == 0:
            found.append("interval")
        values = {
            "gradient": line.get("grad_norm", 0.0),
            "clip": line.get("clip_low", 0.0) + line.get("clip_high", 0.0),
        }
        for name, value in values.items():
            if value > self.largest[name]:
                self.largest[name] = value
                if step > self.every:  # nearly all of the first steps have the largest value so far
                    found.append(name)
        return found

    def add(self, parts, rollouts: list, line: dict) -> None:
        """Log two groups of a finished step, if there is a reason and space.

        If the file would get too long, the interval is doubled.
        """
        if not self.every:
            return
        reasons = self.reasons(line)
        if not reasons:
            return
        step = line["step"]
        text = packed(traced_step(parts, rollouts, step, reasons))
        left = BUDGET - self.file.stat().st_size - len(text)
        if step == self.total or left > len(text):  # the last step always has space
            with self.file.open("a", encoding="utf-8") as file:
                file.write(text)
        # Half of the bytes that are left is for steps with the largest values so far.
        while len(text) * (self.total - step) / self.every > left / 2 and self.every < self.total:
            self.every *= 2


def keep_tokens(rollouts: list, logp: torch.Tensor, entropy: torch.Tensor) -> None:
    """Store a forward's values of each token [S] in the rollouts. A later forward replaces them."""
    sizes = [sum(rollout.lengths) for rollout in rollouts]
    for rollout, new, unsure in zip(rollouts, logp.split(sizes), entropy.split(sizes)):
        rollout.new = new
        rollout.entropy = unsure


def packed(content: dict) -> str:
    """Return a line of trace.jsonl. It has the step, and the compressed content."""
    text = json.dumps(content, separators=(",", ":"))
    compressed = base64.b64encode(zlib.compress(text.encode())).decode()
    return json.dumps({"step": content["step"], "zlib": compressed}) + "\n"


def read_trace(folder: Path) -> list[dict]:
    """Return the logged steps of a run, as dicts like the result of traced_step.

    Raises UserError for a damaged line.
    """
    steps = []
    for line in read_log(folder, name="trace"):
        try:
            steps.append(json.loads(zlib.decompress(base64.b64decode(line["zlib"]))))
        except (KeyError, TypeError, ValueError, zlib.error):
            raise UserError(
                f"{folder / 'trace.jsonl'} is damaged: delete it. The page then has only curves"
            ) from None
    return steps


# ------------------------------------------------------------------------------ contents


def traced_step(parts, rollouts: list, step: int, reasons: list[str]) -> dict:
    """Return a logged step of this process: the rewards of its groups, and two groups in full."""
    questions = []
    for rollout in rollouts:
        rewards = [reward.total for reward in rollout.rewards]
        questions.append({"question": rollout.sample.question, "rewards": rewards})
    widest = int(np.argmax([np.std(one["rewards"]) for one in questions]))
    places = {widest: "largest differences", len(rollouts) - 1: "last question"}
    groups = []
    for place, why in places.items():
        update = update_number(place, len(rollouts), parts.settings.updates)
        group = {"place": place, "why": why, "update": update}
        groups.append(group | traced_group(parts, rollouts[place]))
    return {"step": step, "reasons": reasons, "questions": questions, "groups": groups}


def update_number(place: int, questions: int, updates: int) -> int:
    """Return the number of the update that uses this place in the batch. It counts from 1."""
    return ((place + 1) * updates - 1) // questions + 1


@torch.no_grad()
def traced_group(parts, rollout) -> dict:
    """Return one question with its picture, its answers and their tokens.

    One forward computes the tokens' log-probabilities under the policy after the step.
    """
    policy, s, sample = parts.policy, parts.settings, rollout.sample
    after, _ = logprobs(policy, [rollout.prompt], [rollout.ids], s.temperature)  # [S]
    tokens = {
        "old": rollout.old,
        "new": rollout.new,
        "after": after,
        "reference": rollout.reference,
        "entropy": rollout.entropy,
    }
    described = described_sample(sample, policy.answer_side(s.image_size))
    answers = []
    start = 0
    for i, completion in enumerate(rollout.completions):
        end = start + len(completion.ids)
        answer = described_answer(rollout.rewards[i], described["size"])
        answer["advantage"] = round(rollout.advantage[i].item(), 4)
        answer["truncated"] = completion.truncated
        answer["tokens"] = token_texts(policy.processor.tokenizer, completion.ids.tolist())
        for name, values in tokens.items():
            if values is not None:  # without beta there is no reference
                answer[name] = (values[start:end].float() * NATS).round().long().tolist()
        answers.append(answer)
        start = end
    return described | {"answers": answers}


def described_sample(sample, side: int, longest: int = SIDE, quality: int = 85) -> dict:
    """Return a question with its kind, its small picture (WebP of this quality) and its true mask.

    Coordinates of answers go from 0 to `side`. The picture's longer side has at most `longest`
    pixels.
    """
    size = small_size(sample.image.size, longest)
    return {
        "kind": sample.kind,
        "question": sample.question,
        "side": side,
        "size": size,
        "picture": webp(sample.image, size, quality),
        "truth": small_rle(sample.mask, size),
    }


def described_answer(reward, size: tuple[int, int]) -> dict:
    """Return the objects, the mask and the reward of an answer."""
    return {
        "objects": [asdict(one) for one in reward.answer.objects or []],
        "why": reward.answer.why,
        "mask": small_rle(reward.mask, size),
        "iou": round(reward.iou, 4),
        "terms": {name: round(value, 4) for name, value in reward.terms.items()},
        "reward": round(reward.total, 4),
    }


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """Return the text of each token. If tokens share a character, the last of them gets it."""
    texts = []
    done = 0  # characters of the tokens before
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        if end < len(ids):
            text = text.rstrip("\ufffd")  # an incomplete character
        texts.append(text[done:])
        done = max(done, len(text))
    return texts


# ------------------------------------------------------------------------------ pictures


def small_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return width and height of a picture whose longer side has at most `side` pixels."""
    scale = min(1, side / max(size))
    return tuple(max(1, round(n * scale)) for n in size)


def webp(image: Image.Image, size: tuple[int, int], quality: int) -> str:
    """Return a picture of this size as WebP in base64."""
    file = io.BytesIO()
    image.resize(size).save(file, "WEBP", quality=quality)
    return base64.b64encode(file.getvalue()).decode()


def small_rle(mask: np.ndarray | None, size: tuple[int, int]) -> dict | None:
    """Return a mask [H, W] as COCO's RLE of this size (W, H). None stays None."""
    if mask is None:
        return None
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    return to_rle(np.asarray(grey.resize(size, Image.Resampling.BOX)) > 127)
