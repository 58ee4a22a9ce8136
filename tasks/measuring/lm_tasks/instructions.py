"""What lm-eval's IFEval checks need beside lm-eval: three packages, and NLTK's data on sentences.

lm-eval downloads that data when its checks are first imported. Invariant: here nothing is
downloaded, and what is missing is an error before a model is asked.
"""

from importlib.util import find_spec
from pathlib import Path

from ebbline.tasks.errors import MissingExtra

PACKAGES = ("immutabledict", "langdetect", "nltk")
DATA = "tokenizers/punkt_tab"  # as nltk.data.find names it
# A package on PyPI whose wheel has the data, and where in it: a namespace, so the path is of parts
CARRIER = "llama-index-core"
CARRIED = ("llama_index", "core/_static/nltk_cache")


def require_checks(task: str) -> None:
    """Raises MissingExtra where a package or NLTK's data is missing for lm-eval's checks of `task`.

    Sets langdetect's seed, without which two scorings of one answer may differ.
    """
    absent = [name for name in PACKAGES if find_spec(name) is None]
    if absent:
        raise MissingExtra(
            f"lm-eval's checks for {task} need packages that are not installed "
            f'({", ".join(absent)} missing): pip install "ebbline[ifeval]"'
        )
    import langdetect
    import nltk

    package = find_spec(CARRIED[0])
    for place in () if package is None else package.submodule_search_locations or ():
        folder = str(Path(place) / CARRIED[1])
        if folder not in nltk.data.path:
            nltk.data.path.append(folder)
    try:
        nltk.data.find(DATA)
    except LookupError:
        raise MissingExtra(
            f"lm-eval's checks for {task} need NLTK's data punkt_tab, which ebbline does not "
            f"download: pip install --no-deps {CARRIER} (its wheel has the data), or python -m "
            "nltk.downloader punkt_tab"
        ) from None
    langdetect.DetectorFactory.seed = 0
