"""Stop a run by Ctrl-C, by a signal that ends a program, or by closing the terminal."""

import signal
import sys
import threading
from contextlib import contextmanager

from tqdm import tqdm

from .config import Terminated


def in_main_thread() -> bool:
    """Return whether this is the main thread. Python allows signal handlers only there."""
    return threading.current_thread() is threading.main_thread()


def ending_signals() -> list[signal.Signals]:
    """List the signals that end a run at once: SIGTERM, and the signal of a closed terminal.

    The signal of a closed terminal is SIGHUP, on Windows SIGBREAK. Signals that are ignored
    already, as under nohup, are left out.
    """
    kinds = [signal.SIGTERM]
    for name in ("SIGHUP", "SIGBREAK"):
        kind = getattr(signal, name, None)
        if kind is not None and signal.getsignal(kind) != signal.SIG_IGN:
            kinds.append(kind)
    return kinds


def ignore_signals() -> None:
    """Ignore Ctrl-C and the ending signals from now on, so that no save is interrupted."""
    if in_main_thread():
        for kind in (signal.SIGINT, *ending_signals()):
            signal.signal(kind, signal.SIG_IGN)


@contextmanager
def handlers_put_back():
    """Context manager: after the block, signals are handled as before it."""
    if not in_main_thread():
        yield
        return
    kinds = (signal.SIGINT, *ending_signals())
    before = {kind: signal.getsignal(kind) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            if handler is not None:  # Python cannot put back a handler that it did not install
                signal.signal(kind, handler)


@contextmanager
def signals_ignored():
    """Context manager form of ignore_signals."""
    with handlers_put_back():
        ignore_signals()
        yield


@contextmanager
def stop_on_signals():
    """Context manager: handle signals inside the block, and yield an event that Ctrl-C sets.

    The first Ctrl-C sets the event, so that the step in progress ends first. A second Ctrl-C stops
    at once. SIGTERM and the signal of a closed terminal raise Terminated, because their sender
    seldom waits for a step. Outside the main thread no signal is handled.
    """
    stop = threading.Event()
    if not in_main_thread():
        yield stop
        return

    def finish_step(*_):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop.set()
        tqdm.write("stopping after this step; press Ctrl-C again to stop at once")

    def end_at_once(number, _):
        ignore_signals()  # a second signal must not interrupt the save
        raise Terminated(number)

    with handlers_put_back():
        signal.signal(signal.SIGINT, finish_step)
        for kind in ending_signals():
            signal.signal(kind, end_at_once)
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
