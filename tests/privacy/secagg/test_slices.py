"""A long vector's work is the same on one core and on many."""

import os
from hashlib import sha256

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedveil.privacy.noise import Coins
from fedveil.privacy.secagg import slices
from fedveil.privacy.secagg.keys import digest
from fedveil.privacy.secagg.masks import Mask, add_masks
from fedveil.privacy.secagg.messages import digest_of_vector
from fedveil.privacy.secagg.quantise import quantise
from fedveil.privacy.secagg.slices import SLICE, over_slices

LENGTH = 2 * SLICE + 5
KEY = bytes(range(32))


@pytest.fixture(params=[1, 4], ids=["one core", "four cores"])
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """As if this machine had so many."""
    found = int(request.param)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(found)))
    monkeypatch.setattr(slices, "_QUOTA", None)
    return found


def test_slices_are_whole_and_in_order(cores: int) -> None:
    assert over_slices(0, lambda part: part) == []
    assert over_slices(3, lambda part: part) == [slice(0, 3)]
    found = over_slices(LENGTH, lambda part: part)
    assert found == [slice(0, SLICE), slice(SLICE, 2 * SLICE), slice(2 * SLICE, LENGTH)]


def test_an_error_of_one_comes_out(cores: int) -> None:
    def fail(part: slice) -> None:
        if part.start:
            raise ValueError("slice: is wrong")

    with pytest.raises(ValueError, match="slice: is wrong"):
        over_slices(LENGTH, fail)


def test_a_mask_is_one_keystream(cores: int) -> None:
    vector = np.zeros(LENGTH, dtype="<u4")
    add_masks(vector, [Mask(KEY, negative=False)])
    stream = Cipher(algorithms.AES(KEY), modes.CTR(bytes(16))).encryptor()
    assert vector.tobytes() == stream.update(bytes(4 * LENGTH))


def test_a_hash_is_of_the_slices_hashes(cores: int) -> None:
    vector = np.arange(LENGTH, dtype="<u4")
    parts = (vector[:SLICE], vector[SLICE : 2 * SLICE], vector[2 * SLICE :])
    hashes = [sha256(part.tobytes()).digest() for part in parts]
    length = LENGTH.to_bytes(8, "big")
    assert digest_of_vector(b"c" * 32, vector) == digest("vector", b"c" * 32, length, *hashes)
    vector[-1] ^= 1
    assert digest_of_vector(b"c" * 32, vector) != digest("vector", b"c" * 32, length, *hashes)


def test_the_hash_of_a_vector_is_part_of_the_protocol() -> None:
    """Known answer: a slice of another length would make another hash."""
    vector = np.arange((1 << 18) + 1, dtype="<u4")
    assert digest_of_vector(bytes(32), vector).hex() == (
        "3c82b20cc18f51dedf604f3fd839cb2ff3a06e62a4a77e80349e703c7eb6943b"
    )


def test_coins_are_of_the_slice(cores: int) -> None:
    size = 1 << 20
    values = np.full(2 * size + 5, 0.5, dtype=np.float32)
    found = quantise(values, 1.0, 100, Coins(KEY))
    keys = Coins(KEY)
    for start in (0, size, 2 * size):
        own = Coins(keys.words(4).tobytes())
        draws = own.words(4).view(np.uint32)[:5]
        assert found[start : start + 5].tolist() == (draws < 2**31).astype(int).tolist()


def test_values_may_be_overwritten(cores: int) -> None:
    values = np.linspace(-50, 50, 5 * LENGTH).astype(np.float32)
    expected = quantise(values, 3.0, 100, Coins(KEY))
    found = quantise(values, 3.0, 100, Coins(KEY), in_place=True)
    assert np.shares_memory(found, values)
    assert (found == expected).all()


@pytest.mark.parametrize(
    "values",
    [np.zeros(4), np.zeros(8, np.float32)[::2], np.frombuffer(bytes(16), np.float32)],
    ids=["float64", "strided", "read-only"],
)
def test_values_that_cannot_be_overwritten_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="must be flat, writeable float32 in place"):
        quantise(values, 3.0, 100, Coins(KEY), in_place=True)


def test_a_containers_quota_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    for quota, cores in [(None, 64), (2.0, 2), (0.5, 1), (100.0, 64)]:
        monkeypatch.setattr(slices, "_QUOTA", quota)
        assert slices._cores() == cores
