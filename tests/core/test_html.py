"""The HTML page: complete, self-contained, safe against what names hold, small at a thousand modules."""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lora_compress.errors import MissingPackageError
from lora_compress.report.charts import chart
from lora_compress.report.drawing import DrawingError, draw
from lora_compress.report.file_report import FileReport, ModuleReport
from lora_compress.report.html import html_page, write_html
from lora_compress.report.html_batch import batch_page
from lora_compress.report.html_blocks import place_of
from lora_compress.report.html_history import history_page

_VOID = {"meta", "link", "br", "input", "img", "hr"}


class _Page(HTMLParser):
    """Collects tags, text by enclosing tag, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.balanced = True
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.balanced &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _module(name: str, part: str = "U-Net", rank: tuple[int, int] = (8, 4), bits: float = 4.0, inputs: int = 32) -> ModuleReport:
    sigma = tuple(2.0**-i for i in range(rank[0]))
    lost, norm = sum(s * s for s in sigma[rank[1] :]), sum(s * s for s in sigma)
    stored = int(rank[1] * (16 + inputs) * bits / 8)
    return ModuleReport(name, part, (16, inputs), rank, (rank[0] * (16 + inputs) * 2, stored), lost, norm, sigma)


def report_of(modules: Sequence[ModuleReport], **changes: object) -> FileReport:
    sizes = tuple(sum(module.bytes[side] for module in modules) + 500 for side in (0, 1))
    values = {
        "input": "in.safetensors",
        "output": "out.safetensors",
        "status": "written",
        "layout": "kohya",
        "family": "sd1",
        "bytes": sizes,
        "seconds": 1.5,
        "modules": tuple(modules),
        "notes": ("a note",),
        "settings": {"rank_ratio": 0.5, "group_size": None},
        "curve": ((sizes[1] // 2, 0.4), (sizes[1] * 2, 0.1)),
    }
    return FileReport(**{**values, **changes})  # type: ignore[arg-type]


def many_modules(count: int = 40) -> list[ModuleReport]:
    return [
        _module(
            f"lora_unet_down_blocks_{i // 20}_attentions_{i // 10 % 2}_transformer_blocks_0_attn1_{i % 10}", rank=(8, 1 + i % 7)
        )
        for i in range(count)
    ]


def test_the_page_holds_the_numbers_of_the_report() -> None:
    report = report_of(many_modules())
    page = _Page(html_page(report))
    text = " ".join(" ".join(page.text).split())
    assert page.balanced and not page.open
    for number in (
        f"{report.relative_error:.2%}",
        f"{report.bits_per_weight:.2f}",
        "1.5 s",
        "of 40",
        "a note",
        "rank_ratio",
        "0.5",
    ):
        assert number in text, number
    rows = [tag for tag, attributes in page.tags if tag == "tr"]
    assert len(rows) >= 40
    cells = [
        attributes for tag, attributes in page.tags if tag == "path" and re.fullmatch(r"var\(--h\d\)", attributes.get("fill") or "")
    ]
    assert len(cells) >= 40


def test_the_page_asks_nothing_of_a_network() -> None:
    text = html_page(report_of(many_modules()))
    page = _Page(text)
    assert not [tag for tag, attributes in page.tags if {"src", "href", "srcset", "xlink:href"} & attributes.keys()]
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "embed", "img")]
    assert "@import" not in text and "url(" not in text
    assert "http:" not in text and "https:" not in text
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")


@pytest.mark.parametrize(
    "evil", ["</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a&b<i>", "$script ${title}"]
)
def test_what_names_hold_stays_text(evil: str) -> None:
    plain = _Page(html_page(report_of([_module("lora_unet_a"), _module("lora_unet_b", rank=(8, 2))])))
    modules = [_module(f"lora_unet_blocks_0_{evil}", part=evil), _module(f"{evil}_blocks_1_x", part=evil, rank=(8, 2))]
    text = html_page(
        report_of(modules, input=evil, output=evil, notes=(evil,), settings={evil: evil, "none": None}, layout=evil, family=evil)
    )
    page = _Page(text)
    assert page.balanced and not page.open
    count = [tag for tag, _ in page.tags].count
    assert count("script") == [tag for tag, _ in plain.tags].count("script") and count("img") == 0
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert sum(evil in part for part in page.text) >= 6


def test_files_without_curves_spectra_or_survivors_have_a_page_too() -> None:
    dropped = [_module("lora_unet_blocks_0_x", rank=(8, 0)), _module("lora_unet_blocks_1_x", rank=(8, 0))]
    for report in (
        report_of(dropped, status="not_smaller", output=None, curve=()),
        report_of([ModuleReport("a", "U-Net", (4, 4), (2, 2), (32, 8), 0.0, 0.0)], bytes=(100, 0)),
        report_of([], curve=()),
    ):
        page = _Page(html_page(report))
        assert page.balanced and not page.open
    assert "every module was dropped" in html_page(report_of(dropped))
    some = html_page(report_of([*many_modules(6), dropped[0]]))
    assert 'stroke-dasharray="2.5,2"' in some and "dropped (1)" in some


def test_a_thousand_modules_fit_in_two_megabytes() -> None:
    modules = [
        _module(f"lora_unet_input_blocks_{i // 90}_1_transformer_blocks_{i % 9}_attn{i % 7}", rank=(64, 8)) for i in range(1014)
    ]
    assert len(html_page(report_of(modules)).encode()) < 2_000_000


def test_the_page_is_written_whole(tmp_path: Path) -> None:
    report = report_of(many_modules(4))
    write_html(report, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == html_page(report)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_batch_page_lists_every_file() -> None:
    files = [
        {**report_of(many_modules(3)).as_json(), "input": "a<b>.safetensors"},
        {"input": "bad.safetensors", "output": None, "status": "failed", "error": "bad: is <refused>", "notes": []},
        {"input": "old.safetensors", "output": "x", "status": "skipped", "notes": []},
    ]
    page = _Page(batch_page(files, {"bits": 4}))
    text = " ".join(page.text)
    assert page.balanced and not page.open
    for words in ("a<b>.safetensors", "bad: is <refused>", "skipped", "1 failed"):
        assert words in text


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "down 1.0", "attn1_to_q"),
        ("lora_unet_mid_block_resnets_1_conv1", "mid 1", "conv1"),
        ("lora_unet_up_blocks_2_upsamplers_0_conv", "up 2", "upsamplers_0_conv"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_1_ff_net_0_proj", "in 4", "ff_net_0_proj"),
        ("lora_unet_middle_block_1_transformer_blocks_9_attn2_to_k", "mid 1", "attn2_to_k"),
        ("lora_unet_double_blocks_18_img_attn_qkv", "double 18", "img_attn_qkv"),
        ("transformer.single_transformer_blocks.37.attn.to_q", "single 37", "attn_to_q"),
        ("transformer.transformer_blocks.0.ff.net.0.proj", "block 0", "ff_net_0_proj"),
        ("diffusion_model.blocks.12.self_attn.q", "block 12", "self_attn_q"),
        ("lora_unet_joint_blocks_3_x_block_attn_qkv", "joint 3", "x_block_attn_qkv"),
        ("lora_te1_text_model_encoder_layers_11_mlp_fc1", "layer 11", "mlp_fc1"),
        ("text_encoder_2.text_model.encoder.layers.3.self_attn.k_proj", "layer 3", "self_attn_k_proj"),
        ("lora_unet_conv_in", "other", "conv_in"),
    ],
)
def test_places_of_modules(name: str, block: str, kind: str) -> None:
    place = place_of(name)
    assert (place.block, place.kind) == (block, kind)


def test_blocks_stand_in_the_order_of_the_model() -> None:
    names = [
        "lora_unet_up_blocks_0_resnets_0_conv1",
        "lora_unet_down_blocks_10_resnets_0_conv1",
        "lora_unet_mid_block_resnets_0_conv1",
        "lora_unet_down_blocks_2_downsamplers_0_conv",
        "lora_unet_down_blocks_2_resnets_1_conv1",
        "lora_unet_conv_in",
    ]
    ordered = [place.block for place in sorted(map(place_of, names), key=lambda place: place.order)]
    assert ordered == ["down 2.1", "down 2", "down 10.0", "mid 0", "up 0.0", "other"]


def history() -> list[dict[str, Any]]:
    """Of a training that compresses at its third evaluation and fails to be measured at its fourth."""
    levels = [(0.8, 8), (0.8, 8), (0.75, 6), (0.75, 6)]
    entries: list[dict[str, Any]] = []
    for step, (ratio, bits) in zip((10, 20, 30, 40), levels, strict=True):
        entry: dict[str, Any] = {
            "step": step,
            "pictures": 48,
            "extractor": "probe",
            "rank_ratio": ratio,
            "bits": bits,
            "bytes": step * 1000,
        }
        entries.append(entry | {"strategy": "dynamic", "action": "keep", "reason": f"because {step} < 100"})
        if step < 40:
            entries[-1] |= {
                "probe_fd": 5.0 / step,
                "probe_fd_interval": [0.0, 1.0],
                "probe_fd_floor": 0.125,
                "probe_fd_full": 4.0 / step,
            }
    entries[1] |= {"action": "compress", "next": {"rank_ratio": 0.75, "bits": 6, "strategy": "dynamic"}}
    entries[3] |= {"error": "OutOfMemoryError: <none left>"}
    return entries


def test_the_page_of_a_training_holds_what_was_measured_and_decided() -> None:
    text = history_page("lora <1>", history(), {"mode": "fid_gap"})
    shown = html.unescape(text)
    assert "lora <1>" in shown and "lora <1>" not in text and "<none left>" not in text
    assert all(f"because {step} < 100" in shown for step in (10, 20, 30, 40)) and "OutOfMemoryError: <none left>" in shown
    assert text.count("<figure>") == 4  # probe_fd, rank_ratio, bits, bytes
    assert text.count('stroke-dasharray="5,4"') == 1 and "probe_fd after step 30: 0.1667" in shown
    assert "uncompressed after step 20: 0.2" in shown and ">1</b>" in text and "floor 0.125" in shown
    assert not re.search(r"(src|href)=.?(https?:)?//", text)


def test_a_training_without_a_controller_has_its_distances_alone() -> None:
    entries = [{key: entry[key] for key in ("step", "probe_fd", "probe_fd_interval")} for entry in history()[:3]]
    text = history_page("lora", entries, {})
    assert text.count("<figure>") == 1 and "changes of the compression" not in text
    assert history_page("lora", [{"step": 1, "error": "no"}], {}).count("<figure>") == 0


def test_a_missing_chart_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(MissingPackageError, match="pip install vl-convert-python"):
        html_page(report_of(many_modules(2)))


@pytest.mark.parametrize("evil", ["\0", "\x01", "\a", "\x1b[2J", "\ufffe", "\ud800", "\u202e", "x" * 100_000], ids=ascii)
def test_a_page_is_drawn_whatever_names_hold(evil: str) -> None:
    modules = [
        _module(f"lora_unet_blocks_0_{evil}", part=f"part {evil}"),
        _module(f"{evil}_blocks_1_x", part=f"part {evil}", rank=(8, 2)),
    ]
    text = html_page(report_of(modules, input=evil, notes=(evil,), settings={evil: evil}))
    assert text.count("<svg") >= 5 and "could not be drawn" not in text
    assert not set(text) & set("\0\x01\a\x1b\ufffe\ud800\u202e")
    assert _Page(text).balanced


def test_a_chart_that_cannot_be_drawn_costs_that_chart_alone() -> None:
    bar = {"mark": "bar", "encoding": {"y": {"field": "name", "type": "nominal"}}}
    crash = {"data": {"values": [{"name": "\0"}]}, **bar}
    with pytest.raises(DrawingError, match="ended unexpectedly"):
        draw(crash)
    with pytest.raises(DrawingError, match=r"took over 0\.001 seconds"):
        draw({"data": {"values": [{"name": "a"}]}, **bar}, patience=0.001)
    with pytest.raises(DrawingError, match="ValueError"):
        draw({"mark": 1})
    assert chart("a <label>", {"mark": "nothing"}).startswith('<p class="undrawn">This chart could not be drawn (ValueError')
    assert "&lt;label&gt;" in chart("a <label>", {"mark": "nothing"})
    assert "<svg" in chart("bars", {"data": {"values": [{"name": "\0"}]}, **bar})
