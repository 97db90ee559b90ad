"""Find the functions to grade: my_samr1.py, or the file of `--file`."""

from pathlib import Path

import pytest
from functions import load_functions  # pytest puts this folder on the path

from samr1_mini.config import UserError

HERE = Path(__file__).resolve().parent


def pytest_addoption(parser):
    parser.addoption("--file", default=str(HERE / "my_samr1.py"), help="file with the functions")


@pytest.fixture(scope="session")
def mine(request):
    """Load the functions. A file that cannot be loaded ends the grading with one line."""
    try:
        return load_functions(request.config.getoption("--file"))
    except UserError as error:
        pytest.exit(str(error), returncode=1)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Say in one sentence what went wrong, without a traceback."""
    outcome = yield
    report = outcome.get_result()
    if call.excinfo is None or report.when != "call":
        return
    error = call.excinfo.value
    if isinstance(error, NotImplementedError) and not str(error):
        frame = call.excinfo.traceback[-1]
        report.longrepr = f"{frame.name} is not written yet."
    elif isinstance(error, AssertionError) and str(error):
        report.longrepr = str(error).splitlines()[0]
    else:
        frame = last_frame(item, call)
        message = " ".join(str(error).split())
        report.longrepr = f"{frame} raised {type(error).__name__}: {message}"


def last_frame(item, call) -> str:
    """Return the last function of the graded file in the traceback, with its line."""
    file = Path(item.config.getoption("--file")).resolve()
    for frame in reversed(list(call.excinfo.traceback)):
        if Path(frame.path).resolve() == file:
            return f"{frame.name} (line {frame.lineno + 1})"
    return "the test"
