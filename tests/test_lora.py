"""LoRA in the dtype of the policy: PEFT's numbers in fp32, fewer operations in bf16."""

import pytest
import torch
from peft import LoraConfig

from conftest import with_live_adapter
from counter import Counter, counting
from samr1_mini import policy as policy_module
from samr1_mini.decoding import generate
from samr1_mini.lora import TARGETS
from samr1_mini.policy import encode, load_policy, logprobs


def last_up(policy):
    return policy.base.model.language_model.layers[-1].mlp.up_proj


def with_a_second(policy, **options):
    """Add a second adapter of another rank, and use both."""
    config = LoraConfig(r=4, lora_alpha=20, target_modules=TARGETS, **options)
    policy.model.add_adapter("second", config)
    policy.model.base_model.set_adapter(["default", "second"])
    return with_live_adapter(policy)


def pefts(layer, x, **options):
    """Compute a layer with PEFT's own forward."""
    return type(layer).forward(layer, x, **options)


def output_and_gradients(layer, forward, x):
    """Return the output, and the gradients of the input and of all trained weights."""
    x = x.clone().requires_grad_()
    weights = [p for p in layer.parameters() if p.requires_grad]
    torch.manual_seed(1)  # of a dropout
    out = forward(layer, x)
    slope = torch.linspace(-1, 1, out.numel()).view_as(out)
    return [out, *torch.autograd.grad((out * slope).sum(), [x, *weights])]


def ours(layer, x, **options):
    return layer(x, **options)


@pytest.mark.parametrize("load_in", ["nf4", "fp32"])
@pytest.mark.parametrize("second", [None, {}, {"lora_dropout": 0.5}])
def test_in_fp32_a_lora_layer_has_pefts_output_and_gradients(load_in, second):
    policy = with_live_adapter(load_policy("tiny", load_in, rank=8))
    if second is not None:
        with_a_second(policy, **second)
    layer = last_up(policy).train()
    torch.manual_seed(0)
    for shape in ((5,), (2, 3)):
        x = torch.randn(*shape, layer.in_features)
        found = output_and_gradients(layer, ours, x)
        expected = output_and_gradients(layer, pefts, x)
        assert len(found) == 4 + 2 * (second is not None)
        assert (found[0] - layer.base_layer(x)).norm() > 0.01 * found[0].norm()
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("second", [{"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_of_lora_keep_pefts_forward(second):
    policy = with_a_second(load_policy("tiny", "fp32", rank=8), **second)
    layer = last_up(policy)
    if layer.lora_B["second"].bias is not None:
        torch.nn.init.ones_(layer.lora_B["second"].bias)
    x = torch.randn(2, 3, layer.in_features)
    assert torch.equal(layer(x), pefts(layer, x))


def test_an_adapter_is_switched_off_merged_and_taken_out_again():
    policy = with_live_adapter(load_policy("tiny", "fp32", rank=8))
    layer = last_up(policy)
    x = torch.randn(2, 3, layer.in_features)
    with_adapter = layer(x)
    with policy.as_reference():
        assert torch.equal(layer(x), layer.base_layer(x))
    assert not torch.allclose(with_adapter, layer.base_layer(x), atol=1e-3)
    policy.model.merge_adapter()
    assert torch.equal(layer(x), layer.base_layer(x))
    torch.testing.assert_close(layer(x), with_adapter, atol=1e-4, rtol=1e-4)
    policy.model.unmerge_adapter()
    torch.testing.assert_close(layer(x), with_adapter, atol=1e-4, rtol=1e-4)


def test_one_row_may_name_its_adapters_as_pefts_forward_allows():
    policy = with_a_second(load_policy("tiny", "fp32", rank=8))
    layer = last_up(policy)
    x = torch.randn(2, 3, layer.in_features)
    mixed = layer(x, adapter_names=["second", "__base__"])
    torch.testing.assert_close(mixed[1], layer.base_layer(x[1:])[0])
    assert not torch.allclose(mixed[0], layer.base_layer(x)[0], atol=1e-3)


def gradient(policy, prompts, ids) -> torch.Tensor:
    """Return the gradient of all trained weights in one row."""
    policy.model.train()
    logps, _ = logprobs(policy, prompts, ids)
    parts = torch.autograd.grad((logps * torch.linspace(-1, 1, len(logps))).sum(), policy.trained)
    policy.model.eval()
    return torch.cat([part.flatten() for part in parts])


def test_in_bf16_the_gradient_is_as_near_to_fp32_as_with_pefts_forward(samples, monkeypatch):
    torch.manual_seed(0)
    exact = with_live_adapter(load_policy("tiny", "nf4", rank=8))
    with torch.no_grad():
        prompts = encode(exact, [x.image for x in samples[:2]], [x.question for x in samples[:2]])
    groups = generate(exact, prompts, 3, 24)
    ids = [[answer.ids for answer in group] for group in groups]
    true = gradient(exact, prompts, ids)
    monkeypatch.setattr(policy_module, "compute_dtype", lambda *_: torch.bfloat16)
    torch.manual_seed(0)
    half = with_live_adapter(load_policy("tiny", "nf4", rank=8))
    for prompt in prompts:
        prompt.embeds = prompt.embeds.bfloat16()
    near = torch.cosine_similarity(gradient(half, prompts, ids), true, 0).item()
    layers = [m for m in half.model.modules() if "forward" in vars(m)]
    assert len(layers) == 7 * half.base.config.text_config.num_hidden_layers
    for layer in layers:
        del layer.forward  # from here on, PEFT's
    with_peft = torch.cosine_similarity(gradient(half, prompts, ids), true, 0).item()
    print(f"cosine {near:.5f}, with PEFT's forward {with_peft:.5f}")
    assert near > 0.98 and near > with_peft - 0.002


def test_in_bf16_a_lora_layer_starts_three_operations_fewer_and_keeps_no_fp32_copy(
    monkeypatch,
):
    """196 layers of the 7B: 588 operations a token. Kept are the input, A and B, and A x."""
    monkeypatch.setattr(policy_module, "compute_dtype", lambda *_: torch.bfloat16)
    layer = last_up(with_live_adapter(load_policy("tiny", "nf4", rank=8))).train()
    x = torch.randn(1, 50, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    operations, kept = {}, {}
    for name, forward in (("ours", ours), ("pefts", pefts)):
        counter, saved = Counter(), {}

        def keep(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with counting(counter):
                forward(layer, x)
        operations[name] = counter.lap()["operations"]
        for own in [*layer.parameters(), x]:
            saved.pop(own.untyped_storage().data_ptr(), None)
        kept[name] = sum(saved.values())
    assert operations["pefts"] - operations["ours"] == 3
    weights = 8 * (layer.in_features + layer.out_features)
    assert kept["pefts"] == 4 * 50 * (layer.in_features + 8)
    assert kept["ours"] == 2 * (50 * 8 + weights)
