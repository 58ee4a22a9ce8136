"""What a report says of adapters beside their numbers."""

import json
from dataclasses import replace
from types import SimpleNamespace

from ebbline.analysis.results.adapter_notes import adapter_notes
from ebbline.tasks.measuring.completions import CHANGES_NOTHING
from tests.analysis.conftest import result

SILENT = {CHANGES_NOTHING: True}
BESIDE = {"chat": {"unused_beside_adapter": ["chat template", "vocabulary"]}}


def notes(tmp_path, records):
    """The notes on points whose measurement has these records, by the points' numbers."""
    results, files = [], {}
    for number, record in records.items():
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(record))
        files["generate", f"key{number}"] = path
        keys = {"generate:refusal[seed=0]": f"key{number}"}
        results.append(replace(result(number), keys=keys))

    def find(kind, key):
        path = files.get((kind, key))
        return None if path is None else SimpleNamespace(file=lambda name: path)

    study = SimpleNamespace(
        seeds=(0, 1),
        suites=("task", "refusal"),
        objectives=("refusal_rate", "task_accuracy"),
        kind_of=lambda part: part.partition(":")[0],
    )
    view = SimpleNamespace(study=study, home=SimpleNamespace(store=SimpleNamespace(find=find)))
    return adapter_notes(view, results)


def test_points_whose_adapter_changes_nothing_or_has_another_tokenizer_are_named(tmp_path):
    found = notes(tmp_path, {0: SILENT, 1: {}, 2: BESIDE, 4: SILENT | BESIDE})
    assert found == [
        "Points 0, 4: every update B A of the adapter is zero, so the rates are those of the model "
        "without it. Was it trained?",
        "Points 2, 4: the tokenizer beside the adapter differs from the model's in chat template, "
        "vocabulary, and was not used",
    ]
    assert notes(tmp_path, {1: {"chat": {}}}) == []
