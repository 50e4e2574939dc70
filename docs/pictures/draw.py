"""Draw the documentation's diagrams as SVG: boxes, lines and words in the places given here.

`costs.svg` is drawn from `costs.json`, which `tests/benchmarks/bench_costs.py` writes.

python docs/pictures/draw.py [DIRECTORY]

They are written beside this file, or into the directory. Each has a background of its own: a page
may be light in a browser that prefers dark.
"""

from __future__ import annotations

import json
import sys
from html import escape
from math import log10
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
WIDTH: Final = 600
#: Every text has a contrast of 4.5 or more with what is behind it, in light and in dark.
STYLE: Final = """\
text { font: 16px system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: #1c2330; }
.middle { text-anchor: middle; }
.end { text-anchor: end; }
.small { font-size: 14px; fill: #4c566a; }
.title { font-weight: 600; }
.code { font: 14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
rect { fill: #ffffff; stroke: #8791a5; }
.page { fill: #f4f6fa; stroke: #d5dae4; }
.app { fill: #e3edfb; stroke: #3f74c4; }
.real { fill: #e4f3e6; stroke: #3f8f4c; }
.virtual { fill: #fbeed9; stroke: #b37a1d; stroke-dasharray: 6 4; }
path { fill: none; stroke: #5a6478; stroke-width: 1.6; }
.tip { fill: #5a6478; stroke: none; }
@media (prefers-color-scheme: dark) {
text { fill: #e4e8f0; }
.small { fill: #aeb7c6; }
rect { fill: #262b35; stroke: #6d7789; }
.page { fill: #1a1e26; stroke: #363d4a; }
.app { fill: #1f3150; stroke: #6d9ee8; }
.real { fill: #1d3a24; stroke: #69bd77; }
.virtual { fill: #40311a; stroke: #d9a24b; }
path { stroke: #9aa5b8; }
.tip { fill: #9aa5b8; }
}"""


def box(x: int, y: int, width: int, height: int, kind: str = "", *lines: str) -> str:
    """Draw a box with lines of text in its middle, the first one as a title."""
    top = y + height // 2 + 6 - 10 * (len(lines) - 1)
    texts = [
        text(x + width // 2, top + 20 * number, line, "small" if number else "title", middle=True)
        for number, line in enumerate(lines)
    ]
    attribute = f' class="{kind}"' if kind else ""
    rect = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8"{attribute}/>'
    return "\n".join([rect, *texts])


def text(x: int, y: int, words: str, kind: str = "", *, middle: bool = False) -> str:
    """Write words, from a place on or around it."""
    classes = " ".join(filter(None, [kind, "middle" if middle else ""]))
    attribute = f' class="{classes}"' if classes else ""
    return f'<text x="{x}" y="{y}"{attribute}>{escape(words)}</text>'


def arrow(*points: tuple[int, int], both: bool = False) -> str:
    """Draw a line through some points, with a tip at its end, or at both."""
    line = "M" + " L".join(f"{x} {y}" for x, y in points)
    tips = [tip(points[-2], points[-1])]
    if both:
        tips.append(tip(points[1], points[0]))
    return "\n".join([f'<path d="{line}"/>', *tips])


def tip(start: tuple[int, int], end: tuple[int, int]) -> str:
    """Draw the tip of a line that is upright or level."""
    (x, y), (dx, dy) = end, (end[0] - start[0], end[1] - start[1])
    if dx:
        back = x - 9 if dx > 0 else x + 9
        return f'<path class="tip" d="M{x} {y} L{back} {y - 5} L{back} {y + 5} Z"/>'
    back = y - 9 if dy > 0 else y + 9
    return f'<path class="tip" d="M{x} {y} L{x - 5} {back} L{x + 5} {back} Z"/>'


def sides() -> tuple[int, list[str]]:
    """Draw the same code in production and in a test."""
    types = "normal · pool · async · async_pool"
    return 328, [
        box(120, 16, 360, 84, "app", "Your application, unchanged", types),
        arrow((180, 100), (180, 164)),
        arrow((420, 100), (420, 164)),
        text(168, 138, "in production", "title end"),
        text(432, 138, "in a test", "title"),
        box(24, 164, 264, 148, "real", "Your server", "commits are for good"),
        box(312, 164, 264, 148, "virtual"),
        text(444, 202, "One transaction", "title", middle=True),
        text(444, 228, "on the tests' own server:", "small", middle=True),
        text(444, 248, "commits and errors behave", "small", middle=True),
        text(444, 268, "as usual, and all of it is rolled", "small", middle=True),
        text(444, 288, "back when the test ends", "small", middle=True),
    ]


def timeline() -> tuple[int, list[str]]:
    """Draw what becomes of an application's transactions."""
    rows = [
        ("", "BEGIN", "the test begins"),
        ("BEGIN", "SAVEPOINT", ""),
        ("INSERT …", "INSERT …", ""),
        ("COMMIT", "SAVEPOINT", "others see the row now"),
        ("BEGIN", "", "the savepoint stands already"),
        ("UPDATE …", "UPDATE …", ""),
        ("ROLLBACK", "ROLLBACK TO", "the UPDATE is undone"),
        ("", "ROLLBACK", "the test ends: nothing is left"),
    ]
    parts = [
        text(88, 36, "Your code", "title", middle=True),
        text(286, 36, "PostgreSQL", "title", middle=True),
    ]
    parts.append(box(16, 102, 144, 114, "virtual"))
    parts.append(box(16, 226, 144, 114, "virtual"))
    parts.append(box(206, 52, 160, 336, "real"))
    for number, (app, server, note) in enumerate(rows):
        y = 82 + 41 * number
        if app:
            parts.append(text(88, y, app, "code middle"))
            if server:
                parts.append(arrow((160, y - 5), (206, y - 5)))
        if server:
            parts.append(text(286, y, server, "code middle"))
        if note:
            parts.append(text(382, y, note, "small"))
    return 404, parts


def gateway() -> tuple[int, list[str]]:
    """Draw the ways into a test's session."""
    return 440, [
        box(24, 16, 240, 92, "app", "Handles", "of PGConnectionManager,", "in the pytest process"),
        box(
            312,
            16,
            264,
            92,
            "app",
            "Any driver, any process",
            "asyncpg, SQLAlchemy, Django,",
            "psql, child processes",
        ),
        arrow((444, 108), (444, 184)),
        text(456, 140, "one address:", "small"),
        text(456, 160, "DATABASE_URL", "code"),
        box(336, 184, 216, 64, "", "Gateway", "in the pytest process"),
        arrow((144, 108), (144, 290)),
        text(156, 196, "by themselves", "small"),
        arrow((444, 248), (444, 290)),
        box(
            24,
            290,
            552,
            64,
            "virtual",
            "The test's one session",
            "one transaction, rolled back when the test ends",
        ),
        arrow((300, 354), (300, 384)),
        box(200, 384, 200, 40, "real", "PostgreSQL"),
    ]


def pool() -> tuple[int, list[str]]:
    """Draw the life of a pool."""
    return 436, [
        box(24, 16, 320, 64, "app", "Open", "connects min_size connections"),
        arrow((184, 80), (184, 112)),
        box(24, 112, 320, 84, "", "Ready", "idle connections wait"),
        arrow((344, 136), (410, 136)),
        box(
            410,
            92,
            166,
            104,
            "",
            "Close",
            "disconnect(), close(),",
            "or the process or",
            "event loop ends",
        ),
        arrow((184, 196), (184, 228)),
        box(
            24,
            228,
            320,
            84,
            "real",
            "Lend",
            "to a block: with pool as conn",
            "grows to max_size, then callers wait",
        ),
        arrow((184, 312), (184, 344)),
        box(
            24,
            344,
            320,
            76,
            "real",
            "Give back",
            "commit or roll back; undo autocommit,",
            "row_factory …; replace a dead connection",
        ),
        arrow((344, 382), (380, 382), (380, 174), (344, 174)),
        text(392, 290, "ready for the next block", "small"),
    ]


#: Kinds of `costs.json`, as they are called and coloured in the plot.
COSTS: Final = {
    "by_hand": ("hand-written rollback", ""),
    "rollback_pool": ("rollback, pool", "app"),
    "rollback": ("rollback, normal", "app"),
    "pytest_django": ("pytest-django's db", ""),
    "gateway": ("rollback, a foreign pool", "app"),
    "clone": ("clone", "real"),
    "pytest_postgresql": ("pytest-postgresql", ""),
}
#: The tables of the schema in the plot, and what of a millisecond its left edge is.
TABLES: Final = "100"
LEAST: Final = 0.1


def costs() -> tuple[int, list[str]]:
    """Draw what a test costs, each step to the right ten times as much."""
    measured = json.loads((HERE / "costs.json").read_text("utf-8"))[TABLES]
    left, decade = 240, 95
    bottom = 60 + 32 * len(COSTS)
    parts = [text(24, 34, f"Milliseconds a test adds, {TABLES} tables", "title")]
    for step in range(4):
        x = left + decade * step
        parts.append(f'<path d="M{x} 48 L{x} {bottom}" stroke-opacity="0.35"/>')
        parts.append(text(x, bottom + 20, f"{LEAST * 10**step:g}", "small middle"))
    for number, (kind, (label, color)) in enumerate(COSTS.items()):
        y, cost = 56 + 32 * number, measured[kind]
        width = max(round(decade * log10(cost / LEAST)), 3)
        attribute = f' class="{color}"' if color else ""
        parts.append(text(left - 12, y + 17, label, "small end"))
        parts.append(f'<rect x="{left}" y="{y}" width="{width}" height="24" rx="3"{attribute}/>')
        parts.append(text(left + width + 8, y + 17, f"{cost:.3g}", "small"))
    return bottom + 36, parts


DIAGRAMS: Final = {
    "sides.svg": sides,
    "timeline.svg": timeline,
    "gateway.svg": gateway,
    "pool.svg": pool,
    "costs.svg": costs,
}


def main() -> None:
    """Draw all of them."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    for name, draw in DIAGRAMS.items():
        height, parts = draw()
        size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
        page = f'<rect x="1" y="1" width="{WIDTH - 2}" height="{height - 2}" rx="10" class="page"/>'
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
            f"<style>\n{STYLE}\n</style>",
            page,
            *parts,
            "</svg>\n",
        ]
        (directory / name).write_text("\n".join(lines), "utf-8")


if __name__ == "__main__":
    main()
