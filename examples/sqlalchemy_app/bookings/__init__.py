"""Rooms, and who has booked them."""
