"""README and notes: links, commands, functions and file names are right."""

import ast
import re
import shlex
from pathlib import Path

from samr1_mini import config
from samr1_mini.config import MEMORY

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_links_and_pictures_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXT):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_three_method_files_have_at_most_400_lines_and_no_line_is_longer_than_120():
    for name in ("policy", "reward", "grpo"):
        assert (ROOT / f"samr1_mini/{name}.py").read_text().count("\n") <= 500, name
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
    for preset, (card, free) in MEMORY.items():
        assert f"| `{preset}` | above {card:g} | above {free:g} |" in TEXT


def test_the_method_knows_nothing_of_the_drawn_world():
    for name in ("policy", "reward", "grpo", "attention", "decoding", "tokens", "segmenter"):
        tree = ast.parse((ROOT / f"samr1_mini/{name}.py").read_text())
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


def commands():
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(("python ", "accelerate ")):
                yield shlex.split(line.split(" #")[0])[1:]


def test_every_command_parses(monkeypatch):
    import eval as eval_command
    from samr1_mini.config import parse_settings

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        config, "check_machine", lambda *_: None
    )  # full-size commands are for a GPU
    monkeypatch.setattr(eval_command, "check_machine", lambda *_: None)
    seen = list(commands())
    assert len(seen) >= 6
    for argv in seen:
        if argv[0] == "launch":
            argv = argv[argv.index("train.py") :]
        if argv[0] == "train.py" and "--resume" not in argv:
            argv = [re.sub("FILE", "weights.pth", a) for a in argv]
            parse_settings(argv[1:], "train.py", "")
        elif argv[0] == "eval.py":
            eval_command.parse(
                [re.sub("runs/tiny-seed0", "tutorials/results/seed0", a) for a in argv[1:]]
            )
        elif argv[0] == "-m" and argv[1] != "pytest":
            assert (ROOT / (argv[1].replace(".", "/") + ".py")).exists(), argv


def test_the_test_command_is_the_one_that_ci_runs():
    command = "python -m pytest tests"
    assert command in TEXT and command in (ROOT / ".ci/run").read_text()
