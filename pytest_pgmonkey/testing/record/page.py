"""One page of a run: its tests, what each has done in the database, and the slowest statements."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any, Final

from .lines import cut
from .trace import CONTROL, ERROR, KIND, SQL, TIMES, TOOK, plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .trace import Trace

__all__ = ["Page", "Shown", "embedded"]

_MOST_RUNS: Final = 100_000
_MOST_STATEMENTS: Final = 50
_MOST_LINES: Final = 80
_LONGEST_LINE: Final = 500
# What ends a script element or begins a comment in it, and what JavaScript takes for a new line.
_ESCAPES: Final = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


class Shown:
    """A test as the page shows it."""

    def __init__(self, test: str) -> None:
        self.test: Final = test
        self.outcome = "skipped"
        self.failures: list[str] = []
        self.notes: list[str] = []
        self.trace: Trace = {"lanes": [], "missing": 0, "runs": []}
        self.is_cut = False
        """Whether its statements are left out, as the page has too many."""
        self.spent: dict[str, tuple[int, float]] = {}
        """How often each text ran, and its milliseconds."""
        self.ms = 0.0
        self.count = self.errors = 0

    @property
    def has_failed(self) -> bool:
        """Whether any phase has."""
        return self.outcome == "failed"

    def see(self, outcome: str, failure: str) -> None:
        """Take in how a phase has ended; a failure of one is the test's."""
        if not self.has_failed:
            self.outcome = outcome
        if failure:
            self.failures.append(_tail(failure))

    def note(self, notes: Iterable[str]) -> None:
        """Take in what else is told of it; later reports tell it again."""
        self.notes.extend(note for note in map(plain, notes) if note not in self.notes)

    def add(self, trace: Trace) -> None:
        """Take in what it has done."""
        self.trace, runs = trace, trace["runs"]
        self.count = trace["missing"] + sum(run[TIMES] for run in runs)
        self.ms = sum(run[TOOK] for run in runs)
        self.errors = sum(bool(run[ERROR]) for run in runs)
        for run in runs:
            if run[KIND] != CONTROL:
                count, ms = self.spent.get(run[SQL], (0, 0.0))
                self.spent[run[SQL]] = count + run[TIMES], ms + run[TOOK]

    def leave_out(self) -> None:
        """Let go of single statements; sums stay."""
        self.is_cut, self.trace = True, {**self.trace, "runs": []}


class Page:
    """Collects tests, of which a later attempt replaces an earlier one.

    Where they have too many statements for a page, those of the tests that passed and took the
    least time are left out.
    """

    def __init__(self, most_runs: int = _MOST_RUNS) -> None:
        self._most: Final = most_runs
        self._tests: dict[str, Shown] = {}
        self._runs = 0

    def add(self, shown: Shown) -> None:
        """Add a test that has ended."""
        self._tests[shown.test] = shown
        self._runs += len(shown.trace["runs"])
        if self._runs > 2 * self._most:
            self._bound()

    def _bound(self) -> list[Shown]:
        """Keep as many runs as there is room for; gives the tests in the page's order."""
        tests = sorted(self._tests.values(), key=lambda each: (not each.has_failed, -each.ms))
        self._runs = 0
        for each in tests:
            number = len(each.trace["runs"])
            if self._runs + number > self._most:
                each.leave_out()
            else:
                self._runs += number
        return tests

    def html(self, project: str, written: str) -> str:
        """Give the page of a project's run."""
        style, script = (_part(f"page.{kind}") for kind in ("css", "js"))
        data = _data(self._bound(), project, written)
        return Template(_part("page.html")).substitute(
            style=style,
            script=script,
            style_hash=_hash(style),
            script_hash=_hash(script),
            data=embedded(data),
        )


def _data(tests: list[Shown], project: str, written: str) -> dict[str, Any]:
    texts: dict[str, int] = {}
    shown = [_test(each, texts) for each in tests]
    statements = _statements(tests, texts)
    return {
        "project": plain(project),
        "written": written,
        "tests": shown,
        "statements": statements,
        "texts": list(texts),
    }


def _test(shown: Shown, texts: dict[str, int]) -> dict[str, Any]:
    runs = [
        [*run[:SQL], texts.setdefault(run[SQL], len(texts)), *run[SQL + 1 :]]
        for run in shown.trace["runs"]
    ]
    return {
        "id": plain(shown.test),
        "outcome": shown.outcome,
        "ms": round(shown.ms, 3),
        "count": shown.count,
        "errors": shown.errors,
        "failure": "\n\n".join(shown.failures),
        "notes": shown.notes,
        "lanes": shown.trace["lanes"],
        "missing": shown.trace["missing"],
        "isCut": shown.is_cut,
        "runs": runs,
    }


def _statements(tests: list[Shown], texts: dict[str, int]) -> list[list[Any]]:
    """Give text, count, milliseconds and the test that spent most on it, of the most notable."""
    found: dict[str, list[tuple[float, int, int]]] = {}
    for index, shown in enumerate(tests):
        for text, (count, ms) in shown.spent.items():
            found.setdefault(text, []).append((ms, count, index))
    sums = {
        text: (sum(each[0] for each in spent), sum(each[1] for each in spent))
        for text, spent in found.items()
    }
    notable: dict[str, None] = {}
    for column in (0, 1):
        notable |= dict.fromkeys(_most(sums, column))
    return [
        [
            texts.setdefault(text, len(texts)),
            sums[text][1],
            round(sums[text][0], 3),
            max(found[text])[2],
        ]
        for text in notable
    ]


def _most(sums: Mapping[str, tuple[float, int]], column: int) -> list[str]:
    return sorted(sums, key=lambda text: -sums[text][column])[:_MOST_STATEMENTS]


def _tail(failure: str) -> str:
    """Give the last lines of a failure, where its reason stands."""
    lines = [cut(line, _LONGEST_LINE) for line in plain(failure).splitlines()]
    left = len(lines) - _MOST_LINES
    return "\n".join([f"({left} lines before)", *lines[left:]] if left > 0 else lines)


def embedded(data: Any) -> str:
    """Give data as JSON in which nothing ends a script element or begins markup."""
    return json.dumps(data, separators=(",", ":")).translate(_ESCAPES)


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    """Give the name by which the page's policy permits this text, and no other."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
