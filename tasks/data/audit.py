"""What a prompt set contains: how many distinct requests, which categories, and what it shares with
another set.

A rate over 520 prompts of which 24 are one request says less than its interval claims; arXiv
2311.00117 found this in AdvBench by hand. An audit holds counts and ids, never the text of a
prompt.

Similarity is the Jaccard index of two prompts' *content words*: single words (1-gram shingles) in
lower case, without endings, and without the words that only frame a request ("write a tutorial on
how to"). Prompts are 5 to 20 words long. With 2- or 3-grams, one replaced word breaks up to three
shingles, and a paraphrase falls below any useful level. Framing words would make unrelated prompts
similar. The lists are English; in another language every word counts.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from datasketch import MinHash, MinHashLSH

from ebbline.tasks.data.conversations import is_training_data, read_conversations
from ebbline.tasks.data.formats.folders import read_set
from ebbline.tasks.data.prompts import Prompt, PromptSet, read_prompts
from ebbline.tasks.data.splits.held_out import folded
from ebbline.tasks.errors import DataError, StudyError

LOWEST_SIMILARITY = 0.1
SHORT_WORDS = 3
_PERMUTATIONS = 256
_MISSED = 1e-9  # the accepted chance that the search misses a pair of the least similarity
_WORD = re.compile(r"\w+(?:['’]\w+)?")
# "not", "no" and "without" count as content: they reverse a request.
_FUNCTION_WORDS = """a an the this that these those some any of to in on at by for from with into
about as and or but if than then so is are was were be been being am do does did done have has had
having can could will would shall should may might must i me my we us our you your he him his she
her it its they them their who whom which what when where why how there here"""
_FRAMING_WORDS = """please give provide write create develop make made produce generate compose
draft design offer suggest list outline describe explain teach show tell share help guide guideline
tutorial manual instruction instruct step detail detailed comprehensive complete plan method way
strategy process procedure approach technique tip advice idea example information"""


@dataclass(frozen=True)
class Cluster:
    """Prompts joined, directly or through others, by pairs of at least the least similarity.

    `joined_at` is the smallest similarity that holds the cluster together: with a higher least
    similarity it falls apart. `least` is the smallest similarity of any two members; near zero, the
    cluster is a chain.
    """

    ids: tuple[str, ...]
    joined_at: float
    least: float


@dataclass(frozen=True)
class Category:
    """A category ("" if a prompt has none), its number of prompts, and their share of the set."""

    name: str
    prompts: int
    share: float


@dataclass(frozen=True)
class Lengths:
    """Quantiles of the words per prompt, split at white space. `short` prompts have fewer than
    SHORT_WORDS.
    """

    min: float
    q1: float
    median: float
    q3: float
    p95: float
    max: float
    short: int


@dataclass(frozen=True)
class NearPair:
    """A prompt of this set and a similar prompt of the other set, whose texts differ."""

    id: str
    other: str
    similarity: float


@dataclass(frozen=True)
class Overlap:
    """The overlap with another set of `prompts` prompts: pairs of equal text, and pairs of similar
    text. `shared` counts the prompts of this set that are in a pair.
    """

    prompts: int
    exact: tuple[tuple[str, str], ...]
    near: tuple[NearPair, ...]
    shared: int


@dataclass(frozen=True)
class Audit:
    """An audit of `prompts` prompts. `requests` counts each cluster once. Groups are sorted by
    size, largest first, then by id or name. `repeats` are the ids of the rows that repeat the text
    of an earlier row; they are not among the prompts.
    """

    format: str
    rows: int
    prompts: int
    requests: int
    renamed: int
    least_similarity: float
    clusters: tuple[Cluster, ...]
    duplicates: tuple[tuple[str, ...], ...]
    categories: tuple[Category, ...]
    labels: dict[str, int]
    lengths: Lengths
    overlap: Overlap | None
    repeats: tuple[str, ...] = ()


def audit(
    prompts: PromptSet, against: PromptSet | None = None, least_similarity: float = 0.5
) -> Audit:
    """Find near-copies, duplicates, categories and lengths of a set, and its overlap with
    `against`.

    Two prompts are near-copies if their similarity is at least `least_similarity`, which must be in
    [0.1, 1]; StudyError otherwise. The order of the rows is irrelevant.
    """
    if not LOWEST_SIMILARITY <= least_similarity <= 1.0:
        raise StudyError(
            f"a similarity of {least_similarity:g} is out of range: it is a share of common "
            f"words, from {LOWEST_SIMILARITY:g} to 1"
        )
    rows = prompts.prompts
    if not rows:
        raise StudyError("a set without prompts cannot be audited")
    clusters = _clusters(rows, least_similarity)
    return Audit(
        format=prompts.format,
        rows=prompts.rows,
        prompts=len(rows),
        requests=len(rows) - sum(len(cluster.ids) - 1 for cluster in clusters),
        renamed=prompts.renamed,
        least_similarity=least_similarity,
        clusters=clusters,
        duplicates=_largest_first(
            tuple(_in_order(ids)) for ids in _by_text(rows).values() if len(ids) > 1
        ),
        categories=_categories(rows),
        labels=dict(sorted(Counter(row.label for row in rows).items())),
        lengths=_lengths(rows),
        overlap=None if against is None else overlap(rows, against.prompts, least_similarity),
        repeats=tuple(row.id for row in prompts.repeats),
    )


def read_other(path: Path) -> PromptSet:
    """The set that another is compared with: prompts, or the user's turns of training data. The id
    of a turn is the number of its row and, after the first turn, of the turn: 12, 12:2.
    """
    try:
        first = next(read_set(path, "train"), None)
    except DataError:
        first = None  # read_prompts raises it, or knows the shape
    if first is None or not is_training_data(first.values):
        return read_prompts(path)
    conversations = read_conversations(path)
    prompts = []
    for number, turns in enumerate(conversations, start=1):
        asked = [turn["content"] for turn in turns if turn["role"] == "user"]
        prompts += [
            Prompt(str(number) if place == 1 else f"{number}:{place}", text)
            for place, text in enumerate(asked, start=1)
        ]
    return PromptSet("training data", tuple(prompts), len(conversations))


def content_words(text: str) -> frozenset[str]:
    """The shingles of a prompt, as the module's docstring defines them. Never empty: a prompt of
    framing words only keeps them all.
    """
    words = [_stem(word) for word in _WORD.findall(unicodedata.normalize("NFKC", text).casefold())]
    return (
        frozenset(word for word in words if word not in _FRAME)
        or frozenset(words)
        or frozenset([folded(text)])
    )


def similarity(one: frozenset[str], other: frozenset[str]) -> float:
    """The Jaccard index |A & B| / |A | B|."""
    both = len(one & other)
    return both / (len(one) + len(other) - both)


def _stem(word: str) -> str:
    """A word without 's, -s, -ed, -ing, a final e or a doubled last consonant, and with i for a
    final y: plants, planted, planting -> plant.
    """
    word = word.replace("’", "'").removesuffix("'s")
    for ending in ("ing", "ed", "es", "s"):
        cut = word.removesuffix(ending)
        if cut != word and len(cut) >= 3 and not word.endswith("ss"):
            word = cut
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] in "bdfgmnprt":
        return word[:-1]
    if len(word) > 3 and word[-1] in "ey":
        return word[:-1] + ("i" if word[-1] == "y" else "")
    return word


_FRAME = frozenset(map(_stem, f"{_FUNCTION_WORDS} {_FRAMING_WORDS}".split()))


def _by_text(rows: Iterable[Prompt]) -> dict[str, list[str]]:
    ids = defaultdict(list)
    for row in rows:
        ids[folded(row.text)].append(row.id)
    return ids


def _by_words(rows: Iterable[Prompt]) -> dict[frozenset[str], list[Prompt]]:
    prompts_of = defaultdict(list)
    for row in rows:
        prompts_of[content_words(row.text)].append(row)
    return prompts_of


def _in_order(ids: Iterable[str]) -> list[str]:
    """Ids in natural order: 9 before 10."""
    return sorted(
        ids,
        key=lambda name: (
            [
                (int(part), "") if part.isdecimal() else (-1, part)
                for part in re.split(r"(\d+)", name)
            ],
            name,
        ),
    )


def _largest_first(groups: Iterable[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    return tuple(sorted(groups, key=lambda ids: (-len(ids), ids)))


def _similar(
    queried: Sequence[frozenset[str]], indexed: Sequence[frozenset[str]], least_similarity: float
) -> Iterator[tuple[frozenset[str], frozenset[str], float]]:
    """Pairs of distinct word sets with at least the least similarity. MinHash proposes pairs; the
    exact similarity decides.
    """
    index = MinHashLSH(num_perm=_PERMUTATIONS, params=_bands(least_similarity))
    for number, hashed in enumerate(_hashes(indexed)):
        index.insert(number, hashed)
    for words, hashed in zip(queried, _hashes(queried), strict=True):
        for number in sorted(index.query(hashed)):
            if (found := similarity(words, indexed[number])) >= least_similarity:
                yield words, indexed[number], found


def _hashes(sets: Iterable[frozenset[str]]) -> Iterator[MinHash]:
    yield from MinHash.generator(
        ([word.encode() for word in sorted(words)] for words in sets),
        num_perm=_PERMUTATIONS,
        seed=1,
    )


def _bands(least_similarity: float) -> tuple[int, int]:
    """(bands, rows) of the most selective index that misses a pair of the least similarity t with a
    chance (1 - t^rows)^bands <= _MISSED.
    """
    for rows in range(_PERMUTATIONS // 2, 1, -1):
        if (1 - least_similarity**rows) ** (_PERMUTATIONS // rows) <= _MISSED:
            return _PERMUTATIONS // rows, rows
    return _PERMUTATIONS, 1


def _clusters(rows: Sequence[Prompt], least_similarity: float) -> tuple[Cluster, ...]:
    """Connected components. Pairs are joined from the most similar down, so the last join of a
    cluster is its weakest.
    """
    prompts_of = _by_words(rows)
    distinct = list(prompts_of)
    number_of = {words: place for place, words in enumerate(distinct)}
    pairs = {
        tuple(sorted((number_of[a], number_of[b]))): found
        for a, b, found in _similar(distinct, distinct, least_similarity)
        if a != b
    }
    parent = list(range(len(distinct)))
    joined_at = [1.0] * len(distinct)

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for (one, other), found in sorted(pairs.items(), key=lambda item: -item[1]):
        a, b = root(one), root(other)
        if a != b:
            parent[b], joined_at[a] = a, found
    members = defaultdict(list)
    for place, words in enumerate(distinct):
        members[root(place)].append(words)
    clusters = []
    for top, sets in members.items():
        ids = _in_order(row.id for words in sets for row in prompts_of[words])
        if len(ids) > 1:
            least = min((similarity(a, b) for a, b in combinations(sets, 2)), default=1.0)
            clusters.append(Cluster(tuple(ids), joined_at[top], least))
    return tuple(sorted(clusters, key=lambda cluster: (-len(cluster.ids), cluster.ids)))


def _categories(rows: Sequence[Prompt]) -> tuple[Category, ...]:
    counts = Counter(row.category for row in rows)
    return tuple(
        Category(name, n, n / len(rows))
        for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )


def _lengths(rows: Sequence[Prompt]) -> Lengths:
    words = [len(row.text.split()) for row in rows]
    low, q1, median, q3, p95, high = map(float, np.quantile(words, [0, 0.25, 0.5, 0.75, 0.95, 1]))
    return Lengths(low, q1, median, q3, p95, high, sum(n < SHORT_WORDS for n in words))


def overlap(rows: Sequence[Prompt], others: Sequence[Prompt], least_similarity: float) -> Overlap:
    """What two sets share: equal texts, and pairs of at least the least similarity."""
    mine, theirs = _by_text(rows), _by_text(others)
    exact = {
        (one, other) for text, ids in mine.items() for one in ids for other in theirs.get(text, ())
    }
    words, other_words = _by_words(rows), _by_words(others)
    near = {
        (one.id, other.id): found
        for a, b, found in _similar(list(words), list(other_words), least_similarity)
        for one in words[a]
        for other in other_words[b]
        if folded(one.text) != folded(other.text)
    }
    return Overlap(
        prompts=len(others),
        exact=tuple(sorted(exact)),
        near=tuple(
            NearPair(*pair, found)
            for pair, found in sorted(near.items(), key=lambda item: (-item[1], item[0]))
        ),
        shared=len({one for one, _ in exact} | {one for one, _ in near}),
    )
