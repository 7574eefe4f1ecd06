"""`each_module`: results in order, errors through, and a caller who feels nothing of the worker threads."""

from __future__ import annotations

import threading

import pytest
import torch

from lora_compress.parallel import each_module


def _threads_of_a_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_results_come_in_the_order_of_the_items() -> None:
    items = {f"m{index}": index for index in range(50)}
    results = each_module(lambda name, index: (name, index * index), items)
    assert list(results.items()) == [(name, (name, index * index)) for name, index in items.items()]


def test_the_number_of_threads_stays_what_it_was() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        inside = each_module(lambda name, item: torch.get_num_threads(), {"a": 1, "b": 2})
        assert inside == {"a": 1, "b": 1}
        assert torch.get_num_threads() == 3
        assert _threads_of_a_new_thread() == 3
    finally:
        torch.set_num_threads(before)


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
