"""The commands as a user types them, really launched."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.scinet.data.failing_server import FailingServer

SMALLEST_RUN = ("config.yaml", "environment.json", "metrics.jsonl", "evaluation.json", "report.html", "checkpoints")
STEP_KEYS = {
    "step",
    "samples_seen",
    "loss/supervised",
    "loss/consistency_weak",
    "loss/consistency_medium",
    "loss/distillation",
    "loss/total",
    "learning_rate",
    "gradient_norm",
    "samples_per_second",
    "data_wait_share",
    "known_ratio",
    "pseudo_positives",
    "pseudo_precision",
    "pseudo_recall",
}
METRIC_KEYS = {
    "mean_average_precision",
    "per_class_average_precision",
    "excluded_classes",
    "class_precision",
    "class_recall",
    "class_f1",
    "overall_precision",
    "overall_recall",
    "overall_f1",
}
ENVIRONMENT_KEYS = {"command", "packages", "git_revision", "weights_sha256", "data_card_sha256", "world_size"}


def _rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _steps(run: Path) -> list[dict[str, Any]]:
    return [row for row in _rows(run) if "loss/total" in row]


def _evaluation(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    return found


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def _assert_whole(run: Path, *, world_size: int) -> None:
    assert all((run / name).exists() for name in SMALLEST_RUN), sorted(run.iterdir())
    environment = json.loads((run / "environment.json").read_text())
    assert environment.keys() >= ENVIRONMENT_KEYS
    assert environment["world_size"] == world_size
    assert environment["packages"]["deepspeed"]
    assert [row["step"] for row in _steps(run)] == [1, 2]
    assert all(row.keys() >= STEP_KEYS for row in _steps(run))
    evaluation = _evaluation(run)
    assert evaluation["zero_shot"].keys() >= METRIC_KEYS
    for moment in ("selected", "last"):
        for who in ("teacher", "student"):
            metrics = evaluation[moment][who]
            assert metrics.keys() >= METRIC_KEYS
            assert 0 <= metrics["mean_average_precision"] <= 100
            assert len(metrics["per_class_average_precision"]) == len(evaluation["class_names"])
    checkpoints = {path.name for path in (run / "checkpoints").rglob("*.safetensors")}
    parts = {f"part-{rank:05d}-of-{world_size:05d}.safetensors" for rank in range(world_size)}
    assert checkpoints == {"teacher.safetensors", "student.safetensors", "bank.safetensors", *parts}
    page = (run / "report.html").read_text()
    assert "<html" in page
    assert 'src="http' not in page  # self-contained
    assert not list(run.rglob("*.part"))


def test_deepspeed_command_leaves_a_whole_run_directory(trained: Path) -> None:
    _assert_whole(trained, world_size=1)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("command", "world_size"),
    [
        (("deepspeed", "--num_gpus", "2", "scinet/train.py"), 2),
        (("torchrun", "--nproc-per-node", "2", "scinet/train.py"), 2),
        ((sys.executable, "scinet/train.py", "--local-rank=0"), 1),
    ],
    ids=["deepspeed", "torchrun", "python"],
)
def test_other_launchers_leave_a_whole_run_directory_with_equal_losses(
    launch: Any, train: Any, small: tuple[str, ...], tmp_path: Path, command: tuple[str, ...], world_size: int
) -> None:
    assert train(*small, f"output={tmp_path}", "name=alone").status == 0
    done = launch(*command, *small, f"output={tmp_path}", "name=run")
    assert done.returncode == 0, done.stderr[-3000:]
    _assert_whole(tmp_path / "run", world_size=world_size)
    assert done.stderr.count("zero-shot mAP") == 1, "one rank speaks"
    for row, want in zip(_steps(tmp_path / "run"), _steps(tmp_path / "alone"), strict=True):
        assert row["loss/total"] == pytest.approx(want["loss/total"], rel=1e-5)
        assert row["gradient_norm"] == pytest.approx(want["gradient_norm"], rel=1e-5)


def test_both_spellings_of_local_rank_are_accepted() -> None:
    from scinet import train

    for word in ("--local_rank=0", "--local-rank=0"):
        assert train.main([word, "no_such_key=1"]) == 2


def test_evaluate_repeats_the_selected_test_metrics(trained: Path, scinet: Any) -> None:
    result = scinet("evaluate", "--run", trained, "--json")
    assert result.status == 0, result.err
    printed = json.loads(result.out)
    for who in ("teacher", "student", "fused"):
        want = _evaluation(trained)["selected"][who]["mean_average_precision"]
        assert printed[who]["mean_average_precision"] == pytest.approx(want, abs=0.5)
    text = scinet("evaluate", "--run", trained)
    assert text.status == 0
    assert "teacher: mAP" in text.out
    assert "fused: mAP" in text.out


def test_bank_goes_where_the_run_goes(trained: Path, unseen: Path, scinet: Any, tmp_path: Path) -> None:
    plain = scinet("predict", "--run", trained, unseen, "--csv")
    fused = scinet("predict", "--run", trained, unseen, "--csv", "--fused")
    assert (plain.status, fused.status) == (0, 0), fused.err
    assert plain.out != fused.out
    moved = tmp_path / "elsewhere"
    shutil.copytree(trained, moved)
    again = scinet("predict", "--run", moved, unseen, "--csv", "--fused")
    assert again.out == fused.out
    (moved / "checkpoints" / "selected" / "bank.safetensors").unlink()
    without = scinet("predict", "--run", moved, unseen, "--fused")
    assert without.status == 1
    assert f"error: {moved} has no bank" in without.err
    assert scinet("evaluate", "--run", moved).status == 0


def test_known_labels_and_reasons_are_of_the_bank(trained: Path, unseen: Path, scinet: Any, tmp_path: Path) -> None:
    first, second, *_ = _evaluation(trained)["class_names"]
    table = tmp_path / "known.csv"
    table.write_text(f"file,{second},{first}\na red.jpg,0,1\nelsewhere.jpg,1,\n")
    words = ("predict", "--run", trained, unseen, "--fused", "--json", "--top", 99)
    plain = [json.loads(line) for line in scinet(*words).out.splitlines()]
    result = scinet(*words, "--known", table, "--why", 2)
    assert result.status == 0, result.err
    assert "1 of 2 rows" in result.err
    red, *others = [json.loads(line) for line in result.out.splitlines()]
    assert (red["classes"][first], red["classes"][second]) == (1.0, 0.0)
    assert [found["classes"] for found in others] == [found["classes"] for found in plain[1:]]
    assert [len(found["why"]) for found in (red, *others)] == [2, 2, 2]
    near = red["why"][0]
    assert near["weight"] >= red["why"][1]["weight"] > 0
    assert near["id"].startswith("scene-")
    assert set(near["present"]).isdisjoint(near["absent"])
    for wrong, said in (
        (("--known", table), "--known needs --fused"),
        (("--fused", "--why", 1, "--csv"), "--why and --csv exclude each other"),
        (("--fused", "--known", tmp_path / "known-labels.csv"), "did you mean"),
    ):
        refused = scinet("predict", "--run", trained, unseen, *wrong)
        assert refused.status != 0
        assert said in refused.err


def test_labels_are_completed_with_their_reasons(trained: Path, scinet: Any, tmp_path: Path) -> None:
    out = tmp_path / "labels.csv"
    result = scinet("complete", "--run", trained, "--out", out)
    assert result.status == 0, result.err
    assert "Q on hidden cells: mAP" in result.out
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    class_names = _evaluation(trained)["class_names"]
    assert [row["class"] for row in rows[: len(class_names)]] == class_names
    assert len(rows) % len(class_names) == 0
    known = [row for row in rows if row["known"]]
    assert 0 < len(known) < len(rows)
    assert all(float(row["confidence"]) == float(row["known"]) for row in known)
    assert any(float(row["confidence"]) != float(row["teacher"]) for row in rows if not row["known"])
    again = scinet("complete", "--run", trained, "--out", out)
    assert again.status == 2
    assert "exists: name another file" in again.err


def test_evaluate_reads_other_shards_by_http(trained: Path, scenes: Path, scinet: Any) -> None:
    server = FailingServer(scenes)
    try:
        result = scinet("evaluate", "--run", trained, "--data", server.url, "--json")
    finally:
        server.close()
    assert result.status == 0, result.err
    assert json.loads(result.out)["data"] == server.url
    local = scinet("evaluate", "--run", trained, "--json")
    assert json.loads(result.out)["teacher"] == json.loads(local.out)["teacher"]


@pytest.fixture(scope="module")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unseen")
    Image.new("RGB", (50, 30), "red").save(folder / "a red.jpg")
    Image.new("L", (30, 50), 128).save(folder / "b-grey.png")
    Image.new("RGBA", (40, 40), (0, 0, 255, 100)).save(folder / "c-transparent.webp")
    return folder


def test_predict_prints_text_json_and_csv(trained: Path, unseen: Path, scinet: Any) -> None:
    class_names = _evaluation(trained)["class_names"]
    text = scinet("predict", "--run", trained, unseen, "--top", 3)
    assert text.status == 0, text.err
    assert len(text.out.splitlines()) == 3
    assert text.out.startswith(f"{unseen / 'a red.jpg'}: ")

    as_json = scinet("predict", "--run", trained, unseen, "--json", "--top", 2)
    objects = [json.loads(line) for line in as_json.out.splitlines()]
    assert [Path(found["file"]).name for found in objects] == ["a red.jpg", "b-grey.png", "c-transparent.webp"]
    assert all(len(found["classes"]) == 2 and set(found["classes"]) <= set(class_names) for found in objects)

    as_csv = scinet("predict", "--run", trained, unseen / "b-grey.png", "--csv")
    header, row = list(csv.reader(io.StringIO(as_csv.out)))
    assert header == ["file", *class_names]
    assert all(0 <= float(value) <= 1 for value in row[1:])
    best = max(zip(class_names, map(float, row[1:]), strict=True), key=lambda pair: pair[1])
    assert best[1] == pytest.approx(max(objects[1]["classes"].values()), abs=1e-3)


def test_predict_skips_an_unreadable_image_and_goes_on(
    trained: Path, unseen: Path, scinet: Any, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes((unseen / "a red.jpg").read_bytes()[:200])
    text = tmp_path / "text.png"
    text.write_text("no image")
    result = scinet("predict", "--run", trained, broken, unseen / "a red.jpg", text, unseen / "b-grey.png")
    assert result.status == 1
    assert len(result.out.splitlines()) == 2
    assert str(broken) in result.err
    assert str(text) in result.err
    assert "2 of 4 images could not be read" in result.err
    assert "Traceback" not in result.err


def test_show_prints_the_headline(trained: Path, scinet: Any) -> None:
    result = scinet("show", "--run", trained)
    assert result.status == 0, result.err
    assert "Zero-shot test mAP" in result.out
    assert str(trained / "report.html") in result.out


_HELP = """
import contextlib, io, sys
from scinet import cli
COMMANDS = [[], ["data"], ["data", "build"], ["data", "build", "scenes"], ["data", "build", "csv"],
            ["data", "build", "jsonl"], ["train"], ["evaluate"], ["predict"], ["show"], ["compare"],
            ["bench"], ["bench", "fusion"], ["bench", "step"]]
for words in COMMANDS:
    sys.argv = ["scinet", *words, "--help"]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        status = cli.main()
    assert status == 0, (words, status)
    assert "Usage: " in shown.getvalue(), words
assert not {"torch", "deepspeed"} & set(sys.modules), "help must come at once"
"""


_IMPORTED = """
import sys
from scinet import cli, train
is_training = sys.argv[1] == "train"
status = train.main(sys.argv[2:]) if is_training else cli.main()
print("imported:", *sorted(name for name in sys.modules if "." not in name))
print("compiler:", "torch._dynamo.symbolic_convert" in sys.modules)
print("models:", "torchvision.models.resnet" in sys.modules)
sys.exit(status)
"""
NEVER = {
    "transformers",
    "timm",
    "open_clip",
    "matplotlib",
    "ray",
    "scipy",
    "sklearn",
    "pandas",
    "wandb",
    "sympy",
    "optuna",
}


def _imported(text: str) -> set[str]:
    (line,) = [line for line in text.splitlines() if line.startswith("imported: ")]
    return set(line.split()[1:])


def test_training_on_cached_features_imports_only_what_it_uses(
    launch: Any, trained: Path, small: tuple[str, ...], tmp_path: Path
) -> None:
    del trained  # has left the features behind
    words = (*small, "model.backbone=embedded", f"output={tmp_path}", "name=run")
    done = launch(sys.executable, "-c", _IMPORTED, "train", *words)
    assert done.returncode == 0, done.stderr
    assert "compiler: False" in done.stdout
    assert _imported(done.stdout) & (NEVER | {"torchvision", "tensorboardX"}) == set(), done.stderr


def test_prediction_imports_only_what_it_uses(launch: Any, trained: Path, unseen: Path) -> None:
    done = launch(sys.executable, "-c", _IMPORTED, "predict", "--run", trained, unseen)
    assert done.returncode == 0, done.stderr
    assert "compiler: False\nmodels: False" in done.stdout
    assert _imported(done.stdout) & (NEVER | {"deepspeed", "prometheus_client"}) == set()


def test_help_of_every_command_comes_without_torch(launch: Any) -> None:
    done = launch(sys.executable, "-c", _HELP)
    assert done.returncode == 0, done.stderr


def test_help_of_train_shows_commands_that_end_on_a_laptop(launch: Any) -> None:
    done = launch(sys.executable, "-X", "importtime", "scinet/train.py", "--help")
    assert done.returncode == 0, done.stderr
    assert "deepspeed scinet/train.py --config configs/quickstart.yaml" in done.stdout
    assert " torch\n" not in done.stderr


def test_finished_run_is_refused_and_left_as_it_is(trained: Path, small: tuple[str, ...], train: Any) -> None:
    before = _snapshot(trained)
    result = train(*small, f"output={trained.parent}", f"name={trained.name}")
    assert result.status == 2
    assert "holds a finished run" in result.err
    assert "--resume auto" in result.err
    assert _snapshot(trained) == before


def test_interrupted_run_ends_like_the_unbroken_one_when_resumed(
    small: tuple[str, ...], train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scinet.trainer import Trainer

    words = (*small, "train.max_steps=12", "train.precision=fp32", "loss.warmup_fraction=0", f"output={tmp_path}")
    assert train(*words, "name=unbroken").status == 0

    step = Trainer.train_step

    def interrupted(self: Trainer, *arguments: Any) -> Any:
        if self.progress.step == 7:  # two steps into the second epoch, which the checkpoint does not hold
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        assert train(*words, "name=broken").status == 130
    assert not (tmp_path / "broken" / "evaluation.json").exists()
    assert [row["step"] for row in _steps(tmp_path / "broken")] == [1, 2, 3, 4, 5, 6, 7]

    refused = train(*words, "name=broken")
    assert refused.status == 2
    assert "holds an unfinished run" in refused.err
    changed = train(*words, "name=broken", "seed=5", "resume=true")
    assert changed.status == 2
    assert "seed" in changed.err
    resumed = train(*words, "name=broken", "resume=true")
    assert resumed.status == 0, resumed.err
    assert "resumed after epoch 1 at step 5" in resumed.err

    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    clocks = {"samples_per_second", "data_wait_share"}
    strip = [[{k: v for k, v in row.items() if k not in clocks} for row in _rows(run)] for run in (broken, unbroken)]
    assert strip[0] == strip[1]
    assert len(_steps(unbroken)) == 12
    for moment in ("last", "selected"):
        assert _evaluation(broken)[moment] == _evaluation(unbroken)[moment]


def test_release_profile_keeps_neither_bank_nor_memory(small: tuple[str, ...], train: Any, tmp_path: Path) -> None:
    words = (*small, "profile=release", "model.bi_dominant=none", "fusion.memory_budget_mb=0")
    result = train(*words, f"output={tmp_path}", "name=release")
    assert result.status == 0, result.err
    assert [row["step"] for row in _steps(tmp_path / "release")] == [1, 2]
    (state,) = (tmp_path / "release" / "checkpoints").rglob("part-*.safetensors")
    tensors = load_file(str(state))
    assert len(tensors["fusion/bank.indices@0"]) == 0
    assert "fusion/memory@0" not in tensors


@pytest.mark.multiprocess
def test_compare_prints_its_table_and_runs_no_cell_twice(launch: Any, scenes: Path, tmp_path: Path) -> None:
    base = {
        "data": {"path": str(scenes), "cache_features": True, "cached_variants": 1},
        "model": {"freeze_image": True, "image_size": 64},
        "train": {"global_batch_size": 16, "max_steps": 2},
    }
    methods = {"scinet": [], "bce": ["method=bce"], "zero-shot": ["method=zero_shot"]}
    plan = {"output": str(tmp_path / "out"), "base": "base.yaml", "methods": methods}
    (tmp_path / "base.yaml").write_text(json.dumps(base))  # JSON is YAML
    (tmp_path / "plan.yaml").write_text(json.dumps(plan | {"known_ratios": [0.5], "seeds": [0]}))
    words = (sys.executable, "-m", "scinet.cli", "compare", "--config", tmp_path / "plan.yaml", "--seeds", 3)
    first = launch(*words)
    assert first.returncode == 0, first.stderr[-3000:]
    for method in methods:
        assert f"| {method}" in first.stdout
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").glob("*.json")}
    assert len(cells) == len(methods)
    again = launch(*words)
    assert again.stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in cells} == cells
    table = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert table["seeds"] == [3]
    assert first.stdout.startswith((tmp_path / "out" / "comparison.md").read_text().strip())
    assert f"page: {tmp_path / 'out' / 'comparison.html'}" in first.stdout


def test_run_never_opens_the_test_split_when_told_so(
    train: Any, scinet: Any, own_scenes: Path, on_features: tuple[str, ...], tmp_path: Path
) -> None:
    for shard in own_scenes.glob("test-*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    words = ("--config", "configs/quickstart.yaml", *on_features, "baseline=", f"data.path={own_scenes}")
    words = (*words, "train.global_batch_size=16", "train.epochs=1", f"output={tmp_path}", "name=untested")
    done = train(*words, "train.test_at_end=false")
    assert done.status == 0, done.err
    evaluation = json.loads((tmp_path / "untested/evaluation.json").read_text())
    assert set(evaluation) == {"class_names", "selected", "seconds"}
    assert set(evaluation["selected"]) == {"epoch", "holdout_map"}
    shown = scinet("show", "--run", tmp_path / "untested")
    assert shown.status == 0
    assert "Hold-out mAP" in shown.out
    assert "no page" in shown.out
    refused = train(*words[:-1], "name=other", f"baseline={tmp_path / 'untested'}")
    assert refused.status == 2
    assert "no test score" in refused.err
