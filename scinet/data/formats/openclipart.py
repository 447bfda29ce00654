"""The Open Clip Art Library as Debian packages it: drawings with the free tags of those who drew them."""

from __future__ import annotations

import hashlib
import io
import posixpath
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image

from scinet.data.archives import read_source
from scinet.data.formats import debian_package
from scinet.data.formats.debian_package import Entry
from scinet.data.formats.openclipart_concepts import CONCEPTS, concepts_of
from scinet.data.images import opened
from scinet.data.masks import text_key
from scinet.data.records import Collection, ImageSource, Record
from scinet.errors import ConfigError, DataError

GET = "mkdir openclipart && cd openclipart && apt-get download openclipart-png openclipart-svg"
CLASS_NAMES = tuple(CONCEPTS)
"""The position is the class index."""
LONGEST_SIDE = 448
"""Pixels; a larger drawing is made this small."""
SHARES = {"train": 0.6, "holdout": 0.1, "test": 0.3}
_SKIPPED_FOLDERS = re.compile(r"computer/icons/[a-z]+-theme(/|$)|shapes/stars$|special/gradients$")
_LEAST_SIDE, _MOST_PIXELS = 16, 2**26
_CHUNK, _SIZE = struct.Struct(">I4s"), struct.Struct(">II")
_SUBJECTS = "{http://purl.org/dc/elements/1.1/}subject"
_TAGS = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"


@dataclass(frozen=True)
class OpenClipartOptions:
    """What is read; ``untagged`` is what the absence of a tag means: absent or unknown."""

    source: Path | None
    untagged: str


@dataclass(frozen=True)
class Drawing:
    """A file with all of its names below ``png`` or ``svg``, by links or by equal pixels."""

    image: ImageSource
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """The sample id."""
        return self.names[0]

    @property
    def group(self) -> str:
        """What variants of one drawing have in common: the name without folder and numbers."""
        return re.sub(r"\d+", "", posixpath.basename(self.name)).strip(" ._-")


def collection(options: OpenClipartOptions, scratch: Path, skip_missing: bool) -> Collection:
    """Return the drawings that show a concept.

    Raises:
        ConfigError: if no source folder is given, or it does not exist.
        DataError: if it holds no package, or a damaged one.
    """
    if options.source is None:
        raise ConfigError(f"--source is missing, the folder of two Debian packages; `{GET}` gets them, without root")
    pictures, metadata = (
        _by_name(
            debian_package.entries(options.source, f"openclipart-{kind}", f"usr/share/openclipart/{kind}", scratch)
        )
        for kind in ("png", "svg")
    )
    tags = {name: source.image for source in metadata for name in source.names}
    left_out: Counter[str] = Counter()
    shown: list[tuple[Drawing, frozenset[str]]] = []
    for drawing in _merged(pictures, left_out):
        found = concepts_of(
            _tags([tags[name] for name in drawing.names if name in tags]), map(posixpath.dirname, drawing.names)
        )
        if found:
            shown.append((drawing, found))
        else:
            left_out["no concept"] += 1
    if not shown:
        raise DataError(f"{options.source} holds no drawing that shows a concept: is it the right folder?")
    groups: dict[str, list[frozenset[str]]] = {}
    for drawing, found in shown:
        groups.setdefault(drawing.group, []).append(found)
    splits = deal(groups)
    # in the order of the folders a shard would be all flags
    shown.sort(key=lambda pair: text_key(pair[0].name))

    def records() -> Iterator[Record]:
        for drawing, found in shown:
            present, others = (
                tuple(place for place, name in enumerate(CLASS_NAMES) if (name in found) is is_tagged)
                for is_tagged in (True, False)
            )
            absent = others if options.untagged == "absent" else ()
            yield Record(drawing.name, drawing.image, f"{drawing.name}.png", present, absent, splits[drawing.group])

    counts = {
        "left_out": dict(left_out),
        "names_of_the_same_image": sum(len(drawing.names) - 1 for drawing, _ in shown),
        "groups": len(groups),
    }
    source = _source(options.untagged) | counts
    return Collection("openclipart", list(CLASS_NAMES), source, records, len(shown), flattened, holdout=0.0)


def _by_name(entries: Sequence[Entry]) -> list[Drawing]:
    """Return the files, each with its links; a link to nothing is no name."""
    files = {entry.name: entry.source for entry in entries if entry.source is not None}
    links = {entry.name: entry.target for entry in entries if entry.source is None}
    names: dict[str, list[str]] = {name: [name] for name in files}
    for link in links:
        target, steps = link, 0
        while target in links and steps <= len(links):
            target, steps = links[target], steps + 1
        if target in names:
            names[target].append(link)
    return [Drawing(source, tuple(posixpath.splitext(one)[0] for one in names[name])) for name, source in files.items()]


def _merged(pictures: Sequence[Drawing], left_out: Counter[str]) -> list[Drawing]:
    """Return the drawings that can be used, those of equal pixels as one, and count the others by reason."""
    merged: dict[bytes, Drawing] = {}
    for drawing in pictures:
        names = tuple(name for name in drawing.names if not _SKIPPED_FOLDERS.match(posixpath.dirname(name)))
        if not names:
            left_out["icon themes, stars, gradients"] += 1
            continue
        fault, key = _looked_at(drawing.image)
        if fault:
            left_out[fault] += 1
        else:
            merged[key] = (
                replace(merged[key], names=merged[key].names + names)
                if key in merged
                else replace(drawing, names=names)
            )
    return list(merged.values())


def _looked_at(image: ImageSource) -> tuple[str, bytes]:
    """Return why a PNG is of no use, if it is, and a digest of its pixels; what is no PNG is found by decoding it."""
    content = read_source(image)
    fault, digest, place = "", hashlib.sha256(), 8
    while place + _CHUNK.size <= len(content):
        length, kind = _CHUNK.unpack_from(content, place)
        body = content[place + _CHUNK.size : place + _CHUNK.size + length]
        place += _CHUNK.size + length + 4
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT"):
            digest.update(kind + body)
        if kind == b"IHDR" and length >= _SIZE.size:
            width, height = _SIZE.unpack_from(body)
            if min(width, height) < _LEAST_SIDE:
                fault = f"a side of less than {_LEAST_SIDE} pixels"
            elif width * height > _MOST_PIXELS:
                fault = f"more than {_MOST_PIXELS} pixels"
        elif kind == b"PLTE" and length == 3:
            fault = "one colour"
    return fault, digest.digest()


def _tags(sources: Sequence[ImageSource]) -> list[str]:
    """Return the tags in the metadata of drawings."""
    found: list[str] = []
    for source in sources:
        try:
            root = ElementTree.fromstring(read_source(source))
        except (ElementTree.ParseError, LookupError) as error:
            raise DataError(f"{source} cannot be read: {error}") from error
        found += [tag.text for subject in root.iter(_SUBJECTS) for tag in subject.iter(_TAGS) if tag.text]
    return found


def deal(groups: Mapping[str, Sequence[frozenset[str]]]) -> dict[str, str]:
    """Return the split of each group such that every concept has about its share in each.

    The groups of the rarest concept come first, large ones before small ones, and go where that concept lacks most.

    Args:
        groups: the concepts of each drawing of a group.

    Source: after Sechidis et al., "On the stratification of multi-label data", ECML PKDD 2011, with groups for samples.
    """
    counts = {group: Counter(name for found in rows for name in found) for group, rows in groups.items()}
    total = sum(counts.values(), Counter[str]())
    given = {split: Counter[str]() for split in SHARES}
    rarest = {group: min(own, key=lambda name: (total[name], name)) for group, own in counts.items()}
    splits = {}
    for group in sorted(
        groups, key=lambda group: (total[rarest[group]], rarest[group], -len(groups[group]), text_key(group))
    ):
        name = rarest[group]
        lacking = {split: share * total[name] - given[split][name] for split, share in SHARES.items()}
        splits[group] = max(lacking, key=lambda split: lacking[split])
        given[splits[group]] += counts[group]
    return splits


def flattened(source: ImageSource) -> bytes:
    """Return a drawing on white paper, as PNG without transparency and at most :data:`LONGEST_SIDE` pixels long.

    Raises:
        BrokenImageError: if it cannot be decoded.
    """
    with opened(read_source(source), f"image {source}", ("PNG",)) as image:
        drawing = image.convert("RGBA")
    paper = Image.new("RGBA", drawing.size, "white")
    paper.alpha_composite(drawing)
    small = paper.convert("RGB")
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return buffer.getvalue()


def _source(untagged: str) -> dict[str, Any]:
    meanings = {
        "absent": "counts as absent (closed world, as NUS-WIDE's tags are used): some of these negatives are wrong",
        "unknown": "is unknown: positives are all that is known, so the mAP of any split is 100 whatever a model says",
    }
    return {
        "name": "Open Clip Art Library 0.18, as Debian packages it (openclipart-png, openclipart-svg)",
        "licence": "public domain dedication (Creative Commons) by those who drew them",
        "url": "https://openclipart.org",
        "traps": [
            f"a concept without its tag {meanings[untagged]}",
            "a drawing shows a concept if one of its tags, a folder it lies in or a concept below it says so; tags are "
            "often names of folders: hats are people, and knots are boats",
            f"splits by name ({', '.join(f'{share:.0%} {split}' for split, share in SHARES.items())}): variants of a "
            "drawing, of one name without folder and numbers, lie in one split; --holdout would part them",
            "titles name whole collections and tell no variants; drawings of one style and author lie in all splits",
            "equal images are one sample with the tags and folders of all their names",
            "left out: icon themes, generated stars and gradients, drawings without any of the concepts (most have no "
            "tag), and images too small, too large or of one colour",
            f"on white paper, where white drawings are lost, and at most {LONGEST_SIDE} pixels long",
        ],
        "options": {"untagged": untagged},
    }
