"""Selling tickets."""

from __future__ import annotations

from functools import partial

from django.db import transaction

from .mailing import mail_soon
from .models import Show, Ticket


class SoldOutError(Exception):
    """No seat is left."""


@transaction.atomic
def sell(title: str, email: str) -> Ticket:
    """Take a seat for a buyer, who gets the ticket by mail when all of it is committed."""
    show = Show.objects.select_for_update().get(title=title)
    if show.seats == 0:
        raise SoldOutError(title)
    show.seats -= 1
    show.save(update_fields=["seats"])
    ticket = Ticket.objects.create(show=show, email=email)
    transaction.on_commit(partial(mail_soon, ticket.pk))
    return ticket


@transaction.atomic
def sell_all(title: str, emails: list[str]) -> list[Ticket]:
    """Sell one to each of these buyers, or none at all."""
    return [sell(title, email) for email in emails]
