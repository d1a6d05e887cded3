"""A drafted schema as commented TOML."""

import textwrap
from collections.abc import Iterable, Sequence

from .guess import Guess, LeftOut
from .schema import Column, ImageSchema, TableSchema, TextSchema
from .words import quoted

_HEAD = """\
# A DRAFT of a schema, made by `fedveil data schema` from
# {name}
# It was read off the data and is as private as the data until you have confirmed it.
#
# `unconfirmed` names what was read off the data; no run takes this file while there is such a line.
# Hold each of these against the code book, and delete the line once all of it is right:
"""
_TABLE = """\
#   name        what all sites call the column
#   kind        integer, numeric or categorical
#   bounds      what the value can be at all; here: what was found, rounded outwards
#   categories  all that there can be; here: what was found, also what only one record has
#   nullable    true: the value may be missing; false: a record without it is dropped
#   missing     what stands for a missing value, beside nothing at all
#   header      whether the first line names the columns; if not, all are declared, in their order
#   label       what generation is conditional on
"""
_IMAGE = """\
#   height, width, channels   of every image; others are dropped
#   classes                   all that there can be; a number counts from the first
#   images, labels            the arrays of the .npz
"""
_TEXT = """\
#   length   bytes of a record: longer ones are cut off
#   field    the key of the text in a line
"""
_PLAIN_TEXT = """\
# The schema of a plain text, by `fedveil data schema`. Nothing in it was read off the data.
#   length   bytes of a record: the text is cut at every so many, and one record is what is hidden
"""


def table_text(
    schema: TableSchema,
    guesses: Iterable[Guess],
    left_out: Sequence[LeftOut],
    notes: Iterable[str],
    name: str,
) -> str:
    """The TOML of a drafted table."""
    top = ['modality = "table"', f"header = {_word(schema.header)}"]
    top.append(f"missing = {_array(schema.missing)}")
    if schema.label is None:
        top.append("# label = ...   # a categorical column, if there is one that matters most")
    else:
        top.append(f"label = {quoted(schema.label)}")
    keys = [f.name for f in left_out if f.key]
    top += [f"# person = {quoted(key)}   # if this is the key of a person" for key in keys]
    top.append(f"unconfirmed = {_array(schema.unconfirmed)}")
    head = _HEAD.format(name=quoted(name)) + _TABLE
    parts = [head + "".join(_comment(note) for note in notes) + "\n".join(top)]
    parts += [_column_text(guess) for guess in guesses]
    parts += [_comment(f"Left out: column {quoted(f.name)}: {f.why}.").rstrip() for f in left_out]
    return "\n\n".join(parts) + "\n"


def image_text(schema: ImageSchema, name: str) -> str:
    """The TOML of drafted images."""
    lines = ['modality = "image"', f"height = {schema.height}", f"width = {schema.width}"]
    lines.append(f"channels = {schema.channels}")
    if schema.classes:
        lines.append(f"classes = {_array(schema.classes)}")
    if "images" in schema.unconfirmed:
        lines.append(f"images = {quoted(schema.images)}")
    if "labels" in schema.unconfirmed:
        lines.append(f"labels = {quoted(schema.labels)}")
    lines.append(f"unconfirmed = {_array(schema.unconfirmed)}")
    return _HEAD.format(name=quoted(name)) + _IMAGE + "\n".join(lines) + "\n"


def text_text(schema: TextSchema, keys: Sequence[str], name: str) -> str:
    """The TOML of drafted texts."""
    lines = ['modality = "text"', f"length = {schema.length}"]
    if "field" in schema.unconfirmed:
        lines.append(f"field = {quoted(schema.field)}")
    lines += [f"# person = {quoted(key)}   # if this is the key of a person" for key in keys]
    if schema.unconfirmed:
        lines.append(f"unconfirmed = {_array(schema.unconfirmed)}")
        return _HEAD.format(name=quoted(name)) + _TEXT + "\n".join(lines) + "\n"
    return _PLAIN_TEXT + "\n".join(lines) + "\n"


def _column_text(guess: Guess) -> str:
    column = guess.column
    lines = ["[[column]]", *(_comment(remark).rstrip() for remark in guess.remarks)]
    lines += [f"name = {quoted(column.name)}", f"kind = {quoted(column.kind)}", _domain(column)]
    if guess.suggestion:
        lines.append(f"# {guess.suggestion}")
    lines.append(f"nullable = {_word(column.nullable)}")
    lines.append(f"unconfirmed = {_array(column.unconfirmed)}")
    return "\n".join(lines)


def _domain(column: Column) -> str:
    if column.bounds is None:
        return f"categories = {_array(column.categories)}"
    low, high = (f"{b:.0f}" if b.is_integer() else repr(b) for b in column.bounds)
    return f"bounds = [{low}, {high}]"


def _array(names: Iterable[str]) -> str:
    """A TOML array of strings, over several lines where one would be long."""
    words = [quoted(name) for name in names]
    if sum(len(word) + 2 for word in words) < 80:
        return f"[{', '.join(words)}]"
    lines, length = [[]], 0  # type: list[list[str]], int
    for word in words:
        if lines[-1] and length + len(word) > 96:
            lines.append([])
            length = 0
        lines[-1].append(word)
        length += len(word) + 2
    return "[\n" + "".join(f"  {', '.join(line)},\n" for line in lines) + "]"


def _comment(text: str) -> str:
    wrapped = textwrap.wrap(text, 98, break_long_words=False, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in wrapped)


def _word(value: bool) -> str:  # noqa: FBT001
    return "true" if value else "false"
