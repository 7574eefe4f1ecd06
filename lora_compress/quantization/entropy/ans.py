"""A stack of symbols coded by integer tables (asymmetric numeral systems), on the `constriction` package."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np

from ...errors import FormatError, MissingPackageError
from .tables import PRECISION, normalise

__all__ = ["CHECK_BITS", "AnsReader", "AnsWriter", "coder_model", "joint_counts", "stack_words", "uniform"]

CHECK_BITS = 16
_INTEGER_BYTES = 4
_TOGETHER = 8  # bits that are coded as one symbol


def _constriction() -> Any:
    try:
        import constriction
    except ImportError as error:
        raise MissingPackageError("entropy-coded files need the package constriction: pip install constriction") from error
    return constriction


@lru_cache(maxsize=4096)
def coder_model(counts_of: Callable[..., np.ndarray], *key: Any) -> Any:
    """constriction's model with exactly the counts of `counts_of(*key)`: each is a float32, and their sum is 1."""
    probabilities = (counts_of(*key) / (1 << PRECISION)).astype(np.float32)
    return _constriction().stream.model.Categorical(probabilities, perfect=True)


@cache
def uniform(count: int) -> np.ndarray:
    """Counts of `count` symbols of equal probability."""
    return normalise([1] * count)


def joint_counts(counts_of: Callable[..., np.ndarray], *key: Any) -> np.ndarray:
    """Counts of groups of 8 bits, the first highest, that counts_of(*key) codes one by one."""
    counts = counts_of(*key).tolist()
    masses = [1]
    for _ in range(_TOGETHER):
        masses = [mass * count for mass in masses for count in counts]
    return normalise(masses)


class AnsWriter:
    """Symbols in the order in which they will be read; `to_bytes` codes them backwards."""

    def __init__(self) -> None:
        self._symbols: list[tuple[np.ndarray, Any]] = []

    def write(self, symbols: np.ndarray, counts_of: Callable[..., np.ndarray], *key: Any) -> None:
        """Append symbols (n,) coded by the table counts_of(*key)."""
        if len(symbols):
            self._symbols.append((np.ascontiguousarray(symbols, dtype=np.int32), coder_model(counts_of, *key)))

    def write_grouped(self, symbols: np.ndarray, counts_of: Callable[..., np.ndarray], *key: Any) -> None:
        """Append bits (n,), groups of them as one symbol; zeros fill the last group."""
        self.write(np.packbits(symbols.astype(np.uint8)), joint_counts, counts_of, *key)

    def write_integers(self, values: np.ndarray) -> None:
        """Append integers (n,) from 0 to 2^32 - 1: the number of bytes of each, less one, then all the bytes."""
        octets = values.astype("<u4").view(np.uint8).reshape(-1, _INTEGER_BYTES)
        lengths = (_INTEGER_BYTES - (octets[:, ::-1] != 0).argmax(axis=1)) * octets.any(axis=1)
        lengths = np.maximum(lengths, 1)
        self.write(lengths - 1, uniform, _INTEGER_BYTES)
        self.write(octets[np.arange(_INTEGER_BYTES) < lengths[:, None]], uniform, 256)

    def to_bytes(self, check: int = 0) -> bytes:
        """The stack as 32-bit little-endian words without the zero bytes at its end; the first symbols are in the last word.

        Below all symbols lies `check`, which costs next to nothing up to 2^16: the first symbol takes 2^24 states anyway. But where
        all symbols are the first of their tables, there are no bytes.
        """
        if not any(symbols.any() for symbols, _ in self._symbols):
            return b""
        coder = _constriction().stream.stack.AnsCoder(np.array([check] if check else [], dtype=np.uint32))
        for symbols, model in reversed(self._symbols):
            coder.encode_reverse(symbols, model)
        return coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


def stack_words(chunk: bytes) -> np.ndarray:
    """The words, uint32, of an `AnsWriter`'s bytes.

    Raises:
        FormatError: they are none.
    """
    if chunk and not chunk[-1]:
        raise FormatError("an entropy-coded payload ends in a zero byte, which no encoder writes: get the file again")
    return np.frombuffer(bytes(chunk) + bytes(-len(chunk) % 4), dtype="<u4").astype(np.uint32)


class AnsReader:
    """Undoes an `AnsWriter`."""

    def __init__(self, chunk: bytes) -> None:
        self._coder = _constriction().stream.stack.AnsCoder(stack_words(chunk))

    def read(self, count: int, counts_of: Callable[..., np.ndarray], *key: Any) -> np.ndarray:
        """The next `count` symbols, int32."""
        return self._coder.decode(coder_model(counts_of, *key), count) if count else np.empty(0, dtype=np.int32)

    def read_grouped(self, count: int, counts_of: Callable[..., np.ndarray], *key: Any) -> np.ndarray:
        """The next `count` bits of `write_grouped`, uint8."""
        groups = self.read(-(-count // _TOGETHER), joint_counts, counts_of, *key)
        return np.unpackbits(groups.astype(np.uint8), count=count)

    def read_integers(self, count: int) -> np.ndarray:
        """The next `count` integers of `write_integers`, int64."""
        lengths = self.read(count, uniform, _INTEGER_BYTES) + 1
        octets = np.zeros((count, _INTEGER_BYTES), dtype=np.uint8)
        octets[np.arange(_INTEGER_BYTES) < lengths[:, None]] = self.read(int(lengths.sum()), uniform, 256)
        return octets.view("<u4").reshape(count).astype(np.int64)

    def finish(self) -> int:
        """The number below all symbols.

        Raises:
            FormatError: bytes are left over, or there were too few.
        """
        left = self.left()
        if left >> CHECK_BITS:
            raise FormatError("an entropy-coded payload does not end where its module does: get the file again")
        return left

    def left(self) -> int:
        """The number below all symbols, if none is left; otherwise 2^16 or more."""
        words = self._coder.get_compressed()
        return 1 << CHECK_BITS if len(words) > 1 else sum(words.tolist())
