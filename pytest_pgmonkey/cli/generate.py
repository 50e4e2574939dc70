"""`pgmonkey pgconfig generate-code`: a script that connects as a configuration says.

Where it comes to psycopg itself, settings stand in the script as Python expressions; secrets never
do: the script reads them from where the configuration has them.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from ..config import connection_spec, load_config, prepare_config
from ..connection_type import ConnectionType
from ..judge import TLS_FILES
from ..secrets import VARIABLE, is_reference, is_sensitive, redact_text
from .running import config_arguments, say

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping

    from ..config import ConnectionSpec


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    script = _psycopg_script(args) if args.library == "psycopg" else _own_script(args)
    sys.stdout.write(script)
    return 0


# --- the frame ---

_FRAME = """\
{top}


{async_}def main():
{body}

if __name__ == "__main__":
    {run}
"""
_STANDARD = {"import asyncio", "import os", "from pathlib import Path"}


def _script(type_: ConnectionType, imports: set[str], top: list[str], body: list[str]) -> str:
    """Put a script together from its imports, its top-level parts, and the lines of `main`."""
    imports = imports | {"import asyncio"} if type_.is_async else imports
    groups = (
        sorted(group, key=lambda line: (line.startswith("from "), line))
        for group in (imports & _STANDARD, imports - _STANDARD)
    )
    run = "main()"
    if type_.is_async:
        # psycopg's async side cannot use Windows' default loop.
        windows = ", loop_factory=asyncio.SelectorEventLoop" if sys.platform == "win32" else ""
        run = f"asyncio.run(main(){windows})"
    return _FRAME.format(
        top="\n\n".join(["\n".join(group) for group in groups if group] + top),
        async_=_words(type_)[0],
        body="".join(f"    {line}\n" for line in body),
        run=run,
    )


def _words(type_: ConnectionType) -> tuple[str, str]:
    return ("async ", "await ") if type_.is_async else ("", "")


def _block(type_: ConnectionType, context: str, *before: str) -> list[str]:
    """Write the block in which a query is made."""
    async_, await_ = _words(type_)
    fetch = "(await cursor.fetchone())" if type_.is_async else "cursor.fetchone()"
    return [
        f"{async_}with {context} as conn:",
        *(f"    {line}" for line in before),
        f'    cursor = {await_}conn.execute("SELECT version()")',
        f"    print({fetch}[0])",
    ]


def _literal(text: str) -> str:
    # JSON's strings are Python's, in the quotes that formatters want.
    return json.dumps(text, ensure_ascii=False)


# --- on this package ---


def _own_script(args: argparse.Namespace) -> str:
    config = load_config(args.path)
    type_ = ConnectionType(args.connection_type or config.get("connection_type") or "normal")
    if not _any_reference(config):
        connection_spec(config, type_, origin=args.path)  # Judged as production would.
    elif not args.resolve_env:
        say(f"{args.path}: refers to the environment; --resolve-env has the script resolve it")
    options = [f"{name}=True" for name, on in config_arguments(args).items() if on]
    arguments = ", ".join(["CONFIG", _literal(str(type_)), *options])
    body = [
        "manager = PGConnectionManager()",
        f"connection = {_words(type_)[1]}manager.get_database_connection({arguments})",
        *_block(type_, "connection"),
    ]
    imports = {"from pytest_pgmonkey import PGConnectionManager"}
    return _script(type_, imports, [f"CONFIG = {_literal(args.path)}"], body)


def _any_reference(value: Any) -> bool:
    if is_reference(value):
        return True
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(_any_reference, items))


# --- on psycopg ---


def _psycopg_script(args: argparse.Namespace) -> str:
    raw = load_config(args.path)
    # Judged as production would, with the values that the environment has now.
    judged = prepare_config(raw, **config_arguments(args), origin=args.path)
    spec = connection_spec(judged, args.connection_type, origin=args.path)
    type_ = spec.type
    class_ = "AsyncConnection" if type_.is_async else "Connection"
    class_, library = (f"{class_}Pool", "psycopg_pool") if type_.is_pool else (class_, "psycopg")
    writer = _Writer(raw, args.resolve_env, args.strict)
    writer.imports.add(f"from {library} import {class_}")
    dsn, connection = writer.connection(spec.conninfo_dict)
    pool = writer.pool(dict(spec.pool), type_)
    settings = writer.section(type_.settings_section, dict(spec.settings))
    top = [f"DSN = {dsn}"] if dsn else []
    top += [_dictionary("CONNECTION", connection)] if connection or not dsn else []
    top += [_dictionary("POOL", pool)] if pool else []
    if settings:
        top += [_dictionary("SETTINGS", settings), _prepare(type_, spec.autocommit)]
    if "import yaml" in writer.imports:
        top.insert(0, _READING.format(path=_literal(args.path)))
    names = [name for name in ("DSN", "CONNECTION") if any(part.startswith(name) for part in top)]
    return _script(type_, writer.imports, top, _psycopg_body(spec, class_, names, pool, settings))


# Every scalar as the string that was written: a password may look like a number.
_READING = """\
with open({path}, encoding="utf-8") as file:
    config = yaml.load(file, yaml.BaseLoader)"""


def _dictionary(name: str, items: Mapping[str, str]) -> str:
    return "\n".join([f"{name} = {{", *(f'    "{key}": {items[key]},' for key in items), "}"])


def _prepare(type_: ConnectionType, autocommit: bool) -> str:
    """Write the function that applies session settings to a new connection."""
    async_, await_ = _words(type_)
    lines = [
        f"\n{async_}def prepare(conn):",
        "    for name, value in SETTINGS.items():",
        f'        {await_}conn.execute("SELECT set_config(%s, %s, false)", [name, value])',
    ]
    return "\n".join(lines if autocommit else [*lines, f"    {await_}conn.commit()"])


def _psycopg_body(
    spec: ConnectionSpec,
    class_: str,
    names: list[str],
    pool: Mapping[str, str],
    settings: Mapping[str, str],
) -> list[str]:
    async_, await_ = _words(spec.type)
    dsn, keywords = "DSN" in names, "CONNECTION" in names
    if not spec.type.is_pool:
        given = {"DSN": dsn, "**CONNECTION": keywords, "autocommit=True": spec.autocommit}
        arguments = ", ".join(argument for argument, wanted in given.items() if wanted)
        before = [f"{await_}prepare(conn)"] if settings else []
        return _block(spec.type, f"{await_}{class_}.connect({arguments})", *before)
    connection = "CONNECTION"
    if spec.autocommit:
        connection = '{**CONNECTION, "autocommit": True}' if keywords else '{"autocommit": True}'
    options = {
        "DSN": dsn,
        f"kwargs={connection}": keywords or spec.autocommit,
        "configure=prepare": settings,
        f"check={class_}.check_connection": spec.check_on_checkout,
        "**POOL": pool,
        "open=False": True,
    }
    arguments = ", ".join(option for option, wanted in options.items() if wanted)
    inner = _block(spec.type, "pool.connection()")
    return [f"{async_}with {class_}({arguments}) as pool:", *(f"    {line}" for line in inner)]


# --- values ---


class _Writer:
    """Writes a configuration's values as Python expressions, and notes what they import."""

    def __init__(self, config: Mapping[str, Any], resolve: bool, strict: bool) -> None:
        self.config = config
        self.resolve = resolve
        self.strict = strict
        self.imports: set[str] = set()

    def connection(self, judged: Mapping[str, str]) -> tuple[str | None, dict[str, str]]:
        """Give the expression of the DSN, if there is one, and those of the keys beside it."""
        section = "connection_settings"
        dsn = self.config[section].get("dsn")
        written = self.expression(dsn, str(dsn), section, "dsn") if dsn else None
        return written, self.section(section, judged)

    def section(self, section: str, judged: Mapping[str, str]) -> dict[str, str]:
        return {
            name: self.expression(raw, judged[name], section, name)
            for name, raw in self.config.get(section, {}).items()
            if name in judged and raw not in (None, "")
        }

    def pool(self, judged: Mapping[str, Any], type_: ConnectionType) -> dict[str, str]:
        section = self.config.get(type_.pool_section or "", {})
        return {name: self.pool_value(section.get(name), value) for name, value in judged.items()}

    def pool_value(self, raw: Any, value: Any) -> str:
        if self.resolve and is_reference(raw) and not isinstance(value, bool):
            return f"{type(value).__name__}({self.reference(raw)})"
        return _literal(value) if isinstance(value, str) else repr(value)

    def expression(self, raw: Any, judged: str, section: str, name: str) -> str:
        if self.resolve and is_reference(raw):
            return self.reference(raw)
        secret = is_sensitive(name) and name not in TLS_FILES
        if secret or redact_text(judged) != judged:
            self.imports.add("import yaml")
            return f'config["{section}"]["{name}"]'
        return _literal(judged)

    def reference(self, raw: Any) -> str:
        if isinstance(raw, str):
            self.imports.add("import os")
            return " + ".join(self.parts(raw))
        ((kind, name),) = raw.items()
        if kind == "from_env":
            self.imports.add("import os")
            return f"os.environ[{_literal(name)}]"
        self.imports.add("from pathlib import Path")
        return f'Path({_literal(name)}).expanduser().read_text("utf-8").removesuffix("\\n")'

    def parts(self, text: str) -> Iterator[str]:
        """Give the expressions of a text's variables, and of what stands between them."""
        # Of three each: what stands before a variable, its name, its default.
        pieces = VARIABLE.split(text)
        for start in range(0, len(pieces), 3):
            if pieces[start]:
                yield _literal(pieces[start])
            if pieces[start + 1 :]:
                yield self.variable(*pieces[start + 1 : start + 3])

    def variable(self, name: str, default: str | None) -> str:
        if default is None:
            return f"os.environ[{_literal(name)}]"
        if self.strict:
            return f"(os.environ.get({_literal(name)}) or {_literal(default)})"
        return f"os.environ.get({_literal(name)}, {_literal(default)})"
