"""Names from data: each becomes a path below its folder, or is an error."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebbline.tasks.errors import DataError, ModelError
from ebbline.tasks.identity import content_digest
from ebbline.tasks.paths import check_named_files, files_below, inside, is_inside

PARTS = st.sampled_from(["..", ".", "", "a", "b.c", "~", "a\\b", "x\n", "\0", "/", "C:", "é", "-x"])
NAMES = st.lists(PARTS, min_size=1, max_size=5).map("/".join) | st.text(max_size=12)


@given(NAMES)
def test_a_name_becomes_a_path_below_its_folder_or_an_error(name):
    folder = Path("/models/mine")
    try:
        path = inside(folder, name, folder / "index.json")
    except ModelError as error:
        assert str(folder / "index.json") in str(error) and not is_inside(name)
    else:
        assert Path(os.path.normpath(path)).is_relative_to(folder) and path != folder


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    NAMES, st.sampled_from(["model.safetensors.index.json", "adapter_model.safetensors.index.json"])
)
def test_an_index_entry_that_leaves_its_folder_is_an_error_of_the_pin(tmp_path, name, index):
    (tmp_path / index).write_text(json.dumps({"weight_map": {"w": name}}))
    if is_inside(name):
        check_named_files(tmp_path)
    else:
        for read in (check_named_files, content_digest):
            with pytest.raises(ModelError, match=r"inside its folder"):
                read(tmp_path)
    (tmp_path / index).unlink()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"transformers_weights": "../other.safetensors"}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["/x/tokenizer.4.0.json"]}),
    ],
)
def test_a_config_that_names_a_file_outside_is_an_error(tmp_path, file, content):
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=file):
        content_digest(tmp_path)


@pytest.mark.parametrize("target", ["outside", "outside/weights", "..", "model", "nowhere"])
def test_a_link_that_leaves_its_folder_or_leads_nowhere_is_an_error_that_names_it(tmp_path, target):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "weights").write_text("w")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "link").symlink_to(tmp_path / target)
    with pytest.raises(DataError, match=r"model/link is a link to"):
        content_digest(model)


def test_a_linked_folder_inside_is_part_of_the_pin(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "weights").write_text("one")
    (tmp_path / "link").symlink_to("real")
    assert set(files_below(tmp_path)) == {"real/weights", "link/weights"}
    before = content_digest(tmp_path)
    (tmp_path / "real" / "weights").write_text("two")
    assert content_digest(tmp_path) != before


def test_a_snapshot_of_the_hubs_cache_may_link_to_its_own_blobs_only(tmp_path):
    mine, other = (tmp_path / f"models--org--{name}" for name in ("mine", "other"))
    for repository in (mine, other):
        (repository / "blobs").mkdir(parents=True)
        (repository / "blobs" / "abc").write_text(repository.name)
    snapshot = mine / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert list(files_below(snapshot)) == ["config.json"]
    (snapshot / "theirs").symlink_to(other / "blobs" / "abc")
    with pytest.raises(DataError, match="theirs is a link to"):
        files_below(snapshot)
