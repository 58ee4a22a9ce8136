"""Tables in a terminal: they fit its width. Elsewhere (a file, a pipe) and with --wide they are
whole.
"""

import sys
from collections.abc import Collection, Sequence
from shutil import get_terminal_size

from ebbline.analysis.results.columns import left_out_line, table_text


def table_width(wide: bool) -> int | None:
    """The columns of the terminal; None where a table may have any width."""
    return None if wide or not sys.stdout.isatty() else get_terminal_size().columns


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    wide: bool = False,
    right: Collection[str] = (),
) -> None:
    """Print a table, and the names of the columns that the terminal has no room for."""
    text, left_out = table_text(columns, rows, table_width(wide), right)
    print("\n".join([text, *left_out_line(left_out)]))
