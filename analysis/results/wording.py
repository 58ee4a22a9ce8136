"""Labels for names and numbers that people read. Rates stay in [0, 1] until they are printed."""

import os
import platform
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ebbline.sweeps.drive.live import AtWork
from ebbline.sweeps.study.adapters.branches import ADAPTER
from ebbline.sweeps.study.points import INVALID, Point, Result, Status, Value, defence_of
from ebbline.tasks.defences.in_use import AXIS, DEFENCES, owns
from ebbline.tasks.defences.safe_lora import SAFE_LORA
from ebbline.tasks.measuring.metrics import Metric, direction
from ebbline.tasks.specs import LoxSpec

METRIC_NAMES = {"rouge_l": "ROUGE-L", "acc_norm": "acc_norm"}  # as the field writes them
NO_RESULT: tuple[Status, ...] = ("failed", "invalid", "skipped", "outdated")


def metric_label(name: str) -> str:
    """`refusal.refusal_rate` -> "refusal rate"; `mmlu.acc` -> "acc (mmlu)"."""
    suite, _, metric = name.rpartition(".")
    words = METRIC_NAMES.get(metric) or metric.replace("_", " ")
    return words if not suite or suite.replace("_", " ") in words else f"{words} ({suite})"


def directed_label(name: str) -> str:
    return (
        f"{metric_label(name)}, {'higher' if direction(name) == 'maximise' else 'lower'} is better"
    )


def axis_label(axis: str) -> str:
    """`train.rank` -> "rank", `scale.factor` -> "scale factor". The labels of a study's axes are
    unique: several defences, and LoX, may have a knob of one name.
    """
    part, _, name = axis.rpartition(".")
    return f"{part} {name}" if part in DEFENCES or part == LoxSpec.KIND else name


def value_label(value: Value) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def axis_value_label(axis: str, value: Value, is_brought: bool) -> str:
    """A value in a column of an axis, which may hold points with and without that axis.

    `is_brought` is true for a point whose adapter was trained outside the study.
    """
    if value is None and axis == ADAPTER:
        return "trained"
    if value is None and is_brought and not owns(axis):
        return "-"
    return value_label(value)


def settings_label(point: Point) -> str:
    """A point's axes without its model: "rank=8 size=100". In a study that names defences, the
    defence comes last: "rank=8 safe_lora 0.35".
    """
    named = AXIS in dict(point.values)
    own = [
        f"{axis_label(axis)}={value_label(value)}"
        for axis, value in point.values
        if not named or not owns(axis)
    ]
    return " ".join([*own, *([defence_label(point)] if named else [])])


def changed_label(result: Result) -> str:
    """`40% of modules projected`, or `no module changed`; `changed` of another defence."""
    word = "projected" if defence_of(result.point) is SAFE_LORA else "changed"
    return (
        f"{result.changed_share:.0%} of modules {word}"
        if result.changed_share
        else "no module changed"
    )


def defence_label(point: Point) -> str:
    """A point's defence with the values of its axes: "safe_lora 0.35", "drop 0.4 exact"."""
    defence, values = defence_of(point), dict(point.values)
    return row_label(defence.name, {axis: values[axis] for axis in values if defence.owns(axis)})


def row_label(name: str, knobs: Mapping[str, Value]) -> str:
    """The label of a defence with these values by axis, the main knob first."""
    defence = DEFENCES[name]
    ordered = sorted(knobs, key=lambda axis: (axis != defence.main_knob, axis))
    return " ".join([name, *(value_label(knobs[axis]) for axis in ordered)])


def natural(name: str) -> list[str | float]:
    """A sort key that puts 7b before 13b, and rank=4 before rank=16."""
    return [
        float(part) if index % 2 else part
        for index, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", name))
    ]


def percent(share: float) -> str:
    return f"{share:.1%}"


def clock(seconds: float) -> str:
    """`3:07`, minutes and seconds; from two hours on `26 h 05 min`."""
    whole = round(seconds)
    return (
        f"{whole // 60}:{whole % 60:02d}"
        if whole < 7200
        else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )


def progress_label(stage: AtWork) -> str:
    """`loss 0.310 (40/96)` of a training, `completions (32/100)` of another stage.

    Empty while the stage has reported no progress.
    """
    progress = stage.progress
    if progress is None:
        return stage.sentence
    quantity = progress.note if progress.loss is None else f"loss {progress.loss:.3f}"
    return f"{quantity} ({progress.done}/{progress.total})"


def size_label(size: float) -> str:
    """Bytes as `3.4 GB`, in powers of a thousand."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def count_label(count: int, digits: int = 4) -> str:
    """A large number in so many digits, such as parameters: 134.5M, 6.738B."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.{digits}g}{letter}"
    return str(count)


def measured(metric: Metric) -> str:
    low, high = metric.interval
    return (
        f"{percent(metric.value)} (95% interval {percent(low)} to {percent(high)}, n = {metric.n}"
        f"{spread_label(metric, ', ')}{undecided_label(metric.undecided, ', ')})"
    )


def spread_label(metric: Metric, before: str = "") -> str:
    """`3 seeds sd 9.1`, the spread between seeds in percentage points; empty for one seed."""
    spread = metric.between_seeds
    return "" if spread is None else f"{before}{len(metric.seeds)} seeds sd {100 * spread:.1f}"


def undecided_label(count: int, before: str = "", after: str = "") -> str:
    """`3 undecided`, with text around it; empty where every sample was decided."""
    return f"{before}{count} undecided{after}" if count else ""


def plain_markdown(text: str) -> str:
    """A user's text as one line of Markdown that means itself: no heading, link, citation or HTML
    of its own.
    """
    return _MARKS.sub(r"\\\1", " ".join(text.split()))


def counted_label(found: Sequence[str], order: Sequence[str], of: str) -> str:
    """Counts equal words: "higher at all 12 points", or "higher at 1, lower at 2 of 3 points",
    where `of` is "point". Raises IndexError for nothing found.
    """
    total = len(found)
    if len(set(found)) == 1:
        return f"{found[0]} at all {total} {of}s"
    counts = Counter(found)
    parts = [f"{word} at {counts[word]}" for word in order if counts[word]]
    return f"{', '.join(parts)} of {total} {of}s"


def without_marks(text: str) -> str:
    """The text of `plain_markdown`."""
    return re.sub(rf"\\{_MARKS.pattern}", r"\1", text)


def without_paths(reason: str, hosts: Collection[str] = ()) -> str:
    """A failure's reason without commands, folder names, host names and addresses, for publication.

    `hosts` are host names to remove besides this machine's own (see
    ebbline.sweeps.drive.live.host_names). An absolute path keeps its last part, if that is the name
    of a file. An unquoted path with spaces is removed up to its last slash. In doubt,
    text is removed.
    """
    text = reason.partition(" (to see it again")[0]
    for folder in sorted(
        {str(Path.home()), os.environ.get("EBBLINE_HOME", "")} - {"", "/"}, key=len, reverse=True
    ):
        text = re.sub(rf"{re.escape(folder)}(?![\w.-])", _FOLDER_MARK, text)
    text = _QUOTED.sub(lambda found: found["quote"] + _last_part(found["path"]), text)
    text = _UNQUOTED.sub(lambda found: _last_part(found["path"]), text).replace(
        _FOLDER_MARK, FOLDER
    )
    for name in sorted(_host_names(hosts), key=len, reverse=True):
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", HOST, text, flags=re.IGNORECASE)
    return _ADDRESS.sub(HOST, text)


FOLDER, HOST = "(a folder)", "(a host)"
_MARKS = re.compile(r"([\\`*_\[\]<>#|~$@&])")  # of Markdown, LaTeX in it, and citations
_FOLDER_MARK = "/~"  # replaces the user's folders before paths are searched
_NO_HOST = {"", "here", "localhost"}  # names that identify no machine
_ADDRESS = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.]*\w)")
_END = r"""[:;,.)\]}'"`>!?]+(?=\s|$)"""  # punctuation that ends a path in a sentence
_QUOTED = re.compile(r"""(?P<quote>['"`])(?P<path>(?:~[\w.-]*)?/(?:(?!(?P=quote)(?!\w))[^\n])+)""")
_REST = rf"(?:(?!{_END})\S)*+"  # the rest of a word after a slash
_WORD = rf"[ \t]+(?:(?!{_END})[^\s/])++"
_UNQUOTED = re.compile(
    rf"(?:(?<![\w.])|(?=/~))(?P<path>(?:~[\w.-]*)?/(?=\S){_REST}(?:(?:{_WORD})*?{_WORD}/{_REST})*)"
)
_FILE = re.compile(
    r"[^/]*\.(?:bin|bz2|cfg|csv|db|gguf|gz|html|ini|ipynb|json|jsonl|lock|log|md|npy|npz|parquet|pdf|pkl|png|pt|pth|py|safetensors|so|sqlite"
    r"|svg|tar|tex|tmp|toml|tsv|txt|wandb|xml|xz|yaml|yml|zip|zst)(?::\d+)*"
)


def _last_part(path: str) -> str:
    name = path.rpartition("/")[2]
    return name if _FILE.fullmatch(name) else FOLDER


def _host_names(hosts: Collection[str]) -> set[str]:
    """The names of this machine and of `hosts`, with and without domain.

    Ray may append "/" and a node's id to a name; this part is removed.
    """
    full = {name.partition("/")[0] for name in (platform.node(), *hosts)}
    return {name for each in full for name in (each, each.partition(".")[0])} - _NO_HOST


def reason_label(reason: str) -> str:
    """The reason of a point without a result, for a text that already has its status."""
    return reason.removeprefix(INVALID)


def status_label(status: Status) -> str:
    return "still running" if status == "running" else status
