"""Pictures on the way: samples of prompts, and those that [evaluation] measures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SettingsError
from ..evaluation.base_model import draw
from ..evaluation.prompts import read_prompts
from ..evaluation.validation import Validation

__all__ = ["draw_share", "read_samples", "save_samples"]

_FLAG = re.compile(r"\s--(?=[a-z]+\s)")
_FLAGS = {  # of kohya's prompt files, and what a pipeline calls them
    "n": ("negative_prompt", str),
    "w": ("width", int),
    "h": ("height", int),
    "s": ("num_inference_steps", int),
    "l": ("guidance_scale", float),
    "d": ("seed", int),
}


def read_samples(path: str, size: tuple[int, int]) -> list[dict[str, Any]]:
    """What a pipeline is asked for by each line of a file: a prompt, and kohya's flags --n --w --h --s --l --d.

    Raises:
        EvaluationError: there is no such file, or nothing in it.
        SettingsError: a flag is unknown, or its value no number.
    """
    found = []
    for number, line in enumerate(read_prompts(path)):
        prompt, *flags = _FLAG.split(f" {line}")
        asked: dict[str, Any] = {"prompt": prompt.strip(), "width": size[0], "height": size[1], "seed": number}
        for flag in flags:
            name, _, value = flag.strip().partition(" ")
            try:
                key, kind = _FLAGS[name]
                asked[key] = kind(value.strip())
            except (KeyError, ValueError):
                raise SettingsError([f"--{flag.strip()}: not one of --{', --'.join(_FLAGS)} with its value"], path) from None
        found.append(asked)
    return found


@torch.no_grad()
def save_samples(pipe: Any, samples: Sequence[Mapping[str, Any]], folder: Path, stem: str, sampler: str | None) -> None:
    """Draw, each picture from its own seed, and write <stem>_<number>.png to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with _sampler(pipe, sampler):
        for number, sample in enumerate(samples):
            asked = dict(sample)
            noise = torch.Generator().manual_seed(asked.pop("seed"))
            pipe(**asked, generator=noise).images[0].save(folder / f"{stem}_{number:02d}.png")


def draw_share(
    pipe: Any, validation: Validation, autocast: Callable[[], AbstractContextManager[Any]], share: Sequence[int], other_noise: bool
) -> Tensor:
    """Features (n, d) of the pictures whose indices are `share`, drawn within `autocast`."""
    asked = [validation.host_prompts(other_noise=other_noise)[index] for index in share]
    settings = validation.settings
    guidance = settings.guidance if settings.embedded_guidance is None else settings.embedded_guidance
    options: dict[str, Any] = {"steps": settings.steps, "resolution": settings.size, "guidance": guidance}
    with autocast():
        pictures = draw(pipe, [each["prompt"] for each in asked], seeds=[each["seed"] for each in asked], **options)
    return validation.extractor(pictures)


@contextmanager
def _sampler(pipe: Any, name: str | None) -> Iterator[None]:
    """DDIM instead of the model's own scheduler, where that is asked for."""
    own = pipe.scheduler
    if name == "ddim":
        from diffusers import DDIMScheduler

        pipe.scheduler = DDIMScheduler.from_config(own.config)
    try:
        yield
    finally:
        pipe.scheduler = own
