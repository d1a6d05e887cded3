"""The one byte form of every message: compact, versioned, deterministic.

A message is a frozen dataclass. The annotation of a field says how it is written and within which
limits, so a message's layout, its byte limit and its decoder are one declaration. One value has one
encoding: lengths are fixed or counted, sets ascend, and what is left over, doubled, too long or not
finite is refused. Numbers are big-endian; the vector's words are little-endian, as processors and
the mask generator have them.
"""

import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from types import UnionType
from typing import Annotated, Any, ClassVar, Protocol, TypeVar, Union, get_args, get_origin
from typing import get_type_hints as hints

import numpy as np

from .errors import MalformedMessageError

_MAGIC = b"FV"
VERSION = 1
MAX_WORDS = 1 << 28  # a vector of 1 GiB
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*", re.ASCII)
Buffer = bytes | bytearray | memoryview


class Reader:
    """Takes fields off a message in order, without copies."""

    def __init__(self, data: Buffer) -> None:
        """Reads one message."""
        self._rest = memoryview(data).cast("B")

    def take(self, count: int, what: str) -> memoryview:
        """The next bytes.

        Raises:
            MalformedMessageError: There are fewer.
        """
        if count > len(self._rest):
            raise MalformedMessageError(f"{what}: has {len(self._rest)} bytes, expected {count}")
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken

    def number(self, width: int, what: str) -> int:
        """The next unsigned number of `width` bytes."""
        return int.from_bytes(self.take(width, what), "big")

    def is_over(self) -> bool:
        """Whether nothing is left."""
        return not self._rest

    def end(self, what: str) -> None:
        """Nothing may be left over.

        Raises:
            MalformedMessageError: Something is.
        """
        if len(self._rest):
            raise MalformedMessageError(f"{what}: {len(self._rest)} bytes too many, expected none")


class Codec(Protocol):
    """How a field is written."""

    @property
    def limit(self) -> int:
        """The most bytes it takes."""

    def write(self, value: Any, what: str, out: list[Buffer]) -> None:  # noqa: ANN401
        """Appends the value's bytes, or raises MalformedMessageError."""

    def read(self, reader: Reader, what: str) -> Any:  # noqa: ANN401
        """The value, or raises MalformedMessageError."""


def _check(holds: bool, what: str, got: object, expected: str) -> None:  # noqa: FBT001
    if not holds:
        raise MalformedMessageError(f"{what} = {got}: expected {expected}")


@dataclass(frozen=True)
class Number:
    """An unsigned number of a fixed width in bytes."""

    width: int

    @property
    def limit(self) -> int:
        return self.width

    def write(self, value: int, what: str, out: list[Buffer]) -> None:
        top = 256**self.width - 1
        whole = isinstance(value, int) and not isinstance(value, bool)
        _check(whole and 0 <= value <= top, what, value, f"a whole number of 0 to {top}")
        out.append(value.to_bytes(self.width, "big"))

    def read(self, reader: Reader, what: str) -> int:
        return reader.number(self.width, what)


@dataclass(frozen=True)
class Real:
    """A finite double; zero has one form, the positive one."""

    limit: int = 8

    def write(self, value: float, what: str, out: list[Buffer]) -> None:
        self._allowed(value, what)
        out.append(struct.pack(">d", value))

    def read(self, reader: Reader, what: str) -> float:
        value = float(struct.unpack(">d", reader.take(8, what))[0])
        self._allowed(value, what)
        return value

    @staticmethod
    def _allowed(value: float, what: str) -> None:
        finite = isinstance(value, float) and math.isfinite(value)
        _check(finite and (value != 0 or math.copysign(1, value) > 0), what, value, "a finite real")


@dataclass(frozen=True)
class Bytes:
    """Bytes of a fixed length, or of a counted one within limits."""

    low: int
    high: int

    @property
    def limit(self) -> int:
        return self.high + self._prefix

    @property
    def _prefix(self) -> int:
        return 0 if self.low == self.high else 4

    def write(self, value: bytes, what: str, out: list[Buffer]) -> None:
        _check(isinstance(value, bytes), what, type(value).__name__, "bytes")
        self._allowed(len(value), what)
        out.append(len(value).to_bytes(self._prefix, "big") if self._prefix else b"")
        out.append(value)

    def read(self, reader: Reader, what: str) -> bytes:
        count = reader.number(self._prefix, what) if self._prefix else self.high
        self._allowed(count, what)
        return bytes(reader.take(count, what))

    def _allowed(self, count: int, what: str) -> None:
        _check(self.low <= count <= self.high, what, f"{count} bytes", f"{self.low} to {self.high}")


@dataclass(frozen=True)
class Text:
    """A short name of letters, digits, `_`, `.` and `-`."""

    high: int

    @property
    def limit(self) -> int:
        return self.high + 1

    def fits(self, value: object) -> bool:
        """Whether it is such a name."""
        plain = isinstance(value, str) and _NAME.fullmatch(value)
        return bool(plain) and len(str(value)) <= self.high

    def write(self, value: str, what: str, out: list[Buffer]) -> None:
        self._allowed(value, what)
        out.append(bytes([len(value)]) + value.encode("ascii"))

    def read(self, reader: Reader, what: str) -> str:
        count = reader.number(1, what)
        value = bytes(reader.take(count, what)).decode("ascii", errors="replace")
        self._allowed(value, what)
        return value

    def _allowed(self, value: str, what: str) -> None:
        expected = f"a name of 1 to {self.high} plain characters"
        _check(self.fits(value), what, ascii(value), expected)


@dataclass(frozen=True)
class Many:
    """A counted sequence within limits; ascending ones are sets, by the items' first field.

    `item` is taken from the annotated tuple where it is not given.
    """

    low: int
    high: int
    ascending: bool = False
    item: Codec | None = None

    @property
    def limit(self) -> int:
        return 4 + self.high * self._item.limit

    @property
    def _item(self) -> Codec:
        if self.item is None:
            raise TypeError("Many: goes with an annotated tuple")
        return self.item

    def write(self, value: Sequence[Any], what: str, out: list[Buffer]) -> None:
        _check(isinstance(value, tuple), what, type(value).__name__, "a tuple")
        self._allowed(len(value), what)
        out.append(len(value).to_bytes(4, "big"))
        for item in value:
            self._item.write(item, what, out)
        self._in_order(value, what)

    def read(self, reader: Reader, what: str) -> tuple[Any, ...]:
        count = reader.number(4, what)
        self._allowed(count, what)
        value = tuple(self._item.read(reader, what) for _ in range(count))
        self._in_order(value, what)
        return value

    def _allowed(self, count: int, what: str) -> None:
        _check(self.low <= count <= self.high, what, f"{count} items", f"{self.low} to {self.high}")

    def _in_order(self, items: Sequence[Any], what: str) -> None:
        if self.ascending:
            keys = [_key(item) for item in items]
            rises = all(a < b for a, b in pairwise(keys))
            _check(rises, what, keys, "each once, ascending")


def _key(item: Any) -> Any:  # noqa: ANN401
    if isinstance(item, int):
        return item
    kind: type = type(item)
    return getattr(item, layout(kind)[0][0])


def in_keys(joined: bytes) -> tuple[bytes, ...]:
    """Keys of 32 bytes that stand one after another."""
    return tuple(joined[start : start + 32] for start in range(0, len(joined), 32))


@dataclass(frozen=True)
class Keys:
    """A counted sequence of 32-byte keys within limits."""

    low: int
    high: int

    @property
    def limit(self) -> int:
        return 4 + 32 * self.high

    def write(self, value: Sequence[bytes], what: str, out: list[Buffer]) -> None:
        right = isinstance(value, tuple) and set(map(type, value)) <= {bytes}
        right = right and set(map(len, value)) <= {32}
        _check(right, what, type(value).__name__, "a tuple of keys of 32 bytes")
        self._allowed(len(value), what)
        out.append(len(value).to_bytes(4, "big"))
        out.append(b"".join(value))

    def read(self, reader: Reader, what: str) -> tuple[bytes, ...]:
        count = reader.number(4, what)
        self._allowed(count, what)
        return in_keys(bytes(reader.take(32 * count, what)))

    def _allowed(self, count: int, what: str) -> None:
        _check(self.low <= count <= self.high, what, f"{count} keys", f"{self.low} to {self.high}")


@dataclass(frozen=True)
class Maybe:
    """A value or none."""

    item: Codec

    @property
    def limit(self) -> int:
        return 1 + self.item.limit

    def write(self, value: Any, what: str, out: list[Buffer]) -> None:  # noqa: ANN401
        out.append(b"\0" if value is None else b"\1")
        if value is not None:
            self.item.write(value, what, out)

    def read(self, reader: Reader, what: str) -> Any:  # noqa: ANN401
        there = reader.number(1, what)
        _check(there <= 1, what, there, "0 or 1")
        return self.item.read(reader, what) if there else None


@dataclass(frozen=True)
class Words:
    """A vector of uint32, written and read without a copy; it aligns as the first field."""

    limit: int = 4 + 4 * MAX_WORDS

    def write(self, value: np.ndarray, what: str, out: list[Buffer]) -> None:
        right = isinstance(value, np.ndarray) and value.dtype == np.dtype("<u4") and value.ndim == 1
        _check(right and value.flags.c_contiguous, what, type(value).__name__, "flat uint32 words")
        self._allowed(len(value), what)
        out.append(len(value).to_bytes(4, "big"))
        out.append(value.data.cast("B"))

    def read(self, reader: Reader, what: str) -> np.ndarray:
        count = reader.number(4, what)
        self._allowed(count, what)
        return np.frombuffer(reader.take(4 * count, what), dtype="<u4")

    @staticmethod
    def _allowed(count: int, what: str) -> None:
        _check(1 <= count <= MAX_WORDS, what, f"{count} words", f"1 to {MAX_WORDS}")


@dataclass(frozen=True)
class Nested:
    """A frozen dataclass inside another."""

    kind: type

    @property
    def limit(self) -> int:
        limits: list[int] = [codec.limit for _, codec in layout(self.kind)]
        return sum(limits)

    def write(self, value: Any, what: str, out: list[Buffer]) -> None:  # noqa: ANN401
        _check(type(value) is self.kind, what, type(value).__name__, self.kind.__name__)
        for name, codec in layout(self.kind):
            codec.write(getattr(value, name), f"{what}.{name}", out)

    def read(self, reader: Reader, what: str) -> Any:  # noqa: ANN401
        found = {n: codec.read(reader, f"{what}.{n}") for n, codec in layout(self.kind)}
        return self.kind(**found)


Index = Annotated[int, Number(1)]
Hash = Annotated[bytes, Bytes(32, 32)]
Key = Annotated[bytes, Bytes(32, 32)]
Signature = Annotated[bytes, Bytes(64, 64)]
Name = Annotated[str, Text(64)]


class Message(Protocol):
    """A frozen dataclass with a number of its own; no two kinds have the same."""

    KIND: ClassVar[int]


MessageT = TypeVar("MessageT", bound=Message)


@cache
def layout(kind: type) -> tuple[tuple[str, Codec], ...]:
    """The fields of a message in order, and how each is written."""
    annotated = hints(kind, include_extras=True)
    return tuple((field.name, _codec(annotated[field.name])) for field in fields(kind))


def _codec(annotation: Any) -> Codec:  # noqa: ANN401
    codec: Codec
    if get_origin(annotation) is Annotated:
        base, codec = get_args(annotation)
        if isinstance(codec, Many):
            item = codec.item or _codec(get_args(base)[0])
            return Many(codec.low, codec.high, codec.ascending, item)
        return codec
    if get_origin(annotation) in {Union, UnionType}:
        (inner,) = (a for a in get_args(annotation) if a is not type(None))
        return Maybe(_codec(inner))
    return Nested(annotation)


def limit(kind: type[Message]) -> int:
    """The most bytes that a message of this kind takes; what is longer need not be read."""
    return len(_header(kind)) + Nested(kind).limit


def pieces(message: Message) -> list[Buffer]:
    """A message's bytes in parts, its vector without a copy.

    Raises:
        MalformedMessageError: A value is outside its limits.
    """
    out: list[Buffer] = [_header(type(message))]
    Nested(type(message)).write(message, type(message).__name__, out)
    return out


def encode(message: Message) -> bytes:
    """A message's bytes; raises as `pieces`."""
    return b"".join(pieces(message))


def decode(kind: type[MessageT], data: Buffer) -> MessageT:
    """The message that these bytes are; a vector in it lies in them, and is not copied.

    Raises:
        MalformedMessageError: They are no message of this kind and version, or there are more; what
            is longer than one can be is not read at all.
        UnsafeNumbersError: Its numbers are none that the protocol allows.
    """
    what = kind.__name__
    length = memoryview(data).nbytes
    if length > limit(kind):
        raise MalformedMessageError(f"{what}: {length} bytes, expected at most {limit(kind)}")
    reader = Reader(data)
    header = bytes(reader.take(len(_header(kind)), what))
    if header != _header(kind):
        raise MalformedMessageError(
            f"{what}: begins with {header.hex()}, expected {_header(kind).hex()}; it is of another "
            "kind or version"
        )
    message: MessageT = Nested(kind).read(reader, what)
    reader.end(what)
    return message


def _header(kind: type[Message]) -> bytes:
    return _MAGIC + bytes([VERSION, kind.KIND])
