"""A site's own columns under the federation's names, and every map that is none."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.config import Clean, ConfigError
from fedveil.data_prep import modality
from fedveil.data_prep.clean import DataError
from fedveil.data_prep.harmonise import check_columns, deciding, own_columns
from fedveil.data_prep.schema import ImageSchema, Schema, TableSchema, parse_schema

WriteFile = Callable[[str, str], Path]

AGE = {"name": "age", "kind": "integer", "bounds": [0, 100]}
SEX = {"name": "sex", "kind": "categorical", "categories": ["f", "m"]}


def table(*columns: Mapping[str, Any], **options: Any) -> TableSchema:  # noqa: ANN401
    schema = parse_schema({"column": list(columns), **options}, "s.toml")
    assert isinstance(schema, TableSchema)
    return schema


SCHEMA = table(AGE, SEX)
PERSONS = table(AGE, SEX, person="patient")
BARE = table(AGE, SEX, header=False)
DIGITS = ImageSchema(height=8, width=8, classes=tuple("0123456789"))


def read(source: Path, schema: Schema, columns: Mapping[str, str]) -> pl.DataFrame:
    found = modality(schema).read(str(source), schema, columns)
    assert isinstance(found, pl.DataFrame)
    return found


NONE = ": is no column of the federation"
TWICE = ': column "{}" of the file would be both "{}" and "{}"; map each to a column of its own'
BY_PLACE = ": has a line, and the schema says header = false: columns are known by their places"


class TestReading:
    def test_a_file_under_its_own_names(self, write_file: WriteFile) -> None:
        path = write_file("t.csv", "geschlecht,alter,sonst\nf,30,x\nm,4,y\n")
        found = read(path, SCHEMA, {"age": "alter", "sex": "geschlecht"})
        assert found.to_dict(as_series=False) == {"age": ["30", "4"], "sex": ["f", "m"]}

    def test_what_is_not_mapped_is_called_alike(self, write_file: WriteFile) -> None:
        path = write_file("t.csv", "alter,sex\n30,f\n")
        assert read(path, SCHEMA, {"age": "alter"}).columns == ["age", "sex"]

    def test_the_map_wins_over_a_column_of_the_federations_name(
        self, write_file: WriteFile
    ) -> None:
        """Another column may happen to bear that name at this site."""
        path = write_file("t.csv", "age,alter,sex\n999,30,f\n")
        assert read(path, SCHEMA, {"age": "alter"})["age"].to_list() == ["30"]

    def test_two_columns_may_change_names(self, write_file: WriteFile) -> None:
        path = write_file("t.csv", "age,sex\nf,30\n")
        found = read(path, SCHEMA, {"age": "sex", "sex": "age"})
        assert found.to_dict(as_series=False) == {"age": ["30"], "sex": ["f"]}

    def test_the_key_of_a_person(self, write_file: WriteFile) -> None:
        path = write_file("t.csv", "age,sex,pid\n30,f,p1\n")
        assert read(path, PERSONS, {"patient": "pid"})["patient"].to_list() == ["p1"]

    def test_parquet(self, tmp_path: Path) -> None:
        path = tmp_path / "t.parquet"
        pl.DataFrame({"alter": [30], "sex": ["f"]}).write_parquet(path)
        assert read(path, SCHEMA, {"age": "alter"})["age"].to_list() == ["30"]

    def test_cleaning_goes_by_the_federations_names(self, write_file: WriteFile) -> None:
        raw = read(write_file("t.csv", "alter,sex\n30,f\n999,m\n"), SCHEMA, {"age": "alter"})
        _, report = modality(SCHEMA).clean(raw, SCHEMA, Clean())
        assert set(report.columns) == {"age", "sex"}

    def test_without_a_map_it_is_as_it_was(self, write_file: WriteFile) -> None:
        path = write_file("t.csv", "age,sex\n30,f\n")
        assert read(path, SCHEMA, {}).equals(modality(SCHEMA).read(str(path), SCHEMA))


class TestAMapThatIsNone:
    def test_a_column_that_the_file_has_not(self, write_file: WriteFile) -> None:
        path = write_file("t.csv", "alter,sex\n30,f\n")
        with pytest.raises(DataError) as caught:
            read(path, SCHEMA, {"age": "altre"})
        assert str(caught.value) == (
            f'data.source = {path}: column "altre" (map.age) is missing; the file has '
            "'alter', 'sex'; did you mean \"alter\"?"
        )

    @pytest.mark.parametrize(
        ("schema", "columns", "line"),
        [
            (SCHEMA, {"agee": "alter"}, f'.agee{NONE}; did you mean "age"?'),
            (SCHEMA, {"zzz": "alter"}, f'.zzz{NONE}; it has "age", "sex"'),
            (SCHEMA, {"a b\n": "x"}, f'."a b\\u000a"{NONE}; it has "age", "sex"'),
            (SCHEMA, {"age": "x", "sex": "x"}, TWICE.format("x", "age", "sex")),
            (SCHEMA, {"age": "sex"}, TWICE.format("sex", "age", "sex")),
            (PERSONS, {"patient": "age"}, TWICE.format("age", "age", "patient")),
            (BARE, {"age": "alter"}, BY_PLACE),
            (DIGITS, {"age": "a", "sex": "x"}, ": has 2 lines, and images have no columns"),
        ],
    )
    def test_is_refused_in_one_line(
        self, schema: Schema, columns: Mapping[str, str], line: str
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            check_columns(columns, schema)
        assert str(caught.value).startswith(f"map{line}")
        assert "\n" not in str(caught.value)
        # Nor is anything read by it, whatever there is to read.
        with pytest.raises(ConfigError, match=r"^map"):
            modality(schema).read("sklearn:digits" if schema is DIGITS else "no", schema, columns)

    @given(
        st.dictionaries(st.sampled_from(["age", "sex", "patient"]), st.text(min_size=1, max_size=3))
    )
    def test_no_two_columns_are_ever_one(self, columns: dict[str, str]) -> None:
        try:
            own = own_columns(columns, PERSONS)
        except ConfigError:
            return
        assert list(own) == ["age", "sex", "patient"]
        assert len(set(own.values())) == 3


def test_what_decides_on_the_side_of_a_record() -> None:
    columns = {"age": "alter", "sex": "sex", "patient": "pid"}
    assert deciding(columns, SCHEMA) == {"age": "alter"}
    assert deciding(columns, PERSONS) == {"patient": "pid"}
    assert deciding({"age": "alter"}, PERSONS) == {}
    assert deciding(columns, DIGITS) == {}
