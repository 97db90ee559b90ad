"""Write the PNG figures of the course: `python tutorials/figures.py --out FOLDER`.

The folder gets the PNG outputs of the notebooks, named NOTEBOOK-K.png with K from 1. It also gets
the PNG files of tutorials/results. No cell is run.
"""

import argparse
import base64
import sys
from pathlib import Path

import nbformat

TUTORIALS = Path(__file__).resolve().parent


def notebook_figures(notebook: Path) -> list[bytes]:
    """Return the PNG files in the outputs of a notebook, in their order."""
    found = []
    for cell in nbformat.read(notebook, 4).cells:
        for output in cell.get("outputs", []):
            picture = output.get("data", {}).get("image/png")
            if picture:
                found.append(base64.b64decode(picture))
    return found


def course_figures() -> dict[str, bytes]:
    """Return all figures of the course: file name -> content of the PNG file."""
    figures = {}
    for notebook in sorted(TUTORIALS.glob("*.ipynb")):
        for k, picture in enumerate(notebook_figures(notebook), 1):
            figures[f"{notebook.stem}-{k}.png"] = picture
    for picture in sorted((TUTORIALS / "results").glob("*.png")):
        figures[picture.name] = picture.read_bytes()
    return figures


def write_new(folder: Path, figures: dict[str, bytes]) -> None:
    """Write figures into an empty folder, which is made if it is missing.

    Raises FileExistsError if the folder is not empty, and OSError if it cannot be written.
    """
    if folder.is_file():
        raise FileExistsError("this is a file. Name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError("the folder is not empty. Choose an empty folder or a new name")
    for name, picture in figures.items():
        with (folder / name).open("xb") as file:  # x: never replaces a file
            file.write(picture)


def main(argv: list[str] | None = None) -> None:
    """Run the command. Prints one line on stderr after an error, and ends with exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="an empty or a new folder")
    args = parser.parse_args(argv)
    try:
        figures = course_figures()
        write_new(args.out, figures)
    except OSError as error:
        reason = error.strerror or error
        print(f"figures.py: error: --out {args.out}: {reason}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.out}: {len(figures)} figures")


if __name__ == "__main__":
    main()
