"""The study that confirms points of another study: the same models, settings and measurements, on
other prompts and with further training seeds.

Invariants: nothing of it has chosen a point. It is a study of its own in the same home, so it is
planned, run, continued and reported as any other, and it is frozen when it begins: further points
are added at its end. Its first seeds are those of the nominating study, whose adapters it measures
again; the others are fresh.
"""

from collections.abc import Sequence
from pathlib import Path

from ebbline.sweeps.study.home import FILE as STUDY_FILE
from ebbline.sweeps.study.points import Point, brought
from ebbline.sweeps.study.policies import Budget, Replicates, Search
from ebbline.sweeps.study.study import Study, SuiteEntry
from ebbline.sweeps.study.study_file import as_yaml, source_of, with_absolute_paths
from ebbline.sweeps.study.suites import whole
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError
from ebbline.tasks.files import write_whole

FILE = "confirm.yaml"


def confirming_name(study: str) -> str:
    """The name of the study that confirms points of another one."""
    return f"{study}.confirm"


def confirming_view(view: StudyView) -> StudyView | None:
    """The study that confirms points of this one, as its last run stored it; None before that."""
    name = confirming_name(view.study.study)
    return StudyView.begun(view.home.root, name) if view.home.has_run(name) else None


def points_in(study: Study) -> list[Point]:
    """The points of a confirming study, in order."""
    return [
        Point.of(str(entry["model"]), {k: v for k, v in entry.items() if k != "model"})
        for entry in study.search.list
    ]


def begin(view: StudyView, points: Sequence[Point]) -> StudyView:
    """The confirming study with these points, after those that it has; its file is written into its
    folder. Raises StudyError for a study without `confirm`.
    """
    study, home = view.study, view.home
    earlier = home.begun(confirming_name(study.study))
    known = [] if earlier is None else points_in(earlier)
    every = [*known, *(point for point in dict.fromkeys(points) if point not in known)]
    found = confirming_study(with_absolute_paths(study, _file_of(view)), every)
    path = home.folder(found.study) / FILE
    write_whole(path, lambda fresh: fresh.write_text(as_yaml(found), "utf-8"))
    return StudyView.open(home.root, str(path), extend=True)


def _file_of(view: StudyView) -> Path:
    """The file at which the study's relative paths start."""
    kept = view.home.path(view.study.study) / STUDY_FILE
    return Path(kept.read_text()) if kept.is_file() else source_of(view.source)


def confirming_study(study: Study, points: Sequence[Point]) -> Study:
    """The study that measures `points` of `study` again, by its section `confirm`."""
    confirm = study.confirm
    if confirm is None:
        raise StudyError(
            f"{study.study} has no section `confirm`: give it prompts that chose nothing, such as\n"
            "confirm:\n  suites:\n    refusal: {path: {path: other-prompts.csv}}\n"
            "then `ebbline pin` it. The rest of the study stays as it is. A new study may hold out "
            "a part of its own prompts in place of a file: {hold_out: 0.3}"
        )
    suites = {
        name: SuiteEntry(
            prompts=fresh.set_of(study.suites[name].prompts),
            measure=whole(study.suites[name].measure),
            split=fresh.split,
        )
        for name, fresh in confirm.suites.items()
    }
    measured = [name for name in study.objectives if name.rpartition(".")[0] in suites]
    refusal = study.refusal_metric
    fallback = [refusal] if refusal is not None else []
    trained = any(brought(point) is None for point in points)
    return Study.model_validate(
        {field: getattr(study, field) for field in Study.model_fields}
        | {
            "study": confirming_name(study.study),
            "question": f"Do the points that {study.study} nominated hold on prompts and training "
            "seeds that chose nothing?",
            "hypothesis": "",
            "suites": suites,
            "objectives": tuple(measured or fallback),
            "seeds": (*study.seeds, *(confirm.seeds if trained else ())),
            "replicates": Replicates(),
            "search": Search(
                sampler="list",
                list=tuple({"model": point.model, **dict(point.values)} for point in points),
            ),
            "confirm": None,
            "budget": Budget(),
        }
    )
