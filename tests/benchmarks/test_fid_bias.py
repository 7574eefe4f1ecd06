"""The bias curve of FID: its numbers are those of the laws that are drawn, its plot a picture."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import fid_bias
import pytest

from lora_compress.evaluation.frechet import frechet_distance


def test_few_pictures_look_far_apart_and_many_do_not(tmp_path: Path) -> None:
    rows = fid_bias.rows_of(32, (16, 64, 256), budget=1200)
    same = [row["same"] for row in rows]
    assert same == sorted(same, reverse=True) and same[0] > 10 * same[-1]  # type: ignore[type-var,operator]
    assert rows[-1]["difference"] == pytest.approx(fid_bias.TRUE, rel=0.3)
    assert abs(rows[-1]["infinity"] - fid_bias.TRUE) < abs(rows[-1]["apart"] - fid_bias.TRUE)  # type: ignore[operator]
    assert rows[0]["infinity"] is None
    for row in rows:
        assert abs(row["kid_mean"]) < 2 * row["kid_deviation"]  # type: ignore[operator,arg-type]
    fid_bias.write_bias_plot(tmp_path / "plot.svg", {32: rows})
    texts = {"".join(e.itertext()) for e in ET.parse(tmp_path / "plot.svg").getroot().iter("{http://www.w3.org/2000/svg}text")}
    assert {"features 32 wide", "FID, same law: the floor", "256"} <= texts
    assert "infinity" in fid_bias.table(32, rows)


def test_the_laws_are_as_far_apart_as_is_said() -> None:
    moved = fid_bias.samples(64, 1, 0, fid_bias.TRUE) - fid_bias.samples(64, 1, 0)
    assert float(moved.square().sum()) == pytest.approx(fid_bias.TRUE)
    first, second = fid_bias.samples(8, 40, 0), fid_bias.samples(8, 40, 1)
    row = fid_bias.row_of(8, 40, 1)
    shift = fid_bias.samples(8, 1, 0, fid_bias.TRUE) - fid_bias.samples(8, 1, 0)
    assert row["apart"] == pytest.approx(frechet_distance(first, second + shift))
    assert float(fid_bias.samples(64, 4000, 0).var(dim=0).sum()) == pytest.approx(1.0, rel=0.05)
