"""LoRA Compress: prune, quantize and pack the LoRA of image models.

The core: it knows no trainer and no host program. `compress` and `save` make a file, `load_lora` opens any.
"""

from .api import (
    apply_quantization,
    combined_compression,
    evaluate_lora_performance,
    load_compressed_lora,
    prune_lora_rank,
    quantize_lora_weights,
    save_compressed_lora,
)
from .engine.in_memory import CompressedLora, compress, estimate_size, kohya_partner, opened_by, save
from .engine.to_file import compress_file
from .engine.unpack import expand_file, truncate_file
from .errors import EvaluationError, FormatError, LoraCompressError, SaveError, SettingsError
from .files.writer import atomic_path
from .layouts import as_kohya
from .packed.file import is_packed
from .quantization import check_quantization_support
from .report import CompressionReport, settings_table
from .report.file_report import FileReport, ModuleReport
from .settings import (
    AdaptiveSettings,
    BudgetSettings,
    CompressionSettings,
    EvaluationSettings,
    PruningSettings,
    QatSettings,
    QuantizationSettings,
    TrainingSettings,
    refuse_setting,
    setting_names,
    split_settings,
)
from .sources import LoraSource
from .sources.load import LoraFile, load_lora
from .sources.open import open_lora
from .spectrum import Spectrum, thin_svd
from .update import LowRankUpdate

__version__ = "0.1.0"

__all__ = [
    "AdaptiveSettings",
    "BudgetSettings",
    "CompressedLora",
    "CompressionReport",
    "CompressionSettings",
    "EvaluationError",
    "EvaluationSettings",
    "FileReport",
    "FormatError",
    "LoraCompressError",
    "LoraFile",
    "LoraSource",
    "LowRankUpdate",
    "ModuleReport",
    "PruningSettings",
    "QatSettings",
    "QuantizationSettings",
    "SaveError",
    "SettingsError",
    "Spectrum",
    "TrainingSettings",
    "apply_quantization",
    "as_kohya",
    "atomic_path",
    "check_quantization_support",
    "combined_compression",
    "compress",
    "compress_file",
    "estimate_size",
    "evaluate_lora_performance",
    "expand_file",
    "is_packed",
    "kohya_partner",
    "load_compressed_lora",
    "load_lora",
    "open_lora",
    "opened_by",
    "prune_lora_rank",
    "quantize_lora_weights",
    "refuse_setting",
    "save",
    "save_compressed_lora",
    "setting_names",
    "settings_table",
    "split_settings",
    "thin_svd",
    "truncate_file",
]
