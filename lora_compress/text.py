"""Text from foreign files, made safe to show: on a terminal, in HTML, in a chart.

Names of modules and files, metadata and messages of other libraries can hold any character. A terminal obeys some of them (ESC,
C1), some reorder what stands around them (the bidirectional controls), and some are no text at all (lone surrogates, U+FFFE),
which programs that draw or encode text refuse. All of them are shown as escapes, so that a reader sees that they are there.
"""

from __future__ import annotations

import html
import unicodedata

__all__ = ["as_html", "shortened", "visible"]

# Control, format, surrogate, private use, unassigned; separators of lines and of paragraphs.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"  # format characters that scripts such as Persian and many emoji are spelled with
_ESCAPES = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
_FIRST_BYTE, _LAST_BYTE = "\udc80", "\udcff"  # how Python holds a byte of a file name that is no UTF-8


def visible(text: str, keep: str = "") -> str:
    r"""The text with an escape, such as `\x1b` or `\u202e`, for every character that is not meant to be seen.

    A byte of a file name that is no UTF-8 becomes `\xff`.

    Args:
        text: any string, lone surrogates too.
        keep: characters to leave as they are, such as the newlines of a message of several lines.

    >>> print(visible("lora_\x1b[2J\u202e.safetensors"))
    lora_\x1b[2J\u202e.safetensors
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or not _is_hidden(c) else _escape(c) for c in text)


def as_html(text: object) -> str:
    """The text of an object as HTML that shows it, in an element or in an attribute between quotes; see `visible`."""
    return html.escape(visible(str(text)))


def shortened(text: str, most: int) -> str:
    """The text, with its middle left out where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    half = (most - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN and character not in _JOINERS


def _escape(character: str) -> str:
    code = ord(character)
    if _FIRST_BYTE <= character <= _LAST_BYTE:
        return f"\\x{code - 0xDC00:02x}"
    if character in _ESCAPES:
        return _ESCAPES[character]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
