"""Headless Chromium, driven through Selenium; a test that asks for it is skipped where there is none."""

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# Chromium looks for its maker's servers by itself; the tests count every address that is asked for.
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "about:blank",  # instead of the page of new tabs
)


@contextmanager
def open_browser(profile: Path) -> Iterator:
    """A browser with an empty profile in the folder `profile`."""
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = browser
    for flag in (f"--user-data-dir={profile}", *_FLAGS):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    window.get_log("performance")  # what the browser did before the test
    try:
        yield window
    finally:
        window.quit()


def set_screen(window, width: int, height: int, dark: bool = False) -> None:
    """Size of the page in CSS pixels, and the colour scheme the user prefers."""
    window.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def console_messages(window) -> list[str]:
    """What the page wrote to the console since the last call, failed requests included."""
    return [entry["message"] for entry in window.get_log("browser")]


def requested_addresses(window) -> list[str]:
    """Addresses the pages asked for since the last call, without those that need no network."""
    events = [json.loads(entry["message"])["message"] for entry in window.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [address for address in asked if not address.startswith(("data:", "blob:", "chrome"))]


def save_screenshot(window, path: Path, whole: bool = False) -> None:
    """A picture of what is on the screen, or of the whole page."""
    picture = window.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": whole})
    Path(path).write_bytes(base64.b64decode(picture["data"]))
