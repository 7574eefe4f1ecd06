"""The benchmark scripts on tiny inputs."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import cascade
import curves
import cuts
import gaussian_rate
import lora_files
import measure
import pytest
import resize
import torch
from safetensors import safe_open

from lora_compress.quantization.entropy.stages import Stages


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of three modules, two of one shape."""

    def shapes() -> Iterator[lora_files.Shape]:
        yield "lora_unet_mid_block_attentions_0_proj_in", 96, 64, (1, 1)
        for i in range(2):
            yield f"lora_unet_mid_block_attentions_0_transformer_blocks_{i}_ff_net_2", 128, 64, ()

    monkeypatch.setitem(lora_files.MODELS, "sdxl", shapes)


def test_sdxl_has_the_modules_and_the_bytes_of_the_real_one() -> None:
    shapes = list(lora_files.MODELS["sdxl"]())
    weights = sum(64 * (inputs * torch.Size(kernel).numel() + outputs) for _, inputs, outputs, kernel in shapes)
    assert len(shapes) == len({name for name, *_ in shapes}) == 1014
    assert 463e6 < 2 * weights < 465e6


def test_one_module_of_each_shape_stands_for_all(tiny: None) -> None:
    assert list(resize.sample_of("sdxl", 1).values()) == [2, 1] or list(resize.sample_of("sdxl", 1).values()) == [1, 2]
    assert sum(resize.sample_of("sdxl", 1).values()) == 3


def test_resizing_agrees_with_sd_scripts(tiny: None, tmp_path: Path, sd_scripts: Path) -> None:
    line = resize.resize_line("sdxl", tmp_path, 1, False, 1)
    assert line["modules"] == 3 and line["sd_sample"] == 2
    assert line["agreement"]["apart"] < 2.0**-10
    assert line["agreement"]["theirs"] == pytest.approx(line["agreement"]["ours"], rel=1e-2)
    assert 10 < line["peak_megabytes"] < 1000
    assert {goal.name.split(": ")[0] for goal in resize.resize_goals(line)} == {"sdxl"}
    with safe_open(tmp_path / "sdxl-ours.safetensors", "pt") as file:
        assert {file.get_slice(key).get_shape()[0] for key in file.keys() if "lora_down" in key} == {32}  # noqa: SIM118


def test_decoding_counts_every_weight(tiny: None, tmp_path: Path) -> None:
    (line,) = resize.decode_lines(tmp_path, 1, 1, ["int8"])
    assert line["weights"] == 32 * (96 + 64 + 2 * (128 + 64)) + 3  # three alphas
    assert line["seconds"] > 0
    assert [goal.goal for goal in resize.decode_goals([line], 1)] == [100.0]


def test_a_process_that_fails_is_told_with_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such file"):
        measure.fresh(Path(resize.__file__), "decode", path=tmp_path / "nothing.safetensors", threads=1)


def test_anonymous_memory_is_seen(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\ndata = bytearray(200_000_000)\nfor i in range(0, len(data), 4096): data[i] = 1\n"
        "time.sleep(0.2)\nprint('{\"seconds\": 0.2}')\n"
    )
    run = measure.fresh(script, "any")
    assert 200e6 < run.peak < 260e6
    assert run.seconds > 0.2


def test_rates_on_gaussian_factors_are_close_to_their_bound() -> None:
    rows = torch.randn(32, 512, generator=torch.Generator().manual_seed(0)) / 512**0.5
    entropy, progressive = (gaussian_rate.entropy_line(rows, 3, stages) for stages in (gaussian_rate.SINGLE, Stages(12, 2)))
    fixed = gaussian_rate.fixed_line(rows, "int4")
    assert 0.25 < float(entropy["gap_bits"]) < 0.35
    assert float(entropy["gap_bits"]) < float(progressive["gap_bits"]) < float(fixed["gap_bits"])
    assert float(entropy["refined_gain_bits"]) > -0.01


def test_goals_know_which_way_is_better() -> None:
    goals = [measure.Goal("a", 2, 3), measure.Goal("b", 2, 3, at_least=True), measure.Goal("c", 2, 2)]
    assert [goal.met for goal in goals] == [False, True, True]
    assert [line.rsplit(maxsplit=1)[-1] for line in measure.goal_table(goals).splitlines()[1:]] == ["MISSED", "met", "met"]


def test_the_cascade_saves_more_than_either_alone(tmp_path: Path) -> None:
    lora_files.write_lora(tmp_path / "lora.safetensors", "sd15", 16, every=40)
    (line,) = cascade.lines_of(tmp_path / "lora.safetensors", [4])
    assert line["cascade"] < min(line["quantization"], line["pruning"])
    assert line["entropy_alone"] < line["quantization"]
    assert 0.1 < line["error"] < 0.15
    assert cascade.goals_of("lora", [line])[0].reached > 1.0


def test_the_plot_is_a_well_formed_picture(tmp_path: Path) -> None:
    lines = {"ours: entropy": [(10.0, 0.3), (100.0, 0.05)], "LoRAQuant": [(50.0, 0.4)], "Shannon's bound": [(8.0, 0.3)]}
    path = tmp_path / "images" / "plot.svg"
    curves.write_plot(path, {"one <spectrum>": lines, "another": lines}, {"one <spectrum>": 1000.0, "another": 1000.0})
    root = ET.parse(path).getroot()
    texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"one <spectrum>", "another", "ours: entropy", "100%", "2%"} <= set(texts)


def test_a_step_is_timed_with_masks_and_quantization_on(sd_scripts: Path) -> None:
    import train_step  # joins our packages with those of sd-scripts

    found = train_step.measure_steps(narrow=True, size=64, rank=4, rounds=1, steps=1, device="cpu")
    assert found["ratios"].keys() == {"int4", "nf4", "waiting"}
    assert found["seconds"] > 0
    assert found["state_bytes"]["int4"] < 0.35 * found["parameter_bytes"]  # rows of 32 weights have a scale each, too


def test_cuts_are_compared_with_files_made_afresh_at_their_errors(tmp_path: Path) -> None:
    from rate_distortion import synthetic

    costs = cuts.cut_costs(synthetic("1/i", 16, ((320, 320), (160, 320))), tmp_path, 6, 12)
    ratios, errors, sizes = zip(*costs, strict=True)
    assert len(costs) >= 3 and list(sizes) == sorted(sizes) and list(errors) == sorted(errors, reverse=True)
    assert all(0.9 < ratio < 1.3 for ratio in ratios)
