"""Make the documentation's pictures of terminals: what real runs print, as SVG.

python docs/pictures/make.py [DIRECTORY]

They are written beside this file, or into the directory. What runs is on the pages already.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

import psycopg
import yaml
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from pytest_pgmonkey.testing.servers.embedded.binaries import find_binaries
from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE: Final = Path(__file__).resolve().parent
WIDTH: Final = 110
NARROW: Final = 90
#: Each picture of a failing test: its page, the page's file that runs, and the command.
TESTS: Final = {
    "failure.svg": ("failures.md", "test_stock.py", "python -m pytest -q --tb=short test_stock.py"),
}
#: Each picture of the command `pgmonkey` on a file `shop.yaml`, with a server of its own.
COMMANDS: Final = {
    "pgconfig-test.svg": "pgmonkey pgconfig test --connconfig shop.yaml --connection-type pool",
    "audit.svg": "pgmonkey pgserverconfig --connconfig shop.yaml --processes 4 --audit",
}
#: What `shop.yaml` has besides the server's address.
SHOP: Final = {
    "sync_settings": {"statement_timeout": "30s"},
    "pool_settings": {"min_size": 2, "max_size": 20},
}
ROLES: Final = """
    CREATE ROLE shop LOGIN;
    GRANT SELECT ON pg_hba_file_rules TO shop;
    GRANT EXECUTE ON FUNCTION pg_hba_file_rules() TO shop;
"""
# Options of the run that would only distract from what it is about.
ADDOPTS: Final = "-p pgmonkey -p no:cacheprovider --color=yes"
# What would change the output from one machine to the next, or from one run to the next.
DROPPED: Final = re.compile(r"PGMONKEY_|PYTEST_|CI$|BUILD_NUMBER$|NO_COLOR$|COV_")

# Dark on light pages and on dark ones; every colour has a contrast of 4.5 or more.
THEME: Final = TerminalTheme(
    (30, 32, 38),
    (216, 219, 224),
    [
        (122, 128, 140),
        (240, 118, 120),
        (150, 200, 120),
        (230, 190, 100),
        (120, 175, 240),
        (205, 150, 225),
        (95, 200, 205),
        (216, 219, 224),
    ],
    [
        (150, 156, 168),
        (255, 140, 140),
        (170, 215, 140),
        (245, 210, 130),
        (145, 195, 250),
        (220, 170, 240),
        (125, 215, 220),
        (240, 242, 245),
    ],
)
# Of the reader's own fonts. Without a size it is as wide as its place, on a telephone too.
FORMAT: Final = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">
<style>
.{unique_id} {{
    font: {char_height}px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}}
{styles}
</style>
<defs>
{lines}
</defs>
{chrome}
<g class="{unique_id}" transform="translate({terminal_x}, {terminal_y})">
{backgrounds}
{matrix}
</g>
</svg>
"""


def file_of(page: str, name: str) -> str:
    """Give the file that a page shows."""
    text = (HERE.parent / page).read_text("utf-8")
    block = re.compile(rf"<!-- test: file {re.escape(name)} -->\n```\w+\n(.*?)^```$", re.M | re.S)
    found = block.search(text)
    if found is None:
        sys.exit(f"{page} has no block that is the file {name}")
    return found[1]


def output_of(command: str, name: str, code: str) -> str:
    """Run a command on a file, and give what a terminal would show."""
    environ = {name: value for name, value in os.environ.items() if not DROPPED.match(name)}
    environ |= {
        "COLUMNS": str(WIDTH),
        "PYTEST_ADDOPTS": ADDOPTS,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PGMONKEY_TIMELINE": "failed",  # a run with options has its server in the header alone
    }
    program, *arguments = command.split()
    programs = {"python": [sys.executable], "pgmonkey": [sys.executable, "-m", "pytest_pgmonkey"]}
    with TemporaryDirectory() as directory:
        Path(directory, name).write_text(code, "utf-8")
        Path(directory, "pytest.ini").write_text("[pytest]\n", "utf-8")
        result = subprocess.run(
            [*programs[program], *arguments],
            cwd=directory,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=120,
            check=False,
        )
    return f"\x1b[2m$\x1b[0m \x1b[1m{command}\x1b[0m\n{result.stdout}"


@contextmanager
def shop_config() -> Iterator[str]:
    """Start a server, and give the file `shop.yaml` that leads to it."""
    server = EmbeddedServer.start(find_binaries())
    try:
        server.create_database("shop")
        with psycopg.connect(**server.admin_conninfo("shop"), autocommit=True) as conn:
            conn.execute(ROLES)
        config = server.config("shop")
        config["connection_settings"]["user"] = "shop"
        yield yaml.safe_dump({**config, **SHOP})
    finally:
        server.stop()


def svg_of(output: str, width: int = WIDTH) -> str:
    """Draw what a terminal shows."""
    console = Console(
        record=True,
        width=width,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        legacy_windows=False,
    )
    console.print(Text.from_ansi(output), soft_wrap=True)
    drawn = console.export_svg(title="", theme=THEME, code_format=FORMAT, unique_id="terminal")
    drawn = re.sub(r"<text[^>]*>\n</text>", "", drawn)  # rich draws the ends of lines
    # A line for each text, so that a change is seen as one.
    return drawn.replace("</text><text", "</text>\n<text")


def main() -> None:
    """Make all of them."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    for picture, (page, name, command) in TESTS.items():
        drawn = svg_of(output_of(command, name, file_of(page, name)))
        (directory / picture).write_text(drawn, "utf-8")
    with shop_config() as config:
        for picture, command in COMMANDS.items():
            drawn = svg_of(output_of(command, "shop.yaml", config), NARROW)
            (directory / picture).write_text(drawn, "utf-8")


if __name__ == "__main__":
    main()
