"""Load the functions of an assignment from a file."""

import sys
import traceback
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # Python looks for modules only in the script's own folder

from samr1_mini.config import UserError, cause


def load_functions(file: Path | str):
    """Return the module in a Python file.

    Raises UserError with one line if the file cannot be loaded.
    """
    file = Path(file).resolve()
    spec = spec_from_loader("my_samr1", SourceFileLoader("my_samr1", str(file)))
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{file}{line_of(error, file)} cannot be loaded: {cause(error)}") from None
    return module


def line_of(error: BaseException, file: Path) -> str:
    """Return the line of the file that raised the error, as ", line 3", or "" if none did."""
    lines = []
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == str(file):
            lines.append(frame.lineno)
    if isinstance(error, SyntaxError) and error.lineno:
        lines.append(error.lineno)
    if not lines:
        return ""
    return f", line {lines[-1]}"
