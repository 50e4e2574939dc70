"""The handles and managers that the kit's fixtures give to tests."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..config import connection_spec
from ..connection_type import CONNECTION_TYPES
from ..handles import make_handle
from ..manager import PGConnectionManager

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .interception import Interception

__all__ = ["OwnHandles"]


class OwnHandles:
    """Makes handles and managers that lead to the running test, whatever else is intercepted.

    `config` is the configuration of the prepared database.
    """

    def __init__(self, config: Mapping[str, Any], interception: Interception) -> None:
        self._interception = interception
        self._specs = {name: connection_spec(config, name) for name in CONNECTION_TYPES}

    def make(self, connection_type: str) -> Any:
        """Give a new handle of a type."""
        return make_handle(self._specs[connection_type], None, self._owner)

    @cached_property
    def _owner(self) -> PGConnectionManager:
        return self.manager()

    def manager(self) -> PGConnectionManager:
        """Give a new manager; any path or dictionary given to it leads to the test's database."""
        manager = PGConnectionManager()
        self._interception.adopt(manager)
        return manager
