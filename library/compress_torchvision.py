"""Lets torchvision import beside a CPU-only torch by declaring the two operators whose schemas it then lacks.

PyPI's torchvision for Linux is built for CUDA. Beside a CPU-only torch its C++ extension cannot be loaded: it links to libcudart
and libtorch_cuda. torchvision tolerates that, but its _meta_registrations.py goes on to register shape functions for
`torchvision::nms` and `torchvision::qnms`, which the extension would have declared, and the import ends in
"RuntimeError: operator torchvision::nms does not exist". With the schemas declared, all that is written in Python (transforms,
models, datasets) works; calling the two operators says that they have no kernel.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import sys
from pathlib import Path

__all__ = ["declare_missing_operators"]

# torchvision/csrc/ops/nms.cpp and quantized/cpu/qnms_kernel.cpp
_SCHEMAS = {
    "torchvision::nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "torchvision::qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_CUDA_LIBRARY = re.compile(r"libcudart|libc10_cuda|libtorch_cuda", flags=re.IGNORECASE)


def declare_missing_operators() -> bool:
    """Declares the operators when, and only when, torchvision cannot import for want of them; True if it did.

    The condition: torchvision is installed and not imported yet, torch has neither CUDA nor ROCm, and the loader refuses
    torchvision's extension because a CUDA library is missing. Any other reason (a damaged file, another torch version) is left
    for torchvision to report. Where the extension loads, this has merely loaded it a moment before torchvision does.
    """
    extension = _find_extension()
    if "torchvision" in sys.modules or extension is None:
        return False
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None or not _lacks_cuda(extension):
        return False
    missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name.rpartition(":")[2])]
    for name in missing:
        torch.library.define(name, _SCHEMAS[name])
    return bool(missing)


def _find_extension() -> Path | None:
    """The file of torchvision's C++ extension, found without importing torchvision."""
    spec = importlib.util.find_spec("torchvision") if "torchvision" not in sys.modules else None
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    files = (folder / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def _lacks_cuda(extension: Path) -> bool:
    """Whether loading the extension as torchvision does fails for want of a CUDA library."""
    import torch

    try:
        torch.ops.load_library(str(extension))
    except OSError as error:
        return _CUDA_LIBRARY.search(f"{error} {error.__cause__}") is not None
    return False
