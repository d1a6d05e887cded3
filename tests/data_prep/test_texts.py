"""Texts: where they are cut, what cleaning does to one record, and the way to numbers and back."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.config import Clean, ConfigError
from fedveil.data_prep import Encoded, held_by, modality
from fedveil.data_prep.clean import CleaningReport, DataError, refuse_unusable
from fedveil.data_prep.schema import PADDING, TextSchema, parse_schema, tokens_of
from fedveil.data_prep.texts import Texts, clean, decode, encode, read

FOUR = TextSchema(length=4)
OWNED = TextSchema(length=8, person="who")
CLEAN = Clean()


def texts(*contents: bytes | None, persons: tuple[str, ...] | None = None) -> Texts:
    return Texts(contents, persons or ("",) * len(contents))


def cleaned(*contents: bytes | None) -> tuple[list[bytes | None], CleaningReport]:
    found, report = clean(texts(*contents), TextSchema(length=64), CLEAN)
    return list(found.contents), report


def lines(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


class TestSchema:
    def test_has_defaults_and_no_classes(self) -> None:
        schema = parse_schema({"modality": "text"}, "test")
        assert schema == TextSchema(length=64, field="text", person=None)
        assert (schema.shape, schema.classes, schema.label) == ((64,), (), None)

    @pytest.mark.parametrize(
        ("raw", "said"),
        [
            ({"length": 3}, "length = 3: must be >= 4"),
            ({"length": 4097}, "length = 4097: must be <= 4096"),
            ({"length": "64"}, "must be a valid integer"),
            ({"field": ""}, "field"),
            ({"person": "text"}, 'person = "text": is the key of the text'),
            ({"classes": ["a", "b"]}, "classes"),
            ({"unconfirmed": ["length"]}, "read off the data"),
        ],
    )
    def test_refuses_what_it_cannot_mean(self, raw: dict[str, object], said: str) -> None:
        with pytest.raises(ConfigError, match=r"t\.toml") as caught:
            parse_schema({"modality": "text", **raw}, "t.toml")
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_another_modality_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="must be table, image or text"):
            parse_schema({"modality": "sound"}, "test")


class TestRead:
    def test_a_plain_text_is_cut_at_every_length_bytes_whatever_it_says(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes("abc\nd\u00e9f\r\ng".encode())
        assert read(str(path), FOUR).contents == (b"abc\n", b"d\xc3\xa9f", b"\r\ng")

    def test_each_file_of_a_folder_is_cut_from_its_own_start(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "b.txt").write_bytes(b"12345")
        (tmp_path / "in" / "a.TXT").write_bytes(b"abcdefgh")
        (tmp_path / "notes.md").write_bytes(b"no")
        assert read(str(tmp_path), FOUR).contents == (b"1234", b"5", b"abcd", b"efgh")

    def test_a_text_shorter_than_a_record_is_one(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"ab")
        assert read(str(tmp_path / "a.txt"), FOUR).contents == (b"ab",)

    def test_an_empty_file_has_none(self, tmp_path: Path) -> None:
        for name in ("a.txt", "a.jsonl"):
            (tmp_path / name).write_bytes(b"")
            found = read(str(tmp_path / name), FOUR)
            assert found.contents == ()
            with pytest.raises(DataError, match="holds no records"):
                refuse_unusable(clean(found, FOUR, CLEAN)[1])

    def test_a_line_of_jsonl_is_one_record_cut_off(self, tmp_path: Path) -> None:
        source = lines(tmp_path / "a.jsonl", {"text": "abcdefgh", "other": 1}, {"text": "x\ny"})
        assert read(source, FOUR).contents == (b"abcd", b"x\ny")

    def test_a_bad_line_spoils_itself_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(
            b'\xef\xbb\xbf{"text": "one"}\r\n'
            b"nope\n"
            b"[1]\n"
            b'{"txt": "no"}\n'
            b'{"text": 3}\n'
            b'{"text": null}\n'
            b'{"text": "\\ud800"}\n'  # half of a pair
            b'{"text": "\xff"}\n'
            + b"[" * 100_000
            + b"\n\n"
            + b'{"text": '
            + b"9" * 10_000
            + b'}\n{"text": "two"}'
        )
        found = read(str(path), FOUR)
        assert found.contents == (b"one", *[None] * 8, b"", None, b"two")
        kept, report = clean(found, FOUR, CLEAN)
        assert kept.contents == (b"one", b"two")
        assert (report.records, report.blank, report.kept) == (12, 1, 2)
        assert report.columns["text"].type_errors == 9

    def test_persons_are_strings_or_whole_numbers(self, tmp_path: Path) -> None:
        keys = [" ann ", "7", 7, "", None, 1.5, True, [1], "\ud800"]
        rows = [{"text": "t", "who": key} for key in keys]
        found = read(lines(tmp_path / "a.jsonl", *rows, {"text": "t"}), OWNED)
        assert found.persons == ("ann", "7", "7", *[""] * 7)
        kept, report = clean(found, OWNED, CLEAN)
        assert kept.persons == ("ann", "7", "7")
        assert report.columns["person"].missing == 7
        assert modality(OWNED).identities(kept, OWNED) == [b"ann", b"7", b"7"]

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("a.csv", "must end in .txt or .jsonl"),
            ("a.txt", "is no file; check the path"),
            ("sklearn:shakespeare", "is no text that is built in"),
        ],
    )
    def test_what_is_no_text_is_refused(self, tmp_path: Path, name: str, said: str) -> None:
        source = name if ":" in name else str(tmp_path / name)
        with pytest.raises(DataError, match=said):
            read(source, FOUR)

    def test_plain_text_has_no_persons(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"abc")
        with pytest.raises(DataError, match="does not say whose it is"):
            read(str(tmp_path / "a.txt"), OWNED)

    def test_texts_have_no_columns_to_map(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"abc")
        with pytest.raises(ConfigError, match="texts have no columns"):
            read(str(tmp_path / "a.txt"), FOUR, {"text": "t"})

    def test_endings_tell_modalities_apart(self, tmp_path: Path) -> None:
        assert held_by("a.txt") == held_by("A.JSONL") == "text"
        assert (held_by("a.csv"), held_by("a.npz"), held_by(str(tmp_path))) == (
            "table", "image", "image",
        )  # fmt: skip
        (tmp_path / "a.txt").touch()
        assert held_by(str(tmp_path)) == "text"
        (tmp_path / "a.png").touch()
        assert held_by(str(tmp_path)) == "image"


class TestClean:
    def test_trims_what_a_cut_left_of_characters(self) -> None:
        snow = "\u2744".encode()  # three bytes
        horn = "\U0001f6a9".encode()  # four
        for character in ("\u00e9".encode(), snow, horn):
            for cut in range(1, len(character)):
                found, report = cleaned(character[cut:] + b"ab" + character[:cut])
                assert found == [b"ab"]
                assert not report.columns["text"].type_errors

    def test_drops_what_is_not_utf_8_otherwise(self) -> None:
        found, report = cleaned(b"fine", b"caf\xe9 noir", b"\xff\xfe", b"a\x80b", b"\xc0\xafxy")
        assert found == [b"fine"]
        assert report.columns["text"].type_errors == 4
        assert report.columns["text"].example == "not UTF-8"

    def test_drops_what_is_empty_or_nothing_but_half_a_character(self) -> None:
        found, report = cleaned(b"", b"\x84\x84", b"\r", b" ")
        assert found == [b" "]
        assert (report.records, report.blank, report.kept) == (4, 1, 1)

    def test_control_characters_become_blanks_and_carriage_returns_go(self) -> None:
        found, report = cleaned(b"a\r\nb\tc\x1b[31m\x7f", "\ufeffd".encode())
        assert found == [b"a\nb\tc [31m ", b"d"]
        assert report.columns["text"].out_of_bounds == 2

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
    def test_a_file_of_another_encoding_is_refused_in_a_line_that_says_so(
        self, tmp_path: Path, encoding: str
    ) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(("To be, or not to be" * 40).encode(encoding))
        found, report = clean(read(str(path), TextSchema()), TextSchema(), CLEAN)
        assert found.contents == ()
        with pytest.raises(DataError, match="not UTF-8") as caught:
            refuse_unusable(report)
        assert "save it as UTF-8" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_noise_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(np.random.default_rng(0).bytes(4096))
        _, report = clean(read(str(tmp_path / "a.txt"), TextSchema()), TextSchema(), CLEAN)
        with pytest.raises(DataError, match="not UTF-8"):
            refuse_unusable(report)

    @given(
        st.lists(
            st.one_of(st.binary(max_size=12), st.text("a\r\x1b\u00e9\ufeff").map(str.encode)),
            max_size=6,
        ),
        st.integers(0, 5),
    )
    def test_is_record_by_record_and_done_once(self, contents: list[bytes], place: int) -> None:
        found, _ = cleaned(*contents)
        assert found == [one for content in contents for one in cleaned(content)[0]]
        assert cleaned(*found)[0] == found
        assert all((one or b"").decode() for one in found)
        others = contents[:place] + contents[place + 1 :]
        assert all(one in found for one in cleaned(*others)[0])


class TestNumbers:
    def test_tokens_are_bytes_and_padding(self) -> None:
        found = encode(texts(b"ab", b"\x00\xffcd"), FOUR)
        assert found.x.dtype == np.float32
        assert (found.x * 256).tolist() == [[97, 98, 256, 256], [0, 255, 99, 100]]
        assert found.y.tolist() == [0, 0]
        assert tokens_of(found.x).tolist() == [[97, 98, 256, 256], [0, 255, 99, 100]]

    def test_no_records_have_their_shape(self) -> None:
        assert encode(texts(), FOUR).x.shape == (0, 4)
        assert decode(Encoded(np.zeros((0, 4), np.float32), np.zeros(0, np.int64)), FOUR) == []

    def test_bytes_that_are_no_character_are_replaced(self) -> None:
        x = np.array([[97, 0xE2, 256, 256]], dtype=np.float32) / PADDING
        assert decode(Encoded(x, np.zeros(1, np.int64)), FOUR) == ["a\ufffd"]

    @given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=3), max_size=5))
    def test_the_way_back(self, written: list[str]) -> None:
        schema = TextSchema(length=12)
        there = encode(texts(*(one.encode() for one in written)), schema)
        assert decode(there, schema) == written

    def test_another_modality_is_refused(self) -> None:
        image = parse_schema({"modality": "image", "height": 8, "width": 8}, "test")
        with pytest.raises(DataError, match="the source holds texts"):
            encode(texts(b"a"), image)

    def test_values_are_the_persons(self) -> None:
        raw = texts(b"a", b"b", persons=("ann", "bob"))
        assert modality(OWNED).values(raw, OWNED, "who") == ["ann", "bob"]
        assert modality(OWNED).take(raw, np.array([1])) == texts(b"b", persons=("bob",))
        with pytest.raises(DataError, match="texts have no column"):
            modality(OWNED).values(raw, OWNED, "text")
