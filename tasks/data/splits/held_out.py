"""The split of one prompt set into the search's prompts and those held out for a confirmation.

Invariant: the split is a function of the texts and categories alone. The order of the rows and
their ids are irrelevant. Prompts that a confirmation counts as equal are on one side.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from hashlib import sha256

from ebbline.tasks.specs import Split

# What Excel and word processors put in place of what a person types
_TYPED = {
    ord(written): typed
    for written, typed in zip("\u2018\u2019\u201c\u201d\u2013\u2014", "''\"\"--", strict=True)
} | {ord("\u2026"): "..."}


def folded(text: str) -> str:
    """A text without what programs change in it as they save it: case, spaces, typographic quotes,
    dashes and ellipses, the Unicode form of a letter with an accent (NFD), and characters without a
    width. Two prompts with equal ones count as one.
    """
    typed = unicodedata.normalize("NFD", text).translate(_TYPED).casefold()
    visible = "".join(each for each in typed if unicodedata.category(each) != "Cf")
    return " ".join(unicodedata.normalize("NFD", visible).split())


def chosen(texts: Sequence[str], categories: Sequence[str], split: Split) -> list[int]:
    """The places of the prompts on the side of `split`, ascending.

    Each category gives its share to within one prompt, so that both sides have its categories. In a
    category the prompts are taken in the order of a hash of their text, which is random to them.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for place, text in enumerate(texts):
        places[folded(text)].append(place)
    group_of = {text: min(categories[place] for place in own) for text, own in places.items()}
    ordered = sorted(places, key=lambda text: (group_of[text], _hash(text)))
    share = Fraction(str(split.hold_out))
    held = {
        text
        for number, text in enumerate(ordered)
        if int(share * (number + 1)) > int(share * number)
    }
    wanted = split.side == "confirm"
    return sorted(
        place for text, own in places.items() if (text in held) == wanted for place in own
    )


def _hash(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
