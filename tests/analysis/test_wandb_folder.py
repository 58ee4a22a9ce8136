"""A study's pages as plain files, for whatever tracker people use."""

import csv
import json
from pathlib import Path

from ebbline.analysis.wandb.folder import write_pages
from ebbline.cluster.profile import Profile
from ebbline.cluster.store.artifacts import Store
from ebbline.sweeps.study.study import Study
from ebbline.tasks.identity import digest
from ebbline.tasks.progress import STEPS
from tests.analysis.conftest import failed, result


def test_the_files_hold_what_wandb_would_show_and_are_written_once(
    study: Study, tmp_path: Path
) -> None:
    hashed = {"kind": "train", "version": 1, "spec": {"rank": 8}, "inputs": {}}
    store = Store(tmp_path / "store")
    attempt = store.begin("train", digest(hashed))
    (attempt / "payload" / "curve.csv").write_text(
        "step,loss,learning_rate,tokens\n1,2.5,0.0002,512\n2,1.25,0.0001,500\n"
    )
    (attempt / "log" / STEPS).write_text(
        '{"step": 1, "steps": 2, "loss": 2.5, "learning_rate": 0.0002, "tokens": 512, '
        '"seconds": 2.0}\n'
    )
    training = store.commit(attempt, hashed, {"seconds": 3.0})
    results = [result(0, refusal=0.4), failed(1, f"no such file {tmp_path}/x.json on gpu-12")]
    folder = tmp_path / "pages"

    def write() -> int:
        return write_pages(folder, study, results, [training], Profile(), "0123456789", ["gpu-12"])

    assert write() == 3 and write() == 0
    runs = {
        run["job_type"] + run["status"]: (run, path.parent)
        for path in folder.glob("runs/*/run.json")
        for run in [json.loads(path.read_text())]
    }
    point, _ = runs["pointfinished"]
    assert point["summary"]["refusal/refusal_rate"] == 0.4 and "small" in point["tags"]
    broken, _ = runs["pointfailed"]
    assert broken["summary"]["reason"] == "no such file x.json on (a host)"
    train, place = runs["trainingfinished"]
    assert train["notes"].startswith("`ebbline rerun HOME/store/train/")
    with (place / "history.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    # A step that the log lacks comes from the curve
    assert [(row["loss"], row["tokens_per_s"]) for row in rows] == [("2.5", "256.0"), ("1.25", "")]
    with (folder / "points.csv").open(newline="") as handle:
        assert [row["point"] for row in csv.DictReader(handle)] == ["0"]
    assert not [path for path in folder.rglob("*.*") if str(tmp_path) in path.read_text()]
