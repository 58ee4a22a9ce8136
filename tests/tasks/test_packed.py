"""Packed training gives the gradients, results, checkpoints and errors of training alone.

All tests train a tiny model.
"""

import csv
import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbline.tasks.data.batches import Row, count_tokens
from ebbline.tasks.errors import Leaving, TrainingError
from ebbline.tasks.models.loading import Residents, fingerprint
from ebbline.tasks.progress import TrainedStep
from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.stage import Request
from ebbline.tasks.training.engines import SingleDevice, read_checkpoint
from ebbline.tasks.training.pack_engine import Member, Pack
from ebbline.tasks.training.packed import run
from ebbline.tasks.training.packs import common, in_packs, pack_name, packable
from ebbline.tasks.training.train import read_rows
from ebbline.tasks.worker import run_stages
from tests.tasks.test_train import SETTINGS, adapter_of, furthest, trained
from tests.tiny import context, fresh, request
from tests.tolerance import alike, apart, gamma, losses_alike, steady_adam

__all__ = ["steady_adam"]
pytestmark = pytest.mark.usefixtures("steady_adam")

OTHERS = [
    {"rank": 4, "learning_rate": 2e-2, "seed": 0},
    {"rank": 8, "learning_rate": 1e-2, "seed": 0, "gradient_norm": 0.1},
    {"rank": 4, "learning_rate": 5e-3, "seed": 1, "weight_decay": 5.0},
    {"rank": 16, "learning_rate": 1e-2, "seed": 2, "warmup_share": 0.5, "alpha_over_rank": 1.0},
]


def spec(**changes) -> TrainSpec:
    return TrainSpec(**{**SETTINGS, **changes})


def members(folder: Path, specs, residents=None, **changes) -> list[Member]:
    """Members with scratch folders ctxN, from which a pack or a training alone can continue."""
    shared = residents or Residents()
    return [
        Member(
            spec(**each) if isinstance(each, dict) else each,
            fresh(folder / f"out{number}"),
            context(folder / f"ctx{number}", residents=shared, **changes),
        )
        for number, each in enumerate(specs)
    ]


def trained_together(folder: Path, model: Path, data: Path, specs, **changes) -> list[Member]:
    pack = members(folder, specs, **changes)
    for _, error in run(pack, model, data):
        assert error is None
    return pack


def losses_of(out: Path) -> list[float]:
    with (out / TrainSpec.CURVE).open() as handle:
        return [float(row["loss"]) for row in csv.DictReader(handle)]


member_specs = st.builds(
    spec,
    rank=st.integers(1, 64),
    alpha_over_rank=st.floats(0.25, 4.0, width=32),  # a pack stores it as float32
    learning_rate=st.floats(1e-5, 1e-1),
    seed=st.integers(0, 2),
    global_batch=st.just(6),
)


@pytest.fixture(scope="module")
def in_float64(pair) -> Residents:
    """The aligned model in float64, with its adapters. Only Llama's norms and the loss compute in
    float32.
    """
    residents = Residents()
    model = residents.model(pair.aligned, "none", "float32", "cpu")[0].double()
    residents._loaded.fingerprint = fingerprint(model)  # else it would be loaded again in float32
    return residents


@settings(max_examples=25)
@given(
    specs=st.lists(member_specs, min_size=2, max_size=5),
    micro_batch=st.sampled_from([1, 4, 6]),
    zero_b=st.booleans(),
)
def test_each_members_gradients_are_those_of_training_it_alone(
    pair, chats, tmp_path_factory, in_float64, specs, micro_batch, zero_b
):
    """In float64, with different rows for each member. B is zero, as at the start, or random; with
    zero B there is no gradient on A.

    Float32 remains in each row's five norms over 64 squares and in the loss over some 50 words.
    """
    alike, residents = gamma(5 * 64 + 2 * 50), in_float64
    folder = tmp_path_factory.mktemp("gradients")
    pack = members(folder / "pack", specs, residents, micro_batch=micro_batch)
    engine = Pack(pack, pair.aligned)
    rows = read_rows(chats, engine.tokenizer, specs[0])
    batches = {member: rows[number : number + 6] for number, member in enumerate(pack)}
    starts: list[dict[str, torch.Tensor]] = []
    for number, member in enumerate(pack):
        torch.manual_seed(number)
        for name, tensor in engine.trainees[member.name].named:
            if not zero_b and "lora_B" in name:
                tensor.data.normal_(std=0.1)
        starts.append(
            {name: tensor.detach().clone() for name, tensor in engine.trainees[member.name].named}
        )
    losses = engine.backward(batches)
    together = [
        {name: tensor.grad.clone() for name, tensor in engine.trainees[member.name].named}
        for member in pack
    ]
    engine.close()
    for member, start, found in zip(pack, starts, together, strict=True):
        alone = SingleDevice(
            member.spec, pair.aligned, context(folder, residents=residents, micro_batch=micro_batch)
        )
        for name, tensor in alone.trainee.named:
            assert not zero_b or torch.equal(tensor, start[name])  # same seed, same start
            tensor.data.copy_(start[name])
        loss = gradients_of(alone, batches[member])
        assert losses[member] == pytest.approx(loss, rel=alike)
        for name, tensor in alone.trainee.named:
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(
                found[name],
                tensor.grad,
                rtol=0,
                atol=alike * float(tensor.grad.abs().max()) + 1e-12,
            )
        alone.close()


def gradients_of(engine: SingleDevice, batch: list[Row]) -> float:
    parts = [
        batch[start : start + engine.micro_batch]
        for start in range(0, len(batch), engine.micro_batch)
    ]
    return sum(engine._backward(part, count_tokens(batch)) for part in parts)


@pytest.mark.parametrize(
    ("quantisation", "dtype"),
    [("none", "float32"), ("nf4", "float32"), ("int8", "float32"), ("nf4", "bfloat16")],
)
def test_a_pack_gives_the_results_of_separate_trainings(tmp_path, pair, chats, quantisation, dtype):
    how = {"quantisation": quantisation, "dtype": dtype}
    specs = [{**each, **how} for each in OTHERS]
    pack = trained_together(tmp_path / "pack", pair.aligned, chats, specs)
    for number, each in enumerate(specs):
        out, losses = trained(tmp_path / f"alone{number}", pair.aligned, chats, **each)
        found = pack[number].out
        assert apart(adapter_of(found), adapter_of(out)) < alike(dtype, quantisation)
        assert losses_of(found) == losses_alike(losses, dtype, quantisation)
        for name in ("adapter/adapter_config.json",):
            assert (found / name).read_bytes() == (out / name).read_bytes()
        assert sorted(path.name for path in found.rglob("*")) == sorted(
            path.name for path in out.rglob("*")
        )
    # The tolerance distinguishes two members.
    assert apart(adapter_of(pack[0].out), adapter_of(pack[2].out)) > 5 * alike(dtype, quantisation)


def test_recomputing_activations_changes_nothing(tmp_path, pair, chats):
    kept = trained_together(tmp_path / "kept", pair.aligned, chats, OTHERS[:2])
    recomputed = trained_together(
        tmp_path / "recomputed", pair.aligned, chats, OTHERS[:2], gradient_checkpointing=True
    )
    for one, other in zip(kept, recomputed, strict=True):
        assert apart(adapter_of(one.out), adapter_of(other.out)) < alike()


def cut_off_at(step: int):
    def step_done(done: TrainedStep) -> None:
        if done.step > step:
            raise KeyboardInterrupt

    return step_done


def test_members_of_an_interrupted_pack_continue_in_any_grouping_and_alone(tmp_path, pair, chats):
    whole = trained_together(tmp_path / "whole", pair.aligned, chats, OTHERS)
    halves = members(tmp_path / "cut", OTHERS, checkpoint_every_s=0.0, step_done=cut_off_at(3))
    with pytest.raises(KeyboardInterrupt):
        list(run(halves, pair.aligned, chats))
    assert not any(path for member in halves for path in member.out.iterdir())
    assert [len(read_checkpoint(member.ctx).curve) for member in halves] == [3] * 4
    alone, _ = trained(
        tmp_path / "alone", pair.aligned, chats, ctx=context(tmp_path / "cut" / "ctx0"), **OTHERS[0]
    )
    assert apart(adapter_of(alone), adapter_of(whole[0].out)) < alike()
    assert losses_of(alone) == losses_alike(losses_of(whole[0].out))
    # The other three continue with a member that has not begun, so they end at another time.
    seen: list[int] = []
    late = members(tmp_path / "late", OTHERS, step_done=lambda done: seen.append(done.step))
    for number in (1, 2, 3):
        late[number].ctx.scratch.parent.mkdir(exist_ok=True)
        (tmp_path / "cut" / f"ctx{number}" / "scratch").rename(late[number].ctx.scratch)
    ended = [member for member, error in run(late, pair.aligned, chats) if error is None]
    assert ended == [late[1], late[2], late[3], late[0]]
    assert sorted(seen) == sorted([4, 5, 6] * 3 + [1, 2, 3, 4, 5, 6])
    for member, undisturbed in zip(late, whole, strict=True):
        assert apart(adapter_of(member.out), adapter_of(undisturbed.out)) < alike()
        assert losses_of(member.out) == losses_alike(losses_of(undisturbed.out))


def test_a_training_begun_alone_continues_in_a_pack(tmp_path, pair, chats):
    undisturbed, losses = trained(tmp_path / "undisturbed", pair.aligned, chats, **OTHERS[0])
    ctx = context(tmp_path / "pack" / "ctx0", checkpoint_every_s=0.0, step_done=cut_off_at(2))
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "begun", pair.aligned, chats, ctx=ctx, **OTHERS[0])
    pack = trained_together(tmp_path / "pack", pair.aligned, chats, OTHERS[:2])
    assert losses_of(pack[0].out) == losses_alike(losses)
    assert apart(adapter_of(pack[0].out), adapter_of(undisturbed)) < alike()


def test_a_pack_whose_machine_is_about_to_go_saves_every_member(tmp_path, pair, chats):
    pack = members(
        tmp_path, OTHERS[:2], checkpoint_every_s=1e9, leaving=iter([False, False, True]).__next__
    )
    with pytest.raises(Leaving, match="step 2 is saved"):
        list(run(pack, pair.aligned, chats))
    assert [len(read_checkpoint(member.ctx).curve) for member in pack] == [2, 2]


def test_a_member_with_a_non_finite_loss_fails_alone(tmp_path, pair, chats):
    wild = {"rank": 4, "learning_rate": 1e30}
    pack = members(tmp_path / "pack", [OTHERS[0], wild, OTHERS[3]])
    errors = {pack.index(member): error for member, error in run(pack, pair.aligned, chats)}
    assert list(errors) == [1, 0, 2] and errors[0] is None and errors[2] is None
    assert "the loss became nan at step 2 of 6" in str(errors[1]) and not any(pack[1].out.iterdir())
    for number in (0, 2):
        out, _ = trained(
            tmp_path / f"alone{number}", pair.aligned, chats, **[OTHERS[0], wild, OTHERS[3]][number]
        )
        assert apart(adapter_of(pack[number].out), adapter_of(out)) < alike()


def test_out_of_memory_halves_the_rows_then_the_members_and_gives_the_same_step(
    tmp_path, pair, chats
):
    residents = Residents()
    plain = trained_together(tmp_path / "plain", pair.aligned, chats, OTHERS, residents=residents)
    pack = members(tmp_path / "pack", OTHERS, residents, micro_batch=2)
    engine, sizes = Pack(pack, pair.aligned), []

    def hook(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    engine.model.register_forward_pre_hook(hook, with_kwargs=True)
    rows = read_rows(chats, engine.tokenizer, pack[0].spec)
    from ebbline.tasks.training.packed import _batch

    losses = engine.backward({member: _batch(member, rows) for member in pack})
    assert (
        sizes[:3] == [8, 4, 2]
        and set(sizes[3:]) == {2}
        and (engine.micro_batch, engine.members_at_once) == (1, 2)
    )
    assert [losses[member] for member in pack] == losses_alike(
        [losses_of(member.out)[0] for member in plain]
    )
    sizes.clear()
    engine.model.register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError()), with_kwargs=True
    )
    with pytest.raises(TrainingError, match="out of memory with one row"):
        engine.backward({member: _batch(member, rows) for member in pack})


def test_a_pack_leaves_the_base_unchanged(tmp_path, pair, chats):
    residents = Residents()
    before, _ = trained(
        tmp_path / "before",
        pair.aligned,
        chats,
        ctx=context(tmp_path / "c", residents=residents),
        quantisation="nf4",
    )
    specs = [{**each, "quantisation": "nf4"} for each in OTHERS[:2]]
    trained_together(
        tmp_path / "pack",
        pair.aligned,
        chats,
        specs,
        residents=residents,
        gradient_checkpointing=True,
    )
    after, _ = trained(
        tmp_path / "after",
        pair.aligned,
        chats,
        ctx=context(tmp_path / "d", residents=residents),
        quantisation="nf4",
    )
    assert residents.loads == 1
    assert furthest(adapter_of(before), adapter_of(after)) == 0.0


def test_trainings_that_cannot_be_one_pack_are_an_error_that_names_the_fields(
    tmp_path, pair, chats
):
    for changes, words in [
        ({"global_batch": 8, "quantisation": "nf4"}, r"global_batch \(16 and 8\)"),
        ({"dropout": 0.1}, "dropout 0.1 cannot be trained in a pack"),
        ({"method": "full"}, "method 'full'"),
    ]:
        pack = members(tmp_path / words[:5], [{}, changes])
        with pytest.raises(TrainingError, match=words):
            list(run(pack, pair.aligned, chats))


def test_only_lora_without_dropout_on_the_same_base_data_and_length_may_be_packed():
    contents = {"model": "m", "data": "d"}
    name = pack_name(spec(), contents)
    assert name and {pack_name(spec(**each), contents) for each in OTHERS} == {name}
    for other in (
        spec(steps=4, epochs=1.0),
        spec(global_batch=8),
        spec(quantisation="nf4"),
        spec(target_modules=("q_proj",)),
    ):
        assert pack_name(other, contents) != name
    assert pack_name(spec(), {**contents, "data": "e"}) != name
    assert pack_name(spec(dropout=0.1), contents) == pack_name(spec(method="full"), contents) == ""
    assert packable(spec()) and "rank" not in common(spec())


@given(
    st.lists(
        st.tuples(st.sampled_from(["", "p", "q"]), st.sampled_from([0.2, 1 / 3, 0.5, 1.0])),
        max_size=12,
    )
)
def test_a_batch_is_split_into_packs_that_fit_and_keeps_its_order(shape):
    requests = [
        Request(str(number), "train", {}, {}, {}, "", "", "", pack=pack, pack_share=share)
        for number, (pack, share) in enumerate(shape)
    ]
    packs = list(in_packs(requests))
    assert [one for pack in packs for one in pack] == requests
    for pack in packs:
        assert len({one.pack for one in pack}) == 1
        assert len(pack) == 1 or (pack[0].pack and sum(one.pack_share for one in pack) <= 1 + 1e-6)
    for one, other in itertools.pairwise(packs):  # neighbours of one name would not fit together
        same_name = one[0].pack and one[0].pack == other[0].pack
        assert not same_name or sum(each.pack_share for each in [*one, other[0]]) > 1


def pack_requests(folder: Path, pair, chats, specs, **changes) -> list[Request]:
    inputs = {"model": pair.aligned, "data": chats}
    return [
        request(
            spec(**each),
            inputs,
            folder / f"r{number}",
            **{"pack": "p", "pack_share": 1 / len(specs), **changes},
        )
        for number, each in enumerate(specs)
    ]


def test_a_worker_reports_each_member_of_a_pack_as_its_own_stage(tmp_path, pair, chats):
    requests = pack_requests(tmp_path / "pack", pair, chats, OTHERS)
    separate = pack_requests(tmp_path / "apart", pair, chats, OTHERS, pack="")
    reports = {report.key: report for report in run_stages(requests)}
    assert [report.error for report in run_stages(separate)] == [None] * 4
    assert reports.keys() == {one.key for one in requests} == {one.key for one in separate}
    for one, other in zip(requests, separate, strict=True):
        report = reports[one.key]
        assert report.error is None and report.environment["packed"] == 4
        assert apart(adapter_of(Path(one.out)), adapter_of(Path(other.out))) < alike()
        progress = json.loads((Path(one.log) / "progress.json").read_text())
        assert progress["done"] == progress["total"] == 6
    pack_s = max(report.environment["pack_seconds"] for report in reports.values())
    assert 0 < sum(report.seconds for report in reports.values()) <= pack_s + 0.01, (
        "the members' times add up to at most the pack's time"
    )


def test_a_failed_pack_is_rerun_one_by_one_and_each_member_has_its_own_error(
    tmp_path, pair, chats, monkeypatch, caplog
):
    from ebbline.tasks.training import pack_engine

    def broken(*_):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(pack_engine.Pack, "backward", broken)
    requests = pack_requests(tmp_path, pair, chats, [OTHERS[0], {"learning_rate": 1e30}, OTHERS[2]])
    reports = list(run_stages(requests))
    assert [report.error_type for report in reports] == [None, "TrainingError", None]
    assert (
        "the loss became nan" in reports[1].error
        and "3 trainings failed as a pack (RuntimeError)" in caplog.text
    )
    assert "shapes cannot be multiplied" in (Path(requests[0].log) / "pack_error.txt").read_text()
    assert "packed" not in reports[0].environment


def test_members_that_cannot_begin_do_not_break_the_pack(tmp_path, pair, chats):
    requests = pack_requests(tmp_path, pair, chats, OTHERS[:3])
    requests[1] = Request(**{**vars(requests[1]), "spec": {"rank": 0}})
    reports = list(run_stages(requests))
    assert [report.key for report in reports] == [requests[number].key for number in (1, 0, 2)]
    assert reports[0].error_type == "ValidationError" and [
        report.environment["packed"] for report in reports[1:]
    ] == [2, 2]


def test_a_worker_that_must_leave_reports_leaving_for_every_member(tmp_path, pair, chats):
    answers = iter([False] * 5 + [True] * 9)
    reports = list(
        run_stages(pack_requests(tmp_path, pair, chats, OTHERS[:2]), leaving=lambda: next(answers))
    )
    assert [report.error_type for report in reports] == ["Leaving", "Leaving"]
