"""Make the pictures of the pages anew: `python docs/screenshots.py` writes docs/images/ (minutes; needs Chromium).

The commands run on the embedded model, at sizes that take little time and leave little of it: the pictures show what
there is to see, not what to expect.
"""

import io
import os
import re
import shlex
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
SIZES = "--samples 8 --seqlen 128"
RECIPES = ("wanda", "besa")
COMMANDS = (
    f"besa prune smollm2 besa --recipe besa {SIZES}",
    "besa pack besa packed",
    "besa verify packed",
    'besa generate packed --no-chat --max-new-tokens 24 --prompt "The city lies on the river"',
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FONT = re.compile(r"@font-face {.*?}\s*", re.DOTALL)  # from a server; the reader's own will do
WIDTH, HEIGHT = 1200, 900


def besa(command: str, folder: Path) -> str:
    """What a command prints."""
    words = [sys.executable, "-m", *shlex.split(command)]
    environment = os.environ | {"COLUMNS": str(COLUMNS)}
    return subprocess.run(words, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


def terminal(folder: Path) -> str:
    """The commands and what they printed, as a picture that loads nothing."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for command in COMMANDS:
        console.print(Text(f"$ {command}", style="bold"))
        console.print(Text(besa(command, folder)))
    return FONT.sub("", console.export_svg(title="besa"))


def report(folder: Path) -> Image.Image:
    """The top of the report of two runs, after `terminal`."""
    besa(f"besa prune smollm2 wanda --recipe wanda {SIZES}", folder)
    for model, out in (("smollm2", "dense"), *((recipe, recipe) for recipe in RECIPES)):
        (folder / out).mkdir(exist_ok=True)
        besa(f"besa eval {model} --ppl encyclopedia --window 128 --max-windows 20 --json {out}/besa_eval.json", folder)
    besa(f"besa report dense {' '.join(RECIPES)} --out report.html", folder)
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
        (IMAGES / "terminal.svg").write_text(terminal(Path(name)), encoding="utf-8")
        report(Path(name)).save(IMAGES / "report.png", optimize=True)


if __name__ == "__main__":
    main()
