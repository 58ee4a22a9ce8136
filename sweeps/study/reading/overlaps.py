"""Prompts that a study's sets share: with the training data (contamination), and those of `confirm`
with the search's prompts.

Invariant: a confirmation has no prompt that the search or a training has read. Only counts and ids
leave this module, never a text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ebbline.cluster.store.resolver import Resolver
from ebbline.sweeps.study.reading.row_sets import located
from ebbline.sweeps.study.references import DataRef
from ebbline.sweeps.study.suites import MultipleChoiceSuite, Suite, prompts_of, whole
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.data.audit import Overlap, overlap, read_other
from ebbline.tasks.data.prompts import Prompt
from ebbline.tasks.errors import StudyError
from ebbline.tasks.specs import Split
from ebbline.tasks.stage import Part

SHOWN = 5  # ids in a message
NEAR = 0.5  # the share of common content words of a near-copy, as in `ebbline prompts check`


@dataclass(frozen=True)
class Shared:
    """What the prompts of `suite` share with another set, named as in the study file.

    `overlap` is None where they cannot be compared, for the reason `unknown`.
    """

    suite: str
    other: str
    prompts: int
    overlap: Overlap | None
    unknown: str = "a set is not on this machine"

    def __str__(self) -> str:
        found = self.overlap
        if found is None:
            return f"{self.suite} and {self.other}: not known, {self.unknown}"
        same, near = len({one for one, _ in found.exact}), len({each.id for each in found.near})
        return (
            f"{self.suite} and {self.other}: {same} of {self.prompts} prompts are in both, "
            f"{near} have a near-copy there (at least {NEAR:.0%} of the content words)"
        )


def contamination(view: StudyView) -> Iterator[Shared]:
    """What each suite's prompts share with each set that a training of the study reads."""
    resolver = Resolver(view.home.store)
    for suite, entry in view.study.suites.items():
        if isinstance(entry.measure, MultipleChoiceSuite):
            yield Shared(suite, "the training data", 0, None, "lm-eval reads its items")
            continue
        split = view.study.split_of(suite)
        prompts = _prompts(view, resolver, entry.prompts, entry.measure, split)
        for where, reference in _training(view):
            yield _shared(suite, prompts, where, _others(view, resolver, reference))


def confirmation_overlaps(view: StudyView) -> Iterator[Shared]:
    """What the prompts of `confirm` share with the search's prompts and with the training data."""
    study, resolver = view.study, Resolver(view.home.store)
    for suite, fresh in () if study.confirm is None else study.confirm.suites.items():
        entry = study.suites[suite]
        reference = fresh.set_of(entry.prompts)
        prompts = _prompts(view, resolver, reference, whole(entry.measure), fresh.split)
        for name, other in study.suites.items():
            if isinstance(other.measure, MultipleChoiceSuite):
                continue  # its items are no prompts: no confirmation has such a suite
            asked = _prompts(view, resolver, other.prompts, other.measure, study.split_of(name))
            yield _shared(f"confirm.suites.{suite}", prompts, f"suites.{name}", asked)
        for where, data in _training(view):
            yield _shared(f"confirm.suites.{suite}", prompts, where, _others(view, resolver, data))


def require_apart(view: StudyView) -> list[Shared]:
    """What the confirmation's prompts share with other sets, if it is no equal text.

    Raises StudyError for prompts that the search or a training has read, with their ids, and for a
    set that cannot be compared.
    """
    found = list(confirmation_overlaps(view))
    lines = []
    for each in found:
        if each.overlap is None:
            lines.append(f"  {each}")
        elif each.overlap.exact:
            ids = list(dict.fromkeys(one for one, _ in each.overlap.exact))
            more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
            lines.append(
                f"  {each.suite} has {len(ids)} prompts of {each.other}: "
                f"{', '.join(ids[:SHOWN])}{more}"
            )
    if lines:
        raise StudyError(
            "a confirmation needs prompts that neither the search nor a training has read:\n"
            + "\n".join(lines)
            + "\nRemove them from the sets of `confirm`, and pin the new content"
        )
    return found


def _training(view: StudyView) -> Iterator[tuple[str, DataRef]]:
    """Every set that a training of the study reads: those of its points, then those of its tuned
    models. A set of several models comes once, under the first one.
    """
    study = view.study
    found: set[DataRef] = set()
    data = [] if study.data is None else [("data", study.data)]
    for name, model in study.models.items():
        for role, reference in (("aligned", model.aligned), ("unaligned", model.unaligned)):
            if reference is not None and reference.tuned is not None:
                data.append((f"models.{name}.{role}.tuned.data", reference.tuned.data))
    for where, own in data:
        for part, rows in (("pool", own.pool), ("mix", own.mix)):
            if rows is not None and rows not in found:
                found.add(rows)
                yield f"{where}.{part}", rows


def _prompts(
    view: StudyView, resolver: Resolver, reference: DataRef, suite: Suite, split: Split | None
) -> tuple[Prompt, ...] | None:
    """The prompts of a suite; None where they are not on this machine or are lm-eval's."""
    if isinstance(suite, MultipleChoiceSuite):
        return None
    path = _path(view, resolver, reference)
    return None if path is None else prompts_of(suite, path, split).prompts


def _others(view: StudyView, resolver: Resolver, reference: DataRef) -> tuple[Prompt, ...] | None:
    path = _path(view, resolver, reference)
    return None if path is None else read_other(path).prompts


def _path(view: StudyView, resolver: Resolver, reference: DataRef) -> Path | None:
    item = view.graph.rows(reference)
    if not isinstance(item, Part):
        return located(reference)
    artifact = resolver.artifact(item.stage)
    return None if artifact is None else artifact.file(item.path)


def _shared(
    suite: str, prompts: tuple[Prompt, ...] | None, other: str, others: tuple[Prompt, ...] | None
) -> Shared:
    count = 0 if prompts is None else len(prompts)
    if prompts is None or others is None:
        return Shared(suite, other, count, None)
    return Shared(suite, other, count, overlap(prompts, others, NEAR))
