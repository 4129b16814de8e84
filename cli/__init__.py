"""The command `diffray`."""

from .app import main

__all__ = ["main"]
