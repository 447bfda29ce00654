"""Reading in pieces gives what reading at once gives."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scinet.data.formats import json_stream
from scinet.data.formats.json_stream import top_level

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(tree=st.dictionaries(st.text(max_size=5), VALUES, max_size=5), indent=st.none() | st.integers(0, 3))
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_values_are_the_same_when_read_in_pieces(chunk: int, tree: dict[str, Any], indent: int | None) -> None:
    expected = [
        (key, element) for key, value in tree.items() for element in (value if isinstance(value, list) else [value])
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_CHUNK", chunk)
        assert list(top_level(io.StringIO(json.dumps(tree, indent=indent)))) == expected


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{", '{"a"', '{"a": [1, 2', '{"a": [1 2]}', '{"a": 1 "b": 2}', '{"a": [1,}']
)
def test_text_is_refused_when_it_is_no_object(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json's words differ
        list(top_level(io.StringIO(text)))
