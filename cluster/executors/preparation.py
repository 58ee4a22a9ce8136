"""What a worker's process without a GPU imports while it waits for its next job.

So a process that has made data has torch by the time the first training is projected. It imports no
transformers, because the cores that it would take are those of the trainings. One process has one
preparation: the state is the module's.
"""

import threading
from contextlib import suppress

from ebbline.tasks.errors import MissingExtra
from ebbline.tasks.kinds import import_kinds_without_gpu

IDLE_S = 1.0  # the small stages at a study's start follow each other, and must not wait
_prepared = False
_timer: threading.Timer | None = None


def after_a_job() -> None:
    """Prepare once IDLE_S have passed without another job."""
    global _timer
    if not _prepared:
        _timer = threading.Timer(IDLE_S, _import)
        _timer.daemon = True
        _timer.start()


def before_a_job() -> None:
    """Do not begin now. If it has begun, wait: two threads that import at once could see a module
    that is half made.
    """
    global _timer
    if _timer is not None:
        _timer.cancel()
        _timer.join()
        _timer = None


def _import() -> None:
    global _prepared
    _prepared = True
    with suppress(MissingExtra):  # the stage that needs the package fails with this error
        import_kinds_without_gpu()
