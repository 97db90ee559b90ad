"""README and notes: links, commands, functions, file names and lengths are right."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from samr1_mini import config
from samr1_mini.config import MEMORY

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("tutorials/notes/*.md"))]
NAMES = [page.name for page in PAGES]
TEXT = README.read_text()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_each_note_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((tutorials/notes/[^)#]+)\)", TEXT))
    assert linked == {str(page.relative_to(ROOT)) for page in PAGES[1:]}


def test_the_readme_is_short():
    assert TEXT.count("\n") <= 240 and len(TEXT.split()) <= 2600


def test_the_three_method_files_have_at_most_400_lines_and_no_line_is_longer_than_120():
    for name in ("policy", "reward", "grpo"):
        assert (ROOT / f"samr1_mini/{name}.py").read_text().count("\n") <= 400, name
    files = [*ROOT.glob("*.py")]
    for folder in ("samr1_mini", "tests", "tutorials"):
        files += (ROOT / folder).rglob("*.py")
    long = [
        f"{file.name}:{number}"
        for file in files
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if len(line) > 120
    ]
    assert len(files) > 50 and not long, long


def test_the_memory_of_each_preset_is_what_the_program_asks_for():
    text = (ROOT / "tutorials/notes/gpu.md").read_text()
    for preset, (card, free) in MEMORY.items():
        assert f"| `{preset}` | above {card:g} | above {free:g} |" in text


def test_the_method_knows_nothing_of_the_drawn_world():
    files = {file.stem: file for file in (ROOT / "samr1_mini").glob("*.py")}
    method = ("policy", "reward", "grpo", "attention", "replay", "decoding", "tokens", "segmenter")
    for name in files.keys() & set(method):
        tree = ast.parse(files[name].read_text())
        imported = [
            node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
        ]
        assert not [module for module in imported if "tiny" in module], name


def test_every_function_in_the_equation_table_exists_in_its_file():
    rows = re.findall(r"`(\w+\.py)`: ((?:`\w+`(?:, )?)+)", TEXT)
    assert len(rows) >= 8
    for file, names in rows:
        tree = ast.parse((ROOT / "samr1_mini" / file).read_text())
        defined = {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        }
        assert set(re.findall(r"`(\w+)`", names)) <= defined, (file, names)


def files_of_the_tree():
    """The paths of all .py files in the README's tree. A folder is indented by four spaces.

    A line can list several files: "a.py, b.py   a description".
    """
    block = re.search(r"```text\n(train\.py .*?)```", TEXT, re.S)[1]
    folders, found = [], []
    for line in block.splitlines():
        names = re.match(r"\s*([^\s,]+(?:, [^\s,]+)*)", line)[1].split(", ")
        depth = (len(line) - len(line.lstrip())) // 4
        folders = folders[:depth]
        if names[0].endswith("/"):
            folders.append(names[0])
        for name in names:
            if name.endswith(".py"):
                found.append("".join(folders) + name)
    return found


def test_the_file_tree_lists_each_file_of_the_package_once():
    listed = files_of_the_tree()
    files = ["train.py", "eval.py"]
    for file in (ROOT / "samr1_mini").rglob("*.py"):
        if file.name != "__init__.py":
            files.append(file.relative_to(ROOT).as_posix())
    assert sorted(listed) == sorted(files)


def commands(page):
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(("python ", "accelerate ")):
                yield shlex.split(line.split(" #")[0])[1:]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_parses(page, monkeypatch):
    import eval as eval_command
    from samr1_mini.config import parse_settings

    monkeypatch.chdir(ROOT)
    # full-size commands are for a GPU
    monkeypatch.setattr(config, "check_machine", lambda *_: None)
    monkeypatch.setattr(eval_command, "check_machine", lambda *_: None)
    for argv in commands(page):
        if argv[0] == "launch":
            argv = argv[argv.index("train.py") :]
        if argv[0] == "train.py" and "--resume" not in argv:
            argv = [re.sub("FILE", "weights.pth", a) for a in argv]
            parse_settings(argv[1:], "train.py", "")
        elif argv[0] == "eval.py":
            eval_command.parse(
                [re.sub("runs/tiny-seed0", "tutorials/results/seed0", a) for a in argv[1:]]
            )
        elif argv[0] == "-m" and argv[1] not in ("pytest", "venv"):
            assert (ROOT / (argv[1].replace(".", "/") + ".py")).exists(), argv
        elif argv[0].endswith(".py"):
            assert (ROOT / argv[0]).exists(), argv


def test_the_pages_hold_enough_commands_for_these_tests():
    assert len(list(commands(README))) >= 6
    assert sum(len(list(commands(page))) for page in PAGES) >= 15


def test_the_test_command_is_the_one_that_ci_runs():
    command = "python -m pytest tests"
    assert command in TEXT and command in (ROOT / ".ci/run").read_text()
