"""The command line over finished files, a module for each verb."""

from .main import main
from .process import leave

__all__ = ["leave", "main"]
