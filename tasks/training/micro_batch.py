"""What a training's attempts have learnt about its micro-batch. Imports no torch.

It is a file in the training's scratch folder, so the next attempt does not run out of memory again.
The micro-batch is Context: it changes no result.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ebbline.tasks.files import write_whole

FILE = "micro_batch.json"


@dataclass(frozen=True)
class Learnt:
    """`used` is the micro-batch with which the latest attempt of a gang began. `most` is the
    largest that further attempts may use; None if no attempt has run out of memory.
    """

    used: int | None = None
    most: int | None = None

    def limited(self, micro_batch: int) -> int:
        return micro_batch if self.most is None else min(micro_batch, self.most)


def learnt(scratch: Path) -> Learnt:
    """What is known in a scratch folder. A file that cannot be read counts as none."""
    try:
        content = json.loads((scratch / FILE).read_text())
        values = {name: content.get(name) for name in ("used", "most")}
    except (OSError, ValueError, AttributeError):
        return Learnt()
    return Learnt(**{name: n for name, n in values.items() if isinstance(n, int) and n > 0})


def learn(scratch: Path, used: int | None = None, most: int | None = None) -> None:
    """Record what is given and keep the rest."""
    before = learnt(scratch)
    now = Learnt(used or before.used, most or before.most)
    if now != before:
        write_whole(scratch / FILE, lambda fresh: fresh.write_text(json.dumps(asdict(now))))
