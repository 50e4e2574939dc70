"""CSV files as blocks of bytes that the server can take: packed or not, recoded where needed."""

from __future__ import annotations

import codecs
import os
import stat
import sys
import zlib
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO

from ..common import CommandError
from .encodings import UTF8, Encoding, detect_encoding

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Source", "Target", "open_target"]

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
        try:
            return self.path != "-" and stat.S_ISREG(os.stat(self.path).st_mode)
        except OSError:
            return False

    @contextmanager
    def open(self) -> Iterator[Iterator[bytes]]:
        """Open the file for a block in which its data can be had, without a mark in front."""
        file = self._open()
        try:
            with self._telling():
                start = file.read(BLOCK)
            self.encoding = self._asked or detect_encoding(start)
            yield self._data(start, file)
        finally:
            if self.path != "-":
                self._raw.close()

    def _open(self) -> Any:
        if self.path == "-":
            self._raw = sys.stdin.buffer
            return self._raw
        with self._telling():
            self._raw = open(self.path, "rb", buffering=0)  # noqa: SIM115 - closed by its owner
        if self.path.lower().endswith(".gz"):
            from gzip import GzipFile

            return GzipFile(fileobj=self._raw, mode="rb")
        return self._raw

    def _data(self, start: bytes, file: Any) -> Iterator[bytes]:
        blocks = self._blocks(start, file)
        if self.encoding.server is None:
            return self._recoded(blocks)
        return _unmarked(blocks) if self.encoding.server == "UTF8" else blocks

    def _blocks(self, start: bytes, file: Any) -> Iterator[bytes]:
        block = start
        while block:
            yield block
            with self._telling():
                block = file.read(BLOCK)

    def _recoded(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        decoder = codecs.getincrementaldecoder(self.encoding.codec)("strict")
        lines, first = 1, True
        for block, last in _with_last(blocks):
            try:
                text = decoder.decode(block, last)
            except UnicodeError as error:
                raise self._undecodable(error, lines) from None
            lines += text.count("\n")
            if first and text:
                first, text = False, text.removeprefix("\ufeff")
            yield text.encode("utf-8", "surrogatepass")

    def _undecodable(self, error: UnicodeError, line: int) -> CommandError:
        what = "the bytes are not"
        if isinstance(error, UnicodeDecodeError):
            before = error.object[: error.start].decode(self.encoding.codec, "replace")
            line += before.count("\n")
            what = f"byte 0x{error.object[error.start]:02x} is not"
        return CommandError(
            f"{self.name}: line {line}: {what} {self.encoding.name}; --encoding names another",
            error,
        )

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
            raise CommandError(f"{self.name}: {problem}", error) from None


def _unmarked(blocks: Iterator[bytes]) -> Iterator[bytes]:
    for block in blocks:
        yield block.removeprefix(codecs.BOM_UTF8)
        break
    yield from blocks


def _with_last(blocks: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
    for block in blocks:
        yield block, False
    yield b"", True


# --- writing ---


class Target:
    """A file that takes blocks, recoded where the server does not know its encoding."""

    def __init__(self, file: Any, encoding: Encoding, name: str) -> None:
        self._file = file
        self._encoding = encoding
        self._name = name
        self._encoder: Any = None
        self._decoder: Any = None
        if encoding.server is None:
            self._encoder = codecs.getincrementalencoder(encoding.codec)("strict")
            self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        elif encoding.mark:
            file.write(encoding.mark)

    def write(self, rows: Iterable[Any]) -> int:
        data: bytes = b"".join(rows)
        written = len(data)
        if self._encoder is not None:
            data = self._recoded(data)
        self._file.write(data)
        return written

    def _recoded(self, data: bytes) -> bytes:
        text = self._decoder.decode(data)
        try:
            encoded: bytes = self._encoder.encode(text)
        except UnicodeEncodeError as error:
            sign = error.object[error.start]
            raise CommandError(
                f"{self._name}: {sign!r} cannot be written in {self._encoding.name}; "
                "--encoding names another",
                error,
            ) from None
        return encoded


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
        raise CommandError(f"{path}: cannot be written: {error.strerror or error}", error) from None


@contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    """Write beside the file that `path` leads to, and put the new one in its place at the end."""
    target = os.path.realpath(path)
    mode = _mode(target)
    if mode is None:
        with open(target, "wb") as file:  # A pipe or a device.
            yield file
        return
    directory, name = os.path.split(target)
    temporary = os.path.join(directory, f".{name}.{os.urandom(4).hex()}.part")
    try:
        with open(temporary, "xb", BLOCK, opener=_private) as file:
            yield file
        os.chmod(temporary, mode)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _mode(target: str) -> int | None:
    """Give the permissions that the file will have; `None` where it cannot be replaced."""
    try:
        status = os.stat(target)
    except FileNotFoundError:
        umask = os.umask(0)
        os.umask(umask)
        return 0o666 & ~umask
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(0, "is a directory", target)
    return stat.S_IMODE(status.st_mode) if stat.S_ISREG(status.st_mode) else None
