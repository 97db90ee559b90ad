"""The command that makes the tiny networks: every stage runs, learns for two steps, and leaves what the next one reads."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from samr1_mini.policy import Policy, encode, logprobs
from samr1_mini.segmenter import TINY_SAM, load_segmenter, random_sam
from samr1_mini.tiny import pretrain
from samr1_mini.tiny.build import build_policy, build_processor
from samr1_mini.tokens import banned_ids, stop_ids


def test_the_sam_stage_trains_and_what_it_writes_is_a_segmenters_folder(tmp_path):
    (tmp_path / "sam.json").write_text((TINY_SAM / "sam.json").read_text())
    pretrain.train_sam(2, tmp_path / "model.safetensors", pictures=2)
    torch.manual_seed(0)
    start, trained = random_sam("tiny").state_dict(), load_segmenter(str(tmp_path)).predictor.model.state_dict()
    assert any((trained[name] - value).abs().max() > 1e-3 for name, value in start.items())
    scene = pretrain.scenes_from(0, 1)[0]
    assert load_segmenter(str(tmp_path)).masks(scene.image, [scene.things[0].box], [[]]).shape == (1, 112, 112)


def test_what_the_language_stage_learns_from_one_row_of_answers_is_what_each_is_alone():
    processor = build_processor(pretrain.corpus())
    torch.manual_seed(0)
    model = build_policy(processor.tokenizer)
    policy = Policy(model, processor, torch.zeros(len(processor.tokenizer), dtype=torch.bool), torch.tensor([2]))
    scenes = pretrain.scenes_from(0, 2)
    with torch.no_grad():
        prompts = encode(policy, [Image.fromarray(scene.image) for scene in scenes], ["the red star", "the ring"])
        groups = [[torch.arange(20, 30), torch.arange(40, 47)], [torch.arange(60, 75)]]
        together, _ = logprobs(policy, prompts, groups)
        alone = [logprobs(policy, [p], [[ids]])[0] for p, group in zip(prompts, groups) for ids in group]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    with pytest.raises(AssertionError):
        other = type(model)._from_config(model.config, attn_implementation="sdpa")  # answers would see each other
        Policy(other, processor, policy.banned, policy.stop)


def test_the_vision_and_the_language_stage_train_the_policy_and_it_is_measured(tmp_path, monkeypatch):
    torch.manual_seed(2)
    processor = build_processor(pretrain.corpus())
    model = build_policy(processor.tokenizer)
    pretrain.train_vision(2, tmp_path / "vision.safetensors")
    model.model.visual.load_state_dict(load_file(tmp_path / "vision.safetensors"))
    stop = stop_ids(model, processor.tokenizer)
    policy = Policy(model, processor, banned_ids(model, processor.tokenizer, stop), stop)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pretrain.train_language(policy, 2, pictures=2)
    assert all((p != before[n]).any() for n, p in model.named_parameters() if "layers.0.self_attn.q_proj" in n)
    model.save_pretrained(tmp_path / "policy"), processor.save_pretrained(tmp_path / "policy")
    monkeypatch.setattr(pretrain, "load_policy", lambda name: policy)
    measured = pretrain.measure_policy(count=60, group=1)
    assert set(measured["all"]) == {"box IoU", "holds the object", "format, greedy", "format, sampled"}
    assert pretrain.measure_sam(count=2)["true box"] > 0.8
