"""Measures a training while it runs: pictures of all processes, an entry of the history, and what the controller makes of it."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import LoraCompressError, SaveError, SettingsError
from ..evaluation.validation import Validation, read_history, write_history
from ..report.html import write_page
from ..report.html_history import history_page
from ..settings import AdaptiveSettings
from .controller_session import SessionController
from .evidence import pictures_warning
from .session import TrainingSession

__all__ = ["Evaluator", "kept_random_states", "undisturbed"]

logger = logging.getLogger(__name__)

Draw = Callable[[Sequence[int], bool], Tensor]


class Evaluator:
    """Draws by what a host gives it, measures, keeps the history and leads the compression of a session. Needs accelerate.

    The training goes on as if nothing had been measured: random states, modes of modules, gradients and weights are what they were.

    Args:
        validation: what is drawn and what it is measured against.
        stem: path of the history, without its ending: <stem>.evaluations.jsonl, and a page of it in the end.
        adaptive: as key: value, the settings of a controller; None for none.

    Attributes:
        history: entries, the oldest first.
        controller: after `lead`, where there is to be one.

    Raises:
        SettingsError: the controller's settings are wrong, or its metric is none that is measured.
    """

    def __init__(self, validation: Validation, stem: Path, adaptive: Mapping[str, Any] | None = None) -> None:
        self.validation, self._stem = validation, stem
        self.history: list[dict[str, Any]] = []
        self.controller: SessionController | None = None
        self._adaptive = None
        if adaptive is not None:
            self._adaptive = AdaptiveSettings.parse({"metric": validation.metric, **adaptive})
            if self._adaptive.metric not in validation.metrics:
                measured = f"{validation.settings.extractor} gives {', '.join(validation.metrics)}"
                raise SettingsError([f"metric={self._adaptive.metric}: extractor={measured}: choose one of these"], "[adaptive]")
            if warning := pictures_warning(validation, self._adaptive):
                logger.warning("%s", warning)

    def lead(self, session: TrainingSession) -> None:
        """Let the controller, if there is to be one, take over a session."""
        if self._adaptive is None or self.controller is not None:
            return
        self.controller = controller = SessionController(session, self._adaptive)
        session.state.on_load(lambda: controller.restore(self.history))

    def save(self, path: Path) -> None:
        """Write the history to go on with."""
        write_history(path, self.history)

    def load(self, path: Path) -> None:
        """Go on with a history of `save`."""
        self.history = read_history(path)

    def evaluate(self, draw: Draw, modules: Iterable[nn.Module], step: int, epoch: int | None = None) -> dict[str, Any]:
        """Draw, measure and write down. What fails is an entry too: a training of days does not end for a number.

        Args:
            draw: called in each process with the indices of its prompts, and whether to start from other noise; features (n, d).
            modules: to be in evaluation mode meanwhile.
            step: of the training.
            epoch: likewise, where there are any.
        """
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        start, main = time.perf_counter(), PartialState().is_main_process
        with undisturbed(modules), torch.no_grad():
            entry = self._measured(draw)
        told = {"step": step} if epoch is None else {"step": step, "epoch": epoch}
        entry = {**told, **entry, "seconds": round(time.perf_counter() - start, 1)}
        if self.controller is not None and main:
            entry |= self.controller.decide(self.history, entry)
            if "rank_ratio" in entry and "error" not in entry:
                entry |= self._size(self.controller.session)
        entry = broadcast_object_list([entry])[0]
        self.history.append(entry)
        if self.controller is not None:
            self.controller.apply(entry)
        if main:
            self._tell(entry)
        return entry

    def write_report(self, name: str, settings: Mapping[str, Any]) -> Path | None:
        """Write a page about what was measured; its path, or None where that failed, which is logged, or nothing was."""
        path = Path(f"{self._stem}.evaluations.html")
        try:
            if self.history:
                write_page(history_page(name, self.history, settings), path)
        except LoraCompressError as error:
            logger.error("%s", error)
            return None
        return path if self.history else None

    def told(self, entry: Mapping[str, Any]) -> str:
        """An entry that has been measured, in a line."""
        name = self.validation.metric
        value, floor, pictures = entry[name], entry[f"{name}_floor"], entry["pictures"]
        told = f"step {entry['step']}: {name} {value:.4g} (floor {floor:.4g}), {pictures} pictures, {entry['seconds']:g} s"
        return f"{told}; {entry['action']}: {entry['reason']}" if "action" in entry else told

    def _tell(self, entry: Mapping[str, Any]) -> None:
        if "error" in entry:
            logger.error("step %d: the evaluation failed (%s); the training goes on", entry["step"], entry["error"])
        try:
            write_history(f"{self._stem}.evaluations.jsonl", self.history)
        except SaveError as error:
            logger.error("step %d: %s", entry["step"], error)

    def _size(self, session: TrainingSession) -> dict[str, int]:
        """Bytes of the file that would be saved now; nothing where it could not be, because weights are NaN."""
        try:
            return {"bytes": session.compress().report.bytes[1]}
        except LoraCompressError as error:
            logger.error("%s", error)
            return {}

    def _measured(self, draw: Draw) -> dict[str, Any]:
        """The numbers; measured by the first process alone, from the features of all."""
        from accelerate import PartialState

        validation = self.validation
        floors: dict[str, float] | Tensor | None = validation.known_floors(self.history)
        drawn: dict[str, Tensor] = {}
        session = self.controller.session if self.controller is not None and self.controller.wants_full else None
        for kind in ("compressed", *(["other noise"] if floors is None else []), *(["full"] if session is not None else [])):
            with session.uncompressed() if kind == "full" and session is not None else nullcontext():
                features = self._features(draw, kind == "other noise")
            if isinstance(features, str):
                return {"error": features}
            drawn[kind] = features
        if not PartialState().is_main_process:
            return {}
        if not all(bool(features.isfinite().all()) for features in drawn.values()):
            return {"error": "features of the pictures are NaN or infinite: the training diverged, or the extractor failed"}
        try:
            full = validation.distances(drawn["full"], "_full") if "full" in drawn else {}
            return validation.measure(drawn["compressed"], drawn["other noise"] if floors is None else floors) | full
        except Exception as error:  # as in _features
            return {"error": f"{type(error).__name__}: {error}"}

    def _features(self, draw: Draw, other_noise: bool) -> Tensor | str:
        """(N, d) of all pictures in the order of their prompts, or what went wrong in a process: the same in all of them."""
        from accelerate import PartialState
        from accelerate.utils import gather_object

        state, count = PartialState(), len(self.validation.prompts)
        share = range(state.process_index, count, state.num_processes)
        try:
            own: Any = draw(share, other_noise) if share else None
        except Exception as error:  # whatever a host raises while it draws, other processes wait for this one
            logger.debug("drawing failed", exc_info=True)
            own = f"{type(error).__name__}: {error}"
        parts = gather_object([own])
        if failed := [part for part in parts if isinstance(part, str)]:
            return failed[0]
        found = torch.empty(count, self.validation.reference.shape[1])
        for rank, part in enumerate(parts):
            if part is not None:
                found[rank :: len(parts)] = part
        return found


@contextmanager
def kept_random_states() -> Iterator[None]:
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
def undisturbed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Whatever is computed inside, random states and modules go on as if nothing had been; modules are in evaluation mode."""
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        with kept_random_states():
            yield
    finally:
        for part in training:
            part.training = True
