"""Configurations: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import os
import pickle
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import psycopg
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from psycopg_pool import ConnectionPool

from pytest_pgmonkey import (
    ConfigError,
    ConnectionType,
    PGMonkeyError,
    load_config,
    redact_config,
)
from pytest_pgmonkey.config import (
    _known_dsn,
    _parse,
    connection_spec,
    dsn_spec,
    prepare_config,
    read_spec,
)
from pytest_pgmonkey.judge import _POOL_REFUSED, _POOL_RULES

SECRET = "s3cr3t-value"


@pytest.fixture
def write(tmp_path):
    """A function that writes a configuration file and gives its path."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@contextmanager
def ordinary_user():
    """For root, who may read every file."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def conninfo(**settings) -> dict[str, str]:
    return connection_spec({"connection_settings": settings}).conninfo_dict


def pool(connection_type: str = "pool", **settings) -> dict:
    section = "async_pool_settings" if connection_type == "async_pool" else "pool_settings"
    config = {"connection_settings": {}, section: settings}
    return dict(connection_spec(config, connection_type).pool)


def session(section: str = "sync_settings", type_: str = "normal", **settings) -> dict[str, str]:
    return dict(connection_spec({"connection_settings": {}, section: settings}, type_).settings)


class TestFiles:
    def test_reads_every_section(self, write):
        """A file of every section comes back as it was written."""
        config = {
            "connection_type": "pool",
            "connection_settings": {"host": "db", "port": 5432, "autocommit": True},
            "sync_settings": {"work_mem": "64MB"},
            "async_settings": {"search_path": ["a", "b"]},
            "pool_settings": {"min_size": 1, "timeout": 2.5},
            "async_pool_settings": {"max_size": 9},
        }

        assert config == load_config(write(yaml.safe_dump(config)))

    def test_takes_str_and_path(self, write):
        """A path is a string or a Path."""
        path = write("connection_settings: {host: db}")

        assert load_config(path) == load_config(str(path))
        assert str(path) == read_spec(path).origin

    def test_expands_home(self, write, monkeypatch):
        """A `~` at the start of the path is the home directory."""
        path = write("connection_settings: {host: db}")
        monkeypatch.setenv("HOME", str(path.parent))

        assert load_config(path) == load_config("~/config.yaml")

    def test_empty_section_is_absent(self, write):
        """A section whose lines are all commented out is as if it were absent."""
        spec = read_spec(write("connection_settings: {host: db}\nsync_settings:\n  # x: y\n"))

        assert spec.settings == ()

    @pytest.mark.parametrize(
        "text",
        [
            "'0123'",
            "0123",
            "1:30",
            "1_000",
            "0x1f",
            "1e5",
            "1.50",
            "2024-01-31",
            "12345",
            "-7",
            "1.5",
            "0.00001",
            ".5",
            "=",
            "123456789012345678901234567890",
        ],
    )
    def test_unquoted_password_is_what_was_written(self, write, text):
        """A password without quotes does not change its value into a number's."""
        spec = read_spec(write(f"connection_settings: {{password: {text}}}"))

        assert text.strip("'") == spec.conninfo_dict["password"]

    def test_merge_keys(self, write):
        """Anchors and merge keys work, and overriding a merged key is no duplicate."""
        config = load_config(
            write(
                "connection_settings: {host: db}\n"
                "pool_settings: &pool {min_size: 1, max_size: 2}\n"
                "async_pool_settings:\n  <<: *pool\n  max_size: 3\n"
            )
        )

        assert config["async_pool_settings"] == {"min_size": 1, "max_size": 3}

    @given(st.dictionaries(st.text(), st.text() | st.integers() | st.booleans() | st.none()))
    def test_yaml_round_trip(self, value):
        """What PyYAML writes safely is read unchanged, big numbers as strings."""
        read = _parse(yaml.safe_dump(value), "f")

        assert {key: str(item) for key, item in value.items()} == {
            key: str(item) for key, item in read.items()
        }


class TestBadFiles:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "is empty"),
            ("# only a comment\n", "is empty"),
            ("just text", "is a string, not a mapping"),
            ("- a\n- b\n", "is a list, not a mapping"),
            ("sync_settings: {}\n", "section connection_settings is missing"),
            ("connection_settings:\n", "section connection_settings is empty"),
            ("connection_settings: [a]\n", "connection_settings: is a list, not a mapping"),
            ("connection_settings: text\n", "connection_settings: is a string, not a mapping"),
            ("connection_settings: {1: x}\n", "connection_settings: a name in it is a number"),
            ("connection_settings: {on: x}\n", "a name in it is a boolean (put it in quotes)"),
            ("1: x\n", "a section name is a number"),
            (
                "connection_setings: {}\n",
                "unknown section 'connection_setings' (did you mean 'connection_settings'?)",
            ),
            ("postgresql: 7\n", "postgresql: is not a mapping of sections"),
            ("a: 1\na: 2\n", "duplicate key 'a' at line 2, column 1"),
            (
                "connection_settings:\n  host: a\n  port: 1\n  host: b\n",
                "duplicate key 'host' at line 4, column 3",
            ),
            (b"\xff\xfe\x00", "is not UTF-8 (at byte 0)"),
            ("a: \x01\n", "malformed YAML at line 1"),
            ("&a [*a]", "an alias holds itself"),
            ("a: [\n", "malformed YAML at line 2, column 1"),
            ("a: 1\n\tb: 2\n", "malformed YAML at line 2, column 1"),
            ("a: {b\n", "malformed YAML at line"),
            ("---\na: 1\n---\nb: 1\n", "malformed YAML at line 3, column 1"),
            ("a: !!python/object/apply:os.system [id]\n", "malformed YAML at line 1, column 4"),
            ("a: !!int abc\n", "malformed YAML: a value cannot be read as what its tag says"),
            ("? [a]\n: 1\n", "malformed YAML at line 1"),
            ("[" * 5000, "malformed YAML"),
        ],
    )
    def test_is_one_clear_error(self, write, text, message):
        """A bad file is one ConfigError in one line that names the file and the trouble."""
        path = write(text)

        with pytest.raises(ConfigError) as caught:
            load_config(path)

        assert message in str(caught.value)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert str(path) == caught.value.file

    def test_missing(self, tmp_path):
        """A missing file is a ConfigError that names it."""
        with pytest.raises(ConfigError, match=r"nope\.yaml: cannot be read: No such file"):
            load_config(tmp_path / "nope.yaml")

    def test_directory(self, tmp_path):
        """A directory is a ConfigError."""
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(tmp_path)

    @pytest.mark.parametrize("text", [f"postgresql://u:{SECRET}@h/d", f"host=h password={SECRET}"])
    def test_connection_string_as_path(self, text):
        """A DSN in the place of a file is not shown; the method that takes it is named."""
        with pytest.raises(ConfigError, match="get_database_connection_from_dsn") as caught:
            load_config(text)
        assert SECRET not in f"{caught.value} {caught.value!r} {caught.value.__cause__!r}"

    def test_zero_byte_in_path(self):
        """A path that no system takes is a ConfigError."""
        with pytest.raises(ConfigError, match="bad path"):
            load_config("a\0b")

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
    def test_unreadable(self, write):
        """A file without read permission is a ConfigError."""
        path = write("connection_settings: {host: db}")
        path.chmod(0)

        with ordinary_user(), pytest.raises(ConfigError, match="Permission denied"):
            load_config(path)

    def test_alias_bomb(self, write):
        """A file that aliases blow up is refused before it is expanded."""
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]

        with pytest.raises(ConfigError, match="holds more than"):
            load_config(write("\n".join(lines)))

    @pytest.mark.parametrize(
        "text",
        [
            f"connection_settings:\n  password: '{SECRET}\n",
            f"connection_settings:\n  password: [{SECRET}\n",
            f"connection_settings:\n  password: *{SECRET}\n",
            f"connection_settings:\n  password: !{SECRET} x\n",
            f'connection_settings:\n  password: "\\{SECRET}"\n',
            f"connection_settings:\n  password: @{SECRET}\n",
            f"connection_settings:\n  password: %{SECRET}\n",
            f"connection_settings:\n  password: {SECRET}: x\n",
            f"connection_settings:\n  password: !!int {SECRET}\n",
            f"connection_settings:\n  password: !!timestamp {SECRET}\n",
            f"connection_settings:\n  password: !!bool {SECRET}\n",
            f"connection_settings:\n  password: !!binary é{SECRET}\n",
            f"connection_settings:\n  password: {SECRET}\x01\n",
            f"connection_settings:\n  password:{SECRET}: x\n",
            f"connection_settings:\n  password=x{SECRET}: x\n",
            f"connection_settings:\n  password: &{SECRET} x\n  user: *{SECRET}x\n",
            f"%{SECRET} x\nconnection_settings: 1\n",
            f"connection_settings:\n  password: {SECRET}\n  password: {SECRET}\n",
            f"connection_settings:\n  password: [{SECRET}]\n",
            f"connection_settings:\n  password: {{{SECRET}: {SECRET}}}\n",
            f"connection_settings:\n  port: {SECRET}\n",
            f"connection_settings: {SECRET}\n",
            f"{SECRET}\n",
            f"connection_settings: {{}}\nsync_settings: {{a: {{b: {SECRET}}}}}\n",
            b"connection_settings:\n  password: " + SECRET.encode() + b"\xff\n",
        ],
    )
    def test_never_shows_content(self, write, text):
        """No error and no chained cause repeats what stands in the file."""
        with pytest.raises(PGMonkeyError) as caught:
            load_config(write(text))

        assert SECRET not in str(caught.value)
        assert SECRET not in repr(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None or caught.value.__suppress_context__

    def test_error_survives_a_process_boundary(self):
        """An error can be pickled, as process pools do with a worker's."""
        error = ConfigError("problem", "file", "key", "hint")

        copy = pickle.loads(pickle.dumps(error))

        assert (copy.problem, copy.file, copy.key, copy.hint) == ("problem", "file", "key", "hint")
        assert str(error) == str(copy)


class TestWrapper:
    def test_is_unwrapped_with_a_warning(self, write):
        """The sections beneath `postgresql:` count, and the warning points at the caller."""
        path = write("postgresql:\n  connection_type: pool\n  connection_settings: {host: db}\n")

        with pytest.warns(DeprecationWarning, match="'postgresql:' is deprecated") as caught:
            config = load_config(path)

        assert config == {"connection_type": "pool", "connection_settings": {"host": "db"}}
        assert [__file__] == [warning.filename for warning in caught]

    def test_of_a_dictionary(self):
        """A wrapped dictionary is unwrapped as well, and left as it was."""
        wrapped = {"postgresql": {"connection_settings": {"host": "db"}}}

        with pytest.warns(DeprecationWarning, match="configuration: the wrapper"):
            config = prepare_config(wrapped)

        assert config == {"connection_settings": {"host": "db"}}
        assert wrapped == {"postgresql": {"connection_settings": {"host": "db"}}}

    def test_no_warning_without_it(self, write):
        """A file without the wrapper warns of nothing."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_config(write("connection_settings: {host: db}"))


class TestDsn:
    @pytest.mark.parametrize(
        "dsn",
        [
            "postgresql://u:p%20w@h:5/d?sslmode=require",
            "postgres://h:5/d?user=u&password=p%20w&sslmode=require",
            "host=h port=5 user=u password='p w' dbname=d sslmode=require",
        ],
    )
    def test_parts(self, dsn):
        """libpq takes it apart, in either form."""
        expected = {"host": "h", "port": "5", "user": "u", "password": "p w", "dbname": "d"}
        assert {**expected, "sslmode": "require"} == conninfo(dsn=dsn)

    @pytest.mark.parametrize("order", [1, -1])
    def test_what_is_beside_it_wins(self, order):
        """A key beside a DSN wins, in any order; an empty one is as if it were absent."""
        settings = {"dsn": "postgresql://u:p@h/d", "dbname": "other", "user": "", "port": 6}
        expected = {"host": "h", "user": "u", "password": "p", "dbname": "other", "port": "6"}
        assert expected == conninfo(**dict([*settings.items()][::order]))

    def test_is_as_its_parts(self):
        """Equal settings are equal specs, however they are written."""
        parts = {"host": "h", "port": 5, "password": "p", "dbname": "d"}
        one = connection_spec({"connection_settings": {"dsn": "postgresql://:p@h:5/d"}})
        assert one == connection_spec({"connection_settings": parts})
        assert one.dbname == "d"
        assert one.secrets == ("p",)

    @pytest.mark.parametrize("dsn", ["", None])
    def test_empty_is_absent(self, dsn):
        """An empty DSN is as if it were absent."""
        assert conninfo(dsn=dsn, host="h") == {"host": "h"}

    @pytest.mark.parametrize(
        ("dsn", "key", "message"),
        [
            (f"postgresql+psycopg://u:{SECRET}@h/d", "dsn", "write postgresql:// in place of"),
            (f"mysql://u:{SECRET}@h/d", "dsn", "cannot be read by libpq"),
            (f"password=an {SECRET}", "dsn", "write postgresql://user@host/dbname or"),
            (f"host=h pasword={SECRET}", "dsn", "did you mean 'password'?"),
            (f"postgresql://u:{SECRET}%zz@h/d", "dsn", "cannot be read"),
            ("postgresql://h/d?ssl_mode=require", "dsn", "did you mean 'sslmode'?"),
            ("password=a s3cr3t=value", "dsn", "has a parameter that libpq does not know"),
            (f"postgresql://u:{SECRET}/x@h/d", "dsn.port", "must be an integer"),
            (f"host=h password={SECRET}\0", "dsn", "holds a zero byte"),
            (f"host=h password={SECRET}\ud800", "dsn", "cannot be read"),
            (["h"], "dsn", "must be a string, not a list"),
            ({"from_env": "DATABASE_URL"}, "dsn", "interpolation is off"),
            ("${DATABASE_URL}", "dsn", "interpolation is off"),
        ],
    )
    def test_wrong(self, dsn, key, message):
        """One sentence says what is wrong with a DSN, and shows nothing of it."""
        with pytest.raises(ConfigError) as caught:
            conninfo(dsn=dsn)
        assert message in str(caught.value)
        assert caught.value.key == f"connection_settings.{key}"
        shown = f"{caught.value} {caught.value!r} {caught.value.__cause__!r}"
        assert not [word for word in (SECRET, "s3cr3t") if word in shown]

    def test_interpolation(self, monkeypatch, write):
        """The environment may hold the DSN, or parts of it."""
        monkeypatch.setenv("DATABASE_URL", f"postgresql://u:{SECRET}@h/d")
        monkeypatch.setenv("APP_PASSWORD", SECRET)
        parts = "'postgresql://u:${APP_PASSWORD}@${APP_HOST:-h}/d'"
        for text in ("{from_env: DATABASE_URL}", "${DATABASE_URL}", parts):
            path = write(f"connection_settings:\n  dsn: {text}\n")
            spec = read_spec(path, resolve_env=True)
            assert spec.conninfo_dict["password"] == SECRET
            assert SECRET not in repr(redact_config(spec.config))
            assert load_config(path)["connection_settings"]["dsn"]


class TestConnectionSettings:
    def test_every_keyword_of_libpq(self):
        """Every keyword that libpq knows is taken."""
        special = {"port": "1", "sslmode": "disable"}
        for option in psycopg.pq.Conninfo.get_defaults():
            keyword = option.keyword.decode()
            value = special.get(keyword, "1")

            assert {keyword: value} == {
                key: text
                for key, text in conninfo(**{"sslmode": "disable", keyword: value}).items()
                if key == keyword
            }

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("usr", "user"),
            ("database", "dbname"),
            ("username", "user"),
            ("hots", "host"),
            ("Port", "port"),
            ("ssl-mode", "sslmode"),
            ("autocomit", "autocommit"),
            ("conect_timeout", "connect_timeout"),
            ("passwd", "password"),
            ("url", "dsn"),
            ("DATABASE_URL", "dsn"),
        ],
    )
    def test_unknown_key_names_the_nearest(self, name, hint):
        """An unknown key is refused with the nearest known one."""
        with pytest.raises(ConfigError) as caught:
            conninfo(**{name: "x"})

        assert f"connection_settings: unknown key '{name}' (did you mean '{hint}'?)" == str(
            caught.value
        )

    @pytest.mark.parametrize("name", ["zzzzzz", "q"])
    def test_unknown_key_without_a_near_one(self, name):
        """An unknown key like no other has no hint."""
        with pytest.raises(ConfigError) as caught:
            conninfo(**{name: "x"})

        assert caught.value.hint is None

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("host", "db", "db"),
            ("port", 5432, "5432"),
            ("port", " 5432 ", "5432"),
            ("port", "5432,5433", "5432,5433"),
            ("port", "5432,", "5432,"),
            ("password", 12345, "12345"),
            ("password", " spaces ", " spaces "),
            ("keepalives", True, "1"),
            ("keepalives", False, "0"),
            ("keepalives", "false", "0"),
            ("keepalives", 1, "1"),
            ("keepalives", "ON", "1"),
            ("connect_timeout", "10", "10"),
            ("connect_timeout", 0, "0"),
            ("tcp_user_timeout", 1000, "1000"),
            ("options", "-c geqo=off", "-c geqo=off"),
            ("target_session_attrs", "read-write", "read-write"),
            ("service", "my", "my"),
            ("passfile", Path("/a/b"), "/a/b"),
        ],
    )
    def test_values(self, name, value, expected):
        """Numbers and booleans may be strings, and the other way round where libpq allows it."""
        assert {name: expected} == conninfo(**{name: value})

    @pytest.mark.parametrize("value", [None, ""])
    @pytest.mark.parametrize("name", ["sslmode", "port", "password", "sslcert", "connect_timeout"])
    def test_empty_is_absent(self, name, value):
        """An empty value is as if it were absent."""
        assert conninfo(**{name: value}) == {}

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("port", 0, "must be from 1 to 65535"),
            ("port", 65536, "must be from 1 to 65535"),
            ("port", "http", "must be an integer"),
            ("port", "5432,x", "must be an integer"),
            ("port", 54.32, "must be an integer"),
            ("port", True, "must be an integer"),
            ("port", [1], "must be an integer"),
            ("port", "${PGPORT}", "must be an integer (interpolation is off"),
            ("connect_timeout", "soon", "must be an integer"),
            ("connect_timeout", 2.5, "must be an integer"),
            ("connect_timeout", 2**31, "must be from"),
            ("keepalives", 2, "must be true or false"),
            ("keepalives", "maybe", "must be true or false"),
            ("keepalives", [], "must be true or false"),
            ("host", ["a"], "must be a string, not a list"),
            ("host", {"a": 1}, "must be a string, not a mapping"),
            ("password", True, "must be a string, not a boolean (put it in quotes)"),
            ("password", {"from_env": "X"}, "refers to a secret (interpolation is off"),
            ("password", b"x", "must be a string, not of type bytes"),
            ("password", "a\0b", "holds a zero byte"),
            ("autocommit", "perhaps", "must be true or false"),
            ("autocommit", 7, "must be true or false"),
        ],
    )
    def test_wrong_values(self, name, value, message):
        """A value of the wrong type is refused with its dotted key, and never shown."""
        with pytest.raises(ConfigError) as caught:
            conninfo(**{name: value})

        assert f"connection_settings.{name}: {message}" in str(caught.value)
        assert f"connection_settings.{name}" == caught.value.key

    @pytest.mark.parametrize(
        ("value", "expected"),
        [(True, True), ("true", True), ("No", False), ("0", False), (1, True)],
    )
    def test_autocommit(self, value, expected):
        """Autocommit is a boolean, or a string that says one: 'false' is false."""
        spec = connection_spec({"connection_settings": {"autocommit": value}})

        assert spec.autocommit is expected
        assert spec.conninfo == ()

    @pytest.mark.parametrize("name", ["sslcert", "sslkey", "sslrootcert", "passfile", "sslcrl"])
    def test_home_in_paths(self, name, tmp_path, monkeypatch):
        """A `~` at the start of a file path is the home directory."""
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "file").touch()

        assert {name: str(tmp_path / "file")} == conninfo(**{name: "~/file"})

    def test_tilde_in_a_password_stays(self):
        """A `~` elsewhere is a character."""
        assert conninfo(password="~/x") == {"password": "~/x"}

    @pytest.mark.parametrize("name", ["sslcert", "sslkey", "sslrootcert"])
    def test_missing_tls_file(self, name, tmp_path):
        """A TLS file that is not there is refused by key, before libpq goes without it."""
        path = tmp_path / "nope"

        with pytest.raises(ConfigError) as caught:
            conninfo(**{name: str(path)})

        assert f"connection_settings.{name}" == caught.value.key
        assert f"cannot read the file {path}: No such file or directory" == caught.value.problem

    def test_tls_file_is_a_directory(self, tmp_path):
        """A directory is no certificate."""
        with pytest.raises(ConfigError, match=r"Is a directory|Permission denied"):
            conninfo(sslrootcert=str(tmp_path))

    @pytest.mark.parametrize(
        "settings",
        [
            {"sslrootcert": "system"},
            {"sslkey": "pkcs11:key"},
            {"sslmode": "disable", "sslrootcert": "/nope"},
        ],
    )
    def test_tls_files_that_are_none(self, settings):
        """libpq's special values, and files that libpq will not look at, are left to it."""
        assert settings == conninfo(**settings)


class TestSessionSettings:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("64MB", "64MB"),
            (1000, "1000"),
            (0.5, "0.5"),
            (True, "on"),
            (False, "off"),
            ("", ""),
            (["public"], "public"),
            (["a b", "public", "$user", 'q"q', "Upper"], '"a b", public, "$user", "q""q", "Upper"'),
            ([], ""),
        ],
    )
    def test_values(self, value, expected):
        """Values take the form that set_config() takes, lists as quoted identifiers."""
        assert {"x": expected} == session(x=value)

    @pytest.mark.parametrize("value", [None, {"a": 1}, [1], [None], {"from_env": "X"}, b"x"])
    def test_wrong_values(self, value):
        """Anything else is refused with its dotted key."""
        with pytest.raises(ConfigError) as caught:
            session(work_mem=value)

        assert caught.value.key == "sync_settings.work_mem"

    @pytest.mark.parametrize("name", ["", "a b", "a;b", "a.", "1a", "a'b", "a-b", ".a"])
    def test_wrong_names(self, name):
        """What cannot be the name of a setting is refused."""
        with pytest.raises(ConfigError, match="cannot be the name of a setting"):
            session(**{name: "x"})

    @pytest.mark.parametrize("name", ["work_mem", "app.user_id", "TimeZone", "a$b.c1", "ümlaut"])
    def test_names(self, name):
        """Names of the server's and of one's own settings are taken."""
        assert {name: "x"} == session(**{name: "x"})

    def test_order_is_kept(self):
        """Settings are applied in the order of the file."""
        spec = connection_spec({"connection_settings": {}, "sync_settings": {"b": 1, "a": 2}})

        assert spec.settings == (("b", "1"), ("a", "2"))

    @pytest.mark.parametrize("type_", list(ConnectionType))
    def test_section_by_type(self, type_):
        """Sync types take sync_settings, async types async_settings."""
        config = {
            "connection_settings": {},
            "sync_settings": {"x": "sync"},
            "async_settings": {"x": "async"},
        }

        expected = "async" if type_.is_async else "sync"
        assert (("x", expected),) == connection_spec(config, type_).settings


class TestPoolSettings:
    def test_knows_every_argument_of_psycopg_pool(self):
        """Each parameter of the pool's constructor is taken or refused with advice."""
        import inspect

        parameters = set(inspect.signature(ConnectionPool).parameters)

        assert parameters <= {*_POOL_RULES, *_POOL_REFUSED}

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("min_size", "2", 2),
            ("max_size", "10", 10),
            ("timeout", "2.5", 2.5),
            ("timeout", 30, 30),
            ("max_waiting", 0, 0),
            ("max_lifetime", "3600", 3600.0),
            ("max_idle", 0.5, 0.5),
            ("reconnect_timeout", 0, 0),
            ("num_workers", "3", 3),
            ("name", "main", "main"),
            ("close_returns", "yes", True),
            ("kwargs", {"prepare_threshold": None}, {"prepare_threshold": None}),
            ("reset", print, print),
        ],
    )
    def test_values(self, name, value, expected):
        """Numbers and booleans may be strings, as environment variables make them."""
        assert {name: expected} == pool(**{name: value})

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("min_size", -1, "must be at least 0"),
            ("min_size", "few", "must be an integer"),
            ("min_size", 2.0, "must be an integer"),
            ("max_size", 0, "must be at least 1"),
            ("timeout", 0, "must be above 0"),
            ("timeout", "nan", "must be above 0"),
            ("timeout", "inf", "must be above 0"),
            ("timeout", True, "must be a number"),
            ("timeout", "soon", "must be a number"),
            ("max_idle", -1, "must be above 0"),
            ("max_waiting", -1, "must be at least 0"),
            ("reconnect_timeout", -1, "must be at least 0"),
            ("num_workers", 0, "must be at least 1"),
            ("name", 7, "must be a string"),
            ("close_returns", "maybe", "must be true or false"),
            ("check_on_checkout", "maybe", "must be true or false"),
            ("kwargs", "x", "must be a mapping"),
            ("conninfo", "host=h", "write a DSN as connection_settings.dsn"),
            ("check", "module:function", "must be a function"),
            ("configure", print, "PGConnectionManager(configure="),
        ],
    )
    def test_wrong_values(self, name, value, message):
        """A wrong value is refused with its dotted key."""
        with pytest.raises(ConfigError) as caught:
            pool(**{name: value})

        assert f"pool_settings.{name}" == caught.value.key
        assert message in str(caught.value)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"min_size": "9", "max_size": "5"}, "min_size (9) is above max_size (5)"),
            ({"min_size": 0}, "min_size 0 needs a max_size"),
        ],
    )
    def test_sizes(self, settings, message):
        """Sizes that contradict each other are refused, as psycopg_pool would refuse them."""
        with pytest.raises(ConfigError) as caught:
            pool(**settings)
        with pytest.raises(ValueError, match="size"):
            ConnectionPool(open=False, **{key: int(value) for key, value in settings.items()})

        assert f"pool_settings: {message}" == str(caught.value)

    def test_sizes_are_compared_as_numbers(self):
        """The string '9' is below '10'."""
        assert pool(min_size="9", max_size="10") == {"min_size": 9, "max_size": 10}

    def test_a_small_max_size_alone_lowers_min_size(self) -> None:
        """max_size below psycopg_pool's default min_size of 4 is no contradiction."""
        assert pool(max_size="3") == {"min_size": 3, "max_size": 3}

    @pytest.mark.parametrize("settings", [{"min_size": 7}, {"min_size": 0, "max_size": 1}, {}])
    def test_sizes_that_psycopg_pool_takes(self, settings):
        """psycopg_pool accepts what is accepted here."""
        ConnectionPool(open=False, **pool(**settings))

    @pytest.mark.parametrize("value", [None, ""])
    def test_empty_is_absent(self, value):
        """An empty value leaves psycopg_pool its default."""
        assert pool(min_size=value, timeout=value) == {}

    @pytest.mark.parametrize(("value", "expected"), [("false", False), ("true", True), (1, True)])
    def test_check_on_checkout(self, value, expected):
        """check_on_checkout is no argument of psycopg_pool; 'false' is false."""
        spec = connection_spec(
            {"connection_settings": {}, "pool_settings": {"check_on_checkout": value}}, "pool"
        )

        assert spec.check_on_checkout is expected
        assert spec.pool == ()

    def test_check_twice(self):
        """A check of one's own and check_on_checkout exclude each other."""
        with pytest.raises(ConfigError, match="excludes check_on_checkout"):
            pool(check=print, check_on_checkout=True)

    def test_open_is_ignored(self):
        """`open` is accepted: the handle opens the pool."""
        assert pool(open=False) == {}

    def test_unknown_key(self):
        """An unknown key is refused with the nearest known one."""
        with pytest.raises(ConfigError, match=r"unknown key 'max_sise' \(did you mean 'max_size'"):
            pool(max_sise=1)

    @pytest.mark.parametrize(
        ("type_", "judged"),
        [
            ("normal", None),
            ("async", None),
            ("pool", "pool_settings"),
            ("async_pool", "async_pool_settings"),
        ],
    )
    def test_only_the_section_in_use(self, type_, judged):
        """A bad section of another type troubles nobody."""
        config = {
            "connection_settings": {},
            "pool_settings": {"min_size": 9, "max_size": 1},
            "async_pool_settings": {"min_size": 9, "max_size": 1},
        }

        if judged is None:
            assert connection_spec(config, type_).pool == ()
        else:
            with pytest.raises(ConfigError, match=f"^{judged}: min_size"):
                connection_spec(config, type_)


class TestConnectionType:
    def test_is_a_string(self):
        """The enumeration's members are the names of the types."""
        assert [str(type_) for type_ in ConnectionType] == ["normal", "pool", "async", "async_pool"]
        assert ConnectionType.POOL == "pool"

    @pytest.mark.parametrize("type_", list(ConnectionType))
    def test_argument_beats_file(self, type_):
        """The type that is asked for wins over the one in the file."""
        config = {"connection_type": "pool", "connection_settings": {}}

        assert type_ is connection_spec(config, type_).type
        assert type_ is connection_spec(config, str(type_)).type

    @pytest.mark.parametrize(
        ("named", "expected"), [("async", "async"), (None, "normal"), ("", "normal")]
    )
    def test_default(self, named, expected):
        """Without an argument it is the file's type, else normal."""
        config = {"connection_type": named, "connection_settings": {}}

        assert expected == connection_spec(config).type

    def test_unknown_argument(self):
        """An unknown type is refused with the nearest one."""
        with pytest.raises(ConfigError, match=r"unknown connection type 'asink' .*'async'"):
            connection_spec({"connection_settings": {}}, "asink")

    @pytest.mark.parametrize("named", ["threaded", ["pool"], 7])
    def test_unknown_in_file(self, named):
        """An unknown type in a file names its key, and the types there are."""
        with pytest.raises(ConfigError, match="connection_type: unknown connection type"):
            connection_spec({"connection_type": named, "connection_settings": {}})


class TestSpec:
    CONFIG: ClassVar = {
        "connection_settings": {"host": "h", "user": "u", "dbname": "d", "password": SECRET},
        "sync_settings": {"app.token": SECRET},
        "pool_settings": {"kwargs": {"password": SECRET, "options": {}}},
        "async_settings": {"x": "1"},
    }

    def test_equal_where_the_type_uses_the_same(self):
        """Specs that differ in what the type does not use are equal, and hash alike."""
        other = {**self.CONFIG, "async_settings": {"x": "2"}}

        one = connection_spec(self.CONFIG, "pool", origin="a")
        two = connection_spec(other, "pool", origin="b")

        assert one == two
        assert hash(one) == hash(two)
        assert connection_spec(self.CONFIG, "async") != connection_spec(other, "async")
        assert one != connection_spec(self.CONFIG, "normal")

    def test_shows_no_secret(self):
        """Neither repr nor str of a spec shows a secret."""
        spec = connection_spec(self.CONFIG, "pool", origin="file")

        assert SECRET not in repr(spec)
        assert SECRET not in str(spec)
        assert {SECRET} == set(spec.secrets)
        assert "host='h'" in repr(spec)

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [({"dbname": "d", "user": "u"}, "d"), ({"user": "u"}, "u"), ({}, None)],
    )
    def test_dbname(self, settings, expected, monkeypatch):
        """The database is the one that libpq would choose."""
        for name in ("PGDATABASE", "PGUSER", "PGSERVICE"):
            monkeypatch.delenv(name, raising=False)

        assert expected == connection_spec({"connection_settings": settings}).dbname

    def test_does_not_change_the_dictionary(self):
        """The caller's dictionary stays as it was."""
        config = {"connection_settings": {"host": "h"}, "sync_settings": None}

        connection_spec(config)

        assert config == {"connection_settings": {"host": "h"}, "sync_settings": None}

    def test_not_a_mapping(self):
        """Anything but a mapping is refused."""
        with pytest.raises(ConfigError, match="not a mapping of sections"):
            connection_spec(["a"])  # type: ignore[arg-type]


class TestUnresolved:
    TEXT = (
        "connection_settings:\n"
        "  host: ${DB_HOST}\n  port: ${DB_PORT:-5433}\n  password: {from_env: DB_PASSWORD}\n"
    )

    def test_stays_as_it_is(self, write):
        """Without resolve_env references are left alone, and not judged as values."""
        settings = load_config(write(self.TEXT))["connection_settings"]

        assert settings == {
            "host": "${DB_HOST}",
            "port": "${DB_PORT:-5433}",
            "password": {"from_env": "DB_PASSWORD"},
        }

    def test_connecting_with_it_says_what_to_do(self, write):
        """A reference that would go to the server says that interpolation is off."""
        with pytest.raises(ConfigError, match="pass resolve_env=True"):
            read_spec(write(self.TEXT))

    def test_resolved(self, write, monkeypatch):
        """With resolve_env values of the environment are judged as if they had been written."""
        monkeypatch.setenv("DB_HOST", "db")
        monkeypatch.setenv("DB_PASSWORD", SECRET)
        monkeypatch.delenv("DB_PORT", raising=False)

        spec = read_spec(write(self.TEXT), resolve_env=True)

        assert spec.conninfo_dict == {"host": "db", "port": "5433", "password": SECRET}


# --- what is kept of a file ---


@pytest.fixture
def write_old(write):
    """A function that writes a file which has not changed for long; each time a second younger."""
    times = iter(range(1_000_000_000, 1_000_000_100))

    def write_old(text: str) -> Path:
        path = write(text)
        time = next(times)
        os.utime(path, (time, time))
        return path

    return write_old


def test_an_unchanged_file_is_read_once(write_old):
    """A get costs a look at the file's times."""
    path = write_old("connection_settings: {dbname: one}")
    assert read_spec(path, "pool") is read_spec(path, ConnectionType.POOL)
    assert read_spec(path) is read_spec(path)
    assert read_spec(path).type is ConnectionType.NORMAL


@pytest.mark.parametrize("name", ["write", "write_old"])
def test_a_changed_file_is_read_again(name, request):
    """Also where the change leaves its size, or came just now."""
    write = request.getfixturevalue(name)
    for dbname in ("one", "two", "six"):
        path = write(f"connection_settings: {{dbname: {dbname}}}")
        assert read_spec(path).dbname == dbname


def test_a_file_that_is_gone_or_bad_is_an_error_each_time(write_old):
    """What is kept stands in for nothing but the same file."""
    path = write_old("connection_settings: {dbname: one}")
    read_spec(path)
    write_old("connection_settings: {dbnam: one}")
    for _ in range(2):
        with pytest.raises(ConfigError, match="unknown key 'dbnam'"):
            read_spec(path)
    path.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_spec(path)
    with pytest.raises(ConfigError, match="unknown connection type"):
        read_spec(write_old("connection_settings: {dbname: one}"), ["pool"])


def test_what_surrounds_an_unchanged_file_is_looked_at_each_time(write_old, tmp_path, monkeypatch):
    """Variables, secret files, the home directory and TLS files are none of its text."""
    key, certificate = tmp_path / "key", tmp_path / "root.crt"
    certificate.touch()
    file = write_old(
        "connection_settings:\n  dbname: ${NAME}\n  passfile: ~/passwords\n"
        f"  password: {{from_file: {key}}}\n  sslrootcert: {certificate}\n"
    )
    for turn in ("one", "two"):
        key.write_text(turn)
        monkeypatch.setenv("NAME", turn)
        monkeypatch.setenv("HOME", f"/{turn}")
        monkeypatch.setenv("USERPROFILE", f"/{turn}")
        conninfo = read_spec(file, resolve_env=True).conninfo_dict
        assert (conninfo["dbname"], conninfo["password"]) == (turn, turn)
        assert conninfo["passfile"] == f"/{turn}/passwords"
    file = write_old(f"connection_settings: {{dbname: one, sslrootcert: {certificate}}}")
    assert read_spec(file) is read_spec(file)
    certificate.unlink()
    with pytest.raises(ConfigError, match="cannot read the file"):
        read_spec(file)


def test_an_old_file_warns_of_its_wrapper_each_time(write_old):
    """A deprecation is said to each who asks."""
    path = write_old("postgresql: {connection_settings: {dbname: one}}")
    for _ in range(2):
        with pytest.warns(DeprecationWarning, match="wrapper"):
            read_spec(path)


def test_nobody_changes_what_is_kept_of_a_file(write_old):
    """A list in one spec's configuration is that spec's alone."""
    path = write_old("{connection_settings: {dbname: one}, sync_settings: {search_path: [a]}}")
    read_spec(path, "normal").config["sync_settings"]["search_path"].append("b")
    assert read_spec(path, "pool").settings == (("search_path", "a"),)
    assert load_config(path)["sync_settings"] == {"search_path": ["a"]}


def test_a_dsn_is_taken_apart_once():
    """Its password shows in no repr of what is kept."""
    dsn = f"postgresql://user:{SECRET}@localhost/one"
    spec = dsn_spec(dsn, "pool")
    assert spec is dsn_spec(dsn, "pool")
    assert dsn_spec(dsn).type is ConnectionType.NORMAL
    assert spec.conninfo_dict["password"] == SECRET
    shown = (repr(spec), repr(_known_dsn), repr(_known_dsn(dsn)))
    assert not any(SECRET in text for text in shown)
