"""PostgreSQL connections from one YAML file, in production and in tests.

The names below are loaded on first use: the pytest plugin lives in this package, and no test
run should pay for psycopg that does not need it.
"""

from __future__ import annotations

# Not typing's: `pgmonkey --help` would wait for it.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .blocks import TransactionAbortedError
    from .config import load_config
    from .connection_type import ConnectionType
    from .copying.exporting import export_csv
    from .copying.importing import import_csv
    from .copying.settings import CSVResult
    from .errors import (
        ConfigError,
        CSVError,
        EnvInterpolationError,
        HandleClosedError,
        PGMonkeyError,
        SandboxError,
    )
    from .handles import AsyncHandle, AsyncPoolHandle, Handle, PoolHandle, ServerFacts
    from .manager import PGConnectionManager
    from .secrets import redact_config

__version__ = "0.1.0"

__all__ = [
    "AsyncHandle",
    "AsyncPoolHandle",
    "CSVError",
    "CSVResult",
    "ConfigError",
    "ConnectionType",
    "EnvInterpolationError",
    "Handle",
    "HandleClosedError",
    "PGConnectionManager",
    "PGMonkeyError",
    "PoolHandle",
    "SandboxError",
    "ServerFacts",
    "TransactionAbortedError",
    "__version__",
    "export_csv",
    "import_csv",
    "load_config",
    "redact_config",
]

_HOMES = {
    "blocks": ("TransactionAbortedError",),
    "config": ("load_config",),
    "connection_type": ("ConnectionType",),
    "copying.exporting": ("export_csv",),
    "copying.importing": ("import_csv",),
    "copying.settings": ("CSVResult",),
    "handles": ("AsyncHandle", "AsyncPoolHandle", "Handle", "PoolHandle", "ServerFacts"),
    "manager": ("PGConnectionManager",),
    "secrets": ("redact_config",),
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((home for home, names in _HOMES.items() if name in names), "errors")
    try:
        value = getattr(import_module(f".{home}", __name__), name)
    except ImportError:
        import_module(".errors", __name__).require_libpq()
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
