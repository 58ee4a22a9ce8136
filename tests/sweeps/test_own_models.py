"""A study of a newcomer's model: without a base, and with a chat template from a file."""

import pytest

from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Point
from ebbline.sweeps.study.stages import StageGraph
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.study_file import as_yaml, parse
from ebbline.tasks.errors import StudyError
from ebbline.tasks.specs import DEFAULT_CHAT, TrainSpec

SHA = "0" * 64
STUDY = f"""
study: own
question: q
models:
  one:
    aligned: {{path: {{path: chat, sha256: "{SHA}"}}}}
    chat_template: t.jinja
data: {{pool: {{path: {{path: rows.jsonl, sha256: "{SHA}"}}}}, settings: {{size: 4}}}}
train: {{steps: 1}}
axes: {{train.rank: [2, 4]}}
suites:
  refusal: {{prompts: {{path: {{path: p.csv, sha256: "{SHA}"}}}}, measure: {{kind: refusal}}}}
objectives: [refusal_rate]
"""
TEMPLATE = "{% for m in messages %}{{ m.content }}: 'x'\n{% endfor %}"


@pytest.fixture
def file(tmp_path):
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path / "study.yaml"


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("[2, 4]", "[2, 4], apply.threshold: [null, 0.4]", "apply.threshold"),
        ("suites:", "apply: {threshold: 0.4}\nsuites:", "leave apply out"),
        (
            "suites:",
            "project: {projector: exact, energy: 0.9}\nsuites:",
            "project: it has no effect",
        ),
    ],
)
def test_a_projection_without_a_base_is_an_error_that_names_it(file, old, new, named):
    file.write_text(STUDY.replace(old, new))
    with pytest.raises(StudyError, match="base") as caught:
        parse(file)
    assert named in str(caught.value)


def test_a_study_without_a_base_reads_no_second_model(file, tmp_path):
    graph = StageGraph(parse(file), Home(tmp_path / "home"), located=False)
    study = graph.study
    stages = graph.stages_for(Point("one", (("train.rank", 2),)))
    assert set(stages["project[seed=0]"].inputs) == {"adapter"}
    assert study.models["one"].base is None


def test_the_template_of_a_file_is_a_setting_that_outlives_the_file(file, tmp_path):
    study = parse(file)
    chat = study.models["one"].chat
    assert chat.text == TEMPLATE
    (tmp_path / "t.jinja").unlink()
    stored = Study.model_validate_json(study.model_dump_json())
    assert stored.model_dump() == study.model_dump() and stored.models["one"].chat == chat
    file.write_text(as_yaml(study))
    assert parse(file).models["one"].chat == chat
    file.write_text(STUDY)
    with pytest.raises(StudyError, match=r"t\.jinja cannot be read"):
        parse(file)


def test_without_a_template_of_its_own_a_key_has_no_field_for_it():
    assert "text" not in DEFAULT_CHAT.model_dump()
    assert "text" not in TrainSpec().model_dump(mode="json")["chat"]


def test_a_template_by_name_and_one_by_file_are_an_error(file):
    file.write_text(STUDY.replace("t.jinja", "t.jinja\n    chat: {template: x}"))
    with pytest.raises(StudyError, match="not both"):
        parse(file)
