"""TLS and passwords, against a server that has both."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import psycopg
import pytest
from helpers.four_types import ALL, call

from pytest_pgmonkey import ConfigError, PGConnectionManager

pytestmark = pytest.mark.asyncio


async def facts(
    manager: PGConnectionManager, type_: str, conninfo: dict[str, str], **sections: Any
) -> Any:
    config = {"connection_settings": conninfo, **sections}
    handle = await call(manager.get_database_connection_from_dict(config, type_))
    return await call(handle.test_connection())


@pytest.mark.parametrize("type_", ALL)
async def test_verified_server(type_: str, tls_server: Any, manager: PGConnectionManager) -> None:
    """A password over a connection whose server has proved its name."""
    found = await facts(manager, type_, tls_server.conninfo())
    assert found.tls.startswith("TLSv1.")
    assert found.user == "pgmonkey"


@pytest.mark.parametrize("type_", ALL)
async def test_client_certificate(
    type_: str, tls_server: Any, manager: PGConnectionManager
) -> None:
    """A certificate of the client in the place of a password."""
    found = await facts(manager, type_, tls_server.certificate_conninfo())
    assert found.user == "certificate_user"


@pytest.mark.parametrize("type_", ALL)
async def test_client_certificate_of_a_stranger(
    type_: str, tls_server: Any, manager: PGConnectionManager
) -> None:
    """A certificate that the server's authority has not signed is refused."""
    stranger = tls_server.stranger
    conninfo = tls_server.certificate_conninfo(
        sslcert=str(stranger.certificate), sslkey=str(stranger.key)
    )
    with pytest.raises(psycopg.OperationalError):
        await facts(manager, type_, conninfo)


@pytest.mark.parametrize("type_", ALL)
async def test_unknown_authority(type_: str, tls_server: Any, manager: PGConnectionManager) -> None:
    """A server whose authority is not the one that the file names is not believed."""
    conninfo = tls_server.conninfo(sslrootcert=str(tls_server.other_authority.certificate))
    with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
        await facts(manager, type_, conninfo)


@pytest.mark.parametrize("type_", ALL)
async def test_other_name(type_: str, tls_server: Any, manager: PGConnectionManager) -> None:
    """A certificate in another name than the one that was called is not believed."""
    conninfo = tls_server.conninfo(host="localhost.localdomain", hostaddr="127.0.0.1")
    with pytest.raises(psycopg.OperationalError, match="does not match host name"):
        await facts(manager, type_, conninfo)


@pytest.mark.parametrize("type_", ALL)
async def test_expired_certificate(
    type_: str, expired_tls_server: Any, manager: PGConnectionManager
) -> None:
    """A certificate that has expired is not believed."""
    with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
        await facts(manager, type_, expired_tls_server.conninfo())


async def test_missing_file(tls_server: Any, manager: PGConnectionManager, tmp_path: Path) -> None:
    """A certificate file that is not there is named by its key."""
    conninfo = tls_server.conninfo(sslrootcert=str(tmp_path / "no.crt"))
    with pytest.raises(ConfigError, match=r"no\.crt") as caught:
        await facts(manager, "normal", conninfo)
    assert caught.value.key == "connection_settings.sslrootcert"


@pytest.mark.parametrize("type_", ALL)
async def test_wrong_password(
    type_: str, tls_server: Any, manager: PGConnectionManager, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong password is the server's own error, at once, and no secret is in it."""
    wrong = secrets.token_hex(12)
    conninfo = tls_server.conninfo(password=wrong)
    sections = {"pool_settings": {"timeout": 1}, "async_pool_settings": {"timeout": 1}}
    with pytest.raises(psycopg.OperationalError, match="password authentication failed") as caught:
        await facts(manager, type_, conninfo, **sections)
    assert type(caught.value) is psycopg.OperationalError
    assert wrong not in str(caught.getrepr(style="long", showlocals=False)) + caplog.text
    # Error reports may show the variables of every frame; psycopg's are psycopg's, and a dictionary
    # is the caller's.
    own = [entry for entry in caught.traceback if Path(entry.path).name == "connecting.py"]
    assert own
    for entry in own:
        assert wrong not in repr(entry.frame.f_locals)
    assert manager.cache_info["size"] == 0
