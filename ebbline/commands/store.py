"""`ebbline store`: what the store holds and for whom, whether it is whole, and what may go.

A study refers to every stage that its points and its models before fine-tuning resolve to, and to
all that those read from.
"""

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Literal

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from ebbline.analysis.results.collect import collect
from ebbline.analysis.results.frontier import frontier_by_model
from ebbline.cluster.store.resolver import Resolver
from ebbline.cluster.store.retention import (
    Needed,
    Removal,
    Survey,
    damages,
    made_from,
    remove,
    source_damages,
)
from ebbline.commands.project import progress_bar
from ebbline.sweeps.search.searcher import all_points
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import StageName
from ebbline.sweeps.study.stages import stages_or_reason
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StoreError, StudyError
from ebbline.tasks.kinds import STAGE_KINDS
from ebbline.tasks.stage import Source, Stage

Keep = Literal["all", "frontier", "none"]


def studies_of(home: Home) -> dict[str, Study]:
    """The studies that were begun in a home, as they were first run. Raises StudyError for one that
    cannot be read.
    """
    found = {}
    for path in sorted((home.root / "studies").glob("*/study.json")):
        try:
            found[path.parent.name] = Study.model_validate_json(path.read_text("utf-8"))
        except (ValidationError, UnicodeDecodeError) as error:
            raise StudyError(
                f"{path} cannot be read ({type(error).__name__}), so what its study needs "
                "is unknown. Restore the file, or move that"
                " study's folder away if nobody needs its results; nothing was removed"
            ) from None
    return found


def needed_by(study: Study, home: Home, keep: Keep = "all") -> Needed:
    """What a study refers to; `keep` says whose adapters are to keep their tensors."""
    view = StudyView(study, home, located=False)
    graph, resolver = view.graph, Resolver(home.store)
    targets = [stage for suites in graph.baselines().values() for stage in suites.values()]
    points = all_points(study, view.storage)
    table = view.folder / "results.parquet"
    if not points and table.exists():
        raise StudyError(
            f"{table} has results, but the study's storage has no points, so what they "
            "need is unknown. Restore the storage, or move"
            " that study's folder away if nobody needs its results; nothing was removed"
        )
    for _, point, _, _ in points:
        targets += stages_or_reason(graph, point)[0].values()
    keys, sources, seen = set(), set(), set()

    def visit(stage: Stage) -> None:
        if stage.lineage in seen:
            return
        seen.add(stage.lineage)
        key = resolver.key(stage)
        if key is not None:
            keys.add(key)
        for item in stage.inputs.values():
            if isinstance(item, Source):
                sources.add(item.content)
        for above in stage.upstream():
            visit(above)

    for target in targets:
        visit(target)
    adapters = (frozenset[str](), frozenset[str]()) if keep == "all" else _adapters(view, keep)
    return Needed(frozenset(keys), frozenset(sources), *adapters)


def _adapters(view: StudyView, keep: Keep) -> tuple[frozenset[str], frozenset[str]]:
    """The keys of all trainings and projected adapters of a study's points, and of those that
    points on a frontier or in flight use.
    """
    results = collect(view)
    on_front = (
        [
            result
            for front in frontier_by_model(results, view.study.objectives).values()
            for result in front
        ]
        if keep == "frontier"
        else []
    )
    kept = [
        *on_front,
        *(result for result in results if result.status in ("running", "skipped")),
    ]
    adapters = {kind.name for kind in STAGE_KINDS.values() if kind.writes_adapter}
    own = {
        key
        for result in results
        for name, key in result.keys.items()
        if StageName.parse(name).part in adapters
    }
    return frozenset(own), frozenset(own & {key for result in kept for key in result.keys.values()})


def show_usage(home: Home, as_json: bool) -> None:
    """Print what the store holds by kind, and what each study of the home refers to."""
    with progress_bar("looking") as told:
        survey = Survey(home.store, told)
        needed = {name: needed_by(study, home) for name, study in studies_of(home).items()}
    kinds = {
        what: {"count": count, "bytes": size} for what, (count, size) in survey.sizes().items()
    }
    by_study = {}
    for name, own in needed.items():
        others = _all(other for each, other in needed.items() if each != name)
        by_study[name] = {
            "bytes": survey.of(own.keys),
            "bytes of its own": survey.of(own.keys - others.keys),
        }
    total = sum(entry.size for entries in survey.files.values() for entry in entries)
    if as_json:
        print(
            json.dumps(
                {"store": home.store.place.at, "bytes": total, "kinds": kinds, "studies": by_study},
                indent=1,
            )
        )
        return
    print(f"{home.store.place.at}: {_size(total)}")
    _table(
        ("", "how many", "size"),
        [(what, str(row["count"]), _size(row["bytes"])) for what, row in kinds.items()],
    )
    rows = [
        (name, _size(row["bytes"]), _size(row["bytes of its own"]))
        for name, row in by_study.items()
    ]
    _table(("study", "refers to", "it alone"), rows)


def verify(home: Home, mend: bool, as_json: bool) -> int:
    """Read everything again; print each damage with its remedy, and what was made from it. Returns
    1 when something is damaged and was not moved away.
    """
    with ExitStack() as held:
        if mend:
            _hold(home, held)
        with progress_bar("reading") as told:
            survey = Survey(home.store)
            found = [*damages(survey, told), *source_damages(survey)]
        damaged = {(each.kind, each.key) for each in found}
        descendants = made_from(survey, found)
        quarantined = (
            {where: home.store.quarantine(*where) for where in sorted(damaged | descendants.keys())}
            if mend
            else {}
        )
    if as_json:
        rows = [
            asdict(each) | {"moved to": quarantined.get((each.kind, each.key))} for each in found
        ]
        made = [
            {"kind": where[0], "key": where[1], "from": above, "moved to": quarantined.get(where)}
            for where, above in sorted(descendants.items())
        ]
        report = {"artifacts": len(survey.records), "damages": rows, "made from damages": made}
        print(json.dumps(report, indent=1))
    else:
        for each in found:
            where = each.kind, each.key
            print(f"{'/'.join(where)}, {each.file}: {each.problem}; {_told(where, quarantined)}")
        for where, above in sorted(descendants.items()):
            print(f"{'/'.join(where)}: made from {above}; {_told(where, quarantined)}")
        made_too = f", {len(descendants)} made from them" if descendants else ""
        print(f"{len(survey.records)} artifacts read, {len(damaged)} damaged{made_too}")
    return 1 if found and not mend else 0


def _told(where: tuple[str, str], quarantined: Mapping[tuple[str, str], str]) -> str:
    moved = quarantined.get(where)
    return (
        f"moved to {moved}, and made again by the next run"
        if moved
        else "`ebbline store verify --mend` moves it away"
    )


def collect_garbage(home: Home, older_than_h: float, keep: Keep, yes: bool, as_json: bool) -> None:
    """Print what may go and how much that is; with `yes`, remove it while no study of the home can
    be driven.

    Raises StudyHeld when one is being driven, with `yes`.
    """
    with ExitStack() as held:
        if yes:
            _hold(home, held)
        with progress_bar("looking") as told:
            survey = Survey(home.store, told)
            needed = _all(needed_by(study, home, keep) for study in studies_of(home).values())
        others = sorted(survey.owners - {home.id})
        before = time.time() - older_than_h * 3600
        found = list(survey.removable(None if others else needed, before))
        found += [] if others else survey.adapters(needed, before)
        if yes:
            with progress_bar("removing") as told:
                freed = remove(home.store, found, told)
    rows: dict[str, list[Removal]] = {}
    for removal in found:
        rows.setdefault(removal.what, []).append(removal)
    if as_json:
        said = [asdict(removal) | {"names": len(removal.names)} for removal in found]
        print(
            json.dumps(
                {
                    "removed": yes,
                    "bytes": sum(each.bytes for each in found),
                    "other homes": others,
                    "what": said,
                },
                indent=1,
            )
        )
        return
    _table(
        ("", "how many", "size"),
        [
            (what, str(len(each)), _size(sum(one.bytes for one in each)))
            for what, each in rows.items()
        ],
    )
    if others:
        print(
            f"{len(others)} other homes use this store, and what their studies need is not "
            "known here: artifacts, adapters and sources"
            f" stay. If such a home is gone, remove homes/{others[0]}.json from the store."
        )
    if not found:
        young = (
            f"; what was written in the last {older_than_h:g} hours stays in any case "
            "(--older-than-h)"
            if older_than_h
            else ""
        )
        print(f"nothing may go{young}")
    elif yes:
        print(f"freed {_size(freed)}")
    else:
        print(
            f"{_size(sum(each.bytes for each in found))} may go; nothing was removed. The "
            "same command with --yes removes it."
        )


def forget(home: Home, kind: str, key: str, as_json: bool = False) -> None:
    """Move one artifact aside, so that it is made again, and what was measured from it if it comes
    out otherwise.
    """
    found = (
        [each for each in home.store.place.below(kind) if each.startswith(key)]
        if kind in STAGE_KINDS
        else []
    )
    if len(found) != 1:
        raise StoreError(
            f"{home.store.place.at} has {len(found)} artifacts {kind}/{key}; give a kind "
            f"of {sorted(STAGE_KINDS)} and one whole key"
        )
    with ExitStack() as held:
        _hold(home, held)
        quarantined = home.store.quarantine(kind, found[0])
        print(
            json.dumps({"artifact": f"{kind}/{found[0]}", "moved_to": str(quarantined)})
            if as_json
            else f"{kind}/{found[0]} was moved to {quarantined}"
        )


def _hold(home: Home, held: ExitStack) -> None:
    """Let nobody drive a study of this home meanwhile."""
    for path in sorted((home.root / "studies").glob("*/study.json")):
        held.enter_context(home.driving(path.parent.name))


def _all(needed: Iterable[Needed]) -> Needed:
    found = Needed()
    for each in needed:
        found |= each
    return found


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    if table.row_count:
        Console().print(table)


def _size(count: int) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
