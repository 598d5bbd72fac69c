"""HTML pages in tests: opened in a headless Chromium if there is one, and parsed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

ADDRESSES = {"src", "href", "srcset", "data", "action", "poster", "background", "xlink:href"}


@contextmanager
def page_in_chromium(path: Path, width: int = 1000, height: int = 900) -> Iterator[tuple[Any, list[str]]]:
    """The page, opened in a browser window, and the requests that it makes. Skips the test if there is no browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright to test pages in a browser")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium or google-chrome on the path; install one to test pages in a browser")
    with playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height})
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: pytest.fail(f"the page raised {error}"))
        page.goto(path.as_uri())
        yield page, requests
        browser.close()


class ParsedPage(HTMLParser):
    """The text of a page, its tags, and every address in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self.addresses = "", [], []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ADDRESSES]

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_self_contained(html: str) -> None:
    """The page loads nothing from elsewhere and runs no script."""
    parsed = ParsedPage(html)
    assert [address for address in parsed.addresses if not address.startswith(("data:", "#"))] == []
    assert "@import" not in html
    assert "url(" not in html.replace("url(#", "")  # an SVG refers to its own parts this way
    assert "script" not in parsed.tags
    assert "default-src 'none'" in html, "the browser blocks what the checks above miss"
