"""What is mixed into a trainer to measure it while it runs: validation pictures by the host's own sampling, and their history."""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from tqdm import tqdm

from library import train_util
from lora_compress import AdaptiveSettings, EvaluationError, EvaluationSettings, LoraCompressError, SaveError, SettingsError
from lora_compress.evaluation.pictures import PictureFolder
from lora_compress.evaluation.validation import Validation, read_history, write_history
from lora_compress.report.html import write_page
from lora_compress.report.html_history import history_page
from lora_compress.training import SessionController

__all__ = ["ValidationMixin"]

logger = logging.getLogger(__name__)

_STATE_FILE = "compress_evaluations.jsonl"  # in a folder of --save_state


class ValidationMixin:
    """Goes before a NetworkTrainer of sd-scripts (v0.10.0 to v0.11.1) among the bases of a trainer.

    Does nothing unless `args.evaluation`, settings as a list of key=value, is given. The training goes on as if nothing had been
    measured: random states, modes of modules, gradients and weights are what they were. With `args.adaptive`, likewise, each
    evaluation may change the compression of the steps that follow.
    """

    _validation: Validation | None = None
    _steps_per_epoch = 0
    _trained: Any = None
    _controller: SessionController | None = None

    def assert_extra_args(self, args: argparse.Namespace, *groups: Any) -> None:
        """The host's; then reads the held-out pictures: the data sets are known here and no model is loaded yet."""
        super().assert_extra_args(args, *groups)  # type: ignore[misc]
        if args.evaluation is not None:
            settings = EvaluationSettings.parse(_parsed(args.evaluation))
            with _kept_random_states():
                self._validation = Validation.prepare(settings, _split_of(*groups[1:2]))
            self._history: list[dict[str, Any]] = []
        if args.adaptive is not None and self._validation is not None:
            self._adaptive = AdaptiveSettings.parse({"metric": self._validation.metric} | _parsed(args.adaptive))
            if self._adaptive.metric not in self._validation.metrics:
                measured = f"{self._validation.settings.extractor} gives {', '.join(self._validation.metrics)}"
                raise SettingsError([f"metric={self._adaptive.metric}: extractor={measured}: choose one of these"], "[adaptive]")

    def cache_text_encoder_outputs_if_needed(self, args: argparse.Namespace, *rest: Any) -> None:
        """The host's, which reads the sample prompts where it encodes texts once and for all: ours are among them meanwhile."""
        given = args.sample_prompts
        if self._validation is None or (given is not None and not os.path.isfile(given)):
            super().cache_text_encoder_outputs_if_needed(args, *rest)  # type: ignore[misc]
            return
        theirs = train_util.load_prompts(given) if given is not None else []
        with tempfile.TemporaryDirectory() as folder:
            args.sample_prompts = _write_prompts(folder, [*theirs, *self._validation.host_prompts()])
            try:
                super().cache_text_encoder_outputs_if_needed(args, *rest)  # type: ignore[misc]
            finally:
                args.sample_prompts = given

    def post_process_network(self, args: argparse.Namespace, accelerator: Any, network: Any, *rest: Any) -> None:
        """The host's; then lets the history be saved and loaded with the state of the training."""
        super().post_process_network(args, accelerator, network, *rest)  # type: ignore[misc]
        if self._validation is None:
            return
        self._trained = network

        def save(models: Any, weights: Any, folder: str) -> None:
            if accelerator.is_main_process:
                write_history(Path(folder) / _STATE_FILE, self._history)

        def load(models: Any, folder: str) -> None:
            self._history = read_history(Path(folder) / _STATE_FILE)
            self._lead(args)

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)

    def update_metadata(self, metadata: dict[str, Any], args: argparse.Namespace) -> None:
        """The host's; here it tells how long an epoch is, and the network is complete."""
        super().update_metadata(metadata, args)  # type: ignore[misc]
        self._lead(args)
        self._steps_per_epoch = -(-int(metadata["ss_num_batches_per_epoch"]) // args.gradient_accumulation_steps)

    def train(self, args: argparse.Namespace) -> None:
        """The host's, then a page about what was measured beside the last file."""
        super().train(args)  # type: ignore[misc]
        if self._validation is None or not self._history or int(os.environ.get("RANK", "0")):
            return
        settings = _parsed([*args.evaluation, *(args.adaptive or ())])
        path = _history_path(args, "html")
        try:
            write_page(history_page(args.output_name or "lora", self._history, settings), path)
            tqdm.write(f"report: {path}")
        except LoraCompressError as error:
            logger.error("%s", error)

    def _lead(self, args: argparse.Namespace) -> None:
        """Let the controller, if there is to be one, take over the session of the network."""
        if args.adaptive is None or self._controller is not None:
            return
        self._controller = controller = SessionController(self._trained.session, self._adaptive)
        self._trained.session.state.on_load(lambda: controller.restore(self._history))

    def sample_images(self, accelerator: Any, args: argparse.Namespace, epoch: int | None, global_step: int, *models: Any) -> None:
        """The host's, with the optimizer in the mode for it; then, after a step where it is due, ours."""
        super().sample_images(accelerator, args, epoch, global_step, *models)  # type: ignore[misc]
        if self._validation is not None and epoch is None and self._is_due(args, global_step):
            self._validate(self._validation, accelerator, args, global_step, models)

    def _is_due(self, args: argparse.Namespace, step: int) -> bool:
        """By validate_every_n_steps or _epochs, or both; every epoch where neither is given. Epochs end with the last step."""
        if args.validate_every_n_steps and step % args.validate_every_n_steps == 0:
            return True
        if args.validate_every_n_steps and not args.validate_every_n_epochs:
            return False
        every = self._steps_per_epoch * (args.validate_every_n_epochs or 1)
        return step % every == 0 or step == args.max_train_steps

    def _validate(self, validation: Validation, accelerator: Any, args: argparse.Namespace, step: int, models: Any) -> None:
        """Draw, measure and write down. What fails is an entry too: a training of days does not end for a number."""
        start = time.perf_counter()
        modules = [self._trained, *_modules_of(models)]
        with _kept_random_states(), _in_eval_mode(modules), torch.no_grad():
            entry = self._measured(validation, accelerator, args, step, models)
        epoch = -(-step // self._steps_per_epoch)
        entry = {"step": step, "epoch": epoch, **entry, "seconds": round(time.perf_counter() - start, 1)}
        if self._controller is not None and accelerator.is_main_process:
            entry |= self._controller.decide(self._history, entry)
            if "rank_ratio" in entry and "error" not in entry:
                entry |= self._size()
        entry = broadcast_object_list([entry])[0]
        self._history.append(entry)
        if self._controller is not None:
            self._controller.apply(entry)
        if not accelerator.is_main_process:
            return
        if "error" in entry:
            logger.error("step %d: the evaluation failed (%s); the training goes on", step, entry["error"])
        else:
            tqdm.write(f"step {step}: {_told(validation, entry)}")
        try:
            write_history(_history_path(args, "jsonl"), self._history)
        except SaveError as error:
            logger.error("step %d: %s", step, error)
        numbers = {f"evaluation/{name}": value for name, value in validation.plain_numbers(entry).items()}
        if numbers and accelerator.trackers:
            self.step_logging(accelerator, numbers, step, epoch)  # type: ignore[attr-defined]

    def _size(self) -> dict[str, int]:
        """Bytes of the file that would be saved now; nothing where it could not be, because weights are NaN."""
        try:
            return {"bytes": self._trained.session.compress().report.bytes[1]}
        except LoraCompressError as error:
            logger.error("%s", error)
            return {}

    def _measured(
        self, validation: Validation, accelerator: Any, args: argparse.Namespace, step: int, models: Any
    ) -> dict[str, Any]:
        """The numbers; measured by the first process alone, from the features of all."""
        floors: dict[str, float] | Tensor | None = validation.known_floors(self._history)
        drawn: dict[str, Tensor] = {}
        session = self._controller.session if self._controller is not None and self._controller.wants_full else None
        for kind in ("compressed", *(["other noise"] if floors is None else []), *(["full"] if session is not None else [])):
            with session.uncompressed() if kind == "full" and session is not None else nullcontext():
                features = self._features(validation, accelerator, args, step, models, kind == "other noise")
            if isinstance(features, str):
                return {"error": features}
            drawn[kind] = features
        if not accelerator.is_main_process:
            return {}
        try:
            full = validation.distances(drawn["full"]) if "full" in drawn else {}
            entry = validation.measure(drawn["compressed"], drawn["other noise"] if floors is None else floors)
            return entry | {f"{name}_full": value for name, value in full.items()}
        except Exception as error:  # as in _features
            return {"error": f"{type(error).__name__}: {error}"}

    def _features(
        self, validation: Validation, accelerator: Any, args: argparse.Namespace, step: int, models: Any, other_noise: bool
    ) -> Tensor | str:
        """(N, d) of all pictures in the order of their prompts, or what went wrong in a process: the same in all of them."""
        try:
            own: Any = self._own_features(validation, accelerator, args, step, models, other_noise)
        except Exception as error:  # whatever a host raises while it draws, other processes wait for this one
            logger.debug("drawing failed", exc_info=True)
            own = f"{type(error).__name__}: {error}"
        parts = gather_object([own])
        if failed := [part for part in parts if isinstance(part, str)]:
            return failed[0]
        found = torch.empty(len(validation.prompts), validation.reference.shape[1])
        for rank, part in enumerate(parts):
            if part is not None:
                found[rank :: len(parts)] = part
        return found

    def _own_features(
        self, validation: Validation, accelerator: Any, args: argparse.Namespace, step: int, models: Any, other_noise: bool
    ) -> Tensor | None:
        """Of this process's share, every n-th prompt as the host shares them; None if it has none."""
        share = range(accelerator.process_index, len(validation.prompts), accelerator.num_processes)
        with tempfile.TemporaryDirectory() as folder, _without_trackers(accelerator), _without_messages():
            once = argparse.Namespace(**vars(args))
            once.sample_prompts = _write_prompts(folder, validation.host_prompts(other_noise=other_noise))
            once.sample_every_n_steps, once.sample_every_n_epochs, once.sample_batch_size = 1, None, 1
            once.output_dir, once.output_name = folder, None
            super().sample_images(accelerator, once, None, step, *models)  # type: ignore[misc]
            paths = sorted(Path(folder, "sample").glob("*.png"), key=lambda path: int(path.name.split("_")[1]))
            if len(paths) != len(share):
                raise EvaluationError(f"sd-scripts drew {len(paths)} of {len(share)} pictures")
            return validation.extractor(PictureFolder(tuple(paths), (), None).batches()) if paths else None


def _history_path(args: argparse.Namespace, ending: str) -> Path:
    return Path(args.output_dir) / f"{args.output_name or 'lora'}.evaluations.{ending}"


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


def _told(validation: Validation, entry: dict[str, Any]) -> str:
    name = validation.metric
    value, floor, pictures = entry[name], entry[f"{name}_floor"], entry["pictures"]
    told = f"{name} {value:.4g} (floor {floor:.4g}), {pictures} pictures, {entry['seconds']:g} s"
    return f"{told}; {entry['action']}: {entry['reason']}" if "action" in entry else told


@contextmanager
def _kept_random_states() -> Iterator[None]:
    """Whatever is drawn inside, the generators of Python, NumPy and torch go on outside as if nothing had been."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    module = getattr(torch, device.type) if device is not None else None
    if module is not None and not getattr(module, "is_initialized", lambda: True)():
        module = None  # nothing has been drawn there, and asking would take memory on a device that is not ours
    theirs = module.get_rng_state() if module is not None else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if module is not None:
            module.set_rng_state(theirs)


@contextmanager
def _in_eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


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
