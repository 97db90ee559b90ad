"""Decoding with CUDA graphs: imitated on a CPU, where a replay is a second run, and real on a GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from samr1_mini import decoding
from samr1_mini import rehearse
from samr1_mini.decoding import Cache, FixedCache, TokenReader, generate
from samr1_mini.policy import encode, load_policy


@pytest.fixture
def endless(policy):
    """The tiny policy, whose answers never stop by themselves."""
    banned = policy.banned.clone()
    policy.banned[policy.stop] = True
    yield policy
    policy.banned.copy_(banned)


@pytest.fixture
def imitated(monkeypatch):
    """A CPU counts as a device with graphs. What was recorded, as sizes, and how often it was replayed."""
    sizes, replays = [], []

    def recorded(read):
        out = read()
        sizes.append(out.shape)

        def again():
            replays.append(out.shape)
            out.copy_(read())

        return out, again

    monkeypatch.setattr(decoding, "recorded", recorded)
    monkeypatch.setattr(decoding, "has_graphs", lambda device: True)
    monkeypatch.setattr(decoding, "BLOCK", 25)  # questions leave at multiples of 8
    return sizes, replays


class Graphable(TorchDispatchMode):
    """No operation asks the GPU for a number or brings one from the CPU: a graph can hold neither."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        assert name not in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "lift_fresh",
            "equal",
            "unique",
        ), name
        assert name != "index" or all(
            x is None or x.dtype != torch.bool for x in args[1]
        ), "index by a mask"
        return function(*args, **(kwargs or {}))


def record_a_token(policy, prompts, monkeypatch):
    """Samples three answers to each prompt; the tokens that would be recorded are read as on a GPU while it records."""
    seen = []

    def recorded(read):
        with monkeypatch.context() as recording, Graphable():
            recording.setattr(
                torch.cuda, "is_current_stream_capturing", lambda: True
            )  # transformers asks
            out = read()
        seen.append(out)
        return out, lambda: out.copy_(read())

    monkeypatch.setattr(decoding, "recorded", recorded)
    monkeypatch.setattr(decoding, "has_graphs", lambda device: True)
    generate(policy, prompts, 3, 8)
    assert seen


def test_a_token_that_is_recorded_asks_for_no_number(policy, nf4_policy, samples, monkeypatch):
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Graphable():
        torch.ones(1).item()
    for one in (policy, nf4_policy):
        with torch.no_grad():
            prompts = encode(one, [x.image for x in samples[:2]], [x.question for x in samples[:2]])
        record_a_token(one, prompts, monkeypatch)


def drawn(policy, samples, tokens: int):
    with torch.no_grad():
        prompts = encode(policy, [x.image for x in samples], [x.question for x in samples])
    uniforms = torch.rand(len(samples), 3, tokens, generator=torch.Generator().manual_seed(0))
    return generate(policy, prompts, 3, tokens, uniforms=uniforms)


def flat(groups):
    return [answer for group in groups for answer in group]


def compare(ours, theirs, atol: float):
    assert [a.text for a in flat(ours)] == [a.text for a in flat(theirs)]
    for a, b in zip(flat(ours), flat(theirs)):
        torch.testing.assert_close(a.logps, b.logps, atol=atol, rtol=0)


def test_with_graphs_answers_are_what_they_are_without_while_room_grows_and_questions_leave(
    policy, samples, imitated, monkeypatch
):
    sizes, replays = imitated
    replayed = drawn(policy, samples, tokens=72)
    with monkeypatch.context() as without:
        without.setattr(policy, "cuda_graphs", False)
        compare(replayed, drawn(policy, samples, tokens=72), 1e-4)
    # One is recorded when room grows (25 tokens here) and when half of the questions have ended, not with each of them
    assert 3 <= len(sizes) <= 6 and len(replays) > 5 * len(sizes)
    assert {6} < {size[0] for size in sizes} <= {6, *range(4)}


def test_a_graph_is_recorded_once_a_size_after_a_token_that_is_read_as_it_is(
    endless, samples, imitated
):
    sizes, replays = imitated
    seen = []
    hook = endless.base.model.language_model.register_forward_pre_hook(
        lambda model, args, given: seen.append(given["inputs_embeds"].shape[1]), with_kwargs=True
    )
    drawn(endless, samples[:2], tokens=36)
    hook.remove()
    assert len(sizes) == 2 and len(replays) == 35 - 2  # 35 tokens are read, at most 25 to a size
    assert len(seen) == 1 + 2 + 2 + len(replays)  # prompts, as they are, recorded, replayed


def test_few_questions_that_ended_stay_where_leaving_means_another_graph():
    one, two = torch.tensor([True, False, False, False]), torch.tensor([True, False, True, False])
    assert len(TokenReader(None, Cache([4] * 4, 2, "cpu")).drop(one)) == 3
    assert TokenReader(None, FixedCache([4] * 4, 2, "cpu")).drop(one) is None
    assert len(TokenReader(None, FixedCache([4] * 4, 2, "cpu")).drop(two)) == 2


@pytest.mark.gpu
def test_a_gpu_replays_what_it_would_have_read(samples, monkeypatch):
    policy = load_policy("tiny", "fp32", device="cuda")
    replayed = drawn(policy, samples, tokens=80)
    policy.cuda_graphs = False
    compare(replayed, drawn(policy, samples, tokens=80), 1e-3)


def test_the_rehearsal_times_a_token_both_ways_and_leaves_graphs_as_they_were(
    endless, samples, imitated
):
    with torch.no_grad():
        prompts = encode(endless, [samples[0].image], [samples[0].question])
    taken = rehearse.token_ms(endless, prompts * 2, 2)
    assert set(taken) == {"graph", "eager"} and all(ms > 0 for ms in taken.values())
    assert len(imitated[0]) == 3 and endless.cuda_graphs  # answers of 8, 8 and 24 tokens
