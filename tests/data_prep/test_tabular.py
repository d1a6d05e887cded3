"""Tables: what cannot be read, and that nothing is lost between a table and its numbers."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.config import Clean
from fedveil.data_prep import Encoded, modality
from fedveil.data_prep.clean import DataError, refuse_unusable
from fedveil.data_prep.draft import draft_schema
from fedveil.data_prep.schema import ImageSchema, TableSchema, load_schema, parse_schema
from fedveil.data_prep.tabular import (
    breast_cancer_schema,
    clean,
    decode,
    encode,
    identities,
    read,
    take,
    values,
)

WriteFile = Callable[[str, str], Path]

AGE = {"name": "age", "kind": "integer", "bounds": [0, 100]}
SEX = {"name": "sex", "kind": "categorical", "categories": ["f", "m"]}
ROOT = Path(__file__).resolve().parents[2]
ADULT = ROOT.parent / "shared" / "data" / "adult-train.csv"


def table(*columns: dict[str, Any], **options: Any) -> TableSchema:  # noqa: ANN401
    schema = parse_schema({"column": list(columns), **options}, "s.toml")
    assert isinstance(schema, TableSchema)
    return schema


def refusal(source: Path | str, schema: TableSchema) -> str:
    """The one line that refuses a source; it names the source."""
    with pytest.raises(DataError) as caught:
        read(str(source), schema)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"data.source = {source}: ")
    return line.removeprefix(f"data.source = {source}: ")


def unusable(raw: pl.DataFrame, schema: TableSchema) -> str:
    """The one line that refuses what was read, once it is cleaned."""
    found, report = clean(raw, schema, Clean())
    assert found.height == 0
    with pytest.raises(DataError) as caught:
        refuse_unusable(report)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    return line


SCHEMA = table(AGE, SEX)
BARE = table(AGE, SEX, header=False)
RECORDS = {"age": ["30", "4"], "sex": ["f", "m"]}


# What cannot be read.


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "x.csv", SCHEMA) == "is no file; check the path"


def test_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").mkdir()
    assert refusal(tmp_path / "x.csv", SCHEMA) == "is no file; check the path"


@pytest.mark.parametrize("name", ["x.txt", "x", "x.csv.gz", "x.xlsx"])
def test_a_wrong_ending_is_refused(write_file: WriteFile, name: str) -> None:
    path = write_file(name, "age,sex\n30,f\n")
    assert refusal(path, SCHEMA) == "must end in .csv, .tsv, .data, .parquet"


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.data"])
@pytest.mark.parametrize("text", ["", "\n", " \n\r\n", "\ufeff", "\ufeff\n"])
def test_an_empty_file_has_no_columns(write_file: WriteFile, name: str, text: str) -> None:
    line = refusal(write_file(name, text), SCHEMA)
    assert line == 'column "age" is missing; the file has no columns'


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.data"])
@pytest.mark.parametrize("text", ["", "\n", " \n\r\n", "\ufeff", "\ufeff\n"])
def test_where_no_header_is_declared_an_empty_file_holds_no_records(
    write_file: WriteFile, name: str, text: str
) -> None:
    holds_no_records(write_file(name, text), BARE)


def test_an_empty_parquet_file_is_refused(write_file: WriteFile) -> None:
    assert refusal(write_file("x.parquet", ""), SCHEMA).startswith("cannot be read: ")


def holds_no_records(path: Path, schema: TableSchema) -> None:
    raw = read(str(path), schema)
    assert raw.schema == {"age": pl.String, "sex": pl.String}
    assert raw.height == 0
    assert unusable(raw, schema) == "data: holds no records; check the file"


@pytest.mark.parametrize("text", ["age,sex", "age,sex\n", "\nage,sex\n\n", "sex, age ,more\n"])
def test_a_header_alone_holds_no_records(write_file: WriteFile, text: str) -> None:
    holds_no_records(write_file("x.csv", text), SCHEMA)


def test_a_parquet_file_may_hold_no_records(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pl.DataFrame(schema={"age": pl.Int64, "sex": pl.String}).write_parquet(path)
    holds_no_records(path, SCHEMA)


def test_a_missing_column_is_named_and_the_file_s_shown(write_file: WriteFile) -> None:
    path = write_file("x.csv", "age,gender\n30,f\n")
    assert refusal(path, SCHEMA) == "column \"sex\" is missing; the file has 'age', 'gender'"


def test_a_missing_key_of_a_person_is_named(write_file: WriteFile) -> None:
    path = write_file("x.csv", "age,sex\n30,f\n")
    line = refusal(path, table(AGE, SEX, person="id"))
    assert line == "column \"id\" is missing; the file has 'age', 'sex'"


def test_at_most_eight_found_columns_are_shown_in_plain_ascii(write_file: WriteFile) -> None:
    names = ["größe", "\x1b[31mred", "a'b", "\u2028", *"defghij"]
    line = refusal(write_file("x.csv", ",".join(names) + "\n"), SCHEMA)
    # The line separator is a blank around nothing: what is left has no name.
    shown = [*names[:3], " " * 4, *names[4:8]]
    assert line == f'column "age" is missing; the file has {", ".join(map(ascii, shown))}'
    assert line.isascii()
    assert line.isprintable()


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.parquet"])
@pytest.mark.parametrize(
    "content",
    [bytes(range(256)) * 8, b"\xff\xfe" * 100, b"PAR1" + bytes(range(256)) + b"PAR1"],
    ids=["bytes", "utf-16 mark", "false parquet"],
)
def test_garbage_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert refusal(path, SCHEMA)


def test_a_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pl.DataFrame(RECORDS).write_parquet(path)
    path.write_bytes(path.read_bytes()[:-20])
    assert refusal(path, SCHEMA).startswith("cannot be read: ")


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.data"])
@pytest.mark.parametrize(
    "content",
    [bytes(range(256)) * 8, b"\xff\xfe" * 100, b"PAR1" + bytes(range(256)) + b"PAR1"],
    ids=["bytes", "utf-16 mark", "false parquet"],
)
def test_garbage_without_a_header_leaves_nothing(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert unusable(read(str(path), BARE), BARE)


MALFORMED = [
    "4", "4,m,surplus", "4,m,", "m;4", '"4,m', "4,m,'", f"4,{'m' * 140_000}", '4,"m","', "x", '"',
]  # fmt: skip


@pytest.mark.parametrize("line", MALFORMED, ids=range(len(MALFORMED)))
@pytest.mark.parametrize("schema", [SCHEMA, BARE], ids=["header", "no header"])
def test_a_line_with_a_wrong_number_of_values_is_a_blank_record(
    write_file: WriteFile, line: str, schema: TableSchema
) -> None:
    for place in range(3):
        lines = ["30,f", "5,m"]
        lines.insert(place, line)
        path = write_file("x.csv", "\n".join(["age,sex"] * schema.header + lines))
        rows: list[tuple[str | None, ...]] = [("30", "f"), ("5", "m")]
        rows.insert(place, (None, None))
        raw = read(str(path), schema)
        assert raw.rows() == rows
        found, report = clean(raw, schema, Clean())
        assert found.rows() == [(30.0, "f"), (5.0, "m")]
        assert (report.records, report.blank, report.kept) == (3, 1, 2)
        assert all(c.missing == 0 for c in report.columns.values())
        refuse_unusable(report)


def test_many_malformed_lines_hide_no_good_one(write_file: WriteFile) -> None:
    path = write_file("x.csv", "age,sex\n" + "x\n" * 3000 + "30,f\n")
    raw = read(str(path), SCHEMA)
    assert raw.height == 3001
    assert raw.rows()[-1] == ("30", "f")


@pytest.mark.parametrize(
    "cells",
    [[[1], [2]], [timedelta(1), timedelta(2)]],
    ids=["lists", "durations"],
)
def test_a_column_of_no_plain_values_is_refused(tmp_path: Path, cells: list[Any]) -> None:
    path = tmp_path / "x.parquet"
    pl.DataFrame({"age": cells, "sex": ["f", "m"]}).write_parquet(path)
    assert refusal(path, SCHEMA)


def test_two_columns_of_one_name_are_refused(write_file: WriteFile) -> None:
    path = write_file("x.csv", "age,sex, age\n30,f,31\n")
    assert "age" in refusal(path, SCHEMA)


@pytest.mark.parametrize("text", ["30\n", "30,f,1\n4,m,1\n"])
def test_without_a_header_all_columns_must_be_there(write_file: WriteFile, text: str) -> None:
    raw = read(str(write_file("x.csv", text)), BARE)
    count = text.count("\n")
    assert raw.rows() == [(None, None)] * count
    assert unusable(raw, BARE).startswith(
        f"data: none of {count} records is usable ({count} are blank"
    )


def test_a_schema_of_images_is_refused(write_file: WriteFile) -> None:
    path = write_file("x.csv", "age,sex\n30,f\n")
    with pytest.raises(DataError, match=r"^schema: is for images, the source is a table$"):
        read(str(path), ImageSchema(height=4, width=4))


# What can.


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.csv", "age,sex\n30,f\n4,m\n"),
        ("x.CSV", "age,sex\n30,f\n4,m\n"),
        ("x.data", "age,sex\n30,f\n4,m\n"),
        ("x.tsv", "age\tsex\n30\tf\n4\tm\n"),
        ("x.TSV", "age\tsex\n30\tf\n4\tm\n"),
        ("order.csv", "sex,age\nf,30\nm,4\n"),
        ("more.csv", "id,age,sex,note\n1,30,f,\n2,4,m,x\n"),
        ("bom.csv", "\ufeffage,sex\n30,f\n4,m\n"),
        ("quoted.csv", '"age","sex"\n"30","f"\n4,"m"\n'),
        ("padded.csv", " age , sex\n30,f\n4,m\n"),
        ("crlf.csv", "age,sex\r\n30,f\r\n4,m\r\n"),
        ("no-end.csv", "age,sex\n30,f\n4,m"),
    ],
)
def test_one_table_in_many_spellings(write_file: WriteFile, name: str, text: str) -> None:
    path = write_file(name, text)
    assert read(str(path), SCHEMA).to_dict(as_series=False) == RECORDS


@pytest.mark.parametrize("text", ["age,sex\n30,f\n\n4,m\n", "age,sex\n30,f\n4,m\n\n"])
def test_an_empty_line_is_no_record(write_file: WriteFile, text: str) -> None:
    """Where every column may be missing it would even be kept: a person who never was."""
    assert read(str(write_file("x.csv", text)), SCHEMA).to_dict(as_series=False) == RECORDS


@pytest.mark.parametrize("text", ["\n", "\r\n", "  \n", "\u2003\t\n"])
def test_a_line_of_blanks_is_no_record_either(write_file: WriteFile, text: str) -> None:
    for schema, header in ((SCHEMA, "age,sex\n"), (BARE, "")):
        path = write_file("x.csv", f"{text}{header}{text}30,f\n{text}{text}4,m\n{text}")
        assert read(str(path), schema).to_dict(as_series=False) == RECORDS


@pytest.mark.parametrize(
    ("name", "line", "row"),
    [
        ("x.csv", '30,"f, or m"', ("30", "f, or m")),
        ("x.csv", '30, "f, or m"', ("30", "f, or m")),
        ("x.csv", '"3""0","f"', ('3"0', "f")),
        ("x.tsv", '30\t"f\tor m"', ("30", "f\tor m")),
        ("x.tsv", "30\tf, or m", ("30", "f, or m")),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_quotes_may_hold_separators(
    write_file: WriteFile, name: str, line: str, row: tuple[str, str], end: str
) -> None:
    header = "age\tsex" if name.endswith("tsv") else "age,sex"
    assert read(str(write_file(name, f"{header}\n{line}{end}")), SCHEMA).rows() == [row]


def test_quotes_hold_no_line_breaks(write_file: WriteFile) -> None:
    """Each line stands alone, or one stray quote would swallow the records after it."""
    path = write_file("x.csv", 'age,sex\n30,"f, or\nm"\n4,m\n')
    raw = read(str(path), SCHEMA)
    assert raw["age"].to_list() == ["30", None, "4"]
    first, *others = raw["sex"].to_list()
    assert first.strip() == "f, or"
    assert others == [None, "m"]


@pytest.mark.parametrize("line", ['5,"m', '"5,m', '5,m"', '5,"', '"'])
def test_an_unclosed_quote_ends_with_its_line(write_file: WriteFile, line: str) -> None:
    path = write_file("x.csv", f"age,sex\n30,f\n{line}\n4,m\n")
    raw = read(str(path), SCHEMA)
    assert raw.height == 3
    assert raw[[0, 2]].to_dict(as_series=False) == RECORDS


def test_an_unclosed_quote_in_the_header_ends_with_it_too(write_file: WriteFile) -> None:
    path = write_file("x.csv", 'age,"sex\n30,f\n4,m\n')
    assert read(str(path), SCHEMA).to_dict(as_series=False) == RECORDS


def test_bytes_that_are_no_text_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"age,sex\n30,f\n\xff5,\xe2\x82\n\x00,caf\xe9\n4,m\n")
    raw = read(str(path), SCHEMA)
    assert raw["age"].to_list() == ["30", "\ufffd5", "\x00", "4"]
    assert raw["sex"].to_list() == ["f", "\ufffd", "caf\ufffd", "m"]
    found, _ = clean(raw, SCHEMA, Clean())
    assert found.rows() == [(30.0, "f"), (4.0, "m")]


WIDE: list[dict[str, Any]] = [
    {**AGE, "nullable": True},
    SEX,
    {"name": "pay", "kind": "numeric", "bounds": [0.0, 9.0], "nullable": True},
    {"name": "note", "kind": "categorical", "categories": ["p", "u, v"], "nullable": True},
]

good_lines = st.builds(
    "{},{},{},{}".format,
    st.sampled_from(["30", "4", "?", "", "200", '"7"']),
    st.sampled_from(["f", "m", " m", '"f"']),
    st.sampled_from(["0.5", "", "8", "-1", "x"]),
    st.sampled_from(["p", "q", "r s", '"u, v"']),
).map(str.encode)
# Any bytes but those that end a line; and what a reader of lines stumbles over.
spoiled_lines = st.one_of(
    st.binary(max_size=40),
    st.text("\"',\t ;\\\x00f4\x0b\x0c\x1c\x85\u2028é", max_size=12).map(str.encode),
    st.tuples(good_lines, st.binary(max_size=4), st.integers(0, 20)).map(
        lambda made: made[0][: made[2]] + made[1] + made[0][made[2] :]
    ),
).map(lambda line: line.translate(None, b"\r\n"))


@settings(max_examples=100)
@given(
    st.lists(good_lines | spoiled_lines, max_size=5),
    st.lists(good_lines | spoiled_lines, max_size=5),
    good_lines,
    spoiled_lines,
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.booleans(),
)
def test_spoiling_a_line_changes_its_own_record_only(
    tmp_path_factory: pytest.TempPathFactory,
    before: list[bytes],
    after: list[bytes],
    good: bytes,
    spoiled: bytes,
    end: bytes,
    ended: bool,
    header: bool,
) -> None:
    path = tmp_path_factory.mktemp("lines") / "x.csv"
    schema = table(*WIDE, header=header)

    def rows(lines: list[bytes]) -> list[tuple[Any, ...]]:
        path.write_bytes(end.join([b"age,sex,pay,note"] * header + lines) + end * ended)
        found, report = clean(read(str(path), schema), schema, Clean())
        assert report.records <= len(lines)
        assert report.kept == found.height
        return found.rows()

    for line in (good, spoiled):
        alone = rows([line])
        assert len(alone) <= 1
        assert rows([*before, line, *after]) == rows(before) + alone + rows(after)
    assert len(rows([good])) == 1
    assert rows(before + after) == rows(before) + rows(after)


def test_a_byte_order_mark_means_the_same_on_any_line(tmp_path: Path) -> None:
    """Or taking out the first record would change what becomes of the second."""
    path = tmp_path / "x.csv"
    marked = "\ufeff4,m\n".encode()
    path.write_bytes(marked)
    alone, _ = clean(read(str(path), BARE), BARE, Clean())
    path.write_bytes(b"30,f\n" + marked)
    both, _ = clean(read(str(path), BARE), BARE, Clean())
    assert both.rows() == [(30.0, "f"), *alone.rows()]


def test_without_a_header_columns_stand_in_the_declared_order(write_file: WriteFile) -> None:
    path = write_file("x.csv", "30,f\n4,m\n")
    found = read(str(path), table(AGE, SEX, header=False))
    assert found.to_dict(as_series=False) == RECORDS


def test_values_are_read_as_they_stand(write_file: WriteFile) -> None:
    path = write_file("x.csv", "age,sex\n007,NA\n,  f \n1e1,?\n")
    found = read(str(path), SCHEMA)
    assert found["age"].to_list() == ["007", "", "1e1"]
    assert found["sex"].to_list()[::2] == ["NA", "?"]
    # Blanks before a value are left out (a quote may follow them), those after it stay.
    assert found["sex"].to_list()[1] == "f "
    # Nothing between two separators is nothing, in a file as in a frame.
    assert values(found, SCHEMA, "age") == ["007", "", "1e1"]
    cleaned, report = clean(found, table({**AGE, "nullable": True}, SEX), Clean())
    assert cleaned.rows() == [(None, "f")]
    assert (report.columns["age"].missing, report.columns["sex"].missing) == (1, 2)


def test_a_parquet_file_s_own_types_become_strings(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    schema = table(AGE, {"name": "x", "kind": "numeric", "bounds": [0, 1]}, SEX, person="id")
    pl.DataFrame(
        {"x": [0.25, None], "age": [30, 4], "sex": ["f", "m"], "id": [7, 8], "more": [1, 2]},
        schema_overrides={"sex": pl.Categorical, "age": pl.Int8},
    ).write_parquet(path)
    assert read(str(path), schema).to_dict(as_series=False) == {
        "age": ["30", "4"], "x": ["0.25", None], "sex": ["f", "m"], "id": ["7", "8"],
    }  # fmt: skip


def test_formats_agree(tmp_path: Path) -> None:
    frame = pl.DataFrame(RECORDS)
    frame.write_csv(tmp_path / "x.csv")
    frame.write_csv(tmp_path / "x.tsv", separator="\t")
    frame.write_parquet(tmp_path / "x.parquet")
    found = [read(str(tmp_path / name), SCHEMA) for name in ("x.csv", "x.tsv", "x.parquet")]
    assert all(one.equals(frame) for one in found)


def test_one_column_by_itself() -> None:
    schema = table(AGE, {**SEX, "aliases": {"w": "f"}}, person="id")
    raw = pl.DataFrame({"age": [" 3", None], "sex": ["w ", "m"], "id": ["p ", "q"]})
    assert values(raw, schema, "age") == ["3", ""]
    assert values(raw, schema, "sex") == ["f", "m"]
    assert values(raw, schema, "id") == ["p", "q"]
    with pytest.raises(DataError, match=r'^data\.column = "x": is no column .*age, sex, id$'):
        values(raw, schema, "x")


def test_take_gives_the_rows_in_the_order_asked_for() -> None:
    raw = pl.DataFrame({"age": ["1", "2", "3"]})
    assert take(raw, np.array([2, 0]))["age"].to_list() == ["3", "1"]
    assert take(raw, np.array([], dtype=np.int64)).height == 0


# Numbers.


def test_encoding_by_hand() -> None:
    schema = table(
        AGE,
        {"name": "pay", "kind": "numeric", "bounds": [-1.0, 3.0], "nullable": True},
        {"name": "log", "kind": "numeric", "bounds": [0.0, 99.0], "transform": "log1p"},
        {**SEX, "nullable": True},
        {"name": "y", "kind": "categorical", "categories": ["no", "yes"]},
        label="y",
    )
    frame = pl.DataFrame(
        {
            "age": [25.0, 100.0], "pay": [0.0, None], "log": [9.0, 0.0], "sex": ["m", None],
            "y": ["yes", "no"],
        }
    )  # fmt: skip
    found = encode(frame, schema)
    # age | pay, is there | log1p: log 10 / log 100 | f, m, missing
    assert found.x == pytest.approx(
        np.array([[0.25, 0.25, 1, 0.5, 0, 1, 0], [1, 0, 0, 0, 0, 0, 1]]), abs=1e-7
    )
    assert found.x.dtype == np.float32
    assert found.y.tolist() == [1, 0]
    assert found.y.dtype == np.int64


def test_without_a_label_the_class_is_zero() -> None:
    found = encode(pl.DataFrame({"age": [1.0, 2.0], "sex": ["f", "m"]}), SCHEMA)
    assert found.y.tolist() == [0, 0]
    assert found.y.dtype == np.int64


def test_decoding_takes_the_largest_level_and_stays_in_bounds() -> None:
    schema = table(AGE, {**SEX, "nullable": True}, {**AGE, "name": "z", "nullable": True})
    x = np.array(
        [[1.7, 0.2, 0.9, 0.3, 0.5, 0.51], [-3, 0.1, 0.2, 0.9, 0.5, 0.49]], dtype=np.float32
    )
    found = decode(Encoded(x, np.zeros(2, dtype=np.int64)), schema)
    assert found.to_dict(as_series=False) == {
        "age": [100, 0], "sex": ["m", None], "z": [50, None],
    }  # fmt: skip
    assert found.dtypes == [pl.Int64, pl.String, pl.Int64]


words = st.lists(st.text("abcdefg", min_size=1, max_size=3), min_size=2, max_size=4, unique=True)


@st.composite
def cleaned_tables(draw: st.DrawFn) -> tuple[TableSchema, pl.DataFrame]:
    """A schema and cleaned records of it, bounds themselves among the values."""
    count = draw(st.integers(1, 6))
    columns: list[dict[str, Any]] = []
    data: dict[str, pl.Series] = {}
    for index in range(draw(st.integers(1, 5))):
        name = f"c{index}"
        nullable = draw(st.booleans())
        kind = draw(st.sampled_from(["numeric", "integer", "categorical"]))
        column: dict[str, Any] = {"name": name, "kind": kind, "nullable": nullable}
        cells: st.SearchStrategy[Any]
        if kind == "categorical":
            column["categories"] = draw(words)
            cells = st.sampled_from(column["categories"])
        else:
            column["transform"] = draw(st.sampled_from(["none", "log1p"]))
            low = draw(st.integers(0 if column["transform"] == "log1p" else -500, 500))
            high = low + draw(st.integers(1, 10_000))
            column["bounds"] = [low, high]
            cells = st.sampled_from([low, high]) | (
                st.integers(low, high) if kind == "integer" else st.floats(low, high)
            )
            cells = cells.map(float)
        if nullable:
            cells = st.none() | cells
        dtype = pl.String if kind == "categorical" else pl.Float64
        data[name] = pl.Series(draw(st.lists(cells, min_size=count, max_size=count)), dtype=dtype)
        columns.append(column)
    options = {}
    if draw(st.booleans()):
        classes = draw(words)
        columns.append({"name": "y", "kind": "categorical", "categories": classes})
        labels = st.lists(st.sampled_from(classes), min_size=count, max_size=count)
        data["y"] = pl.Series(draw(labels), dtype=pl.String)
        options["label"] = "y"
    if len(columns) == 1 and options:
        return table({**AGE, "name": "c9"}, *columns, **options), pl.DataFrame(data)
    return table(*columns, **options), pl.DataFrame(data)


@given(cleaned_tables())
def test_encoded_records_are_float32_in_the_unit_cube(
    made: tuple[TableSchema, pl.DataFrame],
) -> None:
    schema, frame = made
    found = encode(frame, schema)
    assert found.x.shape == (frame.height, schema.width)
    assert found.x.dtype == np.float32
    assert (found.x >= 0).all()
    assert (found.x <= 1).all()
    for block in schema.blocks:
        if block.column.kind == "categorical":
            part = found.x[:, block.start : block.stop]
            assert (np.sort(part, axis=1)[:, -1] == 1).all()
            assert (part.sum(axis=1) == 1).all()
    assert ((found.y >= 0) & (found.y < max(1, len(schema.classes)))).all()


@given(cleaned_tables())
def test_decoding_undoes_encoding(made: tuple[TableSchema, pl.DataFrame]) -> None:
    schema, frame = made
    found = decode(encode(frame, schema), schema)
    assert found.columns == [c.name for c in schema.columns]
    for column in schema.columns:
        before, after = frame[column.name].to_list(), found[column.name].to_list()
        if column.kind != "numeric":
            assert after == before
            continue
        assert column.bounds is not None
        low, high = column.bounds
        # float32 keeps 24 bits; under log1p the error grows with the number.
        room = 4e-7 * (high - low) if column.transform == "none" else 4e-6 * (1 + high)
        for one, other in zip(before, after, strict=True):
            assert (one is None) == (other is None)
            assert one is None or abs(one - other) <= room


@given(cleaned_tables(), st.integers(0, 2**32 - 1))
def test_whatever_is_decoded_is_clean(made: tuple[TableSchema, pl.DataFrame], seed: int) -> None:
    """A generator's output, any numbers at all, decodes into the declared domain."""
    schema, _ = made
    rng = np.random.default_rng(seed)
    x = rng.normal(0.5, 1, (8, schema.width)).astype(np.float32)
    y = rng.integers(0, max(1, len(schema.classes)), 8)
    found = decode(Encoded(x, y), schema)
    assert found.height == 8
    for column in schema.columns:
        for value in found[column.name]:
            if value is None:
                assert column.nullable
            elif column.bounds is None:
                assert value in column.categories
            else:
                assert column.bounds[0] <= value <= column.bounds[1]


# Who a record is of.


def test_a_record_s_identity_is_its_person() -> None:
    schema = table(AGE, SEX, person="id")
    frame = pl.DataFrame({"age": [1.0, 2.0, 1.0], "sex": ["f", "m", "f"], "id": ["p", "p", "q"]})
    first, second, third = identities(frame, schema)
    assert first == second == b"p"
    assert third == b"q"


def test_without_a_person_it_is_the_whole_content() -> None:
    frame = pl.DataFrame({"age": [1.0, 1.0, 1.0, 2.0, None], "sex": ["f", "f", "m", "f", "f"]})
    found = identities(frame, SCHEMA)
    assert found[0] == found[1]
    assert len(set(found)) == 4


def test_contents_that_look_alike_when_joined_are_different() -> None:
    frame = pl.DataFrame({"a": ["x', 'y", "x"], "b": ["z", "y', 'z"]})
    schema = table(
        {"name": "a", "kind": "categorical", "categories": ["x", "x', 'y"]},
        {"name": "b", "kind": "categorical", "categories": ["z", "y', 'z"]},
    )
    assert len(set(identities(frame, schema))) == 2


# Real tables.


def test_breast_cancer_is_read_cleaned_and_encoded_whole() -> None:
    schema = breast_cancer_schema()
    raw = read("sklearn:breast_cancer", schema)
    assert raw.shape == (569, 31)
    cleaned, report = clean(raw, schema, Clean())
    assert report.kept == 569
    assert all(
        (c.missing, c.type_errors, c.unknown_categories, c.out_of_bounds) == (0, 0, 0, 0)
        for c in report.columns.values()
    )
    found = encode(cleaned, schema)
    assert found.x.shape == (569, 30)
    # Published: 212 malignant (class 0 of the schema), 357 benign.
    assert np.bincount(found.y).tolist() == [212, 357]
    # The first record: mean radius 17.99 of at most 40, worst fractal dimension 0.1189 of 0.25.
    assert found.x[0, 0] == pytest.approx(17.99 / 40, abs=1e-6)
    assert found.x[0, 29] == pytest.approx(0.1189 / 0.25, abs=1e-6)
    back = decode(found, schema)
    assert back["diagnosis"].to_list() == cleaned["diagnosis"].to_list()
    assert back["mean_area"].to_numpy() == pytest.approx(cleaned["mean_area"].to_numpy(), abs=1e-2)


def test_the_registry_serves_tables() -> None:
    found = modality(SCHEMA)
    assert (found.read, found.encode, found.decode) == (read, encode, decode)


def test_adult_is_cleaned_by_the_example_s_schema_to_the_published_counts() -> None:
    if not ADULT.is_file():
        pytest.skip("no shared/data/adult-train.csv")
    schema = load_schema(ROOT / "examples" / "adult.schema.toml")
    raw = read(str(ADULT), schema)
    cleaned, report = clean(raw, schema, Clean())
    # UCI: 32,561 records, 24,720 of them at most 50K; "?" stands in three columns only.
    assert report.kept == 32_561
    found = encode(cleaned, schema)
    assert sorted(np.bincount(found.y).tolist()) == [7_841, 24_720]
    assert found.x.min() == 0
    assert found.x.max() == 1
    # All its numbers are integers: nothing is lost.
    assert decode(found, schema).equals(
        cleaned.with_columns(pl.col(pl.Float64).cast(pl.Int64)), null_equal=True
    )
    # The file ends in an empty line, which is no record.
    assert report.records == 32_561
    missing = {name: found.missing for name, found in report.columns.items() if found.missing}
    assert sorted(missing.values()) == [583, 1836, 1843]
    assert missing["workclass"] == 1836
    assert all(c.type_errors + c.unknown_categories == 0 for c in report.columns.values())


def test_one_value_that_is_no_text_is_one_value_missing(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pl.DataFrame({"sex": [b"f", b"\xff\xfe", b"m"]}).write_parquet(path)
    schema = parse_schema(
        {"column": [{"name": "sex", "kind": "categorical", "categories": ["f", "m"]}]}, "test"
    )
    assert read(str(path), schema)["sex"].to_list() == ["f", "\ufffd\ufffd", "m"]


@pytest.mark.parametrize("commas", [1, 2, 5])
def test_columns_without_a_name_are_left_alone(commas: int, tmp_path: Path) -> None:
    """A spreadsheet leaves commas at the ends of lines; no schema can name what has no name."""
    end = "," * commas
    file = tmp_path / "x.csv"
    file.write_text(f"age,sex{end}\n44,f{end}\n45,m{end}\n", encoding="utf-8")
    columns = [
        {"name": "age", "kind": "integer", "bounds": [0, 90]},
        {"name": "sex", "kind": "categorical", "categories": ["f", "m"]},
    ]
    schema = parse_schema({"column": columns}, "test")
    assert read(str(file), schema).rows() == [("44", "f"), ("45", "m")]
    drafted = draft_schema(str(file))
    assert isinstance(drafted.schema, TableSchema)
    assert "age" in [c.name for c in drafted.schema.columns] or "age" in drafted.left_out
    assert "" in drafted.left_out
