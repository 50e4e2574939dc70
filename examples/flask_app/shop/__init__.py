"""A shop: products, and their sale."""

from .app import app

__all__ = ["app"]
