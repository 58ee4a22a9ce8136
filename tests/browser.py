"""A real headless Chromium for tests, Debian's, driven by Playwright. What goes wrong in a page, or
leaves the machine, is kept.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Request, sync_playwright

MISSING = "Chromium is not installed; on Debian: apt-get install chromium"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LIMIT_MS = 120_000


def chromium() -> str | None:
    """Where Chromium is, or None. Playwright's own browsers are not used: they would be
    downloaded.
    """
    return shutil.which("chromium") or shutil.which("chromium-browser")


@dataclass
class Window:
    """A browser window with cookies and storage of its own.

    `wrong` holds errors of its pages' consoles and scripts, `asked` the hosts that they turned to.
    """

    context: BrowserContext
    wrong: list[str] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)

    @property
    def elsewhere(self) -> set[str]:
        """The hosts that are not this machine."""
        return self.asked - set(LOOPBACK)


@contextmanager
def launched() -> Iterator[Browser]:
    """A headless Chromium, for as many windows as are wanted."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def window(browser: Browser, **settings: str) -> Iterator[Window]:
    """A window that shares nothing with others; `settings` are Playwright's, such as
    color_scheme.
    """
    found = Window(browser.new_context(viewport={"width": 1360, "height": 900}, **settings))
    found.context.set_default_timeout(LIMIT_MS)

    def on_console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            found.wrong.append(f"{message.type}: {message.text}")

    def sent(request: Request) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("data", "blob"):
            found.asked.add(address.hostname or "")

    found.context.on("console", on_console)
    found.context.on("weberror", lambda error: found.wrong.append(f"script: {error.error}"))
    found.context.on("request", sent)
    try:
        yield found
    finally:
        found.context.close()
