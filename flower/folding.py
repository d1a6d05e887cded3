"""Small messages in one piece.

Flower carries each record, array and part of an array as an object of its own, each by a request of
its own both ways; for the short messages of a secure sum that is most of the time that they take.
"""

from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from google.protobuf.message import DecodeError

from . import ArrayRecord, ConfigRecord, RecordDict

LARGEST = 1 << 20
"""Bytes of a message that is folded; larger ones travel in parts, equal parts once."""
_FOLDED = "folded"


def fold(content: RecordDict) -> RecordDict:
    """A message's content in one record, if it is small; else as it is."""
    if _bytes_of(content) > LARGEST:
        return content
    data = recorddict_to_proto(content).SerializeToString(deterministic=True)
    return RecordDict({_FOLDED: ConfigRecord({_FOLDED: data})})


def unfold(content: RecordDict) -> RecordDict:
    """What was folded, or a content that never was.

    Raises:
        ValueError: It says that it is folded, and is not.
    """
    if _FOLDED not in content:
        return content
    record = content[_FOLDED]
    data = record.get(_FOLDED) if isinstance(record, ConfigRecord) else None
    if len(content) != 1 or not isinstance(data, bytes) or len(data) > 2 * LARGEST:
        raise ValueError("message: expected one folded record")
    found = ProtoRecordDict()
    try:
        found.ParseFromString(data)
        inside: RecordDict = recorddict_from_proto(found)
    except (DecodeError, TypeError, KeyError):
        raise ValueError("message: expected one folded record") from None
    return inside


def _bytes_of(content: RecordDict) -> int:
    """About how long it is: what is large in a message of ours is an array, text or bytes."""
    size = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            size += sum(len(array.data) for array in record.values())
        else:
            size += sum(len(v) for v in record.values() if isinstance(v, str | bytes))
    return size
