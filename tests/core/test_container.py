"""Files: what `save` writes `load_lora` reads, and what is no LoRA is refused in a sentence."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from core.factories import mixed_updates, random_update
from core.mutations import joined, pack, split, unpack
from core.samples import CODECS, dense_file, kohya_file, packed_file, relative_error
from safetensors import safe_open
from safetensors.torch import save_file

from lora_compress import (
    CompressionSettings,
    FormatError,
    LoraSource,
    LowRankUpdate,
    as_kohya,
    compress,
    is_packed,
    kohya_partner,
    load_lora,
    open_lora,
    save,
)
from lora_compress.engine.to_file import compress_file
from lora_compress.engine.unpack import expand_file
from lora_compress.packed.file import INDEX_KEY, PAYLOAD_KEY, PackedFile

SETTINGS = [
    {"bits": 4},
    {"bits": 8, "strategy": "static"},
    {"bits": 4, "strategy": "nf4", "rank_ratio": 0.3, "min_rank": 1},
    {"bits": 4, "save_format": "both"},
    {"bits": 4, "save_format": "kohya"},
    {"save_format": "fp8"},
    {"rank_ratio": 0.5},
    {},
]


def assert_same(found: dict[str, LowRankUpdate], wanted: dict[str, LowRankUpdate]) -> None:
    assert found.keys() == wanted.keys()
    for name, update in wanted.items():
        assert torch.equal(found[name].down.float(), update.down.float()), name
        assert torch.equal(found[name].up.float(), update.up.float()), name
        assert found[name].alpha == update.alpha, name
        assert found[name].down.shape == update.down.shape, name
        assert found[name].up.shape == update.up.shape, name


@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_a_saved_file_loads_as_what_was_compressed(values: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    settings = CompressionSettings.parse(values)
    lora = compress(mixed_updates(), settings, torch.float16, {"ss_base_model_version": "sd_v1"})
    save(lora, path, torch.float16)
    loaded = load_lora(path)
    assert_same(loaded.updates, lora.updates)
    assert loaded.others == {}
    assert loaded.metadata["ss_base_model_version"] == "sd_v1"
    assert loaded.packed == is_packed(path) == (settings.save_format in ("packed", "both"))
    assert kohya_partner(path).exists() == (settings.save_format == "both")
    assert not list(tmp_path.glob(".*"))


def test_the_partner_holds_the_same_weights_in_kohyas_keys(tmp_path: Path) -> None:
    lora = compress(mixed_updates(), CompressionSettings.parse({"bits": 4, "save_format": "both"}))
    save(lora, tmp_path / "a.v1.safetensors", torch.float32)
    partner = load_lora(tmp_path / "a.v1.kohya.safetensors")
    assert not partner.packed
    for name, update in lora.updates.items():
        torch.testing.assert_close(partner.updates[name].dense(), update.dense(), rtol=1e-5, atol=1e-7)


def test_a_packed_file_is_known_without_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    lora = compress(mixed_updates(), CompressionSettings.parse({"bits": 4}))
    save_file(lora.tensors, path)
    assert is_packed(path)
    assert load_lora(path).packed
    assert_same(load_lora(path).updates, lora.updates)


def test_other_tensors_are_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    lora = compress({"lora_unet_a": random_update()}, CompressionSettings.parse({"bits": 8}))
    save_file({**lora.tensors, "emb_params": torch.ones(3, 4)}, path)
    assert torch.equal(load_lora(path).others["emb_params"], torch.ones(3, 4))


@pytest.mark.parametrize("suffix", ["pt", "ckpt"])
def test_pickled_weights_load(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"lora.{suffix}"
    updates = mixed_updates()
    torch.save(as_kohya(updates), path)
    assert_same(load_lora(path).updates, updates)
    assert not is_packed(path)


class _Trap:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("pickles may run anything",)


def _write_bad(kind: str, folder: Path) -> tuple[Path, str]:
    """A path that cannot be loaded, and what the error must say besides the path."""
    path = folder / "lora.safetensors"
    lora = compress({"lora_unet_a": random_update()}, CompressionSettings.parse({"bits": 8}))
    match kind:
        case "missing":
            return path, "no such file"
        case "missing pickle":
            return folder / "lora.pt", "no such file"
        case "folder":
            path.mkdir()
            return path, "no such file"
        case "text":
            path.write_text("this is not it")
            return path, "no safetensors file"
        case "empty":
            path.touch()
            return path, "no safetensors file"
        case "truncated":
            save(lora, path)
            path.write_bytes(path.read_bytes()[:-7])
            return path, "cut short"
        case "truncated header":
            save(lora, path)
            path.write_bytes(path.read_bytes()[:40])
            return path, "cut short"
        case "version":
            save_file(lora.tensors, path, {"lora_compress_format": "2"})
            return path, "packed format 2.* reads 1: update LoRA Compress"
        case "record":
            save_file({key: tensor[:-1] for key, tensor in lora.tensors.items()}, path, {"lora_compress_format": "1"})
            return path, "its index cannot be read"
        case "lonely down":
            save_file({"lora_unet_a.lora_down.weight": torch.zeros(4, 3)}, path)
            return path, "lora_unet_a.lora_up.weight: is missing"
        case "pickle list":
            torch.save([torch.zeros(3)], folder / "lora.pt")
            return folder / "lora.pt", "holds a list"
        case "pickle code":
            torch.save({"a": _Trap()}, folder / "lora.ckpt")
            return folder / "lora.ckpt", "cannot be read as weights alone.*convert it to .safetensors"
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        *("missing", "missing pickle", "folder", "text", "empty", "truncated", "truncated header"),
        *("version", "record", "lonely down", "pickle list", "pickle code"),
    ],
)
def test_what_is_no_lora_is_refused_with_its_path(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, message = _write_bad(kind, tmp_path)
    with pytest.raises(FormatError, match=f"(?s)^{path}: .*{message}"):
        load_lora(path)
    assert "run anything" not in capsys.readouterr().out


def test_metadata_tells_what_was_done(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    report = save(compress(mixed_updates(), CompressionSettings.parse({"bits": 4, "rank_ratio": 0.5, "min_rank": 1})), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["lora_compress_format"] == "1"
    told = {key.removeprefix("ss_compress_"): value for key, value in metadata.items() if key.startswith("ss_compress_")}
    assert told == {
        "rank_ratio": "0.5",
        "norm_threshold": "0.0",
        "min_rank": "1",
        "bits": "4",
        "strategy": "dynamic",
        "group_size": "64",
        "save_format": "packed",
        "modules": "4/4",
        "components": f"{report.total.components[1]}/32",
        "relative_error": f"{report.total.relative_error:.6e}",
    }
    assert json.loads(told["components"].split("/")[0]) == sum(update.rank for update in load_lora(path).updates.values())


PROGRESSIVE = {"bits": 5, "strategy": "entropy", "progressive": True}


@pytest.fixture(scope="module")
def progressive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A progressive file, and the dense updates that it was made of."""
    folder = tmp_path_factory.mktemp("progressive")
    source = kohya_file(folder / "source.safetensors", count=5, width=64, rank=16)
    compress_file(source, folder / "lora.safetensors", CompressionSettings.parse(PROGRESSIVE))
    return folder / "lora.safetensors", dense_file(source)


def beginning(path: Path, size: int, folder: Path) -> PackedFile:
    """The first bytes of a file, opened as any file is."""
    cut = folder / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:size])
    source = open_lora(cut)
    assert isinstance(source, PackedFile)
    return source


def index_end(path: Path) -> int:
    """Where the payload begins, which is last in the file."""
    return path.stat().st_size - sum(length for _, length, _ in PackedFile(path).index.chunks)


def test_every_beginning_of_a_progressive_file_is_a_smaller_lora(progressive, tmp_path: Path) -> None:
    """At any byte at all: it opens, decodes, and its error only falls with what is there."""
    path, exact = progressive
    first, end = index_end(path), path.stat().st_size
    sizes = sorted({first, first + 1, end - 1, end, *(random.Random(0).randrange(first, end) for _ in range(40))})
    errors = []
    for size in sizes:
        source = beginning(path, size, tmp_path)
        assert set(source) | set(source.missing) == exact.keys()
        assert source.complete == (size == end)
        assert source.available <= size - first
        assert bool(source.notes) == (size < end)
        errors.append(relative_error({name: source[name] for name in source}, exact))
    assert errors[0] == 1.0
    assert all(later <= 1.0001 * earlier for earlier, later in itertools.pairwise(errors))
    assert relative_error(load_lora(path).updates, exact) == errors[-1] < 0.05
    half = errors[next(i for i, size in enumerate(sizes) if size > first + 0.5 * (end - first))]
    assert half < 0.3, "the first half holds most of it"


def test_a_packed_file_is_opened_as_any_other(progressive) -> None:
    """All that a source of another layout has, a packed one has."""
    path, exact = progressive
    with open_lora(path) as source:
        assert isinstance(source, PackedFile)
        missing = [name for name in dir(LoraSource) if not name.startswith("_") and not hasattr(source, name)]
        assert missing == []
        with open_lora(path.with_name("source.safetensors")) as original:
            assert (source.layout, source.family, source.path) == (original.layout, original.family, path)
        assert {source.part(name) for name in source} == {"U-Net", "text encoder"}
        assert source.shapes.keys() == exact.keys()
        assert sum(source.factor_bytes(name) for name in source) == path.stat().st_size - index_end(path)


def test_a_beginning_without_the_whole_index_is_refused(progressive, tmp_path: Path) -> None:
    path, _ = progressive
    for size in {0, 7, 8, 100, index_end(path) - 1, *range(200, index_end(path), 211)}:
        with pytest.raises(FormatError, match=r"^.*cut\.safetensors: "):
            beginning(path, size, tmp_path)


def test_a_beginning_that_lacks_modules_is_no_whole_lora(progressive, tmp_path: Path) -> None:
    path, exact = progressive
    two = sum(length for _, length, _ in PackedFile(path).index.chunks[:2])
    source = beginning(path, index_end(path) + two, tmp_path)
    assert 0 < len(source.missing) < len(exact) - 1
    with pytest.raises(FormatError, match=f"{len(source.missing)} modules are missing: get it again"):
        load_lora(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("codec", ["int4", "mixed", "entropy"])
def test_the_beginning_of_another_file_has_whole_modules_alone(codec: str, tmp_path: Path) -> None:
    path = packed_file(codec, kohya_file(tmp_path / "source.safetensors", width=32), tmp_path / "lora.safetensors")
    whole = load_lora(path).updates
    seen = set()
    for size in range(index_end(path), path.stat().st_size, 97):
        source = beginning(path, size, tmp_path)
        assert_same(dict(source), {name: whole[name] for name in source})
        assert [*source] == [*whole][: len(source)]
        seen.add(len(source))
    assert seen == set(range(len(whole)))


@pytest.mark.parametrize("codec", CODECS)
def test_a_changed_byte_of_the_payload_is_noticed(codec: str, tmp_path: Path) -> None:
    """The module that it belongs to is refused, every other one is what it was."""
    path = packed_file(codec, kohya_file(tmp_path / "source.safetensors", count=3, width=24, rank=6), tmp_path / "lora.safetensors")
    data, whole, begin = path.read_bytes(), dict(PackedFile(path)), index_end(path)
    for place in random.Random(codec).sample(range(begin, len(data)), 12):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        source, refused = PackedFile(path), []
        for name in source:
            try:
                assert_same({name: source[name]}, {name: whole[name]})
            except FormatError as error:
                assert f"{path}: {name}: " in str(error)
                refused.append(name)
        assert len(refused) == 1


HEADERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "metadata of numbers": lambda header: header.update(__metadata__={"a": 1}),
    "metadata that are no text": lambda header: header.update(__metadata__={"a": "\ud800"}),
    "metadata as a list": lambda header: header.update(__metadata__=["a"]),
    "a payload of floats": lambda header: header[PAYLOAD_KEY].update(dtype="F64"),
    "an unknown dtype": lambda header: header[INDEX_KEY].update(dtype="Q2"),
    "a payload longer than its chunks": lambda header: header[PAYLOAD_KEY].update(shape=[2**30], data_offsets=[0, 2**30]),
    "a negative offset": lambda header: header[INDEX_KEY].update(data_offsets=[-100, -1]),
    "a shape of fractions": lambda header: header[INDEX_KEY].update(shape=[2.0]),
    "no offsets": lambda header: header[INDEX_KEY].pop("data_offsets"),
    "an entry that is none": lambda header: header.update({INDEX_KEY: 7}),
    "an index beyond the file": lambda header: header[INDEX_KEY].update(shape=[9], data_offsets=[2**40, 2**40 + 9]),
    "a tensor under the key of a module": lambda header: header.update(
        {"lora_unet_mid_block_attentions_0_proj_in.alpha": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    ),
}


@pytest.mark.parametrize("lie", HEADERS)
def test_a_header_that_lies_is_refused(lie: str, tmp_path: Path) -> None:
    path = packed_file(
        "int4", kohya_file(tmp_path / "source.safetensors", count=2, width=24, rank=6), tmp_path / "lora.safetensors"
    )
    header, body = split(path.read_bytes())
    HEADERS[lie](header)
    path.write_bytes(joined(header, body))
    with pytest.raises(FormatError, match=rf"^{path}: "):
        load_lora(path)


def test_large_and_long_headers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    large = rf"{path}: a header of (more than )?\d+ (bytes|values), allowed: \d+: it is no LoRA"
    for data, message in (
        (b"\xff" * 8 + b"{}", "no safetensors file, or cut short"),
        ((2**27).to_bytes(8, "little") + b" " * 2**27, large),
        ((2**21).to_bytes(8, "little") + b"[" * 2**21, large),
        ((2**10).to_bytes(8, "little") + b"[" * 2**10, "no safetensors file, or cut short"),
    ):
        path.write_bytes(data)
        for open_it in (PackedFile, open_lora):
            with pytest.raises(FormatError, match=message):
                open_it(path)
        assert not is_packed(path)


def test_every_flipped_bit_of_what_a_packed_file_carries_is_noticed(tmp_path: Path) -> None:
    source, path = tmp_path / "source.safetensors", tmp_path / "packed.safetensors"
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(4, 640, generator=torch.Generator().manual_seed(0)),
        f"{name}.lora_up.weight": torch.randn(640, 4, generator=torch.Generator().manual_seed(1)),
        f"{name}.alpha": torch.tensor(4.0),
        f"{name}.dora_scale": torch.ones(1, 5),
        "bundle_emb.a": torch.ones(5),
    }
    save_file(tensors, source)
    compress_file(source, path, CompressionSettings.parse({"bits": 4}))
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:begin])
    places = [8 * (begin + i) for key in ("bundle_emb.a", f"{name}.dora_scale") for i in range(*header[key]["data_offsets"])]
    at = [whole.index(key.encode()) for key in ("bundle_emb.a", f"{name}.dora_scale")]
    places += [8 * i for place, length in zip(at, (12, len(name) + 11), strict=True) for i in range(place, place + length)]
    for place in (place + bit for place in places for bit in range(0, 8, 3)):
        wrong = bytearray(whole)
        wrong[place // 8] ^= 1 << place % 8
        path.write_bytes(wrong)
        with pytest.raises(FormatError):
            load_lora(path)
    path.write_bytes(whole)
    assert torch.equal(load_lora(path).others["bundle_emb.a"], tensors["bundle_emb.a"])


@pytest.mark.parametrize("verb", ["compress", "expand"])
def test_a_result_that_could_not_be_read_again_is_not_written(verb: str, tmp_path: Path) -> None:
    source = kohya_file(tmp_path / "source.safetensors", count=3, width=640, rank=8)
    path = packed_file("int8", source, tmp_path / "packed.safetensors")
    metadata, index, payload, others = unpack(path.read_bytes())
    down, up, alpha = index["keys"][0]
    index["keys"][0] = [down, alpha, up]
    path.write_bytes(pack(metadata, index, payload, others))
    target = tmp_path / "out.safetensors"
    target.write_text("old")
    with pytest.raises(FormatError, match="was not written, because it could not be read again"):
        if verb == "expand":
            expand_file(path, target)
        else:
            compress_file(path, target, CompressionSettings.parse({"new_rank": 2}), save_dtype=torch.float16)
    assert target.read_text() == "old"
