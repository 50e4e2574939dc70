"""Ends runs of pytest at random moments, in every way, and counts what is left: it has to be nothing.

    python tests/benchmarks/stress_endings.py [--kills 50] [--source embedded] [--seed N]

`--source` is embedded, config or container (PGMONKEY_TEST_IMAGE names an image). A run has tests of both isolations, sync and async; the moments are drawn from the length of an undisturbed one. What other runs on this machine have is theirs as long as their guardian lives. On a config's server databases are counted after the next run's sweep. Segments do not tell whose they are: nobody else should end servers meanwhile. Needs Linux and pytest-xdist.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import yaml

from pytest_pgmonkey.testing.servers.embedded import guardian
from pytest_pgmonkey.testing.servers.embedded.binaries import find_binaries
from pytest_pgmonkey.testing.servers.embedded.server import ROLE, EmbeddedServer
from pytest_pgmonkey.testing.servers.guardian import is_alive

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKEN = f"STRESS_ENDINGS={os.getpid()}-{time.monotonic_ns()}"
SETTLE = 60.0  # a busy machine takes its time; what is left after it will stay
KINDS = ("processes", "directories", "sockets", "segments", "containers", "databases", "cached")
PYTEST = ("pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly")
APP_YAML = "connection_settings: {host: database.invalid, dbname: app, user: app}\n"
TESTS = """
import pytest
from pytest_pgmonkey import PGConnectionManager

manager = PGConnectionManager()
pool = manager.get_database_connection("app.yaml", "pool")
clone = pytest.mark.pgmonkey(isolation="clone")

@pytest.fixture(scope="session", autouse=True)
def file(pgmonkey_database):
    assert pgmonkey_database.config_path.exists()

def add():
    with pool as conn:
        conn.execute("INSERT INTO item VALUES ('x')")
        conn.execute("SELECT pg_sleep(0.01)")

@pytest.mark.parametrize("n", range(10))
def test_rollback(pgmonkey, n):
    add()

@clone
@pytest.mark.parametrize("n", range(5))
def test_clone(pgmonkey, n):
    add()

@pytest.mark.asyncio
@pytest.mark.parametrize("isolation", [
    pytest.param("rollback", marks=pytest.mark.pgmonkey(isolation="rollback")),
    pytest.param("clone", marks=clone),
])
async def test_async(pgmonkey_async_pool, isolation):
    async with pgmonkey_async_pool as conn:
        await conn.execute("INSERT INTO item VALUES ('x')")
"""
SCHEMA = "".join(f"CREATE TABLE t{n} (id int PRIMARY KEY, name text);\n" for n in range(20))


# What a run has


def processes() -> dict[int, Path]:
    """All processes that are no zombies, and the directories in which they are."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                found[int(entry.name)] = (entry / "cwd").readlink()
    return found


def is_of_this_stress(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return TOKEN.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False


def bases() -> set[Path]:
    return {Path(name) for name in ("/dev/shm", tempfile.gettempdir(), "/tmp", "/var/tmp")}


def directories() -> set[Path]:
    return {path for base in bases() for path in base.glob("pgmonkey-*")}


def has_another_owner(directory: Path) -> bool:
    """Whether the guardian of a run that is not of this stress test still has it."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((directory / guardian.PID).read_text("ascii"))
        return is_alive(pid) and not is_of_this_stress(pid)
    return False


def segments() -> set[str]:
    """The System V shared memory segments that nobody uses and whose creators have ended."""
    lines = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    return {row["shmid"] for row in rows if row["nattch"] == "0" and not is_alive(int(row["cpid"]))}


def sockets() -> set[str]:
    """The addresses of the servers' Unix sockets that somebody has open."""
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    return {line.split()[7] for line in lines if "/pgmonkey-" in line and len(line.split()) > 7}


class Place:
    """A source of servers, and what runs leave there: nothing, where the server is the run's own."""

    arguments: tuple[str, ...] = ("--pgmonkey-source=embedded",)
    swept_by_next_run = False

    def remember(self) -> None:
        """Note what an undisturbed run leaves, and later runs shall find."""

    def left(self) -> Counter[str]:
        return Counter()

    def close(self) -> None:
        """Nothing was opened."""


class Config(Place):
    """A server that lives longer than the runs; its role may create databases."""

    swept_by_next_run = True

    def __init__(self, directory: Path) -> None:
        self.server = EmbeddedServer.start(find_binaries())
        with psycopg.connect(**self.server.admin_conninfo(), autocommit=True) as conn:
            conn.execute(f"ALTER ROLE {ROLE} CREATEDB")
        self.server.create_database("shared")
        file = directory / "server.yaml"
        file.write_text(yaml.safe_dump(self.server.config("shared")), "utf-8")
        self.arguments = (f"--pgmonkey-config={file}",)

    def databases(self) -> set[str]:
        with psycopg.connect(**self.server.admin_conninfo()) as conn:
            return {name for (name,) in conn.execute("SELECT datname FROM pg_database")}

    def remember(self) -> None:
        self.kept = self.databases()

    def left(self) -> Counter[str]:
        return Counter(databases=len(self.databases() - self.kept))

    def close(self) -> None:
        self.server.stop()


class Container(Place):
    def __init__(self) -> None:
        import docker

        from pytest_pgmonkey.testing.servers.container.guardian import ATTEMPT

        self.filters = {"label": ATTEMPT}
        self.client = docker.from_env()
        image = os.environ.get("PGMONKEY_TEST_IMAGE", "pgmonkey-test-postgres")
        self.arguments = ("--pgmonkey-source=container", f"--pgmonkey-image={image}")

    def containers(self) -> set[str]:
        found = self.client.api.containers(all=True, filters=self.filters)
        return {item["Id"] for item in found}

    def remember(self) -> None:
        self.before = self.containers()

    def left(self) -> Counter[str]:
        return Counter(containers=len(self.containers() - self.before))

    def close(self) -> None:
        self.client.close()


# Runs and their ends


@dataclass
class Stress:
    """A project, and the runs of its tests."""

    directory: Path
    random: random.Random
    place: Place = field(default_factory=Place)
    before: set[Path] = field(default_factory=directories)
    segments: set[str] = field(default_factory=segments)

    def fill(self) -> None:
        self.directory.chmod(0o755)
        (self.directory / "pytest.ini").write_text("[pytest]\npgmonkey_schema = schema.sql\n")
        (self.directory / "schema.sql").write_text(f"CREATE TABLE item (name text);\n{SCHEMA}")
        (self.directory / "app.yaml").write_text(APP_YAML)
        (self.directory / "test_one.py").write_text(TESTS)
        (self.directory / "test_two.py").write_text(TESTS)

    @property
    def cache(self) -> Path:
        return self.directory / "cache"

    def begin(self, *arguments: str) -> subprocess.Popen[bytes]:
        name, _, value = TOKEN.partition("=")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PGMONKEY_", "PYTEST_"))}
        with (self.directory / "log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *PYTEST, *self.place.arguments, *arguments],
                cwd=self.directory,
                env={**kept, name: value, "XDG_CACHE_HOME": str(self.cache)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def undisturbed(self, *arguments: str) -> float:
        """Let a run come to its end, and give its length."""
        begin = time.monotonic()
        if self.begin(*arguments).wait():
            sys.exit((self.directory / "log").read_text())
        return time.monotonic() - begin

    def forget_cache(self) -> None:
        for path in self.cache.glob("*/clusters/cluster-*"):
            path.unlink()

    def left(self) -> Counter[str]:
        """What is there now that was not before, and is nobody else's."""
        here = os.getpid()
        new = {path for path in directories() - self.before if not has_another_owner(path)}
        homes = {str(path) for path in new}
        own = {
            pid
            for pid, cwd in processes().items()
            if pid != here
            and (is_of_this_stress(pid) or is_in(str(cwd), homes) or is_removed(str(cwd)))
        }
        lost = {path for path in sockets() if is_in(path, homes) or not Path(path).exists()}
        found = Counter(processes=len(own), directories=len(new), sockets=len(lost))
        found["segments"] = len(segments() - self.segments)
        return found

    def settle(self) -> Counter[str]:
        """Wait until nothing is left, and give what is if that does not come."""
        deadline = time.monotonic() + SETTLE
        while (found := +self.left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        if self.place.swept_by_next_run:
            self.undisturbed("-k", "rollback and 0")
        while (more := +self.place.left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found + more

    def cached(self) -> int:
        """Count what killed runs left in the cache and the next one that fills it did not take."""
        self.forget_cache()
        self.undisturbed()
        return len(list(self.cache.glob("*/clusters/partial-*")))


def is_in(path: str, homes: set[str]) -> bool:
    return any(path == home or path.startswith(f"{home}/") for home in homes)


def is_removed(path: str) -> bool:
    return "/pgmonkey-" in path and path.endswith(" (deleted)")


def workers_of(pid: int) -> list[int]:
    """The worker processes of a run."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children if is_worker(child)]
    return []


def is_worker(pid: str) -> bool:
    with contextlib.suppress(OSError):
        return b"exec(eval(" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def send(number: signal.Signals) -> Any:
    return lambda process, _: process.send_signal(number)


def to_group(number: signal.Signals) -> Any:
    def end(process: subprocess.Popen[bytes], _: random.Random) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    return end


def twice(process: subprocess.Popen[bytes], dice: random.Random) -> None:
    process.send_signal(signal.SIGINT)
    time.sleep(dice.uniform(0, 0.3))
    process.send_signal(signal.SIGINT)


def a_worker(process: subprocess.Popen[bytes], dice: random.Random) -> None:
    """Kill one; the run goes on, with another in its place."""
    while process.poll() is None:
        if found := workers_of(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(dice.choice(found), signal.SIGKILL)
            return
        time.sleep(0.01)


ENDINGS: dict[str, tuple[tuple[str, ...], Any]] = {
    "SIGKILL": ((), send(signal.SIGKILL)),
    "SIGKILL, workers": (("-n2",), send(signal.SIGKILL)),
    "SIGKILL of a worker": (("-n2",), a_worker),
    "SIGKILL of the group": (("-n2",), to_group(signal.SIGKILL)),
    "SIGTERM": ((), send(signal.SIGTERM)),
    "SIGTERM, workers": (("-n2",), send(signal.SIGTERM)),
    "Ctrl-C": ((), send(signal.SIGINT)),
    "Ctrl-C, workers": (("-n2",), to_group(signal.SIGINT)),
    "Ctrl-C twice": ((), twice),
}


@dataclass
class Row:
    """The runs that were ended in one way."""

    kills: int = 0
    late: int = 0
    left: Counter[str] = field(default_factory=Counter)


def stress(test: Stress, kills: int) -> dict[str, Row]:
    rows = {name: Row() for name in ENDINGS}
    lengths = {arguments: lengths_of(test, arguments) for arguments, _ in ENDINGS.values()}
    test.place.remember()
    names = turns(test.random)
    for number in range(kills):
        name = next(names)
        arguments, end = ENDINGS[name]
        cold = number % 3 == 0
        if cold:
            test.forget_cache()
        moment = test.random.uniform(0, lengths[arguments][cold])
        process = test.begin(*arguments)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        rows[name].kills += 1
        rows[name].late += process.poll() is not None
        end(process, test.random)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SETTLE)  # one that hangs is counted with the processes
        found = test.settle()
        rows[name].left += found
        print(
            f"{number + 1:4} {name} after {moment:.2f} s: {dict(found) or 'nothing left'}",
            flush=True,
        )
        if found:
            clean_up(test)
    rows["(the cache at the end)"] = Row(left=Counter(cached=test.cached()))
    return rows


def lengths_of(test: Stress, arguments: tuple[str, ...]) -> dict[bool, float]:
    """The length of a run that begins with an empty cache, and of one that does not."""
    test.forget_cache()
    return {cold: test.undisturbed(*arguments) for cold in (True, False)}


def turns(dice: random.Random) -> Iterator[str]:
    while True:
        yield from dice.sample(list(ENDINGS), len(ENDINGS))


def clean_up(test: Stress) -> None:
    """Let what one run left not be counted again for the next."""
    for pid in processes():
        if pid != os.getpid() and is_of_this_stress(pid):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    test.before |= directories()
    test.segments |= segments()


def report(rows: dict[str, Row]) -> int:
    print(f"\n{'':24}{'kills':>6}{'late':>6}" + "".join(f"{kind:>13}" for kind in KINDS))
    for name, row in rows.items():
        print(
            f"{name:24}{row.kills:6}{row.late:6}"
            + "".join(f"{row.left[kind]:13}" for kind in KINDS)
        )
    total = sum(row.left.total() for row in rows.values())
    print(f"{sum(row.kills for row in rows.values())} kills, {total} left (goal 0)")
    return 1 if total else 0


def place_of(source: str, directory: Path) -> Place:
    if source == "config":
        return Config(directory)
    return Place() if source == "embedded" else Container()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--source", choices=("embedded", "config", "container"), default="embedded")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    with tempfile.TemporaryDirectory(prefix="stress-", ignore_cleanup_errors=True) as name:
        test = Stress(Path(name), random.Random(arguments.seed))
        test.fill()
        test.place = place_of(arguments.source, test.directory)
        test.before |= directories()
        try:
            return report(stress(test, arguments.kills))
        finally:
            test.place.close()


if __name__ == "__main__":
    sys.exit(main())
