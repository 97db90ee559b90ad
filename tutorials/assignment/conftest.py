"""Find the functions to grade: my_samr1.py, or the file of `--file`."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from train_mine import load_functions


def pytest_addoption(parser):
    parser.addoption("--file", default=str(HERE / "my_samr1.py"), help="file with the functions")


@pytest.fixture(scope="session")
def mine(request):
    return load_functions(Path(request.config.getoption("--file")))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Say in one sentence what went wrong, without a traceback."""
    outcome = yield
    report = outcome.get_result()
    if call.excinfo is None or report.when != "call":
        return
    error = call.excinfo.value
    if isinstance(error, NotImplementedError):
        frame = call.excinfo.traceback[-1]
        report.longrepr = f"{frame.name} is not written yet."
    elif isinstance(error, AssertionError):
        report.longrepr = str(error).splitlines()[0]
