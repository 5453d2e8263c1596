"""Headless Chromium for tests of pages: Debian's own, with its own driver; nothing is downloaded."""

import base64
import os
import shutil
import time

import pytest

PATIENCE = 60  # seconds, on a machine that does much else


def open_browser(folder):
    """A browser that saves files in ``folder``; skips where there is none."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("Chromium and its driver are not installed (apt-get install chromium chromium-driver)")
    pytest.importorskip("selenium", reason="selenium is not installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--no-first-run",
        "--disable-extensions",
    ):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium's sandbox refuses root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver, env=os.environ | {"SE_AVOID_STATS": "true"}))
    opened.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    return opened


class Page:
    """The playground in a browser, as a person meets it."""

    def __init__(self, browser, url=None):
        self.browser = browser
        self.look(1400, 1000)
        if url:
            browser.get(f"{url}/")

    def look(self, width, height=1000, dark=False):
        """Another window, another colour scheme."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}  # nothing moves under a click
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme, still]})

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def one(self, selector):
        return self.browser.find_element("css selector", selector)

    def text(self, selector):
        return self.js("return document.querySelector(arguments[0]).textContent", selector)

    def js(self, code, *arguments):
        return self.browser.execute_script(code, *arguments)

    def until(self, condition, what):
        """Wait until something holds; the page may be drawing anew while it is looked at."""
        from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException

        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                if found := condition():
                    return found
            except (NoSuchElementException, StaleElementReferenceException):
                pass
            time.sleep(0.03)
        raise AssertionError(f"not within {PATIENCE} s: {what}; the page says: {self.text('body')[:600]}")

    def put(self, selector, value):
        """Write a value into a field by keys."""
        field = self.one(selector)
        field.clear()
        field.send_keys(value)

    def choose(self, kind):
        """Choose the tab of texts or of chats."""
        self.one(f'.tabs label:has(input[value="{kind}"])').click()

    def ready(self):
        self.until(lambda: self.one("#run").is_enabled(), "the form is filled and nothing runs")

    def write(self, prompt=None):
        if prompt is not None:
            if not self.one("#prompt").is_displayed():
                self.choose("text")
            self.put("#prompt", prompt)
        self.one("#run").click()
        self.done()

    def done(self):
        self.until(
            lambda: not self.one("#stop").is_displayed() and self.one("#run").is_enabled(), "the texts are written"
        )
        self.drawn()

    def drawn(self):
        """What was asked to be drawn is drawn."""
        self.browser.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))"
        )

    def tokens(self, panel):
        """Texts of the tokens of the first or second text."""
        code = "const p = document.querySelectorAll('.tv-panel')[arguments[0]]; "
        return self.js(f"{code}return [...(p?.querySelectorAll('.tv-token') ?? [])].map((t) => t.textContent)", panel)

    def token(self, panel, index):
        return self.all(".tv-panel")[panel].find_elements("css selector", ".tv-token")[index]

    def candidates(self):
        """Rows of the inspector's table, cell by cell."""
        code = "const rows = [...document.querySelectorAll('.tv-inspector tbody tr')]; "
        return self.js(f"{code}return rows.map((r) => [...r.cells].map((c) => c.innerText.trim()))")

    def complaints(self):
        """What the browser's console holds of errors, a breach of the content security policy among them."""
        found = [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]
        return [one for one in found if "favicon" not in one]

    def overflows(self):
        return self.js("return document.documentElement.scrollWidth > document.documentElement.clientWidth")

    def picture(self):
        """The whole page as PNG."""
        size = self.browser.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        return base64.b64decode(shot["data"])
