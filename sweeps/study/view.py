"""A study in one home. A command opens one StudyView, and all code below reads from it.

Invariant: `study` names its sampler, so an existing study keeps its sampler when the default
changes.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from ebbline.sweeps.study.changes import differences, lasting, rejections, revised
from ebbline.sweeps.study.database import PointDatabase
from ebbline.sweeps.study.home import Home, is_plain
from ebbline.sweeps.study.pins import require_pins
from ebbline.sweeps.study.policies import Sampler
from ebbline.sweeps.study.space import limit
from ebbline.sweeps.study.stages import StageGraph
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.study_file import load
from ebbline.tasks.errors import StudyError
from ebbline.tasks.identity import digest


class StudyView:
    """A study as it continues in a home.

    `extend` accepts additions to the stored study, `change` also the changes after which stages of
    existing points run again (see ebbline.sweeps.study.changes). `name` is the
    study's name on the command line, and `source` the argument of
    ebbline.sweeps.study.study_file.load. With `located` false, pins of outside content are used
    without looking for the content.
    """

    def __init__(
        self,
        study: Study,
        home: Home,
        *,
        extend: bool = False,
        change: bool = False,
        name: str = "",
        source: str = "",
        located: bool = True,
    ) -> None:
        """Raises StudyError when the study was begun as a grid and now has a range."""
        self.study, self.home = _continued(study, home), home
        self.extend, self.change, self.located = extend or change, change, located
        self.name = name or study.study
        self.source = source or self.name

    @classmethod
    def open(cls, root: Path, name: str, extend: bool = False, change: bool = False) -> "StudyView":
        """The study of that name or file, in the home at a path. Raises StudyError."""
        home = Home(root)
        source = home.named(name)
        study = load(source)
        if source != name:  # a study that was renamed since its file was written
            study = study.model_copy(update={"study": name})
        return cls(study, home, extend=extend, change=change, name=name, source=source)

    @classmethod
    def begun(cls, root: Path, name: str) -> "StudyView":
        """The study as its last run stored it, whatever its file and its inputs are now; the file's
        study before its first run. Raises StudyError.
        """
        home = Home(root)
        own = _study_of(home, name)
        study = None if own is None else home.begun(own)
        if study is None:
            return cls.open(root, name)
        return cls(study, home, name=name, source=home.named(name), located=False)

    def edited(self) -> list[str]:
        """What the study's file says now that the stored study does not, a line each."""
        try:
            now = load(self.source)
        except StudyError as error:
            return [str(error)]
        if now.study != self.study.study or not self.home.has_run(now.study):
            return []
        return StudyView(now, self.home).changed()

    def unlocated(self) -> "StudyView":
        """The same study for readers that only need keys, without looking for outside content."""
        return StudyView(self.study, self.home, name=self.name, source=self.source, located=False)

    @property
    def argument(self) -> str:
        """What another process opens this study by: its name once the home has its file."""
        name = self.study.study
        return self.source if self.home.named(name) == name else name

    @property
    def folder(self) -> Path:
        """The study's folder, which may not exist."""
        return self.home.path(self.study.study)

    @property
    def database(self) -> PointDatabase:
        """Where the study's points are kept. Raises StudyError as `Home.database` does."""
        return self.home.database(self.study.study)

    @cached_property
    def graph(self) -> StageGraph:
        """The stage graph that all readers share. Raises PinError for content without a pin or with
        another digest.
        """
        require_pins(self.study, self.source)
        return StageGraph(self.study, self.home, self.located)

    def begun_as(self) -> str:
        """The digest of the settings that the study was begun with in this home, or of its present
        settings when it is new.

        Raises StudyError with the differences when the stored study has other settings.
        """
        kept = self.home.kept(self.study.study)
        if not kept:
            return digest(lasting(self.study.model_dump(mode="json")))
        changed = self.changed()
        if changed:
            lines = "\n".join(f"  {line}" for line in changed[:10])
            hint = (
                ""
                if self.change
                else (
                    " If the changes only add points, values of an axis, seeds or a size, "
                    "`--extend` continues the study. With another suite, limit or content of a "
                    "file, `--change` continues it, and runs again what the change concerns."
                )
            )
            raise StudyError(
                f"a study named {self.study.study!r} was begun in {self.home.root} with other "
                f"settings:\n{lines}\n"
                "Give this one another name (`study: ...`), or another --home. Stages "
                f"that both share still run once.{hint}"
            )
        return digest(lasting(json.loads(kept)))

    def changed(self) -> list[str]:
        """The changes since the study was begun in this home, a line each; empty when it is new.
        With `extend`, only the changes that an extension may not make.
        """
        begun = self.home.begun(self.study.study)
        if begun is None:
            return []
        before, now = self._dumps(begun)
        if self.extend:
            before["search"]["points"] = limit(begun)  # also when the file gives no number
        if self.change:
            before = revised(before, now)
        return list(rejections(before, now) if self.extend else differences(before, now))

    def revisions(self) -> list[str]:
        """The changes after which stages of existing points run again, a line each; only with
        `change`.
        """
        begun = self.home.begun(self.study.study)
        if begun is None or not self.change:
            return []
        before, now = self._dumps(begun)
        return list(differences(before, revised(before, now)))

    def _dumps(self, begun: Study) -> tuple[dict[str, Any], dict[str, Any]]:
        """The lasting parts of the stored study and of this one."""
        before = lasting(_with_sampler(begun.sampler, begun).model_dump(mode="json"))
        return before, lasting(self.study.model_dump(mode="json"))

    def freeze(self) -> None:
        """Store the study in its home, with the name of its sampler, its latest budget and its
        placement (see ebbline.sweeps.study.changes.lasting).

        Raises StudyError as `begun_as` does.
        """
        self.begun_as()
        self.home.keep(self.study.study, json.dumps(self.study.model_dump(mode="json"), indent=1))


def _study_of(home: Home, name: str) -> str | None:
    """The study of a home that an argument of the command line names: by its name, by its file, or
    by the file of its last run when that cannot be read any more. None for another.

    Raises StudyError for a file that cannot be read and was not run here.
    """
    if is_plain(name) and home.has_run(name):
        return name
    try:
        own = load(name).study
    except StudyError:
        last = home.run_from(Path(name))
        if last is None:
            raise
        return last
    return own if home.has_run(own) else None


def _continued(study: Study, home: Home) -> Study:
    """The study with a named sampler: the file's, else the stored one, else the default for a new
    study.
    """
    if study.search.sampler is not None:
        return study
    sampler = (home.begun(study.study) or study).sampler
    if sampler == "grid" and not study.has_grid:
        raise StudyError(
            f"{study.study!r} was begun with the grid sampler, which cannot use a {{low, high}} "
            "range. Name another `search.sampler` and continue with `--extend`"
        )
    return _with_sampler(sampler, study)


def _with_sampler(sampler: Sampler, study: Study) -> Study:
    return study.model_copy(update={"search": study.search.model_copy(update={"sampler": sampler})})
