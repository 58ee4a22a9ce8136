"""A study in one home: what a command opens once, and everything below it reads from.

Invariant: `study` has its sampler by name, so that a study that was begun goes on with the sampler
that it was begun with, whatever the default has become since.
"""

import json
from functools import cached_property
from pathlib import Path

from ebbline.sweeps.study.changes import differences, refusals
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.space import limit
from ebbline.sweeps.study.stages import StageGraph
from ebbline.sweeps.study.storage import Storage
from ebbline.sweeps.study.study import Sampler, Study, lasting
from ebbline.sweeps.study.study_file import load
from ebbline.tasks.errors import StudyError
from ebbline.tasks.identity import digest


class StudyView:
    """A study as it is continued in a home.

    With `extend` it may be wider than it was begun (see ebbline.sweeps.study.changes). `name` is
    what the user calls the study, `source` what ebbline.sweeps.study.study_file.load reads it from.
    With `located` false, content from outside is taken at its pin and not looked for.
    """

    def __init__(
        self,
        study: Study,
        home: Home,
        *,
        extend: bool = False,
        name: str = "",
        source: str = "",
        located: bool = True,
    ) -> None:
        """Raises StudyError when the study was begun as a grid, which it cannot be any more."""
        self.study, self.home = _continued(study, home), home
        self.extend, self.located = extend, located
        self.name = name or study.study
        self.source = source or self.name

    @classmethod
    def open(cls, home: Path, name: str, extend: bool = False) -> "StudyView":
        """The study of that name or file, in the home at a path. Raises StudyError."""
        root = Home(home)
        source = root.named(name)
        return cls(load(source), root, extend=extend, name=name, source=source)

    def unlocated(self) -> "StudyView":
        """The same study for readers of keys alone, who need no content from outside."""
        return StudyView(self.study, self.home, name=self.name, source=self.source, located=False)

    @property
    def folder(self) -> Path:
        return self.home.folder(self.study.study)

    @property
    def storage(self) -> Storage:
        """Where the study's points are kept. Raises StudyError as `Home.storage` does."""
        return self.home.storage(self.study.study)

    @cached_property
    def graph(self) -> StageGraph:
        """The one that all readers of the study share. Raises PinError for content without a pin,
        or that is not what its pin says.
        """
        return StageGraph(self.study, self.home, self.located)

    def begun_as(self) -> str:
        """A digest of the settings that the study was begun with here; its own when it is new.

        Raises StudyError, naming what differs, when another one has this name already.
        """
        kept = self.home.kept(self.study.study)
        if not kept:
            return digest(lasting(self.study.model_dump(mode="json")))
        changed = self.changed()
        if changed:
            lines = "\n".join(f"  {line}" for line in changed[:10])
            hint = (
                ""
                if self.extend
                else (
                    " If it only adds points, values of an axis, seeds or a size, `--extend` "
                    "goes on with it."
                )
            )
            raise StudyError(
                f"a study named {self.study.study!r} was begun in {self.home.root} with other "
                f"settings:\n{lines}\n"
                "Give this one another name (`study: ...`), or another --home. Stages "
                f"that both share are still run once.{hint}"
            )
        return digest(lasting(json.loads(kept)))

    def changed(self) -> list[str]:
        """What of the settings is not as the study was begun with here, a line each; nothing when
        it is new. With `extend`, only what is more than a widening.
        """
        kept = self.home.kept(self.study.study)
        if not kept:
            return []
        now = lasting(self.study.model_dump(mode="json"))
        begun = Study.model_validate_json(kept)
        before = lasting(_sampled_by(begun.sampler, begun).model_dump(mode="json"))
        if self.extend:
            before["search"]["points"] = limit(begun)  # how many it is to have, said or not
        return list(refusals(before, now) if self.extend else differences(before, now))

    def freeze(self) -> None:
        """Keep the study as it was begun, or as it was widened, with its sampler by name, its
        latest budget and its placement (see ebbline.sweeps.study.study.lasting).

        Raises StudyError as `begun_as` does.
        """
        self.begun_as()
        self.home.keep(self.study.study, json.dumps(self.study.model_dump(mode="json"), indent=1))


def _continued(study: Study, home: Home) -> Study:
    """The study with its sampler by name: the file's, or what it was begun with here, or for a new
    one what fits it.
    """
    if study.search.sampler is not None:
        return study
    kept = home.kept(study.study)
    sampler = (Study.model_validate_json(kept) if kept else study).sampler
    if sampler == "grid" and not study.has_grid:
        raise StudyError(
            f"{study.study!r} was begun as a grid, and a {{low, high}} range has no "
            "grid. Name another `search.sampler`,"
            " and `--extend` goes on with it"
        )
    return _sampled_by(sampler, study)


def _sampled_by(sampler: Sampler, study: Study) -> Study:
    return study.model_copy(update={"search": study.search.model_copy(update={"sampler": sampler})})
