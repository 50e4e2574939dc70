"""Encodings by Python's or PostgreSQL's name, and which of them can pass to the server as it is.

Bytes of an encoding that PostgreSQL has as a server encoding are sent untouched: ASCII bytes stand
for themselves in all of them, so delimiters and quotes can be found without decoding. All others
are recoded here.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

__all__ = ["UTF8", "Encoding", "detect_encoding", "find_encoding"]


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
    "ISO_8859_5": "iso8859-5",
    "ISO_8859_6": "iso8859-6",
    "ISO_8859_7": "iso8859-7",
    "ISO_8859_8": "iso8859-8",
    "KOI8R": "koi8-r",
    "KOI8U": "koi8-u",
    "LATIN1": "iso8859-1",
    "LATIN2": "iso8859-2",
    "LATIN3": "iso8859-3",
    "LATIN4": "iso8859-4",
    "LATIN5": "iso8859-9",
    "LATIN6": "iso8859-10",
    "LATIN7": "iso8859-13",
    "LATIN8": "iso8859-14",
    "LATIN9": "iso8859-15",
    "LATIN10": "iso8859-16",
    "WIN866": "cp866",
    "WIN874": "cp874",
    "WIN1250": "cp1250",
    "WIN1251": "cp1251",
    "WIN1252": "cp1252",
    "WIN1253": "cp1253",
    "WIN1254": "cp1254",
    "WIN1255": "cp1255",
    "WIN1256": "cp1256",
    "WIN1257": "cp1257",
    "WIN1258": "cp1258",
}
# Clients' encodings, in which a second byte may look like ASCII; and other names.
_RECODED = {
    "ABC": "cp1258",
    "ALT": "cp866",
    "BIG5": "cp950",
    "GB18030": "gb18030",
    "GBK": "gbk",
    "JOHAB": "johab",
    "KOI8": "koi8-r",
    "MSKANJI": "cp932",
    "SHIFTJIS": "cp932",
    "SHIFTJIS2004": "shift_jis_2004",
    "SJIS": "cp932",
    "SQLASCII": "ascii",
    "TCVN": "cp1258",
    "UHC": "cp949",
    "UNICODE": "utf-8",
    "VSCII": "cp1258",
    "WIN": "cp1251",
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


# The longer ones first: UTF-32's begins as UTF-16's does.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def detect_encoding(start: bytes) -> Encoding:
    """Take what the mark at a file's beginning says, else UTF-8."""
    for mark, name in _MARKS:
        if start.startswith(mark):
            return find_encoding(name)
    return UTF8
