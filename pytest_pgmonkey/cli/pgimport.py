"""`pgmonkey pgimport`: a CSV file into a table, all of it or nothing."""

from __future__ import annotations

import argparse

from .common import add_config_options, add_strict_option
from .copying.settings import add_csv_options

__all__ = ["register"]

_EXAMPLE = """\
  pgmonkey pgimport --table people --connconfig pgmonkey_config.yaml --import_file people.csv
  zcat *.csv.gz | pgmonkey pgimport --table app.events --connconfig c.yaml --import_file - \\
      --no-header --delimiter tab"""


def register(parser: argparse.ArgumentParser) -> None:
    """Add the options of `pgimport`."""
    parser.epilog = f"example:\n{_EXAMPLE}"
    parser.add_argument("--table", required=True, metavar="TABLE", help="its name, or schema.table")
    parser.add_argument(
        "--import_file",
        "--import-file",
        dest="file",
        required=True,
        metavar="CSV",
        help="the file, '-' for standard input; one that ends in .gz is unpacked",
    )
    add_config_options(parser)
    add_strict_option(parser)
    add_csv_options(parser)
    parser.add_argument(
        "--create-table",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="create the table where it does not exist, its columns as text (default: no)",
    )
    parser.add_argument(
        "--infer-types",
        action="store_true",
        help="with --create-table: give the columns the types that all of their values have",
    )
    parser.add_argument(
        "--lowercase",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="with --create-table: name columns in lower case, with _ for blanks (default: yes)",
    )
    parser.add_argument(
        "--truncate", action="store_true", help="empty the table first, in the same transaction"
    )
    parser.set_defaults(run=_import, connection_type="normal")


def _import(args: argparse.Namespace) -> int:
    from .copying.importing import run

    return run(args)
