"""`pgmonkey pgserverconfig`: what the server's files must say for a configuration's clients."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from psycopg.pq import Conninfo

from ..config import load_config
from ..judge import refuse_connection_strings
from .running import CommandError, config_arguments, say, session, spec_of
from .server.advice import advise, client_of
from .server.audit import audit

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from .server.advice import Advice, Client
    from .server.audit import Finding


def run(args: argparse.Namespace) -> int:
    """Print what the server's files must say, or what of it a live server has."""
    if args.fail and not args.audit:
        args.parser.error("--strict belongs to --audit")
    client = _client(args)
    if args.clientcert and not client.insists_on_tls:
        raise CommandError(
            f"{args.path}: --clientcert needs TLS, on which the file does not insist: "
            "set sslmode to require, verify-ca or verify-full"
        )
    advice, findings = advise(client), None
    if args.audit:
        with session(args) as conn:
            advice, findings = audit(conn, client)
    if not advice.hba.is_complete:
        say("where clients connect from is not known: give --client-address")
    if args.json:
        _print_json(advice, findings)
    elif findings is None:
        _print_advice(advice)
    else:
        _print_audit(findings)
    wrong = [each.what for each in findings or () if each.status == "mismatch"]
    if wrong and args.fail:
        say(f"the server does not match: {', '.join(wrong)}")
        return 1
    return 0


def _client(args: argparse.Namespace) -> Client:
    config = load_config(args.path, **config_arguments(args))
    pools = []
    for type_ in ("pool", "async_pool"):
        spec = spec_of(args, type_)
        if config.get(spec.type.pool_section or "") is not None:
            pool = dict(spec.pool)
            pools.append(pool.get("max_size") or pool.get("min_size", 4))
    spec = spec_of(args, "normal")
    refuse_connection_strings(spec.conninfo_dict, args.path)
    # libpq's defaults, the environment's variables included, stand in where the file is silent.
    defaults = {
        option.keyword.decode(): option.val.decode()
        for option in Conninfo.get_defaults()
        if option.val and option.keyword in (b"host", b"hostaddr", b"user", b"dbname", b"sslmode")
    }
    return replace(
        client_of(config, {**defaults, **spec.conninfo_dict}, args.path),
        largest_pool=max(pools, default=1),
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
    lines.append(str(advice.hba) if advice.hba.is_complete else f"# {advice.hba}")
    sys.stdout.write("\n".join(lines) + "\n")


def _print_audit(findings: Iterable[Finding]) -> None:
    rows = [("status", "what", "recommended", "current")]
    rows += [(each.status, each.what, each.recommended, each.current) for each in findings]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False))
        sys.stdout.write(f"{'  '.join(cells)}  {row[3]}".rstrip() + "\n")


def _print_json(advice: Advice, findings: list[Finding] | None) -> None:
    document: dict[str, Any] = {
        "postgresql_conf": {entry.name: entry.value for entry in advice.settings},
        "pg_hba_conf": {**asdict(advice.hba), "line": str(advice.hba)},
    }
    if findings is not None:
        document["audit"] = [asdict(each) for each in findings]
        document["mismatches"] = sum(each.status == "mismatch" for each in findings)
    sys.stdout.write(f"{json.dumps(document, indent=2)}\n")
