"""A build is the same with any number of processes, goes on where it stopped, and says what it left out."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scinet.data.archives import read_source
from scinet.data.building import BuildOptions, build
from scinet.data.card import CARD_NAME, DataCard
from scinet.data.records import Collection, ImageSource, Record, file_source
from scinet.data.stream import Order, SampleStream
from scinet.errors import BuildInterrupted, ConfigError, DataError
from tests.scinet.conftest import MakeImage

ROOT = Path(__file__).resolve().parents[3]
Make = Callable[..., DataCard]


@pytest.fixture
def images(tmp_path: Path, make_image: MakeImage) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02d}.jpg").write_bytes(make_image(number, "JPEG", 16))
    return folder


def _collection(images: Path, load: Callable[[ImageSource], bytes] = read_source, **source: Any) -> Collection:
    def records() -> Iterator[Record]:
        for number in range(20):
            path = images / f"{number:02d}.jpg"
            image = file_source(str(path), path.stat()) if path.exists() else None
            split = "test" if number >= 15 else "train"
            yield Record(f"im{number}", image, path.name, (number % 4,), ((number + 1) % 4,), split)

    return Collection("", ["a", "b", "c", "d"], {"name": "test", **source}, records, 20, load)


@pytest.fixture
def make(images: Path, tmp_path: Path) -> Make:
    """``make(name, load=..., options=..., jobs=2)``: build the twenty images in shards of three."""

    def run(
        name: str = "out",
        *,
        load: Callable[[ImageSource], bytes] = read_source,
        source: dict[str, Any] | None = None,
        **given: Any,
    ) -> DataCard:
        options = BuildOptions(**({"holdout": 0.0, "shard_samples": 3} | given))
        return build(lambda _: _collection(images, load, **(source or {})), tmp_path / name, options, lambda *_: None)

    return run


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _shards(folder: Path) -> dict[str, bytes]:
    """All but the card, which holds the name of the folder."""
    return {name: content for name, content in _content(folder).items() if name != CARD_NAME}


class _FailsAt:
    """Loads images, but raises at one of them; counts what it loaded."""

    def __init__(self, name: str, error: BaseException) -> None:
        self.name, self.error, self.loaded = name, error, list[str]()

    def __call__(self, source: ImageSource) -> bytes:
        self.loaded.append(Path(source.path).stem)
        if Path(source.path).stem == self.name:
            raise self.error
        return read_source(source)


def test_bytes_are_the_same_when_several_processes_write(make: Make) -> None:
    serial, parallel = make("data"), make("other/data", jobs=3)
    assert _content(serial.directory) == _content(parallel.directory)
    assert serial.name == "data"


def test_build_goes_on_with_finished_shards_when_it_was_stopped(make: Make, tmp_path: Path) -> None:
    whole = _shards(make("whole").directory)
    with pytest.raises(BuildInterrupted, match=r"2 finished shards are kept in .*\.out\.building"):
        make(load=_FailsAt("07", KeyboardInterrupt()))
    assert not (tmp_path / "out").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / ".out.building/whole").iterdir()}
    assert len(kept) == 2
    load = _FailsAt("none", KeyboardInterrupt())
    done = make(load=load)
    assert load.loaded == [f"{number:02d}" for number in range(6, 20)]
    assert [(done.directory / path.name).stat().st_mtime_ns for path in kept] == list(kept.values())
    assert _shards(done.directory) == whole
    assert not (tmp_path / ".out.building").exists()


def test_build_is_refused_when_it_goes_on_with_other_options(make: Make, tmp_path: Path) -> None:
    with pytest.raises(BuildInterrupted):
        make(load=_FailsAt("07", KeyboardInterrupt()))
    with pytest.raises(ConfigError, match=r"2 shards .* another choice of shard_samples: .* or --restart") as caught:
        make(shard_samples=5)
    assert caught.value.exit_status == 2
    with pytest.raises(ConfigError, match="another choice of options"):
        make(source={"options": {"difficult": "ignore"}})
    assert len(list((tmp_path / ".out.building/whole").iterdir())) == 2
    assert len(make(shard_samples=5, restart=True).split("train").shards) == 3


def test_only_changed_shards_are_written_again_when_the_source_changed(
    make: Make, images: Path, make_image: MakeImage
) -> None:
    with pytest.raises(BuildInterrupted):
        make(load=_FailsAt("10", KeyboardInterrupt()))
    (images / "04.jpg").write_bytes(make_image(99, "JPEG", 17))
    load = _FailsAt("none", KeyboardInterrupt())
    card = make(load=load)
    assert load.loaded == ["03", "04", "05", *(f"{number:02d}" for number in range(9, 20))]
    stored = {s.sample_id: s.image for s in SampleStream(card, "train", Order(0, 0, 1, 0))}
    assert stored["im4"] == (images / "04.jpg").read_bytes()


def test_finished_shard_is_written_again_when_it_was_cut(make: Make, tmp_path: Path) -> None:
    with pytest.raises(BuildInterrupted):
        make(load=_FailsAt("07", KeyboardInterrupt()))
    shard = tmp_path / ".out.building/whole/train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    (shard.parent / ".train-000009.tar.77.part").write_bytes(b"left by a killed worker")
    load = _FailsAt("none", KeyboardInterrupt())
    card = make(load=load)
    assert load.loaded[:3] == ["00", "01", "02"]
    assert sorted(path.name for path in card.directory.iterdir()) == sorted(
        [CARD_NAME, *(shard.file for split in card.splits.values() for shard in split.shards)]
    )


def test_missing_images_stop_the_build_before_a_shard_is_written(make: Make, images: Path, tmp_path: Path) -> None:
    for number in (3, 5, 8, 17):
        (images / f"{number:02d}.jpg").unlink()
    with pytest.raises(DataError) as caught:
        make()
    listed = tmp_path / ".out.building/plan/missing.txt"
    for words in ("4 of 20 images are missing (03.jpg, 05.jpg, 08.jpg, ...)", str(listed), "--missing skip"):
        assert words in str(caught.value)
    assert [line.split("\t") for line in listed.read_text().splitlines()][3] == ["im17", "17.jpg", "not found"]
    assert not list((tmp_path / ".out.building/whole").iterdir())


@pytest.mark.parametrize("jobs", [1, 2])
def test_missing_and_broken_images_are_listed_when_skipped(make: Make, images: Path, jobs: int) -> None:
    (images / "03.jpg").unlink()
    (images / "05.jpg").write_bytes(b"no image")
    whole = (images / "16.jpg").read_bytes()
    (images / "16.jpg").write_bytes(whole[: len(whole) // 2])
    card = make(skip_missing=True, jobs=jobs)
    assert (card.missing.not_found, card.missing.broken, card.missing.count) == (1, 2, 3)
    lines = [line.split("\t") for line in (card.directory / card.missing.file).read_text().splitlines()]
    assert [line[0] for line in lines] == ["im3", "im5", "im16"]
    assert "cannot be decoded" in lines[2][2]
    tree = json.loads((card.directory / CARD_NAME).read_text())
    assert tree["missing"] == {"count": 3, "not_found": 1, "broken": 2, "file": "missing.txt"}
    # what is missing gets no index, what is broken leaves a gap: 19 places, 17 of them taken
    samples = [s for name in card.splits for s in SampleStream(card, name, Order(0, 0, 1, 0))]
    assert card.num_indices == 19
    assert sorted(s.index for s in samples) == sorted(set(range(19)) - {4, 15})


def test_broken_image_is_named_and_the_rest_kept_when_not_skipped(make: Make, images: Path, tmp_path: Path) -> None:
    (images / "10.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"10.jpg cannot be decoded \(8 bytes\): no image format"):
        make()
    assert len(list((tmp_path / ".out.building/whole").iterdir())) == 3
    card = make(skip_missing=True)
    assert card.missing.broken == 1


def test_broken_images_are_named_again_when_a_skipping_build_goes_on_without_skipping(make: Make, images: Path) -> None:
    (images / "01.jpg").write_bytes(b"no image")
    with pytest.raises(BuildInterrupted):
        make(load=_FailsAt("07", KeyboardInterrupt()), skip_missing=True)
    with pytest.raises(DataError, match=r"01.jpg cannot be decoded"):
        make()


def test_build_is_refused_when_no_image_is_there(make: Make, images: Path, tmp_path: Path) -> None:
    for path in images.iterdir():
        path.unlink()
    with pytest.raises(
        DataError, match=r"all 20 images are missing \(00.jpg, 01.jpg, 02.jpg, .*: is it the right folder"
    ):
        make(skip_missing=True)
    assert not (tmp_path / ".out.building").exists()


def test_build_is_refused_when_no_image_can_be_decoded(make: Make, images: Path) -> None:
    for path in images.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="not one image could be decoded"):
        make(skip_missing=True)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_refused_unless_they_may_be_converted(make: Make, images: Path, kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(buffer, kind)
    (images / "02.jpg").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match=f"02.jpg is {kind}, expected JPEG, PNG or WEBP; `--reencode jpeg`"):
        make()
    card = make("converted", reencode=True)
    stored = {s.sample_id: s.image for s in SampleStream(card, "train", Order(0, 0, 1, 0))}
    image = Image.open(io.BytesIO(stored["im2"]))
    assert (image.format, image.size) == ("JPEG", (9, 7))
    assert stored["im1"] == (images / "01.jpg").read_bytes()


@pytest.mark.parametrize("reencode", [False, True])
def test_no_program_is_started_for_an_image(make: Make, images: Path, reencode: bool) -> None:
    # Pillow hands an EPS to Ghostscript
    Image.new("RGB", (9, 7), "red").save(images / "02.jpg", "EPS")
    with pytest.raises(DataError, match=r"02.jpg cannot be decoded \(\d+ bytes\): no image format"):
        make(reencode=reencode)


@pytest.mark.parametrize("size", [1, 7, 8, 300])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpegs_of_any_size_and_mode_are_kept(make: Make, images: Path, size: int, mode: str) -> None:
    Image.new(mode, (size, 2 * size)).save(images / "00.jpg", "JPEG")
    stored = {s.sample_id: s.image for s in SampleStream(make(), "train", Order(0, 0, 1, 0))}
    assert stored["im0"] == (images / "00.jpg").read_bytes()


def test_id_is_shown_when_it_is_no_text(make: Make, images: Path, tmp_path: Path) -> None:
    def records() -> Iterator[Record]:
        yield Record("a\udc80", None, "a\udc80.jpg", (), (), "train")

    collection = Collection("odd", ["a"], {}, records, 1, read_source)
    with pytest.raises(DataError, match=r"sample id 'a\\udc80' holds half a character"):
        build(lambda _: collection, tmp_path / "odd", BuildOptions(), lambda *_: None)


def test_bytes_of_png_webp_and_mpo_are_kept(make: Make, images: Path) -> None:
    contents = {}
    for name, kind in (("00", "PNG"), ("01", "WEBP"), ("02", "MPO")):
        buffer = io.BytesIO()
        frames = {"save_all": True, "append_images": [Image.new("RGB", (8, 8))]} if kind == "MPO" else {}
        Image.new("RGB", (8, 8), "blue").save(buffer, kind, **frames)
        (images / f"{name}.jpg").write_bytes(buffer.getvalue())
        contents[f"im{int(name)}"] = buffer.getvalue()
    card = make()
    stored = {s.sample_id: s.image for s in SampleStream(card, "train", Order(0, 0, 1, 0))}
    assert {key: stored[key] for key in contents} == contents


def test_second_builder_is_refused_while_the_first_is_at_work(make: Make) -> None:
    def load(source: ImageSource) -> bytes:
        if Path(source.path).stem == "09":
            with pytest.raises(ConfigError, match=r"another process is building .*out: wait for it"):
                make()
        return read_source(source)

    assert make(load=load).num_indices == 20
    with pytest.raises(ConfigError, match="not empty"):
        make()


def test_finished_shards_are_kept_when_the_disk_is_full(make: Make, images: Path, tmp_path: Path) -> None:
    noise = os.urandom(3 * 180 * 180)
    Image.frombytes("RGB", (180, 180), noise).save(images / "08.jpg", quality=100)
    whole = _shards(make("whole").directory)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        with pytest.raises(DataError, match=r"writing .*out failed: File too large; \d finished shards are kept"):
            make()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / ".out.building/whole").glob(".*"))
    assert _shards(make().directory) == whole


def test_disk_is_blamed_when_a_process_of_several_finds_it_full(make: Make) -> None:
    with pytest.raises(DataError, match=r"writing .*out failed: No space left on device; \d finished shards are kept"):
        make(load=_FailsAt("17", OSError(28, "No space left on device")), jobs=2)


def test_source_that_cannot_be_read_stops_even_when_missing_images_are_skipped(make: Make) -> None:
    with pytest.raises(DataError, match="gone"):
        make(load=_FailsAt("05", DataError("the disk is gone")), skip_missing=True)


_MANY = """
import io, resource, sys
from pathlib import Path
from PIL import Image
from scinet.data.building import BuildOptions, build
from scinet.data.records import Collection, ImageSource, Record, file_source

buffer = io.BytesIO()
Image.new("RGB", (1, 1)).save(buffer, "PNG")
content, number = buffer.getvalue(), int(sys.argv[2])

def records():
    for n in range(number):
        labels = tuple((n * 7919 + k * 977) % 9605 for k in range(8))
        image = ImageSource(f"/a/folder/of/images/{n:016x}.jpg", "", 0, 67, 67) if n % 10 == 0 else None
        yield Record(f"{n:016x}", image, f"images/{n:016x}.jpg", labels[:3], labels[3:], "train")

collection = Collection("many", [f"class {n}" for n in range(9605)], {}, records, number, lambda source: content)
options = BuildOptions(shard_samples=1000, skip_missing=True)
card = build(lambda _: collection, Path(sys.argv[1]), options, lambda *_: None)
assert card.num_indices == number // 10, card.num_indices
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_hardly_grows_when_records_are_many(tmp_path: Path) -> None:
    kilobytes = []
    for number in (20_000, 200_000):
        words = [sys.executable, "-c", _MANY, str(tmp_path / str(number)), str(number)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        kilobytes.append(int(done.stdout))
    # eight bytes a sample are 1.4 MB; pairs of classes and the card take the rest
    assert kilobytes[1] - kilobytes[0] < 60_000, kilobytes


def test_build_goes_on_when_it_is_allowed_to_convert(make: Make, images: Path, tmp_path: Path) -> None:
    Image.new("RGB", (9, 7), "red").save(images / "17.jpg", "GIF")
    with pytest.raises(DataError, match=r"`--reencode jpeg` converts it.*finished shards are kept"):
        make()
    kept = {path.name: path.stat().st_ino for path in (tmp_path / ".out.building/whole").iterdir()}
    assert kept
    card = make(reencode=True)
    assert {path.name: path.stat().st_ino for path in card.directory.iterdir() if path.name in kept} == kept


def test_converted_images_are_not_taken_over_when_they_may_not_be(make: Make, images: Path, tmp_path: Path) -> None:
    Image.new("RGB", (9, 7), "red").save(images / "02.jpg", "GIF")
    (images / "17.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"17.jpg cannot be decoded"):
        make(reencode=True)
    assert any((tmp_path / ".out.building/whole").iterdir())
    with pytest.raises(DataError, match=r"02.jpg is GIF"):
        make()


def test_shard_is_written_anew_when_an_image_was_replaced_by_one_of_its_size(make: Make, images: Path) -> None:
    whole = (images / "17.jpg").read_bytes()
    (images / "17.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot be decoded"):
        make()
    content = bytearray((images / "00.jpg").read_bytes())
    content[-3] ^= 1  # within the image's last pixels
    (images / "00.jpg").write_bytes(content)
    (images / "17.jpg").write_bytes(whole)
    stored = {s.sample_id: s.image for s in SampleStream(make(), "train", Order(0, 0, 1, 0))}
    assert stored["im0"] == bytes(content)


@pytest.mark.parametrize("damaged", ["options.json", "reports/train-000000.tar.json"])
@pytest.mark.parametrize("content", ["{}", "{x", "[]", '{"positives": 3}'])
def test_notes_of_an_unfinished_build_are_not_believed_when_they_are_damaged(
    make: Make, images: Path, tmp_path: Path, damaged: str, content: str
) -> None:
    whole = (images / "17.jpg").read_bytes()
    (images / "17.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot be decoded"):
        make()
    (images / "17.jpg").write_bytes(whole)
    (tmp_path / ".out.building" / damaged).write_text(content)
    if damaged == "options.json":
        with pytest.raises(ConfigError, match="--restart to begin anew"):
            make()
    assert make(restart=damaged == "options.json").num_indices == 20


def test_link_is_followed_when_it_is_the_target(make: Make, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    make()
    assert (tmp_path / "disk" / "dataset.json").is_file()


def test_target_is_refused_when_it_is_no_place_for_a_folder(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="is a file: name a folder with --out"):
        make()
    (tmp_path / "out").unlink()
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(ConfigError, match="--out is the folder that you are in"):
        make()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "names no class"),
        (["a", " "], "class 1 has no name"),
        (["a", "a"], "two classes are called 'a'"),
        (["\ud800"], "holds half a character"),
    ],
)
def test_classes_are_refused_when_they_cannot_be_told_apart(tmp_path: Path, names: list[str], words: str) -> None:
    collection = Collection("odd", names, {}, lambda: iter(()), 1, read_source)
    with pytest.raises(DataError, match=words):
        build(lambda _: collection, tmp_path / "out", BuildOptions(), lambda *_: None)
    assert not list(tmp_path.iterdir())
