"""The split of one prompt set into the search's prompts and those held out for a confirmation.

Invariant: the split is a function of the texts and categories alone. The order of the rows and
their ids are irrelevant. Prompts that a confirmation counts as equal are on one side.
"""

from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from hashlib import sha256

from ebbline.tasks.specs import Split


def folded(text: str) -> str:
    """A text without case and with single spaces: two prompts with equal ones count as one."""
    return " ".join(text.lower().split())


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
