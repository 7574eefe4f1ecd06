"""Everything that a session must remember, as buffers of one small module, so that whoever saves the network saves it too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingsError

__all__ = ["TrainingState"]

_OTHER_SETTINGS = "the state is of another network or of other pruning and quantization: go on with the settings it was made with"


class TrainingState(nn.Module):
    """Flat buffers of fixed shape, a run of each for every pair.

    Masks and counts are kept exact: casting a network to half precision moves them between devices and leaves their dtypes alone.
    A state dict of another network or of other settings is refused as a whole, before anything is loaded.
    A state dict that holds none of them (of a training without compression) loads as it is: the session is then at its start.

    Args:
        layout: by buffer, the dtype and the shape of each pair's part, by pair; an empty layout makes no buffer.
    """

    step: Tensor
    quantizing: Tensor

    def __init__(self, layout: Mapping[str, tuple[torch.dtype, Mapping[str, tuple[int, ...]]]]) -> None:
        super().__init__()
        self._places: dict[str, dict[str, tuple[int, int, tuple[int, ...]]]] = {}
        self._listeners: list[Callable[[], None]] = []
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("quantizing", torch.zeros((), dtype=torch.bool))
        for kind, (dtype, shapes) in layout.items():
            places, offset = {}, 0
            for name, shape in shapes.items():
                size = torch.Size(shape).numel()
                places[name] = (offset, size, shape)
                offset += size
            if offset:
                self._places[kind] = places
                self.register_buffer(kind, torch.zeros(offset, dtype=dtype))

    def part(self, kind: str, name: str) -> Tensor:
        """A view of one pair's part of a buffer."""
        offset, size, shape = self._places[kind][name]
        return getattr(self, kind).narrow(0, offset, size).view(shape)

    def has(self, kind: str) -> bool:
        """Whether there is such a buffer."""
        return kind in self._places

    def on_load(self, listener: Callable[[], None]) -> None:
        """Call `listener` after a state dict has been loaded, or the buffers moved."""
        self._listeners.append(listener)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainingState:
        device = fn(torch.empty(0, dtype=torch.float32, device=self.step.device)).device
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(device)
        self._tell()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        found = {key.removeprefix(prefix): value.shape for key, value in state_dict.items() if key.startswith(prefix)}
        if found:
            own = {name: buffer.shape for name, buffer in self._buffers.items() if buffer is not None}
            if wrong := sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name)):
                raise SettingsError([f"{', '.join(wrong)} differ: {_OTHER_SETTINGS}"], "resume")
            super()._load_from_state_dict(state_dict, prefix, *rest)
            self._tell()

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()
