"""Parses an HTML page for tests, and computes the contrast of two colours."""

from html.parser import HTMLParser

VOID = ("meta", "img", "br", "link")


class Page(HTMLParser):
    """A page's links, alt texts, headings and tables.

    Raises AssertionError if an element is closed out of order.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.alts: list[str] = []
        self.ids: list[str] = []
        self.levels: list[int] = []
        self.scopes: list[str | None] = []
        self.tables = self.captions = 0
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")
        ]
        self.ids += [found["id"] or ""] if "id" in found else []
        if tag == "img":
            self.alts.append(found.get("alt") or "")
        if tag in ("h1", "h2", "h3", "h4"):
            self.levels.append(int(tag[1]))
        if tag == "th":
            self.scopes.append(found.get("scope"))
        self.tables += tag == "table"
        self.captions += tag == "caption"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, from 1 to 21 (WCAG 2.2, "contrast ratio" and "relative
    luminance").
    """
    dark, light = sorted(map(_luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    digits = colour.removeprefix("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
