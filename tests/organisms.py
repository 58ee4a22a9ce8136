"""The store that tests share: the quickstart's smallest models, trained once and kept between runs.

It is the walk study's store, so it holds a base, an aligned model and a trained adapter of the
smallest size. A study with the same settings finds them by their keys. A test that changes the
store takes a copy, with `copied`.
"""

import shutil
from pathlib import Path

from ebbline.cluster.executors.inline import InlineExecutor
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.study_file import load
from ebbline.sweeps.study.view import StudyView

WALK = Path(__file__).parent / "walk.yaml"


def walked(folder: Path) -> None:
    """Drive the walk's study to its end, in a new home."""
    progress = drive(StudyView(load(str(WALK)), Home(folder)), lambda: InlineExecutor(gpus=1))
    assert [result.reason for result in progress.results] == [""] * 6


def copied(walk: Path, home: Path) -> Path:
    """A home with a copy of the walk's store."""
    shutil.copytree(walk / "store", home / "store")
    return home
