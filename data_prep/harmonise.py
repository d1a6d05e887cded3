"""A site's own columns under the federation's names: the `[map]` of its `site.toml`.

The names are settled before a record is looked at: whether a map fits a schema rests on the two
alone, so that a site may say so (design.md, privacy rule 1). What the file holds is another matter.
"""

from collections.abc import Mapping
from types import MappingProxyType

from ..config import ConfigError
from .schema import Schema, TableSchema
from .words import nearest, quoted

Columns = Mapping[str, str]
"""The federation's column = the site's own; a column that is not named is called alike."""

NO_MAP: Columns = MappingProxyType({})


def wanted(schema: TableSchema) -> list[str]:
    """The federation's columns that a site must have: the schema's, and the key of a person."""
    return [c.name for c in schema.columns] + ([] if schema.person is None else [schema.person])


def check_columns(columns: Columns, schema: Schema) -> None:
    """Holds a map against a schema, without a look at any data.

    Raises:
        ConfigError: It names a column that the federation has not, or one of the site's columns
            would be two of the federation's, or nothing here has columns with names.
    """
    if not columns:
        return
    if not isinstance(schema, TableSchema):
        raise ConfigError(
            f"map: has {_some(columns)}, and {schema.modality}s have no columns; take [map] out"
        )
    known = wanted(schema)
    for name in columns:
        if name not in known:
            raise ConfigError(
                f"map.{_key(name)}: is no column of the federation"
                f"{nearest(name, known) or '; it has ' + ', '.join(map(quoted, known[:8]))}"
            )
    if not schema.header:
        raise ConfigError(
            f"map: has {_some(columns)}, and the schema says header = false: columns are known by "
            "their places; take [map] out, and put the columns in the schema's order"
        )
    taken: dict[str, str] = {}
    for name in known:
        own = columns.get(name, name)
        if own in taken:
            raise ConfigError(
                f"map: column {quoted(own)} of the file would be both {quoted(taken[own])} and "
                f"{quoted(name)}; map each to a column of its own"
            )
        taken[own] = name


def own_columns(columns: Columns, schema: TableSchema) -> dict[str, str]:
    """Every wanted column, and what it is called at the site.

    Raises:
        ConfigError: As `check_columns`.
    """
    check_columns(columns, schema)
    return {name: columns.get(name, name) for name in wanted(schema)}


def deciding(columns: Columns, schema: Schema) -> dict[str, str]:
    """The part of a map that decides on which side of the split a record is.

    With persons that is their key's column; without, a record is known by its whole content.
    """
    if not isinstance(schema, TableSchema):
        return {}
    names = wanted(schema) if schema.person is None else [schema.person]
    return {name: columns[name] for name in names if columns.get(name, name) != name}


def _key(name: str) -> str:
    plain = name.replace("_", "").replace("-", "")
    return name if plain.isalnum() and plain.isascii() else quoted(name)


def _some(columns: Columns) -> str:
    return "a line" if len(columns) == 1 else f"{len(columns)} lines"
