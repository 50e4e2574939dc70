"""A virtual environment as production has it: no pytest, and nothing that nobody asked for."""

from __future__ import annotations

import venv
from functools import cache
from importlib.metadata import Distribution, distribution, packages_distributions
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

THIS = "pytest-pgmonkey[binary]"


def make_production_venv(directory: Path, modules: Iterable[str] = ()) -> Path:
    """Make an environment of `pytest-pgmonkey[binary]` and these modules; give its Python.

    What pip would install is linked from this environment, so that no index is asked. The package
    itself is not in it: it comes by PYTHONPATH.
    """
    venv.create(directory, symlinks=True)
    (packages,) = directory.glob("lib/python*/site-packages")
    names = [THIS, *(name for module in modules for name in _brought_by(module))]
    for one in _closure(names):
        for top in _tops(one):
            link = packages / top.name
            if not link.exists():
                link.symlink_to(top)
    return directory / "bin" / "python"


@cache
def _distributions_of_modules() -> dict[str, list[str]]:
    return dict(packages_distributions())


def _brought_by(module: str) -> list[str]:
    return _distributions_of_modules().get(module, [])


def _closure(lines: list[str]) -> Iterator[Distribution]:
    """Give what has to be installed for these requirements, themselves included."""
    left = [Requirement(line) for line in lines]
    seen = set()
    while left:
        wanted = left.pop()
        key = (wanted.name.lower(), frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        found = distribution(wanted.name)
        yield found
        for line in found.requires or []:
            one = Requirement(line)
            if _is_asked_for(one, wanted.extras):
                left.append(one)


def _is_asked_for(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def _tops(one: Distribution) -> set[Path]:
    """Give the files and folders of site-packages that a distribution consists of."""
    root = Path(str(one.locate_file("")))
    names = {file.parts[0] for file in one.files or []} - {"..", "__pycache__"}
    return {root / name for name in names if not name.endswith(".pth")}
