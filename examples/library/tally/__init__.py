"""Counters in PostgreSQL: `Tally` for sync code, `AsyncTally` for coroutines.

Both take a handle of either type of their kind, and leave its life to the caller.
"""

from .tally import AsyncTally, Tally

__all__ = ["AsyncTally", "Tally"]
