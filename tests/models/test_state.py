"""Parameters as arrays: what does not fit exactly is refused, and no value is told."""

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedveil.models.state import (
    Arrays,
    StateError,
    check_arrays,
    load_arrays,
    read_file,
    to_arrays,
    to_bytes,
)


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


SECRET = 1234.5678


def like() -> Arrays:
    return {"a": np.full((2, 3), SECRET, np.float32), "b": np.full(4, SECRET, np.float32)}


class TestToArrays:
    def test_are_copies_of_all_parameters_in_order(self) -> None:
        net = module()
        arrays = to_arrays(net)
        assert list(arrays) == ["0.weight", "0.bias", "1.weight", "1.bias"]
        before = net.get_parameter("0.bias").detach().clone()
        arrays["0.bias"][:] = 9
        assert torch.equal(net.get_parameter("0.bias"), before)

    def test_are_those_that_are_named(self) -> None:
        assert list(to_arrays(module(), ["1.bias", "0.weight"])) == ["1.bias", "0.weight"]

    def test_are_none_where_none_is_named(self) -> None:
        assert to_arrays(module(), []) == {}

    def test_loading_gives_the_same_module(self) -> None:
        first, second = module(), module()
        load_arrays(second, to_arrays(first))
        x = torch.ones(2, 2)
        assert torch.equal(first(x), second(x))

    def test_loading_copies(self) -> None:
        net = module()
        arrays = {name: np.ones_like(array) for name, array in to_arrays(net).items()}
        load_arrays(net, arrays)
        arrays["0.bias"][:] = 7
        assert (net.get_parameter("0.bias") == 1).all()
        assert all(parameter.requires_grad for parameter in net.parameters())

    def test_read_only_arrays_load_too(self) -> None:
        net = module()
        arrays = to_arrays(module())
        for array in arrays.values():
            array.flags.writeable = False
        load_arrays(net, arrays)


class TestCheck:
    def test_what_fits_passes(self) -> None:
        check_arrays(like(), like())
        check_arrays({}, {})

    @pytest.mark.parametrize(
        "wrong",
        [
            {"a": like()["a"]},
            {**like(), "c": np.zeros(1, np.float32)},
            {"a": like()["a"], "B": like()["b"]},
            {},
            {**like(), "a": like()["a"].T},
            {**like(), "a": like()["a"].ravel()},
            {**like(), "a": like()["a"][None]},
            {**like(), "b": like()["b"][:3]},
            {**like(), "a": like()["a"].astype(np.float64)},
            {**like(), "a": like()["a"].astype(np.float16)},
            {**like(), "a": like()["a"].astype(np.int32)},
            {**like(), "a": like()["a"].astype(">f4")},
        ],
    )
    def test_other_names_shapes_or_types_are_refused(self, wrong: Arrays) -> None:
        with pytest.raises(StateError) as caught:
            check_arrays(wrong, like())
        assert "1234" not in str(caught.value)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_numbers_that_are_not_finite_are_refused(self, bad: float) -> None:
        arrays = like()
        arrays["b"][2] = bad
        with pytest.raises(StateError, match=r"^b: expected finite numbers$"):
            check_arrays(arrays, like())

    @given(st.text(max_size=40))
    def test_names_that_a_site_made_up_are_not_repeated(self, name: str) -> None:
        arrays = {f"<{name}>": like()["a"], "b": like()["b"]}
        with pytest.raises(StateError) as caught:
            check_arrays(arrays, like())
        assert f"<{name}>" not in str(caught.value)

    def test_a_module_that_refuses_arrays_is_left_as_it_was(self) -> None:
        net = module()
        before = to_arrays(net)
        arrays = {name: array + 1 for name, array in before.items()}
        arrays["1.bias"] = np.array([math.nan], np.float32)
        with pytest.raises(StateError):
            load_arrays(net, arrays)
        after = to_arrays(net)
        assert all(np.array_equal(before[name], after[name]) for name in before)


class Contents(NamedTuple):
    """What a file holds."""

    arrays: Arrays
    facts: dict[str, Any]


class TestFile:
    FACTS = {"run_id": "abc", "privacy": {"epsilon": 3.0, "delta": None}, "name": "Käse"}  # noqa: RUF012

    def test_a_round_trip_keeps_arrays_and_facts(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        arrays = {**like(), "t": np.arange(6, dtype=np.float32).reshape(2, 3).T}
        path.write_bytes(to_bytes(arrays, self.FACTS))
        found, facts = read_file(path)
        assert facts == self.FACTS
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == np.float32
            assert np.array_equal(found[name], array)

    def test_equal_contents_give_equal_bytes(self) -> None:
        turned = dict(reversed(self.FACTS.items()))
        backwards = dict(reversed(like().items()))
        # Often enough for an order that is left to chance to show.
        made = {
            to_bytes(arrays, facts)
            for _ in range(20)
            for arrays, facts in ((like(), self.FACTS), (like(), turned), (backwards, self.FACTS))
        }
        assert len(made) == 1

    def test_types_and_shapes_stay_as_they_are(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        arrays: Arrays = {
            "sums": np.array([0.1, 1 + 2.0**-52]), "one": np.array(2.5), "none": np.zeros((0, 3)),
            "model": np.array([[0.1]], np.float32), "count": np.arange(3),
        }  # fmt: skip
        path.write_bytes(to_bytes(arrays, {}))
        found, facts = read_file(path)
        assert facts == {}
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
            assert found[name].tobytes() == array.tobytes(), name

    @pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
    def test_a_file_cut_short_is_refused(self, tmp_path: Path, keep: int) -> None:
        path = tmp_path / "model.safetensors"
        path.write_bytes(to_bytes(like(), self.FACTS)[:keep])
        with pytest.raises(StateError, match="holds no model of ours"):
            read_file(path)

    def test_a_changed_byte_is_noticed_wherever_it_is(self, tmp_path: Path) -> None:
        """Of the header, the facts, the checksum and the numbers: each byte of the file in turn."""
        path = tmp_path / "model.safetensors"
        whole = to_bytes(like(), self.FACTS)
        path.write_bytes(whole)
        read_file(path)
        for place in range(len(whole)):
            spoilt = bytearray(whole)
            spoilt[place] ^= 1
            path.write_bytes(spoilt)
            with pytest.raises(StateError):
                read_file(path)

    @pytest.mark.parametrize(
        "change",
        [
            lambda c: c.arrays["a"].__setitem__((0, 0), 0.0),
            lambda c: c.arrays.update(a=c.arrays["a"].T),
            lambda c: c.arrays.update(b=c.arrays["b"].view(np.int32)),
            lambda c: c.arrays.update(A=c.arrays.pop("a")),
            lambda c: c.arrays.update(c=np.zeros(0, np.float32)),
            lambda c: c.arrays.pop("b"),
            lambda c: c.facts["privacy"].update(epsilon=0.1),
            lambda c: c.facts.update(run_id="abd"),
        ],
        ids=["number", "shape", "type", "name", "array more", "array less", "epsilon", "run"],
    )
    def test_a_checksum_is_of_these_arrays_and_facts_alone(
        self, tmp_path: Path, change: Callable[[Contents], object]
    ) -> None:
        """A well-formed file of other contents, under the checksum of the first."""
        path = tmp_path / "model.safetensors"
        contents = Contents(like(), copy.deepcopy(self.FACTS))
        before = to_bytes(*contents)
        change(contents)
        after = to_bytes(*contents)
        (old,), (new,) = (re.findall(rb"[0-9a-f]{64}", content) for content in (before, after))
        assert old != new
        path.write_bytes(after.replace(new, old))
        with pytest.raises(StateError, match="is damaged: its checksum does not fit"):
            read_file(path)
        path.write_bytes(after)
        assert read_file(path)[1] == contents.facts

    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(StateError, match="holds no model of ours"):
            read_file(tmp_path / "none.safetensors")

    @pytest.mark.parametrize(
        "metadata",
        [
            None,
            {},
            {"fedveil": "no json"},
            {"other": "{}"},
            {"fedveil": "{}"},
            {"sha256": "0" * 64},
            {"fedveil": "no json", "sha256": "0" * 64},
        ],
    )
    def test_a_file_without_our_facts_is_refused(
        self, tmp_path: Path, metadata: dict[str, str] | None
    ) -> None:
        from safetensors.numpy import save

        path = tmp_path / "model.safetensors"
        path.write_bytes(save(like(), metadata=metadata))
        with pytest.raises(StateError, match="holds no model of ours"):
            read_file(path)

    @given(st.binary(max_size=64))
    def test_any_other_bytes_are_refused(
        self, tmp_path_factory: pytest.TempPathFactory, content: bytes
    ) -> None:
        path = tmp_path_factory.mktemp("state") / "model.safetensors"
        path.write_bytes(content)
        with pytest.raises(StateError):
            read_file(path)
