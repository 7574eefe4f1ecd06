"""What can be set: one frozen dataclass per feature, read from strings or TOML values, validated once, all problems at a time."""

from .adaptive import AdaptiveSettings
from .budget import BudgetSettings, parse_size
from .compression import SAVE_FORMATS, SECTIONS, CompressionSettings, setting_names, split_settings
from .evaluation import EXTRACTOR_NAMES, EvaluationSettings
from .host_lists import split_pairs
from .host_option import HostOption, describe_value, is_same_value
from .host_values import read_host_value
from .parsing import read_config, read_toml, refuse_setting
from .pruning import PruningSettings
from .quantization import QuantizationSettings, allows_bits, bits_table
from .training import QatSettings, TrainingSettings

__all__ = [
    "EXTRACTOR_NAMES",
    "SAVE_FORMATS",
    "SECTIONS",
    "AdaptiveSettings",
    "BudgetSettings",
    "CompressionSettings",
    "EvaluationSettings",
    "HostOption",
    "PruningSettings",
    "QatSettings",
    "QuantizationSettings",
    "TrainingSettings",
    "allows_bits",
    "bits_table",
    "describe_value",
    "is_same_value",
    "parse_size",
    "read_config",
    "read_host_value",
    "read_toml",
    "refuse_setting",
    "setting_names",
    "split_pairs",
    "split_settings",
]
