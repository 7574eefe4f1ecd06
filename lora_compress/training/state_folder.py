"""The folder that a training is resumed from: it is written as a whole or not at all, and read with one clear error."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import FormatError, LoraCompressError

__all__ = ["put_back", "reading_state", "whole_folder"]


@contextmanager
def whole_folder(folder: Path, accelerator: Any, *, together: bool = True) -> Iterator[Path]:
    """A new folder to write a state to; it takes its name when it is complete, so that a kill leaves the one before usable.

    Args:
        folder: where the state is to be; a state that is there already is replaced as a whole.
        accelerator: tells which process is the main one, and lets the processes wait for each other.
        together: whether all processes save; False where the main process alone does, and must not wait for the others.
    """
    temporary, old = _beside(folder, "tmp"), _beside(folder, "old")
    wait = accelerator.wait_for_everyone if together else _go_on
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir(parents=True)
    wait()
    yield temporary
    if accelerator.is_main_process:
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    wait()


def put_back(folder: Path) -> None:
    """Give a state its name again when a kill came between the two renamings of `whole_folder`."""
    if not folder.exists() and (old := _beside(folder, "old")).is_dir():
        with suppress(FileNotFoundError):  # another process was faster
            os.replace(old, folder)


@contextmanager
def reading_state(folder: str | Path) -> Iterator[None]:
    """Turn whatever goes wrong while a state is read into one error that names its folder.

    Raises:
        FormatError: an error that is not one of this package was raised.
    """
    try:
        yield
    except LoraCompressError:
        raise
    except Exception as error:  # pickle, zip, torch and accelerate each have errors of their own for bytes that are wrong
        told = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        raise FormatError(
            f"resume={folder}: the state is damaged, or was not saved by this version ({told}): take an earlier one"
        ) from error


def _go_on() -> None:
    """For a process that saves alone."""


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")
