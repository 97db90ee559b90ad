"""Grade the ten functions of my_samr1.py. A failing test says in one sentence what went wrong."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

GOOD = (
    '<think>It is left.</think><answer>{"bbox": [10, 20, 40, 60], "points": [[25, 40, 1]]}</answer>'
)


def near(a, b, tolerance=1e-5):
    """Return whether two numbers, lists or tensors are equal up to rounding."""
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    return a.shape == b.shape and bool(torch.allclose(a, b, atol=tolerance, rtol=tolerance))


# ------------------------------------------------------------------------------- 1. read_answer


def test_a_good_answer_is_read(mine):
    found = mine.read_answer(GOOD)
    wanted = {"box": [10, 20, 40, 60], "points": [[25, 40, 1]]}
    assert found == wanted, f"read_answer must return {wanted} for a good answer, not {found}"


def test_floats_negative_numbers_several_points_and_another_order_are_read(mine):
    good = '{"points": [[25.5, 40, 0], [-3, 4, 1]], "bbox": [-1, 2.5, 40, 60]}'
    found = mine.read_answer(f"<think>It is left.</think><answer>{good}</answer>")
    wanted = {"box": [-1, 2.5, 40, 60], "points": [[25.5, 40, 0], [-3, 4, 1]]}
    assert found == wanted, f"read_answer must return {wanted} for {good}, not {found}"


def test_whitespace_around_both_parts_is_allowed(mine):
    found = mine.read_answer(" " + GOOD.replace("<answer>", "\n<answer>") + "\n")
    assert found is not None, "whitespace before, between and after the two parts is allowed"


FAULTS = [
    ("an answer without <think>", GOOD.split("</think>")[1]),
    ("text before <think>", "Well. " + GOOD),
    ("text after </answer>", GOOD + " Done."),
    ("two answers", GOOD + GOOD),
    ("two thoughts", "<think>Or right.</think>" + GOOD),
    ("content that is no JSON", GOOD.replace('"bbox"', "'bbox'")),
    (
        "a JSON list instead of an object",
        GOOD.replace('{"bbox"', '[{"bbox"').replace("}<", "}]<"),
    ),
    ("a box of three numbers", GOOD.replace("[10, 20, 40, 60]", "[10, 20, 40]")),
    ("a word in the box", GOOD.replace("40, 60]", '40, "x"]')),
    ("a box with x2 < x1", GOOD.replace("[10, 20, 40, 60]", "[40, 20, 10, 60]")),
    ("a box with y2 < y1", GOOD.replace("[10, 20, 40, 60]", "[10, 60, 40, 20]")),
    ("a box of width 0", GOOD.replace("[10, 20, 40, 60]", "[10, 20, 10, 60]")),
    ("a box of height 0", GOOD.replace("[10, 20, 40, 60]", "[10, 20, 40, 20]")),
    ("no point", GOOD.replace("[[25, 40, 1]]", "[]")),
    ("a point of two numbers", GOOD.replace("[25, 40, 1]", "[25, 40]")),
    ("a point of four numbers", GOOD.replace("[25, 40, 1]", "[25, 40, 1, 1]")),
    ("the label 2", GOOD.replace("40, 1]]", "40, 2]]")),
    ("the label 0.5", GOOD.replace("40, 1]]", "40, 0.5]]")),
    ("an answer that was cut off", GOOD[:-20]),
    ("an empty text", ""),
    ("a box of texts", GOOD.replace("[10, 20, 40, 60]", '["1", "1", "5", "5"]')),
    ("a point with a text", GOOD.replace("[25, 40, 1]", '["a", 40, 1]')),
    ("NaN in the box", GOOD.replace("[10, 20, 40, 60]", "[10, 20, NaN, 60]")),
    ("NaN in a point", GOOD.replace("[25, 40, 1]", "[NaN, 40, 1]")),
    ("a number of the box above 1,000,000", GOOD.replace("60]", "2000000]")),
    ("a number that is infinite", GOOD.replace("[10, 20, 40, 60]", "[10, 20, 40, 1e999]")),
    ("a number of 401 digits", GOOD.replace("60]", "1" + "0" * 400 + "]")),
    ("an object without bbox", GOOD.replace('"bbox"', '"box"')),
    ("an object without points", GOOD.replace('"points"', '"point"')),
    ("a number instead of an object", "<think>It is left.</think><answer>5</answer>"),
    ("null instead of a box", GOOD.replace("[10, 20, 40, 60]", "null")),
    ("a number instead of points", GOOD.replace("[[25, 40, 1]]", "5")),
    ("a point that is not in a list", GOOD.replace("[[25, 40, 1]]", "[25, 40, 1]")),
    ("a number of the box below -1,000,000", GOOD.replace("[10,", "[-2000000,")),
    ("a number of a point above 1,000,000", GOOD.replace("[25,", "[2000000,")),
    ("a number of 401 digits in a point", GOOD.replace("[25,", "[1" + "0" * 400 + ",")),
    ("true in the box", GOOD.replace("[10,", "[true,")),
    ("100,000 brackets", GOOD.replace("[10, 20, 40, 60]", "[" * 100_000)),
]


def test_a_thought_can_have_several_lines(mine):
    found = mine.read_answer(GOOD.replace("It is", "It\nis"))
    assert found is not None, "the thought can have several lines: see re.DOTALL"


@pytest.mark.parametrize("fault, text", FAULTS, ids=[fault for fault, _ in FAULTS])
def test_a_faulty_answer_is_refused(mine, fault, text):
    try:
        found = mine.read_answer(text)
    except NotImplementedError:
        raise
    except Exception as error:
        found = f"an error ({type(error).__name__})"
    assert found is None, f"read_answer must return None for {fault}, not {found}"


# -------------------------------------------------------------------------------- 2. to_picture


def test_box_and_points_are_scaled_to_the_picture(mine):
    box, points = mine.to_picture([10, 20, 40, 60], [[25, 40, 1], [30, 50, 0]], 100, 200, 50)
    assert near(
        box, [20, 10, 80, 30]
    ), "to_picture must scale x by width / side and y by height / side"
    assert near(points, [[50, 20, 1], [60, 25, 0]]), "to_picture must scale points, and keep labels"
    box, points = mine.to_picture([1, 2, 4, 6], [[1, 1, 1]], 3, 10, 20)
    exact = near(box, [10 / 3, 40 / 3, 40 / 3, 40]) and near(points, [[10 / 3, 20 / 3, 1]])
    assert exact, "to_picture must not round coordinates"


# --------------------------------------------------------------------------------------- 3. iou


def mask_of(x1, y1, x2, y2):
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[y1:y2, x1:x2] = True
    return mask


def test_the_iou_of_two_masks(mine):
    a, b = mask_of(0, 0, 10, 10), mask_of(5, 0, 15, 10)
    assert near(mine.iou(a, b), 50 / 150), "the IoU is the intersection divided by the union"
    assert isinstance(mine.iou(a, b), float), "iou must return a float, not a tensor"
    assert near(mine.iou(a, a), 1.0), "the IoU of equal masks is 1"
    assert near(mine.iou(a, mask_of(20, 0, 30, 10)), 0.0), "the IoU of separate masks is 0"
    empty = mask_of(0, 0, 0, 0)
    assert near(mine.iou(empty, empty), 1.0), "the IoU of two empty masks is 1"
    assert near(mine.iou(a, empty), 0.0), "the IoU with an empty true mask is 0"
    assert near(mine.iou(empty, a), 0.0), "the IoU of an empty mask and another true mask is 0"


# --------------------------------------------------------------------------- 4. accuracy_reward


def test_the_tiers_of_equation_5(mine):
    tiers = {0.0: 0, 0.5: 0, 0.51: 2, 0.7: 2, 0.71: 3, 0.8: 3, 0.81: 4, 1.0: 4}
    for value, wanted in tiers.items():
        found = mine.accuracy_reward(value)
        assert near(found, wanted), f"the reward for the IoU {value} is {wanted}, not {found}"


# -------------------------------------------------------------------------------- 5. advantages


def test_advantages_compare_answers_with_their_group(mine):
    found = mine.advantages(torch.tensor([6.0, 2.0, 2.0, 2.0]))
    assert near(found.sum(), 0.0), "the advantages of a group add up to 0"
    root = math.sqrt(3)
    assert near(
        found, [root, -1 / root, -1 / root, -1 / root]
    ), "the std of eq. (1) divides by G: see correction=0 of torch.std"


def test_a_group_with_equal_rewards_has_no_advantages(mine):
    found = mine.advantages(torch.tensor([5.0, 5.0, 5.0]))
    assert near(found, [0.0, 0.0, 0.0]), "if all rewards are equal, all advantages must be 0"
    found = mine.advantages(torch.full((7,), 0.1))
    assert near(found, [0.0] * 7), "rewards of 0.1 are equal too: their std is not exactly 0"


# ----------------------------------------------------------------------------- 6. token_weights


def test_both_normalisers(mine):
    token, sequence = [mine.token_weights([1, 3, 2], kind) for kind in ("token", "sequence")]
    assert near(token, [1 / 6] * 6), 'with "token", each of the S tokens has the weight 1 / S'
    wanted = [1 / 3] + [1 / 9] * 3 + [1 / 6] * 2
    assert near(sequence, wanted), 'with "sequence", answers have equal weights'


# ---------------------------------------------------------------------------------------- 7. kl


def test_the_kl_of_equation_3(mine):
    logp = torch.tensor([-1.0, -2.0, -0.5])
    reference = torch.tensor([-1.0, -1.0, -1.5])
    ratios = [1.0, math.e, 1 / math.e]
    wanted = [r - math.log(r) - 1 for r in ratios]
    found = mine.kl(logp, reference)
    assert near(found[0], 0.0), "the KL of equal probabilities is 0"
    assert near(found, wanted), "pi_ref / pi is exp(reference - logp): see eq. (3)"


# -------------------------------------------------------------------------------------- 8. loss


def loss_of(mine, ratios, advantage, lengths, **settings):
    """Return the loss, and its gradient with respect to each log-probability."""
    logp = torch.tensor(ratios).log().requires_grad_()
    old = torch.zeros(len(ratios))
    options = {"beta": 0.0} | settings
    value = mine.loss(logp, old, logp.detach(), torch.tensor(advantage), lengths, **options)
    value.backward()
    return value.item(), logp.grad


def test_the_loss_before_the_first_update(mine):
    value, gradient = loss_of(mine, [1.0] * 4, [2.0, -1.0], [1, 3])
    assert near(
        value, -(2.0 - 3.0) / 4
    ), "at ratio 1, the loss is minus the mean of the advantages over all tokens"
    assert near(gradient, [-0.5, 0.25, 0.25, 0.25]), "each token's gradient is -A / S at ratio 1"


def test_the_clip_stops_tokens_that_have_moved_far_enough(mine):
    _, gradient = loss_of(mine, [1.32, 1.28, 0.78, 0.82], [1.0, -1.0], [2, 2])
    assert gradient[0] == 0, "with a positive advantage, the ratio 1.32 is clipped: no gradient"
    assert gradient[1] < 0, "with a positive advantage, the ratio 1.28 is not clipped at 1.3"
    assert gradient[2] == 0, "with a negative advantage, the ratio 0.78 is clipped: no gradient"
    assert gradient[3] > 0, "with a negative advantage, the ratio 0.82 is not clipped at 0.8"


def test_the_clip_uses_eps_low_and_eps_high(mine):
    _, gradient = loss_of(mine, [1.4, 0.75], [1.0, -1.0], [1, 1], eps_low=0.3, eps_high=0.5)
    assert (gradient != 0).all(), "with eps_low=0.3 and eps_high=0.5, 0.75 and 1.4 are not clipped"
    _, gradient = loss_of(mine, [1.15, 0.85], [1.0, -1.0], [1, 1], eps_low=0.1, eps_high=0.1)
    assert (gradient == 0).all(), "with eps_low=0.1 and eps_high=0.1, 0.85 and 1.15 are clipped"


def test_the_minimum_holds_for_both_signs(mine):
    _, gradient = loss_of(mine, [0.5, 1.6], [1.0, -1.0], [1, 1])
    assert gradient[0] < 0, "a good token whose ratio fell to 0.5 must still be pushed up"
    assert gradient[1] > 0, "a bad token whose ratio rose to 1.6 must still be pushed down"


def test_the_kl_counts_with_the_weight_beta(mine):
    logp = torch.tensor([-1.0, -2.0]).requires_grad_()
    reference = torch.tensor([-1.5, -1.0])
    value = mine.loss(logp, logp.detach(), reference, torch.zeros(1), [2], beta=0.1)
    gaps = [-0.5, 1.0]
    wanted = 0.1 * sum(math.exp(gap) - gap - 1 for gap in gaps) / 2
    assert near(value.item(), wanted), "without advantages, the loss is beta times the mean KL"
    value.backward()
    slopes = [0.1 * (1 - math.exp(gap)) / 2 for gap in gaps]
    assert near(logp.grad, slopes), "the KL must have a gradient: do not detach logp"


# -------------------------------------------------------------------------------- 9. packed_row


def test_positions_of_a_packed_row(mine):
    positions, _ = mine.packed_row(3, [2, 4, 3])
    wanted = [0, 1, 2, 3, 4, 3, 4, 5, 6, 3, 4, 5]
    assert (
        positions.tolist() == wanted
    ), f"positions must be {wanted}: each answer starts after the prompt"


def test_visibility_of_a_packed_row(mine):
    _, visible = mine.packed_row(3, [2, 4, 3])
    assert visible.shape == (12, 12) and visible.dtype == torch.bool, "visible is bool [T, T]"
    assert torch.equal(
        visible[:3, :3], torch.ones(3, 3).tril().bool()
    ), "a token of the prompt sees itself and earlier tokens"
    assert not visible[:3, 3:].any(), "the prompt must not see an answer"
    assert visible[3:, :3].all(), "each token of an answer sees the whole prompt"
    for start, end in ((3, 5), (5, 9), (9, 12)):
        assert not visible[start:end, 3:start].any(), "an answer must not see earlier answers"
        assert not visible[start:end, end:].any(), "an answer must not see later answers"
        wanted = torch.ones(end - start, end - start).tril().bool()
        assert torch.equal(
            visible[start:end, start:end], wanted
        ), "a token of an answer sees itself and earlier tokens of it"


# ---------------------------------------------------------------------------------- 10. one_step


class FakeTools:
    """Tools with known answers. The policy's weights are the log-probabilities of the answers."""

    side = 10

    def __init__(self, texts):
        self.texts = texts  # samples x G
        self.weights = torch.zeros(len(texts), len(texts[0]), requires_grad=True)
        self.updates = 0
        self.gradient = None
        self.asked = []

    def sample(self, samples):
        lengths = [[1 + i for i in range(len(group))] for group in self.texts]
        groups = []
        for texts, sizes in zip(self.texts, lengths):
            groups.append([SimpleNamespace(text=t, length=n) for t, n in zip(texts, sizes)])
        return groups

    def mask(self, sample, box, points):
        assert near(points, [[4, 2, 1]]), "scale the points too, and pass them to tools.mask"
        mask = torch.zeros(sample.image.height, sample.image.width, dtype=torch.bool)
        x1, y1, x2, y2 = [round(v) for v in box]
        mask[y1:y2, x1:x2] = True
        return mask

    def logprobs(self, sample, answers):
        self.asked.append((sample.number, len(answers)))
        weights = self.weights[sample.number]
        sizes = torch.tensor([answer.length for answer in answers])
        logp = weights.repeat_interleave(sizes)
        return logp, logp.detach() - 0.1, logp.detach() - 0.5

    def update(self):
        self.updates += 1
        assert self.weights.grad is not None, "call .backward() before tools.update()"
        self.gradient = self.weights.grad.clone()


def answer_with(box):
    return f'<think>.</think><answer>{{"bbox": {box}, "points": [[1, 1, 1]]}}</answer>'


LEFT, RIGHT, BAD = answer_with([0, 0, 5, 10]), answer_with([5, 0, 10, 10]), "I do not know."


def stepped(mine, texts=((LEFT, RIGHT, BAD), (RIGHT, LEFT, RIGHT))):
    """Make a step with two samples and three answers each. The object is in the left half."""
    tools = FakeTools(texts)
    samples = []
    for number in range(2):
        mask = torch.zeros(20, 40, dtype=torch.bool)
        mask[:, :20] = True  # the left half of the picture
        samples.append(SimpleNamespace(number=number, image=Image.new("RGB", (40, 20)), mask=mask))
    reward = mine.one_step(tools, samples)
    assert reward is not None, "one_step must return the mean reward"
    assert tools.updates, "one_step must call tools.update()"
    return float(reward), tools


def test_a_step_returns_the_mean_reward_of_all_answers(mine):
    reward, _ = stepped(mine)
    wanted = (6 + 2 + 0 + 2 + 6 + 2) / 6
    message = f"the mean of the 6 rewards is {wanted}, not {reward:.2f}: see the steps c to e"
    assert near(reward, wanted), message


def test_a_step_uses_every_answer_of_every_sample(mine):
    _, tools = stepped(mine)
    assert sorted(tools.asked) == [
        (0, 3),
        (1, 3),
    ], "call logprobs once a sample, with all its answers"
    assert (tools.gradient != 0).all(), "every answer here has an advantage, so each has a gradient"


def test_a_step_updates_once(mine):
    _, tools = stepped(mine)
    assert (
        tools.updates == 1
    ), f"call tools.update once, after all samples, not {tools.updates} times"


def test_a_group_with_equal_rewards_still_has_its_kl(mine):
    _, tools = stepped(mine, ((LEFT, RIGHT, BAD), (LEFT, LEFT, LEFT)))
    slope = 0.005 * (1 - math.exp(-0.5))  # of one token's loss, which is only the KL
    wanted = slope * torch.tensor([1.0, 2.0, 3.0]) / 6 / 2
    message = "in a group with equal rewards, the KL still has a gradient: do not skip this group"
    assert near(tools.gradient[1], wanted), message


def test_each_reward_belongs_to_its_own_answer_and_question(mine):
    _, tools = stepped(mine)
    expected = []
    for rewards in ([6.0, 2.0, 0.0], [2.0, 6.0, 2.0]):
        r = torch.tensor(rewards)
        advantage = (r - r.mean()) / r.std(correction=0)
        lengths = torch.tensor([1.0, 2.0, 3.0])
        slope = -advantage * math.exp(0.1) + 0.005 * (1 - math.exp(-0.5))  # of one token's loss
        expected.append(slope * lengths / 6 / 2)  # S = 6 tokens, 2 samples
    wanted = torch.stack(expected)
    signs = torch.equal(tools.gradient.sign(), wanted.sign())
    assert signs, "an answer is pushed in the wrong direction: check which reward it has"
    message = (
        "the gradient has a wrong size: check the advantages of each group, the order of logp, "
    )
    message += "old and reference, and the division by the number of samples"
    assert near(tools.gradient, wanted), message
