"""Equations (1) to (4) against independent formulas, and the loop: what it logs, skips, saves and resumes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import failing_update, score, with_live_adapter
from huggingface_hub import DryRunFileInfo
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

from samr1_mini import decoding, grpo
from samr1_mini import segmenter as segmenter_module
from samr1_mini.config import Settings, Terminated, UserError, make_settings, parse_settings
from samr1_mini.grpo import (
    Parts,
    advantages,
    new_optimizer,
    grpo_loss,
    kl_to_base,
    one_step,
    roll_out,
    token_weights,
    train,
    update,
)
from samr1_mini.metrics import tight_box
from samr1_mini.decoding import Completion
from samr1_mini.policy import TINY, load_policy, logprobs
from samr1_mini.reward import Answer, Object, Reward
from samr1_mini import files, loading, runs
from samr1_mini.sizes import questions_per_batch
from samr1_mini import rehearse
from samr1_mini.rehearse import try_largest_update
from samr1_mini.reports import base_summary, check_values, describe
from samr1_mini.runs import open_run
from samr1_mini.tiny.shapes import Shapes

ROOT = Path(__file__).parent.parent
GOOD = '<think>Left.</think><answer>{"bbox": [10, 20, 60, 70], "points": [[30, 40, 1]]}</answer>'


class Watched(torch.optim.SGD):
    """Keep the gradients of the last step, because an update frees them."""

    def step(self):
        [group] = self.param_groups
        self.gradients = [p.grad.clone() for p in group["params"]]


def naive_loss(logp, old, reference, advantage, normalise, eps_low, eps_high, beta):
    """Eq. (2) to (4) for one group in plain loops: lists of answers, each a list of numbers."""
    total, tokens = 0.0, sum(len(answer) for answer in logp)
    for i, answer in enumerate(logp):
        for t in range(len(answer)):
            ratio = np.exp(logp[i][t] - old[i][t])
            a, b = ratio * advantage[i], min(max(ratio, 1 - eps_low), 1 + eps_high) * advantage[i]
            r = np.exp(reference[i][t] - logp[i][t])
            term = min(a, b) - beta * (r - np.log(r) - 1)
            total += term / tokens if normalise == "token" else term / (len(logp) * len(answer))
    return -total


@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_the_loss_is_the_papers_formula(normalise):
    rng = np.random.default_rng(0)
    lengths = [3, 7, 1, 5]
    logp, old, reference = ([rng.normal(-1, 0.4, n) for n in lengths] for _ in range(3))
    advantage = rng.normal(0, 1, 4)
    flat = lambda x: torch.tensor(np.concatenate(x))
    each = torch.tensor(advantage).repeat_interleave(torch.tensor(lengths))
    s = Settings(normalise=normalise, eps_low=0.2, eps_high=0.3, beta=0.05, kl_bound=100.0)
    loss, _ = grpo_loss(flat(logp), flat(old), flat(reference), each, [lengths], s)
    assert loss.item() == pytest.approx(
        naive_loss(logp, old, reference, advantage, normalise, 0.2, 0.3, 0.05), abs=1e-6
    )


@pytest.mark.parametrize(
    "advantage, ratio, slope",
    [
        (1, 1.2, 1),
        (1, 1.4, 0),
        (1, 0.7, 1),
        (-1, 0.9, -1),
        (-1, 0.7, 0),
        (-1, 1.4, -1),
        (1, 1.29, 1),
        (-1, 0.81, -1),
    ],
)
def test_all_four_quadrants_of_the_asymmetric_clip(advantage, ratio, slope):
    """Where the clip holds, the gradient is 0; elsewhere it is ratio * advantage: a bad token that grew likelier is
    pushed back."""
    logp = torch.tensor([float(np.log(ratio))], requires_grad=True)
    s = Settings(eps_low=0.2, eps_high=0.3)
    given = torch.tensor([float(advantage)])
    loss, tokens = grpo_loss(logp, torch.zeros(1), None, given, [[1]], s)
    loss.backward()
    assert logp.grad.item() == pytest.approx(-ratio * slope, abs=1e-5)
    assert tokens["clip_high"].item() == (advantage > 0 and ratio > 1.3)
    assert tokens["clip_low"].item() == (advantage < 0 and ratio < 0.8)


def test_the_kl_is_k3_and_its_mean_is_the_true_kl():
    generator = torch.Generator().manual_seed(0)
    p, q = (
        torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2)
    )
    tokens = torch.multinomial(p.exp(), 200_000, replacement=True, generator=generator)
    kl, _ = kl_to_base(p[tokens], q[tokens], 100.0)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    assert kl.mean().item() == pytest.approx(exact.item(), rel=0.02)


def test_the_kl_of_nearly_equal_probabilities_keeps_its_digits():
    gap = torch.logspace(-5, -1, 60, dtype=torch.float64)
    exact = gap**2 / 2 + gap**3 / 6 + gap**4 / 24 + gap**5 / 120  # the series of e^gap - gap - 1
    kl, _ = kl_to_base(torch.zeros(60), gap.float(), 5.0)
    assert kl.double().tolist() == pytest.approx(exact.tolist(), rel=2e-2)


def test_one_token_that_the_base_finds_far_likelier_cannot_rule_an_update_and_is_counted():
    """In the gradient as in the value; below the bound nothing changes. With bound 5 and beta 0.005 its pull is at most
    0.74 advantages."""
    logp = torch.tensor([-1.0, -17.0, -6.5], requires_grad=True)
    far = torch.tensor([-1.5, -1.0, -1.0])

    def call(bound):
        s = Settings(beta=0.005, kl_bound=bound)
        loss, tokens = grpo_loss(logp, logp.detach(), far, torch.zeros(3), [[1], [1], [1]], s)
        [gradient] = torch.autograd.grad(loss, logp)
        return gradient, tokens

    wild, free = call(float("inf"))
    tame, held = call(5.0)
    assert wild.abs().max() > 1e4 and tame.abs().max() < 0.74 and tame[0] == wild[0]
    assert held["kl_bounded"].sum() == 2 and free["kl_bounded"].sum() == 0
    expected = np.exp(-0.5) - 0.5 + 2 * (np.exp(5) - 6)
    assert held["kl"].sum().item() == pytest.approx(expected, rel=1e-4)


def test_advantages_are_eq_1():
    rewards = torch.tensor([[6.0, 2.0, 0.0, 6.0], [1.0, 1.0, 1.0, 1.0], [0.1, 0.1, 0.1, 0.1]])
    expected = (np.array([6, 2, 0, 6]) - 3.5) / np.array([6, 2, 0, 6]).std()
    assert advantages(rewards)[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert not advantages(rewards)[
        1:
    ].any()  # no variance: exactly 0, not rounding noise over a tiny std
    # the mean of eight equal numbers is often not that number
    same = torch.linspace(0.01, 6, 500)[:, None].expand(-1, 8)
    assert (same != same.mean(1, keepdim=True)).any() and not advantages(same).any()
    # large rewards have larger rounding errors
    for value in (16.8, 42.7, 60.3):
        same = torch.full((1, 8), value)
        assert same.std(1, correction=0) > 1e-6 and not advantages(same).any()
    assert not advantages(torch.tensor([[16.8, 16.8 + 2e-6, 16.8, 16.8]])).any()
    assert advantages(torch.tensor([[16.8, 16.81]]))[0].tolist() == pytest.approx([-1, 1], abs=1e-3)
    assert advantages(rewards, "mean")[0].tolist() == pytest.approx([2.5, -1.5, -3.5, 2.5])


def test_an_unknown_kind_of_advantage_is_refused_by_name():
    with pytest.raises(ValueError, match="meen"):
        advantages(torch.rand(2, 4), "meen")
    with pytest.raises(UserError, match="--advantage .*meen"):
        make_settings(preset="tiny", device="cpu", advantage="meen")


def test_token_weights_against_sequence_weights_on_a_long_and_a_short_answer():
    token, sequence = token_weights([[9, 1]], "token"), token_weights([[9, 1]], "sequence")
    assert token.tolist() == pytest.approx([0.1] * 10) and sequence.tolist() == pytest.approx(
        [0.5 / 9] * 9 + [0.5]
    )
    assert token_weights([[9, 1], [2, 3]], "token").sum() == pytest.approx(2)
    with pytest.raises(
        ValueError, match="normalise 'dr'"
    ):  # a name without code is no other name's weights
        token_weights([[9, 1]], "dr")


# ---------------------------------------------------------------------------------------------------- the loop


def rollouts_of(policy, segmenter, s, count=4, **changes):
    torch.manual_seed(0)
    data = Shapes("train", count, 5)
    return roll_out(
        Parts(policy, segmenter, None, replace(s, **changes)), [data[i] for i in range(count)]
    )[0]


def test_rewards_go_to_the_prompt_they_belong_to(policy, segmenter, settings, monkeypatch):
    """Two prompts, two constant rewards, and one answer of each group that stands out."""
    real = grpo.score_group

    def constant(segmenter, sample, texts, *args):
        rewards = real(segmenter, sample, texts, *args)
        for g, reward in enumerate(rewards):
            reward.total = float(sample.id[-1]) + 10 * (g == 1)
        return rewards

    monkeypatch.setattr(grpo, "score_group", constant)
    rollouts = rollouts_of(policy, segmenter, settings, 3)
    for i, rollout in enumerate(rollouts):
        assert rollout.sample.id[-1] == str(i) and [r.total for r in rollout.rewards] == [
            i,
            i + 10,
            i,
            i,
        ]
        assert rollout.advantage.argmax() == 1 and rollout.advantage.sum().abs() < 1e-5
    monkeypatch.setattr(
        grpo,
        "score_group",
        lambda *a: [setattr(r, "total", float(a[1].id[-1])) or r for r in real(*a)],
    )
    # equal within each group, not across
    assert all(not r.advantage.any() for r in rollouts_of(policy, segmenter, settings, 3))


def test_the_gradient_is_the_same_for_every_micro_batch_size(policy, segmenter, settings):
    rollouts = rollouts_of(policy, segmenter, settings)
    for i, rollout in enumerate(rollouts):
        rollout.advantage = torch.linspace(-1, 1 + i, settings.group)
    gradients = []
    for micro in (1, 3, 4):
        optimizer = Watched(policy.trained, lr=0.0)
        update(
            Parts(
                policy,
                None,
                optimizer,
                replace(settings, micro=micro, updates=1, lr=0.0, max_grad_norm=1e9),
            ),
            rollouts,
            0,
        )
        gradients.append(optimizer.gradients)
    assert any(g.abs().max() > 1e-3 for g in gradients[0])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("finite", [True, False])
def test_an_update_leaves_no_gradients_that_would_take_memory_while_sampling(
    finite, segmenter, settings
):
    policy = with_live_adapter(load_policy("tiny", "fp32", rank=4))
    rollouts = rollouts_of(policy, segmenter, settings)
    for rollout in rollouts:
        rollout.advantage = torch.linspace(-1, 1, settings.group)
    if not finite:
        rollouts[-1].advantage = torch.full((settings.group,), float("nan"))
    optimizer = new_optimizer(policy, settings)
    log = update(Parts(policy, None, optimizer, settings), rollouts, 0)
    assert optimizer.state and log.get("skipped_updates", 0) == int(not finite)
    assert all(p.grad is None for p in policy.trained)


def test_beta_0_needs_no_reference_and_a_positive_beta_one_pass_a_rollout_batch(
    policy, segmenter, settings, monkeypatch
):
    rollouts, switched_off = rollouts_of(policy, segmenter, settings), []
    disable = policy.model.disable_adapter
    monkeypatch.setattr(
        policy.model, "disable_adapter", lambda: switched_off.append(1) or disable()
    )
    optimizer = torch.optim.SGD([p for p in policy.model.parameters() if p.requires_grad], lr=0.0)
    still = replace(settings, lr=0.0, updates=2, passes=2, micro=4)
    log = update(Parts(policy, None, optimizer, replace(still, beta=0.0)), rollouts, 0)
    assert (
        not switched_off and not {"kl", "kl_bounded"} & log.keys()
    )  # a KL of 0 would look like a policy that stays
    log = update(Parts(policy, None, optimizer, still), rollouts, 0)
    assert len(switched_off) == 1 and log["kl"] > 0
    alone, _ = logprobs(policy, [rollouts[1].prompt], [[a.ids for a in rollouts[1].completions]])
    with torch.no_grad(), policy.as_reference():
        reference, _ = logprobs(
            policy, [rollouts[1].prompt], [[a.ids for a in rollouts[1].completions]]
        )
    torch.testing.assert_close(rollouts[1].reference, reference, atol=1e-4, rtol=1e-4)
    assert (alone - reference).abs().max() > 1e-3


def test_every_pass_sees_every_question_once(policy, segmenter, settings, monkeypatch):
    rollouts, seen, real = rollouts_of(policy, segmenter, settings), [], grpo.batch_loss
    monkeypatch.setattr(
        grpo,
        "batch_loss",
        lambda parts, some: seen.append([r.sample.id for r in some]) or real(parts, some),
    )
    optimizer = torch.optim.SGD([p for p in policy.model.parameters() if p.requires_grad], lr=0.0)
    update(
        Parts(policy, None, optimizer, replace(settings, lr=0.0, updates=2, passes=2)), rollouts, 0
    )
    ids = [r.sample.id for r in rollouts]
    assert seen == [ids[:2], ids[2:]] * 2


def test_groups_without_variance_get_no_policy_gradient(policy, segmenter, settings):
    rollouts = rollouts_of(policy, segmenter, settings)
    for rollout in rollouts:
        rollout.advantage = torch.zeros(settings.group)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    before = [p.clone() for p in parameters]
    update(Parts(policy, None, optimizer, replace(settings, beta=0.0)), rollouts, 0)
    assert all((a == b).all() for a, b in zip(before, parameters))
    assert grpo.describe(rollouts)["zero_variance"] == 1


def test_flat_groups_are_left_out_when_asked_and_the_others_weigh_what_they_did(
    policy, segmenter, settings
):
    """With beta > 0 a flat group pulls to the base; left out, its forwards go too, and the mean is still over all
    questions."""
    rollouts = rollouts_of(policy, segmenter, settings)
    for i, rollout in enumerate(rollouts):
        rollout.advantage = (
            torch.linspace(-1, 1, settings.group) if i == 1 else torch.zeros(settings.group)
        )
    one = replace(settings, updates=1, beta=0.1, lr=0.0, max_grad_norm=1e9)
    gradients = []
    for s, part in (
        (one, rollouts),
        (replace(one, skip_flat=True), rollouts),
        (one, rollouts[1:2]),
    ):
        for rollout in rollouts:
            rollout.reference = None
        optimizer = Watched(policy.trained, lr=0.0)
        update(Parts(policy, None, optimizer, s), part, 0)
        gradients.append(torch.cat([g.flatten() for g in optimizer.gradients]))
        assert [r.reference is not None for r in part] == [
            not s.skip_flat or r is rollouts[1] for r in part
        ]
    everything, skipped, alone = gradients
    torch.testing.assert_close(skipped, alone / len(rollouts), atol=1e-6, rtol=1e-4)
    assert (everything - skipped).norm() > 1e-3 * skipped.norm()
    assert grpo.describe(rollouts)["zero_variance"] == 3 / 4
    policy.model.zero_grad()


def test_a_set_without_questions_for_one_step_is_refused_before_anything_is_written(settings):
    sets = [Shapes(split, 3) for split in ("train", "validation", "test")]
    with pytest.raises(UserError, match="3 questions.* --questions"):
        train(replace(settings, questions=4), sets=sets)
    assert not Path(settings.run).exists()


@pytest.mark.parametrize("name", ["loss", "length", "accuracy", "short_text", "gap_max"])
def test_a_value_of_a_loss_does_not_overwrite_a_column(name):
    reward = SimpleNamespace(terms={"accuracy": 0.0, "short_text": 0.0})
    rollouts = [SimpleNamespace(rewards=[reward])]
    names = ("ratio", "kl", "clip_low", "clip_high", "kl_bounded", "mine")
    good = dict.fromkeys(names, torch.zeros(3))
    check_values(good, rollouts)
    with pytest.raises(UserError, match=f"'{name}'"):
        check_values(good | {name: torch.zeros(3)}, rollouts)


def test_a_non_finite_loss_skips_the_update_loudly(segmenter, settings, capsys):
    policy = load_policy("tiny", "fp32", rank=4)
    rollouts = rollouts_of(policy, segmenter, settings)
    rollouts[0].advantage = torch.full((settings.group,), float("nan"))
    rollouts[3].advantage = torch.tensor([1.0, -1.0, 0.0, 0.0])
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    log = update(Parts(policy, None, torch.optim.AdamW(parameters, lr=1e-3), settings), rollouts, 0)
    assert log["skipped_updates"] == 1 and "not finite" in capsys.readouterr().out
    assert all(p.isfinite().all() for p in parameters) and any(
        (a != b).any() for a, b in zip(before, parameters)
    )


def test_the_second_update_of_a_batch_and_its_second_pass_have_a_ratio_that_is_not_1(
    segmenter, settings
):
    policy = load_policy("tiny", "fp32", rank=4)
    rollouts = rollouts_of(policy, segmenter, settings, 4)
    for rollout in rollouts:
        rollout.advantage = torch.tensor([2.0, -2.0, 1.0, -1.0])
    ranges = []
    for updates, passes in ((1, 1), (2, 1), (1, 2)):
        optimizer = torch.optim.AdamW(
            [p for p in policy.model.parameters() if p.requires_grad], lr=5e-3
        )
        log = update(
            Parts(
                policy, None, optimizer, replace(settings, updates=updates, passes=passes, lr=5e-3)
            ),
            rollouts,
            100,
        )
        ranges.append(log["ratio_max"] - log["ratio_min"])
        policy = load_policy("tiny", "fp32", rank=4)
    assert ranges[0] < 5e-3 < min(ranges[1:])


def test_the_sampling_gap_is_that_of_a_batchs_first_update_alone(segmenter, settings):
    policy = load_policy("tiny", "fp32", rank=4)
    rollouts = rollouts_of(policy, segmenter, settings, 4)
    for rollout in rollouts:
        rollout.advantage = torch.tensor([2.0, -2.0, 1.0, -1.0])
        for answer in rollout.completions:
            answer.logps = (
                answer.logps + torch.tensor([0.25, -0.5])[torch.arange(len(answer.ids)) % 2]
            )
    shifts = torch.cat(
        [
            torch.tensor([0.25, 0.5])[torch.arange(len(a.ids)) % 2]
            for r in rollouts[:2]
            for a in r.completions
        ]
    )
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=0.1)
    log = update(
        Parts(policy, None, optimizer, replace(settings, updates=2, lr=0.1)), rollouts, 100
    )
    assert log["sampling_gap"] == pytest.approx(shifts.mean().item(), abs=1e-3) and log[
        "sampling_gap_max"
    ] == pytest.approx(0.5, abs=1e-3)
    assert (
        log["ratio_max"] > 3
    )  # the second update's policy has moved, which is not sampling's doing


LOGGED = """step reward accuracy iou reasoning_format segmentation_format zero_variance truncated
unique points length loss kl approx_kl
clip_low clip_high entropy ratio_min ratio_max sampling_gap sampling_gap_max kl_bounded grad_norm lr
seconds_rollout seconds_reward seconds_update tokens_per_second peak_memory_gib"""


def test_a_run_writes_log_adapter_pictures_and_summary(settings, tmp_path):
    s = replace(settings, eval_every=1)
    summary = train(s)
    folder = tmp_path / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and not set(LOGGED.split()) - set(lines[0])
    assert {"validation_gIoU", "validation_cIoU", "validation_format"} <= set(lines[0])
    for name in ("curves.png", "sheet-test.png", "sheet-00000.png", "sheet-00001.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert (
        set(summary) >= {"samples", "seed", "seconds", "base", "trained", "ceiling"}
        and summary["samples"] == 8
    )
    assert {"gIoU", "gIoU_lenient", "cIoU", "format"} <= set(summary["base"]) & set(
        summary["trained"]
    )
    assert summary["ceiling"]["gIoU"] > 0.8
    for when in ("base", "trained"):
        each = json.loads((folder / f"test-{when}.json").read_text())
        assert len(each) == s.test_samples and np.mean(
            [one["iou_strict"] for one in each]
        ) == pytest.approx(summary[when]["gIoU"])
        assert np.mean([one["iou"] for one in each]) == pytest.approx(summary[when]["gIoU_lenient"])
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [one["id"] for one in answers] == json.loads((folder / "samples.json").read_text())
    assert [one["step"] for one in answers] == [1] * s.questions + [2] * s.questions and all(
        one["text"] for one in answers
    )
    adapter = PeftModel.from_pretrained(
        Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32),
        folder / "adapter",
    )
    assert any(
        p.any() for n, p in adapter.named_parameters() if "lora_B" in n
    ), "the adapter did not change"


def same_runs(a, b):
    one, two = (
        [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (a, b)
    )
    skip = {
        "seconds_rollout",
        "seconds_reward",
        "seconds_update",
        "tokens_per_second",
        "peak_memory_gib",
    }
    assert (
        len(one) == len(two)
        and (a / "answers.jsonl").read_text() == (b / "answers.jsonl").read_text()
    )
    for x, y in zip(one, two):
        assert {k: v for k, v in x.items() if k not in skip} == {
            k: v for k, v in y.items() if k not in skip
        }
    states = [torch.load(f / "state.pt", weights_only=True) for f in (a, b)]
    assert states[0]["step"] == states[1]["step"]
    for name, value in states[0]["adapter"].items():
        assert (value == states[1]["adapter"][name]).all(), name
    for k, moments in states[0]["optimizer"]["state"].items():
        assert all((moments[m] == states[1]["optimizer"]["state"][k][m]).all() for m in moments)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run with these settings that was never stopped; each is made once."""
    folders = {}

    def run(s):
        s = replace(s, run="")
        if s not in folders:
            folders[s] = tmp_path_factory.mktemp("whole") / "run"
            train(replace(s, run=str(folders[s])))
        return folders[s]

    return run


def test_stopped_by_ctrl_c_and_resumed_equals_never_stopped_bit_for_bit(
    settings, whole, monkeypatch, capsys
):
    s = replace(settings, samples=16, eval_every=2)
    expected, real, steps = whole(s), grpo.update, []

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 1:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(grpo, "update", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train(s)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert (
        stopped.value.code == 130
        and "--resume --run" in capsys.readouterr().out
        and len(steps) == 1
    )
    monkeypatch.setattr(grpo, "update", real)
    train(replace(s, resume=True))
    same_runs(expected, Path(s.run))


def test_a_run_with_redraw_that_was_stopped_equals_one_that_was_never_stopped(
    settings, whole, monkeypatch
):
    """With two answers a group, most groups are flat, so more questions are asked than there are."""
    s = replace(settings, samples=16, group=2, redraw=2, advantage="gdpo", save_minutes=1e-9)
    expected = whole(s)
    log = [json.loads(line) for line in (expected / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["drawn"] for line in log[:2]) > 8 and sum(line["drawn"] for line in log) > 16
    with failing_update(monkeypatch, 3, MemoryError()), pytest.raises(MemoryError):
        train(s)
    train(replace(s, resume=True))
    same_runs(expected, Path(s.run))
    asked = [
        torch.load(f / "state.pt", weights_only=True)["asked"] for f in (expected, Path(s.run))
    ]
    assert asked == [sum(line["drawn"] for line in log)] * 2


def test_a_killed_run_resumes_from_its_last_saved_state(settings, whole, monkeypatch):
    s = replace(settings, samples=16, eval_every=2)
    expected = whole(s)
    # A step after the saved one is logged already: resuming must not log it twice.
    with failing_update(monkeypatch, 4, MemoryError()), pytest.raises(MemoryError):
        train(s)
    train(replace(s, resume=True))
    same_runs(expected, Path(s.run))


def test_killed_at_any_moment_and_resumed_equals_never_stopped_bit_for_bit(tmp_path):
    """kill -9 from outside, once before anything was saved and once somewhere in a step, with a state saved after each
    step."""
    options = [
        "--samples",
        "20",
        "--questions",
        "4",
        "--group",
        "3",
        "--updates",
        "2",
        "--eval-every",
        "0",
        "--test-samples",
        "2",
        "--warmup",
        "1",
        "--max-new-tokens",
        "40",
        "--save-minutes",
        "0.0001",
        "--device",
        "cpu",
    ]
    start = lambda *more: subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--run", str(tmp_path / "cut"), *options, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    wait_for = lambda done, process: [
        time.sleep(0.02) for _ in iter(lambda: done() or process.poll() is not None, True)
    ]
    log = tmp_path / "cut/metrics.jsonl"
    for done, more in ((log.exists, ()), (lambda: log.read_text().count("\n") >= 2, ("--resume",))):
        process = start(*more)
        wait_for(done, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stdout.read()
    last = start("--resume")
    printed, _ = last.communicate()
    assert last.returncode == 0 and "held-out test, greedy" in printed, printed
    whole = make_settings(
        preset="tiny",
        device="cpu",
        run=str(tmp_path / "whole"),
        samples=20,
        questions=4,
        group=3,
        updates=2,
        eval_every=0,
        test_samples=2,
        warmup=1,
        max_new_tokens=40,
    )[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(whole)
    torch.set_num_threads(threads)
    same_runs(tmp_path / "whole", tmp_path / "cut")


def cut_in_the_second_update(monkeypatch, of_step, error):
    """From now on `error()` is called in the second update of that step, its first update done."""
    calls, real = [], grpo.one_update

    def cut(parts, rollouts):
        calls.append(1)
        if len(calls) == (of_step - 1) * parts.settings.updates + 2:
            error()
        return real(parts, rollouts)

    monkeypatch.setattr(grpo, "one_update", cut)
    return lambda: monkeypatch.setattr(grpo, "one_update", real)


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    "error, kind",
    [
        (lambda: signal.raise_signal(signal.SIGTERM), Terminated),
        (out_of_memory, torch.OutOfMemoryError),
    ],
)
def test_a_step_that_is_cut_in_the_middle_of_its_updates_leaves_the_state_before_it(
    error, kind, settings, whole, monkeypatch, capsys
):
    s = replace(settings, samples=12)
    expected, folder = whole(s), Path(s.run)
    restore = cut_in_the_second_update(monkeypatch, 3, error)
    with monkeypatch.context() as full, pytest.raises(kind):
        # moments made anew beside those that are there: for these the memory lacks the room
        full.setattr(torch.optim.AdamW, "load_state_dict", lambda *_: out_of_memory())
        train(s)
    restore()
    state, adapter = (
        torch.load(folder / "state.pt", weights_only=True),
        load_file(folder / "adapter/adapter_model.safetensors"),
    )
    assert state["step"] == 2 and len(adapter) == len(state["adapter"])
    assert all(
        (adapter[name.replace(".default", "")] == value).all()
        for name, value in state["adapter"].items()
    )
    assert (
        "step 2 is saved" in capsys.readouterr().out
        and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    )
    train(replace(s, resume=True))
    same_runs(expected, folder)


def test_a_state_is_saved_every_so_many_minutes_too(settings, tmp_path, monkeypatch):
    saved, real = [], runs.save_state
    monkeypatch.setattr(
        runs,
        "save_state",
        lambda folder, policy, state: saved.append(state["step"]) or real(folder, policy, state),
    )
    train(replace(settings, samples=12, save_minutes=1e-9))
    often, saved[:] = list(saved), []
    train(replace(settings, samples=12, save_minutes=60.0, run=str(tmp_path / "other")))
    assert often == [1, 2, 3, 3] and saved == [3]


def test_a_disk_that_is_full_during_a_save_loses_nothing_is_said_and_the_run_goes_on(
    settings, whole, tmp_path, capsys
):
    s = replace(settings, samples=12)
    expected = whole(s)
    (tmp_path / "run").mkdir()
    part = tmp_path / f"run/state.pt.{os.getpid()}.part"
    part.symlink_to("/dev/full")  # the first save finds no room; failing takes the link away
    train(replace(s, save_minutes=1e-9))
    assert capsys.readouterr().out.count("step 1 could not be saved") == 1 and not part.is_symlink()
    same_runs(expected, tmp_path / "run")


def test_a_disk_that_stays_full_ends_the_run_in_one_line_that_says_how_to_go_on(
    settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(UserError, match="python train.py --resume"):
        train(settings)
    monkeypatch.undo()
    (tmp_path / "run/metrics.jsonl").unlink()
    (tmp_path / "run/metrics.jsonl").symlink_to("/dev/full")  # the log's disk
    with pytest.raises(UserError, match="No space left on device"):
        train(replace(settings, resume=True))


def test_a_run_that_was_stopped_before_it_saved_anything_resumes_from_the_start(
    settings, whole, tmp_path
):
    s = replace(settings, samples=12)
    expected = whole(s)
    open_run(s)
    assert not (tmp_path / "run/state.pt").exists()
    train(replace(s, resume=True))
    same_runs(expected, tmp_path / "run")


# ------------------------------------------------------------------------------------------------ before the first step


@pytest.mark.parametrize(
    "text, tokens, words",
    [
        ("It is there.", 48, "Warning: .* format, .* --group.* 'It is there.'"),
        (GOOD, 3, "Warning: .* --max-new-tokens .now 3"),
        (GOOD, 48, r"4 questions, 4 each: in the format 1.00, mean IoU 0\.\d\d, truncated 0.00$"),
    ],
)
def test_a_first_look_at_the_base_tells_before_the_first_step_whether_anything_can_be_learnt(
    text, tokens, words, policy, segmenter, settings
):
    s = replace(settings, max_new_tokens=tokens)
    rollouts = rollouts_of(policy, segmenter, s)
    for rollout in rollouts:
        for answer in rollout.completions:
            answer.text, answer.truncated = text, tokens == 3
        rollout.rewards = score(segmenter, rollout.sample, [text] * 4, 112)
    assert re.search(words, base_summary(rollouts, s))


def test_the_first_look_is_printed_once_and_changes_no_draw(
    settings, tmp_path, monkeypatch, capsys
):
    train(settings)
    with monkeypatch.context() as without:
        without.setattr(rehearse, "before_training", lambda *_, **__: None)
        train(replace(settings, run=str(tmp_path / "without")))
    answers = [(tmp_path / name / "answers.jsonl").read_text() for name in ("run", "without")]
    assert answers[0] == answers[1]
    assert (
        len(
            re.findall(
                r"answers to 4 questions, 4 each: in the format \d",
                capsys.readouterr().out,
            )
        )
        == 1
    )
    train(replace(settings, resume=True))
    assert "answers to 4 questions" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------ every setting reaches its line


@pytest.fixture(scope="module")
def odd():
    """A policy and settings of which none that the update or the reward uses is at its default."""
    s, _ = make_settings(
        preset="tiny",
        device="cpu",
        questions=2,
        group=3,
        updates=1,
        micro=1,
        temperature=0.7,
        eps_low=0.05,
        eps_high=0.6,
        normalise="sequence",
        advantage="mean",
        kl_bound=0.02,
        beta=0.3,
        warmup=4,
        max_grad_norm=1e9,
        lr=1.0,
        max_new_tokens=40,
        accuracy="iou",
        accuracy_weight=0.5,
        reasoning_format_weight=2.0,
        segmentation_format_weight=3.0,
        max_points=1,
    )
    return with_live_adapter(load_policy("tiny", "fp32", rank=4)), s


def test_the_gradient_of_an_update_is_that_of_plain_loops_with_no_setting_at_its_default(
    odd, segmenter
):
    policy, s = odd
    torch.manual_seed(0)
    data = Shapes("train", 2, 5)
    rollouts, _ = roll_out(Parts(policy, segmenter, None, s), [data[0], data[1]])
    loss = 0.0
    for r in rollouts:
        r.advantage = torch.tensor([1.0, -2.0, 0.5])
        for a in r.completions:  # as if other updates had been made since
            a.logps = a.logps + torch.linspace(-0.5, 0.5, len(a.ids))
        ids = [[a.ids for a in r.completions]]
        with torch.no_grad(), policy.as_reference():
            reference, _ = logprobs(policy, [r.prompt], ids, 0.7)
        logp, _ = logprobs(policy, [r.prompt], ids, 0.7)
        place = 0
        for a, advantage in zip(r.completions, r.advantage):
            for old in a.logps:
                ratio, gap = (logp[place] - old).exp(), (reference[place] - logp[place]).clamp(
                    max=0.02
                )
                surrogate = torch.min(ratio * advantage, ratio.clamp(0.95, 1.6) * advantage)
                loss -= (surrogate - 0.3 * (gap.exp() - gap - 1)) / (3 * len(a.ids)) / 2
                place += 1
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.trained)])
    optimizer = Watched(policy.trained, lr=0.0)
    log = update(Parts(policy, None, optimizer, replace(s, lr=0.0)), rollouts, 0)
    found = torch.cat([g.flatten() for g in optimizer.gradients])
    assert (found - expected).norm() < 1e-3 * expected.norm()
    assert (
        log["loss"] == pytest.approx(loss.item(), rel=1e-3)
        and log["approx_kl"] > 0
        and log["kl_bounded"] > 0
    )
    assert log["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-3)


def test_rewards_weights_points_and_temperature_of_a_rollout_are_those_of_its_settings(
    odd, segmenter, monkeypatch
):
    policy, s = odd
    good = '<think>L.</think><answer>{"bbox": [10, 20, 60, 70], "points": [%s]}</answer>'
    texts, real = [
        good % "[30, 40, 1]",
        good % "[30, 40, 1], [31, 41, 1]",
        "It is there.",
    ], decoding.generate

    def told(*given):
        groups = real(*given)
        for answers in groups:
            for answer, text in zip(answers, texts):
                answer.text = text
        return groups

    monkeypatch.setattr(decoding, "generate", told)
    [r], _ = roll_out(Parts(policy, segmenter, None, s), [Shapes("train", 1, 5)[0]])
    totals = torch.tensor([reward.total for reward in r.rewards])
    assert (
        totals.tolist() == pytest.approx([0.5 * 4 * r.rewards[0].iou + 2 + 3, 2, 0])
        and r.rewards[0].iou > 0
    )
    assert r.advantage == pytest.approx(totals - totals.mean())
    with torch.no_grad():
        logp, _ = logprobs(policy, [r.prompt], [[a.ids for a in r.completions]], 0.7)
    assert (logp - torch.cat([a.logps for a in r.completions])).abs().max() < 1e-3


@pytest.mark.parametrize("unending", ["<|im_start|>", "\n"])
def test_an_answer_that_does_not_end_is_paid_less_than_the_same_one_that_does(
    unending, segmenter, monkeypatch
):
    policy, x = load_policy("tiny", "fp32", rank=4), Shapes("train", 1, 5)[0]
    s, _ = make_settings(preset="tiny", device="cpu", group=3, max_new_tokens=60)
    tokenizer, (ys, xs) = policy.processor.tokenizer, np.nonzero(x.mask)
    box, point = [int(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)], [
        int(xs[0]),
        int(ys[0]),
        1,
    ]
    ids = tokenizer(
        f'<think>.</think><answer>{{"bbox": {box}, "points": [{point}]}}</answer>'
    ).input_ids
    filler = tokenizer(unending).input_ids
    stop, steps = [tokenizer.eos_token_id] * 60, iter(range(60))
    rows = torch.tensor(
        [row[:60] for row in (ids + stop, ids + filler * 60, ids[:-9] + filler + ids[-9:] + stop)]
    )
    monkeypatch.setattr(decoding, "choose_tokens", lambda *_: rows[:, next(steps)][None])
    [r], _ = roll_out(Parts(policy, segmenter, None, s), [x])
    ended, cut, marked = r.rewards
    assert [a.truncated for a in r.completions] == [False, True, False] and ended.answer.in_format
    assert (
        not cut.answer.in_format
        and cut.total < ended.total
        and r.completions[1].text.endswith("[cut]")
    )
    assert not marked.answer.in_format and ended.iou > 0  # within a JSON string neither has a place


def test_the_rate_climbs_and_gradients_are_scaled_down_to_their_norm(odd, segmenter):
    policy, s = odd
    s = replace(s, questions=4, updates=4, warmup=8, max_grad_norm=0.25)
    data, used, norms = Shapes("train", 4, 5), [], []

    class Logging(torch.optim.SGD):
        def step(self):
            used.append(self.param_groups[0]["lr"])
            norms.append(torch.cat([p.grad.flatten() for p in policy.trained]).norm().item())

    torch.manual_seed(1)
    rollouts, _ = roll_out(Parts(policy, segmenter, None, s), [data[i] for i in range(4)])
    log = update(Parts(policy, None, Logging(policy.trained, lr=9.0), s), rollouts, 2)
    assert used == pytest.approx([3 / 8, 4 / 8, 5 / 8, 6 / 8]) and log["lr"] == used[-1]
    assert max(norms) <= 0.2501 and log["grad_norm"] > 0.25


def test_what_is_logged_of_a_rollout_is_what_its_answers_are():
    completion = lambda text, n, cut: Completion(torch.ones(n), torch.zeros(n), cut, text)

    def reward(total, points):
        answer = Answer(112, [Object((1, 1, 9, 9), [(1, 1, 1)] * points)], reasoning_format=True)
        return Reward(None, answer, iou=total / 4, terms={"reasoning_format": 1.0}, total=total)

    some = [completion("a", 4, True), completion("a", 2, False)]
    others = [completion("b", 1, False), completion("c", 1, False)]
    groups = [
        grpo.Rollout(None, None, some, [reward(2.0, 1), reward(2.0, 3)]),
        grpo.Rollout(None, None, others, [reward(4.0, 0), reward(0.0, 0)]),
    ]
    for group, advantage in zip(groups, ([0.0, 0.0], [1.0, -1.0])):
        group.advantage = torch.tensor(advantage)
    line = describe(groups)
    assert (
        line["reward"] == 2
        and line["iou"] == 0.5
        and line["zero_variance"] == 0.5
        and line["truncated"] == 0.25
    )
    assert (
        line["length"] == 2
        and line["points"] == 1
        and line["unique"] == 0.75
        and line["reasoning_format"] == 1
    )


def test_the_optimizer_moves_nothing_without_a_gradient_and_remembers_a_hundred_of_them(settings):
    """The KL alone pulls to the base: a weight decay would be another pull, one that no log shows."""
    policy = with_live_adapter(load_policy("tiny", "fp32", rank=4))
    optimizer, before = new_optimizer(policy, replace(settings, lr=0.5)), [
        p.detach().clone() for p in policy.trained
    ]
    for p in policy.trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all((p == old).all() for p, old in zip(policy.trained, before, strict=True))
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)


def test_rewards_in_training_read_answers_in_what_the_policy_counts_in(
    policy, segmenter, samples, settings, monkeypatch
):
    x1, y1, x2, y2 = (round(1000 * v / 112) for v in tight_box(samples[0].mask))
    text = f'<think>.</think><answer>{{"bbox": [{x1}, {y1}, {x2}, {y2}], "points": [[{x1}, {y1}, 1]]}}</answer>'
    monkeypatch.setattr(
        decoding,
        "generate",
        lambda _, prompts, group, *rest: [
            [Completion(torch.ones(1), torch.zeros(1), False, text)] * group for _ in prompts
        ],
    )
    [rollout], _ = roll_out(
        Parts(replace(policy, coordinates="thousandths"), segmenter, None, settings), samples[:1]
    )
    assert all(r.box_iou > 0.9 for r in rollout.rewards)


def test_loss_and_gradient_norm_in_the_log_are_means_over_passes_and_updates(
    policy, segmenter, settings
):
    rollouts = rollouts_of(policy, segmenter, settings)
    for rollout in rollouts:
        rollout.advantage = torch.linspace(-1, 2, settings.group)
    still = replace(settings, lr=0.0, updates=1, micro=4)
    one, three = (
        update(
            Parts(policy, None, torch.optim.SGD(policy.trained, lr=0.0), replace(still, passes=n)),
            rollouts,
            0,
        )
        for n in (1, 3)
    )
    policy.model.zero_grad()
    for name in ("loss", "grad_norm", "entropy", "kl"):
        assert one[name] == pytest.approx(three[name], rel=1e-3), name
    halves = [
        update(Parts(policy, None, torch.optim.SGD(policy.trained, lr=0.0), still), part, 0)
        for part in (rollouts[:2], rollouts[2:])
    ]
    both = update(
        Parts(policy, None, torch.optim.SGD(policy.trained, lr=0.0), replace(still, updates=2)),
        rollouts,
        0,
    )
    policy.model.zero_grad()
    for name in ("loss", "grad_norm"):
        assert both[name] == pytest.approx(np.mean([half[name] for half in halves]), rel=1e-3), name
    counts = [
        sum(len(a.ids) for r in part for a in r.completions)
        for part in (rollouts[:2], rollouts[2:])
    ]
    assert both["entropy"] == pytest.approx(
        np.average([half["entropy"] for half in halves], weights=counts), rel=1e-3
    )


def test_the_policy_is_in_training_mode_in_an_update_and_its_rehearsal_alone(
    policy, segmenter, settings, monkeypatch
):
    """Checkpointing works in training mode only, and without it an update may not fit; sampling goes without."""
    rollouts, modes, real = rollouts_of(policy, segmenter, settings), [], grpo.logprobs
    assert not load_policy("tiny", "fp32", rank=4).model.training
    monkeypatch.setattr(
        grpo, "logprobs", lambda *a: modes.append(policy.model.training) or real(*a)
    )
    update(
        Parts(policy, None, torch.optim.SGD(policy.trained, lr=0.0), replace(settings, lr=0.0)),
        rollouts,
        0,
    )
    assert len(modes) > 2 and all(modes) and not policy.model.training
    try_largest_update(
        Parts(policy, segmenter, new_optimizer(policy, settings), settings), [rollouts[0].sample]
    )
    assert all(modes) and not policy.model.training
    policy.model.zero_grad()


def test_each_step_of_each_seed_has_questions_and_draws_of_its_own_and_knows_the_updates_before_it(
    settings, monkeypatch
):
    drawn, done = {}, []
    monkeypatch.setattr(
        grpo,
        "roll_out",
        lambda parts, batch, uniforms: ((batch, uniforms), {"seconds_rollout": 2}),
    )
    monkeypatch.setattr(grpo, "update", lambda *args: done.append(args[-1]) or {})
    monkeypatch.setattr(grpo, "describe", lambda _: {"length": 3})
    monkeypatch.setattr(grpo, "flat_tokens", lambda _: 0.0)
    monkeypatch.setattr(grpo, "first_answers", lambda rollouts: rollouts)
    for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 1)):
        s = replace(settings, seed=seed, updates=2, passes=3)
        line, (batch, uniforms) = one_step(Parts(None, None, None, s), range(100), step, 4 * step)
        assert batch == list(range(4 * step, 4 * step + 4)) and line["step"] == step + 1
        assert (
            uniforms.shape == (4, s.group, s.max_new_tokens)
            and line["tokens_per_second"] == 3 * 4 * s.group / 2
        )
        assert (
            drawn.setdefault((seed, step), uniforms) == uniforms
        ).all()  # a step that is done again has the same
    assert len({uniforms.sum().item() for uniforms in drawn.values()}) == 4
    assert done == [0, 6, 0, 6, 6]


@pytest.mark.parametrize("every, looks", [(2, [2, 4]), (0, []), (1, [1, 2, 3, 4, 5])])
def test_after_every_so_many_steps_there_is_a_look_at_the_validation_set_and_a_state_is_saved(
    every, looks, settings, monkeypatch
):
    seen, kept = [], []
    run = SimpleNamespace(
        start=0,
        total=5,
        asked=0,
        steps=lambda: range(5),
        saved_whatever_happens=nullcontext,
        finish=lambda: None,
        finish_step=lambda line, answers, due: kept.append((line["step"], due, "seen" in line)),
    )
    for name, stand_in in dict(
        open_sets=lambda *_: [[], "validation", []],
        opened_run=nullcontext,
        load_models=lambda *_, **__: (None, None),
        new_optimizer=lambda *_: None,
        Run=lambda *_: run,
        Trace=lambda *_: SimpleNamespace(add=None),
        score_base=lambda *_, **__: {},
        summarise=lambda *_: {},
        one_step=lambda parts, data, step, asked: ({"step": step + 1}, []),
        validate=lambda policy, segmenter, data, s, folder, step: seen.append((data, step))
        or {"seen": 1},
    ).items():
        monkeypatch.setattr(grpo, name, stand_in)
    monkeypatch.setattr(rehearse, "before_training", lambda *_: None)
    train(replace(settings, eval_every=every))
    assert seen == [("validation", step) for step in looks]
    assert kept == [(step, step in looks, step in looks) for step in range(1, 6)]


def test_without_a_warm_up_the_first_update_has_the_whole_rate(policy, segmenter, settings):
    rollouts = rollouts_of(policy, segmenter, settings, 1)
    log = update(
        Parts(
            policy,
            None,
            torch.optim.SGD(policy.trained, lr=0.0),
            replace(settings, warmup=0, updates=1, lr=1e-30),
        ),
        rollouts,
        0,
    )
    policy.model.zero_grad()
    assert log["lr"] == 1e-30


def test_the_longest_prompt_says_how_many_questions_are_sampled_side_by_side(
    policy, segmenter, settings, monkeypatch
):
    told = []
    monkeypatch.setattr(
        decoding,
        "questions_per_batch",
        lambda base, count, longest, *_: told.append((count, longest)) or 4,
    )
    lengths = [len(r.prompt.ids) for r in rollouts_of(policy, segmenter, settings)]
    assert len(set(lengths)) > 1 and told == [(4, max(lengths))]


@pytest.mark.parametrize(
    "device, count, tried", [("cuda", 9, [2]), ("cuda", 1, [1]), ("cpu", 9, [])]
)
def test_on_a_gpu_an_update_of_as_many_questions_as_one_forward_takes_is_tried_first(
    device, count, tried, settings, monkeypatch
):
    sizes = []
    monkeypatch.setattr(
        rehearse, "try_largest_update", lambda parts, samples: sizes.append(len(samples))
    )
    parts = Parts(None, None, None, replace(settings, device=device, micro=3))
    rehearse.before_training(parts, range(count), resumed=True)
    assert sizes == tried


# ---------------------------------------------------------------------------------------------------- refused at once


def refuse(what):
    return lambda *_, **__: pytest.fail(f"{what} was loaded or fetched")


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(data="typo"), "--data typo"),
        (dict(policy="./none"), "--policy ./none"),
        (dict(sam="./none"), "--sam ./none"),
        (dict(image_size=100), "multiple of 14"),
        (dict(data="empty-folder"), "empty-folder"),
        (dict(run="/proc/run"), "--run /proc/run: nothing can be written"),
    ],
)
def test_whatever_can_be_refused_at_once_is_refused_before_anything_is_loaded(
    changes, words, settings, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty-folder").mkdir()
    for name in ("load_policy", "load_segmenter"):
        monkeypatch.setattr(loading, name, refuse(name))
    with pytest.raises(UserError, match=words):
        train(replace(settings, **changes))


def test_what_will_be_downloaded_is_said_in_gb_and_refused_where_the_disk_lacks_the_room(
    settings, monkeypatch, tmp_path, capsys
):
    file = lambda size, wanted: DryRunFileInfo(
        "", size, "model.safetensors", "", not wanted, wanted
    )
    monkeypatch.setattr(
        loading.huggingface_hub,
        "snapshot_download",
        lambda name, **_: [file(5 * 10**9, True), file(11 * 10**9, True), file(10**9, False)],
    )
    monkeypatch.setattr(loading, "CACHE", tmp_path)
    monkeypatch.setattr(segmenter_module, "CACHE", tmp_path)
    sets = [SimpleNamespace(download_bytes=500_000_000), SimpleNamespace(download_bytes=0)]
    full = replace(settings, policy="Qwen/Qwen2.5-VL-7B-Instruct", sam="vit_h")
    loading.check_downloads(full, sets) if shutil.disk_usage("/").free > 2e10 else None
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**9))
    capsys.readouterr()
    with pytest.raises(UserError, match=r"SAM vit_h: .* GB are needed in .*, and 1.0 GB are free"):
        loading.check_downloads(full, sets)
    assert (
        "to download: policy Qwen/Qwen2.5-VL-7B-Instruct 16.0 GB, pictures 0.5 GB, SAM vit_h 2.6 GB"
        in capsys.readouterr().out
    )
    loading.check_downloads(settings, sets[1:])
    own = replace(settings, sam="vit_h")  # with a segmenter of one's own, SAM is not downloaded
    loading.check_downloads(own, sets[1:], with_sam=False)
    assert not capsys.readouterr().out  # nothing to download, nothing to say


def test_a_resumed_run_may_be_longer_or_take_less_memory_and_nothing_else(settings, tmp_path):
    train(settings)
    again, _ = parse_settings(
        [
            "--resume",
            "--run",
            settings.run,
            "--micro",
            "1",
            "--samples",
            "16",
            "--checkpointing",
            "--max-new-tokens",
            "24",
        ],
        "train.py",
        "",
    )
    changes = dict(micro=1, samples=16, checkpointing=True, max_new_tokens=24)
    assert again == replace(settings, resume=True, processes=1, **changes)
    with pytest.raises(SystemExit):
        parse_settings(["--resume", "--run", settings.run, "--group", "2"], "train.py", "")
    assert train(again)["samples"] == 16
    # the next time it need not be said again
    assert parse_settings(["--resume", "--run", settings.run], "train.py", "")[0] == again


# ---------------------------------------------------------------------------------------------------- memory


def test_fewer_questions_are_sampled_at_a_time_where_memory_is_short_and_the_answers_stay_the_same(
    policy, segmenter, settings, monkeypatch
):
    whole, sizes, real = rollouts_of(policy, segmenter, settings), [], decoding.generate
    assert questions_per_batch(policy.base, 4, 220, settings, float("inf")) == 4
    assert questions_per_batch(policy.base, 4, 220, settings, 0) == 1
    enough = next(
        mib
        for mib in range(1, 1000)
        if questions_per_batch(policy.base, 4, 220, settings, mib * 2**20) == 2
    )
    assert (
        questions_per_batch(policy.base, 4, 1000, settings, enough * 2**20) == 1
    )  # longer prompts take more
    assert (
        questions_per_batch(
            policy.base, 4, 220, replace(settings, max_new_tokens=1000), enough * 2**20
        )
        == 1
    )
    monkeypatch.setattr(decoding, "free_memory", lambda s: enough * 2**20)
    monkeypatch.setattr(
        decoding, "generate", lambda *args: sizes.append(len(args[1])) or real(*args)
    )
    parts = rollouts_of(policy, segmenter, settings)
    assert sizes == [2, 2] and [[a.text for a in r.completions] for r in whole] == [
        [a.text for a in r.completions] for r in parts
    ]


def test_the_largest_update_is_tried_at_full_length_and_changes_nothing(
    policy, settings, monkeypatch
):
    data, asked, real = Shapes("train", 2, 5), [], grpo.logprobs
    monkeypatch.setattr(grpo, "logprobs", lambda *args: asked.extend(args[2]) or real(*args))
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters() if p.requires_grad}
    state = torch.get_rng_state()
    try_largest_update(
        Parts(policy, None, new_optimizer(policy, settings), settings), [data[0], data[1]]
    )
    assert [[len(ids) for ids in group] for group in asked] == [
        [settings.max_new_tokens] * settings.group
    ] * 2
    assert all(
        (p == before[n]).all() and p.grad is None
        for n, p in policy.model.named_parameters()
        if p.requires_grad
    )
    assert (torch.get_rng_state() == state).all() and not policy.model.training


def test_memory_that_runs_out_ends_in_one_line_that_says_what_to_lower(
    settings, monkeypatch, capsys
):
    import train as command

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(grpo, "train", full)
    with pytest.raises(SystemExit) as left:
        command.main(["--device", "cpu"])
    error = capsys.readouterr().err
    assert (
        left.value.code == 2
        and len(error.splitlines()) == 1
        and "--micro" in error
        and "--resume" in error
        and "2.00 GiB" in error
    )


def test_a_run_is_not_overwritten(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="--resume"):
        train(settings)


def test_a_run_whose_adapter_did_not_change_is_an_error(settings, monkeypatch):
    monkeypatch.setattr(grpo, "advantages", lambda rewards, kind: torch.zeros_like(rewards))
    with pytest.raises(UserError, match="never changed"):
        train(replace(settings, beta=0.0))


def test_a_short_real_training_raises_the_reward(tmp_path):
    s, _ = make_settings(
        preset="tiny",
        device="cpu",
        run=str(tmp_path / "run"),
        samples=256,
        eval_every=0,
        test_samples=60,
    )
    summary = train(s)
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    first, last = (np.mean([line["reward"] for line in part]) for part in (lines[:4], lines[-4:]))
    assert last > first + 0.5, (first, last)
    assert summary["trained"]["gIoU"] > summary["base"]["gIoU"]
