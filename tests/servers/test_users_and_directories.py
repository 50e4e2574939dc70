"""Where the kit has to work: any user, any directory, any home."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers.remains import NEEDS_ROOT

import pytest_pgmonkey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# The interpreter itself may be in a home of mode 0700, then the system's does as well.
INTERPRETERS = (sys.executable, f"/usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}")
IMPORTED = [path for path in sys.path if "site-packages" in path]
NAMED = 1
NAMELESS = 54321
PACKAGE = Path(pytest_pgmonkey.__file__).parent


@NEEDS_ROOT
def test_a_project_that_the_server_s_user_cannot_read(
    project: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """As root the server runs as somebody else, who sees nothing of the project."""
    assert any(
        not path.stat().st_mode & stat.S_IXOTH for path in (project.path, *project.path.parents)
    )
    project.makepyfile(
        """
        import os

        def test_it(pgmonkey, pgmonkey_server):
            pgmonkey.execute("INSERT INTO item (name) VALUES ('x')")
            home = pgmonkey_server.conninfo("postgres")["host"]
            assert os.stat(home + "/data").st_uid != 0
        """
    )
    for _ in range(2):  # the second one starts from the cache
        run().assert_outcomes(passed=1)


def test_long_paths_and_no_memory_to_keep_data_in(
    project: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """Where /dev/shm is missing the data goes to a long TMPDIR, and the socket to a short one."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        long = Path(short, "x" * 100, "y" * 100)
        long.mkdir(parents=True)
        for path in (Path(short), *long.parents[:1], long):
            path.chmod(0o755)
        project.makeconftest(
            f"""
            from pathlib import Path
            from pytest_pgmonkey.testing.servers.embedded import directories

            directories._bases = lambda: [Path("/nowhere"), Path({str(long)!r}), Path({short!r})]
            """
        )
        project.makepyfile(
            f"""
            import os

            def test_it(pgmonkey, pgmonkey_server):
                pgmonkey.execute("INSERT INTO item (name) VALUES ('x')")
                home = pgmonkey_server.conninfo("postgres")["host"]
                assert os.path.dirname(home) == {short!r}
                assert os.listdir({str(long)!r}) == [os.path.basename(home)]
            """
        )
        run().assert_outcomes(passed=1)
        assert not list(long.iterdir())
        assert len(list(Path(short).iterdir())) == 1


class Somebody:
    """A user who is not root, with a home and a project of their own."""

    def __init__(self, directory: Path, uid: int) -> None:
        self.uid = uid
        self.interpreter = sys.executable
        self.home = directory / "home"
        self.project = directory / "project"
        for path in (self.home, self.project):
            path.mkdir()
            os.chown(path, uid, uid)
        (self.project / "schema.sql").write_text("CREATE TABLE item (n int);")
        (self.project / "test_it.py").write_text(
            "def test_it(pgmonkey): pgmonkey.execute('INSERT INTO item VALUES (1)')\n"
        )

    def finds_python(self) -> bool:
        """Whether there is an interpreter that the user can run, with all that is needed."""
        for self.interpreter in INTERPRETERS:
            with contextlib.suppress(OSError):
                if not self.run("-c", "import pytest_pgmonkey, psycopg, pytest").returncode:
                    return True
        return False

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        own = ("XDG_CACHE_HOME", "TMPDIR", "PYTEST_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(own)}
        kept["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), *IMPORTED])
        return subprocess.run(
            [self.interpreter, "-B", *command],
            cwd=self.project,
            env={**kept, "HOME": str(self.home), "USER": "somebody"},
            user=self.uid,
            group=self.uid,
            extra_groups=[],
            capture_output=True,
            text=True,
            check=False,
        )

    def test(self, *args: str) -> str:
        options = ["-p", "no:cacheprovider", "--pgmonkey-schema=schema.sql"]
        done = self.run("-m", "pytest", *options, *args)
        return done.stdout + done.stderr


@pytest.fixture
def become() -> Iterator[Callable[[int], Somebody]]:
    """Be another user; skips where that user cannot read the installation."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o755)

    def become(uid: int) -> Somebody:
        somebody = Somebody(directory, uid)
        if not somebody.finds_python():
            pytest.skip(f"needs Python and packages that other users can read, unlike {PACKAGE}")
        return somebody

    yield become
    shutil.rmtree(directory)


@NEEDS_ROOT
def test_an_ordinary_user(become: Callable[[int], Somebody]) -> None:
    """The server runs as the user; the cache is in the home, and does without where it must."""
    somebody = become(NAMED)
    for _ in range(2):
        assert "1 passed" in somebody.test()
    cache = somebody.home / ".cache" / "pytest-pgmonkey"
    assert len(list(cache.glob("clusters/cluster-*"))) == 2
    assert cache.stat().st_uid == NAMED
    shutil.rmtree(cache)
    somebody.home.joinpath(".cache").chmod(0o555)
    assert "1 passed" in somebody.test()
    assert not cache.exists()


@NEEDS_ROOT
def test_a_user_without_a_name(become: Callable[[int], Somebody]) -> None:
    """initdb refuses a user that is not in the list of users: the error says what to do."""
    output = become(NAMELESS).test()
    assert f"User {NAMELESS} has no name: add it to /etc/passwd" in output
    assert "INTERNALERROR" not in output
    assert "Traceback" not in output
