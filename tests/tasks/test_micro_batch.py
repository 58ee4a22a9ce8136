"""A micro-batch that was halved stays halved in the next attempt of the training."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.training.engines import SingleDevice
from ebbline.tasks.training.micro_batch import FILE, Learnt, learn, learnt
from ebbline.tasks.training.pack_engine import Member, Pack
from tests.tasks.test_train import SETTINGS, out_of_memory_when, rows_of
from tests.tiny import context


@given(notes=st.lists(st.tuples(st.sampled_from(["used", "most"]), st.integers(1, 99)), min_size=1))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_latest_of_each_note_is_kept(tmp_path, notes):
    (tmp_path / FILE).unlink(missing_ok=True)
    for name, value in notes:
        learn(tmp_path, **{name: value})
    latest = dict(notes)
    assert learnt(tmp_path) == Learnt(latest.get("used"), latest.get("most"))
    assert learnt(tmp_path).limited(16) == min(16, latest.get("most", 16))


@pytest.mark.parametrize("text", ["", "[", "[]", '{"most": 0}', '{"most": "x"}', "\udcff"])
def test_a_file_that_cannot_be_read_counts_as_none(tmp_path, text):
    (tmp_path / FILE).write_text(text, errors="surrogateescape")
    assert learnt(tmp_path) == learnt(tmp_path / "none") == Learnt()


def test_the_next_attempt_on_one_device_begins_with_the_size_that_fitted(tmp_path, pair, chats):
    spec, rows = TrainSpec(**SETTINGS), rows_of(pair, chats, 16)
    first = SingleDevice(spec, pair.aligned, context(tmp_path / "a"))
    out_of_memory_when(first, lambda sizes: sizes[-1] > 4)
    first.step(rows, 1e-3)
    again = SingleDevice(spec, pair.aligned, context(tmp_path / "a", micro_batch=8))
    other = SingleDevice(spec, pair.aligned, context(tmp_path / "b"))
    assert (first.micro_batch, again.micro_batch, other.micro_batch) == (4, 4, 16)


def test_members_of_a_pack_remember_it_too(tmp_path, pair, chats):
    spec, rows = TrainSpec(**SETTINGS), rows_of(pair, chats, 16)

    def members(*names: str) -> list[Member]:
        return [Member(spec, tmp_path, context(tmp_path / name), name) for name in names]

    first = members("one", "two")
    pack = Pack(first, pair.aligned)

    def hook(module, args, kwargs):
        if len(kwargs["input_ids"]) > 2 * 8:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    pack.model.register_forward_pre_hook(hook, with_kwargs=True)
    pack.backward(dict.fromkeys(first, rows))
    assert pack.micro_batch == 8
    pack.close()
    assert Pack(members("two", "three"), pair.aligned).micro_batch == 8
    assert Pack(members("three", "four"), pair.aligned).micro_batch == 16
