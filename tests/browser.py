"""Pages in headless Chromium, by Playwright."""

import importlib.util
import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="apt-get install chromium, and pip install playwright",
)


@contextmanager
def open_page(url, size=(1280, 900), **context):
    """A page, and the list of the errors and outside requests that it makes while it is open."""
    from playwright.sync_api import sync_playwright

    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *camera])
        viewport = {"width": size[0], "height": size[1]}
        page, errors = browser.new_context(viewport=viewport, **context).new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: errors.append(request.url) if outside(request.url, url) else None)
        page.goto(url)
        yield page, errors
        browser.close()


def outside(asked, url):
    """Whether a request goes elsewhere than to the page's own server."""
    return not asked.startswith(("data:", "blob:", url.split("/", 3)[0] + "//" + url.split("/", 3)[2]))
