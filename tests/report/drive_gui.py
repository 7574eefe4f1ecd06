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

PATIENCE = 60_000  # ms
SIZE = "0.012"  # MB


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
    page.wait_for_selector("#chart svg.marks", timeout=PATIENCE)
    box = page.locator("#chart svg.marks").bounding_box()
    seen["about"] = page.locator("#about").inner_text()
    seen["chart"] = [box["width"], box["height"]] if box else [0, 0]
    seen["lines"] = page.locator("#chart svg .mark-line path").count()
    number = page.locator("#size input[type=number]")
    before = number.input_value()
    page.locator("#kind").get_by_label("smallest").check()
    page.wait_for_function("old => document.querySelector('#size input[type=number]').value !== old", arg=before, timeout=PATIENCE)
    slider = page.locator("#size input[type=range]")
    seen["range"] = [float(slider.get_attribute(name) or "nan") for name in ("min", "max", "step")]
    number.fill(SIZE)
    number.press("Tab")
    page.locator("#compress").click()
    page.wait_for_function("() => document.querySelector('#result')?.innerText.includes('became')", timeout=PATIENCE)
    seen["result"] = page.locator("#result").inner_text()
    for name in ("file", "report"):
        with page.expect_download(timeout=PATIENCE) as download:
            page.locator(f"#{name}").click()
        seen[name] = download.value.suggested_filename
        download.value.save_as(folder / "downloads" / seen[name])


def refuse(page: Page, folder: Path, seen: dict[str, Any]) -> None:
    """Files that are refused: one that is no LoRA, and one that is too large."""
    upload(page, folder / "wrong.safetensors")
    page.wait_for_selector(".toast-body", timeout=PATIENCE)
    page.wait_for_timeout(500)
    seen["errors"] = page.locator(".toast-body").all_inner_texts()
    seen["page of the error"] = page.locator("body").inner_text()
    seen["left of the file before"] = page.locator("#about").is_visible() or page.locator("#result").is_visible()
    page.locator(".toast-close").click()
    upload(page, folder / "large.safetensors")
    page.wait_for_selector("text=/exceed/", timeout=PATIENCE)


def main(browser: str, address: str, folder: Path) -> None:
    told: list[str] = []
    asked: list[str] = []
    both: dict[str, Any] = {}
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=browser, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        for name, width in (("desktop", 1280), ("phone", 390)):
            seen: dict[str, Any] = {}
            page = chromium.new_page(viewport={"width": width, "height": 900})
            page.on("console", lambda message: told.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: told.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            page.goto(address, timeout=PATIENCE)
            page.wait_for_selector("#upload input[type=file]", state="attached", timeout=PATIENCE)
            compress(page, folder, seen)
            seen["overflow"] = overflow(page)
            if name == "desktop":
                refuse(page, folder, seen)
            page.close()
            both[name] = seen
        chromium.close()
    hosts = sorted({urlsplit(url).hostname or "" for url in asked if not url.startswith(("data:", "blob:"))})
    print(json.dumps({**both, "console": told, "hosts": hosts}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
