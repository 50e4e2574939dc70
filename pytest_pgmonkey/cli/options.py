"""The command line: the options of each command, and the name of the function that runs it.

`pgmonkey --help` waits for all imports here: neither typing nor shutil is among them.
"""

from __future__ import annotations

import argparse
import os

from .. import __version__
from ..connection_type import CONNECTION_TYPES
from ..copying.names import as_sign, refuse_doubles, split_names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

#: Set by the shell's side of argcomplete.
COMPLETING = "_ARGCOMPLETE"


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of examples; finds the terminal's width without shutil."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        try:
            columns = int(os.environ.get("COLUMNS") or os.get_terminal_size(1).columns)
        except (ValueError, OSError):
            columns = 0
        super().__init__(prog, **{"width": (columns or 80) - 2, **kwargs})


def make_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Make the parser; only the command that is typed has its options."""
    parser = argparse.ArgumentParser(
        prog="pgmonkey",
        description="PostgreSQL connections from one YAML file.",
        epilog="example:\n  pgmonkey pgconfig create --connconfig pgmonkey_config.yaml",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pgmonkey {__version__}")
    _add_flag(parser, "--debug", "show the traceback of a failure")
    parser.set_defaults(parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    # The options before a command take no values.
    typed = next((word for word in argv if not word.startswith("-")), None)
    for name, (summary, add_options) in COMMANDS.items():
        command = _add_command(commands, name, summary)
        if name == typed or COMPLETING in os.environ:
            add_options(command)
    return parser


def _add_command(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    # Also after the command; its default would undo one before it.
    _add_flag(parser, "--debug", argparse.SUPPRESS, default=argparse.SUPPRESS)
    parser.set_defaults(parser=parser)
    return parser


def _complete(parser: argparse.ArgumentParser, run: str, example: str) -> None:
    """Name what runs a command, as module and function of this package; help ends with examples."""
    parser.set_defaults(run=run)
    parser.epilog = f"example:\n{example}"


# --- the commands ---


def _pgconfig(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="commands", metavar="COMMAND")

    create = _add_command(actions, "create", "write a commented template")
    _add_file(create, "the file to write; it must not exist yet")
    create.add_argument("--type", choices=["pg"], default="pg", help="the kind of database")
    _complete(create, "pgconfig.create", _EXAMPLES["create"])

    test = _add_command(actions, "test", "connect as the application would")
    _add_config(test)
    _add_connection_type(test)
    _add_strict(test)
    _complete(test, "pgconfig.test", _EXAMPLES["test"])

    generate = _add_command(actions, "generate-code", "print a script that connects")
    _add_config(generate)
    _add_connection_type(generate)
    generate.add_argument(
        "--library",
        type=lambda name: "pytest_pgmonkey" if name == "pgmonkey" else name,
        choices=["pytest_pgmonkey", "psycopg"],
        default="pytest_pgmonkey",
        help="the library that the script uses (default: %(default)s; pgmonkey is an alias)",
    )
    _complete(generate, "generate.run", _EXAMPLES["generate-code"])


def _pgserverconfig(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--processes",
        type=_count,
        default=1,
        metavar="N",
        help="number of processes that use the file at the same time (default: 1)",
    )
    parser.add_argument(
        "--client-address",
        type=_network,
        metavar="CIDR",
        help="where clients connect from, such as 10.0.0.0/24 or 2001:db8::/64",
    )
    parser.add_argument(
        "--clientcert",
        choices=["verify-ca", "verify-full"],
        help="also make the server ask for a client certificate",
    )
    _add_flag(parser, "--audit", "compare with the live server, read-only")
    strict = "with --audit: exit with status 1 on a mismatch"
    _add_flag(parser, "--strict", strict, dest="fail")
    _add_flag(parser, "--json", "print JSON")
    _complete(parser, "pgserverconfig.run", _EXAMPLES["pgserverconfig"])


def _pgimport(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--table", required=True, metavar="TABLE", help="table or schema.table")
    parser.add_argument(
        "--import_file",
        "--import-file",
        dest="file",
        required=True,
        metavar="CSV",
        help="the file, or '-' for standard input; .gz files are decompressed",
    )
    _add_config(parser)
    _add_strict(parser)
    _add_csv(parser)
    create = "create the table if it does not exist, with text columns (default: no)"
    _add_switch(parser, "--create-table", create)
    infer = "with --create-table: give each column a type that fits all its values"
    _add_flag(parser, "--infer-types", infer)
    lower = "with --create-table: put names in lower case, with _ for blanks (default: yes)"
    _add_switch(parser, "--lowercase", lower)
    _add_flag(parser, "--truncate", "empty the table first, in the same transaction")
    _complete(parser, "copying.commands.run_import", _EXAMPLES["pgimport"])


def _pgexport(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--table", metavar="TABLE", help="a table or view: table or schema.table")
    source.add_argument("--query", metavar="SQL", help="a read-only query")
    parser.add_argument(
        "--export_file",
        "--export-file",
        dest="file",
        metavar="CSV",
        help="the file, or '-' for standard output; .gz files are compressed "
        "(default: TABLE.csv; a query goes to standard output)",
    )
    _add_config(parser)
    _add_strict(parser)
    _add_csv(parser)
    _complete(parser, "copying.commands.run_export", _EXAMPLES["pgexport"])


def _kept(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    _add_flag(what, "--json", "print JSON")
    what.add_argument(
        "--remove",
        nargs="*",
        metavar="NAME",
        help="remove the named ones, or all",
    )
    _complete(parser, "kept.run", _EXAMPLES["kept"])


COMMANDS = {
    "pgconfig": ("write and test configuration files", _pgconfig),
    "pgserverconfig": (
        "recommend server settings for a configuration",
        _pgserverconfig,
    ),
    "pgimport": ("import a CSV file into a table", _pgimport),
    "pgexport": ("export a table, view or query as CSV", _pgexport),
    "kept": ("list and remove databases kept from failed tests", _kept),
}
_EXAMPLES = {
    "create": """\
  pgmonkey pgconfig create --filepath pgmonkey_config.yaml""",
    "test": """\
  pgmonkey pgconfig test --connconfig pgmonkey_config.yaml --connection-type pool""",
    "generate-code": """\
  pgmonkey pgconfig generate-code --connconfig pgmonkey_config.yaml \\
      --connection-type async_pool --library psycopg > script.py""",
    "pgserverconfig": """\
  pgmonkey pgserverconfig --connconfig pgmonkey_config.yaml --processes 4 \\
      --client-address 10.0.0.0/24
  pgmonkey pgserverconfig --connconfig pgmonkey_config.yaml --audit --strict""",
    "pgimport": """\
  pgmonkey pgimport --table people --connconfig pgmonkey_config.yaml --import_file people.csv
  zcat *.csv.gz | pgmonkey pgimport --table app.events --connconfig c.yaml --import_file - \\
      --no-header --delimiter tab""",
    "pgexport": """\
  pgmonkey pgexport --table people --connconfig pgmonkey_config.yaml --export_file people.csv
  pgmonkey pgexport --query 'SELECT id, name FROM people' --connconfig c.yaml > names.csv""",
    "kept": """\
  pgmonkey kept
  pgmonkey kept --remove""",
}


# --- options of several commands ---


def _add_flag(parser: argparse._ActionsContainer, name: str, about: str, **more: Any) -> None:
    parser.add_argument(name, action="store_true", help=about, **more)


def _add_switch(parser: argparse.ArgumentParser, name: str, about: str) -> None:
    """Add an option and its `--no-` form; `None` where neither is given."""
    parser.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=about)


def _add_file(parser: argparse.ArgumentParser, about: str) -> None:
    """Add the option that names the configuration file: it has both names everywhere."""
    parser.add_argument(
        "--connconfig", "--filepath", dest="path", metavar="FILE", required=True, help=about
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that reads a configuration."""
    _add_file(parser, "the configuration file")
    _add_flag(parser, "--resolve-env", "expand ${VAR}, from_env and from_file in the file")
    defaults = "also allow ${VAR:-default} for passwords and other secrets"
    _add_flag(parser, "--allow-sensitive-defaults", defaults)
    parser.set_defaults(connection_type=None, strict=False)


def _add_connection_type(parser: argparse.ArgumentParser) -> None:
    default = "how to connect (default: the file's connection_type, else normal)"
    parser.add_argument("--connection-type", choices=CONNECTION_TYPES, help=default)


def _add_strict(parser: argparse.ArgumentParser) -> None:
    _add_flag(parser, "--strict", "treat an empty variable as missing")


def _add_csv(parser: argparse.ArgumentParser) -> None:
    """Add what import and export have in common."""
    parser.add_argument(
        "--columns",
        type=_columns,
        metavar="A,B,...",
        help='columns, in the file\'s order; quote a name that has a comma: "a,b"',
    )
    _add_switch(parser, "--header", "the first record holds the column names (default)")
    signs = {
        "delimiter": "separates values; 'tab' for a tab (default: ,)",
        "quotechar": 'encloses values (default: ")',
    }
    for name, help_ in signs.items():
        parser.add_argument(f"--{name}", type=_sign, metavar="C", help=help_)
    parser.add_argument(
        "--null", metavar="TEXT", help="unquoted text that means NULL (default: the empty string)"
    )
    parser.add_argument(
        "--encoding",
        metavar="NAME",
        help="a Python or PostgreSQL name (default: utf-8)",
    )
    parser.set_defaults(connection_type="normal")


# --- values ---


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes")
    return int(text)


def _network(text: str) -> object:
    from ipaddress import ip_network

    try:
        return ip_network(text, strict=False)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _sign(text: str) -> str:
    try:
        return as_sign(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _columns(text: str) -> list[str]:
    names = split_names(text, ",")
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of names")
    try:
        refuse_doubles(names)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return names
