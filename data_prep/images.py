"""Images: an npz file, a folder of PNG and JPEG files by class, or scikit-learn's digits."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import Clean
from .clean import CleaningReport, ColumnReport, DataError
from .harmonise import NO_MAP, Columns, check_columns
from .modality import Encoded, Modality
from .schema import ImageSchema, Schema

# What numpy and zipfile raise on damaged, encrypted or foreign archives.
_NPZ_ERRORS = (
    OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError,
    RuntimeError, MemoryError,
)  # fmt: skip
_SUFFIXES = {".png", ".jpg", ".jpeg"}


@dataclass(frozen=True)
class Images:
    """Raw images: pixels [N, H, W, C] uint8; labels [N] class names, "" for none.

    An image that could not be used has `usable` False and any pixels.
    """

    pixels: np.ndarray
    labels: np.ndarray
    usable: np.ndarray

    def arrays(self) -> np.ndarray:
        """Pixels as image libraries take them: [N, H, W] for grey, [N, H, W, 3] for colour."""
        return self.pixels[..., 0] if self.pixels.shape[-1] == 1 else self.pixels


def read(source: str, schema: Schema, columns: Columns = NO_MAP) -> Images:
    """Reads images of the schema's shape.

    Raises:
        DataError: The file or folder is missing, or cannot be read as images of this shape.
        ConfigError: There are `columns`, which images have not.
    """
    schema = _image(schema)
    check_columns(columns, schema)
    if source == "sklearn:digits":
        return _digits()
    path = Path(source)
    if path.is_dir():
        images = _read_folder(path, schema)
    elif path.suffix == ".npz" and path.is_file():
        images = _read_npz(path, schema)
    else:
        raise DataError(f"data.source = {source}: is no .npz file and no folder; check the path")
    return images


def clean(raw: Images, schema: Schema, rules: Clean) -> tuple[Images, CleaningReport]:
    """Drops, one by one, images of a wrong shape and images of an undeclared class."""
    del rules  # images have no value to mend
    schema = _image(schema)
    labels = raw.labels
    known = np.isin(labels, schema.classes) if schema.classes else np.ones(len(labels), dtype=bool)
    kept = take(raw, np.flatnonzero(raw.usable & known))
    report = CleaningReport(
        records=len(raw.pixels),
        blank=0,
        kept=len(kept.pixels),
        columns={
            "image": ColumnReport(
                type_errors=int((~raw.usable).sum()),
                example=f"not {schema.height}x{schema.width}" if not raw.usable.all() else None,
            ),
            "label": ColumnReport(
                unknown_categories=int((~known).sum()),
                example=str(labels[~known][0]) if not known.all() else None,
            ),
        },
    )
    return kept, report


def values(raw: Images, schema: Schema, column: str) -> list[str]:
    """The labels, the only column that images have."""
    if column != "label" or not _image(schema).classes:
        raise DataError(f'data.column = "{column}": images with classes have "label" only')
    return [str(label) for label in raw.labels]


def take(raw: Images, rows: np.ndarray) -> Images:
    """The given images."""
    return Images(raw.pixels[rows], raw.labels[rows], raw.usable[rows])


def identities(cleaned: Images, schema: Schema) -> list[bytes]:
    """What decides an image's side of the split: its pixels and label."""
    _image(schema)
    pairs = zip(cleaned.pixels, cleaned.labels, strict=True)
    return [image.tobytes() + str(label).encode() for image, label in pairs]


def encode(cleaned: Images, schema: Schema) -> Encoded:
    """Encodes images: x [N, C, H, W] float32 in [0, 1]; y [N] class index, 0 without classes."""
    schema = _image(schema)
    codes = {name: code for code, name in enumerate(schema.classes)}
    x = cleaned.pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255
    y = np.array([codes.get(str(label), 0) for label in cleaned.labels], dtype=np.int64)
    return Encoded(x, y)


def decode(encoded: Encoded, schema: Schema) -> Images:
    """Turns encoded images into pixels and class names."""
    schema = _image(schema)
    pixels = np.rint(encoded.x.clip(0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    names = np.array(schema.classes or [""])
    return Images(pixels, names[encoded.y], np.ones(len(pixels), dtype=bool))


def read_npz_arrays(path: Path, names: list[str] | None) -> dict[str, np.ndarray]:
    """Reads the named arrays of an .npz archive, or all.

    Raises:
        DataError: It cannot be read, or has none of a name.
    """
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"data.source = {path}: is a single array, no .npz archive")
            names = archive.files if names is None else names
            if absent := [name for name in names if name not in archive.files]:
                raise DataError(
                    f'data.source = {path}: has no array "{absent[0]}"; it has '
                    f"{', '.join(archive.files)}"
                )
            return {name: archive[name] for name in names}
    except _NPZ_ERRORS as error:
        raise DataError(f"data.source = {path}: cannot be read: {error}") from None


def image_files(path: Path) -> list[Path]:
    """The images of a folder and the folders in it, in order."""
    return sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES)


def _image(schema: Schema) -> ImageSchema:
    if not isinstance(schema, ImageSchema):
        raise DataError(f"schema: is for a {schema.modality}, the source holds images")
    return schema


def _digits() -> Images:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # Published as 0..16 counts of set pixels in 4x4 blocks.
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    return Images(pixels, bunch.target.astype(str), np.ones(len(pixels), dtype=bool))


def _read_npz(path: Path, schema: ImageSchema) -> Images:
    wanted = [schema.images, schema.labels] if schema.classes else [schema.images]
    arrays = read_npz_arrays(path, wanted)
    pixels = arrays[schema.images]
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    shape = (schema.height, schema.width, schema.channels)
    if pixels.ndim != 4 or pixels.shape[1:] != shape or pixels.dtype != np.uint8:
        raise DataError(
            f"data.source = {path}: images are {pixels.shape[1:]} {pixels.dtype}: the schema "
            f"declares {shape} uint8"
        )
    labels = arrays[schema.labels] if schema.classes else np.zeros(len(pixels), dtype=int)
    if labels.shape != (len(pixels),):
        raise DataError(
            f"data.source = {path}: {schema.labels} has shape {labels.shape}: must be one label "
            f"for each of {len(pixels)} images"
        )
    return Images(pixels, _class_names(labels, schema), np.ones(len(pixels), dtype=bool))


def _class_names(labels: np.ndarray, schema: ImageSchema) -> np.ndarray:
    if not schema.classes:
        return np.full(len(labels), "")
    if np.issubdtype(labels.dtype, np.integer):
        known = (labels >= 0) & (labels < len(schema.classes))
        return np.where(known, np.array(schema.classes)[labels * known], "")
    if labels.dtype.kind == "S":  # one label's bytes may not spoil the others
        return np.char.decode(labels, "utf-8", "replace")
    return labels.astype(str)


def _read_folder(path: Path, schema: ImageSchema) -> Images:
    files = image_files(path)
    pixels = np.zeros((len(files), schema.height, schema.width, schema.channels), dtype=np.uint8)
    usable = np.zeros(len(files), dtype=bool)
    for index, file in enumerate(files):
        image = _read_image(file, schema)
        if image is not None:
            pixels[index], usable[index] = image, True
    labels = [file.parent.name if schema.classes else "" for file in files]
    return Images(pixels, np.array(labels, dtype=str), usable)


def _read_image(file: Path, schema: ImageSchema) -> np.ndarray | None:
    from PIL import Image

    try:
        with Image.open(file) as opened:
            image = np.asarray(opened.convert("L" if schema.channels == 1 else "RGB"))
    except Exception:  # noqa: BLE001  whatever one file does, the others are read
        return None
    image = image.reshape(*image.shape[:2], schema.channels)
    return image if image.shape[:2] == (schema.height, schema.width) else None


MODALITY = Modality(read, clean, values, take, identities, encode, decode)
