"""The rolled-back transaction that all connections of a test share."""

from .sandbox import Sandbox

__all__ = ["Sandbox"]
