"""The sync side: a web application or a script that leaves mail to be sent."""

from __future__ import annotations

from pathlib import Path

from pytest_pgmonkey import PGConnectionManager

manager = PGConnectionManager()
db = manager.get_database_connection(Path(__file__).with_name("database.yaml"), "normal")


def post(*recipients: str) -> None:
    with db as conn:
        conn.cursor().executemany(
            "INSERT INTO mail (recipient) VALUES (%s)", [(each,) for each in recipients]
        )


def report() -> dict[str, int]:
    with db as conn:
        return dict(
            conn.execute("SELECT state::text, count(*) FROM mail GROUP BY state").fetchall()
        )
