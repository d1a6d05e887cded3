"""Secret coins: every draw that privacy rests on comes from a site's own cryptographic generator.

The stream is AES-256 in counter mode under a key from the operating system (NIST SP 800-90A calls
the construction CTR_DRBG). A run's seed never enters: seeded sampling voids amplification, and
known noise is no noise.
"""

import os
import secrets
import threading

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_BLOCK = 1 << 16  # samples made at a time: the working set stays in cache
_TWISTER_BYTES = 5056
_TWISTER_WORDS = slice(24, 24 + 8 * 624)  # behind seed, left, seeded and next; 32 bits in 64 each
_TWO_PI = np.float64(2 * np.pi)


class Coins:
    """A stream of secret random words, and the draws that are made of it.

    Safe across threads. A forked process would repeat its parent's stream, and is refused.
    """

    def __init__(self, key: bytes) -> None:
        """Starts a stream; two streams of one key are equal, so a key serves one stream only.

        Raises:
            ValueError: The key is not 32 bytes.
        """
        if len(key) != 32:
            raise ValueError(f"key = {len(key)} bytes: must be 32 secret bytes")
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._lock = threading.Lock()
        self._process = os.getpid()

    @classmethod
    def from_system(cls) -> "Coins":
        """A fresh stream that nobody can predict or repeat."""
        return cls(secrets.token_bytes(32))

    def words(self, count: int) -> np.ndarray:
        """[count] uniform uint64.

        Raises:
            RuntimeError: This process is a fork of the one that the coins are of.
        """
        if os.getpid() != self._process:
            raise RuntimeError("coins: are of another process; make new ones after a fork")
        with self._lock:
            return np.frombuffer(self._stream.update(bytes(8 * count)), dtype=np.uint64)

    def uniform(self, count: int) -> np.ndarray:
        """[count] float64, uniform on the multiples of 2^-53 in (0, 1]."""
        words = (self.words(count) >> np.uint64(11)).astype(np.float64)
        words += 1
        words *= 2.0**-53
        return words

    def poisson_sample(self, count: int, rate: float) -> np.ndarray:
        """Ascending indices of range(count), each in it by its own coin of probability `rate`."""
        # Uniform on (0, 1]: `<=` takes everyone at rate 1, and is below the rate by 2^-53 at most.
        return np.flatnonzero(self.uniform(count) <= rate)

    def gaussian(self, shape: tuple[int, ...], scale: float) -> np.ndarray:
        """Gaussian noise, float64.

        Each sample is half the sum of the four normals of two Box-Muller pairs, which makes the
        set of reachable values far denser than one normal's (Holohan and Braghin 2021, section 4).
        This is a fast, rounded sampler and no exact discrete one; whoever adds it must not let its
        low-order bits out (`mechanism.add_noise` rounds them away).

        Args:
            shape: The shape of the noise.
            scale: Its standard deviation; 0 gives zeros.
        """
        noise = np.empty(int(np.prod(shape)))
        for start in range(0, len(noise), _BLOCK):
            part = noise[start : start + _BLOCK]
            part[:] = self._normals(len(part)) * scale
        return noise.reshape(shape)

    def _normals(self, count: int) -> np.ndarray:
        # Two radii and two angles: r cos and r sin are independent, which makes four normals.
        uniforms = self.uniform(4 * count).reshape(4, count)
        radii = np.sqrt(-2 * np.log(uniforms[:2]))
        angles = uniforms[2:] * _TWO_PI
        normals: np.ndarray = ((np.cos(angles) + np.sin(angles)) * radii).sum(axis=0)
        return normals / 2

    def generator(self) -> torch.Generator:
        """A torch generator with a secret state, for draws inside a model.

        Reparametrisation and dropout draws need not be cryptographic, but they must be
        unpredictable: one record more shifts the draws of the records behind it, which is harmless
        only while the draws are independent of everything the adversary knows. A seed would not do:
        torch's CPU generator keeps 32 bits of it, few enough to try them all. So the whole state of
        its Mersenne twister is drawn, 624 words of 32 bits.

        Raises:
            RuntimeError: This torch lays the state out in another way.
        """
        generator = torch.Generator()
        state = generator.get_state().numpy()
        if state.nbytes != _TWISTER_BYTES:
            raise RuntimeError(f"torch: generator state of {state.nbytes} bytes: use torch 2.13")
        state[_TWISTER_WORDS] = (self.words(624) >> np.uint64(32)).view(np.uint8)
        generator.set_state(torch.from_numpy(state))
        return generator
