"""W&B's alerts (Slack, email) on a study: points failed, a budget stopped it, it has ended.

Off by default; `wandb_alerts` in HOME/cluster.yaml chooses. An alert has counts, settings and
one-line reasons, never a prompt, a completion, a path or a host.

Invariant: each event is sent at most once, also by the next mirror. So an event is written down
(ebbline.analysis.wandb.memory) before it is sent. Alerts need W&B's server: without it none is sent
and none is written down, and the next mirror that is online sends one for all that has happened.
"""

import html
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ebbline.analysis.results.wording import settings_label, without_paths
from ebbline.cluster.profile import AlertEvent
from ebbline.sweeps.drive.live import End, Live
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study

NAMED = 5  # the most failed points that one alert names
TITLE_CHARACTERS = 63  # W&B takes no longer title
REASON_CHARACTERS = 300
NEED_ONLINE = (
    "wandb_alerts are not sent: they need W&B's server, and this mirror is offline. Log in "
    "(`wandb login`), and the next `ebbline run` sends what has happened until then"
)
_ENDS: dict[End, str] = {
    "done": "has ended",
    "gain": "has ended: the frontier grew too slowly",
    "error": "has ended with an error",
}


@dataclass(frozen=True)
class Alert:
    """A message on `events`. An event is in one alert only."""

    events: tuple[str, ...]
    title: str
    text: str
    level: Literal["INFO", "WARN", "ERROR"]


def alerts_due(
    study: Study,
    results: Sequence[Result],
    live: Live | None,
    chosen: Collection[AlertEvent],
    sent: Collection[str],
    hosts: Collection[str] = (),
) -> Iterator[Alert]:
    """The alerts that the study's state calls for. `sent` are the events of earlier alerts, and
    names in `hosts` are removed from reasons. Points that have failed since then share an alert.
    """
    if "point_failed" in chosen:
        new = {_failure(r): r for r in results if r.status == "failed" and _failure(r) not in sent}
        if new:
            yield _points_failed(study, new, hosts)
    if live is None or live.ended is None:
        return
    done = f"{live.points.completed} points finished" + (
        f", {count} failed" if (count := sum(r.status == "failed" for r in results)) else ""
    )
    # A later run that stops at the same budget, or has nothing to do, tells nothing new
    event = f"{live.ended} after {live.points.completed}"
    if live.ended == "budget":
        kind: AlertEvent = "budget"
        event += "".join(f" {name}={value:g}" for name, value in sorted(live.budget.items()))
        how = "was stopped by its budget"
    elif live.ended in _ENDS:
        kind, how = "ended", _ENDS[live.ended]
    else:
        return  # a person has stopped it
    if kind in chosen and event not in sent:
        level: Literal["INFO", "ERROR", "WARN"] = (
            "ERROR" if live.ended == "error" else "WARN" if kind == "budget" else "INFO"
        )
        cost = f"{live.spent.gpu_hours:.3g} GPU-hours"
        yield Alert((event,), _title(study, how), f"{done}; {cost} spent.", level)


def _failure(result: Result) -> str:
    return f"failed {result.number}"


def _points_failed(study: Study, new: dict[str, Result], hosts: Collection[str]) -> Alert:
    found = list(new.values())
    numbers = ", ".join(str(result.number) for result in found[:NAMED])
    what = f"point {numbers}" if len(found) == 1 else f"{len(found)} points"
    lines = [
        f"Point {result.number} ({result.point.model}, {settings_label(result.point)}): "
        f"{without_paths(result.reason, hosts)[:REASON_CHARACTERS]}"
        for result in found[:NAMED]
    ]
    if len(found) > NAMED:
        lines.append(f"and {len(found) - NAMED} more.")
    # Slack reads < > & as its own, and email is HTML
    text = "\n".join(html.escape(" ".join(line.split()), quote=False) for line in lines)
    return Alert(tuple(new), _title(study, f"{what} failed"), text, "WARN")


def _title(study: Study, what: str) -> str:
    """The study's name is cut where the title is too long."""
    return f"{study.study[: TITLE_CHARACTERS - len(what) - 1]} {what}"
