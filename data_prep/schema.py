"""The contract that all sites sign: what a record is, declared and never read off the data.

A schema is public. It fixes the domains (bounds, categories, shape, classes) and, with them, the
layout of an encoded record, so that every site encodes alike and a model can be built without data.
What a draft read off the data is marked as `unconfirmed`; no run takes a schema with such a mark.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, Strict, model_validator

from ..config import ConfigError, Options, read_toml, validated

if TYPE_CHECKING:
    import numpy as np

Names = Annotated[tuple[str, ...], Strict(False)]  # noqa: FBT003
Bounds = Annotated[tuple[float, float], Strict(False)]  # noqa: FBT003
# Left out where there is none: a confirmed schema's JSON, and its hash in a ledger, know no marks.
Marks = Annotated[Names, Field(exclude_if=lambda names: not names)]
# Left out while it is not set, for the same reason: hashes of schemas without it stay as they are.
Bins = Annotated[int | None, Field(ge=2, le=100, exclude_if=lambda bins: bins is None)]


class Column(Options):
    """A column of a table."""

    name: str = Field(min_length=1)
    kind: Literal["numeric", "integer", "categorical"]
    bounds: Bounds | None = None
    categories: Names = ()
    aliases: dict[str, str] = Field(default_factory=dict)  # other spellings of a category
    transform: Literal["none", "log1p"] = "none"
    nullable: bool = False
    bins: Bins = None  # cells of a number in the statistics; default: about a dozen
    unconfirmed: Marks = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        fault = self._category_fault() if self.kind == "categorical" else self._number_fault()
        if fault:
            raise ValueError(f'column "{self.name}": {fault}')
        return self

    def _category_fault(self) -> str | None:
        if len(self.categories) < 2 or repeated(self.categories) is not None:
            return "categories: needs at least two, each named once"
        if padded := next((c for c in self.categories if c != c.strip()), None):
            return f"categories: {padded!r} has blanks around it"
        if unknown := sorted(set(self.aliases.values()) - set(self.categories)):
            return f"aliases: {unknown[0]!r} is no declared category"
        if self.bounds or self.transform != "none":
            return "bounds and transform are for numbers"
        if self.bins is not None:
            return "bins are for numbers"
        return None

    def _number_fault(self) -> str | None:
        if self.bounds is None or self.bounds[0] >= self.bounds[1]:
            return "bounds: declare [low, high] with low < high"
        if max(abs(bound) for bound in self.bounds) > 2**53:
            return "bounds: must lie within -2^53 and 2^53"
        if self.kind == "integer" and not all(b.is_integer() for b in self.bounds):
            return "bounds: must be whole, for the column is"
        if self.categories or self.aliases:
            return "categories and aliases are for categorical columns"
        return self._transform_fault(*self.bounds) if self.transform == "log1p" else None

    def _transform_fault(self, low: float, high: float) -> str | None:
        if low < 0:
            return "transform: log1p needs a lower bound >= 0"
        if math.log1p(low) >= math.log1p(high):
            return "transform: log1p makes one number of both bounds; leave it out"
        return None

    @property
    def levels(self) -> int:
        """One-hot width of a categorical column; a nullable one has "missing" as its last level."""
        return len(self.categories) + self.nullable

    @property
    def width(self) -> int:
        """How many encoded numbers the column takes: its levels, or value (and presence)."""
        return self.levels if self.kind == "categorical" else 1 + self.nullable


@dataclass(frozen=True)
class Block:
    """Where a column stands in the encoded record: `encoded[start:stop]`."""

    column: Column
    start: int
    stop: int


class TableSchema(Options):
    """A table: its columns, its label (if any) and the key of a person (if any)."""

    modality: Literal["table"] = "table"
    columns: Annotated[tuple[Column, ...], Strict(False)] = Field(alias="column")  # noqa: FBT003
    label: str | None = None
    person: Annotated[str, Field(min_length=1)] | None = None
    missing: Names = ("", "NA", "?")
    header: bool = True  # without one, a file has all columns in the declared order
    unconfirmed: Marks = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [column.name for column in self.columns]
        if (twice := repeated(names)) is not None:
            raise ValueError(f"column: {twice!r} is declared twice")
        for column in self.columns:
            if lost := set(column.categories) & {"", *self.missing}:
                raise ValueError(
                    f'column "{column.name}": categories: {min(lost)!r} is a missing marker'
                )
        if self.label is not None:
            label = next((c for c in self.columns if c.name == self.label), None)
            if label is None or label.kind != "categorical" or label.nullable:
                raise ValueError(
                    f'label = "{self.label}": must name a categorical column that is not nullable'
                )
        if self.person in names:
            raise ValueError(f'person = "{self.person}": the key must not be a column of the model')
        if self.person is not None and not self.header:
            raise ValueError(
                f'person = "{self.person}": needs a file with a header, for it is no column of the '
                "model; set header = true"
            )
        if not self.features:
            raise ValueError("column: declare at least one besides the label")
        return self

    @cached_property
    def features(self) -> tuple[Column, ...]:
        """The columns that are encoded: all but the label."""
        return tuple(column for column in self.columns if column.name != self.label)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The layout of an encoded record, in the order of the features."""
        stops = [0]
        for column in self.features:
            stops.append(stops[-1] + column.width)
        spans = zip(self.features, pairwise(stops), strict=True)
        return tuple(Block(column, start, stop) for column, (start, stop) in spans)

    @property
    def numeric(self) -> bool:
        """Whether there is a number among the features."""
        return any(column.kind != "categorical" for column in self.features)

    @property
    def width(self) -> int:
        """Length of an encoded record."""
        return self.blocks[-1].stop

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an encoded record."""
        return (self.width,)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The label's categories; none without a label."""
        return next((c.categories for c in self.columns if c.name == self.label), ())


class ImageSchema(Options):
    """Images of one shape, with one class each (or none)."""

    modality: Literal["image"] = "image"
    height: Annotated[int, Field(ge=4, le=512)]
    width: Annotated[int, Field(ge=4, le=512)]
    channels: Literal[1, 3] = 1
    classes: Names = ()
    images: str = "images"  # the array in an npz file: [N, H, W] or [N, H, W, C], uint8
    labels: str = "labels"  # the array in an npz file: [N], a class's name or its index
    unconfirmed: Marks = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.classes) == 1 or repeated(self.classes) is not None:
            raise ValueError("classes: needs none, or at least two, each named once")
        if self.height % 4 or self.width % 4:
            raise ValueError(f"height, width = {self.height}, {self.width}: must be multiples of 4")
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an encoded record."""
        return self.channels, self.height, self.width

    @property
    def label(self) -> str | None:
        """What the label is called; `None` without classes."""
        return "label" if self.classes else None

    @property
    def person(self) -> None:
        """Images carry no key of a person."""
        return


PADDING = 256
"""The token behind the end of a text; smaller ones are bytes."""


def tokens_of(x: "np.ndarray") -> "np.ndarray":
    """The tokens of encoded texts: x [N, length], a token over `PADDING` each, -> int64.

    Whatever stands in x becomes a token: what is no number ends its record.
    """
    found: np.ndarray = (x * PADDING).round().clip(0, PADDING)
    found[~(found >= 0)] = PADDING
    return found.astype("int64")


class TextSchema(Options):
    """Texts, cut into records of a declared number of bytes; without classes."""

    modality: Literal["text"] = "text"
    length: Annotated[int, Field(ge=4, le=4096)] = 64  # bytes of a record; a shorter one is padded
    field: Annotated[str, Field(min_length=1)] = "text"  # the key of the text in a line of JSON
    person: Annotated[str, Field(min_length=1)] | None = None  # and of whose it is
    unconfirmed: Marks = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.person == self.field:
            raise ValueError(f'person = "{self.person}": is the key of the text; name another')
        return self

    @property
    def shape(self) -> tuple[int]:
        """Of an encoded record."""
        return (self.length,)

    @property
    def classes(self) -> tuple[str, ...]:
        """Texts have none."""
        return ()

    @property
    def label(self) -> None:
        """Texts have none."""
        return


Schema = TableSchema | ImageSchema | TextSchema
_SCHEMAS: dict[str, type[TableSchema] | type[ImageSchema] | type[TextSchema]] = {
    "table": TableSchema,
    "image": ImageSchema,
    "text": TextSchema,
}


def load_schema(path: Path | str, *, draft: bool = False) -> Schema:
    """Reads a schema from TOML; `draft` allows one with marks, for looking at data only.

    Raises:
        ConfigError: The file cannot be read, declares no usable schema, or is a draft.
    """
    return parse_schema(read_toml(Path(path)), origin=str(path), draft=draft)


def parse_schema(raw: dict[str, Any], origin: str, *, draft: bool = False) -> Schema:
    """Makes a schema from plain values; `origin` names them in errors.

    Raises:
        ConfigError: They declare no usable schema, or one with marks where `draft` is not said.
    """
    modality = raw.get("modality", "table")
    if not isinstance(modality, str) or modality not in _SCHEMAS:
        raise ConfigError(f"{origin}: modality = {modality!r}: must be table, image or text")
    try:
        schema: Schema = validated(_SCHEMAS[modality], raw)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    if (found := marks(schema)) and not draft:
        (section, names), *more = found.items()
        raise ConfigError(
            f"{origin}: {section}unconfirmed = {json.dumps(names, ensure_ascii=False)}: was read "
            "off the data; check it against the code book and delete that line"
            + (f" (and {len(more)} more)" if more else "")
        )
    return schema


def marks(schema: Schema) -> dict[str, tuple[str, ...]]:
    """What was read off the data and nobody confirmed: option names by their section's name."""
    columns = schema.columns if isinstance(schema, TableSchema) else ()
    sections = {"": schema.unconfirmed} | {
        f'column "{column.name}": ': column.unconfirmed for column in columns
    }
    return {section: names for section, names in sections.items() if names}


def schema_from_json(text: str) -> Schema:
    """Reads what `schema_to_json` made.

    Raises:
        ConfigError: It is no schema, or a draft of one.
    """
    try:
        raw = json.loads(text)
    except ValueError:
        raw = None
    if not isinstance(raw, dict):
        raise ConfigError("schema: is no JSON object")
    return parse_schema(raw, "schema")


def schema_to_json(schema: Schema) -> str:
    """A schema as it travels to the sites and into the run folder."""
    return schema.model_dump_json(by_alias=True)


def repeated(names: Iterable[str]) -> str | None:
    """The first name that stands there twice, if any."""
    return next((name for name, times in Counter(names).items() if times > 1), None)
