"""Debian's tagged drawings: concepts out of tags and folders, one sample an image, variants in one split."""

from __future__ import annotations

import io
import lzma
import struct
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from scinet import cli
from scinet.data.card import DataCard
from scinet.data.formats.openclipart import LONGEST_SIDE, SHARES, OpenClipartOptions, collection, deal, flattened
from scinet.data.formats.openclipart_concepts import CONCEPTS, concepts_of, normalised
from scinet.data.records import file_source
from scinet.errors import ConfigError, DataError
from tests.scinet.data.formats.conftest import Build, same_shards, truth

SPLITS = ("train", "holdout", "test")
_METADATA = """<svg xmlns="http://www.w3.org/2000/svg"><metadata><rdf:RDF xmlns:cc="http://web.resource.org/cc/"
 xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work>
<dc:title>Flag</dc:title><dc:subject><rdf:Bag><rdf:li></rdf:li>{}</rdf:Bag></dc:subject></cc:Work></rdf:RDF></metadata>
<text>tool</text></svg>"""
Draw = Callable[..., None]


def _png(seed: int, size: tuple[int, int] = (20, 24), text: str = "") -> bytes:
    pixels = np.random.Generator(np.random.PCG64(seed)).integers(0, 255, (size[1], size[0], 4), dtype=np.uint8)
    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("Title", text)
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "raw"


@pytest.fixture
def draw(root: Path) -> Draw:
    """``draw("animals/ox_01", "mammal", seed=3)``: put a drawing with its tags into the packages' trees."""

    def make(name: str, *tags: str, content: bytes | None = None, seed: int = 0, text: str = "") -> None:
        items = "".join(f"<rdf:li>{tag}</rdf:li>" for tag in tags)
        for kind, data in (("png", content or _png(seed, text=text)), ("svg", _METADATA.format(items).encode())):
            path = root / "usr/share/openclipart" / kind / f"{name}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    return make


def _link(root: Path, name: str, target: str) -> None:
    for kind in ("png", "svg"):
        path = root / "usr/share/openclipart" / kind / f"{name}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(f"{target}.{kind}")


def _collect(root: Path | None, untagged: str = "absent") -> partial[object]:
    return partial(collection, OpenClipartOptions(root, untagged))


def _positives(card: DataCard) -> dict[str, tuple[str, ...]]:
    splits = [split for split in SPLITS if split in card.splits]
    return {name: known for split in splits for name, (known, _) in truth(card, split).items()}


def test_concepts_come_from_tags_folders_and_the_concepts_below(draw: Draw, root: Path, build_from: Build) -> None:
    draw("animals/mammals/ox_01", "grass", seed=1)
    draw("unsorted/sail_01", "Boats", "hash", seed=2)
    draw("signs_and_symbols/x_01", "United_Nations_Member", seed=3)
    card = build_from(_collect(root))
    assert _positives(card) == {
        "animals/mammals/ox_01": ("animal", "mammal"),
        "unsorted/sail_01": ("transport", "vehicle", "boat"),
        "signs_and_symbols/x_01": ("flag",),
    }
    assert "public domain" in card.source["licence"]


@pytest.mark.parametrize("untagged", ["absent", "unknown"])
def test_lack_of_a_tag_means_what_was_asked_for(draw: Draw, root: Path, build_from: Build, untagged: str) -> None:
    draw("food/pie_01", seed=1)
    card = build_from(_collect(root, untagged))
    (labels,) = [labels for split in card.splits for labels in truth(card, split).values()]
    others = tuple(name for name in card.class_names if name != "food")
    assert labels == (("food",), others if untagged == "absent" else ())
    assert card.source["options"] == {"untagged": untagged}
    assert ("closed world" in card.source["traps"][0]) == (untagged == "absent")


def test_image_is_one_sample_with_the_labels_of_all_its_names(draw: Draw, root: Path, build_from: Build) -> None:
    draw("food/pie_01", seed=1)
    _link(root, "recreation/party/pie_02", "../../food/pie_01")
    _link(root, "recreation/toys/pie_03", "../party/pie_02")
    _link(root, "tools/nothing", "../gone")
    draw("tools/fork_01", seed=2, text="one")
    draw("office/spoon_01", seed=2, text="another")
    card = build_from(_collect(root))
    assert _positives(card) == {"food/pie_01": ("food", "toy", "party"), "office/spoon_01": ("tool", "office")}
    assert card.source["names_of_the_same_image"] == 3


def _header_only(width: int, height: int) -> bytes:
    body = struct.pack(">II", width, height) + bytes([8, 6, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + body + struct.pack(">I", zlib.crc32(b"IHDR" + body))


def test_drawing_is_left_out_and_counted_when_it_is_of_no_use(draw: Draw, root: Path, build_from: Build) -> None:
    blank = io.BytesIO()
    Image.new("P", (20, 20)).save(blank, "PNG")
    draw("food/pie_01", seed=1)
    draw("computer/icons/flat-theme/action/pie", "food", seed=2)
    draw("shapes/stars/star_05pt02step", "shape", seed=3)
    draw("unsorted/thing_01", "grass", seed=4)
    draw("tools/dot_01", content=_png(5, (15, 40)))
    draw("tools/huge_01", content=_header_only(16000, 16000))
    draw("tools/blank_01", content=blank.getvalue())
    card = build_from(_collect(root))
    assert list(_positives(card)) == ["food/pie_01"]
    assert Counter(card.source["left_out"]) == {
        "icon themes, stars, gradients": 2,
        "no concept": 1,
        "a side of less than 16 pixels": 1,
        "more than 67108864 pixels": 1,
        "one colour": 1,
    }


def test_variants_lie_in_one_split_and_all_splits_have_each_concept(draw: Draw, root: Path, build_from: Build) -> None:
    for number in range(40):
        name = chr(ord("a") + number // 2) + "_ox"
        draw(f"animals/{name}_0{number % 2}", seed=number)
        draw(f"food/{name}_{number}", seed=100 + number)
    card = build_from(_collect(root))
    where = {name: split for split in SPLITS for name in truth(card, split)}
    groups: dict[str, set[str]] = {}
    for name, split in where.items():
        groups.setdefault(name.partition("/")[2][0], set()).add(split)
    assert len(where) == 80
    assert all(len(splits) == 1 for splits in groups.values())
    assert {split: card.splits[split].num_samples for split in SPLITS} == {"train": 48, "holdout": 8, "test": 24}


def test_a_hold_out_is_there_when_nothing_is_said(draw: Draw, root: Path, build_from: Build) -> None:
    for number in range(20):
        draw(f"food/{chr(97 + number)}", seed=number)
    card = build_from(_collect(root), holdout=None)
    assert [card.splits[split].num_samples for split in SPLITS] == [12, 2, 6]


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=60),
    rows=st.lists(st.sets(st.sampled_from("abc"), min_size=1), min_size=60, max_size=60),
)
def test_every_group_is_dealt_and_the_rarest_concept_has_its_share(sizes: list[int], rows: list[set[str]]) -> None:
    groups = {f"g{n}": [frozenset(row)] * size for n, (size, row) in enumerate(zip(sizes, rows, strict=False))}
    splits = deal(groups)
    assert splits == deal(dict(reversed(groups.items())))
    assert set(splits) == set(groups)
    total = Counter(name for group in groups.values() for found in group for name in found)
    rarest = min(total, key=lambda name: (total[name], name))
    for split, share in SHARES.items():
        have = sum(len(groups[group]) for group in groups if splits[group] == split and rarest in groups[group][0])
        assert abs(have - share * total[rarest]) <= 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_paper_is_white_where_a_drawing_is_transparent(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (2 * LONGEST_SIDE, LONGEST_SIDE), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, LONGEST_SIDE, LONGEST_SIDE))
    path = tmp_path / "it.png"
    image.convert(mode).save(path, "PNG")
    with Image.open(io.BytesIO(flattened(file_source(str(path), path.stat())))) as flat:
        assert (flat.format, flat.mode, flat.size) == ("PNG", "RGB", (LONGEST_SIDE, LONGEST_SIDE // 2))
        assert (flat.getpixel((10, 10)), flat.getpixel((LONGEST_SIDE - 10, 10))) == ((0, 0, 0), (255, 255, 255))


def _ar(name: bytes, content: bytes) -> bytes:
    header = (
        name.ljust(16) + b"0".ljust(12) + b"0".ljust(6) * 2 + b"100644".ljust(8) + str(len(content)).encode().ljust(10)
    )
    return header + b"`\n" + content + b"\n" * (len(content) % 2)


def _package(root: Path, folder: Path, kind: str, data: bytes | None = None) -> Path:
    """Pack a tree of one kind as a Debian package."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.add(root / "usr/share/openclipart" / kind, f"./usr/share/openclipart/{kind}")
    member = (b"data.tar.xz", lzma.compress(tar.getvalue())) if data is None else (b"data.tar.zst", data)
    folder.mkdir(exist_ok=True)
    path = folder / f"openclipart-{kind}_1%3a0.18_all.deb"
    path.write_bytes(b"!<arch>\n" + _ar(b"debian-binary", b"2.0\n") + _ar(b"control.tar.xz", b"odd") + _ar(*member))
    return path


@pytest.fixture
def packages(draw: Draw, root: Path, tmp_path: Path) -> Path:
    draw("food/pie_01", seed=1)
    draw("animals/ox_01", seed=2)
    _link(root, "tools/pie_02", "../food/pie_01")
    for kind in ("png", "svg"):
        _package(root, tmp_path / "debs", kind)
    return tmp_path / "debs"


def test_shards_are_the_same_when_read_out_of_the_packages(packages: Path, root: Path, build_from: Build) -> None:
    plain = build_from(_collect(root), name="plain")
    assert same_shards(build_from(_collect(packages), name="packed"), plain)
    # each package unpacked by itself
    for kind in ("png", "svg"):
        part = packages.parent / "apart" / kind / "usr/share/openclipart"
        part.mkdir(parents=True)
        (root / "usr/share/openclipart" / kind).rename(part / kind)
    assert same_shards(build_from(_collect(packages.parent / "apart"), name="last"), plain)


def test_way_to_the_packages_is_told_when_they_are_missing(root: Path, draw: Draw, build_from: Build) -> None:
    with pytest.raises(ConfigError, match="apt-get download openclipart-png openclipart-svg"):
        build_from(_collect(None))
    root.mkdir()
    with pytest.raises(DataError, match=r"openclipart-png is missing in .*apt-get download openclipart-png"):
        build_from(_collect(root))
    with pytest.raises(ConfigError, match="does not exist"):
        build_from(_collect(root / "nowhere"))
    draw("unsorted/thing_01", "grass")
    with pytest.raises(DataError, match="no drawing that shows a concept"):
        build_from(_collect(root))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda content: content[:-40], "ends early"),
        (lambda content: content[:400] + bytes(40) + content[440:], "cannot be read: .*download it again"),
        (lambda content: b"no archive", "is no Debian package"),
        (lambda content: content[:100], "holds no data.tar.xz"),
    ],
)
def test_package_is_refused_when_it_is_damaged(
    packages: Path, build_from: Build, spoil: Callable[[bytes], bytes], words: str
) -> None:
    (path,) = packages.glob("openclipart-png*")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match=words):
        build_from(_collect(packages))


def test_unpacking_is_asked_for_when_a_package_is_packed_otherwise(
    packages: Path, root: Path, build_from: Build
) -> None:
    _package(root, packages, "png", b"zst")
    with pytest.raises(DataError, match="dpkg -x openclipart-png"):
        build_from(_collect(packages))


def test_metadata_is_named_when_it_is_broken(draw: Draw, root: Path, build_from: Build) -> None:
    draw("food/pie_01", "a & b")
    with pytest.raises(DataError, match=r"food/pie_01\.svg cannot be read"):
        build_from(_collect(root))


def test_command_ends_with_two_when_no_source_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["scinet", "data", "build", "openclipart", "--out", str(tmp_path / "out")])
    assert cli.main() == 2
    assert "apt-get download" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_table_names_tags_as_they_are_compared_and_parents_that_exist() -> None:
    for concept in CONCEPTS.values():
        assert {normalised(tag) for tag in concept.tags} == concept.tags
        assert set(concept.parents) <= set(CONCEPTS)


@pytest.mark.parametrize(
    ("tags", "folders", "expected"),
    [
        (["Flags"], [], {"flag"}),
        (["map_symbol"], [], {"map symbol"}),
        (["hot", "dog"], [], set()),
        ([], ["animals/birds/penguin"], {"animal", "bird"}),
        ([], ["animals-and-others"], set()),
        (["glass", "hash(0x8a3cca4)", ""], ["unsorted"], set()),
    ],
)
def test_concepts_are_those_of_tag_and_folder(tags: list[str], folders: list[str], expected: set[str]) -> None:
    assert concepts_of(tags, folders) == expected
