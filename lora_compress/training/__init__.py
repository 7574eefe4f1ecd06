"""Compression while a network learns: pruning and quantization attached to any pairs of down and up layers."""

from .calibration import calibration_path, write_calibration
from .controller_session import SessionController
from .pairs import Pair, find_pairs, live_weight
from .schedule import Timeline
from .session import TrainingSession

__all__ = [
    "Pair",
    "SessionController",
    "Timeline",
    "TrainingSession",
    "calibration_path",
    "find_pairs",
    "live_weight",
    "write_calibration",
]
