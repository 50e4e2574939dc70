"""Options of pytest runs that tests start."""

from __future__ import annotations

from typing import Final

#: Nothing of a run stays in its directory, and hypothesis, which takes a second to be imported and
#: which no such run uses, is left out.
QUICK: Final = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")
