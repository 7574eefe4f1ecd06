"""What a training measures of its own pictures: the numbers are those of the functions behind them, and what is wrong is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_compress import EvaluationError, EvaluationSettings, FormatError, SettingsError
from lora_compress.evaluation.extractors import load_extractor
from lora_compress.evaluation.frechet import frechet_distance
from lora_compress.evaluation.intervals import jackknife_interval
from lora_compress.evaluation.kernels import kernel_distance
from lora_compress.evaluation.pictures import PictureFolder, read_pictures
from lora_compress.evaluation.shapes import write_dataset
from lora_compress.evaluation.validation import Validation, read_history, write_history


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_COMPRESS_CACHE", str(tmp_path / "cache"))
    return write_dataset(tmp_path / "set", count=6)


def settings(folder: Path | None = None, **more: object) -> EvaluationSettings:
    values = {"extractor": "probe", "count": 4, "size": 64, **({"reference": str(folder)} if folder else {}), **more}
    return EvaluationSettings.parse(values)


def test_numbers_are_those_of_the_distances_with_intervals_and_a_floor_that_stays(folder: Path) -> None:
    validation = Validation.prepare(settings(folder))
    reference = load_extractor("probe")(read_pictures(folder).batches())
    assert torch.equal(validation.reference, reference)
    first, other, later = (torch.randn(4, 128, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    entry = validation.measure(first, other)
    for name, distance in (("probe_fd", frechet_distance), ("probe_kd", kernel_distance)):
        assert entry[name] == distance(first, reference)
        assert entry[f"{name}_interval"] == list(jackknife_interval(distance, first, reference))
    assert entry["probe_fd_floor"] == frechet_distance(first, other)
    assert (entry["pictures"], entry["reference"]) == (4, 6)
    floors = validation.known_floors([entry, {"step": 2, "error": "x"}])
    assert floors is not None
    after = validation.measure(later, floors)
    assert after["probe_fd"] == frechet_distance(later, reference) and after["probe_fd_floor"] == entry["probe_fd_floor"]
    assert Validation.prepare(settings(folder, count=5)).known_floors([entry]) is None  # of other numbers of pictures
    assert set(validation.plain_numbers(entry)) == {"probe_fd", "probe_fd_floor", "probe_kd", "probe_kd_floor"}
    with pytest.raises(EvaluationError, match="NaN or infinity"):
        validation.measure(torch.full((4, 128), float("nan")), floors)


def test_prompts_are_captions_spread_over_the_pictures_or_lines_of_a_file(folder: Path, tmp_path: Path) -> None:
    captions = read_pictures(folder).captions
    assert Validation.prepare(settings(folder)).prompts == tuple(captions[index] for index in (0, 1, 3, 4))
    assert Validation.prepare(settings(folder, count=8)).prompts == (*captions, *captions[:2])
    (tmp_path / "prompts.txt").write_text("one --d 5\ntwo\n", encoding="utf-8")
    for caption in folder.glob("*.txt"):
        caption.unlink()  # not needed now
    own = Validation.prepare(settings(folder, prompts=str(tmp_path / "prompts.txt"), first_seed=7, steps=3, guidance=2))
    drawn = own.host_prompts()
    assert [(line["prompt"], line["seed"]) for line in drawn] == [("one --d 5", 7), ("two", 8), ("one --d 5", 9), ("two", 10)]
    assert all(
        (line["width"], line["height"], line["sample_steps"], line["scale"]) == (64, 64, 3, 2.0) and "guidance_scale" not in line
        for line in drawn
    )
    assert not {line["seed"] for line in drawn} & {line["seed"] for line in own.host_prompts(other_noise=True)}


def test_the_validation_split_serves_where_no_folder_is_named(folder: Path) -> None:
    whole = read_pictures(folder)
    split = PictureFolder(whole.paths[:3], whole.captions[:3], None)
    found = Validation.prepare(settings(), split)
    assert len(found.reference) == 3 and set(found.prompts) == set(whole.captions[:3])
    for less, message in ((None, "no validation split"), (PictureFolder(whole.paths[:1], ("a",), None), "1 picture ")):
        with pytest.raises(EvaluationError, match=message):
            Validation.prepare(settings(), less)
    with pytest.raises(EvaluationError, match=r"0001.png has no caption"):
        Validation.prepare(settings(), PictureFolder(whole.paths[:2], ("a", ""), None))


def test_a_history_is_read_as_it_was_written(tmp_path: Path) -> None:
    history = [{"step": 1, "fid": float(np.pi), "fid_interval": [None, 1.0]}, {"step": 2, "error": "é"}]
    write_history(tmp_path / "a.jsonl", history)
    assert read_history(tmp_path / "a.jsonl") == history
    assert [json.loads(line)["step"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [1, 2]
    assert read_history(tmp_path / "absent.jsonl") == []
    (tmp_path / "b.jsonl").write_text('{"step": 1')
    with pytest.raises(FormatError, match=r"b\.jsonl"):
        read_history(tmp_path / "b.jsonl")


def test_all_problems_of_the_section_are_told_at_once() -> None:
    wrong = {"extractor": "fid", "count": 2, "size": 100, "steps": 0, "guidance": -1, "first_seed": "x", "promts": "a.txt"}
    with pytest.raises(SettingsError) as caught:
        EvaluationSettings.parse(wrong)
    told = str(caught.value)
    for part in ("extractor=fid", "count=2", "multiple of 64", "steps=0", "guidance=-1", "first_seed='x'", "did you mean prompts"):
        assert part in told
