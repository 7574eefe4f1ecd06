"""A folder of captioned pictures, checked as a whole before anything is drawn or measured."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import EvaluationError

__all__ = ["PICTURE_ENDINGS", "PictureFolder", "read_pictures"]

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_CAPTIONS = (".txt", ".caption")


@dataclass(frozen=True)
class PictureFolder:
    """Pictures that are read when they are asked for.

    Args:
        paths: sorted.
        captions: of each; empty if they were not asked for.
        resolution: every picture is scaled and centre-cropped to this square; None leaves them as they are, all of one size.
    """

    paths: tuple[Path, ...]
    captions: tuple[str, ...]
    resolution: int | None

    def __len__(self) -> int:
        return len(self.paths)

    def batches(self, size: int = 32) -> Iterator[Tensor]:
        """The pictures, uint8 (n, 3, H, W).

        Raises:
            EvaluationError: one cannot be read.
        """
        for begin in range(0, len(self), size):
            yield torch.stack([self._read(path) for path in self.paths[begin : begin + size]])

    @cached_property
    def key(self) -> str:
        """Of what is in the pictures, whatever they are called: a hash of their bytes and of the resolution."""
        digests = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in self.paths)
        return hashlib.sha256("\n".join([str(self.resolution), *digests]).encode()).hexdigest()

    def _read(self, path: Path) -> Tensor:
        try:
            with Image.open(path) as file:
                picture = file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise _broken(path, error) from error
        if self.resolution is not None:
            picture = _cropped(picture, self.resolution)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def read_pictures(
    folder: str | os.PathLike[str], *, resolution: int | None = None, captions: bool = True, least: int = 2
) -> PictureFolder:
    """The pictures of a folder and of those in it, such as kohya's `10_name`.

    Args:
        folder: with .png, .jpg, .webp or .bmp files; captions beside them, in .txt or .caption files.
        resolution: scale the shorter side to this and crop the centre.
        captions: whether every picture must have one.
        least: pictures that are needed.

    Raises:
        EvaluationError: no such folder, no or too few pictures, one that cannot be read, sizes that differ, a caption missing.
    """
    root = Path(folder)
    if not root.is_dir():
        raise EvaluationError(f"{folder}: is no folder: name the folder that holds the pictures and their captions")
    paths = tuple(sorted(path for path in root.rglob("*") if path.suffix.lower() in PICTURE_ENDINGS and path.is_file()))
    if not paths:
        raise EvaluationError(f"{folder}: holds no pictures ({', '.join(PICTURE_ENDINGS)}), nor do the folders in it")
    if len(paths) < least:
        raise EvaluationError(f"{folder}: holds 1 picture: a distance between sets needs {least} or more, 50 to mean anything")
    sizes = {path: _size(path) for path in paths}
    first = paths[0]
    for path, size in sizes.items():
        if resolution is None and size != sizes[first]:
            raise EvaluationError(
                f"{folder}: pictures differ in size ({first.name} is {_times(sizes[first])}, {path.name} {_times(size)}): "
                f"give a resolution, --resolution {_usual(sizes[first])}, to have all scaled and their centres cropped"
            )
    return PictureFolder(paths, tuple(map(_caption, paths)) if captions else (), resolution)


def _caption(path: Path) -> str:
    for ending in _CAPTIONS:
        beside = path.with_suffix(ending)
        if beside.is_file():
            text = beside.read_text(encoding="utf-8", errors="replace").strip()
            if not text:
                raise EvaluationError(f"{beside}: is empty: write what {path.name} shows, or give --prompts FILE")
            return " ".join(text.split())
    raise EvaluationError(
        f"{path}: has no caption: write what it shows into {path.with_suffix('.txt').name}, or give --prompts FILE"
    )


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as file:
            return file.size
    except (OSError, SyntaxError, ValueError) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> EvaluationError:
    reason = "no picture" if "cannot identify" in str(error) else str(error)
    return EvaluationError(f"{path}: cannot be read as a picture ({reason}): replace it or take it out of the folder")


def _cropped(picture: Image.Image, side: int) -> Image.Image:
    """Scaled until the shorter side is `side`, with the filter that is right for making pictures smaller, then its centre."""
    scale = side / min(picture.size)
    wide, high = (max(round(length * scale), side) for length in picture.size)
    scaled = picture.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - side) // 2, (high - side) // 2
    return scaled.crop((left, top, left + side, top + side))


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _usual(size: tuple[int, int]) -> int:
    return max(min(size) // 64 * 64, 64)
