"""Label selectors agree with Ray's own rules."""

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
def test_a_selector_matches_the_same_labels_as_in_ray(selector, expected):
    hosts = ({"type": "A"}, {"type": "B"}, {"zone": "A"})
    assert tuple(selected({"type": selector}, labels) for labels in hosts) == expected


def test_an_empty_value_matches_an_empty_label_but_no_missing_label():
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
def test_a_selector_that_ray_rejects_is_an_error(selector):
    if validate_label_selector_value(selector) is not None:
        with pytest.raises(StudyError, match=r"label selector .*in\(a,b\)"):
            parse(selector)
    # Ray's check accepts a list without `in`, which its documentation does not have.
    elif not selector.lstrip("!").startswith("("):
        parse(selector)
