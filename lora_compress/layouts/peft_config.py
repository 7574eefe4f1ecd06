"""The LoRA configuration that PEFT and diffusers keep beside the weights: alpha lives there and not in the tensors."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FormatError
from ..files.regular import open_regular
from ..files.tensors import TensorFile

__all__ = ["CONFIG_NAME", "METADATA_KEY", "PeftConfig", "applies_to", "rewritten_config", "text_of_config"]

METADATA_KEY = "lora_adapter_metadata"  # JSON of one LoraConfig for each model, keys such as transformer.lora_alpha
CONFIG_NAME = "adapter_config.json"
_WRAPPER = "base_model.model."  # what PeftModel puts before the names of the base model's layers
_DEFAULT_ALPHA = 8  # LoraConfig.lora_alpha of PEFT, where a configuration leaves it out
_REGEX = frozenset("*+?()[]{}|\\")
_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_MORE = ("peft_type", "init_r", "alpha", "init_lora_weights", "use_qalora", "use_bdlora", "alora_invocation_tokens")
_OF_EVERY_METHOD = (  # fields of PEFT's configurations that do not depend on the method
    *("base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "task_type", "peft_version", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
)
_CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga")  # init_lora_weights with which PEFT subtracts from the base model


@dataclass(frozen=True)
class PeftConfig:
    """LoraConfig fields by model ("transformer", "unet", "text_encoder"; "" where the file names none).

    The update of a module is lora_alpha / r * B @ A, or lora_alpha / sqrt(r) with use_rslora; rank_pattern and alpha_pattern
    hold other values for modules by the end of their name (PEFT's documentation of LoraConfig).
    """

    source: str
    models: Mapping[str, Mapping[str, Any]]
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # likewise: what tells PEFT's methods apart
    _tables: dict[int, dict[tuple[str, bool], list[tuple[int, Any]]]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, file: TensorFile, given: str | os.PathLike[str] | None = None) -> PeftConfig:
        """The configuration of a file.

        It is `given`, an adapter_config.json or a folder with one, or else the header's lora_adapter_metadata, or else the
        adapter_config.json beside a file named adapter_model.

        Raises:
            FormatError: it is there and is no LoRA configuration.
        """
        if given is not None:
            return cls.read(Path(given) / CONFIG_NAME if os.path.isdir(given) else Path(given))
        if METADATA_KEY in file.metadata:
            return cls.parse(file.metadata[METADATA_KEY], f"{file.path}: {METADATA_KEY}")
        sidecar = file.path.with_name(CONFIG_NAME)
        if applies_to(file.path) and sidecar.is_file():
            return cls.read(sidecar)
        return cls("", {})

    @classmethod
    def read(cls, path: Path) -> PeftConfig:
        """An adapter_config.json.

        Raises:
            FormatError: it cannot be read, or is no LoRA configuration.
        """
        return cls.parse(text_of_config(path), str(path))

    @classmethod
    def parse(cls, text: str, source: str) -> PeftConfig:
        """A configuration from its text.

        Args:
            text: JSON.
            source: where it stands, for messages.

        Raises:
            FormatError: it is no LoRA configuration.
        """
        models: dict[str, dict[str, Any]] = {}
        more: dict[str, dict[str, Any]] = {}
        values = _loaded(text, source)
        for key, value in values.items() if isinstance(values, dict) else ():
            model, _, name = key.rpartition(".")
            if name in _FIELDS:
                models.setdefault(model, {})[name] = value
            elif name in _MORE:
                more.setdefault(model, {})[name] = value
        for model, fields in more.items():
            if fields.get("peft_type") == "LORA":
                models.setdefault(model, {}).setdefault("lora_alpha", _DEFAULT_ALPHA)
        return cls(source, models, more)

    def scale(self, name: str, rank: int) -> float | None:
        """What up @ down of a module is multiplied by; None where the configuration says nothing of it.

        Raises:
            FormatError: its alpha is no number, or a pattern is a regular expression.
        """
        model, module = self._model(name)
        config = self.models.get(model)
        if not config or "lora_alpha" not in config:
            return None
        alpha = self._pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e30:
            raise FormatError(f"{self.source}: lora_alpha {alpha!r} of {name}, allowed: a number")
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") is True else rank)

    def of_method(self, name: str) -> str:
        """PEFT's name of the method that a module was trained with, such as LORA, ADALORA or LOKR; "" where nothing tells it."""
        return str(self.more.get(self._model(name)[0], {}).get("peft_type") or "").upper()

    def number(self, name: str, key: str) -> float | None:
        """A number of the configuration of a module's model; None where it is absent or no finite number."""
        model = self._model(name)[0]
        value = {**self.more.get(model, {}), **self.models.get(model, {})}.get(key)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30 else None

    def lycoris_scale(self, name: str, rank: int | None) -> float | None:
        """alpha / r of PEFT's LoHa and LoKr, which keep alpha in the configuration; None where it does not say.

        Args:
            rank: of the factors; None where both matrices of a LoKr are whole, and r is that of the configuration.
        """
        alpha, module = self.number(name, "alpha"), self._model(name)[1]
        config = self.models.get(self._model(name)[0], {})
        if self.of_method(name) not in ("LOHA", "LOKR") or alpha is None:
            return None
        alpha, rank = (
            self._pattern(config.get("alpha_pattern"), module, alpha),
            rank or self._pattern(config.get("rank_pattern"), module, config.get("r")),
        )
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in (alpha, rank)) or not rank:
            raise FormatError(f"{self.source}: alpha {alpha!r} and r {rank!r} of {name}, allowed: numbers")
        return float(alpha) / rank

    def rank(self, name: str) -> int | None:
        """The rank that the configuration states for a module, None where it states none."""
        model, module = self._model(name)
        config = self.models.get(model) or {}
        rank = self._pattern(config.get("rank_pattern"), module, config.get("r"))
        return rank if type(rank) is int else None

    def changes_base(self) -> str:
        """The `init_lora_weights` with which PEFT subtracts a part of rank r from the base model's weights, "" where it does not.

        Such an adapter means something on that changed model alone, and at its own rank alone.
        """
        found = (str(fields.get("init_lora_weights", "")) for fields in self.more.values())
        return next((value for value in found if _CHANGES_BASE.match(value.lower())), "")

    @classmethod
    def rewritten(cls, metadata: Mapping[str, str], ranks: Mapping[str, int], where: object) -> dict[str, str]:
        """The metadata of a file, its configuration if it has one made true for a plain file of these ranks."""
        if METADATA_KEY not in metadata:
            return dict(metadata)
        old = metadata[METADATA_KEY]
        return {**metadata, METADATA_KEY: cls.parse(old, f"{where}: {METADATA_KEY}").metadata(ranks, old)}

    def metadata(self, ranks: Mapping[str, int], old: str) -> str:
        """The same JSON for a file of these ranks whose scales are in its factors: lora_alpha = r for every module."""
        values = json.loads(old)
        for model in self.models:
            own = {module: rank for name, rank in ranks.items() for owner, module in [self._model(name)] if owner == model}
            values |= {f"{model}.{name}" if model else name: value for name, value in _true_fields(own).items()}
        return json.dumps(values, sort_keys=True)

    def _model(self, name: str) -> tuple[str, str]:
        """The model that a module belongs to, and the module's name in it."""
        name = name.removeprefix(_WRAPPER)
        model, _, module = name.partition(".")
        return (model, module) if model in self.models and model else ("", name)

    def _pattern(self, patterns: object, module: str, default: object) -> Any:
        """The value of the first pattern that is the end of a module's name, as PEFT matches them."""
        if not isinstance(patterns, dict):
            return default
        endings = {module: True}  # of the name, and whether it is the whole of it
        for index, character in enumerate(module):
            if character == ".":
                endings[module[index + 1 :]] = False
        found = [(order, value) for ending, whole in endings.items() for order, value in self._written(patterns, ending, whole)]
        return min(found, key=lambda item: item[0])[1] if found else default

    def _written(self, patterns: dict[str, Any], ending: str, whole: bool) -> list[tuple[int, Any]]:
        """Position and value of the patterns that say `ending`, however they are written; anchored ones if it is the whole name."""
        table = self._tables.get(id(patterns))
        if table is None:
            table = self._tables[id(patterns)] = self._table(patterns)
        return [entry for anchored in ((False, True) if whole else (False,)) for entry in table.get((ending, anchored), ())]

    def _table(self, patterns: dict[str, Any]) -> dict[tuple[str, bool], list[tuple[int, Any]]]:
        """Patterns by the name they stand for.

        They are regular expressions to PEFT. Trainers write names; anything else is refused, because an expression from a file
        can be made to run forever.
        """
        table: dict[tuple[str, bool], list[tuple[int, Any]]] = {}
        for order, (key, value) in enumerate(patterns.items()):
            literal = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if _REGEX & set(literal):
                raise FormatError(
                    f"{self.source}: rank_pattern or alpha_pattern {key!r} is a regular expression, allowed: names of modules"
                )
            table.setdefault((literal, key.startswith("^")), []).append((order, value))
        return table


def text_of_config(path: Path) -> str:
    """The text of an adapter_config.json.

    Raises:
        FormatError: there is no such file, or it cannot be read.
    """
    try:
        with open_regular(path) as file:
            return file.read().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read ({error})") from error


def applies_to(path: Path) -> bool:
    """Whether PEFT and this program take the adapter_config.json beside a file for that of the file."""
    return path.stem.startswith("adapter_model")


def rewritten_config(text: str, ranks: Mapping[str, int], source: str, *, has_dora: bool, has_all: bool = True) -> str:
    """An adapter_config.json made true for a file whose scales are in its factors.

    r, lora_alpha, rank_pattern, alpha_pattern and use_rslora are set; use_dora becomes false where no magnitudes are left.
    Of another method than LoRA (AdaLoRA, LoHa, LoKr), whose modules were converted, it becomes a LoraConfig of the same layers.
    Everything else stays, but for `init_lora_weights` where it keeps PEFT from loading the file, or modules without weights random.

    Args:
        text: of the configuration.
        ranks: by module name, of all modules in the file.
        source: names the configuration in errors.
        has_dora: whether the file holds magnitudes of DoRA.
        has_all: whether it holds every module that the configuration targets; of others PEFT is to make zeros.

    Raises:
        FormatError: it is no JSON object.
    """
    values = _loaded(text, source)
    if not isinstance(values, dict):
        raise FormatError(f"{source}: holds a {type(values).__name__}, allowed: the JSON object of a LoraConfig")
    if str(values.get("peft_type", "LORA")).upper() != "LORA":  # what was converted is plain LoRA
        values = {key: value for key, value in values.items() if key in _OF_EVERY_METHOD} | {"peft_type": "LORA"}
    values |= _true_fields({name.removeprefix(_WRAPPER): rank for name, rank in ranks.items()})
    if values.get("use_dora") and not has_dora:
        values["use_dora"] = False
    begun = values.get("init_lora_weights", True)
    odd = begun == "orthogonal" and any(rank % 2 for rank in ranks.values())
    if odd or not (has_all or begun in (True, "gaussian", "eva")):
        values["init_lora_weights"] = True
    return json.dumps(values, indent=2)


def _true_fields(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The fields of a LoraConfig for modules of these ranks whose scale is 1: lora_alpha = r."""
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    ambiguous = _ambiguous(ranks)
    pattern = {_as_pattern(name, ambiguous): rank for name, rank in ranks.items() if rank != usual}
    return {"r": usual, "lora_alpha": usual, "use_rslora": False, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}


def _as_pattern(name: str, ambiguous: set[str]) -> str:
    """The key of a pattern. One that would match another module as well is tied to the beginning of the name."""
    return "^" + name.replace(".", "\\.") if name in ambiguous else name


def _ambiguous(names: Iterable[str]) -> set[str]:
    """Names that PEFT would find at the end of another module's name too, such as proj_out and blocks.0.proj_out."""
    names = list(names)
    endings: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        endings.update("_".join(parts[index:]) for index in range(len(parts)))
    return {name for name in names if endings[name.replace(".", "_")] > 1}


def _loaded(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{source}: no JSON ({error}): without it every alpha is read as the rank") from error
