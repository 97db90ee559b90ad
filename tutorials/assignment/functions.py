"""Load the functions of an assignment from a file."""

import importlib.util
from pathlib import Path


def load_functions(file: Path | str):
    """Return the module in a Python file."""
    spec = importlib.util.spec_from_file_location("my_samr1", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
