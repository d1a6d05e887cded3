"""Images: files that are refused, images that are dropped, and an exact way there and back."""

import gc
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from fedveil.config import Clean
from fedveil.data_prep import Encoded, modality
from fedveil.data_prep.clean import (
    CleaningReport,
    ColumnReport,
    DataError,
    refuse_unusable,
)
from fedveil.data_prep.images import Images, clean, decode, encode, identities, read, take, values
from fedveil.data_prep.schema import ImageSchema, TableSchema, parse_schema

GREY = ImageSchema(height=8, width=4, classes=("cat", "dog"))
COLOUR = ImageSchema(height=4, width=8, channels=3)
PLAIN = ImageSchema(height=8, width=4)
DIGITS = ImageSchema(height=8, width=8, classes=tuple("0123456789"))

Save = Callable[..., str]


def pixels(count: int, schema: ImageSchema = GREY, seed: int = 0) -> np.ndarray:
    """Images as an npz file holds them: [N, H, W] or [N, H, W, 3]."""
    shape = (count, schema.height, schema.width) + ((3,) if schema.channels == 3 else ())
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def save_arrays(**arrays: Any) -> str:  # noqa: ANN401
        path = tmp_path / "x.npz"
        np.savez(path, **arrays)
        return str(path)

    return save_arrays


def refusal(source: str, schema: ImageSchema = GREY) -> str:
    with pytest.raises(DataError) as caught:
        read(source, schema)
    line = str(caught.value)
    del caught
    gc.collect()  # a file left open warns here, not in whichever test comes next
    assert "\n" not in line
    assert line.startswith(f"data.source = {source}: ")
    return line.removeprefix(f"data.source = {source}: ")


# npz files that are refused.


def test_a_missing_array_is_named_and_the_file_s_shown(save: Save) -> None:
    path = save(pictures=pixels(2), labels=np.array([0, 1]))
    assert refusal(path) == 'has no array "images"; it has pictures, labels'
    path = save(images=pixels(2))
    assert refusal(path) == 'has no array "labels"; it has images'


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (np.zeros((2, 4, 8), dtype=np.uint8), "(4, 8, 1) uint8"),
        (np.zeros((2, 8, 4, 3), dtype=np.uint8), "(8, 4, 3) uint8"),
        (np.zeros((2, 32), dtype=np.uint8), "(32,) uint8"),
        (np.zeros((2, 8, 4), dtype=np.float32), "(8, 4, 1) float32"),
        (np.zeros((2, 8, 4), dtype=np.int64), "(8, 4, 1) int64"),
        (np.zeros((2, 8, 4), dtype=np.int8), "(8, 4, 1) int8"),
        (np.zeros((), dtype=np.uint8), "() uint8"),
    ],
)
@pytest.mark.parametrize("schema", [GREY, PLAIN], ids=["classes", "no classes"])
def test_a_wrong_shape_or_type_is_refused(
    save: Save, images: np.ndarray, found: str, schema: ImageSchema
) -> None:
    path = save(images=images, labels=np.array([0, 1]))
    assert refusal(path, schema) == f"images are {found}: the schema declares (8, 4, 1) uint8"


@pytest.mark.parametrize("labels", [np.zeros(3, int), np.zeros((2, 1), int), np.array(0)])
def test_labels_must_be_one_each(save: Save, labels: np.ndarray) -> None:
    path = save(images=pixels(2), labels=labels)
    assert refusal(path) == (
        f"labels has shape {labels.shape}: must be one label for each of 2 images"
    )


@pytest.mark.parametrize("name", ["images", "labels"])
def test_pickled_arrays_are_refused_unopened(tmp_path: Path, name: str) -> None:
    touched = tmp_path / "touched"

    class Trap:
        def __reduce__(self) -> tuple[Callable[[str], Path], tuple[str]]:
            return _touch, (str(touched),)

    arrays: dict[str, Any] = {"images": pixels(1), "labels": np.array([0])}
    trap = np.empty(1, dtype=object)
    trap[0] = Trap()
    arrays[name] = trap
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    assert refusal(str(path)).startswith("cannot be read: ")
    assert not touched.exists()


def _touch(path: str) -> Path:
    Path(path).touch()
    return Path(path)


@pytest.mark.parametrize("saver", [np.savez, np.savez_compressed], ids=["plain", "compressed"])
def test_a_truncated_file_is_refused(tmp_path: Path, saver: Callable[..., None]) -> None:
    path = tmp_path / "x.npz"
    saver(path, images=pixels(20), labels=np.zeros(20, dtype=int))
    whole = path.read_bytes()
    for length in (0, 1, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert refusal(str(path)).startswith("cannot be read: ")


@pytest.mark.parametrize("saver", [np.savez, np.savez_compressed], ids=["plain", "compressed"])
def test_a_damaged_file_is_refused(tmp_path: Path, saver: Callable[..., None]) -> None:
    """Sixteen bytes overwritten amid the images, the archive's index left whole."""
    path = tmp_path / "x.npz"
    smooth = np.arange(50 * 32).reshape(50, 8, 4) // 7 % 256
    saver(path, images=smooth.astype(np.uint8), labels=np.zeros(50, dtype=int))
    whole = path.read_bytes()
    for start in (180, 200, 220, 240):
        path.write_bytes(whole[:start] + b"\xff" * 16 + whole[start + 16 :])
        assert refusal(str(path)).startswith("cannot be read: ")


def test_a_single_array_under_the_wrong_ending_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, pixels(2))
    path = tmp_path / "x.npz"
    path.write_bytes(buffer.getvalue())
    assert refusal(str(path)).startswith("is a single array")


@pytest.mark.parametrize("labels", [np.zeros(0, dtype=int), np.zeros(0, dtype=str)])
@pytest.mark.parametrize("schema", [GREY, PLAIN], ids=["classes", "no classes"])
def test_no_images_are_read_and_cleaned_and_only_then_refused(
    save: Save, labels: np.ndarray, schema: ImageSchema
) -> None:
    raw = read(save(images=pixels(0), labels=labels), schema)
    assert raw.pixels.shape == (0, 8, 4, 1)
    none_at_all(raw, schema)


def none_at_all(raw: Images, schema: ImageSchema) -> None:
    assert len(raw.pixels) == len(raw.labels) == len(raw.usable) == 0
    found, report = clean(raw, schema, Clean())
    assert found.pixels.shape == raw.pixels.shape
    assert report == CleaningReport(
        records=0, blank=0, kept=0, columns={"image": ColumnReport(), "label": ColumnReport()}
    )
    assert encode(found, schema).x.shape == (0, 1, 8, 4)
    assert identities(found, schema) == []
    assert unusable(report) == "data: holds no records; check the file"


def unusable(report: CleaningReport) -> str:
    """The one line that refuses what cleaning found."""
    with pytest.raises(DataError) as caught:
        refuse_unusable(report)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    return line


@pytest.mark.parametrize("name", ["absent.npz", "x.png", "x.npy"])
def test_what_is_no_npz_and_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    if not name.startswith("absent"):
        (tmp_path / name).write_bytes(b"x")
    assert refusal(str(tmp_path / name)) == "is no .npz file and no folder; check the path"


def test_a_schema_of_a_table_is_refused() -> None:
    column = {"name": "n", "kind": "numeric", "bounds": [0, 1]}
    schema = parse_schema({"column": [column]}, "s.toml")
    assert isinstance(schema, TableSchema)
    with pytest.raises(DataError, match=r"^schema: is for a table, the source holds images$"):
        read("sklearn:digits", schema)


# npz files that are read.


def test_labels_may_be_indices_or_names(save: Save) -> None:
    made = pixels(3)
    by_index = read(save(images=made, labels=np.array([1, 0, 1])), GREY)
    by_name = read(save(images=made, labels=np.array(["dog", "cat", "dog"])), GREY)
    for found in (by_index, by_name):
        assert found.labels.tolist() == ["dog", "cat", "dog"]
        assert (found.pixels[..., 0] == made).all()
        assert found.usable.all()


def test_arrays_may_have_other_names(save: Save) -> None:
    schema = GREY.model_copy(update={"images": "x", "labels": "y"})
    assert read(save(x=pixels(2), y=np.array([0, 1])), schema).labels.tolist() == ["cat", "dog"]


def test_without_classes_labels_are_not_looked_at(save: Save) -> None:
    found = read(save(images=pixels(2, COLOUR)), COLOUR)
    assert found.pixels.shape == (2, 4, 8, 3)
    assert found.labels.tolist() == ["", ""]


def test_a_grey_channel_may_be_written_out(save: Save) -> None:
    made = pixels(2)
    found = read(save(images=made[..., None], labels=np.array([0, 1])), GREY)
    assert (found.pixels[..., 0] == made).all()


@pytest.mark.parametrize(
    ("labels", "kept", "example"),
    [
        (np.array([0, 2, -1, 1]), ["cat", "dog"], ""),
        (np.array([0, 255, 7, 1], dtype=np.uint8), ["cat", "dog"], ""),
        (np.array(["dog", "Cat", "", "cat"]), ["dog", "cat"], "Cat"),
        (np.array([b"dog", b"\xff", b"cow", b"cat"]), ["dog", "cat"], None),
    ],
)
def test_images_of_an_undeclared_class_are_dropped_and_counted(
    save: Save, labels: np.ndarray, kept: list[str], example: str | None
) -> None:
    made = pixels(4)
    found, report = clean(read(save(images=made, labels=labels), GREY), GREY, Clean())
    assert found.labels.tolist() == kept
    assert (found.pixels[..., 0] == made[[0, 3]]).all()
    if example is None:  # how bytes that are no text are shown is left open
        example = report.columns["label"].example
        assert isinstance(example, str)
    assert report == CleaningReport(
        records=4,
        blank=0,
        kept=2,
        columns={
            "image": ColumnReport(),
            "label": ColumnReport(unknown_categories=2, example=example),
        },
    )
    refuse_unusable(report)


# Folders.


def put(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good images, and one of each kind of bad."""
    root = tmp_path / "pets"
    made = pixels(3)
    put(root / "cat" / "a.png", made[0])
    put(root / "dog" / "b.PNG", made[1])
    put(root / "dog" / "wide.png", np.zeros((4, 8), dtype=np.uint8))
    put(root / "cow" / "c.png", made[2])
    (root / "cat" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (root / "cat" / "empty.jpg").touch()
    whole = (root / "cat" / "a.png").read_bytes()
    (root / "cat" / "half.png").write_bytes(whole[: len(whole) // 2])
    (root / "cat" / "notes.txt").write_text("no image", encoding="utf-8")
    return root


def test_bad_images_of_a_folder_are_dropped_one_by_one_and_counted(folder: Path) -> None:
    raw = read(str(folder), GREY)
    assert len(raw.pixels) == 7  # the text file is none
    found, report = clean(raw, GREY, Clean())
    assert found.labels.tolist() == ["cat", "dog"]
    assert (found.pixels[..., 0] == pixels(3)[:2]).all()
    assert report == CleaningReport(
        records=7,
        blank=0,
        kept=2,
        columns={
            "image": ColumnReport(type_errors=4, example="not 8x4"),
            "label": ColumnReport(unknown_categories=1, example="cow"),
        },
    )
    refuse_unusable(report)


def test_without_classes_a_folder_s_names_mean_nothing(folder: Path) -> None:
    found, report = clean(read(str(folder), PLAIN), PLAIN, Clean())
    assert found.labels.tolist() == ["", "", ""]
    assert report.columns["image"] == ColumnReport(type_errors=4, example="not 8x4")
    # There is no class to be unknown.
    assert report.columns["label"] == ColumnReport()


def test_colour_becomes_grey_and_grey_colour(tmp_path: Path) -> None:
    put(tmp_path / "cat" / "a.png", np.full((8, 4, 3), (255, 0, 0), dtype=np.uint8))
    grey = read(str(tmp_path), GREY)
    # ITU-R 601: 0.299 of 255 for red.
    assert set(grey.pixels.ravel().tolist()) == {76}
    put(tmp_path / "cat" / "a.png", np.full((8, 4), 9, dtype=np.uint8))
    colour = read(str(tmp_path), GREY.model_copy(update={"channels": 3}))
    assert colour.pixels.shape == (1, 8, 4, 3)
    assert (colour.pixels == 9).all()


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".JPG"])
def test_jpeg_is_read(tmp_path: Path, suffix: str) -> None:
    put(tmp_path / "dog" / f"a{suffix}", np.full((8, 4), 100, dtype=np.uint8))
    found, _ = clean(read(str(tmp_path), GREY), GREY, Clean())
    assert found.labels.tolist() == ["dog"]
    assert np.abs(found.pixels.astype(int) - 100).max() <= 2


def test_the_order_of_a_folder_is_its_names(tmp_path: Path) -> None:
    made = pixels(3)
    for index in (2, 0, 1):
        put(tmp_path / "cat" / f"{index}.png", made[index])
    assert (read(str(tmp_path), GREY).pixels[..., 0] == made).all()


@pytest.mark.parametrize("schema", [GREY, PLAIN], ids=["classes", "no classes"])
def test_an_empty_folder_holds_no_records(tmp_path: Path, schema: ImageSchema) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").touch()
    none_at_all(read(str(tmp_path), schema), schema)


def test_a_folder_without_a_usable_image_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "cat" / "a.png", np.zeros((4, 4), dtype=np.uint8))
    put(tmp_path / "cow" / "b.png", pixels(1)[0])
    found, report = clean(read(str(tmp_path), GREY), GREY, Clean())
    assert found.pixels.shape == (0, 8, 4, 1)
    assert report == CleaningReport(
        records=2,
        blank=0,
        kept=0,
        columns={
            "image": ColumnReport(type_errors=1, example="not 8x4"),
            "label": ColumnReport(unknown_categories=1, example="cow"),
        },
    )
    line = unusable(report)
    assert line.startswith('data: none of 2 records is usable (0 are blank; column "image": ')
    assert "type_errors 1" in line
    assert "not 8x4" in line
    assert line.endswith("); compare the schema with the file")


def test_images_of_a_wrong_shape_throughout_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        put(tmp_path / "cat" / f"{name}.png", np.zeros((4, 4), dtype=np.uint8))
    found, report = clean(read(str(tmp_path), GREY), GREY, Clean())
    assert len(found.pixels) == report.kept == 0
    assert unusable(report).startswith(
        "column \"image\" = 'not 8x4', ...: no value is what the schema declares; "
    )


def test_images_of_undeclared_classes_throughout_are_refused(save: Save) -> None:
    raw = read(save(images=pixels(2), labels=np.array(["Cat", "cow"])), GREY)
    found, report = clean(raw, GREY, Clean())
    assert len(found.pixels) == report.kept == 0
    assert unusable(report).startswith(
        "column \"label\" = 'Cat', ...: no value is what the schema declares; "
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_no_damage_to_a_file_stops_the_reading(tmp_path: Path, kind: str) -> None:
    """A damaged file is one dropped record, never an error that names nothing."""
    buffer = io.BytesIO()
    Image.fromarray(pixels(1)[0]).save(buffer, format=kind)
    whole = bytearray(buffer.getvalue())
    folder = tmp_path / "cat"
    folder.mkdir()
    rng = np.random.default_rng(0)
    suffix = {"PNG": "png", "JPEG": "jpg"}[kind]
    for index in range(200):
        damaged = whole.copy()
        for place in rng.integers(0, len(whole), 4):
            damaged[place] = rng.integers(0, 256)
        (folder / f"{index:03}.{suffix}").write_bytes(damaged)
    assert len(read(str(tmp_path), GREY).pixels) == 200


def test_one_more_image_adds_at_most_itself(folder: Path) -> None:
    before, _ = clean(read(str(folder), GREY), GREY, Clean())
    put(folder / "cat" / "aa.png", pixels(1, seed=9)[0])
    after, _ = clean(read(str(folder), GREY), GREY, Clean())
    assert len(after.pixels) == 3
    assert (after.pixels[[0, 2]] == before.pixels).all()


sources = st.lists(
    st.tuples(st.sampled_from(["cat", "dog", "cow", ""]), st.booleans(), st.integers(0, 255)),
    max_size=5,
)


def made_of(found: list[tuple[str, bool, int]]) -> Images:
    return Images(
        np.array([np.full((8, 4, 1), grey) for *_, grey in found], dtype=np.uint8).reshape(
            -1, 8, 4, 1
        ),
        np.array([label for label, *_ in found], dtype=str),
        np.array([usable for _, usable, _ in found], dtype=bool),
    )


@given(sources, sources, st.sampled_from([GREY, PLAIN]))
def test_cleaning_commutes_with_putting_together(
    first: list[tuple[str, bool, int]],
    second: list[tuple[str, bool, int]],
    schema: ImageSchema,
) -> None:
    found, report = clean(made_of(first + second), schema, Clean())
    parts = [clean(made_of(part), schema, Clean()) for part in (first, second)]
    assert found.labels.tolist() == [n for part, _ in parts for n in part.labels.tolist()]
    assert (found.pixels == np.concatenate([part.pixels for part, _ in parts])).all()
    assert found.usable.all()
    assert (report.records, report.blank) == (len(first) + len(second), 0)
    assert report.kept == len(found.pixels) == sum(part.kept for _, part in parts)
    for name, column in report.columns.items():
        one, other = (part.columns[name] for _, part in parts)
        assert column == ColumnReport(
            type_errors=one.type_errors + other.type_errors,
            unknown_categories=one.unknown_categories + other.unknown_categories,
            example=other.example if one.example is None else one.example,
        )


# Digits.


def test_digits_are_the_published_ones() -> None:
    raw = read("sklearn:digits", DIGITS)
    found, report = clean(raw, DIGITS, Clean())
    assert (report.records, report.kept) == (1797, 1797)
    assert found.pixels.shape == (1797, 8, 8, 1)
    # The first image is a zero whose first row is 0 0 5 13 9 1 0 0 of 16.
    assert found.labels[0] == "0"
    expected = [0, 0, 80, 207, 143, 16, 0, 0]  # rounded multiples of 255 / 16
    assert found.pixels[0, 0, :, 0].tolist() == expected
    assert found.pixels.max() == 255
    assert np.bincount(encode(found, DIGITS).y).tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip


# Encoding.


def test_encoding_by_hand() -> None:
    made = np.zeros((1, 4, 8, 3), dtype=np.uint8)
    made[0, 1, 2] = (0, 51, 255)
    schema = COLOUR.model_copy(update={"classes": ("cat", "dog")})
    found = encode(Images(made, np.array(["dog"]), np.array([True])), schema)
    assert found.x.shape == (1, 3, 4, 8)
    assert found.x[0, :, 1, 2] == pytest.approx([0, 0.2, 1])
    assert found.x.sum() == pytest.approx(1.2)
    assert found.x.dtype == np.float32
    assert found.y.dtype == np.int64
    assert found.y.tolist() == [1]


@given(st.sampled_from([GREY, COLOUR, PLAIN]), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_decoding_undoes_encoding_exactly(schema: ImageSchema, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (count, schema.height, schema.width, schema.channels)
    labels = rng.choice(schema.classes or ("",), count)
    made = Images(rng.integers(0, 256, shape, dtype=np.uint8), labels, np.ones(count, dtype=bool))
    encoded = encode(made, schema)
    assert encoded.x.min() >= 0
    assert encoded.x.max() <= 1
    back = decode(encoded, schema)
    assert (back.pixels == made.pixels).all()
    assert back.pixels.dtype == np.uint8
    assert back.labels.tolist() == labels.tolist()
    assert back.usable.all()


def test_every_grey_value_survives() -> None:
    made = np.arange(256, dtype=np.uint8).reshape(8, 8, 4, 1)
    images = Images(made, np.full(8, ""), np.ones(8, dtype=bool))
    assert (decode(encode(images, PLAIN), PLAIN).pixels == made).all()


def test_decoding_keeps_any_numbers_in_range() -> None:
    x = np.array([-5, 0.5, 7, 1.001], dtype=np.float32).reshape(1, 1, 2, 2)
    found = decode(Encoded(x, np.zeros(1, dtype=np.int64)), PLAIN)
    assert found.pixels.ravel().tolist() == [0, 128, 255, 255]


def test_arrays_are_as_image_libraries_take_them() -> None:
    grey = Images(pixels(2)[..., None], np.full(2, ""), np.ones(2, dtype=bool))
    colour = Images(pixels(2, COLOUR), np.full(2, ""), np.ones(2, dtype=bool))
    assert grey.arrays().shape == (2, 8, 4)
    assert colour.arrays().shape == (2, 4, 8, 3)


# The rest of a modality.


def test_labels_are_the_only_column() -> None:
    raw = Images(pixels(2)[..., None], np.array(["dog", "cow"]), np.ones(2, dtype=bool))
    assert values(raw, GREY, "label") == ["dog", "cow"]
    with pytest.raises(DataError, match=r'^data\.column = "x"'):
        values(raw, GREY, "x")
    with pytest.raises(DataError, match=r'^data\.column = "label"'):
        values(raw, PLAIN, "label")


def test_an_image_s_identity_is_its_pixels_and_label() -> None:
    made = pixels(2)[[0, 0, 0, 1], ..., None]
    images = Images(made, np.array(["cat", "cat", "dog", "cat"]), np.ones(4, dtype=bool))
    found = identities(images, GREY)
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_take_gives_the_rows_in_the_order_asked_for() -> None:
    made = pixels(3)[..., None]
    images = Images(made, np.array(["cat", "dog", "x"]), np.array([True, True, False]))
    found = take(images, np.array([2, 0]))
    assert (found.pixels == made[[2, 0]]).all()
    assert found.labels.tolist() == ["x", "cat"]
    assert found.usable.tolist() == [False, True]


def test_the_registry_serves_images() -> None:
    found = modality(GREY)
    assert (found.read, found.encode, found.decode) == (read, encode, decode)


def test_one_file_that_a_decoder_chokes_on_is_one_image_less(tmp_path: Path) -> None:
    """A text chunk that unpacks to megabytes makes Pillow raise what is no OSError."""
    (tmp_path / "a").mkdir()
    for name, text in (("bomb", "x" * 3_000_000), ("good", "x")):
        info = PngImagePlugin.PngInfo()
        info.add_text("note", text, zip=True)
        Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(
            tmp_path / "a" / f"{name}.png", pnginfo=info
        )
    schema = ImageSchema(height=8, width=8, classes=("a", "b"))
    assert read(str(tmp_path), schema).usable.tolist() == [False, True]
