"""Data directories kept between runs, so that a run starts without initdb and migrations.

An entry is a directory that got its name when it was complete. It is read without a lock: it
knows how many files and bytes it has, so a copy made while it was being removed is seen through.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..caches import private_cache
from .guardian import copy_tree
from .reach import locked

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    Content = list[tuple[str, bytes | None]]

__all__ = ["Cluster", "can_keep", "discard", "find", "keep", "keep_soon", "key_of"]

FORMAT: Final = 1
KEPT: Final = 6
_COMPLETE: Final = "complete"
_DIRECTORY: Final = "clusters"
_LOCK_LIMIT: Final = 5.0


@dataclass(frozen=True)
class Cluster:
    """A kept data directory: where it is, and what a whole copy of it comes to."""

    path: Path
    files: int
    size: int

    @property
    def data(self) -> Path:
        return self.path / "data"


def key_of(facts: Iterable[object]) -> str:
    """Give the name under which a data directory is kept that comes of these facts."""
    text = json.dumps([FORMAT, *facts])
    return f"cluster-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def can_keep() -> bool:
    """Tell whether there is a place to keep anything."""
    return private_cache(_DIRECTORY) is not None


def find(key: str) -> Cluster | None:
    """Give the data directory that is kept under a name."""
    cache = private_cache(_DIRECTORY)
    if cache is None:
        return None
    mark = cache / key / _COMPLETE
    try:
        files, size = map(int, mark.read_text("ascii").split())
        os.utime(mark)  # the last use decides which ones are removed
    except (OSError, ValueError):
        return None
    return Cluster(cache / key, files, size)


def keep(key: str, data: Path) -> None:
    """Keep a data directory on which no server runs; where that fails, there is none."""
    _keep(key, data)


def _keep(key: str, data: Path | Content) -> None:
    cache = private_cache(_DIRECTORY)
    if cache is None:
        return
    with contextlib.suppress(OSError), locked(cache, _LOCK_LIMIT) as held:
        if held and not (cache / key).exists():
            _store(cache, key, data)
            _remove_oldest(cache)


def keep_soon(key: str, data: Path) -> threading.Thread | None:
    """Keep a data directory that is read now, and written while its server runs already."""
    try:
        content = list(_read(str(data), "data"))
    except OSError:
        return None
    writing = threading.Thread(target=_keep, args=(key, content), name="pgmonkey-keep")
    writing.start()
    return writing


def discard(cluster: Cluster) -> None:
    """Remove a data directory that turned out not to be whole, or not to work."""
    with contextlib.suppress(OSError):
        _remove(cluster.path)


def _read(source: str, name: str) -> Iterator[tuple[str, bytes | None]]:
    """Give directories and what is in their files, in the order in which they can be made."""
    yield name, None
    with os.scandir(source) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _read(entry.path, f"{name}/{entry.name}")
            elif entry.is_file(follow_symlinks=False):
                with open(entry.path, "rb", buffering=0) as file:  # noqa: PTH123 - it is quicker
                    yield f"{name}/{entry.name}", file.read()
            else:
                raise OSError(f"{entry.path} is neither a file nor a directory")


def _write(content: Content, target: Path) -> tuple[int, int]:
    """Write what was read, for its owner alone; give how many files and bytes."""
    files = size = 0
    while content:  # so that memory is given back on the way
        name, data = content.pop(0)
        if data is None:
            (target / name).mkdir(mode=0o700)
        else:
            (target / name).touch(mode=0o600)
            size += (target / name).write_bytes(data)
            files += 1
    return files, size


def _store(cache: Path, key: str, data: Path | Content) -> None:
    partial = cache / f"partial-{secrets.token_hex(8)}"
    try:
        partial.mkdir(mode=0o700)
        if isinstance(data, list):
            files, size = _write(data, partial)
        else:
            files, size = copy_tree(str(data), str(partial / "data"))
        (partial / _COMPLETE).write_text(f"{files} {size}\n", "ascii")
        partial.rename(cache / key)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_oldest(cache: Path) -> None:
    def last_use(path: Path) -> float:
        mark = path / _COMPLETE
        return mark.stat().st_mtime if mark.exists() else 0.0

    for path in sorted(cache.glob("cluster-*"), key=last_use)[:-KEPT]:
        _remove(path)


def _remove(path: Path) -> None:
    """Take the name away first: from then on nobody finds an entry that is half removed."""
    going = path.parent / f"partial-{secrets.token_hex(8)}"
    path.rename(going)
    shutil.rmtree(going, ignore_errors=True)
