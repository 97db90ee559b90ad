"""Make a short animation of the same held-out scenes during training:
`python tutorials/animate.py runs/tiny-seed0 --out learning.gif`.

The frames are the sheets that the run wrote at each validation. A lower `--eval-every` gives more
frames.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

LAST = 4000  # milliseconds of the last frame


def read_frames(run: Path, width: int) -> list[Image.Image]:
    """Read the run's validation sheets, oldest first, scaled to `width` pixels."""
    frames = []
    for sheet in sorted(run.glob("sheet-[0-9]*.png")):
        with Image.open(sheet) as image:
            height = round(image.height * width / image.width)
            image = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
            frames.append(image)
    return frames


def animate(run: Path, out: Path, width: int, seconds: float) -> int:
    """Write the run's validation sheets as an animated GIF; returns the number of frames."""
    frames = read_frames(run, width)
    if len(frames) < 2:
        sys.exit(
            f"animate.py: error: {run} has {len(frames)} sheets, and at least 2 are needed: "
            "train with a lower --eval-every"
        )
    strip = Image.new("RGB", (width, sum(frame.height for frame in frames)))
    top = 0
    for frame in frames:
        strip.paste(frame, (0, top))
        top += frame.height
    # One palette for all frames, so that colours do not flicker. Pillow's default method gives most
    # of the palette to the many greys. Then red becomes orange, and questions ask for colours.
    colours = strip.quantize(256, method=Image.Quantize.FASTOCTREE)
    frames = [frame.quantize(palette=colours, dither=Image.Dither.NONE) for frame in frames]
    durations = [round(1000 * seconds)] * (len(frames) - 1) + [LAST]
    frames[0].save(out, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return len(frames)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out = Path("learning.gif")
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument(
        "--out", type=Path, default=out, help="file to write (default learning.gif)"
    )
    parser.add_argument("--width", type=int, default=720, help="pixels (default 720)")
    parser.add_argument(
        "--seconds", type=float, default=0.8, help="of each frame but the last (default 0.8)"
    )
    args = parser.parse_args()
    count = animate(args.run, args.out, args.width, args.seconds)
    size = args.out.stat().st_size / 2**20
    print(f"{args.out}: {count} frames, {size:.1f} MiB")


if __name__ == "__main__":
    main()
