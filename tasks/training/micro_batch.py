"""What a training's attempts have learnt about its micro-batch. Imports no torch.

It is a file in the training's scratch folder, so the next attempt does not run out of memory again.
The micro-batch is Context: it changes no result.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ebbline.tasks.files import write_whole
from ebbline.tasks.specs import Spec, TrainSpec

FILE = "micro_batch.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Learnt:
    """`used` is the micro-batch with which the latest attempt of a gang began. `most` is the
    largest that further attempts may use; None if no attempt has run out of memory. `killed` are
    the attempts that were killed for memory and have lowered `most`.
    """

    used: int | None = None
    most: int | None = None
    killed: tuple[str, ...] = ()

    def limited(self, micro_batch: int) -> int:
        return micro_batch if self.most is None else min(micro_batch, self.most)


def learnt(scratch: Path) -> Learnt:
    """What is known in a scratch folder. A file that cannot be read counts as none."""
    try:
        content = json.loads((scratch / FILE).read_text())
        values = {name: content.get(name) for name in ("used", "most")}
        killed = content.get("killed", [])
    except (OSError, ValueError, AttributeError):
        return Learnt()
    sizes: dict[str, Any] = {name: n for name, n in values.items() if isinstance(n, int) and n > 0}
    names = killed if isinstance(killed, list) else []
    return Learnt(**sizes, killed=tuple(name for name in names if isinstance(name, str)))


def learn(
    scratch: Path,
    used: int | None = None,
    most: int | None = None,
    killed: tuple[str, ...] = (),
) -> None:
    """Record what is given and keep the rest."""
    before = learnt(scratch)
    now = Learnt(used or before.used, most or before.most, killed or before.killed)
    if now != before:
        write_whole(scratch / FILE, lambda fresh: fresh.write_text(json.dumps(asdict(now))))


def halve_after_kills(scratch: Path, killed: tuple[str, ...], micro_batch: int) -> None:
    """Halve the micro-batch once for each of the `killed` attempts that has not lowered it yet.

    `micro_batch` is what the next attempt would begin with. Another machine may know fewer of the
    attempts; it counts those it does not know.
    """
    before = learnt(scratch)
    unknown = [attempt for attempt in killed if attempt not in before.killed]
    if unknown:
        half = max(1, before.limited(micro_batch) >> len(unknown))
        _log.warning(
            "the process of this training was killed, probably for memory; it continues with a "
            "micro-batch of %d",
            half,
        )
        scratch.mkdir(parents=True, exist_ok=True)
        learn(scratch, most=half, killed=(*before.killed, *unknown))


def halvings(spec: Spec) -> int:
    """How often the micro-batch of a stage can be halved; 0 if it has none."""
    return spec.global_batch.bit_length() - 1 if isinstance(spec, TrainSpec) else 0
