"""Results in order, errors through, and a caller who feels nothing of the worker threads, also where calls overlap."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from core.samples import kohya_file
from threadpoolctl import threadpool_info

from lora_compress import CompressionSettings, compress_file
from lora_compress.inspection.comparison import compare_files
from lora_compress.inspection.file import inspect_file
from lora_compress.parallel import each_module, stream_batches


def _threads_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def _blas_threads() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


@pytest.fixture
def three_threads() -> Iterator[None]:
    """Torch has three threads before the test, and must have them after it: in this thread and in a new one."""
    before, blas = torch.get_num_threads(), _blas_threads()
    torch.set_num_threads(3)
    try:
        yield
        assert (torch.get_num_threads(), _threads_of_a_new_thread(), _blas_threads()) == (3, 3, blas)
    finally:
        torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_items() -> None:
    items = {f"m{index}": index for index in range(50)}
    results = each_module(lambda name, index: (name, index * index), items)
    assert list(results.items()) == [(name, (name, index * index)) for name, index in items.items()]


def test_the_number_of_threads_stays_what_it_was(three_threads: None) -> None:
    inside = each_module(lambda name, item: torch.get_num_threads(), {"a": 1, "b": 2})
    assert inside == {"a": 1, "b": 1}


def test_threads_that_start_meanwhile_have_as_many_as_before(three_threads: None) -> None:
    stream = stream_batches(lambda names: dict.fromkeys(names, torch.get_num_threads()), [f"m{index}" for index in range(99)])
    assert next(stream) == ("m0", 1)
    assert (torch.get_num_threads(), _threads_of_a_new_thread()) == (3, 3)
    assert {count for _, count in stream} == {1}


def _fail(stream: Iterator[object]) -> None:
    with pytest.raises(KeyError, match="m70"):
        list(stream)


ENDINGS: dict[str, Callable[[Iterator[object]], object]] = {
    "exhausted": list,
    "closed": lambda stream: stream.close(),  # type: ignore[attr-defined]
    "failing": _fail,
    "abandoned": lambda stream: None,
}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first_ends_first", "second_ends_first"])
@pytest.mark.parametrize("endings", list(product(ENDINGS, ENDINGS)), ids="_".join)
def test_calls_that_overlap_leave_the_number_of_threads(
    three_threads: None, endings: tuple[str, str], order: tuple[int, int]
) -> None:
    """Each in a thread of its own, which is new when its call begins and is asked for its number of threads when that has ended."""

    def work(names: Sequence[str], fails: bool) -> dict[str, int]:
        if fails and "m70" in names:
            raise KeyError("m70")
        return dict.fromkeys(names, torch.get_num_threads())

    names = [f"m{index}" for index in range(99)]
    streams = [stream_batches(partial(work, fails=ending == "failing"), names) for ending in endings]
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        pools = (first, second)
        for pool, stream in zip(pools, streams, strict=True):
            assert pool.submit(next, stream).result() == ("m0", 1)
            del stream
        for which in order:
            pools[which].submit(ENDINGS[endings[which]], streams[which]).result()
            streams[which] = iter(())  # what was abandoned ends here, in another thread than it ran in
        assert [pool.submit(torch.get_num_threads).result() for pool in pools] == [3, 3]


def test_files_that_are_worked_on_at_once_come_out_right(three_threads: None, tmp_path: Path) -> None:
    """Compressed, packed, inspected and compared, by four at once as by one alone."""
    source = kohya_file(tmp_path / "lora.safetensors", count=9, width=96, rank=16)

    def work(name: str) -> tuple[bytes, str, float]:
        target = tmp_path / f"{name}.safetensors"
        compress_file(source, target, CompressionSettings.parse({"bits": 4, "save_format": "packed"}))
        inspected = inspect_file(str(target)).as_json()
        del inspected["model"]
        return target.read_bytes(), json.dumps(inspected), compare_files(str(source), str(target)).relative_error

    alone = work("alone")
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, "abcd")) == [alone] * 4
        assert set(pool.map(lambda _: torch.get_num_threads(), range(8))) == {3}


def test_the_first_error_comes_through() -> None:
    def fail(name: str, item: int) -> int:
        if item > 2:
            raise KeyError(name)
        return item

    with pytest.raises(KeyError, match="m3"):
        each_module(fail, {f"m{index}": index for index in range(9)})
    assert _threads_of_a_new_thread() == torch.get_num_threads()


def test_no_gradients_are_recorded() -> None:
    weight = torch.ones(2, requires_grad=True)
    assert not each_module(lambda name, item: item * 2, {"m": weight})["m"].requires_grad
