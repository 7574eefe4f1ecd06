"""A LoRA file of any layout as updates by module, read one module at a time."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import FormatError
from ..files.tensors import TensorFile, open_tensors
from ..names.families import family_of, part_of
from ..update import LowRankUpdate, require_range
from .foreign import CARRIED
from .identity import what_it_holds
from .left_over import refuse_left_over
from .numbered import is_numbered, numbered_metadata
from .peft_config import PeftConfig
from .peft_folder import weights_of
from .plain import KOHYA_KEYS, PlainKeys
from .quantized import dequantized
from .registry import LAYOUTS
from .survey import Module, ModuleShape, Stated, Survey

if TYPE_CHECKING:
    from ..packed.file import PackedFile

__all__ = ["LoraSource", "open_lora", "require_readable"]

_TIED = re.compile(r"\.(dora_scale|reshape_weight|lora_magnitude_vector(\.[^.]+)*|lora_(B|up)(\.[^.]+)?\.bias)$")


def open_lora(
    path: str | os.PathLike[str],
    repair: bool = False,
    *,
    alpha: float | None = None,
    peft_config: str | os.PathLike[str] | None = None,
) -> LoraSource | PackedFile:
    """Open a LoRA file of any layout, without reading its weights.

    Args:
        path: .safetensors, or .pt, .ckpt, .bin and their like, which are read as weights alone. Of a packed file the first
            bytes will do. A folder that PEFT wrote stands for the weights in it.
        repair: mend what can be mended (ranks that disagree, odd alphas, half modules) and say so in `notes`.
        alpha: of modules whose alpha the file does not tell, where that is not their rank.
        peft_config: adapter_config.json of the file, or a folder with it; by default the one beside a file named adapter_model.

    Raises:
        SettingsError: alpha is 0 or no finite number.
        FormatError: no such file, no LoRA, or something is wrong with it that was not to be repaired.
    """
    from ..packed.file import PackedFile, is_packed  # which names modules by the rules of this package

    path = weights_of(path)
    stated = Stated(alpha, peft_config)
    if is_packed(path):
        return PackedFile(path)
    file, scaled, unknown_scales = dequantized(open_tensors(path))
    survey = Survey(file, repair, unknown_scales, stated)
    for key in scaled:
        survey.tell("factors that another program had quantized were multiplied by their scales", key)
    for layout in LAYOUTS:
        layout.find(survey)
    refuse_left_over(survey)
    survey.finish()
    if not survey.modules:
        reasons = "; ".join(["it is " + what_it_holds(file), *survey.notes()]).replace(CARRIED, "")
        raise FormatError(f"{file.path}: holds no low-rank update that is known here: {reasons}: give a LoRA")
    return LoraSource(file, survey)


def require_readable(written: Path, target: str | os.PathLike[str], modules: int) -> None:
    """Open a plain file that was written under a temporary name, before it takes its own; its header and alphas alone are read.

    Args:
        written: the file.
        target: the name that it is about to take, for messages.
        modules: how many updates it was written with.

    Raises:
        FormatError: it cannot be read as a LoRA of that many modules, as when a packed file names the keys of its modules wrongly.
    """
    try:
        with open_lora(written) as source:
            found = len(source)
        problem = "" if found == modules else f"{found} modules are found in it, {modules} were written"
    except FormatError as error:
        problem = str(error).replace(str(written), "the result")
    if problem:
        raise FormatError(
            f"{target}: was not written, because it could not be read again ({problem}): "
            "the names of keys in the input do not fit their tensors: get the input again"
        )


class LoraSource(Mapping[str, LowRankUpdate]):
    """The updates of a file by module name, in file order; `source[name]` reads that module's tensors and nothing else.

    Threads may read at the same time.

    Attributes:
        path: of the file.
        metadata: of the file.
        layout: kohya, peft, diffusers, control_lora, loha, lokr, glora or full; of most of its modules.
        family: see `families.family_of`.
        notes: what a user must be told, one sentence each.
        dtype: of the factors, the most frequent by number of weights.
        shapes: of the modules, from the header.
        others: tensors that belong to no update, under their own keys; read when asked for.
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
        self.family = family_of(self.shapes)
        self.dtype = _usual_dtype(file, self._modules)
        free = survey.free()
        self._extras = _tied_to_modules(free, self._modules)
        tied = {key for keys in self._extras.values() for key in keys}
        self.others: Mapping[str, Tensor] = _LazyTensors(file, [key for key in free if key not in tied])

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

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def part(self, name: str) -> str:
        """The part of the model that a module is in: "U-Net", "DiT", "text encoder", "text encoder 2" ..."""
        return part_of(name, self.family)

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

    def __enter__(self) -> LoraSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _LazyTensors(Mapping[str, Tensor]):
    """Some tensors of a file, read when asked for."""

    def __init__(self, file: TensorFile, keys: list[str]) -> None:
        self._file = file
        self._keys = dict.fromkeys(keys)

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        return self._file.read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys


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
