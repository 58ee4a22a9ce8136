"""The sets of rows that a study names: what is reported of them is what the stages read."""

import pyarrow
import pytest
from pyarrow import parquet

from ebbline.sweeps.study.reading.row_sets import RowSet
from ebbline.sweeps.study.references import DataRef, Local
from tests.tiny import write_lines

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
FORMATS = {
    "chat": ({"messages": TURNS}, ("messages",)),
    "Alpaca": ({"instruction": "i", "output": "o", "text": "t"}, ("instruction", "output")),
    "question and answer": ({"question": "q", "answer": "a"}, ("question", "answer")),
    "instruction and response": (
        {"instruction": "i", "context": "c", "response": "a"},
        ("instruction", "response", "context"),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_training_data_has_the_format_and_columns_that_its_reader_reads(name, tmp_path):
    row, columns = FORMATS[name]
    path = write_lines(tmp_path / "train.jsonl", [row])
    facts = RowSet("data.pool", DataRef(path=Local(path=str(path))), needed=1).read(path)
    assert (facts.format, facts.fields) == (name, columns)


def test_training_data_in_a_folder_of_the_hub_has_a_format(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        table = pyarrow.Table.from_pylist([{"messages": TURNS}])
        parquet.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    facts = RowSet("data.pool", DataRef(path=Local(path=str(tmp_path))), needed=1).read(tmp_path)
    assert (facts.rows, facts.format) == (1, "chat")
