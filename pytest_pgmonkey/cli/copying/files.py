"""CSV files as blocks of bytes that the server can take: packed or not, recoded where needed."""

from __future__ import annotations

import codecs
import os
import stat
import sys
import zlib
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, BinaryIO

from ..running import CommandError
from .encodings import UTF8, Encoding, detect_encoding

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

BLOCK = 1 << 17


# --- reading ---


class Source:
    """A file to import; standard input where the path is '-'."""

    def __init__(self, path: str, encoding: Encoding | None) -> None:
        self.path = path
        self.name = "standard input" if path == "-" else path
        self.encoding = encoding or UTF8
        self._asked = encoding
        self._raw: Any = None

    @property
    def total(self) -> int | None:
        """The bytes of the file, where it has an end that is known."""
        try:
            status = os.fstat(self._raw.fileno())
        except OSError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    @property
    def done(self) -> int:
        """The bytes that have been read, packed ones where the file is packed."""
        try:
            return int(self._raw.tell())
        except OSError:
            return 0  # A pipe has no position.

    @property
    def repeatable(self) -> bool:
        """Whether the file can be read once more."""
        return self.path != "-" and os.path.isfile(self.path)

    @contextmanager
    def open(self) -> Iterator[Iterator[bytes]]:
        """Open the file for a block in which its data can be had, without a mark in front."""
        with self._telling():
            # Closed below: standard input stays open.
            self._raw = sys.stdin.buffer if self.path == "-" else open(self.path, "rb", 0)  # noqa: SIM115
        try:
            blocks = self._blocks()
            start = next(blocks, b"")
            self.encoding = self._asked or detect_encoding(start)
            mark = "\ufeff".encode(self.encoding.codec, "ignore")
            blocks = chain([start.removeprefix(mark)], blocks)
            yield blocks if self.encoding.server else self._recoded(blocks)
        finally:
            if self.path != "-":
                self._raw.close()

    def _blocks(self) -> Iterator[bytes]:
        file = self._raw
        if self.path.lower().endswith(".gz"):
            from gzip import GzipFile

            file = GzipFile(fileobj=file, mode="rb")
        with self._telling():
            while block := file.read(BLOCK):
                yield block

    def _recoded(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        line = 1
        try:
            for text in codecs.iterdecode(blocks, self.encoding.codec):
                line += text.count("\n")
                yield text.encode("utf-8", "surrogatepass")
        except UnicodeError as error:
            what = "the bytes are not"
            if isinstance(error, UnicodeDecodeError):
                before = error.object[: error.start].decode(self.encoding.codec, "replace")
                line += before.count("\n")
                what = f"byte 0x{error.object[error.start]:02x} is not"
            raise CommandError(
                f"{self.name}: line {line}: {what} {self.encoding.name}; --encoding names another"
            ) from error

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError, ValueError, zlib.error) as error:
            # An OSError of gzip itself has no reason of the system's.
            if isinstance(error, OSError) and error.strerror:
                problem = f"cannot be read: {error.strerror}"
            elif isinstance(error, ValueError):
                problem = "cannot be read: bad path"
            else:
                problem = f"is damaged: {error}"
            raise CommandError(f"{self.name}: {problem}") from error


# --- writing ---


class Target:
    """A file that takes whole rows in UTF-8, or in an encoding that the server knows."""

    def __init__(self, file: Any, encoding: Encoding, name: str) -> None:
        self._file = file
        self._encoding = encoding
        self._name = name
        self._encoder: Any = None
        if encoding.server is None:
            self._encoder = codecs.getincrementalencoder(encoding.codec)("strict")
        file.write(encoding.mark)

    def write(self, rows: Iterable[Any]) -> int:
        """Write rows and give how many bytes the server has sent for them."""
        data: bytes = b"".join(rows)
        self._file.write(self._recoded(data) if self._encoder else data)
        return len(data)

    def _recoded(self, data: bytes) -> bytes:
        try:
            recoded: bytes = self._encoder.encode(data.decode())
        except UnicodeEncodeError as error:
            sign = error.object[error.start]
            raise CommandError(
                f"{self._name}: {sign!r} cannot be written in {self._encoding.name}; "
                "--encoding names another"
            ) from error
        return recoded


@contextmanager
def open_target(path: str, encoding: Encoding) -> Iterator[Target]:
    """Open a file to export to: it is there when the block has ended well, else as before."""
    if path == "-":
        yield Target(sys.stdout.buffer, encoding, "standard output")
        sys.stdout.buffer.flush()
        return
    try:
        with _replacing(path) as raw:
            if path.lower().endswith(".gz"):
                from gzip import GzipFile

                # No name and no time in it: the same rows give the same file.
                with GzipFile("", "wb", 6, raw, 0) as packed:
                    yield Target(packed, encoding, path)
            else:
                yield Target(raw, encoding, path)
    except OSError as error:
        raise CommandError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    """Write beside the file that `path` leads to, and put the new one in its place at the end."""
    target = os.path.realpath(path)
    old = os.stat(target).st_mode if os.path.exists(target) else None
    if old is not None and not stat.S_ISREG(old):
        if stat.S_ISDIR(old):
            raise IsADirectoryError(0, "is a directory", target)
        with open(target, "wb") as file:  # A pipe or a device.
            yield file
        return
    # From the first moment on, only those read it who may read the file itself.
    mode = 0o666 if old is None else stat.S_IMODE(old)
    directory, name = os.path.split(target)
    temporary = os.path.join(directory, f".{name}.{os.urandom(4).hex()}.part")
    try:
        opener = partial(os.open, mode=mode)
        with open(temporary, "xb", BLOCK, opener=opener) as file:
            yield file
        if old is not None:
            os.chmod(temporary, mode)  # The umask has taken a part of it.
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
