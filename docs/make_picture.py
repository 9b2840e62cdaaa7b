"""Draws docs/quickstart.svg from a real run of the quick start.

python docs/make_picture.py
"""

from __future__ import annotations

import html
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = Path(__file__).with_name("quickstart.svg")
COMMAND = "python cloud_services.py quickstart"
LINE, LETTER, MARGIN, BAR = 18, 7.83, 16, 30


def main() -> int:
    """Run it, draw it."""
    done = subprocess.run(
        [sys.executable, "cloud_services.py", "quickstart"], cwd=ROOT, check=True, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    lines = [f"$ {COMMAND}", *done.stdout.splitlines()]
    PICTURE.write_text(draw(lines), encoding="utf-8")
    return 0


def draw(lines: list[str]) -> str:
    """A terminal window with these lines, as SVG."""
    width = round(max(map(len, lines)) * LETTER + 2 * MARGIN)
    height = len(lines) * LINE + BAR + MARGIN
    rows = "\n".join(
        f'<text x="{MARGIN}" y="{BAR + LINE * (number + 1) - 6}" xml:space="preserve"'
        f"{_style(line)}>{html.escape(line)}</text>"
        for number, line in enumerate(lines)
    )
    dots = "".join(
        f'<circle cx="{20 + 18 * n}" cy="16" r="5.5" fill="{color}"/>'
        for n, color in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        f' width="{width}" height="{height}">\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="#1e2227"/>{dots}\n'
        '<g font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"'
        f' font-size="13" fill="#d7dae0">\n{rows}\n</g>\n</svg>\n'
    )


def _style(line: str) -> str:
    if line.startswith("$"):
        return ' fill="#98c379"'
    heading = line.endswith(":") or line.startswith("step ")
    return ' font-weight="bold" fill="#61afef"' if heading else ""


if __name__ == "__main__":
    sys.exit(main())
