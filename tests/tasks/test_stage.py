"""Stages: which differences make two stages different, and which never do."""

from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbline.tasks.errors import StudyError
from ebbline.tasks.identity import digest
from ebbline.tasks.kinds import STAGE_KINDS, parsed_spec, request_payload
from ebbline.tasks.specs import ApplySpec, DataSpec, ProjectSpec, TrainSpec
from ebbline.tasks.stage import (
    Context,
    FollowUp,
    Part,
    Request,
    Source,
    Stage,
    key_payload,
    spec_payload,
)
from tests.tasks.test_golden_keys import SPECS

POOL = Source("a" * 64, "/data/pool.jsonl")


def data(size: int = 10, pool: Source = POOL) -> Stage:
    return Stage(DataSpec(size=size), {"pool": pool})


def train(rank: int = 8, stage: Stage | None = None) -> Stage:
    return Stage(
        TrainSpec(rank=rank),
        {"model": Source("b" * 64, "/m"), "data": Part(stage or data(), "data.jsonl")},
    )


def test_equal_stages_have_one_lineage():
    assert train().lineage == train().lineage


def test_lineage_depends_on_the_spec_the_inputs_and_all_stages_upstream():
    variants = [
        train(),
        train(rank=4),
        train(stage=data(20)),
        train(stage=data(pool=Source("c" * 64, "/data/pool.jsonl"))),
    ]
    # The whole artifact, not a part of it
    variants.append(Stage(TrainSpec(), {"model": Source("b" * 64, "/m"), "data": data()}))
    variants.append(
        Stage(TrainSpec(), {"model": Source("b" * 64, "/m"), "data": Part(data(), "other.jsonl")})
    )
    assert len({stage.lineage for stage in variants}) == len(variants)


def test_the_location_of_pinned_content_is_not_in_a_lineage():
    assert data(pool=Source("a" * 64, "/elsewhere")).lineage == data().lineage


def test_the_order_of_the_inputs_is_irrelevant():
    one = Stage(ApplySpec(), {"adapter": POOL, "projection": Source("d" * 64, "/p")})
    other = Stage(ApplySpec(), {"projection": Source("d" * 64, "/p"), "adapter": POOL})
    assert one.lineage == other.lineage
    assert list(one.inputs) == list(other.inputs)


def test_upstream_holds_stages_and_no_pinned_content():
    read = data()
    assert train(stage=read).upstream() == (read,)
    assert data().upstream() == ()


def test_a_key_hashes_the_content_of_inputs_and_every_default_of_the_spec():
    payload = key_payload(TrainSpec(), {"model": "1", "data": "2"})
    assert set(payload) == {"kind", "version", "spec", "inputs"}
    off = {"penalty", "penalty_weight", "ema_decay"}  # in a key only where they are on
    assert set(payload["spec"]) == set(TrainSpec.model_fields) - off
    on = TrainSpec(penalty="norm", penalty_weight=0.5, ema_decay=0.9)
    assert set(key_payload(on, {})["spec"]) == set(TrainSpec.model_fields)
    keys = {
        digest(payload),
        digest(key_payload(TrainSpec(), {"model": "1", "data": "3"})),
        digest(key_payload(TrainSpec(rank=4), {"model": "1", "data": "2"})),
        digest({**payload, "version": payload["version"] + 1}),
        digest({**payload, "kind": "apply"}),
    }
    assert len(keys) == 5


def test_no_setting_of_the_context_reaches_a_key():
    # The context's rank is a member's number in its gang; a Spec's is the rank of a LoRA
    context_names = {field.name for field in fields(Context)} - {"rank"}
    for kind in STAGE_KINDS.values():
        assert not context_names & set(kind.spec.model_fields), kind.name
    request = example_request()
    other = Request(
        **{
            **vars(request),
            "gpus": 4,
            "device": "cuda",
            "threads": 3,
            "micro_batch": 2,
            "log": "/l",
            "scratch": "/s",
            "out": "/o",
        }
    )
    assert digest(request_payload(other)) == digest(request_payload(request))


def example_request() -> Request:
    spec, contents = SPECS["train"]
    return Request(
        key=digest(key_payload(spec, contents)),
        kind="train",
        spec=spec.model_dump(mode="json"),
        inputs={"model": "/m", "data": "/d"},
        contents=contents,
        out="/out",
        log="/log",
        scratch="/scratch",
        micro_batch=4,
    )


@pytest.mark.parametrize("name", SPECS)
def test_a_request_of_every_stage_kind_survives_json(name):
    spec, contents = SPECS[name]
    sent = Request(
        digest(key_payload(spec, contents)),
        spec.KIND,
        spec.model_dump(mode="json"),
        {},
        contents,
        "/o",
        "/l",
        "/s",
        follow_ups=(FollowUp("score", {"scorer": "x"}, {"generation": ""}, {}, {}, "abc"),),
    )
    received = Request.from_json(sent.to_json())
    assert received == sent
    assert parsed_spec(received) == spec
    assert digest(request_payload(received)) == received.key


@given(threshold=st.none() | st.floats(-1, 1))
def test_a_threshold_reaches_a_worker_to_the_last_bit(threshold):
    spec = ApplySpec(threshold=threshold)
    sent = Request("k", "apply", spec.model_dump(mode="json"), {}, {}, "/o", "/l", "/s")
    assert parsed_spec(Request.from_json(sent.to_json())) == spec


def test_an_unknown_stage_kind_is_an_error_that_names_it():
    with pytest.raises(StudyError, match="no stage kind 'distil'"):
        parsed_spec(Request("k", "distil", {}, {}, {}, "/o", "/l", "/s"))


def test_a_requests_context_has_its_folders_and_the_given_changes():
    ctx = example_request().context(rank=1, world_size=2)
    assert (ctx.log, ctx.scratch, ctx.micro_batch) == (Path("/log"), Path("/scratch"), 4)
    assert (ctx.rank, ctx.world_size) == (1, 2)


def test_specs_are_strict_and_frozen():
    with pytest.raises(ValueError, match="rnak"):
        TrainSpec(rnak=4)
    with pytest.raises(ValueError, match="rank"):
        TrainSpec(rank="8")
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        TrainSpec(rank=0)
    with pytest.raises(ValueError, match="frozen"):
        TrainSpec().rank = 4
    with pytest.raises(ValueError, match="cannot be quantised"):
        TrainSpec(method="full", quantisation="nf4")
    with pytest.raises(ValueError, match="not both"):
        ApplySpec(threshold=0.1, modules=2)
    for wrong in ({"energy": 0.9}, {"projector": "exact"}):
        with pytest.raises(ValueError, match="the approximate one has none"):
            ProjectSpec(**wrong)


def test_the_scorer_and_its_measure_are_hashed():
    assert spec_payload(SPECS["score"][0])["spec"] == {
        "measure": "refusal",
        "scorer": "prefix",
        "also": [],
    }
