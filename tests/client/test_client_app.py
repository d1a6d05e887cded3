"""The site's handlers, asked by real Flower messages: what they answer and what they never say."""

import json
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
from polars.exceptions import PanicException
from torch import nn

from fedveil.client import app as client_module
from fedveil.client.app import client_app
from fedveil.client.site import Site
from fedveil.client.training import train
from fedveil.config import RunConfig
from fedveil.data_prep import modality, run_schema
from fedveil.data_prep.clean import DataError
from fedveil.data_prep.images import Images
from fedveil.data_prep.partition import keyed_split
from fedveil.data_prep.schema import schema_to_json
from fedveil.flower import (
    Array,
    ArrayRecord,
    ClientApp,
    ConfigRecord,
    Context,
    Message,
    RecordDict,
    set_identity,
    set_message_id,
)
from fedveil.models import Batch, family
from fedveil.models.layers import initialise
from fedveil.models.state import Arrays, to_arrays
from fedveil.privacy.accounting import AccountingError
from fedveil.privacy.noise import Coins
from fedveil.wire import TRAIN, Refusal, Refused, Task, Update, pack, read_reply

MakeConfig = Callable[..., RunConfig]
KEY = bytes(range(32))
PLANTED = "PATIENT-4711"
NODE = 5


@pytest.fixture(autouse=True, scope="module")
def _identity() -> None:
    set_identity(1, 0)


@pytest.fixture
def config(make_config: MakeConfig) -> RunConfig:
    """Without a mechanism, so that nothing has to be priced."""
    return make_config(privacy={"mechanism": "none"}).resolved()


def images(count: int, seed: int = 1) -> Images:
    """So many different images, all usable."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)
    labels = np.array([str(index % 10) for index in range(count)])
    return Images(pixels, labels, np.ones(count, dtype=bool))


class Asked:
    """One site behind a real ClientApp, and how often its data were read."""

    def __init__(self, read: Callable[[], Any] | None = None) -> None:
        self.reads = 0
        self._read = read or (lambda: images(40))
        self.site = Site("site-005", self._reading, KEY, Coins(bytes(range(1, 33))))
        self.app = client_app(lambda _: self.site)
        self.context = Context(1, NODE, {}, RecordDict(), {})

    def _reading(self) -> Any:  # noqa: ANN401
        self.reads += 1
        return self._read()

    def __call__(self, content: RecordDict) -> Message:
        return call(self.app, self.context, content)

    def answer(self, task: Task) -> Update | Refused:
        """What the site answers, as the server reads it."""
        return read_reply(self(pack(task)))


def call(app: ClientApp, context: Context, content: RecordDict) -> Message:
    """One message to an app and its reply."""
    message = Message(content, NODE, TRAIN, group_id="1")
    set_message_id(message, "abc")
    return app(message, context)


def initial(config: RunConfig) -> dict[str, np.ndarray]:
    """The model that a run starts from."""
    module = family("vae").build(config.model, run_schema(config))
    initialise(module, torch.Generator().manual_seed(0))
    return to_arrays(module)


def task_for(config: RunConfig, number: int = 1, /, **changes: Any) -> Task:  # noqa: ANN401
    """The server's request for one round."""
    values: dict[str, Any] = {
        "run_id": "run-a",
        "round": number,
        "config": config.model_dump_json(by_alias=True),
        "schema": schema_to_json(run_schema(config)),
        "arrays": initial(config),
    }
    return Task(**(values | changes))


def refusal(answer: Update | Refused) -> Refusal:
    """Why a site refused."""
    assert isinstance(answer, Refused)
    return answer.code


def everything_in(message: Message) -> bytes:
    """All bytes and texts of a message, as it would travel and as it would be shown."""

    def deflated(part: Any) -> bytes:  # noqa: ANN401
        children = part.children or {}
        return bytes(part.deflate()) + b"".join(deflated(child) for child in children.values())

    return deflated(message) + repr(message).encode()


class TestAnswer:
    def test_an_update_of_exactly_the_trainable_arrays(self, config: RunConfig) -> None:
        answer = Asked().answer(task_for(config))
        assert isinstance(answer, Update)
        assert (answer.run_id, answer.round) == ("run-a", 1)
        expected = initial(config)
        module = family("vae").build(config.model, run_schema(config))
        assert answer.arrays.keys() == set(family("vae").trainable(module))
        for name, array in answer.arrays.items():
            assert array.shape == expected[name].shape
            assert array.dtype == np.float64
            assert np.isfinite(array).all()

    def test_under_fedavg_a_model_of_float32(self, make_config: MakeConfig) -> None:
        averaged = make_config(
            privacy={"mechanism": "none"}, aggregation={"strategy": "fedavg"}
        ).resolved()
        answer = Asked().answer(task_for(averaged))
        assert isinstance(answer, Update)
        expected = initial(averaged)
        assert answer.arrays.keys() == expected.keys()
        for name, array in answer.arrays.items():
            assert array.shape == expected[name].shape
            assert array.dtype == np.float32
            assert np.isfinite(array).all()

    def test_it_replies_to_the_message(self, config: RunConfig) -> None:
        reply = Asked()(pack(task_for(config)))
        assert reply.metadata.reply_to_message_id == "abc"
        assert reply.metadata.src_node_id == NODE
        assert set(reply.content) == {"facts", "arrays"}
        assert set(reply.content["facts"]) == {"run-id", "round"}

    def test_records_are_read_once_a_run(self, config: RunConfig) -> None:
        site = Asked()
        for number in (1, 2):
            assert isinstance(site.answer(task_for(config, number)), Update)
        assert site.reads == 1
        assert site.site.failed is False

    def test_under_central_the_sum_is_clipped_and_without_noise(
        self, make_config: MakeConfig
    ) -> None:
        central = make_config().resolved()
        answer = Asked(lambda: images(1)).answer(task_for(central))
        assert isinstance(answer, Update)
        norm = np.sqrt(sum(float(np.square(a).sum()) for a in answer.arrays.values()))
        # One record at most: the noise of this plan would be a norm of 20.
        assert norm <= central.privacy.clipping_norm


class TestCount:
    """Each round of a run is answered once, whatever becomes of it."""

    def test_the_same_round_again(self, config: RunConfig) -> None:
        site = Asked()
        assert isinstance(site.answer(task_for(config)), Update)
        assert refusal(site.answer(task_for(config))) is Refusal.BUDGET

    def test_an_earlier_round(self, config: RunConfig) -> None:
        site = Asked()
        assert isinstance(site.answer(task_for(config, 2)), Update)
        assert refusal(site.answer(task_for(config, 1))) is Refusal.BUDGET

    @pytest.mark.parametrize("number", [3, 100, 0, -1])
    def test_a_round_that_is_not_in_the_plan(self, config: RunConfig, number: int) -> None:
        site = Asked()
        assert config.federation.rounds == 2
        assert refusal(site.answer(task_for(config, number))) is Refusal.BUDGET
        assert site.reads == 0

    def test_a_refused_round_costs_nothing(self, config: RunConfig) -> None:
        site = Asked()
        site.answer(task_for(config, 3))
        assert isinstance(site.answer(task_for(config, 1)), Update)

    def test_runs_are_counted_apart(self, config: RunConfig) -> None:
        site = Asked()
        assert isinstance(site.answer(task_for(config, 2)), Update)
        assert isinstance(site.answer(task_for(config, 1, run_id="run-b")), Update)

    def test_the_count_is_made_before_data_are_read(self, config: RunConfig) -> None:
        spent_when_read: list[object] = []

        def read() -> Images:
            spent_when_read.append(dict(site.context.state["run-a"]))
            raise OSError(PLANTED)

        site = Asked(read)
        assert isinstance(site.answer(task_for(config)), Update)
        (spent,) = spent_when_read
        assert isinstance(spent, dict)
        assert spent["round"] == 1
        assert refusal(site.answer(task_for(config))) is Refusal.BUDGET
        assert site.reads == 1

    def test_a_round_that_failed_altogether_is_spent_too(
        self, config: RunConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        site = Asked()
        with monkeypatch.context() as patch:
            patch.setattr(client_module, "train", always_failing)
            assert refusal(site.answer(task_for(config))) is Refusal.FAILED
        assert refusal(site.answer(task_for(config))) is Refusal.BUDGET
        assert isinstance(site.answer(task_for(config, 2)), Update)

    def test_two_copies_at_once_are_answered_once(self, config: RunConfig) -> None:
        """Both threads would find the round unspent, if they could look at the same time."""
        both_looked = threading.Barrier(2)

        class Slow(RecordDict):
            def get(self, *arguments: Any) -> Any:  # noqa: ANN401
                found = super().get(*arguments)
                with suppress(threading.BrokenBarrierError):
                    both_looked.wait(1)
                return found

        site = Asked()
        site.context = Context(1, NODE, {}, Slow(), {})
        content = task_for(config)
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(site.answer, content) for _ in range(2)]
        first, second = sorted((a.result() for a in answers), key=lambda a: isinstance(a, Refused))
        assert both_looked.broken  # so the second one had to wait
        assert isinstance(first, Update)
        assert refusal(second) is Refusal.BUDGET
        assert site.reads == 1

    @pytest.mark.parametrize("copies", [2, 8])
    def test_nor_are_many_copies(self, config: RunConfig, copies: int) -> None:
        site = Asked()
        start = threading.Barrier(copies)
        task = task_for(config)

        def ask() -> Update | Refused:
            start.wait(60)
            return site.answer(task)

        with ThreadPoolExecutor(copies) as pool:
            answers = [future.result() for future in [pool.submit(ask) for _ in range(copies)]]
        assert sum(isinstance(answer, Update) for answer in answers) == 1
        refused = [answer for answer in answers if isinstance(answer, Refused)]
        assert [refusal(answer) for answer in refused] == [Refusal.BUDGET] * (copies - 1)

    def test_a_longer_plan_does_not_reopen_a_round(self, make_config: MakeConfig) -> None:
        site = Asked()
        for rounds in (2, 3):
            config = make_config(
                federation={"rounds": rounds}, privacy={"mechanism": "none"}
            ).resolved()
            answer = site.answer(task_for(config, 2))
            assert isinstance(answer, Update) == (rounds == 2)

    def test_a_state_that_is_not_ours_is_no_permission(self, config: RunConfig) -> None:
        site = Asked()
        site.context.state["run-a"] = ConfigRecord({"round": "none", "terms": "none"})
        assert refusal(site.answer(task_for(config))) is Refusal.CONFIGURATION
        assert site.reads == 0

    def test_a_run_is_bound_to_its_first_price(self, make_config: MakeConfig) -> None:
        """Or a server would ask for one more round at a time, each of a run that is not spent."""
        local = {"mechanism": "local"}
        first = make_config(privacy={**local, "epsilon": 1.0}, federation={"rounds": 1}).resolved()
        site = Asked()
        assert isinstance(site.answer(task_for(first)), Update)
        for rounds, epsilon in ((2, 1.0), (2, 50.0), (1, 50.0)):
            other = make_config(
                privacy={**local, "epsilon": epsilon}, federation={"rounds": rounds}
            ).resolved()
            assert refusal(site.answer(task_for(other, 2))) is Refusal.CONFIGURATION
        assert refusal(site.answer(task_for(first, 2))) is Refusal.BUDGET

    def test_a_panic_of_the_reader_is_a_site_without_records(self, config: RunConfig) -> None:
        """polars panics with what is no Exception; it must not get past the site either."""

        def read() -> Images:
            raise PanicException(PLANTED)

        site = Asked(read)
        answer = site.answer(task_for(config))
        assert isinstance(answer, Update)
        assert not any(array.any() for array in answer.arrays.values())


class TestConfiguration:
    @pytest.mark.parametrize(
        "text",
        ["", "nonsense", "[]", "3", "{}", '{"data": {}, "model": {"family": "vae"}}'],
    )
    def test_no_configuration(self, config: RunConfig, text: str) -> None:
        site = Asked()
        answer = site.answer(task_for(config, config=text))
        assert refusal(answer) is Refusal.CONFIGURATION
        assert site.reads == 0

    @pytest.mark.parametrize(
        ("section", "option", "value"),
        [
            ("privacy", "epsilon", -1.0),
            ("privacy", "mechanism", "trust-me"),
            ("privacy", "noise_multiplier", 0.0),
            ("federation", "rounds", 0),
            ("model", "family", "gan-from-the-server"),
            ("data", "records", None),
        ],
    )
    def test_a_configuration_that_is_not_acceptable(
        self, config: RunConfig, section: str, option: str, value: object
    ) -> None:
        raw = json.loads(config.model_dump_json(by_alias=True))
        raw[section][option] = value
        if option == "records":
            raw["data"]["source"] = "elsewhere.csv"
        site = Asked()
        answer = site.answer(task_for(config, config=json.dumps(raw)))
        assert refusal(answer) is Refusal.CONFIGURATION
        assert (answer.run_id, answer.round) == ("run-a", 1)
        assert site.reads == 0

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "nonsense",
            "[]",
            "{}",
            '{"modality": "sound"}',
            '{"modality": ["image"]}',
            '{"modality": "image", "height": 7, "width": 8}',
        ],
    )
    def test_no_schema(self, config: RunConfig, text: str) -> None:
        site = Asked()
        answer = site.answer(task_for(config, schema=text))
        assert refusal(answer) is Refusal.CONFIGURATION
        assert site.reads == 0

    def test_the_site_prices_the_run_itself(self, make_config: MakeConfig) -> None:
        """The server claims nothing that counts: an unreachable budget is refused unread."""
        cheap = make_config(privacy={"epsilon": 1e-7}).resolved()
        site = Asked()
        assert refusal(site.answer(task_for(cheap))) is Refusal.CONFIGURATION
        assert site.reads == 0
        # Nor was anything counted for it.
        assert "run-a" not in site.context.state

    def test_a_price_in_doubt_is_a_refusal(
        self, config: RunConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def doubt(config: RunConfig) -> None:
            raise AccountingError("the accountants disagree")

        monkeypatch.setattr(client_module, "plan", doubt)
        renamed = config.model_dump(by_alias=True)
        renamed["federation"]["name"] = "in-doubt"
        site = Asked()
        answer = site.answer(task_for(RunConfig.model_validate(renamed)))
        assert isinstance(answer, Refused)
        assert site.reads == 0


class TestMalformed:
    @pytest.mark.parametrize(
        "content",
        [
            RecordDict(),
            RecordDict({"facts": ConfigRecord({"run-id": "run-a"})}),
            RecordDict({"facts": ConfigRecord({"round": 1}), "arrays": ArrayRecord({})}),
            pack(Update("run-a", 1, {})),
            pack(Refused("run-a", 1, Refusal.FAILED)),
        ],
        ids=["empty", "no round", "no run", "an update", "a refusal"],
    )
    def test_what_is_no_task_is_refused(self, content: RecordDict) -> None:
        site = Asked()
        assert refusal(read_reply(site(content))) is Refusal.CONFIGURATION
        assert site.reads == 0

    @pytest.mark.parametrize("encoding", ["numpy.ndarray", "little-endian"])
    @pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"PK\x05\x06" + bytes(18)])
    def test_so_are_arrays_that_are_none(
        self, config: RunConfig, data: bytes, encoding: str
    ) -> None:
        content = pack(task_for(config))
        content["arrays"] = ArrayRecord({"w": Array("float64", (1,), encoding, data)})
        site = Asked()
        assert refusal(read_reply(site(content))) is Refusal.CONFIGURATION
        assert site.reads == 0

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda arrays: arrays.popitem(),
            lambda arrays: arrays.update(more=np.zeros(1, dtype=np.float32)),
            lambda arrays: arrays.update({"posterior.bias": arrays["posterior.bias"][:1]}),
            lambda arrays: arrays.update(
                {"posterior.bias": np.full_like(arrays["posterior.bias"], np.nan)}
            ),
            lambda arrays: arrays.update(
                {"posterior.bias": arrays["posterior.bias"].astype(np.float64)}
            ),
        ],
        ids=["missing", "foreign", "short", "nan", "float64"],
    )
    def test_arrays_that_do_not_fit_the_model(
        self, config: RunConfig, spoil: Callable[[dict[str, np.ndarray]], object]
    ) -> None:
        arrays = initial(config)
        spoil(arrays)
        site = Asked()
        assert refusal(site.answer(task_for(config, arrays=arrays))) is Refusal.FAILED
        assert site.reads == 0


KINDS = [RuntimeError, OSError, KeyError, ValueError, TypeError, DataError, MemoryError]


def always_failing(*arguments: object) -> Arrays:
    """Work that fails whatever the records are."""
    raise RuntimeError(f"no {PLANTED}")


class TestSecrecy:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_text_of_an_exception_stays(
        self, config: RunConfig, kind: type[Exception], caplog: pytest.LogCaptureFixture
    ) -> None:
        def read() -> Images:
            raise kind(f"cannot read {PLANTED}")

        site = Asked(read)
        with caplog.at_level(logging.ERROR, "fedveil.client"):
            reply = site(pack(task_for(config)))
        # It takes part like any other; that it failed is for its own log.
        assert isinstance(read_reply(reply), Update)
        assert dict(reply.content["facts"]) == {"run-id": "run-a", "round": 1}
        assert PLANTED.encode() not in everything_in(reply)
        assert site.site.failed is True
        assert "site-005" in caplog.text
        assert PLANTED in caplog.text

    @pytest.mark.parametrize("kind", KINDS)
    def test_where_it_fails_without_records_too(
        self,
        config: RunConfig,
        kind: type[Exception],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        sizes: list[int] = []

        def fail(module: nn.Module, records: Batch, *arguments: object) -> Arrays:
            sizes.append(len(records.y))
            raise kind(f"no {PLANTED}")

        monkeypatch.setattr(client_module, "train", fail)
        with caplog.at_level(logging.ERROR, "fedveil.client"):
            reply = Asked(lambda: images(0))(pack(task_for(config)))
        assert refusal(read_reply(reply)) is Refusal.FAILED
        assert PLANTED.encode() not in everything_in(reply)
        assert PLANTED in caplog.text
        assert sizes == [0, 0]

    def test_of_a_module_that_cannot_be_built_too(
        self, config: RunConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def build(*arguments: object) -> nn.Module:
            raise ValueError(PLANTED)

        unbuildable = replace(family("vae"), build=build)
        task = pack(task_for(config))
        monkeypatch.setattr(client_module, "family", lambda _: unbuildable)
        site = Asked()
        reply = site(task)
        assert refusal(read_reply(reply)) is Refusal.FAILED
        assert PLANTED.encode() not in everything_in(reply)
        assert site.reads == 0

    def test_of_opening_the_site_too(self, config: RunConfig) -> None:
        def open_site(context: Context) -> Site:
            raise FileNotFoundError(f"/srv/{PLANTED}.parquet")

        context = Context(1, NODE, {}, RecordDict(), {})
        reply = call(client_app(open_site), context, pack(task_for(config)))
        assert refusal(read_reply(reply)) is Refusal.FAILED
        assert PLANTED.encode() not in everything_in(reply)

    def test_of_data_that_cannot_be_used_too(self, config: RunConfig) -> None:
        def read() -> Images:
            raise DataError(f'column "age" = {PLANTED}')

        reply = Asked(read)(pack(task_for(config)))
        assert isinstance(read_reply(reply), Update)
        assert PLANTED.encode() not in everything_in(reply)

    def test_a_reply_holds_no_count_and_no_loss(self, config: RunConfig) -> None:
        for count in (17, 23):
            reply = Asked(partial(images, count))(pack(task_for(config)))
            record = reply.content["facts"]
            assert dict(record) == {"run-id": "run-a", "round": 1}


def unusable() -> Images:
    """Images of which none can be used."""
    return Images(
        np.zeros((9, 8, 8, 1), dtype=np.uint8), np.array(["?"] * 9), np.zeros(9, dtype=bool)
    )


def broken() -> Images:
    """Data that cannot be read at all."""
    raise DataError(PLANTED)


def crashing() -> Images:
    """Data that make the reader crash."""
    raise RuntimeError(PLANTED)


def strange() -> Images:
    """Data that can be read, but not cleaned."""
    return cast("Images", object())


FAILING = [unusable, broken, crashing, strange]


class TestDataThatFailAltogether:
    """Whether a site's data failed is private: it takes part like any other."""

    @pytest.mark.parametrize("read", FAILING)
    def test_zeros_under_central(self, make_config: MakeConfig, read: Callable[[], Images]) -> None:
        central = make_config().resolved()
        site = Asked(read)
        answer = site.answer(task_for(central))
        assert isinstance(answer, Update)
        expected = initial(central)
        assert answer.arrays.keys() == expected.keys()
        for name, array in answer.arrays.items():
            assert array.shape == expected[name].shape
            assert array.dtype == np.float64
            assert not array.any(), name
        assert site.site.failed is (read is not unusable)

    @pytest.mark.parametrize("read", FAILING)
    def test_noise_under_local(self, make_config: MakeConfig, read: Callable[[], Images]) -> None:
        local = make_config(privacy={"mechanism": "local"}).resolved()
        answer = Asked(read).answer(task_for(local))
        assert isinstance(answer, Update)
        before = initial(local)
        assert answer.arrays.keys() == before.keys()
        # Adam's first step on noise moves every weight by the learning rate.
        for name, array in answer.arrays.items():
            moved = np.abs(array - before[name])
            assert moved == pytest.approx(local.learning_rate, rel=0.05), name

    @pytest.mark.parametrize("mechanism", ["central", "local", "none"])
    @pytest.mark.parametrize("read", FAILING)
    def test_a_failing_site_says_what_one_without_records_says(
        self, make_config: MakeConfig, mechanism: str, read: Callable[[], Images]
    ) -> None:
        """To the byte under equal coins: the failure itself draws none."""
        config = make_config(privacy={"mechanism": mechanism}).resolved()
        replies = [Asked(each)(pack(task_for(config))) for each in (read, partial(images, 0))]
        failed, empty = (read_reply(reply) for reply in replies)
        assert isinstance(failed, Update)
        assert isinstance(empty, Update)
        assert failed.arrays.keys() == empty.arrays.keys()
        for name, array in failed.arrays.items():
            assert array.dtype == empty.arrays[name].dtype, name
            assert array.tobytes() == empty.arrays[name].tobytes(), name
        assert dict(replies[0].content["facts"]) == dict(replies[1].content["facts"])

    @pytest.mark.parametrize("strategy", ["adam", "fedavg"])
    def test_nothing_of_a_training_that_failed_is_sent(
        self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, strategy: str
    ) -> None:
        """It fails in the midst of its records, when the module has already learned from them."""
        config = make_config(
            privacy={"mechanism": "none"}, aggregation={"strategy": strategy}
        ).resolved()

        def halfway(module: nn.Module, records: Batch, *rest: Any) -> Arrays:  # noqa: ANN401
            if len(records.y):
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.add_(1)
                raise RuntimeError(PLANTED)
            return train(module, records, *rest)

        monkeypatch.setattr(client_module, "train", halfway)
        site = Asked()
        reply = site(pack(task_for(config)))
        assert PLANTED.encode() not in everything_in(reply)
        answer = read_reply(reply)
        assert isinstance(answer, Update)
        assert site.site.failed is True
        for name, array in initial(config).items():
            expected = array if strategy == "fedavg" else np.zeros(array.shape)
            assert answer.arrays[name].dtype == expected.dtype, name
            assert answer.arrays[name].tobytes() == expected.tobytes(), name

    def test_it_tries_its_records_again_in_the_next_round(self, config: RunConfig) -> None:
        def read() -> Images:
            return broken() if site.reads == 1 else images(40)

        site = Asked(read)
        first, second = (site.answer(task_for(config, number)) for number in (1, 2))
        assert isinstance(first, Update)
        assert isinstance(second, Update)
        assert not any(array.any() for array in first.arrays.values())
        assert any(array.any() for array in second.arrays.values())
        # That it has failed once is not forgotten.
        assert site.site.failed is True


def test_held_out_and_audit_records_never_train(make_config: MakeConfig) -> None:
    """Labels tell the sides apart: training records are 1, all the others 9.

    The prior starts uniform, so its cross-entropy has gradient gain * (n / 10 - n_k) for class k:
    the reply itself says which labels, and how many, were trained on.
    """
    config = make_config(
        data={"holdout": 0.3, "audit": 0.3},
        privacy={"mechanism": "none", "sampling_rate": 1.0},
        aggregation={"strategy": "sgd"},
    ).resolved()
    schema = run_schema(config)
    kind = modality(schema)
    chosen: list[Mapping[str, np.ndarray]] = []
    for label, wanted in (("1", True), ("9", False)):
        candidates = images(90, seed=int(label))
        candidates.labels[:] = label
        sides = keyed_split(kind.identities(candidates, schema), KEY, 0.3, 0.3)
        rows = sides.training if wanted else np.concatenate([sides.holdout, sides.audit])
        taken = kind.take(candidates, rows)
        chosen.append({"pixels": taken.pixels, "labels": taken.labels})
    trained, kept = (len(part["labels"]) for part in chosen)
    assert trained > 20
    assert kept > 40
    raw = Images(
        np.concatenate([part["pixels"] for part in chosen]),
        np.concatenate([part["labels"] for part in chosen]),
        np.ones(trained + kept, dtype=bool),
    )
    answer = Asked(lambda: raw).answer(task_for(config))
    assert isinstance(answer, Update)
    module = family("vae").build(config.model, schema)
    gain = float(module.prior.gain)  # type: ignore[union-attr,arg-type]
    expected = np.full(10, trained / 10)
    expected[1] -= trained
    assert answer.arrays["prior.weights.weight"].ravel() / gain == pytest.approx(expected, rel=1e-4)
