"""The secure sum in one process: masks, a site's round, the server's; beside Flower and CKKS.

Every sum is held against the plain integer sum. Sites keep their state in vaults on disk, durably.
The masks are timed beside Flower's own generator (as a site runs either: ours on all cores, its on
the one that it knows; and both on one core), and on one core beside ChaCha20 and AES without
blocks; a site's round beside its masks alone. TenSEAL gets an environment of its own under the
user's cache, and the leanest parameters at a scale of 2^40 that a sum needs; without a network it
is left out. A whole round over the local engine stands beside a plain one (`secure_grid.py`).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition, parameters_mod
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from harness import Report, interleaved, start
from secure_grid import over_plain_grid

from fedveil.privacy.noise import Coins
from fedveil.privacy.secagg.aggregator import Aggregator
from fedveil.privacy.secagg.encoding import decode, pieces
from fedveil.privacy.secagg.keys import Identity, digest
from fedveil.privacy.secagg.masks import Mask, add_masks
from fedveil.privacy.secagg.messages import Upload, digest_of_vector
from fedveil.privacy.secagg.quantise import quantise
from fedveil.privacy.secagg.site import Site
from fedveil.privacy.secagg.terms import Block, Floor, Member, Numbers, Setup
from fedveil.privacy.secagg.vault import Vault

TEN, TWENTY, HUNDRED = Numbers(10, 7, 9, 3), Numbers(20, 13, 18, 4), Numbers(100, 67, 90, 20)
ROUNDS = 50  # R: rounds that one set-up has keys for
MODEL = digest("model of the benchmark")
MASKS = 11
BLOCK = 1 << 17  # words; as `add_masks` has them
TENSEAL = "tenseal==0.3.18"
CKKS = """
import json, sys, time
import numpy as np, tenseal as ts

context = ts.context(ts.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 60], n_threads=1)
context.global_scale = 2**40
values = np.random.default_rng(0).standard_normal(int(sys.argv[1]))
for _ in sys.stdin:
    times = [time.perf_counter()]
    vector = ts.ckks_vector(context, values)
    times.append(time.perf_counter())
    message = vector.serialize()
    times.append(time.perf_counter())
    total = vector.copy()
    for _ in range(9):
        total += vector
    times.append(time.perf_counter())
    found = np.array(total.decrypt())
    times.append(time.perf_counter())
    assert np.abs(found - 10 * values).max() < 1e-5
    names = "encrypt serialise add decrypt".split()
    seconds = {name: b - a for name, a, b in zip(names, times, times[1:])}
    print(json.dumps({**seconds, "bytes": len(message)}), file=sys.stderr, flush=True)
"""


def main() -> None:
    """Gigabytes of mask a second, seconds a site and at the server, bytes, and ratios."""
    report = start(__doc__ or "")
    masks(report, 1_000_000 if report.quick else 10_000_000, 3 if report.quick else 7)
    with tempfile.TemporaryDirectory(prefix="fedveil-bench-") as folder:
        length, repeats = (2_000_000, 1) if report.quick else (10_000_000, 5)
        ten_sites(report, Path(folder) / "ten", length, repeats)
        beside_ckks(report, Path(folder) / "small", 1_000_000, 2 if report.quick else 9)
        over_plain_grid(report, Path(folder) / "grid", length, repeats)
        numbers, length = (TWENTY, 100_000) if report.quick else (HUNDRED, 1_000_000)
        many_sites(report, Path(folder) / "many", numbers, length)
    report.finish()


# Masks.


def masks(report: Report, length: int, repeats: int) -> None:
    """Eleven masks on one vector: of ours, and of others that take turns with it."""
    keys = [os.urandom(32) for _ in range(MASKS)]
    aes = [Mask(key, index % 2 == 1) for index, key in enumerate(keys)]
    names = ("ours", "one_core", "one_shot", "chacha20")
    vectors = {name: np.zeros(length, "<u4") for name in names}
    seconds = interleaved(
        {
            "ours": lambda: add_masks(vectors["ours"], aes),
            "one_core": lambda: _on_one_core(lambda: add_masks(vectors["one_core"], aes)),
            "one_shot": lambda: _one_shot(vectors["one_shot"], aes),
            "chacha20": lambda: _chacha20(vectors["chacha20"], aes),
            "flower": lambda: _flower(length, keys),
        },
        repeats,
    )
    for name in ("ours", "one_core"):
        _check(np.array_equal(vectors[name], vectors["one_shot"]), "masks")
    report.add("mask_gb_per_s", 4e-9 * MASKS * length / seconds["ours"], "GB/s")
    report.add("mask_gb_per_s_one_core", 4e-9 * MASKS * length / seconds["one_core"], "GB/s")
    report.add("mask_speedup_vs_flower", seconds["flower"] / seconds["ours"])
    for name in ("flower", "chacha20", "one_shot"):
        report.add(f"mask_speedup_vs_{name}_one_core", seconds[name] / seconds["one_core"])


def _on_one_core(run: Callable[[], object]) -> None:
    """As on a machine with one."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        run()
    finally:
        os.sched_setaffinity(0, cores)


def _one_shot(vector: np.ndarray, masks: Sequence[Mask]) -> None:
    """The whole keystream at once, then added."""
    for key, negative in masks:
        stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        keystream = np.frombuffer(stream.update(bytes(vector.nbytes)), dtype="<u4")
        (np.subtract if negative else np.add)(vector, keystream, out=vector)


def _chacha20(vector: np.ndarray, masks: Sequence[Mask]) -> None:
    """Block by block as `add_masks` does it, with the other cipher."""
    streams: list[tuple[CipherContext, bool]] = [
        (Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor(), negative)
        for key, negative in masks
    ]
    zeros, buffer = bytes(4 * BLOCK), np.empty(BLOCK, dtype="<u4")
    for begin in range(0, len(vector), BLOCK):
        part = vector[begin : begin + BLOCK]
        keystream = buffer[: len(part)]
        for stream, negative in streams:
            stream.update_into(zeros[: keystream.nbytes], keystream.data.cast("B"))
            (np.subtract if negative else np.add)(part, keystream, out=part)


def _flower(length: int, keys: Sequence[bytes]) -> None:
    """As flwr's `secaggplus_mod` masks a vector, at its default modulus of 2^32."""
    vector: list[Any] = [np.zeros(length, dtype=np.int64)]
    for key in keys:
        vector = parameters_addition(vector, pseudo_rand_gen(key, 1 << 32, [(length,)]))
    parameters_mod(vector, 1 << 32)


# Whole rounds.


def _nothing() -> None:
    """What comes after an upload otherwise."""


class TimedVault(Vault):
    """A vault that knows how long it took to save."""

    seconds = 0.0

    def replace(self, before: bytes | None, after: bytes) -> None:
        """See `Vault`."""
        began = time.perf_counter()
        super().replace(before, after)
        self.seconds += time.perf_counter() - began


class Session:
    """Sites and a server that hand each other messages.

    Attributes:
        site: Seconds of the current round or set-up, by site and what it did.
        server: Seconds of the server.
        sent: Bytes by site.
    """

    def __init__(self, numbers: Numbers, length: int, folder: Path) -> None:
        """Identities, vaults and [n, d] float32 values; no keys yet."""
        folder.mkdir()
        identities = [Identity(os.urandom(32)) for _ in range(numbers.n)]
        names = [f"site-{index:03}" for index in range(numbers.n)]
        pinned = {n: identity.public for n, identity in zip(names, identities, strict=True)}
        self.vaults = [TimedVault(folder / name, os.urandom(32), name, "bench") for name in names]
        self.sites = [
            Site(name, "bench", identity, pinned, vault, Floor())
            for name, identity, vault in zip(names, identities, self.vaults, strict=True)
        ]
        roster = tuple(Member(name, pinned[name]) for name in names)
        self.aggregator = Aggregator(Setup("bench", 0, roster, numbers, ROUNDS))
        self.block = Block("gradient", length, 1.0, 1000.0, 0.0, 1.0)
        self.bound = self.block.saturation(numbers)
        shape = (numbers.n, length)
        self.values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        self.coins, self.ledger = Coins.from_system(), 0
        self.start_clocks()

    def start_clocks(self) -> None:
        """All at zero."""
        self.site: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.sent: dict[int, int] = defaultdict(int)
        self.server = 0.0
        for vault in self.vaults:
            vault.seconds = 0.0

    @contextmanager
    def at_site(self, index: int, what: str = "rest") -> Iterator[None]:
        """Counts what is done inside for a site."""
        began = time.perf_counter()
        yield
        self.site[index][what] += time.perf_counter() - began

    def asked(self, index: int, step: Callable[..., Any], *asked: Any) -> Any:  # noqa: ANN401
        """A site's answer, which leaves it as parts and is not copied."""
        with self.at_site(index):
            message = step(self.sites[index], *asked)
            parts = pieces(message)
        self.sent[index] += sum(len(part) for part in parts)
        return message

    def at_server(self, step: Callable[..., Any], *messages: Any) -> Any:  # noqa: ANN401
        """Counts what the server does with a message."""
        began = time.perf_counter()
        found = step(*messages)
        self.server += time.perf_counter() - began
        return found

    def set_up(self) -> None:
        """Both round trips of an epoch."""
        aggregator = self.aggregator
        for index in range(len(self.sites)):
            advertisement = self.asked(index, Site.advertise, aggregator.setup)
            self.at_server(aggregator.add_advertisement, advertisement)
        roster = self.at_server(aggregator.close_advertisements)
        for index in range(len(self.sites)):
            deal = self.asked(index, Site.deal, roster)
            self.at_server(aggregator.add_deal, deal)
        for index, deals in self.at_server(aggregator.close_deals).items():
            with self.at_site(index):
                self.sites[index].accept(deals)

    def round(self, absent: int | None = None, after: Callable[[], object] = _nothing) -> None:
        """All of a round but for a site that does not upload.

        `after` each upload is called uncounted: what takes turns with the sites.
        """
        self.start_clocks()
        self.ledger += 1
        aggregator, expected = self.aggregator, np.zeros(self.block.length, "<u4")
        opening = self.at_server(aggregator.open_round, MODEL, [self.block])
        for index in aggregator.members:
            if index != absent:
                upload = self._uploaded(index, opening, expected)
                self.at_server(aggregator.add_upload, upload)
                after()
        for index, uploaders in self.at_server(aggregator.close_uploads).items():
            confirmation = self.asked(index, Site.confirm, uploaders)
            self.at_server(aggregator.add_confirmation, confirmation)
        confirmations = self.at_server(aggregator.close_confirmations)
        for index in self.site:
            unmasking = self.asked(index, Site.unmask, confirmations)
            self.at_server(aggregator.add_unmasking, unmasking)
        _check(np.array_equal(self.at_server(aggregator.total), expected), "round")

    def _uploaded(self, index: int, opening: Any, expected: np.ndarray) -> Upload:  # noqa: ANN401
        with self.at_site(index):
            self.sites[index].open_round(opening, MODEL)
        values = self.values[index].copy()  # the site's own sum, which it gives up
        with self.at_site(index, "quantise"):
            words = quantise(values, self.block.scale, self.bound, self.coins, in_place=True)
        expected += words
        upload: Upload = self.asked(index, Site.upload, opening, words, self.ledger, MODEL)
        return upload

    def check_bytes(self) -> None:
        """A message's parts, joined, are the message."""
        opening = self.aggregator.open_round(MODEL, [self.block])
        upload = self._uploaded(0, opening, np.zeros(self.block.length, "<u4"))
        again = decode(Upload, b"".join(pieces(upload)))
        same = (again.uploaded, again.shares) == (upload.uploaded, upload.shares)
        _check(same and np.array_equal(again.vector, upload.vector), "decode")


def ten_sites(report: Report, folder: Path, length: int, repeats: int) -> None:
    """A site's round beside its masks, the server's beside a plain sum; where the time goes."""
    session, label = Session(TEN, length, folder), _label(length)
    session.set_up()
    session.check_bytes()
    masked = [Mask(os.urandom(32), index % 2 == 1) for index in range(TEN.n)]
    scratch, times = np.zeros(length, "<u4"), defaultdict[str, list[float]](list)

    def after() -> None:
        times["masks"].append(_seconds(lambda: add_masks(scratch, masked)))
        times["hash"].append(_seconds(lambda: digest_of_vector(MODEL, scratch)))

    session.round()  # a warm-up that is not counted
    for _ in range(repeats):
        session.round(after=after)
        _add_up(session, times)
        times["server"].append(session.server)
        times["plain"].append(_seconds(lambda: _plain_sum(session.values)))
        session.round(absent=9)
        times["one_dropped"].append(session.server)
    found = {name: median(seconds) for name, seconds in times.items()}
    report.add(f"site_s_10_sites_{label}", found["site"], "s")
    for name in ("quantise", "masks", "hash", "store"):
        report.add(f"site_{name}_s_10_sites_{label}", found[name], "s")
    report.add("round_over_masks", found["site"] / found["masks"])
    unquantised = found["site"] - found["quantise"]
    report.add("round_over_masks_without_quantising", unquantised / found["masks"])
    report.add(f"plain_sum_s_10_sites_{label}", found["plain"], "s")
    report.add(f"server_s_10_sites_{label}", found["server"], "s")
    report.add(f"server_s_10_sites_{label}_one_dropped", found["one_dropped"], "s")
    report.add("server_over_plain_sum", found["server"] / found["plain"])


def _add_up(session: Session, times: dict[str, list[float]]) -> None:
    """Each site's round, and the part of it that is quantising and saving."""
    for index, parts in session.site.items():
        times["site"].append(sum(parts.values()))
        times["quantise"].append(parts["quantise"])
        times["store"].append(session.vaults[index].seconds)


def _plain_sum(values: np.ndarray) -> None:
    total = np.zeros(values.shape[1], values.dtype)
    for vector in values:
        total += vector


def many_sites(report: Report, folder: Path, numbers: Numbers, length: int) -> None:
    """Everything that all sites and the server do, one after another."""
    session, n = Session(numbers, length, folder), numbers.n
    session.set_up()
    everyone = _of_sites(session)
    report.add(f"setup_s_{n}_sites", everyone + session.server, "s for all sites and the server")
    report.add(f"setup_s_{n}_sites_a_site", everyone / n, "s")
    set_up = session.sent[0]
    session.round()
    everyone = _of_sites(session)
    report.add(f"round_s_{n}_sites_{_label(length)}", everyone + session.server, "s")
    report.add(f"site_s_{n}_sites_{_label(length)}", everyone / n, "s")
    report.add(f"server_s_{n}_sites_{_label(length)}", session.server, "s")
    ratio = (session.sent[0] + set_up / ROUNDS) / (4 * length)
    report.add(f"bytes_over_float32_{n}_sites", ratio)


def _of_sites(session: Session) -> float:
    return sum(sum(parts.values()) for parts in session.site.values())


# CKKS.


def beside_ckks(report: Report, folder: Path, length: int, repeats: int) -> None:
    """A site's round of a million parameters, in turns with an encryption of as many by TenSEAL."""
    session, label = Session(TEN, length, folder), _label(length)
    session.set_up()
    set_up = session.sent[0]
    session.round()  # a warm-up that is not counted
    report.add("bytes_over_float32", (session.sent[0] + set_up / ROUNDS) / (4 * length))
    times, peer = defaultdict[str, list[float]](list), _ckks_process(length)
    for _ in range(repeats):
        session.round()
        _add_up(session, times)
        for name, value in (_ckks_turn(peer) if peer is not None else {}).items():
            times[name].append(value)
    found = {name: median(seconds) for name, seconds in times.items()}
    report.add(f"site_s_10_sites_{label}", found["site"], "s")
    if peer is None:
        return
    peer.communicate()
    for name in ("encrypt", "serialise", "add", "decrypt"):
        report.add(f"ckks_{name}_s_{label}", found[name], "s")
    report.add("ckks_bytes_over_float32", found["bytes"] / (4 * length))
    # What a site does until its message is on its way; its decryption of the sum is not counted.
    report.add("ckks_over_secagg", (found["encrypt"] + found["serialise"]) / found["site"])


def _ckks_process(length: int) -> "subprocess.Popen[str] | None":
    """TenSEAL in its own environment, warmed up; nothing if there is no getting it."""
    try:
        python = _environment()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"CKKS: left out, {TENSEAL} cannot be installed: {error}", file=sys.stderr)
        return None
    peer = subprocess.Popen(
        [python, "-c", CKKS, str(length)], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    _ckks_turn(peer)
    return peer


def _environment() -> Path:
    """The Python of an environment that has the peer and nothing of the project."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "fedveil-benchmarks" / TENSEAL.replace("==", "-")
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        make = [sys.executable, "-m", "venv", "--clear", str(folder)]
        install = [str(python), "-m", "pip", "install", "--quiet", TENSEAL, "numpy"]
        for command in (make, install):
            subprocess.run(command, check=True, stdout=sys.stderr)
        ready.touch()
    return python


def _ckks_turn(peer: "subprocess.Popen[str]") -> dict[str, float]:
    assert peer.stdin is not None
    assert peer.stderr is not None
    print(file=peer.stdin, flush=True)
    for line in peer.stderr:
        if line.startswith("{"):
            found: dict[str, float] = json.loads(line)
            return found
    raise RuntimeError("CKKS: the process ended; run the benchmark again")


def _label(length: int) -> str:
    return f"{length // 1_000_000}m" if length >= 1_000_000 else f"{length // 1000}k"


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _check(holds: bool, what: str) -> None:  # noqa: FBT001
    if not holds:
        raise RuntimeError(f"{what}: is not what it must be, no figure holds")


if __name__ == "__main__":
    main()
