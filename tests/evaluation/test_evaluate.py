"""Evaluating LoRA on tiny-sd: attached exactly, measured as defined, and every bad input refused in one sentence."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_compress
from lora_compress import EvaluationError, FormatError, as_kohya, compress_file, evaluate_lora_performance, load_lora
from lora_compress.cli import main
from lora_compress.evaluation.attachment import Lora, _converted, attached, read_lora, rounded
from lora_compress.evaluation.base_model import draw, load_base_model
from lora_compress.evaluation.output_error import relative_output_error
from lora_compress.evaluation.shapes import concept_prompts, write_dataset
from lora_compress.inspection.file import report_files
from lora_compress.report.html_evaluation import evaluation_page, write_evaluation_html
from lora_compress.settings import CompressionSettings

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1")
FAST = {"count": 4, "steps": 2, "resolution": 64, "cache": False, "batch": 2, "prompts_compared": 3}


@pytest.fixture(scope="module")
def base(tiny_sd: Path):  # type: ignore[no-untyped-def]
    return load_base_model(tiny_sd)


def random_lora(pipeline, path: Path, *, every: int = 3, strength: float = 0.3, rank: int = 6) -> Path:  # type: ignore[no-untyped-def]
    """Ranks and alphas that differ between modules, linear layers and convolutions, U-Net and text encoder."""
    random, tensors, number = torch.Generator().manual_seed(0), {}, 0
    for prefix, model in (("lora_unet_", pipeline.unet), ("lora_te_", pipeline.text_encoder)):
        names = [
            name for name, layer in model.named_modules() if name.endswith((*LAYERS, "q_proj", "fc1")) and hasattr(layer, "weight")
        ]
        for name in names[::every]:
            out, inputs, *kernel = model.get_submodule(name).weight.shape
            own = 1 + number % rank
            number += 1
            down = torch.randn(own, inputs, *kernel, generator=random) / (inputs * max(len(kernel), 1)) ** 0.5
            up = torch.randn(out, own, *[1] * len(kernel), generator=random) * strength
            key = prefix + name.replace(".", "_")
            tensors |= {
                f"{key}.lora_down.weight": down,
                f"{key}.lora_up.weight": up,
                f"{key}.alpha": torch.tensor(0.5 + number % 3),
            }
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def files(base, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:  # type: ignore[no-untyped-def]
    """A LoRA, and a packed one made from it."""
    folder = tmp_path_factory.mktemp("lora")
    full = random_lora(base, folder / "full.safetensors")
    settings = CompressionSettings.parse({"bits": 3, "strategy": "dynamic"})
    assert compress_file(full, folder / "small.safetensors", settings).status == "written"
    return full, folder / "small.safetensors"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, count=8)
    return folder


@torch.no_grad()
def outputs(pipeline) -> Tensor:  # type: ignore[no-untyped-def]
    random = torch.Generator().manual_seed(1)
    text = pipeline.text_encoder(torch.arange(77).unsqueeze(0)).last_hidden_state
    return pipeline.unet(torch.randn(1, 4, 8, 8, generator=random), 500, text).sample


def test_an_attached_lora_is_its_updates_merged_into_the_weights(base, files: tuple[Path, Path], tiny_sd: Path) -> None:  # type: ignore[no-untyped-def]
    before = outputs(base)
    for path in files:
        lora = read_lora(str(path))
        merged = load_base_model(tiny_sd)
        layers = {**{f"lora_unet_{n.replace('.', '_')}": m for n, m in merged.unet.named_modules()}}
        layers |= {f"lora_te_{n.replace('.', '_')}": m for n, m in merged.text_encoder.named_modules()}
        for name, update in load_lora(path).updates.items():
            weight = layers[name].weight
            weight.data += update.dense().float().reshape(weight.shape)
        with attached(base, lora):
            found = outputs(base)
        assert (found - before).norm() > 0.05 * before.norm()
        torch.testing.assert_close(found, outputs(merged), rtol=1e-3, atol=1e-4)
        assert torch.equal(outputs(base), before)  # and gone afterwards


def test_diffusers_own_loader_and_ours_agree(base, files: tuple[Path, Path]) -> None:  # type: ignore[no-untyped-def]
    lora = read_lora(str(files[1]))  # ranks and alphas differ between its modules
    unet = {name: update for name, update in lora.updates.items() if name.startswith("lora_unet")}
    xl = Lora(lora.path, unet, "sdxl", lora.metadata)  # the family whose names diffusers converts
    with attached(base, Lora(lora.path, unet, lora.family, lora.metadata)):
        ours = outputs(base)
    with _converted(base, xl, ["any"]):
        theirs = outputs(base)
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


def test_a_module_that_diffusers_drops_is_told(base, files: tuple[Path, Path]) -> None:  # type: ignore[no-untyped-def]
    lora = read_lora(str(files[1]))
    before = outputs(base)
    strange = {f"{name}_of_another": update for name, update in lora.updates.items()}
    with pytest.raises(EvaluationError, match="diffusers"):
        with _converted(base, Lora(lora.path, strange, "sdxl", lora.metadata), ["any"]):
            pass
    assert torch.equal(outputs(base), before)


def test_a_picture_depends_on_its_prompt_and_seed_alone(base) -> None:  # type: ignore[no-untyped-def]
    prompts = concept_prompts(3)
    together = draw(base, prompts, seeds=[5, 6, 7], steps=2, batch=3)
    assert together.dtype == torch.uint8 and tuple(together.shape) == (3, 3, 64, 64)
    alone = draw(base, prompts[1:2], seeds=[6], steps=2)
    assert (alone[0].int() - together[1].int()).abs().max() <= 1
    assert not torch.equal(draw(base, prompts[1:2], seeds=[9], steps=2), alone)


def test_the_output_error_is_that_of_single_steps(base, files: tuple[Path, Path]) -> None:  # type: ignore[no-untyped-def]
    """The original against itself: 0. Without its updates: 1, whatever the sampler did. The packed one: in between."""
    full, small = (read_lora(str(path)) for path in files)
    nothing = type(full)(full.path, {n: type(u)(u.down, u.up * 0, u.alpha) for n, u in full.updates.items()}, full.family, {})
    prompts = concept_prompts(2)
    run = lambda: draw(base, prompts, seeds=[0, 1], steps=3, batch=2, output_type="latent")  # noqa: E731
    same, none, packed, floor = relative_output_error(base, full, [full, nothing, small, rounded(full, torch.bfloat16)], run, 2)
    assert same.value == pytest.approx(0.0, abs=1e-6)
    assert none.value == pytest.approx(1.0, abs=1e-5)
    assert 5 * floor.value < packed.value < 1.0
    assert len(packed.timesteps) == 3 and list(packed.timesteps) == sorted(packed.timesteps, reverse=True)
    assert tuple(packed.lost.shape) == (2, 3)
    with pytest.raises(EvaluationError, match="changes nothing in the base model"):
        relative_output_error(base, nothing, [small], run, 2)


def test_without_a_base_model_it_is_size_and_weights(files: tuple[Path, Path]) -> None:
    full, small = files
    found = evaluate_lora_performance(small, original=full)
    assert found["size_mb"] == small.stat().st_size / 1e6 and found["size_mb_full"] == full.stat().st_size / 1e6
    assert found["relative_error"] == pytest.approx(
        lora_compress.inspection.comparison.compare_files(str(full), str(small)).relative_error
    )
    assert evaluate_lora_performance(small).metrics.keys() == {"size_mb"}


@pytest.fixture(scope="module")
def evaluated(files: tuple[Path, Path], dataset: Path, tiny_sd: Path):  # type: ignore[no-untyped-def]
    return evaluate_lora_performance(files[1], dataset, base_model=tiny_sd, original=files[0], extractors=["probe"], **FAST)


def test_every_number_has_its_count_its_extractor_and_its_interval(evaluated) -> None:  # type: ignore[no-untyped-def]
    names = {estimate.name for estimate in evaluated.estimates}
    assert {"relative_output_error", "ssim", "ssim_base", "ssim_other_seed", "probe_cosine"} <= names
    assert {f"probe_{kind}{who}" for kind in ("fd", "kd") for who in ("", "_full", "_base")} <= names
    assert not {"fid", "kid", "cmmd"} & names, "those need Inception or CLIP"
    for estimate in evaluated.estimates:
        assert estimate.interval[0] <= estimate.value <= estimate.interval[1], estimate
        assert estimate.count == (3 if estimate.name == "relative_output_error" else 4)
        assert estimate.extractor and estimate.meaning and estimate.floor is not None
        assert estimate.against == (8 if "probe_fd" in estimate.name or "probe_kd" in estimate.name else None)
    assert any("below 2000 FID is mostly bias" in note and "KID" in note for note in evaluated.notes)
    assert evaluated["ssim_other_seed"] < evaluated["ssim"] <= 1.0
    assert evaluated["probe_fd"] > 0 and 0 < evaluated["relative_output_error"] < 1
    assert len(evaluated.by_timestep) == 2


def test_the_page_holds_the_numbers_and_the_pictures(evaluated) -> None:  # type: ignore[no-untyped-def]
    text = evaluation_page(evaluated)
    assert text.count("data:image/png;base64,") == 4 * 4  # base, full, compressed, difference; the slider shows them again
    assert text.count('type="range"') == 1
    for estimate in evaluated.estimates:
        assert f"<td>{estimate.name}</td><td>{estimate.value:.4g}</td>" in text
    assert 'src="http' not in text and "href=" not in text and "url(" not in text


def test_the_page_tells_of_the_file_and_of_the_training(evaluated, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """What lies beside the LoRA is found."""
    lora = tmp_path / "lora.safetensors"
    shutil.copy(evaluated.path, lora)
    entries = [{"step": 10, "probe_fd": 2.5, "probe_fd_interval": [2, 3], "rank_ratio": 0.5}, {"step": 20, "error": "no pictures"}]
    (tmp_path / "lora.evaluations.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    write_evaluation_html(dataclasses.replace(evaluated, path=str(lora)), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    for told in ("Bytes before and after", "Rank and bits by block", "Spectra", "Evaluations and decisions", "no pictures"):
        assert told in text
    (tmp_path / "lora.evaluations.jsonl").write_text("no JSON\n", encoding="utf-8")
    with pytest.raises(FormatError, match="is no history of evaluations"):
        write_evaluation_html(dataclasses.replace(evaluated, path=str(lora)), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == text
    report = report_files(evaluated.original, str(lora))
    assert report.relative_error == pytest.approx(evaluated.relative_error, rel=1e-6)
    assert report.bytes == (evaluated.bytes_original, evaluated.bytes)
    for module in report.modules:
        assert math.fsum(value**2 for value in module.sigma) == pytest.approx(module.squared_norm, rel=1e-5)


def test_a_base_model_without_a_data_set_draws_stock_prompts(files: tuple[Path, Path], tiny_sd: Path) -> None:
    found = evaluate_lora_performance(files[1], base_model=tiny_sd, **{**FAST, "count": 2, "steps": 1})
    assert {estimate.name for estimate in found.estimates} - {"lpips_base"} == {"ssim_base"}
    assert found["ssim_base"] < 1.0


def test_combined_compression_evaluates_what_it_wrote(files: tuple[Path, Path], tiny_sd: Path, tmp_path: Path) -> None:
    target = tmp_path / "made.safetensors"
    report = lora_compress.combined_compression(
        files[0], target, rank_ratio=0.7, bits=4, evaluate={"base_model": tiny_sd, **FAST, "count": 2, "steps": 1}
    )
    assert report.metrics["size_mb"] == target.stat().st_size / 1e6
    assert report.metrics["relative_error"] == pytest.approx(report.relative_error, rel=1e-3)
    assert 0 < report.metrics["relative_output_error"] < 1
    assert report.as_json()["evaluation"]["metrics"] == report.evaluation.metrics  # type: ignore[union-attr]
    plain = lora_compress.combined_compression(files[0], target, rank_ratio=0.7, bits=4)
    assert plain.evaluation is None and plain.metrics["size_mb"] == report.metrics["size_mb"]


def command(*words: object) -> int:
    return main(["evaluate", *map(str, words)])


def test_the_command_prints_json_and_writes_a_page(
    files: tuple[Path, Path], dataset: Path, tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, cache = tmp_path / "page.html", tmp_path / "cache"
    flags = ("--count", 2, "--steps", 1, "--extractor", "probe", "--cache", cache, "--report", page, "--json")
    assert command("--model", files[0], "--other", files[1], "--base_model", tiny_sd, "--dataset", dataset, *flags) == 0
    told = json.loads(capsys.readouterr().out)
    newer = ("--original", files[0], "--model", files[1], "--base_model", tiny_sd, "--dataset", dataset)
    assert command(*newer, *flags) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["estimates"] == told["estimates"] and again["original"] == told["original"] == str(files[0])
    assert command(*newer, "--other", files[1]) == 2
    assert "give --original A --model B" in capsys.readouterr().err
    assert told["metrics"]["size_mb"] == files[1].stat().st_size / 1e6
    assert set(told["estimates"]["probe_fd"]) == {"value", "interval", "count", "against", "extractor", "floor", "meaning"}
    assert told["settings"]["extractors"] == "probe" and told["settings"]["pictures"] == 2
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert len(list(cache.glob("probe-*.npz"))) == 1
    assert command("--model", files[1]) == 0
    assert "small.safetensors: " in capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], status: int, *words: object) -> str:
    assert command(*words, "--extractor", "probe", "--cache", "none", "--count", 2, "--steps", 1) == status
    output = capsys.readouterr()
    assert output.out == ""
    lines = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def _one(folder: Path) -> None:
    for path in sorted(folder.rglob("*.png"))[1:]:
        path.unlink()


def _none(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.unlink()


def _mixed(folder: Path) -> None:
    path = sorted(folder.rglob("*.png"))[2]
    Image.new("RGB", (80, 48)).save(path)


def _corrupt(folder: Path) -> None:
    path = sorted(folder.rglob("*.png"))[2]
    path.write_bytes(path.read_bytes()[:-40])


def _text(folder: Path) -> None:
    sorted(folder.rglob("*.png"))[2].write_text("no picture")


def _uncaptioned(folder: Path) -> None:
    sorted(folder.rglob("*.txt"))[2].unlink()


def _silent(folder: Path) -> None:
    sorted(folder.rglob("*.txt"))[2].write_text(" \n")


BROKEN = {
    "empty": (_none, r"holds no pictures \(\.png, "),
    "one picture": (_one, r"holds 1 picture: a distance between sets needs 2 or more"),
    "mixed sizes": (_mixed, r"differ in size \(0000\.png is 64 x 64, 0002\.png 80 x 48\): give a resolution, --resolution 64"),
    "corrupt": (_corrupt, r"0002\.png: cannot be read as a picture \(.*(truncated|broken|bytes).*\): replace it"),
    "no picture": (_text, r"0002\.png: cannot be read as a picture \(no picture\): replace it"),
    "caption missing": (_uncaptioned, r"0002\.png: has no caption: write what it shows into 0002\.txt, or give --prompts"),
    "caption empty": (_silent, r"0002\.txt: is empty: write what 0002\.png shows"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_data_set_that_will_not_do_is_refused_in_one_sentence(
    kind: str, files: tuple[Path, Path], tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, pattern = BROKEN[kind]
    write_dataset(tmp_path / "data", count=4)
    damage(tmp_path / "data")
    error = refused(capsys, 1, "--model", files[0], "--base_model", tiny_sd, "--dataset", tmp_path / "data")
    assert re.search(pattern, error), error


def test_a_lora_of_another_family_is_refused(
    base,
    files: tuple[Path, Path],
    tiny_sd: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],  # type: ignore[no-untyped-def]
) -> None:
    from core.factories import random_update

    names = "down_blocks_1_attentions_0_transformer_blocks_0", "mid_block_attentions_0_transformer_blocks_0"
    xl = {f"lora_unet_{name}_attn2_to_k": random_update(2, 2048, 640, (), 1.0, i, 0.1) for i, name in enumerate(names)}
    save_file(as_kohya(xl), tmp_path / "xl.safetensors")
    error = refused(capsys, 1, "--model", tmp_path / "xl.safetensors", "--base_model", tiny_sd)
    assert "xl.safetensors: is a LoRA for sdxl, the base model is sd1 (StableDiffusionPipeline)" in error
    flux = {"lora_unet_double_blocks_0_img_attn_qkv": random_update(2, 3072, 9216, (), 1.0, 0, 0.1)}
    save_file(as_kohya(flux), tmp_path / "flux.safetensors")
    assert "is a LoRA for flux1" in refused(capsys, 1, "--model", tmp_path / "flux.safetensors", "--base_model", tiny_sd)
    wide = load_file(files[0])
    name = next(key for key in wide if key.endswith("attn1_to_q.lora_down.weight"))
    wide[name] = torch.cat([wide[name], wide[name]], dim=1)
    save_file(wide, tmp_path / "wide.safetensors")
    error = refused(capsys, 1, "--model", tmp_path / "wide.safetensors", "--base_model", tiny_sd)
    assert name.removesuffix(".lora_down.weight") in error and "the layer of the base model" in error
    stray = load_file(files[0])
    stray = {key.replace("down_blocks_0", "down_blocks_7"): tensor for key, tensor in stray.items()}
    save_file(stray, tmp_path / "stray.safetensors")
    assert "are not in the base model" in refused(capsys, 1, "--model", tmp_path / "stray.safetensors", "--base_model", tiny_sd)


def test_other_bad_input_is_refused(
    files: tuple[Path, Path], dataset: Path, tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "name the model, --base_model" in refused(capsys, 2, "--model", files[0], "--dataset", dataset)
    assert "no such file" in refused(capsys, 2, "--model", tmp_path / "no.safetensors")
    (tmp_path / "empty").mkdir()
    error = refused(capsys, 1, "--model", files[0], "--base_model", tmp_path / "empty")
    assert "cannot be loaded as a base model" in error and "model_index.json" in error
    error = refused(capsys, 1, "--model", files[0], "--base_model", tiny_sd, "--device", "cuda:99")
    assert "device=cuda:99: torch cannot use it here" in error
    (tmp_path / "prompts.txt").write_text("# none\n\n")
    error = refused(capsys, 1, "--model", files[0], "--base_model", tiny_sd, "--prompts", tmp_path / "prompts.txt")
    assert "holds no prompt" in error
    dora = load_file(files[0])
    name = next(key for key in dora if key.endswith(".alpha")).removesuffix(".alpha")
    save_file(dora | {f"{name}.dora_scale": torch.ones(4, 1)}, tmp_path / "dora.safetensors")
    assert "DoRA is not evaluated here" in refused(capsys, 1, "--model", tmp_path / "dora.safetensors", "--base_model", tiny_sd)


def test_no_hook_stays_behind_when_drawing_fails(base, files: tuple[Path, Path]) -> None:  # type: ignore[no-untyped-def]
    lora, before = read_lora(str(files[0])), outputs(base)
    with pytest.raises(KeyboardInterrupt):
        with attached(base, lora):
            raise KeyboardInterrupt
    assert torch.equal(outputs(base), before)
