"""What `ebbline defend` prints about each adapter that it made."""

import json
from collections.abc import Sequence
from statistics import median

from rich.console import Console

from ebbline.commands.defended.defend import RECORD, DefendedAdapter
from ebbline.tasks.defences.methods.knobs import shown
from ebbline.tasks.defences.words import range_phrase


def print_defended(defended: Sequence[DefendedAdapter], as_json: bool) -> None:
    """Print what was done, a line for each outcome, and the notes of each adapter."""
    if as_json:
        records = [
            json.loads((each.out / RECORD).read_text()) | {"out": str(each.out)}
            for each in defended
        ]
        print(json.dumps({"adapters": records}, indent=1))
        return
    screen = Console(markup=False, highlight=False, soft_wrap=True)
    errors = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    first = defended[0]
    settings = dict.fromkeys(shown(each.setting) for each in defended)
    screen.print(f"{first.method}: {'; '.join(settings)}", markup=False)
    for each in defended:
        screen.print(f"{each.out}: {_sentence(each)}", markup=False)
    for name in dict.fromkeys(each.adapter for each in defended):
        own = [each for each in defended if each.adapter == name]
        if not any(each.changed for each in own):
            errors.print(
                f"note: no module of {name} was changed{range_phrase(own[0].rows)}", markup=False
            )
        for note in own[0].notes:
            errors.print(f"note: {note}", style="yellow", markup=False)


def _sentence(each: DefendedAdapter) -> str:
    """How many modules changed, and the median effect on one."""
    text = f"{len(each.changed)} of {len(each.rows)} modules changed"
    ratios = [one.norm_ratio for one in each.effects.values() if one.norm_ratio is not None]
    shares = [
        one.change_explained for one in each.effects.values() if one.change_explained is not None
    ]
    if ratios:
        text += f"; median length {median(ratios):.3f} of the update's"
    if shares:
        text += f", {median(shares):.1%} of the change is scaling"
    return text
