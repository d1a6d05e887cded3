"""Secret coins: the key stream, the draws made of it, and what must never enter them.

Statistical tests run on fixed coins, so that they answer alike every time. Each has a false-alarm
rate below 1e-6 over the choice of the key.
"""

import ast
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import fedveil
from fedveil.privacy.noise import Coins

KEY = bytes(range(32))
ALARM = 1e-7
"""Two-sided false-alarm rate of each single statistical check here."""
Z = float(stats.norm.isf(ALARM / 2))  # 5.33 standard errors
BLOCKS = 3 * (1 << 16) + 17  # several blocks of the sampler, and a part of one


class Words(Coins):
    """Coins whose every word is the same given one."""

    def __init__(self, word: int) -> None:
        super().__init__(KEY)
        self.word = word

    def words(self, count: int) -> np.ndarray:
        return np.full(count, self.word, dtype=np.uint64)


class HalfKnown(Coins):
    """Coins whose very first word has zeros where `shared` has ones."""

    def __init__(self, key: bytes, shared: int) -> None:
        super().__init__(key)
        self.hidden = np.uint64(2**64 - 1 - shared)

    def words(self, count: int) -> np.ndarray:
        words = super().words(count).copy()
        words[:1] &= self.hidden
        self.hidden = np.uint64(2**64 - 1)
        return words


def by_blocks(key: bytes, blocks: int) -> bytes:
    """AES-256 of the big-endian block numbers: counter mode by the book, without a counter mode."""
    cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305
    return b"".join(cipher.update(n.to_bytes(16, "big")) for n in range(blocks))


class TestKeyStream:
    def test_the_first_words_under_a_zero_key_are_the_published_ones(self) -> None:
        # AES-256 of the zero block under the zero key: NIST AESAVS, GFSbox/KeySbox tables.
        block = bytes.fromhex("dc95c078a2408989ad48a21492842087")
        words = Coins(bytes(32)).words(2)
        assert words.tolist() == [
            int.from_bytes(block[:8], "little"),
            int.from_bytes(block[8:], "little"),
        ]

    @given(st.binary(min_size=32, max_size=32), st.integers(1, 40))
    def test_words_are_aes_256_in_counter_mode(self, key: bytes, count: int) -> None:
        expected = np.frombuffer(by_blocks(key, count)[: 8 * count], dtype="<u8")
        assert np.array_equal(Coins(key).words(count), expected)

    @given(st.lists(st.integers(0, 9), max_size=12))
    def test_calls_continue_one_stream(self, counts: list[int]) -> None:
        coins = Coins(KEY)
        parts = [coins.words(count) for count in counts]
        joined = np.concatenate([np.zeros(0, np.uint64), *parts])
        assert np.array_equal(joined, Coins(KEY).words(sum(counts)))

    @pytest.mark.parametrize("length", [0, 16, 24, 31, 33, 64])
    def test_a_key_of_the_wrong_length_is_refused(self, length: int) -> None:
        with pytest.raises(ValueError, match=f"{length} bytes: must be 32"):
            Coins(bytes(length))

    def test_threads_share_the_stream_and_no_word_is_drawn_twice(self) -> None:
        coins, calls, size = Coins(KEY), 800, 33
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(coins.words, [size] * calls))
        drawn = np.sort(np.concatenate(parts))
        assert len(np.unique(drawn)) == calls * size
        assert np.array_equal(drawn, np.sort(Coins(KEY).words(calls * size)))

    def test_threads_drawing_noise_never_share_a_sample(self) -> None:
        coins = Coins(KEY)
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(lambda _: coins.gaussian((501,), 1.0).tobytes(), range(64)))
        assert len(set(parts)) == 64

    def test_two_systems_coins_differ(self) -> None:
        first, second = Coins.from_system(), Coins.from_system()
        assert not np.array_equal(first.words(4), second.words(4))
        assert not np.array_equal(first.poisson_sample(1000, 0.5), second.poisson_sample(1000, 0.5))
        assert not np.array_equal(first.gaussian((8,), 1.0), second.gaussian((8,), 1.0))


class TestUniform:
    def test_the_smallest_is_above_zero_and_the_largest_is_one(self) -> None:
        assert Words(0).uniform(1)[0] == 2.0**-53
        assert Words(2**64 - 1).uniform(1)[0] == 1.0

    def test_uniforms_fill_their_range_evenly(self) -> None:
        """Chi-squared over 256 bins, upper tail at 1e-7, lower at 1e-7."""
        draws, bins = 1 << 19, 256
        uniforms = Coins(KEY).uniform(draws)
        assert uniforms.min() > 0
        assert uniforms.max() <= 1
        counts = np.bincount(np.ceil(uniforms * bins).astype(int) - 1, minlength=bins)
        statistic = float(((counts - draws / bins) ** 2).sum() / (draws / bins))
        low, high = stats.chi2.ppf([ALARM, 1 - ALARM], bins - 1)
        assert low < statistic < high


class TestPoissonSample:
    @given(st.integers(0, 300), st.floats(0, 1, exclude_min=True))
    def test_indices_ascend_and_lie_in_range(self, count: int, rate: float) -> None:
        rows = Coins(KEY).poisson_sample(count, rate)
        assert rows.dtype == np.int64
        assert np.all(np.diff(rows) > 0)
        assert not len(rows) or (rows[0] >= 0 and rows[-1] < count)

    def test_rate_one_takes_every_record_whatever_the_coins(self) -> None:
        assert np.array_equal(Coins(KEY).poisson_sample(5000, 1.0), np.arange(5000))
        assert np.array_equal(Words(2**64 - 1).poisson_sample(7, 1.0), np.arange(7))

    def test_a_chance_is_never_rounded_up(self) -> None:
        # u <= rate for a multiple u of 2^-53: the chance is rate rounded down to that grid.
        assert len(Words(0).poisson_sample(1, 2.0**-53)) == 1
        assert len(Words(0).poisson_sample(1, 2.0**-54)) == 0
        assert len(Words(2**64 - 1).poisson_sample(1, math.nextafter(1, 0))) == 0

    @pytest.mark.parametrize("rate", [0.001, 0.05, 0.5, 0.97])
    def test_the_rate_is_the_asked_one_and_sizes_are_binomial(self, rate: float) -> None:
        """Two-sided binomial bound and chi-squared of the sizes' variance at 1e-7 each."""
        coins, draws, count = Coins(KEY), 400, 5000
        sizes = np.array([len(coins.poisson_sample(count, rate)) for _ in range(draws)])
        low, high = stats.binom.ppf([ALARM / 2, 1 - ALARM / 2], draws * count, rate)
        assert low <= sizes.sum() <= high
        spread = float(((sizes - count * rate) ** 2).sum() / (count * rate * (1 - rate)))
        low, high = stats.chi2.ppf([ALARM / 2, 1 - ALARM / 2], draws)
        assert 0.95 * low < spread < 1.1 * high  # a binomial is a little wider in the tails

    def test_each_record_has_a_coin_of_its_own(self) -> None:
        """Neighbours are together no more often than by chance: binomial bound at 1e-7."""
        draws = 20_000
        coins = Coins(KEY)
        member = np.zeros((draws, 4), dtype=bool)
        for row in member:
            row[coins.poisson_sample(4, 0.3)] = True
        low, high = stats.binom.ppf([ALARM / 2, 1 - ALARM / 2], draws, 0.09)
        for i in range(4):
            for j in range(i):
                assert low <= (member[:, i] & member[:, j]).sum() <= high


class TestGaussian:
    @pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (4, 1, 5), (0, 3), (1 << 16,)])
    def test_shape_and_type(self, shape: tuple[int, ...]) -> None:
        noise = Coins(KEY).gaussian(shape, 1.0)
        assert noise.shape == shape
        assert np.issubdtype(noise.dtype, np.floating)

    def test_scale_zero_gives_zeros(self) -> None:
        assert not Coins(KEY).gaussian((100,), 0.0).any()

    @pytest.mark.parametrize("scale", [1e-3, 2.5, 1e6])
    def test_scale_multiplies(self, scale: float) -> None:
        one = Coins(KEY).gaussian((1000,), 1.0)
        assert np.allclose(Coins(KEY).gaussian((1000,), scale), one * scale, rtol=1e-6, atol=0)

    def test_the_shape_does_not_change_the_stream(self) -> None:
        flat = Coins(KEY).gaussian((12,), 1.0)
        assert np.array_equal(Coins(KEY).gaussian((3, 4), 1.0), flat.reshape(3, 4))

    @pytest.mark.parametrize("word", [0, 2**64 - 1, 2**63, 2047])
    def test_extreme_coins_give_finite_noise(self, word: int) -> None:
        assert np.isfinite(Words(word).gaussian((3,), 1.0)).all()

    def test_mean_variance_skewness_and_kurtosis(self) -> None:
        """Each within 5.33 standard errors (1e-7, two-sided), the variance by chi-squared."""
        x = Coins(KEY).gaussian((BLOCKS,), 1.0).astype(np.float64)
        n = len(x)
        assert abs(x.mean()) < Z / math.sqrt(n)
        low, high = stats.chi2.ppf([ALARM / 2, 1 - ALARM / 2], n)
        assert low < float((x**2).sum()) < high
        assert abs(stats.skew(x)) < Z * math.sqrt(6 / n)
        assert abs(stats.kurtosis(x)) < Z * math.sqrt(24 / n)

    @pytest.mark.parametrize("threshold", [0.5, 2.0, 3.0, 4.0])
    def test_tails_are_as_heavy_as_they_must_be(self, threshold: float) -> None:
        """Two-sided binomial bound at 1e-7 on how often |x| exceeds the threshold."""
        x = Coins(KEY).gaussian((1 << 20,), 1.0)
        chance = 2 * stats.norm.sf(threshold)
        low, high = stats.binom.ppf([ALARM / 2, 1 - ALARM / 2], len(x), chance)
        assert low <= (np.abs(x) > threshold).sum() <= high

    def test_the_distribution_is_normal(self) -> None:
        """Kolmogorov-Smirnov at 1e-7; float32 rounding is far below its resolution."""
        x = Coins(KEY).gaussian((BLOCKS,), 3.0)
        assert stats.kstest(x.astype(np.float64) / 3, "norm").pvalue > ALARM

    @pytest.mark.parametrize("shape", ["uniform", "laplace", "clipped"])
    def test_the_normality_test_rejects_other_noise_of_unit_variance(self, shape: str) -> None:
        u = Coins(KEY).uniform(BLOCKS)
        x = {
            "uniform": (u - 0.5) * math.sqrt(12),
            "laplace": stats.laplace.ppf(u * (1 - 1e-12), scale=math.sqrt(0.5)),
            "clipped": stats.norm.ppf(u * (1 - 1e-12)).clip(-2, 2),
        }[shape]
        assert stats.kstest(x, "norm").pvalue < ALARM

    def test_two_calls_are_independent(self) -> None:
        """Correlations of the values and of their squares within 5.33 standard errors."""
        coins = Coins(KEY)
        first, second = (coins.gaussian((BLOCKS,), 1.0).astype(np.float64) for _ in range(2))
        bound = Z / math.sqrt(BLOCKS)
        assert abs(np.corrcoef(first, second)[0, 1]) < bound
        assert abs(np.corrcoef(first**2, second**2)[0, 1]) < bound

    @pytest.mark.parametrize("lag", [1, 2, 4, 1 << 15, 1 << 16])
    def test_samples_of_one_call_are_independent(self, lag: int) -> None:
        """Autocorrelation within 5.33 standard errors; a block's length is among the lags."""
        x = Coins(KEY).gaussian((BLOCKS,), 1.0).astype(np.float64)
        left, right = x[:-lag], x[lag:]
        bound = Z / math.sqrt(len(left))
        assert abs(np.corrcoef(left, right)[0, 1]) < bound
        assert abs(np.corrcoef(left**2, right**2)[0, 1]) < bound


class TestGenerator:
    def test_two_generators_of_one_stream_differ(self) -> None:
        coins = Coins(KEY)
        first, second = (torch.rand(8, generator=coins.generator()) for _ in range(2))
        assert not torch.equal(first, second)

    def test_equal_coins_give_equal_generators(self) -> None:
        first, second = (torch.rand(8, generator=Coins(KEY).generator()) for _ in range(2))
        assert torch.equal(first, second)

    @pytest.mark.parametrize("shared", [2**33 - 1, 2**64 - 2**31], ids=["low", "high"])
    def test_more_than_32_secret_bits_decide_on_the_draws(self, shared: int) -> None:
        """A secret that torch cuts to 32 bits is found by trying them all."""
        first, second = (
            torch.rand(8, generator=HalfKnown(key, shared).generator()) for key in (KEY, bytes(32))
        )
        assert not torch.equal(first, second)


class TestNothingElseEnters:
    def test_global_seeds_neither_change_the_coins_nor_are_changed_by_them(self) -> None:
        def draw(coins: Coins) -> list[bytes]:
            return [
                coins.words(3).tobytes(),
                coins.poisson_sample(100, 0.5).tobytes(),
                coins.gaussian((9,), 1.0).tobytes(),
                torch.rand(3, generator=coins.generator()).numpy().tobytes(),
            ]

        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
        first, fresh = draw(Coins(KEY)), draw(Coins.from_system())
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert str(np.random.get_state()) == str(numpy_state)  # noqa: NPY002
        torch.manual_seed(2)
        assert draw(Coins(KEY)) == first
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        again = draw(Coins.from_system())
        assert all(mine != theirs for mine, theirs in zip(fresh, again, strict=True))

    def test_the_check_below_finds_forbidden_sources(self) -> None:
        for line in (
            "import random",
            "from random import gauss",
            "import numpy.random",
            "from numpy.random import default_rng",
            "from numpy import random",
            "from torch import randn",
            "x = np.random.default_rng(seed)",
            "x = numpy.random.normal()",
            "x = torch.randn(3, generator=g)",
            "x = torch.bernoulli(p)",
            "torch.manual_seed(3)",
            "x = torch.zeros(3).normal_()",
            "x = torch.nn.functional.dropout(y)",
        ):
            assert forbidden_sources(line), line
        assert not forbidden_sources("x = torch.Generator().manual_seed(words)")

    @pytest.mark.parametrize("folder", ["privacy", "client"])
    def test_no_module_draws_from_anywhere_else(self, folder: str) -> None:
        root = Path(fedveil.__file__).parent / folder
        files = sorted(root.rglob("*.py"))
        assert files
        found = [
            f"{file.relative_to(root)}:{line}"
            for file in files
            for line in forbidden_sources(file.read_text(encoding="utf-8"))
        ]
        assert not found


_TORCH_DRAWS = {
    "bernoulli", "default_generator", "empty_like_random", "initial_seed", "manual_seed",
    "multinomial", "normal", "poisson", "rand", "rand_like", "randint", "randint_like", "randn",
    "randn_like", "random", "randperm", "seed",
}  # fmt: skip
_ANY_DRAWS = {
    "bernoulli_", "cauchy_", "dropout", "exponential_", "geometric_", "log_normal_", "normal_",
    "random_", "trunc_normal_", "uniform_",
}  # fmt: skip


def forbidden_sources(source: str) -> list[int]:
    """Lines that draw from torch's, NumPy's or Python's own generators."""
    lines: list[int] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            bad = any(a.name in {"random", "numpy.random"} for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = {a.name for a in node.names}
            bad = node.module in {"random", "numpy.random"} or (
                (node.module == "numpy" and "random" in names)
                or (node.module == "torch" and bool(names & _TORCH_DRAWS))
            )
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            bad = (
                node.attr in _ANY_DRAWS
                or (owner in {"np", "numpy"} and node.attr == "random")
                or (owner == "torch" and node.attr in _TORCH_DRAWS)
            )
        else:
            continue
        if bad:
            lines.append(node.lineno)
    return lines
