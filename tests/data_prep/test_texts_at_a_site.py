"""Texts before a run: checked, cleaned into a file that reads as the same, drafted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.config import Clean, ConfigError
from fedveil.data_prep.clean import DataError
from fedveil.data_prep.cleaned import write_cleaned
from fedveil.data_prep.draft import draft_schema
from fedveil.data_prep.findings import check
from fedveil.data_prep.schema import TextSchema, load_schema
from fedveil.data_prep.texts import clean, read

CLEAN = Clean()
SCHEMA = TextSchema(length=8)
OWNED = TextSchema(length=8, field="note", person="who")


class TestCleaned:
    @given(st.binary(max_size=80))
    def test_reads_as_the_same_records(
        self, tmp_path_factory: pytest.TempPathFactory, content: bytes
    ) -> None:
        folder = tmp_path_factory.mktemp("texts")
        source, out = folder / "a.txt", folder / "b.jsonl"
        source.write_bytes(b"a sound\n" + content)
        report = write_cleaned(str(source), SCHEMA, CLEAN, out)
        first, _ = clean(read(str(source), SCHEMA), SCHEMA, CLEAN)
        second, again = clean(read(str(out), SCHEMA), SCHEMA, CLEAN)
        assert first == second
        assert again.records == again.kept == report.kept
        assert again.columns["text"].out_of_bounds == 0

    def test_keeps_whose_they_are(self, tmp_path: Path) -> None:
        source, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
        source.write_text('{"note": "caf\\u00e9s \\r\\u2028", "who": 7, "x": 1}\n{"note": "b"}\n')
        write_cleaned(str(source), OWNED, CLEAN, out)
        assert json.loads(out.read_text(encoding="utf-8")) == {"note": "caf\u00e9s ", "who": "7"}
        assert json.loads((tmp_path / "b.jsonl.cleaning.json").read_text()) == {
            "records": 2,
            "blank": 0,
            "kept": 1,
            "columns": {
                "text": counted(out_of_bounds=1),
                "person": counted(missing=1),
            },
        }

    def test_another_ending_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("text")
        with pytest.raises(ConfigError, match=r"is for texts; end it in \.jsonl"):
            write_cleaned(str(tmp_path / "a.txt"), SCHEMA, CLEAN, tmp_path / "b.txt")


def counted(**found: int) -> dict[str, Any]:
    names = ("missing", "type_errors", "unknown_categories", "out_of_bounds")
    return {**dict.fromkeys(names, 0), "example": None, **found}


class TestCheck:
    def test_of_plain_text(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(b"sound...caf\xe9 au.bell\x07...\r\r\r\r\r\r\r\r")
        found = check(str(path), SCHEMA, CLEAN)
        assert found.refusal is None
        assert [(f.column, f.what, f.count) for f in found.findings] == [
            ("text", "not UTF-8", 1),
            ("text", "control characters", 2),
        ]
        assert (found.report.records, found.report.kept) == (4, 2)

    def test_of_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"note": "a", "who": "x"}\n\nnope\n{"note": "b"}\n', encoding="utf-8")
        found = check(str(path), OWNED, CLEAN)
        assert [(f.column, f.what, f.count) for f in found.findings] == [
            (None, "nothing in it", 1),
            ("text", 'no JSON object with a text "note"', 1),
            ("who", "missing", 1),
        ]
        assert found.report.kept == 1

    def test_what_cannot_be_used_says_why(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes("abc".encode("utf-16") * 9)
        refusal = check(str(tmp_path / "a.txt"), SCHEMA, CLEAN).refusal
        assert refusal is not None
        assert "save it as UTF-8" in refusal


class TestDraft:
    def test_of_plain_text_nothing_is_read_off_the_data(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("secret " * 99)
        for source in (tmp_path / "a.txt", tmp_path):
            draft = draft_schema(str(source))
            assert draft.schema == TextSchema()
            assert "unconfirmed" not in draft.text
            (tmp_path / "s.toml").write_text(draft.text)
            assert load_schema(tmp_path / "s.toml") == TextSchema()

    def test_of_lines_length_and_field_are_marked(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        rows = [{"id": n, "who": "ann", "note": "x" * (n + 1)} for n in range(100)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "nope\n\n")
        draft = draft_schema(str(path))
        # Nine in ten have 90 bytes or less: the next power of two.
        assert draft.schema == TextSchema(length=128, field="note", unconfirmed=("length", "field"))
        assert draft.keys == ("id", "who")
        assert '# person = "who"' in draft.text
        (tmp_path / "s.toml").write_text(draft.text)
        with pytest.raises(ConfigError, match="was read off the data"):
            load_schema(tmp_path / "s.toml")
        assert load_schema(tmp_path / "s.toml", draft=True) == draft.schema

    def test_a_field_that_is_called_text_is_one(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "short", "source": "a long address"}\n')
        found = draft_schema(str(tmp_path / "a.jsonl")).schema
        assert isinstance(found, TextSchema)
        assert (found.field, found.length) == ("text", 8)

    @pytest.mark.parametrize("content", ["", "nope\n", "[1]\n", '{"a": 3}\n', '{"": "b"}\n'])
    def test_lines_without_a_text_are_refused(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(DataError, match="no line is a JSON object with a text"):
            draft_schema(str(tmp_path / "a.jsonl"))

    def test_there_are_no_labels(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("text")
        with pytest.raises(ConfigError, match="--label mood: is for tables; texts have none"):
            draft_schema(str(tmp_path / "a.txt"), "mood")

    def test_by_the_command_line(
        self, tmp_path: Path, call: Callable[..., tuple[object, str, str]]
    ) -> None:
        (tmp_path / "a.txt").write_text("To be, or not to be")
        source, schema = str(tmp_path / "a.txt"), str(tmp_path / "s.toml")
        assert call("data", "schema", source, "-o", schema)[0] == 0
        code, out, _ = call("data", "check", source, "--schema", schema)
        assert (code, "USABLE: 1 of 1 records, 0 dropped" in out) == (0, True)
        code, out, _ = call("data", "schema", source, "--json")
        assert json.loads(out)["unconfirmed"] == 0
        code, _, err = call("data", "check", str(tmp_path / "a.csv"), "--schema", schema)
        assert (code, err.count("\n")) == (2, 1)
