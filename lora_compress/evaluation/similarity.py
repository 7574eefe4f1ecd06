"""How alike two pictures of the same prompt and seed are: SSIM, the cosine of features, LPIPS."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import EvaluationError

__all__ = ["feature_cosine", "load_lpips", "structural_similarity"]

_WINDOW, _SIGMA = 11, 1.5
_STABLE = (0.01**2, 0.03**2)  # of values in [0, 1]


def structural_similarity(first: Tensor, second: Tensor) -> Tensor:
    """SSIM of each pair of pictures, uint8 (N, 3, H, W) to (N,), float64; 1 where they are equal.

    Mean over channels and the places where an 11 x 11 Gaussian window of sigma 1.5 lies inside the picture (Wang et al., IEEE TIP
    13, 2004, with its constants and window).

    Raises:
        EvaluationError: shapes that differ, or pictures smaller than the window.
    """
    if first.shape != second.shape or min(first.shape[2:]) < _WINDOW:
        raise EvaluationError(
            f"pictures are {tuple(first.shape)} and {tuple(second.shape)}: SSIM is of equal sizes, {_WINDOW} pixels and more"
        )
    return torch.cat([_similarities(*pair) for pair in zip(first.split(16), second.split(16), strict=True)])


def feature_cosine(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of the angle between the features of each pair, (N, d) and (N, d) to (N,)."""
    return F.cosine_similarity(first.double(), second.double(), dim=1)


def load_lpips(device: str = "cpu") -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS with AlexNet (Zhang et al., arXiv 1801.03924), uint8 (N, 3, H, W) pairs to (N,); 0 where they are equal.

    Raises:
        EvaluationError: the package is missing, or AlexNet's weights are not here and cannot be downloaded.
    """
    try:
        import lpips
    except ImportError as error:
        raise EvaluationError("LPIPS: needs its package: pip install lpips") from error
    try:
        model = lpips.LPIPS(net="alex", verbose=False).to(device).eval().requires_grad_(False)
    except Exception as error:  # what urllib and torch raise has no common base
        raise EvaluationError(
            f"LPIPS: AlexNet's weights cannot be had ({error}): download "
            "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth into ~/.cache/torch/hub/checkpoints"
        ) from error

    def distance(first: Tensor, second: Tensor) -> Tensor:
        pairs = zip(first.split(16), second.split(16), strict=True)
        return torch.cat([model(*(side.to(device).float() / 127.5 - 1.0 for side in pair)).flatten().cpu() for pair in pairs])

    return distance


def _similarities(first: Tensor, second: Tensor) -> Tensor:
    x, y = first.double() / 255.0, second.double() / 255.0
    places = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    line = torch.exp(-places.square() / (2.0 * _SIGMA**2))
    line = (line / line.sum()).to(x.device)

    def blurred(values: Tensor) -> Tensor:
        rows = F.conv2d(values.flatten(0, 1).unsqueeze(1), line.view(1, 1, 1, -1))
        return F.conv2d(rows, line.view(1, 1, -1, 1)).view(len(values), 3, *[size - _WINDOW + 1 for size in values.shape[2:]])

    mean_x, mean_y = blurred(x), blurred(y)
    variance_x, variance_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    brightness = (2 * mean_x * mean_y + _STABLE[0]) / (mean_x**2 + mean_y**2 + _STABLE[0])
    structure = (2 * covariance + _STABLE[1]) / (variance_x + variance_y + _STABLE[1])
    return (brightness * structure).flatten(1).mean(dim=1)
