"""What the HTML pages share: templates, and figures embedded in the page.

Invariants: a page loads nothing from other addresses and escapes all values.
"""

import base64
from collections.abc import Collection, Mapping

import jinja2
from matplotlib.figure import Figure

from ebbline.analysis.figures.drawing import svg
from ebbline.analysis.figures.projection_words import map_words, share_words
from ebbline.tasks.defences import words
from ebbline.tasks.defences.gate import ModuleRow

Shown = Mapping[str, str]
"""A figure for a template, with the keys `source`, `alt` and `caption`."""


def template(name: str) -> jinja2.Template:
    """A template below analysis/; it escapes values and raises if a variable is undefined."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ebbline.analysis", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def shown(figure: Figure, alt: str, caption: str) -> Shown:
    """A figure embedded in the page; `alt` describes it with its numbers."""
    return embedded(svg(figure), alt, caption)


def embedded(svg_bytes: bytes, alt: str, caption: str) -> Shown:
    """An SVG image embedded in the page."""
    return {
        "source": f"data:image/svg+xml;base64,{base64.b64encode(svg_bytes).decode('ascii')}",
        "alt": alt,
        "caption": caption,
    }


def shown_cosines(
    figure: Figure, what: str, rows: Mapping[str, ModuleRow], projected: Collection[str]
) -> Shown:
    """The map of one adapter's modules, with its description and caption."""
    return shown(figure, map_words(rows, projected, what), words.map_caption(what))


def shown_shares(figure: Figure, what: str, curves: Mapping[str, Mapping[str, ModuleRow]]) -> Shown:
    """The step curves of projected shares, with their description and caption."""
    return shown(figure, share_words(curves, what), words.share_caption(what))
