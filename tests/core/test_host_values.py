"""Values of sd-scripts' options, read without sd-scripts: what comes out is of the option's kind and needs no further reading."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_compress.settings import HostOption, describe_value, is_same_value, read_host_value, split_pairs

OPTIONS = [
    HostOption("cache_latents", bool, False),
    HostOption("clip_skip", int),
    HostOption("train_batch_size", int, 1),
    HostOption("save_every_n_epochs", int),
    HostOption("learning_rate", float, 2e-6),
    HostOption("noise_offset", float),
    HostOption("lr_warmup_steps", int, 0),
    HostOption("vae", str),
    HostOption("output_name", str),
    HostOption("caption_prefix", str),
    HostOption("lr_scheduler", str, "constant"),
    HostOption("resolution", str),
    HostOption("mixed_precision", str, "no", ("no", "fp16", "bf16")),
    HostOption("compile_dynamic", str, None, ("true", "false", "auto")),
    HostOption("dynamo_backend", str, "inductor", ("eager", "inductor")),
    HostOption("network_args", str, many=True),
    HostOption("optimizer_args", str, many=True),
    HostOption("base_weights", str, many=True),
    HostOption("text_encoder_lr", float, many=True),
]
WORDS = [
    "",
    " ",
    "true",
    "False",
    "NO",
    "none",
    "undefined",
    "1",
    "1.0",
    "1e-4",
    "10%",
    "fp32",
    "FP16",
    "512x512",
    "512,512",
    "a=1 b=2",
]
single = st.one_of(st.booleans(), st.integers(), st.floats(), st.sampled_from(WORDS), st.text(max_size=8))
values = st.one_of(single, st.lists(single, max_size=3), st.dictionaries(st.text("ab", max_size=2), single, max_size=2))


@given(option=st.sampled_from(OPTIONS), value=values)
def test_what_is_read_is_of_the_kind_of_the_option_and_is_read_as_itself(option: HostOption, value: Any) -> None:
    try:
        found = read_host_value(option, value)
    except ValueError as error:
        assert str(error)
        return
    if option.many:
        assert found is None or found == "" or isinstance(found, (list, int, float))
    elif found is not None:
        numbers = (int, float) if option.kind in (int, float) else option.kind
        assert isinstance(found, numbers)
    if found is not None:
        assert is_same_value(read_host_value(option, found), found)
    assert describe_value(found)


@given(
    st.lists(st.tuples(st.sampled_from(["a", "conv_dim", "x.y"]), st.sampled_from(["1", "0.9,0.99", "(1, 2)", "True"])), min_size=1)
)
def test_pairs_that_are_joined_are_parted_again(pairs: list[tuple[str, str]]) -> None:
    texts = [f"{name}={value}" for name, value in pairs]
    for between in (" ", ",", ", ", "\n"):
        assert split_pairs(between.join(texts)) == texts


def test_a_converter_of_its_own_takes_texts_and_checks_numbers() -> None:
    def even(text: str) -> int:
        number = int(text)
        if number % 2:
            raise ValueError("odd")
        return number

    option = HostOption("pairs", even)
    assert read_host_value(option, "4") == 4 and read_host_value(option, 4) == 4
    with pytest.raises(ValueError, match="odd"):
        read_host_value(option, 3)
