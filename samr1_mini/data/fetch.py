"""Download COCO's pictures with retries and time limits. Incomplete files are never kept."""

import io
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.request import urlopen

from tqdm import tqdm

from ..config import CACHE, UserError, first_line
from ..files import replace_file
from .pictures import open_picture

COCO_URL = (
    "http://images.cocodataset.org/train2014/"  # no address that comes with data is ever opened
)
COCO_BYTES = 165_000  # of a picture, on average: train2014.zip has 82,783 in 13.5 GB
PICTURES = CACHE / "train2014"  # the pictures that were fetched

WORKERS = 16  # pictures on their way at a time
PAUSES = (1.0, 5.0)  # seconds before the second and before the third try
SILENCE = 20.0  # seconds without a byte, then a try ends
LIMIT = 60.0  # seconds for a picture, all tries together: a server that sends a byte now and then never falls silent
LARGEST = 64 * 2**20  # bytes of a picture


def picture_name(path: str) -> str:
    """Return the file's own name in a path that comes with data.

    Raises ValueError if the path is not a picture's file name.
    """
    name = Path(str(path)).name
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.(jpe?g|png)", name, re.IGNORECASE):
        raise ValueError(f"{name!r} is no picture's file name")
    return name


def fetch_pictures(sizes: dict[str, tuple[int, int]], folder: Path, allowed: int) -> dict[str, str]:
    """Fetch the pictures of `sizes`, {name: (width, height)}, that `folder` lacks.

    Returns {name: reason} for those that could not be fetched. Raises UserError for more than
    `allowed` failures, or for a full disk.
    """
    pool, failed = ThreadPoolExecutor(WORKERS), {}
    lacking = [name for name in sizes if not is_there(folder / name)]
    jobs = {
        pool.submit(fetch_picture, COCO_URL + name, folder / name, sizes[name]): name
        for name in lacking
    }
    try:
        for job in tqdm(
            as_completed(jobs),
            total=len(jobs),
            desc="pictures",
            dynamic_ncols=True,
            disable=not jobs,
        ):
            if reason := job.result():
                failed[jobs[job]] = reason
            if len(failed) > max(
                allowed, 2 * WORKERS
            ):  # it is not the pictures: the others would take their time too
                break
    finally:
        pool.shutdown(cancel_futures=True)
    if len(failed) > allowed:
        name, reason = next(iter(failed.items()))
        raise UserError(
            f"{len(failed)} of {len(sizes)} pictures were not fetched, the first {COCO_URL}{name}: "
            f"{reason}. The others are kept; run again to continue"
        )
    return failed


def is_there(file: Path) -> bool:
    """Whether a picture was fetched."""
    return (
        file.is_file() and file.stat().st_size > 0
    )  # a machine that loses its power may leave a name without bytes


def fetch_picture(url: str, file: Path, size: tuple[int, int]) -> str:
    """Download one picture.

    Returns "" or the reason for failure. Only complete files get the final name.
    """
    end, reason = time.monotonic() + LIMIT, ""
    for pause in (0.0, *PAUSES):
        time.sleep(pause)
        left = end - time.monotonic()
        if left <= 0:
            break
        try:
            data = within(left, download, url, min(SILENCE, left))
            if (found := open_picture(io.BytesIO(data)).size) != size:
                raise ValueError(
                    f"the picture is {found[0]} x {found[1]}, but the data expect {size[0]} x {size[1]}"
                )
            store_picture(data, file)
            return ""
        except (
            OSError,
            ValueError,
            HTTPException,
        ) as error:  # a TimeoutError and an HTTPError are OSErrors
            reason = str(error) or type(error).__name__
            if isinstance(error, HTTPError) and error.code in (
                404,
                410,
            ):  # it is gone, and will be at the next try
                break
    return reason


def download(url: str, silence: float) -> bytes:
    with urlopen(url, timeout=silence) as answer:
        data = answer.read(LARGEST)
        if answer.length:  # bytes that were announced and did not come
            raise ValueError(f"the connection broke, {answer.length} bytes before the end")
        return data


def within(seconds: float, work, *arguments):
    """Run `work(*arguments)` and return its result. Raises TimeoutError after `seconds` in total."""
    outcome = Future()

    def run():
        try:
            outcome.set_result(work(*arguments))
        except Exception as error:
            outcome.set_exception(error)

    Thread(
        target=run, daemon=True
    ).start()  # a thread that is given up ends with its socket, or with the program
    wait([outcome], seconds)
    if not outcome.done():
        raise TimeoutError(f"not done within {seconds:.0f} seconds")
    return outcome.result()


def store_picture(data: bytes, file: Path) -> None:
    """Write a picture. Raises UserError if the disk is full."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, lambda part: part.write_bytes(data))
    except OSError as error:
        raise UserError(f"{file.parent}: {first_line(error)}") from None
