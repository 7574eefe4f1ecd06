"""Folders of pictures, feature extractors by name, and the cache of what they saw."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_compress import EvaluationError
from lora_compress.evaluation.extractors import EXTRACTORS, FeatureExtractor, load_extractor
from lora_compress.evaluation.pictures import read_pictures
from lora_compress.evaluation.prompts import STOCK_PROMPTS, stock_prompts
from lora_compress.evaluation.reference import reference_features
from lora_compress.evaluation.shapes import write_dataset
from lora_compress.evaluation.similarity import feature_cosine, load_lpips, structural_similarity


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "set", count=6)
    return tmp_path / "set"


def means(pictures: torch.Tensor) -> torch.Tensor:
    """An extractor of one's own: mean and standard deviation of each channel."""
    values = pictures.float().flatten(2)
    return torch.cat([values.mean(2), values.std(2)], dim=1)


def test_a_folder_is_read_in_order_with_its_captions(folder: Path) -> None:
    found = read_pictures(folder)
    paths = sorted(folder.rglob("*.png"))
    assert len(found) == 6 and found.paths == tuple(paths)
    assert list(found.captions) == [path.with_suffix(".txt").read_text().strip() for path in paths]
    batches = list(found.batches(4))
    assert [tuple(batch.shape) for batch in batches] == [(4, 3, 64, 64), (2, 3, 64, 64)]
    assert torch.equal(batches[1][1], torch.from_numpy(np.array(Image.open(paths[5]).convert("RGB"))).permute(2, 0, 1))


def test_a_resolution_scales_and_crops_pictures_of_any_size(folder: Path) -> None:
    wide = Image.new("RGB", (200, 100), (255, 0, 0))
    wide.paste((0, 255, 0), (50, 0, 150, 100))  # its centre square
    wide.save(folder / "wide.png")
    found = read_pictures(folder, resolution=32, captions=False)
    pictures = torch.cat(list(found.batches()))
    assert tuple(pictures.shape) == (7, 3, 32, 32)
    centre = pictures[found.paths.index(folder / "wide.png")]
    assert centre[1, :, 1:-1].float().mean() > 250 and centre[0, :, 2:-2].float().mean() < 5


def test_the_key_is_of_contents_not_of_names(folder: Path) -> None:
    before = read_pictures(folder).key
    path = sorted(folder.rglob("*.png"))[0]
    for file in (path, path.with_suffix(".txt")):
        file.rename(file.with_name(f"zz{file.suffix}"))
    assert read_pictures(folder).key == before
    assert read_pictures(folder, resolution=64).key != before
    Image.new("RGB", (64, 64)).save(path.with_name("zz.png"))
    assert read_pictures(folder).key != before


def test_features_of_a_data_set_are_kept(folder: Path, tmp_path: Path) -> None:
    calls = []

    def counted(pictures: torch.Tensor) -> torch.Tensor:
        calls.append(len(pictures))
        return means(pictures)

    extractor, cache = load_extractor(counted), tmp_path / "cache"
    pictures = read_pictures(folder)
    first = reference_features(pictures, extractor, cache)
    assert sum(calls) == 6 + 1  # the picture that tells extractors apart
    assert torch.equal(reference_features(read_pictures(folder), extractor, cache), first)
    assert sum(calls) == 7
    (file,) = cache.glob("counted-*.npz")
    file.write_bytes(b"broken")
    assert torch.equal(reference_features(pictures, extractor, cache), first)
    assert sum(calls) == 13
    brighter = load_extractor(lambda p: means(p) + 1.0)
    assert brighter.identity != FeatureExtractor("lambda", means).identity


@pytest.mark.parametrize(
    ("name", "fd", "kd", "mmd"),
    [
        ("inception", "fid", "kid", "inception_mmd"),
        ("clip", "clip_fd", "clip_kd", "cmmd"),
        ("probe", "probe_fd", "probe_kd", "probe_mmd"),
    ],
)
def test_a_distance_is_called_fid_only_with_inception(name: str, fd: str, kd: str, mmd: str) -> None:
    extractor = FeatureExtractor(name, means)
    assert (extractor.metric("fd"), extractor.metric("kd"), extractor.metric("mmd")) == (fd, kd, mmd)


def test_the_probe_reads_pictures_of_any_size(folder: Path) -> None:
    probe = load_extractor("probe")
    pictures = torch.cat(list(read_pictures(folder).batches()))
    features = probe(pictures)
    assert tuple(features.shape) == (6, 128)
    larger = pictures.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert feature_cosine(features, probe(larger)).min() > 0.9


def _vision_folder(kind: str, folder: Path) -> Path:
    from transformers import (
        BitImageProcessor,
        CLIPImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
        Dinov2Config,
        Dinov2Model,
    )

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    if kind == "clip":
        CLIPVisionModelWithProjection(CLIPVisionConfig(**small, intermediate_size=64, projection_dim=24)).save_pretrained(folder)
        size = {"shortest_edge": 28}
        CLIPImageProcessor(size=size, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    else:
        Dinov2Model(Dinov2Config(**small)).save_pretrained(folder)
        BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "width"), [("clip", 24), ("dinov2", 32)])
def test_transformers_load_from_a_folder(kind: str, width: int, folder: Path, tmp_path: Path) -> None:
    """A small model of the real architecture, with random weights: the loading and the preprocessing are the real ones."""
    extractor = load_extractor(kind, _vision_folder(kind, tmp_path / kind))
    pictures = torch.cat(list(read_pictures(folder).batches()))
    features = extractor(pictures)
    assert tuple(features.shape) == (6, width)
    assert torch.isfinite(features).all() and features.std(dim=0).max() > 0
    torch.testing.assert_close(extractor(pictures.flip(0)).flip(0), features, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the file that torch-fidelity reads: torchvision's network with as many classes has the same layers."""
    pytest.importorskip("torch_fidelity")
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    network = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.01, 0.1)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.parametrize("size", [64, 333])
def test_inception_sees_what_that_of_torch_fidelity_sees(size: int, inception_file: Path) -> None:
    """Through its own maker of extractors; smaller and larger pictures than the network takes."""
    from torch_fidelity.utils import create_feature_extractor

    pictures = torch.randint(0, 256, (3, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    theirs = create_feature_extractor(
        "inception-v3-compat", ["2048"], cuda=False, feature_extractor_weights_path=str(inception_file)
    )
    extractor = load_extractor("inception", inception_file)
    features = extractor(pictures)
    assert tuple(features.shape) == (3, 2048) and (features.std(dim=0) > 0).float().mean() > 0.5
    torch.testing.assert_close(features, theirs(pictures)[0])
    assert [extractor.metric(kind) for kind in ("fd", "kd")] == ["fid", "kid"]


class Command:
    """What a pickle may do: run a command when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_weights_that_would_run_a_command_are_refused(inception_file: Path, tmp_path: Path) -> None:
    torch.save(torch.load(inception_file) | {"other": Command(tmp_path / "made")}, tmp_path / "bad.pth")
    with pytest.raises(EvaluationError, match=r"bad\.pth: holds more than tensors .*--weights inception=FILE"):
        load_extractor("inception", tmp_path / "bad.pth")
    assert not (tmp_path / "made").exists()


def test_weights_that_are_not_of_inception_are_told(inception_file: Path, tmp_path: Path) -> None:
    state = torch.load(inception_file)
    del state["Mixed_7c.branch1x1.conv.weight"]
    torch.save(state, tmp_path / "other.pth")
    (tmp_path / "torn.pth").write_bytes(inception_file.read_bytes()[:10000])
    for name in ("other", "torn"):
        with pytest.raises(EvaluationError, match=r"extractor inception: weights cannot be had .*--weights inception=FILE"):
            load_extractor("inception", tmp_path / f"{name}.pth")


@pytest.mark.parametrize("name", ["clip", "dinov2", "probe"])
def test_missing_weights_are_told_with_what_to_download_and_where_to_put_it(name: str, tmp_path: Path) -> None:
    for weights in (tmp_path / "nowhere", None) if name != "probe" else (tmp_path / "nowhere",):
        with pytest.raises(EvaluationError) as caught:
            load_extractor(name, weights)
        text = str(caught.value)
        assert f"--weights {name}=" in text
        assert name == "probe" or "huggingface-cli download" in text
        assert "assets/tiny-sd/probe.safetensors" in text or name != "probe"


def test_missing_inception_is_told_with_what_to_install_or_download(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"pip install torch-fidelity|weights-inception-2015-12-05-6726825d\.pth.*--weights"):
        load_extractor("inception", tmp_path / "nowhere.pth")


def test_extractors_refuse_what_they_cannot_use() -> None:
    with pytest.raises(EvaluationError, match=f"resnet: is unknown: known are {', '.join(EXTRACTORS)}"):
        load_extractor("resnet")
    with pytest.raises(EvaluationError, match="extractors read uint8"):
        load_extractor(means)(torch.rand(2, 3, 8, 8))
    with pytest.raises(EvaluationError, match="must return one row for each"):
        load_extractor(lambda pictures: pictures.float())(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_ssim_is_that_of_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.image")
    random = torch.Generator().manual_seed(0)
    first = torch.randint(0, 256, (3, 3, 40, 52), generator=random, dtype=torch.uint8)
    second = (first.int() + torch.randint(-40, 41, first.shape, generator=random)).clamp(0, 255).byte()
    pair = (side.double() / 255 for side in (first, second))
    _, theirs = functional.structural_similarity_index_measure(*pair, data_range=1.0, reduction="none", return_full_image=True)
    inside = theirs[..., 5:-5, 5:-5].flatten(1).mean(1)  # theirs pads pictures by reflection, Wang's and ours do not
    torch.testing.assert_close(structural_similarity(first, second), inside, rtol=1e-6, atol=1e-7)


def test_ssim_falls_with_noise_and_is_one_for_equal_pictures() -> None:
    random = torch.Generator().manual_seed(0)
    picture = torch.randint(60, 200, (1, 3, 8, 8), generator=random).float().repeat_interleave(6, 2).repeat_interleave(6, 3)
    noise = torch.randn(picture.shape, generator=random)
    values = [float(structural_similarity(picture.byte(), (picture + scale * noise).byte())) for scale in (0.0, 5.0, 20.0, 50.0)]
    assert values[0] == pytest.approx(1.0)
    assert values == sorted(values, reverse=True) and values[-1] < 0.5
    with pytest.raises(EvaluationError, match="11 pixels"):
        structural_similarity(picture.byte()[..., :10], picture.byte()[..., :10])


def test_lpips_is_zero_for_equal_pictures_and_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real network with random weights in its backbone, which can only be downloaded."""
    lpips = pytest.importorskip("lpips")
    monkeypatch.setattr(lpips, "LPIPS", partial(lpips.LPIPS, pnet_rand=True))
    distance = load_lpips()
    random = torch.Generator().manual_seed(0)
    pictures = torch.randint(60, 200, (3, 3, 64, 64), generator=random, dtype=torch.uint8)
    noise = torch.randint(-50, 51, pictures.shape, generator=random)
    assert torch.equal(distance(pictures, pictures), torch.zeros(3))
    near, far = (distance(pictures, (pictures.int() + noise // divisor).clamp(0, 255).byte()) for divisor in (10, 1))
    assert tuple(near.shape) == (3,) and (far > near).all() and (near > 0).all()


def test_stock_prompts_name_what_the_lora_was_trained_on() -> None:
    told = {"ss_tag_frequency": '{"10_x": {"striped star": 40, "white background": 12, "rare": 1, "a star": 30}}'}
    assert all(prompt.startswith("striped star, a star, white background, ") for prompt in stock_prompts(told))
    assert stock_prompts({}) == list(STOCK_PROMPTS) == stock_prompts({"ss_tag_frequency": "[1, 2]"})
