"""The rehearsal: true shapes, random weights, whole steps, a table."""

import json
import sys

import pytest
import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Linear4bit
from PIL import Image
from peft.tuners import lora
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

import train
from samr1_mini import policy as policy_module
from samr1_mini.config import UserError, make_settings
import benchmark
from samr1_mini import full_size
from samr1_mini import rehearse as rehearse_module
from samr1_mini.full_size import random_policy, shape_config, shape_processor
from samr1_mini.grpo import Parts, new_optimizer
from samr1_mini.policy import TINY, load_policy
from samr1_mini.memory import cap_memory


@pytest.mark.parametrize("shape, published", [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_the_shapes_have_as_many_parameters_as_the_published_models(shape, published):
    """Half of the bytes that the index files of the bf16 checkpoints state."""
    with init_empty_weights():
        model = Qwen2_5_VLForConditionalGeneration._from_config(shape_config(shape))
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == published


@pytest.mark.parametrize("load_in", ["nf4", "bf16"])
def test_a_random_policy_is_quantised_where_a_loaded_one_would_be(load_in):
    policy = random_policy(shape_config("small"), load_in, 4, "cpu", False)
    four = {name for name, module in policy.base.named_modules() if isinstance(module, Linear4bit)}
    assert bool(four) == (load_in == "nf4") and not any(
        "visual" in name or "lm_head" in name for name in four
    )
    assert all(not p.is_meta for p in policy.base.parameters()) and not any(
        b.is_meta for b in policy.base.buffers()
    )
    assert all("lora" in name for name, p in policy.model.named_parameters() if p.requires_grad)
    if four:
        assert all(policy.base.get_submodule(name).weight.quant_state.nested for name in four)


@pytest.mark.parametrize("load_in", ["nf4", "bf16"])
def test_a_random_policy_is_made_of_the_classes_and_dtypes_of_a_real_load(
    load_in, tmp_path, monkeypatch
):
    monkeypatch.setattr(policy_module, "compute_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(full_size, "compute_dtype", lambda *_: torch.bfloat16)
    config = shape_config("small")
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(TINY).save_pretrained(tmp_path)
    drawn, loaded = random_policy(config, load_in, 4, "cpu", False), load_policy(
        tmp_path, load_in, rank=4
    )
    kinds = [
        {name: type(module) for name, module in p.model.named_modules()} for p in (drawn, loaded)
    ]
    assert kinds[0] == kinds[1] and (lora.bnb.Linear4bit in kinds[0].values()) == (load_in == "nf4")
    held = [
        [(name, type(p), p.dtype, p.shape) for name, p in one.model.named_parameters()]
        for one in (drawn, loaded)
    ]
    assert held[0] == held[1]


def test_a_rehearsal_on_a_cpu_runs_whole_steps_says_that_it_is_small_and_writes_its_table(
    tmp_path, capsys
):
    train.main(
        [
            "--preset",
            "tiny",
            "--rehearse",
            "2",
            "--device",
            "cpu",
            "--max-new-tokens",
            "8",
            "--image-size",
            "224",
            "--group",
            "2",
            "--run",
            str(tmp_path / "rehearsal"),
        ]
    )
    printed = capsys.readouterr().out
    assert (
        "say nothing about a GPU" in printed and not (tmp_path / "rehearsal/metrics.jsonl").exists()
    )
    table = json.loads((tmp_path / "rehearsal/rehearsal.json").read_text())
    assert (
        set(table["seconds"])
        == set(table["peak_gib"])
        == {"load", "rollout", "reward", "update", "evaluation"}
    )
    assert (
        table["shape"] == "small"
        and table["prompt_tokens"] > 64
        and "hours_for_3000_samples" not in table
        and not table["forecast"]
    )
    for phase in table["seconds"]:
        assert phase in printed


@pytest.mark.parametrize("step", [1, 2])
def test_memory_that_runs_out_is_told_with_its_phase(step, monkeypatch):
    calls, real = [], rehearse_module.update

    def full(*args):
        calls.append(1)
        if len(calls) == step:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return real(*args)

    monkeypatch.setattr(rehearse_module, "update", full)
    settings, _ = make_settings(
        preset="tiny", device="cpu", rehearse=2, max_new_tokens=8, image_size=112, group=2
    )
    with pytest.raises(UserError, match="update.*--group.*2.00 GiB"):
        rehearse_module.rehearse(settings)


def test_a_size_that_the_shape_cannot_cut_is_refused_in_one_line():
    settings, _ = make_settings(preset="3b", device="cpu", rehearse=1, image_size=100)
    with pytest.raises(UserError, match="--image-size .*28.*100.*112"):
        rehearse_module.rehearse(settings)


def test_a_policy_of_another_shape_than_the_presets_is_refused_in_one_line():
    settings, _ = make_settings(
        preset="7b", device="cpu", rehearse=1, policy="Qwen/Qwen3-VL-4B-Instruct", image_size=832
    )
    with pytest.raises(UserError, match="--preset 7b.*--policy Qwen/Qwen3"):
        rehearse_module.rehearse(settings)


def test_the_benchmark_takes_a_shape_and_writes_its_rows(tmp_path, monkeypatch):
    options = [
        "--shape",
        "small",
        "--rounds",
        "1",
        "--tokens",
        "4",
        "--lengths",
        "3",
        "5",
        "--out",
        str(tmp_path / "b.json"),
    ]
    monkeypatch.setattr(sys, "argv", ["benchmark", *options])
    monkeypatch.setattr(benchmark, "SIDES", ((8, 2), (12, 1)))
    benchmark.main()
    rows = json.loads((tmp_path / "b.json").read_text())
    assert (
        rows["shape"] == "small"
        and [r["size"] for r in rows["results"]] == [224, 336]
        and set(rows["weights"]) >= {"nf4, update", "bf16, rollout"}
    )
    assert [r["answer_tokens"] for r in rows["updates"]] == [3, 3, 5] and all(
        set(r["update"]) == {"as it is", "masked row"} for r in rows["updates"]
    )
    assert rows["decoding"][1]["traffic"]["as it is"] < 1.5


@pytest.mark.gpu
def test_a_3b_rehearsal_fits_a_24_gb_card(tmp_path):
    settings, _ = make_settings(
        preset="3b",
        device="cuda",
        rehearse=1,
        memory_limit=24.0,
        questions=4,
        max_new_tokens=64,
        run=str(tmp_path),
    )
    cap_memory(settings)
    table = rehearse_module.rehearse(settings)
    assert max(table["peak_gib"].values()) < 24 and table["device"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("side", [840, 1008, 1120])
def test_the_rehearsal_sees_pictures_of_the_size_of_the_settings(side):
    reader = shape_processor(shape_config("7b")).image_processor
    grid = reader(images=[Image.new("RGB", (side, side))], return_tensors="pt").image_grid_thw
    assert grid.tolist() == [[1, side // 14, side // 14]]


def test_moments_that_the_optimizer_already_has_are_not_made_twice(settings, policy, monkeypatch):
    parts = Parts(policy, None, new_optimizer(policy, settings), settings)
    made = []
    monkeypatch.setattr(torch, "zeros_like", lambda p: made.append(p))
    monkeypatch.setattr(rehearse_module, "encode_questions", lambda *_: [])
    loss = torch.zeros((), requires_grad=True)
    monkeypatch.setattr(rehearse_module, "batch_loss", lambda *_: (loss * 1, {}))
    rehearse_module.try_largest_update(parts, [])
    assert len(made) == 2 * len(parts.policy.trained)
    parts.optimizer.state[parts.policy.trained[0]] = {"step": torch.ones(())}
    rehearse_module.try_largest_update(parts, [])
    assert len(made) == 2 * len(parts.policy.trained)
