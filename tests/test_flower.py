"""A smoke test for every Flower internal that is touched: an upgrade that breaks one fails here."""

import json
import os
import subprocess
import sys

import pytest

from fedveil import flower
from fedveil.flower import (
    Array,
    ArrayRecord,
    ClientApp,
    ConfigRecord,
    Context,
    Error,
    FlowerRun,
    Grid,
    Message,
    RecordDict,
    ServerApp,
    empty_run,
    set_identity,
    set_message_id,
)

CLOSED = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def python(script: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "RAY_"))}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestIdentity:
    def test_messages_carry_it(self) -> None:
        set_identity(11, 3)
        metadata = Message(RecordDict(), 5, "train.step", group_id="7").metadata
        assert (metadata.run_id, metadata.src_node_id, metadata.src_task_id) == (11, 3, 11)
        assert (metadata.dst_node_id, metadata.message_type) == (5, "train.step")
        assert metadata.group_id == "7"

    def test_it_can_be_changed(self) -> None:
        set_identity(11, 3)
        set_identity(12, 4)
        metadata = Message(RecordDict(), 5, "train.step").metadata
        assert (metadata.run_id, metadata.src_node_id, metadata.src_task_id) == (12, 4, 12)

    def test_no_message_without_it(self) -> None:
        """The reason for the internal: should Flower stop to ask for it, it can go."""
        script = """
from fedveil.flower import Message, RecordDict, set_identity
try:
    Message(RecordDict(), 5, "train.step")
except Exception as error:
    print("refused")
set_identity(1, 2)
Message(RecordDict(), 5, "train.step")
print("made")
"""
        assert python(script).split() == ["refused", "made"]


class TestMessageId:
    def test_a_reply_refers_to_it(self) -> None:
        set_identity(11, 3)
        request = Message(RecordDict(), 5, "train.step", group_id="7")
        set_message_id(request, "abc")
        assert request.metadata.message_id == "abc"
        for answer in (
            Message(RecordDict(), reply_to=request),
            Message(Error(2, ""), reply_to=request),
        ):
            assert answer.metadata.reply_to_message_id == "abc"
            assert (answer.metadata.src_node_id, answer.metadata.dst_node_id) == (5, 3)
            assert answer.metadata.group_id == "7"

    def test_other_messages_are_not_touched(self) -> None:
        set_identity(11, 3)
        first, second = (Message(RecordDict(), 5, "train.step") for _ in range(2))
        set_message_id(first, "abc")
        assert second.metadata.message_id == ""


def test_an_empty_run() -> None:
    run = empty_run(99)
    assert isinstance(run, FlowerRun)
    assert run.run_id == 99


def test_a_message_goes_through_an_app_and_back() -> None:
    set_identity(11, 0)
    app = ClientApp()

    @app.train("step")
    def step(message: Message, context: Context) -> Message:
        context.state["seen"] = ConfigRecord({"node": context.node_id})
        return Message(message.content, reply_to=message)

    context = Context(11, 5, {}, RecordDict(), {})
    request = Message(RecordDict({"facts": ConfigRecord({"round": 1})}), 5, "train.step")
    set_message_id(request, "abc")
    reply = app(request, context)
    assert reply.content["facts"]["round"] == 1
    assert reply.metadata.reply_to_message_id == "abc"
    assert reply.metadata.src_node_id == 5
    assert context.state["seen"]["node"] == 5


@pytest.mark.parametrize("name", flower.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(flower, name) is not None


def test_the_public_classes_are_what_they_were() -> None:
    assert all(
        isinstance(kind, type)
        for kind in (Array, ArrayRecord, ConfigRecord, Context, Error, Grid, Message, ServerApp)
    )


@pytest.mark.parametrize(
    "module", ["fedveil.flower", "fedveil.wire", "fedveil.client.app", "fedveil.server.app"]
)
def test_flowers_calls_to_the_outside_are_closed_before_it_is_imported(module: str) -> None:
    script = f"""
import json, os, sys
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name == "flwr":
            print(json.dumps({{key: os.environ.get(key) for key in {sorted(CLOSED)!r}}}))
sys.meta_path.insert(0, Spy())
import {module}
"""
    # Whoever asked for telemetry elsewhere does not get it here.
    first = python(script, FLWR_TELEMETRY_ENABLED="1").splitlines()[0]
    assert json.loads(first) == CLOSED
