"""How pages are opened in a headless Chromium without network: for the pictures, and for the tests."""

from __future__ import annotations

import shutil

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--proxy-server=127.0.0.1:9",  # a closed port: pages need no network
    "--virtual-time-budget=5000",
)


def program() -> str | None:
    """The browser; None where none is installed."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def command(browser: str, home: str, size: tuple[int, int], dark: bool) -> list[str]:
    """The start of a command line. `home`: a new folder, for its profile. `size`: of the window."""
    width, height = size
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    return [browser, *OPTIONS, f"--user-data-dir={home}", f"--window-size={width},{height}", *theme]
