"""Bits a byte of a model of plays that ten sites share, at epsilon 1: one round of noisy counts.

It needs tinyshakespeare.txt of ../shared/data. What is measured is text that no site has: the last
tenth of the file, cut off beforehand. Lower is better; 8 is no guess at all. `bpc_bigram_exact` is
of pairs of bytes, `bpc_exact` of the model itself, both counted without noise. The compressors have
seen the sites' text too, and are told no bound on what they may remember of it.
"""

import bz2
import lzma
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from harness import Report, start

import fedveil
from fedveil.config import Clean, MarginalOptions, Statistics, load_config
from fedveil.data_prep import Encoded, modality
from fedveil.data_prep.queries import answers, noisy, workload
from fedveil.data_prep.schema import Schema, load_schema
from fedveil.models import Batch, family, metrics

ROOT = Path(__file__).resolve().parents[1]
PLAYS = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
EXAMPLE = ROOT / "examples" / "shakespeare.toml"
CELLS_OF_PAIRS = 66_306  # of single bytes and pairs: no room for longer runs


def main() -> None:
    """Bits a byte by model, and the seconds of the private run."""
    report = start(__doc__ or "")
    if not PLAYS.is_file():
        print(f"{PLAYS}: is missing; nothing is measured", file=sys.stderr)
        report.finish()
        return
    with tempfile.TemporaryDirectory(prefix="fedveil-bench-") as folder:
        train, test = parted(Path(folder))
        private(report, train, test, repeats=1 if report.quick else 3)
        references(report, train, test)
    report.finish()


def parted(folder: Path) -> tuple[Path, Path]:
    """Nine tenths of the file, and the rest: two files."""
    plays = PLAYS.read_bytes()
    cut = len(plays) * 9 // 10
    files = folder / "train.txt", folder / "test.txt"
    for file, part in zip(files, (plays[:cut], plays[cut:]), strict=True):
        file.write_bytes(part)
    return files


def private(report: Report, train: Path, test: Path, repeats: int) -> None:
    """The example as it is, on the sites' part; its noise is drawn anew each time."""
    found, seconds = [], []
    for number in range(repeats):
        settings = {"data.source": str(train), "data.holdout": 0.0, "data.records": 15_000}
        run = fedveil.simulate(load_config(EXAMPLE, settings), out=train.parent / f"run{number}")
        found.append(run.evaluate(test)["figures"]["bits_per_character"])
        seconds.append(run.metrics["seconds"]["total"])
    report.add("bpc_marginal_eps1", float(np.mean(found)), "bits a byte")
    if repeats > 1:
        report.add("bpc_marginal_eps1_spread", max(found) - min(found))
    report.add("marginal_eps1_seconds", float(np.mean(seconds)), "s")


def references(report: Report, train: Path, test: Path) -> None:
    """The same without noise, shorter runs, no model at all, and compressors."""
    schema = load_schema(EXAMPLE.with_name("text.schema.toml"))
    known, new = encoded(train, schema), encoded(test, schema)
    report.add("bpc_exact", exact(known, new, schema, Statistics()), "bits a byte")
    pairs = Statistics(max_cells=CELLS_OF_PAIRS)
    report.add("bpc_bigram_exact", exact(known, new, schema, pairs), "bits a byte")
    report.add("bpc_uniform", 8.0, "bits a byte")
    seen, unseen = train.read_bytes(), test.read_bytes()
    for name, compress in (("bz2", bz2.compress), ("xz", lzma.compress)):
        more = len(compress(seen + unseen)) - len(compress(seen))
        report.add(f"bpc_{name}", 8 * more / len(unseen), "bits a byte")


def encoded(path: Path, schema: Schema) -> Encoded:
    """The records of a file, cleaned and encoded."""
    kind = modality(schema)
    cleaned, _ = kind.clean(kind.read(str(path), schema), schema, Clean())
    return kind.encode(cleaned, schema)


def exact(known: Encoded, new: Encoded, schema: Schema, options: Statistics) -> float:
    """Bits a byte of new records under a model of the known ones' counts."""
    asked = workload(schema, options, len(known.y), 0.0)
    counts = noisy(asked, answers(asked, known, schema), 0.0, len(known.y))
    kind = family("marginal")
    fit = kind.fit
    if fit is None:
        raise TypeError("marginal: is fitted")
    generator = torch.Generator().manual_seed(0)
    module = fit(MarginalOptions(family="marginal"), schema, counts, generator)
    records = Batch(torch.from_numpy(new.x), torch.from_numpy(new.y))
    exam = metrics.prepare(kind.sample(module, 100, generator), schema, seed=0)
    sums = metrics.answers(kind, module, exam, records, schema)
    return metrics.figures(sums, exam, schema, kind.score_bounds(module))["bits_per_character"]


if __name__ == "__main__":
    main()
