"""Around the loop: what a run is told, loads, keeps, saves and measures, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from conftest import failing_update, with_live_adapter
from safetensors import SafetensorError
from safetensors.torch import load_file

import eval as eval_command
import train as command
from samr1_mini import config, grpo
from samr1_mini.config import Settings, Terminated, UserError, parse_settings
from samr1_mini import policy as policy_module
from samr1_mini.evaluation import evaluate
from samr1_mini.grpo import new_optimizer, train
from samr1_mini.policy import load_policy
from samr1_mini.prompt import load_prompt
from samr1_mini import files, loading, memory, reports, runs
from samr1_mini.reports import first_answers
from samr1_mini.tiny.shapes import Shapes


def test_what_is_set_about_data_reaches_all_three_sets(settings, monkeypatch):
    asked = []
    monkeypatch.setattr(
        loading, "open_data", lambda *a: asked.append(a) or SimpleNamespace(box_only=False)
    )
    loading.open_sets(
        replace(
            settings,
            data="a",
            eval_data="b",
            seed=7,
            sentences="all",
            coco_dir="c",
            ignore="excluded",
            objects="several",
            samples=8,
            eval_samples=5,
            test_samples=6,
        )
    )
    rest = (7, "all", "c", "excluded", "several")
    assert asked == [
        ("a", "train", 8, *rest),
        ("b", "validation", 5, *rest),
        ("b", "test", 6, *rest),
    ]


def test_boxes_without_masks_are_trained_on_by_their_boxes_alone(settings, monkeypatch):
    monkeypatch.setattr(loading, "open_data", lambda *_: SimpleNamespace(box_only=True))
    with pytest.raises(UserError, match="has boxes and no masks, .* add --accuracy box-iou"):
        loading.open_sets(settings)
    for s in (replace(settings, accuracy="box-iou"), replace(settings, accuracy_weight=0.0)):
        assert len(loading.open_sets(s)) == 3


def test_what_is_set_about_the_models_reaches_them(settings, monkeypatch):
    asked = []
    policy = SimpleNamespace(prompt="")
    monkeypatch.setattr(loading, "check_picture_size", lambda *_: None)
    monkeypatch.setattr(loading, "load_policy", lambda *a: asked.append(a) or policy)
    monkeypatch.setattr(loading, "load_segmenter", lambda *a: asked.append(a))
    monkeypatch.setattr(loading, "check_segmenter", lambda *_: None)
    s = replace(
        settings,
        load_in="bf16",
        rank=3,
        checkpointing=True,
        coordinates="thousandths",
        sam="vit_b",
        sam_checkpoint="x.pth",
        sam_dtype="bf16",
    )
    loading.load_models(s, [], "adapter")
    assert asked == [
        ("vit_b", "x.pth", "cpu", "bf16"),
        ("tiny", "bf16", 3, "adapter", "cpu", True, "thousandths"),
    ]


def test_a_seed_draws_the_same_new_adapter_whatever_was_drawn_before(settings):
    adapters = []
    for before in (1, 2):
        torch.manual_seed(before)
        policy, _ = loading.load_models(settings, [])
        adapters.append(torch.cat([p.flatten() for p in policy.trained]))
    assert (adapters[0] == adapters[1]).all() and adapters[0].any()


def test_each_set_is_told_the_pictures_that_it_lacked_when_the_run_began(
    settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(loading, "check_downloads", lambda *_: None)
    asked = []
    sets = [
        SimpleNamespace(
            download=asked.append, check_files=lambda resumed: None, warnings=[], missing=[]
        )
        for _ in range(3)
    ]
    saved = {"train": ["a.jpg", "b.jpg"], "test": ["c.jpg"]}
    for content, expected in (
        (saved, [["a.jpg", "b.jpg"], [], ["c.jpg"]]),
        (None, [[], [], []]),
    ):
        asked.clear()
        (tmp_path / "missing.json").unlink(missing_ok=True)
        if content is not None:
            files.write_json(tmp_path / "missing.json", content)
        loading.fetch_sets(settings, sets, runs.known_missing(tmp_path))
        assert asked == expected


def test_the_pictures_of_all_sets_are_counted_in_what_is_to_be_downloaded(settings, capsys):
    loading.check_downloads(
        settings, [SimpleNamespace(download_bytes=10**8 * n) for n in (1, 2, 4)]
    )
    assert "pictures 0.7 GB" in capsys.readouterr().out


def test_the_answer_that_is_kept_of_a_question_stands_beside_its_own_reward():
    answers = [SimpleNamespace(text=text, ids=[0] * n) for text, n in (("a", 1), ("b", 2))]
    rewards = [SimpleNamespace(total=6.0, iou=0.91234), SimpleNamespace(total=1.0, iou=0.1)]
    x = SimpleNamespace(id="7", kind="side", question="?")
    assert first_answers([SimpleNamespace(sample=x, completions=answers, rewards=rewards)]) == [
        {
            "id": "7",
            "kind": "side",
            "question": "?",
            "text": "a",
            "tokens": 1,
            "reward": 6.0,
            "iou": 0.912,
        }
    ]


def test_the_time_of_a_run_is_that_of_all_its_parts(settings, tmp_path):
    train(settings)
    state = torch.load(tmp_path / "run/state.pt", weights_only=True)
    torch.save(state | {"seconds": 5000.0}, tmp_path / "run/state.pt")
    assert 5000 < train(replace(settings, resume=True))["seconds"] < 6000


def test_the_bases_figures_of_a_run_that_goes_on_are_those_from_before_its_training(
    settings, tmp_path
):
    train(settings)
    base = json.loads((tmp_path / "run/base.json").read_text())
    (tmp_path / "run/base.json").write_text(json.dumps(base | {"gIoU": 0.12345}))
    assert train(replace(settings, resume=True))["base"]["gIoU"] == 0.12345


def test_the_base_model_is_evaluated_without_the_adapter_where_a_resumed_run_lost_its_figures(
    settings, policy, segmenter, tmp_path
):
    data = Shapes("test", 4, 0)
    s = replace(settings, max_new_tokens=60)
    with policy.as_reference():
        expected = evaluate(policy, segmenter, data, s).each()
    assert evaluate(policy, segmenter, data, s).each() != expected
    base = reports.score_base(policy, segmenter, data, data, s, tmp_path, resumed=True)
    assert json.loads((tmp_path / "test-base.json").read_text()) == json.loads(json.dumps(expected))
    assert base["gIoU"] == runs.read_base(tmp_path)["gIoU"]


def test_minutes_between_saves_are_counted_from_the_last_save(settings, monkeypatch):
    saved, now, real_save, real_update = [], [0.0], runs.save_state, grpo.update

    def slow(*args):
        now[0] += 61
        return real_update(*args)

    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(grpo, "update", slow)
    monkeypatch.setattr(runs, "save_state", lambda *a: saved.append(a[2]["step"]) or real_save(*a))
    train(replace(settings, samples=16, save_minutes=2.0))
    assert saved == [2, 4, 4]  # of four steps of 61 seconds each; the last one is for the end


def test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_does_not_cut_the_saving_off():
    with runs.stop_on_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with runs.stop_on_signals():
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        for _ in range(2):  # nor does Ctrl-C
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_signals_do_not_interrupt_the_last_save(settings, tmp_path):
    saved = []

    def save():
        for kind in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(kind)
        saved.append(True)
        return True

    adapter = {"lora_B": torch.ones(1)}
    run = SimpleNamespace(state={"adapter": adapter}, save=save, folder=tmp_path, s=settings)
    runs.Run.finish(run)
    assert saved
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    def fail(part):
        part.write_text("half")
        raise OSError("full")

    def write_folder(part):
        part.mkdir()
        (part / name).write_text(name)

    def fail_in_folder(part):
        part.mkdir()
        fail(part / "x")

    files.write_json(tmp_path / "a.json", [1])
    with pytest.raises(OSError):
        files.replace_file(tmp_path / "a.json", fail)
    assert json.loads((tmp_path / "a.json").read_text()) == [1]
    for name in ("one", "two"):
        files.replace_file(tmp_path / "folder", write_folder)
    with pytest.raises(OSError):
        files.replace_file(tmp_path / "folder", fail_in_folder)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert found == ["a.json", "folder", "folder/two"]


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path, monkeypatch):
    def write(part):
        part.mkdir()
        (part / "new").write_text("new")

    def replace(part, path):
        raise PermissionError("in use")

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    left = tmp_path / f"folder.{os.getpid()}.old"  # by a program that was killed
    left.mkdir()
    (left / "file").write_text("")
    with monkeypatch.context() as locked:
        locked.setattr(Path, "replace", replace)
        with pytest.raises(PermissionError):
            files.replace_file(tmp_path / "folder", write)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert found == ["folder", "folder/old"]
    left.mkdir()
    (left / "file").write_text("")
    files.replace_file(tmp_path / "folder", write)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert found == ["folder", "folder/new"]


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old").write_text("old")
    (tmp_path / "adapter").symlink_to(tmp_path / "disk")
    (tmp_path / "a.json").symlink_to(tmp_path / "b.json")

    def write(part):
        part.mkdir()
        (part / "new").write_text("new")

    files.replace_file(tmp_path / "adapter", write)
    files.write_json(tmp_path / "a.json", [1])
    assert (tmp_path / "adapter").is_symlink() and (tmp_path / "a.json").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["new"]
    assert json.loads((tmp_path / "b.json").read_text()) == [1]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), UserError("line 4: image file is truncated")]
)
def test_a_second_ctrl_c_or_a_broken_picture_leaves_the_state_before_the_step(
    error, settings, tmp_path, monkeypatch, capsys
):
    with failing_update(monkeypatch, 2, error), pytest.raises(type(error)):
        train(settings)
    assert torch.load(tmp_path / "run/state.pt", weights_only=True)["step"] == 1
    assert "step 1 is saved; " in capsys.readouterr().out


@pytest.mark.parametrize("error, code", [(Terminated(15), 143), (KeyboardInterrupt(), 130)])
def test_memory_is_capped_before_the_training_and_a_program_that_was_stopped_says_so_by_its_code(
    error, code, monkeypatch
):
    done = []
    monkeypatch.setattr(command, "cap_memory", lambda s: done.append(s.memory_limit))

    def stopped(s):
        done.append("train")
        raise error

    monkeypatch.setattr(grpo, "train", stopped)
    with pytest.raises(SystemExit) as left:
        command.main(["--device", "cpu", "--memory-limit", "3"])
    assert left.value.code == code and done == [3.0, "train"]


def test_the_peak_of_memory_is_that_of_this_program():
    known = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 2**20  # GiB
    assert memory.peak_memory("cpu") == pytest.approx(known, rel=0.05)


def test_memory_that_is_free_is_what_the_card_the_allocator_and_the_limit_leave(
    settings, monkeypatch
):
    for name, gib in (("mem_get_info", (10, 24)), ("memory_reserved", 3), ("memory_allocated", 2)):
        value = tuple(n * 2**30 for n in gib) if isinstance(gib, tuple) else gib * 2**30
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    free = (
        lambda limit: memory.free_memory(replace(settings, device="cuda", memory_limit=limit))
        / 2**30
    )
    assert (free(0.0), free(20.0), free(8.0)) == (11, 11, 6) and memory.free_memory(
        settings
    ) == float("inf")


CACHE_CODE = "import os; os.environ.pop('HOME', None); import pwd; from samr1_mini.config import CACHE; print(CACHE)"


def run_cache_code(code, **environment):
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-1000:]
    return Path(done.stdout.strip())


def test_the_cache_is_where_samr1_cache_names_it(tmp_path):
    assert run_cache_code(CACHE_CODE, SAMR1_CACHE=str(tmp_path / "mine")) == tmp_path / "mine"


def test_a_tilde_in_samr1_cache_is_the_home_folder(tmp_path):
    code = "from samr1_mini.config import CACHE; print(CACHE)"
    found = run_cache_code(code, SAMR1_CACHE="~/x", HOME=str(tmp_path), USERPROFILE=str(tmp_path))
    assert found == tmp_path / "x"


def test_a_machine_without_a_home_folder_still_has_a_cache(tmp_path):
    code = CACHE_CODE.replace(
        "from samr1_mini", "pwd.getpwuid = lambda uid: {}[uid]; from samr1_mini"
    )
    assert (
        run_cache_code(code, SAMR1_CACHE="", TMPDIR=str(tmp_path))
        == tmp_path / ".cache" / "samr1_mini"
    )


# ------------------------------------------------------------------ another prompt, another start


def test_a_run_keeps_its_prompt_and_a_resumed_run_and_an_evaluation_use_it(
    settings, tmp_path, monkeypatch
):
    file = tmp_path / "other.txt"
    file.write_text("Find this: {question}\nAnswer in {unit}, with {braces}.\n")
    seen = []
    real = policy_module.prompt_text

    def watched(processor, *asked):
        seen.append(real(processor, *asked))
        return seen[-1]

    monkeypatch.setattr(policy_module, "prompt_text", watched)
    train(replace(settings, prompt_file=str(file), samples=4))
    asked = [text for text in seen if "Find this:" in text]
    assert len(asked) > 8 and "pixels of the 112 x 112 picture, with {braces}." in asked[0]
    assert (tmp_path / "run/prompt.txt").read_text() == file.read_text().strip()
    file.write_text("Changed: {question}")
    resumed, _ = parse_settings(["--resume", "--run", settings.run, "--samples", "8"], "", "")
    seen.clear()
    train(resumed)
    assert [text for text in seen if "Find this:" in text]
    assert not [text for text in seen if "Changed:" in text]
    chosen, _, _ = eval_command.parse(["--adapter", str(tmp_path / "run/adapter")])
    assert chosen.prompt_file == str(tmp_path / "run/prompt.txt")
    # the file's name may be typed again each time
    parse_settings(["--resume", "--run", settings.run, "--prompt-file", str(file)], "", "")


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"no place for it",
        b"\x00",
        b"<|im_start|>user\n{question}<|im_end|>",
        "Find {question}".encode("utf-16"),
    ],
)
def test_a_prompt_file_that_cannot_be_used_is_refused_in_one_line(content, settings, tmp_path):
    file = tmp_path / "other.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"--prompt-file {file}") as refused:
        train(replace(settings, prompt_file=str(file)))
    assert "\n" not in str(refused.value)


def test_a_byte_order_mark_is_no_part_of_the_prompt(tmp_path):
    (tmp_path / "prompt.txt").write_text("Find {question}", encoding="utf-8-sig")
    assert load_prompt(str(tmp_path / "prompt.txt")) == "Find {question}"


def test_a_run_that_stopped_before_it_kept_its_prompt_continues_with_the_users_file(tmp_path):
    (tmp_path / "mine.txt").write_text("Find {question}")
    s, _ = parse_settings(["--preset", "tiny", "--prompt-file", str(tmp_path / "mine.txt")], "", "")
    (tmp_path / "run").mkdir()
    runs.write_settings(tmp_path / "run", s)
    resumed, _ = parse_settings(["--resume", "--run", str(tmp_path / "run")], "", "")
    assert resumed.prompt_file == str(tmp_path / "mine.txt")


def test_an_adapter_that_does_not_fit_on_the_disk_does_not_end_the_run(settings, tmp_path, capsys):
    def full(*_, **__):
        raise SafetensorError("No space left on device")

    policy = SimpleNamespace(model=SimpleNamespace(save_pretrained=full))
    state = {"step": 3, "adapter": {}, "optimizer": {}}
    assert not runs.save_state(tmp_path, policy, state)
    assert "step 3 " in capsys.readouterr().out


def test_saving_an_adapter_asks_no_hub(tmp_path, monkeypatch):
    policy = with_live_adapter(load_policy("tiny", "fp32", rank=4))
    asked = []
    monkeypatch.setattr(
        peft.utils.save_and_load, "check_file_exists_on_hf_hub", lambda *name: asked.append(name)
    )
    policy.model.peft_config["default"].base_model_name_or_path = "Qwen/Qwen2.5-VL-3B-Instruct"
    optimizer = new_optimizer(policy, Settings())
    assert runs.save_state(tmp_path, policy, runs.take_state(policy, optimizer, 1, 1, 1.0))
    assert not asked
    kept = load_policy("tiny", "fp32", adapter=tmp_path / "adapter").model.state_dict()
    assert all((kept[name] == tensor).all() for name, tensor in policy.model.state_dict().items())


def test_a_run_continues_without_its_deleted_log(settings, tmp_path, monkeypatch, capsys):
    train(settings)
    (tmp_path / "run/metrics.jsonl").unlink()
    with pytest.raises(UserError, match="holds a run already"):  # its state is not overwritten
        train(settings)
    monkeypatch.setattr(runs, "FIRST_STEPS", 2)
    train(replace(settings, resume=True, samples=16))
    assert re.search(r"measured: \d+\.\d s a step", capsys.readouterr().out)


@pytest.mark.parametrize(
    "begun, now", [({}, dict(policy="tiny-several")), (dict(sam="vit_b"), dict(sam="vit_l"))]
)
def test_a_run_does_not_go_on_with_another_model_whose_shapes_may_fit(
    begun, now, settings, tmp_path
):
    runs.write_settings(tmp_path, replace(settings, **begun))
    runs.check_settings(tmp_path, replace(settings, **begun, samples=99))
    with pytest.raises(UserError, match="another model"):
        runs.check_settings(tmp_path, replace(settings, **begun | now))


def test_a_policy_and_a_sam_may_have_moved(settings, tmp_path):
    runs.write_settings(tmp_path, replace(settings, policy="a/qwen", sam="a/sam2"))
    runs.check_settings(tmp_path, replace(settings, policy="b/qwen", sam="b/sam2"))


@pytest.mark.parametrize("kind", [lambda mean: mean, float])
def test_a_value_of_a_loss_that_is_no_number_for_each_token_is_named(kind, settings):
    def loss(logp, old, reference, advantage, lengths, s):
        return -(logp * advantage).mean(), {"mine": kind(logp.detach().mean())}

    with pytest.raises(UserError, match="'mine'"):
        train(replace(settings, samples=4), loss=loss)


def test_a_reward_of_ones_own_terms_needs_none_of_the_papers(settings):
    train(replace(settings, samples=4), reward_terms=lambda reward, s: {"mine": reward.iou})


def test_a_loss_without_a_ratio_gets_no_columns_about_the_ratio(settings):
    def loss(logp, old, reference, advantage, lengths, s):
        return -(logp * advantage).mean(), {}

    train(replace(settings, samples=4), loss=loss)
    [line] = runs.read_log(Path(settings.run))
    assert "approx_kl" in line and not {"ratio_min", "clip_low"} & line.keys()


def test_a_run_starts_from_an_adapter_of_the_same_rank_and_its_base_is_the_base_model(
    settings, tmp_path
):
    first = train(replace(settings, lr=5e-3))
    start = str(tmp_path / "run/adapter")
    second = replace(settings, start_from=start, lr=1e-12, run=str(tmp_path / "second"))
    summary = train(second)
    assert summary["base"]["gIoU"] == pytest.approx(first["base"]["gIoU"])
    before = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    after = load_file(tmp_path / "second/adapter/adapter_model.safetensors")
    for name, weights in before.items():
        assert torch.allclose(weights, after[name], atol=1e-6), name
    (tmp_path / "run").rename(tmp_path / "moved")  # a resumed run needs its own state alone
    train(replace(second, resume=True))
    with pytest.raises(UserError, match="--rank 32"):
        gone = dict(start_from=str(tmp_path / "moved/adapter"), rank=4)
        train(replace(settings, run=str(tmp_path / "third"), **gone))
    file = tmp_path / "moved/adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_dropout": 0.1}))
    with pytest.raises(UserError, match="lora_dropout"):
        train(replace(settings, run=str(tmp_path / "third"), start_from=gone["start_from"]))


def test_a_run_from_an_adapter_with_another_alpha_resumes_with_this_alpha(settings, tmp_path):
    train(settings)
    start = tmp_path / "run/adapter"
    file = start / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 7}))
    s = replace(settings, start_from=str(start), run=str(tmp_path / "second"))
    weights = load_file(start / "adapter_model.safetensors")
    runs.open_run(s)  # stopped before the first save
    for resume in (False, True):
        policy, _ = loading.load_models(replace(s, resume=resume), [])
        for name, parameter in runs.adapter_of(policy).items():
            assert (weights[name.replace(".default", "")] == parameter).all(), name
    train(s)
    (tmp_path / "run").rename(tmp_path / "moved")
    policy, _ = loading.load_models(replace(s, resume=True), [])
    layers = [m for m in policy.model.modules() if hasattr(m, "lora_A")]
    assert {layer.scaling["default"] for layer in layers} == {7 / s.rank}
    train(replace(s, resume=True, samples=12))
    saved = json.loads((tmp_path / "second/adapter/adapter_config.json").read_text())
    assert saved["lora_alpha"] == 7


def half_loss(logp, old, reference, advantage, lengths, s):
    loss, values = grpo.grpo_loss(logp, old, reference, advantage, lengths, s)
    return loss / 2, values


def test_a_run_with_its_own_loss_is_continued_only_with_this_loss(settings, monkeypatch, capsys):
    with failing_update(monkeypatch, 2, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        train(settings, loss=half_loss)
    assert "train.py" not in capsys.readouterr().out  # it would train with the usual loss
    with pytest.raises(UserError, match="half_loss.*grpo_loss"):
        train(replace(settings, resume=True))
    assert train(replace(settings, resume=True), loss=half_loss)["samples"] == settings.samples


def test_an_own_function_with_a_defaults_name_is_not_the_default(settings):
    def grpo_loss(*args):
        return grpo.grpo_loss(*args)

    train(settings, loss=grpo_loss)
    assert "train.py" not in runs.resume_command(Path(settings.run), settings)
    with pytest.raises(UserError, match="own grpo_loss"):
        train(replace(settings, resume=True))


def test_a_log_whose_last_line_is_cut_off_continues_after_a_deleted_beginning(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 41}\n{"step": 42}\n{"st')
    assert [line["step"] for line in runs.read_log(tmp_path, 60)] == [41, 42]


def test_a_run_that_is_continued_in_python_keeps_its_settings(settings):
    train(settings)
    with pytest.raises(UserError, match="--lr"):
        train(replace(settings, resume=True, lr=2 * settings.lr))


def test_two_programs_do_not_train_in_one_folder(settings, tmp_path):
    runs.open_run(settings)
    hold = f"import time, filelock; held = filelock.FileLock({str(tmp_path / 'run/lock')!r})"
    other = subprocess.Popen(
        [sys.executable, "-c", f"{hold}; held.acquire(); print(flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
    )
    other.stdout.readline()
    try:
        with pytest.raises(UserError, match="--run"):
            train(replace(settings, resume=True))
    finally:
        other.kill()
        other.wait()
    train(replace(settings, resume=True))  # the lock of a killed program is free


def test_a_finished_run_is_free_for_other_programs(settings, tmp_path):
    train(settings)
    take = f"from filelock import FileLock; FileLock({str(tmp_path / 'run/lock')!r}, 0).acquire()"
    subprocess.run([sys.executable, "-c", take], check=True)


def test_a_log_that_was_deleted_during_a_run_gets_no_step_twice(settings, tmp_path):
    s = replace(settings, samples=16, save_minutes=60.0)
    train(replace(s, samples=8))
    (tmp_path / "run/metrics.jsonl").unlink()
    train(replace(s, samples=12, resume=True))  # its log has step 3 only
    log = runs.read_log(tmp_path / "run")
    line = json.dumps(log[-1] | {"step": 4})  # of a step after the saved state
    (tmp_path / "run/metrics.jsonl").write_text(json.dumps(log[-1]) + "\n" + line + "\n")
    train(replace(s, resume=True))
    assert [line["step"] for line in runs.read_log(tmp_path / "run")] == [3, 4]


def test_a_finished_run_without_its_log_is_summarised(settings, tmp_path):
    train(settings)
    (tmp_path / "run/metrics.jsonl").unlink()
    (tmp_path / "run/summary.json").unlink()
    train(replace(settings, resume=True))
    assert (tmp_path / "run/summary.json").exists()


def test_a_run_with_shorter_answers_tests_the_base_with_shorter_answers_too(settings, tmp_path):
    train(settings)
    long = json.loads((tmp_path / "run/test-base.json").read_text())
    train(replace(settings, resume=True, max_new_tokens=2))
    short = json.loads((tmp_path / "run/test-base.json").read_text())
    assert max(len(x["text"]) for x in short) < min(len(x["text"]) for x in long)


def test_a_tracker_also_gets_the_step_in_which_ctrl_c_was_pressed(settings):
    lines = []

    def log(line):
        lines.append(line["step"])

    def loss(*args):
        signal.raise_signal(signal.SIGINT)
        return grpo.grpo_loss(*args)

    with pytest.raises(SystemExit):
        train(replace(settings, updates=1, micro=4), loss=loss, log=log)
    assert lines == [1]


def test_sets_of_another_type_are_refused(settings):
    with pytest.raises(TypeError, match="Data"):
        train(settings, sets=[Shapes("train", 8)[:8]] * 3)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory")])
def test_a_machine_whose_memory_is_full_gets_one_line(error, settings, monkeypatch, capsys):
    def full(_):
        raise error

    monkeypatch.setattr(command, "run", full)
    with pytest.raises(SystemExit) as left:
        command.run_or_exit(settings)
    assert left.value.code == 2 and "--max-new-tokens" in capsys.readouterr().err


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(config, "gpu_fault", lambda: "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="--nproc_per_node"):
        config.check_gpu(Settings(device="cuda"))


@pytest.mark.parametrize(
    "terms",
    [
        lambda reward, s: {"mine": 1.0} | ({"off": 1.0} if reward.answer.objects else {}),
        lambda reward, s: {"mine": 1.0} | ({"off": 1.0} if reward.sample.kind == "part" else {}),
        lambda reward, s: {"length": 1.0},
        lambda reward, s: {"mine_max": 1.0},
        lambda reward, s: {"mine": float("nan")},
    ],
)
def test_a_term_is_finite_has_a_name_of_its_own_and_is_there_for_every_answer(terms, settings):
    with pytest.raises(UserError, match="reward term"):
        train(replace(settings, samples=8, questions=8), reward_terms=terms)


def test_a_tracker_may_change_the_log_line(settings):
    train(settings, log=lambda line: line.clear())
    assert [line["step"] for line in runs.read_log(Path(settings.run))] == [1, 2]
