"""What lm-eval's IFEval checks need beside lm-eval: three packages, and NLTK's data on sentences.

lm-eval downloads that data when its checks are first imported. Invariant: here nothing is
downloaded, and what is missing is an error before a model is asked.
"""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ebbline.tasks.errors import EvaluationError, MissingExtra

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


def require_arguments(name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Raises EvaluationError for an instruction whose arguments are not those that its check needs.

    lm-eval draws a missing argument, and one that is 0 or empty, at random: the answer would be
    checked for something that the prompt does not say.
    """
    # lm-eval's checks load NLTK's data as they are imported (require_checks)
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    for row in rows:
        where = f"row {row.get('key')!r} of lm-eval's {name}"
        asked, given = row["instruction_id_list"], row["kwargs"]
        if len(asked) != len(given):
            raise EvaluationError(
                f"{where} has {len(asked)} instructions and arguments for {len(given)}"
            )
        for instruction, arguments in zip(asked, given, strict=True):
            if instruction not in INSTRUCTION_DICT:
                raise EvaluationError(f"{where} has the instruction {instruction!r}, which is none")
            needed = set(INSTRUCTION_DICT[instruction](instruction).get_instruction_args_keys())
            found = {key for key, value in (arguments or {}).items() if value}
            if needed != found:
                raise EvaluationError(
                    f"{where}: {instruction} needs the arguments {sorted(needed)}, none of them 0 "
                    f"or empty, and has {sorted(found)}"
                )
