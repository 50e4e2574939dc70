"""The documentation's pictures of terminals show what the runs print today."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PICTURES = sorted((DOCS / "pictures").glob("*.svg"))


def words(picture: Path) -> list[str]:
    """The words of a picture, without numbers: times are others in each run."""
    texts = ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")
    return re.sub(r"[\d.]+", "", " ".join(text.text or "" for text in texts)).split()


def test_pictures_are_of_today(tmp_path: Path) -> None:
    """Made again, they have the same words; if not: python docs/pictures/make.py."""
    pytest.importorskip("rich", reason="needs rich: pip install '.[docs]'")
    command = [sys.executable, str(DOCS / "pictures" / "make.py"), str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)
    made = sorted(tmp_path.iterdir())
    assert [path.name for path in made] == [path.name for path in PICTURES]
    for picture, new in zip(PICTURES, made, strict=True):
        assert words(picture) == words(new), picture.name
        assert {"pgmonkey", "statements", "ROLLBACK"} <= set(words(picture)), picture.name


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_a_picture_needs_nothing_else(picture: Path) -> None:
    """No font or image from elsewhere; it is as wide as its place, and on a page."""
    text = picture.read_text("utf-8")
    root = ElementTree.fromstring(text)
    assert "viewBox" in root.attrib
    assert not {"width", "height"} & set(root.attrib)
    assert re.findall(r"https?://[^\"')]+", text) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"@import|@font-face|url\((?!#)|<image|<script|href", text)
    pages = "".join(page.read_text("utf-8") for page in DOCS.glob("*.md"))
    assert f"](pictures/{picture.name})" in pages
