"""`pgmonkey pgconfig generate-code`: a script that connects as a configuration says.

Where it comes to psycopg itself, settings stand in the script as Python expressions; secrets never
do: the script reads them from where the configuration has them.
"""

from __future__ import annotations

import re
import sys

from ..connection_type import ConnectionType
from .common import add_command, add_config_options, add_connection_type, config_arguments, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping
    from typing import Any

__all__ = ["register"]

_EXAMPLE = """\
  pgmonkey pgconfig generate-code --connconfig pgmonkey_config.yaml \\
      --connection-type async_pool --library psycopg > script.py"""


def register(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `generate-code` to `pgconfig`."""
    parser = add_command(actions, "generate-code", "print a script that connects", _EXAMPLE)
    add_config_options(parser)
    add_connection_type(parser)
    parser.add_argument(
        "--library",
        type=_library,
        choices=["pytest_pgmonkey", "psycopg"],
        default="pytest_pgmonkey",
        help="what the script is written on (default: %(default)s; pgmonkey means the same)",
    )
    parser.set_defaults(run=_generate)


def _library(name: str) -> str:
    return "pytest_pgmonkey" if name == "pgmonkey" else name


def _generate(args: argparse.Namespace) -> int:
    from .failures import failures

    with failures(args):
        script = _psycopg_script(args) if args.library == "psycopg" else _own_script(args)
    sys.stdout.write(script)
    return 0


# --- frames ---

_FRAME = """\
{top}


{define} main():
{body}

if __name__ == "__main__":
    {run}
"""

# psycopg's async side cannot use Windows' default loop.
_RUN = "asyncio.run(main())"
_RUN_ON_WINDOWS = "asyncio.run(main(), loop_factory=asyncio.SelectorEventLoop)"


def _script(
    type_: ConnectionType, imports: list[list[str]], top: list[list[str]], body: list[str]
) -> str:
    """Put a script together from groups of imports, of top-level lines, and the lines of `main`."""
    if type_.is_async:
        imports[0].append("import asyncio")
    groups = [sorted(group, key=_import_order) for group in imports] + top
    call = _RUN_ON_WINDOWS if sys.platform == "win32" else _RUN
    return _FRAME.format(
        top="\n\n".join("\n".join(group) for group in groups if group),
        define="async def" if type_.is_async else "def",
        body="".join(f"    {line}\n" for line in body),
        run=call if type_.is_async else "main()",
    )


def _import_order(line: str) -> tuple[bool, str]:
    return line.startswith("from "), line


# --- on this package ---


def _own_script(args: argparse.Namespace) -> str:
    from ..config import connection_spec, load_config

    config = load_config(args.path)
    type_ = _type(args, config)
    if not _any_reference(config):
        connection_spec(config, type_, origin=args.path)  # Judged as production would.
    elif not args.resolve_env:
        say(f"{args.path}: refers to the environment; --resolve-env has the script resolve it")
    arguments = ["CONFIG", _literal(str(type_))]
    arguments += [f"{name}=True" for name, on in config_arguments(args).items() if on]
    call = f"manager.get_database_connection({', '.join(arguments)})"
    body = [
        "manager = PGConnectionManager()",
        f"{'connection = await' if type_.is_async else 'connection ='} {call}",
        *_query(type_, "connection"),
    ]
    imports = [[], ["from pytest_pgmonkey import PGConnectionManager"]]
    return _script(type_, imports, [[f"CONFIG = {_literal(args.path)}"]], body)


def _type(args: argparse.Namespace, config: Mapping[str, Any]) -> ConnectionType:
    return ConnectionType(args.connection_type or config.get("connection_type") or "normal")


def _any_reference(value: Any) -> bool:
    from ..secrets import is_reference

    if is_reference(value):
        return True
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(_any_reference, items))


def _query(type_: ConnectionType, block: str) -> list[str]:
    """Write the block in which a query is made."""
    if type_.is_async:
        return [
            f"async with {block} as conn:",
            '    cursor = await conn.execute("SELECT version()")',
            "    print((await cursor.fetchone())[0])",
        ]
    return [
        f"with {block} as conn:",
        '    cursor = conn.execute("SELECT version()")',
        "    print(cursor.fetchone()[0])",
    ]


def _literal(text: str) -> str:
    import json

    # JSON's strings are Python's, in the quotes that formatters want.
    return json.dumps(text, ensure_ascii=False)


# --- on psycopg ---


def _psycopg_script(args: argparse.Namespace) -> str:
    from ..config import connection_spec, load_config, prepare_config

    options = config_arguments(args)
    raw = load_config(args.path)
    # Judged as production would, with the values that the environment has now.
    spec = connection_spec(
        prepare_config(raw, **options, origin=args.path) if args.resolve_env else raw,
        args.connection_type,
        origin=args.path,
    )
    writer = _Writer(args.path, raw, args.resolve_env, args.strict)
    connection = dict(writer.connection(dict(spec.conninfo)))
    autocommit = spec.autocommit
    pool = dict(writer.pool(dict(spec.pool), spec.type)) if spec.type.is_pool else {}
    settings = dict(writer.settings(spec.settings, spec.type))
    return _Psycopg(spec.type, autocommit, spec.check_on_checkout).script(
        writer, connection, pool, settings
    )


_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


class _Writer:
    """Writes a configuration's values as Python expressions, and notes what they need."""

    def __init__(self, path: str, config: Mapping[str, Any], resolve: bool, strict: bool) -> None:
        self.config = config
        self.path = path
        self.resolve = resolve
        self.strict = strict
        self.needs_os = False
        self.needs_path = False
        self.needs_file = False

    def connection(self, judged: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        section = self.config["connection_settings"]
        for name in section:
            if name in judged:
                yield name, self.expression(section[name], judged[name], name)

    def pool(self, judged: Mapping[str, Any], type_: ConnectionType) -> Iterator[tuple[str, str]]:
        from ..secrets import is_reference

        section = self.config.get(type_.pool_section or "", {})
        for name, value in judged.items():
            if self.resolve and is_reference(section.get(name)) and not isinstance(value, bool):
                expression = self.reference(section[name])
                yield name, f"{type(value).__name__}({expression})"
            else:
                yield name, _literal(value) if isinstance(value, str) else repr(value)

    def settings(
        self, judged: tuple[tuple[str, str], ...], type_: ConnectionType
    ) -> Iterator[tuple[str, str]]:
        section = self.config.get(type_.settings_section, {})
        for name, value in judged:
            yield name, self.expression(section[name], value, name, type_.settings_section)

    def expression(
        self, raw: Any, judged: str, name: str, section: str = "connection_settings"
    ) -> str:
        from ..judge import TLS_FILES
        from ..secrets import is_reference, is_sensitive, redact_text

        if self.resolve and is_reference(raw):
            return self.reference(raw)
        secret = is_sensitive(name) and name not in TLS_FILES
        if secret or redact_text(judged) != judged:
            self.needs_file = True
            return f'config["{section}"]["{name}"]'
        return _literal(judged)

    def reference(self, raw: Any) -> str:
        if isinstance(raw, str):
            return self.text(raw)
        ((kind, name),) = raw.items()
        if kind == "from_env":
            self.needs_os = True
            return f"os.environ[{_literal(name)}]"
        self.needs_path = True
        return f'Path({_literal(name)}).expanduser().read_text("utf-8").removesuffix("\\n")'

    def text(self, text: str) -> str:
        self.needs_os = True
        parts, end = [], 0
        for match in _VARIABLE.finditer(text):
            if match.start() > end:
                parts.append(_literal(text[end : match.start()]))
            parts.append(self.variable(match[1], match[2]))
            end = match.end()
        if end < len(text):
            parts.append(_literal(text[end:]))
        return " + ".join(parts)

    def variable(self, name: str, default: str | None) -> str:
        if default is None:
            return f"os.environ[{_literal(name)}]"
        if self.strict:
            return f"(os.environ.get({_literal(name)}) or {_literal(default)})"
        return f"os.environ.get({_literal(name)}, {_literal(default)})"


class _Psycopg:
    """Writes the script of one connection type on psycopg and psycopg_pool."""

    def __init__(self, type_: ConnectionType, autocommit: bool, check: bool) -> None:
        self.type = type_
        self.autocommit = autocommit
        self.check = check
        self.await_ = "await " if type_.is_async else ""
        prefix = "Async" if type_.is_async else ""
        self.class_ = f"{prefix}Connection{'Pool' if type_.is_pool else ''}"

    def script(
        self,
        writer: _Writer,
        connection: Mapping[str, str],
        pool: Mapping[str, str],
        settings: Mapping[str, str],
    ) -> str:
        top = [_dictionary("CONNECTION", connection)]
        if writer.needs_file:
            # Every scalar as the string that was written: a password may look like a number.
            reading = [
                f'with open({_literal(writer.path)}, encoding="utf-8") as file:',
                "    config = yaml.load(file, yaml.BaseLoader)",
            ]
            top.insert(0, reading)
        if pool:
            top.append(_dictionary("POOL", pool))
        if settings:
            top += [_dictionary("SETTINGS", settings), self.prepare()]
        return _script(self.type, self.imports(writer), top, self.body(pool, settings))

    def imports(self, writer: _Writer) -> list[list[str]]:
        standard = ["import os"] if writer.needs_os else []
        standard += ["from pathlib import Path"] if writer.needs_path else []
        module = "psycopg_pool" if self.type.is_pool else "psycopg"
        others = [f"from {module} import {self.class_}"]
        others += ["import yaml"] if writer.needs_file else []
        return [standard, others]

    def prepare(self) -> list[str]:
        """Write the function that applies session settings to a new connection."""
        define = "async def" if self.type.is_async else "def"
        return [
            "",
            f"{define} prepare(conn):",
            "    for name, value in SETTINGS.items():",
            f'        {self.await_}conn.execute("SELECT set_config(%s, %s, false)", [name, value])',
            *([] if self.autocommit else [f"    {self.await_}conn.commit()"]),
        ]

    def body(self, pool: Mapping[str, str], settings: Mapping[str, str]) -> list[str]:
        if self.type.is_pool:
            return self.pool_body(pool, settings)
        arguments = "**CONNECTION" + (", autocommit=True" if self.autocommit else "")
        lines = _query(self.type, f"{self.await_}{self.class_}.connect({arguments})")
        if settings:
            lines.insert(1, f"    {self.await_}prepare(conn)")
        return lines

    def pool_body(self, pool: Mapping[str, str], settings: Mapping[str, str]) -> list[str]:
        kwargs = "{**CONNECTION, 'autocommit': True}" if self.autocommit else "CONNECTION"
        arguments = [f"kwargs={kwargs}".replace("'", '"')]
        arguments += ["configure=prepare"] if settings else []
        arguments += [f"check={self.class_}.check_connection"] if self.check else []
        arguments += ["**POOL"] if pool else []
        arguments += ["open=False"]
        with_ = "async with" if self.type.is_async else "with"
        inner = _query(self.type, "pool.connection()")
        return [
            f"{with_} {self.class_}({', '.join(arguments)}) as pool:",
            *(f"    {line}" for line in inner),
        ]


def _dictionary(name: str, items: Mapping[str, str]) -> list[str]:
    return [f"{name} = {{", *(f'    "{key}": {value},' for key, value in items.items()), "}"]
