"""What is told of a compression."""

from .table import CompressionReport, PartReport, settings_table

__all__ = ["CompressionReport", "PartReport", "settings_table"]
