"""Answers in other shapes, templates that open the answer, damaged files, and figures in notebooks."""

import copy
import hashlib
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import lenient_box, score, with_live_adapter
from nbclient import NotebookClient
from safetensors.torch import load_file, save_file

import eval as evaluate_command
import train as train_command
from samr1_mini import policy as policy_module
from samr1_mini import lenient as lenient_module
from samr1_mini import reward
from samr1_mini.config import UserError, make_settings, option
from samr1_mini.evaluation import evaluate
from samr1_mini.files import check_adapter_files
from samr1_mini.decoding import generate
from samr1_mini.grpo import Parts, new_optimizer, roll_out
from samr1_mini.lenient import read_leniently
from samr1_mini.loading import check_picture_size
from samr1_mini.policy import TINY, encode, load_policy, logprobs
from samr1_mini.reward import read_answer
from samr1_mini.reports import first_answers, base_summary
from samr1_mini.runs import load_state, save_state, take_state
from samr1_mini.tokens import CUT, answer_text, opened_answer

ROOT = Path(__file__).parent.parent

# -------------------------------------------------------------------------------- figures in notebooks

FRESH = """
import importlib, json, pkgutil, sys
from pathlib import Path
import matplotlib
matplotlib.use("svg")
before = dict(matplotlib.rcParams)
import samr1_mini
for module in pkgutil.walk_packages(samr1_mini.__path__, "samr1_mini."):
    importlib.import_module(module.name)
from samr1_mini.plots import curves
from tutorials.tiny_world.phases import draw, read_run
run = "tutorials/results/seed0"
metrics, answers = read_run(run)
curves(Path(sys.argv[1]) / "curves.png", metrics)
draw(Path(sys.argv[1]) / "phases.png", [(metrics[:20], answers[:200])])
assert matplotlib.get_backend() == "svg", matplotlib.get_backend()
assert dict(matplotlib.rcParams) == before
assert "matplotlib.pyplot" not in sys.modules
"""


def test_no_module_of_the_package_imports_pyplot_or_changes_a_backend(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", FRESH, str(tmp_path)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    for name in ("curves.png", "phases.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_figure_shows_in_a_notebook_that_imports_the_package_after_its_backend():
    cells = [
        "%matplotlib inline\nimport matplotlib.pyplot as plt\nimport samr1_mini.plots",
        "plt.plot([1, 2]);",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    where = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=where).execute()
    kinds = [kind for output in notebook.cells[1].outputs for kind in output.get("data", {})]
    assert "image/png" in kinds


# -------------------------------------------------------------------------------- shares


def asked_format(box: str, points: str = "[[15, 25, 1]]") -> str:
    return f'<think>Left.</think><answer>{{"bbox": {box}, "points": {points}}}</answer>'


@pytest.mark.parametrize(
    "box",
    [
        "[0.1, 0.2, 0.5, 0.6]",
        "[0, 0, 1, 1]",
        "[0.0, 0.0, 1.0, 0.5]",
        "[-0.1, 0.2, 0.5, 0.6]",
        "[0.001, 0.001, 0.999, 0.999]",
    ],
)
@pytest.mark.parametrize("size", [112, 840, 1000])
def test_a_box_in_shares_of_the_picture_is_not_in_the_format(box, size):
    answer = read_answer(asked_format(box), size)
    assert answer.reasoning_format and not answer.segmentation_format
    assert answer.objects is None and "shares" in answer.why
    assert lenient_box(asked_format(box), size) is None


@pytest.mark.parametrize(
    "box",
    [
        "[0, 0, 2, 1]",
        "[0.5, 0.5, 1.5, 1.5]",
        "[0, 0, 1, 30]",
        "[0.1, 0.2, 50.5, 60.6]",
    ],
)
def test_a_small_box_in_pixels_stays_in_the_format(box):
    answer = read_answer(asked_format(box), 112)
    assert answer.in_format and answer.objects[0].box == tuple(json.loads(box))


@pytest.mark.parametrize(
    "text",
    [
        "[0.1, 0.2, 0.5, 0.6]",
        '{"bbox_2d": [0.1, 0.2, 0.5, 0.6]}',
        '{"x1": 0.1, "y1": 0.2, "x2": 0.5, "y2": 0.6}',
        "<box>0.1 0.2 0.5 0.6</box>",
        "(0.1, 0.2), (0.5, 0.6)",
    ],
)
def test_shares_are_no_box_in_the_lenient_reading_either(text):
    assert lenient_box(text) is None
    assert lenient_box(f"[10, 20, 30, 40] or {text}") == (10, 20, 30, 40)


# -------------------------------------------------------------------------------- lenient reading


@pytest.mark.parametrize(
    "text",
    [
        '{"bbox_2d": [10, 20, 30, 40], "point_2d": [1, 2, 9, 9]}',
        '{"point_2d": [1, 2, 9, 9], "bbox_2d": [10, 20, 30, 40]}',
        '{"bbox": [10, 20, 30, 40], "points": [[1, 2, 9, 9]]}',
        '{"box": [10, 20, 30, 40], "keypoints": (1, 2, 9, 9)}',
        '{"box_2d": [10, 20, 30, 40], "points_2d": [1, 2, 9, 9], "size": [1, 1, 90, 90]}',
        '{"bbox": [10, 20, 30, 40], "color": [1, 2, 9, 9]}',
        '<answer>{"bbox_2d": [10, 20, 30, 40]} and not [1, 2, 9, 9]</answer>',
        '{"bbox": {"x1": 10, "y1": 20, "x2": 30, "y2": 40}, "point": [1, 2, 9, 9]}',
        '[{"bbox_2d": [1, 2, 9, 9]}, {"bbox_2d": [10, 20, 30, 40]}] on [1, 1, 90, 90]',
        '{"bbox": [[1, 2, 9, 9], [10, 20, 30, 40]]}',
        '{"bbox": [{"x1": 1, "y1": 2, "x2": 9, "y2": 9}, {"x1": 10, "y1": 20, "x2": 30, "y2": 40}]}',
    ],
)
def test_a_key_that_names_a_box_goes_before_all_other_numbers(text):
    answer = read_answer(text, 112)
    assert lenient_box(text) == (10, 20, 30, 40) and answer.objects is None


@pytest.mark.parametrize(
    "text",
    [
        '{"point_2d": [10, 20, 30, 40]}',
        '[{"point_2d": [10, 20, 30, 40], "label": "star"}]',
        '{"points": [[10, 20, 30, 40]]}',
        '{"point": (10, 20, 30, 40)}',
        '{"points_2d": (10, 20), (30, 40)}',
        '{"keypoints": [10, 20, 30, 40]}',
        '{"points": {"x1": 10, "y1": 20, "x2": 30, "y2": 40}}',
        '<points x1="10" y1="20" x2="30" y2="40" alt="star">star</points>',
        "<point>(10, 20), (30, 40)</point>",
        '{"x1": 10, "y1": 20, "x2": 30}',
        '{"x1": 10, "y1": 20, "x1": 30, "y1": 40}',
        "<box>10 20 30</box>",
        "<box>10 20 30 40 50</box>",
        '{"x1": 30, "y1": 40, "x2": 10, "y2": 20}',
    ],
)
def test_a_key_that_names_points_and_a_box_with_a_side_too_few_give_none(text):
    assert lenient_box(text) is None


@pytest.mark.parametrize(
    "text",
    [
        '{"x1": 10, "y1": 20, "x2": 30, "y2": 40}',
        '{"y2": 40, "x1": 10, "x2": 30, "y1": 20}',
        '{"label": "star", "x1": 10.0, "y1": 20, "x2": 30, "y2": 40, "score": 0.9}',
        '{"x1": "10", "y1": "20", "x2": "30", "y2": "40"}',
        '{\n "xmin": 10,\n "ymin": 20,\n "xmax": 30,\n "ymax": 40\n}',
        '{"x_min": 10, "x_max": 30, "y_min": 20, "y_max": 40}',
        '{"left": 10, "top": 20, "right": 30, "bottom": 40}',
        "Left: 10, Right: 30, Top: 20, Bottom: 40",
        "x1=10 y1=20 x2=30 y2=40",
        "<box>(10,20),(30,40)</box>",
        "<box>(10, 20), (30, 40)</box>",
        "<box>[10, 20, 30, 40]</box>",
        "<box>[[10, 20, 30, 40]]</box>",
        "<box>10 20 30 40</box>",
        "<box>10, 20, 30, 40</box>",
        "<bbox>\n10 20\n30 40\n</bbox>",
        "<|box_start|>(10,20),(30,40)<|box_end|>",
        "<|box_start|>[10, 20, 30, 40]<|box_end|>",
        "<think>Left.</think><answer><box>10 20 30 40</box><points>(15,25),(1,2)</points></answer>",
        "<box>(10,20),(30,40)</box> in a picture of (1, 1, 90, 90)",
        "<ref>cup</ref><box>(1,2),(9,9)</box><ref>star</ref><box>(10,20),(30,40)</box>",
    ],
)
def test_named_sides_and_box_tags_are_read_leniently_and_only_so(text):
    answer = read_answer(text, 112)
    assert lenient_box(text) == (10, 20, 30, 40)
    assert answer.objects is None and not answer.segmentation_format


PIECES = [
    "x1:1,",
    "{x1:1",
    "x1:1 y1:1 x2:1 x1:1 ",
    "x1:1,y1:2,x2:3,y2:4,",
    "left=1 ",
    "<box>",
    "<box>1",
    "<box>1 2 3 4",
    "<box>(1,2),(3,4)",
    "<box>[1,2,3,4]</box>",
    "<|",
    "box:",
    "box_",
    "box",
    "box:[9,9,1,1],",
    "point",
    "point:[",
    "points:[[1,2,",
    "<point",
    "{",
    "[0.1,0.2,0.3,0.4],",
]


@pytest.mark.parametrize("piece", PIECES)
def test_twice_the_hostile_text_takes_twice_as_long(piece, monkeypatch):
    monkeypatch.setattr(reward, "MAX_TEXT", 10**6)
    monkeypatch.setattr(lenient_module, "MAX_TEXT", 10**6)

    def seconds(size):
        text, taken = (piece * size)[:size], []
        for _ in range(3):
            start = time.process_time()
            read_leniently(text, 112)
            taken.append(time.process_time() - start)
        return min(taken)

    # Three doublings: linear time grows by 8, quadratic time by 64.
    assert seconds(32_000) < 24 * seconds(4_000) + 0.01


def test_all_answers_of_the_committed_run_are_read_as_when_it_was_made():
    """The sum is that of the parser with which the run was made."""
    read = hashlib.sha256()
    for line in (ROOT / "tutorials/results/seed0/answers.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        answer = read_answer(text, 112)
        formats = answer.reasoning_format, answer.segmentation_format
        box, points = None, []
        if answer.objects:
            [one] = answer.objects
            box, points = one.box, one.points
        read.update(repr((box, points, formats, lenient_box(text))).encode())
    assert read.hexdigest() == "969924d5ec206c4bfd2e5fe4594f2e3f05e2458a03fb8809c2dd3afd9988e6df"


# -------------------------------------------------------------------------------- opened answers

OPEN = ["<think>", "<think>\n", "<think>\n\n</think>\n\n"]


def opening(policy, start: str):
    """The policy with a chat template that writes `start` after the assistant's header."""
    processor = copy.deepcopy(policy.processor)
    end = "assistant\n{% endif %}"
    assert processor.chat_template.endswith(end)
    opened = f"assistant\n{start}{{% endif %}}"
    processor.chat_template = processor.chat_template.replace(end, opened)
    return replace(policy, processor=processor)


@pytest.fixture(scope="module")
def thinker():
    """The tiny base behind a template that opens <think>. Its answers then continue a thought."""
    return opening(load_policy("tiny", "fp32", rank=4), "<think>")


@pytest.mark.parametrize("start", OPEN)
def test_what_a_template_opens_is_found_and_the_instruction_is_not(policy, samples, start):
    images = [x.image for x in samples[:2]]
    questions = [samples[0].question, "the sign that says <think>"]
    with torch.no_grad():
        prompts = encode(opening(policy, start), images, questions)
        plain = encode(policy, images, questions)
    assert [p.opened for p in prompts] == [start, start]
    assert [p.opened for p in plain] == ["", ""]
    decoded = policy.processor.tokenizer.decode(prompts[0].ids)
    assert decoded.endswith(f"assistant\n{start}")


@pytest.mark.parametrize(
    "text, opened",
    [
        ("<|im_start|>user\nTOLD<|im_end|>\n<|im_start|>assistant\n", ""),
        (
            "<|im_start|>user\nTOLD<|im_end|>\n<|im_start|>assistant\n<think>\nOkay, ",
            "<think>\nOkay, ",
        ),
        ("<|im_start|>user\nTOLD Use <think>.<|im_end|>\n<|im_start|>assistant\n", ""),
        (
            "<|im_start|>system\n<think> </think><|im_end|>\nUSER: TOLD ASSISTANT: <think>",
            "<think>",
        ),
        ("USER: <think> TOLD\nASSISTANT:", ""),
        ("USER: TOLD\nASSISTANT:<think>\n</think>\n", "<think>\n</think>\n"),
    ],
)
def test_only_the_end_of_the_prompt_behind_the_users_turn_opens_an_answer(text, opened):
    assert opened_answer(text, "TOLD") == opened


@pytest.mark.parametrize(
    "opened, generated, whole",
    [
        ("", "<think>a</think>b", "<think>a</think>b"),
        ("<think>\n", "a</think>b", "<think>\na</think>b"),
        ("<think>\n", "<think>a</think>b", "<think>a</think>b"),
        ("<think>\n", "\n<think>a</think>b", "\n<think>a</think>b"),
        ("<think>\n\n</think>\n\n", "b", "<think>\n\n</think>\n\nb"),
        ("<think>\n\n</think>\n\n", "<think>a</think>b", "<think>a</think>b"),
    ],
)
def test_an_answer_has_one_think_part_however_the_template_begins(opened, generated, whole):
    assert answer_text(opened, generated, False) == whole
    assert answer_text(opened, generated, True) == whole + CUT


def test_an_opened_think_changes_texts_and_neither_tokens_nor_log_probabilities(
    thinker, samples, monkeypatch
):
    def answers():
        torch.manual_seed(0)
        with torch.no_grad():
            prompts = encode(thinker, [x.image for x in samples], [x.question for x in samples])
            groups = generate(thinker, prompts, 4, 100)
            ids = [[a.ids for a in group] for group in groups]
            return [a for group in groups for a in group], logprobs(thinker, prompts, ids)[0]

    ours, logps = answers()
    monkeypatch.setattr(policy_module, "opened_answer", lambda *_: "")
    without, same = answers()
    assert all((a.ids == b.ids).all() for a, b in zip(ours, without)) and (logps == same).all()
    for a, b in zip(ours, without):
        assert a.text in (b.text, "<think>" + b.text)
    formats = [sum(read_answer(a.text, 112).in_format for a in some) for some in (ours, without)]
    assert formats[0] > len(ours) / 2 and formats[1] <= 2


def test_rewards_logs_and_advice_see_the_whole_answer(thinker, segmenter, samples, settings):
    torch.manual_seed(0)
    rollouts, _ = roll_out(
        Parts(thinker, segmenter, None, replace(settings, max_new_tokens=100)), samples[:4]
    )
    rewards = [r for x in rollouts for r in x.rewards]
    assert sum(r.answer.reasoning_format for r in rewards) > len(rewards) / 2
    logged = first_answers(rollouts)
    assert all(line["text"].startswith("<think>") for line in logged)
    assert [line["tokens"] for line in logged] == [len(x.completions[0].ids) for x in rollouts]
    assert "Warning" not in base_summary(rollouts, settings)


@pytest.mark.parametrize("more", [{}, {"votes": 3}, {"blank": True}])
def test_evaluation_sees_the_whole_answer_too(thinker, segmenter, samples, settings, more):
    s = replace(settings, max_new_tokens=100)
    rows = evaluate(thinker, segmenter, samples[:4], s, **more).rows
    assert all(text.startswith("<think>") for row in rows for text in row.texts)
    assert sum(row.in_format for row in rows) >= 3


def folder_that_opens(tmp_path, start: str) -> Path:
    folder = tmp_path / "policy"
    shutil.copytree(TINY, folder)
    template = folder / "chat_template.jinja"
    opened = f"assistant\n{start}{{% endif %}}"
    changed = template.read_text().replace("assistant\n{% endif %}", opened)
    assert changed != template.read_text()
    template.write_text(changed)
    return folder


def test_one_picture_is_answered_behind_a_template_that_opens_think(tmp_path, samples, capsys):
    samples[0].image.save(tmp_path / "scene.png")
    evaluate_command.main(
        [
            "--preset",
            "tiny",
            "--device",
            "cpu",
            "--image",
            str(tmp_path / "scene.png"),
            "--question",
            samples[0].question,
            "--out",
            str(tmp_path / "out"),
            "--policy",
            str(folder_that_opens(tmp_path, "<think>")),
        ]
    )
    shown = capsys.readouterr().out
    assert "\n<think>" in shown and shown.count("<think>") == 1 and "mask:" in shown


@pytest.mark.parametrize(
    "text, warns",
    [
        ('<answer>{"bbox": [10, 20, 60, 70], "points": [[30, 40, 1]]}</answer>', "<think>"),
        ("It is there.", "--group"),
        (asked_format("[10, 20, 60, 70]"), ""),
    ],
)
def test_the_first_check_names_the_part_of_the_format_that_is_missing(
    text, warns, policy, segmenter, samples, settings
):
    torch.manual_seed(0)
    rollouts, _ = roll_out(
        Parts(policy, segmenter, None, replace(settings, max_new_tokens=8)), samples[:2]
    )
    for rollout in rollouts:
        for answer in rollout.completions:
            answer.text, answer.truncated = text, False
        rollout.rewards = score(segmenter, rollout.sample, [text] * 4, 112)
    warning = base_summary(rollouts, settings).partition("Warning")[2]
    assert warns in warning and bool(warning) == bool(warns)
    assert "--group" not in warning or warns == "--group"


# -------------------------------------------------------------------------------- damaged files

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def damage(file: Path, kind: str) -> None:
    """Cut a file, empty it, remove it, or put something else in its place."""
    if kind == "missing":
        file.unlink()
        return
    whole = file.read_bytes()
    contents = {
        "cut": whole[: len(whole) // 2],
        "last byte": whole[:-1],
        "pointer": POINTER,
        "empty": b"",
        "list": b"[]",
        "words": b"hello",
        "bytes": bytes(range(128, 256)) * 4,
        "object": b"{}",
    }
    file.write_bytes(contents[kind])


def refused_in_one_line(capsys, main, arguments: list) -> str:
    """Run a command that must end with code 2 and one line of error, and return that line."""
    with pytest.raises(SystemExit) as left:
        main([*map(str, arguments)])
    errors = capsys.readouterr().err
    lines = [line for line in errors.splitlines() if "error:" in line]
    assert left.value.code == 2 and len(lines) == 1 and "Traceback" not in errors, errors
    return lines[0]


def evaluation(tmp_path, *more) -> list:
    return ["--preset", "tiny", "--device", "cpu", "--count", "1", "--out", tmp_path / "out", *more]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "adapter"
    load_policy("tiny", "fp32", rank=4).model.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(adapter, tmp_path):
    """A copy of a whole adapter, to be damaged."""
    return shutil.copytree(adapter, tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["cut", "last byte", "pointer", "empty", "words", "bytes"])
def test_an_adapters_damaged_weights_are_named_in_one_line(kind, copied, tmp_path, capsys):
    file = copied / "adapter_model.safetensors"
    damage(file, kind)
    arguments = evaluation(tmp_path, "--adapter", copied)
    line = refused_in_one_line(capsys, evaluate_command.main, arguments)
    assert str(file) in line and ("empty" in line) == (kind == "empty")
    assert ("git lfs pull" in line) == (kind == "pointer")


@pytest.mark.parametrize("kind", ["cut", "pointer", "empty", "list", "words", "bytes", "object"])
def test_an_adapters_damaged_configuration_is_named_in_one_line(kind, copied):
    file = copied / "adapter_config.json"
    damage(file, kind)
    with pytest.raises(UserError) as error:
        load_policy("tiny", "fp32", adapter=copied)
    assert str(file) in str(error.value)
    assert ("git lfs pull" in str(error.value)) == (kind == "pointer")


@pytest.mark.parametrize(
    "name, value",
    [
        ("peft_type", "IA3"),
        ("peft_type", "LOHA"),
        ("peft_type", "LN_TUNING"),
        ("peft_type", None),
        ("peft_type", "NONSENSE"),
        ("peft_type", 5),
        ("r", None),
        ("r", "four"),
        ("r", 2.5),
        ("r", 2),
        ("r", 0),
        ("target_modules", None),
        ("target_modules", "("),
        ("target_modules", 7),
        ("target_modules", ["q_proj"]),
        ("lora_alpha", "x"),
    ],
)
def test_an_adapter_of_another_kind_or_with_odd_values_is_refused(name, value, copied):
    file = copied / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(UserError) as error:
        load_policy("tiny", "fp32", adapter=copied)
    assert str(file if name == "peft_type" else copied) in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: {f"{name}.other": tensor for name, tensor in w.items()},
        lambda w: dict(list(w.items())[1:]),
        lambda w: {name: tensor[:, :2].contiguous() for name, tensor in w.items()},
        lambda w: {},
    ],
)
def test_an_adapter_whose_weights_have_other_names_or_shapes_is_refused(change, copied):
    """PEFT only warns of weights with other names, and the base model was evaluated."""
    file = copied / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(UserError, match="does not fit"):
        load_policy("tiny", "fp32", adapter=copied)


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny policy's folder, to be damaged."""
    return shutil.copytree(TINY, tmp_path / "policy")


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        load_policy(str(folder), "fp32", rank=4)
    assert "\n" not in str(error.value)
    return str(error.value)


JSONS = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "generation_config.json",
]


@pytest.mark.parametrize("kind", ["cut", "pointer", "empty", "list", "words", "bytes"])
@pytest.mark.parametrize("name", JSONS)
def test_a_policys_damaged_json_is_named_before_weights_are_read(name, kind, folder, monkeypatch):
    damage(folder / name, kind)
    loader = policy_module.AutoModelForImageTextToText
    monkeypatch.setattr(loader, "from_pretrained", lambda *_, **__: 1 / 0)
    line = refused(folder)
    assert str(folder / name) in line and ("git lfs pull" in line) == (kind == "pointer")


@pytest.mark.parametrize("kind", ["object", "missing"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "processor_config.json"])
def test_a_policys_json_without_its_keys_or_missing_is_refused(name, kind, folder):
    damage(folder / name, kind)
    assert str(folder) in refused(folder)


@pytest.mark.parametrize(
    "name, value",
    [
        ("vision_config", None),
        ("text_config", None),
        ("text_config", {}),
        ("vision_config", [1]),
        ("text_config", "x"),
        ("model_type", None),
        ("model_type", ["qwen2_5_vl"]),
        ("dtype", "float99"),
    ],
)
def test_a_configuration_with_odd_values_is_refused_before_a_large_model_is_made(
    name, value, folder
):
    """Without sizes of its own the library would make a model of 70 billion weights."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    assert str(folder) in refused(folder)


@pytest.mark.parametrize("kind", ["cut", "last byte", "pointer", "empty", "words", "missing"])
def test_a_policys_damaged_weights_are_one_line(kind, folder, tmp_path, capsys):
    damage(folder / "model.safetensors", kind)
    arguments = evaluation(tmp_path, "--policy", folder)
    line = refused_in_one_line(capsys, evaluate_command.main, arguments)
    assert str(folder) in line and "model.safetensors" in line
    assert ("git lfs pull" in line) == (kind == "pointer")


def test_training_refuses_a_damaged_policy_too(folder, tmp_path, capsys):
    damage(folder / "model.safetensors", "cut")
    arguments = ["--preset", "tiny", "--device", "cpu", "--policy", folder]
    arguments += ["--run", tmp_path / "run"]
    assert "model.safetensors" in refused_in_one_line(capsys, train_command.main, arguments)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: {name: tensor for name, tensor in w.items() if "layers.1." not in name},
        lambda w: {name: tensor[..., :8].contiguous() for name, tensor in w.items()},
        lambda w: {},
    ],
)
def test_weights_that_are_not_the_configurations_are_refused_and_never_drawn(change, folder):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    assert str(folder) in refused(folder)


SECOND = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(folder):
    """The tiny policy in two shards."""
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(whole)
    places = {}
    for shard, some in ((SECOND.replace("00002-", "00001-"), names[:50]), (SECOND, names[50:])):
        save_file({name: whole[name] for name in some}, folder / shard, {"format": "pt"})
        places |= dict.fromkeys(some, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return folder


def test_a_policy_in_shards_loads(sharded):
    assert load_policy(str(sharded), "fp32", rank=4).trained


@pytest.mark.parametrize(
    "name, kind",
    [
        (SECOND, "missing"),
        (SECOND, "pointer"),
        (SECOND, "last byte"),
        (SECOND, "empty"),
        (INDEX, "cut"),
        (INDEX, "pointer"),
        (INDEX, "list"),
        (INDEX, "object"),
        (INDEX, "missing"),
    ],
)
def test_a_damaged_shard_or_index_is_named(name, kind, sharded):
    damage(sharded / name, kind)
    line = refused(sharded)
    assert str(sharded) in line and name in line
    assert ("git lfs pull" in line) == (kind == "pointer")


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "..\\model.safetensors", "", None, "config.json"],
)
def test_an_index_opens_no_file_outside_its_folder_and_no_other_kind(name, sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["more"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    line = refused(sharded)
    assert str(sharded / INDEX) in line and repr(str(name)) in line


def test_quantised_weights_are_refused_before_they_are_loaded(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    assert "has quantised weights" in refused(folder)


@pytest.mark.parametrize(
    "error, word",
    [
        (OSError("The paging file is too small (os error 1455)"), "the memory is too small"),
        (MemoryError(), "the memory is too small"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "memory is too",
        ),
        (OSError("header too large"), "if its files are damaged"),
    ],
)
def test_too_little_memory_is_not_blamed_on_the_files(error, word, folder, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(policy_module.AutoModelForImageTextToText, "from_pretrained", fail)
    assert word in refused(folder)


def test_a_picture_size_that_the_processor_changes_is_refused(policy):
    check_picture_size(policy, make_settings(preset="tiny", device="cpu", image_size=112)[0])
    s, _ = make_settings(preset="tiny", device="cpu", image_size=840)
    with pytest.raises(UserError, match="--image-size 840.* 490 x 490 .*--image-size 490 or less"):
        check_picture_size(policy, s)
    check_picture_size(replace(policy, coordinates="thousandths"), s)  # fit every size


def test_an_adapter_that_is_not_there_or_is_a_run_is_refused_by_its_name(tmp_path):
    with pytest.raises(UserError, match="--adapter .*nowhere"):
        check_adapter_files(tmp_path / "nowhere")
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    with pytest.raises(UserError, match="--start-from .*run is no adapter. Name .*run/adapter"):
        check_adapter_files(tmp_path / "run", "--start-from")


def test_an_index_that_lacks_weights_is_refused(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] = dict(list(index["weight_map"].items())[:50])
    (sharded / INDEX).write_text(json.dumps(index))
    assert str(sharded) in refused(sharded)


@pytest.mark.parametrize("kind", ["cut", "pointer", "empty", "words", "bytes", "missing"])
def test_a_damaged_chat_template_is_refused(kind, folder):
    damage(folder / "chat_template.jinja", kind)
    assert str(folder) in refused(folder)


def test_a_template_that_leaves_out_the_picture_or_the_question_is_refused(folder):
    file = folder / "chat_template.jinja"
    whole = file.read_text()
    for part in ("<|image_pad|>", "{{ part.text }}"):
        assert part in whole
        file.write_text(whole.replace(part, ""))
        assert "template" in refused(folder)


def test_out_of_memory_is_not_taken_for_a_damaged_file(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(policy_module.AutoModelForImageTextToText, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_policy("tiny", "fp32", rank=4)


# -------------------------------------------------------------------------------- a damaged state


@pytest.fixture(scope="module")
def learner():
    """A policy and its optimizer after one update."""
    policy = with_live_adapter(load_policy("tiny", "fp32", rank=4))
    optimizer = new_optimizer(policy, make_settings(preset="tiny", device="cpu")[0])
    for parameter in policy.trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return policy, optimizer


@pytest.fixture(scope="module")
def taken(learner):
    """Their state. It is taken before a test loads a damaged one into them."""
    return take_state(*learner, 3, 60, 1.5)


def test_a_whole_state_is_put_back(learner, taken, tmp_path):
    policy, optimizer = learner
    assert save_state(tmp_path, policy, taken)
    with torch.no_grad():
        policy.trained[0].zero_()
    assert load_state(tmp_path, policy, optimizer) == (3, 60, 1.5)
    again = take_state(policy, optimizer, 3, 60, 1.5)
    assert all(
        (again["adapter"][name] == tensor).all() for name, tensor in taken["adapter"].items()
    )
    assert again["optimizer"]["state"].keys() == taken["optimizer"]["state"].keys()


@pytest.mark.parametrize("kind", ["cut", "last byte", "pointer", "empty", "words", "bytes", "list"])
def test_a_damaged_state_is_named_in_one_line(kind, learner, taken, tmp_path):
    file = tmp_path / "state.pt"
    torch.save(taken, file)
    damage(file, kind)
    with pytest.raises(UserError) as error:
        load_state(tmp_path, *learner)
    assert str(file) in str(error.value) and "weights_only" not in str(error.value)
    assert ("git lfs pull" in str(error.value)) == (kind == "pointer")


def test_no_bytes_in_a_states_place_raise_anything_else(learner, tmp_path):
    torch.manual_seed(0)
    for i in range(100):
        length = 1 + i // 2
        (tmp_path / "state.pt").write_bytes(bytes(torch.randint(256, (length,)).tolist()))
        with pytest.raises(UserError):
            load_state(tmp_path, *learner)


def other_moments(state):
    state["optimizer"]["state"][0]["exp_avg"] = torch.ones(2, 2)


def no_step(state):
    del state["optimizer"]["state"][0]["step"]


def fewer_parameters(state):
    state["optimizer"]["param_groups"][0]["params"] = [0, 1]


def other_adapter(state):
    name = next(iter(state["adapter"]))
    state["adapter"][name] = state["adapter"][name][:1]


def less_adapter(state):
    state["adapter"].popitem()


@pytest.mark.parametrize(
    "change",
    [
        other_moments,
        no_step,
        fewer_parameters,
        other_adapter,
        less_adapter,
        lambda state: state.pop("step"),
        lambda state: state.pop("asked"),
        lambda state: state.pop("adapter"),
        lambda state: state.update(step="3"),
        lambda state: state.update(asked="60"),
        lambda state: state.update(optimizer={}),
        lambda state: state.update(optimizer=5),
        lambda state: state.update(adapter={"a": 1}),
        lambda state: state["optimizer"].update(state=[1]),
    ],
)
def test_a_state_with_other_shapes_or_parts_is_refused(change, learner, taken, tmp_path):
    state = copy.deepcopy(taken)
    change(state)
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(UserError, match="state.pt"):
        load_state(tmp_path, *learner)


def test_resume_refuses_a_cut_state_with_code_2(tmp_path, capsys):
    run = tmp_path / "run"
    small = dict(
        eval_every=0,
        eval_samples=2,
        test_samples=2,
        max_new_tokens=8,
        questions=2,
        updates=1,
        group=2,
        samples=2,
    )
    options = [text for name, value in small.items() for text in (option(name), str(value))]
    with pytest.raises(SystemExit):  # answers of 8 tokens get no reward, so the run learns nothing
        train_command.main(["--preset", "tiny", "--device", "cpu", "--run", str(run), *options])
    capsys.readouterr()
    (run / "state.pt").write_bytes(POINTER)
    again = ["--resume", "--run", run, "--samples", "4"]
    line = refused_in_one_line(capsys, train_command.main, again)
    assert str(run / "state.pt") in line and "git lfs pull" in line
