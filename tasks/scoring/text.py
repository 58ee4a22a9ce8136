"""The characters of a completion as a scorer compares them.

Invariant: what a reader does not see changes no verdict. Examples are zero-width characters, kinds
of spaces, and the form of an apostrophe or of a letter. Every function here returns a text for
comparison only; it is never stored.
"""

import re
import unicodedata

# Apostrophes and single quotes in use as one: typographic, modifier letter, prime, backtick,
# acute accent, full-width.
_APOSTROPHES = dict.fromkeys(
    map(ord, "\u2018\u2019\u201b\u02bc\u02b9\u02bb\u2032`\u00b4\uff07"), "'"
)
_HYPHENS = dict.fromkeys(map(ord, "\u2010\u2011\u2212\ufe63\uff0d"), "-")
_QUOTES = dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f\u00ab\u00bb\uff02"), '"')
# Characters that NFKC keeps and nobody sees: fillers, the Braille blank, variation selectors.
_UNSEEN = dict.fromkeys(
    [*map(ord, "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"), *range(0xFE00, 0xFE10)]
)
_SUPERSCRIPTS = re.compile("[\u00b2\u00b3\u00b9\u2070\u2074-\u2079]+")
_ESCAPED = re.compile(r"&(?:#0*39|#x0*27|apos|[lr]squo);", re.I)
# Accents of Latin, Greek and Cyrillic letters. In other scripts a mark makes another letter.
_ACCENTS = re.compile("[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff]+")

# Emphasis and headings of Markdown, and the marks before a line: quotes, bullets, numbers, emoji.
_EMPHASIS = re.compile(r"[*~#]+|(?<!\w)_+|_+(?!\w)")
# The lines that begin and end a code block, after `plain`.
_FENCE = re.compile(r"^[ \t]*(?:'{3,}|~{3,})[\w+.-]*[ \t]*$", re.MULTILINE)
_SPEAKER = r"(?:assistant|ai|bot|chatbot|model|answer|response|reply|output|final answer|a)"
_LEADING = re.compile(
    rf"(?:<[^<>\s]{{1,30}}>|\[/?inst\]|[\W_]+|\d{{1,2}}[.)]\s|<\W*{_SPEAKER}\W*>"
    rf"|{_SPEAKER}\"?\s*(?:[:\uff1a>]|\n|-\s|\|>))+",
    re.IGNORECASE,
)

# Where a model goes on to a next item, its own answer has ended.
_NEXT_ITEM = re.compile(
    r"\n[^\S\n]*[^\w\n]{0,4}(?:question|q|user|human|input|instruction|problem|exercise|frage|pregunta)"
    r"\s*\d*\s*[:.]",
    re.I,
)


def plain(text: str) -> str:
    """The text in compatibility form (NFKC) with straight quotes and hyphens, without characters
    that have no width. Line breaks stay.
    """
    text = text.translate(_APOSTROPHES).translate(_HYPHENS).translate(_QUOTES).translate(_UNSEEN)
    text = _ESCAPED.sub("'", text)
    text = _SUPERSCRIPTS.sub(lambda found: f"^{found[0]}", text)  # 10² is not 102
    text = unicodedata.normalize("NFKC", text)
    return "".join(each for each in text if unicodedata.category(each) != "Cf")


def without_accents(text: str) -> str:
    return unicodedata.normalize("NFC", _ACCENTS.sub("", unicodedata.normalize("NFD", text)))


def without_emphasis(text: str) -> str:
    return _EMPHASIS.sub("", _FENCE.sub("", text))


def without_leading_marks(text: str) -> str:
    """The text from its first word on, without marks and a speaker's name before it.

    `> **Assistant:** I cannot` begins with "I cannot".
    """
    found = _LEADING.match(text)
    return text if found is None else text[found.end() :]


def before_next_item(text: str) -> str:
    """The text up to a next question that a model asks itself."""
    return _NEXT_ITEM.split(text, maxsplit=1)[0]


def lines_of(text: str) -> str:
    """The lines of a text, each with single spaces."""
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines())
