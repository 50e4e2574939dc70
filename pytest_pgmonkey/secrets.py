"""Where secret values come from and how they are kept out of sight.

`interpolate` puts values of the environment and of secret files into a configuration;
`redact_config` and `redact_text` take secret values out of what people get to read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .errors import ConfigError, EnvInterpolationError

REDACTED = "***REDACTED***"

SENSITIVE_KEYS = frozenset(
    {"passwd", "sslcert", "sslkey", "sslrootcert", "scram_client_key", "scram_server_key"}
)
SENSITIVE_PARTS = ("password", "token", "secret", "credential")

#: A reference to a variable: its name, and its default.
VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")

# Both patterns would rather hide too much than end before the secret does: an unescaped "@",
# "/" or blank in a URL's password, a "&" in a keyword string's.
_URL_PASSWORD = re.compile(r"(://[^:]*:)(.+)(@)", re.DOTALL)
_DSN_PASSWORD = re.compile(
    r"(\b\w*(?:password|passwd|secret|token|credential|scram_\w+_key)\w*\s*=\s*)"
    r"('(?:\\.|[^'\\])*'?|(?:\\.|[^\s\\])+)",
    re.IGNORECASE | re.DOTALL,
)


def is_sensitive(key: object) -> bool:
    """Tell whether the value of this configuration key is a secret."""
    lower = str(key).lower()
    return lower in SENSITIVE_KEYS or any(part in lower for part in SENSITIVE_PARTS)


def is_reference(value: object) -> bool:
    """Tell whether `interpolate` would replace this value or a part of it."""
    if isinstance(value, str):
        return VARIABLE.search(value) is not None
    return _is_structured(value)


def is_in_a_file(value: object) -> bool:
    """Tell whether `interpolate` would read this value from a file."""
    return _is_structured(value) and "from_file" in value  # type: ignore[operator]


def _is_structured(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) == 1
        and next(iter(value)) in ("from_env", "from_file")
    )


# --- interpolation ---


def interpolate(
    config: Any,
    environ: Mapping[str, str],
    allow_sensitive_defaults: bool = False,
    strict: bool = False,
    file: str | None = None,
) -> Any:
    """Give a copy of `config` with every reference replaced; what it puts in is not read again."""
    return _Interpolation(environ, allow_sensitive_defaults, strict, file).value(config, "", False)


@dataclass(frozen=True)
class _Interpolation:
    environ: Mapping[str, str]
    allow_sensitive_defaults: bool
    strict: bool
    file: str | None

    def value(self, value: Any, key: str, sensitive: bool) -> Any:
        if isinstance(value, str):
            return self.text(value, key, sensitive)
        if _is_structured(value):
            return self.structured(value, key)
        if isinstance(value, Mapping):
            return {
                name: self.value(
                    item, f"{key}.{name}" if key else str(name), sensitive or is_sensitive(name)
                )
                for name, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [
                self.value(item, f"{key}[{index}]", sensitive) for index, item in enumerate(value)
            ]
        return value

    def text(self, text: str, key: str, sensitive: bool) -> str:
        if "${" not in text:
            return text
        return VARIABLE.sub(
            lambda match: self.variable(
                match[1], match[2], key, sensitive or _has_secret_default(match)
            ),
            text,
        )

    def structured(self, reference: Mapping[str, Any], key: str) -> str:
        ((kind, name),) = reference.items()
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{kind} takes one name, as a string", file=self.file, key=key)
        if kind == "from_env":
            return self.variable(name, None, key, sensitive=True)
        return self.secret_file(name, key)

    def variable(self, name: str, default: str | None, key: str, sensitive: bool) -> str:
        value = self.environ.get(name)
        if value or (value is not None and not self.strict):
            return value
        state = "is not set" if value is None else "is empty"
        if default is None:
            raise self.error(f"environment variable {name} {state}", key, name)
        if sensitive and not self.allow_sensitive_defaults:
            raise self.error(
                f"environment variable {name} {state}, and a sensitive key takes no default",
                key,
                name,
                hint="set the variable, or allow sensitive defaults",
            )
        return default

    def secret_file(self, name: str, key: str) -> str:
        try:
            text = Path(name).expanduser().read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            # Its own text shows bytes of the secret.
            raise self.error(f"secret file {name} is not UTF-8", key) from None
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or "bad path"
            raise self.error(f"cannot read secret file {name}: {reason}", key) from None
        text = text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
        if self.strict and not text:
            raise self.error(f"secret file {name} is empty", key)
        return text

    def error(
        self, problem: str, key: str, variable: str | None = None, hint: str | None = None
    ) -> EnvInterpolationError:
        return EnvInterpolationError(problem, self.file, key, hint, variable)


def _has_secret_default(reference: re.Match[str]) -> bool:
    """Tell whether a default holds the password of a DSN, or stands in its place."""
    default, mark = reference[2], "\0"
    if default is None:
        return False
    text, (start, end) = reference.string, reference.span()
    around = mark.join(VARIABLE.sub("x", part) for part in (text[:start], text[end:]))
    return _redact_dsn(default) != default or mark not in _redact_dsn(around)


# --- redaction ---


def redact_config(config: Any) -> Any:
    """Return a deep copy of a configuration with `***REDACTED***` in place of its secrets.

    Secrets are the values of sensitive keys, with everything below them, and all passwords inside
    DSNs and URLs.
    """
    return _redact(config, sensitive=False)


def _redact(value: Any, sensitive: bool) -> Any:
    if isinstance(value, Mapping):
        return {
            _redact_dsn(key): _redact(item, sensitive or is_sensitive(key))
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        items = [_redact(item, sensitive) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if value is None or value == "":
        return value
    return REDACTED if sensitive else _redact_dsn(value)


def _redact_dsn(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = _URL_PASSWORD.sub(rf"\1{REDACTED}\3", value) if "://" in value else value
    return _DSN_PASSWORD.sub(rf"\1{REDACTED}", text) if "=" in text else text


def redact_text(text: str, secrets: Iterable[str] = ()) -> str:
    """Hide these secrets, in every spelling a driver may repeat, and passwords inside DSNs."""
    spellings = {form(secret) for secret in secrets if secret for form in _SPELLINGS}
    for spelling in sorted(spellings, key=len, reverse=True):
        pattern = re.escape(spelling)
        # A password such as "a" is hidden where it stands alone, not inside every word.
        pattern = rf"(?<!\w){pattern}(?!\w)" if len(spelling) < 4 else pattern
        text = re.sub(pattern, REDACTED, text)
    redacted: str = _redact_dsn(text)
    return redacted


_SPELLINGS: tuple[Callable[[str], str], ...] = (
    str,
    lambda secret: quote(secret, safe=""),
    lambda secret: secret.replace("\\", "\\\\").replace("'", "\\'"),
    lambda secret: repr(secret)[1:-1],
)
