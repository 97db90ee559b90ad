"""Stop a run from outside: Ctrl-C, the signals that end a program, and a terminal that is gone."""

import signal
import sys
import threading
from contextlib import contextmanager

from tqdm import tqdm

from .config import Terminated


def in_main_thread() -> bool:
    """Whether signals may be handled here: Python allows it in the main thread alone."""
    return threading.current_thread() is threading.main_thread()


def ending_signals() -> list[signal.Signals]:
    """List the signals that end a run at once: SIGTERM, and the signal of a closed terminal.

    The latter is SIGHUP, and SIGBREAK on Windows. The list omits a signal that is ignored already,
    as under nohup.
    """
    kinds = [signal.SIGTERM]
    for name in ("SIGHUP", "SIGBREAK"):
        kind = getattr(signal, name, None)
        if kind is not None and signal.getsignal(kind) != signal.SIG_IGN:
            kinds.append(kind)
    return kinds


def ignore_ending_signals() -> None:
    """Ignore all ending signals except Ctrl-C from now on, so that no save is interrupted."""
    if in_main_thread():
        for kind in ending_signals():
            signal.signal(kind, signal.SIG_IGN)


@contextmanager
def stop_on_signals():
    """Context manager: handle signals inside the block, and yield an event that Ctrl-C sets.

    The first Ctrl-C sets the event, so that the step in progress ends first. A second Ctrl-C stops
    at once. SIGTERM and the signal of a closed terminal raise Terminated: their sender seldom waits
    for a step. Outside the main thread no signal is handled.
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
        ignore_ending_signals()  # a second one must not cut the saving off
        raise Terminated(number)

    handlers = {signal.SIGINT: finish_step} | dict.fromkeys(ending_signals(), end_at_once)
    before = {kind: signal.signal(kind, handler) for kind, handler in handlers.items()}
    try:
        yield stop
    finally:
        for kind, handler in before.items():
            if (
                handler is not None
            ):  # None: it was not installed by Python, which cannot put it back
                signal.signal(kind, handler)


# A terminal or a pipe is gone, the stream was closed, or a signal's handler prints in the middle of another print.
LOST = (OSError, ValueError, RuntimeError)


class LastingStream:
    """A text stream whose writes never fail.

    Text is lost once its terminal is closed or its reader has ended.
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
