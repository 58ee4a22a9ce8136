"""The documentation site: how it is built, and what is wrong with it. `make docs` runs this by
itself: `python -m tests.site`.

A link into the site has to find its file and its anchor; a link out of it is read, never followed.
Pages, styles and scripts may ask for nothing from elsewhere.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "zensical.toml"
BUILT = ROOT / "build" / "site"
_FETCHED = ("src", "srcset", "data", "poster", "action", "formaction", "background")
_NAVIGATION = {
    "prev",
    "next",
    "canonical",
    "edit",
    "alternate",
}  # <link rel> that nothing is fetched for
_IN_STYLES = re.compile(r"""(?:url\(\s*|@import\s+)["']?(?!data:)([^"')\s]+)""")
_IN_MARKDOWN = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass
class Page(HTMLParser):
    """What one built page has to say to a checker: its anchors, where its links lead, what it
    fetches.
    """

    path: Path
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.anchors |= {attributes[name] for name in ("id", "name") if name in attributes}
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        if (
            tag in ("link", "use", "image")
            and not set(attributes.get("rel", "").split()) & _NAVIGATION
        ):
            self.fetched += [
                attributes[name] for name in ("href", "xlink:href") if name in attributes
            ]
        self.fetched += [attributes[name] for name in _FETCHED if name in attributes]
        self.fetched += _IN_STYLES.findall(attributes.get("style", ""))


def build(folder: Path) -> Path:
    """Build the site from a copy of its sources in `folder`; raises AssertionError with the
    generator's output.
    """
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(CONFIG, folder)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / BUILT.relative_to(ROOT)


def faults(site: Path) -> list[str]:
    """What is wrong with a built site and the README: a line for each fault."""
    return [
        *outside_navigation(),
        *lost_links(site),
        *foreign_assets(site),
        *lost_readme_links(site),
    ]


def outside_navigation() -> Iterator[str]:
    """Pages that the navigation lacks or names twice, and names in it that are no page."""
    named = list(_pages_in(tomllib.loads(CONFIG.read_text())["project"]["nav"]))
    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    yield from (
        f"docs/{name} is not in the navigation of {CONFIG.name}"
        for name in sorted(there - set(named))
    )
    yield from (
        f"{CONFIG.name} names {name}, which is no page in docs/"
        for name in sorted(set(named) - there)
    )
    yield from (
        f"{CONFIG.name} names {name} twice"
        for name in sorted({name for name in named if named.count(name) > 1})
    )


def lost_links(site: Path) -> Iterator[str]:
    for path in sorted(site.rglob("*.html")):
        for link in page(path).links:
            if fault := _fault(link, path, site):
                yield f"{path.relative_to(site)}: {fault}"


def lost_readme_links(site: Path) -> Iterator[str]:
    """The README stands outside the site: its links are files of the repository, their anchors
    those of the built pages.
    """
    for link in _IN_MARKDOWN.findall((ROOT / "README.md").read_text("utf-8")):
        parts = urlsplit(link)
        if parts.scheme:
            fault = _fault(link, ROOT / "README.md", ROOT)
        elif not (ROOT / parts.path).exists():
            fault = f"{link} is no file"
        else:
            built = site / Path(parts.path).with_suffix(".html").name
            fault = (
                f"{link} is no anchor"
                if parts.fragment
                and not (built.is_file() and parts.fragment in page(built).anchors)
                else None
            )
        if fault:
            yield f"README.md: {fault}"


def foreign_assets(site: Path) -> Iterator[str]:
    """What pages and styles would fetch: nothing from elsewhere, and only what is there."""
    for path in sorted(site.rglob("*.html")):
        for asset in page(path).fetched:
            if fault := _asset_fault(asset, path, site):
                yield f"{path.relative_to(site)}: {fault}"
    for path in sorted([*site.rglob("*.css"), *site.rglob("*.svg")]):
        for asset in _IN_STYLES.findall(path.read_text("utf-8")):
            if not asset.startswith("#") and (fault := _asset_fault(asset, path, site)):
                yield f"{path.relative_to(site)}: {fault}"


@cache
def page(path: Path) -> Page:
    return Page(path)


def _pages_in(entry: Any) -> Iterator[str]:
    """The page names in a navigation, in its order."""
    if isinstance(entry, str):
        yield entry
    else:
        for below in entry.values() if isinstance(entry, dict) else entry:
            yield from _pages_in(below)


def _place(path: str, at: Path, site: Path) -> Path:
    """The file that a path on a page means; one that begins with a slash is the site's, as on the
    page for what is not found.
    """
    found = (
        site / unquote(path).lstrip("/")
        if path.startswith("/")
        else at.parent / unquote(path)
        if path not in ("", ".")
        else at
    )
    return found / "index.html" if found.is_dir() else found


def _fault(link: str, at: Path, site: Path) -> str | None:
    parts = urlsplit(link)
    if parts.scheme in ("http", "https"):
        return (
            None if "." in parts.netloc and not re.search(r"\s", link) else f"{link} is no address"
        )
    if parts.scheme == "mailto":
        return None
    if parts.scheme or parts.netloc:
        return f"{link} leads where no page is"
    target = _place(parts.path, at, site)
    if not target.is_file():
        return f"{link} is no file"
    if (
        parts.fragment
        and target.suffix == ".html"
        and unquote(parts.fragment) not in page(target).anchors
    ):
        return f"{link} is no anchor"
    return None


def _asset_fault(asset: str, at: Path, site: Path) -> str | None:
    parts = urlsplit(asset)
    if parts.scheme == "data":
        return None
    if parts.scheme or parts.netloc:
        return f"{asset} would be fetched from elsewhere"
    return None if _place(parts.path, at, site).is_file() else f"{asset} is no file"


def main() -> int:
    shutil.rmtree(BUILT, ignore_errors=True)
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=ROOT
    )
    found = faults(BUILT) if built.returncode == 0 else []
    for fault in found:
        print(fault)
    if not found and built.returncode == 0:
        print(
            f"{BUILT.relative_to(ROOT)}/index.html: {len(list(BUILT.rglob('*.html')))} "
            "pages, every link and anchor is there"
        )
    return built.returncode or (1 if found else 0)


if __name__ == "__main__":
    raise SystemExit(main())
