"""The report of `ebbline prompts check`: an audit as tables, and what to do next.

It prints counts, ids and categories. It prints the texts of near-copies only with --show-text.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ebbline.tasks.data.audit import SHORT_WORDS, Audit, Cluster
from ebbline.tasks.data.prompts import PromptSet
from ebbline.tasks.identity import content_digest

SHOWN = {"clusters": 20, "ids": 12, "categories": 60, "pairs": 20, "texts": 5}
FEW_PROMPTS = 10  # below it, a rate's 95% interval can be wider than +-0.25

_KEYS = {"least_similarity": "threshold"}  # Audit field -> its key in --json


def print_audit(
    audit: Audit, path: Path, as_json: bool, show_text: PromptSet | None = None
) -> None:
    """Print an audit of the set at `path`. `show_text` is the set itself; it adds the texts of
    near-copies.
    """
    texts = {} if show_text is None else {prompt.id: prompt.text for prompt in show_text.prompts}
    if as_json:
        shown = {
            name: texts[name] for cluster in audit.clusters for name in cluster.ids if name in texts
        }
        record = {
            "path": str(path),
            "sha256": content_digest(path),
            **{_KEYS.get(name, name): value for name, value in asdict(audit).items()},
            "verdicts": verdicts(audit),
        }
        print(
            json.dumps(record | ({"texts": shown} if show_text else {}), indent=1, allow_nan=False)
        )
        return
    screen = Console(markup=False, highlight=False)
    limited = "" if audit.rows == audit.prompts else f" of {audit.rows} rows"
    _line(
        screen,
        f"{path}: {audit.format}, {audit.prompts} prompts{limited}, sha256 {content_digest(path)}",
    )
    _line(screen, f"words in a prompt: {_words(audit)}")
    if set(audit.labels) != {""}:
        _line(
            screen,
            "labels: "
            + ", ".join(f"{n} {name or 'without one'}" for name, n in audit.labels.items()),
        )
    if len(audit.categories) > 1 or audit.categories[0].name:
        screen.print(_categories(audit))
    if audit.clusters:
        screen.print(
            _clusters(
                audit.clusters,
                f"near-copies: {audit.least_similarity:g} or more of their content words in common",
            )
        )
    if texts:
        _texts(screen, audit.clusters, texts)
    if audit.overlap is not None and (audit.overlap.exact or audit.overlap.near):
        screen.print(_overlap(audit))
    for verdict in verdicts(audit):
        _line(screen, f"- {verdict}")


def verdicts(audit: Audit) -> list[str]:
    """The findings and what to do next, a sentence each."""
    return [*_copies(audit), *_coverage(audit), *_rows(audit), *_shared(audit)]


def _copies(audit: Audit) -> list[str]:
    if not audit.clusters:
        return [
            f"no near-copies at a similarity of {audit.least_similarity:g}: each prompt is a "
            "separate request"
        ]
    inside = sum(len(cluster.ids) for cluster in audit.clusters)
    sentences = [
        f"{_count(len(audit.clusters), 'cluster holds', 'clusters hold')} {inside} of "
        f"{audit.prompts} prompts: count a cluster once, or"
        f" report rates per cluster. The set has "
        f"{_count(audit.requests, 'separate request', 'separate requests')}, so an "
        f"interval for n = {audit.prompts} is too narrow"
    ]
    chains = [
        str(place)
        for place, cluster in enumerate(audit.clusters, start=1)
        if cluster.least < audit.least_similarity / 2
    ]
    if chains:
        sentences.append(
            f"{_count(len(chains), 'cluster is a chain', 'clusters are chains')} whose "
            f"ends have little in common ({_some(chains)}):"
            " read the texts (--show-text), or raise --similarity"
        )
    if audit.duplicates:
        extra = sum(len(ids) - 1 for ids in audit.duplicates)
        sentences.append(
            f"{_count(extra, 'prompt repeats', 'prompts repeat')} another, apart from case and "
            "white space: remove the repeats"
        )
    return sentences


def _coverage(audit: Audit) -> list[str]:
    named = [category for category in audit.categories if category.name]
    without = audit.prompts - sum(category.prompts for category in named)
    if not named:
        return ["no prompt has a category: the set's coverage is unknown; add a column `category`"]
    largest, smallest = named[0], named[-1]
    sentences = [f"there is one category ({_plain(largest.name)}): the set's coverage is unknown"]
    if len(named) > 1:
        sentences = [
            f"{len(named)} categories, the smallest with "
            f"{_count(smallest.prompts, 'prompt', 'prompts')} ({_plain(smallest.name)}),"
            f" the largest with {largest.prompts} ({_plain(largest.name)}, {largest.share:.0%})"
        ]
    few = [category.name for category in named if category.prompts < FEW_PROMPTS]
    if few:
        sentences.append(
            f"{_count(len(few), 'category holds', 'categories hold')} fewer than "
            f"{FEW_PROMPTS} prompts: report no separate rate for"
            f" {'it' if len(few) == 1 else 'them'} ({_some([_plain(name) for name in few])})"
        )
    if without:
        sentences.append(f"{_count(without, 'prompt has', 'prompts have')} no category")
    return sentences


def _rows(audit: Audit) -> list[str]:
    sentences = []
    if audit.repeats:
        ids = _some([_plain(name) for name in audit.repeats])
        sentences.append(
            f"{_count(len(audit.repeats), 'row repeats', 'rows repeat')} the prompt of an earlier "
            f"row and {'is' if len(audit.repeats) == 1 else 'are'} not asked again ({ids})"
        )
    if audit.lengths.short:
        sentences.append(
            f"{_count(audit.lengths.short, 'prompt has', 'prompts have')} fewer than "
            f"{SHORT_WORDS} words: is the text cut?"
        )
    if len([name for name in audit.labels if name]) > 1:
        sentences.append(
            "the set holds harmful and harmless prompts: a suite of the kind refusal asks only the "
            "harmful ones, one of the kind over_refusal only the harmless ones"
        )
    if audit.renamed:
        sentences.append(
            f"{_count(audit.renamed, 'row has', 'rows have')} an id of an earlier row "
            "and became ID@LINE: give each row a unique id"
        )
    return sentences


def _shared(audit: Audit) -> list[str]:
    if audit.overlap is None:
        return []
    if not audit.overlap.shared:
        return [
            f"no prompt equals or resembles one of the {audit.overlap.prompts} prompts of the "
            "other set"
        ]
    return [
        f"{audit.overlap.shared} of {audit.prompts} prompts recur in the other set (pairs: "
        f"{len(audit.overlap.exact)} equal,"
        f" {len(audit.overlap.near)} similar): do not count the two sets as independent, "
        "and do not train on one and measure on the other"
    ]


def _categories(audit: Audit) -> Table:
    table = _table("categories", "category", ">prompts", ">share")
    for category in audit.categories[: SHOWN["categories"]]:
        table.add_row(
            Text(_plain(category.name) or "(none)"), str(category.prompts), f"{category.share:.1%}"
        )
    _left_out(table, len(audit.categories), SHOWN["categories"])
    return table


def _clusters(clusters: Sequence[Cluster], title: str) -> Table:
    table = _table(title, ">cluster", ">prompts", ">joined at", ">least", "ids")
    for place, cluster in enumerate(clusters[: SHOWN["clusters"]], start=1):
        ids = _some([_plain(name) for name in cluster.ids])
        table.add_row(
            str(place),
            str(len(cluster.ids)),
            f"{cluster.joined_at:.2f}",
            f"{cluster.least:.2f}",
            Text(ids),
        )
    _left_out(table, len(clusters), SHOWN["clusters"])
    return table


def _overlap(audit: Audit) -> Table:
    assert audit.overlap is not None
    table = _table("in both sets", "id", "id in the other set", ">similarity")
    pairs = [(one, other, "same") for one, other in audit.overlap.exact]
    pairs += [(pair.id, pair.other, f"{pair.similarity:.2f}") for pair in audit.overlap.near]
    for one, other, similarity in pairs[: SHOWN["pairs"]]:
        table.add_row(Text(_plain(one)), Text(_plain(other)), similarity)
    _left_out(table, len(pairs), SHOWN["pairs"])
    return table


def _texts(screen: Console, clusters: Sequence[Cluster], texts: dict[str, str]) -> None:
    for place, cluster in enumerate(clusters[: SHOWN["clusters"]], start=1):
        _line(
            screen,
            f"cluster {place}, {min(len(cluster.ids), SHOWN['texts'])} of {len(cluster.ids)}:",
        )
        for name in cluster.ids[: SHOWN["texts"]]:
            _line(screen, f"  {_plain(name)}: {_printable(texts[name])}")


def _table(title: str, *columns: str) -> Table:
    """A table; a column whose name begins with > is right-aligned."""
    table = Table(
        title=title, title_justify="left", title_style="", box=SIMPLE_HEAD, pad_edge=False
    )
    for name in columns:
        table.add_column(
            name.removeprefix(">"),
            justify="right" if name.startswith(">") else "left",
            overflow="fold",
        )
    return table


def _left_out(table: Table, there: int, shown: int) -> None:
    if there > shown:
        table.caption = f"and {there - shown} more: --json lists all"
        table.caption_justify = "left"


def _words(audit: Audit) -> str:
    lengths = audit.lengths
    return (
        f"{lengths.min:g} at least, {lengths.q1:g} / {lengths.median:g} / {lengths.q3:g} "
        f"quartiles, {lengths.p95:g} at 95%,"
        f" {lengths.max:g} at most; {lengths.short} with fewer than {SHORT_WORDS}"
    )


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN["ids"]
    return ", ".join(names[: SHOWN["ids"]]) + (f" and {more} more" if more > 0 else "")


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def _plain(name: str) -> str:
    """An id or a category from a file, for the screen: without control characters, at most 60
    characters.
    """
    shown = _printable(name)
    return shown if len(shown) <= 60 else f"{shown[:59]}…"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "�" for letter in " ".join(text.split()))


def _line(screen: Console, text: str) -> None:
    screen.print(text, markup=False, soft_wrap=True)
