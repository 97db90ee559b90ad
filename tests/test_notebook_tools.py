"""The files that notebooks use: set-up, exercises, and figures with sliders."""

import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

TUTORIALS = Path(__file__).parent.parent / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
sys.path.insert(0, str(TUTORIALS))

import start
import touch

from samr1_mini.data import load_data
from samr1_mini.metrics import tight_box
from samr1_mini.segmenter import load_segmenter


def cells_of(notebook):
    return nbformat.read(notebook, 4).cells


# ------------------------------------------------------------------------------- start.py


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_all_notebooks_start_with_the_same_three_lines(notebook):
    first = [cell for cell in cells_of(notebook) if cell.cell_type == "code"][0].source
    other = [cell for cell in cells_of(NOTEBOOKS[0]) if cell.cell_type == "code"][0].source
    assert first == other and len(first.splitlines()) == 3 and "start.py" in first


def test_a_function_that_is_not_written_yet_does_not_stop_the_notebook(capsys):
    with start.exercise():
        raise NotImplementedError
    assert "Not written yet" in capsys.readouterr().out
    with pytest.raises(NotImplementedError, match="for Bool"):  # an error of PyTorch
        with start.exercise():
            raise NotImplementedError("not implemented for Bool")


def test_a_wrong_function_stops_the_notebook_and_a_right_one_is_praised(capsys):
    with pytest.raises(AssertionError, match="IoU"):
        with start.exercise():
            assert 1 == 2, "IoU of equal masks is 1"
    with start.exercise():
        assert 1 == 1
    assert "Right" in capsys.readouterr().out


def test_a_package_that_was_updated_after_it_was_loaded_is_named(monkeypatch):
    assert start.stale_packages() == []
    monkeypatch.setattr(np, "__version__", "1.0")
    assert start.stale_packages() == ["numpy"]
    assert start.stale_packages(("a_package_that_is_not_loaded",)) == []


# --------------------------------------------------------------------------------- exercises


def exercises(notebook):
    """Each function that the reader writes: the index of its cell, and its solution."""
    cells = cells_of(notebook)
    for i, cell in enumerate(cells):
        if cell.cell_type == "code" and "raise NotImplementedError" in cell.source:
            after = "\n".join(c.source for c in cells[i + 1 : i + 4] if c.cell_type == "markdown")
            solution = re.search(r"```python\n(.*?)```", after, re.S)
            yield i, solution and solution.group(1)


@pytest.mark.parametrize("number", [2, 3])
def test_the_solutions_of_a_notebook_pass_its_checks_and_common_mistakes_do_not(number, capsys):
    [notebook] = TUTORIALS.glob(f"{number}_*.ipynb")
    cells = cells_of(notebook)
    found = list(exercises(notebook))
    assert len(found) >= 2
    for i, solution in found:
        [name] = re.findall(r"^def (\w+)\(", cells[i].source, re.M)
        names = {"np": np, "torch": torch, "exercise": start.exercise, "json": json, "re": re}
        exec(solution, names)
        exec(cells[i + 1].source, names)
        assert "Right" in capsys.readouterr().out, name
        right = names[name]
        for wrong in (lambda x: x * 0, lambda x: x * 2, lambda x: -x):
            names[name] = lambda *a, wrong=wrong, **k: wrong(right(*a, **k))
            with pytest.raises((AssertionError, TypeError)):
                exec(cells[i + 1].source, names)


def test_the_checks_of_read_box_refuse_a_function_that_runs_the_text_as_python():
    [notebook] = TUTORIALS.glob("2_*.ipynb")
    [check] = [cell.source for cell in cells_of(notebook) if "assert read_box(good)" in cell.source]
    names = {"json": json, "exercise": start.exercise}
    names["read_box"] = lambda text: eval(text.split("<answer>")[1].split("</answer>")[0])["bbox"]
    with pytest.raises(NameError, match="null"):  # null is a word of JSON, and not of Python
        exec(check, names)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_ends_with_at_least_three_folded_answers(notebook):
    last = cells_of(notebook)[-1].source
    assert last.count("<details>") >= 3 and last.count("<details>") == last.count("</details>")


def test_the_gpu_cell_of_notebook_6_prints_the_forecast_and_the_measured_step(monkeypatch, capsys):
    """The cell believes that there is a GPU. The command it starts rehearses a small model here."""
    [notebook] = TUTORIALS.glob("6_*.ipynb")
    [cell] = [c.source for c in cells_of(notebook) if "--rehearse 1 --max-new-tokens" in c.source]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    exec(cell, {"torch": torch, "subprocess": subprocess, "sys": sys, "ROOT": TUTORIALS.parent})
    printed = capsys.readouterr().out
    assert "forecast: 3b in nf4" in printed and re.search(r"^update +\d", printed, re.M)


# ----------------------------------------------------------------------------------- touch.py


@pytest.fixture(scope="module")
def question():
    return load_segmenter("tiny"), load_data("shapes", "test", 30)[29]


def test_the_box_figure_shows_a_high_iou_for_the_true_box_only(question, monkeypatch):
    monkeypatch.setattr(touch, "has_widgets", lambda: False)
    segmenter, sample = question
    _, axes = plt.subplots()
    true, moved, wide = touch.moved_boxes(sample)
    assert true == tight_box(sample.mask)
    assert touch.draw_box(axes, segmenter, sample, true, []) > 0.9
    assert touch.draw_box(axes, segmenter, sample, wide, []) < 0.6
    touch.touch_box(segmenter, sample)
    assert len(plt.gcf().axes) == 3
    plt.close("all")


def test_the_clip_figure_shows_the_objective_and_its_slope(monkeypatch):
    monkeypatch.setattr(touch, "has_widgets", lambda: False)
    inside, above = touch.objective(0.2, 0.22, 1.0), touch.objective(0.2, 0.4, 1.0)
    assert inside == pytest.approx((1.1, 1.0), abs=1e-5)
    assert above == pytest.approx((1.3, 0.0), abs=1e-5)  # clipped at 1 + eps_high
    assert touch.objective(0.2, 0.4, -1.0) == pytest.approx((-2.0, -1.0), abs=1e-5)
    touch.touch_clip()
    assert len(plt.gcf().axes) == 3
    plt.close("all")


def test_moving_a_slider_draws_the_figure_again(question, monkeypatch):
    widgets = pytest.importorskip("ipywidgets")
    shown, drawn = [], []
    monkeypatch.setattr(touch, "show", shown.append)
    monkeypatch.setattr(touch, "draw_clip", lambda axes, *values: drawn.append(values))
    touch.touch_clip()
    sliders = shown[0].children[0].children
    assert all(isinstance(one, widgets.FloatSlider) for one in sliders)
    before = len(drawn)
    sliders[1].value = 0.5
    assert len(drawn) == before + 1 and drawn[-1] == (0.2, 0.5, 1.0)
    boxes = []
    monkeypatch.setattr(touch, "draw_box", lambda axes, *values: boxes.append(values[2:]))
    touch.touch_box(*question)
    controls = shown[1].children[0].children
    controls[0].value = (10, 50)
    controls[2].value = 0
    assert boxes[-1][0][0] == 10 and boxes[-1][0][2] == 50 and boxes[-1][1][0][2] == 0
    plt.close("all")


# --------------------------------------------------------------------------- Colab and Kaggle


@pytest.mark.skipif(not (TUTORIALS.parent / ".git").exists(), reason="not a git clone")
def test_with_an_address_the_first_cell_fetches_the_project(tmp_path):
    """The folder of this project stands for its address. The packages are already installed."""
    first = [cell for cell in cells_of(NOTEBOOKS[0]) if cell.cell_type == "code"][0].source
    assert first.startswith('ADDRESS = ""')
    first = first.replace('ADDRESS = ""', f'ADDRESS = "{TUTORIALS.parent}"', 1)
    shown = "import samr1_mini\nprint(ROOT, samr1_mini.__file__)"
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(text) for text in (first, shown)]
    )
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    root, file = notebook.cells[1].outputs[0].text.split()
    assert root == str(tmp_path / "project")
    assert file == str(tmp_path / "project" / "samr1_mini" / "__init__.py")
