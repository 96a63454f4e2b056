"""Record `tweetscore demo` in a terminal of tmux and write the middle of its output to docs/demo.png.

    python docs/make_demo_picture.py

The demo runs in a temporary home. Chromium draws the picture; the Japanese font is that of matplotlib-fontja.
"""

import io
import re
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

PICTURE = Path(__file__).with_name("demo.png")
COLUMNS, ROWS = 112, 50
FONT = Path(str(files("matplotlib_fontja") / "fonts" / "ipaexg.ttf"))
LINE_PIXELS, WIDTH_PIXELS = 20, 1010
LIMIT_SECONDS = 900
ENDED = "demo ended with exit code"
# The part of the output that the picture shows.
FIRST, LAST = "model 1 is the champion", "SELECT topic"

PAGE = """\
<meta charset="utf-8">
<style>
@font-face {{ font-family: ja; src: url({font}); }}
body {{ overflow: hidden; margin: {line}px 24px; background: #0c0c0c; color: #d9d9d9; }}
pre {{ margin: 0; font: 14px/{line}px "DejaVu Sans Mono", ja, monospace; }}
b {{ display: inline-block; width: 1.2041em; height: {line}px; vertical-align: top; text-align: center;
  font: 14px/{line}px ja, monospace; }}
</style>
<pre>{code}</pre>
"""


def tmux(socket: str, *arguments: str) -> str:
    return subprocess.run(["tmux", "-L", socket, *arguments], check=True, capture_output=True, text=True).stdout  # noqa: S607


def record(home: str) -> str:
    """Return the whole output of the demo as ANSI text. Raises when the demo fails or takes too long."""
    socket = f"demo-{Path(home).name}"
    command = shlex.join(["env", f"TWEETSCORE_HOME={home}/home", sys.executable, "-m", "worker.cli", "demo"])
    shell = f"{command}; echo {ENDED} $?; sleep {LIMIT_SECONDS}"
    tmux(socket, "new-session", "-d", "-x", str(COLUMNS), "-y", str(ROWS), shell)
    try:
        deadline = time.monotonic() + LIMIT_SECONDS
        while ENDED not in (seen := tmux(socket, "capture-pane", "-p", "-e", "-S", "-")):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the demo took longer than {LIMIT_SECONDS} s:\n{seen}")
            time.sleep(1)
    finally:
        tmux(socket, "kill-session")
    printed, _, code = seen.partition(ENDED)
    if code.split()[0] != "0":
        raise RuntimeError(f"the demo failed:\n{printed}")
    return printed.rstrip()


def draw(printed: str, folder: Path) -> None:
    """Write the part of the output from `FIRST` to `LAST` to the picture, with its colours."""
    lines = Text.from_ansi(printed).split()
    first, last = (next(i for i, line in enumerate(lines) if mark in line.plain) for mark in (FIRST, LAST))
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    for line in (Text("$ tweetscore demo"), Text("..."), *lines[first:last]):
        console.print(line, soft_wrap=True)
    height = (3 + last - first) * LINE_PIXELS
    page = folder / "demo.html"
    code = console.export_html(theme=MONOKAI, inline_styles=True, code_format="{code}")
    code = re.sub(".\ufe0f?", _cell, code)
    page.write_text(PAGE.format(font=FONT.as_uri(), line=LINE_PIXELS, code=code), encoding="utf-8")
    arguments = ["--headless", "--no-sandbox", "--disable-background-networking", "--force-device-scale-factor=1.5"]
    size = f"--window-size={WIDTH_PIXELS},{height}"
    subprocess.run(["chromium", *arguments, size, f"--screenshot={PICTURE}", page.as_uri()], check=True)  # noqa: S607


def _cell(found: re.Match[str]) -> str:
    """Put a character of two columns into a box of that width."""
    return f"<b>{found[0]}</b>" if cell_len(found[0]) == 2 else found[0]


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        draw(record(home), Path(home))


if __name__ == "__main__":
    main()
