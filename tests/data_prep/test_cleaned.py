"""Cleaned files: they read as the same records again, and are whole or not there."""

import errno
import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.config import Clean, ConfigError
from fedveil.data_prep import cleaned as cleaned_module
from fedveil.data_prep import modality
from fedveil.data_prep.clean import CleaningReport, DataError, refuse_unusable
from fedveil.data_prep.cleaned import write_cleaned
from fedveil.data_prep.schema import ImageSchema, Schema, parse_schema
from fedveil.data_prep.tabular import breast_cancer_schema

WriteFile = Callable[[str, str], Path]

AGE = {"name": "age", "kind": "integer", "bounds": [0, 99], "nullable": True}
PAY = {"name": "pay", "kind": "numeric", "bounds": [-1, 1e6], "nullable": True}
SEX = {
    "name": "sex",
    "kind": "categorical",
    "categories": ["f", "m", 'x "y", z'],
    "aliases": {"male": "m"},
    "nullable": True,
}


def table(*columns: dict[str, Any], **options: Any) -> Schema:  # noqa: ANN401
    return parse_schema({"column": list(columns), **options}, "s.toml")


def read_clean(source: Path | str, schema: Schema, rules: Clean | None = None) -> Any:  # noqa: ANN401
    kind = modality(schema)
    found, _ = kind.clean(kind.read(str(source), schema), schema, rules or Clean())
    return found


def refusal(source: Path, schema: Schema, out: Path) -> str:
    before = sorted(p.name for p in source.parent.iterdir())
    with pytest.raises(ConfigError) as caught:
        write_cleaned(str(source), schema, Clean(), out)
    assert sorted(p.name for p in source.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"--out {out}: ")


ODD = [
    "", "?", "9", "99", "99.0", "1e2", "-0", "0.1", "44.0", "f", "m", "male", "Male", "007", "inf",
    "nan", 'x "y", z', "\ufeffq", '"', "a\\", "1e-300",
]  # fmt: skip
CELLS = st.one_of(
    st.sampled_from(ODD),
    st.text(max_size=3),
    st.floats(-10, 200).map(str),
    st.integers(-10, 200).map(str),
)


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
@given(
    rows=st.lists(st.tuples(CELLS, CELLS, CELLS, CELLS), min_size=1, max_size=12),
    header=st.booleans(),
    missing=st.sampled_from([["?"], ["?", "99", "9"], ["99.0", "0", "99", "0.0", "99.00"]]),
    rule=st.sampled_from(["clip", "missing", "drop"]),
)
def test_a_cleaned_table_reads_as_the_same_records(
    tmp_path_factory: pytest.TempPathFactory,
    ending: str,
    rows: list[tuple[str, ...]],
    header: bool,
    missing: list[str],
    rule: str,
) -> None:
    folder = tmp_path_factory.mktemp("trip")
    person = {"person": "id"} if header else {}
    schema = table(AGE, PAY, SEX, header=header, missing=missing, **person)
    names = ["age", "pay", "sex", "id"]
    source = folder / "x.parquet"
    pl.DataFrame(rows, schema=names, orient="row").write_parquet(source)
    rules = Clean.model_validate({"out_of_bounds": rule})
    expected = read_clean(source, schema, rules)
    out = folder / f"out{ending}"
    try:
        report = write_cleaned(str(source), schema, rules, out)
    except DataError:
        with pytest.raises(DataError):
            refuse_unusable(report_of(source, schema, rules))
    except ConfigError:
        # No CSV of ours can hold a line break or a leading byte order mark; Parquet can.
        assert ending == ".csv"
        assert re.search("[\\n\\r\ufeff]", "".join(expected["id"]))
    else:
        found = read_clean(out, schema, rules)
        assert found.equals(expected)
        assert found.height == report.kept
        note = out.with_name(f"{out.name}.cleaning.json")
        assert json.loads(note.read_text()) == report.as_dict()
        return
    assert [p.name for p in folder.iterdir()] == ["x.parquet"]


def report_of(source: Path, schema: Schema, rules: Clean) -> CleaningReport:
    """What cleaning says of a file."""
    kind = modality(schema)
    _, report = kind.clean(kind.read(str(source), schema), schema, rules)
    assert isinstance(report, CleaningReport)
    return report


def test_a_csv_by_hand(write_file: WriteFile, tmp_path: Path) -> None:
    text = 'pay,age,sex,note\n1.50,44.0,male,x\n2e6,?,"x ""y"", z",y\n,107,m,z\nx,x,x,x\n1\n'
    out = tmp_path / "out.csv"
    report = write_cleaned(str(write_file("x.csv", text)), table(AGE, PAY, SEX), Clean(), out)
    assert out.read_text() == ('age,pay,sex\n44,1.5,m\n,1000000.0,"x ""y"", z"\n99,,m\n')
    assert (report.records, report.blank, report.kept) == (5, 1, 3)
    for path in (out, tmp_path / "out.csv.cleaning.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600  # it is as private as the data
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "out.csv",
        "out.csv.cleaning.json",
        "x.csv",
    ]


def test_a_number_that_would_read_as_missing_is_spelled_otherwise(
    write_file: WriteFile, tmp_path: Path
) -> None:
    schema = table(AGE, PAY, missing=["99", "0.5"])
    path = write_file("x.csv", "age,pay\n107,0.50\n99,0.5\n1,2\n")
    for ending in (".csv", ".parquet"):
        out = tmp_path / f"out{ending}"
        write_cleaned(str(path), schema, Clean(), out)
        assert read_clean(out, schema).rows() == [(99.0, 0.5), (1.0, 2.0)]
    assert (tmp_path / "out.csv").read_text().startswith("age,pay\n99.0,5.0")


def test_parquet_keeps_the_types_and_keys_stay_words(write_file: WriteFile, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    path = write_file("x.csv", "id,age,pay\n007,44.0,1\n8,,2.5\n")
    write_cleaned(str(path), table(AGE, PAY, person="id"), Clean(), out)
    frame = pl.read_parquet(out)
    assert dict(frame.schema) == {"age": pl.Int64, "pay": pl.Float64, "id": pl.String}
    assert frame.rows() == [(44, 1.0, "007"), (None, 2.5, "8")]


def test_breast_cancer(tmp_path: Path) -> None:
    schema, out = breast_cancer_schema(), tmp_path / "out.csv"
    report = write_cleaned("sklearn:breast_cancer", schema, Clean(), out)
    assert report.kept == 569
    assert read_clean(out, schema).equals(read_clean("sklearn:breast_cancer", schema))


# What is refused, with nothing written.


def test_a_line_break_goes_into_parquet_only(tmp_path: Path) -> None:
    source = tmp_path / "x.parquet"
    pl.DataFrame({"id": ["a\nb"], "age": ["4"]}).write_parquet(source)
    schema = table(AGE, person="id")
    assert refusal(source, schema, tmp_path / "out.csv").startswith(
        "would not read as the same records again: a value holds a line break"
    )
    write_cleaned(str(source), schema, Clean(), tmp_path / "out.parquet")
    assert read_clean(tmp_path / "out.parquet", schema)["id"].to_list() == ["a\nb"]


def test_aliases_in_a_circle_are_refused(write_file: WriteFile, tmp_path: Path) -> None:
    schema = table({**SEX, "aliases": {"f": "m", "m": "f"}})
    path = write_file("x.csv", "sex\nf\nm\nf\n")
    assert "aliases rename a category" in refusal(path, schema, tmp_path / "out.csv")


@pytest.mark.parametrize("there", ["out.csv", "out.csv.cleaning.json"])
def test_nothing_is_overwritten(write_file: WriteFile, tmp_path: Path, there: str) -> None:
    path = write_file("x.csv", "age\n4\n")
    write_file(there, "mine")
    assert refusal(path, table(AGE), tmp_path / "out.csv").endswith(
        "is there already; choose another name"
    )
    assert (tmp_path / there).read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("x.csv", "is the data itself; choose another name"),
        ("no/out.csv", "its folder is not there; make it first"),
        ("out.npz", "the schema is for tables; end it in .csv or .parquet"),
        ("out", "the schema is for tables; end it in .csv or .parquet"),
    ],
)
def test_where_nothing_can_be_written(
    write_file: WriteFile, tmp_path: Path, name: str, why: str
) -> None:
    path = write_file("x.csv", "age\n4\n")
    assert refusal(path, table(AGE), tmp_path / name) == why
    assert path.read_text() == "age\n4\n"


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_full_disk_leaves_nothing(
    write_file: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Whichever of the four writes and renames fails."""
    path, calls = write_file("x.csv", "age\n4\n"), []

    def counted(name: str) -> Callable[..., None]:
        real = getattr(cleaned_module, name)

        def act(*arguments: object) -> None:
            calls.append(name)
            if len(calls) == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(*arguments)

        return act

    for name in ("create_secret_file", "publish"):
        monkeypatch.setattr(cleaned_module, name, counted(name))
    assert refusal(path, table(AGE), tmp_path / "out.csv") == (
        "cannot be written (No space left on device); choose another folder"
    )
    assert len(calls) == failing


def test_data_that_cannot_be_used_leave_nothing(write_file: WriteFile, tmp_path: Path) -> None:
    for text in ("age\n", "age\nx\n"):
        path = write_file("x.csv", text)
        with pytest.raises(DataError):
            write_cleaned(str(path), table(AGE), Clean(), tmp_path / "out.csv")
    assert [p.name for p in tmp_path.iterdir()] == ["x.csv"]


# Images.


@pytest.mark.parametrize("classes", [(), ("a", "b")])
@pytest.mark.parametrize("channels", [1, 3])
def test_cleaned_images_read_as_the_same_images(
    tmp_path: Path, classes: tuple[str, ...], channels: int
) -> None:
    pixels = np.arange(5 * 4 * 8 * channels).reshape(5, 4, 8, channels).astype(np.uint8)
    labels = np.array(["a", "b", "zz", "b", "a"])
    np.savez(tmp_path / "x.npz", pics=pixels, labels=labels)
    raw = {"height": 4, "width": 8, "channels": channels, "classes": classes, "images": "pics"}
    schema = ImageSchema.model_validate(raw)
    out = tmp_path / "out.npz"
    report = write_cleaned(str(tmp_path / "x.npz"), schema, Clean(), out)
    assert report.kept == (4 if classes else 5)
    found, expected = read_clean(out, schema), read_clean(tmp_path / "x.npz", schema)
    assert np.array_equal(found.pixels, expected.pixels)
    assert np.array_equal(found.labels, expected.labels)
    assert sorted(np.load(out).files) == sorted(["pics", *["labels"] * bool(classes)])


def test_an_array_may_be_called_file(tmp_path: Path) -> None:
    schema = ImageSchema(height=8, width=8, classes=tuple("0123456789"), images="file")
    out = tmp_path / "out.npz"
    assert write_cleaned("sklearn:digits", schema, Clean(), out).kept == 1797
    assert np.array_equal(
        read_clean(out, schema).pixels, read_clean("sklearn:digits", schema).pixels
    )
