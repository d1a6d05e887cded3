"""What a folder or an archive of images seems to hold, for a person to confirm."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from .clean import DataError
from .images import image_files, read_npz_arrays

_CLASSES = 1000


@dataclass(frozen=True)
class Found:
    """Images as they are found.

    Attributes:
        height, width, channels: Of most of them.
        classes: Their classes by name; none if there are none, or too many.
        arrays: The names of the images' and the labels' arrays in an archive.
        notes: What a person should know, a line each.
    """

    height: int
    width: int
    channels: Literal[1, 3]
    classes: tuple[str, ...]
    arrays: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def find_images(path: Path) -> Found:
    """Looks at a folder of images by class, or an .npz archive.

    Raises:
        DataError: It cannot be read, or holds no images of a shape that a schema may declare.
    """
    found = _in_folder(path) if path.is_dir() else _in_archive(path)
    sides = (found.height, found.width)
    if any(side % 4 or not 4 <= side <= 512 for side in sides):
        raise DataError(
            f"data.source = {path}: images are {found.height}x{found.width}: must be multiples of "
            "4, from 4 to 512; pad or scale them"
        )
    return found


def _in_folder(path: Path) -> Found:
    files = image_files(path)
    shapes = Counter(shape for file in files if (shape := _shape(file)) is not None)
    if not shapes:
        raise DataError(f"data.source = {path}: holds no PNG or JPEG that can be read")
    (height, width), _ = Counter(shape[:2] for shape in shapes.elements()).most_common(1)[0]
    grey = sum(count for shape, count in shapes.items() if shape[2])
    classes = tuple(sorted({file.parent.name for file in files}))
    notes = ("Images of other shapes will be dropped.",) * (len({s[:2] for s in shapes}) > 1)
    channels: Literal[1, 3] = 1 if 2 * grey >= shapes.total() else 3
    return Found(height, width, channels, _usable(classes), notes=notes)


def _shape(file: Path) -> tuple[int, int, bool] | None:
    """Height, width and whether it is grey, from the file's head."""
    from PIL import Image

    try:
        with Image.open(file) as opened:
            return opened.height, opened.width, opened.mode in {"1", "L", "LA", "I", "I;16", "F"}
    except Exception:  # noqa: BLE001  whatever one file does, the others are looked at
        return None


def _in_archive(path: Path) -> Found:
    if not path.is_file():
        raise DataError(f"data.source = {path}: is no file; check the path")
    arrays = read_npz_arrays(path, None)
    sizes = {name: len(array) for name, array in arrays.items() if _is_images(array)}
    if not sizes:
        shapes = ", ".join(f"{k!a} {v.shape} {v.dtype}" for k, v in list(arrays.items())[:8])
        raise DataError(
            f"data.source = {path}: holds no images: an array must be uint8, [N, H, W] or "
            f"[N, H, W, 3]; it has {shapes or 'no arrays'}"
        )
    chosen = max(sizes, key=lambda name: sizes[name])
    images = arrays[chosen]
    labels = _labels(arrays, chosen)
    classes = () if labels is None else _usable(_classes(arrays[labels]))
    notes = [f"Several arrays may be images: {', '.join(map(ascii, sizes))}."] * (len(sizes) > 1)
    return Found(
        height=images.shape[1],
        width=images.shape[2],
        channels=3 if images.ndim == 4 and images.shape[3] == 3 else 1,
        classes=classes,
        arrays=(chosen, labels) if labels is not None and classes else (chosen,),
        notes=tuple(notes),
    )


def _is_images(array: np.ndarray) -> bool:
    grey = array.ndim == 3 or (array.ndim == 4 and array.shape[3] in {1, 3})
    return grey and array.dtype == np.uint8 and len(array) > 0


def _labels(arrays: dict[str, np.ndarray], images: str) -> str | None:
    """The array of one whole number or word an image; the one named most like the images."""
    fitting = [
        name
        for name, array in arrays.items()
        if array.shape == (len(arrays[images]),) and array.dtype.kind in "iuUS"
    ]
    wanted = images.replace("images", "labels")
    return max(fitting, key=lambda name: (name == wanted, "label" in name), default=None)


def _classes(labels: np.ndarray) -> tuple[str, ...]:
    if labels.dtype.kind in "iu":  # a number is an index into the classes
        numbers = range(int(labels.max()) + 1) if labels.min() >= 0 else ()
        return tuple(map(str, numbers)) if len(numbers) <= _CLASSES else ()
    texts = np.char.decode(labels, "utf-8", "replace") if labels.dtype.kind == "S" else labels
    return tuple(sorted(set(texts.tolist())))


def _usable(classes: tuple[str, ...]) -> tuple[str, ...]:
    return classes if 2 <= len(classes) <= _CLASSES else ()
