"""The contract that all sites sign: what is refused, and the layout that follows from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedveil.config import ConfigError, RunConfig
from fedveil.data_prep import MODALITIES, Modality, modality, run_schema
from fedveil.data_prep.schema import (
    ImageSchema,
    Schema,
    TableSchema,
    load_schema,
    marks,
    parse_schema,
    repeated,
    schema_from_json,
    schema_to_json,
)

WriteFile = Callable[[str, str], Path]

AGE = {"name": "age", "kind": "integer", "bounds": [0, 120]}
PAY = {"name": "pay", "kind": "numeric", "bounds": [0.0, 9.5], "nullable": True}
SEX = {"name": "sex", "kind": "categorical", "categories": ["f", "m"]}


def table(*columns: dict[str, Any], **options: Any) -> TableSchema:  # noqa: ANN401
    schema = parse_schema({"column": list(columns), **options}, "s.toml")
    assert isinstance(schema, TableSchema)
    return schema


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_schema(raw, "s.toml")
    line = str(caught.value)
    assert line.startswith("s.toml: ")
    assert "\n" not in line
    return line.removeprefix("s.toml: ")


# One column.


@pytest.mark.parametrize(
    ("column", "line"),
    [
        (
            {"name": "a", "kind": "categorical"},
            'column "a": categories: needs at least two, each named once',
        ),
        (
            {"name": "a", "kind": "categorical", "categories": ["x"]},
            'column "a": categories: needs at least two, each named once',
        ),
        (
            {"name": "a", "kind": "categorical", "categories": ["x", "y", "x"]},
            'column "a": categories: needs at least two, each named once',
        ),
        (
            {**SEX, "name": "a", "aliases": {"w": "f", "z": "zz"}},
            "column \"a\": aliases: 'zz' is no declared category",
        ),
        ({**SEX, "name": "a", "bounds": [0, 1]}, 'column "a": bounds and transform are for'),
        ({**SEX, "name": "a", "transform": "log1p"}, 'column "a": bounds and transform are for'),
        ({**SEX, "name": "a", "bins": 3}, 'column "a": bins are for numbers'),
        ({"name": "a", "kind": "numeric"}, 'column "a": bounds: declare [low, high]'),
        (
            {"name": "a", "kind": "integer", "bounds": [2, 1]},
            'column "a": bounds: declare [low, high] with low < high',
        ),
        (
            {"name": "a", "kind": "numeric", "bounds": [1.0, 1.0]},
            'column "a": bounds: declare [low, high] with low < high',
        ),
        (
            {**AGE, "name": "a", "categories": ["x", "y"]},
            'column "a": categories and aliases are for categorical columns',
        ),
        (
            {**AGE, "name": "a", "aliases": {"x": "y"}},
            'column "a": categories and aliases are for categorical columns',
        ),
        (
            {"name": "a", "kind": "numeric", "bounds": [-0.5, 1.0], "transform": "log1p"},
            'column "a": transform: log1p needs a lower bound >= 0',
        ),
        (
            {**AGE, "name": "a", "bounds": [2**53 - 1, 2**53], "transform": "log1p"},
            'column "a": transform: log1p makes one number of both bounds',
        ),
        ({**AGE, "name": ""}, 'column.0.name = "": must not be empty'),
        ({**AGE, "kind": "text"}, "column.0.kind = \"text\": must be 'numeric', 'integer' or"),
        ({**AGE, "bounds": [0, float("inf")]}, "column.0.bounds.1 = Infinity: must be a finite"),
        ({**AGE, "bounds": [float("nan"), 1]}, "column.0.bounds.0 = NaN: must be a finite"),
        ({**AGE, "bounds": ["0", "1"]}, 'column.0.bounds.0 = "0": must be a valid number'),
        ({**AGE, "bounds": [0]}, "column.0.bounds.1: missing"),
        ({**SEX, "categories": [1, 2]}, "column.0.categories.0 = 1: must be a valid string"),
        ({**AGE, "nulable": True}, 'column.0.nulable: unknown key; did you mean "nullable"?'),
        ({"kind": "integer", "bounds": [0, 1]}, "column.0.name: missing"),
    ],
)
def test_a_bad_column_is_refused(column: dict[str, Any], line: str) -> None:
    assert refusal({"column": [column, {**AGE, "name": "other"}]}).startswith(line)


def test_log1p_may_start_at_zero() -> None:
    schema = table({"name": "a", "kind": "numeric", "bounds": [0, 1], "transform": "log1p"})
    assert schema.columns[0].transform == "log1p"


def test_bounds_of_an_integer_column_are_whole() -> None:
    """Or clipping to them, and decoding, would leave the column's domain."""
    assert refusal({"column": [{"name": "a", "kind": "integer", "bounds": [0.5, 3.5]}]}).startswith(
        'column "a": bounds'
    )


@pytest.mark.parametrize("category", ["NA", "?", " padded", "padded "])
def test_a_category_that_no_value_can_be_is_refused(category: str) -> None:
    """Values are trimmed, and missing markers are missing, before categories are looked at."""
    raw = {"column": [{"name": "a", "kind": "categorical", "categories": [category, "x", "y"]}]}
    assert "categories" in refusal(raw)


@pytest.mark.parametrize("missing", [[], ["NA"], [""]])
def test_nothing_at_all_is_no_category(missing: list[str]) -> None:
    """It is missing, whatever markers are declared."""
    column = {"name": "a", "kind": "categorical", "categories": ["", "x"]}
    assert "categories" in refusal({"column": [column], "missing": missing})


# The table.


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        ({"column": [AGE, SEX, AGE]}, "column: 'age' is declared twice"),
        ({"column": [AGE, SEX], "label": "sx"}, 'label = "sx": must name a categorical column'),
        ({"column": [AGE, SEX], "label": "age"}, 'label = "age": must name a categorical column'),
        (
            {"column": [AGE, {**SEX, "nullable": True}], "label": "sex"},
            'label = "sex": must name a categorical column that is not nullable',
        ),
        (
            {"column": [AGE, SEX], "person": "age"},
            'person = "age": the key must not be a column of the model',
        ),
        ({"column": [SEX], "label": "sex"}, "column: declare at least one besides the label"),
        ({"column": []}, "column: declare at least one"),
        ({}, "column: missing"),
        ({"column": AGE}, "column = "),
        ({"column": [AGE], "colunm": []}, 'colunm: unknown key; did you mean "column"?'),
        (
            {"column": [AGE], "modality": "video"},
            "modality = 'video': must be table, image or text",
        ),
        (
            {"column": [AGE], "modality": ["table"]},
            "modality = ['table']: must be table, image or text",
        ),
    ],
)
def test_a_bad_table_is_refused(raw: dict[str, Any], line: str) -> None:
    assert refusal(raw).startswith(line)


def test_the_label_is_no_feature_and_has_the_classes() -> None:
    schema = table(AGE, SEX, PAY, label="sex")
    assert [c.name for c in schema.features] == ["age", "pay"]
    assert schema.classes == ("f", "m")
    assert table(AGE, SEX).classes == ()


def test_the_layout_by_hand() -> None:
    colour = {
        "name": "colour", "kind": "categorical", "categories": ["r", "g", "b"], "nullable": True,
    }  # fmt: skip
    schema = table(AGE, SEX, PAY, colour, {**SEX, "name": "label"}, label="label")
    spans = [(b.column.name, b.start, b.stop) for b in schema.blocks]
    # A number is one wide, a nullable one two; categories one a level, a nullable one more.
    assert spans == [("age", 0, 1), ("sex", 1, 3), ("pay", 3, 5), ("colour", 5, 9)]
    assert schema.width == 9


def test_defaults_of_a_table() -> None:
    schema = table(AGE)
    assert (schema.label, schema.person, schema.header) == (None, None, True)
    assert schema.missing == ("", "NA", "?")


def test_a_schema_is_frozen() -> None:
    schema = table(AGE)
    with pytest.raises(ValidationError, match="frozen"):
        schema.label = "age"  # type: ignore[misc]


def test_repeated_finds_the_first_name_that_stands_twice() -> None:
    assert repeated([]) is None
    assert repeated(["a", "b"]) is None
    assert repeated(["c", "a", "b", "a", "b"]) == "a"


# Images.


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"height": 6}, "height, width = 6, 8: must be multiples of 4"),
        ({"width": 10}, "height, width = 8, 10: must be multiples of 4"),
        ({"height": 0}, "height = 0: must be >= 4"),
        ({"width": 516}, "width = 516: must be <= 512"),
        ({"channels": 2}, "channels = 2: must be 1 or 3"),
        ({"classes": ["a"]}, "classes: needs none, or at least two, each named once"),
        ({"classes": ["a", "b", "a"]}, "classes: needs none, or at least two, each named once"),
        ({"label": "x"}, "label: unknown key"),
    ],
)
def test_a_bad_image_schema_is_refused(options: dict[str, Any], line: str) -> None:
    raw = {"modality": "image", "height": 8, "width": 8, **options}
    assert refusal(raw).startswith(line)


def test_images_have_a_label_only_with_classes_and_never_a_person() -> None:
    assert ImageSchema(height=4, width=8).label is None
    schema = ImageSchema(height=4, width=8, classes=("a", "b"))
    assert (schema.label, schema.person) == ("label", None)


# Any table.

names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6)
words = st.lists(st.text("abcdefg", min_size=1, max_size=3), min_size=2, max_size=5, unique=True)
bounds = st.tuples(st.integers(0, 50), st.integers(1, 1000)).map(lambda p: [p[0], p[0] + p[1]])
numbers = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["numeric", "integer"]),
        "bounds": bounds,
        "transform": st.sampled_from(["none", "log1p"]),
        "nullable": st.booleans(),
    }
)
categoricals = st.fixed_dictionaries(
    {"kind": st.just("categorical"), "categories": words, "nullable": st.booleans()}
)


@st.composite
def tables(draw: st.DrawFn) -> TableSchema:
    found = draw(
        st.lists(
            st.tuples(names, numbers | categoricals),
            min_size=1,
            max_size=6,
            unique_by=lambda c: c[0],
        )
    )
    columns = [{"name": name, **rest} for name, rest in found]
    taken = {name for name, _ in found}
    options: dict[str, Any] = {"header": draw(st.booleans())}
    if draw(st.booleans()):
        columns.append({"name": "the label", "kind": "categorical", "categories": draw(words)})
        options["label"] = "the label"
    if draw(st.booleans()):
        options["header"] = True
        options["person"] = draw(names.filter(lambda n: n not in taken))
    return table(*columns, **options)


@given(tables())
def test_blocks_are_contiguous_and_as_wide_as_their_columns(schema: TableSchema) -> None:
    assert [b.column for b in schema.blocks] == list(schema.features)
    assert schema.blocks[0].start == 0
    for before, after in zip(schema.blocks, schema.blocks[1:], strict=False):
        assert before.stop == after.start
    for block in schema.blocks:
        column = block.column
        values = len(column.categories) if column.kind == "categorical" else 1
        assert block.stop - block.start == values + (1 if column.nullable else 0)
    assert schema.width == sum(b.stop - b.start for b in schema.blocks)


@given(tables())
def test_a_table_survives_json(schema: TableSchema) -> None:
    assert schema_from_json(schema_to_json(schema)) == schema


@given(
    st.builds(
        lambda h, w, channels, classes: ImageSchema(
            height=4 * h, width=4 * w, channels=channels, classes=tuple(classes)
        ),
        st.integers(1, 128),
        st.integers(1, 128),
        st.sampled_from([1, 3]),
        st.just([]) | words,
    )
)
def test_an_image_schema_survives_json(schema: ImageSchema) -> None:
    assert schema_from_json(schema_to_json(schema)) == schema


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"table"', "null"])
def test_what_is_no_json_object_is_no_schema(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^schema: is no JSON object$"):
        schema_from_json(text)


# Files.


def test_a_file_declares_a_table(write_file: WriteFile) -> None:
    path = write_file(
        "s.toml",
        'label = "sex"\n[[column]]\nname = "age"\nkind = "integer"\nbounds = [0, 120]\n'
        '[[column]]\nname = "sex"\nkind = "categorical"\ncategories = ["f", "m"]\n'
        '[column.aliases]\nmale = "m"\n',
    )
    assert load_schema(path) == table(AGE, {**SEX, "aliases": {"male": "m"}}, label="sex")


def test_a_file_declares_images(write_file: WriteFile) -> None:
    path = write_file("s.toml", 'modality = "image"\nheight = 28\nwidth = 28\n')
    assert load_schema(str(path)) == ImageSchema(height=28, width=28)


def test_a_bad_schema_file_names_itself(write_file: WriteFile, tmp_path: Path) -> None:
    path = write_file("s.toml", '[[column]]\nname = "a"\nkind = "numeric"\n')
    with pytest.raises(ConfigError) as caught:
        load_schema(path)
    assert str(caught.value).startswith(f'{path}: column "a": bounds: declare')
    with pytest.raises(ConfigError, match=r"cannot be read"):
        load_schema(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=r"is not TOML"):
        load_schema(write_file("broken.toml", "[[column]\n"))


# A run's schema, and the registry.


def test_built_in_sources_have_a_schema(make_config: Callable[..., RunConfig]) -> None:
    digits = run_schema(make_config())
    assert digits == ImageSchema(height=8, width=8, classes=tuple("0123456789"))
    cancer = run_schema(make_config(data={"source": "sklearn:breast_cancer"}))
    assert isinstance(cancer, TableSchema)
    assert (cancer.width, cancer.classes) == (30, ("malignant", "benign"))


def test_a_declared_schema_wins(
    make_config: Callable[..., RunConfig], write_file: WriteFile
) -> None:
    path = write_file("s.toml", 'modality = "image"\nheight = 8\nwidth = 8\n')
    found = run_schema(make_config(data={"schema": str(path)}))
    assert found == ImageSchema(height=8, width=8)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("sklearn:iris", r"^data\.source = sklearn:iris: unknown; known are sklearn:digits, "),
        ("/srv/x.csv", r"^data\.schema: missing: name the TOML file"),
    ],
)
def test_a_run_without_a_schema_is_refused(
    make_config: Callable[..., RunConfig], source: str, line: str
) -> None:
    with pytest.raises(ConfigError, match=line):
        run_schema(make_config(data={"source": source}))


@pytest.mark.parametrize(
    "schema", [table(AGE), ImageSchema(height=4, width=4)], ids=["table", "image"]
)
def test_every_modality_is_registered(schema: Schema) -> None:
    assert schema.modality in MODALITIES
    assert isinstance(modality(schema), Modality)


def test_all_registered_modalities_have_a_schema() -> None:
    assert set(MODALITIES) == {"table", "image", "text"}


# What was read off the data and nobody confirmed.


def draft_of(raw: dict[str, Any]) -> Schema:
    """What a person may look at, and no run may take."""
    return parse_schema(raw, "s.toml", draft=True)


MARKED = {**AGE, "unconfirmed": ["bounds"]}
WHY = "was read off the data; check it against the code book and delete that line"


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        ({"column": [SEX, MARKED]}, f'column "age": unconfirmed = ["bounds"]: {WHY}'),
        ({"column": [AGE], "unconfirmed": ["header"]}, f'unconfirmed = ["header"]: {WHY}'),
        (
            {"column": [MARKED], "unconfirmed": ["header", "label"]},
            f'unconfirmed = ["header", "label"]: {WHY} (and 1 more)',
        ),
        (
            {"modality": "image", "height": 8, "width": 8, "unconfirmed": ["height"]},
            f'unconfirmed = ["height"]: {WHY}',
        ),
    ],
)
def test_a_draft_is_refused_by_whoever_does_not_ask_for_one(
    raw: dict[str, Any], line: str, tmp_path: Path
) -> None:
    assert refusal(raw) == line
    schema = draft_of(raw)
    assert marks(schema)
    # The marks travel with it, so that no way leads round the refusal.
    with pytest.raises(ConfigError) as caught:
        schema_from_json(schema_to_json(schema))
    assert str(caught.value) == f"schema: {line}"


def test_a_run_refuses_a_draft(write_file: WriteFile) -> None:
    path = write_file("s.toml", DRAFTED)
    with pytest.raises(ConfigError, match=r'column "age": unconfirmed = \["kind"\]: was read off'):
        load_schema(path)
    config = RunConfig.model_validate(
        {
            "data": {"source": "x.csv", "schema": str(path), "records": 10},
            "model": {"family": "vae"},
        }
    )
    with pytest.raises(ConfigError, match=r'column "age": unconfirmed = \["kind"\]: was read off'):
        run_schema(config)
    assert marks(load_schema(path, draft=True)) == {'column "age": ': ("kind",)}


DRAFTED = """
[[column]]
name = "age"
kind = "integer"
bounds = [0, 120]
unconfirmed = ["kind"]
"""


def test_an_empty_mark_is_none() -> None:
    assert table({**AGE, "unconfirmed": []}, unconfirmed=[]) == table(AGE)


def test_a_confirmed_schema_is_hashed_and_stored_as_it_ever_was() -> None:
    """Ledgers hold a hash of this text, and run folders the text."""
    column = (
        '{"name":"age","kind":"integer","bounds":[0.0,120.0],"categories":[],"aliases":{},'
        '"transform":"none","nullable":false}'
    )
    rest = '"label":null,"person":null,"missing":["","NA","?"],"header":true}'
    assert schema_to_json(table(AGE)) == f'{{"modality":"table","column":[{column}],{rest}'
    assert table(AGE).model_dump_json() == f'{{"modality":"table","columns":[{column}],{rest}'
    assert ImageSchema(height=4, width=8).model_dump_json() == (
        '{"modality":"image","height":4,"width":8,"channels":1,"classes":[],"images":"images",'
        '"labels":"labels"}'
    )
