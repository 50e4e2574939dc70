"""The documentation's pictures: terminals show what runs print today, scripts draw diagrams."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PICTURES = sorted((DOCS / "pictures").glob("*.svg"))
#: Words that a picture of a terminal must show.
SHOWN = {
    "failure.svg": {"pgmonkey", "statements", "ROLLBACK"},
    "pgconfig-test.svg": {"PostgreSQL", "shop", "TLS:"},
    "audit.svg": {"max_connections", "ok", "mismatch", "scram-sha-"},
}


def words(picture: Path) -> list[str]:
    """The words of a picture, without numbers: times are others in each run."""
    texts = ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")
    return re.sub(r"[\d.]+", "", " ".join(text.text or "" for text in texts)).split()


def made(script: str, directory: Path) -> dict[str, Path]:
    """Make pictures anew."""
    command = [sys.executable, str(DOCS / "pictures" / script), str(directory)]
    subprocess.run(command, check=True, timeout=120)
    return {path.name: path for path in directory.iterdir()}


def test_terminals_are_of_today(tmp_path: Path) -> None:
    """Made again, they have the same words; if not: python docs/pictures/make.py."""
    pytest.importorskip("rich", reason="needs rich: pip install '.[docs]'")
    new = made("make.py", tmp_path)
    assert SHOWN.keys() == new.keys()
    for name, shown in SHOWN.items():
        assert words(DOCS / "pictures" / name) == words(new[name]), name
        assert shown <= set(words(new[name])), name


def test_diagrams_are_as_drawn(tmp_path: Path) -> None:
    """Drawn again, they are the same; if not: python docs/pictures/draw.py."""
    new = made("draw.py", tmp_path)
    assert sorted({*new, *SHOWN}) == [path.name for path in PICTURES]
    for name, picture in new.items():
        assert (DOCS / "pictures" / name).read_text("utf-8") == picture.read_text("utf-8"), name


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_a_picture_needs_nothing_else(picture: Path) -> None:
    """No font or image from elsewhere; it fits into its place, and is on a page."""
    text = picture.read_text("utf-8")
    root = ElementTree.fromstring(text)
    assert "viewBox" in root.attrib
    if picture.name in SHOWN:  # As wide as its place; a diagram has its own width.
        assert not {"width", "height"} & set(root.attrib)
    assert re.findall(r"https?://[^\"')]+", text) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"@import|@font-face|url\((?!#)|<image|<script|href", text)
    pages = "".join(page.read_text("utf-8") for page in DOCS.glob("*.md"))
    assert f"](pictures/{picture.name})" in pages
