r"""LaTeX for a paper: text, and booktabs tables as floats to \input.

Invariants: names from a study are escaped, so any name compiles. A table that is too wide is shrunk
to its column. A table that is too long continues in another float. The tables need the packages
booktabs and graphicx.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from ebbline.analysis.results.before_after import STATES, trios
from ebbline.analysis.results.frontier import frontier, frontier_by_model
from ebbline.analysis.results.measurements import Baselines, refusal_metric
from ebbline.analysis.results.tables import axes_in
from ebbline.analysis.results.wording import (
    axis_label,
    metric_label,
    natural,
    settings_label,
    value_label,
    without_marks,
)
from ebbline.sweeps.study.points import Result, Value
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.safe_lora import SAFE_LORA
from ebbline.tasks.measuring.metrics import Metric, direction

CONFIRMED = "confirmed"
ROWS = 40  # most rows of one float: more do not fit on a page
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
_ARROWS = {"maximise": r"$\uparrow$", "minimise": r"$\downarrow$"}
_INTERVALS = {
    True: "sub- and superscripts are the ends of the 95\\% interval",
    False: "brackets hold the 95\\% interval",
}
MANY = 3  # with more metrics, intervals are small and the table spans both columns


@dataclass(frozen=True)
class TableLayout:
    """The width and type size of a table.

    `narrow`: one of two columns. `both`: a float over two columns. `small`: intervals are written
    as sub- and superscripts.
    """

    narrow: bool
    both: bool
    small: bool

    @staticmethod
    def of(narrow: bool, metrics: int) -> "TableLayout":
        return TableLayout(
            narrow and metrics <= MANY, narrow and metrics > MANY, narrow or metrics > MANY
        )


@dataclass(frozen=True)
class Condition:
    """A row of the before-after table.

    `what` says whether the model is before fine-tuning, fine-tuned, or fine-tuned and defended.
    """

    model: str
    what: str
    result: Result | None
    metrics: Mapping[str, Metric]


def escaped(text: str) -> str:
    """Escapes LaTeX's special characters."""
    return "".join(_SPECIAL.get(letter, letter) for letter in text)


def breakable(digest: str) -> str:
    """A commit or sha256 with line-break points for a narrow column."""
    return r"\allowbreak ".join(digest[start : start + 8] for start in range(0, len(digest), 8))


def in_latex(text: str) -> str:
    r"""Converts the Markdown subset of ebbline.analysis.paper.methods to LaTeX.

    Bold titles become \paragraph, and `[@one; @two]` becomes \cite.
    """
    paragraphs = []
    for paragraph in text.strip().split("\n\n"):
        title, bold, rest = paragraph.removeprefix("**").partition("**")
        if paragraph.startswith("# "):
            paragraphs.append(f"% {paragraph[2:]}")
        elif bold and paragraph.startswith("**"):
            paragraphs.append(rf"\paragraph{{{escaped(title)}}}{_inline(rest)}")
        else:
            paragraphs.append(_inline(paragraph))
    return "\n\n".join([r"{\sloppy", *paragraphs, r"\par}"]) + "\n"


def _inline(text: str) -> str:
    parts = re.split(r" ?\[(@[^\]]+)\]", text)  # every second part was in brackets
    words = [
        re.sub(
            r"\b[0-9a-f]{40,64}\b", lambda found: breakable(found[0]), escaped(without_marks(part))
        )
        for part in parts[::2]
    ]
    cites = [
        rf"~\cite{{{','.join(key.strip().removeprefix('@') for key in part.split(';'))}}}"
        for part in parts[1::2]
    ]
    return "".join(word + cite for word, cite in zip(words, [*cites, ""], strict=True))


def frontier_table(study: Study, results: Sequence[Result], narrow: bool) -> str:
    """Each model's frontier: varying axes, share of changed modules, and objectives."""
    layout = TableLayout.of(narrow, len(study.objectives))
    own = [
        result
        for found in frontier_by_model(results, study.objectives).values()
        for result in found
    ]
    overall = {result.number for result in frontier(results, study.objectives)}
    rows = sorted(
        own,
        key=lambda result: (
            natural(result.point.model),
            [result.metrics[name].value for name in study.objectives],
        ),
    )
    values = [dict(row.point.values) for row in rows]
    varying = [axis for axis in axes_in(rows) if len({repr(each.get(axis)) for each in values}) > 1]
    columns = {"model": [escaped(row.point.model) for row in rows]}
    columns |= {
        escaped(axis_label(axis)): [_value(each, axis) for each in values] for axis in varying
    }
    columns["share"] = [
        "none" if not row.changed_share else rf"{row.changed_share:.0%}".replace("%", r"\%")
        for row in rows
    ]
    for name in study.objectives:
        columns[_heading(name, layout)] = [_cell(row.metrics[name], layout) for row in rows]
    columns[""] = [r"$\ast$" if row.number in overall else "" for row in rows]
    fixed = [
        f"{escaped(axis_label(axis))} = {_value(values[0], axis)}"
        for axis in (axes_in(rows) if rows else [])
        if axis not in varying
    ]
    names = [each.words.name for each in study.used_defences if each.method is not None]
    by = f"projected by {names[0]}" if names == [SAFE_LORA.words.name] else "changed by a defence"
    caption = (
        f"Frontier of each model in the study {escaped(study.study)}. Rates are in per "
        f"cent; {_INTERVALS[layout.small]}"
        f" ({_samples({name: [row.metrics[name] for row in rows] for name in study.objectives})})."
        rf" Share: of modules {by}. $\ast$: on the frontier "
        r"over all models."
    )
    if fixed:
        caption += f" All rows: {', '.join(fixed)}."
    text = 1 + len(varying) + 1
    return _floats(
        columns,
        "l" + "r" * (text - 1) + "c" * (len(columns) - text),
        caption,
        f"tab:{study.study}-frontier",
        layout,
    )


def conditions(study: Study, results: Sequence[Result], baselines: Baselines) -> list[Condition]:
    """The rows of the before-after table, for the states that were measured.

    See ebbline.analysis.results.before_after.
    """
    rows: list[Condition] = []
    for trio in trios(study, results):
        if trio.model in baselines:
            rows.append(Condition(trio.model, STATES["aligned"], None, baselines[trio.model]))
        if trio.tuned is not None:
            rows.append(Condition(trio.model, STATES["tuned"], trio.tuned, trio.tuned.metrics))
        if trio.shipped is not None:
            rows.append(
                Condition(trio.model, STATES["shipped"], trio.shipped, trio.shipped.metrics)
            )
            if trio.shipped.confirmed is not None and trio.shipped.confirmed.setting:
                found = trio.shipped.confirmed.setting
                rows.append(Condition(trio.model, CONFIRMED, trio.shipped, found))
    return rows


def before_after_table(
    study: Study, results: Sequence[Result], baselines: Baselines, narrow: bool
) -> str:
    """Each model before and after fine-tuning and its defence: one metric for each suite."""
    rows, names = conditions(study, results, baselines), headlines(study)
    layout = TableLayout.of(narrow, len(names))
    columns = {"model": [escaped(row.model) for row in rows], "": [row.what for row in rows]}
    for name in names:
        columns[_heading(name, layout)] = [_cell(row.metrics.get(name), layout) for row in rows]
    settings = "; ".join(
        f"{row.model} {row.what}, point {row.result.number} ({settings_label(row.result.point)})"
        for row in rows
        if row.result is not None
    )
    shown = {name: [row.metrics[name] for row in rows if name in row.metrics] for name in names}
    caption = (
        f"Before and after in the study {escaped(study.study)}. Rates are in per cent; "
        f"{_INTERVALS[layout.small]} ({_samples(shown)})."
        f"{_what_rows_are(study, rows)}{f' {escaped(settings)}.' if settings else ''}"
    )
    return _floats(
        columns, "ll" + "c" * len(names), caption, f"tab:{study.study}-before-after", layout
    )


def _what_rows_are(study: Study, rows: Sequence[Condition]) -> str:
    """Explains how the points were chosen, only for states in the table."""
    states = {row.what for row in rows}
    if STATES["shipped"] in states:
        return (
            " Defended: the most useful defended point whose rate meets the refusal floor of"
            f" {escaped(f'{study.refusal_floor:.0%}')}, or the nearest to it; fine-tuned: "
            "the same training without a defence,"
            " if it was run. These points were picked on the same prompts that are shown here"
            + (
                ', except in the rows "confirmed": those are on other prompts and training seeds.'
                if CONFIRMED in states
                else ": they are candidates, and not confirmed."
            )
        )
    if STATES["tuned"] not in states:
        return ""
    why = (
        "No defended point was picked, as no refusal rate was measured"
        if refusal_metric(study) is None
        else "No point was defended"
    )
    return f" Fine-tuned: each model's first point without a defence. {why}."


def before_after_frame(
    study: Study, results: Sequence[Result], baselines: Baselines
) -> pd.DataFrame:
    """The rows of the before-after table with every metric, one row for each metric."""
    rows = [
        (
            row.model,
            row.what,
            None if row.result is None else row.result.number,
            name,
            m.value,
            *m.interval,
            m.n,
            m.undecided,
            len(m.seeds) or 1,
            m.between_seeds,
        )
        for row in conditions(study, results, baselines)
        for name, m in sorted(row.metrics.items())
    ]
    frame = pd.DataFrame(
        rows,
        columns=[
            *("model", "what", "point", "metric", "value", "low", "high"),
            *("n", "undecided", "seeds", "seed_sd"),
        ],
    )
    return frame.astype({"point": "Int64", "seed_sd": "Float64"})


def headlines(study: Study) -> list[str]:
    """The metrics of the before-after table: the objectives, then one for each other suite.

    That is a suite's first metric; for HellaSwag it is acc_norm, as is usual.
    """
    names = list(study.objectives)
    for suite, entry in study.suites.items():
        hellaswag = entry.measure.kind == "multiple_choice" and "hellaswag" in entry.measure.task
        if not any(name.rpartition(".")[0] == suite for name in names):
            names.append(f"{suite}.{'acc_norm' if hellaswag else entry.measure.metrics()[0]}")
    return names


def _value(values: Mapping[str, Value], axis: str) -> str:
    return escaped(value_label(values[axis])) if axis in values else "--"


def _once(names: list[str]) -> list[str]:
    """The names, with repetitions in consecutive rows left empty."""
    return ["" if index and names[index - 1] == name else name for index, name in enumerate(names)]


def _heading(name: str, layout: TableLayout) -> str:
    """A metric's label in short lines, with an arrow for its direction."""
    lines: list[str] = []
    for word in metric_label(name).split():
        if lines and len(lines[-1]) + len(word) < (10 if layout.narrow else 14):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    text = r"\\".join(escaped(line) for line in lines)
    return rf"\begin{{tabular}}[b]{{@{{}}c@{{}}}}{text} {_ARROWS[direction(name)]}\end{{tabular}}"


def _cell(metric: Metric | None, layout: TableLayout) -> str:
    if metric is None:
        return "--"
    value, low, high = (f"{100 * share:.1f}" for share in (metric.value, *metric.interval))
    undecided = f" ({metric.undecided}u)" if metric.undecided else ""
    text = f"${value}_{{{low}}}^{{{high}}}$" if layout.small else f"{value} [{low}, {high}]"
    spread = metric.between_seeds
    return text + ("" if spread is None else f" (sd {100 * spread:.1f})") + undecided


def _samples(metrics: Mapping[str, Sequence[Metric]]) -> str:
    """The number of samples of each metric: "n: refusal rate 200, task accuracy 100 to 300"."""
    parts = []
    for name, found in metrics.items():
        counts = sorted({metric.n for metric in found})
        if counts:
            parts.append(
                f"{metric_label(name)} {counts[0]}"
                + (f" to {counts[-1]}" if len(counts) > 1 else "")
            )
    if not parts:
        return "nothing was measured"
    undecided = any(metric.undecided for found in metrics.values() for metric in found)
    seeds = any(len(metric.seeds) > 1 for found in metrics.values() for metric in found)
    return (
        f"$n$: {escaped(', '.join(parts))}"
        + ("; sd: standard deviation between training seeds, in points" if seeds else "")
        + ("; u: undecided samples, counted against the model" if undecided else "")
    )


def _floats(
    columns: Mapping[str, Sequence[str]],
    columns_as: str,
    caption: str,
    label: str,
    layout: TableLayout,
) -> str:
    cells = pd.DataFrame(columns)
    floats = [_float(cells.iloc[:ROWS], columns_as, caption, label, layout)]
    for start in range(ROWS, len(cells), ROWS):
        more = f"{caption.partition('.')[0]}, continued."
        floats.append(
            _float(
                cells.iloc[start : start + ROWS],
                columns_as,
                more,
                f"{label}-{start // ROWS + 1}",
                layout,
            )
        )
    return "\n".join(floats)


def _float(
    cells: pd.DataFrame, columns_as: str, caption: str, label: str, layout: TableLayout
) -> str:
    """One float. A continued float begins with its model's name again."""
    cells = cells.assign(model=_once(list(cells["model"])))
    tabular = (
        cells.style.hide(axis="index").to_latex(column_format=columns_as, hrules=True).rstrip()
    )
    lines = tabular.split("\n")
    top = lines.index(r"\midrule") + 1
    for row in range(len(cells) - 1, 0, -1):
        if cells.iloc[row, 0]:  # a name starts a new group
            lines.insert(top + row, r"\addlinespace")
    name, size = (
        "table*" if layout.both else "table",
        r"\footnotesize" if layout.narrow else r"\small",
    )
    stretch = r"\renewcommand{\arraystretch}{1.25}" if layout.small else ""
    return "\n".join(
        [
            rf"\begin{{{name}}}[t]",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\label{{{label}}}",
            rf"{size}\setlength{{\tabcolsep}}{{{2.5 if layout.narrow else 4}pt}}{stretch}",
            r"\sbox0{%",
            *lines,
            r"}%",
            r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi",
            rf"\end{{{name}}}",
            "",
        ]
    )
