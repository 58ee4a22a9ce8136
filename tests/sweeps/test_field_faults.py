"""A fault names its field as the user wrote it, with the line, whatever pydantic calls it."""

import re
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ebbline.sweeps.study.reading.field_faults import faults, lines_of, path_in
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.study_file import _tuples, parse
from ebbline.tasks.errors import StudyError
from tests.sweeps.made import WHOLE, changed, written


def fields(value, path=()):
    """Every path of a study's data that is a field and no item of a list."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            yield from fields(item, (*path, key))


def fault_of(folder, changes):
    try:
        parse(written(folder, changes))
    except StudyError as error:
        return str(error).partition("\n")[2]
    return ""


@settings(max_examples=50)
@given(
    st.sampled_from([path for path in fields(WHOLE) if path[0] != "hypothesis"]),
    st.sampled_from([{"foreign": 1}, ((1,),), "a text", -7.5]),
)
def test_a_wrong_value_anywhere_is_named_by_its_path(path, value):
    own = _tuples(changed({"/".join(path): value}))
    try:
        Study.model_validate(own, context={"folder": Path()})
    except ValidationError as error:
        messages = list(faults(error, Study, own))
    else:
        return
    assert messages
    for message in messages:
        for internal in (
            "function-",
            "tuple",
            "union[",
            "nullable",
            "[key]",
            "Range",
            "dictionary",
        ):
            assert internal not in message
        where = re.match(r"(.*?)(?:\[\d+\])*: ", message)[1]
        # A field that is missing or foreign stands below one that is there.
        above = where.rpartition(".")[0]
        assert where == "study" or path_in(own, where) or path_in(own, above) is not None, message


def test_the_members_of_a_union_are_one_fault_at_the_field(tmp_path):
    for value, fault in {
        "abc": "axes.train.rank: Input should be a list or a mapping (got 'abc')",
        "low": "axes.train.rank.high: this field is required",
        "item": "axes.train.rank[1]: Input should be a valid boolean or a valid integer or a valid "
        "number or a valid string (got {})",
    }.items():
        given_value = {"low": {"low": 1}, "item": [4, {}]}.get(value, value)
        message = fault_of(tmp_path, {"axes/train.rank": given_value})
        assert [line.partition(": ")[2] for line in message.splitlines()] == [fault]


def test_the_line_is_that_of_the_key_as_written():
    text = "a:\n  b.c:\n    - {x: 1}\n    - x: 2\n"
    line_of = lines_of(text)
    assert [line_of(path) for path in (("a",), ("a", "b.c"), ("a", "b.c", 1, "x"))] == [1, 2, 4]
    assert line_of(("a", "missing")) == 1 and line_of(()) is None


def test_the_kind_of_a_suite_is_named_by_its_own_key(tmp_path):
    suite = {"prompts": {"language": "task.jsonl"}, "measure": {"kind": "task", "scorre": "exact"}}
    message = fault_of(tmp_path, {"suites/task": suite})
    assert "suites.task.measure.scorre: 'scorre' is not one of" in message
    assert "did you mean 'scorer'" in message
    suite["measure"] = {}
    assert "suites.task.measure.kind: this field is required: one of ['harm" in fault_of(
        tmp_path, {"suites/task": suite}
    )


def test_a_setting_that_would_be_ignored_is_named_with_its_line(tmp_path):
    message = fault_of(tmp_path, {"train": {"epochs": 1, "seed": 3}})
    line = int(re.match(r"  line (\d+): train\.seed: ", message)[1])
    assert (tmp_path / "study.yaml").read_text().splitlines()[line - 1].strip() == "seed: 3"
