"""The sandbox against what an expert would write by hand, without pytest around either.

    python tests/benchmarks/bench_sandbox.py [rounds]

A "test" is one insert and one select; a rival rolls a session connection back after it. The rivals
take turns test by test; the figure is the ratio of the medians.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from time import perf_counter
from typing import TYPE_CHECKING, Any

import psycopg

from pytest_pgmonkey import PGConnectionManager, sources
from pytest_pgmonkey.testing.sandbox import Sandbox
from pytest_pgmonkey.testing.servers.embedded.binaries import find_binaries
from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Callable

INSERT = "INSERT INTO t VALUES (%s, 'x')"
SELECT = "SELECT count(*) FROM t"
MANY = 100


class Interceptor:
    """Leads every handle into one sandbox."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.source = sandbox.source
        self.async_source = sandbox.async_source

    def judge(self, *_: Any) -> bool:
        """Accept every configuration."""
        return True


# What a test does, on a connection and its async twin.


def two(conn: Any) -> None:
    conn.execute(INSERT, [1])
    conn.execute(SELECT).fetchone()


async def two_async(conn: Any) -> None:
    await conn.execute(INSERT, [1])
    await (await conn.execute(SELECT)).fetchone()


def many(conn: Any) -> None:
    for number in range(MANY // 2):
        conn.execute(INSERT, [number])
        conn.execute(SELECT)


async def many_async(conn: Any) -> None:
    for number in range(MANY // 2):
        await conn.execute(INSERT, [number])
        await conn.execute(SELECT)


def commits(conn: Any) -> None:
    for number in range(MANY):
        conn.execute(INSERT, [number])
        conn.commit()


class Bench:
    """The rivals and the loop that the async ones share."""

    def __init__(self, conninfo: dict[str, str]) -> None:
        self.sandbox = Sandbox(conninfo)
        self.loop = asyncio.new_event_loop()
        self.plain = psycopg.connect(**conninfo)
        self.auto = psycopg.connect(**conninfo, autocommit=True)
        connect = psycopg.AsyncConnection.connect
        self.aplain = self.loop.run_until_complete(connect(**conninfo))
        self.aauto = self.loop.run_until_complete(connect(**conninfo, autocommit=True))
        manager = PGConnectionManager()
        plain = {"connection_settings": {"dbname": "x"}}
        auto = {"connection_settings": {"dbname": "x", "autocommit": True}}
        get = manager.get_database_connection_from_dict
        self.handles: dict[str, Any] = {
            "normal": get(plain, "normal"),
            "pool": get(plain, "pool"),
            "auto": get(auto, "normal"),
        }

        async def get_async() -> None:
            for name, config in (("async", plain), ("async_pool", plain), ("aauto", auto)):
                type_ = "async" if name == "aauto" else name
                self.handles[name] = await get(config, type_)

        self.loop.run_until_complete(get_async())

    def ours(self, name: str, work: Callable[[Any], None]) -> Callable[[], None]:
        handle = self.handles[name]

        def test() -> None:
            with handle as conn:
                work(conn)
            self.sandbox.reset()

        return test

    def ours_async(self, name: str, work: Callable[[Any], Any]) -> Callable[[], None]:
        handle = self.handles[name]

        async def body() -> None:
            async with handle as conn:
                await work(conn)

        def test() -> None:
            self.loop.run_until_complete(body())
            self.sandbox.reset()

        return test

    def by_hand(self, work: Callable[[Any], None]) -> Callable[[], None]:
        def test() -> None:
            work(self.plain)
            self.plain.rollback()

        return test

    def by_hand_async(self, work: Callable[[Any], Any]) -> Callable[[], None]:
        def test() -> None:
            self.loop.run_until_complete(work(self.aplain))
            self.loop.run_until_complete(self.aplain.rollback())

        return test

    def committing(self, work: Callable[[Any], None]) -> Callable[[], None]:
        def test() -> None:
            work(self.plain)
            self.plain.execute("DELETE FROM t")
            self.plain.commit()

        return test

    def autocommit(self) -> Callable[[], None]:
        def test() -> None:
            many(self.auto)
            self.auto.execute("DELETE FROM t")

        return test

    def autocommit_async(self) -> Callable[[], None]:
        def test() -> None:
            self.loop.run_until_complete(many_async(self.aauto))
            self.loop.run_until_complete(self.aauto.execute("DELETE FROM t"))

        return test


def rows(bench: Bench) -> list[tuple[str, float, int, Callable[[], None], Callable[[], None]]]:
    """Give name, goal, repetitions in a round, ours and theirs of each comparison."""
    b = bench
    return [
        ("normal", 0.95, 20, b.ours("normal", two), b.by_hand(two)),
        ("pool", 1.0, 20, b.ours("pool", two), b.by_hand(two)),
        ("async", 0.75, 20, b.ours_async("async", two_async), b.by_hand_async(two_async)),
        ("async_pool", 0.75, 20, b.ours_async("async_pool", two_async), b.by_hand_async(two_async)),
        ("100 in a transaction", 1.08, 1, b.ours("normal", many), b.by_hand(many)),
        (
            "100 in a transaction, async",
            1.08,
            1,
            b.ours_async("async", many_async),
            b.by_hand_async(many_async),
        ),
        ("100 autocommit", 1.5, 1, b.ours("auto", many), b.autocommit()),
        (
            "100 autocommit, async",
            1.4,
            1,
            b.ours_async("aauto", many_async),
            b.autocommit_async(),
        ),
        ("100 insert and commit", 0.9, 1, b.ours("normal", commits), b.committing(commits)),
    ]


def measure(test: Callable[[], None], times: list[float], repeat: int) -> None:
    start = perf_counter()
    for _ in range(repeat):
        test()
    times.append((perf_counter() - start) / repeat)


def main(rounds: int = 60) -> int:
    server = EmbeddedServer.start(find_binaries())
    try:
        server.create_database("bench")
        conninfo = server.conninfo("bench")
        with psycopg.connect(**conninfo) as conn:
            conn.execute("CREATE TABLE t (n int, x text)")
        return compare(conninfo, rounds)
    finally:
        server.stop()


def compare(conninfo: dict[str, str], rounds: int) -> int:
    late = 0
    bench: Any = None
    sources.interceptor = None
    sandbox = Sandbox(conninfo)
    sources.interceptor = Interceptor(sandbox)  # type: ignore[assignment]
    bench = Bench(conninfo)
    bench.sandbox = sandbox
    for name, goal, repeat, ours, theirs in rows(bench):
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            measure(ours, times[0], repeat)
            measure(theirs, times[1], repeat)
        mine, other = (statistics.median(each[5:]) * 1e6 for each in times)
        ratio = mine / other
        late += ratio > goal
        print(f"{name:28} {ratio:.3f} x (goal {goal}; {mine:.0f} us against {other:.0f} us)")
    sources.interceptor = None
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
