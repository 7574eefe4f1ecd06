"""Trains a LoRA of a Stable Diffusion pipeline with accelerate, diffusers and PEFT alone, pruned and quantized as settings say."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraCompressError
from ..pipeline import save
from ..training import Pair, TrainingSession, find_pairs
from .denoising import Denoiser, load_denoiser
from .options import find_pictures, make_optimizer, read_options, resolution

__all__ = ["train"]

logger = logging.getLogger(__name__)

_PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "float": torch.float32}
_TOLD = 50  # steps between two lines of the log


def train(config: Mapping[str, Any]) -> Path:
    """Train as a TOML of kohya's keys says, and write the LoRA; its path.

    Several processes (`accelerate launch --num_processes 2`) take a batch each, and average the gradients of the LoRA's weights:
    nothing else learns, so nothing is wrapped.

    Raises:
        LoraCompressError: no data, a family that is not trained here, wrong settings, PEFT or diffusers missing.
    """
    try:
        from accelerate import Accelerator
        from diffusers.optimization import get_scheduler
        from peft import LoraConfig  # noqa: F401  what add_adapters needs, before minutes of loading
    except ImportError as error:
        raise LoraCompressError(f"--host diffusers needs accelerate, diffusers and peft ({error}): pip install them") from error
    options, settings = read_options(config)
    accelerator = Accelerator(mixed_precision=options["mixed_precision"])
    torch.manual_seed(int(options["seed"]))
    files = find_pictures(options)
    denoiser = load_denoiser(str(options["pretrained_model_name_or_path"]), resolution(options))
    pairs, groups = add_adapters(denoiser, options)
    denoiser.pipe.to(accelerator.device)
    steps, weights = int(options["max_train_steps"]), [weight for pair in pairs.values() for weight in pair.weights]
    session = TrainingSession(pairs, settings, total_steps=steps)
    optimizer = make_optimizer(str(options["optimizer_type"]), groups)
    warmup = int(options["lr_warmup_steps"])
    rates = get_scheduler(options["lr_scheduler"], optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    encoded = {path: denoiser.encode(path) for path, _ in files}
    batches = _batches([(encoded[path], caption) for path, caption in files], options, accelerator)
    torch.manual_seed(int(options["seed"]) + 1 + accelerator.process_index)  # each process has noise of its own
    for step in range(1, steps + 1):
        with accelerator.autocast():
            loss = denoiser.loss(*next(batches))
        loss.backward()
        _average(weights, accelerator)
        torch.nn.utils.clip_grad_norm_(weights, float(options["max_grad_norm"]) or float("inf"))
        optimizer.step()
        rates.step()
        optimizer.zero_grad(set_to_none=True)
        if step % _TOLD == 0 and accelerator.is_main_process:
            logger.info("step %d of %d: loss %.4f", step, steps, loss.item())
        every = options["save_every_n_steps"]
        if every and step % int(every) == 0 and step < steps:
            _save(session, options, accelerator, f"-step{step:08d}")
    path = _save(session, options, accelerator, "")
    session.close()
    return path


def add_adapters(denoiser: Denoiser, options: Mapping[str, Any]) -> tuple[dict[str, Pair], list[dict[str, Any]]]:
    """Pairs of PEFT by kohya's names, and the groups of their weights for an optimizer; a learning rate of 0 leaves a model out."""
    from peft import LoraConfig

    pairs: dict[str, Pair] = {}
    groups = []
    denoiser.pipe.vae.requires_grad_(False)
    for prefix, (module, targets) in denoiser.parts.items():
        module.requires_grad_(False)
        module.train()
        rate = float(options["unet_lr" if prefix == "lora_unet" else "text_encoder_lr"])
        if not rate:
            continue
        rank, alpha = int(options["network_dim"]), float(options["network_alpha"])
        module.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)))  # type: ignore[arg-type, operator]
        if options["gradient_checkpointing"]:
            _checkpoint(module)
        found = _kohya_names(find_pairs(module), prefix)
        groups.append({"params": [weight for pair in found.values() for weight in pair.weights], "lr": rate})
        pairs |= found
    return pairs, groups


def _checkpoint(module: Any) -> None:
    """Blocks are computed again in the backward pass, without torch's reentrant way."""
    if hasattr(module, "enable_gradient_checkpointing"):  # of diffusers, which is never reentrant
        module.enable_gradient_checkpointing()
    else:
        module.gradient_checkpointing_enable({"use_reentrant": False})


def _kohya_names(pairs: Mapping[str, Pair], prefix: str) -> dict[str, Pair]:
    named = {name: f"{prefix}_{name.replace('.', '_')}" for name in pairs}
    return {named[name]: replace(pair, name=named[name], module=named[name]) for name, pair in pairs.items()}


def _batches(
    pictures: Sequence[tuple[Tensor, str]], options: Mapping[str, Any], accelerator: Any
) -> Iterator[tuple[Tensor, list[str]]]:
    """Latents and captions without end; all processes shuffle alike, and each takes its own of as many batches as there are."""
    random = torch.Generator().manual_seed(int(options["seed"]))
    own, world = int(options["train_batch_size"]), accelerator.num_processes
    order: list[int] = []
    while True:
        while len(order) < own * world:
            order += torch.randperm(len(pictures), generator=random).tolist()
        taken, order = order[: own * world], order[own * world :]
        chosen = [pictures[i] for i in taken[own * accelerator.process_index :][:own]]
        yield torch.cat([latents for latents, _ in chosen]), [caption for _, caption in chosen]


def _average(weights: Sequence[Tensor], accelerator: Any) -> None:
    if accelerator.num_processes > 1:
        for weight in weights:
            if weight.grad is not None:
                weight.grad = accelerator.reduce(weight.grad, "mean")


def _save(session: TrainingSession, options: Mapping[str, Any], accelerator: Any, suffix: str) -> Path:
    """Write the LoRA as it stands; one process does, the others wait."""
    path = Path(options["output_dir"]) / f"{options['output_name']}{suffix}.safetensors"
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        dtype = _PRECISIONS[options["save_precision"]]
        save(session.compress(dtype), path, dtype)
    accelerator.wait_for_everyone()
    return path
