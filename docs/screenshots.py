"""Make the pictures of the pages anew: `python docs/screenshots.py` writes docs/images/ (two minutes; needs Chromium).

The terminal is that of the commands themselves, on the embedded model. The report is of the runs that the front page
shows.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
COLUMNS = 108
COMMANDS = (
    "besa prune smollm2 pruned --recipe wanda --samples 16 --seqlen 512",
    "besa inspect pruned",
    "besa pack pruned packed",
)
RUNS = ROOT / "experiments" / "results" / "demo-full-50"
SHOWN = ("dense", "magnitude", "wanda", "sparsegpt", "besa")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FONT = re.compile(r"@font-face {.*?}\s*", re.DOTALL)  # from a server; the reader's own will do
WIDTH, HEIGHT = 1200, 900


def besa(command: str, folder: Path) -> str:
    """What a command prints to a terminal, colours included."""
    words = [sys.executable, "-m", *command.split()]
    environment = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(COLUMNS)}
    return subprocess.run(words, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


def terminal(folder: Path) -> str:
    """The commands and what they printed, as a picture that loads nothing."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for command in COMMANDS:
        console.print(Text(f"$ {command}", style="bold"))
        console.print(Text.from_ansi(besa(command, folder)))
    return FONT.sub("", console.export_svg(title="besa"))


def report(folder: Path) -> Image.Image:
    """The top of the report of some runs."""
    besa(f"besa report {' '.join(str(RUNS / name) for name in SHOWN)} --out report.html", folder)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"No browser is here: install one of {', '.join(BROWSERS)}.")
    switches = ["--headless", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}", "--screenshot=report.png"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        switches.append("--no-sandbox")
    subprocess.run([browser, *switches, (folder / "report.html").as_uri()], cwd=folder, check=True, capture_output=True)
    return Image.open(folder / "report.png").convert("RGB").quantize(64)  # text and lines need few colours


def main() -> None:
    """Write both pictures."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        report(Path(name)).save(IMAGES / "report.png", optimize=True)
        (IMAGES / "terminal.svg").write_text(terminal(Path(name)), encoding="utf-8")


if __name__ == "__main__":
    main()
