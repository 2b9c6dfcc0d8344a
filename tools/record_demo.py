"""Writes docs/demo.svg: `smart demo` in a terminal of 80 columns, as an animation.

    pip install pyte
    python tools/record_demo.py

Everything is shown as it came, but that silences, in which answers are timed, are cut to a second.

Needed by the README's first picture.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import pty
import struct
import sys
import termios
import time
from collections import defaultdict
from pathlib import Path
from xml.sax.saxutils import escape

import pyte

OUTPUT = Path(__file__).parents[1] / "docs" / "demo.svg"
COMMAND = "smart demo"
COLUMNS = 80
ROWS = 30
SILENCE = 1.0  # seconds, at most
FRAME = 0.1  # seconds, at least
BLOCKS = "▏▎▍▌▋▊▉█"  # eighths
STAY = 6.0  # seconds that the end is shown
WIDTH = 8.4  # of a character
HEIGHT = 18
MARGIN = 16
COLOURS = {"default": "#d6d9dc", "green": "#43cc8e", "brown": "#f2a45f", "dim": "#7d848b"}

Run = tuple[int, str, str]  # column, text, colour
Frame = tuple[float, list[tuple[Run, ...]]]  # second, rows


def record() -> list[tuple[float, bytes]]:
    """What the command writes to a terminal, with the seconds since its start."""
    child, terminal = pty.fork()
    if not child:
        os.environ.update(TERM="xterm-256color", COLUMNS=str(COLUMNS), LINES=str(ROWS))
        os.environ.pop("NO_COLOR", None)
        module = "smart_decoding.cli.main"
        os.execv(sys.executable, [sys.executable, "-m", module, *COMMAND.split()[1:]])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    started = time.monotonic()
    found = []
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # Linux's way to say that the other side is closed
            data = b""
        if not data:
            break
        found.append((time.monotonic() - started, data))
    if os.waitpid(child, 0)[1]:
        raise SystemExit(b"".join(data for _, data in found).decode())
    return found


def frames(recording: list[tuple[float, bytes]]) -> list[Frame]:
    """The screen at each time it had changed, silences cut."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    stream.feed(f"$ {COMMAND}\r\n".encode())
    found = [(0.0, rows_of(screen))]
    now = 0.0
    for (before, _), (at, data) in itertools.pairwise([(0.0, b""), *recording]):
        now += min(SILENCE, at - before)
        stream.feed(data)
        frame = (now, rows_of(screen))
        if now - found[-1][0] >= FRAME:
            found.append(frame)
        else:  # the newest state of a moment counts
            found[-1] = (found[-1][0], frame[1])
    return found


def rows_of(screen: pyte.Screen) -> list[tuple[Run, ...]]:
    """Runs of one colour."""
    rows = []
    for y in range(ROWS):
        cells = [screen.buffer[y][x] for x in range(COLUMNS)]
        runs = []
        for colour, group in itertools.groupby(range(COLUMNS), lambda x: cells[x].fg):  # noqa: B023
            places = list(group)
            text = "".join(cells[x].data for x in places)
            if text.strip():
                indent = len(text) - len(text.lstrip())
                runs.append((places[0] + indent, text.strip(), colour))
        rows.append(tuple(runs))
    return rows


def svg(shown: list[Frame]) -> str:
    """The animation. A row that stays as it is from one frame to others is drawn once."""
    total = shown[-1][0] + STAY
    spans: dict[tuple[float, float], list[str]] = defaultdict(list)
    for y in range(ROWS):
        for row, group in itertools.groupby(shown, lambda frame: frame[1][y]):  # noqa: B023
            since = next(group)[0]
            until = min((at for at, rows in shown if at > since and rows[y] != row), default=total)
            spans[since, until].extend(drawn(run, y) for run in row)
    items = [
        f'<g visibility="{"visible" if until == total else "hidden"}">'
        f"{animation(since / total, until / total, total)}{''.join(texts)}</g>"
        for (since, until), texts in sorted(spans.items())
        if texts
    ]
    width = round(COLUMNS * WIDTH + 2 * MARGIN)
    height = ROWS * HEIGHT + 2 * MARGIN
    font = "font:14px ui-monospace,'DejaVu Sans Mono',Menlo,Consolas,monospace;white-space:pre"
    colours = "".join(f".{name}{{fill:{value}}}" for name, value in COLOURS.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
        f"<title>{COMMAND}, recorded; silences are cut to {SILENCE:g} s</title>"
        f"<style>text{{{font}}}{colours}</style>"
        f'<rect width="100%" height="100%" rx="10" fill="#16191c"/>\n'
        + "\n".join(items)
        + "\n</svg>\n"
    )


def drawn(run: Run, y: int) -> str:
    """A run, as wide as its characters whatever the font; bars as bars."""
    column, text, colour = run
    name = colour if colour in COLOURS else "default"
    x = MARGIN + column * WIDTH
    if set(text) <= set(BLOCKS):
        width = sum(BLOCKS.index(block) + 1 for block in text) * WIDTH / 8
        place = f'x="{x:g}" y="{MARGIN + HEIGHT * y + 2}"'
        return f'<rect class="{name}" {place} width="{width:g}" height="13"/>'
    return (
        f'<text class="{name}" x="{x:g}" y="{MARGIN + HEIGHT * y + 13}" '
        f'textLength="{len(text) * WIDTH:g}" lengthAdjust="spacingAndGlyphs">{escape(text)}</text>'
    )


def animation(since: float, until: float, total: float) -> str:
    """What shows an element in a part of the time, over and over."""
    steps = [(0.0, "hidden")] if since > 0 else []
    steps.append((since, "visible"))
    if until < 1:
        steps.append((until, "hidden"))
    if len(steps) == 1:
        return ""
    values = ";".join(value for _, value in steps)
    times = ";".join(f"{at:.4f}".rstrip("0").rstrip(".") or "0" for at, _ in steps)
    return (
        f'<animate attributeName="visibility" values="{values}" keyTimes="{times}" '
        f'calcMode="discrete" dur="{total:.2f}s" repeatCount="indefinite"/>'
    )


if __name__ == "__main__":
    OUTPUT.write_text(svg(frames(record())), encoding="utf-8")
    print(f"{OUTPUT}: {OUTPUT.stat().st_size / 1000:.0f} KB")
