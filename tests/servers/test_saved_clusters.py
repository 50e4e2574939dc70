"""No server where no test needs one, and a start that pays for initdb and schema only once."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from pytest_pgmonkey.testing.databases.recipe import Recipe, recipe_of
from pytest_pgmonkey.testing.servers.embedded import guardian, saved_clusters
from pytest_pgmonkey.testing.servers.embedded.binaries import find_binaries
from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Counts = dict[str, int]

COUNTING = """\
#!/bin/sh
echo "$(basename $0) $1" >> {log}
exec {program} "$@"
"""
WITH_DATABASE = """
    def test_database(pgmonkey):
        assert pgmonkey.execute("SELECT count(*) FROM item").fetchone() == (1,)

    def test_plain():
        pass
"""


class Programs:
    """A directory of server programs that count how often they are started."""

    def __init__(self, directory: Path) -> None:
        self.bindir = directory / "bin"
        self.log = directory / "log"
        self.bindir.mkdir()
        self.log.touch()
        self.log.chmod(0o666)
        found = find_binaries()
        for name in ("initdb", "postgres"):
            script = self.bindir / name
            script.write_text(COUNTING.format(log=self.log, program=found.program(name)))
            script.chmod(0o755)

    def take(self) -> Counts:
        """How often each was started since the last call; being asked for a version is none."""
        lines = [line for line in self.log.read_text().splitlines() if "--version" not in line]
        self.log.write_text("")
        return {name: lines.count(f"{name} -D") for name in ("initdb", "postgres")}


@pytest.fixture
def programs(open_directory: Path) -> Programs:
    """Counting programs, where every user can run them."""
    return Programs(open_directory)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user can enter."""
    path = Path("/tmp", f"pgmonkey-test-{os.getpid()}-{time.monotonic_ns()}")
    path.mkdir(mode=0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def cache(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of kept clusters, in an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(pytester.path / "cache"))
    return pytester.path / "cache" / "pytest-pgmonkey" / "clusters"


@pytest.fixture
def counted(project: pytest.Pytester, run: Callable[..., Any], programs: Programs) -> Any:
    """Run pytest on a test of one table's single row; gives how often programs were started."""
    project.makepyfile(WITH_DATABASE)
    (project.path / "schema.sql").write_text(
        "CREATE TABLE item (n int);\nINSERT INTO item VALUES (1);\n"
    )

    def counted(*args: str, **outcomes: int) -> Counts:
        result = run(f"--pgmonkey-bindir={programs.bindir}", *args)
        result.assert_outcomes(**(outcomes or {"passed": 2}))
        return programs.take()

    return counted


@pytest.mark.parametrize(
    ("arguments", "outcomes"),
    [
        (["--collect-only"], {}),
        (["-k", "plain"], {"passed": 1, "deselected": 1}),
        (["-k", "plain", "-n1"], {"passed": 1}),
        (["--fixtures"], {}),
    ],
    ids=" ".join,
)
def test_no_server_where_no_selected_test_needs_one(
    project: pytest.Pytester,
    run: Callable[..., Any],
    programs: Programs,
    arguments: list[str],
    outcomes: Counts,
) -> None:
    """Collecting, listing and other tests start neither server nor initdb."""
    project.makepyfile(WITH_DATABASE)
    result = run(f"--pgmonkey-bindir={programs.bindir}", *arguments)
    result.assert_outcomes(**outcomes)
    assert programs.take() == {"initdb": 0, "postgres": 0}


def test_a_distributed_run_that_does_not_use_the_kit_is_left_alone(
    pytester: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """No header, and nothing loaded, for a suite in whose environment the package only is."""
    pytester.makepyfile(
        """
        import sys

        def test_plain():
            assert "pytest_pgmonkey.testing.kit" not in sys.modules
            assert "pytest_pgmonkey.testing.servers.embedded.server" not in sys.modules
        """
    )
    result = run("-n1")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("pgmonkey:*")


def test_the_second_run_starts_without_initdb_and_schema(counted: Any, cache: Path) -> None:
    """The first run makes and keeps; the second copies; another schema is loaded anew."""
    assert counted() == {"initdb": 1, "postgres": 2}
    assert counted() == {"initdb": 0, "postgres": 1}
    schema = Path("schema.sql")
    schema.write_text("CREATE TABLE other ();" + schema.read_text())
    assert counted() == {"initdb": 0, "postgres": 2}
    assert len(list(cache.glob("cluster-*"))) == 3
    assert not list(cache.glob("partial-*"))


def test_without_a_cache_everything_works(counted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the home cannot be written, each run makes its own cluster."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setenv("HOME", "/dev/null")
    assert counted() == {"initdb": 1, "postgres": 1}


class TestTemplates:
    """The embedded server alone: its template, its cache, and what becomes of broken ones."""

    @pytest.fixture
    def start(
        self, cache: Path, programs: Programs, tmp_path: Path
    ) -> Iterator[Callable[..., Counts]]:
        """Start and stop a server with a template; gives how often what was started."""
        binaries = find_binaries(programs.bindir)
        schema = tmp_path / "schema.sql"
        schema.write_text("CREATE TABLE item ();")
        recipe = recipe_of([schema], [], tmp_path)
        assert recipe is not None

        def start(fail: bool = False) -> Counts:
            loads = 0

            def load(name: str) -> None:
                nonlocal loads
                loads += 1
                with psycopg.connect(**server.conninfo(name)) as conn:
                    conn.execute("CREATE TABLE item ()")
                if fail:
                    raise ZeroDivisionError

            server = EmbeddedServer.start(binaries, recipe=recipe)
            try:
                server.create_database("tests", server.template(recipe, load))
                with psycopg.connect(**server.conninfo("tests")) as conn:
                    conn.execute("SELECT FROM item")
            finally:
                server.stop()
            return {**programs.take(), "load": loads}

        return start

    def test_what_is_kept_is_never_trusted_half(
        self, start: Callable[..., Counts], cache: Path
    ) -> None:
        """Kept clusters that lost their end, or do not start, are made anew."""
        assert start() == {"initdb": 1, "postgres": 2, "load": 1}
        for kept in cache.glob("cluster-*"):
            os.truncate(kept, kept.stat().st_size - 1)
        assert start() == {"initdb": 1, "postgres": 2, "load": 1}
        for kept in cache.glob("cluster-*"):
            index, _, content = kept.read_bytes().partition(b"\n")
            kept.write_bytes(index + b"\n" + bytes(len(content)))
        assert start() == {"initdb": 1, "postgres": 4, "load": 1}
        assert start() == {"initdb": 0, "postgres": 1, "load": 0}

    def test_a_load_that_fails_leaves_nothing(
        self, start: Callable[..., Counts], cache: Path
    ) -> None:
        """A failed load leaves neither a template in the server nor a cluster in the cache."""
        with pytest.raises(ZeroDivisionError):
            start(fail=True)
        assert len(list(cache.glob("cluster-*"))) == 1
        assert start()["load"] == 1

    def test_settings_of_the_database_are_in_its_copies(
        self, database: str, pg_server: EmbeddedServer
    ) -> None:
        """What ALTER DATABASE sets belongs to a database, and CREATE DATABASE does not copy it."""
        with psycopg.connect(**pg_server.conninfo(database), autocommit=True) as conn:
            conn.execute(f"ALTER DATABASE {database} SET search_path = somewhere")
        copy = f"{database}_copy"
        pg_server.create_database(copy, database)
        try:
            with psycopg.connect(**pg_server.conninfo(copy)) as conn:
                assert conn.execute("SHOW search_path").fetchone() == ("somewhere",)
        finally:
            pg_server.drop_database(copy)


def always(conn: Any) -> None:
    """A schema step that says nothing of what it depends on."""


def versioned(conn: Any) -> None:
    """A schema step with a version."""


def reading(conn: Any) -> None:
    """A schema step that names its inputs."""


versioned.pgmonkey_version = 1  # type: ignore[attr-defined]
reading.pgmonkey_inputs = ["*.txt"]  # type: ignore[attr-defined]


class TestRecipe:
    def recipe(self, tmp_path: Path, *steps: Any, extensions: tuple[str, ...] = ()) -> Recipe:
        found = recipe_of(steps, extensions, tmp_path)
        assert found is not None
        return found

    def test_nothing_to_load_is_no_recipe(self, tmp_path: Path) -> None:
        """Without schema and extensions there is no template."""
        assert recipe_of([], [], tmp_path) is None

    def test_content_order_and_extensions_count(self, tmp_path: Path) -> None:
        """Whatever could make another database gives another name."""
        one, two = tmp_path / "one.sql", tmp_path / "two.sql"
        one.write_text("SELECT 1")
        two.write_text("SELECT 2")
        names = [
            self.recipe(tmp_path, one, two).name,
            self.recipe(tmp_path, two, one).name,
            self.recipe(tmp_path, one).name,
            self.recipe(tmp_path, one, extensions=("hstore",)).name,
        ]
        one.write_text("SELECT 3")
        names.append(self.recipe(tmp_path, one, two).name)
        assert len(set(names)) == 5
        one.write_text("SELECT 1")
        again = self.recipe(tmp_path, one, two)
        assert names[0] == again.name
        assert again.lasting

    def test_a_function_without_a_name_is_every_process_s_own(self, tmp_path: Path) -> None:
        """What two processes cannot both name is not shared between them."""
        functions = [lambda conn: conn for _ in range(2)]
        one, two = (self.recipe(tmp_path, function) for function in functions)
        assert one.digest != two.digest
        assert not one.lasting

    def test_a_function_lasts_by_what_it_declares(self, tmp_path: Path) -> None:
        """A function is called in every run, unless it says what its result depends on."""
        assert not self.recipe(tmp_path, always).lasting
        recipes = [self.recipe(tmp_path, versioned), self.recipe(tmp_path, reading)]
        (tmp_path / "new.txt").touch()
        recipes.append(self.recipe(tmp_path, reading))
        assert all(recipe.lasting for recipe in recipes)
        assert len({recipe.digest for recipe in recipes}) == 3
        assert recipes[2] == self.recipe(tmp_path, reading)
        assert not self.recipe(tmp_path, always, versioned).lasting


class TestClusters:
    @pytest.fixture(autouse=True)
    def home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        file = saved_clusters.file_of([])
        assert file is not None
        assert tmp_path / "pytest-pgmonkey" / "clusters" == file.parent
        return file.parent

    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        path = tmp_path / "data"
        path.mkdir()
        (path / "file").write_text("content")
        return path

    @staticmethod
    def keep(file: Path, data: Path) -> None:
        if (writing := saved_clusters.save(file, data)) is not None:
            writing.join()

    def test_a_packed_directory_is_the_same(self, data: Path, tmp_path: Path) -> None:
        """Files, empty ones too, and directories come out as they went in; nothing of a part."""
        (data / "empty").touch()
        (data / "a" / "b").mkdir(parents=True)
        (data / "a" / "b" / "\u00fc\n").write_bytes(bytes(range(256)))
        packed = b"".join(saved_clusters.pack(str(data)))
        (tmp_path / "packed").write_bytes(packed)
        guardian.unpack(str(tmp_path / "packed"), str(tmp_path / "copy"))
        copied = {p.relative_to(tmp_path / "copy") for p in (tmp_path / "copy").rglob("*")}
        assert copied == {p.relative_to(data) for p in data.rglob("*")}
        for path in copied:
            if (data / path).is_file():
                assert (tmp_path / "copy" / path).read_bytes() == (data / path).read_bytes()
        (tmp_path / "packed").write_bytes(packed[:-1])
        with pytest.raises(OSError, match="too early"):
            guardian.unpack(str(tmp_path / "packed"), str(tmp_path / "other"))

    def test_the_oldest_are_removed(self, data: Path, home: Path) -> None:
        """A few clusters are kept, those that were used last."""
        for number in range(saved_clusters.LIMIT):
            self.keep(home / f"cluster-{number}", data)
            os.utime(home / f"cluster-{number}", (number, number))
        assert saved_clusters.is_saved(home / "cluster-0")
        self.keep(home / "cluster-new", data)
        assert saved_clusters.is_saved(home / "cluster-0")
        assert not saved_clusters.is_saved(home / "cluster-1")
        assert len(list(home.glob("cluster-*"))) == saved_clusters.LIMIT

    def test_what_is_kept_is_its_users_alone(self, data: Path, home: Path) -> None:
        """A schema may hold what is nobody else's business."""
        self.keep(home / "cluster-it", data)
        for path in (home, home / "cluster-it"):
            assert path.stat().st_mode & 0o077 == 0

    def test_a_killed_run_leaves_nothing_for_long(self, data: Path, home: Path) -> None:
        """What was half made is never found, and goes with the next that is kept."""
        self.keep(home / "cluster-one", data)
        (home / "partial-0").mkdir()
        shutil.copy(home / "cluster-one", home / "partial-0")
        self.keep(home / "cluster-three", data)
        assert not (home / "partial-0").exists()

    def test_a_directory_with_links_is_not_kept(self, data: Path, home: Path) -> None:
        """A data directory that reaches beyond itself cannot be copied whole."""
        (data / "link").symlink_to("/")
        self.keep(home / "cluster-it", data)
        assert not saved_clusters.is_saved(home / "cluster-it")

    def test_a_cache_that_others_may_write_is_not_used(self, home: Path) -> None:
        """Another user's cluster could name programs to be run."""
        home.parent.chmod(0o777)
        other = saved_clusters.file_of([])
        assert other is None or home not in other.parents
