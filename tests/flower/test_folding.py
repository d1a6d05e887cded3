"""Small messages in one piece: what goes in comes out, and nothing else does."""

import numpy as np
import pytest
from flwr.common.serde import recorddict_to_proto
from hypothesis import given
from hypothesis import strategies as st

from fedveil.flower import Array, ArrayRecord, ConfigRecord, RecordDict
from fedveil.flower.folding import LARGEST, fold, unfold

_names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
_facts = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=40),
    st.binary(max_size=40),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.booleans(),
)
_arrays = st.lists(st.floats(width=32, allow_nan=False), max_size=5).map(
    lambda values: Array(np.array(values, np.float32))
)
_records = st.one_of(
    st.dictionaries(_names, _facts, max_size=4).map(lambda facts: ConfigRecord({**facts})),
    st.dictionaries(_names, _arrays, max_size=3).map(ArrayRecord),
)


@given(st.dictionaries(_names.filter(lambda name: name != "folded"), _records, max_size=4))
def test_what_is_folded_is_unfolded(records: dict[str, ConfigRecord | ArrayRecord]) -> None:
    content = RecordDict({**records})
    folded = fold(content)
    assert list(folded) == ["folded"]
    found = unfold(folded)
    assert found == content
    assert list(found) == list(records)  # a digest is over arrays in their order


def bytes_of(size: int) -> RecordDict:
    return RecordDict({"arrays": ArrayRecord({"x": Array("uint8", (size,), "raw", bytes(size))})})


def test_a_large_message_travels_in_parts() -> None:
    assert "folded" in fold(bytes_of(LARGEST))
    larger = bytes_of(LARGEST + 1)
    assert fold(larger) is larger
    assert unfold(larger) is larger


def test_what_is_large_may_also_be_text_or_bytes() -> None:
    for value in ("x" * (LARGEST + 1), b"x" * (LARGEST + 1)):
        content = RecordDict({"facts": ConfigRecord({"a": value})})
        assert fold(content) is content


INSIDE = fold(RecordDict({"facts": ConfigRecord({"a": 1})})).config_records["folded"]["folded"]

LONG = RecordDict({"facts": ConfigRecord({"a": b"x" * (2 * LARGEST)})})
TOO_LONG = recorddict_to_proto(LONG).SerializeToString()


@pytest.mark.parametrize(
    "records",
    [
        {"folded": ConfigRecord({"folded": b"\xff\xff\xff"})},
        {"folded": ConfigRecord({"folded": "text"})},
        {"folded": ConfigRecord({"folded": 3})},
        {"folded": ConfigRecord({})},
        {"folded": ConfigRecord({"other": INSIDE})},
        {"folded": ConfigRecord({"folded": INSIDE}), "facts": ConfigRecord({})},
        {"folded": ArrayRecord({"folded": Array(np.zeros(3))})},
        {"folded": ConfigRecord({"folded": TOO_LONG})},
    ],
    ids=["no-protobuf", "text", "number", "empty", "misnamed", "two-records", "array", "too-long"],
)
def test_what_only_says_that_it_is_folded_is_refused(records: dict[str, ConfigRecord]) -> None:
    with pytest.raises(ValueError, match=r"^message: expected one folded record$"):
        unfold(RecordDict({**records}))


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    content = RecordDict({"folded": ConfigRecord({"folded": data})})
    try:
        assert isinstance(unfold(content), RecordDict)
    except ValueError as error:
        assert str(error) == "message: expected one folded record"  # noqa: PT017  either will do
