"""Mailing tickets in threads, so that their buyers need not wait."""

from __future__ import annotations

from threading import Thread
from typing import Final

from django.core.mail import send_mail
from django.db import connection

from .models import Ticket

_under_way: Final[set[Thread]] = set()


def mail_soon(pk: int) -> None:
    thread = Thread(target=_mail, args=[pk])
    _under_way.add(thread)
    thread.start()


def wait() -> None:
    """Wait until no mail is under way."""
    while _under_way:
        _under_way.pop().join()


def _mail(pk: int) -> None:
    try:
        ticket = Ticket.objects.select_related("show").get(pk=pk)
        send_mail(ticket.show.title, f"Ticket {pk}", "office@tickets.example", [ticket.email])
        ticket.mailed = True
        ticket.save(update_fields=["mailed"])
    finally:
        connection.close()
