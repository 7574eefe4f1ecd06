"""LoRA Compress: prune, quantize and pack the LoRA of image models.

The core: it knows no trainer and no host program. `compress` and `save` make a file, `load_lora` opens any.
"""

from .container import is_packed
from .errors import FormatError, LoraCompressError, SaveError, SettingsError
from .files import atomic_path
from .layouts import LoraSource, as_kohya, open_lora
from .loading import LoraFile, load_lora
from .pipeline import CompressedLora, compress, estimate_size, kohya_partner, opened_by, save
from .report import CompressionReport, settings_table
from .settings import (
    BudgetSettings,
    CompressionSettings,
    PruningSettings,
    QuantizationSettings,
    refuse_setting,
    setting_names,
    split_settings,
)
from .spectrum import Spectrum, thin_svd
from .update import LowRankUpdate

__version__ = "0.1.0"

__all__ = [
    "BudgetSettings",
    "CompressedLora",
    "CompressionReport",
    "CompressionSettings",
    "FormatError",
    "LoraCompressError",
    "LoraFile",
    "LoraSource",
    "LowRankUpdate",
    "PruningSettings",
    "QuantizationSettings",
    "SaveError",
    "SettingsError",
    "Spectrum",
    "as_kohya",
    "atomic_path",
    "compress",
    "estimate_size",
    "is_packed",
    "kohya_partner",
    "load_lora",
    "open_lora",
    "opened_by",
    "refuse_setting",
    "save",
    "setting_names",
    "settings_table",
    "split_settings",
    "thin_svd",
]
