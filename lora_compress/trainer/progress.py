"""How far a training has come: its batches, and all that it needs to go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError
from ..files.writer import write_safetensors
from ..layouts import as_kohya
from ..training import TrainingSession
from ..training.state_folder import put_back, reading_state

__all__ = ["Batches", "Progress", "check_state_folder", "steps_of_epoch"]

_STATE, _LAST = "custom_checkpoint_0.pkl", "model.safetensors"  # what accelerate writes of us, and what is written last


def steps_of_epoch(pictures: int, batch: int, processes: int) -> int:
    """Steps until every picture has been seen, by processes that take a batch each."""
    return -(-pictures // (batch * processes))


class Batches:
    """Latents and captions without end; all processes shuffle alike, and each takes its own of as many batches as there are.

    Args:
        pictures: latents (1, c, h, w) with their caption.
        size: pictures of a batch.
        seed: of the order.
        accelerator: that knows this process.
    """

    def __init__(self, pictures: Sequence[tuple[Tensor, str]], size: int, seed: int, accelerator: Any) -> None:
        self._pictures, self._size = pictures, size
        self._index, self._world = accelerator.process_index, accelerator.num_processes
        self._random = torch.Generator().manual_seed(seed)
        self._order: list[int] = []

    @property
    def per_epoch(self) -> int:
        """Steps until every picture has been seen."""
        return steps_of_epoch(len(self._pictures), self._size, self._world)

    def take(self) -> tuple[Tensor, list[str]]:
        """The next batch: latents (N, c, h, w) and N captions."""
        together = self._size * self._world
        while len(self._order) < together:
            self._order += torch.randperm(len(self._pictures), generator=self._random).tolist()
        taken, self._order = self._order[:together], self._order[together:]
        chosen = [self._pictures[i] for i in taken[self._size * self._index :][: self._size]]
        return torch.cat([latents for latents, _ in chosen]), [caption for _, caption in chosen]

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands."""
        return {"order": list(self._order), "random": self._random.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._order = list(state["order"])
        self._random.set_state(state["random"].cpu())


@dataclass
class Progress:
    """What accelerate keeps of a training beside random states.

    Args:
        session: its pairs learn.
        optimizer: of their weights.
        rates: its schedule.
        batches: their order.
        step: steps that were done.
    """

    session: TrainingSession
    optimizer: torch.optim.Optimizer
    rates: Any
    batches: Batches
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        """All of it, in tensors and plain numbers."""
        weights = {name: [weight.detach() for weight in pair.weights] for name, pair in self.session.pairs.items()}
        return {"weights": weights, "session": self.session.state.state_dict(), "step": self.step} | {
            name: getattr(self, name).state_dict() for name in ("optimizer", "rates", "batches")
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            FormatError: it is of another network.
        """
        pairs = self.session.pairs
        shapes = {name: [tuple(weight.shape) for weight in pair.weights] for name, pair in pairs.items()}
        if shapes != {name: [tuple(weight.shape) for weight in weights] for name, weights in state["weights"].items()}:
            raise FormatError(
                "resume: the state is of a network with other layers or ranks: train with the settings it was made with"
            )
        for name, weights in state["weights"].items():
            for own, loaded in zip(pairs[name].weights, weights, strict=True):
                own.copy_(loaded)
        self.session.state.load_state_dict(state["session"])
        for name in ("optimizer", "rates", "batches"):
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]

    def save(self, accelerator: Any, folder: Path) -> None:
        """Write all of it, and the LoRA before compression in kohya's layout: <folder>/model.safetensors."""
        accelerator.save_state(str(folder))
        if accelerator.is_main_process:
            updates = {name: pair.update() for name, pair in self.session.pairs.items()}
            write_safetensors(as_kohya(updates), folder / _LAST, {})
        accelerator.wait_for_everyone()

    def load(self, accelerator: Any, folder: str) -> None:
        """Read what `save` has written.

        Raises:
            FormatError: the state is damaged, or of another network.
            SettingsError: it is of other settings.
        """
        with reading_state(folder):
            accelerator.load_state(folder)


def check_state_folder(folder: Path) -> None:
    """Check that a folder holds a whole state, whose last file is model.safetensors.

    Raises:
        FormatError: it does not.
    """
    put_back(folder)
    if not (folder / _STATE).is_file():
        raise FormatError(f"resume={folder}: holds no state of --host diffusers: give a folder <output_name>-state")
    if not (folder / _LAST).is_file():
        raise FormatError(f"resume={folder}: the state is unfinished, saving it was interrupted: take an earlier one")
