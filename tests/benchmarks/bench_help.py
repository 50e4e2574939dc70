"""`pgmonkey --help` against `python -c "import argparse"`.

    python tests/benchmarks/bench_help.py [runs]

Each in a new interpreter, in turns; the figure is the ratio of the medians, interpreter included.
Goal: at most 1.5.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from time import perf_counter

GOAL = 1.5
# As the console script does.
HELP = "import sys; from pytest_pgmonkey.cli import main; sys.exit(main(['--help']))"
CODE = {"ours": HELP, "theirs": "import argparse"}


def main(runs: int = 40) -> int:
    times: dict[str, list[float]] = {name: [] for name in CODE}
    for _ in range(runs + 1):
        for name, code in CODE.items():
            start = perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
            times[name].append(perf_counter() - start)
    # The first turn reads the files from the disk and compiles them.
    medians = {name: statistics.median(each[1:]) for name, each in times.items()}
    ratio = medians["ours"] / medians["theirs"]
    print(
        f"--help: {ratio:.2f} x "
        f"({1000 * medians['ours']:.0f} ms against {1000 * medians['theirs']:.0f} ms)"
    )
    return 0 if ratio <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
