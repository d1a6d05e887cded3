"""Drafts of schemas: all that was read off the data is marked, and the text says what it holds."""

import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedveil.config import Clean, ConfigError, FedveilError
from fedveil.data_prep import modality
from fedveil.data_prep.clean import DataError, refuse_unusable
from fedveil.data_prep.draft import Draft, draft_schema, open_marks
from fedveil.data_prep.schema import Column, ImageSchema, TableSchema, load_schema, parse_schema
from fedveil.data_prep.tabular import breast_cancer_schema, read

WriteFile = Callable[[str, str], Path]
ROOT = Path(__file__).resolve().parents[2]
ADULT = ROOT.parent / "shared" / "data" / "adult-train.csv"


def table_of(draft: Draft) -> TableSchema:
    """The drafted schema; its text says the same, and no run takes it."""
    raw = tomllib.loads(draft.text)
    assert parse_schema(raw, "draft", draft=True) == draft.schema
    with pytest.raises(ConfigError, match="was read off the data"):
        parse_schema(raw, "draft")
    assert isinstance(draft.schema, TableSchema)
    return draft.schema


def columns(draft: Draft) -> dict[str, Column]:
    return {column.name: column for column in table_of(draft).columns}


def refusal(source: Path | str, label: str | None = None) -> str:
    with pytest.raises(FedveilError) as caught:
        draft_schema(str(source), label)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"data.source = {source}: ", "")


PEOPLE = "id,age,sex,y\n" + "".join(
    f"P{i},{20 + i * 7 % 30},{'fm'[i % 2]},{'no' if i % 3 else 'yes'}\n" for i in range(30)
)


def test_a_small_table_is_drafted_and_every_guess_marked(write_file: WriteFile) -> None:
    draft = draft_schema(str(write_file("x.csv", PEOPLE)))
    schema = table_of(draft)
    assert [column.name for column in schema.columns] == ["age", "sex", "y"]
    assert (schema.label, schema.header, schema.missing) == ("y", True, ())
    assert schema.unconfirmed == ("missing", "header", "label")
    assert columns(draft)["age"].bounds == (20, 50)
    assert columns(draft)["sex"].categories == ("f", "m")
    for column in schema.columns:
        domain = "categories" if column.kind == "categorical" else "bounds"
        assert column.unconfirmed == ("name", "kind", domain, "nullable")
    assert open_marks(schema) == 3 + 3 * 4
    assert draft.left_out.keys() == {"id"}
    assert draft.keys == ("id",)
    assert '# person = "id"' in draft.text


def test_the_text_begins_with_what_it_is(write_file: WriteFile) -> None:
    head = draft_schema(str(write_file("x.csv", PEOPLE))).text.split("modality")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert "DRAFT" in head.splitlines()[0]
    assert "as private as the data until you have confirmed it" in head
    marks = ("name", "kind", "bounds", "categories", "nullable", "missing", "header", "label")
    assert all(f"#   {mark} " in head for mark in marks)


def test_confirming_is_deleting_the_marks(write_file: WriteFile) -> None:
    path = write_file("x.csv", PEOPLE)
    lines = draft_schema(str(path)).text.splitlines()
    kept = [line for line in lines if not line.startswith("unconfirmed")]
    schema = load_schema(write_file("s.toml", "\n".join(kept)))
    kind = modality(schema)
    _, report = kind.clean(kind.read(str(path), schema), schema, Clean())
    assert report.kept == 30


def test_a_label_that_was_asked_for_is_not_marked(write_file: WriteFile) -> None:
    path = write_file("x.csv", PEOPLE)
    schema = table_of(draft_schema(str(path), "sex"))
    assert (schema.label, schema.unconfirmed) == ("sex", ("missing", "header"))
    assert refusal(path, "Sax") == ('--label Sax: is no column of the file; did you mean "sex"?')
    assert refusal(path, "id").startswith("--label id: cannot be a label: nearly every")
    assert refusal(path, "zzzz").endswith("; the file has 'id', 'age', 'sex', 'y'")


def test_missing_markers_that_occur_are_declared(write_file: WriteFile) -> None:
    rows = "".join(f"{v},{w}\n" for v, w in zip("12?4567N8" * 4, "ab-a" * 9, strict=True))
    schema = table_of(draft_schema(str(write_file("x.csv", "v,w\n" + rows.replace("N", "NA")))))
    assert schema.missing == ("-", "?", "NA")
    assert all(column.nullable for column in schema.columns)


# Headers.


@pytest.mark.parametrize(
    ("text", "header"),
    [
        ("a,b\n1,x\n2,y\n", True),
        ("a,b\nx,u\ny,v\nx,v\n", True),
        ("1,x\n2,y\n", False),
        ("x,u\ny,u\nx,v\ny,v\n", False),  # what stands on top stands below too
        ("?,x\n2,y\n3,x\n", False),
        (",v\n1,x\n2,y\n", True),
        ("junk\n1,x\n2,y\n", False),  # the first line is broken
    ],
)
def test_a_header_is_words_that_stand_nowhere_below(
    write_file: WriteFile, text: str, header: bool
) -> None:
    path = write_file("x.csv", text)
    draft = draft_schema(str(path))
    schema = table_of(draft)
    assert schema.header == header
    names = {column.name for column in schema.columns} | draft.left_out.keys()
    assert ("column_1" in names) == (not header)


def test_a_column_without_a_name_is_left_out(write_file: WriteFile) -> None:
    draft = draft_schema(str(write_file("x.csv", ",v\n1,x\n2,y\n3,x\n")))
    assert draft.left_out == {"": "it has no name; give it one if the model needs it"}


def test_without_a_header_nothing_can_be_left_out_and_that_is_said(write_file: WriteFile) -> None:
    text = "".join(f"P{i},{i % 7},{'ab'[i % 2]}\n" for i in range(30))
    draft = draft_schema(str(write_file("x.csv", text)))
    assert table_of(draft).header
    (note,) = draft.notes
    assert "put the line column_1,column_2,column_3 on its top" in note
    assert note.split()[0] in draft.text
    # And so it is: with that line the draft reads the file.
    path = write_file("y.csv", "column_1,column_2,column_3\n" + text)
    assert read(str(path), draft.schema).height == 30


# Files.


def test_broken_lines_do_not_matter(write_file: WriteFile) -> None:
    lines = PEOPLE.splitlines()
    broken = [*lines[:5], "x", 'a,"b', "1,2,3,4,5,6", *lines[5:]]
    draft = draft_schema(str(write_file("x.csv", "\n".join(broken))))
    whole = draft_schema(str(write_file("x.csv", PEOPLE)))
    assert draft.schema == whole.schema
    (note,) = draft.notes
    assert note.startswith("Some lines have another number of fields")


@pytest.mark.parametrize("name", ["x.tsv", "x.parquet", "x.data"])
def test_one_table_in_many_forms(tmp_path: Path, write_file: WriteFile, name: str) -> None:
    path = write_file("x.csv", PEOPLE)
    frame = pl.read_csv(path)
    other = tmp_path / name
    if name == "x.parquet":
        frame.write_parquet(other)
    else:
        frame.write_csv(other, separator="\t" if name == "x.tsv" else ",")
    found, expected = draft_schema(str(other)), draft_schema(str(path))
    assert table_of(found).columns == table_of(expected).columns
    # Parquet names its columns: no header was guessed.
    assert ("header" in table_of(found).unconfirmed) == (name != "x.parquet")


def test_parquet_lists_and_missing_values(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    frame = pl.DataFrame({"l": [[1], [2]] * 9, "b": [True, False] * 9, "n": [1.5, None] * 9})
    frame.with_columns(n=pl.Series([1.5, None, 2.5] * 6)).write_parquet(path)
    draft = draft_schema(str(path))
    assert draft.left_out == {"l": "it holds no plain values"}
    assert columns(draft)["b"].categories == ("false", "true")
    assert columns(draft)["n"].nullable


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "holds no records; check the file"),
        ("\n\n", "holds no records; check the file"),
        ("a,b\n", "holds no records; check the file"),
        ("a,b,a\n1,x,2\n2,y,3\n", "column 'a' is there twice; rename one"),
        ("a\0b\n", "is no text in UTF-8; save it as such"),
        ("a;b\n1;x\n2;y\n", "has one column; its separator seems to be a semicolon: save it"),
        ("a,b\n1,2\n1,2\n", 'no column can be drafted; column "a": it has one value only; column'),
    ],
)
def test_what_cannot_be_drafted_is_refused(write_file: WriteFile, text: str, why: str) -> None:
    assert refusal(write_file("x.csv", text)).startswith(why)


def test_other_sources_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone.csv") == "is no file; check the path"
    assert refusal(tmp_path / "gone.npz") == "is no file; check the path"
    assert refusal(tmp_path / "x.xlsx").startswith("must end in .csv")
    assert "its schema is built in" in refusal("sklearn:digits")
    assert refusal(tmp_path) == "holds no PNG or JPEG that can be read"


@pytest.mark.parametrize("name", ["x.csv", "x.parquet", "x.npz"])
def test_rubbish_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(bytes(range(256)) * 20)
    assert refusal(path)


def test_a_label_alone_is_no_model(write_file: WriteFile) -> None:
    path = write_file("x.csv", "y\n" + "a\nb\n" * 9)
    assert refusal(path, "y") == "no column can be drafted beside the label"
    assert table_of(draft_schema(str(path))).label is None


@given(
    st.lists(
        st.lists(
            st.one_of(
                st.sampled_from(["a", "b", "NA", "?", "", "1", "2.5", "007", "-", "inf", '"', "é"]),
                st.text(max_size=4),
                st.integers().map(str),
                st.floats().map(str),
            ),
            min_size=1,
            max_size=3,
        ),
        min_size=1,
        max_size=30,
    )
)
def test_any_file_is_drafted_or_refused_and_a_draft_loads(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]
) -> None:
    path = tmp_path_factory.mktemp("any") / "x.csv"
    text = "\n".join(",".join(row) for row in rows)
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        draft = draft_schema(str(path))
    except FedveilError:
        return
    table_of(draft)


# Known data.


def test_breast_cancer_lies_within_its_draft(tmp_path: Path) -> None:
    declared = breast_cancer_schema()
    path = tmp_path / "x.csv"
    read("sklearn:breast_cancer", declared).write_csv(path)
    draft = draft_schema(str(path))
    schema = table_of(draft)
    assert (schema.label, schema.classes) == ("diagnosis", ("benign", "malignant"))
    assert [column.name for column in schema.columns] == [c.name for c in declared.columns]
    assert {column.kind for column in schema.features} == {"numeric"}
    kind = modality(schema)
    _, report = kind.clean(kind.read(str(path), schema), schema, Clean())
    refuse_unusable(report)
    assert report.kept == 569
    assert all(column.out_of_bounds == 0 for column in report.columns.values())


@pytest.mark.skipif(not ADULT.exists(), reason="the shared data are not here")
def test_adult_is_drafted_as_its_code_book_has_it() -> None:
    drafted = table_of(draft_schema(str(ADULT)))
    declared = load_schema(ROOT / "examples" / "adult.schema.toml")
    assert isinstance(declared, TableSchema)
    assert (drafted.header, drafted.missing, drafted.label) == (False, ("?",), "column_15")
    for found, meant in zip(drafted.columns, declared.columns, strict=True):
        assert (found.kind, found.nullable) == (meant.kind, meant.nullable)
        assert sorted(found.categories) == sorted(meant.categories)


# Images.


def images_of(draft: Draft) -> ImageSchema:
    raw = tomllib.loads(draft.text)
    assert parse_schema(raw, "draft", draft=True) == draft.schema
    with pytest.raises(ConfigError, match="was read off the data"):
        parse_schema(raw, "draft")
    assert isinstance(draft.schema, ImageSchema)
    return draft.schema


def test_a_folder_of_images(tmp_path: Path) -> None:
    for index in range(4):
        folder = tmp_path / "dog" if index % 2 else tmp_path / "cat"
        folder.mkdir(exist_ok=True)
        pixels = np.zeros((8, 12), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    Image.fromarray(np.zeros((9, 9, 3), dtype=np.uint8)).save(tmp_path / "cat" / "odd.png")
    (tmp_path / "cat" / "bad.png").write_text("no image")
    draft = draft_schema(str(tmp_path))
    schema = images_of(draft)
    assert (schema.height, schema.width, schema.channels) == (8, 12, 1)
    assert schema.classes == ("cat", "dog")
    assert schema.unconfirmed == ("height", "width", "channels", "classes")
    assert draft.notes == ("Images of other shapes will be dropped.",)
    assert refusal(tmp_path, "cat").startswith("--label cat: is for tables")


def test_an_archive_of_several_arrays(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(
        path,
        test_images=np.zeros((2, 8, 8), dtype=np.uint8),
        test_labels=np.zeros(2, dtype=int),
        train_images=np.zeros((5, 8, 8), dtype=np.uint8),
        other=np.zeros(5, dtype=int),
        train_labels=np.array([0, 1, 2, 2, 1]),
    )
    draft = draft_schema(str(path))
    schema = images_of(draft)
    assert (schema.images, schema.labels) == ("train_images", "train_labels")
    assert schema.classes == ("0", "1", "2")
    assert "labels" in schema.unconfirmed
    assert draft.notes == ("Several arrays may be images: 'test_images', 'train_images'.",)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (np.array(["b", "a", "b"]), ("a", "b")),
        (np.array([b"b", b"a", b"b"]), ("a", "b")),
        (np.array([0, -1, 1]), ()),
        (np.array([0, 5000, 1]), ()),
        (np.array([0, 0, 0]), ()),
        (np.array([0.5, 1, 2]), ()),
        (None, ()),
    ],
)
def test_classes_of_an_archive(
    tmp_path: Path, labels: np.ndarray | None, classes: tuple[str, ...]
) -> None:
    path = tmp_path / "x.npz"
    colour = np.zeros((3, 4, 8, 3), dtype=np.uint8)
    if labels is None:
        np.savez(path, images=colour)
    else:
        np.savez(path, images=colour, labels=labels)
    schema = images_of(draft_schema(str(path)))
    assert (schema.channels, schema.classes) == (3, classes)
    assert ("classes" in schema.unconfirmed) == bool(classes)


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.zeros((3, 9, 8), dtype=np.uint8), "images are 9x8: must be multiples of 4"),
        (np.zeros((3, 8, 8)), "holds no images: an array must be uint8"),
        (np.zeros((0, 8, 8), dtype=np.uint8), "holds no images: an array must be uint8"),
    ],
)
def test_images_that_no_schema_takes(tmp_path: Path, array: np.ndarray, why: str) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images=array)
    with pytest.raises(DataError):
        draft_schema(str(path))
    assert refusal(path).startswith(why)
