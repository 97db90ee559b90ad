"""Download COCO's pictures with retries and time limits. Incomplete files are never kept."""

import io
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from http.client import HTTPException
from pathlib import Path
from threading import Event, Thread
from urllib.error import HTTPError
from urllib.request import urlopen

from tqdm import tqdm

from ..config import CACHE, UserError, first_line
from ..files import replace_file
from .pictures import Size, check_size, open_picture

# Addresses in data files are never opened.
COCO_URL = "http://images.cocodataset.org/train2014/"
COCO_BYTES = 165_000  # of a picture, on average: train2014.zip has 82,783 in 13.5 GB
PICTURES = CACHE / "train2014"  # the downloaded pictures

WORKERS = 16  # downloads at a time
PAUSES = (1.0, 5.0)  # seconds before the second and before the third try
SILENCE = 20.0  # a try ends after so many seconds without a byte
LIMIT = 60.0  # seconds for all tries of a picture: a slow server may send a byte now and then
LARGEST = 64 * 2**20  # bytes of a picture


def picture_name(path: str) -> str:
    """Return the file name of a path in a data file.

    Raises ValueError if the path is not a picture's file name.
    """
    name = Path(str(path)).name
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.(jpe?g|png)", name, re.IGNORECASE):
        raise ValueError(f"{name!r} is not the name of a .jpg or .png file")
    return name


def download_pictures(sizes: dict[str, Size], folder: Path, most_failures: int) -> dict[str, str]:
    """Download the pictures of `sizes`, {name: size}, that `folder` lacks.

    Returns {name: reason} for the pictures that could not be downloaded. Raises UserError for more
    than `most_failures` failures, or for a full disk.
    """
    pool, jobs, failed, stop = ThreadPoolExecutor(WORKERS), {}, {}, Event()
    for name, size in sizes.items():
        if not is_there(folder / name):
            job = pool.submit(download_picture, folder / name, size, stop)
            jobs[job] = name
    done = as_completed(jobs)
    bar = tqdm(done, "pictures", len(jobs), dynamic_ncols=True, disable=not jobs)
    try:
        for job in bar:
            reason = job.result()
            if reason:
                failed[jobs[job]] = reason
            if len(failed) > max(most_failures, 2 * WORKERS):
                break  # the server is broken: do not try the other pictures
    finally:
        stop.set()  # jobs that are running do not try again
        pool.shutdown(cancel_futures=True)
    if len(failed) > most_failures:
        name, reason = next(iter(failed.items()))
        raise UserError(
            f"{len(failed)} of {len(sizes)} pictures were not downloaded. The first is "
            f"{COCO_URL}{name}: {reason}. Downloaded pictures are kept; run again"
        )
    return failed


def is_there(file: Path) -> bool:
    """Return True if a picture was downloaded. A power failure may leave an empty file."""
    return file.is_file() and file.stat().st_size > 0


def download_picture(file: Path, size: Size, stop: Event) -> str:
    """Download one of COCO's pictures to `file`.

    Returns "" or the reason for failure. Only complete files get the final name. When `stop` is
    set, there is no further try.
    """
    end, reason = time.monotonic() + LIMIT, "stopped"
    for pause in (0.0, *PAUSES):
        stopped = stop.wait(pause)
        left = end - time.monotonic()
        if stopped or left <= 0:
            break
        try:
            data = read_within(left, COCO_URL + file.name)
            picture = open_picture(io.BytesIO(data))
            check_size("the picture", picture.size, size)
            write_picture(data, file)
            return ""
        except (OSError, ValueError, HTTPException) as error:
            reason = str(error) or type(error).__name__
            if isinstance(error, HTTPError) and error.code in (404, 410):
                break  # the server does not have the picture: do not try again
    return reason


def read_url(url: str, silence: float) -> bytes:
    """Return the bytes of a URL. `silence` is the longest time without a byte, in seconds."""
    with urlopen(url, timeout=silence) as answer:
        data = answer.read(LARGEST)
        if answer.length:  # bytes that were announced and did not come
            raise ValueError(f"the connection broke, {answer.length} bytes before the end")
        return data


def read_within(seconds: float, url: str) -> bytes:
    """Read a URL in a thread. Raises TimeoutError after `seconds` in total."""
    outcome = Future()

    def run():
        try:
            outcome.set_result(read_url(url, min(SILENCE, seconds)))
        except Exception as error:
            outcome.set_exception(error)

    Thread(target=run, daemon=True).start()  # this thread may outlive the call
    wait([outcome], seconds)
    if not outcome.done():
        raise TimeoutError(f"not done within {seconds:.0f} seconds")
    return outcome.result()


def write_picture(data: bytes, file: Path) -> None:
    """Write a picture. Raises UserError if the disk is full."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, lambda part: part.write_bytes(data))
    except OSError as error:
        raise UserError(f"{file.parent}: {first_line(error)}") from None
