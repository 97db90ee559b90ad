"""The page tutorials/notes/extend.md: each example runs, and changes what it says that it changes."""

import json
import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parent.parent / "tutorials" / "notes" / "extend.md"


def log_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The folder in which all examples ran, and the names that they defined."""
    folder = tmp_path_factory.mktemp("extend")
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(0)
        blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
        assert len(blocks) >= 6
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    return folder / "runs", names


def test_the_step_by_hand_has_a_ratio_of_1_and_moves_the_adapter(page):
    _, names = page
    assert (names["values"]["ratio"] - 1).abs().max() < 1e-3
    assert any(p.any() for n, p in names["policy"].model.named_parameters() if "lora_B" in n)


def test_a_term_from_outside_is_logged_and_counts_in_the_reward(page):
    runs, _ = page
    for line in log_of(runs / "penalty"):
        terms = ("accuracy", "reasoning_format", "segmentation_format", "off_object")
        assert line["reward"] == pytest.approx(sum(line[name] for name in terms))
        assert -1 <= line["off_object"] <= 0


def test_gspo_gives_all_tokens_of_an_answer_one_ratio(page):
    runs, names = page
    logp = torch.tensor([-1.0, -2.0, -3.0, -1.0], requires_grad=True)
    old = torch.tensor([-1.1, -2.3, -2.9, -1.0])
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    _, values = names["gspo_loss"](logp, old, None, advantage, [[2, 2]], names["settings"])
    expected = torch.tensor([0.4 / 2, 0.4 / 2, -0.1 / 2, -0.1 / 2]).exp()
    assert torch.allclose(values["ratio"], expected)
    for line in log_of(runs / "gspo"):
        assert {"loss", "ratio_min", "ratio_max", "approx_kl", "entropy"} <= set(line)


def test_a_segmenter_and_a_tracker_of_ones_own_are_used(page):
    runs, names = page
    assert [line["step"] for line in names["lines"]] == [1, 2]
    logged = log_of(runs / "tracked")
    assert [line["reward"] for line in names["lines"]] == [line["reward"] for line in logged]
    rewards = [line["accuracy"] for line in log_of(runs / "boxes")]
    assert rewards != [line["accuracy"] for line in logged]
