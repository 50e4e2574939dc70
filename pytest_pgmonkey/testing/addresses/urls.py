"""Addresses of databases as URLs."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["url_of"]


def url_of(conninfo: Mapping[str, str], scheme: str = "postgresql") -> str:
    """Turn libpq's keywords into a URL: `postgresql://user@host/name`."""
    rest = {key: value for key, value in conninfo.items() if value}
    user, password, dbname = (
        quote(rest.pop(k, ""), safe="") for k in ("user", "password", "dbname")
    )
    login = f"{user}:{password}@" if password else f"{user}@" if user else ""
    address, host = "", rest.get("host", "")
    # A socket's directory cannot stand where a host name does, nor can several hosts.
    if host and not host.startswith("/") and "," not in host:
        del rest["host"]
        port = rest.pop("port", "")
        address = (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "")
    query = f"?{urlencode(rest, quote_via=quote)}" if rest else ""
    return f"{scheme}://{login}{address}/{dbname}{query}"
