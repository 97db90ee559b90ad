"""The forecast: arithmetic against what a GPU measured, and against counted operations."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import Qwen2VLConfig, Qwen3VLConfig, Sam2Config

import train
from counter import Counter, count_phases, counting, fake_counter, fake_policy
from samr1_mini import forecast as forecast_module
from samr1_mini import grpo, speed
from samr1_mini.config import make_settings
from samr1_mini.forecast import GIB, forecast_line, peaks, phase_bytes
from samr1_mini.forecast import policy_sizes, prompt_bytes, staying_bytes, usable
from samr1_mini.full_size import random_policy, shape_config
from samr1_mini.rehearse import comparison_table, forecast, forecast_lines
from samr1_mini.runs import time_left
from samr1_mini.sizes import Sizes, number_bytes, sam_sizes
from samr1_mini.speed import CARDS, hours, known_card, moved_bytes, step_seconds, update_seconds

RESULTS = Path(__file__).parent.parent / "tutorials/results"


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def full_size(preset: str, **given):
    return make_settings(preset=preset, device="cpu", **given)[0]


def short(**given):
    """Settings of steps that a test can afford to run for real."""
    few = dict(image_size=112, questions=2, group=4, updates=2, max_new_tokens=16)
    return make_settings(preset="tiny", device="cpu", **few | given)[0]


def pefts_moved_bytes(n) -> float:
    """Bytes of a forward and a token with PEFT's own LoRA layers, which compute in fp32."""
    return moved_bytes(n) + n.layers * (8 * n.input_widths + 24 * n.output_widths)


@pytest.mark.parametrize("name", ["rehearsal-7b", "rehearsal-3b", "rehearsal-3b-bf16"])
def test_memory_is_within_10_percent_and_a_step_within_30_of_what_an_h100_measured(
    name, monkeypatch
):
    """The only step sampled and rewarded before AdamW had moments. SAM was in fp32.

    The LoRA layers were PEFT's. They started 21 operations more in a layer. In the prefill they
    held one fp32 number of the hidden width more, and 6 bytes more of each number of the MLP.
    """
    monkeypatch.setattr(speed, "OPERATIONS", speed.OPERATIONS + 21)
    monkeypatch.setattr(speed, "moved_bytes", pefts_moved_bytes)
    found = read(name)["measured"]
    lengths = dict(load_in=found["load_in"], max_new_tokens=found["max_new_tokens"])
    lengths["sam_dtype"] = "fp32"
    s = full_size(found["shape"], **lengths)
    config, prompt = shape_config(found["shape"]), found["prompt_tokens"]
    n = Sizes(config, s, prompt)
    gib = peaks(n)
    moments = staying_bytes(n)["moments"] / GIB
    gradients = phase_bytes(n)["layers"]["gradients"] / GIB
    measured = found["peak_gib"]
    pefts = s.questions * prompt * (4 * n.hidden_width + 6 * n.mlp_width) / GIB
    rollout = max(gib["prefill"] + pefts, gib["decode"]) - moments
    assert rollout == pytest.approx(measured["rollout"], rel=0.1)
    assert gib["reward"] - moments == pytest.approx(measured["reward"], rel=0.1)
    assert gib["update"] == pytest.approx(measured["update"], rel=0.1)
    for size, peak in found["update_peak_gib"].items():
        group, tokens = map(int, size.split(" x "))
        one = replace(s, group=group, max_new_tokens=tokens, questions=1, updates=1)
        if peak is not None:
            expected = peaks(Sizes(config, one, prompt))["update"]
            assert expected - gradients == pytest.approx(peak, rel=0.1), size
    step = step_seconds(n, "H100")
    assert sum(step.values()) == pytest.approx(found["seconds_per_step"], rel=0.3)
    assert step["update"] == pytest.approx(found["seconds"]["update"], rel=0.3)


@pytest.mark.parametrize("name", ["counted-7b", "counted-7b-kept"])
def test_the_7b_is_near_what_the_counter_counted(name, monkeypatch):
    """The counter holds no SAM beside the policy. Its seconds hold no starts of operations."""
    monkeypatch.setattr(speed, "LAUNCH", 0.0)
    monkeypatch.setattr(speed, "REPLAYED", 0.0)
    counted = read(name)
    found, s = counted["counted"], full_size("7b", max_new_tokens=counted["tokens"])
    n = Sizes(shape_config("7b"), s)
    n.kept_layers = counted["keep"]
    sam, gib = staying_bytes(n)["SAM"] / GIB, peaks(n)
    for phase in ("prefill", "decode", "update"):
        assert gib[phase] - sam == pytest.approx(found[phase]["peak"] / GIB, rel=0.1), phase
    reward = (sam + sum(phase_bytes(n)["reward"].values()) / GIB) - prompt_bytes(n) / GIB
    assert reward == pytest.approx(found["reward"]["peak"] / GIB, rel=0.1)
    for card, step in counted["seconds_per_step"].items():
        forecast_seconds = sum(step_seconds(n, card).values())
        assert forecast_seconds == pytest.approx(sum(step.values()), rel=0.3), card


def test_the_committed_forecast_is_that_of_the_program():
    assert_near(read("forecast-7b")["forecast"], forecast(shape_config("7b"), full_size("7b")))


def assert_near(committed, found) -> None:
    if not isinstance(found, dict):
        assert committed == pytest.approx(found, rel=1e-6)
        return
    assert committed.keys() == found.keys()
    for name in found:
        assert_near(committed[name], found[name])


@pytest.mark.parametrize("load_in, kept", [("nf4", 0), ("nf4", 3), ("bf16", 4)])
def test_arithmetic_is_near_the_counter_at_a_small_shape(load_in, kept, monkeypatch):
    wide = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=8, vocab_size=32768)
    monkeypatch.setattr(speed, "LAUNCH", 0.0)  # the counter's seconds hold no starts
    monkeypatch.setattr(
        "samr1_mini.full_size.POLICY_SIZES",
        {"small": wide | dict(num_hidden_layers=4, num_key_value_heads=2)},
    )
    config = shape_config("small")
    s = short(load_in=load_in, checkpointing=kept < 4, group=8, micro=1, max_new_tokens=32)
    counter = fake_counter()
    policy = fake_policy(config, s, torch.bfloat16, counter)
    policy.keep_layers(kept)
    found = count_phases(policy, counter, s, prompt_tokens=264)
    n = Sizes(config, s, 264)
    n.kept_layers = kept
    stay = staying_bytes(n)
    sam = stay.pop("SAM")
    assert stay["moments"] == pytest.approx(found["moments"], rel=0.01)
    weights = sum(stay.values()) - stay["moments"]
    assert weights == pytest.approx(found["weights"], rel=0.03)
    gib = peaks(n)
    for phase in ("prefill", "decode", "update"):
        assert gib[phase] - sam / GIB == pytest.approx(found[phase]["peak"] / GIB, rel=0.1), phase
    for card in ("RTX 4090", "H100"):
        assert update_seconds(n, card) == pytest.approx(found["update"][card], rel=0.3), card


def test_memory_without_numbers_is_that_of_real_tensors_in_real_nf4():
    s, config = short(), shape_config("small")
    policy = random_policy(config, "nf4", s.rank, "cpu", False)
    assert any(isinstance(m, Linear4bit) for m in policy.base.modules())
    policy.banned[policy.stop] = True  # answers of full length
    real_counter = Counter()
    for tensor in [*policy.model.parameters(), *policy.model.buffers(), policy.banned]:
        real_counter.hold(tensor)
    for p in policy.base.parameters():
        if isinstance(p, Params4bit):
            state = p.quant_state
            second = state.state2
            for tensor in (state.absmax, state.code, state.offset, second.absmax, second.code):
                real_counter.hold(tensor)
    real = count_phases(policy, real_counter, s, prompt_tokens=128)
    counter = fake_counter()
    without_numbers = fake_policy(config, s, torch.float32, counter)
    # Comparing ids with a tensor on "meta" gives random memory. Then questions would end at random.
    assert not without_numbers.stop.is_meta and not without_numbers.banned.is_meta
    fake = count_phases(without_numbers, counter, s, 128)
    for part in ("weights", "moments"):
        assert fake[part] == pytest.approx(real[part], rel=0.01), part
    for phase in ("prefill", "decode", "update"):
        assert fake[phase]["peak"] == pytest.approx(real[phase]["peak"], rel=0.1), phase
        assert fake[phase]["flops"] == real[phase]["flops"], phase


def test_a_write_without_numbers_leaves_real_whole_numbers_alone_and_frees_what_is_gone():
    counter = fake_counter()
    with counting(counter):
        whole, real = torch.empty(1024, 256), torch.arange(6)
        assert counter.live == 4 * 1024 * 256 + 48 and whole.sum().item() == 1.0
        real[2:4] = whole[0, :2].long()
        assert real.tolist() == [0, 1, 2, 3, 4, 5]
        assert whole[torch.arange(1024) < 7].shape == (7, 256)
        del whole
    assert counter.live < 4 * 1024 and counter.peak > 4 * 1024 * 256


def test_the_7b_weighs_what_its_published_parameters_weigh_in_nf4():
    """4 bits a weight of the projections and their scales, 16 bits for all else."""
    four = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    adapter = 28 * 32 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    expected = four * (0.5 + (1 + 4 / 256) / 64) + 2 * (8_292_166_656 - four) + 4 * adapter
    stay = staying_bytes(policy_sizes(full_size("7b")))
    parts = ("language layers", "embeddings and head", "vision tower", "adapter")
    assert sum(stay[part] for part in parts) == pytest.approx(expected, rel=0.002)


@pytest.mark.parametrize(
    "config, vision, queries, features",
    [(Qwen2VLConfig(), 675_759_104, 8192, 1), (Qwen3VLConfig(), 566_949_104, 32 * 128, 4)],
)
def test_other_qwens_are_counted_by_their_configs(config, vision, queries, features, monkeypatch):
    monkeypatch.setattr(forecast_module, "check_policy", lambda name: config)
    s = full_size("7b", policy="a/folder", image_size=896)
    n = policy_sizes(s)
    assert n.vision_weights == pytest.approx(vision, rel=0.05)
    assert (n.query_width, n.vision_outputs) == (queries, features)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    monkeypatch.setattr(forecast_module, "card_memory", lambda limit: (80.0, 80.0))
    assert "forecast: peak" in forecast_line(s)


def test_a_larger_rank_group_and_longer_answers_take_more_memory_and_time():
    s = full_size("3b")
    base, seconds = peaks(policy_sizes(s)), sum(step_seconds(policy_sizes(s), "L4").values())
    for name, value in dict(rank=64, group=16, max_new_tokens=1024).items():
        n = policy_sizes(replace(s, **{name: value}))
        assert peaks(n)["update"] > base["update"], name
        assert sum(step_seconds(n, "L4").values()) > seconds, name
    whole = policy_sizes(replace(s, checkpointing=False))
    assert peaks(whole)["update"] > 2 * base["update"]
    assert hours(policy_sizes(s), "L4") > hours(policy_sizes(replace(s, test_samples=1)), "L4")


def test_each_segmenter_has_its_own_weights(tmp_path):
    Sam2Config().save_pretrained(tmp_path)
    counted = {kind: sam_sizes(kind) for kind in ("vit_h", "vit_b", "tiny", str(tmp_path))}
    weights = [n for n, _, _ in counted.values()]
    assert weights == [641_090_608, 93_735_472, 1_088_200, 31_440_721]
    assert counted["vit_h"][1:] == (4096, 16 * 4096**2)
    assert counted[str(tmp_path)][2] == 0


def test_a_gpu_without_bf16_keeps_all_but_the_4_bit_weights_in_fp32(monkeypatch):
    s = replace(full_size("3b"), device="cuda")
    gib = {}
    for capability in ((8, 0), (7, 5)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        gib[number_bytes(s.load_in, s.device)] = staying_bytes(policy_sizes(s))
    assert gib[4]["language layers"] == gib[2]["language layers"]
    assert gib[4]["vision tower"] == 2 * gib[2]["vision tower"]
    assert policy_sizes(full_size("3b", load_in="fp32")).number_bytes == 4


def test_each_line_of_the_table_is_a_forecast_and_holds_its_figures():
    s = full_size("7b")
    table = forecast(shape_config("7b"), s)
    lines = forecast_lines(json.loads(json.dumps(table)), s)
    assert all(line.startswith("forecast: ") and "\n" not in line for line in lines)
    text = "\n".join(lines)
    for card in CARDS:
        assert f"{table['hours'][card]['512']:.1f}" in text
    for size, peak in table["update_peak_gib"].items():
        assert f"{size} tokens: {peak:.1f} GiB" in text
    assert "redraw" not in text
    assert "redraw" in "".join(forecast_lines(table, replace(s, redraw=2)))
    sizes_of = {"a": usable(11.6) - 0.01, "b": usable(11.6) + 0.01, "c": 30.0}
    table["peak_gib"]["reward"] = 9.0
    lines = forecast_lines(table | {"update_peak_gib": sizes_of}, s)
    fits = [line.split("GiB, ")[1] for line in lines if re.search("  [abc] tokens", line)]
    assert fits == ["24 GB, 16 GB, 12 GB", "24 GB, 16 GB", "none of 24, 16 and 12 GB"]


@pytest.mark.parametrize(
    "name, card",
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("A100-SXM-80GB", "A100"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A10", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("GRID A100-10C", None),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
    ],
)
def test_a_card_is_known_by_its_name(name, card):
    assert known_card(name) == card


def test_training_starts_with_a_line_about_its_card_and_keeps_its_random_numbers(monkeypatch):
    s = full_size("7b")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=23.6 * GIB)
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (23.6 * GIB, 23.6 * GIB))
    line = forecast_line(s)
    assert re.findall(r"\d+\.\d", line) == ["20.6", "23.6", "2.5"] and "128 tokens" in line
    assert torch.equal(before, torch.get_rng_state())
    assert "--redraw" not in line and "--redraw" in forecast_line(replace(s, redraw=2))
    limited = forecast_line(replace(s, memory_limit=20.0))
    assert re.findall(r"\d+\.\d", limited) == ["17.5", "20.0", "2.6"]
    warned = forecast_line(replace(s, memory_limit=12.0)).splitlines()
    assert re.findall(r"\d+\.\d", warned[0]) == ["11.6", "12.0", "2.8"]
    assert warned[1].startswith("warning")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L40S")
    assert "no forecast of hours" in forecast_line(s)


def test_the_time_left_comes_from_measured_steps():
    left = time_left([50.0, 10.0, 14.0], 303)
    assert re.findall(r"\d+\.\d", left) == ["12.0", "1.0"]


@pytest.mark.parametrize("processes, lines", [(None, 1), ("1", 1), ("2", 0)])
def test_a_process_among_several_makes_no_forecast(processes, lines, monkeypatch, capsys):
    s, ran = replace(full_size("7b"), device="cuda"), []
    monkeypatch.setattr(train, "parse_settings", lambda *_: (s, "a line"))
    monkeypatch.setattr(grpo, "train", ran.append)
    monkeypatch.setattr(forecast_module, "forecast_line", lambda s: "forecast: peak")
    if processes:
        monkeypatch.setenv("WORLD_SIZE", processes)
        monkeypatch.setenv("RANK", "0")
    train.main([])
    assert ran == [s] and capsys.readouterr().out.count("forecast: peak") == lines


def test_measured_figures_stand_beside_the_forecast_of_their_phase():
    expected = dict(load=9.0, prefill=15.5, decode=14.0, reward=13.0, update=12.5)
    measured = dict(rollout=30.0, reward=8.0, update=84.0, evaluation=2.0)
    times = {"rollout": 31.5, "update": 80.25}
    lines = comparison_table(measured, dict.fromkeys(measured, 11.0), expected, times)
    assert [line.split() for line in lines[1:]] == [
        ["rollout", "30.0", "31.5", "11.000", "15.500"],
        ["reward", "8.0", "-", "11.000", "13.000"],
        ["update", "84.0", "80.2", "11.000", "12.500"],
        ["evaluation", "2.0", "-", "11.000", "-"],
    ]
