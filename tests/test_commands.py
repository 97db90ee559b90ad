"""The commands as a user types them: help, mistakes, a folder of one's own data, a single picture."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

import eval as evaluate
import train
from samr1_mini.config import (
    PRESETS,
    Settings,
    UserError,
    check,
    make_settings,
    option,
    parse_settings,
    resumed_settings,
)
from samr1_mini.data import load_data, open_data, open_picture
from samr1_mini.memory import compute_dtype
from samr1_mini.tiny.scenes import KINDS, make_scene

ROOT = Path(__file__).parent.parent
TERMS = ("accuracy", "reasoning-format", "segmentation-format")
ONLY_CPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def run(*command, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=ONLY_CPU | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "command",
    [
        ["train.py"],
        ["eval.py"],
        ["-m", "tutorials.tiny_world.pretrain"],
        ["tests/benchmarks/benchmark.py"],
        ["tests/benchmarks/benchmark_step.py"],
    ],
)
def test_help_of_every_command(command):
    out = run(*command, "--help")
    assert out.returncode == 0 and "usage" in out.stdout
    if command == ["train.py"]:
        shown = " ".join(out.stdout.split())
        for f in fields(Settings):
            assert (
                f"--{f.name.replace('_', '-')}" in shown
                and f.metadata["help"].split(",")[0][:20] in shown
            )
        headings = [
            line[:-1]
            for line in out.stdout.splitlines()
            if line.endswith(":") and not line.startswith(" ")
        ]
        assert headings == [
            "options",
            "run",
            "model",
            "data",
            "rollout",
            "reward",
            "optimisation",
            "evaluation",
        ]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--sample", "30"], "--samples"),
        (["--samples", "many"], "--samples"),
        (["--samples", "0"], "--samples"),
        (["--samples", "5"], "--questions"),
        (["--group", "1"], "--group"),
        (["--seed", "99999999999999"], "--seed"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--beta", "inf"], "--beta"),
        (["--eps-low", "1"], "--eps-low"),
        (["--accuracy", "dice"], "--accuracy"),
        (["--image-size", "20"], "--image-size"),
        (["--updates", "20"], "--updates 20"),
        (["--preset", "70b"], "--preset"),
        (["--sam", "vit_h", "--sam-checkpoint", "no.pth"], "--sam-checkpoint no.pth"),
        (
            [f"--{name}-weight=0" for name in TERMS],
            "--accuracy-weight",
        ),
        (["--resume"], "--run"),
        (["--resume", "--run", "no/such/run"], "no/such/run"),
        (["5"], "option 5"),
    ],
)
def test_a_mistake_gets_one_line_that_names_the_option(argv, words, capsys):
    with pytest.raises(SystemExit) as left:
        parse_settings(argv, "train.py", "")
    error = capsys.readouterr().err
    assert left.value.code == 2 and words in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "command, words",
    [
        (["train.py", "--policy", "no-such/policy"], "--policy no-such/policy"),
        (["train.py", "--preset", "3b", "--device", "cpu"], "--policy Qwen/Qwen2.5-VL-3B-Instruct"),
        (["train.py", "--sam", "no-such/sam"], "--sam no-such/sam"),
        (["eval.py", "--wrong", "1"], "--wrong"),
    ],
)
def test_a_users_mistake_ends_in_one_line_and_no_traceback(command, words, tmp_path):
    """Each in a program of its own, without the hub."""
    out = run(str(ROOT / command[0]), *command[1:], cwd=tmp_path)
    assert out.returncode == 2 and words in out.stderr and "Traceback" not in out.stderr
    errors = [line for line in out.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert not list(tmp_path.glob("runs/*/metrics.jsonl"))


@pytest.mark.parametrize(
    "main, argv, words",
    [
        (train.main, ["--data", "no-such-folder"], "--data no-such-folder"),
        (train.main, ["--image-size", "100"], "--image-size"),
        (
            train.main,
            ["--sam-checkpoint", str(ROOT / "README.md")],
            "--sam vit_b",
        ),
        (evaluate.main, ["--adapter", "no-such-folder"], "--adapter no-such-folder"),
        (evaluate.main, ["--image", "no.jpg"], "--question"),
        (evaluate.main, ["--image", "no.jpg", "--question", "the red star"], "--image no.jpg"),
    ],
)
def test_a_users_mistake_ends_in_one_line_and_nothing_is_begun(
    main, argv, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["--preset", "tiny", "--device", "cpu", *argv])
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert left.value.code == 2 and len(errors) == 1 and words in errors[0]
    assert not list(tmp_path.glob("runs/*/metrics.jsonl"))


# What these cards report as their whole memory, in GiB, and their compute capability.
CARDS = [
    ("NVIDIA A10G", 21.99, (8, 6), "7b"),
    ("NVIDIA L4", 22.03, (8, 9), "7b"),
    ("NVIDIA A10", 22.06, (8, 6), "7b"),
    ("NVIDIA GeForce RTX 3090", 23.69, (8, 6), "7b"),
    ("NVIDIA GeForce RTX 4090", 23.64, (8, 9), "7b"),
    ("NVIDIA RTX A5000", 23.68, (8, 6), "7b"),
    ("NVIDIA GeForce RTX 5090", 31.36, (12, 0), "7b"),
    ("NVIDIA A100-SXM4-40GB", 39.39, (8, 0), "7b"),
    ("NVIDIA H100 80GB HBM3", 79.11, (9, 0), "7b"),
    ("NVIDIA RTX A4000", 15.73, (8, 6), "3b"),
    ("NVIDIA GeForce RTX 4080", 15.70, (8, 9), "3b"),
    ("NVIDIA GeForce RTX 3060", 11.66, (8, 6), "3b"),
    ("NVIDIA GeForce RTX 3080", 9.77, (8, 6), "tiny"),
    ("Tesla T4", 14.56, (7, 5), "tiny"),
]


def put_in(monkeypatch, name, memory, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda *_: SimpleNamespace(total_memory=int(memory * 2**30)),
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (int(memory * 2**30),) * 2)


@pytest.mark.parametrize("name, memory, capability, preset", CARDS)
def test_the_machine_chooses_the_preset_and_says_why(name, memory, capability, preset, monkeypatch):
    put_in(monkeypatch, name, memory, capability)
    settings, line = make_settings(lr=1e-3)
    assert (
        settings.preset == preset
        and f"preset {preset}" in line
        and name in line
        and "lr = 0.001" in line
    )
    assert ("--preset 3b" in line) == (capability < (8, 0))


def test_with_a_gpu_that_is_not_to_be_used_the_tiny_preset_is_chosen(monkeypatch):
    put_in(monkeypatch, *CARDS[0][:3])
    assert make_settings()[0].preset == "7b"
    settings, line = make_settings(device="cpu")
    assert settings.preset == "tiny" and settings.device == "cpu" and "CPU" in line


def test_without_a_gpu_the_tiny_preset_is_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings, line = make_settings()
    assert settings.preset == "tiny" and settings.device == "cpu" and "no GPU" in line


def test_a_gpu_that_emulates_bf16_trains_3b_only_if_told_and_then_not_in_bf16(monkeypatch):
    put_in(monkeypatch, "Tesla T4", 14.56, (7, 5))
    settings, line = make_settings(preset="3b")
    check(settings)
    assert "fp32" in line and compute_dtype(settings.load_in, settings.device) == torch.float32
    with pytest.raises(UserError, match="--load-in bf16: .*--load-in nf4"):
        check(make_settings(preset="3b", load_in="bf16")[0])


def test_every_preset_is_valid():
    for preset in PRESETS:
        check(make_settings(preset=preset, device="cpu")[0])


@pytest.mark.parametrize("name", sorted({f.name for f in fields(Settings)} - {"run", "resume"}))
def test_a_run_that_goes_on_is_the_run_that_began_but_for_its_length_and_its_memory(name, tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(asdict(Settings(preset="tiny", seed=3))))
    value = {bool: True, int: 9, float: 0.75, str: "other"}[
        Settings.__dataclass_fields__[name].type
    ]
    given = {"run": str(tmp_path), "resume": True, name: False if name == "points" else value}
    if name in (
        "samples",
        "micro",
        "checkpointing",
        "memory_limit",
        "max_new_tokens",
        "save_minutes",
        "data",
        "eval_data",
        "coco_dir",
        "policy",
        "sam",
        "sam_checkpoint",
    ):
        assert getattr(resumed_settings(given)[0], name) == value
    elif name == "preset":  # what it says of sizes is in the run's own settings
        assert resumed_settings(given)[0].preset == "tiny"
    else:
        with pytest.raises(UserError, match=option(name)):
            resumed_settings(given)


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_the_large_presets_are_qwens_of_their_size_on_the_largest_sam_as_the_readme_measured_them(
    size,
):
    s, _ = make_settings(preset=size, device="cpu")
    assert (s.policy, s.sam, s.data) == (
        f"Qwen/Qwen2.5-VL-{size.upper()}-Instruct",
        "vit_h",
        "refcocog",
    )
    assert (s.image_size, s.max_new_tokens, s.lr, s.micro, s.checkpointing) == (
        840,
        512,
        2e-5,
        1,
        True,
    )


# ------------------------------------------------------------------------------------------------- a folder of your own


def write_folder(folder, count=20):
    """A data.jsonl of drawn scenes, masks in turn as a 0/1 PNG, a 0/255 PNG, compressed RLE, uncompressed RLE and
    polygons."""
    (folder / "pictures").mkdir(parents=True)
    lines, truths = [], []
    for i in range(count):
        scene = make_scene(i)
        thing = scene.things[0]
        Image.fromarray(scene.image).save(folder / f"pictures/{i}.png")
        rle = coco.encode(np.asfortranarray(thing.mask.astype(np.uint8)))
        truth = thing.mask
        if i % 5 < 2:
            Image.fromarray(thing.mask.astype(np.uint8) * (1, 255)[i % 5]).save(
                folder / f"pictures/{i}-mask.png"
            )
            mask = f"pictures/{i}-mask.png"
        elif i % 5 == 2:
            mask = {"size": rle["size"], "counts": rle["counts"].decode()}
        elif i % 5 == 3:
            flat = thing.mask.flatten(order="F").astype(int)
            edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
            mask = {
                "size": list(thing.mask.shape),
                "counts": np.diff(np.concatenate([[0], edges, [len(flat)]])).tolist(),
            }
        else:
            mask, truth = [[10, 10, 40, 10, 40, 30, 10, 30]], np.zeros((112, 112), bool)
            truth[10:30, 10:40] = True
        truths.append(truth)
        lines.append(
            {
                "id": str(i),
                "image": f"pictures/{i}.png",
                "question": f"the {thing.name}",
                "mask": mask,
            }
        )
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return truths


def test_a_known_picture_gives_the_known_mask_in_every_layout(tmp_path):
    truths = write_folder(tmp_path)
    seen = {}
    for split in ("train", "validation", "test"):
        for sample in load_data(str(tmp_path), split, 100 if split != "train" else 16):
            assert (sample.mask == truths[int(sample.id)]).all(), sample.id
            assert (
                np.asarray(sample.image) == make_scene(int(sample.id)).image
            ).all()  # RGB, not BGR
            seen.setdefault(split, set()).add(sample.id)
    assert (
        len(set.union(*seen.values())) == 20 == sum(map(len, seen.values()))
    )  # splits are disjoint and complete


def test_more_samples_than_lines_go_round_again_in_a_new_order(tmp_path):
    write_folder(tmp_path)
    ids = [s.id for s in load_data(str(tmp_path), "train", 32, seed=1)]
    assert len(ids) == 32 and set(ids[:16]) == set(ids[16:]) and ids[:16] != ids[16:]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"image": "pictures/none.png"}, "none.png"),
        ({"image": "../secret.png"}, "secret.png"),
        ({"image": "/etc/hostname"}, "hostname"),
        ({"mask": "pictures/1.txt"}, "1.txt"),
        ({"mask": 7}, "PNG"),
        ({"mask": [[1, 2, 3]]}, "polygon"),
        ({"mask": {"size": [8, 8], "counts": [0, 64]}}, "8 x 8"),
        ({"mask": "pictures/small.png"}, "8 x 8"),
        ({"question": ""}, "question"),
        ({"image": "pictures/cut.png"}, ""),
    ],
)
def test_a_broken_line_stops_with_its_file_and_number_named(tmp_path, change, words):
    write_folder(tmp_path, 5)
    Image.new("L", (8, 8), 1).save(tmp_path / "pictures/small.png")
    whole = (tmp_path / "pictures/2.png").read_bytes()
    (tmp_path / "pictures/cut.png").write_bytes(whole[: len(whole) // 2])
    lines = [
        json.loads(line) | {"split": "test"}
        for line in (tmp_path / "data.jsonl").read_text().splitlines()
    ]
    lines[2] |= change
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError) as error:
        list(load_data(str(tmp_path), "test", 10))
    assert "data.jsonl line 3" in str(error.value) and words in str(error.value)


def test_a_line_that_is_not_json_is_named(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"image": "a.png"\n')
    with pytest.raises(UserError, match="line 1"):
        load_data(str(tmp_path), "train", 1)


@pytest.mark.parametrize(
    "change", [{"image": "pictures/typo.png"}, {"mask": "pictures/typo.png"}, {"mask": ""}]
)
def test_a_mistake_in_any_line_is_told_when_the_data_are_opened(tmp_path, change):
    """Also in a line that another split, or a longer run, would read: nothing else is loaded for it."""
    write_folder(tmp_path, 20)
    lines = (tmp_path / "data.jsonl").read_text().splitlines() * 21
    lines[399] = json.dumps(json.loads(lines[399]) | change | {"split": "test"})
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"data\.jsonl line 400: (pictures/typo\.png|mask)"):
        open_data(str(tmp_path), "train", 2)


def test_a_test_split_of_ones_own_is_drawn_and_not_its_first_lines(tmp_path):
    write_folder(tmp_path, 40)
    lines = [
        json.loads(line) | {"split": "test"}
        for line in (tmp_path / "data.jsonl").read_text().splitlines()
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    some, every = load_data(str(tmp_path), "test", 10), [str(i) for i in range(40)]
    assert some.ids == load_data(str(tmp_path), "test", 10, seed=7).ids
    assert len(set(some.ids)) == 10 and max(map(int, some.ids)) > 19
    assert (
        load_data(str(tmp_path), "test", 40).ids
        == load_data(str(tmp_path), "test", 99).ids
        == every
    )
    assert [s.picture for s in some] == [f"pictures/{name}.png" for name in some.ids]
    assert (some.box_only, some.download_bytes) == (False, 0)


def test_a_photo_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert open_picture(tmp_path / "a.jpg").size == (20, 40)
    Image.fromarray(np.zeros((20, 40), np.uint16)).save(tmp_path / "a.png", exif=exif)
    assert open_picture(tmp_path / "a.png").size == (20, 40)


def test_a_picture_a_hundred_times_longer_than_wide_is_refused(tmp_path):
    Image.new("RGB", (1010, 10)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="1010 x 10"):
        open_picture(tmp_path / "a.png")


@pytest.mark.parametrize(
    "name, mode", [("a.png", "I;16"), ("a.tif", "I;16"), ("a.tif", "I;16B"), ("a.tif", "I")]
)
def test_sixteen_bits_of_grey_keep_their_brightness(tmp_path, name, mode):
    grey = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16  # 0 to 65,520
    kind = {"I;16": "<u2", "I;16B": ">u2", "I": np.int32}[mode]
    Image.frombytes(mode, (64, 64), grey.astype(kind).tobytes()).save(tmp_path / name)
    with Image.open(tmp_path / name) as file:
        assert file.mode == mode
    seen = np.asarray(open_picture(tmp_path / name)).astype(int)
    assert seen.shape == (64, 64, 3) and np.abs(seen - (grey / 65535 * 255)[..., None]).max() <= 1


def huge_png(width, height):
    """A PNG of a few bytes whose header states this size."""
    chunk = (
        lambda name, data: struct.pack(">I", len(data))
        + name
        + data
        + struct.pack(">I", zlib.crc32(name + data))
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_a_picture_too_large_to_read_is_said_with_its_size_as_a_picture_and_as_a_mask(tmp_path):
    (tmp_path / "huge.png").write_bytes(huge_png(20000, 18000))
    with pytest.raises(ValueError, match="360000000 pixels"):
        open_picture(tmp_path / "huge.png")
    write_folder(tmp_path, 5)
    lines = [
        json.loads(line) | {"split": "test"}
        for line in (tmp_path / "data.jsonl").read_text().splitlines()
    ]
    lines[2]["mask"] = "huge.png"
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=r"data\.jsonl line 3: .*360000000 pixels"):
        list(load_data(str(tmp_path), "test", 10))


@pytest.mark.parametrize(
    "format", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "ICO", "TGA"]
)
def test_whatever_is_broken_in_a_picture_its_error_is_one_that_is_caught(format):
    whole, rng, refused = io.BytesIO(), np.random.default_rng(0), 0
    Image.fromarray(make_scene(1).image).resize((32, 32)).save(whole, format)
    whole = np.frombuffer(whole.getvalue(), np.uint8)
    for turn in range(300):
        data = whole[: rng.integers(1, len(whole))] if turn % 3 == 0 else whole.copy()
        if turn % 3:
            data[rng.integers(0, min(len(data), 400 if turn % 2 else len(data)), 4)] = rng.integers(
                0, 256, 4
            )
        try:
            open_picture(io.BytesIO(data.tobytes()))
        except (OSError, ValueError):
            refused += 1
    assert refused > 20


def test_train_and_eval_on_a_folder_of_ones_own_then_on_one_picture(tmp_path):
    write_folder(tmp_path / "mine", 24)
    out = run(
        "train.py",
        "--data",
        str(tmp_path / "mine"),
        "--samples",
        "8",
        "--questions",
        "4",
        "--group",
        "4",
        "--updates",
        "2",
        "--eval-every",
        "1",
        "--run",
        str(tmp_path / "run"),
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert "gIoU" in out.stdout and (tmp_path / "run/adapter/adapter_model.safetensors").exists()
    adapter = str(tmp_path / "run/adapter")
    out = run("eval.py", "--adapter", adapter, "--out", str(tmp_path / "eval"))
    assert out.returncode == 0, out.stderr[-2000:]
    results = json.loads((tmp_path / "eval/results.json").read_text())
    assert (
        results["summary"]["count"]
        == len(load_data(str(tmp_path / "mine"), "test", 99))
        == len(results["answers"])
    )
    assert (tmp_path / "eval/sheet.png").exists() and results["data"] == str(tmp_path / "mine")
    assert "95 %" in out.stdout
    evaluate.main(
        [
            "--adapter",
            adapter,
            "--image",
            str(tmp_path / "mine/pictures/3.png"),
            "--question",
            "the leftmost object",
            "--out",
            str(tmp_path / "eval"),
        ]
    )
    assert (tmp_path / "eval/3-overlay.png").read_bytes().startswith(b"\x89PNG")
    out = run("train.py", "--resume", "--run", str(tmp_path / "run"), "--samples", "4")
    assert out.returncode == 2
    assert "--samples 4:" in out.stderr and "--samples 8" in out.stderr
    kept = [
        json.loads((tmp_path / f"run/{name}.json").read_text()) for name in ("samples", "settings")
    ]
    assert (
        len(kept[0]) == kept[1]["samples"] == 8 and "Traceback" not in out.stderr
    )  # a plain --resume still works
    file = tmp_path / "mine/data.jsonl"
    file.write_text(
        "\n".join(file.read_text().splitlines()[::-1])
    )  # other questions would be drawn
    out = run("train.py", "--resume", "--run", str(tmp_path / "run"), "--samples", "12")
    assert (
        out.returncode == 2
        and str(tmp_path / "mine") in out.stderr
        and "Traceback" not in out.stderr
    )


def test_a_set_that_has_only_a_train_split_is_evaluated_on_another(tmp_path):
    write_folder(tmp_path / "mine", 8)
    lines = [
        json.loads(line) | {"split": "train"}
        for line in (tmp_path / "mine/data.jsonl").read_text().splitlines()
    ]
    (tmp_path / "mine/data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train.main(
        [
            "--preset",
            "tiny",
            "--device",
            "cpu",
            "--data",
            str(tmp_path / "mine"),
            "--eval-data",
            "shapes",
            "--samples",
            "8",
            "--questions",
            "4",
            "--group",
            "4",
            "--updates",
            "2",
            "--eval-every",
            "0",
            "--test-samples",
            "3",
            "--run",
            str(tmp_path / "run"),
        ]
    )
    assert set(json.loads((tmp_path / "run/summary.json").read_text())["trained"]["by_kind"]) == {
        x.kind for x in load_data("shapes", "test", 3)
    }
    assert set(json.loads((tmp_path / "run/samples.json").read_text())) == set("01234567")
    for split, count, data in (
        ("test", 3, "shapes"),
        ("train", 8, str(tmp_path / "mine")),
    ):  # as the run did
        evaluate.main(
            [
                "--adapter",
                str(tmp_path / "run/adapter"),
                "--split",
                split,
                "--count",
                str(4 * count // 3),
                "--out",
                str(tmp_path / "eval"),
            ]
        )
        results = json.loads((tmp_path / "eval/results.json").read_text())
        assert results["data"] == data and len({one["id"] for one in results["answers"]}) == len(
            results["answers"]
        )


def test_eval_of_the_base_by_kind_of_question(tmp_path, capsys):
    evaluate.main(["--preset", "tiny", "--device", "cpu", "--count", "30", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in KINDS)
    summary = json.loads((tmp_path / "results.json").read_text())["summary"]
    low, high = summary["gIoU_interval"]
    assert low <= summary["gIoU"] <= high and set(summary["by_kind"]) == set(KINDS)
