"""What `pgimport` and `pgexport` do: they call `import_csv` and `export_csv`."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

from ...copying.settings import UsageError
from ...copying.tables import parse_name
from ..running import as_options, handle_of, say
from .progress import progress
from .sidecar import apply_sidecar

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from ...copying.settings import CSVResult

_COMMON = ("table", "columns", "header", "delimiter", "quotechar", "null", "encoding")
_IMPORT = (*_COMMON, "create_table", "infer_types", "lowercase", "truncate")
_EXPORT = (*_COMMON, "query")


def run_import(args: argparse.Namespace) -> int:
    """Import a file."""
    from ...copying.importing import import_csv

    apply_sidecar(args, args.file)
    file = sys.stdin.buffer if args.file == "-" else args.file
    result = _copied(args, import_csv, file, args.file, _IMPORT)
    sys.stdout.write(f"imported {_rows(result)} into {result.table}\n")
    return 0


def run_export(args: argparse.Namespace) -> int:
    """Export a table or a query."""
    from ...copying.exporting import export_csv

    path = args.file or (
        _file_name(parse_name(args.table).table) if args.table is not None else "-"
    )
    apply_sidecar(args, path)
    file = sys.stdout.buffer if path == "-" else path
    result = _copied(args, export_csv, file, path, _EXPORT)
    if result.left_out:
        left_out = ", ".join(result.left_out)
        say(f"generated columns are left out: {left_out}; --columns exports them")
    message = f"exported {_rows(result)} to "
    if path == "-":
        say(f"{message}standard output")
    else:
        sys.stdout.write(f"{message}{path}\n")
    return 0


def _copied(
    args: argparse.Namespace,
    copy: Callable[..., CSVResult],
    file: object,
    path: str,
    names: tuple[str, ...],
) -> CSVResult:
    given: dict[str, Any] = {name: getattr(args, name) for name in names}
    # What was neither typed nor in the file beside it has the function's default.
    given = {name: value for name, value in given.items() if value is not None}
    try:
        with handle_of(args) as handle, progress(path) as show:
            return copy(handle, file, progress=show, **given)
    except UsageError as error:
        parser: argparse.ArgumentParser = args.parser
        parser.error(as_options(error))


def _rows(result: CSVResult) -> str:
    return f"{result.rows} {'row' if result.rows == 1 else 'rows'}"


def _file_name(table: str) -> str:
    """Name the file of a table, in this directory and on any file system."""
    return re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]', "_", table) + ".csv"
