"""Text of foreign files: what a terminal would obey or a drawing program would choke on is shown as an escape."""

from __future__ import annotations

import html
import sys
import unicodedata

import pytest

from lora_compress.text import as_html, shortened, visible


def test_nothing_that_a_terminal_obeys_is_left() -> None:
    for code in (*range(0x3000), *range(0xD700, 0x10000, 7), *range(0xFFF0, 0x10010), 0xE0001, 0xF0000, sys.maxunicode):
        character = chr(code)
        shown = visible(f"a{character}b")
        shown.encode()
        assert all(unicodedata.category(c) not in ("Cc", "Cs", "Cn", "Zl", "Zp") for c in shown)
        assert shown == f"a{character}b" or (shown.isprintable() and shown.startswith("a\\") and shown.endswith("b"))


@pytest.mark.parametrize("bidi", "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c\ufeff\u2028")
def test_what_reorders_or_hides_text_is_seen(bidi: str) -> None:
    assert visible(f"lora{bidi}") == f"lora\\u{ord(bidi):04x}"


def test_usual_names_stay_as_they_are() -> None:
    for name in ("lora_unet_mid_block", "キャラ スタイル", "naïve été", "a\u3000b", "می\u200cخواهم", "👩\u200d🎨", "[bold]x[/]"):
        assert visible(name) == name


def test_escapes_name_the_byte_or_the_character() -> None:
    assert visible("\0\x1b\x9b\r\n\t\udcff\ud800\ufffe\U0001fffe") == r"\x00\x1b\x9b\r\n\t\xff\ud800\ufffe\U0001fffe"
    assert visible("one\ntwo\x1b", keep="\n") == "one\ntwo\\x1b"


def test_html_shows_the_same() -> None:
    text = "<b>&\"'\x1b\u202e"
    assert html.unescape(as_html(text)) == visible(text) and "<" not in as_html(text)


def test_long_texts_lose_their_middle() -> None:
    assert shortened("abc", 5) == "abc" and shortened("abcdefghij", 5) == "ab…ij"
