"""The search for a step: how few looks at the file it takes, and how close predictions are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from lora_compress import CompressionSettings, LowRankUpdate
from lora_compress.engine.context import FileContext
from lora_compress.engine.encode import EncodedModule, Encoder
from lora_compress.engine.plan import plan
from lora_compress.quantization import ModulePlan
from lora_compress.update import relative_error


def updates() -> dict[str, LowRankUpdate]:
    """40 modules whose strength spans a factor of 10, with spectra i^-0.6."""
    random = torch.Generator().manual_seed(0)
    found = {}
    for number in range(40):
        inputs, outputs = ((320, 320), (320, 640), (640, 320), (200, 900))[number % 4]
        root = (torch.arange(1, 17) ** -0.6 * 10 ** (number % 9 / 8 - 0.5)).sqrt()
        down = torch.randn(16, inputs, generator=random) / inputs**0.5 * root[:, None]
        up = torch.randn(outputs, 16, generator=random) / outputs**0.5 * root
        part = "te1" if number % 5 == 0 else "unet"
        found[f"lora_{part}_{number}"] = LowRankUpdate(down, up, 16.0)
    return found


class Counted(Encoder):
    """Counts how many modules were made, and how many predicted."""

    made = predicted = 0

    def run(self, choices: Mapping[str, ModulePlan], *, predict: bool = False) -> Iterator[tuple[str, EncodedModule]]:
        if predict:
            self.predicted += len(choices)
        else:
            self.made += len(choices)
        return super().run(choices, predict=predict)


def encoder(**settings: Any) -> Counted:
    return Counted(updates(), CompressionSettings.parse({"strategy": "entropy", "save_format": "packed", **settings}))


def frame(counted: Encoder) -> FileContext:
    return FileContext(
        lambda stored: 900 + sum(70 + module.payload for module in stored.values()), dict.fromkeys(counted.components, "U-Net")
    )


def error(counted: Encoder, stored: Mapping[str, EncodedModule]) -> float:
    lost = sum(stored[n].squared_error if n in stored else a.norm for n, a in counted.components.items())
    return relative_error(lost, sum(a.norm for a in counted.components.values()))


BUDGETS = [{"target_size": size} for size in ("60kB", "100kB", "200kB", "400kB")]
BUDGETS += [{"target_error": target} for target in (0.02, 0.05, 0.1, 0.2, 0.4)]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("codec", [{}, {"refine": False}, {"progressive": True}], ids=str)
def test_a_budget_is_met_within_one_percent_by_few_looks_at_the_file(budget: dict[str, Any], codec: dict[str, Any]) -> None:
    counted = encoder(**budget, **codec)
    found = plan(counted, frame(counted))
    assert found.stored is not None
    size, target = counted.settings.budget.size, counted.settings.budget.target_error
    reached = frame(counted).file_size(found.stored) / size if size else error(counted, found.stored) / float(target or 0)
    assert 0.99 <= reached <= 1.0
    modules = len(counted.components)
    assert counted.made <= 2.3 * modules  # one run, seldom two, and a sample of an eighth for each prediction
    assert counted.predicted <= 3 * modules


@pytest.mark.parametrize("codec", [{}, {"refine": False}, {"progressive": True}], ids=str)
@pytest.mark.parametrize("step", [0.03, 0.01, 0.002])
def test_predictions_are_what_coding_comes_to(step: float, codec: dict[str, Any]) -> None:
    counted = encoder(target_size="100kB", **codec)
    choices = {name: ModulePlan(16, step_size=step) for name in counted.components}
    made, predicted = dict(counted.run(choices)), counted.predict(choices)
    assert frame(counted).file_size(predicted) == pytest.approx(frame(counted).file_size(made), rel=0.004)
    assert error(counted, predicted) == pytest.approx(error(counted, made), rel=0.012)
