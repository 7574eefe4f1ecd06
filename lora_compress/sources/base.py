"""The protocol of a source: where the modules of a LoRA come from, whatever they come from.

A file of any layout, a packed file and a network in memory are sources. The engine, the reports and the programs know nothing else
of them: whatever offers a new kind of LoRA (a merge of several, a difference of two models, a filter) subclasses `LoraSource`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..files.dtypes import TensorSpec
from ..layouts.plain import KOHYA_KEYS, PlainKeys
from ..names.families import family_of, part_of
from ..update import LowRankUpdate, ModuleShape

__all__ = ["LazyTensors", "LoraSource"]


class LazyTensors(Mapping[str, Tensor]):
    """Tensors that are read when they are asked for.

    Args:
        keys: of the tensors, in their order.
        read: returns the tensor of a key.
    """

    def __init__(self, keys: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._keys = dict.fromkeys(keys)
        self._read = read

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        return self._read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys


class LoraSource(Mapping[str, LowRankUpdate]):
    """The low-rank updates of a LoRA by module name. `source[name]` reads that module and nothing else.

    A subclass must give `shapes` and `__getitem__`; everything else has a default that is right for plain updates. Threads may read
    at the same time.

    Attributes:
        path: of the file, for messages; a name in angle brackets where there is none.
        layout: name of the key layout of a plain file that is made of the source.
        dtype: of the factors, the most frequent by number of weights.
        metadata: texts by key.
        notes: what a user must know of the source, one sentence each.
        packed: whether the modules are coded in the packed format.
        rounds_once: whether `decode` gives each weight rounded once to the type that is asked for, with the scale in the factors.
        shapes: of the modules, by name.
        others: tensors that belong to no update, under their own keys; each is read when it is asked for.
        carried: types and shapes of the tensors in `others`.

    Example:
        >>> import torch
        >>> class OneModule(LoraSource):
        ...     shapes = {"lora_unet_mid_block_attentions_0_proj_in": ModuleShape(8, 8, (), 2)}
        ...     def __getitem__(self, name):
        ...         return LowRankUpdate(torch.ones(2, 8), torch.ones(8, 2), alpha=2.0)
        >>> source = OneModule()
        >>> len(source), source.family, source.part("lora_unet_mid_block_attentions_0_proj_in")
        (1, 'sdxl', 'U-Net')
    """

    path: Path = Path("<memory>")
    layout: str = "kohya"
    dtype: torch.dtype = torch.float32
    metadata: Mapping[str, str] = {}
    notes: Sequence[str] = ()
    packed: bool = False
    rounds_once: bool = False
    shapes: Mapping[str, ModuleShape]
    others: Mapping[str, Tensor] = {}
    carried: Mapping[str, TensorSpec] = {}

    @abstractmethod
    def __getitem__(self, name: str) -> LowRankUpdate:
        """Read one module.

        Raises:
            FormatError: the module cannot be read.
        """

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def decode(self, name: str, dtype: torch.dtype | None = None) -> LowRankUpdate:
        """Read one module with factors of `dtype`; None leaves them as they are.

        Raises:
            FormatError: the module cannot be read.
        """
        update = self[name]
        if dtype is None:
            return update
        return LowRankUpdate(update.down.to(dtype), update.up.to(dtype), update.alpha, update.rest)

    @cached_property
    def family(self) -> str:
        """The model family that the modules belong to; see `names.families.family_of`."""
        return family_of(self.shapes)

    def part(self, name: str) -> str:
        """Return the part of the model that a module is in: "U-Net", "DiT", "text encoder", "text encoder 2" ..."""
        return part_of(name, self.family)

    def is_balanced(self, name: str) -> bool:
        """Whether `source[name]` comes out as its singular value decomposition already: alpha = rank and factors balanced.

        Row i of down is then sqrt(sigma_i) v_i, column i of up sqrt(sigma_i) u_i, strongest first, so that sigma_i is the squared
        norm of the row.
        """
        return False

    def plain_keys(self, name: str) -> PlainKeys:
        """Return the keys that a module has in a plain file that is made of the source.

        Layouts without alpha mean alpha = rank: the scale goes into the factors.
        """
        return KOHYA_KEYS

    def plain_metadata(self, ranks: Mapping[str, int]) -> dict[str, str]:
        """Return the metadata of a plain file that holds these modules at these ranks."""
        return dict(self.metadata)

    def leave_numbers(self) -> None:
        """Let modules that are known by their numbers have names in a plain file, if all of them can have one."""

    def require_whole(self) -> None:
        """Raises: FormatError: modules are missing, because the file was cut."""

    def extras(self, name: str) -> dict[str, Tensor]:
        """Return the tensors that mean nothing without a module, under their full keys: dora_scale and its like."""
        return {}

    def extra_specs(self, name: str) -> dict[str, TensorSpec]:
        """Return types and shapes of the tensors in `extras(name)`, which are not read for it."""
        return {}

    def factor_bytes(self, name: str) -> int:
        """Return the bytes that a module takes in its file: of the tensors that make the update, or of its coded stages."""
        outputs, inputs, kernel, rank = self.shapes[name]
        return rank * (outputs + inputs * torch.Size(kernel).numel()) * self.dtype.itemsize

    @property
    def carried_bytes(self) -> int:
        """Bytes of the tensors that make no update: of `others` and of all `extras`."""
        extras = (spec for name in self for spec in self.extra_specs(name).values())
        return sum(spec.nbytes for spec in (*self.carried.values(), *extras))

    def codec(self, name: str) -> str:
        """Return the name of the codec that a module is coded with, "" where it is not coded."""
        return ""

    def close(self) -> None:
        """Let go of the file, for instance to replace it. Tensors that were read stay valid."""

    def __enter__(self) -> LoraSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
