"""Label selectors against Ray's own rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray._private.label_utils import validate_label_selector_value

from ebbline.cluster.schedule.labels import parse, selected
from ebbline.tasks.errors import StudyError

CASES = {
    "A": (True, False, False),
    "!A": (False, True, True),
    "in(A,B)": (True, True, False),
    "!in(A, B)": (False, False, True),
}


@pytest.mark.parametrize(
    ("selector", "expected"), [pytest.param(*case, id=case[0]) for case in CASES.items()]
)
def test_a_selector_judges_a_value_another_value_and_a_missing_label_as_ray_does(
    selector, expected
):
    hosts = ({"type": "A"}, {"type": "B"}, {"zone": "A"})
    assert tuple(selected({"type": selector}, labels) for labels in hosts) == expected


def test_an_empty_value_selects_an_empty_label_and_no_missing_one():
    assert selected({"type": ""}, {"type": ""})
    assert not selected({"type": ""}, {})


def test_all_selectors_must_hold():
    assert selected({"type": "A", "zone": "!b"}, {"type": "A", "zone": "a"})
    assert not selected({"type": "A", "zone": "!b"}, {"type": "A", "zone": "b"})


@given(
    st.one_of(
        st.text("aB1._-!(), in", max_size=12),
        st.from_regex(r"!?in\([ab,. ]{1,6}\)", fullmatch=True),
    )
)
def test_what_ray_would_refuse_is_an_error_that_names_it(selector):
    if validate_label_selector_value(selector) is not None:
        with pytest.raises(StudyError, match=r"label selector .*in\(a,b\)"):
            parse(selector)
    elif not selector.lstrip("!").startswith(
        "("
    ):  # Ray's check lets a list without `in` through, which it documents nowhere
        parse(selector)
