"""`--save_state` and `--resume` under sd-scripts: states are written whole, and checked before anything is loaded from them."""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lora_compress import CompressionSettings, FormatError, SettingsError
from lora_compress.files.header import read_header
from lora_compress.training.state_folder import put_back, reading_state, whole_folder

__all__ = ["check_resume", "check_state", "guard_states"]

_WEIGHTS, _OPTIMIZER, _SCALER = "model.safetensors", "optimizer.bin", "scaler.pt"
_FILES = (_WEIGHTS, _OPTIMIZER, "scheduler.bin", "random_states_0.pkl")  # in the order in which accelerate writes them
_SETTINGS = "compress_settings.json"  # ours
_SESSION = "compress_training."
_DOWN = ".lora_down.weight"
_START_ANEW = "resume with the settings that it was made with, or start a training from its LoRA file with --network_weights"


def check_resume(args: argparse.Namespace) -> None:
    """Check the folder that `--resume` names, before a model is loaded.

    What comes from Hugging Face is checked once it is here; a state of DeepSpeed has other files, which DeepSpeed checks itself.

    Raises:
        FormatError: it holds no state, or one that is unfinished or damaged.
    """
    if args.resume and not args.resume_from_huggingface and not getattr(args, "deepspeed", False):
        check_state(Path(args.resume).expanduser())


def check_state(folder: Path) -> None:
    """Check that a folder holds a whole state of a training.

    Raises:
        FormatError: it does not; the message names the newest whole state beside it.
    """
    put_back(folder)
    if problem := _problem(folder):
        beside = _newest_beside(folder)
        remedy = f"the newest whole state beside it is {beside}" if beside else "no whole state is beside it"
        other = "resume from that" if beside else "start a training from the last LoRA file with --network_weights"
        raise FormatError(f"resume={folder}: {problem}; {remedy}: {other}")


def guard_states(args: argparse.Namespace, accelerator: Any, network: Any) -> None:
    """Let `accelerator` write each state as a whole and without NaN, and check each state against `network` before it is loaded."""
    if getattr(args, "deepspeed", False):
        return
    save_state, load_state = accelerator.save_state, accelerator.load_state
    settings = _training_settings(getattr(network, "compression", None))

    def save_whole(output_dir: str, *rest: Any, **options: Any) -> Any:
        if hasattr(network, "check_finite"):
            network.check_finite(output_dir)
        with whole_folder(Path(output_dir), accelerator, together=False) as temporary:  # sd-scripts saves in the main process alone
            (temporary / _SETTINGS).write_text(json.dumps(settings | _optimizers(accelerator)), encoding="utf-8")
            return save_state(str(temporary), *rest, **options)

    def load_checked(input_dir: str, *rest: Any, **options: Any) -> None:
        check_state(Path(input_dir).expanduser())
        with reading_state(input_dir):
            load_state(input_dir, *rest, **options)

    def check_match(models: list[Any], input_dir: str) -> None:
        folder = Path(input_dir)
        for model in models:
            if accelerator.unwrap_model(model) is network:
                own = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
                _check_network(folder, own)
        _check_settings(folder, settings | _optimizers(accelerator))
        if accelerator.scaler is not None and not (folder / _SCALER).is_file():
            raise SettingsError([f"{folder} has no {_SCALER}: it was saved without mixed_precision=fp16: {_START_ANEW}"], "resume")

    accelerator.save_state, accelerator.load_state = save_whole, load_checked
    accelerator.register_load_state_pre_hook(check_match)


def _problem(folder: Path) -> str | None:
    """What makes a folder no whole state, None for a whole one."""
    if not folder.exists():
        return "there is no such folder"
    if not folder.is_dir():
        return "is a file: a state is a folder that --save_state writes, <output_name>-state or <output_name>-<number>-state"
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing == list(_FILES):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        return f"holds no state of a training (found: {found}; needed: {', '.join(_FILES)})"
    if missing:
        return f"the state is unfinished, {', '.join(missing)} missing: saving it was interrupted, or files were removed"
    for path in (folder / name for name in (*_FILES, _SCALER, _SETTINGS, "train_state.json")):
        if path.is_file() and (damage := _damage(path)):
            return f"the state is damaged, {path.name}: {damage}"
    return None


def _damage(path: Path) -> str | None:
    """What is wrong with a file of a state, None where nothing is."""
    if path.name == _WEIGHTS:
        try:
            header = read_header(path)
        except FormatError as error:
            return str(error).removeprefix(f"{path}: ")
        there, due = header.available, header.promised
        return None if there == due else f"{there:,} bytes of tensors are there, {due:,} are due"
    if path.suffix == ".json":
        try:
            is_object = isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
        except ValueError:
            is_object = False
        return None if is_object else "no JSON object"
    try:
        with zipfile.ZipFile(path) as archive:  # what torch.save writes
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        return f"{path.stat().st_size:,} bytes that torch.save has not written, or not to the end ({error})"
    return f"the checksum of {broken} is wrong" if broken else None


def _newest_beside(folder: Path) -> Path | None:
    """The newest whole state in the folder that `folder` is in; those that a kill left under a temporary name are hidden."""
    if not folder.parent.is_dir():
        return None
    states = [path for path in folder.parent.iterdir() if path != folder and path.name.endswith("-state") and path.is_dir()]
    for state in sorted(states, key=lambda path: path.stat().st_mtime, reverse=True):
        if not state.name.startswith(".") and _problem(state) is None:
            return state
    return None


def _check_network(folder: Path, own: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the shapes of a state's tensors with those of the network that is to go on from it.

    Raises:
        SettingsError: they differ.
    """
    header = read_header(folder / _WEIGHTS)
    twice = set(header.metadata)  # of tensors that share memory safetensors keeps one and names the others
    found = {key: tensor.shape for key, tensor in header.tensors.items()}
    if difference := next(_differences(found, own, twice), None):
        raise SettingsError(
            [f"{folder / _WEIGHTS} is of another network or of other settings: {difference}: {_START_ANEW}"], "resume"
        )


def _differences(found: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]], twice: set[str]) -> Iterator[str]:
    """What differs, the most telling first."""
    if _of_processes(found) != _of_processes(own):
        yield "it was saved by one process and this training has several, or the other way round"
    for key in own:
        if key.endswith(_DOWN) and key in found and found[key][0] != own[key][0]:
            yield f"network_dim is {found[key][0]} in the state and {own[key][0]} in this training ({key})"
    session_found, session_own = ({key for key in keys if _SESSION in key} for keys in (found, own))
    if bool(session_found) != bool(session_own):
        first, second = ("with", "without") if session_found else ("without", "with")
        yield f"it was made {first} iterative_pruning, qat or collect_calibration, this training is {second} them"
    for said, keys in (
        ("only in this training", own.keys() - found.keys() - twice),
        ("only in the state", found.keys() - own.keys()),
    ):
        if keys:
            yield f"{len(keys)} tensors are {said}, such as {min(keys)}"
    for key in own.keys() & found.keys():
        if own[key] != found[key]:
            yield f"{key} has shape {list(found[key])} in the state and {list(own[key])} in this training"


def _of_processes(keys: Mapping[str, Any]) -> bool:
    """Whether the keys are of a network that torch has wrapped for several processes."""
    return bool(keys) and all(key.startswith("module.") for key in keys)


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Compare the settings of pruning and quantization that act on the training; a state saved by sd-scripts' own script has none.

    Raises:
        SettingsError: they differ.
    """
    path = folder / _SETTINGS
    if not path.is_file():
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    problems = [
        f"{name} is {saved.get(name)} in the state and {settings.get(name)} in this training"
        for name in sorted(saved.keys() | settings.keys())
        if (name in saved or name != "optimizer") and saved.get(name) != settings.get(name)
    ]
    if problems:
        raise SettingsError([*problems, f"{path}: {_START_ANEW}"], "resume")


def _optimizers(accelerator: Any) -> dict[str, Any]:
    """Return the classes of the optimizers that `accelerator` saves: the state of one means nothing to another."""
    return {"optimizer": [type(getattr(each, "optimizer", each)).__name__ for each in accelerator._optimizers]}


def _training_settings(settings: CompressionSettings | None) -> dict[str, Any]:
    """Values by name of what changes the steps of a training; what concerns only its files may change between two runs."""
    if settings is None:
        return {}
    values, names = settings.as_dict(), set()
    if settings.training.iterative_pruning:
        names |= {field.name for part in (settings.pruning, settings.training) for field in fields(part)}
    if settings.quantized_training.qat:
        names |= {field.name for field in fields(settings.quantized_training)} | {"bits", "strategy", "group_size", "scale"}
    return {name: values[name] for name in sorted(names & values.keys())}
