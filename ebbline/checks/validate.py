"""`ebbline validate`: everything about a study that shows before it runs."""

import json
import sys
from functools import partial

from ebbline.checks.found import Found
from ebbline.checks.study_checks import check_study, progress, require_no_fault
from ebbline.sweeps.search.searcher import check_written_points
from ebbline.sweeps.study.pins import require_pins, unpinned
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.study_file import load
from ebbline.tasks.errors import EbblineError, StudyError


def validate(source: str, as_json: bool) -> int:
    """Check a study file and print what was checked. Returns the exit code.

    Raises StudyError with every fault, and PinError for content without a pin.
    """
    study = load(source)
    check_written_points(study)
    with progress(quiet=as_json) as now:
        found = check_study(study, now)
    if as_json:
        return _print_json(study, source, found)
    error = _error(study, source, found)
    if error is None:
        axes = dict.fromkeys(axis for model in study.models for axis in study.axes_of(model))
        parts = [
            _counted(len(study.models), "model"),
            *([_counted(len(study.adapters), "adapter")] if study.adapters else []),
            f"axes {', '.join(axes)}",
            _counted(len(study.suites), "suite"),
            study.sampler,
        ]
        print(f"{study.study} is valid: {', '.join(parts)}")
    for line in found.lines():
        print(line)
    sys.stdout.flush()
    if error is not None:
        raise error
    return 0


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _error(study: Study, source: str, found: Found) -> EbblineError | None:
    """The error of a study that is not valid: every fault, and the references without a pin."""
    errors: list[EbblineError] = []
    checks = partial(require_no_fault, study, found), partial(require_pins, study, source)
    for check in checks:
        try:
            check()
        except EbblineError as error:
            errors.append(error)
    if len(errors) < 2:
        return next(iter(errors), None)
    return StudyError("\n".join(map(str, errors)))


def _print_json(study: Study, source: str, found: Found) -> int:
    error = _error(study, source, found)
    record = {
        "valid": error is None,
        **({} if error is None else {"error": str(error), "kind": type(error).__name__}),
        "exit_code": int(error is not None),
        **found.as_json(),
        "unpinned": [where for where, _ in unpinned(study)],
        "study": study.model_dump(mode="json"),
    }
    print(json.dumps(record, indent=1))
    return int(record["exit_code"])
