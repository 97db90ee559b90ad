"""Stop a run by Ctrl-C, by a signal that ends a program, or by closing the terminal."""

import os
import signal
import sys
import threading
from contextlib import contextmanager

from tqdm import tqdm

from .config import Terminated


def first_started() -> bool:
    """Return whether this is the first of the processes that were started together."""
    return os.environ.get("RANK", "0") == "0"


def handled_signals() -> list[signal.Signals]:
    """List the signals that stop a run: Ctrl-C, SIGTERM, and the signal of a closed terminal.

    The signal of a closed terminal is SIGHUP, on Windows SIGBREAK. If it is ignored already, as
    under nohup, it is left out. Python allows signal handlers only in the main thread. In another
    thread the list is empty.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    kinds = [signal.SIGINT, signal.SIGTERM]
    for name in ("SIGHUP", "SIGBREAK"):
        kind = getattr(signal, name, None)
        if kind is not None and signal.getsignal(kind) != signal.SIG_IGN:
            kinds.append(kind)
    return kinds


def ignore_signals() -> None:
    """Ignore the handled signals from now on, so that no save is interrupted."""
    for kind in handled_signals():
        signal.signal(kind, signal.SIG_IGN)


@contextmanager
def handlers_put_back(handlers: dict):
    """Context manager: after the block, signals are handled as before it.

    `handlers` maps signals to the handlers of the block. The block may replace them.
    """
    before = {kind: signal.getsignal(kind) for kind in handlers}
    try:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)
        yield
    finally:
        for kind, handler in before.items():
            if handler is not None:  # Python cannot put back a handler that it did not install
                signal.signal(kind, handler)


@contextmanager
def stop_on_signals():
    """Context manager: handle signals inside the block, and yield an event that Ctrl-C sets.

    The first Ctrl-C sets the event, so that the step in progress ends first. A second Ctrl-C stops
    at once. SIGTERM and the signal of a closed terminal raise Terminated, because their sender
    seldom waits for a step.
    """
    stop = threading.Event()

    def handle(number, _):
        if number != signal.SIGINT:
            ignore_signals()  # a second signal must not interrupt the save
            raise Terminated(number)
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        if first_started():
            tqdm.write("stopping after this step; press Ctrl-C again to stop at once")

    with handlers_put_back(dict.fromkeys(handled_signals(), handle)):
        yield stop


# The terminal or the pipe is gone, the stream was closed, or a signal's handler prints while
# another print is not finished.
LOST = (OSError, ValueError, RuntimeError)


class LastingStream:
    """A text stream whose writes never fail.

    Text is lost after its terminal is closed or its reader has ended.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except UnicodeEncodeError:  # a stream without these characters
            return self.write(text.encode("ascii", "replace").decode())
        except LOST:
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except LOST:
            pass

    def __getattr__(self, name: str):  # isatty, fileno, encoding, ...: those of the stream itself
        return getattr(self.stream, name)


def outlive_terminal() -> None:
    """Make later prints succeed even after the terminal is closed."""
    if sys.stdout is not None:  # a program without a console has none
        sys.stdout = LastingStream(sys.stdout)
    if sys.stderr is not None:
        sys.stderr = LastingStream(sys.stderr)


@contextmanager
def lasting_output():
    """Context manager form of outlive_terminal, for training called from a notebook."""
    before = sys.stdout, sys.stderr
    outlive_terminal()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
