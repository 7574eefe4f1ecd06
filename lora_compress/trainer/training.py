"""Trains a LoRA of a diffusers pipeline with accelerate, diffusers and PEFT alone, pruned and quantized as settings say."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.in_memory import plain_partner, save
from ..errors import FormatError, LoraCompressError
from ..evaluation.validation import Validation
from ..files.writer import atomic_path, write_safetensors
from ..layouts.plain import PlainKeys
from ..training import TrainingSession, find_pairs
from ..training.evaluator import Evaluator, kept_random_states, undisturbed
from ..training.state_folder import whole_folder
from ..update import LowRankUpdate
from .base import add_adapters
from .denoising import Denoiser, load_denoiser
from .drawing import draw_share, read_samples, save_samples
from .options import Plan, find_pictures, make_optimizer, read_plan
from .progress import Batches, Progress, check_state_folder, steps_of_epoch

__all__ = ["train"]

logger = logging.getLogger(__name__)

_PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "float": torch.float32, "no": torch.float32}
_TOLD = 50  # steps between two lines of the log
_PEFT_KEYS = PlainKeys("{}.lora_A.weight", "{}.lora_B.weight", None)


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
    plan = read_plan(config)
    accelerator = Accelerator(mixed_precision=plan.options["mixed_precision"])
    torch.manual_seed(plan.options["seed"])
    files = find_pictures(plan.options)
    plan = plan.in_steps(steps_of_epoch(len(files), plan.options["train_batch_size"], accelerator.num_processes))
    options = plan.options
    evaluator = _evaluator(plan)
    denoiser = load_denoiser(
        str(options["pretrained_model_name_or_path"]), options["resolution"], _PRECISIONS[options["mixed_precision"]]
    )
    pairs, groups = add_adapters(denoiser, options, accelerator.device)
    denoiser.pipe.to(accelerator.device)
    steps = options["max_train_steps"]
    session = TrainingSession(pairs, plan.compression, total_steps=steps)
    optimizer = make_optimizer(str(options["optimizer_type"]), groups)
    warmup = options["lr_warmup_steps"]
    rates = get_scheduler(options["lr_scheduler"], optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    latents = {path: denoiser.encode(path) for path, _ in files}
    pictures = [(latents[path], caption) for path, caption in files]
    batches = Batches(pictures, options["train_batch_size"], options["seed"], accelerator)
    progress = Progress(session, optimizer, rates, batches)
    accelerator.register_for_checkpointing(progress)
    run = _Run(plan, accelerator, denoiser, progress, evaluator)
    torch.manual_seed(options["seed"] + 1 + accelerator.process_index)  # each process has noise of its own
    if options["resume"]:
        run.resume(Path(options["resume"]))
    while progress.step < steps:
        run.step()
    path = run.finish()
    session.close()
    return path


def _evaluator(plan: Plan) -> Evaluator | None:
    if plan.evaluation is None:
        return None
    with kept_random_states():  # extractors begin with random weights
        return Evaluator(Validation.prepare(plan.evaluation), plan.output(""), plan.adaptive)


class _Run:
    """The steps of a training, and what is due between them."""

    def __init__(self, plan: Plan, accelerator: Any, denoiser: Denoiser, progress: Progress, evaluator: Evaluator | None) -> None:
        self.plan, self.accelerator, self.denoiser, self.progress, self.evaluator = plan, accelerator, denoiser, progress, evaluator
        self.session = progress.session
        self._weights = [weight for pair in self.session.pairs.values() for weight in pair.weights]
        given = plan.options["sample_prompts"]
        self._samples = read_samples(str(given), plan.options["resolution"]) if given else []
        if evaluator is not None:
            evaluator.lead(self.session)

    def step(self) -> None:
        """One step of the optimizer, and whatever is due after it."""
        progress, options = self.progress, self.plan.options
        with self.accelerator.autocast():
            loss = self.denoiser.loss(*progress.batches.take())
        loss.backward()
        _average(self._weights, self.accelerator)
        torch.nn.utils.clip_grad_norm_(self._weights, options["max_grad_norm"] or float("inf"))
        progress.optimizer.step()
        progress.rates.step()
        progress.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        if progress.step % _TOLD == 0 and not bool(loss.isfinite()):
            raise FormatError(
                f"step {progress.step}: the loss is {loss.item()}: the training diverged; what was saved before is unchanged: "
                "resume from there, or begin anew, with a lower learning_rate or mixed_precision=bf16"
            )
        if progress.step % _TOLD == 0 and self.accelerator.is_main_process:
            logger.info("step %d of %d: loss %.4f", progress.step, options["max_train_steps"], loss.item())
        last = progress.step == options["max_train_steps"]
        if self._samples and (last or _due(options["sample_every_n_steps"], progress.step)):
            self._sample()
        if self.evaluator is not None and (
            last or _due(options["validate_every_n_steps"] or progress.batches.per_epoch, progress.step)
        ):
            self._evaluate(self.evaluator)
        if _due(options["save_every_n_steps"], progress.step) and not last:
            self._save(f"-step{progress.step:08d}", options["save_state"])

    def resume(self, folder: Path) -> None:
        """Go on where a state was saved."""
        check_state_folder(folder)
        if self.evaluator is not None:
            self.evaluator.load(folder / "evaluations.jsonl")
        self.progress.load(self.accelerator, str(folder))

    def finish(self) -> Path:
        """Write what is to be written at the end; the path of the LoRA."""
        path = self._save("", self.plan.options["save_state"] or self.plan.options["save_state_on_train_end"])
        if self.evaluator is not None and self.accelerator.is_main_process:
            told = {**vars(self.evaluator.validation.settings), **(self.plan.adaptive or {})}
            if page := self.evaluator.write_report(str(self.plan.options["output_name"]), told):
                logger.info("report: %s", page)
        return path

    def _sample(self) -> None:
        if self.accelerator.is_main_process:
            stem, folder = f"{self.plan.options['output_name']}_{self.progress.step:06d}", self.plan.output("").parent / "sample"
            with undisturbed(self.denoiser.models.values()), self.accelerator.autocast():
                save_samples(self.denoiser.pipe, self._samples, folder, stem, self.plan.options["sample_sampler"])
        self.accelerator.wait_for_everyone()

    def _evaluate(self, evaluator: Evaluator) -> None:
        draw = partial(draw_share, self.denoiser.pipe, evaluator.validation, self.accelerator.autocast)
        entry = evaluator.evaluate(draw, self.denoiser.models.values(), self.progress.step)
        if "error" not in entry and self.accelerator.is_main_process:
            logger.info("%s", evaluator.told(entry))

    def _save(self, suffix: str, state: bool) -> Path:
        """Write the LoRA as it stands; one process does, the others wait."""
        path, options = self.plan.output(f"{suffix}.safetensors"), self.plan.options
        if self.accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            dtype = _PRECISIONS[options["save_precision"]]
            lora = self.session.compress(dtype)
            save(lora, path, dtype)
            if options["save_peft"]:
                _save_peft(lora.updates, self.denoiser, path.with_suffix(".peft.safetensors"), dtype)
        self.accelerator.wait_for_everyone()
        if state:
            folder = self.plan.output(f"{suffix}-state")
            with whole_folder(folder, self.accelerator) as temporary:
                if self.evaluator is not None and self.accelerator.is_main_process:
                    self.evaluator.save(temporary / "evaluations.jsonl")
                self.progress.save(self.accelerator, temporary)
        return path


def _due(every: int | None, step: int) -> bool:
    return every is not None and every > 0 and step % every == 0


def _average(weights: Sequence[Tensor], accelerator: Any) -> None:
    if accelerator.num_processes > 1:
        for weight in weights:
            if weight.grad is not None:
                weight.grad = accelerator.reduce(weight.grad, "mean")


def _save_peft(updates: Mapping[str, LowRankUpdate], denoiser: Denoiser, path: Path, dtype: torch.dtype) -> None:
    """Write what load_lora_weights of any pipeline reads: names of diffusers, alpha = rank in every module."""
    names = {
        f"{prefix}_{name.replace('.', '_')}": f"{component}.{name}"
        for prefix, (component, _) in denoiser.parts.items()
        for name in find_pairs(denoiser.models[component])
    }
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        tensors |= _PEFT_KEYS.tensors(names[name], plain_partner(update, dtype, has_alpha=False))
    with atomic_path(path) as temporary:
        write_safetensors(tensors, temporary, {})
