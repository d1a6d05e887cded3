"""Masks: keystreams of AES-256 in counter mode, added to a vector modulo 2^32.

The counter starts at zero, for a key serves one mask (NIST SP 800-38A, section 6.5). A block of the
vector stays in cache while every mask is added to it, so that the vector crosses the memory bus
once, however many masks there are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from .keys import agree, derive
from .slices import over_slices

_BLOCK = 1 << 17  # words; half a megabyte of vector and as much of keystream, in the L2 cache
_ZEROS = bytes(4 * _BLOCK)
_WORDS = 4  # of a block of the cipher


class Mask(NamedTuple):
    """One keystream, and whether it is added or taken away.

    Attributes:
        key: 32 secret bytes that serve this mask only.
        negative: Whether it is taken away.
    """

    key: bytes
    negative: bool


def add_masks(vector: np.ndarray, masks: Sequence[Mask]) -> None:
    """Adds masks to a vector, in place.

    Args:
        vector: [d] little-endian uint32, writeable.
        masks: Any number of them; each costs about as much as the cipher alone.
    """
    over_slices(len(vector), lambda part: _add(vector[part], masks, part.start))


def _add(vector: np.ndarray, masks: Sequence[Mask], start: int) -> None:
    """Adds the masks' words from `start` on, a multiple of the cipher's block."""
    counter = (start // _WORDS).to_bytes(16, "big")
    streams = [
        (Cipher(algorithms.AES(mask.key), modes.CTR(counter)).encryptor(), mask.negative)
        for mask in masks
    ]
    buffer = np.empty(min(_BLOCK, len(vector)), dtype="<u4")
    for begin in range(0, len(vector), _BLOCK):
        part = vector[begin : begin + _BLOCK]
        keystream = buffer[: len(part)]
        room = keystream.data.cast("B")
        for stream, negative in streams:
            stream.update_into(_ZEROS[: room.nbytes], room)
            (np.subtract if negative else np.add)(part, keystream, out=part)


def pair_mask(private: bytes, public: bytes, context: bytes, own: int, other: int) -> Mask:
    """What `own` adds for its pair with `other`, by its private key and the other's public one.

    The two sites of a pair add opposite masks, so they cancel in a sum that has both; if one is
    not in it, its private key gives what it would have added.

    Raises:
        WeakKeyError: The public key is none.
    """
    pair = bytes(sorted((own, other)))
    return Mask(derive(agree(private, public), "pair mask", context, pair), negative=own > other)


def self_mask(seed: bytes, context: bytes, site: int) -> Mask:
    """What a site adds by its own seed: its vector stays hidden where its pairs' keys do not.

    Double masking, Bonawitz et al. 2017, section 6.
    """
    return Mask(derive(seed, "self mask", context, bytes([site])), negative=False)
