"""Options from later papers: new questions for flat groups (DAPO), and a comparison of each reward term (GDPO)."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from samr1_mini import grpo, processes, variants
from samr1_mini.config import UserError, make_settings
from samr1_mini.grpo import Parts, advantages, one_step, train
from samr1_mini.reports import flat_tokens, saving_line
from samr1_mini.tiny.shapes import Shapes
from samr1_mini.variants import gdpo_advantages, redraw, scale_to_batch


def rewards_of(terms):
    """Rewards with only their terms: `terms` [B][G] are dicts."""
    return [[SimpleNamespace(terms=one) for one in group] for group in terms]


def group_of(advantage, prompt=3, lengths=(1, 1)):
    """A rollout with only the fields that count here."""
    return SimpleNamespace(
        advantage=torch.tensor(advantage),
        prompt=SimpleNamespace(ids=torch.zeros(prompt)),
        lengths=list(lengths),
    )


# ------------------------------------------------------------------------------------------ GDPO


def gdpo_by_hand(terms, weights):
    """GDPO in plain loops: terms [B][G] of dicts -> the sums before and after the batch's step."""
    sums = []
    for group in terms:
        row = np.zeros(len(group))
        for name in group[0]:
            values = np.array([one[name] for one in group], float)
            if values.std() > 0:
                row += weights.get(name, 1.0) * (values - values.mean()) / values.std()
        sums.append(row)
    sums = np.array(sums)
    return sums, (sums - sums.mean()) / (sums.std() + 1e-6)


def random_terms(seed, groups=5, size=4):
    rng = np.random.default_rng(seed)
    return [
        [
            {
                "accuracy": float(rng.choice([0, 2, 3, 4])),
                "format": float(rng.integers(2)),
                "own": rng.normal(),
            }
            for _ in range(size)
        ]
        for _ in range(groups)
    ]


def test_gdpo_compares_each_term_in_its_group_and_then_scales_the_batch():
    terms = random_terms(0)
    for one in terms[1]:  # a term without variance, and a group without any
        one["accuracy"] = 3.0
    for one in terms[2]:
        one.update(accuracy=0.1, format=1.0, own=0.3)
    weights = {"accuracy": 2.0, "format": 0.5}
    before, after = gdpo_by_hand(terms, weights)
    found = gdpo_advantages(rewards_of(terms), weights)
    np.testing.assert_allclose(found.numpy(), before, atol=1e-5)
    rollouts = [SimpleNamespace(advantage=row) for row in found]
    scale_to_batch(rollouts)
    np.testing.assert_allclose(
        torch.stack([r.advantage for r in rollouts]).numpy(), after, atol=1e-5
    )
    assert not rollouts[2].advantage.any()  # exactly 0, so that --redraw and --skip-flat see it


def test_gdpo_sees_a_difference_that_the_sum_of_the_terms_hides():
    terms = [[{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}, {"a": 0.0, "b": 1.0}]]
    assert not advantages(torch.tensor([[1.0, 1.0, 1.0]])).any()
    assert gdpo_advantages(rewards_of(terms), {"a": 3.0})[0, 0] > 1


def test_terms_that_cancel_leave_exactly_nothing_to_learn():
    for size in (1.0, 1e-6):  # of the weights
        terms = [[{"a": a, "b": 1 - a} for a in (1.0, 0.0, 1.0)]]
        assert not gdpo_advantages(rewards_of(terms), {"a": size, "b": size}).any()
        assert gdpo_advantages(rewards_of(terms), {"a": size, "b": size / 2}).all()


def test_gdpo_scales_with_the_batch_of_all_processes(monkeypatch):
    before, after = gdpo_by_hand(random_terms(1, groups=6), {})
    rows = [torch.tensor(row) for row in before]
    for i in range(2):
        mine = [SimpleNamespace(advantage=row) for row in rows[i::2]]
        monkeypatch.setattr(variants, "gather", lambda own: rows[0::2] + rows[1::2])
        scale_to_batch(mine)
        found = np.stack([rollout.advantage.numpy() for rollout in mine])
        np.testing.assert_allclose(found, after[i::2], atol=1e-5)


def test_a_batch_of_flat_groups_stays_at_0_under_gdpo():
    rollouts = [SimpleNamespace(advantage=torch.zeros(4)) for _ in range(3)]
    scale_to_batch(rollouts)
    assert not any(rollout.advantage.any() for rollout in rollouts)


def test_a_step_with_gdpo_has_the_advantages_of_its_own_rewards(
    policy, segmenter, settings, monkeypatch
):
    seen = []
    monkeypatch.setattr(grpo, "update", lambda parts, rollouts, done: seen.extend(rollouts) or {})
    data = Shapes("train", 8, 5)
    s = replace(settings, advantage="gdpo", accuracy="iou", segmentation_format_weight=0.25)
    one_step(Parts(policy, segmenter, None, s), data, 0, 0)
    terms = [[reward.terms for reward in rollout.rewards] for rollout in seen]
    _, expected = gdpo_by_hand(terms, s.reward_weights)
    found = torch.stack([rollout.advantage for rollout in seen]).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert abs(found).max() > 0.5


# ---------------------------------------------------------------------------------------- redraw


def fake_roll_out(flat):
    """A rollout of question `q` at a place is flat if `q` is in `flat`; it keeps its random numbers."""

    def roll_out(parts, samples, uniforms):
        new = []
        for q, numbers in zip(samples, uniforms, strict=True):
            value = 0.0 if q in flat else 1.0
            new.append(SimpleNamespace(q=q, u=numbers, advantage=torch.tensor([value, -value])))
        return new, {"seconds_rollout": 2.0, "seconds_reward": 1.0}

    return roll_out


def redrawn(monkeypatch, flat, count, process, batches=2):
    """What `count` processes draw: for each of them questions of its places, and numbers of new groups."""
    monkeypatch.setattr(grpo, "roll_out", fake_roll_out(flat))
    parts = SimpleNamespace(settings=SimpleNamespace(questions=6))
    torch.manual_seed(0)
    uniforms = torch.rand(1 + batches, 6, 2)
    state = SimpleNamespace(num_processes=count, process_index=process)
    monkeypatch.setattr(processes, "PartialState", lambda: state)
    share = processes.share
    rollouts, _ = grpo.roll_out(parts, list(share(range(6))), share(uniforms[0]))
    asked, counts, seconds = 6, [], {"seconds_rollout": 2.0, "seconds_reward": 1.0}
    for batch in uniforms[1:]:
        # the places that are flat in all processes, from a run of one process
        monkeypatch.setattr(variants, "gather", lambda mine: everywhere(mine, counts))
        new, number = redraw(parts, range(10), rollouts, share(batch), asked, seconds)
        asked += number
        counts.append(number)
    return rollouts, counts, seconds, uniforms


PLACES = [[1, 2, 5], [2]]  # places that are flat before the first and the second further batch


def everywhere(mine, counts):
    places = PLACES[len(counts)]
    assert set(mine) <= set(places)
    return places[::-1]  # processes send them in another order


def test_flat_groups_are_replaced_by_the_next_questions_and_processes_agree_on_which(monkeypatch):
    flat = {1, 2, 5, 7}  # 1 -> 6, 2 -> 7 -> 9, 5 -> 8
    expected = [0, 6, 9, 3, 4, 8]
    for count in (1, 2, 3):
        together = [None] * 6
        for process in range(count):
            rollouts, counts, seconds, uniforms = redrawn(monkeypatch, flat, count, process)
            assert counts == [3, 1]
            together[process::count] = rollouts
        assert [rollout.q for rollout in together] == expected
        batch_of = [0, 1, 2, 0, 0, 1]  # each place has random numbers of its own in each batch
        for place, (rollout, batch) in enumerate(zip(together, batch_of)):
            assert torch.equal(rollout.u, uniforms[batch, place])
    alone = redrawn(monkeypatch, flat, 1, 0)[2]
    assert alone == {"seconds_rollout": 6.0, "seconds_reward": 3.0}


def test_after_the_last_question_the_first_comes_again(monkeypatch):
    monkeypatch.setattr(grpo, "roll_out", fake_roll_out({0, 1}))
    parts = SimpleNamespace(settings=SimpleNamespace(questions=2))
    rollouts, _ = grpo.roll_out(parts, [0, 1], torch.rand(2, 1))
    seconds = {"seconds_rollout": 0.0, "seconds_reward": 0.0}
    new, count = redraw(parts, range(5), rollouts, torch.rand(2, 1), 4, seconds)
    assert [rollout.q for rollout in rollouts] == [4, 0] and count == 2
    assert new == rollouts and not rollouts[1].advantage.any()  # a flat group fills the place


@pytest.mark.parametrize("seed, step", [(0, 0), (0, 3), (7, 3)])
def test_the_first_batch_has_the_random_numbers_of_a_run_without_redraw(
    seed, step, settings, monkeypatch
):
    seen = []

    def roll_out(parts, samples, uniforms):
        seen.append((samples, uniforms))
        new = [SimpleNamespace(q=q, advantage=torch.zeros(2)) for q in samples]
        return new, {"seconds_rollout": 1.0, "seconds_reward": 1.0}

    monkeypatch.setattr(grpo, "roll_out", roll_out)
    described = []
    monkeypatch.setattr(grpo, "update", lambda *_: {})
    monkeypatch.setattr(
        grpo, "describe", lambda rollouts: described.append(list(rollouts)) or {"length": 1.0}
    )
    monkeypatch.setattr(grpo, "flat_tokens", lambda _: 0.0)
    monkeypatch.setattr(grpo, "first_answers", lambda rollouts: list(rollouts))
    lines = []
    for count in (0, 2):
        s = replace(settings, seed=seed, redraw=count)
        line, answers = one_step(Parts(None, None, None, s), range(20), step, 18)
        lines.append(line)
        assert len(answers) == 4 * (1 + count)
    torch.manual_seed(seed * 10**6 + step)
    expected = torch.rand(4, settings.group, settings.max_new_tokens)
    assert torch.equal(seen[0][1], expected) and torch.equal(seen[1][1], expected)
    assert [samples for samples, _ in seen[1:]] == [[18, 19, 0, 1], [2, 3, 4, 5], [6, 7, 8, 9]]
    sums = {numbers.sum().item() for _, numbers in seen[1:]}
    assert len(sums) == 3
    # the log describes the first batch, which is not selected
    assert [[one.q for one in groups] for groups in described] == [[18, 19, 0, 1]] * 2
    assert "drawn" not in lines[0] and lines[1]["drawn"] == 12
    assert lines[1]["seconds_rollout"] == 3 * lines[0]["seconds_rollout"]


def test_a_negative_number_of_redraws_is_refused():
    with pytest.raises(UserError, match="--redraw must be 0 or more"):
        make_settings(preset="tiny", device="cpu", redraw=-1)


# ------------------------------------------------------------------------------------- skip_flat


def test_flat_tokens_count_prompts_and_answers_of_flat_groups():
    groups = [
        group_of([0.0, 0.0], prompt=10, lengths=(4, 6)),  # 20 tokens, flat
        group_of([1.0, -1.0], prompt=10, lengths=(20, 10)),  # 40
        group_of([1.0, -1.0], prompt=20, lengths=(10, 10)),  # 40
    ]
    assert flat_tokens(groups) == pytest.approx(0.2)
    assert flat_tokens(groups[:1]) == 1 and flat_tokens(groups[1:]) == 0


def test_the_last_line_of_a_run_weighs_the_flat_share_of_each_step_with_its_seconds():
    log = [
        {"zero_variance": 0.5, "flat_tokens": 0.4, "seconds_update": 60.0},
        {"zero_variance": 0.1, "flat_tokens": 0.0, "seconds_update": 180.0},
        {"zero_variance": 0.0, "seconds_update": 60.0},  # of an older version
    ]
    line = saving_line(log)
    assert "20 %" in line and "8 % less time (0.4 minutes)" in line


@pytest.mark.parametrize(
    "changes, printed", [({}, 1), ({"skip_flat": True}, 0), ({"beta": 0.0}, 0)]
)
def test_a_run_prints_what_skip_flat_would_have_saved_if_it_would_have_saved_anything(
    changes, printed, settings, capsys
):
    train(replace(settings, samples=4, **changes))
    assert capsys.readouterr().out.count("--skip-flat") == printed


def test_a_run_with_redraw_keeps_the_number_of_steps_and_logs_what_it_asked(settings, tmp_path):
    summary = train(replace(settings, group=2, redraw=2, lr=1e-12))
    folder = tmp_path / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    ids = json.loads((folder / "samples.json").read_text())
    drawn = sum(line["drawn"] for line in lines)
    assert len(lines) == 2 and summary["samples"] == 8 and len(ids) == 8
    assert drawn > 8 and all(4 <= line["drawn"] <= 12 for line in lines)
    assert [answer["id"] for answer in answers] == [ids[i % 8] for i in range(drawn)]
    state = torch.load(folder / "state.pt", weights_only=True)
    assert state["asked"] == drawn
