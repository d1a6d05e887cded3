"""The security note's program runs as it stands there."""

import re
from pathlib import Path

import numpy as np

import fedveil
from fedveil.privacy.secagg.transcript import verify_transcript

README = Path(fedveil.__file__).parent / "privacy" / "secagg" / "README.md"


def test_the_wiring_gives_the_sum() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    found: dict[str, object] = {}
    exec(compile(program, str(README), "exec"), found)  # noqa: S102
    total, transcript, pinned = found["total"], found["transcript"], found["pinned"]
    assert isinstance(total, np.ndarray)
    assert np.abs(total - [1.5, -3.0, 6.0]).max() <= 3 * 2.0**-16
    assert isinstance(transcript, bytearray)
    assert isinstance(pinned, dict)
    (record,) = verify_transcript(transcript, pinned).rounds
    assert record.uploaders == ("bern", "genf", "thun")
