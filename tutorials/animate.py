"""A short animation of the same held-out scenes as training goes on:
`python tutorials/animate.py runs/tiny-seed0 --out learning.gif`.

The frames are the sheets that the run wrote at each look (`--eval-every`), so a run with more looks moves more
smoothly.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image


def animate(run: Path, out: Path, width: int, seconds: float) -> int:
    """Write the run's validation sheets, oldest first, as an animated GIF; returns the number of frames."""
    sheets = sorted(run.glob("sheet-[0-9]*.png"))
    if len(sheets) < 2:
        sys.exit(
            f"animate.py: error: {run} has {len(sheets)} sheets, and at least 2 are needed: "
            "train with a lower --eval-every"
        )
    frames = []
    for sheet in sheets:
        with Image.open(sheet) as image:
            frames.append(
                image.convert("RGB").resize(
                    (width, round(image.height * width / image.width)), Image.Resampling.LANCZOS
                )
            )
    strip = Image.new("RGB", (width, sum(frame.height for frame in frames)))
    for i, frame in enumerate(frames):
        strip.paste(frame, (0, sum(f.height for f in frames[:i])))
    # One palette for all, so that colours do not flicker. Pillow's default gives most of it to the many greys, and red
    # becomes orange, under questions that ask for a colour.
    colours = strip.quantize(256, method=Image.Quantize.FASTOCTREE)
    frames = [frame.quantize(palette=colours, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(
        out,
        save_all=True,
        append_images=frames[1:],
        duration=[round(1000 * seconds)] * (len(frames) - 1) + [4000],
        loop=0,
    )
    return len(frames)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("learning.gif"),
        help="file to write (default learning.gif)",
    )
    parser.add_argument("--width", type=int, default=720, help="pixels (default 720)")
    parser.add_argument(
        "--seconds", type=float, default=0.8, help="a frame; the last one stays four (default 0.8)"
    )
    args = parser.parse_args()
    count = animate(args.run, args.out, args.width, args.seconds)
    print(f"{args.out}: {count} frames, {args.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
