"""`ebbline store`: list the store's content by study, verify it, and remove what no study needs.

A study needs every stage of its points and of its models before fine-tuning, and all inputs of
those stages.
"""

import json
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Literal

from ebbline.analysis.results.collect import collect
from ebbline.analysis.results.frontier import frontier_by_model
from ebbline.analysis.results.wording import size_label
from ebbline.bars import progress_bar
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
from ebbline.sweeps.search.searcher import all_points
from ebbline.sweeps.state.controls import control_stages
from ebbline.sweeps.state.spending import read_spent
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import StageName
from ebbline.sweeps.study.stages import stages_or_reason
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tables import print_table
from ebbline.tasks.errors import EbblineError, StoreError, StudyError
from ebbline.tasks.files import remove_stale
from ebbline.tasks.kinds import STAGE_KINDS
from ebbline.tasks.stage import Source, Stage

Keep = Literal["all", "frontier", "none"]


def needs_of_studies(
    home: Home, keep: Keep = "all"
) -> tuple[dict[str, Needed], dict[str, EbblineError]]:
    """What each study of a home needs, by name; and the error of each study whose needs are
    unknown.
    """
    needed: dict[str, Needed] = {}
    unknown: dict[str, EbblineError] = {}
    for name in home.studies():
        try:
            study = home.begun(name)
            if study is not None:
                needed[name] = needed_by(study, home, keep)
        except EbblineError as error:
            unknown[name] = error
    return needed, unknown


def needed_by(study: Study, home: Home, keep: Keep = "all") -> Needed:
    """The artifacts and sources that a study needs. `keep` chooses the adapters that keep their
    tensors.

    Raises StudyError when the study has results but its database has no points.
    """
    view = StudyView(study, home, located=False)
    graph, resolver = view.graph, Resolver(home.store)
    targets = [stage for suites in graph.baselines().values() for stage in suites.values()]
    points = all_points(study, view.database)
    table = view.folder / "results.parquet"
    if not points and (table.exists() or read_spent(view.folder).keys):
        raise StudyError(
            f"{view.folder} has results, but the study's database has no points, so it is unknown "
            "what they need. Restore the database, or move the study's folder away if nobody needs "
            "its results"
        )
    for _, point, _, _ in points:
        targets += stages_or_reason(graph, point)[0].values()
    if study.used_controls.settings:
        targets += control_stages(graph, collect(view))
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
    """The keys of all adapters of a study's points, and the keys of those whose points are on a
    frontier or in flight.
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
        *(result for result in results if result.status in ("running", "skipped", "outdated")),
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
    """Print the store's size by kind, and the size of what each study of the home needs."""
    with progress_bar("looking") as progress:
        survey = Survey(home.store, progress)
        needed, unknown = needs_of_studies(home)
    kinds = {
        what: {"count": count, "bytes": size} for what, (count, size) in survey.sizes().items()
    }
    by_study = {}
    for name, own in needed.items():
        others = all_needed(other for each, other in needed.items() if each != name)
        by_study[name] = {
            "bytes": survey.of(own.keys),
            "bytes of its own": survey.of(own.keys - others.keys),
        }
    total = sum(entry.size for entries in survey.files.values() for entry in entries)
    if as_json:
        print(
            json.dumps(
                {
                    "store": home.store.place.at,
                    "bytes": total,
                    "kinds": kinds,
                    "studies": by_study,
                    "unknown": _reasons(unknown),
                },
                indent=1,
            )
        )
        return
    print(f"{home.store.place.at}: {size_label(total)}")
    _table(
        ("", "how many", "size"),
        [(what, str(row["count"]), size_label(row["bytes"])) for what, row in kinds.items()],
    )
    rows = [
        (name, size_label(row["bytes"]), size_label(row["bytes of its own"]))
        for name, row in by_study.items()
    ]
    _table(("study", "needs", "needs alone"), rows)
    _print_unknown(unknown)


def verify(home: Home, mend: bool, as_json: bool) -> int:
    """Read every artifact; print each damage with its remedy, and what was made from it. Returns 1
    when a damaged artifact is left in the store.
    """
    with ExitStack() as held:
        if mend:
            _hold(home, held)
        with progress_bar("reading") as progress:
            survey = Survey(home.store)
            found = [*damages(survey, progress), *source_damages(survey)]
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
            print(f"{'/'.join(where)}, {each.file}: {each.problem}; {_remedy(where, quarantined)}")
        for where, above in sorted(descendants.items()):
            print(f"{'/'.join(where)}: made from {above}; {_remedy(where, quarantined)}")
        made_too = f", {len(descendants)} made from them" if descendants else ""
        print(f"{len(survey.records)} artifacts read, {len(damaged)} damaged{made_too}")
    return 1 if found and not mend else 0


def _remedy(where: tuple[str, str], quarantined: Mapping[tuple[str, str], str]) -> str:
    moved = quarantined.get(where)
    return (
        f"moved to {moved}; the next run makes a new one"
        if moved
        else "`ebbline store verify --mend` quarantines it"
    )


def collect_garbage(home: Home, older_than_h: float, keep: Keep, yes: bool, as_json: bool) -> None:
    """Print what no study needs and its size. With `yes`, remove it; no study of the home can run
    meanwhile.

    While the needs of a study are unknown, artifacts, adapters and sources stay. Raises StudyHeld,
    with `yes`, when a study has a driver.
    """
    with ExitStack() as held:
        if yes:
            _hold(home, held)
        with progress_bar("looking") as progress:
            survey = Survey(home.store, progress)
            by_study, unknown = needs_of_studies(home, keep)
            needed = all_needed(by_study.values())
        others = sorted(survey.owners - {home.known_id})
        before, known = time.time() - older_than_h * 3600, not others and not unknown
        found = list(survey.removable(needed if known else None, before))
        found += survey.adapters(needed, before) if known else []
        if yes:
            with progress_bar("removing") as progress:
                freed = remove(home.store, found, progress)
            remove_stale(home.root / "id")
    rows: dict[str, list[Removal]] = {}
    for removal in found:
        rows.setdefault(removal.what, []).append(removal)
    if as_json:
        removals = [asdict(removal) | {"names": len(removal.names)} for removal in found]
        print(
            json.dumps(
                {
                    "removed": yes,
                    "bytes": sum(each.bytes for each in found),
                    "other homes": others,
                    "unknown": _reasons(unknown),
                    "what": removals,
                },
                indent=1,
            )
        )
        return
    _table(
        ("", "how many", "size"),
        [
            (what, str(len(each)), size_label(sum(one.bytes for one in each)))
            for what, each in rows.items()
        ],
    )
    if others:
        print(
            f"{len(others)} other homes use this store, and their studies' needs are unknown here: "
            "artifacts, adapters and sources"
            f" stay. If such a home is gone, remove homes/{others[0]}.json from the store."
        )
    _print_unknown(unknown)
    if not found:
        young = (
            f"; files written in the last {older_than_h:g} hours always stay (--older-than-h)"
            if older_than_h
            else ""
        )
        print(f"nothing to remove{young}")
    elif yes:
        print(f"freed {size_label(freed)}")
    else:
        print(
            f"{size_label(sum(each.bytes for each in found))} can be removed; nothing was removed. "
            "The same command with --yes removes it."
        )


def forget(home: Home, kind: str, key: str, as_json: bool = False) -> None:
    """Quarantine one artifact, so that the next run reruns its stage. If the result differs, stages
    that read it rerun too.

    Raises StoreError unless `key` begins exactly one artifact's key.
    """
    found = (
        [each for each in home.store.place.below(kind) if each.startswith(key)]
        if kind in STAGE_KINDS
        else []
    )
    if len(found) != 1:
        raise StoreError(
            f"{home.store.place.at} has {len(found)} artifacts {kind}/{key}; give one of the kinds "
            f"{sorted(STAGE_KINDS)} and a complete key"
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
    """Hold all studies of this home, so that none gets a driver."""
    for name in home.studies():
        held.enter_context(home.driving(name))


def _reasons(unknown: Mapping[str, EbblineError]) -> dict[str, str]:
    return {name: str(error) for name, error in unknown.items()}


def _print_unknown(unknown: Mapping[str, EbblineError]) -> None:
    """Name each study whose needs are unknown, and what that prevents."""
    for name, error in unknown.items():
        print(
            f"study {name}: {error}\nUntil then it is unknown what this study needs: artifacts, "
            "adapters and sources stay.",
            file=sys.stderr,
        )


def all_needed(needed: Iterable[Needed]) -> Needed:
    found = Needed()
    for each in needed:
        found |= each
    return found


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    if listed := list(rows):
        print_table(columns, listed, wide=True, right=columns[1:])
