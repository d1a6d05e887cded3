"""What a check says: the fault, how often, an example, what becomes of it, and the mend."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedveil.config import Clean, RunConfig
from fedveil.data_prep.clean import DataError
from fedveil.data_prep.findings import DROPPED, Checked, Finding, check, records_note
from fedveil.data_prep.schema import ImageSchema, Schema, parse_schema
from fedveil.data_prep.words import near, nearest, quoted, shown

WriteFile = Callable[[str, str], Path]

AGE = {"name": "age", "kind": "integer", "bounds": [0, 100], "nullable": True}
SEX = {"name": "sex", "kind": "categorical", "categories": ["Female", "Male"]}


def table(*columns: dict[str, Any], **options: Any) -> Schema:  # noqa: ANN401
    return parse_schema({"column": list(columns), **options}, "s.toml")


SCHEMA = table(AGE, SEX)


@pytest.fixture
def checked(write_file: WriteFile) -> Callable[..., Checked]:
    def run(
        lines: str,
        schema: Schema = SCHEMA,
        header: str = "age,sex\n",
        **rules: Any,  # noqa: ANN401
    ) -> Checked:
        path = write_file("x.csv", header + lines.replace(" ", "\n"))
        return check(str(path), schema, Clean(**rules))

    return run


Check = Callable[..., Checked]


def only(found: Checked) -> Finding:
    (finding,) = found.findings
    return finding


def test_clean_data_has_no_findings(checked: Check) -> None:
    found = checked("30,Male 4,Female")
    assert (found.findings, found.refusal, found.report.kept) == ((), None, 2)


@pytest.mark.parametrize(
    ("rule", "becomes", "kept"),
    [("clip", "clipped", 4), ("missing", "becomes missing", 4), ("drop", DROPPED, 1)],
)
def test_out_of_bounds(checked: Check, rule: str, becomes: str, kept: int) -> None:
    found = checked("30,Male 107,Male 107,Male -4,Female", out_of_bounds=rule)
    assert only(found) == Finding(
        "age",
        "out of bounds",
        3,
        ("107", "-4"),
        becomes,
        "widen bounds if the code book says so, or leave it",
    )
    assert found.report.kept == kept


@pytest.mark.parametrize(
    ("nullable", "rule", "becomes", "kept"),
    [
        (True, "missing", "becomes missing", 2),
        (True, "drop", DROPPED, 1),
        (False, "missing", DROPPED, 1),
    ],
)
def test_no_number(checked: Check, nullable: bool, rule: str, becomes: str, kept: int) -> None:
    schema = table({**AGE, "nullable": nullable}, SEX)
    found = checked("30,Male 4x,Male", schema, type_error=rule)
    assert only(found) == Finding(
        "age",
        "no whole number",
        1,
        ("4x",),
        becomes,
        "correct them in the file, or check the column's kind",
    )
    assert found.report.kept == kept


@pytest.mark.parametrize(
    ("value", "mend"),
    [
        ('"4,5"', "write decimals with a point"),
        ("4.5", 'kind = "numeric" if the code book has fractions'),
        ("N/A", 'add "N/A" to missing'),
        ("inf", "correct them in the file, or check the column's kind"),
    ],
)
def test_how_to_mend_what_is_no_number(checked: Check, value: str, mend: str) -> None:
    assert only(checked(f"30,Male {value},Male")).mend == mend


def test_an_unknown_category_is_held_against_the_declared_ones(checked: Check) -> None:
    found = checked("3,Male 4,Femal 5,Femal 6,Femal 7,male 8,zz 9,--")
    assert only(found) == Finding(
        "sex",
        "unknown category",
        6,
        ("Femal", "--", "male"),
        DROPPED,
        'add "--" to missing; did you mean "Female" by "Femal", "Male" by "male"? then aliases = '
        '{ "Femal" = "Female", "male" = "Male" }; add "zz" to categories if the code book has it',
    )


def test_the_advice_works(checked: Check) -> None:
    aliases = {"Femal": "Female", "male": "Male"}
    mended = table(AGE, {**SEX, "aliases": aliases}, missing=["--"])
    found = checked("3,Male 4,Femal 7,male", mended)
    assert (found.findings, found.report.kept) == ((), 3)


def test_aliases_that_are_there_stay_in_the_advice(checked: Check) -> None:
    schema = table(AGE, {**SEX, "aliases": {"M": "Male"}})
    assert 'aliases = { "M" = "Male", "Femal" = "Female" }' in (
        only(checked("3,M 4,Femal", schema)).mend
    )


def test_missing_values(checked: Check) -> None:
    first, second = checked("30,Male ?,Male 4,NA").findings
    assert first == Finding("age", "missing", 1, (), "stays missing")
    mend = "nullable = true keeps these records, if the value may be missing"
    assert second == Finding("sex", "missing", 1, (), DROPPED, mend)


def test_lines_that_are_broken(checked: Check) -> None:
    found = checked("30,Male 4 5,Male,x 6")
    assert only(found) == Finding(
        None,
        "no value, or a wrong number of fields",
        3,
        (),
        DROPPED,
        "2 with 1 fields in place of 2: mend their separators and quotes",
    )


def test_another_separator_without_a_header(checked: Check) -> None:
    schema = table(AGE, SEX, header=False)
    found = checked("30;Male 4;Female", schema, "")
    assert only(found).mend.startswith(
        "2 with 1 fields in place of 2; its separator seems to be a semicolon: save it"
    )
    assert found.refusal is not None
    assert "none of 2 records is usable (2 are blank)" in found.refusal


def test_a_record_of_nobody(checked: Check) -> None:
    schema = table(AGE, SEX, person="id")
    found = checked("1,30,Male ,4,Male ,,", schema, "id,age,sex\n")
    blank, nobody = found.findings
    assert (blank.column, blank.count) == (None, 1)
    assert (nobody.column, nobody.what, nobody.count) == ("id", "missing", 1)
    assert found.report.kept == 1


def test_what_is_wrong_throughout_is_refused_and_still_advised(checked: Check) -> None:
    found = checked("30,male 4,femal")
    assert found.refusal is not None
    assert "no value is what the schema declares" in found.refusal
    assert 'did you mean "Female" by "femal"' in only(found).mend
    assert not found.as_dict()["usable"]


@pytest.mark.parametrize(
    ("header", "hint"),
    [
        ("age,SEX", '; did you mean "SEX"?'),
        ("age;sex", "; its separator seems to be a semicolon: save it with commas as .csv"),
        ("30,Male", "; if it has no header: header = false"),
        ("a,b", "'a', 'b'"),
    ],
)
def test_a_missing_column_is_explained(checked: Check, header: str, hint: str) -> None:
    with pytest.raises(DataError, match="is missing; the file has") as caught:
        checked("30,Male", header=f"{header}\n")
    assert hint in str(caught.value)


def test_images_of_another_class_or_shape(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.array(["cat", "dgo", "dgo", "Cat"]))
    schema = ImageSchema(height=8, width=8, classes=("cat", "dog"))
    found = check(str(tmp_path / "x.npz"), schema, Clean())
    assert only(found) == Finding(
        "label",
        "unknown class",
        3,
        ("dgo", "Cat"),
        DROPPED,
        'did you mean "dog" by "dgo"? rename it; did you mean "cat" by "Cat"? rename it; '
        "add to classes what the code book has",
    )


# The declared size.


def run_config(source: str, **data: Any) -> RunConfig:  # noqa: ANN401
    raw = {
        "federation": {"sites": 10},
        "data": {"source": source, "schema": "s.toml", **data},
        "model": {"family": "vae"},
    }
    return RunConfig.model_validate(raw)


@pytest.mark.parametrize(
    ("source", "kept", "far"),
    [
        ("mine", 1000, False),
        ("mine", 501, False),
        ("mine", 499, True),
        ("mine", 2001, True),
        ("other", 100, False),
        ("other", 1000, True),
        ("other", 49, True),
    ],
)
def test_records_far_from_what_was_declared(source: str, kept: int, far: bool) -> None:
    """The run's own source is all of it; another file is one of ten sites'."""
    note = records_note(run_config("mine", records=1000), source, kept)
    assert (note is not None) == far
    if note is not None:
        assert "data.records = 1000" in note
        assert f"{kept} are usable here" in note
        assert ("about 100 at each of 10 sites" in note) == (source == "other")


# Words.


def test_the_nearest_word_whatever_its_case() -> None:
    assert near("FEMAL", ["Male", "Female"]) == "Female"
    assert near("zz", ["Male", "Female"]) is None
    assert nearest("zz", ["a"]) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("é", '"é"'),
        ('a"b\\', '"a\\"b\\\\"'),
        ("\x1b[31m\n", '"\\u001b[31m\\u000a"'),
        ("\U000e0001", '"\\U000e0001"'),
    ],
)
def test_quoted_text_is_toml_and_harmless(text: str, expected: str) -> None:
    assert quoted(text) == expected
    assert shown("x" * 50) == '"' + "x" * 37 + '..."'
