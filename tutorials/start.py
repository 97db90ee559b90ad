"""Prepare a notebook. The first cell of each notebook runs this file with %run.

The notebook gets np, plt, torch, ROOT (the folder of the project), colours, and `exercise`.
"""

import sys
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]


def stale_packages(names=("numpy", "torch", "transformers")) -> list[str]:
    """Return the names of loaded packages whose installed version is now another one.

    On Colab and Kaggle, the first cell installs packages. A package that is already loaded keeps
    its old version until the runtime restarts.
    """
    stale = []
    for name in names:
        if name in sys.modules:
            loaded = str(sys.modules[name].__version__).split("+")[0]  # without +cpu or +cu128
            if loaded != metadata.version(name).split("+")[0]:
                stale.append(name)
    return stale


stale = ", ".join(stale_packages())
if stale:
    raise ImportError(f"{stale}: another version was installed. Restart the kernel, and run all")

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython import get_ipython

from samr1_mini.plots import BLUE, GREEN, ORANGE, PINK

torch.set_num_threads(1)
if get_ipython():
    get_ipython().run_line_magic("matplotlib", "inline")
plt.rcParams["figure.dpi"] = 75


@contextmanager
def exercise():
    """Check a function that the reader writes. The asserts stand in a block `with exercise():`.

    If the function is not written yet, this prints a sentence, and the notebook continues.
    """
    try:
        yield
    except NotImplementedError as error:
        if str(error):  # PyTorch raises the same error, with a message
            raise
        print("Not written yet. Write the function in the cell above. Then run both cells again.")
    else:
        print("Right: all checks pass.")
