"""alpha in the configuration beside the weights: applied once, and never again after it has gone into the factors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from core.layouts.files import dense, product, random, save, written_back

from lora_compress import FormatError, LowRankUpdate
from lora_compress.sources.open import open_lora

KEY = "lora_adapter_metadata"


def tensors(**ranks: int) -> dict[str, torch.Tensor]:
    result = {}
    for index, (name, rank) in enumerate(ranks.items()):
        module = name.replace("__", ".")
        result[f"{module}.lora_A.weight"] = random(rank, 7, seed=index)
        result[f"{module}.lora_B.weight"] = random(6, rank, seed=index + 50)
    return result


def scale(folder: Path, weights: dict[str, torch.Tensor], config: dict[str, object]) -> dict[str, float]:
    source = open_lora(save(weights, folder, {KEY: json.dumps(config)}))
    found = {}
    for name, update in source.items():
        plain = product(weights[f"{name}.lora_B.weight"], weights[f"{name}.lora_A.weight"])
        found[name] = float((dense(update) * plain).sum() / plain.square().sum())
        torch.testing.assert_close(dense(update), found[name] * plain)
    return found


def test_each_model_has_its_own_alpha(tmp_path: Path) -> None:
    config = {"transformer.r": 4, "transformer.lora_alpha": 8, "text_encoder.r": 2, "text_encoder.lora_alpha": 1}
    found = scale(tmp_path, tensors(transformer__a=4, text_encoder__b=2, unet__c=4), config)
    assert found == pytest.approx({"transformer.a": 2.0, "text_encoder.b": 0.5, "unet.c": 1.0})


def test_patterns_match_the_end_of_a_name_as_peft_matches_them(tmp_path: Path) -> None:
    patterns = {"to_q": 2, "^blocks.0.to_k$": 12, r"blocks\.1\.to_k": 16}
    config = {
        "transformer.r": 4,
        "transformer.lora_alpha": 4,
        "transformer.alpha_pattern": patterns,
        "transformer.rank_pattern": {"to_q": 8},
    }
    modules = {"transformer__blocks__0__to_q": 8, "transformer__blocks__0__to_k": 4, "transformer__blocks__1__to_k": 4}
    others = {"transformer__x__blocks__0__to_k": 4, "transformer__blocks__0__add_to_q": 4}
    found = scale(tmp_path, tensors(**modules, **others), config)
    assert [found[name.replace("__", ".")] for name in (*modules, *others)] == pytest.approx([0.25, 3.0, 4.0, 1.0, 1.0])


def test_rank_stabilised_lora_divides_by_the_square_root(tmp_path: Path) -> None:
    assert scale(tmp_path, tensors(a=16), {"r": 16, "lora_alpha": 8, "use_rslora": True}) == pytest.approx({"a": 2.0})


def test_alpha_in_the_file_comes_before_the_configuration(tmp_path: Path) -> None:
    weights = {**tensors(a=4), "a.alpha": torch.tensor(12.0)}
    assert scale(tmp_path, weights, {"r": 4, "lora_alpha": 8}) == pytest.approx({"a": 3.0})


def test_adapter_config_beside_adapter_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 20, "peft_type": "LORA"}))
    weights = tensors(a=4)
    for name, expected in (("adapter_model.safetensors", 5.0), ("other.safetensors", 1.0)):
        source = open_lora(save(weights, tmp_path, name=name))
        torch.testing.assert_close(dense(source["a"]), expected * product(weights["a.lora_B.weight"], weights["a.lora_A.weight"]))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_written_file_is_read_back_with_a_scale_of_one(tmp_path: Path, rslora: bool) -> None:
    weights = tensors(transformer__a=4, transformer__b=4, transformer__c=9, text_encoder__d=4)
    config = {
        "transformer.r": 4,
        "transformer.lora_alpha": 8,
        "transformer.rank_pattern": {"c": 9},
        "transformer.alpha_pattern": {"b": 3},
        "transformer.use_rslora": rslora,
        "transformer.target_modules": ["a", "b", "c"],
        "text_encoder.r": 4,
        "text_encoder.lora_alpha": 1,
    }
    source = open_lora(save(weights, tmp_path, {KEY: json.dumps(config), "format": "pt"}))
    written: dict[str, torch.Tensor] = {}
    ranks = {"transformer.a": 4, "transformer.b": 2, "transformer.c": 4, "text_encoder.d": 3}
    for name, rank in ranks.items():
        update = source[name]
        written |= written_back(source, name, LowRankUpdate(update.down[:rank], update.up[:, :rank], update.scale * rank))
    metadata = source.plain_metadata(ranks)
    assert metadata["format"] == "pt"
    new = json.loads(metadata[KEY])
    assert new["transformer.target_modules"] == ["a", "b", "c"]
    assert new["transformer.rank_pattern"] == {"b": 2}
    again = open_lora(save(written, tmp_path, metadata, name="again.safetensors"))
    for name, rank in ranks.items():
        update = source[name]
        expected = update.alpha / update.rank * product(update.up[:, :rank], update.down[:rank])
        torch.testing.assert_close(dense(again[name]), expected, rtol=1e-5, atol=1e-6)
        model, _, module = name.partition(".")
        assert new[f"{model}.rank_pattern"].get(module, new[f"{model}.r"]) == rank
        assert new[f"{model}.alpha_pattern"].get(module, new[f"{model}.lora_alpha"]) == rank


def test_metadata_without_a_configuration_stays_as_it_is(tmp_path: Path) -> None:
    source = open_lora(save(tensors(a=4), tmp_path, {"ss_base_model_version": "sd_v1"}))
    assert source.plain_metadata({"a": 2}) == {"ss_base_model_version": "sd_v1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        (json.dumps({"lora_alpha": "many"}), "lora_alpha 'many' of a, allowed: a number"),
        (json.dumps({"lora_alpha": float("nan")}), "lora_alpha nan of a"),
        (json.dumps({"lora_alpha": True}), "lora_alpha True of a"),
        (json.dumps({"lora_alpha": 1, "alpha_pattern": {"(x+x+)+y": 2}}), "is a regular expression, allowed: names"),
    ],
    ids=["cut", "deep", "text", "nan", "bool", "regex"],
)
def test_a_broken_configuration_is_one_clear_error(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f"lora.safetensors: {KEY}: .*{message}".replace("(", r"\(")):
        open_lora(save(tensors(a=4), tmp_path, {KEY: text}))


@pytest.mark.parametrize("text", ["[]", "3", json.dumps({"r": 4}), json.dumps({"alpha_pattern": 3, "lora_alpha": 4})])
def test_a_configuration_without_an_alpha_changes_nothing(text: str, tmp_path: Path) -> None:
    weights = tensors(a=4)
    source = open_lora(save(weights, tmp_path, {KEY: text}))
    torch.testing.assert_close(dense(source["a"]), product(weights["a.lora_B.weight"], weights["a.lora_A.weight"]))
    source.plain_metadata({"a": 4})
