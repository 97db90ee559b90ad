"""Write SAM-R1 yourself: ten functions. Replace each `raise NotImplementedError` by your code.

    python -m pytest tutorials/assignment        # grades your functions, in seconds
    python tutorials/assignment/train_mine.py    # trains the tiny policy with your functions

Work from top to bottom: later functions use earlier ones. Equations (1) to (5) are those of the
paper (arXiv 2505.22596). Shapes: G answers to a question, S tokens of all answers together.
"""

import json
import re

import torch


def read_answer(text: str) -> dict | None:
    """1. Read box and points from the text of an answer.

    A good answer has exactly this form, and nothing before or after it:

        <think>...</think><answer>{"bbox": [x1, y1, x2, y2], "points": [[x, y, label], ...]}</answer>

    Return {"box": [x1, y1, x2, y2], "points": [[x, y, label], ...]}. Return None in these cases:
    the text has another form, the content of <answer> is not JSON, a number is missing, x2 <= x1 or
    y2 <= y1, there is no point, or a label is neither 0 nor 1. Never raise an error: the policy can
    write any text. Hints: re.fullmatch with re.DOTALL, json.loads.
    """
    raise NotImplementedError


def to_picture(box: list, points: list, side: int, width: int, height: int) -> tuple[list, list]:
    """2. Scale box and points to the picture.

    The policy sees every picture as a square of `side` x `side` pixels. The picture has `width` x
    `height` pixels. Return the box and the points in the picture's pixels. Labels do not change.
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
    """5. Compare the answers of one group: rewards [G] -> advantages [G].

    (1)  A_i = (r_i - mean(r)) / std(r)

    The std divides by G, not by G - 1. If all rewards are equal, all advantages are 0.
    """
    raise NotImplementedError


def token_weights(lengths: list[int], normalise: str) -> torch.Tensor:
    """6. Return the weight of each token [S] of a group. `lengths` holds the G answer lengths.

    "token"     (4)  all S tokens have the same weight
    "sequence"  (2)  all answers have the same weight, and so have all tokens of one answer

    In both cases the weights sum to 1.
    """
    raise NotImplementedError


def kl(logp: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """7. Return the estimate of the KL to the base model for each token [S].

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
    old        [S] log-probabilities when the answers were sampled
    reference  [S] log-probabilities under the base model
    advantage  [G] of each answer. All tokens of an answer have its advantage.
    lengths    the G answer lengths. The tokens of the first answer come first.
    """
    raise NotImplementedError


def packed_row(prompt: int, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """9. Return positions and visibility of a packed row.

    A packed row holds the prompt once, with `prompt` tokens, then the G answers one after another.
    It has T = prompt + S tokens. Each answer must look as if it alone followed the prompt.

    positions  [T] integers from 0. The first token of every answer has the position `prompt`.
    visible    bool [T, T]. visible[i, j] is True if token i sees token j: the tokens of the prompt
               up to itself, and for a token of an answer also its own answer up to itself.
    """
    raise NotImplementedError


def one_step(tools, samples: list) -> float:
    """10. Make one training step with a list of samples. Return the mean reward of all answers.

      a. Sample: groups = tools.sample(samples). It returns one list of G answers for each sample.
         Each answer has `text` and `length`.

    For each sample and its group:

      b. Read each answer: read_answer(answer.text).
      c. Scale it: to_picture(box, points, tools.side, *sample.image.size).
      d. Draw its mask: tools.mask(sample, box, points) returns a bool tensor [H, W].
      e. Reward it: 2 + accuracy_reward(IoU). The IoU compares the mask with sample.mask, a bool
         tensor [H, W]. An answer that cannot be read has the reward 0.
      f. Compare the group: advantages.
      g. Get log-probabilities: logp, old, reference = tools.logprobs(sample, answers), [S] each.
      h. Compute the loss, divide it by the number of samples, and call .backward().

      i. At the end, call tools.update() once. It makes one step of AdamW.
    """
    raise NotImplementedError
