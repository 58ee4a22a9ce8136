"""The pages that walk a reader through something, walked: their files written, their changes made,
their commands run.
"""

import shutil
from pathlib import Path

import pytest

from tests.organisms import copied
from tests.pages import DOCS, follow
from tests.whole import RUN_S

pytestmark = [pytest.mark.process, pytest.mark.timeout(RUN_S)]
CODE = ("analysis", "cluster", "ebbline", "sweeps", "tasks", "tests")


def checkout(folder: Path) -> Path:
    """A copy of the code, as a reader would have it to change."""
    for package in CODE:
        shutil.copytree(
            DOCS.parent / package,
            folder / package,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    shutil.copy(DOCS.parent / "pyproject.toml", folder)
    return folder


@pytest.fixture(scope="session")
def written(walk_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reader who followed the tutorial and then wrote and ran the study of
    writing-a-study.md.
    """
    folder = checkout(tmp_path_factory.mktemp("reader"))
    copied(walk_home, folder / "runs")
    follow(DOCS / "writing-a-study.md", folder, {"EBBLINE_HOME": "runs"})
    return folder


def test_the_tutorial_says_what_ebbline_says(quickstart_home: Path, tmp_path: Path) -> None:
    """Only here the tutorial's commands run."""
    follow(DOCS / "tutorial.md", checkout(tmp_path), {"EBBLINE_HOME": str(quickstart_home)})


@pytest.mark.parametrize(
    "page",
    [
        "bringing-data.md",
        "adding-a-suite.md",
        "adding-a-stage-kind.md",
        "adding-an-executor.md",
        "adding-a-defence.md",
    ],
)
def test_a_page_does_what_it_says(page: str, written: Path, tmp_path: Path) -> None:
    """Only here the commands of these pages run; the first pays for a training."""
    folder = checkout(tmp_path)
    shutil.copytree(written / "mine", folder / "mine")
    follow(DOCS / page, folder, {"EBBLINE_HOME": str(written / "runs")})
