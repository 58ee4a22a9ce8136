"""What a changed study reuses of its existing points, before anything runs."""

from collections import Counter
from collections.abc import Iterator

from ebbline.cluster.store.resolver import Resolver
from ebbline.sweeps.state.trials import read
from ebbline.sweeps.study.points import StageName
from ebbline.sweeps.study.stages import stages_or_reason
from ebbline.sweeps.study.view import StudyView


def reuse_of_changes(view: StudyView) -> Iterator[str]:
    """The changes of a study that `--change` accepts, then how many stages of its finished points
    are reused, a line each. Nothing for a study that was not changed.

    Raises StudyError, as the run does, for a change that is not accepted.
    """
    changes = view.revisions()
    if not changes:
        return
    view.begun_as()
    yield "changed since the study was begun:"
    yield from (f"  {line}" for line in changes)
    entries = [entry for entry in read(view.study, view.database)[0] if entry.state == "done"]
    resolver, total, found = Resolver(view.home.store), Counter[str](), Counter[str]()
    for entry in entries:
        for name, stage in stages_or_reason(view.graph, entry.point)[0].items():
            part = StageName.parse(name).part
            total[part] += 1
            found[part] += resolver.artifact(stage) is not None
    yield f"of the {len(entries)} finished points:"
    for part, count in total.items():
        again = count - found[part]
        rest = f", at most {again} run again" if again else ""
        yield f"  {part}: {found[part]} of {count} reused{rest}"
    yield ""
