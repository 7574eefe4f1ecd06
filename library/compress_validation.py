"""What is mixed into a trainer to measure it while it runs: validation pictures by the host's own sampling."""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from library import train_util
from lora_compress import EvaluationError, EvaluationSettings
from lora_compress.evaluation.pictures import PictureFolder
from lora_compress.evaluation.validation import Validation
from lora_compress.training.evaluator import Evaluator, kept_random_states

__all__ = ["ValidationMixin"]

_STATE_FILE = "compress_evaluations.jsonl"  # in a folder of --save_state


class ValidationMixin:
    """Goes before a NetworkTrainer of sd-scripts (v0.10.0 to v0.11.1) among the bases of a trainer.

    Does nothing unless `args.evaluation`, settings as a list of key=value, is given. With `args.adaptive`, likewise, each
    evaluation may change the compression of the steps that follow.
    """

    _evaluator: Evaluator | None = None
    _steps_per_epoch = 0
    _trained: Any = None

    def assert_extra_args(self, args: argparse.Namespace, *groups: Any) -> None:
        """The host's; then reads the held-out pictures: the data sets are known here and no model is loaded yet."""
        super().assert_extra_args(args, *groups)  # type: ignore[misc]
        if args.evaluation is not None:
            settings = EvaluationSettings.parse(_parsed(args.evaluation))
            with kept_random_states():
                validation = Validation.prepare(settings, _split_of(*groups[1:2]))
            adaptive = _parsed(args.adaptive) if args.adaptive is not None else None
            self._evaluator = Evaluator(validation, Path(args.output_dir or ".") / (args.output_name or "lora"), adaptive)

    def cache_text_encoder_outputs_if_needed(self, args: argparse.Namespace, *rest: Any) -> None:
        """The host's, which reads the sample prompts where it encodes texts once and for all: ours are among them meanwhile."""
        given = args.sample_prompts
        if self._evaluator is None or (given is not None and not os.path.isfile(given)):
            super().cache_text_encoder_outputs_if_needed(args, *rest)  # type: ignore[misc]
            return
        theirs = train_util.load_prompts(given) if given is not None else []
        with tempfile.TemporaryDirectory() as folder:
            args.sample_prompts = _write_prompts(folder, [*theirs, *self._evaluator.validation.host_prompts()])
            try:
                super().cache_text_encoder_outputs_if_needed(args, *rest)  # type: ignore[misc]
            finally:
                args.sample_prompts = given

    def post_process_network(self, args: argparse.Namespace, accelerator: Any, network: Any, *rest: Any) -> None:
        """The host's; then lets the history be saved and loaded with the state of the training."""
        super().post_process_network(args, accelerator, network, *rest)  # type: ignore[misc]
        if self._evaluator is None:
            return
        self._trained, evaluator = network, self._evaluator

        def save(models: Any, weights: Any, folder: str) -> None:
            if accelerator.is_main_process:
                evaluator.save(Path(folder) / _STATE_FILE)

        def load(models: Any, folder: str) -> None:
            evaluator.load(Path(folder) / _STATE_FILE)
            self._lead(evaluator)

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)

    def update_metadata(self, metadata: dict[str, Any], args: argparse.Namespace) -> None:
        """The host's; here it tells how long an epoch is, and the network is complete."""
        super().update_metadata(metadata, args)  # type: ignore[misc]
        if self._evaluator is not None:
            self._lead(self._evaluator)
        self._steps_per_epoch = -(-int(metadata["ss_num_batches_per_epoch"]) // args.gradient_accumulation_steps)

    def train(self, args: argparse.Namespace) -> None:
        """The host's, then a page about what was measured beside the last file."""
        super().train(args)  # type: ignore[misc]
        if self._evaluator is None or int(os.environ.get("RANK", "0")):
            return
        settings = _parsed([*args.evaluation, *(args.adaptive or ())])
        if path := self._evaluator.write_report(args.output_name or "lora", settings):
            tqdm.write(f"report: {path}")

    def _lead(self, evaluator: Evaluator) -> None:
        if hasattr(self._trained, "session"):
            evaluator.lead(self._trained.session)

    def sample_images(self, accelerator: Any, args: argparse.Namespace, epoch: int | None, global_step: int, *models: Any) -> None:
        """The host's, with the optimizer in the mode for it; then, after a step where it is due, ours."""
        super().sample_images(accelerator, args, epoch, global_step, *models)  # type: ignore[misc]
        if self._evaluator is not None and epoch is None and self._is_due(args, global_step):
            self._validate(self._evaluator, accelerator, args, global_step, models)

    def _is_due(self, args: argparse.Namespace, step: int) -> bool:
        """By validate_every_n_steps or _epochs, or both; every epoch where neither is given. Epochs end with the last step."""
        if args.validate_every_n_steps and step % args.validate_every_n_steps == 0:
            return True
        if args.validate_every_n_steps and not args.validate_every_n_epochs:
            return False
        every = self._steps_per_epoch * (args.validate_every_n_epochs or 1)
        return step % every == 0 or step == args.max_train_steps

    def _validate(self, evaluator: Evaluator, accelerator: Any, args: argparse.Namespace, step: int, models: Any) -> None:
        """Measure, and tell it."""
        draw = partial(self._drawn, evaluator.validation, accelerator, args, step, models)
        epoch = -(-step // self._steps_per_epoch)
        entry = evaluator.evaluate(draw, [self._trained, *_modules_of(models)], step, epoch)
        if not accelerator.is_main_process or "error" in entry:
            return
        tqdm.write(evaluator.told(entry))
        numbers = {f"evaluation/{name}": value for name, value in evaluator.validation.plain_numbers(entry).items()}
        if numbers and accelerator.trackers:
            self.step_logging(accelerator, numbers, step, epoch)  # type: ignore[attr-defined]

    def _drawn(
        self,
        validation: Validation,
        accelerator: Any,
        args: argparse.Namespace,
        step: int,
        models: Any,
        share: Sequence[int],
        other_noise: bool,
    ) -> Tensor:
        """Features of this process's share, every n-th prompt as the host shares them."""
        with tempfile.TemporaryDirectory() as folder, _without_trackers(accelerator), _without_messages():
            once = argparse.Namespace(**vars(args))
            once.sample_prompts = _write_prompts(folder, validation.host_prompts(other_noise=other_noise))
            once.sample_every_n_steps, once.sample_every_n_epochs, once.sample_batch_size = 1, None, 1
            once.output_dir, once.output_name = folder, None
            super().sample_images(accelerator, once, None, step, *models)  # type: ignore[misc]
            paths = sorted(Path(folder, "sample").glob("*.png"), key=lambda path: int(path.name.split("_")[1]))
            if len(paths) != len(share):
                raise EvaluationError(f"sd-scripts drew {len(paths)} of {len(share)} pictures")
            return validation.extractor(PictureFolder(tuple(paths), (), None).batches())


def _parsed(pairs: Iterable[str]) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in pairs)


def _split_of(group: Any = None) -> PictureFolder | None:
    """Pictures and captions of the host's validation data set, by name of the file; None where there is none."""
    if group is None:
        return None
    infos = sorted(group.image_data.values(), key=lambda info: str(info.absolute_path))
    captions = tuple(" ".join(str(info.caption or "").split()) for info in infos)
    return PictureFolder(tuple(Path(info.absolute_path) for info in infos), captions, None)


def _write_prompts(folder: str, prompts: list[dict[str, Any]]) -> str:
    path = Path(folder) / "prompts.json"
    path.write_text(json.dumps(prompts), encoding="utf-8")
    return str(path)


def _modules_of(models: Iterable[Any]) -> Iterator[nn.Module]:
    for model in models:
        if isinstance(model, nn.Module):
            yield model
        elif isinstance(model, (list, tuple)):
            yield from _modules_of(model)


@contextmanager
def _without_trackers(accelerator: Any) -> Iterator[None]:
    """The host sends every picture that it draws to W&B."""
    trackers, accelerator.trackers = accelerator.trackers, []
    try:
        yield
    finally:
        accelerator.trackers = trackers


@contextmanager
def _without_messages() -> Iterator[None]:
    """The host logs eight lines and a progress bar for every picture."""
    before, begin_bar = logging.root.manager.disable, tqdm.__init__
    logging.disable(logging.INFO)
    tqdm.__init__ = partialmethod(begin_bar, disable=True)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        logging.disable(before)
        tqdm.__init__ = begin_bar  # type: ignore[method-assign]
