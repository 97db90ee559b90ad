"""Write SAM-R1 yourself: ten functions. Replace each `raise NotImplementedError` by your code.

    python -m pytest tutorials/assignment        # grades your functions, in seconds
    python tutorials/assignment/train_mine.py    # trains the tiny policy with your functions

Work from top to bottom: later functions use earlier ones. In a function, do not give a variable the
name of one of the ten functions. Equations have the numbers of the paper (arXiv 2505.22596).

A group is one question with its G answers. S is the number of tokens in these G answers.
"""

import json
import re

import torch


def read_answer(text: str) -> dict | None:
    """1. Read box and points from the text of an answer.

    A good answer has this form, with each tag once. Whitespace around its two parts is allowed:

        <think>...</think><answer>{"bbox": [x1, y1, x2, y2], "points": [[x, y, label], ...]}</answer>

    Return {"box": [x1, y1, x2, y2], "points": [[x, y, label], ...]}. Return None if

      - the text has another form, or the content of <answer> is not a JSON object
      - "bbox" is missing, or is not a list of four numbers
      - x2 <= x1, or y2 <= y1
      - "points" is missing, or is not a list with at least one point
      - a point is not a list of three numbers, or its label is neither 0 nor 1
      - a number is not between -1,000,000 and 1,000,000

    Here, NaN and true are not numbers.
    Never raise an error: the policy can write any text. The text in <think> can have several lines.
    Hints: re.fullmatch with re.DOTALL, json.loads, RecursionError.
    """
    raise NotImplementedError


def to_picture(box: list, points: list, side: int, width: int, height: int) -> tuple[list, list]:
    """2. Scale box and points to the picture.

    The policy sees every picture as a square of `side` x `side` pixels. The original picture has
    `width` x `height` pixels. Return the box and the points in the picture's pixels. Labels do not
    change.
    """
    raise NotImplementedError


def iou(mask: torch.Tensor, truth: torch.Tensor) -> float:
    """3. Return the IoU of two masks, bool [H, W]: their intersection divided by their union.

    If both masks are empty, the IoU is 1.
    """
    raise NotImplementedError


def accuracy_reward(iou: float) -> float:
    """4. Return the accuracy reward of eq. (5).

    It is 4 for an IoU above 0.8, 3 above 0.7, 2 above 0.5, and 0 otherwise.
    """
    raise NotImplementedError


def advantages(rewards: torch.Tensor) -> torch.Tensor:
    """5. Return the advantage of each answer of a group: rewards [G] -> advantages [G].

    (1)  A_i = (r_i - mean(r)) / std(r)

    The std divides by G, not by G - 1. If all rewards are equal, up to rounding, all advantages
    are 0.
    """
    raise NotImplementedError


def token_weights(lengths: list[int], normalise: str) -> torch.Tensor:
    """6. Return the weight of each token [S] of a group. `lengths` holds the G answer lengths.

    "token"     eq. (4): all S tokens have the same weight.
    "sequence"  eq. (2): each answer has the weight 1 / G. Its tokens share this weight equally.

    In both cases, the weights of all tokens sum to 1.
    """
    raise NotImplementedError


def kl(logp: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """7. Return the KL divergence from the base model for each token [S], by the estimate of eq. (3).

    (3)  KL = pi_ref / pi - log(pi_ref / pi) - 1

    `logp` [S] is log(pi), and `reference` [S] is log(pi_ref).
    """
    raise NotImplementedError


def loss(
    logp: torch.Tensor,
    old: torch.Tensor,
    reference: torch.Tensor,
    advantage: torch.Tensor,
    lengths: list[int],
    eps_low: float = 0.2,
    eps_high: float = 0.3,
    beta: float = 0.005,
) -> torch.Tensor:
    """8. Return the loss of one group: minus eq. (4).

    rho = pi / pi_old for each token
    (4)  J = (1 / S) sum over tokens [min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) - beta KL]

    logp       [S] log-probabilities under the policy, with gradient
    old        [S] log-probabilities under the policy that sampled the answers
    reference  [S] log-probabilities under the base model
    advantage  [G] of each answer. Use the advantage of an answer for each of its tokens.
    lengths    the G answer lengths. The tokens of the first answer come first.

    Use token_weights with "token", and kl.
    """
    raise NotImplementedError


def packed_row(prompt: int, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """9. Return positions and visibility of a packed row.

    A packed row holds the prompt once, then the G answers one after another. The prompt has
    `prompt` tokens, and the row has T = prompt + S tokens. The model must treat each answer as if
    the other answers were not in the row.

    positions  [T] integers from 0. The first token of every answer has the position `prompt`.
    visible    bool [T, T]. visible[i, j] is True if token i sees token j. A token of the prompt
               sees itself and the tokens before it. A token of an answer sees the whole prompt,
               itself, and the earlier tokens of its own answer.
    """
    raise NotImplementedError


def one_step(tools, samples: list) -> float:
    """10. Make one training step with a list of samples. Return the mean reward of all answers.

    A sample is a question with its picture and its true mask.

      a. Draw answers: groups = tools.sample(samples). It returns one list of G answers for each
         sample. Each answer has `text` and `length`.

    For each sample and its group of answers:

      b. Read each answer: read_answer(answer.text).
      c. Scale it: to_picture(box, points, tools.side, *sample.image.size).
      d. Draw its mask: tools.mask(sample, box, points) returns a bool tensor [H, W].
      e. Reward the answer: 2 if it can be read, plus accuracy_reward(IoU). The IoU compares the
         mask with sample.mask, bool [H, W]. An answer that cannot be read has the reward 0.
      f. Compute the advantages from the G rewards.
      g. Get log-probabilities: logp, old, reference = tools.logprobs(sample, answers), [S] each.
      h. Compute the loss, divide it by the number of samples, and call .backward().

      i. At the end, call tools.update() once. It makes one step of AdamW.
    """
    raise NotImplementedError
