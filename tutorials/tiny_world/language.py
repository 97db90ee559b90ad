"""Stage "language": the policy learns to answer questions, as Qwen2.5-VL does before GRPO.

A batch has pictures, and behind each picture several rows. A row is a question and an answer.
Three sorts of rows follow each other: answers about the picture, answers that name a thing of the
picture whatever the question asks, and conclusions from a scene that the row describes as text.
The base model learns to compare only in answers that list coordinates first.
It never answers an indirect or a combined question about its own picture.
So GRPO has something to find.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from samr1_mini.policy import Policy, Prompt, encode, logprobs
from samr1_mini.tiny.scenes import Scene, Thing, ask
from .answers import (
    ANSWER,
    LISTING,
    STYLES,
    answer_parts,
    draw_style,
    fact_texts,
    fair_questions,
    listed,
)
from .ground import align_words, cut, policy_optimizers
from .training import learn, scenes_from

TURN = "<|im_end|>\n<|im_start|>assistant\n"  # from a question to its answer
A_WORD = "the"  # stands in for a question: all begin with a word, so the tokens before are the same
SLACK = 0.4  # how much too wide the base model's boxes are on each side, in lengths of the box
QUESTIONS = 7  # answers about a picture
OTHERS = 2  # of each of the two other sorts of rows, for each picture
WITHOUT_PART = ["attribute", "relation", "indirect", "combined"]


class Asked(NamedTuple):
    """A question about a picture."""

    kind: str
    question: str
    thing: Thing  # the right object


class Written(NamedTuple):
    """A row's tokens [t], and the tokens that are learnt, bool [t]."""

    ids: torch.Tensor
    learnt: torch.Tensor


class Described(NamedTuple):
    """A question about a scene that is described as text."""

    question: str
    hint: str
    description: str
    conclusion: str  # the name of the right object


def written(policy: Policy, *texts: tuple[str, bool]) -> Written:
    """Join (text, is it learnt) pairs to one row. Each text begins where a word begins."""
    ids, learnt = [], []
    for text, wanted in texts:
        tokens = policy.processor.tokenizer(text).input_ids
        ids += tokens
        learnt += [wanted] * len(tokens)
    on = {"device": policy.device}
    return Written(torch.tensor(ids, **on), torch.tensor(learnt, **on))


def questions_on(scene: Scene, rng: np.random.Generator) -> list[Asked]:
    """Draw up to QUESTIONS questions about a scene, at least one.

    Indirect and combined questions are left out.
    """
    kinds = rng.choice(["attribute", "part", "relation"], QUESTIONS, p=[0.4, 0.1, 0.5])
    questions = []
    for kind in kinds:
        found = ask(scene, rng, str(kind))
        if found:
            text, [thing] = found
            questions.append(Asked(str(kind), text, thing))
    if questions:
        return questions
    return [Asked("attribute", *fair_questions(scene, "attribute")[0])]


def shown_row(
    policy: Policy, asked: Asked, scene: Scene, rng: np.random.Generator, slack: float
) -> Written:
    """Return a question about the picture and its answer.

    In six of ten rows a hint asks for the answer's style. The base model learns to compare only
    if the answer first lists the coordinates that it compares. All other answers to a relation
    learn only their first words and their list.
    """
    hinted = rng.random() < 0.6
    compares = asked.kind == "relation"
    style = "places"
    if not (hinted and compares):
        style = draw_style(rng, hinted)
    hint = STYLES[style].hint if hinted else ""
    parts = answer_parts(asked.thing, scene, rng, slack, style, asked.question)
    begins, listing, named, numbers = parts
    whole = hinted or not compares
    return written(
        policy,
        (f" {asked.question}{hint}{TURN}", False),
        (begins + listing, True),
        (f"{named}{numbers}<|im_end|>", whole),
    )


def any_question(scene: Scene, rng: np.random.Generator) -> str:
    """Return a question of any kind but part."""
    for kind in rng.permutation(WITHOUT_PART):
        found = ask(scene, rng, kind)
        if found:
            return found[0]
    raise RuntimeError("the scene allows no question")


def astray_row(
    policy: Policy, scene: Scene, other: Scene, rng: np.random.Generator, slack: float
) -> Written:
    """Return a question about another scene, and an answer about some thing in this picture.

    Learnt are the list, the box and the points of the named thing, but not its name.
    So a list shows what is visible and a box fits the name, whatever the question asks.
    Without such rows, lists and boxes failed for the kinds of questions that are never asked
    about the picture itself.
    """
    question = any_question(other, rng)
    hinted = rng.random() < 0.75
    thing = scene.things[rng.integers(len(scene.things))]
    style = ""
    while style not in ("short", *LISTING):
        style = draw_style(rng, hinted)
    hint = STYLES[style].hint if hinted else ""
    begins, listing, named, numbers = answer_parts(thing, scene, rng, slack, style, question)
    return written(
        policy,
        (f" {question}{hint}{TURN}{begins}", False),
        (listing, True),
        (named, False),
        (f"{numbers}<|im_end|>", True),
    )


def described_questions(rng: np.random.Generator, scene: Scene, count: int) -> list[Described]:
    """Return up to `count` questions about a scene that is described as text.

    The base model learns here to conclude from its own list, for all kinds of questions but part.
    A list of names suffices to find the thing of a colour or a shape.
    A comparison gets a list of coordinates.
    """
    questions = []
    for _ in range(count):
        kind = str(rng.choice(WITHOUT_PART, p=[0.05, 0.15, 0.3, 0.5]))
        style = "names"
        if kind in ("relation", "combined") or rng.random() < 0.6:
            style = "places"
        found = ask(scene, rng, kind)
        if not found:
            continue
        question, [thing] = found
        hint = STYLES[style].hint if rng.random() < 0.5 else ""
        questions.append(Described(question, hint, listed(scene, style, question), thing.name))
    return questions


def text_rows(policy: Policy, rng: np.random.Generator, scene: Scene, count: int) -> list[Written]:
    """Return a fact, and conclusions from up to `count` questions about a described scene.

    These rows stand behind the picture of another scene. With no picture, or a grey one, the
    policy did not use these lessons once there was a picture. Learnt is the conclusion up to the
    first number. If a hint asks for the list, its first words are learnt too: without them the
    policy repeated conclusions and broke off lists.
    """
    facts = fact_texts()
    question, answer = facts[rng.integers(len(facts))]
    rows = [written(policy, (f" {question}{TURN}", False), (f"{answer}<|im_end|>", True))]
    begins = STYLES["places"].begins
    for question, hint, description, conclusion in described_questions(rng, scene, count):
        prompt = (f" {question}{hint}{TURN}", False)
        # Half of the rows without a hint learn only an answer's first words. Otherwise the base
        # model would list whenever a question names no thing.
        if not hint and rng.random() < 0.5:
            first_words = STYLES[draw_style(rng, False)].begins
            rows.append(written(policy, prompt, (first_words, True)))
            continue
        start = (begins, bool(hint))
        rest = (description.removeprefix(begins), False)
        rows.append(written(policy, prompt, start, rest, (f" {conclusion}{ANSWER}", True)))
    return rows


def row_groups(policy: Policy, scenes: list[Scene], step: int, slack: float) -> list[tuple]:
    """Return for each picture its (rows about pictures, rows about text)."""
    rng = np.random.default_rng([2, step])
    count = len(scenes)
    others = scenes_from(3 * 10**7 + step * count, count)
    asked = [questions_on(scene, rng) for scene in scenes]
    shown = []
    for scene, questions in zip(scenes, asked):
        shown.append([shown_row(policy, question, scene, rng, slack) for question in questions])
    for rows, scene, other in zip(shown, scenes, others):
        rows += [astray_row(policy, scene, other, rng, slack) for _ in range(OTHERS)]
    texts = [text_rows(policy, rng, other, OTHERS) for other in others]
    return list(zip(shown, texts))


def row_loss(logps: torch.Tensor, groups: list[tuple]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean loss of the learnt tokens of rows about pictures, and of rows about text.

    logps [all tokens of all rows], in the order of the groups.
    """
    learnt, is_text = [], []
    for shown, texts in groups:
        for row in shown:
            learnt.append(row.learnt)
            is_text.append(torch.zeros_like(row.learnt))
        for row in texts:
            learnt.append(row.learnt)
            is_text.append(torch.ones_like(row.learnt))
    learnt, is_text = torch.cat(learnt), torch.cat(is_text)
    return -logps[learnt & ~is_text].mean(), -logps[learnt & is_text].mean()


def prompts_before_question(policy: Policy, scenes: list[Scene]) -> list[Prompt]:
    """Return each scene's prompt up to the question. All rows of a picture share this part."""
    images = [Image.fromarray(scene.image) for scene in scenes]
    prompts = encode(policy, images, [A_WORD] * len(scenes))
    tail = len(policy.processor.tokenizer(f" {A_WORD}{TURN}").input_ids)
    return [cut(p, len(p.ids) - tail) for p in prompts]


def train_language(policy: Policy, steps: int, work: Path, pictures: int = 8) -> None:
    """Train the policy to answer. It becomes the base model.

    The rows of a picture share its tokens in one packed row (attention.py).
    In the first half of the steps boxes are exact: so small a network learns places only from
    numbers without noise. In the second half boxes are too wide by SLACK, as in the base model.
    """
    model = policy.base.train()

    def loss_of(step: int) -> tuple[torch.Tensor, dict]:
        slack = 0.0
        if step >= steps // 2:
            slack = SLACK
        scenes = scenes_from(2 * 10**7 + step * pictures, pictures)
        prompts = prompts_before_question(policy, scenes)
        groups = row_groups(policy, scenes, step, slack)
        alignment = align_words(policy, prompts, scenes)
        rows = [[row.ids for row in shown + texts] for shown, texts in groups]
        logps, _ = logprobs(policy, prompts, rows)
        shown, text = row_loss(logps, groups)
        figures = {"shown": shown.item(), "text": text.item(), "words": alignment.item()}
        return shown + 0.5 * text + 0.3 * alignment, figures

    learn("language", model, policy_optimizers(model), steps, work, loss_of)
