"""A micro-batch that was halved stays halved in the next attempt of the training."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebbline.cluster.executors.executor import run_batch
from ebbline.cluster.store.artifacts import Store
from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.stage import Request
from ebbline.tasks.training.engines import SingleDevice
from ebbline.tasks.training.micro_batch import FILE, Learnt, halve_after_kills, learn, learnt
from ebbline.tasks.training.pack_engine import Member, Pack
from tests.cluster.made import stored_request
from tests.tasks.test_train import SETTINGS, out_of_memory_when, rows_of
from tests.tiny import context, write_chats


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


@given(
    seen=st.lists(st.integers(0, 5), max_size=6),
    largest=st.integers(1, 64),
    most=st.none() | st.integers(1, 64),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_kill_halves_once_however_often_it_is_reported(tmp_path, seen, largest, most):
    """A machine may hear of several kills at once, and of each again at every later attempt."""
    (tmp_path / FILE).unlink(missing_ok=True)
    learn(tmp_path, most=most)
    for count in seen:
        halve_after_kills(tmp_path, tuple(f"attempt {n}" for n in range(count)), largest)
    kills = max(seen, default=0)
    expected = max(1, min(largest, most or largest) >> kills)
    assert learnt(tmp_path).limited(largest) == expected


def test_a_training_whose_process_was_killed_continues_with_half_the_micro_batch(tmp_path, pair):
    inputs = {"model": pair.aligned, "data": write_chats(tmp_path / "rows.jsonl", 16)}
    store = Store(tmp_path / "store")
    spec = TrainSpec(**{**SETTINGS, "global_batch": 8})
    request = stored_request(store, spec, inputs, killed=("first",))
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        step = SingleDevice.step

        def noted(self, *args):
            sizes.append(self.micro_batch)
            return step(self, *args)

        patch.setattr(SingleDevice, "step", noted)
        (report,) = run_batch([Request.from_json(request.to_json())])
    assert report.error is None and set(sizes) == {4}
