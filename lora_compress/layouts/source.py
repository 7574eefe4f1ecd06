"""A LoRA file of any layout as updates by module, read one module at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import FormatError
from ..files.dtypes import TensorSpec
from ..files.tensors import TensorFile
from ..sources.base import LazyTensors, LoraSource
from ..update import LowRankUpdate, require_range
from .numbered import is_numbered, numbered_metadata
from .peft_config import PeftConfig
from .plain import KOHYA_KEYS, PlainKeys
from .survey import Module, ModuleShape, Survey

__all__ = ["PlainFile"]

_TIED = re.compile(r"\.(dora_scale|reshape_weight|lora_magnitude_vector(\.[^.]+)*|lora_(B|up)(\.[^.]+)?\.bias)$")


class PlainFile(LoraSource):
    """A file of any key layout that is not packed, its modules in file order.

    Args:
        file: its tensors.
        survey: what the key layouts found in it.

    Attributes:
        layout: kohya, peft, diffusers, control_lora, loha, lokr, glora or full; that of most modules.
    """

    def __init__(self, file: TensorFile, survey: Survey) -> None:
        self.path = file.path
        self.metadata = dict(file.metadata)
        self.notes = survey.notes()
        self._file = file
        position = {key: index for index, key in enumerate(file)}
        self._modules = {module.name: module for module in sorted(survey.modules.values(), key=lambda m: position[m.keys[0]])}
        self.shapes: Mapping[str, ModuleShape] = {name: module.shape for name, module in self._modules.items()}
        self.layout = _usual_layout(self._modules)
        self.dtype = _usual_dtype(file, self._modules)
        free = survey.free()
        self._extras = _tied_to_modules(free, self._modules)
        tied = {key for keys in self._extras.values() for key in keys}
        self.carried = {key: file[key] for key in free if key not in tied}
        self.others = LazyTensors(self.carried, file.read)

    def __getitem__(self, name: str) -> LowRankUpdate:
        """Raises: FormatError: the module cannot be read, or holds what has no decomposition."""
        module = self._modules[name]
        try:
            update = module.load()
            require_range(update)
            return update
        except FormatError as error:
            text = str(error)
            raise FormatError(text if text.startswith(str(self.path)) else f"{self.path}: {name}: {text}") from error
        except RuntimeError as error:
            raise FormatError(f"{self.path}: {name}: cannot be converted ({error})") from error

    def extra_specs(self, name: str) -> dict[str, TensorSpec]:
        """Return types and shapes of the tensors in `extras(name)`, which are not read for it."""
        return {key: self._file[key] for key in self._extras.get(name, ())}

    def is_balanced(self, name: str) -> bool:
        """Whether `source[name]` comes out as its singular value decomposition already: alpha = rank and factors balanced.

        Row i of down is then sqrt(sigma_i) v_i, column i of up sqrt(sigma_i) u_i, strongest first, so that sigma_i is the squared
        norm of the row. True of what was converted (LoHa, LoKr, full differences).
        """
        return self._modules[name].balanced

    def extras(self, name: str) -> dict[str, Tensor]:
        """Tensors that mean nothing without the module, under their full keys, untouched: dora_scale and its like.

        One of them is part of the update: the bias of a PEFT up factor, which is scaled as the factors are.
        """
        tensors = {key: self._file.read(key) for key in self._extras.get(name, ())}
        gain = self._modules[name].bias_gain
        if gain == 1.0:
            return tensors
        return {key: (t.double() * gain).to(t.dtype) if key.endswith(".bias") else t for key, t in tensors.items()}

    def factor_bytes(self, name: str) -> int:
        """Bytes of the tensors that make the update, alpha included and extras not."""
        return sum(map(self._file.stored_bytes, self._modules[name].keys))

    @property
    def carried_bytes(self) -> int:
        """Bytes of the tensors that make no update: of `others` and of all `extras`."""
        return sum(map(self._file.stored_bytes, self._file)) - sum(map(self.factor_bytes, self))

    def plain_keys(self, name: str) -> PlainKeys:
        """Keys of a plain file in the layout the module came in; what was converted becomes kohya's.

        Layouts without alpha mean alpha = rank: the scale goes into the factors.
        """
        return self._modules[name].plain

    def leave_numbers(self) -> None:
        """Let modules that are known by their numbers (cloneofsimo/lora) have kohya's keys in a plain file, if all have names.

        No program of today reads numbers, and packed files leave out modules that are zero.
        """
        numbered = [name for name, module in self._modules.items() if is_numbered(module.plain)]
        if not any(self._modules[name].plain.down == f"{name}:down" for name in numbered):
            for name in numbered:
                self._modules[name] = replace(self._modules[name], plain=KOHYA_KEYS, layout="kohya")
            self.layout = _usual_layout(self._modules)

    def plain_metadata(self, ranks: Mapping[str, int]) -> dict[str, str]:
        """The metadata for a plain file that holds these modules at these ranks.

        The configuration that PEFT and diffusers keep there is rewritten: its ranks are true and its scales are 1, because
        they have gone into the factors.
        """
        keys = [(self.plain_keys(name), rank) for name, rank in ranks.items()]
        return numbered_metadata(PeftConfig.rewritten(self.metadata, ranks, self.path), keys)

    def close(self) -> None:
        """Let go of the file, for instance to replace it; tensors that were read stay valid."""
        self._file.close()


def _usual_layout(modules: Mapping[str, Module]) -> str:
    return Counter(module.layout for module in modules.values()).most_common(1)[0][0]


def _usual_dtype(file: TensorFile, modules: Mapping[str, Module]) -> torch.dtype:
    weights: Counter[torch.dtype] = Counter()
    for module in modules.values():
        for key in module.keys:
            weights[file.precision(key)] += file[key].numel
    return weights.most_common(1)[0][0]


def _tied_to_modules(keys: list[str], modules: Mapping[str, Module]) -> dict[str, list[str]]:
    tied: dict[str, list[str]] = {}
    for key in keys:
        ending = _TIED.search(key)
        if ending and key[: ending.start()] in modules:
            tied.setdefault(key[: ending.start()], []).append(key)
    return tied
