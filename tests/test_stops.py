"""Runs that end halfway: nothing that was learnt is lost, and what ended the run is said."""

import fcntl
import json
import os
import pickle
import pty
import select
import shlex
import signal
import subprocess
import sys
import termios
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train as command
from samr1_mini import decoding, grpo
from samr1_mini import policy as policy_module
from samr1_mini.config import Settings, Terminated, UserError, resumed_settings
from samr1_mini.grpo import train
from samr1_mini.decoding import TokenReader, generate
from samr1_mini.policy import encode
from samr1_mini import processes, runs, stops
from samr1_mini.tiny.scenes import make_scene

ROOT = Path(__file__).parent.parent
SHORT = [
    "--device",
    "cpu",
    "--questions",
    "4",
    "--group",
    "4",
    "--updates",
    "2",
    "--eval-every",
    "0",
    "--test-samples",
    "4",
    "--max-new-tokens",
    "60",
    "--warmup",
    "1",
]


def environment():
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # python and torchrun of this environment
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path}


def saved_state(folder):
    return torch.load(Path(folder) / "state.pt", weights_only=True)


def saved_adapter(folder):
    weights = load_file(Path(folder) / "adapter" / "adapter_model.safetensors")
    return {name.replace(".weight", ".default.weight"): value for name, value in weights.items()}


def same_adapters(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------------------------------------- a lost terminal


@contextmanager
def in_a_terminal(folder, samples, ignored):
    """The training in a terminal of its own; within, its first step is done. Yields the process and the terminal."""
    ours, its = pty.openpty()

    def enter():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        if ignored:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    options = ["--samples", str(samples), "--run", str(folder), *SHORT]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *options],
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=enter,
        cwd=ROOT,
        env=environment(),
    )
    os.close(its)
    log, end = folder / "metrics.jsonl", time.monotonic() + 300
    try:
        while not (log.exists() and log.read_text().count("\n")):
            assert process.poll() is None and time.monotonic() < end
            if select.select([ours], [], [], 0.1)[0]:
                os.read(ours, 10000)
        time.sleep(0.5)  # the state of the step is taken just after its line is written
        yield process, ours
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_a_run_whose_terminal_is_closed_saves_its_last_step_and_says_so_by_its_code(tmp_path):
    with in_a_terminal(tmp_path / "run", 4000, ignored=False) as (process, terminal):
        os.close(terminal)
        assert process.wait(120) == 128 + signal.SIGHUP
    steps = saved_state(tmp_path / "run")["step"]
    assert 1 <= steps == len((tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert same_adapters(saved_adapter(tmp_path / "run"), saved_state(tmp_path / "run")["adapter"])


def test_a_run_that_ignores_a_closed_terminal_ends_as_if_it_were_open(tmp_path):
    with in_a_terminal(tmp_path / "run", 12, ignored=True) as (process, terminal):
        os.close(terminal)
        assert process.wait(300) == 0
    assert saved_state(tmp_path / "run")["step"] == 3 and (tmp_path / "run/summary.json").exists()


def test_a_closed_terminal_ends_a_run_as_sigterm_does_and_either_of_them_once():
    for first, second in ((signal.SIGHUP, signal.SIGTERM), (signal.SIGTERM, signal.SIGHUP)):
        with stops.stop_on_signals():
            assert signal.getsignal(first) != signal.SIG_DFL  # which would end the tests
            with pytest.raises(Terminated) as end:
                signal.raise_signal(first)
            assert end.value.number == first
            signal.raise_signal(second)
        assert signal.getsignal(signal.SIGHUP) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_that_is_ignored_when_the_run_begins_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stops.stop_on_signals():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_where_there_is_no_sighup_sigbreak_ends_a_run(monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    with stops.stop_on_signals():
        assert signal.getsignal(signal.Signals.SIGUSR1) == signal.SIG_DFL
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)  # Windows alone has it
    with stops.stop_on_signals(), pytest.raises(Terminated):
        assert signal.getsignal(signal.SIGUSR1) != signal.SIG_DFL
        signal.raise_signal(signal.SIGUSR1)


def test_a_training_in_another_thread_handles_no_signals(settings, tmp_path):
    failed = []

    def work():
        try:
            train(settings)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed and (tmp_path / "run/summary.json").exists()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_program_that_was_ended_says_by_which_signal(number, code, monkeypatch):
    monkeypatch.setattr(grpo, "train", lambda s: (_ for _ in ()).throw(Terminated(number)))
    with pytest.raises(SystemExit) as left:
        command.main(["--device", "cpu"])
    assert left.value.code == code


class Lost:
    """A stream nobody reads any more."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    flush = isatty = lambda self: self.write("")


def test_prints_that_fail_end_no_run(settings, tmp_path, monkeypatch):
    real = grpo.one_step

    def lose(*args):
        if args[2] == 0:
            monkeypatch.setattr(sys.stdout, "stream", Lost())
            monkeypatch.setattr(sys.stderr, "stream", Lost())
        return real(*args)

    monkeypatch.setattr(grpo, "one_step", lose)
    train(settings)
    assert saved_state(tmp_path / "run")["step"] == 2


def test_a_print_that_fails_comes_after_the_save_and_does_not_hide_what_ended_the_run(
    settings, tmp_path, monkeypatch
):
    break_the_second_step(monkeypatch, KeyError("no such key"))
    real = runs.save_state

    def save_and_lose_the_terminal(*args):
        saved = real(*args)
        monkeypatch.setattr(sys, "stdout", stops.LastingStream(Lost()))
        return saved

    monkeypatch.setattr(runs, "save_state", save_and_lose_the_terminal)
    with pytest.raises(KeyError, match="no such key"):
        train(settings)
    assert saved_state(tmp_path / "run")["step"] == 1


# ---------------------------------------------------------------------------------------------------- any exception


def break_the_second_step(monkeypatch, error, broken_too=lambda: None):
    """The second update of the second step ends with `error`: the policy's weights are not those of a whole step.
    From then on what `broken_too` does holds."""
    calls, real = [], grpo.one_update

    def broken(*args):
        calls.append(1)
        if len(calls) == 4:
            broken_too()
            raise error
        return real(*args)

    monkeypatch.setattr(grpo, "one_update", broken)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        AssertionError(),
        KeyError("box"),
        MemoryError(),
    ],
    ids=repr,
)
def test_whatever_ends_a_step_leaves_the_last_whole_step_and_is_raised_on(
    error, settings, tmp_path, monkeypatch, capsys
):
    def dead(*_, **__):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def lose_the_gpu():  # after such an error no weight can be read from it, and none be written
        monkeypatch.setattr(torch.nn.Module, "state_dict", dead)
        monkeypatch.setattr(runs, "put_adapter", dead)

    break_the_second_step(monkeypatch, error, lose_the_gpu)
    with pytest.raises(type(error)) as end:
        train(settings)
    assert end.value is error
    state = saved_state(tmp_path / "run")
    assert state["step"] == 1 and same_adapters(saved_adapter(tmp_path / "run"), state["adapter"])
    assert "--resume" in capsys.readouterr().out


def test_the_adapter_of_a_state_is_saved_as_peft_saves_it(policy, tmp_path):
    optimizer = torch.optim.AdamW(policy.trained)
    (tmp_path / "run").mkdir()
    assert runs.save_state(tmp_path / "run", policy, runs.take_state(policy, optimizer, 1, 4, 1.0))
    policy.model.save_pretrained(tmp_path / "peft")
    files = sorted(file.name for file in (tmp_path / "peft").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "run/adapter").iterdir())
    for name in files:
        assert (tmp_path / "peft" / name).read_bytes() == (
            tmp_path / "run/adapter" / name
        ).read_bytes(), name


def test_a_bug_keeps_its_traceback_and_memory_that_ran_out_does_not(monkeypatch, capsys):
    def end_with(error):
        monkeypatch.setattr(grpo, "train", lambda s: (_ for _ in ()).throw(error))
        command.main(["--device", "cpu"])

    for bug in (KeyError("box"), torch.AcceleratorError("CUDA error: unspecified launch failure")):
        with pytest.raises(type(bug)):
            end_with(bug)
    for full in (
        torch.OutOfMemoryError("2 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
    ):
        with pytest.raises(SystemExit) as left:
            end_with(full)
        assert left.value.code == 2 and "--max-new-tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, kind_elsewhere",
    [
        (KeyError("box"), RuntimeError),
        (UserError("line 4: box"), UserError),
        (OSError(2, "no file", "box"), UserError),
        (torch.OutOfMemoryError("box"), torch.OutOfMemoryError),
    ],
    ids=repr,
)
def test_a_failure_in_one_process_ends_all(error, kind_elsewhere, monkeypatch):
    monkeypatch.setattr(processes, "PartialState", lambda: SimpleNamespace(num_processes=2))
    exchanged = []

    def exchange(mine):
        exchanged.extend(pickle.dumps(one) for one in mine)
        return [*mine, None]

    monkeypatch.setattr(processes, "gather_object", exchange)
    with pytest.raises(type(error)) as end, processes.fail_together():
        raise error
    assert end.value is error and len(exchanged) == 1
    theirs = pickle.loads(exchanged[0])
    monkeypatch.setattr(processes, "gather_object", lambda mine: [*mine, theirs])
    for exchange in (processes.wait_for_all, lambda: processes.gather([1]), lambda: None):
        with pytest.raises(kind_elsewhere, match="box") as end, processes.fail_together():
            exchange()
        assert type(end.value) is kind_elsewhere


# ---------------------------------------------------------------------------------------------------- CUDA graphs


def answers_of(policy, samples):
    with torch.no_grad():
        prompts = encode(policy, [x.image for x in samples], [x.question for x in samples])
    uniforms = torch.rand(len(samples), 3, 60, generator=torch.Generator().manual_seed(0))
    groups = generate(policy, prompts, 3, 60, uniforms=uniforms)
    return [answer for group in groups for answer in group]


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operation not permitted when stream is capturing\nmore"),
        torch.OutOfMemoryError("2 GiB"),
    ],
    ids=["capture", "memory"],
)
def test_where_no_graph_can_be_recorded_answers_are_the_same_and_one_line_says_so(
    error, written, policy, samples, monkeypatch, capsys
):
    expected, tried = answers_of(policy, samples), []

    def fails(read):
        tried.append(read() if written else None)
        raise error

    monkeypatch.setattr(decoding, "recorded", fails)
    monkeypatch.setattr(decoding, "has_graphs", lambda device: True)
    monkeypatch.setattr(policy, "cuda_graphs", True)  # a failed recording switches it off
    monkeypatch.setattr(decoding, "BLOCK", 25)
    capsys.readouterr()
    for _ in range(2):
        for ours, theirs in zip(answers_of(policy, samples), expected, strict=True):
            assert ours.text == theirs.text
            torch.testing.assert_close(ours.logps, theirs.logps, atol=1e-4, rtol=0)
    lines = [line for line in capsys.readouterr().out.splitlines() if "graph" in line]
    assert len(tried) == 1 and len(lines) == 1


def test_memory_that_runs_out_without_a_graph_too_is_raised(policy, samples, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("2 GiB")

    def fails(read):
        monkeypatch.setattr(TokenReader, "read", full)
        read()

    monkeypatch.setattr(decoding, "recorded", fails)
    monkeypatch.setattr(decoding, "has_graphs", lambda device: True)
    with pytest.raises(torch.OutOfMemoryError):
        answers_of(policy, samples)


def test_a_recording_that_fails_gives_the_stream_back(monkeypatch):
    current = ["before"]

    @contextmanager
    def graph(_):
        current[0] = (
            "capturing"  # and stays there, as in torch, where the end of the recording fails
        )
        yield
        raise AssertionError("not reached")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))
    with pytest.raises(ZeroDivisionError):
        decoding.recorded(lambda: 1 / 0)
    assert current == ["before"]


@pytest.mark.gpu
def test_a_gpu_that_cannot_record_a_token_reads_it_as_it_is(samples, monkeypatch, capsys):
    policy = policy_module.load_policy("tiny", "fp32", device="cuda")
    policy.cuda_graphs = False
    expected = answers_of(policy, samples)
    policy.cuda_graphs = True
    real = TokenReader.read

    def asks(reader, embeds, positions):
        if torch.cuda.is_current_stream_capturing():
            embeds.sum().item()  # no graph can hold this
        return real(reader, embeds, positions)

    monkeypatch.setattr(TokenReader, "read", asks)
    for _ in range(2):
        for ours, theirs in zip(answers_of(policy, samples), expected, strict=True):
            assert ours.text == theirs.text
    assert capsys.readouterr().out.count("graph") == 1


# ---------------------------------------------------------------------------------------------------- nothing is learnt


def quick_steps(monkeypatch, zero_variance, changes):
    """Steps that take no time; from the first on they leave `zero_variance`, and change the adapter where told to."""

    def quick(parts, data, step, asked):
        if changes:
            with torch.no_grad():
                for name, parameter in parts.policy.model.named_parameters():
                    if "lora_B" in name:
                        parameter.fill_(1e-6 * (step + 1))
        line = dict.fromkeys(
            (
                "reward",
                "iou",
                "segmentation_format",
                "seconds_rollout",
                "seconds_reward",
                "seconds_update",
            ),
            0.5,
        )
        return line | {"step": step + 1, "zero_variance": zero_variance}, []

    monkeypatch.setattr(grpo, "one_step", quick)


@pytest.mark.parametrize(
    "zero_variance, changes, warned",
    [(0.95, True, 1), (0.95, False, 1), (0.3, False, 1), (0.3, True, 0)],
)
def test_after_ten_steps_one_line_warns_where_nothing_is_learnt(
    zero_variance, changes, warned, settings, monkeypatch, capfd
):
    quick_steps(monkeypatch, zero_variance, changes)
    parts = [(48, False, warned), (76, True, 0), (120, True, warned)]  # 12, 7 and 11 steps
    if not changes:  # after the last step that is an error, so there is nothing to go on with
        parts = parts[:1]
    for samples, resume, expected in parts:
        with nullcontext() if changes else pytest.raises(UserError):
            train(replace(settings, samples=samples, resume=resume))
        told = capfd.readouterr()
        assert told.out.count("Warning") == expected
        assert f"zero_variance={zero_variance:.2f}" in told.err


def test_a_resumed_adapter_that_no_step_changes_is_noticed(settings, monkeypatch, capsys):
    quick_steps(monkeypatch, 0.0, changes=True)
    train(settings)
    quick_steps(monkeypatch, 0.0, changes=False)
    train(replace(settings, samples=60, resume=True))
    assert capsys.readouterr().out.count("Warning") == 1


def not_finite(monkeypatch, finite):
    """Gradients that are not finite but for the updates (counted from 1) in `finite`."""
    calls, real = [], grpo.add_up_gradients

    def broken(parameters):
        calls.append(1)
        real(parameters)
        if len(calls) not in finite:
            parameters[0].grad.fill_(float("nan"))

    monkeypatch.setattr(grpo, "add_up_gradients", broken)
    return calls


def test_ten_updates_in_a_row_without_finite_gradients_end_the_run_and_lose_nothing(
    settings, tmp_path, monkeypatch
):
    calls = not_finite(monkeypatch, finite={1, 4})
    with pytest.raises(UserError, match="--lr"):
        train(replace(settings, samples=48))
    assert len(calls) == 14
    state = saved_state(tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert state["step"] == len(log) == 6 and [line.get("skipped_updates", 0) for line in log] == [
        1,
        1,
        2,
        2,
        2,
        2,
    ]
    assert all(value.isfinite().all() for value in state["adapter"].values())


def test_nine_updates_in_a_row_without_finite_gradients_are_borne(settings, tmp_path, monkeypatch):
    not_finite(monkeypatch, finite={1, 11})
    train(replace(settings, samples=24))
    assert saved_state(tmp_path / "run")["step"] == 6


# ---------------------------------------------------------------------------------------------------- what was moved


PATHS = ("data", "eval_data", "coco_dir", "policy", "sam", "sam_checkpoint")


@pytest.mark.parametrize("name", PATHS)
def test_a_resumed_run_may_name_the_places_to_which_its_data_and_models_were_moved(name, tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(asdict(Settings(preset="tiny"))))
    s, _ = resumed_settings({"run": str(tmp_path), "resume": True, name: "elsewhere"})
    assert getattr(s, name) == "elsewhere"


def write_folder(folder, first=0, count=30):
    """A folder of drawn scenes, known by their lines' numbers alone."""
    folder.mkdir()
    lines = []
    for i in range(count):
        scene = make_scene(first + i)
        Image.fromarray(scene.image).save(folder / f"{i}.png")
        Image.fromarray(scene.things[0].mask.astype(np.uint8)).save(folder / f"{i}-mask.png")
        lines.append(
            {
                "image": f"{i}.png",
                "question": f"the {scene.things[0].name}",
                "mask": f"{i}-mask.png",
                "split": ("train", "train", "train", "val", "test")[i % 5],
            }
        )
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_a_run_goes_on_after_its_folder_and_its_data_were_moved_and_not_with_other_data(
    settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(grpo, "summarise", lambda *_: {})
    data = write_folder(tmp_path / "data")
    train(replace(settings, data=str(data)))
    moved, run = data.rename(tmp_path / "moved data"), (tmp_path / "run").rename(
        tmp_path / "moved run"
    )
    other = write_folder(tmp_path / "other", first=100)
    before = (run / "state.pt").read_bytes()
    changes = [
        {"data": "shapes"},
        {"data": str(other)},
        {"data": str(moved), "eval_data": str(other)},
    ]
    for change in changes:  # `other` has the same ids
        s, _ = resumed_settings({"run": str(run), "resume": True, "samples": 12} | change)
        with pytest.raises(UserError, match="--resume"):
            train(s)
        assert json.loads((run / "settings.json").read_text())["data"] == str(data)
        assert (run / "state.pt").read_bytes() == before
    s, _ = resumed_settings({"run": str(run), "resume": True, "samples": 12, "data": str(moved)})
    train(s)
    told = json.loads((run / "settings.json").read_text())
    assert saved_state(run)["step"] == 3 and told["data"] == str(moved) and told["run"] == str(run)


def test_an_adapter_of_another_size_of_policy_is_refused(policy):
    adapter = {
        name: p.detach().clone() for name, p in policy.model.named_parameters() if p.requires_grad
    }
    runs.put_adapter(policy, {"adapter": adapter})
    name = next(iter(adapter))
    for wrong in (adapter | {name: adapter[name][:, :-1]}, adapter | {"more": adapter[name]}, {}):
        with pytest.raises(UserError, match="--policy"):
            runs.put_adapter(policy, {"adapter": wrong})


@pytest.mark.parametrize(
    "begun, now, refused",
    [
        ("tiny", "vit_h", True),
        ("vit_b", "facebook/sam2-hiera-large", True),
        ("tiny", "tiny", False),
        ("facebook/sam2-hiera-large", "models/sam2", False),
    ],
)
def test_a_sam_may_be_moved_and_is_no_other_kind(begun, now, refused, settings, tmp_path):
    folder = Path(settings.run)
    folder.mkdir()
    runs.write_settings(folder, replace(settings, sam=begun))
    s = replace(settings, sam=now, resume=True)
    if not refused:
        assert runs.open_run(s) == folder
        return
    with pytest.raises(UserError, match="--sam"):
        runs.open_run(s)


# ------------------------------------------------------------------ damaged files of a run


WHOLE = {
    "samples.json": ["a", "b"],
    "base.json": {"gIoU": 0.5, "ceiling": {"gIoU": 0.9}},
    "test-base.json": [{"id": "a"}],
    "missing.json": {"train": []},
}
DAMAGES = {
    "cut off": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "zeros": lambda whole: bytes(len(whole)),
    "another value": lambda whole: b"5",
    "another list": lambda whole: b"[5]",
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_of_a_run_is_named_in_one_line_before_anything_is_loaded(
    name, kind, settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(grpo, "load_models", lambda *_, **__: pytest.fail("models were loaded"))
    folder = runs.open_run(settings)
    for file, content in WHOLE.items():
        runs.write_json(folder / file, content)
    s = replace(settings, resume=True)
    assert runs.open_run(s) == folder
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(DAMAGES[kind](whole))
    if kind == "another list" and name in ("samples.json", "missing.json"):
        return  # these hold lists of any names
    with pytest.raises(UserError) as error:
        train(s)
    assert str(folder / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ['{"step": 2, "rew', "\x00" * 20, "5", ""])
def test_a_damaged_line_of_a_log_is_named_only_if_the_state_needs_it(damage, tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n' + damage)
    assert runs.read_log(tmp_path, 1) == [{"step": 1}]
    assert runs.read_log(tmp_path) == [{"step": 1}]  # the last line may still be on its way
    file.write_text('{"step": 1}\n' + damage + "\n" + '{"step": 3}\n')
    assert runs.read_log(tmp_path, 1) == [{"step": 1}]
    with pytest.raises(UserError) as error:
        runs.read_log(tmp_path, 3)
    assert f"{file}, line 2" in str(error.value)


# ---------------------------------------------------------------------------------------------------- how to continue


def test_the_command_that_continues_a_run_names_a_folder_with_a_space_as_a_shell_reads_it(
    settings, monkeypatch
):
    folder = Path("my runs/it's one")
    words = shlex.split(runs.resume_command(folder, settings))
    assert words == ["python", "train.py", "--resume", "--run", str(folder), "--samples", "8"]
    monkeypatch.setattr(sys, "platform", "win32")
    assert '"my runs' in runs.resume_command(folder, settings)


def test_the_command_that_continues_a_run_names_the_script_as_it_was_named(settings, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["../there/train.py", "--samples", "8"])
    assert shlex.split(runs.resume_command(Path("x"), settings))[1] == "../there/train.py"


BROKEN = """
import os, runpy, sys

sys.path.insert(0, os.environ["PYTHONPATH"])
from samr1_mini import grpo

real, calls = grpo.one_update, []

def broken(*args):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 4:
        raise KeyError("in the second process")
    return real(*args)

if "--resume" not in sys.argv:
    grpo.one_update = broken
runpy.run_path(os.path.join(os.environ["PYTHONPATH"], "train.py"), run_name="__main__")
"""


def test_two_processes_save_what_they_have_learnt_when_one_fails_and_the_command_that_they_print_starts_two(
    tmp_path,
):
    (tmp_path / "train.py").write_text(BROKEN)
    folder = tmp_path / "my run"
    start = [
        "torchrun",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--",
        str(tmp_path / "train.py"),
        *SHORT,
        "--samples",
        "12",
        "--run",
        str(folder),
    ]
    out = subprocess.run(
        start, cwd=tmp_path, capture_output=True, text=True, env=environment(), timeout=600
    )
    assert out.returncode != 0 and "KeyError: 'in the second process'" in out.stderr
    assert saved_state(folder)["step"] == 1
    commands = [line.strip() for line in out.stdout.splitlines() if "--resume" in line]
    assert len(commands) == 1
    again = subprocess.run(
        commands[0],
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=600,
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("preset tiny") == 2 and saved_state(folder)["step"] == 3


def test_a_run_continues_where_questions_with_an_empty_truth_were_left_out(tmp_path):
    (tmp_path / "samples.json").write_text('["a"]')
    (tmp_path / "test-base.json").write_text('[{"id": "x"}, {"id": "z"}]')
    s = SimpleNamespace(data="mine", eval_data="", empty_truth="excluded")

    def check(test):
        runs.check_questions(
            tmp_path, [SimpleNamespace(ids=["a"]), None, SimpleNamespace(ids=test)], s
        )

    check(["x", "y", "z"])
    with pytest.raises(UserError, match="mine"):
        check(["z", "x", "y"])
