"""Activations that an update keeps: as many layers as the free memory holds."""

from dataclasses import replace

import pytest
import torch

from conftest import with_live_adapter
from samr1_mini import grpo, memory
from samr1_mini.config import make_settings
from samr1_mini.forecast import fill_card, peaks, staying_bytes
from samr1_mini.full_size import shape_config
from samr1_mini.gpu import GIB
from samr1_mini.grpo import Parts, batch_loss
from samr1_mini.policy import encode, load_policy
from samr1_mini.rehearse import full_rollouts
from samr1_mini.sizes import Sizes, layers_to_keep, set_kept_layers, update_bytes
from samr1_mini.speed import update_seconds

LAYERS = 28  # of the 7B


def sizes_7b(**given) -> Sizes:
    s, _ = make_settings(preset="7b", device="cpu", **given)
    return Sizes(shape_config("7b"), s)


def update_peak(n: Sizes) -> float:
    return max(sum(parts.values()) for parts in update_bytes(n).values())


@pytest.fixture(scope="module")
def checkpointed():
    """A tiny policy that recomputes, the settings of an update, and its rollouts."""
    torch.manual_seed(0)
    policy = with_live_adapter(load_policy("tiny", "nf4", rank=4, checkpointing=True))
    s, _ = make_settings(preset="tiny", device="cpu", group=3, max_new_tokens=10)
    return policy, replace(s, checkpointing=True)


def rollouts_of(checkpointed, samples):
    policy, s = checkpointed
    with torch.no_grad():
        prompts = encode(policy, [x.image for x in samples[:2]], [x.question for x in samples[:2]])
    return full_rollouts(policy, prompts, s)


def test_gradients_are_equal_for_any_number_of_kept_layers_and_only_the_first_are_recomputed(
    checkpointed, samples
):
    policy, s = checkpointed
    rollouts = rollouts_of(checkpointed, samples)
    layers = policy.base.model.language_model.layers
    calls, found, hooks = [], [], []
    for number, layer in enumerate(layers):
        hook = lambda *_, number=number: calls.append(number)
        hooks.append(layer.mlp.register_forward_pre_hook(hook))
    policy.model.train()
    for count in range(len(layers) + 1):
        policy.keep_layers(count)
        calls.clear()
        loss, _ = batch_loss(Parts(policy, None, None, s), rollouts)
        loss.backward()
        recomputed = sorted(calls[len(layers) :])
        assert recomputed == list(range(len(layers) - count))
        found.append(torch.cat([p.grad.flatten() for p in policy.trained]))
        policy.model.zero_grad()
    policy.model.eval()
    for hook in hooks:
        hook.remove()
    assert found[0].norm() > 0
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-6, rtol=1e-5)


def test_on_a_gpu_the_free_memory_decides_before_each_forward(checkpointed, samples, monkeypatch):
    policy, s = checkpointed
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    rollouts = rollouts_of(checkpointed, samples)
    layers = policy.base.model.language_model.layers
    tokens = [len(rollout.prompt.ids) for rollout in rollouts]
    lengths = [rollout.lengths for rollout in rollouts]
    most = Sizes(policy.base.config, replace(s, checkpointing=False), max(tokens))
    most.row_questions = 2
    for device, free, kept in (
        ("cpu", 0, None),
        ("cuda", 0, 0),
        ("cuda", 1.01 * update_peak(most), len(layers)),
        ("cuda", 0.8 * update_peak(most), None),
    ):
        policy.keep_layers(0)
        monkeypatch.setattr(grpo, "usable_memory", lambda s: free)
        now = replace(s, device=device)
        batch_loss(Parts(policy, None, None, now), rollouts)
        recomputed = sum(layer.gradient_checkpointing for layer in layers)
        if device == "cpu":
            assert recomputed == len(layers)
        elif kept is None:
            expected = layers_to_keep(policy.base, tokens, lengths, now, free)
            assert recomputed == len(layers) - expected
        else:
            assert recomputed == len(layers) - kept
    policy.keep_layers(0)


@pytest.mark.parametrize("tokens", [128, 512])
def test_the_choice_is_the_largest_number_of_layers_that_fits(tokens):
    n = sizes_7b(max_new_tokens=tokens)
    sizes = []
    for n.kept_layers in range(LAYERS + 1):
        sizes.append(update_peak(n))
    assert sizes == sorted(sizes)
    for kept, size in enumerate(sizes):
        set_kept_layers(n, size)
        assert n.kept_layers == kept or sizes[n.kept_layers] == size
        set_kept_layers(n, size - 1)
        assert n.kept_layers == max(0, kept - 1) or sizes[n.kept_layers] < size
    set_kept_layers(n, -1.0)
    assert n.kept_layers == 0


def test_a_layer_of_the_7b_keeps_the_tensors_of_its_backward():
    """In bf16: 3 of the query's width, the keys and values, 2 of the hidden width, 4 of the MLP."""
    n = sizes_7b(max_new_tokens=128)
    n.kept_layers = 1
    one = sum(update_bytes(n)["layers"].values())
    n.kept_layers = 2
    more = sum(update_bytes(n)["layers"].values()) - one
    row = 1100 + 8 * 127
    token = 2 * (3 * 3584 + 2 * 512 + 2 * 3584 + 4 * 18944) + 4 * 2 * 3584
    cached = 2 * 2 * 512 * 8 * (1100 + 128)
    adapter = 2 * 32 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert more == row * token + cached + adapter - row * 2 * 3584  # less the input of the layer


def test_an_update_on_a_full_card_fits_and_is_faster():
    for tokens in (128, 512):
        few, full = sizes_7b(max_new_tokens=tokens), sizes_7b(max_new_tokens=tokens)
        fill_card(full, 20.6)
        assert few.kept_layers == 0 < full.kept_layers
        assert peaks(few)["update"] < peaks(full)["update"] <= 20.6
        full.kept_layers += 1
        assert peaks(full)["update"] > 20.6 or full.kept_layers > LAYERS
        full.kept_layers -= 1
        # The recomputed part is one of four forwards, if a backward counts as two without weights.
        saved = update_seconds(few, "RTX 4090") - update_seconds(full, "RTX 4090")
        whole = sizes_7b(max_new_tokens=tokens, checkpointing=False)
        rest = update_seconds(few, "RTX 4090") - update_seconds(whole, "RTX 4090")
        assert saved == pytest.approx(rest * full.kept_layers / LAYERS)


def test_without_checkpointing_every_layer_is_kept_at_any_memory():
    n = sizes_7b(checkpointing=False)
    fill_card(n, 1.0)
    assert n.kept_layers == LAYERS and sum(staying_bytes(n).values()) > GIB


def test_a_tenth_of_the_whole_memory_stays_empty(monkeypatch):
    s, _ = make_settings(preset="tiny", device="cpu")
    assert memory.usable_memory(s) == float("inf")
    s = replace(s, device="cuda")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 9 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 12 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 * GIB, 24 * GIB))
    monkeypatch.setattr(memory, "windows_lends_memory", lambda: False)
    # Free are 8 and 12 - 9 GiB. With 9 GiB in use, that makes 20.
    assert memory.usable_memory(s) == pytest.approx(0.9 * 20 * GIB - 9 * GIB)
    limited = memory.usable_memory(replace(s, memory_limit=15.0))
    assert limited == pytest.approx(0.9 * 15 * GIB - 9 * GIB)
