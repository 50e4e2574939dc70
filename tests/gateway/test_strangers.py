"""Applications that know nothing of the kit, most of them in processes that are started once.

Each is a project of its own, whose tests run in a process of their own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers.remains import processes_of
from helpers.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the gateway needs Unix sockets")

SCHEMA = """\
CREATE TABLE item (
    id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL UNIQUE
);
"""

PROCESSES = """
    import os
    import re
    import subprocess
    import threading
    from contextlib import contextmanager

    import httpx

    PATIENCE = 60

    @contextmanager
    def running(*command, ready, **options):
        '''A child process, and the line of its output that says that it is ready.'''
        with subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        ) as child:
            too_late = threading.Timer(PATIENCE, child.kill)
            too_late.start()
            output = []
            try:
                for line in child.stdout:
                    output.append(line)
                    if ready in line:
                        break
                too_late.cancel()
                assert output and ready in output[-1], "".join(output)
                yield child, line
            finally:
                too_late.cancel()
                child.terminate()
                print(child.communicate(timeout=PATIENCE)[0])

    @contextmanager
    def serving(*command, ready, url, **variables):
        '''A client of an HTTP server that finds its database by DATABASE_URL.'''
        # gunicorn puts a socket into the directory.
        environ = {"DATABASE_URL": url, "XDG_RUNTIME_DIR": os.getcwd(), **variables}
        with running(*command, ready=ready, env={**os.environ, **environ}) as (child, line):
            address = re.search(r"127\\.0\\.0\\.1:\\d+", line)[0]
            with httpx.Client(base_url=f"http://{address}", timeout=PATIENCE) as client:
                yield client
"""

# GET / gives the names of the items, POST / adds items by their names: all of them, or none.
HTTP_TESTS = """
    from concurrent.futures import ThreadPoolExecutor

    import psycopg
    import pytest

    def names(pgmonkey):
        return [name for (name,) in pgmonkey.execute("SELECT name FROM item ORDER BY id")]

    @pytest.mark.parametrize("run", range(3))
    def test_application_and_test_see_each_others_rows(client, pgmonkey, run):
        assert client.get("/").json() == []
        assert client.post("/", content="theirs").status_code == 200
        assert names(pgmonkey) == ["theirs"]
        pgmonkey.execute("INSERT INTO item (name) VALUES ('ours')")
        assert client.get("/").json() == ["theirs", "ours"]

    def test_a_failed_request_leaves_nothing(client, pgmonkey):
        pgmonkey.execute("INSERT INTO item (name) VALUES ('taken')")
        assert client.post("/", content="new,taken").status_code == 409
        assert names(pgmonkey) == client.get("/").json() == ["taken"]
        assert client.post("/", content="new").status_code == 200
        assert names(pgmonkey) == client.get("/").json() == ["taken", "new"]

    def test_requests_at_the_same_time(client, pgmonkey):
        wanted = [f"{n},again {n}" for n in range(12)]
        with ThreadPoolExecutor(6) as executor:
            for response in executor.map(lambda text: client.post("/", content=text), wanted):
                assert response.status_code == 200
        assert sorted(names(pgmonkey)) == sorted(",".join(wanted).split(","))

    @pytest.mark.pgmonkey(isolation="clone")
    @pytest.mark.parametrize("run", range(2))
    def test_in_a_database_of_the_tests_own(client, pgmonkey, run):
        assert client.get("/").json() == []
        assert client.post("/", content="theirs").status_code == 200
        pgmonkey.execute("VACUUM item")
        assert names(pgmonkey) == ["theirs"]

    def test_what_it_commits_is_not_in_the_database(client, pgmonkey, pgmonkey_database):
        assert client.post("/", content="theirs").status_code == 200
        assert names(pgmonkey) == ["theirs"]
        with psycopg.connect(pgmonkey_database.dsn) as conn:
            assert conn.execute("SELECT FROM item").rowcount == 0

    def test_no_row_has_stayed(client, pgmonkey):
        assert client.get("/").json() == names(pgmonkey) == []
"""
# POST /hold begins a transaction and adds an item, POST /finish commits; GET /opened gives how many
# connections the pool has opened.
POOL_TESTS = """
    def test_a_request_leaves_its_transaction_open(client, pgmonkey):
        assert client.post("/hold").status_code == 200

    def test_its_commit_comes_too_late(client, pgmonkey):
        assert client.get("/").json() == []
        assert client.post("/finish").status_code == 200
        assert client.get("/").json() == []
        assert pgmonkey.execute("SELECT FROM item").rowcount == 0

    def test_the_pool_has_kept_its_connections(client):
        assert client.get("/opened").json() == 2
"""
HTTP_PASSED, POOL_PASSED = 9, 3


@pytest.fixture(autouse=True)
def no_process_stays(pytester: pytest.Pytester) -> Iterator[None]:
    """Every child that a project starts ends with it."""
    if not Path("/proc/self/cwd").exists():
        yield
        return
    before = processes_of(pytester.path)
    yield
    left = set[int]()

    def is_quiet() -> bool:
        left.clear()
        left.update(processes_of(pytester.path) - before)
        return not left

    if not wait_until(is_quiet, 5):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project with a table of items, and a module that starts processes."""
    (pytester.path / "schema.sql").write_text(SCHEMA, "utf-8")
    pytester.makepyfile(processes=PROCESSES)
    ini(pytester, "pgmonkey_schema = schema.sql")
    return pytester


@pytest.fixture
def passes(run: Callable[..., Any]) -> Callable[[int], None]:
    """Run the project: so many of its tests pass, and nothing else comes of it."""

    def passes(number: int) -> None:
        # To import hypothesis takes as long as all the rest of such a run.
        result = run("-v", "-p", "no:hypothesispytest")
        result.assert_outcomes(passed=number)
        assert result.ret == 0

    return passes


def ini(pytester: pytest.Pytester, *lines: str) -> None:
    head = (
        "[pytest]",
        "pythonpath = .",
        "asyncio_default_fixture_loop_scope = function",
        "timeout = 90",  # before this run is killed, and its children stay
    )
    (pytester.path / "pytest.ini").write_text("\n".join([*head, *lines]) + "\n", "utf-8")


# Libraries, in the process of the tests


def test_sqlmodel(project: pytest.Pytester, passes: Callable[[int], None]) -> None:
    """Two engines of a module, over psycopg and asyncpg, are there before the tables."""
    ini(
        project,
        "pgmonkey_env =",
        "    DATABASE_URL = url:postgresql+psycopg",
        "    ASYNC_DATABASE_URL = url:postgresql+asyncpg",
        "pgmonkey_schema =",
        "    models:create_heroes",
        "    models:create_teams",
    )
    project.makepyfile(
        models="""
        import asyncio
        import os

        from sqlalchemy import create_engine
        from sqlalchemy.ext.asyncio import create_async_engine
        from sqlalchemy.pool import NullPool
        from sqlmodel import Field, SQLModel

        engine = create_engine(os.environ["DATABASE_URL"])
        # Each test has an event loop of its own, in which asyncpg's connections stay.
        async_engine = create_async_engine(os.environ["ASYNC_DATABASE_URL"], poolclass=NullPool)

        class Hero(SQLModel, table=True):
            id: int | None = Field(default=None, primary_key=True)
            name: str = Field(unique=True)

        class Team(SQLModel, table=True):
            id: int | None = Field(default=None, primary_key=True)
            name: str = Field(unique=True)

        def create_heroes(conn):
            SQLModel.metadata.create_all(engine, tables=[Hero.__table__])

        def create_teams(conn):
            async def create():
                async with async_engine.begin() as conn:
                    await conn.run_sync(SQLModel.metadata.create_all)

            asyncio.run(create())
        """,
        test_models="""
        import pytest
        from models import Hero, Team, async_engine, engine
        from sqlalchemy.exc import IntegrityError
        from sqlmodel import Session, select
        from sqlmodel.ext.asyncio.session import AsyncSession

        @pytest.mark.parametrize("run", range(3))
        def test_sync(run):
            with Session(engine) as session:
                assert session.exec(select(Hero)).all() == []
                session.add(Hero(name="Ann"))
                session.commit()
                session.add(Hero(name="Ann"))
                with pytest.raises(IntegrityError):
                    session.commit()
                session.rollback()
                session.add(Hero(name="Ben"))
                session.commit()
            with Session(engine) as session:
                assert session.exec(select(Hero.name).order_by(Hero.id)).all() == ["Ann", "Ben"]

        @pytest.mark.asyncio
        @pytest.mark.parametrize("run", range(3))
        async def test_async(run):
            async with AsyncSession(async_engine) as session:
                assert (await session.exec(select(Team))).all() == []
                session.add(Team(name="A"))
                await session.commit()
                session.add(Team(name="A"))
                with pytest.raises(IntegrityError):
                    await session.commit()
                await session.rollback()
                session.add(Team(name="B"))
                await session.commit()
            async with AsyncSession(async_engine) as session:
                found = await session.exec(select(Team.name).order_by(Team.id))
                assert found.all() == ["A", "B"]

        @pytest.mark.asyncio
        async def test_both_engines_work_in_one_transaction(pgmonkey):
            with Session(engine) as session:
                session.add_all([Hero(name="Ann"), Team(name="A")])
                session.commit()
            async with AsyncSession(async_engine) as session:
                session.add_all([Hero(name="Ben"), Team(name="B")])
                await session.commit()
                assert (await session.exec(select(Hero.name))).all() == ["Ann", "Ben"]
            with Session(engine) as session:
                assert session.exec(select(Team.name)).all() == ["A", "B"]
            assert pgmonkey.execute("SELECT count(*) FROM hero, team").fetchone() == (4,)

        @pytest.mark.pgmonkey(isolation="clone")
        def test_clone():
            with Session(engine) as session:
                session.add(Hero(name="Ann"))
                session.commit()
                assert session.exec(select(Hero.name)).all() == ["Ann"]

        def test_nothing_has_stayed(pgmonkey):
            with Session(engine) as session:
                assert session.exec(select(Hero)).all() == session.exec(select(Team)).all() == []
            assert pgmonkey.execute("SELECT FROM hero UNION ALL SELECT FROM team").rowcount == 0
        """,
    )
    passes(9)


def test_pg8000(project: pytest.Pytester, passes: Callable[[int], None]) -> None:
    """A driver in Python, by itself and under SQLAlchemy, connects when the module is imported."""
    ini(
        project,
        "pgmonkey_schema = schema.sql",
        "pgmonkey_env =",
        "    DATABASE_URL = url:postgresql+pg8000",
        "    DB_HOST = host",
        "    DB_PORT = port",
        "    DB_USER = user",
        "    DB_PASSWORD = password",
        "    DB_NAME = dbname",
    )
    project.makepyfile(
        items="""
        import os

        import pg8000.native
        from sqlalchemy import create_engine

        native = pg8000.native.Connection(
            os.environ["DB_USER"],
            host=os.environ["DB_HOST"],
            port=int(os.environ["DB_PORT"]),
            password=os.environ["DB_PASSWORD"],
            database=os.environ["DB_NAME"],
        )
        engine = create_engine(os.environ["DATABASE_URL"])
        """,
        test_items="""
        import pytest
        from items import engine, native
        from pg8000.native import DatabaseError
        from sqlalchemy import text
        from sqlalchemy.exc import SQLAlchemyError

        INSERT = "INSERT INTO item (name) VALUES (:name)"
        NAMES = "SELECT name FROM item ORDER BY id"

        @pytest.mark.parametrize("run", range(3))
        def test_native(run):
            assert native.run(NAMES) == []
            native.run(INSERT, name="one")
            native.run("START TRANSACTION")
            native.run(INSERT, name="two")
            native.run("ROLLBACK")
            with pytest.raises(DatabaseError) as caught:
                native.run(INSERT, name="one")
            assert caught.value.args[0]["C"] == "23505"
            statement = native.prepare(INSERT)
            statement.run(name="three")
            statement.close()
            assert native.run(NAMES) == [["one"], ["three"]]

        @pytest.mark.parametrize("run", range(3))
        def test_sqlalchemy(run):
            with engine.begin() as conn:
                assert conn.execute(text(NAMES)).all() == []
                conn.execute(text(INSERT), [{"name": "one"}, {"name": "two"}])
            with pytest.raises(SQLAlchemyError, match="item_name_key"), engine.begin() as conn:
                conn.execute(text(INSERT), [{"name": "three"}, {"name": "two"}])
            with engine.connect() as conn:
                assert conn.execute(text(NAMES)).scalars().all() == ["one", "two"]

        def test_one_sees_what_the_other_has_committed(pgmonkey):
            native.run(INSERT, name="native")
            with engine.begin() as conn:
                conn.execute(text(INSERT), {"name": "engine"})
            pgmonkey.execute("INSERT INTO item (name) VALUES ('test')")
            assert native.run(NAMES) == [["native"], ["engine"], ["test"]]

        @pytest.mark.pgmonkey(isolation="clone")
        def test_clone(pgmonkey):
            native.run(INSERT, name="native")
            assert pgmonkey.execute(NAMES).fetchall() == [("native",)]

        def test_nothing_has_stayed():
            assert native.run(NAMES) == []
        """,
    )
    passes(9)


# Servers that are started once


def test_uvicorn(project: pytest.Pytester, passes: Callable[[int], None]) -> None:
    """The async pools of two applications are opened when these start, and live on."""
    project.makepyfile(
        with_asyncpg="""
        import os
        from contextlib import AsyncExitStack, asynccontextmanager

        import asyncpg
        from fastapi import FastAPI, HTTPException, Request

        held = AsyncExitStack()
        opened = []

        async def note(conn):
            opened.append(conn)

        @asynccontextmanager
        async def lifespan(app):
            async with asyncpg.create_pool(
                os.environ["DATABASE_URL"], min_size=2, max_size=2, init=note
            ) as app.state.pool:
                yield

        app = FastAPI(lifespan=lifespan)

        @app.get("/")
        async def names():
            rows = await app.state.pool.fetch("SELECT name FROM item ORDER BY id")
            return [row["name"] for row in rows]

        @app.post("/")
        async def add(request: Request):
            try:
                async with app.state.pool.acquire() as conn, conn.transaction():
                    for name in (await request.body()).decode().split(","):
                        await conn.execute("INSERT INTO item (name) VALUES ($1)", name)
            except asyncpg.UniqueViolationError:
                raise HTTPException(409)

        @app.post("/hold")
        async def hold():
            conn = await held.enter_async_context(app.state.pool.acquire())
            await held.enter_async_context(conn.transaction())
            await conn.execute("INSERT INTO item (name) VALUES ('held')")

        @app.post("/finish")
        async def finish():
            await held.aclose()

        @app.get("/opened")
        async def connections():
            return len(opened)
        """,
        with_psycopg="""
        import os
        from contextlib import AsyncExitStack, asynccontextmanager

        from psycopg.errors import UniqueViolation
        from psycopg_pool import AsyncConnectionPool
        from starlette.applications import Starlette
        from starlette.responses import JSONResponse
        from starlette.routing import Route

        held = AsyncExitStack()
        opened = []

        async def note(conn):
            opened.append(conn)

        @asynccontextmanager
        async def lifespan(app):
            async with AsyncConnectionPool(
                os.environ["DATABASE_URL"], min_size=2, max_size=2, configure=note, open=False
            ) as app.state.pool:
                yield

        async def names(request):
            async with request.app.state.pool.connection() as conn:
                cursor = await conn.execute("SELECT name FROM item ORDER BY id")
                return JSONResponse([name for (name,) in await cursor.fetchall()])

        async def add(request):
            try:
                async with request.app.state.pool.connection() as conn:
                    for name in (await request.body()).decode().split(","):
                        await conn.execute("INSERT INTO item (name) VALUES (%s)", [name])
            except UniqueViolation:
                return JSONResponse("taken", 409)
            return JSONResponse("added")

        async def hold(request):
            conn = await held.enter_async_context(request.app.state.pool.connection())
            await conn.execute("INSERT INTO item (name) VALUES ('held')")
            return JSONResponse("held")

        async def finish(request):
            await held.aclose()
            return JSONResponse("finished")

        async def connections(request):
            return JSONResponse(len(opened))

        routes = [
            Route("/", names),
            Route("/", add, methods=["POST"]),
            Route("/hold", hold, methods=["POST"]),
            Route("/finish", finish, methods=["POST"]),
            Route("/opened", connections),
        ]
        app = Starlette(routes=routes, lifespan=lifespan)
        """,
        conftest="""
        import sys

        import pytest
        from processes import serving

        @pytest.fixture(scope="session", params=["with_asyncpg", "with_psycopg"])
        def client(request, pgmonkey_url):
            command = [sys.executable, "-m", "uvicorn", f"{request.param}:app", "--port", "0"]
            with serving(*command, ready="running on", url=pgmonkey_url) as client:
                yield client
        """,
        test_items=HTTP_TESTS,
        test_pool=POOL_TESTS,
    )
    passes(2 * (HTTP_PASSED + POOL_PASSED))


def test_gunicorn(project: pytest.Pytester, passes: Callable[[int], None]) -> None:
    """Each of two workers has a pool, and both see what the other has committed."""
    project.makepyfile(
        shop="""
        import os

        from flask import Flask, request
        from psycopg.errors import UniqueViolation
        from psycopg_pool import ConnectionPool

        app = Flask(__name__)
        pool = ConnectionPool(os.environ["DATABASE_URL"], min_size=1, open=True)

        @app.get("/")
        def names():
            with pool.connection() as conn:
                cursor = conn.execute("SELECT name FROM item ORDER BY id")
                return [name for (name,) in cursor]

        @app.post("/")
        def add():
            try:
                with pool.connection() as conn:
                    for name in request.get_data(as_text=True).split(","):
                        conn.execute("INSERT INTO item (name) VALUES (%s)", [name])
            except UniqueViolation:
                return "taken", 409
            return {"pid": os.getpid()}
        """,
        conftest="""
        import sys

        import pytest
        from processes import serving

        @pytest.fixture(scope="session")
        def client(pgmonkey_url):
            command = [sys.executable, "-m", "gunicorn", "-w", "2", "-b", "127.0.0.1:0", "shop:app"]
            with serving(*command, ready="Listening at", url=pgmonkey_url) as client:
                yield client
        """,
        test_items=HTTP_TESTS,
        test_workers="""
        import pytest

        @pytest.mark.parametrize("run", range(2))
        def test_both_workers_join_the_test(client, pgmonkey, run):
            first = []

            def body():
                # The worker that has this request waits for the rest: another one has the next.
                first.append(client.post("/", content="first"))
                yield b"second"

            second = client.post("/", content=body())
            assert first[0].json()["pid"] != second.json()["pid"]
            assert client.get("/").json() == ["first", "second"]
            assert pgmonkey.execute("SELECT count(*) FROM item").fetchone() == (2,)
        """,
    )
    passes(HTTP_PASSED + 2)


@pytest.fixture(scope="session")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with node-postgres, which is installed once."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("needs Node.js (Debian: nodejs, npm): install it to run this test")
    directory = tmp_path_factory.mktemp("node")
    # Without it npm would look for one in the directories above.
    (directory / "package.json").write_text("{}", "utf-8")
    command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline"]
    command += ["--fetch-retries=4", "--fetch-retry-mintimeout=1000", "pg@8"]
    try:
        subprocess.run(command, cwd=directory, check=True, capture_output=True, timeout=150)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"needs node-postgres, which npm cannot install: {error}: {error.stderr!r}")
    return directory / "node_modules"


def test_node(project: pytest.Pytester, passes: Callable[[int], None], node_modules: Path) -> None:
    """A pool of node-postgres, with prepared statements."""
    (project.path / "server.js").write_text(
        """
        const http = require("node:http");
        const { Pool } = require("pg");

        const pool = new Pool({
          connectionString: process.env.DATABASE_URL, max: 2, idleTimeoutMillis: 0,
        });
        let opened = 0;
        pool.on("connect", () => opened++);
        let held;

        async function names() {
          const { rows } = await pool.query("SELECT name FROM item ORDER BY id");
          return [200, rows.map((row) => row.name)];
        }

        async function add(names) {
          const client = await pool.connect();
          try {
            await client.query("BEGIN");
            for (const name of names) {
              const text = "INSERT INTO item (name) VALUES ($1)";
              await client.query({ name: "add", text, values: [name] });
            }
            await client.query("COMMIT");
            return [200, "added"];
          } catch (error) {
            await client.query("ROLLBACK");
            return [error.code === "23505" ? 409 : 500, String(error)];
          } finally {
            client.release();
          }
        }

        async function hold() {
          held = await pool.connect();
          await held.query("BEGIN; INSERT INTO item (name) VALUES ('held')");
          return [200, "held"];
        }

        async function finish() {
          await held.query("COMMIT");
          held.release();
          return [200, "finished"];
        }

        async function answer(request) {
          const parts = await request.toArray();
          if (request.url === "/opened") return [200, opened];
          if (request.url === "/hold") return hold();
          if (request.url === "/finish") return finish();
          if (request.method === "GET") return names();
          return add(Buffer.concat(parts).toString().split(","));
        }

        const server = http.createServer(async (request, response) => {
          const [status, body] = await answer(request).catch((error) => [500, String(error)]);
          response.writeHead(status).end(JSON.stringify(body));
        });
        server.listen(0, "127.0.0.1", () => {
          console.log(`listening on 127.0.0.1:${server.address().port}`);
        });
        """,
        "utf-8",
    )
    project.makepyfile(
        conftest=f"""
        import pytest
        from processes import serving

        MODULES = {str(node_modules)!r}

        @pytest.fixture(scope="session")
        def client(pgmonkey_url):
            command = ["node", "server.js"]
            with serving(
                *command, ready="listening", url=pgmonkey_url, NODE_PATH=MODULES
            ) as client:
                yield client
        """,
        test_items=HTTP_TESTS,
        test_pool=POOL_TESTS,
    )
    passes(HTTP_PASSED + POOL_PASSED)


def test_pgbouncer(project: pytest.Pytester, passes: Callable[[int], None]) -> None:
    """Four connections of a pool share two of PgBouncer's, transaction by transaction."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        pytest.skip("needs PgBouncer (Debian: pgbouncer): install it to run this test")
    project.makepyfile(
        conftest=f"""
        import os
        import shutil
        import tempfile
        from pathlib import Path

        import pytest
        from processes import running
        from psycopg.conninfo import conninfo_to_dict, make_conninfo
        from psycopg_pool import ConnectionPool
        from pytest_pgmonkey.testing.servers.embedded.binaries import run_as
        from pytest_pgmonkey.testing.servers.embedded.unprivileged import unprivileged_uid

        INI = '''
        [databases]
        shop = {{}}

        [pgbouncer]
        pool_mode = transaction
        listen_addr =
        listen_port = 6432
        unix_socket_dir = {{}}
        auth_type = any
        default_pool_size = 2
        '''

        @pytest.fixture(scope="session")
        def pooler(pgmonkey_url):
            directory = Path(tempfile.mkdtemp())  # the project's own is root's alone
            uid = unprivileged_uid()  # PgBouncer refuses to run as root
            if uid is not None:
                os.chown(directory, uid, uid)
            server = make_conninfo(**conninfo_to_dict(pgmonkey_url))
            file = directory / "pgbouncer.ini"
            file.write_text(INI.format(server, directory))
            try:
                with running({program!r}, file, ready="process up", **run_as(uid)):
                    yield make_conninfo(host=directory, port=6432, dbname="shop", user="anybody")
            finally:
                shutil.rmtree(directory)

        @pytest.fixture(scope="session")
        def pool(pooler):
            # In this mode PgBouncer wants no prepared statements, which are of one session.
            options = {{"prepare_threshold": None}}
            with ConnectionPool(pooler, min_size=4, kwargs=options) as pool:
                yield pool
        """,
        test_items="""
        from concurrent.futures import ThreadPoolExecutor

        import psycopg
        import pytest

        def add(pool, *names):
            with pool.connection() as conn:
                for name in names:
                    conn.execute("INSERT INTO item (name) VALUES (%s)", [name])

        def names(pool):
            with pool.connection() as conn:
                return [name for (name,) in conn.execute("SELECT name FROM item ORDER BY name")]

        @pytest.mark.parametrize("run", range(3))
        def test_rows_of_one_test(pool, pgmonkey, run):
            assert names(pool) == []
            add(pool, "pooled")
            pgmonkey.execute("INSERT INTO item (name) VALUES ('test')")
            assert names(pool) == ["pooled", "test"]
            with pytest.raises(psycopg.errors.UniqueViolation):
                add(pool, "new", "pooled")
            assert pgmonkey.execute("SELECT count(*) FROM item").fetchone() == (2,)

        def test_transactions_at_the_same_time(pool, pgmonkey):
            with ThreadPoolExecutor(4) as executor:
                list(executor.map(lambda n: add(pool, f"{n}", f"again {n}"), range(16)))
            assert len(names(pool)) == 32

        def test_connections_take_turns_at_the_same_session(pool):
            with pool.connection() as first, pool.connection() as second:
                first.execute("INSERT INTO item (name) VALUES ('first')")
                first.commit()
                second.execute("INSERT INTO item (name) VALUES ('second')")
                second.rollback()
                query = "SELECT name FROM item"
                assert first.execute(query).fetchall() == [("first",)]
                assert second.execute(query).fetchall() == [("first",)]

        @pytest.mark.pgmonkey(isolation="clone")
        @pytest.mark.parametrize("run", range(2))
        def test_in_a_database_of_the_tests_own(pool, pgmonkey, run):
            assert names(pool) == []
            add(pool, "pooled")
            pgmonkey.execute("VACUUM item")
            assert names(pool) == ["pooled"]

        def test_no_row_has_stayed(pool):
            assert names(pool) == []
        """,
    )
    passes(8)


# Workers that are forked


WORKERS = """
    import json
    import multiprocessing
    import os
    import sys

    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import IntegrityError

    engine = create_engine(os.environ["DATABASE_URL"])

    def begin(together):
        global all_are_busy
        all_are_busy = together
        engine.dispose(close=False)  # its connections are the parent's

    def add(name):
        all_are_busy.wait(60)  # so that no worker takes the jobs of all
        try:
            with engine.begin() as conn:
                conn.execute(text("INSERT INTO item (name) VALUES (:name)"), {"name": name})
        except IntegrityError:
            return os.getpid(), "taken"
        return os.getpid(), "added"

    def forked(number):
        with engine.connect() as conn:
            conn.execute(text("SELECT 1"))  # the pool has a connection when the workers are forked
        context = multiprocessing.get_context("fork")
        return context.Pool(number, begin, [context.Barrier(number)])

    if __name__ == "__main__":
        with forked(2) as workers:
            print("ready", flush=True)
            for line in sys.stdin:
                print(json.dumps(workers.map(add, json.loads(line), 1)), flush=True)
"""
WORKERS_TESTS = """
    import pytest
    from sqlalchemy import text

    def names(pgmonkey):
        return [name for (name,) in pgmonkey.execute("SELECT name FROM item ORDER BY name")]

    @pytest.mark.parametrize("run", range(3))
    def test_both_workers_join_the_test(work, pgmonkey, run):
        pgmonkey.execute("INSERT INTO item (name) VALUES ('test')")
        (one, first), (other, second) = work(["a", "b"])
        assert one != other
        assert first == second == "added"
        assert names(pgmonkey) == ["a", "b", "test"]

    def test_the_second_of_two_equal_rows_fails(work, pgmonkey):
        assert sorted(word for pid, word in work(["a", "a"])) == ["added", "taken"]
        assert {word for pid, word in work(["b", "c"])} == {"added"}
        assert names(pgmonkey) == ["a", "b", "c"]

    @pytest.mark.pgmonkey(isolation="clone")
    @pytest.mark.parametrize("run", range(2))
    def test_in_a_database_of_the_tests_own(work, pgmonkey, run):
        work(["a", "b"])
        pgmonkey.execute("VACUUM item")
        assert names(pgmonkey) == ["a", "b"]

    def test_no_row_has_stayed(work, pgmonkey):
        assert names(pgmonkey) == []
"""


def test_prefork_worker(project: pytest.Pytester, passes: Callable[[int], None]) -> None:
    """A process with an engine forks two workers, which get their jobs through a pipe."""
    project.makepyfile(
        workers=WORKERS,
        conftest="""
        import json
        import os
        import sys

        import pytest
        from processes import running

        @pytest.fixture(scope="session")
        def work(pgmonkey_url):
            url = pgmonkey_url.replace("postgresql:", "postgresql+psycopg:")
            environ = {**os.environ, "DATABASE_URL": url}
            command = [sys.executable, "workers.py"]
            with running(*command, ready="ready", env=environ) as (child, line):

                def work(names):
                    child.stdin.write(json.dumps(names) + "\\n")
                    child.stdin.flush()
                    return json.loads(child.stdout.readline())

                yield work
        """,
        test_workers=WORKERS_TESTS,
    )
    passes(7)


def test_workers_that_the_tests_process_forks(
    project: pytest.Pytester, passes: Callable[[int], None]
) -> None:
    """They connect anew, and the parent's engine goes on on its own connections."""
    ini(
        project,
        "pgmonkey_schema = schema.sql",
        "pgmonkey_env = DATABASE_URL = url:postgresql+psycopg",
        # Python 3.12 warns of forks in a process that has threads, as one with a gateway has.
        "filterwarnings = ignore:This process:DeprecationWarning",
    )
    project.makepyfile(
        workers=WORKERS,
        conftest="""
        import pytest
        from workers import add, engine, forked

        @pytest.fixture(scope="session")
        def work(pgmonkey_database):
            with forked(2) as workers:
                yield lambda names: workers.map(add, names, 1)
        """,
        test_workers=WORKERS_TESTS,
        test_engine="""
        from sqlalchemy import text
        from workers import engine

        def test_the_parent_has_kept_its_connection(work):
            work(["a", "b"])
            with engine.begin() as conn:
                conn.execute(text("INSERT INTO item (name) VALUES ('parent')"))
            names = text("SELECT name FROM item ORDER BY name")
            with engine.connect() as conn:
                assert conn.execute(names).scalars().all() == ["a", "b", "parent"]
        """,
    )
    passes(8)
