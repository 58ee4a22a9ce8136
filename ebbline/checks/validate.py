"""`ebbline validate`: everything about a study that shows before it runs."""

import json
import sys

from ebbline.checks.found import Found
from ebbline.checks.study_checks import check_study, progress, require_no_fault
from ebbline.sweeps.search.searcher import check_written_points
from ebbline.sweeps.study.pins import require_pins, unpinned
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.study_file import load
from ebbline.tasks.errors import EbblineError


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
    require_no_fault(study, found)
    if not unpinned(study):
        axes = dict.fromkeys(axis for model in study.models for axis in study.axes_of(model))
        print(
            f"{study.study} is valid: {len(study.models)} models, axes {', '.join(axes)}, "
            f"{len(study.suites)} suites, {study.sampler}"
        )
    for line in found.lines():
        print(line)
    sys.stdout.flush()
    require_pins(study, source)
    return 0


def _print_json(study: Study, source: str, found: Found) -> int:
    error: EbblineError | None = None
    try:
        require_no_fault(study, found)
        require_pins(study, source)
    except EbblineError as invalid:
        error = invalid
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
