"""`pgmonkey pgexport`: a table, a view or a query to a CSV file."""

from __future__ import annotations

from .common import add_config_options, add_strict_option
from .copying.settings import add_csv_options

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

__all__ = ["register"]

_EXAMPLE = """\
  pgmonkey pgexport --table people --connconfig pgmonkey_config.yaml --export_file people.csv
  pgmonkey pgexport --query 'SELECT id, name FROM people' --connconfig c.yaml > names.csv"""


def register(parser: argparse.ArgumentParser) -> None:
    """Add the options of `pgexport`."""
    parser.epilog = f"example:\n{_EXAMPLE}"
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--table", metavar="TABLE", help="a table or view, or schema.table")
    source.add_argument("--query", metavar="SQL", help="a query; it may only read")
    parser.add_argument(
        "--export_file",
        "--export-file",
        dest="file",
        metavar="CSV",
        help="the file, '-' for standard output; packed if it ends in .gz "
        "(default: TABLE.csv; a query goes to standard output)",
    )
    add_config_options(parser)
    add_strict_option(parser)
    add_csv_options(parser)
    parser.set_defaults(run=_export, connection_type="normal")


def _export(args: argparse.Namespace) -> int:
    from .copying.exporting import run

    return run(args)
