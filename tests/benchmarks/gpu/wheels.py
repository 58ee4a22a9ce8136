"""make gpu-wheels: collects what `make gpu-check` needs beside torch, transformers, peft and
accelerate, as wheels for a machine without a network. They are at most 60 MB together.

    python -m tests.benchmarks.gpu.wheels [--python 3.12] [--to build/gpu-wheels]
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

GIVEN = ("torch", "transformers", "peft", "accelerate")
CARRIED = ("bitsandbytes", "pydantic")  # older versions of GIVEN require no pydantic
LIMIT_MB = 60
# pip compares the number exactly
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (5, 12, 17, 24, 26, 27, 28, 31, 34, 35)] + [
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]


def with_needs(names: Iterable[str]) -> set[str]:
    """Distributions and all that they require, without extras, as installed here."""
    found: set[str] = set()
    waiting = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for text in requires(name) or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(needed.name))
    return found


def carried() -> dict[str, str]:
    """Distribution -> the version installed here, of each wheel to carry."""
    names = with_needs(CARRIED) - with_needs(["torch"]) - {"numpy", "packaging"}
    return {name: version(name) for name in sorted(names)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("--python", default=here, help="of the machine with the GPU")
    parser.add_argument("--to", type=Path, default=Path("build/gpu-wheels"))
    given = parser.parse_args()
    if given.to.exists():
        shutil.rmtree(given.to)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={given.python}"]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    command += ["--dest", str(given.to), *(f"{name}=={own}" for name, own in carried().items())]
    subprocess.run(command, check=True)
    sizes = {path.name: path.stat().st_size / 1e6 for path in sorted(given.to.glob("*.whl"))}
    for name, megabytes in sizes.items():
        print(f"{megabytes:6.1f} MB  {name}")
    total = sum(sizes.values())
    print(f"{total:6.1f} MB  in {given.to}, of at most {LIMIT_MB}")
    return int(total > LIMIT_MB)


if __name__ == "__main__":
    sys.exit(main())
