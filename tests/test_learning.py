"""What the committed adapter learnt: it answers better than the base on scenes it never saw, and because it looks at them."""

from pathlib import Path

import pytest

from samr1_mini.config import make_settings
from samr1_mini.data import load_data
from samr1_mini.evaluation import evaluate
from samr1_mini.policy import load_policy

ADAPTER = Path(__file__).parent.parent / "tutorials/results/seed0/adapter"


@pytest.fixture(scope="module")
def trained(segmenter):
    s, _ = make_settings(preset="tiny", device="cpu")
    policy, data = load_policy("tiny", adapter=ADAPTER), load_data("shapes", "test", 120)
    return {blank: evaluate(policy, segmenter, data, s, blank=blank).summary() for blank in (False, True)}


def test_the_trained_policy_answers_in_the_format(trained):
    assert trained[False]["format"] > 0.95


def test_a_blanked_picture_costs_the_trained_policy_most_of_its_score(trained):
    assert trained[True]["gIoU_lenient"] < 0.4 * trained[False]["gIoU_lenient"]
