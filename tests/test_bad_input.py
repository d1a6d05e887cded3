"""Every bad input is one line on stderr and an exit code: no traceback, no run folder."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import fedveil
from fedveil.privacy import accounting
from fedveil.privacy import plan as plan_module

CONFIG = """
[federation]
sites = 2
rounds = 2
[data]
source = "data.csv"
schema = "schema.toml"
records = 100
[model]
family = "vae"
hidden = 4
latent = 2
[privacy]
mechanism = "none"
statistics_share = 0.0
"""
SCHEMA = """
label = "ill"
[[column]]
name = "age"
kind = "integer"
bounds = [0, 120]
[[column]]
name = "weight"
kind = "numeric"
bounds = [0, 300]
[[column]]
name = "ill"
kind = "categorical"
categories = ["no", "yes"]
"""
IMAGES = """
modality = "image"
height = 8
width = 8
classes = ["0", "1"]
"""
NONE = 'mechanism = "none"'
SHARED = 'mechanism = "distributed"'
SITE = 'mechanism = "site"\nepsilon_holdout = 3.0'
DIGITS = CONFIG.replace('"data.csv"\nschema = "schema.toml"\nrecords = 100', '"sklearn:digits"')
ROWS = [f"{20 + n},{60.5 + n},{'yes' if n % 3 else 'no'}" for n in range(20)]
TABLE = "\n".join(["age,weight,ill", *ROWS]) + "\n"
Files = dict[str, str | bytes]


def changed(old: str, new: str, text: str = CONFIG) -> Files:
    """A configuration with one change."""
    assert old in text
    return {"run.toml": text.replace(old, new)}


def with_option(section: str, line: str, text: str = CONFIG) -> Files:
    """A configuration with a line more."""
    return changed(f"[{section}]\n", f"[{section}]\n{line}\n", text)


CENTRAL = 'mechanism = "central"\n'


def private(line: str) -> Files:
    """A configuration with these lines of a promise."""
    return changed('mechanism = "none"', line)


def policy(line: str, *files: tuple[str, str]) -> Files:
    """A configuration with a policy, and files beside it."""
    return {"run.toml": f"{CONFIG}[policy]\n{line}\n", **dict(files)}


def durable(line: str, data: str = 'ledger = "home"\ndataset_id = "cardiology"') -> Files:
    """A configuration with a ledger that outlives its run, and these lines of a policy."""
    text = CONFIG.replace('mechanism = "none"', CENTRAL + "sampling_rate = 1.0")
    return with_option("data", data, f"{text}[policy]\n{line}\n")


def npz(**arrays: np.ndarray) -> bytes:
    """An archive of arrays."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    """A single array."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def parquet(frame: pl.DataFrame) -> bytes:
    """A table as Parquet."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()


def images(content: bytes | None, name: str = "data.npz", schema: str = IMAGES) -> Files:
    """A run on images from a file."""
    files: Files = {"schema.toml": schema, **changed("data.csv", name)}
    if content is not None:
        files[name] = content
    return files


TEXT = 'modality = "text"\nlength = 16\n'


def texts(content: bytes | None, name: str = "data.txt", schema: str = TEXT) -> Files:
    """A run on texts from a file."""
    model = CONFIG.replace('"vae"\nhidden = 4\nlatent = 2', '"marginal"').replace(
        "rounds = 2\n", ""
    )
    model = model.replace("statistics_share = 0.0\n", "")
    files: Files = {"schema.toml": schema, "run.toml": model.replace("data.csv", name)}
    if content is not None:
        files[name] = content
    return files


PLAY = "To be, or not to be: that is the question. Whether 'tis nobler in the mind" * 4


def spoilt(content: bytes) -> bytes:
    """The same with bytes in its midst turned round."""
    middle = len(content) // 3
    return (
        content[:middle]
        + bytes(255 - b for b in content[middle : middle + 60])
        + content[middle + 60 :]
    )


def evaluation(line: str) -> Files:
    """A configuration with an evaluation."""
    return {"run.toml": f"{CONFIG}[evaluation]\n{line}\n"}


LIMITS = "epsilon_lifetime = 9.0\ndelta_lifetime = 1e-4"
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 8, 8)).astype(np.uint8)
LABELS = np.arange(20) % 2
LISTS = pl.DataFrame({"age": [[1, 2]] * 4, "weight": [70.0] * 4, "ill": ["no", "yes"] * 2})

CASES: dict[str, tuple[Files | None, str]] = {
    "no configuration": (None, "run.toml: cannot be read"),
    "empty configuration": ({"run.toml": ""}, "missing"),
    "unparsable configuration": ({"run.toml": "[data\n"}, "run.toml: is not TOML"),
    "binary configuration": ({"run.toml": b"\xff\xfe\x00"}, "run.toml: is not TOML"),
    "a section that is none": ({"run.toml": "data = 3\nmodel = []\n"}, "data"),
    "a key over two lines": (with_option("privacy", '"a\\nb" = 1'), "unknown key"),
    "unknown key": (with_option("privacy", "epsilom = 1.0"), 'did you mean "epsilon"?'),
    "unknown section": ({"run.toml": CONFIG + "[privacies]\na = 1\n"}, '"privacy"?'),
    "unknown family": (changed('"vae"', '"vea"'), 'model.family = "vea"'),
    "no family": (changed('family = "vae"\n', ""), "model.family: missing"),
    "no source": (changed('source = "data.csv"\n', ""), "data.source: missing"),
    "empty source": (changed('"data.csv"', '""'), "data.source"),
    "unknown built-in source": (
        {"run.toml": DIGITS.replace("digits", "iris")}, "data.source = sklearn:iris: unknown"
    ),
    "unknown kind of source": (changed("data.csv", "data.xyz"), "data.source"),
    "unknown mechanism": (private('mechanism = "magic"'), "privacy.mechanism"),
    "unknown strategy": (
        {"run.toml": CONFIG + '[aggregation]\nstrategy = "mean"\n'}, "aggregation.strategy"
    ),
    "mechanism and strategy": (
        {"run.toml": DIGITS.replace('"none"', '"local"') + '[aggregation]\nstrategy = "adam"\n'},
        "does not go with",
    ),
    "epsilon 0": (private("epsilon = 0.0"), "privacy.epsilon = 0.0: must be > 0"),
    "epsilon -1": (private("epsilon = -1"), "privacy.epsilon = -1"),
    "epsilon nan": (private("epsilon = nan"), "privacy.epsilon"),
    "epsilon inf": (private("epsilon = inf"), "privacy.epsilon"),
    "epsilon text": (private('epsilon = "much"'), 'privacy.epsilon = "much"'),
    "epsilon out of reach": (private(CENTRAL + "epsilon = 1e-7"), "privacy.epsilon"),
    "delta 1": (private("delta = 1.0"), "privacy.delta = 1.0: must be < 1"),
    "delta 2": (private("delta = 2.0"), "privacy.delta"),
    "delta 0": (private("delta = 0.0"), "privacy.delta"),
    "delta nan": (private("delta = nan"), "privacy.delta"),
    "clipping norm 0": (private("clipping_norm = 0.0"), "privacy.clipping_norm"),
    "sampling rate above 1": (private("sampling_rate = 1.5"), "privacy.sampling_rate"),
    "epsilon of the holdout 0": (private("epsilon_holdout = 0.0"), "privacy.epsilon_holdout = 0.0"),
    "epsilon of the holdout above 100": (
        private("epsilon_holdout = 101"), "privacy.epsilon_holdout = 101: must be <= 100"
    ),
    "epsilon of the holdout out of reach": (
        private(CENTRAL + "sampling_rate = 1.0\nepsilon_holdout = 1e-7"),
        "privacy.epsilon_holdout = 1e-07: cannot be reached",
    ),
    "a ledger without an account": (
        durable(LIMITS, 'ledger = "home"'), "data.dataset_id: missing: data.ledger needs"
    ),
    "a ledger without a limit of epsilon": (
        durable("delta_lifetime = 1e-4"), "policy.epsilon_lifetime: missing: data.ledger outlives"
    ),
    "a ledger without a limit of delta": (
        durable("epsilon_lifetime = 9.0"), "policy.delta_lifetime: missing: data.ledger outlives"
    ),
    "a ledger without any limit": (durable(""), "policy.epsilon_lifetime: missing"),
    "a ledger for a run that is not private": (
        {"run.toml": with_option("data", 'ledger = "home"\ndataset_id = "a"')["run.toml"]},
        'data.ledger: no budget pays for privacy.mechanism = "none"',
    ),
    "a ledger without a name": (durable(LIMITS, 'ledger = ""\ndataset_id = "a"'), "data.ledger"),
    "a ledger that is a number": (
        durable(LIMITS, 'ledger = 3\ndataset_id = "a"'), "data.ledger = 3: must be a valid string"
    ),
    "an account that is a path": (
        with_option("data", 'dataset_id = "../a"'), 'data.dataset_id = "../a": must match'
    ),
    "an account without a name": (with_option("data", 'dataset_id = ""'), 'data.dataset_id = ""'),
    "limits that are none": (
        durable("epsilon_lifetime = 0.0\ndelta_lifetime = 1e-4"),
        "policy.epsilon_lifetime = 0.0: must be > 0",
    ),
    "a limit of delta that is none": (
        durable("epsilon_lifetime = 9.0\ndelta_lifetime = 1.0"), "policy.delta_lifetime = 1.0"
    ),
    "a limit that is endless": (
        durable("epsilon_lifetime = inf\ndelta_lifetime = 1e-4"), "policy.epsilon_lifetime"
    ),
    "an unknown limit": (durable("epsilon_lifetme = 9.0"), 'did you mean "epsilon_lifetime"?'),
    "an unknown composition": (
        durable(LIMITS + '\ncomposition = "aditon"'), 'did you mean "addition"?'
    ),
    "a composition that is not valid across runs": (
        durable(LIMITS + '\ncomposition = "pld"'), "must be 'addition' or 'rdp'"
    ),
    "a filter without a limit": (
        {"run.toml": CONFIG + '[policy]\ncomposition = "rdp"\n'}, "policy.epsilon_lifetime: missing"
    ),
    "two sites under the default mechanism": (
        private("epsilon = 3.0"), 'federation.sites = 2: privacy.mechanism = "distributed", the'
    ),
    "two sites that share the noise of whole updates": (
        private('mechanism = "site"'), 'federation.sites = 2: privacy.mechanism = "site" needs'
    ),
    "shared noise in the clear": (
        {"run.toml": f"{CONFIG.replace(NONE, SHARED)}[aggregation]\nencryption = 'none'\n"},
        'aggregation.encryption = "none": does not go with privacy.mechanism = "distributed"',
    ),
    "an unknown encryption": (
        {"run.toml": f"{CONFIG}[aggregation]\nencryption = 'secag'\n"}, 'did you mean "secagg"?'
    ),
    "numbers of a secure sum that is none": (
        {"run.toml": f"{CONFIG}[secagg]\nn_min = 2\n"},
        'secagg.n_min: goes with aggregation.encryption = "secagg" only',
    ),
    "an unsafe threshold": (
        {"run.toml": f"{CONFIG.replace(NONE, SHARED)}[secagg]\nthreshold = 2\n".replace(
            "sites = 2", "sites = 5"
        )},
        "secagg.threshold = 2: must be 4 to 5",
    ),
    "a median of what only a sum is seen of": (
        {"run.toml": f"{CONFIG}[aggregation]\nencryption = 'secagg'\nstrategy = 'median'\n"},
        'aggregation.strategy = "median": needs each site\'s model',
    ),
    "persons that nobody counted": (
        private(CENTRAL + 'unit = "person"'), "data.persons: missing: privacy.unit"
    ),
    "persons that hide nothing": (
        with_option("data", "persons = 9"), 'data.persons = 9: goes with privacy.unit = "person"'
    ),
    "an unknown unit": (private('unit = "patient"'), 'privacy.unit = "patient": must be'),
    "a unit of another mechanism": (
        private(CENTRAL + 'unit = "site"'), 'privacy.unit = "site": does not go with'
    ),
    "a holdout as dear as a site's whole run": (
        {"run.toml": f"{CONFIG.replace(NONE, SITE)}[aggregation]\nencryption = 'none'\n"},
        "privacy.epsilon_holdout = 3: must be below privacy.epsilon = 3",
    ),
    "a policy that accepts nothing": (policy("mechanisms = []"), "policy.mechanisms = []: must"),
    "a policy's list that is none": (policy('units = "record"'), "must be a list"),
    "a policy of an unknown mechanism": (
        policy('mechanisms = ["cental"]'), 'did you mean "central"?'
    ),
    "a policy's coordinator without a key": (
        policy('coordinator = "me"'), 'policy.coordinator = "me": must match'
    ),
    "an account in a run's policy": (policy('dataset_id = "a"'), "policy.dataset_id: unknown key"),
    "no folder of policies": (policy('folder = "gone"'), "cannot be read (No such file"),
    "a file for a folder of policies": (
        policy('folder = "data.csv"'), "cannot be read (Not a directory)"
    ),
    "a policy of a site that is none": (
        policy('folder = "own"', ("own/site-003.toml", "[policy]\n")),
        "own/site-003.toml: policy.folder may hold the policies of this run's sites only",
    ),
    "a simulated site's empty file": (
        policy('folder = "own"', ("own/site-001.toml", "")), "own/site-001.toml: policy: missing"
    ),
    "a simulated site's unknown key": (
        policy('folder = "own"', ("own/site-002.toml", "[policy]\nmin_site = 3\n")),
        'own/site-002.toml: policy.min_site: unknown key; did you mean "min_sites"?',
    ),
    "evaluation every -1 rounds": (evaluation("every = -1"), "evaluation.every = -1: must be >= 0"),
    "evaluation every half a round": (evaluation("every = 0.5"), "evaluation.every = 0.5"),
    "evaluation by 99 samples": (
        evaluation("samples = 99"), "evaluation.samples = 99: must be >= 100"
    ),
    "evaluation by too many samples": (
        evaluation("samples = 1000001"), "evaluation.samples = 1000001: must be <= "
    ),
    "an unknown option of evaluation": (evaluation("evry = 3"), 'did you mean "every"?'),
    "a training share of all": (
        evaluation("training_share = 1.0"), "evaluation.training_share = 1.0: must be < 1"
    ),
    "a training share below 0": (
        evaluation("training_share = -0.1"), "evaluation.training_share = -0.1: must be >= 0"
    ),
    "a training share without a holdout": (
        {
            "run.toml": CONFIG.replace("records = 100\n", "records = 100\nholdout = 0.0\n")
            + "[evaluation]\ntraining_share = 0.1\n"
        },
        "evaluation.training_share = 0.1: needs records to hold the figures against",
    ),
    "zero sites": (changed("sites = 2", "sites = 0"), "federation.sites = 0: must be >= 1"),
    "half a site": (changed("sites = 2", "sites = 2.5"), "federation.sites"),
    "zero rounds": (changed("rounds = 2", "rounds = 0"), "federation.rounds = 0: must be >= 1"),
    "more sites than records": (changed("sites = 2", "sites = 21"), "federation.sites = 21"),
    "more replies than sites": (with_option("federation", "min_replies = 3"), "min_replies = 3"),
    "all held out": (with_option("data", "holdout = 0.5\naudit = 0.5"), "data.holdout"),
    "no records declared": (changed("records = 100\n", ""), "data.records"),
    "no schema declared": (changed('schema = "schema.toml"\n', ""), "data.schema"),
    "no schema file": (changed("schema.toml", "gone.toml"), "gone.toml: cannot be read"),
    "unparsable schema": ({"schema.toml": "= ="}, "schema.toml: is not TOML"),
    "empty schema": ({"schema.toml": ""}, "schema.toml"),
    "unknown modality": ({"schema.toml": 'modality = "sound"'}, "modality"),
    "modality that is a list": ({"schema.toml": 'modality = ["table"]'}, "modality"),
    "schema of images for a table": ({"schema.toml": IMAGES}, "data"),
    "schema of a table for images": (
        {"run.toml": CONFIG.replace("data.csv", "sklearn:digits")}, "data.source = sklearn:digits"
    ),
    "unknown column to share out by": (
        with_option("data", 'partition = "column"\ncolumn = "town"'), 'data.column = "town"'
    ),
    "no data file": ({"data.csv": ""}, "data.csv"),
    "data file that is gone": (changed("data.csv", "gone.csv"), "gone.csv: is no file"),
    "header only": ({"data.csv": "age,weight,ill\n"}, "data: holds no records"),
    "binary data": ({"data.csv": b"\x00\x01\xff\xfe" * 100}, "data.csv"),
    "ragged data only": (
        {"data.csv": "age,weight,ill\n" + "1,2,no,4,5\n1,2\n" * 5},
        "none of 10 records is usable (10 are blank",
    ),
    "another separator": (
        {"data.csv": "age,weight,ill\n" + TABLE.partition("\n")[2].replace(",", ";")},
        "none of 20 records is usable (20 are blank",
    ),
    "a column missing": ({"data.csv": TABLE.replace("weight", "height")}, '"weight" is missing'),
    "a column twice": ({"data.csv": TABLE.replace("age,weight", "age, age,weight")}, "data.csv"),
    "a header over two lines": (
        {"data.csv": TABLE.replace("age,weight", '"a\nge",weight')}, '"age" is missing'
    ),
    "a column of wrong type": (
        {"data.csv": "age,weight,ill\n" + "old,70,no\n" * 9},
        "column \"age\" = 'old', ...: no value is what the schema declares",
    ),
    "a column of unknown categories": (
        {"data.csv": TABLE.replace("yes", "1").replace("no", "0")},
        "column \"ill\" = '0', ...: no value is what the schema declares",
    ),
    "a column of nothing": ({"data.csv": "age,weight,ill\n" + ",70,no\n" * 9}, "none of 9 records"),
    "all records unusable": (
        {"data.csv": "age,weight,ill\n" + "1,,no\n,70,yes\n" * 5}, "none of 10 records is usable"
    ),
    "garbage for Parquet": (
        {**changed("data.csv", "data.parquet"), "data.parquet": b"PAR1 garbage"}, "data.parquet"
    ),
    "empty Parquet": ({**changed("data.csv", "data.parquet"), "data.parquet": b""}, "data.parquet"),
    "lists in Parquet": (
        {**changed("data.csv", "data.parquet"), "data.parquet": parquet(LISTS)}, "data.parquet"
    ),
    "no text": (texts(None), "data.txt: is no file"),
    "an empty text": (texts(b""), "data: holds no records"),
    "an empty jsonl": (texts(b"", "data.jsonl"), "data: holds no records"),
    "a text of UTF-16": (texts(PLAY.encode("utf-16")), "save it as UTF-8"),
    "a text of Latin-1": (texts(("\u00e9t\u00e9 " * 99).encode("latin-1")), "save it as UTF-8"),
    "a text that is none": (texts(np.random.default_rng(1).bytes(999)), "save it as UTF-8"),
    "a text of fewer records than sites": (texts(b"To be"), "more sites than records (1)"),
    "a text of another ending": (texts(PLAY.encode(), "data.doc"), "must end in .txt or .jsonl"),
    "a table for a text": (texts(TABLE.encode(), "data.csv"), "must end in .txt or .jsonl"),
    "lines that are no JSON": (texts(PLAY.encode(), "data.jsonl"), "the schema's field"),
    "lines without the text": (texts(b'{"txt": "a"}\n' * 9, "data.jsonl"), "the schema's field"),
    "lines with a number": (texts(b'{"text": 3}\n' * 9, "data.jsonl"), "the schema's field"),
    "lines that are lists": (texts(b'["text"]\n' * 9, "data.jsonl"), "the schema's field"),
    "lines that are blank": (texts(b"\n" * 9, "data.jsonl"), "none of 9 records is usable"),
    "lines of nothing": (texts(b'{"text": ""}\n' * 9, "data.jsonl"), "none of 9 records"),
    "a length out of range": (
        texts(PLAY.encode(), schema=TEXT.replace("16", "3")), "length = 3: must be >= 4"
    ),
    "a length too great": (
        texts(PLAY.encode(), schema=TEXT.replace("16", "9999")), "length = 9999: must be <= 4096"
    ),
    "a draft of texts": (
        texts(PLAY.encode(), schema=TEXT + 'unconfirmed = ["length"]\n'), "was read off the data"
    ),
    "plain text of persons": (
        texts(PLAY.encode(), schema=TEXT + 'person = "who"\n'), "does not say whose it is"
    ),
    "texts by a family that makes none": (
        {**texts(PLAY.encode()), "run.toml": CONFIG.replace("data.csv", "data.txt")},
        'model.family = "vae": makes no texts; use "marginal"',
    ),
    "no images": (images(None), "data.npz"),
    "empty images": (images(b""), "data.npz"),
    "garbage for images": (images(b"garbage"), "data.npz"),
    "half an archive": (images(npz(images=PIXELS, labels=LABELS)[:300]), "data.npz"),
    "a spoilt archive": (images(spoilt(npz(images=PIXELS, labels=LABELS))), "data.npz"),
    "one array for an archive": (images(npy(PIXELS)), "data.npz"),
    "an archive without images": (images(npz(labels=LABELS)), 'no array "images"'),
    "an archive without labels": (images(npz(images=PIXELS)), 'no array "labels"'),
    "one number for images": (images(npz(images=np.array(3), labels=LABELS)), "data.npz"),
    "an archive of no images": (
        images(npz(images=PIXELS[:0], labels=LABELS[:0])), "data: holds no records"
    ),
    "images of wrong shape": (
        images(npz(images=PIXELS[:, :4], labels=LABELS)), "the schema declares (8, 8, 1) uint8"
    ),
    "images of wrong type": (
        images(npz(images=PIXELS / 255, labels=LABELS)), "the schema declares (8, 8, 1) uint8"
    ),
    "too few labels": (images(npz(images=PIXELS, labels=LABELS[:5])), "one label"),
    "pickled images": (
        images(npz(images=np.array([None]), labels=LABELS)), "data.npz"
    ),
    "unknown classes": (
        images(npz(images=PIXELS, labels=LABELS + 7)),
        "column \"label\" = '', ...: no value is what the schema declares",
    ),
    "images of a size that the model cannot halve": (
        images(npz(images=PIXELS, labels=LABELS), schema=IMAGES.replace("8", "10")),
        "multiples of 4",
    ),
}  # fmt: skip


def lay(folder: Path, files: Files) -> None:
    """Writes a whole run's files, those given instead of the good ones."""
    good: Files = {"run.toml": CONFIG, "schema.toml": SCHEMA, "data.csv": TABLE}
    for name, content in {**good, **files}.items():
        data = content.encode() if isinstance(content, str) else content
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


Call = Callable[..., Any]


def assert_refused(
    result: tuple[object, str, str], said: str, codes: tuple[int, ...] = (2,)
) -> None:
    """One line that says so, on stderr, and an exit code."""
    code, out, err = result
    assert out == ""
    assert err.startswith("error: "), err
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    assert said in err
    assert code in codes


class TestSimulate:
    def test_the_good_run_that_the_others_spoil(self, call: Call, tmp_path: Path) -> None:
        lay(tmp_path, {})
        code, out, err = call("simulate", "run.toml", "--out", "run", "--json")
        assert (code, err) == (0, "")
        assert '"rounds": 2' in out

    def test_the_good_images(self, call: Call, tmp_path: Path) -> None:
        lay(tmp_path, images(npz(images=PIXELS, labels=LABELS)))
        assert call("simulate", "run.toml", "--dry-run")[0] == 0

    @pytest.mark.parametrize(
        ("line", "found"),
        [
            (b"1,2,no,4,5\n", {"blank": 1, "kept": 20}),
            (b"1,2\n", {"blank": 1, "kept": 20}),
            (b",,\n", {"blank": 1, "kept": 20}),
            (b'"1,2,no\n', {"blank": 1, "kept": 20}),
            (b"\xff\xfe,2,no\n", {"blank": 0, "kept": 20}),
            (b"30,70,no\n", {"blank": 0, "kept": 21}),
        ],
        ids=["too long", "too short", "empty", "an open quote", "no UTF-8", "a good one"],
    )
    @pytest.mark.parametrize("first", [True, False])
    def test_a_bad_line_is_one_record_lost(
        self, call: Call, tmp_path: Path, line: bytes, found: dict[str, int], first: bool
    ) -> None:
        """Whatever stands in one line: the run goes on, and the other records are all there."""
        header, rest = (part.encode() for part in TABLE.split("\n", 1))
        lines = line + rest if first else rest + line
        lay(tmp_path, {"data.csv": header + b"\n" + lines})
        code, _, err = call("simulate", "run.toml", "--out", "run", "--json")
        assert (code, err) == (0, "")
        reports = [json.loads(f.read_text()) for f in tmp_path.glob("run/sites/*/cleaning.json")]
        assert len(reports) == 2
        total = {key: sum(report[key] for report in reports) for key in ("blank", "kept")}
        assert total == found
        assert sum(report["records"] for report in reports) == 21

    @pytest.mark.parametrize(
        ("name", "content"),
        [("data.txt", PLAY.encode()), ("data.jsonl", b'{"text": "To be"}\nnope\n\n{"text": "or"}')],
    )
    def test_the_good_texts(self, call: Call, tmp_path: Path, name: str, content: bytes) -> None:
        lay(tmp_path, texts(content, name))
        code, _, err = call("simulate", "run.toml", "--dry-run")
        assert (code, err) == (0, "")

    @pytest.mark.parametrize("case", CASES)
    def test_bad(self, call: Call, tmp_path: Path, case: str) -> None:
        files, said = CASES[case]
        if files is not None:
            lay(tmp_path, files)
        before = sorted(tmp_path.rglob("*"))
        assert_refused(call("simulate", "run.toml", "--out", "out/run"), said)
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize(
        ("setting", "said"),
        [
            ("privacy.epsilon", "must be section.key=value"),
            ("epsilon=3", "must be section.key=value"),
            ("privacy.epsilon=", "privacy.epsilon"),
            ("privacy.epsilon=-1", "privacy.epsilon = -1"),
            ("privacy.epsilom=1", 'did you mean "epsilon"?'),
            ("nonsense.a=1", "unknown key"),
            ("privacy.epsilon.a=1", "privacy"),
            ("data.source=gone.csv", "gone.csv: is no file"),
            ("model.family=gan2", "model.family"),
            (".=1", "unknown key"),
        ],
    )
    def test_bad_settings(self, call: Call, tmp_path: Path, setting: str, said: str) -> None:
        lay(tmp_path, {})
        before = sorted(tmp_path.rglob("*"))
        assert_refused(call("simulate", "run.toml", "--set", setting), said)
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize("out", ["run.toml", "run.toml/run", "full"])
    def test_no_place_for_the_run(self, call: Call, tmp_path: Path, out: str) -> None:
        lay(tmp_path, {})
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "thesis.txt").write_text("mine", encoding="utf-8")
        before = sorted(tmp_path.rglob("*"))
        assert_refused(call("simulate", "run.toml", "--out", out), f"--out {out}")
        assert sorted(tmp_path.rglob("*")) == before

    def test_the_fewest_samples_make_no_noise_of_a_library(
        self, call: Call, tmp_path: Path
    ) -> None:
        lay(tmp_path, evaluation("samples = 100"))
        code, out, err = call("simulate", "run.toml", "--out", "run", "--json")
        assert (code, err) == (0, "")
        assert json.loads(out)["evaluated"]["evaluations"] == 2

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            (
                "epsilon_lifetime = 0.5",
                "site-001: account fedveil/record/training: epsilon 0 of 0.5 is spent",
            ),
            (
                "delta_lifetime = 1e-9",
                "site-001: account fedveil/record/training: delta 0 of 1e-09 is spent",
            ),
            ('epsilon_lifetime = 3.1\ncomposition = "rdp"', "site-001: account fedveil/record/"),
        ],
    )
    def test_a_run_beyond_its_own_policy(
        self, call: Call, tmp_path: Path, line: str, said: str
    ) -> None:
        """It is no wrong configuration, but a run that the sites refuse: nothing has run."""
        text = CONFIG.replace('mechanism = "none"', CENTRAL + "sampling_rate = 1.0")
        lay(tmp_path, {"run.toml": f"{text}[policy]\n{line}\n"})
        assert_refused(call("simulate", "run.toml", "--out", "run"), said, codes=(1,))
        assert not list(tmp_path.glob("run/events.jsonl"))
        assert not list(tmp_path.glob("run/sites/*/cleaning.json"))

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("site-001.sqlite", b"garbage" * 99, "site-001.sqlite: file is not a database"),
            ("site-002.sqlite", b"", "site-002.sqlite: is no ledger"),
            ("site-002.SIMULATED-split.key", b"00" * 32, "site-002.sqlite: is missing"),
            ("site-001.SIMULATED-split.key", b"", "site-001.sqlite: is missing"),
        ],
    )
    def test_a_home_of_ledgers_that_is_damaged(
        self, call: Call, tmp_path: Path, name: str, content: bytes, said: str
    ) -> None:
        lay(tmp_path, durable(LIMITS))
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / name).write_bytes(content)
        assert_refused(call("simulate", "run.toml", "--out", "run"), said, codes=(1,))
        assert (tmp_path / "home" / name).read_bytes() == content
        assert not list(tmp_path.glob("run/events.jsonl"))

    @pytest.mark.parametrize("home", ["data.csv", "data.csv/home", "/proc/home"])
    def test_a_home_of_ledgers_that_cannot_be(self, call: Call, tmp_path: Path, home: str) -> None:
        lay(tmp_path, durable(LIMITS, f'ledger = "{home}"\ndataset_id = "a"'))
        result = call("simulate", "run.toml", "--out", "run")
        assert_refused(result, Path(home).name, codes=(1, 2))
        assert (tmp_path / "data.csv").read_text(encoding="utf-8") == TABLE

    def test_accountants_that_disagree(
        self, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`Do not run` is for the user to read, not a traceback."""

        def doubt(*arguments: object) -> None:
            raise accounting.AccountingError("the accountants disagree")

        monkeypatch.setattr(plan_module, "calibrate", lambda *_: accounting.Releases(1.0, 0.5, 2))
        monkeypatch.setattr(plan_module, "pld_epsilon", lambda *_: 1.0)
        monkeypatch.setattr(plan_module, "cross_check", doubt)
        lay(tmp_path, private('mechanism = "central"'))
        before = sorted(tmp_path.rglob("*"))
        result = call("simulate", "run.toml", "--out", "run")
        assert_refused(result, "the accountants disagree", codes=(1, 2))
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize("case", ["epsilon -1", "a column missing"])
    def test_in_a_process(self, tmp_path: Path, case: str) -> None:
        files, said = CASES[case]
        assert files is not None
        lay(tmp_path, files)
        done = subprocess.run(
            [sys.executable, "-m", "fedveil", "simulate", "run.toml"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert_refused((done.returncode, done.stdout, done.stderr), said)
        assert not (tmp_path / "runs").exists()


class TestSample:
    @pytest.mark.parametrize(
        ("folder", "said"),
        [
            ("gone", "gone: holds no run; check the path"),
            ("empty", "empty: holds no run; check the path"),
            ("file", "file: is a file; give the folder of a run"),
        ],
    )
    def test_no_run(self, call: Call, tmp_path: Path, folder: str, said: str) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").write_text("mine", encoding="utf-8")
        result = call("sample", folder, "-o", "a.png")
        assert_refused(result, said)
        assert not (tmp_path / "a.png").exists()

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("model.safetensors", b""),
            ("model.safetensors", b"garbage"),
            ("model.safetensors", None),
            ("schema.json", None),
            ("schema.json", b"\xff"),
            ("config.toml", None),
            ("metrics.json", b"{}"),
        ],
    )
    def test_a_damaged_run(
        self,
        call: Call,
        finished_run: fedveil.Run,
        tmp_path: Path,
        name: str,
        content: bytes | None,
    ) -> None:
        copied = tmp_path / "run"
        copied.mkdir()
        for part in ("metrics.json", "schema.json", "config.toml", "model.safetensors"):
            (copied / part).write_bytes((finished_run.path / part).read_bytes())
        if content is None:
            (copied / name).unlink()
        else:
            (copied / name).write_bytes(content)
        assert_refused(call("sample", copied, "-o", "a.png"), "", codes=(1, 2))
        assert not (tmp_path / "a.png").exists()

    def test_a_model_with_a_flipped_header(self, finished_run: fedveil.Run, tmp_path: Path) -> None:
        copied = tmp_path / "run"
        copied.mkdir()
        for part in ("metrics.json", "schema.json", "config.toml", "model.safetensors"):
            (copied / part).write_bytes((finished_run.path / part).read_bytes())
        whole = (copied / "model.safetensors").read_bytes()
        (copied / "model.safetensors").write_bytes(whole[:-10])
        done = subprocess.run(
            [sys.executable, "-m", "fedveil", "sample", "run", "-o", "a.png"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert_refused((done.returncode, done.stdout, done.stderr), "model.safetensors", codes=(1,))

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["-o", "a.csv"], "--out a.csv"),
            (["-o", "a"], "--out a"),
            (["-o", "gone/a.png"], "--out gone/a.png: cannot be written"),
            (["-o", "a.png", "-n", "0"], "n = 0"),
            (["-o", "a.npz", "-n", "-5"], "n = -5"),
            (["-o", "a.npz", "--seed", str(2**80)], "seed"),
        ],
    )
    def test_bad_options(
        self, call: Call, finished_run: fedveil.Run, tmp_path: Path, options: list[str], said: str
    ) -> None:
        assert_refused(call("sample", finished_run.path, *options), said)
        assert not list(tmp_path.iterdir())
