"""The servers that a study's suites need (`backend: NAME==VERSION`), and whether the profile names
them.
"""

from ebbline.cluster.profile import Profile
from ebbline.sweeps.study.study import Study
from ebbline.tasks.errors import StudyError
from ebbline.tasks.specs import TRANSFORMERS


def require_servers(study: Study, profile: Profile) -> None:
    """Raise StudyError for a backend whose server is not in the profile."""
    for name, suite in study.suites.items():
        backend = suite.measure.backend
        if backend != TRANSFORMERS and backend not in profile.servers:
            known = f" It names {', '.join(sorted(profile.servers))}." if profile.servers else ""
            raise StudyError(
                f"suites.{name}.measure.backend is {backend}, and cluster.yaml in the home does "
                f"not say where that server lies.{known} Add `servers: {{{backend}: {{python: "
                "/path/to/its/python}}` there, or `address: URL` in place of `python`"
            )
