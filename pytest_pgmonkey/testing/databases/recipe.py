"""What a template database is made from: schema steps and extensions, named by their content."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .schema import SchemaError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Recipe", "recipe_of"]

_NAME_DIGITS: Final = 24


@dataclass(frozen=True)
class Recipe:
    """The content of a template database; two recipes with one digest make the same.

    A `lasting` recipe says all that its result depends on, so that the result may serve
    later runs. Any other is followed once a run.
    """

    digest: str
    lasting: bool
    extensions: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the template database."""
        return f"pgmonkey_template_{self.digest[:_NAME_DIGITS]}"


def recipe_of(
    steps: Iterable[Path | Callable[[Any], Any]], extensions: Iterable[str], rootdir: Path
) -> Recipe | None:
    """Give the recipe of schema steps that are resolved, `None` where there is nothing to do."""
    extensions = tuple(extensions)
    facts: list[bytes] = [f"extension {name}".encode() for name in extensions]
    lasting = True
    for step in steps:
        is_complete = False
        try:
            found = list(_facts_of_file(step) if isinstance(step, Path) else _facts(step, rootdir))
            is_complete = isinstance(step, Path) or _declares(step)
        except OSError:  # loading it will say what is wrong
            found = [repr(step).encode()]
        facts += found
        lasting = lasting and is_complete
    return Recipe(_digest(facts), lasting, extensions) if facts else None


def _digest(facts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(b"%d\n%s\n" % (len(fact), fact))
    return digest.hexdigest()


def _facts_of_file(path: Path) -> Iterator[bytes]:
    yield b"file " + os.fsencode(path.name)
    yield path.read_bytes()


def _declares(function: Callable[[Any], Any]) -> bool:
    """Whether a function says what its result depends on."""
    return hasattr(function, "pgmonkey_version") or hasattr(function, "pgmonkey_inputs")


def _facts(function: Callable[[Any], Any], rootdir: Path) -> Iterator[bytes]:
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", None)
    if not module or not name or "<" in name:
        # Another process cannot be sure that its function of this name is the same one.
        yield f"function {id(function)} of process {os.getpid()}".encode()
        return
    yield f"function {module}:{name}".encode()
    if _declares(function):
        yield f"version {getattr(function, 'pgmonkey_version', None)!r}".encode()
        code = getattr(function, "__code__", None)
        if code is not None:
            yield Path(code.co_filename).read_bytes()
        for path in _inputs(function, rootdir):
            yield from _facts_of_file(path)


def _inputs(function: Callable[[Any], Any], rootdir: Path) -> Iterator[Path]:
    patterns = getattr(function, "pgmonkey_inputs", ())
    try:
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            yield from sorted(path for path in rootdir.glob(str(pattern)) if path.is_file())
    except (TypeError, ValueError, NotImplementedError) as error:
        raise SchemaError(
            f"schema step {function.__module__}:{function.__qualname__}: pgmonkey_inputs = "
            f"{patterns!r} must be patterns of paths below {rootdir}: {error}"
        ) from None
