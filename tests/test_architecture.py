"""The package's import rules, checked on its sources.

Imports inside functions and under `TYPE_CHECKING` count like all others.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import pytest_pgmonkey

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

ROOT = Path(pytest_pgmonkey.__file__).parent
PLUGIN = "testing.plugin"
#: What the modules of a folder must not import.
FORBIDDEN = {
    "testing.databases": ("testing.servers", "testing.clones", "testing.sandbox", "testing.kit"),
    "testing.servers": ("testing.clones", "testing.sandbox", "testing.kit"),
    "testing.clones": ("testing.sandbox", "testing.kit"),
    "testing.sandbox": ("testing.databases", "testing.servers", "testing.clones", "testing.kit"),
    "testing.sandbox.core": ("testing.sandbox.psycopg_door", "testing.sandbox.sandbox"),
}
TEST_SIDE = ("pytest", "_pytest", "testcontainers", "pytest_pgmonkey.testing")
MODULES_IN_A_FOLDER = 14


# --- reading sources ---


def name_of(path: Path) -> str:
    """Give a module's name within the package; the package's own `__init__` has none."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in FILES.items()}


def imported(tree: ast.AST, package: list[str]) -> Iterator[str]:
    """Give the absolute names that a module in `package` imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            home = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{home}.{alias.name}" for alias in node.names)


def package_of(name: str) -> list[str]:
    """Give the package that a module is in, as the parts of its name; a package is in itself."""
    parts = [ROOT.name, *filter(None, name.split("."))]
    return parts if FILES[name].name == "__init__.py" else parts[:-1]


IMPORTS = {name: sorted(imported(tree, package_of(name))) for name, tree in TREES.items()}


def module_of(name: str) -> str:
    """Give the package's module that an absolute name is, or is in; "" is none of them.

    The package's own `__init__` does not count: it gives its version to the others, and the
    others' names to users.
    """
    first, *parts = name.split(".")
    if first != ROOT.name:
        return ""
    inside = ".".join(parts)
    return inside if inside in FILES else ".".join(parts[:-1])


def is_in(name: str, *homes: str) -> bool:
    return any(name == home or name.startswith(f"{home}.") for home in homes)


def breaches(importers: Iterable[str], *forbidden: str) -> list[str]:
    """Give the imports that are not allowed, each with its importer."""
    return [
        f"{importer} imports {name}"
        for importer in importers
        for name in IMPORTS[importer]
        if is_in(name, *forbidden)
    ]


def assert_none(found: list[str]) -> None:
    """Fail with a line for each; pytest's own message would show only the first."""
    if found:
        pytest.fail("\n".join([f"{len(found)} found:", *found]), pytrace=False)


# --- circles ---


def circles(graph: Mapping[str, set[str]]) -> list[str]:
    """Give a shortest circle through each module that is in one, each circle once."""
    ways: dict[frozenset[str], list[str]] = {}
    for name in sorted(graph):
        if way := circle_through(name, graph):
            ways.setdefault(frozenset(way), way)
    return [" -> ".join([*way, way[0]]) for way in ways.values()]


def circle_through(start: str, graph: Mapping[str, set[str]]) -> list[str]:
    """Give a shortest way from a module to itself, or nothing: a breadth-first search."""
    ways = [[start]]
    seen: set[str] = set()
    for way in ways:
        for name in sorted(graph[way[-1]] - seen):
            if name == start:
                return way
            seen.add(name)
            ways.append([*way, name])
    return []


def test_no_modules_import_each_other() -> None:
    """Each module can be read, and changed, with only those below it in mind."""
    graph = {name: {module_of(one) for one in IMPORTS[name]} - {"", name} for name in FILES}
    assert_none(circles(graph))


# --- directions ---


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_follow_the_folders(folder: str) -> None:
    """What a folder is built upon knows nothing of it."""
    forbidden = [f"{ROOT.name}.{name}" for name in FORBIDDEN[folder]]
    assert_none(breaches((name for name in FILES if is_in(name, folder)), *forbidden))


def test_one_module_knows_all_sources_of_servers() -> None:
    """Another source is a module of its own, and a line there."""
    sources = [f"testing.servers.{name}" for name in ("embedded", "container", "configured")]
    known = {
        name: {one for one in sources if any(is_in(module_of(i), one) for i in IMPORTS[name])}
        for name in FILES
        if not is_in(name, *sources)
    }
    assert [name for name, ones in known.items() if len(ones) > 1] == ["testing.servers.launch"]


def test_nothing_imports_the_plugin() -> None:
    """pytest loads it, by its entry point."""
    others = (name for name in FILES if not is_in(name, PLUGIN))
    assert_none(breaches(others, f"{ROOT.name}.{PLUGIN}"))


def test_only_the_plugin_imports_pytest() -> None:
    """All else works without pytest."""
    others = (name for name in FILES if not is_in(name, PLUGIN))
    assert_none(breaches(others, "pytest", "_pytest"))


def test_production_does_not_import_the_test_side() -> None:
    """Production runs where neither pytest nor containers are installed."""
    production = (name for name in FILES if not is_in(name, "testing"))
    assert_none(breaches(production, *TEST_SIDE))


# --- private names of others, which a new release may move ---

PRIVATE = re.compile(r"_[a-z]\w*")


def private_imports(name: str, library: str) -> set[str]:
    """Give the private modules and names of a library that a module imports."""
    return {
        one
        for one in IMPORTS[name]
        if is_in(one, library) and any(map(PRIVATE.fullmatch, one.split(".")))
    }


def private_attributes(tree: ast.AST) -> set[str]:
    """Give the private attributes that a module uses of other objects than its own `self`."""
    uses: list[tuple[ast.AST, object]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            uses.append((node.value, node.attr))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
            uses.append((node.args[0], getattr(node.args[1], "value", "")))
    return {
        str(name)
        for owner, name in uses
        if PRIVATE.fullmatch(str(name)) and not re.match(r"self\b", ast.unparse(owner))
    }


@cache
def defined_in(*sources: Path) -> set[str]:
    """Give the private names that these files define."""
    pattern = re.compile(r"(?:\bdef |\bself\.|^ *)(_[a-z]\w*)\b(?=\(|\s*[:=])", re.MULTILINE)
    return {name for path in sources for name in pattern.findall(path.read_text("utf-8"))}


def users_of_private_names(*libraries: str) -> dict[str, set[str]]:
    """Give the modules that use private names of a library that they import, and the names.

    A name that the package defines as well is taken for its own. A class that inherits from one
    of the library's may use its own attributes.
    """
    homes = [Path(str(find_spec(library).origin)).parent for library in libraries]  # type: ignore[union-attr]
    theirs = defined_in(*(path for home in homes for path in sorted(home.rglob("*.py"))))
    theirs -= defined_in(*FILES.values())
    used = {
        name: (private_attributes(tree) & theirs).union(
            *(private_imports(name, library) for library in libraries)
        )
        for name, tree in TREES.items()
        if any(is_in(one, *libraries) for one in IMPORTS[name])
    }
    return {name: names for name, names in used.items() if names}


@pytest.mark.parametrize(
    ("libraries", "home"),
    [
        (("psycopg", "psycopg_pool"), "testing.sandbox"),
        (("pytest", "_pytest"), PLUGIN),
    ],
    ids=["psycopg", "pytest"],
)
def test_one_module_uses_private_names(libraries: tuple[str, ...], home: str) -> None:
    """What a new release of psycopg or pytest may move is in one place."""
    users = users_of_private_names(*libraries)
    assert len(users) == 1, users
    assert all(is_in(name, home) for name in users), users


# --- size ---


def test_folders_are_small() -> None:
    """A folder's modules can be taken in at a glance."""
    modules = [path for path in FILES.values() if path.stem not in ("__init__", "__main__")]
    folders = Counter(path.parent.relative_to(ROOT).as_posix() for path in modules)
    assert {name: n for name, n in folders.items() if n > MODULES_IN_A_FOLDER} == {}


# --- the rules can fail ---


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import a.b", "a.b"),
        ("from a import b", "a.b"),
        ("from . import b", "top.inner.b"),
        ("from .. import b", "top.b"),
        ("from ..a import b", "top.a.b"),
        ("def f():\n    from .a import b", "top.inner.a.b"),
        ("if TYPE_CHECKING:\n    from .a import b", "top.inner.a.b"),
    ],
)
def test_imports_are_found(code: str, name: str) -> None:
    """Absolute and relative ones, wherever they stand."""
    assert list(imported(ast.parse(code), ["top", "inner"])) == [name]


def test_circles_are_found() -> None:
    """The shortest ones, each once."""
    graph = {"a": {"b", "e"}, "b": {"c"}, "c": {"a", "d"}, "d": {"c"}, "e": set()}
    assert circles(graph) == ["a -> b -> c -> a", "c -> d -> c"]


def test_private_names_are_found() -> None:
    """Those of other objects, also where they are asked for by name."""
    code = "one._a\nself._b\none.two._c\ngetattr(one, '_d', None)\none.__dict__"
    assert private_attributes(ast.parse(code)) == {"_a", "_c", "_d"}
