"""The control plane over real gRPC: who may call what, and what is refused in which words."""

import contextlib
import itertools
import json
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedveil.config import ConfigError, FedveilError
from fedveil.deployment.control import (
    FLEET_SERVICE,
    METHODS,
    SERVICE,
    ControlClient,
    UnreachableError,
    encode,
    our_version,
)
from fedveil.server.audit_log import verify
from fedveil.server.control import Serving
from fedveil.server.gate import Gate

NOBODY = "0" * 16
Client = Callable[..., ControlClient]
Federation = Any
"""As in conftest.py, which cannot be imported."""
Pairs = dict[str, Any]
Queued = Callable[[], str]
Values = dict[str, Any]


def ask(client: ControlClient, method: str, request: Mapping[str, Any] | None = None) -> object:
    """One answer, or all of a stream's."""
    if METHODS[method].streams:
        return list(client.stream(method, request))
    return client.call(method, request)


def request_for(method: str, submission: dict[str, Any], run_id: str) -> dict[str, Any]:
    if method == "submit":
        return submission
    return {"run": run_id} if method in {"cancel", "resume", "watch", "fetch"} else {}


class TestRoles:
    @pytest.mark.parametrize("name", ["olga", "ada", "north"])
    @pytest.mark.parametrize("method", METHODS)
    def test_who_may_what(
        self,
        client: Client,
        federation: Federation,
        queued: Queued,
        submission: Values,
        name: str,
        method: str,
    ) -> None:
        run_id = queued()
        if method in {"resume", "watch", "fetch"}:
            federation.queue.cancel(run_id, "otto")
        role = {"olga": "operator", "ada": "auditor", "north": "site"}[name]
        request = request_for(method, submission, run_id)
        if role in METHODS[method].roles:
            assert ask(client(name), method, request)
            assert not any(e["outcome"].startswith("refused") for e in federation.log())
            return
        before = federation.queue.listed()
        with pytest.raises(ConfigError, match=f"{method}: is for .*; {name} is {role}"):
            ask(client(name), method, request)
        assert federation.queue.listed() == before
        (entry,) = federation.log()
        assert (entry["member"], entry["role"], entry["call"]) == (name, role, method)
        assert entry["outcome"].startswith("refused: ")

    def test_the_table(self) -> None:
        """As it was agreed; whoever widens it has to say so here."""
        assert {name: "".join(sorted(r[0] for r in m.roles)) for name, m in METHODS.items()} == {
            "submit": "o", "cancel": "o", "resume": "o", "list": "ao", "watch": "ao",
            "fetch": "ao", "roster": "aos", "status": "aos",
        }  # fmt: skip


class TestStrangers:
    def test_no_certificate(self, federation: Federation, serving: Serving) -> None:
        credentials = grpc.ssl_channel_credentials(federation.server.ca.read_bytes())
        with (
            grpc.secure_channel(f"127.0.0.1:{serving.port}", credentials) as channel,
            pytest.raises(grpc.RpcError) as caught,
        ):
            channel.unary_unary(f"/{SERVICE}/status")(b"{}", timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not federation.server.state.joinpath("audit.jsonl").exists()

    @pytest.mark.usefixtures("serving")
    def test_a_certificate_of_another_authority(self, federation: Federation, pairs: Pairs) -> None:
        with (
            ControlClient(federation.kit("olga", pairs["forged"])) as client,
            pytest.raises(ConfigError, match="does not accept the certificate of operator olga"),
        ):
            client.call("status")

    @pytest.mark.usefixtures("serving")
    def test_another_federations_server(self, federation: Federation, pairs: Pairs) -> None:
        kit = federation.kit("olga", authority=pairs["stranger"])
        with (
            ControlClient(kit) as client,
            pytest.raises(ConfigError, match="is not the server of federation trial"),
        ):
            client.call("status")

    @pytest.mark.usefixtures("serving")
    def test_one_of_the_authoritys_who_is_in_no_roster(
        self, federation: Federation, pairs: Pairs
    ) -> None:
        """Such as of one whose certificate was replaced."""
        with (
            ControlClient(federation.kit("olga", pairs["unlisted"])) as client,
            pytest.raises(ConfigError, match="not in the roster"),
        ):
            client.call("list")
        (entry,) = federation.log()
        assert (entry["member"], entry["role"]) == (pairs["unlisted"].digest, "")

    def test_unencrypted(self, serving: Serving) -> None:
        with (
            grpc.insecure_channel(f"127.0.0.1:{serving.port}") as channel,
            pytest.raises(grpc.RpcError),
        ):
            channel.unary_unary(f"/{SERVICE}/status")(b"{}", timeout=20)

    def test_nobody_there(self, federation: Federation, serving: Serving) -> None:
        kit = federation.kit("olga")
        serving.stop(0)
        with (
            ControlClient(kit) as client,
            pytest.raises(UnreachableError, match=r"is the server up, and port \d+ open\?"),
        ):
            client.call("status")


class TestRevocation:
    def test_it_acts_at_once(self, federation: Federation, client: Client) -> None:
        olga, otto = client("olga"), client("otto")
        assert olga.call("list")
        federation.write_roster(2, gone=("olga",))
        with pytest.raises(ConfigError, match="not in the roster"):
            olga.call("list")
        assert otto.call("list")

    def test_on_open_streams_too(
        self, federation: Federation, client: Client, queued: Queued
    ) -> None:
        stream = client("ada").stream("watch", {"run": queued()})
        assert "state" in next(stream)
        federation.write_roster(2, gone=("ada",))
        with pytest.raises(ConfigError, match="not in the roster"):
            list(itertools.islice(stream, 200))

    @pytest.mark.parametrize("content", [b"", b"{}", None])
    def test_a_damaged_roster_lets_nobody_in(
        self, federation: Federation, client: Client, content: bytes | None
    ) -> None:
        olga = client("olga")
        olga.call("list")
        if content is None:
            federation.server.roster.unlink()
        else:
            federation.server.roster.write_bytes(content)
        with pytest.raises(ConfigError, match=r"the server's .*roster"):
            olga.call("list")
        federation.write_roster(1)
        assert olga.call("list")

    def test_an_older_roster_brings_nobody_back(
        self, federation: Federation, client: Client
    ) -> None:
        olga, otto = client("olga"), client("otto")
        otto.call("list")
        federation.write_roster(2, gone=("olga",))
        otto.call("list")
        federation.write_roster(1)
        for one in (olga, otto):
            with pytest.raises(ConfigError, match="version 1, it had 2"):
                one.call("list")

    def test_nor_after_a_restart(self, federation: Federation, serving: Serving) -> None:
        federation.write_roster(2, gone=("olga",))
        assert serving.plane.gate.roster().version == 2
        federation.write_roster(1)
        with pytest.raises(ConfigError, match="version 1, it had 2"):
            Gate(federation.server)
        federation.write_roster(3)
        assert Gate(federation.server).roster().version == 3

    def test_who_is_revoked_does_not_fill_the_audit_log(
        self, federation: Federation, client: Client
    ) -> None:
        olga = client("olga")
        federation.write_roster(2, gone=("olga",))
        for method in ("list", "status", "list", "status"):
            with pytest.raises(ConfigError, match="is not in the roster"):
                olga.call(method)
        assert [entry["call"] for entry in federation.log()] == ["list", "status"]

    def test_a_roster_of_another_authority(
        self, federation: Federation, client: Client, pairs: Pairs
    ) -> None:
        from fedveil.deployment.roster import sign_roster

        data = sign_roster(federation.roster(5), pairs["stranger"].key)
        olga = client("olga")
        federation.server.roster.write_bytes(data)
        with pytest.raises(ConfigError, match="not signed by the federation's authority"):
            olga.call("list")


class TestSubmit:
    def test_it_waits_with_a_receipt(
        self, federation: Federation, client: Client, submission: Values, queued: Queued
    ) -> None:
        queued()
        answer = client("olga").call("submit", submission)
        summary = federation.queue.summary(answer["run"])
        assert (summary.state, summary.by, answer["position"]) == ("queued", "olga", 2)
        asked, done = federation.log()
        assert asked["about"] == f"sha256 {sha256(encode(submission)).hexdigest()}"
        assert done["about"] == f"run {answer['run']}, {asked['about']}"
        assert (asked["outcome"], done["outcome"]) == ("allowed", "done")
        receipt = answer["receipt"]
        assert receipt == {"entry": done["number"], "hash": done["hash"]}
        verify(federation.server.state / "audit.jsonl", (receipt["entry"], receipt["hash"]))

    @pytest.mark.parametrize(
        ("section", "options", "said"),
        [
            ("federation", {"sites": 10}, "use --set federation.sites=3"),
            ("federation", {"engine": "ray"}, "federation.engine"),
            ("federation", {"rounds": 0}, "federation.rounds = 0"),
            ("federation", {"fly": 1}, "federation.fly: unknown key"),
            ("privacy", {"epsilon": 1e-6}, "epsilon"),
        ],
    )
    def test_what_is_no_run_here(
        self, federation: Federation, client: Client, submission: Values, section: str,
        options: Values, said: str,
    ) -> None:  # fmt: skip
        submission["config"][section] |= options
        with pytest.raises(FedveilError, match=re.escape(said)):
            client("olga").call("submit", submission)
        assert federation.queue.listed() == []
        assert federation.log()[-1]["outcome"].startswith("failed: ")

    @pytest.mark.parametrize("schema", [{}, {"modality": "image"}, {"modality": "x"}])
    def test_no_schema(self, client: Client, submission: Values, schema: Values) -> None:
        with pytest.raises(FedveilError):
            client("olga").call("submit", {**submission, "schema": schema})


class TestCancelAndResume:
    def test_there_and_back(self, federation: Federation, client: Client, queued: Queued) -> None:
        run_id, olga = queued(), client("olga")
        assert olga.call("cancel", {"run": run_id})["receipt"]["entry"] == 2
        assert federation.queue.summary(run_id).state == "cancelled"
        with pytest.raises(ConfigError, match="is cancelled; there is nothing to cancel"):
            olga.call("cancel", {"run": run_id})
        assert olga.call("resume", {"run": run_id})["run"] == run_id
        assert federation.queue.summary(run_id).state == "queued"


class TestStatus:
    def test_what_everybody_sees(
        self, federation: Federation, client: Client, queued: Queued
    ) -> None:
        queued()
        status = client("west").call("status")
        assert status == {
            "federation": "trial", "version": our_version(), "queued": 1, "running": [],
            "sites": None,
        }  # fmt: skip
        nodes = {"north": {"online": True, "since": "2026-01-01T00:00:00+00:00"}}
        (federation.server.state / "nodes.json").write_text(json.dumps(nodes))
        assert client("west").call("status")["sites"] == nodes

    def test_the_roster_as_it_is(self, federation: Federation, client: Client) -> None:
        text = federation.server.roster.read_text()
        assert client("north").call("roster") == {"roster": text}

    def test_what_is_asked_every_minute_is_noted_once_a_roster(
        self, federation: Federation, client: Client
    ) -> None:
        north = client("north")
        for version in (2, 3):
            federation.write_roster(version)
            for _ in range(3):
                north.call("roster")
        assert [(one["call"], one["member"]) for one in federation.log()] == 2 * [
            ("roster", "north")
        ]


class TestHealth:
    @pytest.fixture
    def health(self, federation: Federation, serving: Serving) -> Iterator[Callable[[str], Any]]:
        assert serving.port == federation.port
        kit = federation.kit("ada")
        credentials = grpc.ssl_channel_credentials(
            kit.ca.read_bytes(), kit.private_key(), kit.certificate()
        )
        with grpc.secure_channel(kit.control, credentials) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest
            yield lambda service: stub.Check(request(service=service), timeout=20).status

    def test_of_the_server(self, health: Callable[[str], Any]) -> None:
        serving = health_pb2.HealthCheckResponse.SERVING
        assert (health(""), health(SERVICE)) == (serving, serving)

    def test_of_the_fleet_that_is_not_there(self, health: Callable[[str], Any]) -> None:
        assert health(FLEET_SERVICE) == health_pb2.HealthCheckResponse.NOT_SERVING

    def test_not_for_strangers(self, federation: Federation, health: Callable[[str], Any]) -> None:
        federation.write_roster(2, gone=("ada",))
        with pytest.raises(grpc.RpcError) as caught:
            health("")
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_tls_without_a_certificate_is_hung_up_on(federation: Federation, serving: Serving) -> None:
    """By the server itself, not only by what answers a call."""
    import socket

    context = ssl.create_default_context(cafile=str(federation.server.ca))
    context.set_alpn_protocols(["h2"])
    address = ("127.0.0.1", serving.port)
    with (
        socket.create_connection(address, 10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as channel,
        contextlib.suppress(ssl.SSLError, ConnectionResetError),
    ):
        assert channel.recv(1) == b""
