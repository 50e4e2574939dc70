"""Encodings by Python's or PostgreSQL's name, and which of them can pass to the server as it is.

Bytes of an encoding that PostgreSQL has as a server encoding are sent untouched: ASCII bytes stand
for themselves in all of them, so delimiters and quotes can be found without decoding. All others
are recoded here.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Encoding:
    """An encoding of files."""

    name: str
    #: Python's name for it.
    codec: str
    #: The server's name for it; `None`: files are recoded here.
    server: str | None
    #: Written at the beginning of a file where nothing is recoded.
    mark: bytes = b""

    @property
    def sent_as(self) -> str:
        """What the server is told."""
        return self.server or "UTF8"

    @property
    def data_codec(self) -> str:
        """Python's name for the bytes that the server sees."""
        return self.codec if self.server else "utf-8"


UTF8 = Encoding("utf-8", "utf-8", "UTF8")

# Python's names are those that `codecs.lookup` gives: to look them all up would import them all.
_SERVER = {
    "UTF8": "utf-8",
    "EUC_CN": "gb2312",
    "EUC_JIS_2004": "euc_jis_2004",
    "EUC_JP": "euc_jp",
    "EUC_KR": "euc_kr",
    "KOI8R": "koi8-r",
    "KOI8U": "koi8-u",
    "WIN866": "cp866",
    "WIN874": "cp874",
    **{f"WIN{number}": f"cp{number}" for number in range(1250, 1259)},
    **{f"ISO_8859_{number}": f"iso8859-{number}" for number in range(5, 9)},
    **{
        f"LATIN{number}": f"iso8859-{part}"
        for number, part in enumerate((1, 2, 3, 4, 9, 10, 13, 14, 15, 16), 1)
    },
}
# Clients' encodings, in which a second byte may look like ASCII; and other names.
_RECODED = {
    **{name: name.lower() for name in ("GB18030", "GBK", "JOHAB")},
    "BIG5": "cp950",
    "SHIFTJIS": "cp932",
    "SJIS": "cp932",
    "SQLASCII": "ascii",
    "UHC": "cp949",
    "UNICODE": "utf-8",
    "ALT": "cp866",
    "KOI8": "koi8-r",
    "WIN": "cp1251",
    **dict.fromkeys(("ABC", "TCVN", "VSCII"), "cp1258"),
    "WIN932": "cp932",
    "WIN936": "gbk",
    "WIN949": "cp949",
    "WIN950": "cp950",
}


def _key(name: str) -> str:
    return re.sub(r"[^A-Z0-9]", "", name.upper())


_BY_KEY = {_key(name): codec for name, codec in {**_SERVER, **_RECODED}.items()}
_BY_CODEC = {codec: name for name, codec in _SERVER.items()}


def find_encoding(name: str) -> Encoding:
    """Find an encoding; `LookupError` where neither side knows it."""
    codec = codecs.lookup(_BY_KEY.get(_key(name), name)).name
    "".encode(codec)  # A LookupError where it encodes no text.
    if codec == "utf-8-sig":
        return Encoding(name, "utf-8", "UTF8", codecs.BOM_UTF8)
    return Encoding(name, codec, _BY_CODEC.get(codec))


def detect_encoding(start: bytes) -> Encoding:
    """Take what the mark at a file's beginning says, else UTF-8."""
    # UTF-32's first: it begins as UTF-16's does.
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return find_encoding("utf-32")
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return find_encoding("utf-16")
    return UTF8
