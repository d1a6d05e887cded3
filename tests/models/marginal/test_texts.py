"""The n-gram model: likelihoods by hand, back-off under noise, samples of what was counted."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from fedveil.config import MarginalOptions, Statistics
from fedveil.data_prep import Encoded
from fedveil.data_prep.queries import Noisy, answers, noisy, workload
from fedveil.data_prep.queries.texts import CLASS_OF, CLASSES, HASHED, TOKENS, hashed
from fedveil.data_prep.schema import TextSchema
from fedveil.data_prep.texts import Texts, decode, encode
from fedveil.models import Batch
from fedveil.models.marginal.texts import Runs, build, fit, sample, score_bounds, scores

OPTIONS = MarginalOptions(family="marginal")
SCHEMA = TextSchema(length=16)
WORDS = ["the cat sat", "a dog ran", "the dog sat", "a cat ran", "The cat ran!"]


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def encoded(texts: list[str], schema: TextSchema = SCHEMA) -> Encoded:
    return encode(Texts(tuple(t.encode() for t in texts), ("",) * len(texts)), schema)


def batch(texts: list[str], schema: TextSchema = SCHEMA) -> Batch:
    found = encoded(texts, schema)
    return Batch(torch.from_numpy(found.x), torch.from_numpy(found.y))


def told(texts: list[str], multiplier: float = 0.0, schema: TextSchema = SCHEMA) -> Noisy:
    """Statistics of texts, with so much noise."""
    asked = workload(schema, Statistics(), 1e6, 1.0)
    scale = multiplier * asked.sensitivity
    noise = np.random.default_rng(5).normal(0, 1, asked.length) * scale
    return noisy(asked, answers(asked, encoded(texts, schema), schema) + noise, scale, len(texts))


def fitted(texts: list[str], multiplier: float = 0.0, schema: TextSchema = SCHEMA) -> Runs:
    return fit(OPTIONS, schema, told(texts, multiplier, schema), gen())


def drawn(module: Runs, n: int, seed: int = 0) -> list[str]:
    found = sample(module, n, gen(seed))
    return decode(Encoded(found.x.numpy(), found.y.numpy()), SCHEMA)


class TestScores:
    def test_of_nothing_known_all_tokens_are_alike(self) -> None:
        module = build(OPTIONS, SCHEMA)
        found = scores(module, batch(["a", "abc", "a" * 16]))
        # A shorter record has its end beside its bytes; a whole one has not.
        expected = [-2 * math.log(257), -4 * math.log(257), -16 * math.log(257)]
        assert found.tolist() == pytest.approx(expected, rel=1e-5)
        assert score_bounds(module) == (-16 * math.log(257), 0.0)

    def test_are_sums_over_places_by_hand(self) -> None:
        module = build(OPTIONS, SCHEMA)
        rng = np.random.default_rng(1)
        tables = {
            name: rng.normal(size=table.values.shape)
            for name, table in (
                ("pairs", module.pairs), ("triples", module.triples), ("fours", module.fours),
            )
        }  # fmt: skip
        with torch.no_grad():
            for name, values in tables.items():
                getattr(module, name).values.copy_(torch.from_numpy(values))
        expected = 0.0
        tokens = [256, 256, 256, *b"Ab!", 256]
        for o, a, b, c in zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False):
            logits = [_logit(tables, o, a, b, following) for following in range(TOKENS)]
            expected += logits[c] - math.log(sum(map(math.exp, logits)))
        assert scores(module, batch(["Ab!"])).tolist() == pytest.approx([expected], rel=1e-5)

    def test_of_a_fitted_model_are_probabilities(self) -> None:
        """Over all records of one or no byte more they add up to the chance of their beginning."""
        schema = TextSchema(length=4)
        module = fitted(["ab", "abc", "b"] * 40, schema=schema)
        one = sum(
            math.exp(scores(module, batch(["ab" + last], schema)).item())
            for last in ["", *map(chr, range(1, 128))]
        )
        start = build(OPTIONS, schema)
        assert one < 1
        assert start is not module
        assert math.exp(scores(module, batch(["ab"], schema)).item()) == pytest.approx(
            1 / 3, rel=0.15
        )

    @pytest.mark.parametrize("multiplier", [0.0, 1.0, 30.0])
    def test_lie_within_their_bounds_whatever_the_noise(self, multiplier: float) -> None:
        """They are as tight as no guess at all: a loss has no more noise than that asks for."""
        module = fitted(WORDS * 30, multiplier)
        low, high = score_bounds(module)
        strange = ["Zounds! A hat", "cat the sat", "the CAT sat...", "\u00e9t\u00e9"]
        found = scores(module, batch(WORDS + strange))
        assert ((low <= found) & (found <= high)).all()

    def test_no_records_have_none(self) -> None:
        module = build(OPTIONS, SCHEMA)
        empty = Batch(torch.zeros(0, 16), torch.zeros(0, dtype=torch.int64))
        assert scores(module, empty).shape == (0,)

    def test_many_records_are_scored_in_parts_alike(self) -> None:
        module = fitted(WORDS * 20)
        texts = WORDS * 210  # more places than are looked at at a time
        together = scores(module, batch(texts))
        assert together[-5:].tolist() == pytest.approx(scores(module, batch(WORDS)).tolist())


def _logit(tables: dict[str, np.ndarray], o: int, a: int, b: int, c: int) -> float:
    p, q, r, s = (int(CLASS_OF[token]) for token in (o, a, b, c))
    cell = hashed(np.array([((p * CLASSES + q) * CLASSES + r) * CLASSES + s]))[0]
    return float(tables["pairs"][b, c] + tables["triples"][q, r, s] + tables["fours"][cell])


class TestFit:
    def test_exact_counts_are_learnt_by_heart(self) -> None:
        module = fitted(WORDS * 40)
        known = scores(module, batch(WORDS))
        # Five texts alike: log 5 nats each, but for what of them is the same in several.
        assert (known > -4.0).all()
        odd = scores(module, batch(["eht tac tas", "zzzzzzzzzzz"]))
        assert (odd < known.min() - 20).all()

    def test_the_context_decides(self) -> None:
        """After "th" comes "e", after "ah" an "a": pairs alone cannot tell."""
        module = fitted(["the", "aha"] * 50)
        right = scores(module, batch(["the", "aha"]))
        wrong = scores(module, batch(["tha", "ahe"]))
        assert (right - wrong > 2.0).all()

    def test_four_tokens_decide_where_three_are_alike(self) -> None:
        module = fitted(["xabc", "yabd"] * 50)
        right = scores(module, batch(["xabc", "yabd"]))
        wrong = scores(module, batch(["xabd", "yabc"]))
        assert (right - wrong > 2.0).all()

    def test_letters_keep_their_case(self) -> None:
        module = fitted(["ABBA", "abba"] * 60)
        right = scores(module, batch(["ABBA", "abba"]))
        wrong = scores(module, batch(["AbBa", "aBbA"]))
        assert (right - wrong > 2.0).all()

    def test_what_noise_hides_falls_back_on_shorter_runs(self) -> None:
        texts = WORDS * 200
        quiet, loud = (scores(fitted(texts, z), batch(WORDS)).mean() for z in (0.5, 40.0))
        guess = -sum(len(text) + 1 for text in WORDS) / len(WORDS) * math.log(257)
        assert guess < loud < quiet

    def test_nothing_but_noise_says_next_to_nothing(self) -> None:
        """Taken at its word, noise would make a text of its own: far worse than a guess."""
        module = fitted([], multiplier=100.0)
        guess = -np.array([len(text) + 1 for text in WORDS]) * math.log(257)
        assert (scores(module, batch(WORDS)).numpy() > 1.3 * guess).all()
        ratios = module.triples.values.detach().abs()
        assert ratios.median() < 0.1

    def test_is_the_same_for_the_same_statistics(self) -> None:
        statistics = told(WORDS, 1.0)
        first, second = (fit(OPTIONS, SCHEMA, statistics, gen(seed)) for seed in (1, 2))
        for (name, one), (_, other) in zip(
            first.named_parameters(), second.named_parameters(), strict=True
        ):
            assert torch.equal(one, other), name
            assert one.isfinite().all(), name

    @pytest.mark.parametrize("last", ["pairs", "triples"])
    def test_shorter_workloads_leave_their_tables_at_nought(self, last: str) -> None:
        most = {"pairs": 66_306, "triples": 176_898}[last]
        asked = workload(SCHEMA, Statistics(max_cells=most), 1e6, 1.0)
        total = answers(asked, encoded(WORDS * 9), SCHEMA)
        module = fit(OPTIONS, SCHEMA, noisy(asked, total, 0.0, 45), gen())
        assert not module.fours.values.any()
        assert module.triples.values.any() == (last == "triples")
        assert module.fours.values.shape == (HASHED,)

    @pytest.mark.parametrize("value", [0.0, -1e9, 1e9])
    def test_whatever_the_statistics_are_the_model_is_one(self, value: float) -> None:
        asked = workload(SCHEMA, Statistics(), 1e6, 1.0)
        module = fit(OPTIONS, SCHEMA, noisy(asked, np.full(asked.length, value), 3.0, 1.0), gen())
        assert scores(module, batch(WORDS)).isfinite().all()
        assert len(drawn(module, 3)) == 3

    def test_another_script_is_learnt_too(self) -> None:
        texts = ["мама мыла", "рама мала"]
        schema = TextSchema(length=24)
        module = fitted(texts * 60, 0.5, schema)
        assert (scores(module, batch(texts, schema)) > -25).all()


class TestSamples:
    def test_are_of_what_was_counted(self) -> None:
        """Four tokens do not reach over two words, so these may change places."""
        found = drawn(fitted(WORDS * 100), 400)
        words = Counter(word for text in found for word in text.split(" "))
        known = {word for text in WORDS for word in text.split(" ")}
        assert sum(words[word] for word in known) > 0.8 * words.total()
        assert all(words[word] > 40 for word in known)

    def test_begin_and_end_as_records_do(self) -> None:
        module = fitted(["ab", "b"] * 100)
        found = drawn(module, 300)
        assert sum(text == "ab" for text in found) == pytest.approx(150, abs=40)
        assert all(found)

    def test_none_is_empty_though_all_that_was_counted_are(self) -> None:
        module = build(OPTIONS, SCHEMA)
        with torch.no_grad():
            module.pairs.values[256, 256] = 50.0
        assert all(drawn(module, 50))

    def test_of_control_characters_hold_tabs_and_line_ends_only(self) -> None:
        found = "".join(drawn(fitted(WORDS * 20, 2.0), 300))
        assert all(c.isprintable() or c in "\t\n" for c in found)

    def test_have_nothing_behind_their_end(self) -> None:
        tokens = (sample(fitted(WORDS * 20, 0.1), 200, gen()).x * 256).numpy()
        ended = np.logical_or.accumulate(tokens == 256, axis=1)
        assert (tokens[ended] == 256).all()
        assert ended.any()
