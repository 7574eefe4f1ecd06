"""Where a result goes: into one file, or into the two files of a folder that PEFT can load."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import FormatError, SettingsError
from ..files.atomic import atomic_path
from ..files.regular import have_same_path
from ..layouts.peft_config import PeftConfig, applies_to, rewritten_config
from ..layouts.peft_folder import CONFIG_DETAIL, CONFIG_NAME, WEIGHTS_NAMES, PeftTemplate, metadata_of_file, template_of
from ..sources.open import open_lora

__all__ = ["AdapterOutput"]

_OF_ONE_FILE = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


@dataclass(frozen=True)
class AdapterOutput:
    """Where a result goes: one file, or the two files of a folder for PEFT.

    Args:
        weights: the file of weights.
        template: the configuration whose rewritten copy is to lie beside the weights; None: the result is a single file.
        remembered: the same for a single file, which keeps it in its metadata so that a folder can be made of it again.
    """

    weights: Path
    template: PeftTemplate | None = None
    remembered: PeftTemplate | None = None

    @classmethod
    def of(
        cls,
        source: Path,
        target: str | os.PathLike[str],
        given: str | os.PathLike[str] | None = None,
        *,
        packed: bool = False,
        force: bool = False,
    ) -> AdapterOutput:
        """Find out where the result of compressing `source` into `target` goes.

        A name that ends with .safetensors is a single file, any other name a folder. A file with the name that PEFT loads gets
        its configuration beside it where none is.

        Args:
            source: the weights that are read.
            target: as the user names it.
            given: the configuration of `source`, where it does not lie beside it.
            packed: whether the weights are written packed, which PEFT cannot read.
            force: whether the input itself may be replaced.

        Raises:
            SettingsError: a folder was asked for where there can be none, or a configuration of other weights lies beside the file.
            FormatError: the configuration cannot be read.
        """
        template = template_of(source, given)
        path = Path(target)
        if os.fspath(target).endswith(".safetensors"):
            return cls._single(source, path, template, packed, force)
        if template is None and not (path.is_dir() or os.fspath(target).endswith(("/", os.sep))):
            return cls(path)  # the name of no LoRA file, which is refused as such
        problem = ""
        if packed:
            problem = (
                f"PEFT reads no packed files, so that none goes into a folder: name a file, {path}.safetensors; "
                "`resize_lora_ext.py expand` makes a folder of it again"
            )
        elif template is None:
            problem = (
                f"is a folder for PEFT, and {source} has no {CONFIG_NAME}: end the name of a file with .safetensors, or state "
                "--peft_config FILE"
            )
        elif path.is_file():
            problem = "is a file, and a folder is written: choose another name"
        elif not force and _is_same(path / CONFIG_NAME, source.with_name(CONFIG_NAME)):
            problem = "is the input itself: choose another folder, or --force to replace it"
        if problem or template is None:
            raise SettingsError([f"{target}: {problem}"], "output")
        return cls(path / WEIGHTS_NAMES[0], _refuse_changed_base(template))

    @classmethod
    def _single(cls, source: Path, path: Path, template: PeftTemplate | None, packed: bool, force: bool) -> AdapterOutput:
        beside, mine = path.with_name(CONFIG_NAME), source.with_name(CONFIG_NAME)
        single = cls(path, remembered=template)
        if not applies_to(path):
            return single
        own = force and not packed and _is_same(beside, mine)
        if beside.exists() and not own and not _is_pair_of_ours(path):
            problem = (
                f"beside it lies {CONFIG_NAME}, which PEFT would apply to it and which is of other weights: write a folder, "
                f"--save_to {path.parent}{os.sep}, which gets its own, or choose another name than {path.name}"
            )
            raise SettingsError([f"{path}: {problem}"], "output")
        if packed or template is None or path.name != WEIGHTS_NAMES[0]:
            return single
        return cls(path, _refuse_changed_base(template))

    @property
    def is_folder(self) -> bool:
        """Whether a configuration is written too."""
        return self.template is not None

    def details(self) -> dict[str, str]:
        """Return what a single file keeps in its metadata of the configuration that it came with."""
        if self.remembered is None:
            return {}
        values = json.loads(self.remembered.text)
        kept = {key: value for key, value in values.items() if key not in _OF_ONE_FILE} if isinstance(values, dict) else {}
        return {CONFIG_DETAIL: json.dumps(kept, separators=(",", ":"))} if kept else {}

    @contextmanager
    def written_beside(self, ranks: Mapping[str, int], has_dora: bool, has_all: bool = True) -> Iterator[None]:
        """Write the configuration of weights whose scales are in their factors when the block ends without an error.

        Args:
            ranks: of all modules in the file.
            has_dora: whether it holds magnitudes of DoRA.
            has_all: whether it is sure to hold every module that the configuration targets.
        """
        yield
        if self.template is None:
            return
        text = rewritten_config(self.template.text, ranks, self.template.source, has_dora=has_dora, has_all=has_all)
        with atomic_path(self.weights.with_name(CONFIG_NAME)) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def notes(self) -> list[str]:
        """Return what the user must know of the configuration, one sentence each."""
        if self.template is not None:
            return [f"{CONFIG_NAME} was written beside the weights: r and lora_alpha are their ranks, so that every scale is 1"]
        if self.remembered is not None:
            return [f"alpha is part of the factors: do not put the {CONFIG_NAME} of the input beside this file"]
        return []


def _is_same(one: Path, other: Path) -> bool:
    return one.exists() and have_same_path(one, other)


def _refuse_changed_base(template: PeftTemplate) -> PeftTemplate:
    """Raises: SettingsError: PEFT changes the base model by this adapter's rank as it loads it."""
    way = PeftConfig.parse(template.text, template.source).changes_base() if os.path.isfile(template.source) else ""
    if not way:
        return template
    problem = (
        f"init_lora_weights is {way!r}: PEFT subtracts a decomposition of rank r from the base model as it loads such an adapter, "
        "so that another rank would mean another model: convert it with PEFT first (save_pretrained with "
        "path_initial_model_for_weight_conversion)"
    )
    raise SettingsError([f"{template.source}: {problem}"], "output")


def _is_pair_of_ours(weights: Path) -> bool:
    """Whether a file and the configuration beside it were written together by this program, and fit each other still."""
    try:
        if not any(key.startswith("ss_compress_") for key in metadata_of_file(weights)):
            return False
        config = PeftConfig.read(weights.with_name(CONFIG_NAME))
        with open_lora(weights) as lora:
            ranks = {name: shape.rank for name, shape in lora.shapes.items()}
        return all(config.rank(name) == rank and config.scale(name, rank) == 1.0 for name, rank in ranks.items())
    except FormatError:
        return False
