"""Define `Sample`, a question about a picture, and `Data`, the interface of all data sets."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

LONGEST_QUESTION = 2000  # characters of a question


@dataclass
class Sample:
    """A question about a picture of W x H pixels, with the true mask."""

    image: Image.Image  # RGB
    question: str
    mask: np.ndarray  # the true mask, bool [H, W]; of several objects, their union
    id: str
    kind: str = ""  # kind of question, if the data set names one
    ignore: np.ndarray | None = None  # pixels that the data set leaves undecided, bool [H, W]
    box_only: bool = False  # the truth is a box: `mask` is its area, and the IoU of boxes is scored
    picture: str = ""  # name of the picture: bootstrap intervals resample pictures
    # Masks of the single objects, bool [H, W]; None if the data set gives only one mask, [] for
    # "nothing".
    masks: list[np.ndarray] | None = None


def union(masks: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Return the union of masks bool [H, W] of a picture of this size; without masks, all False."""
    found = np.zeros(size[::-1], bool)
    for mask in masks:
        found |= mask
    return found


class Data(Sequence):
    """A sequence of samples. Pictures are read when a sample is used.

    A subclass defines `ids`, the sample ids, and `sample_at(i)`, which reads sample number `i`.
    """

    box_only = False  # boxes and no masks
    download_bytes = 0  # about how much `download` will download
    missing: Sequence[str] = ()  # pictures without a file, whose samples were replaced
    warnings: Sequence[str] = ()  # lines for the user about possible mistakes

    def __getitem__(self, i: int | slice) -> Sample | list[Sample]:
        """Return a sample, or a list of samples for a slice. Negative numbers count from the end."""
        if isinstance(i, slice):
            return [self.sample_at(number) for number in range(*i.indices(len(self)))]
        number = i + len(self) if i < 0 else i
        if not 0 <= number < len(self):
            raise IndexError(f"question {i} of {len(self)}")
        return self.sample_at(number)

    def download(self, missing: Sequence[str] = ()) -> None:
        """Download the files that are not here yet.

        `missing` lists pictures that cannot be downloaded. Every process replaces their
        samples, so all processes have the same samples.
        """

    def files(self) -> list[Path]:
        """Return the files that the samples come from."""
        return []

    def check_files(self, resumed: bool = False) -> None:
        """Read pictures and masks before the first step. Raises UserError for a broken one."""


def clean_question(question) -> str:
    """Return the text of a question without spaces around it.

    Raises ValueError for text that is too long, and for special tokens: the model would read
    <|image_pad|> as a picture.
    """
    text = str(question).strip()
    token = re.search(r"<\|\w+\|>", text)
    if token:
        raise ValueError(f"the question holds {token[0]}, a special token; remove the token")
    if len(text) > LONGEST_QUESTION:
        raise ValueError(
            f"the question has {len(text)} characters; write at most {LONGEST_QUESTION}"
        )
    text.encode()  # half a surrogate pair is a ValueError
    return text
