"""Tickets for shows."""
