"""Other policies of the family: Qwen2-VL and Qwen3-VL as small random models, in the same prompts, packed rows and
rewards."""

import pytest
import torch
from conftest import score, with_live_adapter
from PIL import Image
from test_decoding import record_a_token
from transformers import (
    AutoProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from samr1_mini.config import UserError, make_settings
from samr1_mini.decoding import generate
from samr1_mini.evaluation import evaluate
from samr1_mini.grpo import Parts, roll_out
from samr1_mini.metrics import tight_box
from samr1_mini.policy import (
    TINY,
    check_policy,
    encode,
    load_policy,
    logprobs,
    prompt_text,
)

TEXT = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
)
FAMILY = ["qwen2_vl", "qwen3_vl"]
CELL = {"qwen2_vl": 28, "qwen3_vl": 32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small random models as ordinary folders, with the tiny tokenizer."""
    torch.manual_seed(0)
    parts, made = AutoProcessor.from_pretrained(TINY), {}
    tokenizer, token = parts.tokenizer, parts.tokenizer.convert_tokens_to_ids
    ids = dict(
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    text = TEXT | dict(
        vocab_size=len(tokenizer),
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"),
    )
    qwen2 = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config=text
            | dict(
                bos_token_id=token("<|endoftext|>"),
                rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]),
            ),
            vision_config=dict(depth=2, embed_dim=32, hidden_size=64, num_heads=2, patch_size=14),
            **ids,
        )
    )
    qwen3 = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=text
            | dict(
                head_dim=16,
                rope_parameters=dict(
                    rope_type="default",
                    rope_theta=1e4,
                    mrope_section=[2, 3, 3],
                    mrope_interleaved=True,
                ),
            ),
            vision_config=dict(
                depth=4,
                hidden_size=32,
                intermediate_size=64,
                num_heads=2,
                patch_size=16,
                out_hidden_size=64,
                num_position_embeddings=64,
                deepstack_visual_indexes=[0, 2],
            ),
            **ids,
        )
    )
    for model, kind in ((qwen2, Qwen2VLProcessor), (qwen3, Qwen3VLProcessor)):
        name = model.config.model_type
        made[name] = tmp_path_factory.mktemp(name)
        with torch.no_grad():  # the default start is so flat that every question would get nearly the same answer
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(6)
        model.save_pretrained(made[name])
        for part in (parts.image_processor, parts.video_processor):
            part.patch_size = CELL[name] // 2
        kind(
            parts.image_processor,
            tokenizer,
            parts.video_processor,
            chat_template=parts.chat_template,
        ).save_pretrained(made[name])
    return made


@pytest.fixture(params=FAMILY)
def other(request, folders):
    return with_live_adapter(load_policy(folders[request.param], "fp32", rank=4))


def seen(other, samples):
    size = 4 * CELL[other.base.config.model_type]
    return [x.image.resize((size, size)) for x in samples], [x.question for x in samples]


def test_sampled_and_packed_log_probs_equal_the_models_own_forward(other, samples):
    """One unpadded row an answer, pixels and all: deepstack features, positions and picture tokens are where the model
    itself has them."""
    images, questions = seen(other, samples[:3])
    torch.manual_seed(0)
    with torch.no_grad():
        prompts = encode(other, images, questions)
    groups = generate(other, prompts, 3, 12)
    ids = [[a.ids for a in g] for g in groups]
    packed, _ = logprobs(other, prompts, ids)
    alone = []
    for image, question, group in zip(images, questions, ids):
        for answer in group:
            inputs = other.processor(
                text=[prompt_text(other.processor, question, *image.size, other.coordinates)],
                images=[image],
                return_tensors="pt",
            )
            start = inputs.input_ids.shape[1]
            inputs["input_ids"] = torch.cat([inputs.input_ids, answer[None]], 1)
            inputs["attention_mask"] = torch.ones_like(inputs.input_ids)
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(
                inputs.mm_token_type_ids, (0, len(answer))
            )
            other.base.model.rope_deltas = None
            with torch.no_grad():
                logits = (
                    other.base(**inputs)
                    .logits[0, start - 1 : -1]
                    .float()
                    .masked_fill(other.banned, -float("inf"))
                )
            alone.append(logits.log_softmax(-1).gather(1, answer[:, None])[:, 0])
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        torch.cat([a.logps for g in groups for a in g]), torch.cat(alone), atol=1e-3, rtol=1e-3
    )
    packed.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in other.model.parameters())


def test_a_token_of_theirs_can_be_recorded_as_a_cuda_graph_too(other, samples, monkeypatch):
    with torch.no_grad():
        prompts = encode(other, *seen(other, samples[:2]))
    record_a_token(other, prompts, monkeypatch)


def test_another_picture_gives_other_log_probs(other, samples):
    images, questions = seen(other, samples[:1])
    ids = [[torch.arange(300, 310)]]
    with torch.no_grad():
        seeing, blind = (
            logprobs(other, encode(other, [image], questions), ids)[0]
            for image in (images[0], Image.new("RGB", images[0].size, (128, 128, 128)))
        )
    assert (seeing - blind).abs().max() > 0.01


def test_these_models_are_asked_in_thousandths_and_their_answers_read_so(other, samples, segmenter):
    assert other.coordinates == "thousandths" and other.answer_side(128) == 1000
    assert "thousandths of the picture's width and height" in prompt_text(
        other.processor, "what?", 128, 128, other.coordinates
    )
    item = samples[0]
    x1, y1, x2, y2 = (round(1000 * v / 112) for v in tight_box(item.mask))
    middle = [(x1 + x2) // 2, (y1 + y2) // 2, 1]
    text = f'<think>.</think><answer>{{"bbox": [{x1}, {y1}, {x2}, {y2}], "points": [{middle}]}}</answer>'
    [right], [wrong] = score(segmenter, item, [text], other.answer_side(112)), score(
        segmenter, item, [text], 112
    )
    assert right.box_iou > 0.9 and right.iou > 0.8 > 0.1 > wrong.iou


def test_the_coordinate_system_can_be_set_against_the_models_habit(folders, policy):
    assert load_policy(folders["qwen2_vl"], "fp32", 4, coordinates="pixels").answer_side(112) == 112
    assert policy.coordinates == "pixels" and policy.answer_side(112) == 112
    assert load_policy("tiny", "fp32", 4, coordinates="thousandths").answer_side(112) == 1000


def test_rollouts_and_evaluation_run_with_them(other, samples, segmenter):
    size = 4 * CELL[other.base.config.model_type]
    s, _ = make_settings(preset="tiny", device="cpu", group=2, max_new_tokens=6, image_size=size)
    rollouts, _ = roll_out(Parts(other, segmenter, None, s), samples[:2])
    assert len(rollouts) == 2 and all(len(r.completions) == len(r.rewards) == 2 for r in rollouts)
    assert len(evaluate(other, segmenter, samples[:2], s).rows) == 2


@pytest.mark.parametrize(
    "kind, size, words",
    [
        ("qwen3_vl", 840, "multiple of 32 .* not 840: try 832"),
        ("qwen2_vl", 100, "multiple of 28 .* not 100: try 112"),
    ],
)
def test_a_size_that_does_not_divide_into_cells_is_refused_before_anything_is_loaded(
    folders, kind, size, words, monkeypatch
):
    monkeypatch.setattr(
        "samr1_mini.policy.AutoModelForImageTextToText.from_pretrained",
        lambda *_, **__: pytest.fail("it was loaded"),
    )
    with pytest.raises(UserError, match=f"--image-size must be a {words}"):
        check_policy(folders[kind], size)
