"""CSV files as blocks of bytes that the server can take: packed or not, recoded where needed."""

from __future__ import annotations

import codecs
import os
import stat
import sys
import zlib
from contextlib import contextmanager, suppress
from functools import partial
from io import TextIOBase, TextIOWrapper
from itertools import chain
from typing import IO, TYPE_CHECKING, Any, BinaryIO, TypeAlias, Union

from ..errors import CSVError
from .encodings import UTF8, Encoding, detect_encoding, find_encoding

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: A path, or what is open for reading or writing, in binary or text mode.
CSVFile: TypeAlias = Union[str, "os.PathLike[str]", IO[bytes], IO[str]]
BLOCK = 1 << 17


# --- paths and open files ---


class _Text:
    """Text in memory as bytes in UTF-8."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self.flush = file.flush

    def read(self, size: int) -> bytes:
        return self._file.read(size).encode("utf-8", "surrogatepass")

    def write(self, data: bytes) -> None:
        self._file.write(self._decoder.decode(data))


def _taken(file: CSVFile) -> tuple[str | None, Any]:
    """Give a path, or a stream of bytes."""
    if isinstance(file, str | os.PathLike):
        return os.fspath(file), None
    if not isinstance(file, TextIOBase):
        return None, file
    if not isinstance(file, TextIOWrapper):
        return None, _Text(file)
    # Its bytes: line ends within quotes are data, which text mode would change.
    file.flush()
    if _can_seek(file) and file.readable():
        file.seek(file.tell())  # What it has read in advance goes back.
    return None, file.buffer


def _encoding_of(file: CSVFile) -> Encoding | None:
    """Give the encoding that an open text file has."""
    if not isinstance(file, TextIOWrapper) or _is_stdin(file.buffer):
        return None
    return find_encoding(file.encoding)


def _is_stdin(stream: Any) -> bool:
    return stream is getattr(sys.stdin, "buffer", sys)


def _can_seek(stream: Any) -> bool:
    return bool(getattr(stream, "seekable", bool)())


def _name(path: str | None, stream: Any) -> str:
    if path is not None:
        return path
    if stream is getattr(sys.stdout, "buffer", sys):
        return "standard output"
    name = getattr(stream, "name", None)
    return "standard input" if _is_stdin(stream) else name if isinstance(name, str) else "the file"


def _is_packed(path: str) -> bool:
    return path.lower().endswith(".gz")


# --- reading ---


class Source:
    """A file to import: a path, or what is open for reading."""

    def __init__(self, file: CSVFile, encoding: Encoding | None) -> None:
        self._file = file
        self._path, self._stream = _taken(file)
        self.name = _name(self._path, self._stream)
        self._asked = encoding or _encoding_of(file)
        self.encoding = self._asked or UTF8
        self._raw: Any = None
        self._start = self._stream.tell() if self.repeatable and self._stream else 0

    def again(self) -> Source:
        """Give the same file once more, from the place where this one began."""
        if self._stream is not None:
            self._stream.seek(self._start)
        return Source(self._file, self._asked)

    @property
    def total(self) -> int | None:
        """The bytes of the file, where it has an end that is known."""
        try:
            status = os.fstat(self._raw.fileno())
        except (AttributeError, OSError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    @property
    def done(self) -> int:
        """The bytes that have been read, packed ones where the file is packed."""
        try:
            return int(self._raw.tell())
        except (AttributeError, OSError):
            return 0  # A pipe has no position.

    @property
    def repeatable(self) -> bool:
        """Whether the file can be read once more."""
        if self._path is not None:
            return os.path.isfile(self._path)
        return not _is_stdin(self._stream) and _can_seek(self._stream)

    @contextmanager
    def open(self) -> Iterator[Iterator[bytes]]:
        """Open the file for a block in which its data can be had, without a mark in front."""
        with self._telling():
            # Closed below: a stream is its owner's.
            self._raw = self._stream if self._path is None else open(self._path, "rb", 0)  # noqa: SIM115
        try:
            blocks = self._blocks()
            start = next(blocks, b"")
            self.encoding = self._asked or detect_encoding(start)
            mark = "\ufeff".encode(self.encoding.codec, "ignore")
            blocks = chain([start.removeprefix(mark)], blocks)
            yield blocks if self.encoding.server else self._recoded(blocks)
        finally:
            if self._path is not None:
                self._raw.close()

    def _blocks(self) -> Iterator[bytes]:
        file = self._raw
        if self._path is not None and _is_packed(self._path):
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
            raise CSVError(
                f"{self.name}: line {line}: {what} {self.encoding.name}",
                "`encoding` names another",
                file=self.name,
                line=line,
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
            raise CSVError(f"{self.name}: {problem}", file=self.name) from error


# --- writing ---


class Target:
    """A file that takes whole rows in UTF-8, or in an encoding that the server knows."""

    def __init__(self, file: Any, encoding: Encoding, name: str) -> None:
        self._file = file
        self.encoding = encoding
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
            raise CSVError(
                f"{self._name}: {sign!r} cannot be written in {self.encoding.name}",
                "`encoding` names another",
                file=self._name,
            ) from error
        return recoded


@contextmanager
def open_target(file: CSVFile, encoding: Encoding | None) -> Iterator[Target]:
    """Open a file to export to: one by path is there when the block has ended well, else as before.

    What is written to an open file stays in it.
    """
    path, stream = _taken(file)
    encoding = encoding or _encoding_of(file) or UTF8
    name = _name(path, stream)
    if path is None:
        yield Target(stream, encoding, name)
        stream.flush()
        return
    try:
        with _replacing(path) as raw:
            if _is_packed(path):
                from gzip import GzipFile

                # No name and no time in it: the same rows give the same file.
                with GzipFile("", "wb", 6, raw, 0) as packed:
                    yield Target(packed, encoding, path)
            else:
                yield Target(raw, encoding, path)
    except OSError as error:
        problem = f"{path}: cannot be written: {error.strerror or error}"
        raise CSVError(problem, file=path) from error


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
