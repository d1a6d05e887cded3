"""Synthetic files: each says that it is synthetic, and is there whole or not at all."""

import errno
import gc
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

import fedveil
from fedveil.config import ConfigError, FedveilError
from fedveil.export import read_provenance, write

IMAGE_ENDINGS = [".png", ".npz"]
TABLE_ENDINGS = [".csv", ".parquet", ".png"]
FindRun = Callable[[str], fedveil.Run]


@pytest.fixture
def of_kind(finished_run: fedveil.Run, finished_table_run: fedveil.Run) -> FindRun:
    """A finished run by its modality."""
    return lambda kind: finished_run if kind == "image" else finished_table_run


KINDS = [("image", ending) for ending in IMAGE_ENDINGS] + [
    ("table", ending) for ending in TABLE_ENDINGS
]

QUICK = KINDS[:-1]  # a picture of marginals takes a second


@pytest.mark.parametrize(("kind", "ending"), KINDS)
class TestEveryEnding:
    def test_it_says_what_it_is(
        self, of_kind: FindRun, tmp_path: Path, kind: str, ending: str
    ) -> None:
        run = of_kind(kind)
        path = write(run, 7, tmp_path / f"drawn{ending}", seed=1)
        assert path == tmp_path / f"drawn{ending}"
        found = read_provenance(path)
        assert found == run.provenance()
        assert found["synthetic"] is True
        assert found["run_id"] == run.metrics["run_id"]
        assert found["epsilon"] == run.privacy["epsilon"]
        assert found["mechanism"] == "central"

    def test_nothing_else_is_left(
        self, of_kind: FindRun, tmp_path: Path, kind: str, ending: str
    ) -> None:
        write(of_kind(kind), 7, tmp_path / f"drawn{ending}", seed=1)
        expected = {f"drawn{ending}"}
        if ending == ".csv":
            expected.add("drawn.csv.provenance.json")
        assert {p.name for p in tmp_path.iterdir()} == expected


@pytest.mark.parametrize(("kind", "ending"), QUICK)
class TestPlaces:
    def test_an_older_file_is_replaced(
        self, of_kind: FindRun, tmp_path: Path, kind: str, ending: str
    ) -> None:
        path = tmp_path / f"drawn{ending}"
        path.write_text("old", encoding="utf-8")
        write(of_kind(kind), 7, path, seed=1)
        assert read_provenance(path)["synthetic"] is True

    def test_an_ending_in_capitals_will_do(
        self, of_kind: FindRun, tmp_path: Path, kind: str, ending: str
    ) -> None:
        path = write(of_kind(kind), 7, tmp_path / f"DRAWN{ending.upper()}", seed=1)
        assert read_provenance(path)["synthetic"] is True

    @pytest.mark.parametrize("blocked", ["file/deeper", "gone"])
    def test_an_unwritable_place(
        self, of_kind: FindRun, tmp_path: Path, kind: str, ending: str, blocked: str
    ) -> None:
        (tmp_path / "file").write_text("mine", encoding="utf-8")
        with pytest.raises(ConfigError, match="cannot be written"):
            write(of_kind(kind), 7, tmp_path / blocked / f"drawn{ending}", seed=1)
        assert [p.name for p in tmp_path.iterdir()] == ["file"]

    def test_a_folder_in_its_place_leaves_nothing(
        self, of_kind: FindRun, tmp_path: Path, kind: str, ending: str
    ) -> None:
        (tmp_path / f"drawn{ending}").mkdir()
        with pytest.raises(ConfigError, match="cannot be written"):
            write(of_kind(kind), 7, tmp_path / f"drawn{ending}", seed=1)
        assert [p.name for p in tmp_path.rglob("*")] == [f"drawn{ending}"]

    def test_a_full_disk_leaves_the_old_file(
        self,
        of_kind: FindRun,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        kind: str,
        ending: str,
    ) -> None:
        path = tmp_path / f"drawn{ending}"
        path.write_text("old", encoding="utf-8")

        def full(*arguments: object, **options: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        monkeypatch.setattr(os, "rename", full)
        with pytest.raises(ConfigError, match="No space left"):
            write(of_kind(kind), 7, path, seed=1)
        assert path.read_text(encoding="utf-8") == "old"
        assert [p.name for p in tmp_path.iterdir()] == [f"drawn{ending}"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("image", "drawn.csv"),
        ("image", "drawn.parquet"),
        ("image", "drawn.jpg"),
        ("image", "drawn"),
        ("table", "drawn.npz"),
        ("table", "drawn.xlsx"),
        ("table", "drawn.csv.gz"),
    ],
)
def test_a_wrong_ending(of_kind: FindRun, tmp_path: Path, kind: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{kind}s; end it in \.") as caught:
        write(of_kind(kind), 7, tmp_path / name, seed=1)
    endings = IMAGE_ENDINGS if kind == "image" else TABLE_ENDINGS
    assert all(ending in str(caught.value) for ending in endings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "ending"), KINDS)
def test_fewer_than_one(of_kind: FindRun, tmp_path: Path, kind: str, ending: str) -> None:
    with pytest.raises(ConfigError, match="n = 0"):
        write(of_kind(kind), 0, tmp_path / f"drawn{ending}")
    assert not list(tmp_path.iterdir())


class TestContents:
    def test_a_grid(self, finished_run: fedveil.Run, tmp_path: Path) -> None:
        with Image.open(write(finished_run, 20, tmp_path / "a.png", seed=1)) as image:
            assert image.format == "PNG"
            assert image.mode == "L"
            # Five across and four down, of 8 pixels and a gap of 1 each, enlarged alike.
            assert image.width % 46 == 0
            assert image.width * 37 == image.height * 46

    def test_arrays(self, finished_run: fedveil.Run, tmp_path: Path) -> None:
        with np.load(write(finished_run, 9, tmp_path / "a.npz", seed=1)) as arrays:
            images = arrays["images"]
            labels = arrays["labels"]
        assert (images.shape, images.dtype) == ((9, 8, 8), np.uint8)
        assert labels.shape == (9,)
        assert set(labels) <= set("0123456789")
        assert np.array_equal(images, np.asarray(finished_run.sample(9, seed=1)))

    def test_a_csv(self, finished_table_run: fedveil.Run, tmp_path: Path) -> None:
        frame = pl.read_csv(write(finished_table_run, 9, tmp_path / "a.csv", seed=1))
        expected = finished_table_run.sample(9, seed=1)
        assert isinstance(expected, pl.DataFrame)
        assert frame.columns == expected.columns
        assert frame["diagnosis"].to_list() == expected["diagnosis"].to_list()
        note = json.loads((tmp_path / "a.csv.provenance.json").read_text(encoding="utf-8"))
        assert note["synthetic"] is True

    def test_a_parquet(self, finished_table_run: fedveil.Run, tmp_path: Path) -> None:
        frame = pl.read_parquet(write(finished_table_run, 9, tmp_path / "a.parquet", seed=1))
        expected = finished_table_run.sample(9, seed=1)
        assert isinstance(expected, pl.DataFrame)
        assert frame.equals(expected)

    def test_marginals(self, finished_table_run: fedveil.Run, tmp_path: Path) -> None:
        with Image.open(write(finished_table_run, 9, tmp_path / "a.png", seed=1)) as image:
            assert image.format == "PNG"
            assert image.width > 500

    def test_a_table_never_goes_without_its_note(
        self, finished_table_run: fedveil.Run, tmp_path: Path
    ) -> None:
        """Nothing half-written: a CSV file says nothing of itself."""
        (tmp_path / "a.csv.provenance.json").mkdir()
        with pytest.raises(ConfigError, match="cannot be written"):
            write(finished_table_run, 9, tmp_path / "a.csv", seed=1)
        assert [p.name for p in tmp_path.iterdir()] == ["a.csv.provenance.json"]


def png(**texts: str) -> bytes:
    """A picture that says so."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def npz(**arrays: Any) -> bytes:  # noqa: ANN401
    """An archive of arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy() -> bytes:
    """A single array."""
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def parquet() -> bytes:
    """A table that says nothing."""
    buffer = io.BytesIO()
    pl.DataFrame({"a": [1]}).write_parquet(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", None),
        ("a.png", b""),
        ("a.png", b"garbage"),
        ("a.png", png()),
        ("a.png", png(fedveil="no json")),
        ("a.png", png(fedveil="[1]")),
        ("a.png", png(fedveil="{}")[:40]),
        ("a.npz", None),
        ("a.npz", b""),
        ("a.npz", b"garbage"),
        ("a.npz", b"PK\x03\x04garbage"),
        ("a.npz", npz(images=np.zeros(3))),
        ("a.npz", npz(provenance=np.array([{"synthetic": True}], dtype=object))),
        ("a.npz", npz(provenance=np.array("3"))),
        ("a.npz", npy()),
        ("a.parquet", None),
        ("a.parquet", b""),
        ("a.parquet", b"garbage"),
        ("a.parquet", parquet()),
        ("a.csv", None),
        ("a.csv", b"a,b\n1,2\n"),
        ("a.xyz", b"something"),
    ],
)
def test_files_that_say_nothing_of_ours(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FedveilError, match="carries no provenance of ours"):
        read_provenance(path)
    gc.collect()  # a file left open is told here, not in some later test


def test_a_run_without_privacy_says_so(finished_run: fedveil.Run, tmp_path: Path) -> None:
    run = fedveil.simulate(
        finished_run.config,
        out=tmp_path / "run",
        privacy={"mechanism": "none"},
        federation={"rounds": 1},
    )
    found = read_provenance(tmp_path / "run" / "samples.png")
    assert found["epsilon"] is None
    assert found["mechanism"] == "none"
    assert "NOT PRIVATE" in found["against"]
    assert found == run.provenance()
