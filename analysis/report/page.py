"""What the HTML pages share: their template, and figures drawn into the page itself.

Invariants: a page asks for nothing from outside, and escapes whatever it is given.
"""

import base64
from collections.abc import Collection, Mapping

import jinja2
from matplotlib.figure import Figure

from ebbline.analysis.figures.drawing import svg
from ebbline.analysis.figures.words import map_words, share_words
from ebbline.tasks.defences import words
from ebbline.tasks.defences.gate import ModuleRow

Shown = Mapping[str, str]
"""A figure as the pages take it: `source`, `alt` and `caption`."""


def template(name: str) -> jinja2.Template:
    """A page of analysis/, which escapes whatever it is given and raises for what it was not."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ebbline.analysis", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def shown(figure: Figure, alt: str, caption: str) -> Shown:
    """A figure, drawn into the page itself. `alt` says in words what it shows, with its numbers."""
    return embedded(svg(figure), alt, caption)


def embedded(drawn: bytes, alt: str, caption: str) -> Shown:
    """The same of a figure that is SVG already."""
    return {
        "source": f"data:image/svg+xml;base64,{base64.b64encode(drawn).decode('ascii')}",
        "alt": alt,
        "caption": caption,
    }


def shown_cosines(
    figure: Figure, what: str, rows: Mapping[str, ModuleRow], taken: Collection[str]
) -> Shown:
    """A map of one adapter's modules, with the words that explain it."""
    return shown(figure, map_words(rows, taken, what), words.map_caption(what))


def shown_shares(figure: Figure, what: str, curves: Mapping[str, Mapping[str, ModuleRow]]) -> Shown:
    """The step curves of projected shares, with the words that explain them."""
    return shown(figure, share_words(curves, what), words.share_caption(what))
