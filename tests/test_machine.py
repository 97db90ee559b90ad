"""The wrong machine: GPUs that PyTorch cannot use, too little memory, old drivers, Windows, and how SAM is loaded.

No machine here has a GPU: the functions of torch.cuda answer as they would on it.
"""

import ast
import io
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file
from segment_anything import sam_model_registry

import eval as evaluate_command
import train as train_command
from samr1_mini import evaluation, grpo
from samr1_mini import segmenter as segmenter_module
from samr1_mini.config import (
    MEMORY,
    PRESETS,
    UserError,
    check,
    first_line,
    make_settings,
    parse_settings,
    print_anything,
)
from samr1_mini.data import load_data
from samr1_mini.evaluation import batch_size, evaluate
from samr1_mini import forecast as forecast_module
from samr1_mini.forecast import GAPS, GIB, peaks, policy_sizes
from samr1_mini.full_size import shape_config
from samr1_mini import files, gpu, loading, memory
from samr1_mini.segmenter import load_segmenter, random_sam
from samr1_mini.tiny.scenes import make_scene

ROOT = Path(__file__).parent.parent
BUILT_FOR = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # torch 2.14.1 for CUDA 13.0
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Sun May 12 19:39:15 UTC 2024\n"
OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs@host)  "
    "Wed Feb 12\nGCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1)\n"
)


@pytest.fixture
def put_in(monkeypatch, tmp_path):
    """A function that makes this machine another one: its GPU, driver, system and build of PyTorch."""

    def put(
        name=None, whole=0.0, free=None, capability=(0, 0), driver=None, wsl=False, cuda="13.0"
    ):
        bytes_of = (int((whole if free is None else free) * GIB), int(whole * GIB))
        fractions = []
        for function, answer in dict(
            is_available=name is not None and cuda is not None,
            get_device_name=name,
            get_device_properties=SimpleNamespace(total_memory=bytes_of[1]),
            get_device_capability=capability,
            mem_get_info=bytes_of,
            get_arch_list=BUILT_FOR,
            device_count=1,
        ).items():
            monkeypatch.setattr(torch.cuda, function, lambda *_, answer=answer: answer)
        monkeypatch.setattr(
            torch.cuda, "set_per_process_memory_fraction", lambda share, *_: fractions.append(share)
        )
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(gpu, "DRIVER_FILE", tmp_path / "driver")
        if driver:
            (tmp_path / "driver").write_text(driver)
        monkeypatch.setattr(gpu, "WSL_DEVICE", tmp_path / "dxg")
        monkeypatch.setattr(gpu, "WSL_TOOL", tmp_path / "nvidia-smi")
        monkeypatch.setattr(gpu.shutil, "which", lambda tool: None)
        if wsl:
            (tmp_path / "dxg").touch()
        return fractions

    return put


@pytest.fixture
def trained(monkeypatch):
    """The settings with which training would begin, if it does."""
    begun = []
    monkeypatch.setattr(grpo, "train", begun.append)
    return begun


def run_train(argv: list[str]) -> int:
    """The exit code of train.py."""
    try:
        train_command.main(argv)
    except SystemExit as left:
        return left.code
    return 0


P100 = dict(
    name="Tesla P100-PCIE-16GB", whole=15.9, capability=(6, 0), driver=CLOSED.format("580.95.05")
)
V100 = dict(
    name="Tesla V100-SXM2-32GB", whole=31.7, capability=(7, 0), driver=CLOSED.format("580.95.05")
)
GTX_1080 = dict(name="NVIDIA GeForce GTX 1080 Ti", whole=10.9, capability=(6, 1))
T4 = dict(name="Tesla T4", whole=14.6, capability=(7, 5))
RTX_3090 = dict(name="NVIDIA GeForce RTX 3090", whole=23.7, capability=(8, 6))
RTX_3060 = dict(name="NVIDIA GeForce RTX 3060", whole=12.0, free=10.8, capability=(8, 6), wsl=True)
NEW_CARD = dict(name="a GPU of tomorrow", whole=30.0, capability=(13, 0))
OLD_DRIVER = dict(driver=CLOSED.format("535.183.01"))


@pytest.mark.parametrize(
    "machine, argv, preset, device, words",
    [
        (P100, [], "tiny", "cpu", ["P100", "6.0", "sm_75"]),
        (V100, [], "tiny", "cpu", ["V100", "7.0"]),
        (GTX_1080, [], "tiny", "cpu", ["1080 Ti", "6.1"]),
        (NEW_CARD, [], "tiny", "cpu", ["13.0"]),
        (GTX_1080, ["--preset", "tiny"], "tiny", "cpu", ["1080 Ti", "6.1"]),
        (V100, ["--preset", "7b", "--device", "cpu"], "7b", "cpu", []),
        (T4, [], "tiny", "cuda", ["T4", "emulates bf16"]),
        (RTX_3090, [], "7b", "cuda", ["RTX 3090"]),
        (RTX_3090 | {"free": 22.5}, [], "7b", "cuda", []),
        (RTX_3090 | {"free": 7.5}, [], "tiny", "cuda", ["7.5", "7b", "3b"]),
        (RTX_3090 | {"free": 12.0}, [], "3b", "cuda", ["12.0", "7b"]),
        (RTX_3090, ["--memory-limit", "12"], "3b", "cuda", ["--memory-limit 12"]),
        (RTX_3090, ["--memory-limit", "8"], "tiny", "cuda", ["--memory-limit 8"]),
        (
            RTX_3090 | {"free": 10.0},
            ["--preset", "7b"],
            "7b",
            "cuda",
            ["10.0", "12.9", "--preset 3b"],
        ),
        (RTX_3090 | {"free": 10.0}, ["--device", "cpu"], "tiny", "cpu", []),
        (RTX_3060, [], "3b", "cuda", ["10.8 GiB"]),
        (OLD_DRIVER, [], "tiny", "cpu", ["535.183.01", "580", "too old"]),
        (OLD_DRIVER, ["--preset", "tiny"], "tiny", "cpu", ["535.183.01", "580"]),
        (dict(driver=OPEN.format("570.86.15")), [], "tiny", "cpu", ["570.86.15", "580", "too old"]),
        (dict(driver=OLD_DRIVER["driver"], cuda="12.8"), [], "tiny", "cpu", ["535.183.01", "525"]),
        (
            dict(driver=OLD_DRIVER["driver"], cuda="14.0"),
            [],
            "tiny",
            "cpu",
            ["535.183.01", "CUDA 14"],
        ),
        (dict(driver=OPEN.format("580.95.05")), [], "tiny", "cpu", ["580.95.05", "new enough"]),
        (dict(driver="no version"), [], "tiny", "cpu", ["driver", "580"]),
        (dict(wsl=True), [], "tiny", "cpu", ["driver", "580", "Windows"]),
        (
            dict(driver=OPEN.format("580.95.05"), cuda=None),
            [],
            "tiny",
            "cpu",
            ["built without CUDA", "pip"],
        ),
        (dict(cuda=None), [], "tiny", "cpu", ["no GPU was found", "built without CUDA"]),
        (dict(), [], "tiny", "cpu", ["no GPU was found"]),
    ],
)
def test_training_begins_with_the_preset_and_the_device_that_the_machine_allows_and_says_why(
    machine, argv, preset, device, words, put_in, trained, capsys
):
    put_in(**machine)
    assert run_train(argv) == 0
    [s] = trained
    assert (s.preset, s.device) == (preset, device)
    printed = capsys.readouterr().out
    assert all(word in printed for word in words), printed
    assert ("warning" in printed) == (argv == ["--preset", "7b"]), printed


@pytest.mark.parametrize(
    "machine, argv, words",
    [
        (dict(), ["--preset", "7b"], ["--preset 7b", "no GPU was found", "--device cpu"]),
        (dict(), ["--preset", "3b"], ["--preset 3b"]),
        (dict(), ["--preset", "3b", "--device", "auto"], ["--preset 3b"]),
        (dict(), ["--policy", PRESETS["7b"]["policy"]], ["--policy", "--device cpu"]),
        (P100, ["--preset", "7b"], ["--preset 7b", "P100", "6.0"]),
        (V100, ["--preset", "3b"], ["--preset 3b", "V100", "7.0"]),
        (OLD_DRIVER, ["--preset", "7b"], ["--preset 7b", "535.183.01", "580"]),
        (P100, ["--device", "cuda"], ["--device cuda", "P100", "6.0"]),
        (V100, ["--preset", "7b", "--device", "cuda"], ["--device cuda", "V100"]),
        (OLD_DRIVER, ["--device", "cuda"], ["--device cuda", "535.183.01", "580"]),
        (dict(cuda=None), ["--device", "cuda"], ["--device cuda", "built without CUDA"]),
        (T4, ["--preset", "3b", "--load-in", "bf16"], ["--load-in bf16"]),
        (
            RTX_3090 | {"free": 7.5},
            ["--preset", "7b"],
            ["--preset 7b", "7.9", "7.5", "--preset 3b"],
        ),
        (RTX_3090, ["--preset", "7b", "--memory-limit", "7"], ["7.9", "7.0", "--memory-limit"]),
    ],
)
def test_a_machine_that_cannot_do_what_was_asked_for_is_refused_in_one_line_before_training(
    machine, argv, words, put_in, trained, capsys
):
    put_in(**machine)
    assert run_train(argv) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and all(word in error[0] for word in words), error
    assert not trained


@pytest.mark.parametrize("preset", ["3b", "7b"])
def test_a_rehearsal_of_a_full_size_preset_needs_no_gpu(preset, put_in):
    put_in()
    s, _ = parse_settings(["--preset", preset, "--rehearse", "1"], "train.py", "")
    assert (s.preset, s.device) == (preset, "cpu")


@pytest.mark.parametrize("device, code", [("cuda", 2), ("auto", 2), ("cpu", None)])
def test_a_full_size_run_is_continued_on_the_cpu_only_where_it_was_started_there(
    device, code, put_in, tmp_path, capsys
):
    put_in()
    saved = asdict(make_settings(preset="7b", device="cpu")[0]) | {"device": device}
    (tmp_path / "settings.json").write_text(json.dumps(saved))
    try:
        parse_settings(["--resume", "--run", str(tmp_path)], "train.py", "")
        left = None
    except SystemExit as stopped:
        left = stopped.code
    assert left == code
    assert len(capsys.readouterr().err.splitlines()) == (code == 2)


@pytest.mark.parametrize(
    "beside, argv, refused",
    [
        ({}, ["--preset", "7b"], True),
        ({}, ["--preset", "3b", "--image", "a.png", "--question", "the cup"], True),
        ({}, ["--preset", "7b", "--device", "cpu"], False),
        ({"preset": "7b", "device": "cuda"}, ["--adapter"], True),
        ({"preset": "3b", "device": "cuda"}, ["--adapter", "--device", "cpu"], False),
        ({"preset": "3b", "device": "cuda"}, ["--adapter", "--merge", "merged"], False),
        ({"preset": "tiny", "device": "cuda"}, ["--adapter"], False),
    ],
)
def test_evaluation_of_a_full_size_policy_needs_a_gpu_or_device_cpu(
    beside, argv, refused, put_in, tmp_path, capsys
):
    put_in()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"weight": torch.zeros(1)}, tmp_path / "adapter/adapter_model.safetensors")
    if beside:
        saved = PRESETS[beside["preset"]] | beside
        (tmp_path / "settings.json").write_text(json.dumps(saved))
        argv = ["--adapter", str(tmp_path / "adapter"), *argv[1:]]
    if not refused:
        assert evaluate_command.parse(argv)[0].device == "cpu"
        return
    with pytest.raises(SystemExit) as left:
        evaluate_command.parse(argv)
    error = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and len(error) == 1 and "--device cpu" in error[0]


def test_evaluation_is_refused_before_anything_is_fetched_where_the_weights_do_not_fit(
    put_in, monkeypatch, capsys
):
    put_in(**RTX_3090 | {"free": 7.5})
    monkeypatch.setattr(evaluate_command, "open_input", lambda *_: pytest.fail("data were opened"))
    with pytest.raises(SystemExit) as left:
        evaluate_command.main(["--preset", "7b"])
    assert left.value.code == 2 and "--preset 7b" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [RuntimeError("no such operation\nmore"), KeyError("op"), AssertionError()]
)
def test_a_forecast_that_fails_does_not_stop_the_training(
    error, put_in, trained, monkeypatch, capsys
):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(forecast_module, "peaks", fails)
    for free, warned in ((23.0, 0), (12.0, 1)):  # the preset's own memory is compared all the same
        put_in(**RTX_3090 | {"free": free})
        assert run_train(["--preset", "7b"]) == 0
        printed = capsys.readouterr().out
        lines = [line for line in printed.splitlines() if "no forecast" in line]
        assert len(lines) == 1 and type(error).__name__ in lines[0]
        assert printed.count("warning") == warned
    assert len(trained) == 2


def test_an_evaluation_whose_memory_cannot_be_forecast_goes_on(put_in, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no such operation")

    put_in(**RTX_3090)
    monkeypatch.setattr(forecast_module, "policy_sizes", fails)
    evaluate_command.refuse_too_little_memory(make_settings(preset="7b")[0])
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("preset", MEMORY)
def test_the_memory_that_a_preset_needs_is_the_forecast_with_gaps(preset):
    s, _ = make_settings(preset=preset, device="cpu")
    gib = peaks(policy_sizes(s))
    needed = max(gib["load"], gib["reward"], gib["update"]) / (1 - GAPS)
    assert MEMORY[preset][1] == pytest.approx(needed, abs=0.06)


@pytest.mark.parametrize(
    "capability, built_for, runs",
    [
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((8, 9), BUILT_FOR, True),
        ((9, 0), BUILT_FOR, True),
        ((12, 1), BUILT_FOR, True),
        ((10, 3), BUILT_FOR, True),
        ((7, 5), BUILT_FOR, True),
        ((7, 0), BUILT_FOR, False),
        ((6, 1), BUILT_FOR, False),
        ((5, 2), ["sm_50"], True),
        ((12, 0), ["sm_90"], False),
        ((12, 0), ["sm_80", "compute_90"], True),
        ((8, 9), ["compute_90"], False),
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),
        ((12, 0), ["compute_90a"], False),
        ((10, 3), ["sm_100f"], True),
        ((12, 0), ["compute_100f"], False),
        ((9, 0), ["gfx90a", "gfx1100"], True),
        ((9, 0), [], True),
    ],
)
def test_code_runs_on_its_own_major_version_and_ptx_on_newer_gpus(capability, built_for, runs):
    assert gpu.has_kernels(capability, built_for) == runs


def test_a_driver_that_only_nvidias_tool_tells_is_named(put_in, monkeypatch):
    put_in()
    done = SimpleNamespace(stdout="546.33\n")
    monkeypatch.setattr(gpu.shutil, "which", lambda tool: "nvidia-smi.exe")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *a, **k: done)
    assert "546.33" in gpu.gpu_fault() and "580" in gpu.gpu_fault()

    def hangs(*_, **__):
        raise subprocess.TimeoutExpired("nvidia-smi", 10)

    monkeypatch.setattr(gpu.subprocess, "run", hangs)
    assert "580" in gpu.gpu_fault()


def test_gpus_that_a_variable_hides_are_not_blamed_on_the_driver(put_in, monkeypatch):
    put_in(driver=OPEN.format("580.95.05"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert "CUDA_VISIBLE_DEVICES" in gpu.gpu_fault()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "CUDA_VISIBLE_DEVICES" not in gpu.gpu_fault() and "container" in gpu.gpu_fault()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # on a machine with one GPU
    assert "CUDA_VISIBLE_DEVICES is 1" in gpu.gpu_fault()


# ------------------------------------------------------------------------------------------------- memory


def test_processes_that_train_together_choose_by_the_whole_memory(put_in, monkeypatch):
    """Each would see another free memory, and the presets could differ."""
    put_in(**RTX_3090 | {"free": 7.5})
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert make_settings()[0].preset == "7b"


@pytest.mark.parametrize(
    "message, preset", [("CUDA error: out of memory", "tiny"), ("not supported", "7b")]
)
def test_a_gpu_that_does_not_tell_its_free_memory_counts_whole_unless_it_is_full(
    message, preset, put_in, monkeypatch
):
    def fails(*_):
        raise RuntimeError(message)

    put_in(**RTX_3090)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fails)
    assert make_settings()[0].preset == preset


@pytest.mark.parametrize(
    "release", ["5.15.167.4-microsoft-standard-WSL2", "4.4.0-19041-Microsoft", "dxg", "win32"]
)
def test_where_windows_lends_memory_the_process_is_held_to_what_is_free_at_its_start(
    release, put_in, monkeypatch, capsys
):
    fractions = put_in(**RTX_3060 | {"wsl": release == "dxg"})
    monkeypatch.setattr(gpu.platform, "release", lambda: release)
    if release == "win32":
        monkeypatch.setattr(sys, "platform", "win32")
    s, _ = make_settings(preset="3b")
    memory.cap_memory(s)
    assert fractions == [pytest.approx(10.8 / 12)] and "10.8 GiB" in capsys.readouterr().out
    memory.cap_memory(replace(s, memory_limit=6.0))
    assert fractions[1] == pytest.approx(6 / 12)
    memory.cap_memory(replace(s, device="cpu"))
    assert len(fractions) == 2


def test_on_linux_itself_only_the_memory_limit_holds_the_process(put_in, monkeypatch, capsys):
    fractions = put_in(**RTX_3060 | {"wsl": False})
    monkeypatch.setattr(gpu.platform, "release", lambda: "6.8.0-45-generic")
    s, _ = make_settings(preset="3b")
    memory.cap_memory(s)
    assert not fractions
    memory.cap_memory(replace(s, memory_limit=6.0))
    assert fractions == [pytest.approx(0.5)] and not capsys.readouterr().out


def test_evaluation_under_wsl_is_held_too(put_in, monkeypatch):
    fractions = put_in(**RTX_3060)
    monkeypatch.setattr(evaluate_command, "refuse_too_little_memory", lambda s: None)

    def stop(*_):
        raise UserError("enough")

    monkeypatch.setattr(evaluate_command, "open_input", stop)
    monkeypatch.setattr(evaluate_command, "join_processes", lambda device: None)
    with pytest.raises(SystemExit):
        evaluate_command.main(["--preset", "3b"])
    assert fractions == [pytest.approx(10.8 / 12)]


def test_memory_that_becomes_free_later_is_not_beyond_the_cap_of_windows(put_in, monkeypatch):
    put_in(**RTX_3060)
    s, _ = make_settings(preset="3b")
    for name, answer in dict(
        memory_reserved=3 * GIB,
        memory_allocated=2 * GIB,
        mem_get_info=(9 * GIB, 12 * GIB),
        get_per_process_memory_fraction=0.5,
        current_device=0,
    ).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    assert memory.free_memory(s) == pytest.approx(4 * GIB)  # half of 12, and 2 are taken


def test_an_evaluation_answers_fewer_questions_in_a_batch_where_memory_is_short(monkeypatch):
    base = SimpleNamespace(config=shape_config("7b"), dtype=torch.bfloat16)
    policy, free = SimpleNamespace(base=base), {"gib": 0.0}
    monkeypatch.setattr(evaluation, "free_memory", lambda s: free["gib"] * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    s = replace(make_settings(preset="7b", device="cpu")[0], device="cuda")
    sizes = []
    for gib in (0.1, 2.0, 4.0, 60.0):
        free["gib"] = gib
        sizes.append(batch_size(policy, s))
    assert sizes[0] == 1 < sizes[1] < sizes[2] < sizes[3] == 15
    assert batch_size(policy, replace(s, device="cpu")) == 15
    free["gib"] = 0.1
    assert batch_size(policy, replace(s, eval_batch=40)) == 40
    assert batch_size(policy, replace(s, device="cpu"), votes=3) == 5
    free["gib"] = 60.0
    assert batch_size(policy, s, votes=3) == 5
    free["gib"] = 4.0
    assert batch_size(policy, replace(s, group=64)) == sizes[2]  # the group is training's alone


def test_an_evaluation_that_continues_with_another_batch_answers_every_question(
    policy, segmenter, tmp_path, monkeypatch
):
    data, keep, s = (
        load_data("shapes", "validation", 7),
        (tmp_path / "answers.part", "what"),
        make_settings(preset="tiny", device="cpu", max_new_tokens=2)[0],
    )
    real, calls = evaluation.generate, []

    def stopped(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(evaluation, "generate", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(policy, segmenter, data, replace(s, eval_batch=3), keep=keep)
    rows = evaluate(policy, segmenter, data, replace(s, eval_batch=2), keep=keep).rows
    assert [row.index for row in rows] == list(range(7))


# ------------------------------------------------------------------------------------------------- other systems


def test_on_windows_the_peak_of_memory_is_the_peak_working_set(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # importing it fails, as on Windows
    used = SimpleNamespace(rss=GIB, peak_wset=3 * GIB)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: used))
    assert memory.peak_memory("cpu") == 3.0


def test_on_macos_the_peak_of_memory_is_counted_in_bytes(monkeypatch):
    bytes_or_kib = memory.peak_memory("cpu")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory.peak_memory("cpu") == pytest.approx(bytes_or_kib / 1024, rel=0.2)


@pytest.mark.parametrize("command", ["train.py", "eval.py"])
def test_a_console_without_a_character_does_not_stop_the_program(command):
    """The settings are printed with the name that was typed, before its folder is missed."""
    env = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "HF_HUB_OFFLINE": "1"}
    argv = [sys.executable, str(ROOT / command), "--preset", "tiny", "--device", "cpu"]
    argv += (
        ["--data", "\u2192 \u732b", "--out", os.devnull]
        if command == "eval.py"
        else ["--data", "\u2192 \u732b"]
    )
    done = subprocess.run(argv, env=env, capture_output=True, encoding="cp1252", cwd=ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-500:]
    assert "data = ? ?" in done.stdout


def test_what_is_printed_becomes_question_marks_only_where_the_stream_lacks_it(monkeypatch):
    for encoding, expected in (("cp1252", b"? \xe9"), ("utf-8", "\u2192 \xe9".encode())):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        print_anything()
        print("\u2192 \xe9", end="", flush=True)
        assert written.getvalue() == expected
        monkeypatch.undo()
    monkeypatch.setattr(sys, "stdout", None)  # as under pythonw
    print_anything()


def text_files_without_encoding(file: Path) -> list[str]:
    """Calls that read or write text in the encoding of the machine, as "file:line"."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name not in ("open", "read_text", "write_text", "fdopen") or "Image.open" in ast.unparse(
            node
        ):
            continue
        strings = [
            a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
        ]
        binary = name in ("open", "fdopen") and any("b" in text for text in strings)
        if not binary and "encoding" not in [k.arg for k in node.keywords]:
            found.append(f"{file}:{node.lineno}")
    return found


def test_text_files_are_read_and_written_as_utf8_on_every_system():
    package = [f for f in (ROOT / "samr1_mini").rglob("*.py") if "data" not in f.parts]
    files = [*package, ROOT / "train.py", ROOT / "eval.py", *(ROOT / "tutorials").glob("*.py")]
    assert len(files) > 25 and [one for f in files for one in text_files_without_encoding(f)] == []


ONLY_UNIX = """
import builtins
real = builtins.__import__
def without_unix(name, globals=None, *rest, **named):
    asks = (globals or {}).get("__name__", "").split(".")[0]
    if asks in ("samr1_mini", "train", "eval") and name in ("resource", "fcntl", "pwd", "termios"):
        raise ImportError(name)
    return real(name, globals, *rest, **named)
builtins.__import__ = without_unix
import train, eval
import samr1_mini.grpo, samr1_mini.rehearse, samr1_mini.data.public
from samr1_mini.memory import peak_memory
assert peak_memory("cpu") > 0
"""


def test_the_package_works_where_it_cannot_import_modules_of_unix():
    command = [sys.executable, "-c", ONLY_UNIX]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]


# ------------------------------------------------------------------------------------------------- disks


@pytest.mark.parametrize(
    "changes, named, left_out",
    [
        (dict(policy="Qwen/x"), ["HF_HOME"], ["SAMR1_CACHE", "--coco-dir", "--sam-checkpoint"]),
        (dict(sam="vit_h"), ["SAMR1_CACHE", "--sam-checkpoint"], ["HF_HOME", "--coco-dir"]),
        (dict(sam="facebook/sam2"), ["HF_HOME"], ["SAMR1_CACHE", "--sam-checkpoint"]),
        (dict(data="refcocog"), ["SAMR1_CACHE", "--coco-dir"], ["HF_HOME", "--sam-checkpoint"]),
        (dict(data="reasonseg"), ["SAMR1_CACHE"], ["HF_HOME", "--coco-dir"]),
        (
            dict(policy="Qwen/x", sam="vit_h", data="refcocog"),
            ["HF_HOME", "SAMR1_CACHE", "--coco-dir", "--sam-checkpoint"],
            [],
        ),
    ],
)
def test_a_full_disk_names_only_what_helps(
    changes, named, left_out, settings, monkeypatch, tmp_path
):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setattr(loading, "hub_bytes", lambda name: 10**9 * (name not in ("tiny", "vit_h")))
    monkeypatch.setattr(loading, "CACHE", tmp_path)
    monkeypatch.setattr(segmenter_module, "CACHE", tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**8))
    sets = [SimpleNamespace(download_bytes=10**9 * ("data" in changes))]
    with pytest.raises(UserError) as error:
        loading.check_downloads(replace(settings, **changes), sets)
    assert all(name in str(error.value) for name in named), error.value
    assert not any(name in str(error.value) for name in left_out), error.value


def test_the_advice_names_the_variable_that_has_an_effect(monkeypatch):
    """HF_HUB_CACHE comes before HF_HOME in huggingface_hub."""
    download = files.Download("model", 1, Path(files.HF_HUB_CACHE))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert download.variable == "HF_HOME"
    monkeypatch.setenv("HF_HUB_CACHE", "/elsewhere")
    assert download.variable == "HF_HUB_CACHE"


def test_a_drive_that_does_not_exist_does_not_hang():
    drive = SimpleNamespace(exists=lambda: False)
    drive.parent = drive  # as PureWindowsPath("Z:\\").parent
    assert files.Download("model", 1, drive).place is drive


def test_disks_without_a_number_are_told_apart_by_their_letter():
    """Windows gives some disks the number 0."""

    def folder(path):
        return SimpleNamespace(
            stat=lambda: SimpleNamespace(st_dev=0), absolute=lambda: PureWindowsPath(path)
        )

    disks = [files.disk_of(folder(path)) for path in ("C:\\models", "C:\\pictures", "D:\\pictures")]
    assert disks[0] == disks[1] != disks[2]


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT"])
def test_a_disk_that_is_full_names_the_variables_of_both_caches(name):
    import errno

    said = first_line(OSError(getattr(errno, name), "No space left on device"))
    assert "HF_HOME" in said and "SAMR1_CACHE" in said and "\n" not in said
    assert "HF_HOME" not in first_line(OSError(errno.ENOENT, "No such file"))


# ------------------------------------------------------------------------------------------------- SAM


@pytest.fixture
def small_vit_b(monkeypatch):
    monkeypatch.setitem(sam_model_registry, "vit_b", lambda: random_sam("tiny"))
    return load_segmenter("tiny").predictor.model.state_dict()


def masks_of(segmenter) -> np.ndarray:
    scene = make_scene(3)
    return segmenter.masks(
        scene.image, [thing.box for thing in scene.things], [[(20.0, 30.0, 1)]] * len(scene.things)
    )


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_of_sam_gives_the_same_masks_and_is_mapped_where_it_can_be(
    zipped, small_vit_b, segmenter, tmp_path, monkeypatch
):
    file, real, mapped = tmp_path / "b.pth", torch.load, []
    torch.save(small_vit_b, file, _use_new_zipfile_serialization=zipped)
    monkeypatch.setattr(
        torch, "load", lambda *a, **k: mapped.append(k.get("mmap", False)) or real(*a, **k)
    )
    loaded = load_segmenter("vit_b", file)
    assert mapped == [zipped]
    model = loaded.predictor.model
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(x.is_meta or x.requires_grad for x in tensors) and not model.training
    assert {x.dtype for x in tensors} == {torch.float32}
    assert model.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert (masks_of(loaded) == masks_of(segmenter)).all()


def test_a_model_that_reads_its_weights_draws_no_random_ones(small_vit_b, tmp_path, monkeypatch):
    torch.save(small_vit_b, tmp_path / "b.pth")
    built = []
    real = segmenter_module.random_sam
    monkeypatch.setattr(
        segmenter_module, "random_sam", lambda kind: built.append(real(kind)) or built[0]
    )
    meta = []
    load = torch.nn.Module.load_state_dict
    monkeypatch.setattr(
        torch.nn.Module,
        "load_state_dict",
        lambda self, *a, **k: meta.append({p.is_meta for p in self.parameters()})
        or load(self, *a, **k),
    )
    load_segmenter("vit_b", tmp_path / "b.pth")
    assert meta == [{True}]


def test_half_precision_weights_of_sam_are_held_in_fp32(small_vit_b, tmp_path):
    torch.save({name: value.half() for name, value in small_vit_b.items()}, tmp_path / "b.pth")
    model = load_segmenter("vit_b", tmp_path / "b.pth").predictor.model
    assert {x.dtype for x in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "damage",
    [
        "truncated",
        "short",
        "empty",
        "pointer",
        "missing key",
        "other key",
        "other shape",
        "list",
        "nested",
        "text value",
        "legacy truncated",
        "folder",
        "missing file",
    ],
)
def test_a_file_that_does_not_hold_sams_weights_is_refused_in_one_line(
    damage, small_vit_b, tmp_path
):
    file, state = tmp_path / "b.pth", dict(small_vit_b)
    first = next(iter(state))
    if damage == "missing key":
        del state[first]
    if damage == "other key":
        state["head.weight"] = torch.zeros(3)
    if damage == "other shape":
        state[first] = torch.zeros(3)
    if damage == "text value":
        state[first] = "weights"
    content = {"list": list(state.values()), "nested": {"model": state}}.get(damage, state)
    torch.save(content, file, _use_new_zipfile_serialization=damage != "legacy truncated")
    whole = file.read_bytes()
    if "truncated" in damage:
        file.write_bytes(whole[: len(whole) // 2])
    if damage == "short":
        file.write_bytes(whole[:-10])
    if damage == "empty":
        file.write_bytes(b"")
    if damage == "pointer":
        file.write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2564550879\n"
        )
    if damage in ("folder", "missing file"):
        file.unlink()
    if damage == "folder":
        file.mkdir()
    with pytest.raises(UserError) as error:
        load_segmenter("vit_b", file)
    assert "--sam-checkpoint" in str(error.value) and str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_every_preset_still_passes_its_check():
    for preset in PRESETS:
        check(make_settings(preset=preset, device="cpu")[0])
