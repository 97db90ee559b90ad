"""Load the functions of an assignment from a file."""

import sys
import traceback
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # Python looks for modules only in the script's own folder

from samr1_mini.config import UserError, cause


def load_functions(file: Path | str, needed: str = "") -> ModuleType:
    """Run a Python file, and return it as a module. `needed` names a function that it must have.

    Raises UserError with one line if the file cannot be loaded. An import would save compiled code
    beside the file, and could load old code after a quick change.
    """
    file = Path(file).resolve()
    module = ModuleType(file.name)
    module.__file__ = str(file)
    sys.modules[file.name] = module  # dataclasses look there
    try:
        exec(compile(file.read_bytes(), str(file), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        raise UserError(f"{file}{line_of(error, file)} cannot be loaded: {cause(error)}") from None
    if needed and not callable(getattr(module, needed, None)):
        raise UserError(f"{file} has no function {needed}")
    return module


def line_of(error: BaseException, file: Path) -> str:
    """Return the line of the file that raised the error, as ", line 3", or "" if none did."""
    lines = []
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == str(file):
            lines.append(frame.lineno)
    if isinstance(error, SyntaxError) and error.filename == str(file) and error.lineno:
        lines.append(error.lineno)
    if not lines:
        return ""
    return f", line {lines[-1]}"
