"""One peer, once: runs in the peers' own environment and knows nothing of Fedveil.

`python adult_peer.py PEER EPSILON DELTA SEED IN.npz OUT.npz`: IN has `table` [N, columns] and
`levels` [columns], how many codes a column has, or 0 for a number in [0, 1]. OUT has a `table` of
the same layout and as many rows, and the `seconds` of fitting and sampling, by the clock and the
processor (`cpu`). Every transformer is fitted to the declared domain, none to the data, so that
none of the budget goes there.
"""

import sys
import time
from functools import partialmethod
from typing import Any

import numpy as np
import pandas as pd
import torch
from mbi import MarkovRandomField
from snsynth import Synthesizer
from snsynth.transform import (
    ChainTransformer,
    LabelTransformer,
    MinMaxTransformer,
    OneHotEncoder,
    TableTransformer,
)

AIM_ROUNDS = 30
"""Its default is 16 a column, 240 here, each with a fit of its own."""


def main(peer: str, epsilon: float, delta: float, seed: int, given: str, found: str) -> None:
    """Fits the peer to the table and writes its synthetic one."""
    np.random.seed(seed)  # noqa: NPY002  what the peers draw from
    torch.manual_seed(seed)
    # The default, "round", pairs low codes with low ones in columns that are independent.
    rows_alone = partialmethod(MarkovRandomField.synthetic_data, method="sample")
    MarkovRandomField.synthetic_data = rows_alone
    with np.load(given) as opened:
        table, levels = opened["table"], opened["levels"]
    columns = {f"c{i}": table[:, i].astype(int) if n else table[:, i] for i, n in enumerate(levels)}
    frame = pd.DataFrame(columns)
    began, worked = time.perf_counter(), time.process_time()
    synthesizer = Synthesizer.create(peer, epsilon=epsilon, delta=delta, **_options(peer))
    synthesizer.fit(frame, transformer=_transformer(peer, levels))
    synthetic = synthesizer.sample(len(frame))
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    np.savez(found, table=np.asarray(synthetic, np.float64), seconds=seconds, cpu=cpu)


def _options(peer: str) -> dict[str, Any]:
    if peer == "aim":
        return {"rounds": AIM_ROUNDS}
    return {"cuda": False, "verbose": False} if peer.endswith("gan") else {}


def _transformer(peer: str, levels: np.ndarray) -> Any:  # noqa: ANN401
    """Fitted to each code of each column, which are public."""
    if peer.endswith("gan"):
        columns = [
            ChainTransformer([LabelTransformer(nullable=False), OneHotEncoder()])
            if n
            else MinMaxTransformer(lower=0.0, upper=1.0, nullable=False)
            for n in levels
        ]
    else:
        columns = [LabelTransformer(nullable=False) for _ in levels]
    transformer = TableTransformer(columns)
    most = int(max(levels))
    domain = {f"c{i}": np.arange(most) % n if n else np.zeros(most) for i, n in enumerate(levels)}
    transformer.fit(pd.DataFrame(domain))
    return transformer


if __name__ == "__main__":
    name, epsilon, delta, seed, given, found = sys.argv[1:]
    main(name, float(epsilon), float(delta), int(seed), given, found)
