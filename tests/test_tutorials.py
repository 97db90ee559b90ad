"""The notebooks run from top to bottom, hold their outputs, and ask before they show."""

import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from samr1_mini.config import Settings

TUTORIALS = Path(__file__).parent.parent / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
sys.path.insert(0, str(TUTORIALS))  # animate.py stands there


def texts(notebook, kind):
    return [cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == kind]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom_without_network(notebook, monkeypatch):
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    NotebookClient(
        nbformat.read(notebook, 4),
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(TUTORIALS)}},
    ).execute()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebooks_outputs_are_committed_in_order_and_without_errors(notebook):
    cells = [cell for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell.outputs) for cell in cells) >= 0.6 * len(cells)
    assert not [
        o
        for cell in cells
        for o in cell.outputs
        if o.output_type == "error" or o.get("name") == "stderr"
    ]
    assert (
        notebook.stat().st_size < 2**20
        and str(Path.home()) not in notebook.read_text()
        and "/work/" not in notebook.read_text()
    )


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_asks_for_a_prediction_and_answers_it_in_the_next_cell(notebook):
    cells = nbformat.read(notebook, 4).cells
    asking = [
        i
        for i, cell in enumerate(cells)
        if cell.cell_type == "markdown" and "**Predict" in cell.source
    ]
    assert len(asking) >= 2
    assert all(
        cells[i + 1].cell_type == "code" and (cells[i + 1].outputs or cells[i + 2].get("outputs"))
        for i in asking
    )


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


def test_a_film_keeps_the_colours_that_its_questions_ask_for(tmp_path):
    import animate

    for name in ("00000", "00002"):
        shutil.copy(TUTORIALS / "results/seed0/sheet-test.png", tmp_path / f"sheet-{name}.png")
    animate.animate(tmp_path, tmp_path / "x.gif", 720, 0.1)
    with Image.open(tmp_path / "x.gif") as film, Image.open(tmp_path / "sheet-00000.png") as sheet:
        ours = np.asarray(film.convert("RGB"), int)
        true = np.asarray(sheet.convert("RGB").resize(film.size, Image.Resampling.LANCZOS), int)
    vivid = np.ptp(true, -1) > 120
    assert vivid.mean() > 0.005 and np.abs(ours - true)[vivid].mean() < 12, np.abs(ours - true)[
        vivid
    ].mean()


def test_links_between_notebooks_lead_somewhere():
    assert len(NOTEBOOKS) >= 5
    for notebook in NOTEBOOKS:
        for target in re.findall(r"\]\(([^)]+\.\w+)\)", "\n".join(texts(notebook, "markdown"))):
            assert target.startswith("http") or (TUTORIALS / target).exists(), (
                notebook.name,
                target,
            )


def test_every_option_that_a_notebook_names_exists():
    own = {
        "adapter",
        "split",
        "count",
        "blank",
        "image",
        "question",
        "merge",
        "out",
        "help",
        "num-processes",
        "num_processes",
        "no-points",
        "rows",
        "seeds",
        "results",
    }
    known = {name.replace("_", "-") for name in Settings.__dataclass_fields__} | own
    for notebook in NOTEBOOKS:
        for option in re.findall(
            r"(?<![\w-])--([a-z][\w-]+)",
            "\n".join(texts(notebook, "markdown") + texts(notebook, "code")),
        ):
            assert option in known, (notebook.name, option)


def test_an_animation_keeps_the_sheets_shape_goes_round_and_stays_on_its_last_frame(tmp_path):
    import animate

    for name, shade in (("00000", 10), ("00002", 200), ("test", 90)):
        Image.new("RGB", (40, 20), (shade, 0, 0)).save(tmp_path / f"sheet-{name}.png")
    assert (
        animate.animate(tmp_path, tmp_path / "x.gif", 20, 0.1) == 2
    )  # sheet-test.png is of other questions
    with Image.open(tmp_path / "x.gif") as image:
        assert image.size == (20, 10) and image.info["loop"] == 0
        assert [image.seek(i) or image.info["duration"] for i in range(2)] == [100, 4000]
