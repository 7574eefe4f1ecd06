"""Small stand-ins for `pipeline.compress_file`, importable by the processes of a batch."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lora_compress import CompressionSettings, FormatError, atomic_path, compress_file
from lora_compress.files.writer import write_safetensors
from lora_compress.report.file_report import FileReport

LOG = "COMPRESSORS_LOG"  # names a file that gets a line for every call


def to_half(source: str, target: str, settings: CompressionSettings, *, details: dict[str, str], **_: Any) -> FileReport:
    """Casts every tensor to float16. A file with a tensor named `bad` is refused, one named `deadly` ends the process."""
    if os.environ.get(LOG):
        with open(os.environ[LOG], "a", encoding="utf-8") as log:
            log.write(os.path.basename(source) + "\n")
    tensors = load_file(source)
    if "bad" in tensors:
        raise FormatError(f"{source}: bad: is refused")
    if "unforeseen" in tensors:
        raise ZeroDivisionError("nobody thought of this")
    if "deadly" in tensors:
        os._exit(9)
    sizes = os.path.getsize(source), os.path.getsize(source)
    if "compact" in tensors:
        return FileReport(source, None, "not_smaller", "kohya", "sd1", sizes, 0.0, ())
    half = {name: tensor.half() for name, tensor in tensors.items()}
    with atomic_path(target) as temporary:
        write_safetensors(half, temporary, _told(details))
    return FileReport(source, str(target), "written", "kohya", "sd1", (sizes[0], os.path.getsize(target)), 0.0, (), ("halved",))


def _told(details: dict[str, str]) -> dict[str, str]:
    return {f"ss_compress_{name}": value for name, value in details.items()}


def disturbed(source: str, target: str, settings: CompressionSettings, **options: Any) -> FileReport:
    """`compress_file`, while another program does to the input, after its first module, what the name of the file says.

    The names begin with shrink, grow, vanish, replace, rewrite or nothing.
    """
    path, waiting = Path(source), [True]

    def disturb(done: int, count: int) -> None:
        if not waiting:
            return
        waiting.clear()
        match path.name.partition("-")[0]:
            case "shrink":
                os.truncate(path, path.stat().st_size // 3)
            case "grow":
                with open(path, "ab") as file:
                    file.write(bytes(4096))
            case "vanish":
                path.unlink()
            case "replace":
                other = path.with_suffix(".other")
                other.write_bytes(path.read_bytes()[::-1])
                os.replace(other, path)
            case "rewrite":
                path.write_bytes(path.read_bytes()[::-1])

    return compress_file(source, target, settings, progress=disturb, **options)


def slowly_to_half(source: str, target: str, settings: CompressionSettings, **options: Any) -> FileReport:
    """The same, with the temporary file half written for a while: what a kill finds."""
    with atomic_path(Path(target)) as temporary:
        temporary.write_bytes(Path(source).read_bytes()[:1000])
        time.sleep(0.15)
        half = {name: tensor.half() for name, tensor in load_file(source).items()}
        write_safetensors(half, temporary, _told(options["details"]))
        time.sleep(0.05)
    return FileReport(source, str(target), "written", "kohya", "sd1", (os.path.getsize(source), os.path.getsize(target)), 0.0, ())


def lora_file(path: Path, seed: int = 0, *, marker: str | None = None, size: int = 64) -> Path:
    """A kohya LoRA of one module, and a tensor named `marker`."""
    generator = torch.Generator().manual_seed(seed)
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(4, size, generator=generator),
        f"{name}.lora_up.weight": torch.randn(size, 4, generator=generator),
        f"{name}.alpha": torch.tensor(4.0),
    }
    if marker:
        tensors[marker] = torch.zeros(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(tensors, path, {"ss_output_name": "test"})
    return path
