"""One attention: an answer sees its prompt and itself, in scoring and in sampling, and no mask says so."""

import weakref
from dataclasses import replace

import pytest
import torch
from test_policy import draw
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from samr1_mini import decoding
from samr1_mini.attention import PackedRow
from benchmark import compare_decoding, masked_rows
from samr1_mini.decoding import Cache, FixedCache, generate
from samr1_mini.full_size import random_policy, shape_config
from samr1_mini.policy import encode, logprobs, prompt_text
from samr1_mini.sizes import Sizes, question_bytes, questions_per_batch
from samr1_mini.tokens import products

H, KV, D = 6, 2, 8


def softmax_attention(q, k, v, scale):
    """One query [H, d] on keys and values [KV, n, d] -> [H, d], written out."""
    k, v = (x.double().repeat_interleave(H // KV, 0) for x in (k, v))  # [H, n, d]
    weights = ((k @ q.double()[..., None])[..., 0] * scale).exp()  # [H, n]
    return ((weights / weights.sum(-1, keepdim=True))[:, None] @ v)[:, 0].float()


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that any operation takes or makes, backward included."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen |= {
            tuple(x.shape) for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)
        }
        return out


def test_in_a_row_each_token_sees_its_prompt_and_what_its_own_answer_said_before():
    """Two questions, uneven answers, one of a single token of which nothing is read; gradients too."""
    torch.manual_seed(0)
    prompts, answers = [5, 3], [[4, 0, 2], [1, 3, 3]]
    size = sum(prompts) + sum(map(sum, answers))
    q, k, v = (torch.randn(1, n, size, D, requires_grad=True) for n in (H, KV, KV))
    expected, start = [], 0
    for prompt, group in zip(prompts, answers):
        shared = list(range(start, start + prompt))
        for part, before in [(shared, []), *((range(n), shared) for n in group)]:
            places = shared if part is shared else list(range(start, start + len(part)))
            start += len(places)
            for i, place in enumerate(places):
                sees = before + places[: i + 1]
                expected.append(
                    softmax_attention(q[0, :, place], k[0, :, sees], v[0, :, sees], 0.3)
                )
    expected = torch.stack(expected)[None]  # [1, T, H, d]
    seen = PackedRow(prompts, answers).attend(0, q, k, v, 0.3)
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn(seen.shape)
    for ours, theirs in zip(
        *(torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (seen, expected))
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [Cache, FixedCache])
def test_in_the_cache_each_new_token_sees_its_prompt_and_its_own_answer_while_questions_leave(
    kind, monkeypatch
):
    """Prompts of different lengths, more tokens than a block holds, two layers, and questions that end one after
    another."""
    monkeypatch.setattr(decoding, "BLOCK", 4)
    torch.manual_seed(0)
    lengths, group = [5, 3, 7, 4], 2
    cache, read = kind(lengths, group, "cpu"), {}
    for layer in (0, 1):
        q, k, v = (torch.randn(4, n, 7, D) for n in (H, KV, KV))
        seen = cache.attend(layer, q, k, v, 0.3)  # [b, P, H, d]
        for b, n in enumerate(lengths):
            expected = torch.stack(
                [
                    softmax_attention(q[b, :, i], k[b, :, : i + 1], v[b, :, : i + 1], 0.3)
                    for i in range(n)
                ]
            )
            torch.testing.assert_close(seen[b, :n], expected, atol=1e-5, rtol=1e-5)
            for g in range(group):
                read[layer, b, g] = k[b, :, :n], v[b, :, :n]
    there = torch.arange(4)
    for step, leaves in enumerate([[], [0], [], [], [], [3], [], [], [1], []]):
        ended = torch.tensor([int(b) in leaves for b in there])
        if ended.any():
            there = there[cache.drop(ended)]
        cache.grow()
        for layer in (0, 1):
            q, k, v = (torch.randn(len(there), n, group, D) for n in (H, KV, KV))
            seen = cache.attend(layer, q, k, v, 0.3)  # [b, G, H, d]
            for i, b in enumerate(there.tolist()):
                for g in range(group):
                    read[layer, b, g] = tuple(
                        torch.cat([x, y[i, :, g, None]], 1)
                        for x, y in zip(read[layer, b, g], (k, v))
                    )
                    expected = softmax_attention(q[i, :, g], *read[layer, b, g], 0.3)
                    torch.testing.assert_close(seen[i, g], expected, atol=1e-5, rtol=1e-5)
    assert there.tolist() == [2]


def test_a_question_that_leaves_is_replaced_in_place_by_the_last_one():
    cache = Cache([50] * 8, 4, "cpu")
    cache.attend(0, torch.randn(8, H, 50, D), *torch.randn(2, 8, KV, 50, D), 1.0)
    cache.grow()
    cache.answers[0].normal_()
    places, last = (
        [x.data_ptr() for x in cache.prompt + cache.answers],
        [x[:, 7].clone() for x in cache.prompt + cache.answers],
    )
    with Shapes() as shapes:
        assert cache.drop(torch.arange(8) == 2).tolist() == [0, 1, 7, 3, 4, 5, 6]
    assert [
        x.data_ptr() for x in cache.prompt + cache.answers
    ] == places  # nothing was laid out anew
    assert all(torch.equal(x[:, 2], y) for x, y in zip(cache.prompt + cache.answers, last))
    copied = {s[1] for s in shapes.seen if len(s) > 3}
    assert copied == {
        8,
        7,
        1,
    }  # the whole, the whole without its end, and the one question that moved


def test_no_mask_over_a_row_and_none_over_a_growing_cache_exists(policy, samples, unwatched_masks):
    torch.manual_seed(0)
    with torch.no_grad():
        prompts = encode(policy, [x.image for x in samples[:2]], [x.question for x in samples[:2]])
    with Shapes() as shapes:
        groups = generate(policy, prompts, 4, 12)
        ids = [[a.ids for a in g] for g in groups]
        logprobs(policy, prompts, ids)[0].sum().backward()
    policy.model.zero_grad()
    longest = max(len(p.ids) for p in prompts)
    rows = [len(p.ids) + sum(len(i) - 1 for i in g) for p, g in zip(prompts, ids)]
    square = {*rows, sum(rows), *(len(p.ids) for p in prompts)}
    width = policy.base.config.text_config.hidden_size
    growing = {longest + 4 * t for t in range(1, 13)} - {width}
    masks = [
        s
        for s in shapes.seen
        if s[-2:] in {(n, n) for n in square} or (s[-2:-1] == (4,) and s[-1] in growing)
    ]
    assert not masks and (1, sum(rows), width) in shapes.seen
    with Shapes() as shapes, torch.no_grad():
        masked_rows(policy, prompts, ids)
    assert any(s[-2:] == (max(rows), max(rows)) for s in shapes.seen)  # the baseline's is seen


def test_masked_rows_give_the_same_log_probs_and_gradients_in_nf4(nf4_policy, samples):
    prompts, groups = draw(nf4_policy, samples[:3], group=4, tokens=48)
    ids, results = [[a.ids for a in g] for g in groups], []
    parameters = [p for p in nf4_policy.model.parameters() if p.requires_grad]
    nf4_policy.model.train()
    for logps in (logprobs(nf4_policy, prompts, ids)[0], masked_rows(nf4_policy, prompts, ids)):
        results.append(
            (
                logps.detach(),
                torch.cat([g.flatten() for g in torch.autograd.grad(logps.sum(), parameters)]),
            )
        )
    nf4_policy.model.eval()
    (ours, gradient), (theirs, expected) = results
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


def test_the_same_numbers_come_out_bit_for_bit_twice(policy, samples):
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    results = []
    for _ in range(2):
        prompts, groups = draw(policy, samples[:3], group=4, tokens=30)
        logps, _ = logprobs(policy, prompts, [[a.ids for a in g] for g in groups])
        results.append(
            [
                logps.detach(),
                torch.cat([a.logps for g in groups for a in g]),
                *torch.autograd.grad(logps.sum(), parameters),
            ]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_without_a_layout_the_model_is_an_ordinary_one_padding_and_all(policy, samples):
    """Two prompts of different lengths in the model's own forward, padded on the left, give what each gives alone."""
    config, processor = policy.base.config, policy.processor
    assert (
        config.text_config._attn_implementation == "shared_prompt"
        and config.vision_config._attn_implementation == "sdpa"
    )
    texts, images = (
        [
            prompt_text(processor, q, 112, 112)
            for q in ("the star", samples[0].question + " and no other")
        ],
        [samples[0].image] * 2,
    )
    logits = []
    for batch in ([0, 1], [0], [1]):
        inputs = processor(
            text=[texts[i] for i in batch],
            images=[images[i] for i in batch],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        assert bool((inputs.attention_mask == 0).any()) == (len(batch) == 2)
        policy.base.model.rope_deltas = None
        with torch.no_grad():
            logits.append(policy.base(**inputs).logits[:, -1])
    torch.testing.assert_close(logits[0], torch.cat(logits[1:]), atol=1e-4, rtol=1e-4)


def test_one_decoded_token_moves_little_more_than_the_cache_and_the_old_way_seventeen_times_as_much():
    at_the_end = compare_decoding(511, 1, "cpu")["traffic"]
    assert at_the_end["as it is"] < 1.5 and 16 < at_the_end["repeated and concatenated"] < 18


def test_the_library_and_the_cache_agree_at_the_7b_shape():
    """PyTorch's own kernel on the keys of a prompt and an answer in one, and the cache: the same attention."""
    torch.manual_seed(0)
    keys = torch.randn(2, 1, 4, 40, 128)
    cache = Cache([40], 2, "cpu")
    cache.attend(0, torch.randn(1, 28, 40, 128), *keys, 128**-0.5)
    new, query = torch.randn(2, 1, 4, 2, 3, 128), torch.randn(1, 28, 2, 128)
    for t in range(3):
        cache.grow()
        seen = cache.attend(0, query, *new[..., t, :], 128**-0.5)
    for g in range(2):
        k, v = (torch.cat([x, y[:, :, g]], 2) for x, y in zip(keys, new))
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, g : g + 1], k, v, enable_gqa=True
        )
        torch.testing.assert_close(seen[:, g], expected[:, :, 0], atol=1e-5, rtol=1e-5)
    assert (
        products(query.bfloat16(), query.bfloat16()).dtype == torch.float32
    )  # scores are never rounded to bf16


# ---------------------------------------------------------------------------------------------------- memory


class Live(TorchDispatchMode):
    """Counts the bytes that tensors made under it hold, and notes the most at a time."""

    def __init__(self):
        super().__init__()
        self.held, self.now, self.peak = {}, 0, 0

    def free(self, key: int):
        self.now -= self.held.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        known = {
            x.untyped_storage()._cdata
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        for storage in (
            x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)
        ):
            if storage._cdata not in known and storage._cdata not in self.held:
                self.held[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out


@pytest.mark.parametrize("size, tokens", [(112, 66), (448, 16)])
def test_the_estimate_of_what_a_question_takes_is_what_is_counted(samples, settings, size, tokens):
    """At a shape whose prompts take most and at one whose answers do: what a third question adds to the peak of two."""
    policy = random_policy(shape_config("small"), "fp32", 4, "cpu", False)
    policy.banned[policy.processor.tokenizer.eos_token_id] = True  # answers of full length
    s = replace(settings, load_in="fp32", group=8, max_new_tokens=tokens)
    with torch.no_grad():
        prompts = encode(
            policy, [samples[0].image.resize((size, size))] * 3, [samples[0].question] * 3
        )
    peaks = []
    for n in (1, 3):
        with Live() as live:
            generate(policy, prompts[:n], s.group, tokens)
        peaks.append(live.peak)
    estimate = question_bytes(Sizes(policy.base.config, s, len(prompts[0].ids)))
    assert estimate == pytest.approx((peaks[1] - peaks[0]) / 2, rel=0.15)


def test_the_questions_of_a_batch_go_in_equal_parts(policy, settings):
    one = question_bytes(Sizes(policy.base.config, settings, 160))
    parts = lambda questions, most: questions_per_batch(
        policy.base, questions, 160, settings, 2 * one * (most + 0.5)
    )
    assert [parts(16, most) for most in (1, 3, 8, 13, 16, 40)] == [1, 3, 8, 8, 16, 16]
    assert parts(5, 3) == 3 and parts(1, 3) == 1
