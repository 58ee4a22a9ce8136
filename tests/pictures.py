"""The four pictures of docs/design.md, drawn as text. `python -m tests.pictures` draws them again;
a test says when that is due.

Stages and their arrows come from a real graph, masks from the real gate, imports from the source;
the drivers' picture is written here.
"""

import ast
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Point
from ebbline.sweeps.study.stages import StageGraph
from ebbline.sweeps.study.study_file import parse
from ebbline.tasks.defences.gate import ModuleRow, chosen
from ebbline.tasks.specs import ApplySpec, DataSpec, TrainSpec
from ebbline.tasks.stage import Part, Stage, closure, stage_of

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "pictures"
# Each picture brings its own ground, so that it can be read on a light page and on a dark one.
STYLE = """
.ground{fill:#ffffff}.box{fill:#eef3fb;stroke:#3b5b8c}.new{fill:#fff1dc;stroke:#a8650a}.truth{fill:#e2f3e8;stroke:#23704a}
.quiet{fill:#f4f4f4;stroke:#757575}text{fill:#1b1b1b;font:14px sans-serif}.small{font-size:12px}
.strong{font-weight:bold}
.line{stroke:#444;fill:none;stroke-width:1.4}.head{fill:#444}.dash{stroke-dasharray:5 4}
@media (prefers-color-scheme:dark){
.ground{fill:#1d1f26}.box{fill:#22304a;stroke:#8fb0e6}.new{fill:#43310f;stroke:#e8b25a}
.truth{fill:#173626;stroke:#7fd0a2}.quiet{fill:#2b2d33;stroke:#a9a9a9}text{fill:#f0f0f0}.line{stroke:#c8c8c8}.head{fill:#c8c8c8}}
""".strip().replace("\n", "")
HEAD = (
    '<marker id="to" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" '
    'orient="auto">'
    '<path class="head" d="M0 0L8 4L0 8z"/></marker>'
)


class Picture:
    """An SVG in the making. Places are pixels from the upper left corner."""

    def __init__(self, title: str, description: str, width: int, height: int) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            'role="img" aria-labelledby="title description">',
            f'<title id="title">{escape(title)}</title>\n'
            f'<desc id="description">{escape(description)}</desc>',
            f"<style>{STYLE}</style>\n<defs>{HEAD}</defs>",
            f'<rect class="ground" width="{width}" height="{height}" rx="8"/>',
        ]

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        lines: Sequence[str],
        look: str = "box",
    ) -> None:
        """A box with lines of text in its middle, the first one strong."""
        self._parts.append(
            f'<rect class="{look}" x="{x:g}" y="{y:g}" width="{width:g}" '
            f'height="{height:g}" rx="6"/>'
        )
        first = y + height / 2 + 5 - 8.5 * (len(lines) - 1)
        for number, line in enumerate(lines):
            self.text(
                x + width / 2,
                first + 17 * number,
                line,
                "middle",
                "strong" if number == 0 else "small",
            )

    def text(self, x: float, y: float, label: str, anchor: str = "start", look: str = "") -> None:
        named = f' class="{look}"' if look else ""
        self._parts.append(
            f'<text{named} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(label)}</text>'
        )

    def arrow(self, *places: tuple[float, float], dash: bool = False) -> None:
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in places)
        self._parts.append(
            f'<path class="line{" dash" if dash else ""}" d="{path}" marker-end="url(#to)"/>'
        )

    def curve(
        self, start: tuple[float, float], end: tuple[float, float], level: bool = True
    ) -> None:
        """An arrow that arrives level, and leaves level or upwards."""
        (x, y), (u, v) = start, end
        bend = ((x + u) / 2, y) if level else (x, v + 10)
        path = f"M{x:g} {y:g}C{bend[0]:g} {bend[1]:g} {(x + u) / 2:g} {v:g} {u:g} {v:g}"
        self._parts.append(f'<path class="line" d="{path}" marker-end="url(#to)"/>')

    def done(self) -> str:
        return "\n".join([*self._parts, "</svg>\n"])


def stages_picture() -> str:
    """The stages of two points of tests/walk.yaml that differ in their threshold."""
    with TemporaryDirectory() as folder:
        graph = StageGraph(parse(ROOT / "tests" / "walk.yaml"), Home(Path(folder)))
        one, other = (
            graph.stages_for(Point.of("7b", {"train.rank": 8, "apply.threshold": threshold}))
            for threshold in (0.35, 0.4)
        )
    first = {stage.lineage for stage in closure(one.values())}
    columns = _columns(
        {stage.lineage: stage for stage in closure([*one.values(), *other.values()])}
    )
    width, height, gap, step, places = 84, 54, 22, 64, dict[str, tuple[float, float]]()
    deepest = max(len(column) for column in columns)
    chain = 56 + deepest * step + 70  # the middle of the columns that lie below what they end in
    picture = Picture(
        "The stages of two points that differ in their threshold",
        "From the invented language to a base model, data and an aligned model, one "
        "training and one projection, shared by both points."
        " Each threshold has an apply stage of its own, and behind it generations and scores.",
        len(columns) * (width + gap) + 20,
        chain + 150,
    )
    for index, column in enumerate(columns):
        top = 56 if len(column) == deepest else chain - (len(column) - 1) * step / 2
        for row, stage in enumerate(column):
            places[stage.lineage] = 20 + index * (width + gap), top + row * step
    for column in columns:
        for stage in column:
            x, y = places[stage.lineage]
            for above in stage.upstream():
                u, v = places[above.lineage]
                if x - u > 2 * width:
                    picture.curve((u + width / 2, v), (x, y + height / 2), level=False)
                else:
                    picture.curve((u + width, v + height / 2), (x, y + height / 2))
    for column in columns:
        for stage in column:
            look = "box" if stage.lineage in first else "new"
            picture.box(
                *places[stage.lineage],
                width,
                height,
                [line for line in (stage.kind, _about(stage), stage.lineage[:8]) if line],
                look,
            )
    picture.text(20, 30, "A point's stages, and what another threshold adds to them", look="strong")
    foot = (
        "blue: of the point with threshold 0.35; orange: what threshold 0.4 adds; the last "
        "line begins the lineage"
    )
    picture.text(20, chain + 136, foot, look="small")
    return picture.done()


def thresholds_picture() -> str:
    """Which modules each of eight thresholds takes, by the gate that `apply` uses, for cosines made
    up for the picture.
    """
    rows = {
        f"module {number}": ModuleRow(cosine, None)
        for number, cosine in enumerate((0.21, 0.22, 0.29, 0.38, 0.55, 0.58), 1)
    }
    thresholds = (0.2, 0.25, 0.28, 0.3, 0.35, 0.4, 0.5, 0.6)
    left, step, top = 170, 74, 84
    picture = Picture(
        "Thresholds between the same cosines are one mask",
        "Six modules with their cosines against eight thresholds. C B where a threshold "
        "takes a module. Two thresholds between the same"
        " two cosines take the same modules, give the same adapter and share its measurements.",
        left + len(thresholds) * step + 20,
        top + len(rows) * 34 + 96,
    )
    picture.text(
        20,
        30,
        "cosine of each module, known after one projection; a threshold only chooses",
        look="strong",
    )
    picture.text(20, 64, "threshold", look="small")
    masks: list[frozenset[str]] = []
    for column, threshold in enumerate(thresholds):
        x = left + column * step
        mask = frozenset(chosen(rows, threshold, None))
        again = mask in masks
        if not again:
            masks.append(mask)
        picture.box(x, top - 14, step - 12, len(rows) * 34 + 14, [], "quiet" if again else "box")
        picture.text(x + (step - 12) / 2, 64, f"{threshold:g}", "middle", "strong")
        for row, name in enumerate(rows):
            if name in mask:
                picture.text(x + (step - 12) / 2, top + 16 + row * 34, "C·B", "middle", "small")
        picture.text(
            x + (step - 12) / 2,
            top + len(rows) * 34 + 24,
            f"mask {masks.index(mask) + 1}",
            "middle",
            "small",
        )
        if again:
            picture.text(x + (step - 12) / 2, top + len(rows) * 34 + 42, "known", "middle", "small")
    for row, (name, found) in enumerate(rows.items()):
        picture.text(20, top + 16 + row * 34, f"{name}: {found.cosine:.2f}", look="small")
    foot = (
        f"{len(thresholds)} thresholds, {len(masks)} masks: {len(masks)} measurements from one "
        "training and one projection"
    )
    picture.text(20, top + len(rows) * 34 + 76, foot)
    return picture.done()


def truths_picture() -> str:
    """Who decides, who works, and the two places that anything is read back from."""
    picture = Picture(
        "One truth each: points in the Optuna storage, outputs in the store",
        "The driver asks the search for points, plans their stages, looks their keys up in "
        "the store, and lets the scheduler place"
        " what misses on an executor, whose workers commit artifacts to the store. Screen, "
        "W&B, tables and report are"
        " mirrors that nothing reads back.",
        860,
        400,
    )
    picture.text(20, 30, "Who decides, who works, and what is read back", look="strong")
    picture.box(20, 60, 180, 66, ["points", "Optuna storage", "(SQLite or PostgreSQL)"], "truth")
    picture.box(
        20, 290, 180, 66, ["outputs", "the store: KEY -> artifact", "(folder or bucket)"], "truth"
    )
    picture.box(
        330,
        60,
        190,
        66,
        [
            "driver",
            "asks, plans, tells",
            "sweeps.drive, cluster.running",
        ],
    )
    picture.box(330, 176, 190, 66, ["scheduler", "what starts where, now", "a pure function"])
    picture.box(330, 290, 190, 66, ["executor", "inline, Ray, yours", "tasks.worker.run_stages"])
    picture.box(650, 60, 190, 66, ["mirrors", "screen, W&B, tables,", "figures, report"], "quiet")
    picture.arrow((330, 82), (200, 82))
    picture.text(265, 76, "ask", "middle", "small")
    picture.arrow((200, 106), (330, 106))
    picture.text(265, 122, "points", "middle", "small")
    picture.arrow((425, 126), (425, 176))
    picture.text(435, 156, "ready stages", look="small")
    picture.arrow((425, 242), (425, 290))
    picture.text(435, 271, "placements", look="small")
    picture.arrow((330, 323), (200, 323))
    picture.text(265, 317, "commit", "middle", "small")
    picture.arrow((110, 290), (110, 200), (330, 118))
    picture.text(118, 226, "is this key there?", look="small")
    picture.arrow((520, 93), (650, 93), dash=True)
    picture.text(585, 86, "shown", "middle", "small")
    picture.text(650, 150, "nothing reads them back", look="small")
    picture.text(
        20,
        386,
        "Kill anything: both truths are on disk, and the same command reads them again and "
        "goes on.",
        look="small",
    )
    return picture.done()


def imports_picture() -> str:
    """The five folders in the order that import-linter holds them to, and which imports which, read
    from the source.
    """
    what = {
        "tasks": ("what a stage is", "models, training, measuring"),
        "cluster": ("where and how", "store, scheduler, executors"),
        "sweeps": ("which points", "studies, search, the driver"),
        "analysis": ("what came out", "frontier, figures, report"),
        "ebbline": ("the command line", "reaches all four"),
    }
    layers = list(what)
    picture = Picture(
        "Imports go one way",
        "tasks, cluster, sweeps, analysis, ebbline from left to right; an arc from each "
        "folder to every one that it imports, to the left.",
        30 + len(layers) * 200,
        300,
    )
    picture.text(20, 30, "Imports go one way: an arrow means: imports", look="strong")
    for index, name in enumerate(layers):
        picture.box(20 + index * 200, 176, 180, 74, [name, *what[name]])
    for index, name in enumerate(layers):
        for other in sorted(_imported(name) & set(layers) - {name}, key=layers.index):
            there = layers.index(other)
            start, end = (
                20 + index * 200 + 40 + 12 * (index - there),
                20 + there * 200 + 150 - 12 * (index - there),
            )
            top = 170 - 26 * (index - there)
            picture.arrow((start, 176), (start - 14, top), (end + 14, top), (end, 176))
    picture.text(
        20,
        282,
        "read from the source by tests/pictures.py; CI holds the code to it with import-linter",
        look="small",
    )
    return picture.done()


def _columns(stages: Mapping[str, Stage]) -> list[list[Stage]]:
    """Stages by how many others stand before them in the longest chain."""
    depth: dict[str, int] = {}
    for lineage, stage in stages.items():  # inputs first
        depth[lineage] = max((depth[above.lineage] + 1 for above in stage.upstream()), default=0)
    return [
        [stage for lineage, stage in stages.items() if depth[lineage] == at]
        for at in range(max(depth.values()) + 1)
    ]


def _about(stage: Stage) -> str:
    """Which of its kind a stage is."""
    if isinstance(stage.spec, ApplySpec):
        return f"at {stage.spec.threshold}"
    if isinstance(stage.spec, DataSpec):
        return f"{stage.spec.size} rows"
    if isinstance(stage.spec, TrainSpec):
        return "full" if stage.spec.method == "full" else f"rank {stage.spec.rank}"
    generation = stage_of(stage.inputs["generation"]) if "generation" in stage.inputs else stage
    prompts = generation.inputs.get("prompts") if generation is not None else None
    return prompts.path.removesuffix(".jsonl") if isinstance(prompts, Part) else ""


def _imported(package: str) -> set[str]:
    """Which of the five folders a folder imports, by ebbline.FOLDER."""
    return {
        name.removeprefix("ebbline.").partition(".")[0]
        for path in _sources(ROOT / package)
        for name in _names(ast.parse(path.read_text("utf-8")))
    }


def _sources(folder: Path) -> Iterator[Path]:
    """The Python files below a folder; links to other folders are not followed."""
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not (Path(here) / name).is_symlink()]
        yield from (Path(here) / name for name in names if name.endswith(".py"))


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


PICTURES = {
    "stages.svg": stages_picture,
    "thresholds.svg": thresholds_picture,
    "truths.svg": truths_picture,
    "imports.svg": imports_picture,
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), "utf-8")


if __name__ == "__main__":
    main()
