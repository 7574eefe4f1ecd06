"""The reader itself: lazy, in file order, safe for threads, true about what it leaves alone."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from core.layouts.files import dense, product, random, save

from lora_compress import FormatError
from lora_compress.files.tensors import TensorFile
from lora_compress.sources.open import open_lora


def network(count: int = 3, rank: int = 2) -> dict[str, torch.Tensor]:
    result = {}
    for index in range(count):
        result[f"lora_unet_m{index}.lora_down.weight"] = random(rank, 8, seed=index)
        result[f"lora_unet_m{index}.lora_up.weight"] = random(6, rank, seed=index + 100)
        result[f"lora_unet_m{index}.alpha"] = torch.tensor(float(index + 1))
    return result


def test_opening_reads_alphas_and_a_module_reads_its_own_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save({**network(), "lora_unet_m0.dora_scale": random(6), "emb": random(3)}, tmp_path)
    read: list[str] = []
    original = TensorFile.read
    monkeypatch.setattr(TensorFile, "read", lambda self, key: read.append(key) or original(self, key))
    source = open_lora(path)
    assert sorted(read) == [f"lora_unet_m{i}.alpha" for i in range(3)]
    assert source.shapes["lora_unet_m0"].rank == 2
    assert source.factor_bytes("lora_unet_m1") == 4 * (2 * 8 + 2 * 6 + 1)
    assert len(source.others) == 1
    read.clear()
    source["lora_unet_m1"]
    assert sorted(read) == ["lora_unet_m1.lora_down.weight", "lora_unet_m1.lora_up.weight"]
    read.clear()
    source.extras("lora_unet_m0")
    assert read == ["lora_unet_m0.dora_scale"]


def test_many_threads_read_what_one_reads(tmp_path: Path) -> None:
    tensors = network(count=40)
    source = open_lora(save(tensors, tmp_path))
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda name: dense(source[name]), list(source) * 5))
    for name, result in zip(list(source) * 5, results, strict=True):
        alpha = float(tensors[f"{name}.alpha"]) / 2
        expected = alpha * product(tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"])
        torch.testing.assert_close(result, expected)


def test_modules_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = network(count=12)
    save(tensors, tmp_path)
    offsets = {name: os.path.getsize(path) for name in open_lora(path)}
    data = path.read_bytes()
    for name in offsets:
        offsets[name] = data.index(tensors[f"{name}.lora_down.weight"].numpy().tobytes())
    assert list(open_lora(path)) == sorted(offsets, key=offsets.__getitem__)


def test_what_belongs_to_no_update_is_kept_to_the_bit(tmp_path: Path) -> None:
    others = {
        "bundle_emb.word.string_to_param.*": random(2, 4).half(),
        "lora_unet_n.w_norm": random(5),
        "emb_params": random(3, 3),
        "count": torch.tensor([7], dtype=torch.int64),
        "lora_unet_gone.alpha": torch.tensor(3.0),
        "lora_unet_m0.diff_b": random(6),
        "flag": torch.tensor([True]),
    }
    tied = {"lora_unet_m0.dora_scale": random(6, 1).bfloat16(), "lora_unet_m1.reshape_weight": torch.tensor([6, 8])}
    source = open_lora(save({**network(), **others, **tied}, tmp_path))
    assert source.others.keys() == others.keys()
    for key, tensor in others.items():
        assert source.others[key].dtype == tensor.dtype
        assert torch.equal(source.others[key], tensor)
    for key, tensor in tied.items():
        (again,) = source.extras(key.split(".")[0]).values()
        assert again.dtype == tensor.dtype
        assert torch.equal(again, tensor)
    assert source.extras("lora_unet_m2") == {}
    with pytest.raises(KeyError):
        source.others["lora_unet_m0.alpha"]


@pytest.mark.parametrize("suffix", [".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.default.weight"])
def test_dora_is_carried_with_its_module(suffix: str, tmp_path: Path) -> None:
    tensors = {"x.lora_A.weight": random(2, 4), "x.lora_B.weight": random(3, 2), f"x{suffix}": random(3)}
    source = open_lora(save(tensors, tmp_path))
    assert torch.equal(source.extras("x")[f"x{suffix}"], random(3))


def test_the_type_is_that_of_most_weights(tmp_path: Path) -> None:
    tensors = network(count=2)
    tensors["lora_unet_m0.lora_down.weight"] = random(2, 8).half()
    assert open_lora(save(tensors, tmp_path)).dtype == torch.float32
    wide = {"lora_unet_w.lora_down.weight": random(2, 90).bfloat16(), "lora_unet_w.lora_up.weight": random(90, 2).bfloat16()}
    assert open_lora(save({**tensors, **wide}, tmp_path)).dtype == torch.bfloat16


@pytest.mark.parametrize("layouts", [("kohya", "loha"), ("peft", "diffusers")])
def test_layouts_may_be_mixed_and_each_module_keeps_its_own(layouts: tuple[str, str], tmp_path: Path) -> None:
    parts = {
        "kohya": {
            "a.lora_down.weight": (2, 4),
            "a.lora_up.weight": (3, 2),
            "a2.lora_down.weight": (2, 4),
            "a2.lora_up.weight": (3, 2),
        },
        "loha": {"b.hada_w1_a": (3, 2), "b.hada_w1_b": (2, 4), "b.hada_w2_a": (3, 2), "b.hada_w2_b": (2, 4)},
        "peft": {"c.lora_A.weight": (2, 4), "c.lora_B.weight": (3, 2), "c2.lora_A.weight": (2, 4), "c2.lora_B.weight": (3, 2)},
        "diffusers": {"d.lora.down.weight": (2, 4), "d.lora.up.weight": (3, 2)},
    }
    source = open_lora(save({key: random(*size) for layout in layouts for key, size in parts[layout].items()}, tmp_path))
    assert source.layout == layouts[0]
    assert len(source) == 3
    ends = {key.rsplit(".lora", 1)[-1] for name in source for key in source.plain_keys(name).of_module(name)}
    kohya = {"_down.weight", "_up.weight"}
    expected = {"kohya": kohya, "loha": kohya, "peft": {"_A.weight", "_B.weight"}, "diffusers": {".down.weight", ".up.weight"}}
    assert expected[layouts[0]] | expected[layouts[1]] <= ends


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".pth"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_files_are_read_as_weights_alone(suffix: str, nested: bool, legacy: bool, tmp_path: Path) -> None:
    tensors = network()
    path = tmp_path / f"lora{suffix}"
    torch.save(
        {"state_dict": tensors, "step": 3} if nested else {**tensors, "note": "text"},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    source = open_lora(path)
    assert source.metadata == {}
    for name, update in source.items():
        assert torch.equal(update.down, tensors[f"{name}.lora_down.weight"])


class _Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def test_a_pickle_that_runs_code_is_refused_without_running_it(tmp_path: Path) -> None:
    path = tmp_path / "lora.pt"
    torch.save({**network(), "x": _Touch(str(tmp_path / "touched"))}, path)
    with pytest.raises(FormatError, match=r"lora\.pt: cannot be read as weights alone"):
        open_lora(path)
    assert not (tmp_path / "touched").exists()


def test_a_tensor_that_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.pt"
    torch.save({"m.lora_down.weight": torch.ones(1).expand(10**6, 10**6), "m.lora_up.weight": torch.ones(3, 10**6)}, path)
    with pytest.raises(FormatError, match=r"m\.lora_down\.weight: \(1000000, 1000000\) is more than the file holds"):
        open_lora(path)


def test_a_file_can_be_replaced_after_closing_and_its_tensors_live_on(tmp_path: Path) -> None:
    path = save(network(), tmp_path)
    with open_lora(path) as source:
        down = source["lora_unet_m0"].down
    before = down.clone()
    save(network(count=1, rank=1), tmp_path, name="new.safetensors").replace(path)
    assert torch.equal(down, before)
    with pytest.raises(FormatError, match="cannot be read"):
        source["lora_unet_m1"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.weight": torch.ones(3, 3)}, "holds no low-rank update that is known here"),
        ({"a.oft_blocks": torch.ones(2, 3, 3)}, "holds no low-rank update .* OFT or BOFT multiplies the base"),
    ],
)
def test_what_is_no_lora_is_refused(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message):
        open_lora(save(tensors, tmp_path))


def test_no_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path, tmp_path / "absent.pt"):
        with pytest.raises(FormatError, match="no such file"):
            open_lora(path)


def test_a_file_of_twenty_thousand_modules_is_read(tmp_path: Path) -> None:
    down, up, alpha = torch.ones(1, 2), torch.ones(2, 1), torch.tensor(1.0)
    tensors = {}
    for number in range(20_000):
        name = f"lora_unet_down_blocks_{number}_proj_in"
        tensors |= {f"{name}.lora_down.weight": down.clone(), f"{name}.lora_up.weight": up.clone(), f"{name}.alpha": alpha.clone()}
    with open_lora(save(tensors, tmp_path)) as source:
        assert len(source) == 20_000
        assert float(dense(source["lora_unet_down_blocks_19999_proj_in"]).sum()) == 4.0
