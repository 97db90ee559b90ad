"""The forecast: counts on tensors without numbers are held to real tensors and to formulas."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit

import train
from samr1_mini import grpo
from samr1_mini.config import make_settings
from samr1_mini import forecast as forecast_module
from samr1_mini.forecast import (
    CARDS,
    GIB,
    Counter,
    beside,
    build,
    count,
    counts,
    forecast,
    forecast_line,
    forecast_lines,
    known_card,
    shape_config,
    usable,
)
from samr1_mini.rehearse import random_policy
from samr1_mini.policy import load_policy
from samr1_mini.runs import time_left
from samr1_mini.segmenter import load_segmenter


def short(**given):
    """Settings of steps that a test can afford to run for real."""
    tiny = dict(
        preset="tiny",
        device="cpu",
        image_size=112,
        questions=2,
        group=4,
        updates=2,
        max_new_tokens=16,
    )
    return make_settings(**tiny | given)[0]


@pytest.fixture(scope="module")
def small():
    """Counts of the small shape in bf16 without numbers, with its config."""
    config = shape_config("small")
    return config, count(*build(config, short()), short())


def real_count(policy, segmenter, s):
    """The same phases on real tensors, counted by the same counter."""
    counter = Counter()
    tensors = [*policy.model.parameters(), *policy.model.buffers(), policy.banned]
    for p in policy.base.parameters():
        if isinstance(p, Params4bit):
            state = p.quant_state
            tensors += [
                state.absmax,
                state.code,
                state.offset,
                state.state2.absmax,
                state.state2.code,
            ]
    for tensor in tensors:
        counter.hold(tensor)
    weights = counter.live
    for tensor in (*segmenter.predictor.model.parameters(), *segmenter.predictor.model.buffers()):
        counter.hold(tensor)
    loaded = {"weights": weights, "sam": counter.live - weights, "load": counter.live}
    return count(counter, policy, segmenter, loaded, s)


@pytest.mark.parametrize("shape", ["tiny", "small"])
def test_memory_without_numbers_is_that_of_real_tensors_in_real_nf4(shape):
    s = short()
    tiny = shape == "tiny"
    made = lambda: random_policy(shape_config(shape), "nf4", s.rank, "cpu", False)
    policy = load_policy("tiny", "nf4", s.rank) if tiny else made()
    assert any(isinstance(m, Linear4bit) for m in policy.base.modules())
    policy.banned[policy.processor.tokenizer.eos_token_id] = (
        True  # answers of full length, as in the forecast
    )
    real = real_count(policy, load_segmenter("tiny"), s)
    fake = count(*build(policy.base.config, s, torch.float32), s)
    for part in ("weights", "optimizer", "sam"):
        assert fake[part] == pytest.approx(real[part], rel=0.01), part
    stays = real["weights"] + real["optimizer"] + real["sam"]
    for phase in ("encode", "prefill", "last", "reward", "update"):
        assert stays + fake[phase]["over"] == pytest.approx(
            stays + real[phase]["over"], rel=0.1
        ), phase
        assert fake[phase]["flops"] == real[phase]["flops"], phase


def test_operations_are_those_of_a_formula(small):
    """Two for each weight and token, attention's products of queries, keys and values; the head at answer tokens."""
    config, found = small
    s, t = short(), config.text_config
    width, kv = t.hidden_size, t.num_key_value_heads * t.hidden_size // t.num_attention_heads
    shapes = [
        (width, width),
        (width, kv),
        (width, kv),
        (width, width),
        *[(width, t.intermediate_size)] * 3,
    ]
    weights = t.num_hidden_layers * sum(a * b for a, b in shapes)
    adapter = t.num_hidden_layers * sum(s.rank * (a + b) for a, b in shapes)
    head, prompt, answers = width * t.vocab_size, found["prompt_tokens"], s.group * s.max_new_tokens

    rows = s.questions * s.group
    keys = prompt + s.max_new_tokens
    decode = 2 * rows * (weights + adapter + head) + 4 * rows * keys * width * t.num_hidden_layers
    assert found["last"]["flops"] == pytest.approx(decode, rel=0.1)

    tokens = prompt + answers - s.group
    pairs = prompt**2 / 2 + answers * (prompt + s.max_new_tokens / 2)
    forward = 2 * tokens * weights + 4 * pairs * width * t.num_hidden_layers
    # the reference, the forward, the gradient of what came in: the base's own weights get none, the adapter's do
    update = (
        3 * 2 * tokens * weights
        + 3 * 2 * tokens * adapter
        + (2 + 2.5) * (forward - 2 * tokens * weights)
    )
    update += (
        4 * 2 * answers * head
    )  # reference, forward, forward again, backward: the head is always computed twice
    assert found["update"]["flops"] == pytest.approx(update, rel=0.1)


def test_memory_of_a_whole_model_is_that_of_two_and_three_layers_multiplied(monkeypatch):
    many = forecast_module.SHAPES["small"] | {
        "num_hidden_layers": 14
    }  # what is wrong by a layer is wrong by twelve
    monkeypatch.setitem(forecast_module.SHAPES, "small", many)
    config, s = shape_config("small"), short()
    found, quick = count(*build(config, s), s), counts(config, s, (), whole=False)
    for part in ("weights", "optimizer", "sam"):
        assert quick[part] == pytest.approx(found[part], rel=1e-4)
    for phase in ("encode", "prefill", "last", "reward", "update"):
        assert quick[phase]["over"] == pytest.approx(found[phase]["over"], rel=0.02), phase
        assert quick[phase]["flops"] == pytest.approx(found[phase]["flops"], rel=0.001), phase


def test_the_7b_weighs_what_its_published_parameters_weigh_in_nf4():
    """4 bits a weight of the projections, (8 + 32/256)/64 of statistics, 16 bits for all else, 32 for the adapter."""
    config = shape_config("7b")
    four = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    adapter = 28 * 32 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    expected = four * (0.5 + (1 + 4 / 256) / 64) + 2 * (8_292_166_656 - four) + 4 * adapter
    assert build(config, short(preset="7b", sam="tiny"))[3]["weights"] == pytest.approx(
        expected, rel=0.002
    )


def test_longer_answers_take_more_memory_and_time_and_each_line_says_that_it_is_a_forecast(
    monkeypatch,
):
    monkeypatch.setattr(forecast_module, "GRID", ((4, 128), (8, 64), (8, 256)))
    s = short()
    table = forecast(shape_config("small"), s)
    sizes = table["update_peak_gib_by_size"]
    assert sizes["4 x 128"] < sizes["8 x 256"] and sizes["4 x 128"] == pytest.approx(
        sizes["8 x 64"], rel=0.1
    )
    assert set(table["hours"]) == set(CARDS) and all(
        0 < h["128"] < h["512"] for h in table["hours"].values()
    )
    assert table["hours"]["L4"]["512"] >= table["hours"]["H100"]["512"]
    stays = table["weights_gib"] + table["optimizer_gib"] + table["sam_gib"]
    assert all(
        table[f"{phase}_peak_gib"] > stays
        for phase in ("encode", "prefill", "decode", "reward", "update")
    )
    lines = forecast_lines(json.loads(json.dumps(table)), s)
    assert all(line.startswith("forecast: ") and "\n" not in line for line in lines)
    text = "\n".join(lines)
    assert (
        f"{table['hours']['L4']['512']:.1f}" in text
        and f"8 x 256 tokens: {sizes['8 x 256']:.1f} GiB" in text
    )


def test_a_card_holds_what_is_less_than_its_usable_memory():
    s = short(preset="7b")
    phases = ("load", "encode", "prefill", "decode", "reward", "update")
    table = {f"{p}_peak_gib": 9.0 for p in phases} | dict(
        weights_gib=6.7, optimizer_gib=0.9, sam_gib=2.4
    )
    table |= dict(prompt_tokens=1100, hours={})
    sizes = {"a": usable(12) - 0.01, "b": usable(12) + 0.01, "c": 30.0}
    table |= dict(decode_bytes_per_token=1, update_flops=1, update_peak_gib_by_size=sizes)
    lines = forecast_lines(table, s)
    assert [
        next(x for x in lines if f"  {size} tokens" in x).split("GiB, ")[1] for size in "abc"
    ] == ["24 GB, 16 GB, 12 GB", "24 GB, 16 GB", "none of 24, 16 and 12 GB"]


@pytest.mark.parametrize(
    "name, card",
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A10", None),
    ],
)
def test_a_card_is_known_by_its_name(name, card):
    assert known_card(name) == card


def test_training_starts_with_a_line_about_its_card_and_keeps_its_random_numbers(monkeypatch):
    found, config = [], shape_config("small")
    monkeypatch.setattr(forecast_module, "shape_config", lambda preset: config)
    s = short(preset="7b", sam="tiny")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    real = forecast_module.counts
    monkeypatch.setattr(
        forecast_module, "counts", lambda *a, **k: found.append(real(*a, **k)) or found[0]
    )
    line = r"forecast: peak 0.\d GiB, no hours: a machine without a GPU is none of RTX 3090, .*"
    assert re.fullmatch(line, forecast_line(s))
    assert torch.equal(before, torch.get_rng_state())

    monkeypatch.setattr(forecast_module, "counts", lambda *a, **k: found[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=23.6 * GIB)
    )
    line = (
        r"forecast: peak 0.\d GiB of this card's 23.6, about \d.\d hours at answers of 128 tokens"
    )
    assert re.fullmatch(line, forecast_line(s))
    assert "of this card's 20.0, about" in forecast_line(replace(s, memory_limit=20.0))


def test_of_another_policy_there_is_no_forecast_and_the_time_left_comes_from_measured_steps():
    for unknown in (short(), short(preset="7b", policy="Qwen/Qwen3-VL-4B-Instruct")):
        assert (
            forecast_line(unknown)
            == "no forecast: it knows the policies of --preset 3b and 7b alone"
        )
    assert (
        time_left([50.0, 10.0, 14.0], 303)
        == "measured: 12.0 s a step, 1.0 hours left, without evaluation"
    )


@pytest.mark.parametrize("processes, lines", [(None, 1), ("1", 1), ("2", 0)])
def test_a_process_among_several_makes_no_forecast(processes, lines, monkeypatch, capsys):
    """It would run the training's code alone, and wait there for the others, which wait elsewhere."""
    s, ran = replace(short(preset="7b"), device="cuda"), []
    monkeypatch.setattr(train, "parse_settings", lambda *_: (s, "a line"))
    monkeypatch.setattr(grpo, "train", ran.append)
    monkeypatch.setattr(forecast_module, "forecast_line", lambda s: "forecast: peak")
    if processes:
        monkeypatch.setenv("WORLD_SIZE", processes), monkeypatch.setenv("RANK", "0")
    train.main([])
    assert ran == [s] and capsys.readouterr().out.count("forecast: peak") == lines


def test_measured_figures_stand_beside_the_forecast_of_their_phase():
    phases = {
        "load": 9.0,
        "encode": 10.0,
        "prefill": 15.5,
        "decode": 14.0,
        "reward": 13.0,
        "update": 12.5,
    }
    expected = {f"{phase}_peak_gib": gib for phase, gib in phases.items()}
    measured = dict(rollout=30.0, reward=8.0, update=84.0, evaluation=2.0)
    lines = beside(
        measured, dict.fromkeys(measured, 11.0), expected, {"rollout": 31.5, "update": 80.25}
    )
    assert [line.split() for line in lines[1:]] == [
        ["rollout", "30.0", "31.5", "11.000", "15.500"],
        ["reward", "8.0", "-", "11.000", "13.000"],
        ["update", "84.0", "80.2", "11.000", "12.500"],
        ["evaluation", "2.0", "-", "11.000", "-"],
    ]
    assert lines[0].split() == ["phase", "seconds", "forecast", "peak", "GiB", "forecast"]


def test_what_a_gpu_measured_is_near_its_forecast():
    results = Path(__file__).parent.parent / "tutorials/results"
    read = lambda name: json.loads((results / f"{name}.json").read_text())
    forecast, measured = read("forecast-7b")["forecast"], read("rehearsal-7b")["measured"]
    bf16 = read("rehearsal-3b-bf16")
    for expected, found in ((forecast, measured), (bf16["forecast"], bf16["measured"])):
        for phase, of in dict(
            load="load", rollout="prefill", reward="reward", update="update"
        ).items():
            assert found["peak_gib"][phase] == pytest.approx(expected[f"{of}_peak_gib"], rel=0.1)
    for size, peak in measured["update_peak_gib"].items():
        assert peak is None or peak == pytest.approx(
            forecast["update_peak_gib_by_size"][size], rel=0.05
        )
    for phase, seconds in forecast["seconds_per_step"]["H100"]["512"].items():
        assert 1 / 1.5 < measured["seconds"][phase] / seconds < 1.5


def test_a_write_without_numbers_leaves_real_whole_numbers_alone_and_frees_what_is_gone():
    counter = Counter(forecast_module.FakeTensorMode(allow_non_fake_inputs=True))
    with counter:
        whole, real = torch.empty(1024, 256), torch.arange(6)
        assert counter.live == 4 * 1024 * 256 + 48 and whole.sum().item() == 1.0
        real[2:4] = whole[0, :2].long()
        assert real.tolist() == [0, 1, 2, 3, 4, 5] and whole[torch.arange(1024) < 7].shape == (
            7,
            256,
        )
        del whole
    assert counter.live < 4 * 1024 and counter.peak > 4 * 1024 * 256
