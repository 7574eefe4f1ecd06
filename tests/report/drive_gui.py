"""Uses the page of `resize_lora_ext.py gui` as a person would: run with Playwright on the path, tells as JSON what it saw.

python drive_gui.py CHROMIUM ADDRESS FOLDER; FOLDER holds lora.safetensors, wrong.safetensors and large.safetensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Page, sync_playwright

PATIENCE = 40_000  # ms


def upload(page: Page, path: Path) -> None:
    if page.locator("#upload input[type=file]").count() == 0:
        page.locator("#upload button[aria-label=Clear], #upload button[aria-label='Remove this file']").first.click()
    page.locator("#upload input[type=file]").set_input_files(path)


def overflow(page: Page) -> int:
    width: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return width


def compress(page: Page, folder: Path, seen: dict[str, Any]) -> None:
    """Upload, look, choose packed and a size, compress, download."""
    upload(page, folder / "lora.safetensors")
    page.wait_for_selector("#chart canvas, #chart svg.marks", timeout=PATIENCE)
    box = page.locator("#chart canvas, #chart svg.marks").first.bounding_box()
    seen["about"] = page.locator("#about").inner_text()
    seen["chart"] = [box["width"], box["height"]] if box else [0, 0]
    number = page.locator("#size input[type=number]")
    before = number.input_value()
    page.locator("#kind").get_by_label("smallest").check()
    page.wait_for_function("old => document.querySelector('#size input[type=number]').value !== old", arg=before, timeout=PATIENCE)
    slider = page.locator("#size input[type=range]")
    seen["range"] = [float(slider.get_attribute(name) or "nan") for name in ("min", "max", "step")]
    number.fill("0.012")
    number.press("Tab")
    page.locator("#compress").click()
    page.wait_for_function("() => document.querySelector('#result')?.innerText.includes('became')", timeout=PATIENCE)
    seen["result"] = page.locator("#result").inner_text()
    for name in ("file", "report"):
        with page.expect_download(timeout=PATIENCE) as download:
            page.locator(f"#{name}").click()
        seen[name] = download.value.suggested_filename
        download.value.save_as(folder / "downloads" / seen[name])


def main(browser: str, address: str, folder: Path) -> None:
    seen: dict[str, Any] = {"console": [], "hosts": []}
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=browser, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        for name, width in (("desktop", 1280), ("phone", 390)):
            page = chromium.new_page(viewport={"width": width, "height": 900})
            page.on("console", lambda told: seen["console"].append(told.text) if told.type == "error" else None)
            page.on("pageerror", lambda error: seen["console"].append(str(error)))
            page.on("request", lambda request: seen["hosts"].append(urlsplit(request.url).hostname))
            page.goto(address, timeout=PATIENCE)
            page.wait_for_selector("#upload input[type=file]", state="attached", timeout=PATIENCE)
            compress(page, folder, seen)
            seen[f"{name} overflow"] = overflow(page)
            page.screenshot(path=folder / f"{name}.png", full_page=True)
            if name == "phone":
                break
            upload(page, folder / "wrong.safetensors")
            page.wait_for_selector(".toast-body", timeout=PATIENCE)
            page.wait_for_timeout(500)
            seen["errors"] = page.locator(".toast-body").all_inner_texts()
            seen["text after error"] = page.locator("body").inner_text()
            page.locator(".toast-close").first.click()
            upload(page, folder / "large.safetensors")
            page.wait_for_selector("text=/maximum|exceeds/i", timeout=PATIENCE)
            seen["too large"] = page.locator("body").inner_text()
            page.close()
        chromium.close()
    seen["hosts"] = sorted({host for host in seen["hosts"] if host})
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
