"""Shows, and the tickets that were sold for them."""

from __future__ import annotations

from django.db import models


class Show(models.Model):
    title = models.CharField(max_length=100, unique=True)
    seats = models.PositiveIntegerField(help_text="how many are left")


class Ticket(models.Model):
    show = models.ForeignKey(Show, on_delete=models.PROTECT, related_name="tickets")
    email = models.EmailField()
    mailed = models.BooleanField(default=False)
