"""Shamir's secret sharing over GF(2^8), byte by byte (Shamir 1979).

Site i holds the polynomials' values at the point i + 1; a secret is their value at 0. Any t shares
give it, and t - 1 of them say nothing about it. The field is that of AES (FIPS 197, section 4), so
a share is as long as its secret and uniform.
"""

from collections.abc import Mapping

import numpy as np

from .keys import Entropy

MAX_POINTS = 255


def _products() -> np.ndarray:
    """[256, 256] uint8: the field's multiplication table."""
    powers, value = [], 1
    for _ in range(255):  # 3 generates the field's 255 units
        powers.append(value)
        value ^= (value << 1) ^ (0x11B if value & 0x80 else 0)
    exponents = np.array(powers * 2)
    logs = np.zeros(256, dtype=np.int64)
    logs[powers] = np.arange(255)
    table: np.ndarray = exponents[logs[:, None] + logs[None, :]].astype(np.uint8)
    table[0, :] = table[:, 0] = 0
    return table


_PRODUCT = _products()
_INVERSE = np.argmax(_PRODUCT == 1, axis=1).astype(np.uint8)  # of 0 there is none; it is not asked


def split(secret: bytes, threshold: int, count: int, entropy: Entropy) -> list[bytes]:
    """Shares of a secret, the i-th for the point i + 1.

    Args:
        secret: Any number of bytes.
        threshold: How many shares give it back, >= 1.
        count: How many are made, `threshold` to 255.
        entropy: Secret coins: len(secret) * (threshold - 1) bytes of them.

    Returns:
        `count` shares, each as long as the secret.

    Raises:
        ValueError: The numbers are out of range.
    """
    if not 1 <= threshold <= count <= MAX_POINTS:
        raise ValueError(f"threshold {threshold}, count {count}: must be 1 <= t <= n <= 255")
    coins = np.frombuffer(entropy(len(secret) * (threshold - 1)), dtype=np.uint8)
    coefficients = coins.reshape(threshold - 1, len(secret))
    rows = 256 * np.arange(1, count + 1)[:, None]  # of the table, by point
    values = np.zeros((count, len(secret)), dtype=np.uint8)
    for coefficient in coefficients:  # Horner's rule, the highest power first
        values = _PRODUCT.ravel().take(rows + (values ^ coefficient))
    values ^= np.frombuffer(secret, dtype=np.uint8)
    return [row.tobytes() for row in values]


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret of exactly as many shares as the threshold, by index; wrong ones give another.

    Raises:
        ValueError: There are none, they differ in length, or an index is no site's.
    """
    if not shares or not all(0 <= i < MAX_POINTS for i in shares):
        raise ValueError(f"shares of {sorted(shares)}: must be of sites 0 to {MAX_POINTS - 1}")
    if len({len(share) for share in shares.values()}) != 1:
        raise ValueError("shares: must all be of one length")
    points = {index: index + 1 for index in shares}
    secret = np.zeros(len(next(iter(shares.values()))), dtype=np.uint8)
    for index, share in shares.items():
        weight = 1  # Lagrange's, at 0: the product of x_j / (x_j - x_i); minus is exclusive or
        for other in points.values():
            if other != points[index]:
                quotient = _PRODUCT[other, _INVERSE[other ^ points[index]]]
                weight = int(_PRODUCT[weight, quotient])
        secret ^= _PRODUCT[weight][np.frombuffer(share, dtype=np.uint8)]
    return secret.tobytes()
