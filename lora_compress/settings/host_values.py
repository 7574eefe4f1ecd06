"""Reads values of sd-scripts' training options as people and their tools write them in TOML files.

sd-scripts takes a value of a TOML file as it stands: nothing converts or checks it, as its command line would. A value that it can
use is therefore handed on untouched. One that would fail later, or silently mean something else, is converted where it can mean one
thing only, such as the text "1e-4" for a learning rate or `false` for a path that is not set.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping
from typing import Any

from .host_lists import read_host_list
from .host_option import NONE_WORDS, HostOption, parse_number

__all__ = ["read_host_value"]

_FLAG_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False, "": False}
# Texts of the user's own, in which every word may be meant. An empty one is a text too, but for the two that name files and runs.
_NAMES = ("output_name", "log_tracker_name")
_FREE_TEXT = (
    *("caption_separator", "caption_extension", "caption_prefix", "caption_suffix", "keep_tokens_separator", "secondary_separator"),
    *("log_prefix", "wandb_run_name", "training_comment", "system_prompt"),
)
# sd-scripts itself takes an empty text as not set here: it asks whether there is any text. Elsewhere it asks for None.
_MAY_BE_EMPTY = (
    *("console_log_file", "tokenizer_cache_dir", "train_data_dir", "reg_data_dir", "resume", "save_precision"),
    *("show_timesteps", "lr_scheduler_type", "optimizer_type"),
)
# Texts of one or more numbers, or of tags, with commas between them.
_COMMA_SEPARATED = ("resolution", "skip_image_resolution", "show_timesteps_resolution", "face_crop_aug_range", "metadata_tags")
_SIZE = re.compile(r"(\d+)\s*[xX×*]\s*(\d+)")  # 512x768, as people write width and height
# sd-scripts divides by these, or deletes the file that it has just written: 0 is how users write "never" and "keep all".
_ZERO_IS_UNSET = re.compile(r"(save|sample|validate)_every_n_\w+|save_last_n_\w+|max_train_epochs")
# Declared as whole numbers, but used in products and quotients alone: half a cycle of a cosine is a common setting.
_FRACTIONS = ("lr_scheduler_num_cycles", "lr_scheduler_timescale", "save_n_epoch_ratio", "ddp_timeout")
# Names of classes and functions: a space before or after one is a slip. Those of schedulers are in small letters.
_NAMES_IN_CODE = ("lr_scheduler", "lr_scheduler_type", "optimizer_type", "network_module")
_STEPS_OR_SHARE = ("lr_warmup_steps", "lr_decay_steps")
# Values beyond the choices of the command line that sd-scripts can use: it reads the first only with torch_compile and hands it to
# accelerate, and draws with DDIM where it does not know a sampler.
_OPEN_CHOICES = ("dynamo_backend", "sample_sampler")
_OTHER_WORDS = {
    "dynamo_backend": {"false": "no", "": "no", "0": "no", **dict.fromkeys(NONE_WORDS, "no")},
    "mixed_precision": dict.fromkeys(("fp32", "float32", "float", "32"), "no")
    | dict.fromkeys(("float16", "16"), "fp16")
    | {"bfloat16": "bf16"},
    "save_precision": dict.fromkeys(("fp32", "float32", "32"), "float")
    | dict.fromkeys(("float16", "16"), "fp16")
    | {"bfloat16": "bf16"},
}


def read_host_value(option: HostOption, value: Any) -> Any:
    """`value` of a TOML file as the program that trains needs it; `value` itself where it can be used as it stands.

    >>> read_host_value(HostOption("learning_rate", float, 2e-6), "1e-4")
    0.0001

    Raises:
        ValueError: it has no meaning for this option. The text says what has one, such as "a whole number".
    """
    if option.many:
        return read_host_list(option, value)
    if isinstance(value, Mapping):
        raise ValueError("a single value, not a table")
    if isinstance(value, list):
        if not value:
            return option.default
        value = _single(option, value)
    if option.kind is bool:
        return _read_flag(option.name, value)
    words = _OTHER_WORDS.get(option.name, {})
    if not isinstance(value, float) and (word := str(value).strip().lower()) in words:
        return words[word]
    if isinstance(value, bool) and (word := str(value).lower()) in option.choices:
        return word
    if _is_unset(option, value):
        return option.default
    if option.name in _STEPS_OR_SHARE:
        return _read_steps(value)
    if option.kind in (int, float):
        return _read_number(option, value)
    return _read_text(option, value) if option.kind is str else _read_other(option, value)


def _single(option: HostOption, values: list[Any]) -> Any:
    """The one value that is meant by a list where a single value belongs."""
    if len(values) == 1:
        return values[0]
    if option.name in _COMMA_SEPARATED and not any(isinstance(part, (bool, list, Mapping)) for part in values):
        return ",".join(map(_short_number, values))
    raise ValueError("a single value, not a list")


def _is_unset(option: HostOption, value: Any) -> bool:
    """Whether a value says that the option is not set; for numbers that have another default, false is 0 in sd-scripts."""
    is_text = option.kind not in (int, float) and option.name not in _STEPS_OR_SHARE
    if isinstance(value, str):
        word = value.strip().lower()
        if not word:
            return not _is_free_text(option) and (value != "" or option.name not in _MAY_BE_EMPTY)
        return word in NONE_WORDS and word not in option.choices and option.name not in _NAMES and not _is_free_text(option)
    if value is False:
        return is_text or option.default is None
    return is_text and option.default is None and value == 0 and option.name not in _NAMES and not _is_free_text(option)


def _is_free_text(option: HostOption) -> bool:
    return option.name in _FREE_TEXT or option.name.startswith("metadata_")


def _read_flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and not math.isnan(value):
        return bool(value)
    if isinstance(value, str):
        word = value.strip().lower()
        if word in (*_FLAG_WORDS, *NONE_WORDS, name):  # xformers = "xformers", as a choice of several has it
            return _FLAG_WORDS.get(word, word == name)
    raise ValueError("true or false")


def _read_number(option: HostOption, value: Any) -> Any:
    number = parse_number(value, "a whole number" if option.kind is int else "a number")
    if option.kind is float and isinstance(value, str):
        number = float(number)
    if option.kind is int and isinstance(number, float) and option.name not in _FRACTIONS:
        if not number.is_integer():
            raise ValueError("a whole number")
        number = int(number)
    never = number == 0 and option.default is None and _ZERO_IS_UNSET.fullmatch(option.name)
    random = number < 0 and option.name == "seed"  # -1 in other programs; NumPy refuses it
    return option.default if never or random else number


def _read_steps(value: Any) -> int | float:
    """Steps as a whole number, or the share of all steps as a fraction. sd-scripts takes 100.0 for 100 times all steps."""
    expected = "a whole number of steps, or a share of them from 0 to 1"
    if isinstance(value, str) and value.strip().endswith("%"):
        return float(parse_number(value.strip()[:-1], expected)) / 100
    number = parse_number(value, expected)
    if isinstance(number, float) and number > 1:
        if not number.is_integer():
            raise ValueError(expected)
        return int(number)
    return number


def _read_text(option: HostOption, value: Any) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        text = _short_number(value) if option.name in _COMMA_SEPARATED else str(value)
    elif isinstance(value, (datetime.date, datetime.time)):
        text = str(value)
    elif isinstance(value, str):
        text = value
    else:
        raise ValueError(f'text, such as "{value}"')
    if option.name in _COMMA_SEPARATED and (size := _SIZE.fullmatch(text.strip())):
        text = ",".join(size.groups())
    if option.name in _NAMES_IN_CODE:
        text = text.strip().lower() if option.name == "lr_scheduler" else text.strip()
    if not option.choices or text in option.choices or (not text and option.name in _MAY_BE_EMPTY):
        return text
    for choice in option.choices:
        if str(choice).lower() == text.strip().lower():
            return choice
    if option.name in _OPEN_CHOICES and isinstance(value, str):
        return text
    raise ValueError(f"one of {', '.join(str(choice) for choice in option.choices if choice is not None)}")


def _read_other(option: HostOption, value: Any) -> Any:
    """For an option with a converter of its own: texts are converted, numbers are taken to be what it makes of a text."""
    try:
        converted = option.kind(str(value))
    except Exception as error:  # a converter may raise what it likes; argparse has an exception for it
        raise ValueError(f"of another form ({error})") from None
    return converted if isinstance(value, str) else value


def _short_number(value: Any) -> str:
    """512.0 as 512, since sizes in pixels are whole numbers; other values as they are written."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
