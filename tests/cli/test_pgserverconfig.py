"""`pgmonkey pgserverconfig`: the entries for a configuration, and the server that has them."""

from __future__ import annotations

import json

import psycopg
import pytest
import yaml

POOLS = {"pool_settings": {"max_size": 20}, "async_pool_settings": {"max_size": 30}}


@pytest.fixture
def advise(pgmonkey, tmp_path):
    """A function that writes a configuration and gives the advice on it."""

    def advise(config: dict[str, object], *options: object):
        path = tmp_path / "c.yaml"
        path.write_text(yaml.safe_dump(config))
        return pgmonkey("pgserverconfig", "--connconfig", path, *options)

    return advise


def remote(**settings: object) -> dict[str, object]:
    return {
        "connection_settings": {"host": "db.example", "dbname": "app", "user": "me", **settings}
    }


def hba(result) -> str:
    return result.output().splitlines()[-1]


class TestSettings:
    @pytest.mark.parametrize(
        ("sections", "options", "expected"),
        [
            (POOLS, [], 37),  # (30 + 3) * 1.1 = 36.3
            (POOLS, ["--processes", 4], 136),  # (120 + 3) * 1.1 = 135.3
            ({"pool_settings": {"max_size": 97}}, [], 110),  # exactly
            ({"pool_settings": {}}, [], 8),  # psycopg_pool's own size of 4
            ({"async_pool_settings": {"max_size": "${N:-9}"}}, ["--resolve-env"], 14),
            ({}, ["--processes", 7], 11),
        ],
    )
    def test_max_connections(self, advise, sections, options, expected):
        """Processes times the larger pool, those reserved, and a tenth on top, rounded up."""
        lines = advise({**remote(), **sections}, "--client-address", "10.0.0.0/8", *options)

        assert f"max_connections = {expected} " in lines.output()

    @pytest.mark.parametrize(
        ("section", "name"),
        [
            ("connection_settings", "user"),
            ("connection_settings", "dbname"),
            ("sync_settings", "lock_timeout"),
            ("async_settings", "statement_timeout"),
        ],
    )
    @pytest.mark.parametrize("sign", ["\n", "\r", "\x85", "\u2028", "\x1b"])
    def test_a_value_is_never_a_line_of_its_own(self, advise, section, name, sign):
        """A name or a value that would add a line to the server's files is refused."""
        config = remote()
        config[section] = {**config.get(section, {}), name: f"me{sign}host all all all trust"}

        error = advise(config, "--client-address", "10.0.0.0/8").error

        assert f"c.yaml: {section}.{name}: holds a control character" in error
        assert "trust" not in error

    def test_a_connection_string_is_no_name(self, advise):
        """A DSN in the place of a name is refused, and its password is not printed."""
        result = advise(remote(dbname="postgresql://me:hunter2@db.example/app"))

        assert "connection_settings.dbname: holds a whole connection string" in result.error
        assert "hunter2" not in result.err

    def test_time_outs(self, advise):
        """Time-outs are those of the file, the longer one where sync and async differ."""
        config = {
            **remote(),
            "sync_settings": {"statement_timeout": "30s", "work_mem": "1MB"},
            "async_settings": {
                "statement_timeout": "2min",
                "idle_in_transaction_session_timeout": 5000,
            },
        }

        lines = advise(config, "--client-address", "10.0.0.0/8").output().splitlines()

        entries = [line.split("#")[0].strip() for line in lines]
        assert "statement_timeout = '2min'" in entries
        assert "idle_in_transaction_session_timeout = 5000" in entries
        assert not [entry for entry in entries if "work_mem" in entry]

    @pytest.mark.parametrize("mode", ["disable", "allow", "prefer", None])
    def test_no_tls(self, advise, mode):
        """A client that does without TLS asks for none."""
        result = advise(remote(sslmode=mode), "--client-address", "10.0.0.0/8")

        assert "ssl" not in result.output()

    @pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
    def test_tls(self, advise, mode):
        """A client that insists on TLS has the server speak it; no client certificate is asked."""
        lines = advise(remote(sslmode=mode), "--client-address", "10.0.0.0/8").output()

        assert "ssl = on" in lines
        assert "ssl_cert_file = 'server.crt'" in lines
        assert "ssl_key_file = 'server.key'" in lines
        assert "ssl_ca_file" not in lines
        assert "clientcert" not in lines


class TestHba:
    @pytest.mark.parametrize(
        ("settings", "options", "expected"),
        [
            ({}, ["10.1.2.3/8"], "host  app  me  10.0.0.0/8  scram-sha-256"),
            ({}, ["10.1.2.3"], "host  app  me  10.1.2.3/32  scram-sha-256"),
            ({}, ["2001:db8::/64"], "host  app  me  2001:db8::/64  scram-sha-256"),
            ({"sslmode": "require"}, ["::1"], "hostssl  app  me  ::1/128  scram-sha-256"),
            (
                {"sslmode": "require"},
                ["10.0.0.0/8", "--clientcert", "verify-full"],
                "hostssl  app  me  10.0.0.0/8  scram-sha-256  clientcert=verify-full",
            ),
            ({"host": "localhost"}, [], "host  app  me  samehost  scram-sha-256"),
            ({"host": "127.0.0.1"}, [], "host  app  me  samehost  scram-sha-256"),
            ({"host": "/run/postgresql"}, [], "local  app  me  scram-sha-256"),
            ({"host": ""}, [], "local  app  me  scram-sha-256"),
            ({"host": "/run", "dbname": ""}, [], "local  me  me  scram-sha-256"),
            ({"host": "/run", "dbname": "a b", "user": "all"}, [], 'local  "a b"  "all"'),
        ],
    )
    def test_line(self, advise, monkeypatch, settings, options, expected):
        """One line: type, database, user, the client's address and never the server's."""
        monkeypatch.delenv("PGHOST", raising=False)
        arguments = ["--client-address", *options] if options else []

        assert hba(advise(remote(**settings), *arguments)).startswith(expected)

    def test_unknown_address(self, advise):
        """Where clients connect from must be said: a comment stands for the line until then."""
        result = advise(remote(host="10.0.0.5"))

        assert hba(result) == "# host  app  me  CLIENT_ADDRESS  scram-sha-256"
        assert "give --client-address" in result.err
        assert "10.0.0.5" not in result.out

    @pytest.mark.parametrize(
        "options",
        [
            ["--client-address", "10.0.0.0/33"],
            ["--client-address", "here"],
            ["--processes", "0"],
            ["--processes", "x"],
            ["--strict"],
            ["--clientcert", "maybe"],
        ],
    )
    def test_wrong_usage(self, advise, options):
        """What is no address and no number is wrong usage."""
        assert advise(remote(), *options).status == 2

    def test_clientcert_needs_tls(self, advise):
        """A client certificate without TLS is a contradiction."""
        assert "--clientcert needs TLS" in advise(remote(), "--clientcert", "verify-ca").error

    def test_json(self, advise):
        """The same for machines."""
        document = json.loads(
            advise(remote(sslmode="require"), "--client-address", "::/0", "--json").output()
        )

        assert document["postgresql_conf"]["ssl"] == "on"
        assert document["pg_hba_conf"] == {
            "type": "hostssl",
            "database": "app",
            "user": "me",
            "address": "::/0",
            "method": "scram-sha-256",
            "options": [],
            "line": "hostssl  app  me  ::/0  scram-sha-256",
        }

    def test_bad_file(self, advise):
        """What the file has wrong is one line."""
        assert "unknown key 'hots'" in advise({"connection_settings": {"hots": "x"}}).error


class TestAudit:
    @pytest.fixture
    def audit(self, advise):
        """A function that audits a server and gives status and findings by name."""

        def audit(config: dict[str, object], *options: object):
            result = advise(config, "--audit", "--json", *options)
            found = json.loads(result.out)["audit"]
            return result.status, {each["what"]: each for each in found}

        return audit

    @pytest.fixture
    def may_look(self, tls_server):
        """The role of the tests may read pg_hba_file_rules for a while."""
        grants = ["SELECT ON pg_hba_file_rules", "EXECUTE ON FUNCTION pg_hba_file_rules()"]
        with psycopg.connect(**tls_server.admin_conninfo(), autocommit=True) as conn:
            for grant in grants:
                conn.execute(f"GRANT {grant} TO pgmonkey")
            yield conn
            for grant in grants:
                conn.execute(f"REVOKE {grant} FROM pgmonkey")

    def test_good_server(self, audit, tls_server, may_look):
        """A server that has what is needed is well."""
        config = {"connection_settings": tls_server.conninfo(sslmode="prefer")}

        status, found = audit(config, "--strict")

        assert status == 0
        assert {each["status"] for each in found.values()} == {"ok"}
        assert found["pg_hba.conf"]["current"].endswith("host all all 127.0.0.1 scram-sha-256")
        assert found["this connection"]["current"].startswith("TLSv1.")

    def test_mismatches(self, audit, tls_server, may_look):
        """Too few connections, other time-outs, and a line that lets plain text in."""
        config = {
            "connection_settings": tls_server.conninfo(),
            "pool_settings": {"max_size": 5000},
            "sync_settings": {"statement_timeout": "1min"},
        }

        assert audit(config)[0] == 0
        status, found = audit(config, "--strict")

        assert status == 1
        wrong = {name for name, each in found.items() if each["status"] == "mismatch"}
        assert wrong == {"max_connections", "statement_timeout", "pg_hba.conf"}
        assert found["statement_timeout"]["current"] == "0ms"

    @pytest.mark.parametrize(
        ("settings", "options", "status", "current"),
        [
            ({}, ["--client-address", "10.0.0.0/8"], "mismatch", "no line lets this client in"),
            ({}, ["--client-address", "127.0.0.0/8"], "mismatch", "no line lets this client in"),
            ({"sslmode": "require"}, [], "mismatch", "host all all 127.0.0.1 scram-sha-256"),
        ],
    )
    def test_hba(self, audit, tls_server, may_look, settings, options, status, current):
        """The first line that applies is judged; an address that is let in in part is not in."""
        conninfo = tls_server.conninfo(**{"sslmode": "prefer", **settings})

        found = audit({"connection_settings": conninfo}, *options)[1]["pg_hba.conf"]

        assert found["status"] == status
        assert found["current"].endswith(current)

    def test_certificate(self, audit, tls_server, may_look):
        """A line that asks for a certificate instead of a password is as good."""
        may_look.execute("GRANT pgmonkey TO certificate_user")
        try:
            config = {"connection_settings": tls_server.certificate_conninfo()}
            found = audit(config, "--clientcert", "verify-full")[1]
        finally:
            may_look.execute("REVOKE pgmonkey FROM certificate_user")

        assert found["pg_hba.conf"]["status"] == "ok"
        assert found["ssl_ca_file"]["status"] == "ok"

    def test_a_role_that_may_not_look(self, advise, pg_server, database):
        """What cannot be seen is unknown, which is no mismatch, and it is said why."""
        result = advise(pg_server.config(database), "--audit", "--strict")

        assert "this role may not read pg_hba_file_rules" in result.output()
        assert "unknown  pg_hba.conf" in result.out

    def test_it_only_reads(self, advise, pg_server, database):
        """The audit works for a role that may not write at all."""
        config = pg_server.config(database)
        config["sync_settings"] = {"default_transaction_read_only": True}

        assert advise(config, "--audit").status == 0

    def test_dead_server(self, advise):
        """A server that is not there is one line and status 1."""
        config = {"connection_settings": {"host": "127.0.0.1", "port": 1}}

        assert "refused" in advise(config, "--audit").error.lower()
