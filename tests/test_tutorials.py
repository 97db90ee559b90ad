"""The notebooks run from top to bottom, hold their outputs, and ask before they show; the ablations' table is what its lines say."""

import csv
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from samr1_mini.config import Settings, parse_settings

TUTORIALS = Path(__file__).parent.parent / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
sys.path.insert(0, str(TUTORIALS))  # ablations.py stands there


def texts(notebook, kind):
    return [cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == kind]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom_without_network(notebook, monkeypatch):
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    NotebookClient(nbformat.read(notebook, 4), timeout=900, kernel_name="python3", resources={"metadata": {"path": str(TUTORIALS)}}).execute()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebooks_outputs_are_committed_in_order_and_without_errors(notebook):
    cells = [cell for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell.outputs) for cell in cells) >= 0.6 * len(cells)
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert notebook.stat().st_size < 2**20 and str(Path.home()) not in notebook.read_text() and "/work/" not in notebook.read_text()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_asks_for_a_prediction_and_answers_it_in_the_next_cell(notebook):
    cells = nbformat.read(notebook, 4).cells
    asking = [i for i, cell in enumerate(cells) if cell.cell_type == "markdown" and "**Predict" in cell.source]
    assert len(asking) >= 2
    assert all(cells[i + 1].cell_type == "code" and (cells[i + 1].outputs or cells[i + 2].get("outputs")) for i in asking)


def test_the_animation_moves_and_is_small(tmp_path):
    import animate

    film = TUTORIALS / "results" / "learning.gif"
    with Image.open(film) as image:
        assert image.n_frames >= 8 and film.stat().st_size < 2 * 2**20
    for step, shade in ((0, 10), (2, 200), (10, 90)):
        Image.new("RGB", (40, 20), (shade, 0, 0)).save(tmp_path / f"sheet-{step:05d}.png")
    assert animate.animate(tmp_path, tmp_path / "x.gif", 20, 0.1) == 3
    with Image.open(tmp_path / "x.gif") as image:
        shades = [image.seek(i) or image.convert("RGB").getpixel((5, 5))[0] for i in range(3)]
    assert shades == pytest.approx([10, 200, 90], abs=6)
    with pytest.raises(SystemExit, match="lower --eval-every"):
        animate.animate(TUTORIALS, tmp_path / "y.gif", 20, 0.1)


def test_links_between_notebooks_lead_somewhere():
    assert len(NOTEBOOKS) >= 5
    for notebook in NOTEBOOKS:
        for target in re.findall(r"\]\(([^)]+\.\w+)\)", "\n".join(texts(notebook, "markdown"))):
            assert target.startswith("http") or (TUTORIALS / target).exists(), (notebook.name, target)


def test_every_option_that_a_notebook_names_exists():
    own = {"adapter", "split", "count", "blank", "mirror", "image", "question", "merge", "out", "help", "num-processes", "num_processes", "no-points", "rows"}
    known = {name.replace("_", "-") for name in Settings.__dataclass_fields__} | own
    for notebook in NOTEBOOKS:
        for option in re.findall(r"(?<![\w-])--([a-z][\w-]+)", "\n".join(texts(notebook, "markdown") + texts(notebook, "code"))):
            assert option in known, (notebook.name, option)


def test_the_committed_ablations_hold_every_seed_once_and_only_rows_that_can_be_run_again():
    import ablations

    with ablations.FILE.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len({(line["row"], line["seed"]) for line in lines}) == len(lines) >= 5
    for line in lines:
        assert ablations.ROWS[line["row"]] == line["options"]


def ablation_rows():
    """The README's table: every row that has runs, with the options it changes."""
    import ablations

    lines = ablations.read()
    for row in dict.fromkeys(row for title in ablations.TABLES for row in ablations.rows_of(lines, title)):
        runs, mean, apart, paper = ablations.cells(lines, row)
        assert int(runs) >= 5, row
        yield f"| {row} | {f'`{ablations.ROWS[row]}`' if ablations.ROWS[row] else ''} | {mean} | {apart} | {paper} |"


def test_the_readmes_table_of_ablations_is_what_the_committed_runs_say():
    text = (TUTORIALS.parent / "README.md").read_text()
    stated = text[text.index("| row | options |") :].split("\n\n")[0].splitlines()[2:]
    assert stated == list(ablation_rows()), "\n".join(ablation_rows())


def test_what_the_readme_says_of_the_ablations_is_in_their_lines():
    import ablations

    lines, text = ablations.read(), " ".join((TUTORIALS.parent / "README.md").read_text().split())
    mean = lambda row, measure: ablations.compare(lines, row, measure)["mean"][0]
    apart = {row: ablations.compare(lines, row)["difference"] for row in ablations.ROWS if row in {line["row"] for line in lines}}
    worse = {row for row, (difference, half) in apart.items() if difference + half < 0}
    assert worse == {"G = 2", "rank 128", "lr 2e-3", "112 samples"} and not [row for row, (difference, half) in apart.items() if difference - half > 0]
    assert "Groups of 2, a rank of 128, a learning rate of 2e-3 and 112 questions are worse" in text
    lengths = [mean(row, "length") for row in ("3008 samples", "3008 samples, beta 0")]
    assert "(answers of {:.0f} tokens against {:.0f})".format(*lengths) in text and mean("3008 samples, beta 0", "format") > 0.99
    boxes = [100 * mean(row, "box_accuracy") for row in ("box IoU", "base")]
    assert "of which {:.0f} % reach an IoU of 0.5, against {:.0f} %".format(*boxes) in text


def test_every_interval_that_notebook_5_quotes_is_that_of_its_runs(monkeypatch):
    import ablations

    lines, known = ablations.read(), set()
    others = {"G = 4": "G = 16", "10000 samples": "3008 samples"}  # what its text compares beside the tables
    for base, rows in ((ablations.BASE, list(ablations.ROWS)[1:]), (others, others)):
        monkeypatch.setattr(ablations, "BASE", base)
        known |= {"{:+.3f} ± {:.3f}".format(*ablations.compare(lines, row, measure)["difference"]) for row in rows for measure in ablations.TESTED}
    [notebook] = TUTORIALS.glob("5*.ipynb")
    quoted = re.findall(r"[+-]\d\.\d{3} ± \d\.\d{3}", "\n".join(texts(notebook, "markdown")))
    assert len(quoted) >= 5 and not set(quoted) - known


def test_the_papers_figures_stand_beside_the_rows_that_repeat_its_tables():
    import ablations

    shown = {row: ablations.cells(ablations.read(), row)[3] for row in ("base", "threshold 0.5", "threshold 0.7", "threshold 0.8", "G = 2")}
    assert shown == {"base": "60.2", "threshold 0.5": "56.5", "threshold 0.7": "56.2", "threshold 0.8": "58.6", "G = 2": ""}
    assert [ablations.PAPER[row] for row in ("GRPO", "GRPO + token-level", "GRPO + clip-higher")] == ["57.8", "58.0", "59.1"]
    switched = {row: parse_settings(["--preset", "tiny", "--device", "cpu", *options.split()], "train.py", "")[0] for row, options in ablations.ROWS.items()}
    assert (switched["GRPO"].normalise, switched["GRPO"].eps_high, switched["base"].normalise, switched["base"].eps_high) == ("sequence", 0.2, "token", 0.3)
    assert (switched["GRPO + token-level"].normalise, switched["GRPO + token-level"].eps_high) == ("token", 0.2)
    assert (switched["GRPO + clip-higher"].normalise, switched["GRPO + clip-higher"].eps_high) == ("sequence", 0.3)


def test_an_ablation_that_was_stopped_halfway_goes_on_and_else_starts_anew_in_a_folder_of_its_own(tmp_path, monkeypatch):
    import ablations

    commands = []
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    monkeypatch.setattr(ablations.subprocess, "run", lambda command, **_: commands.append(command) or SimpleNamespace(returncode=1, stderr="disk full"))
    folder = tmp_path / "runs" / "ablations" / "112-samples-seed0"
    for saved in ("metrics.jsonl", "state.pt"):  # a run without a saved state cannot go on
        folder.mkdir(parents=True, exist_ok=True)
        (folder / saved).touch()
        with pytest.raises(RuntimeError, match="112 samples, seed 0: disk full"):
            ablations.one_run("112 samples", 0)
        assert ("--resume" in commands[-1]) == folder.exists() == (saved == "state.pt")
    for row in ablations.ROWS:
        with pytest.raises(RuntimeError):
            ablations.one_run(row, 1)
    assert len({command[command.index("--run") + 1] for command in commands}) == 1 + len(ablations.ROWS)


def test_a_figure_of_ablations_has_a_dot_a_seed_and_the_intervals_of_its_table():
    import ablations

    lines = [{"row": row, "seed": s, "gIoU": 0.7 + 0.02 * s + shift + 0.01 * s * shift} for row, shift in (("base", 0), ("no points", 0.05), ("G = 2", -0.1)) for s in range(5)]
    figure = ablations.draw(lines, ["points", "group"])
    dots = [line.get_xdata() for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    assert np.concatenate(dots) == pytest.approx([0.05 + 0.0005 * s for s in range(5)] + [-0.1 - 0.001 * s for s in range(5)])
    far = ablations.draw([line | {"gIoU": line["gIoU"] - 0.2 * (line["row"] == "G = 2")} for line in lines], ["points", "group"]).axes[0]
    assert far.get_xlim() == figure.axes[0].get_xlim() == ablations.draw(lines, ["points"]).axes[0].get_xlim()  # one scale for all tables
    assert [text.get_text() for text in far.texts] == ["← -0.302 ± 0.002"] and not figure.axes[0].texts
    assert len([line for line in far.get_lines() if line.get_marker() == "o"]) == 1
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["points", "no points", "group", "G = 2"]


@pytest.mark.parametrize("count", [2, 3, 5, 8, 10])
def test_intervals_hold_95_percent_of_students_t_and_differences_are_paired_by_seed(count):
    import ablations

    values = np.random.default_rng(0).normal(0.7, 0.03, count)
    mean, half = ablations.interval(values.tolist())
    x = np.linspace(-1000, 1000, 4_000_001)
    density = (1 + x**2 / (count - 1)) ** (-count / 2)  # Student's t with count - 1 degrees of freedom, up to a factor
    inside = density[abs(x) <= half / (values.std(ddof=1) / np.sqrt(count))].sum() / density.sum()
    assert mean == pytest.approx(values.mean()) and inside == pytest.approx(0.95, abs=2e-3)
    lines = [{"row": "base", "seed": s, "gIoU": v} for s, v in enumerate(values)] + [{"row": "x", "seed": s, "gIoU": v + 0.01} for s, v in enumerate(values)][::-1]
    x = ablations.compare(lines, "x")
    assert x["difference"] == pytest.approx((0.01, 0.0), abs=1e-9) and x["runs"] == count


def test_the_long_run_without_kl_is_compared_with_the_run_as_long_as_it():
    import ablations

    lines = [{"row": row, "seed": s, "gIoU": value + 0.01 * s} for row, value in (("base", 0.7), ("3008 samples", 0.75), ("3008 samples, beta 0", 0.74)) for s in range(5)]
    assert ablations.compare(lines, "3008 samples, beta 0")["difference"] == pytest.approx((-0.01, 0.0), abs=1e-9)
    assert ablations.compare(lines, "3008 samples")["difference"] == pytest.approx((0.05, 0.0), abs=1e-9)
    assert ablations.rows_of(lines, "KL, against 3008 samples") == ["3008 samples", "3008 samples, beta 0"]
    assert ablations.cells(lines, "3008 samples, beta 0")[2] == "-0.010 ± 0.000 against 3008 samples"
