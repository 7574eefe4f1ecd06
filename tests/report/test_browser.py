"""The pages in a real browser: no errors, charts that can be seen, a slider that moves, phones, light and dark."""

from __future__ import annotations

import json
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from report.conftest import HEADLESS

from lora_compress.evaluation.results import Estimate, Evaluation
from lora_compress.report.html import html_page
from lora_compress.report.html_evaluation import evaluation_page
from lora_compress.report.html_history import history_page
from tests.core.test_html import history, many_modules, report_of

_FLAGS = [*HEADLESS, "--virtual-time-budget=2000"]
_FIRST = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(String(event.message)));
addEventListener("unhandledrejection", (event) => errors.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => errors.push(event.violatedDirective));
console.error = (...told) => errors.push(told.join(" "));
</script>"""
_LAST = """<script>
addEventListener("load", () => {
  const boxes = [...document.querySelectorAll("svg[role=img]")].map((svg) => svg.getBoundingClientRect());
  const seen = {
    errors, charts: boxes.length, hidden: boxes.filter((box) => box.width < 40 || box.height < 20).length,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth, width: innerWidth,
    page: getComputedStyle(document.body).backgroundColor,
    colours: [...document.querySelectorAll('svg [fill^="var("]')].map((mark) => getComputedStyle(mark).fill),
  };
  const compare = document.getElementById("compare");
  if (compare) {
    const [before, after] = compare.querySelectorAll("img");
    const slider = compare.querySelector("input");
    const cuts = ["0", "25", "100"].map((value) => {
      slider.value = value;
      slider.dispatchEvent(new Event("input"));
      return getComputedStyle(after).clipPath;
    });
    const first = before.src;
    document.querySelectorAll("table.pictures tbody tr")[1].click();
    Object.assign(seen, { cuts, changed: before.src !== first, shown: before.getBoundingClientRect().width });
  }
  parent.postMessage(JSON.stringify(seen), "*");
});
</script>"""
_FRAME = """<!doctype html><pre id="seen"></pre>
<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe>
<script>
onmessage = (event) => {{ document.getElementById("seen").textContent = event.data; }};
</script>"""  # a window cannot be as narrow as a phone


def look(browser: str, page: str, folder: Path, *, phone: bool, dark: bool) -> dict[str, Any]:
    """What a script inside the page sees, after it has moved what can be moved."""
    page = page.replace("<style>", f"{_FIRST}<style>", 1).replace("</body>", f"{_LAST}</body>")
    (folder / "page.html").write_text(page, encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(_FRAME.format(width=390 if phone else 1280), encoding="utf-8")
    flags = [*_FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000"]
    flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", frame.as_uri()]
    done = subprocess.run([browser, *flags], capture_output=True, text=True, timeout=120)
    assert '<pre id="seen">{' in done.stdout, done.stderr[-2000:]
    seen: dict[str, Any] = json.loads(unescape(done.stdout.split('<pre id="seen">')[1].split("</pre>")[0]))
    return seen


def evaluation(*more: Any) -> str:
    """A page with three prompts, drawn three times; `more` as `evaluation_page` takes it."""
    generator = torch.Generator().manual_seed(0)
    names = ("base", "full", "compressed")
    pictures = {name: torch.randint(256, (3, 3, 64, 64), generator=generator).byte() for name in names}
    estimate = Estimate("ssim", 0.93, (0.9, 0.95), 8, "pixels", 0.99, "how alike pictures are")
    return evaluation_page(
        Evaluation("small", "big", 2000, 9000, 0.05, (estimate,), ((100.0, 0.02), (500.0, 0.03)), (), {"count": 3}, pictures), *more
    )


PAGES = {
    "file": lambda: html_page(report_of(many_modules())),
    "training": lambda: history_page("star", history(), {"mode": "fid_gap"}),
    "evaluation": evaluation,
    "all of it": lambda: evaluation(report_of(many_modules()), history()),
}
CHARTS = {"file": 3, "training": 4, "evaluation": 0, "all of it": 7}  # at least


@pytest.mark.parametrize(("phone", "dark"), [(False, False), (True, True)], ids=["desktop, light", "phone, dark"])
@pytest.mark.parametrize("name", list(PAGES))
def test_a_page_in_a_browser(name: str, phone: bool, dark: bool, browser: str, tmp_path: Path) -> None:
    seen = look(browser, PAGES[name](), tmp_path, phone=phone, dark=dark)
    assert seen["errors"] == []
    assert seen["charts"] >= CHARTS[name] and seen["hidden"] == 0
    assert seen["overflow"] <= 0 and seen["width"] == (390 if phone else 1280)
    assert all(colour.startswith("rgb") and colour != "rgb(0, 0, 0)" for colour in seen["colours"]), "variables of page.css"
    assert (len(seen["colours"]) > 10) == (name != "evaluation")
    brightness = sum(map(int, seen["page"].removeprefix("rgb(").rstrip(")").split(","))) / 3
    assert (brightness < 80) == dark
    if name in ("evaluation", "all of it"):
        cuts = [cut.removeprefix("inset(").rstrip(")").split()[-1] for cut in seen["cuts"]]
        assert cuts in (["0%", "25%", "100%"], ["0px", "25%", "100%"]) and seen["changed"] and seen["shown"] > 100
