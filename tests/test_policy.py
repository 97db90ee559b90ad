"""The policy: what is sampled is what is trained, the prompt is shared, and only the adapter learns."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from conftest import with_live_adapter
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration
from transformers.integrations.accelerate import check_and_set_device_map

from eval import merge
from samr1_mini import decoding
from samr1_mini import policy as policy_module
from samr1_mini.config import UserError
from samr1_mini.decoding import choose_tokens, generate
from samr1_mini.full_size import random_policy, shape_config
from samr1_mini.grpo import Parts, new_optimizer, roll_out, update
from samr1_mini.policy import (
    TINY,
    Prompt,
    encode,
    instruction,
    load_policy,
    logprobs,
    prompt_text,
)
from samr1_mini.tokens import stop_ids, token_logits


def draw(policy, samples, group=3, tokens=40, temperature=1.0, seed=0):
    """Prompts, and answers to them of uneven length."""
    torch.manual_seed(seed)
    with torch.no_grad():
        prompts = encode(policy, [s.image for s in samples], [s.question for s in samples])
    return prompts, generate(policy, prompts, group, tokens, temperature)


def one_by_one(policy, item, ids, temperature=1.0):
    """Log-probs of one answer by the model's own forward on one unpadded, unpacked row, pixels and all: the independent
    way."""
    inputs = policy.processor(
        text=[prompt_text(policy.processor, item.question, *item.image.size)],
        images=[item.image],
        return_tensors="pt",
    )
    start = inputs.input_ids.shape[1]
    inputs["input_ids"] = torch.cat([inputs.input_ids, ids[None]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs.input_ids)
    inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs.mm_token_type_ids, (0, len(ids)))
    policy.base.model.rope_deltas = None
    logits = policy.base(**inputs).logits[0, start - 1 : -1].float() / temperature
    logits[:, policy.banned] = -float("inf")
    return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_log_probs_equal_one_by_one_and_sampling(policy, samples, temperature):
    """Two and more pictures in a batch, prompts and answers of different lengths: each answer goes with its own
    picture."""
    prompts, groups = draw(policy, samples[:4], temperature=temperature)
    assert (
        len({len(p.ids) for p in prompts}) > 1 and len({len(a.ids) for g in groups for a in g}) > 1
    )
    packed, _ = logprobs(policy, prompts, [[a.ids for a in g] for g in groups], temperature)
    sampled = torch.cat([a.logps for g in groups for a in g])
    with torch.no_grad():
        alone = torch.cat(
            [one_by_one(policy, x, a.ids, temperature) for x, g in zip(samples, groups) for a in g]
        )
    torch.testing.assert_close(packed, alone, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(sampled, alone, atol=2e-4, rtol=1e-4)


def test_a_padded_batch_gives_the_same_log_probs_and_gradients(policy, samples):
    """Every answer in a row of its own with a copy of the prompt, padded on the right: what the packed row saves."""
    prompts, groups = draw(policy, samples[:3])
    ids = [[a.ids for a in g] for g in groups]
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    packed, _ = logprobs(policy, prompts, ids)
    weight = torch.linspace(-1, 1, len(packed))
    gradient = torch.autograd.grad((packed * weight).sum(), parameters)
    padded, _ = logprobs(
        policy, [p for p, g in zip(prompts, ids) for _ in g], [[a] for g in ids for a in g]
    )
    torch.testing.assert_close(packed, padded, atol=1e-4, rtol=1e-4)
    for a, b in zip(gradient, torch.autograd.grad((padded * weight).sum(), parameters)):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)


def test_an_answer_does_not_see_the_other_answers(policy, samples):
    prompts, groups = draw(policy, samples[:1], group=3)
    ids = [a.ids for a in groups[0]]
    with torch.no_grad():
        before, _ = logprobs(policy, prompts, [ids])
        after, _ = logprobs(policy, prompts, [[ids[0].flip(0), ids[1], ids[2].flip(0)]])
    middle = slice(len(ids[0]), len(ids[0]) + len(ids[1]))
    torch.testing.assert_close(before[middle], after[middle], atol=1e-5, rtol=1e-5)
    assert (before[: len(ids[0])] - after[: len(ids[0])]).abs().max() > 1e-2


def test_the_pictures_matter(policy, samples):
    prompts, groups = draw(policy, samples[:1])
    ids = [[a.ids for a in groups[0]]]
    grey = encode(policy, [Image.new("RGB", (112, 112), (128, 128, 128))], [samples[0].question])
    with torch.no_grad():
        assert (
            logprobs(policy, prompts, ids)[0] - logprobs(policy, grey, ids)[0]
        ).abs().max() > 0.1


def test_greedy_sampling_equals_transformers_generate(policy, samples):
    _, groups = draw(policy, samples[:3], group=1, temperature=0)
    for x, [answer] in zip(samples, groups):
        inputs = policy.processor(
            text=[prompt_text(policy.processor, x.question, 112, 112)],
            images=[x.image],
            return_tensors="pt",
        )
        policy.base.model.rope_deltas = None
        out = policy.base.generate(**inputs, max_new_tokens=40, do_sample=False, num_beams=1)
        assert (
            out[0, inputs.input_ids.shape[1] :].tolist()[: len(answer.ids)] == answer.ids.tolist()
        )


def test_sampled_frequencies_are_those_of_the_softmax(policy, samples):
    """No top-k, no top-p, no penalty, no shipped generation_config: the first token's frequencies against its
    probabilities."""
    with torch.no_grad():
        prompts = encode(policy, [samples[0].image], [samples[0].question])
    torch.manual_seed(0)
    [answers] = generate(policy, prompts, 3000, 1)
    counts = (
        torch.bincount(torch.stack([a.ids[0] for a in answers]), minlength=len(policy.banned))
        / 3000
    )
    exact = torch.full_like(counts, -float("inf"))
    with torch.no_grad():
        for token in range(len(policy.banned)):
            if counts[token] > 0:
                exact[token] = one_by_one(policy, samples[0], torch.tensor([token]))[0]
    seen = counts > 0
    assert (counts[seen] - exact[seen].exp()).abs().max() < 0.04
    assert exact[seen].exp().sum() > 0.99


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_tokens_are_drawn_as_often_as_the_softmax_at_this_temperature_says(
    temperature, policy, samples, monkeypatch
):
    """Forty ids that are all likely: a top-k, a top-p or another temperature would show in most of them."""
    flat = torch.full((len(policy.banned),), -1e30)
    flat[300:340] = torch.linspace(-1.5, 1.5, 40)
    monkeypatch.setattr(
        decoding,
        "token_logits",
        lambda _, hidden, t: (flat / t).expand(*hidden.shape[:-1], len(flat)),
    )
    with torch.no_grad():
        prompts = encode(policy, [samples[0].image], [samples[0].question])
    torch.manual_seed(0)
    [answers] = generate(policy, prompts, 4000, 1, temperature)
    counts = torch.bincount(torch.stack([a.ids[0] for a in answers]), minlength=340)[
        300:340
    ].double()
    expected = 4000 * (flat[300:340].double() / temperature).softmax(0)
    assert (
        counts.sum() == 4000 and ((counts - expected) ** 2 / expected).sum() < 80
    )  # chi-square, 39: mean 39, sd 9
    logps = torch.stack([a.logps[0] for a in answers]).double()
    assert torch.allclose(
        logps.exp() * 4000, expected[[int(a.ids[0]) - 300 for a in answers]], rtol=1e-4
    )


def test_a_drawn_token_is_the_one_whose_stretch_holds_the_number():
    logp = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).log().clamp(min=-1e30)
    uniforms = torch.tensor(
        [0.0, 0.24, 0.26, 0.74, 0.76, 1 - 2**-24]
    )  # the largest number that torch.rand gives
    assert choose_tokens(logp.expand(6, -1), uniforms).tolist() == [1, 1, 3, 3, 4, 4]


def test_an_answer_is_the_same_whatever_is_sampled_beside_it(policy, samples):
    """So that neither memory, which says how many go side by side, nor the number of processes changes a run."""
    with torch.no_grad():
        prompts = encode(policy, [x.image for x in samples[:4]], [x.question for x in samples[:4]])
    torch.manual_seed(0)
    uniforms = torch.rand(4, 3, 30)
    together = generate(policy, prompts, 3, 30, uniforms=uniforms)
    apart = [
        generate(policy, [p], 3, 30, uniforms=uniforms[i : i + 1])[0] for i, p in enumerate(prompts)
    ]
    assert [[a.text for a in group] for group in together] == [
        [a.text for a in group] for group in apart
    ]
    other = generate(policy, prompts, 3, 30, uniforms=uniforms.flip(0))
    assert [[a.text for a in group] for group in together] != [
        [a.text for a in group] for group in other
    ]


def test_vision_tokens_are_never_sampled_however_much_the_head_wants_them(
    policy, samples, monkeypatch
):
    config = policy.base.config
    wanted = [
        config.image_token_id,
        config.video_token_id,
        config.vision_start_token_id,
        config.vision_end_token_id,
    ]
    forward = policy.base.lm_head.forward

    def eager(hidden):
        logits = forward(hidden).clone()
        logits[..., wanted] = 1e4
        return logits

    monkeypatch.setattr(policy.base.lm_head, "forward", eager)
    _, groups = draw(policy, samples[:2], group=4, tokens=20)
    assert not {int(t) for g in groups for a in g for t in a.ids} & set(wanted)


def test_eos_is_part_of_the_answer_and_a_cut_answer_is_marked(policy, samples):
    eos = policy.processor.tokenizer.eos_token_id
    prompts, groups = draw(policy, samples, group=4, tokens=96)
    answers = [a for g in groups for a in g]
    ended = [a for a in answers if not a.truncated]
    assert ended and all(a.ids[-1] == eos and (a.ids[:-1] != eos).all() for a in ended)
    packed, _ = logprobs(policy, prompts, [[a.ids for a in g] for g in groups])
    assert len(packed) == sum(len(a.ids) for a in answers)  # eos is scored, so stopping is trained
    _, short = draw(policy, samples, group=4, tokens=5)
    assert all(a.truncated and len(a.ids) == 5 for g in short for a in g)


def test_an_answer_stops_where_the_models_own_generation_config_does_and_padding_is_never_sampled(
    policy, real_vocabulary, monkeypatch
):
    """Qwen's stops at <|im_end|> and at <|endoftext|>; the tiny policy's at <|im_end|> alone, so there <|endoftext|> is
    only padding."""
    token = policy.processor.tokenizer.convert_tokens_to_ids
    assert (
        policy.stop.tolist() == [token("<|im_end|>")]
        and policy.banned[token("<|endoftext|>")]
        and not policy.banned[policy.stop].any()
    )
    real = load_policy(real_vocabulary, "fp32", rank=2)
    assert real.stop.tolist() == [151643, 151645] and not real.banned[real.stop].any()
    assert (
        real.banned[[151652, 151653, 151654, 151655, 151656]].all()
        and real.banned[len(real.processor.tokenizer) :].all()
    )
    with torch.no_grad():
        prompts = encode(real, [Image.new("RGB", (112, 112))], ["the cup"])
    for end in real.stop:
        wanted = iter([3, 4, int(end), 5])
        monkeypatch.setattr(
            decoding,
            "choose_tokens",
            lambda logp, uniforms: torch.full(logp.shape[:-1], next(wanted)),
        )
        [[answer]] = generate(real, prompts, 1, 4)
        assert answer.ids.tolist() == [3, 4, end] and not answer.truncated
    assert len(logprobs(real, prompts, [[answer.ids]])[0]) == 3  # stopping is trained


def test_an_answers_end_comes_from_its_length_when_pad_and_eos_are_one_token(policy, samples):
    tokenizer = policy.processor.tokenizer
    pad, tokenizer.pad_token = tokenizer.pad_token, tokenizer.eos_token
    try:
        prompts, groups = draw(policy, samples[:2], group=4, tokens=96)
        packed, _ = logprobs(policy, prompts, [[a.ids for a in g] for g in groups])
    finally:
        tokenizer.pad_token = pad
    ended = [a for g in groups for a in g if not a.truncated]
    assert ended and all(a.ids[-1] == tokenizer.eos_token_id for a in ended)
    torch.testing.assert_close(
        packed.detach(), torch.cat([a.logps for g in groups for a in g]), atol=2e-4, rtol=1e-4
    )


def test_the_prompt_is_encoded_once_a_group_in_sampling_and_in_scoring(
    policy, samples, monkeypatch
):
    seen = {"tower": 0, "tokens": 0}
    tower, layer = (
        policy.base.model.visual.forward,
        policy.base.model.language_model.layers[0].forward,
    )

    def count_tower(pixels, *args, **kwargs):
        seen["tower"] += kwargs["grid_thw"].shape[0] if "grid_thw" in kwargs else args[0].shape[0]
        return tower(pixels, *args, **kwargs)

    def count_tokens(hidden, *args, **kwargs):
        seen["tokens"] += hidden.shape[0] * hidden.shape[1]
        return layer(hidden, *args, **kwargs)

    monkeypatch.setattr(policy.base.model.visual, "forward", count_tower)
    monkeypatch.setattr(policy.base.model.language_model.layers[0], "forward", count_tokens)
    prompts, groups = draw(policy, samples[:2], group=8, tokens=30)
    width = max(len(p.ids) for p in prompts)
    assert seen["tower"] == 2 and seen["tokens"] <= 2 * width + 16 * 30
    seen["tokens"] = 0
    logprobs(policy, prompts, [[a.ids for a in g] for g in groups])
    assert seen["tower"] == 2 and seen["tokens"] <= 2 * (width + 8 * 30)


class LargestLogits(TorchDispatchMode):
    """Notes the largest tensor over the vocabulary that any operation makes, backward included."""

    def __init__(self, head):
        super().__init__()
        (self.vocabulary, self.width), self.largest = head.weight.shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if (
            isinstance(out, torch.Tensor)
            and out.ndim
            and out.shape[-1] == self.vocabulary
            and out.shape != (self.width, self.vocabulary)
        ):
            self.largest = max(self.largest, out.numel())
        return out


def test_logits_are_never_held_whole_and_chunks_change_nothing(
    policy, samples, monkeypatch, unwatched_masks
):
    prompts, groups = draw(policy, samples[:4], group=8)
    ids, vocabulary = [[a.ids for a in g] for g in groups], len(policy.banned)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    tokens = sum(len(a) for g in ids for a in g)
    whole, entropy = logprobs(policy, prompts, ids)
    gradient = torch.autograd.grad(whole.sum(), parameters)
    split = torch.Tensor.split
    monkeypatch.setattr(
        torch.Tensor,
        "split",
        lambda self, size, *a, **k: split(self, 7 if self.shape[0] == tokens else size, *a, **k),
    )
    heads = []
    hook = policy.base.lm_head.register_forward_hook(
        lambda module, args, out: heads.append(out.numel())
    )
    with LargestLogits(policy.base.lm_head) as seen:
        chunked, chunked_entropy = logprobs(policy, prompts, ids)
        chunked_gradient = torch.autograd.grad(chunked.sum(), parameters)
    hook.remove()
    # once forward, once again in the backward
    assert max(heads) == 7 * vocabulary and sum(heads) == 2 * tokens * vocabulary
    assert seen.largest == 7 * vocabulary
    torch.testing.assert_close(whole, chunked, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, chunked_entropy, atol=1e-5, rtol=1e-5)
    for a, b in zip(gradient, chunked_gradient):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_over_qwens_whole_vocabulary_no_chunk_of_logits_is_larger_than_256_mb(unwatched_masks):
    config = shape_config("small")
    (
        config.text_config.vocab_size,
        config.text_config.hidden_size,
        config.text_config.num_hidden_layers,
    ) = (151_936, 32, 1)
    config.text_config.num_attention_heads = config.text_config.num_key_value_heads = 2
    config.text_config.intermediate_size, config.text_config.layer_types = 32, ["full_attention"]
    config.text_config.rope_parameters["mrope_section"], config.vision_config.out_hidden_size = [
        2,
        3,
        3,
    ], 32
    policy = random_policy(config, "fp32", 2, "cpu", False)
    prompt = Prompt(
        torch.arange(300, 308),
        torch.randn(8, 32),
        torch.arange(8).expand(3, -1),
        torch.zeros(8, dtype=torch.bool),
    )
    with torch.no_grad(), LargestLogits(policy.base.lm_head) as seen:
        logps, _ = logprobs(
            policy, [prompt], [[torch.randint(300, 1000, (250,)) for _ in range(2)]]
        )
    assert len(logps) == 500 and 100 * 151_936 < seen.largest <= 2**26  # numbers of 4 bytes


def test_entropy_is_that_of_the_distribution(policy, samples):
    prompts, groups = draw(policy, samples[:1], group=2)
    _, entropy = logprobs(policy, prompts, [[a.ids for a in groups[0]]])
    policy.base.model.rope_deltas = None
    inputs = policy.processor(
        text=[prompt_text(policy.processor, samples[0].question, 112, 112)],
        images=[samples[0].image],
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = policy.base(**inputs).logits[0, -1].float()
    logits[policy.banned] = -float("inf")
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy[0], expected, atol=1e-4, rtol=1e-4)


def test_the_reference_is_the_base_without_its_adapter(policy, samples):
    prompts, groups = draw(policy, samples[:1])
    ids = [[a.ids for a in groups[0]]]
    plain = load_policy("tiny", "fp32")
    with torch.no_grad(), policy.as_reference():
        reference, _ = logprobs(policy, prompts, ids)
    with torch.no_grad():
        torch.testing.assert_close(
            reference, logprobs(plain, prompts, ids)[0], atol=1e-5, rtol=1e-5
        )
        assert (logprobs(policy, prompts, ids)[0] - reference).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------- NF4 and LoRA


@pytest.fixture
def as_on_a_gpu(monkeypatch, samples):
    """The tiny policy in the dtypes of a GPU: NF4 weights, bf16 beside them, an fp32 adapter, checkpointing."""
    monkeypatch.setattr(policy_module, "compute_dtype", lambda load_in, device: torch.bfloat16)
    return with_live_adapter(load_policy("tiny", "nf4", rank=8, checkpointing=True))


def test_logits_are_not_rounded_to_the_dtype_of_the_head(as_on_a_gpu):
    head = as_on_a_gpu.base.lm_head
    torch.manual_seed(0)
    hidden = torch.randn(2, 3, head.in_features, dtype=torch.bfloat16).mul_(4).requires_grad_()
    exact = hidden.double() @ head.weight.double().T  # [2, 3, V]
    logits = token_logits(as_on_a_gpu, hidden, 1.0)
    allowed = ~as_on_a_gpu.banned
    assert logits.dtype == torch.float32 and exact.abs().max() > 8
    ours, rounded = ((x.double() - exact)[..., allowed].abs().max() for x in (logits, head(hidden)))
    assert ours < 1e-4 < 1e-2 < rounded
    slope = torch.randn(logits.shape) * allowed
    [gradient], [true] = (torch.autograd.grad((x * slope).sum(), hidden) for x in (logits, exact))
    assert (gradient - true).norm() < 0.01 * true.norm()


def test_rollout_reward_reference_and_updates_run_in_the_dtypes_of_a_gpu_and_the_first_ratio_stays_near_1(
    as_on_a_gpu, samples, segmenter, settings
):
    policy = as_on_a_gpu
    layer = policy.base.model.language_model.layers[0].self_attn.q_proj
    assert (
        layer.base_layer.compute_dtype
        == policy.base.lm_head.weight.dtype
        == policy.base.model.visual.dtype
        == torch.bfloat16
    )
    assert all(p.dtype == torch.float32 for p in policy.model.parameters() if p.requires_grad)
    torch.manual_seed(0)
    rollouts, _ = roll_out(Parts(policy, segmenter, None, settings), samples[:4])
    assert all(a.logps.dtype == torch.float32 for r in rollouts for a in r.completions)
    for rollout in rollouts:
        rollout.advantage = torch.linspace(-1, 1, settings.group)
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters() if p.requires_grad}
    log = update(Parts(policy, None, new_optimizer(policy, settings), settings), rollouts, 100)
    assert any((p != before[n]).any() for n, p in policy.model.named_parameters() if n in before)
    assert 0 < log["sampling_gap"] < 0.02 and log["sampling_gap_max"] < 0.5 and log["kl"] > 0


@pytest.mark.parametrize(
    "load_in, device, capability, dtype",
    [
        ("nf4", "cpu", None, torch.float32),
        ("nf4", "cuda", (8, 6), torch.bfloat16),
        ("nf4", "cuda", (7, 5), torch.float32),
        ("bf16", "cpu", None, torch.bfloat16),
        ("fp32", "cuda", (9, 0), torch.float32),
    ],
)
def test_what_is_not_in_four_bits_is_bf16_only_where_a_gpu_computes_in_it(
    load_in, device, capability, dtype, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert (
        policy_module.compute_dtype(load_in, device) == dtype
        and policy_module.four_bits(dtype).bnb_4bit_compute_dtype == dtype
    )


def test_only_the_language_models_projections_are_in_four_bits(nf4_policy):
    four_bit = {n for n, m in nf4_policy.base.named_modules() if isinstance(m, Linear4bit)}
    layers = nf4_policy.base.config.text_config.num_hidden_layers
    assert len(four_bit) == 7 * layers and all(
        "language_model" in n and "visual" not in n for n in four_bit
    )
    assert nf4_policy.base.lm_head.weight.dtype == torch.float32
    state = next(
        m for m in nf4_policy.base.modules() if isinstance(m, Linear4bit)
    ).weight.quant_state
    assert state.quant_type == "nf4" and state.nested  # double quantisation


def test_only_the_adapter_trains_and_it_sits_on_the_language_model(nf4_policy):
    training = [n for n, p in nf4_policy.model.named_parameters() if p.requires_grad]
    layers = nf4_policy.base.config.text_config.num_hidden_layers
    assert len(training) == 2 * 7 * layers and all(
        "lora_" in n and "language_model" in n for n in training
    )


def test_gradients_pass_through_four_bit_layers_as_through_their_dequantised_weights(
    nf4_policy, samples
):
    """After sampling in eval mode too: there bitsandbytes may swap in an inference kernel that has no backward."""
    prompts, groups = draw(nf4_policy, samples[:2])
    ids = [[a.ids for a in g] for g in groups]
    plain = load_policy("tiny", "fp32", rank=8)
    sources = dict(nf4_policy.base.named_modules())
    with torch.no_grad():
        for name, module in plain.base.named_modules():
            if isinstance(sources.get(name), Linear4bit):
                module.weight.copy_(
                    dequantize_4bit(sources[name].weight.data, sources[name].weight.quant_state)
                )
        for a, b in zip(plain.model.parameters(), nf4_policy.model.parameters()):
            if a.requires_grad:
                a.copy_(b)
    results = []
    for policy in (nf4_policy, plain):
        policy.model.train()
        logps, _ = logprobs(policy, prompts, ids)
        results.append(
            (
                logps,
                torch.autograd.grad(
                    logps.sum(), [p for p in policy.model.parameters() if p.requires_grad]
                ),
            )
        )
        policy.model.eval()
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-4, rtol=1e-4)
    for a, b in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(
        torch.cat([a.logps for g in groups for a in g]),
        results[0][0].detach(),
        atol=2e-4,
        rtol=1e-4,
    )


def test_checkpointing_changes_memory_and_not_gradients(samples):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        policy = with_live_adapter(load_policy("tiny", "nf4", rank=4, checkpointing=checkpointing))
        torch.manual_seed(0)
        prompts, groups = draw(policy, samples[:2], tokens=20)
        policy.model.train()
        calls = []
        policy.base.model.language_model.layers[0].self_attn.q_proj.register_forward_pre_hook(
            lambda *_: calls.append(1)
        )
        logps, _ = logprobs(policy, prompts, [[a.ids for a in g] for g in groups])
        logps.sum().backward()
        results.append(([p.grad for p in policy.model.parameters() if p.requires_grad], len(calls)))
    assert results[0][1] == 1 and results[1][1] == 2  # computed again in the backward
    for a, b in zip(results[0][0], results[1][0]):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_saved_adapter_loads_with_peft_on_the_plain_base(policy, samples, tmp_path):
    policy.model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(
        Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32), tmp_path
    )
    inputs = policy.processor(
        text=[prompt_text(policy.processor, samples[0].question, 112, 112)],
        images=[samples[0].image],
        return_tensors="pt",
    )
    policy.base.model.rope_deltas = None
    with torch.no_grad():
        torch.testing.assert_close(
            plain(**inputs).logits, policy.model(**inputs).logits, atol=1e-4, rtol=1e-4
        )
    again = load_policy("tiny", "fp32", adapter=tmp_path)
    assert any(p.requires_grad for p in again.model.parameters())


def test_a_merged_folder_answers_like_base_and_adapter_up_to_bf16(policy, samples, tmp_path):
    """Against the adapter on the base through PEFT, and far from the base alone."""
    policy.model.save_pretrained(tmp_path / "adapter")
    merge("tiny", tmp_path / "adapter", tmp_path / "merged")
    merged = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    assert (
        next(iter(load_file(tmp_path / "merged/model.safetensors").values())).dtype
        == torch.bfloat16
    )
    inputs = processor(
        text=[prompt_text(processor, samples[0].question, 112, 112)],
        images=[samples[0].image],
        return_tensors="pt",
    )
    policy.base.model.rope_deltas = None
    with torch.no_grad():
        ours, theirs = merged(**inputs).logits.log_softmax(-1), policy.model(
            **inputs
        ).logits.log_softmax(-1)
        with policy.as_reference():
            plain = policy.model(**inputs).logits.log_softmax(-1)
    assert (ours - theirs).abs().mean() < 0.1 * (plain - theirs).abs().mean()


def test_the_prompt_holds_the_question_the_size_and_an_example_the_parser_accepts(policy):
    from samr1_mini.reward import read_answer

    text = prompt_text(policy.processor, "the red star", 112, 84)
    assert (
        "Question: the red star" in text and "112 x 84" in text and text.count("<|image_pad|>") == 1
    )
    start = text.index("<think>The left")
    assert read_answer(text[start : text.index("</answer>", start) + 9], 112).in_format


def test_another_kind_of_model_and_a_missing_one_are_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="llama"):
        load_policy(tmp_path)
    with pytest.raises(UserError, match="no-such-folder"):
        load_policy("./no-such-folder")


@pytest.mark.parametrize("load_in", ["nf4", "bf16"])
def test_each_of_several_processes_loads_its_base_on_a_gpu_of_its_own(load_in, monkeypatch):
    """transformers' loader puts "cuda" in the place of this process; of {"": "cuda"} its threads would make GPU 0."""
    asked = {}
    monkeypatch.setattr(policy_module, "compute_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(
        policy_module.AutoModelForImageTextToText,
        "from_pretrained",
        lambda _, **given: asked.update(given) or (None, {"missing_keys": ()}),
    )
    monkeypatch.setattr(policy_module, "add_adapter", lambda *_: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    load_policy("tiny", load_in, device="cuda")
    assert check_and_set_device_map(asked["device_map"]) == {"": torch.device("cuda:1")}


@pytest.mark.gpu
def test_the_policy_trains_on_a_gpu_in_nf4_and_bf16(samples):
    for load_in in ("nf4", "bf16"):
        policy = load_policy("tiny", load_in, rank=4, device="cuda", checkpointing=True)
        prompts, groups = draw(policy, samples[:2], tokens=20)
        policy.model.train()
        logps, _ = logprobs(policy, prompts, [[a.ids for a in g] for g in groups])
        logps.sum().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.model.parameters())


def test_a_model_whose_generation_config_names_no_end_stops_at_its_tokenizers(policy, monkeypatch):
    tokenizer = policy.processor.tokenizer
    for none in (None, []):
        monkeypatch.setattr(policy.base.generation_config, "eos_token_id", none)
        assert stop_ids(policy.base, tokenizer).tolist() == [tokenizer.eos_token_id]


def test_no_four_bit_layer_may_take_the_kernel_that_has_no_backward(monkeypatch):
    """bitsandbytes takes it only on CPUs with AVX512-BF16, where gradients would vanish without a word."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    layers = [
        m for m in load_policy("tiny", "nf4", rank=4).base.modules() if isinstance(m, Linear4bit)
    ]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)


@pytest.mark.parametrize("rank", [4, 32])
def test_an_adapter_of_any_rank_counts_twice(rank):
    policy = load_policy("tiny", "fp32", rank=rank)
    layer = policy.base.model.language_model.layers[0].self_attn.q_proj
    assert layer.scaling == {"default": 2.0} and layer.lora_A["default"].weight.shape[0] == rank


def test_questions_stay_with_their_pictures_where_the_vision_tower_takes_them_in_several_calls(
    policy, samples, monkeypatch
):
    """A call takes 4,096 patches: 64 drawn scenes, or one picture of 840 pixels a side."""
    images, questions = [x.image for x in samples], [x.question for x in samples]
    with torch.no_grad():
        expected, calls = encode(policy, images, questions), []
        tower = policy.base.model.get_image_features
        monkeypatch.setattr(
            policy.base.model, "get_image_features", lambda *a: calls.append(len(a[1])) or tower(*a)
        )
        many = encode(policy, images * 14, questions * 14)
    assert calls == [64, 20] and len({p.ids.tolist().__repr__() for p in expected}) == 6
    for a, b in zip(many, expected * 14, strict=True):
        assert a.ids.tolist() == b.ids.tolist() and (a.positions == b.positions).all()
        torch.testing.assert_close(a.embeds, b.embeds, atol=1e-4, rtol=1e-4)


def test_blanks_around_a_question_change_nothing():
    assert instruction(" the red star\n", 112, 112) == instruction("the red star", 112, 112)


def test_a_token_is_drawn_even_where_rounding_leaves_the_probabilities_short_of_one():
    """Without it the largest numbers that torch.rand gives would stand for an id that the vocabulary lacks."""
    logp = torch.tensor([0.5, 0.4999, 0.0]).log().clamp(min=-1e30)
    assert choose_tokens(logp[None], torch.tensor([1 - 2**-24])).tolist() == [1]
