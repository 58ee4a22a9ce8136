"""Tables fit a terminal: the last columns are left out and named, and no cell is ever cut."""

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from ebbline.analysis.results.columns import ALWAYS, left_out_line, table_text

CELL = st.text("ab 9é漢", max_size=8).map(str.strip)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[str], list[list[str]]]:
    names = [f"c{number}" for number in range(draw(st.integers(1, 6)))]
    return names, draw(st.lists(st.lists(CELL, min_size=len(names), max_size=len(names))))


@given(tables(), st.integers(1, 60))
def test_a_table_fits_and_what_it_leaves_out_is_named(
    table: tuple[list[str], list[list[str]]], width: int
) -> None:
    names, rows = table
    text, left_out = table_text(names, rows, width)
    shown = names[: len(names) - len(left_out)]
    assert [*shown, *left_out] == names and len(shown) >= min(ALWAYS, len(names))
    lines = text.split("\n")
    assert len(lines) == 1 + len(rows)
    for cells, line in zip([shown, *rows], lines, strict=True):
        assert all(cell in line for cell in cells[: len(shown)])
    if len(shown) > ALWAYS:
        assert max(map(cell_len, lines)) <= width
    whole, none = table_text(names, rows)
    assert none == [] and (left_out or whole == text)


@given(tables())
def test_a_column_is_only_left_out_where_it_has_no_room(
    table: tuple[list[str], list[list[str]]],
) -> None:
    names, rows = table
    text, _ = table_text(names, rows)
    widest = max(
        sum(cell_len(max(column, key=cell_len)) for column in zip(names, *rows, strict=True))
        + 2 * (len(names) - 1),
        1,
    )
    assert table_text(names, rows, widest) == (text, [])


def test_columns_line_up_and_numbers_to_the_right() -> None:
    text, _ = table_text(["stage", "size"], [["train", "1"], ["x", "1000"]], right=["size"])
    assert text == "stage  size\ntrain     1\nx      1000"
    assert left_out_line(["rank", "size"]) == [
        "Not shown, as the terminal is too narrow: rank, size (--wide shows all)"
    ]
    assert left_out_line([]) == []
