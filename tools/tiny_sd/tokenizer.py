"""Stage: a real CLIP tokenizer with a small vocabulary, in which every word of a caption is one token and any text tokenizes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.models.clip.tokenization_clip import bytes_to_unicode

__all__ = ["CACHE_NAME", "learn_merges", "write_tokenizer"]

CACHE_NAME = "openai_clip-vit-large-patch14"  # the folder in which sd-scripts looks for SD1.x's tokenizer
_END = "</w>"
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first (Sennrich et al. 2016), until each word is one token."""
    byte_names = bytes_to_unicode()
    split = [[byte_names[byte] for byte in word.encode()] for word in sorted(set(words))]
    split = [[*letters[:-1], letters[-1] + _END] for letters in split]
    merges: list[tuple[str, str]] = []
    while any(len(word) > 1 for word in split):
        pairs = Counter(pair for word in split for pair in pairwise(word))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))  # ties by spelling: the same merges everywhere
        merges.append(best)
        split = [_merge(word, best) for word in split]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in word:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def write_tokenizer(words: Iterable[str], folder: Path) -> CLIPTokenizer:
    """Write `folder`/tokenizer; returns the tokenizer."""
    merges = learn_merges(words)
    letters = list(bytes_to_unicode().values())  # CLIP's order: 256 bytes, the same ending a word, merges, the two marks
    tokens = [*letters, *(letter + _END for letter in letters), *("".join(pair) for pair in merges), _BOS, _EOS]
    target = folder / "tokenizer"
    target.mkdir(parents=True, exist_ok=True)
    vocabulary = json.dumps({token: index for index, token in enumerate(tokens)}, ensure_ascii=False)
    (target / "vocab.json").write_text(vocabulary, encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (target / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(str(target / "vocab.json"), str(target / "merges.txt"), pad_token=_EOS, model_max_length=77)
    tokenizer.save_pretrained(str(target))
    return CLIPTokenizer.from_pretrained(str(target))
