"""What can be set: one frozen dataclass per feature, read from strings or TOML values, validated once, all problems at a time."""

from .budget import BudgetSettings, parse_size
from .compression import SAVE_FORMATS, CompressionSettings, refuse_setting, setting_names, split_settings
from .pruning import PruningSettings
from .quantization import BITS_TABLE, QuantizationSettings
from .training import QatSettings, TrainingSettings

__all__ = [
    "BITS_TABLE",
    "SAVE_FORMATS",
    "BudgetSettings",
    "CompressionSettings",
    "PruningSettings",
    "QatSettings",
    "QuantizationSettings",
    "TrainingSettings",
    "parse_size",
    "refuse_setting",
    "setting_names",
    "split_settings",
]
