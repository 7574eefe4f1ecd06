"""The command line over finished files, a module for each verb."""

from .main import main

__all__ = ["main"]
