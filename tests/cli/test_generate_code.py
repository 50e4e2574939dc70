"""`pgmonkey pgconfig generate-code`: scripts that run as they are, with no secret in them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import psycopg
import pytest
import yaml

from pytest_pgmonkey.connection_type import CONNECTION_TYPES
from pytest_pgmonkey.testing.addresses.urls import url_of

LIBRARIES = ["pytest_pgmonkey", "psycopg"]
PASSWORD = "01234567890 'secret\" \\"


@pytest.fixture
def run_script(tmp_path):
    """A function that runs a script and gives what it prints; it must end well and quietly."""

    def run_script(code: str, **environ: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(code)
        result = subprocess.run(
            [sys.executable, "-W", "error", str(path)],
            capture_output=True,
            text=True,
            env={**os.environ, **environ},
            timeout=30,
            check=False,
        )
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout

    return run_script


@pytest.fixture
def template(pgmonkey, tmp_path, pg_server, database):
    """The template, with nothing changed but where the server is."""
    path = tmp_path / "pgmonkey_config.yaml"
    pgmonkey("pgconfig", "create", "--filepath", path).output()
    conninfo = pg_server.conninfo(database)
    text = path.read_text()
    for name, old in (("host", "localhost"), ("port", "5432"), ("dbname", "postgres")):
        assert f"  {name}: {old}\n" in text
        text = text.replace(f"  {name}: {old}\n", f"  {name}: '{conninfo.get(name, '')}'\n")
    path.write_text(text.replace("  user: postgres\n", f"  user: {conninfo['user']}\n"))
    return path


@pytest.fixture
def generate(pgmonkey):
    """A function that generates a script, as nothing else on standard output."""

    def generate(path, library: str, type_: str | None = None, *options: str) -> str:
        arguments = ["--connconfig", path, "--library", library]
        arguments += ["--connection-type", type_] if type_ else []
        result = pgmonkey("pgconfig", "generate-code", *arguments, *options)
        assert result.err == ""
        ast.parse(result.output())
        return result.out

    return generate


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("type_", CONNECTION_TYPES)
def test_runs_on_the_template(generate, run_script, template, library, type_):
    """Each script runs with the template's own settings, and ends at once and quietly."""
    assert run_script(generate(template, library, type_)).startswith("PostgreSQL ")


@pytest.mark.parametrize("library", LIBRARIES)
def test_is_formatted(generate, template, tmp_path, monkeypatch, library):
    """The script is as ruff would format it."""
    pytest.importorskip("ruff")
    monkeypatch.chdir(template.parent)  # A long path would be a long line.
    for type_ in CONNECTION_TYPES:
        path = tmp_path / f"{type_}.py"
        path.write_text(generate(template.name, library, type_))
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--check"]

    result = subprocess.run(
        [*command, *map(str, tmp_path.glob("*.py"))], capture_output=True, text=True, check=False
    )

    assert result.returncode == 0, result.stdout


def test_the_originals_name(generate, template):
    """`--library pgmonkey`, as the original has it, means this package."""
    assert generate(template, "pgmonkey") == generate(template, "pytest_pgmonkey")


def test_the_files_type(generate, make_config):
    """Without the option it is the file's type, else normal."""
    assert '"async_pool"' in generate(make_config("async_pool"), "pytest_pgmonkey")
    assert '"normal"' in generate(make_config(), "pytest_pgmonkey")


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("type_", CONNECTION_TYPES)
def test_all_settings(generate, run_script, make_config, library, type_):
    """Session settings, autocommit and the check of pools are in force in the script."""
    values = {"search_path": ["app", "public"], "work_mem": "5MB"}
    pool = {"min_size": 2, "max_size": 3, "check_on_checkout": True, "timeout": "7"}
    path = make_config(
        connection_settings={"autocommit": True, "application_name": 'a "b" \\'},
        sync_settings=values,
        async_settings=values,
        pool_settings=pool,
        async_pool_settings=pool,
    )
    show = (
        "SELECT concat_ws('|', current_setting('search_path'), current_setting('work_mem'),"
        " current_setting('application_name'), pg_current_xact_id_if_assigned())"
    )
    code = generate(path, library, type_)
    assert "check_connection" in code or library == "pytest_pgmonkey" or "pool" not in type_

    printed = run_script(code.replace("SELECT version()", show))

    assert printed == 'app, public|5MB|a "b" \\\n'


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("type_", ["normal", "async_pool"])
def test_tls_and_password(generate, run_script, tmp_path, tls_server, library, type_):
    """A password is no part of the script, which finds it, whatever it looks like."""
    role = f"writer_{type_}_{library}"
    settings = tls_server.conninfo(user=role, password=PASSWORD)
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"connection_settings": settings}))
    code = generate(path, library, type_)
    assert "secret" not in code
    with psycopg.connect(**tls_server.admin_conninfo(), autocommit=True) as conn:
        literal = psycopg.sql.Literal(PASSWORD).as_string(conn)
        conn.execute(f"CREATE ROLE {role} LOGIN PASSWORD {literal}")
        try:
            assert run_script(code).startswith("PostgreSQL ")
        finally:
            conn.execute(f"DROP ROLE {role}")


@pytest.mark.parametrize("library", LIBRARIES)
def test_references(generate, run_script, make_config, tmp_path, library, monkeypatch, conn):
    """With `--resolve-env` the script resolves the references when it runs."""
    (tmp_path / "secret").write_text("from the file\n")
    path = make_config(
        connection_settings={
            "application_name": "${APP_A}-${APP_B:-b}!",
            "password": {"from_env": "APP_PASSWORD"},
            "sslpassword": {"from_file": str(tmp_path / "secret")},
        },
        sync_settings={"work_mem": "${APP_MEMORY:-5MB}"},
        pool_settings={"min_size": 1, "max_size": "${APP_SIZE}"},
    )
    monkeypatch.setenv("APP_A", "now")
    monkeypatch.setenv("APP_PASSWORD", "hidden")
    monkeypatch.setenv("APP_SIZE", "2")
    show = "SELECT current_setting('application_name') || current_setting('work_mem')"

    code = generate(path, library, "pool", "--resolve-env")
    printed = run_script(code.replace("SELECT version()", show), APP_A="later")

    assert printed == "later-b!5MB\n"
    assert not [secret for secret in ("hidden", "from the file") if secret in code]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("autocommit", [True, False])
@pytest.mark.parametrize("type_", ["normal", "async_pool"])
def test_dsn(generate, run_script, tmp_path, pg_server, database, library, autocommit, type_):
    """A DSN is the script's first argument, read from the file where it holds a password."""
    url = url_of({**pg_server.conninfo(database), "password": "pass1234"})
    path = tmp_path / "c.yaml"
    for beside in ({"autocommit": autocommit}, {"application_name": "it"}):
        path.write_text(yaml.safe_dump({"connection_settings": {"dsn": url, **beside}}))
        code = generate(path, library, type_)
        assert "pass1234" not in code
        name = "SELECT current_database() || current_setting('application_name')"
        expected = database + beside.get("application_name", "")
        assert run_script(code.replace("SELECT version()", name)) == f"{expected}\n"


@pytest.mark.parametrize("library", LIBRARIES)
def test_dsn_from_the_environment(generate, run_script, tmp_path, pg_server, database, library):
    """With `--resolve-env` the script asks the variable when it runs."""
    url = url_of(pg_server.conninfo(database))
    path = tmp_path / "c.yaml"
    path.write_text("connection_settings: {dsn: {from_env: APP_URL}}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APP_URL", "postgresql://elsewhere/app")
        code = generate(path, library, "pool", "--resolve-env")
    assert run_script(code, APP_URL=url).startswith("PostgreSQL ")


def test_references_without_the_option(pgmonkey, make_config):
    """Where references stay as they are, it is said."""
    path = make_config(connection_settings={"password": "${APP_PASSWORD}"})

    result = pgmonkey("pgconfig", "generate-code", "--connconfig", path)

    assert result.status == 0
    assert "--resolve-env has the script resolve it" in result.err


def test_secrets_in_other_places(generate, make_config):
    """A password inside of a DSN is one as well."""
    path = make_config(connection_settings={"dbname": "postgresql://u:pass1234@h/db"})

    assert "pass1234" not in generate(path, "psycopg")


def test_bad_file(pgmonkey, make_config):
    """What the file has wrong is one line."""
    path = make_config(pool_settings={"min_size": 9, "max_size": 1})
    for library in LIBRARIES:
        arguments = ["--connconfig", path, "--library", library, "--connection-type", "pool"]

        error = pgmonkey("pgconfig", "generate-code", *arguments).error

        assert error == f"{path}: pool_settings: min_size (9) is above max_size (1)"
