"""The quick way through a plain header is the thorough one's, or none."""

from __future__ import annotations

import tarfile

from hypothesis import example, given, settings
from hypothesis import strategies as st

from scinet.data.tar_headers import _header, _plain_header

_TYPES = [tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE]


@st.composite
def _blocks(draw: st.DrawFn) -> bytes:
    """Headers as tools write them, some with bytes changed afterwards."""
    info = tarfile.TarInfo(draw(st.text(max_size=120).map(lambda text: text.replace("\0", "/"))) or "a.jpg")
    info.size = draw(st.sampled_from([0, 1, 511, 512, 123456, 8**11 - 1, 8**11]))
    info.mode, info.type = draw(st.sampled_from([0o444, 0o644])), draw(st.sampled_from(_TYPES))
    kind = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    try:
        block = bytearray(info.tobuf(kind, "utf-8", "surrogateescape")[-512:])
    except ValueError:  # too long for this format
        block = bytearray(512)
    for place, value in draw(st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), max_size=3)):
        block[place] = value
    return bytes(block)


def _of_size(field: bytes) -> bytes:
    block = tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT)
    return block[:124] + field + block[136:]


@settings(max_examples=2000)
@given(_blocks())
@example(_of_size(b"80000000000\0"))  # digits, but of no octal number
def test_plain_header_is_read_as_the_library_reads_it(block: bytes) -> None:
    # with the fields that the quick way does not look at made valid
    block = bytes(
        bytearray(block[:100]) + b"0000644\0" + b"0000000\0" * 2 + block[124:136] + b"0" * 11 + b"\0" + block[148:]
    )
    block = block[:329] + b"0000000\0" * 2 + block[345:]
    summed = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    for whole in (block, block[:148] + summed + block[156:]):
        quick = _plain_header(whole)
        if quick is not None:
            assert quick == _header(whole)


def test_plain_header_is_read_quickly_when_a_build_wrote_it() -> None:
    info = tarfile.TarInfo("train-0001.jpg")
    info.size, info.mode = 4711, 0o444
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        assert _plain_header(info.tobuf(kind)) == ("train-0001.jpg", 4711, tarfile.REGTYPE)
