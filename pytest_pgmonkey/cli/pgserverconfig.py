"""`pgmonkey pgserverconfig`: what the server's files must say for a configuration's clients."""

from __future__ import annotations

import argparse
import sys

from .common import CommandError, add_config_options, config_arguments, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from .server.advice import Advice, Client
    from .server.audit import Finding

__all__ = ["register"]

_EXAMPLE = """\
  pgmonkey pgserverconfig --connconfig pgmonkey_config.yaml --processes 4 \\
      --client-address 10.0.0.0/24
  pgmonkey pgserverconfig --connconfig pgmonkey_config.yaml --audit --strict"""


def register(parser: argparse.ArgumentParser) -> None:
    """Add the options of `pgserverconfig`."""
    parser.epilog = f"example:\n{_EXAMPLE}"
    add_config_options(parser)
    parser.add_argument(
        "--processes",
        type=_count,
        default=1,
        metavar="N",
        help="processes that use the file at the same time (default: 1)",
    )
    parser.add_argument(
        "--client-address",
        type=_network,
        metavar="CIDR",
        help="where clients connect from, such as 10.0.0.0/24 or 2001:db8::/64",
    )
    parser.add_argument(
        "--clientcert",
        choices=["verify-ca", "verify-full"],
        help="have the server ask clients for a certificate, too",
    )
    parser.add_argument(
        "--audit", action="store_true", help="compare with the live server, read-only"
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        dest="fail",
        help="with --audit: exit with status 1 where the server does not match",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_advise)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes")
    return int(text)


def _network(text: str) -> Any:
    from .server.advice import network

    try:
        return network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _advise(args: argparse.Namespace) -> int:
    from .failures import failures

    if args.fail and not args.audit:
        args.parser.error("--strict belongs to --audit")
    with failures(args):
        client = _client(args)
    if args.clientcert and not client.insists_on_tls:
        raise CommandError(
            f"{args.path}: --clientcert needs TLS, on which the file does not insist: "
            "set sslmode to require, verify-ca or verify-full"
        )
    advice, findings = _audited(args, client) if args.audit else (_advice(args, client), [])
    if advice.hba.address is None and advice.hba.type != "local":
        say("where clients connect from is not known: give --client-address")
    if args.json:
        _print_json(advice, findings if args.audit else None)
    else:
        _print_audit(findings) if args.audit else _print_advice(advice)
    return _verdict(findings) if args.fail else 0


def _client(args: argparse.Namespace) -> Client:
    from ..config import load_config, read_spec
    from ..judge import refuse_connection_strings
    from .server.advice import client_of

    arguments = config_arguments(args)
    config = load_config(args.path, **arguments)
    pools = []
    for type_ in ("pool", "async_pool"):
        spec = read_spec(args.path, type_, **arguments)
        if config.get(spec.type.pool_section or "") is not None:
            pool = dict(spec.pool)
            pools.append(pool.get("max_size") or pool.get("min_size", 4))
    spec = read_spec(args.path, "normal", **arguments)
    refuse_connection_strings(spec.conninfo_dict, args.path)
    return client_of(config, {**_libpq_defaults(), **spec.conninfo_dict}, pools, args.path)


def _libpq_defaults() -> dict[str, str]:
    """Give what libpq takes where a file is silent, the environment's variables included."""
    from psycopg.pq import Conninfo

    return {
        option.keyword.decode(): option.val.decode()
        for option in Conninfo.get_defaults()
        if option.val and option.keyword in (b"host", b"hostaddr", b"user", b"dbname", b"sslmode")
    }


def _advice(args: argparse.Namespace, client: Client) -> Advice:
    from .server.advice import advise

    return advise(
        client,
        processes=args.processes,
        address=args.client_address,
        clientcert=args.clientcert,
    )


def _audited(args: argparse.Namespace, client: Client) -> tuple[Advice, list[Finding]]:
    from .failures import failures
    from .server.audit import audit
    from .session import session

    with failures(args), session(args) as conn:
        return audit(
            conn,
            client,
            processes=args.processes,
            address=args.client_address,
            clientcert=args.clientcert,
        )


# --- output ---


def _print_advice(advice: Advice) -> None:
    entries = [(str(entry), entry.why) for entry in advice.settings]
    width = max(len(entry) for entry, _ in entries)
    lines = ["# postgresql.conf"]
    lines += [f"{entry:<{width}}  # {why}" for entry, why in entries]
    lines += ["", "# pg_hba.conf"]
    known = advice.hba.type == "local" or advice.hba.address is not None
    lines.append(str(advice.hba) if known else f"# {advice.hba}")
    sys.stdout.write("\n".join(lines) + "\n")


def _print_audit(findings: Iterable[Finding]) -> None:
    rows = [("status", "what", "recommended", "current")]
    rows += [(each.status, each.what, each.recommended, each.current) for each in findings]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False))
        sys.stdout.write(f"{'  '.join(cells)}  {row[3]}".rstrip() + "\n")


def _print_json(advice: Advice, findings: list[Finding] | None) -> None:
    import json
    from dataclasses import asdict

    document: dict[str, Any] = {
        "postgresql_conf": {entry.name: entry.value for entry in advice.settings},
        "pg_hba_conf": {**asdict(advice.hba), "line": str(advice.hba)},
    }
    if findings is not None:
        document["audit"] = [asdict(each) for each in findings]
        document["mismatches"] = sum(each.status == "mismatch" for each in findings)
    json.dump(document, sys.stdout, indent=2)
    sys.stdout.write("\n")


def _verdict(findings: Iterable[Finding]) -> int:
    wrong = [each.what for each in findings if each.status == "mismatch"]
    if wrong:
        say(f"the server does not match: {', '.join(wrong)}")
    return 1 if wrong else 0
