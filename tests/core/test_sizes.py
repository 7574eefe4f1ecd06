"""What a file may weigh: its precision under a budget, no growth, and what is known of a file that is not written."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from core.layouts.files import save
from core.samples import dense_file, kohya_file, relative_error, sample_file
from rich.console import Console
from safetensors.torch import load_file, save_file

from lora_compress import CompressionSettings, FormatError, SettingsError, load_lora
from lora_compress.batch import CompressOptions, Job, run_job
from lora_compress.cli import main
from lora_compress.cli.batch import _table as batch_table
from lora_compress.engine.energy import energy_notes
from lora_compress.engine.precision import Factors, budget_precisions, half_precision
from lora_compress.engine.to_file import compress_file
from lora_compress.inspection.file import inspect_file
from lora_compress.packed.file import PackedFile
from lora_compress.report.html_batch import batch_page

FP8 = torch.float8_e4m3fn
RealLora = Callable[[str], Path]


def settings(**values: object) -> CompressionSettings:
    return CompressionSettings.parse(values)


def precisions(path: Path) -> set[torch.dtype]:
    return {tensor.dtype for key, tensor in load_file(path).items() if ".lora_" in key}


def scaled(path: Path, factor: float, dtype: torch.dtype = torch.float32) -> Path:
    """A file whose factors are multiplied each by `factor`."""
    tensors = load_file(kohya_file(path, count=6, width=96, rank=16, convolutions=False))
    return save(
        {k: t if k.endswith("alpha") else (t.float() * factor).to(dtype) for k, t in tensors.items()}, path.parent, name=path.name
    )


# Precision as part of a budget


@pytest.mark.parametrize("budget", [{"target_error": 0.05}, {"target_size": "40kB"}], ids=str)
def test_a_budget_stores_32_bit_files_in_16(budget: dict[str, object], tmp_path: Path) -> None:
    source = scaled(tmp_path / "in.safetensors", 1.0)
    small, named = tmp_path / "small.safetensors", tmp_path / "named.safetensors"
    report = compress_file(source, small, settings(**budget))
    other = compress_file(source, named, settings(**budget), save_dtype=torch.float32)
    assert precisions(small) == {torch.float16} and precisions(named) == {torch.float32}
    assert report.bytes[1] < 0.6 * other.bytes[1] or report.relative_error < 0.7 * other.relative_error
    assert any("float16" in note and "--save_precision" in note for note in report.notes)
    assert not any("--save_precision" in note for note in other.notes)
    found = relative_error(load_lora(small).updates, dense_file(source))
    assert found == pytest.approx(report.relative_error, rel=1e-3)


@pytest.mark.parametrize("factor", [3e-7, 3e3])
def test_weights_that_float16_does_not_hold_are_stored_in_bfloat16(factor: float, tmp_path: Path) -> None:
    source, target = scaled(tmp_path / "in.safetensors", factor), tmp_path / "out.safetensors"
    report = compress_file(source, target, settings(target_error=0.05))
    assert precisions(target) == {torch.bfloat16} and report.relative_error <= 0.05


def test_an_error_that_16_bits_do_not_reach_keeps_32(tmp_path: Path) -> None:
    source, target = scaled(tmp_path / "in.safetensors", 1.0), tmp_path / "out.safetensors"
    report = compress_file(source, target, settings(target_error=1e-4, allow_larger=True))
    assert precisions(target) == {torch.float32} and report.relative_error <= 1e-4


@pytest.mark.parametrize("values", [{"new_rank": 8}, {"rank_ratio": 0.5}, {"norm_threshold": 0.01}], ids=str)
def test_without_a_budget_the_precision_stays(values: dict[str, object], tmp_path: Path) -> None:
    source, target = scaled(tmp_path / "in.safetensors", 1.0), tmp_path / "out.safetensors"
    compress_file(source, target, settings(**values, allow_larger=True))
    assert precisions(target) == {torch.float32}


@pytest.mark.parametrize("values", [{"new_rank": 8}, {"target_size": "20kB"}, {"target_error": 0.2}], ids=str)
def test_a_file_of_8_bit_floats_stays_one(values: dict[str, object], tmp_path: Path) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    compress_file(scaled(tmp_path / "whole.safetensors", 1.0), source, settings(save_format="fp8"))
    report = compress_file(source, target, settings(**values))
    assert precisions(target) == {FP8} and report.status == "written"
    assert relative_error(load_lora(target).updates, dense_file(source)) == pytest.approx(report.relative_error, rel=1e-3)
    compress_file(source, target, settings(**values), save_dtype=torch.float16)
    assert precisions(target) <= {torch.float16, FP8}


def test_an_error_below_that_of_8_bit_floats_takes_16(tmp_path: Path) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    compress_file(scaled(tmp_path / "whole.safetensors", 1.0), source, settings(save_format="fp8"))
    report = compress_file(source, target, settings(target_error=0.01, allow_larger=True))
    assert precisions(target) == {torch.float16} and report.relative_error <= 0.01


def test_8_bit_floats_without_alpha_tell_what_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sample_file("peft", tmp_path, name="in.safetensors")
    with pytest.raises(SettingsError, match=r"needs an alpha beside its factors.*packed with bits=8.*save_precision=fp16"):
        compress_file(source, tmp_path / "out.safetensors", settings(save_format="fp8"))
    half = save({key: tensor.to(FP8) for key, tensor in load_file(source).items()}, tmp_path)
    report = compress_file(half, tmp_path / "out.safetensors", settings(new_rank=1, allow_larger=True))
    assert precisions(tmp_path / "out.safetensors") == {torch.float16}
    assert any("8-bit floats need an alpha" in note and "bits=8" in note for note in report.notes)


def test_the_choice_of_a_precision() -> None:
    usual = [Factors(torch.tensor([1.0, 0.1]), (64, 64))]
    tiny = [Factors(torch.tensor([1e-10, 1e-11]), (768, 768))]
    large = [*usual, Factors(torch.tensor([5e9]), (64, 64))]
    assert [half_precision(factors) for factors in (usual, tiny, large, [])] == [
        torch.float16,
        torch.bfloat16,
        torch.bfloat16,
        torch.float16,
    ]
    assert budget_precisions(torch.float32, usual, True) == (torch.float16, torch.float32)
    assert budget_precisions(torch.bfloat16, usual, True) == (torch.bfloat16, torch.float16)
    assert budget_precisions(torch.float16, usual, True) == (torch.float16,)
    assert budget_precisions(torch.float8_e5m2, usual, True) == (FP8, torch.float16)
    assert budget_precisions(torch.float8_e5m2, usual, False) == (torch.float16,)


def test_inspect_tells_the_sizes_that_a_budget_gives(tmp_path: Path) -> None:
    source = scaled(tmp_path / "in.safetensors", 1.0)
    size, error = inspect_file(str(source)).curve[-2]
    report = compress_file(source, tmp_path / "out.safetensors", settings(target_error=error, min_rank=1))
    assert report.bytes[1] == pytest.approx(size, rel=0.2)  # the curve does not know of metadata


# No file is larger than its input


@pytest.mark.parametrize(
    "values",
    [
        {"new_rank": 8},
        {"rank_ratio": 0.5},
        {"target_error": 0.05},
        {"target_size": "20MB"},
        {"bits": 8},
        {"bits": 4, "save_format": "both"},
        {"bits": 4, "save_format": "kohya"},
        {"strategy": "mixed", "target_error": 0.05},
        {"strategy": "mixed", "target_size": "3MB"},
        {"strategy": "entropy", "target_error": 0.05},
        {"strategy": "entropy", "bits": 4},
        {"strategy": "entropy", "target_size": "3MB"},
        {"save_format": "fp8"},
    ],
    ids=str,
)
def test_a_lokr_does_not_grow(
    values: dict[str, object], real_lora: RealLora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is encoded to find that out: the estimate is sure."""
    monkeypatch.setattr("lora_compress.engine.encode.Encoder.run", lambda *args, **more: pytest.fail("modules are made"))
    source = real_lora("lycoris_smart_falcon_4_lokr.safetensors")
    report = compress_file(source, tmp_path / "out.safetensors", settings(**values), save_dtype=torch.float16)
    assert report.status == "not_smaller" and report.output is None and not list(tmp_path.iterdir())
    assert report.bytes[1] >= report.bytes[0] == source.stat().st_size
    assert report.as_json()["relative_error"] is report.as_json()["bits_per_weight"] is None


def test_a_size_below_the_input_is_met_whatever_it_takes(real_lora: RealLora, tmp_path: Path) -> None:
    source, target = real_lora("lycoris_smart_falcon_4_lokr.safetensors"), tmp_path / "out.safetensors"
    report = compress_file(source, target, settings(target_size="600kB"))
    assert report.status == "written" and target.stat().st_size <= 600_000


def test_the_command_refuses_growth_and_takes_it_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = kohya_file(tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    ask = ["--model", str(source), "--save_to", str(target), "--save_precision", "float"]
    assert main([*ask, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["status"] == "not_smaller" and told["relative_error"] is None and not target.exists()
    assert main(ask) == 0
    shown = capsys.readouterr().out
    assert "nothing written" in shown and "--allow_larger" in shown and "0.00%" not in shown and "16.00" not in shown
    assert main([*ask, "--allow_larger", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "written" and target.stat().st_size > source.stat().st_size


@pytest.mark.parametrize(
    ("more", "status"), [({}, "not_smaller"), ({"copy_uncompressible": True}, "copied"), ({"larger": True}, "written")], ids=str
)
def test_a_batch_reports_what_would_grow(more: dict[str, bool], status: str, tmp_path: Path) -> None:
    source, larger = kohya_file(tmp_path / "in.safetensors"), more.pop("larger", False)
    options = CompressOptions(settings(allow_larger=larger), save_dtype=torch.float32, **more)
    file = run_job(Job(str(source), str(tmp_path / "out.safetensors")), options)
    assert file["status"] == status and (file["relative_error"] is None) == (status != "written")
    page, table = batch_page([file], options.settings.as_dict()), Console(file=StringIO(), width=200)
    table.print(batch_table([file]))
    for shown in (page, table.file.getvalue()):
        assert ("%" in shown.partition("in.safetensors")[2].partition("settings")[0]) <= (status == "written")


def test_the_plain_file_beside_a_packed_one_may_be_larger_and_is_told(real_lora: RealLora, tmp_path: Path) -> None:
    source = real_lora("lycoris_smart_falcon_4_lokr.safetensors")
    values = {"target_size": "600kB", "strategy": "entropy", "save_format": "both"}
    report = compress_file(source, tmp_path / "out.safetensors", settings(**values))
    partner = tmp_path / "out.kohya.safetensors"
    assert report.status == "written" and partner.stat().st_size > source.stat().st_size
    assert any(str(partner) in note and "--format packed" in note for note in report.notes)


# What is not made has no error


def test_a_result_that_is_not_made_has_no_error(tmp_path: Path) -> None:
    source = kohya_file(tmp_path / "in.safetensors", count=2, width=16, rank=2)
    for values in ({"bits": 2, "save_format": "kohya"}, {"new_rank": 2}):
        report = compress_file(source, tmp_path / "out.safetensors", settings(**values))
        assert report.status == "not_smaller"
        assert report.as_json()["relative_error"] is None and report.as_json()["bits_per_weight"] is None
        assert report.metrics.keys() == {"size_mb"}
        assert (
            main(["--model", str(source), "--save_to", str(tmp_path / "o"), "--new_rank", "2", "--report", str(tmp_path / "p")])
            == 0
        )
        assert "0.00%" not in (tmp_path / "p.html").read_text(encoding="utf-8")


# What the norms of the modules say


def zeroed(tmp_path: Path, *modules: int) -> Path:
    tensors = load_file(kohya_file(tmp_path / "whole.safetensors", count=4, convolutions=False))
    ups = sorted(key for key in tensors if "lora_up" in key)
    for number in modules or range(len(ups)):
        tensors[ups[number]] = torch.zeros_like(tensors[ups[number]])
    return save(tensors, tmp_path, name="zeroed.safetensors")


def test_a_lora_that_was_never_trained_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = zeroed(tmp_path)
    for values in ({"new_rank": 2}, {"target_error": 0.05}, {"bits": 4}, {"strategy": "entropy", "bits": 3}):
        with pytest.raises(FormatError, match=r"zeroed\.safetensors: every update is zero: this LoRA was never trained"):
            compress_file(source, tmp_path / "out.safetensors", settings(**values))
    assert inspect_file(str(source)).notes == ("every update is zero: this LoRA was never trained",)
    assert main(["--model", str(source), "--save_to", str(tmp_path / "out"), "--new_rank", "2"]) == 1
    assert "never trained" in capsys.readouterr().err and not (tmp_path / "out.safetensors").exists()


def test_a_lora_that_was_trained_in_part_is_told(tmp_path: Path) -> None:
    source = zeroed(tmp_path, 1, 2)
    report = compress_file(source, tmp_path / "out.safetensors", settings(new_rank=2))
    for notes in (report.notes, inspect_file(str(source)).notes):
        assert sum("the update of 2 of 4 modules is zero" in note for note in notes) == 1


def test_a_real_file_that_was_trained_in_part_is_told(real_lora: RealLora) -> None:
    found = inspect_file(str(real_lora("peft_unet_partly_zero") / "adapter_model.safetensors"))
    assert any("the update of 32 of 128 modules is zero" in note for note in found.notes)


def test_modules_that_hold_nearly_all_are_named(tmp_path: Path) -> None:
    tensors = load_file(kohya_file(tmp_path / "whole.safetensors", count=40, width=32, convolutions=False))
    ups = sorted(key for key in tensors if "lora_up" in key)
    for key in ups[:2]:
        tensors[key] *= 400
    source = save(tensors, tmp_path, name="in.safetensors")
    report = compress_file(source, tmp_path / "out.safetensors", settings(target_error=0.05))
    for notes in (report.notes, inspect_file(str(source)).notes):
        (note,) = (note for note in notes if "of the squared norm" in note)
        assert note.startswith("2 of 40 modules hold 99.") and ups[0].partition(".")[0] in note and "--target_error" in note
    assert sum(module.rank[1] > 0 for module in report.modules) < 10


@pytest.mark.parametrize(
    ("strong", "others", "noted"), [(2, 126, True), (3, 27, True), (4, 26, False), (1, 9, True), (1, 8, False)]
)
def test_few_modules_are_a_tenth_of_them_at_most(strong: int, others: int, noted: bool) -> None:
    energies = {f"m{i}": 1000.0 if i < strong else 0.1 for i in range(strong + others)}
    assert any("of the squared norm" in note for note in energy_notes(energies)) == noted


def test_energy_that_is_spread_is_not_noted(tmp_path: Path) -> None:
    source = kohya_file(tmp_path / "in.safetensors", count=40, width=32, convolutions=False)
    assert not any("squared norm" in note for note in inspect_file(str(source)).notes)


def test_packed_files_are_not_refused_by_expand_which_tells_what_rounding_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = kohya_file(tmp_path / "in.safetensors")
    packed, plain = tmp_path / "packed.safetensors", tmp_path / "plain.safetensors"
    compress_file(source, packed, settings(strategy="entropy", bits=4))
    assert main(["expand", "--model", str(packed), "--save_to", str(plain), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    exact = {name: update.dense() for name, update in load_lora(packed, torch.float32).updates.items()}
    rounded = relative_error(load_lora(plain, torch.float32).updates, exact)
    assert 0.0 < rounded < 1e-3 and told["relative_error"] == pytest.approx(rounded, rel=0.02)
    assert plain.stat().st_size > packed.stat().st_size and len(PackedFile(packed)) == 6


def _scaled_file(path: Path, gain: float, metadata: dict[str, str] | None = None) -> Path:
    """Three modules of rank 8 whose updates have entries of about `gain`."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for i in range(3):
        name = f"lora_unet_mid_block_attentions_0_proj_{i}"
        tensors[f"{name}.lora_down.weight"] = torch.randn(8, 64, generator=generator) * gain**0.5
        tensors[f"{name}.lora_up.weight"] = torch.randn(64, 8, generator=generator) * gain**0.5
        tensors[f"{name}.alpha"] = torch.tensor(8.0)
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize("settings", [{}, {"strategy": "entropy"}, {"strategy": "mixed"}])
def test_a_size_that_the_header_alone_exceeds_is_refused_with_the_size_of_the_header(
    settings: dict[str, str], tmp_path: Path
) -> None:
    source = _scaled_file(tmp_path / "lora.safetensors", 1.0, {"ss_tag_frequency": "x" * 200_000})
    with pytest.raises(SettingsError, match=r"50000 bytes are too few: .* take 20\d{4} bytes alone; take a larger target_size"):
        compress_file(source, tmp_path / "out.safetensors", CompressionSettings.parse({"target_size": "50KB", **settings}))
    assert not (tmp_path / "out.safetensors").exists()


def test_updates_that_a_precision_cannot_hold_are_refused_or_named(tmp_path: Path) -> None:
    out, settings = tmp_path / "out.safetensors", CompressionSettings.parse({"new_rank": 4})
    tiny = _scaled_file(tmp_path / "tiny.safetensors", 1e-25)
    with pytest.raises(SettingsError, match=r"float16 cannot hold weights as small as those of 3 of 3 modules, .*--save_precision"):
        compress_file(tiny, out, settings, save_dtype=torch.float16)
    assert not out.exists()
    assert compress_file(tiny, out, settings, save_dtype=torch.bfloat16).relative_error < 0.6
    some = load_file(_scaled_file(tmp_path / "some.safetensors", 1.0))
    weak = "lora_unet_mid_block_attentions_0_proj_1"
    save_file({k: v * 1e-12 if weak in k and "alpha" not in k else v for k, v in some.items()}, tmp_path / "some.safetensors")
    report = compress_file(tmp_path / "some.safetensors", out, settings, save_dtype=torch.float16)
    assert any(f"1 of 3 modules, {weak} for one" in note for note in report.notes)


@pytest.mark.parametrize("gain", [1e-25, 1e30])
@pytest.mark.parametrize("settings", [{"bits": 3}, {"target_error": 0.1}])
def test_updates_beyond_the_tables_of_the_entropy_coder_are_refused_by_name(
    gain: float, settings: dict[str, float], tmp_path: Path
) -> None:
    source, out = _scaled_file(tmp_path / "lora.safetensors", gain), tmp_path / "out.safetensors"
    with pytest.raises(SettingsError, match=r"strategy=entropy: the strongest update, lora_unet_mid\S+, has the norm .*allowed"):
        compress_file(source, out, CompressionSettings.parse({"strategy": "entropy", **settings}))
    assert compress_file(source, out, CompressionSettings.parse({"bits": 8})).relative_error < 0.05
