"""Names and signs as people type them; this module is imported by `pgmonkey --help`."""

from __future__ import annotations

import re


def split_names(text: str, separator: str) -> list[str]:
    """Take names apart; quotes keep one together, doubled ones in it stand for one.

    Gives none where the text is something else.
    """
    name = rf'"(?:[^"]|"")+"|[^"\s{separator}][^{separator}]*'
    if not re.fullmatch(rf"\s*(?:{name})\s*(?:[{separator}]\s*(?:{name})\s*)*", text):
        return []
    return [
        part[1:-1].replace('""', '"') if part.startswith('"') else part.strip()
        for part in re.findall(name, text)
    ]


def as_sign(text: object) -> str:
    """Judge a delimiter or quote character; `ValueError` says what it must be.

    A tab, which is hard to type, has names.
    """
    if not isinstance(text, str):
        raise ValueError("must be one character, in quotes")
    one = "\t" if text.lower() in ("tab", "\\t") else text
    if len(one) != 1 or not one.isascii() or one in "\r\n\0":
        raise ValueError("must be one ASCII character, and no line end")
    return one


def refuse_doubles(names: list[str]) -> None:
    """Raise `ValueError` where a name comes twice."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is named twice")
