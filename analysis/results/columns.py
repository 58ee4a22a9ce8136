"""Tables as plain text, as wide as the reader's terminal."""

from collections.abc import Collection, Sequence

from rich.cells import cell_len

BETWEEN = "  "
ALWAYS = 2  # the first columns are never left out


def table_text(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int | None = None,
    right: Collection[str] = (),
) -> tuple[str, list[str]]:
    """A table with a header, and the names of the columns that `width` has no room for.

    The last columns are left out first: put the important ones first. `right` names the columns
    that are aligned to the right. Without a width every column is there, and no cell is cut.
    """
    lines = [list(columns), *map(list, rows)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    shown = len(widths)
    while width is not None and shown > ALWAYS and _total(widths[:shown]) > width:
        shown -= 1
    text = "\n".join(
        BETWEEN.join(
            (" " * (size - cell_len(cell))).join(("", cell) if name in right else (cell, ""))
            for name, cell, size in zip(columns[:shown], line, widths, strict=False)
        ).rstrip()
        for line in lines
    )
    return text, list(columns[shown:])


def left_out_line(columns: Sequence[str]) -> list[str]:
    """The line below a table that names the columns left out; nothing where all are shown."""
    if not columns:
        return []
    return [f"Not shown, as the terminal is too narrow: {', '.join(columns)} (--wide shows all)"]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(BETWEEN) * (len(widths) - 1)
