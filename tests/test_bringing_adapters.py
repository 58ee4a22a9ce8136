"""The study of docs/bringing-adapters.md, run with adapters that TRL trained on a tiny model."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from typer.testing import CliRunner

from ebbline.cli import app
from ebbline.tasks.identity import content_digest
from tests.brought import adapter_folder, with_layout
from tests.pages import DOCS, blocks
from tests.tiny import Pair, write_lines

pytestmark = [pytest.mark.model, pytest.mark.process]


def trained_by_trl(folder: Path, model: Path, rank: int) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"word{number} word{number + 1}"},
                {"role": "assistant", "content": f"word{number + 2} word3"},
            ]
        }
        for number in range(16)
    ]
    settings = SFTConfig(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        save_steps=2,
        learning_rate=1e-2,
        max_length=64,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    trainer.save_model()


def command(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_trl_become_the_points_of_the_pages_study(pair: Pair, tmp_path: Path) -> None:
    """Only here an adapter that another tool trained goes through a whole study."""
    mine = tmp_path / "mine"
    for name, model in (("base", pair.base), ("aligned", pair.aligned)):
        shutil.copytree(model, mine / name)
    trained_by_trl(mine / "trl-run", mine / "aligned", rank=4)
    adapter_folder(mine / "axolotl-run", {"q_proj": (64, 64), "v_proj": (64, 32)})
    with_layout(mine / "axolotl-run", "axolotl")
    assert (mine / "trl-run" / "checkpoint-2" / "optimizer.pt").exists()
    (mine / "refuse.csv").write_text("prompt\n" + "".join(f"word{n} word9\n" for n in range(6)))
    tasks = [{"prompt": f"word{n} word8", "answer": f"word{n}"} for n in range(6)]
    write_lines(mine / "task.jsonl", tasks)
    (study,) = (each for each in blocks(DOCS / "bringing-adapters.md") if each.title)
    assert study.title == "mine/adapters.yaml"
    # The random model refuses nothing; below its floor nothing could be exported
    text = study.text.replace("refusal_floor: 0.9 ", "refusal_floor: 0.0 ")
    (tmp_path / study.title).write_text(text)
    pinned, home = mine / "pinned.yaml", tmp_path / "home"
    command("pin", mine / "adapters.yaml", "--to", pinned)
    asked = ["run", pinned, "--home", home, "--executor", "inline", "--no-wandb", "--json"]
    outcome = json.loads(command(*asked))
    assert outcome["exit_code"] == 0
    frame = pd.read_csv(home / "studies" / "my-adapters" / "results.csv")
    assert list(frame["adapter"]) == ["first"] * 4 + ["second"] * 4
    assert set(frame["status"]) == {"done"} and set(frame["seeds"]) == {1}
    shares = frame.groupby("adapter")["projected_share"].max()
    assert (shares > 0).all() and not any(column.startswith("train") for column in frame)
    assert "first" in (home / "studies" / "my-adapters" / "report.html").read_text("utf-8")
    out = tmp_path / "out"
    command("pick", pinned, "--home", home, "--accept-unsure", "--export", out, "--with-base")
    assert "trained outside this study" in (out / "README.md").read_text("utf-8")
    base = json.loads((out / "pick.json").read_text())["base"]
    assert base["content_sha256"] == content_digest(mine / "aligned")
    assert (out / "aligned" / "model.safetensors").exists()
