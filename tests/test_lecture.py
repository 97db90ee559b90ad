"""The plan for lecturers names things that exist, and figures.py writes every figure of the course."""

import ast
import json
import os
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from samr1_mini.columns import COLUMNS
from samr1_mini.config import Settings, option
from tutorials import figures

ROOT = Path(__file__).parent.parent
TUTORIALS = ROOT / "tutorials"
LECTURE = (TUTORIALS / "lecture.md").read_text(encoding="utf-8")
PROSE = re.sub("```.*?```", "", LECTURE, flags=re.S)
NAMED = sorted(set(re.findall("`([^`]+)`", PROSE)))


# ------------------------------------------------------------------------------ figures.py


def test_every_figure_of_the_course_is_written_and_opens(tmp_path, capsys):
    wanted = [file.name for file in (TUTORIALS / "results").glob("*.png")]
    for notebook in TUTORIALS.glob("*.ipynb"):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        count = sum("image/png" in output.get("data", {}) for output in outputs)
        wanted += [f"{notebook.stem}-{k}.png" for k in range(1, count + 1)]
    figures.main(["--out", str(tmp_path / "new" / "figures")])
    written = list((tmp_path / "new" / "figures").iterdir())
    assert sorted(file.name for file in written) == sorted(wanted) and len(wanted) > 20
    assert f"{len(wanted)} figures" in capsys.readouterr().out
    for file in written:
        with Image.open(file) as picture:
            picture.load()
            assert picture.format == "PNG" and min(picture.size) > 20, file.name


def test_the_first_figure_of_a_notebook_is_its_first_png_output(tmp_path):
    notebook = TUTORIALS / "3_grpo_by_hand.ipynb"
    found = re.search(r'"image/png": "([^"\\]{40})', notebook.read_text(encoding="utf-8"))
    figure = figures.course_figures()["3_grpo_by_hand-1.png"]
    assert figure.startswith(figures.base64.b64decode(found[1]))


def error_of(folder, capsys):
    """Return the line on stderr of the command that cannot write to a folder."""
    with pytest.raises(SystemExit) as ended:
        figures.main(["--out", str(folder)])
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and str(folder) in line
    return line


def test_a_filled_folder_stays_as_it_is(tmp_path, capsys):
    (tmp_path / "loop.png").write_text("mine")
    assert "not empty" in error_of(tmp_path, capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["loop.png"]
    assert (tmp_path / "loop.png").read_text() == "mine"


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert "this is a file" in error_of(tmp_path / "file", capsys)
    assert "Not a directory" in error_of(tmp_path / "file" / "figures", capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_without_permission_is_one_line(tmp_path, capsys, monkeypatch):
    if os.geteuid() == 0:  # root may write everywhere

        def refuse(path, *options, **more):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "mkdir", refuse)
    tmp_path.chmod(0o500)
    assert "Permission denied" in error_of(tmp_path / "figures", capsys)
    tmp_path.chmod(0o700)


# ------------------------------------------------------------------------------ lecture.md


def defined(file):
    """Return the functions and classes of a Python file, and methods as Class.method."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [one for one in node.body if isinstance(one, ast.FunctionDef)]
            names |= {f"{node.name}.{one.name}" for one in methods}
    return names


def options_of(text):
    return set(re.findall(r'"(--[a-z][\w-]+)"', text))


def fault(name):
    """Return what is wrong with a name in backticks, or nothing.

    A name is a path from the root, `path: function`, an option, or a column of the log.
    """
    path, colon, function = name.partition(": ")
    if colon:
        file = ROOT / path
        if not file.is_file():
            return f"{path} does not exist"
        return "" if function in defined(file) else f"{path} does not define {function}"
    if name.startswith("--"):
        known = {option(field) for field in Settings.__dataclass_fields__}
        for script in ("train_mine", "find_bugs", "conftest"):
            known |= options_of((TUTORIALS / f"assignment/{script}.py").read_text())
        return "" if name.split()[0] in known else f"no option is called {name}"
    if "/" in name or re.search(r"\.\w+$", name):
        return "" if (ROOT / name).exists() else f"{name} does not exist"
    return "" if name in COLUMNS else f"{name} is no column of the log"


@pytest.mark.parametrize("name", NAMED)
def test_a_name_in_backticks_exists(name):
    assert not fault(name), fault(name)


def test_each_notebook_and_enough_functions_are_named():
    assert {str(file.relative_to(ROOT)) for file in TUTORIALS.glob("*.ipynb")} <= set(NAMED)
    assert sum(": " in name for name in NAMED) >= 14


def test_a_wrong_name_is_a_fault():
    assert fault("tutorials/9_no.ipynb") and fault("samr1_mini/grpo.py: advantage")
    assert fault("samr1_mini/no.py: advantages") and fault("--no-such") and fault("zero_varianze")
    assert not fault("samr1_mini/grpo.py: advantages") and not fault("zero_variance")
    assert not fault("samr1_mini/policy.py: Policy.as_reference") and not fault("--redraw")


def test_every_command_starts_a_file_that_exists():
    lines = "\n".join(re.findall("```bash\n(.*?)```", LECTURE, re.S)).splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line]
    assert len(commands) >= 4
    for words in commands:
        assert words[0] == "python", words
        paths = [word for word in words[1:] if "/" in word and "FOLDER" not in word]
        assert paths and all((ROOT / path).exists() for path in paths), words


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", LECTURE, re.S | re.M)[1]


def test_the_three_blocks_of_time_have_90_minutes_each():
    for title in ("Lecture 1", "Lecture 2", "Lab"):
        [text] = re.findall(rf"^## ({title}.*?)(?=^## )", LECTURE, re.S | re.M)
        assert sum(map(int, re.findall(r"^### .*\((\d+) minutes\)$", text, re.M))) == 90, title


def test_each_block_has_a_goal_something_to_show_a_question_and_an_answer():
    blocks = re.findall(r"^### [^\n]*minutes\)\n(.*?)(?=^##|\Z)", LECTURE, re.S | re.M)
    assert len(blocks) >= 15
    for block in blocks:
        assert re.findall(r"^- \*\*(\w+)\*\*", block, re.M) == ["Goal", "Show", "Ask", "Answer"]


def content_of_the_page():
    page = (TUTORIALS / "results/report.html").read_text(encoding="utf-8")
    content = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    return json.loads(content)


def group_of(content, number, question):
    [step] = [step for step in content["steps"] if step["step"] == number]
    [group] = [group for group in step["groups"] if group["question"] == question]
    return group


def test_the_page_shows_what_the_plan_says():
    content = content_of_the_page()
    named = re.findall(r'step (\d+), "([^"]+)"', LECTURE)
    groups = [group_of(content, int(number), question) for number, question in named]
    sentence, equal, last = groups
    worst = sorted(sentence["answers"], key=lambda answer: -answer["reward"])[-1]
    assert "".join(worst["tokens"]).startswith("The purple square") and worst["reward"] == 0
    assert {answer["reward"] for answer in equal["answers"]} == {6}
    [step] = [step for step in content["steps"] if last in step["groups"]]
    assert [group["update"] for group in step["groups"]] == [1, 4]
    log, run = content["log"], LECTURE.partition("### 6. A run")[2]
    assert f"`segmentation_format` is {log['segmentation_format'][29]:.2f}" in run
    assert f"`iou` is {log['iou'][29]:.2f} there, and {log['iou'][-1]:.2f} in the last" in run


def test_the_glossary_has_the_25_words():
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", section("Glossary"), re.M)[1:]  # [0] the head
    words = "policy, rollout, group, reward, advantage, baseline, ratio, clip, KL, base model, "
    words += "reference, on-policy, importance sampling, entropy, temperature, token, logit, "
    words += "greedy answer, IoU, gIoU, cIoU, LoRA, NF4, packed row, ablation"
    assert [word for word, _ in rows] == words.split(", ")
    assert all(text.endswith(".") and text.count(". ") == 0 for _, text in rows)
