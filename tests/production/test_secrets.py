"""Interpolation puts the right values in, redaction lets none out."""

from __future__ import annotations

import pickle
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_pgmonkey import ConfigError, EnvInterpolationError, load_config, redact_config
from pytest_pgmonkey.secrets import (
    REDACTED,
    interpolate,
    is_reference,
    is_sensitive,
    redact_text,
)

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
SECRETS = st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S", "Zs")), min_size=12)


class TestInterpolation:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("${A}", "one"),
            ("${A}${B}", "onetwo"),
            ("x${A}-${B}y", "xone-twoy"),
            ("${A:-other}", "one"),
            ("${NO:-other}", "other"),
            ("${NO:-}", ""),
            ("${NO:-a:-b}", "a:-b"),
            ("${EMPTY}", ""),
            ("${EMPTY:-other}", ""),
            ("$A", "$A"),
            ("${}", "${}"),
            ("${A", "${A"),
            ("${A-x}", "${A-x}"),
            ("${1A}", "${1A}"),
            ("$${A}", "$one"),
            ("plain", "plain"),
        ],
    )
    def test_text(self, text, expected):
        """Well-formed references are replaced, everything else stays."""
        environ = {"A": "one", "B": "two", "EMPTY": ""}

        assert expected == interpolate(text, environ)

    def test_any_depth_and_lists(self):
        """References are found in mappings and lists at any depth; other values stay."""
        config = {"a": {"b": ["${X}", {"c": "${X}"}, 7, None, True]}, "d": {"from_env": "X"}}

        assert interpolate(config, {"X": "x"}) == {
            "a": {"b": ["x", {"c": "x"}, 7, None, True]},
            "d": "x",
        }

    def test_leaves_the_original(self):
        """The configuration itself is not changed."""
        config = {"a": ["${X}"]}

        interpolate(config, {"X": "x"})

        assert config == {"a": ["${X}"]}

    def test_values_are_not_read_again(self):
        """A value that looks like a reference is not followed."""
        assert interpolate("${A}", {"A": "${B}", "B": "no"}) == "${B}"

    @given(
        st.dictionaries(NAMES, st.text(), min_size=1),
        st.lists(st.text().filter(lambda text: "$" not in text and "{" not in text)),
    )
    def test_puts_in_exactly_the_values(self, environ, between):
        """Text made of references and other parts becomes the values and the other parts."""
        pieces = [(f"${{{name}}}", value) for name, value in environ.items()]
        pieces += [(text, text) for text in between]

        text = "".join(before for before, _ in pieces)

        assert "".join(after for _, after in pieces) == interpolate(text, environ)

    @pytest.mark.parametrize("reference", ["${NO}", {"from_env": "NO"}])
    def test_missing(self, reference):
        """A missing variable is an error that names it and the dotted key."""
        with pytest.raises(EnvInterpolationError) as caught:
            interpolate({"a": {"list": [1, reference]}}, {}, file="f.yaml")

        assert str(caught.value) == "f.yaml: a.list[1]: environment variable NO is not set"
        assert (
            caught.value.variable,
            caught.value.key,
            caught.value.file,
        ) == ("NO", "a.list[1]", "f.yaml")
        assert isinstance(caught.value, ConfigError)

    @pytest.mark.parametrize("reference", ["${EMPTY}", {"from_env": "EMPTY"}])
    def test_strict(self, reference):
        """In strict mode a variable that is set but empty counts as missing."""
        assert interpolate({"host": reference}, {"EMPTY": ""}) == {"host": ""}

        with pytest.raises(EnvInterpolationError, match="environment variable EMPTY is empty"):
            interpolate({"host": reference}, {"EMPTY": ""}, strict=True)

    def test_strict_takes_the_default(self):
        """In strict mode an empty variable yields to a default."""
        assert interpolate("${EMPTY:-x}", {"EMPTY": ""}, strict=True) == "x"

    @pytest.mark.parametrize(
        "config",
        [
            {"password": "${NO:-x}"},
            {"connection_settings": {"sslrootcert": "/a/${NO:-x}"}},
            {"credentials": {"deep": [{"user": "${NO:-x}"}]}},
            {"API_TOKEN": "${NO:-x}"},
            {"dsn": "postgresql://u:${NO:-x}@h/d"},
            {"dsn": "host=${NO_HOST:-h} password=${NO:-x}"},
            {"dsn": "${NO:-postgresql://u:x@h/d}"},
        ],
    )
    def test_sensitive_default(self, config):
        """A sensitive key, and what is beneath it, takes a default only where it is allowed."""
        with pytest.raises(EnvInterpolationError, match="sensitive key takes no default"):
            interpolate(config, {})

        assert "x" in str(interpolate(config, {}, allow_sensitive_defaults=True))

    @pytest.mark.parametrize(
        "dsn",
        [
            "${NO:-postgresql://h:5/d}",
            "postgresql://${NO:-u}:${PASSWORD}@${NO:-h}:${NO:-5}/${NO:-d}",
            "host=${NO:-h} password=${PASSWORD} dbname=${NO:-d}",
        ],
    )
    def test_other_defaults_in_a_dsn(self, dsn):
        """A default that is no password is one like any other."""
        resolved = interpolate({"dsn": dsn}, {"PASSWORD": "pw"})["dsn"]
        assert "h" in resolved
        assert "$" not in resolved

    def test_sensitive_default_is_not_shown(self):
        """The refused default is not in the message."""
        with pytest.raises(EnvInterpolationError) as caught:
            interpolate({"password": "${NO:-hunter2}"}, {})

        assert "hunter2" not in str(caught.value)

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"secret", "secret"),
            (b"secret\n", "secret"),
            (b"secret\r\n", "secret"),
            (b"secret\n\n", "secret\n"),
            (b"secret\r", "secret\r"),
            (b" a\r\nb \n", " a\r\nb "),
            (b"\n", ""),
            (b"", ""),
            ("\ufeffé".encode(), "é"),
        ],
    )
    def test_from_file(self, tmp_path, content, expected):
        """A secret file's content is the value, less one newline at its end."""
        path = tmp_path / "secret"
        path.write_bytes(content)

        assert {"password": expected} == interpolate({"password": {"from_file": str(path)}}, {})

    @pytest.mark.parametrize("content", [b"", b"\n"])
    def test_empty_file_in_strict_mode(self, tmp_path, content):
        """In strict mode an empty secret file counts as missing."""
        path = tmp_path / "secret"
        path.write_bytes(content)

        with pytest.raises(EnvInterpolationError, match="is empty"):
            interpolate({"password": {"from_file": str(path)}}, {}, strict=True)

    def test_unreadable_file(self, tmp_path):
        """A secret file that cannot be read is an error that names it and the key."""
        path = tmp_path / "nope"

        with pytest.raises(EnvInterpolationError) as caught:
            interpolate({"password": {"from_file": str(path)}}, {})

        assert f"password: cannot read secret file {path}: No such file or directory" == str(
            caught.value
        )

    def test_binary_file(self, tmp_path):
        """A secret file that is no text is refused without showing a byte of it."""
        path = tmp_path / "secret"
        path.write_bytes(b"hunter2\xff")

        with pytest.raises(EnvInterpolationError, match="is not UTF-8") as caught:
            interpolate({"password": {"from_file": str(path)}}, {})

        assert caught.value.__suppress_context__

    @pytest.mark.parametrize("name", [None, 7, "", ["X"]])
    @pytest.mark.parametrize("kind", ["from_env", "from_file"])
    def test_reference_without_a_name(self, kind, name):
        """A reference takes one name."""
        with pytest.raises(ConfigError, match=f"password: {kind} takes one name"):
            interpolate({"password": {kind: name}}, {})

    def test_mapping_with_more_keys_is_no_reference(self):
        """Only a mapping of that one key is a reference."""
        config = {"a": {"from_env": "X", "b": "c"}}

        assert config == interpolate(config, {})
        assert not is_reference(config["a"])

    def test_opt_in(self, tmp_path, monkeypatch):
        """The environment is looked at only on request."""
        monkeypatch.setenv("DB_HOST", "db")
        path = tmp_path / "c.yaml"
        path.write_text("connection_settings: {host: '${DB_HOST}'}")

        assert load_config(path)["connection_settings"]["host"] == "${DB_HOST}"
        assert load_config(path, resolve_env=True)["connection_settings"]["host"] == "db"

    def test_error_survives_a_process_boundary(self):
        """The error can be pickled with all that it says."""
        error = EnvInterpolationError("problem", "file", "key", "hint", "VARIABLE")

        copy = pickle.loads(pickle.dumps(error))

        assert vars(error) == vars(copy)
        assert str(error) == str(copy)


class TestSensitive:
    @pytest.mark.parametrize(
        "key",
        [
            "password",
            "PASSWORD",
            "passwd",
            "sslpassword",
            "sslkey",
            "sslcert",
            "sslrootcert",
            "api_token",
            "TokenValue",
            "my_secret_key",
            "db_credential",
            "new_password_2",
        ],
    )
    def test_keys(self, key):
        """The keys of secrets are known in any case of letters."""
        assert is_sensitive(key)

    @pytest.mark.parametrize("key", ["host", "port", "dbname", "user", "passfile", "sslmode", 7])
    def test_other_keys(self, key):
        """Other keys are not."""
        assert not is_sensitive(key)


class TestRedaction:
    def test_config(self):
        """Secrets are replaced at any depth, everything else stays, and the original too."""
        config = {
            "connection_settings": {"host": "db", "port": 5432, "password": "hunter2"},
            "list": [{"token": "hunter2"}, "plain"],
            "credentials": {"user": "hunter2", "more": ["hunter2", 7, None]},
            "sslkey": None,
            "passwd": "",
        }

        redacted = redact_config(config)

        assert redacted == {
            "connection_settings": {"host": "db", "port": 5432, "password": REDACTED},
            "list": [{"token": REDACTED}, "plain"],
            "credentials": {"user": REDACTED, "more": [REDACTED, REDACTED, None]},
            "sslkey": None,
            "passwd": "",
        }
        assert config["connection_settings"]["password"] == "hunter2"

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("postgresql://u:pw@h:5/d", f"postgresql://u:{REDACTED}@h:5/d"),
            ("postgresql://:pw@h/d", f"postgresql://:{REDACTED}@h/d"),
            ("postgres://u:p@w/x y@h/d", f"postgres://u:{REDACTED}@h/d"),
            ("postgresql://u@h/d", "postgresql://u@h/d"),
            ("postgresql://h:5432/d", "postgresql://h:5432/d"),
            ("postgresql://u@h/d?password=pw", f"postgresql://u@h/d?password={REDACTED}"),
            ("host=h password=pw user=u", f"host=h password={REDACTED} user=u"),
            ("password = 'a b\\' c' user=u", f"password = {REDACTED} user=u"),
            ("password=a\\ b user=u", f"password={REDACTED} user=u"),
            ("password='never closed", f"password={REDACTED}"),
            ("PASSWORD=pw", f"PASSWORD={REDACTED}"),
            ("sslpassword=pw", f"sslpassword={REDACTED}"),
            ("scram_client_key=pw", f"scram_client_key={REDACTED}"),
            ("password=a&b host=h", f"password={REDACTED} host=h"),
            ("password=a://b:c@d e", f"password={REDACTED} e"),
            ("no secret here", "no secret here"),
            ("a=b", "a=b"),
        ],
    )
    def test_dsn(self, text, expected):
        """Passwords inside DSNs and URLs are replaced, wherever they stand."""
        assert {"x": [expected]} == redact_config({"x": [text]})
        assert expected == redact_text(text)

    @pytest.mark.parametrize("value", ["text", 42, None, True])
    def test_scalars(self, value):
        """A value that is no mapping comes back."""
        assert value == redact_config(value)

    @given(
        SECRETS,
        st.recursive(
            st.none(),
            lambda inner: st.lists(inner, min_size=1) | st.dictionaries(NAMES, inner, min_size=1),
        ),
        st.sampled_from(["password", "Api_Token", "credentials", "sslkey"]),
    )
    def test_never_leaks_beneath_a_sensitive_key(self, secret, shape, key):
        """However a secret is nested beneath a sensitive key, it does not come out."""
        config = {"a": [{key: _filled(shape, secret)}]}

        assert secret not in _leaves(redact_config(config))

    @given(SECRETS)
    def test_never_leaks_from_a_dsn(self, secret):
        """Whatever characters a password has, no DSN or URL in a value shows it."""
        escaped = secret.replace("\\", "\\\\").replace("'", "\\'")
        texts = [
            f"host=h password='{escaped}' user=u",
            f"postgresql://user:{quote(secret, safe='')}@host/db",
            f"postgresql://user:{secret}@host/db",
            f"postgresql://host/db?user=u&password={quote(secret, safe='')}",
        ]

        for text in texts:
            shown = redact_config({"dsn": text})["dsn"]
            assert secret not in shown
            assert escaped not in shown
            assert quote(secret, safe="") not in shown

    @given(SECRETS.filter(lambda secret: secret.strip(" *") not in REDACTED))
    def test_text_never_leaks(self, secret):
        """A message that repeats a secret in a driver's spellings does not show it."""
        message = f"a {secret} b {quote(secret, safe='')} c {secret!r} d"

        shown = redact_text(message, [secret])

        assert secret not in shown
        assert quote(secret, safe="") not in shown

    def test_text_keeps_words(self):
        """A very short secret is hidden where it stands alone, so that a message stays readable."""
        assert f"a cat {REDACTED} b" == redact_text("a cat c b", ["c"])
        assert redact_text("nothing", ["", "x"]) == "nothing"


def _filled(shape, secret):
    if isinstance(shape, list):
        return [_filled(item, secret) for item in shape]
    if isinstance(shape, dict):
        return {key: _filled(item, secret) for key, item in shape.items()}
    return secret


def _leaves(value):
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]
