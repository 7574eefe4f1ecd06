"""What the programs that load LoRA files ask of a plain file: what to adapt, what they refuse, what they drop.

The rules were read in and run against ComfyUI 0.28, AUTOMATIC1111 1.10.1, Forge, Forge Neo, diffusers 0.30 to 0.42, InvokeAI,
musubi-tuner and stable-diffusion.cpp in 2026. A program is a row of data here; `ConsumerRules` merges the rows of several.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from ..errors import SettingsError
from .marks import is_taken_whole
from .refusals import DORA, LAYOUTS_WITH_ALPHA, SD, problems_of

__all__ = [
    "CONSUMERS",
    "Adaptation",
    "Consumer",
    "ConsumerRules",
    "PlannedFile",
    "PlannedModule",
    "opened_by",
]

_MID = ".lora_mid."
_FORGE_UNMATCHED = 12
_WEBUI_EXTENSION = "the extension for AUTOMATIC1111, Forge, Forge Neo and reForge"


@dataclass(frozen=True)
class Consumer:
    """How one program reads a file in kohya's layout.

    Args:
        name: as `--for` takes it.
        title: as messages name it.
        one_alpha: one value for the whole file is needed, because alphas that differ are mixed up.
        one_rank: modules of one part of the model need one rank, because ranks that differ are mis-scaled.
        alpha_read_in: the families in whose files alpha reaches the loader, provided that the layout of the file has one; in the
            files of every other family ranks that differ are mis-scaled, because one rank is taken for the alpha of all modules.
            None: all families.
        takes_whole: it refuses files of some kinds as soon as a module is missing; see `marks.is_taken_whole`.
        least_rank: a smaller one is mis-scaled.
        fp8: families whose float8 files it loads; None: all.
        no_models_of: families of whose models it has none, so that nothing is said of their files.
        casts: it casts factors before it multiplies them; otherwise float8 ones make it fail.
        merges_mid: it multiplies lora_mid of CP-decomposed convolutions itself.
        reads: endings of keys, beside the factors and alpha, that it uses.
        refuses_strange_keys: in which families a key that it does not know makes it refuse the file; None: in all.
        tolerated: keys that it does not know before it leaves the LoRA out; None: any number.
        packed_with: what of ours opens packed files there; None: nothing.
        packed_factors_alone: it refuses packed files with tensors beside factors.
    """

    name: str
    title: str
    one_alpha: bool = False
    one_rank: bool = False
    alpha_read_in: frozenset[str] | None = None
    takes_whole: bool = False
    least_rank: int = 1
    fp8: frozenset[str] | None = None
    no_models_of: frozenset[str] = frozenset()
    casts: bool = True
    merges_mid: bool = True
    reads: frozenset[str] = frozenset()
    refuses_strange_keys: frozenset[str] | None = frozenset()
    tolerated: int | None = None
    packed_with: str | None = None
    packed_factors_alone: bool = False

    def refuses_in(self, family: str) -> bool:
        """Whether a key that it does not know makes it refuse a file of `family`."""
        return self.refuses_strange_keys is None or family in self.refuses_strange_keys

    def needs_one_rank(self, layout: str, family: str) -> bool:
        """Whether it mis-scales ranks that differ in a file of `layout` for a model of `family`."""
        reads_alpha = self.alpha_read_in is None or (layout in LAYOUTS_WITH_ALPHA and family in self.alpha_read_in)
        return self.one_rank or not reads_alpha

    def strange(self, keys: Iterable[str]) -> list[str]:
        """The keys that it does not use, lora_mid apart, which is merged where it has to be."""
        return [key for key in keys if _MID not in key and not any(key.endswith("." + ending) for ending in self.reads)]


@dataclass(frozen=True)
class _Diffusers(Consumer):
    """What its releases share: kohya's keys are converted to PEFT's, and what is left over is an error.

    Its converters for families other than SD and SDXL multiply alpha / rank into the factors and hand no alpha on.
    """

    one_alpha: bool = True
    alpha_read_in: frozenset[str] | None = SD
    takes_whole: bool = True
    fp8: frozenset[str] | None = SD
    merges_mid: bool = False
    reads: frozenset[str] = frozenset({"lora_magnitude_vector", "lora_magnitude_vector.weight"})
    refuses_strange_keys: frozenset[str] | None = None
    packed_with: str | None = "lora_compress.diffusers.load_lora"
    packed_factors_alone: bool = True


_COMFY_READS = frozenset({DORA, "diff", "diff_b", "w_norm", "b_norm"})

CONSUMERS: dict[str, Consumer] = {
    consumer.name: consumer
    for consumer in (
        Consumer(
            "comfyui", "ComfyUI", reads=_COMFY_READS | {"set_weight", "reshape_weight"}, packed_with="the plug-in for ComfyUI"
        ),
        Consumer("a1111", "AUTOMATIC1111", reads=frozenset({DORA, "diff", "w_norm", "b_norm"}), packed_with=_WEBUI_EXTENSION),
        Consumer("forge", "Forge", reads=_COMFY_READS, tolerated=_FORGE_UNMATCHED, packed_with=_WEBUI_EXTENSION),
        _Diffusers("diffusers", "diffusers"),
        _Diffusers("diffusers-0.40", "diffusers 0.40 and later", alpha_read_in=None),
        _Diffusers("diffusers-0.32", "diffusers 0.32", one_rank=True),
        Consumer("invokeai", "InvokeAI", reads=frozenset({DORA, "diff", "w_norm", "b_norm"}), refuses_strange_keys=SD),
        Consumer("musubi", "musubi-tuner", merges_mid=False, no_models_of=SD, casts=False),
        Consumer("sdcpp", "stable-diffusion.cpp", least_rank=2, reads=frozenset({"diff"})),
    )
}
_ALL = "all"


@dataclass(frozen=True)
class PlannedModule:
    """A module about to be written: its rank and alpha, the part of the model it is in, the full keys of its extras."""

    rank: int
    alpha: float
    part: str = ""
    extras: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlannedFile:
    """A file about to be written.

    Args:
        save_format: kohya, fp8, packed or both.
        dtype: of the factors.
        layout: of the keys, as `LoraSource.layout` tells it.
        family: of the model, as `LoraSource.family` tells it.
        modules: by name; dropped ones are absent.
        others: keys of tensors that belong to no module.
    """

    save_format: str
    dtype: torch.dtype
    layout: str
    family: str
    modules: Mapping[str, PlannedModule]
    others: tuple[str, ...] = ()

    @property
    def extras(self) -> list[str]:
        """Keys that are written beside factors and alphas."""
        return [key for module in self.modules.values() for key in module.extras] + list(self.others)


@dataclass(frozen=True)
class Adaptation:
    """What the writer has to do.

    Args:
        ranks: of each module as written, components of zeros included.
        alpha: the one alpha of the file, the rest of each scale folded into the factors; None: alphas stay as they are.
        merge_mid: modules whose lora_mid has to be multiplied into down.
    """

    ranks: dict[str, int]
    alpha: float | None
    merge_mid: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConsumerRules:
    """The rules of several programs at once.

    Args:
        consumers: the programs, in the order they were named.
    """

    consumers: tuple[Consumer, ...] = ()

    @classmethod
    def named(cls, names: Iterable[str]) -> ConsumerRules:
        """The rules of the programs in `names`; `all` stands for every one of CONSUMERS.

        Raises:
            SettingsError: a program is not known.
        """
        wanted = [name.strip().lower() for name in names]
        strange = [name for name in wanted if name not in CONSUMERS and name != _ALL]
        if strange:
            raise SettingsError([f"for={name}: must be one of {', '.join((*CONSUMERS, _ALL))}" for name in strange])
        return cls(tuple(CONSUMERS.values()) if _ALL in wanted else tuple(CONSUMERS[name] for name in dict.fromkeys(wanted)))

    @property
    def one_alpha(self) -> bool:
        """Whether every module needs the same alpha."""
        return any(consumer.one_alpha for consumer in self.consumers)

    @property
    def least_rank(self) -> int:
        """The smallest rank that all of them scale right."""
        return max((consumer.least_rank for consumer in self.consumers), default=1)

    def one_rank(self, layout: str, family: str) -> bool:
        """Whether the modules of a part of the model need one rank in a file of `layout` for a model of `family`."""
        return any(consumer.needs_one_rank(layout, family) for consumer in self.consumers)

    def kept_whole(self, names: Collection[str]) -> Collection[str]:
        """Those of the modules of a file that must not be dropped, because a program would refuse what is left: all or none."""
        return names if any(consumer.takes_whole for consumer in self.consumers) and is_taken_whole(names) else ()

    def adaptation(self, file: PlannedFile) -> Adaptation:
        """What must become of `file` so that all of them compute its update."""
        ranks = {name: max(module.rank, self.least_rank) for name, module in file.modules.items()}
        if self.one_rank(file.layout, file.family):
            largest: dict[str, int] = {}
            for name, module in file.modules.items():
                largest[module.part] = max(largest.get(module.part, 0), ranks[name])
            ranks = {name: largest[module.part] for name, module in file.modules.items()}
        alphas = {module.alpha for module in file.modules.values()}
        fold = file.layout in LAYOUTS_WITH_ALPHA and self.one_alpha and (len(alphas) > 1 or min(alphas, default=1.0) <= 0.0)
        mids = [name for name, module in file.modules.items() if any(_MID in key for key in module.extras)]
        merged = tuple(mids) if any(not consumer.merges_mid for consumer in self.consumers) else ()
        return Adaptation(ranks, 1.0 if fold else None, merged)

    def problems(self, file: PlannedFile) -> list[str]:
        """Why one of them could not load `file`, a sentence each with its remedy."""
        if not self.consumers:
            return []
        return [problem for consumer in self.consumers for problem in problems_of(consumer, file)]

    def notes(self, file: PlannedFile) -> list[str]:
        """What the user must be told: what a packed file needs, what was padded, which program leaves out what."""
        if file.save_format == "packed":
            return [f"{each.title} opens packed files with {each.packed_with}" for each in self.consumers if each.packed_with]
        found = []
        written = self.adaptation(file).ranks
        padded = [name for name, module in file.modules.items() if module.rank < written[name]]
        if padded:
            found.append(f"{len(padded)} of {len(file.modules)} modules padded with zeros to rank {max(written.values())}")
        for consumer in (each for each in self.consumers if file.family not in each.no_models_of):
            strange = consumer.strange(file.extras)
            dora = [key for key in strange if key.endswith("." + DORA)]
            if dora:
                found.append(f"{consumer.title} drops dora_scale of {len(dora)} modules: its images will differ")
            if consumer.name == "musubi" and file.layout not in LAYOUTS_WITH_ALPHA:
                found.append(f"{consumer.title} merges files in kohya's layout alone: run its convert_lora.py on this one first")
            rest = len(strange) - len(dora)
            if rest and not consumer.refuses_in(file.family):
                example = next(key for key in strange if key not in dora)
                found.append(f"{consumer.title} leaves out {rest} other tensors, {example} among them")
        return found


def opened_by(save_format: str, family: str = "unknown") -> str:
    """Which programs open a file of `save_format` (kohya, fp8 or packed) for a model of `family`, in words."""
    if save_format == "packed":
        return (
            "LoRA Compress alone: sd-scripts with --network_module networks.lora_compress, ComfyUI, AUTOMATIC1111, Forge, "
            "Forge Neo and reForge with our plug-ins, "
            "diffusers with lora_compress.diffusers.load_lora, lora_compress.load_lora in Python, "
            "or after `resize_lora_ext.py expand` everything that opens kohya LoRA"
        )
    float8 = save_format == "fp8"
    general = [consumer for consumer in CONSUMERS.values() if not consumer.name.startswith("diffusers-")]
    titles = [consumer.title for consumer in general if _opens_plain(consumer, float8, family)] + ["sd-scripts"]
    if float8 and family == "unknown":
        titles.append("diffusers for SD and SDXL")
    return ", ".join(titles)


def _opens_plain(consumer: Consumer, float8: bool, family: str) -> bool:
    if family in consumer.no_models_of:
        return False
    return not float8 or (consumer.casts and (consumer.fp8 is None or family in consumer.fp8))
