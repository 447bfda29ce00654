"""Each mistake ends in one sentence that names the thing, the right exit status, and nothing half-written."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.scinet.data.failing_server import FailingServer

ROOT = Path(__file__).resolve().parents[2]
USAGE, FAILURE = 2, 1


def _assert_one_error(result: Any, status: int, *names: str) -> str:
    assert result.status == status, result.err
    errors = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, result.err
    assert "Traceback" not in result.err
    for name in names:
        assert name in errors[0], f"{name!r} is not in {errors[0]!r}"
    return errors[0]


@pytest.fixture
def refused(train: Any, small: tuple[str, ...], tmp_path: Path) -> Any:
    """``refused(status, overrides, *names)``: the training command fails as it should and leaves no run."""

    def check(status: int, overrides: list[str], *names: str, config: tuple[str, ...] = small) -> str:
        runs = tmp_path / "runs"
        result = train(*config, f"output={runs}", "name=bad", *overrides)
        error = _assert_one_error(result, status, *names)
        assert not (runs / "bad").exists()
        return error

    return check


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("colour=red", ["'colour'"]),
        ("data.know_ratio=0.1", ["'data.know_ratio'", "did you mean 'data.known_ratio'"]),
        ("datta.known_ratio=0.1", ["'datta.known_ratio'", "did you mean 'data.known_ratio'"]),
        ("train.epochs=many", ["'train.epochs'", "'many'", "whole number"]),
        ("train.epochs=1.5", ["'train.epochs'", "1.5"]),
        ("model.freeze_image=3", ["'model.freeze_image'", "true or false"]),
        ("train=5", ["'train'", "section"]),
        ("train.epochs=", ["'train.epochs'"]),
        ("data.known_ratio=1.5", ["'data.known_ratio'", "1.5", "from 0 to 1"]),
        ("method=scinnet", ["'method'", "did you mean 'scinet'"]),
        ("epochs", ["'epochs'", "key=value"]),
        ("name=a/b", ["'name'", "plain folder name"]),
    ],
)
def test_wrong_override_is_named(refused: Any, override: str, names: list[str]) -> None:
    refused(USAGE, [override], *names)


def test_all_wrong_overrides_are_reported_together(refused: Any) -> None:
    refused(USAGE, ["train.epoch=3", "data.known_ratio=-1"], "'train.epoch'", "'data.known_ratio'")


def test_missing_configuration_file_is_named_with_the_nearest(train: Any) -> None:
    _assert_one_error(
        train("--config", "configs/quikstart.yaml"), USAGE, "configs/quikstart.yaml", "did you mean 'configs/quickstart"
    )


def test_configuration_that_is_no_yaml_is_named(train: Any, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("data: [1,\n")
    _assert_one_error(train("--config", path), USAGE, str(path))


@pytest.mark.parametrize("name", ["nuswide", "coco2014", "voc2007", "voc2012", "cub"])
def test_published_setting_without_its_data_names_path_and_command(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = train("--config", ROOT / f"configs/{name}.yaml")
    _assert_one_error(result, USAGE, f"data/{name}", "scinet data build")
    assert not list(tmp_path.iterdir())


def test_empty_data_folder_is_named(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(USAGE, [f"data.path={tmp_path / 'empty'}"], str(tmp_path / "empty"), "scinet data build")


def test_missing_shard_is_named(refused: Any, own_scenes: Path) -> None:
    (own_scenes / "train-000001.tar").unlink()
    refused(FAILURE, [f"data.path={own_scenes}"], str(own_scenes / "train-000001.tar"), "missing")


def test_damaged_card_is_named(refused: Any, own_scenes: Path) -> None:
    (own_scenes / "dataset.json").write_text("{")
    refused(FAILURE, [f"data.path={own_scenes}"], str(own_scenes / "dataset.json"))


@pytest.mark.parametrize(("split", "purpose"), [("holdout", "select the best epoch by"), ("test", "test on")])
def test_split_that_a_run_needs_is_named_before_the_run(
    refused: Any, own_scenes: Path, split: str, purpose: str
) -> None:
    card = json.loads((own_scenes / "dataset.json").read_text())
    del card["splits"][split]
    (own_scenes / "dataset.json").write_text(json.dumps(card))
    refused(
        USAGE, [f"data.path={own_scenes}"], str(own_scenes), f"no samples to {purpose} (split '{split}'", "--holdout"
    )


def test_mask_file_without_a_training_sample_is_named_before_the_run(
    refused: Any, scinet: Any, scenes: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mask.jsonl"
    assert scinet("data", "mask", scenes, "--known-ratio", 0.3, "--out", path).status == 0
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    last = json.loads(lines[-1])["id"]
    refused(FAILURE, [f"data.mask_file={path}"], str(path), f"'{last}'", f"1 of {len(lines) - 1}")
    refused(USAGE, [f"data.mask_file={tmp_path / 'masc.jsonl'}"], "masc.jsonl", "did you mean")
    refused(USAGE, [f"data.mask_file={path}", "data.single_positive=true"], "'data.single_positive'")


def _resize(folder: Path, shard: str, content: bytes) -> None:
    """Replace a shard and let the card say its new size, so that only reading meets the damage."""
    (folder / shard).write_bytes(content)
    card = json.loads((folder / "dataset.json").read_text())
    for split in card["splits"].values():
        for entry in split["shards"]:
            if entry["file"] == shard:
                entry["num_bytes"] = len(content)
    (folder / "dataset.json").write_text(json.dumps(card))


def test_truncated_tar_is_named_when_its_size_is_wrong(refused: Any, own_scenes: Path) -> None:
    shard = own_scenes / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-9999])
    refused(FAILURE, [f"data.path={own_scenes}"], str(shard), "truncated")


def test_truncated_tar_is_named_when_only_reading_meets_it(refused: Any, own_scenes: Path) -> None:
    shard = "train-000000.tar"
    _resize(own_scenes, shard, (own_scenes / shard).read_bytes()[:100_000])
    refused(FAILURE, [f"data.path={own_scenes}"], str(own_scenes / shard))


def _spoil_image(folder: Path, shard: str, position: int) -> str:
    """Overwrite one image of a shard with noise of the same length, and return the sample's key."""
    content, spoilt = io.BytesIO(), ""
    with tarfile.open(folder / shard) as source, tarfile.open(fileobj=content, mode="w") as target:
        images = [member for member in source.getmembers() if member.name.endswith(".jpg")]
        for member in source.getmembers():
            data = source.extractfile(member)
            assert data is not None
            payload = data.read()
            if member is images[position]:
                payload, spoilt = b"\x00" * len(payload), member.name.removesuffix(".jpg")
            target.addfile(member, io.BytesIO(payload))
    _resize(folder, shard, content.getvalue())
    return spoilt


def test_image_that_cannot_be_decoded_is_named_with_its_shard(refused: Any, own_scenes: Path) -> None:
    key = _spoil_image(own_scenes, "train-000001.tar", 3)
    refused(FAILURE, [f"data.path={own_scenes}"], str(own_scenes / "train-000001.tar"), key, "cannot be decoded")


@pytest.mark.multiprocess
def test_error_of_the_second_rank_alone_is_said_once_and_nobody_waits(
    launch: Any, small: tuple[str, ...], own_scenes: Path, tmp_path: Path
) -> None:
    key = _spoil_image(own_scenes, "train-000000.tar", 1)  # position 1 falls to rank 1
    words = (*small, f"data.path={own_scenes}", f"output={tmp_path / 'runs'}", "name=bad")
    done = launch("torchrun", "--nproc-per-node", 2, "scinet/train.py", *words, timeout_s=200)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    assert key in errors[0]
    # torchrun itself ends with a traceback of its own; the ranks, whose lines torch marks, show none
    assert "[rank" not in done.stderr
    assert "scinet/running.py" not in done.stderr


@pytest.mark.multiprocess
def test_wrong_key_is_said_once_when_two_ranks_start(launch: Any, small: tuple[str, ...]) -> None:
    done = launch("torchrun", "--nproc-per-node", 2, "scinet/train.py", *small, "train.epoch=1", timeout_s=200)
    assert done.returncode != 0
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1, done.stderr


def _table(folder: Path, header: str) -> tuple[str, ...]:
    images = folder / "images"
    images.mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (8, 8), "green").save(images / name)
    width = header.count(",")
    rows = "".join(f"{name}{',1' * width}\n" for name in ("a.jpg", "b.jpg"))
    (folder / "labels.csv").write_text(f"{header}\n{rows}")
    (folder / "classes.txt").write_text("cat\ndog\nowl\n")
    where = ("--labels", folder / "labels.csv", "--images", images, "--classes", folder / "classes.txt")
    return ("data", "build", "csv", *map(str, where), "--out", str(folder / "out"))


@pytest.mark.parametrize(
    ("header", "names"),
    [
        ("file,cat,dog,oowl", ["'oowl'", "classes.txt", "did you mean 'owl'"]),
        ("file,cat,dog", ["2 label columns", "3 classes", "'owl'"]),
        ("file,cat,dog,owl,cat", ["cat"]),
    ],
    ids=["unknown", "fewer", "repeated"],
)
def test_label_table_that_does_not_fit_the_class_list_is_named(
    scinet: Any, tmp_path: Path, header: str, names: list[str]
) -> None:
    words = _table(tmp_path, header)
    _assert_one_error(scinet(*words), FAILURE, "labels.csv", *names)
    assert {path.name for path in tmp_path.iterdir()} == {"images", "labels.csv", "classes.txt"}


@pytest.mark.parametrize("cached", ["true", "false"])
def test_attention_heads_that_do_not_divide_the_width_are_named(refused: Any, cached: str) -> None:
    overrides = ["model.attention_heads=5", f"data.cache_features={cached}"]
    refused(USAGE, overrides, "model.attention_heads is 5", "width 32")


def test_batch_larger_than_the_data_is_named(refused: Any) -> None:
    refused(USAGE, ["train.global_batch_size=4096"], "train.global_batch_size=4096", "training samples")


def test_folder_that_holds_something_else_is_left_alone(train: Any, small: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    result = train(*small, f"output={tmp_path}", "name=mine")
    _assert_one_error(result, USAGE, str(tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_output_that_cannot_be_written_is_named(train: Any, small: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")  # a read-only folder does not stop root
    result = train(*small, f"output={tmp_path / 'file'}", "name=run")
    _assert_one_error(result, USAGE, str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "in the way"


def test_data_output_that_cannot_be_written_is_named(scinet: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = scinet("data", "build", "scenes", "--out", tmp_path / "file" / "scenes", "--count", 10)
    _assert_one_error(result, USAGE, str(tmp_path / "file"))


def test_full_data_folder_is_left_alone(scinet: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep")
    result = scinet("data", "build", "scenes", "--out", tmp_path, "--count", 10)
    _assert_one_error(result, USAGE, str(tmp_path), "not empty")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_predict_names_an_image_that_does_not_exist(scinet: Any, trained: Path, tmp_path: Path) -> None:
    _assert_one_error(scinet("predict", "--run", trained, tmp_path / "none.jpg"), USAGE, str(tmp_path / "none.jpg"))


def test_predict_names_a_folder_without_images(scinet: Any, trained: Path, tmp_path: Path) -> None:
    _assert_one_error(scinet("predict", "--run", trained, tmp_path), USAGE, str(tmp_path))


@pytest.mark.parametrize("command", ["predict", "evaluate", "show"])
def test_run_that_does_not_exist_is_named(scinet: Any, tmp_path: Path, command: str) -> None:
    images = [tmp_path / "a.jpg"] if command == "predict" else []
    result = scinet(command, "--run", tmp_path / "no-run", *images)
    _assert_one_error(result, FAILURE, str(tmp_path / "no-run"))


def test_negative_count_is_refused(scinet: Any, tmp_path: Path) -> None:
    result = scinet("data", "build", "scenes", "--out", tmp_path / "out", "--count", -5)
    assert result.status == USAGE
    assert "--count" in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "value"), [("--test", 1.5), ("--holdout", -0.1)])
def test_share_outside_its_range_is_named(scinet: Any, tmp_path: Path, option: str, value: float) -> None:
    result = scinet("data", "build", "scenes", "--out", tmp_path / "out", "--count", 10, option, value)
    _assert_one_error(result, USAGE, option, str(value))
    assert not (tmp_path / "out").exists()


def test_run_goes_on_when_a_bad_sample_is_skipped(
    train: Any, small: tuple[str, ...], own_scenes: Path, tmp_path: Path
) -> None:
    key = _spoil_image(own_scenes, "train-000001.tar", 3)
    skip = ("data.on_bad_sample=skip", f"data.path={own_scenes}", "data.cache_features=false", "train.last_batch=train")
    result = train(*small, *skip, "train.max_steps=6", f"output={tmp_path}", "name=run", "data.max_bad_fraction=0.02")
    assert result.status == 0, result.err
    warnings = [line for line in result.err.splitlines() if "skipped: " in line]
    assert len(warnings) == 1
    assert key in warnings[0]
    assert "train-000001.tar" in warnings[0]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss/total" in row]
    number = json.loads((own_scenes / "dataset.json").read_text())["splits"]["train"]["num_samples"]
    assert steps[-1]["skipped_samples"] == 1
    assert steps[-1]["samples_seen"] == number - 1


@pytest.mark.parametrize("cached", ["true", "false"])
def test_arithmetic_is_said_when_too_many_samples_are_bad(
    train: Any, small: tuple[str, ...], own_scenes: Path, tmp_path: Path, cached: str
) -> None:
    for position in (1, 3, 5, 7):
        _spoil_image(own_scenes, "train-000000.tar", position)
    words = ("data.on_bad_sample=skip", f"data.path={own_scenes}", f"data.cache_features={cached}", "train.max_steps=5")
    result = train(*small, *words, f"output={tmp_path}", "name=run")
    _assert_one_error(result, FAILURE, "could not be read", "data.max_bad_fraction=0.01")


def test_batch_larger_than_the_data_is_refused_before_anything_is_computed(refused: Any, small: Any) -> None:
    error = refused(
        USAGE, ["train.global_batch_size=4096", "data.cache_dir=/nonexistent/cache"], "train.last_batch=train"
    )
    assert "set at most" in error


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("pipe:cat /data", ["data.allow_pipe=true"]),
        ("s3://bucket/scenes", ["pip install s3fs"]),
        ("gopher://host/scenes", ["'gopher://'"]),
    ],
)
def test_address_that_cannot_be_opened_is_named(refused: Any, path: str, names: list[str]) -> None:
    refused(USAGE, [f"data.path={path}"], path, *names)


def test_cache_folder_that_cannot_be_written_is_named(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "cache"
    refused(
        USAGE, ["data.path=http://127.0.0.1:9/set", f"data.cache_shards={folder}"], "data.cache_shards", str(folder)
    )


def test_run_is_the_same_when_its_data_come_by_http(
    train: Any, small: tuple[str, ...], scenes: Path, tmp_path: Path
) -> None:
    server = FailingServer(scenes)
    server.faults["train-000000.tar"] = [("reset", 50_000), ("status", 500)]
    try:
        for name, path in (("local", str(scenes)), ("http", server.url)):
            words = (f"data.path={path}", "data.cache_features=false", f"data.cache_shards={tmp_path / 'cache'}")
            result = train(*small, *words, f"output={tmp_path}", f"name={name}")
            assert result.status == 0, result.err
    finally:
        server.close()
    evaluations = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("local", "http")]
    assert evaluations[0]["last"] == evaluations[1]["last"]


def test_source_that_stalls_ends_the_run_in_time(
    train: Any, small: tuple[str, ...], scenes: Path, tmp_path: Path
) -> None:
    server = FailingServer(scenes)
    server.always["train-000001.tar"] = ("stall", 1000)
    try:
        words = (f"data.path={server.url}", "data.cache_features=false", "data.timeout_s=2", "data.workers=2")
        result = train(*small, *words, f"output={tmp_path}", "name=run")
    finally:
        server.close()
    _assert_one_error(result, FAILURE, "train-000001.tar", "stalled for 2 s")
