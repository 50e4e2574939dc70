"""The test side: servers, the rolled-back transaction, fixtures. Production never imports it.

Use `PGMonkey`, the type of the fixture `pgmonkey`, in annotations.
"""

from __future__ import annotations

# Not typing's, and loaded on first use: the plugin lives in this package.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .fixture_value import PGMonkey

__all__ = ["PGMonkey"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .fixture_value import PGMonkey

    return PGMonkey
