"""The package that `pip install` makes: one name at its top, and all that the commands read."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the tracked files, built without the network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(out), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.mark.process
def test_a_wheel_installs_one_package_with_every_file_that_the_code_reads(wheel: Path) -> None:
    """`tasks` and `analysis` are names that users have in their own folders."""
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"ebbline"}
    tracked = [
        path.relative_to(ROOT).as_posix()
        for folder in ("tasks", "cluster", "sweeps", "analysis")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    ]
    assert len(tracked) > 150
    assert not [name for name in tracked if f"ebbline/{name}" not in names]


@pytest.mark.process
def test_an_installed_wheel_lists_its_studies_from_a_folder_of_its_own(
    wheel: Path, tmp_path: Path
) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    path = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})"
    code = f"{path}; from ebbline.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "validate", "quickstart"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "quickstart" in done.stdout, done.stderr


LINKS = ("tasks", "cluster", "sweeps", "analysis")


def test_a_folder_holds_at_most_15_files_and_says_what_lives_there() -> None:
    """What it may import is held by import-linter."""
    folders = {
        path.parent
        for top in ("ebbline", *LINKS)
        for path in (ROOT / top).rglob("*.py")
        if path.parent.name not in LINKS or path.parent.parent == ROOT
    }
    assert len(folders) > 20
    for folder in sorted(folders):
        files = list(folder.glob("*.py"))
        about = (folder / "__init__.py").read_text("utf-8")
        assert len(files) <= 15 and about.startswith('"""'), folder
