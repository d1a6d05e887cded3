"""What travels to the control plane: other versions, broken and too long messages, wrong runs."""

from collections.abc import Callable, Mapping
from typing import Any

import grpc
import pytest

from fedveil.config import ConfigError, FedveilError
from fedveil.deployment.control import (
    LARGEST_MESSAGE,
    METHODS,
    SERVICE,
    VERSION_KEY,
    ControlClient,
    decode,
    encode,
    our_version,
)
from fedveil.server.control import Serving

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


class TestVersions:
    @pytest.mark.parametrize("other", ["0.0.9", "9.1.0", "", "x"])
    def test_another_one(self, federation: Federation, client: Client, other: str) -> None:
        with pytest.raises(ConfigError, match=r"major and minor must be equal"):
            client("north", version=other or " ").call("roster")
        assert federation.log()[-1]["outcome"].startswith("refused: version")

    def test_another_patch(self, client: Client) -> None:
        major, minor, _ = our_version().split(".")
        assert client("north", version=f"{major}.{minor}.99").call("roster")

    def test_none(self, federation: Federation, serving: Serving) -> None:
        answer = raw(federation, serving, "status", b"{}", version=None)
        assert answer[0] is grpc.StatusCode.FAILED_PRECONDITION


def raw(
    federation: Federation,
    serving: Serving,
    method: str,
    data: bytes,
    version: str | None = "0.1.0",
) -> tuple[grpc.StatusCode, str]:
    """How a call of olga's with any bytes ends."""
    kit = federation.kit("olga")
    credentials = grpc.ssl_channel_credentials(
        kit.ca.read_bytes(), kit.private_key(), kit.certificate()
    )
    metadata = ((VERSION_KEY, version),) if version else ()
    with grpc.secure_channel(kit.control, credentials) as channel:
        try:
            channel.unary_unary(f"/{SERVICE}/{method}")(data, timeout=30, metadata=metadata)
        except grpc.RpcError as error:
            return error.code(), error.details()
    return grpc.StatusCode.OK, ""


class TestMessages:
    @pytest.mark.parametrize(
        "data",
        [b"", b"{", b"[]", b"null", b"\xff", b'{"a": NaN}', b"[" * 100_000, b'{"run": 1e999}'],
    )
    def test_broken(self, federation: Federation, serving: Serving, data: bytes) -> None:
        code, details = raw(federation, serving, "cancel", data)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "\n" not in details
        assert federation.log()[-1]["outcome"].startswith("refused: ")

    @pytest.mark.parametrize("over", [1, 1 << 20])
    def test_too_long(self, federation: Federation, serving: Serving, over: int) -> None:
        """A little is refused by us, and logged; a lot by gRPC, before it is read."""
        code, details = raw(federation, serving, "submit", b" " * (LARGEST_MESSAGE + over))
        assert code in {
            grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED,
        }  # fmt: skip
        assert str(LARGEST_MESSAGE + over) in details
        assert federation.queue.listed() == []

    def test_too_long_to_be_sent(self, client: Client) -> None:
        with pytest.raises(ConfigError, match="at most 1048576"):
            client("olga").call("cancel", {"run": "0" * LARGEST_MESSAGE})

    @pytest.mark.parametrize(
        "run_id",
        [
            "../../keys",
            "..",
            "",
            "a" * 15,
            "A" * 16,
            "a" * 16 + "\n",
            7,
            None,
            ["a" * 16],
            "é" * 16,
        ],
    )
    @pytest.mark.parametrize("method", ["cancel", "watch", "fetch"])
    def test_what_is_no_number_of_a_run(self, client: Client, method: str, run_id: object) -> None:
        with pytest.raises(ConfigError, match="run"):
            ask(client("olga"), method, {"run": run_id})

    @pytest.mark.parametrize("method", ["cancel", "resume", "watch", "fetch"])
    def test_nobodys_run(self, client: Client, method: str) -> None:
        with pytest.raises(ConfigError, match=f"run '{NOBODY}': there is none"):
            ask(client("olga"), method, {"run": NOBODY})

    def test_unknown_keys(self, client: Client) -> None:
        with pytest.raises(ConfigError, match="path: unknown key"):
            client("olga").call("list", {"path": "/etc"})

    def test_an_unknown_method(self, client: Client) -> None:
        with pytest.raises(ConfigError, match="install its version"):
            client("olga").call("shutdown")

    def test_both_ways(self) -> None:
        message = {"a": [1, "\u00e9", None]}
        assert decode(encode(message)) == message

    def test_an_error_nobody_foresaw_tells_its_kind_alone(
        self, federation: Federation, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from fedveil.server import calls

        monkeypatch.setattr(calls, "listed", lambda _: dict[str, int]()["a secret of the server"])
        with pytest.raises(
            FedveilError, match=r"^list: KeyError at the server; its log says more$"
        ):
            client("olga").call("list")
        assert federation.log()[-1]["outcome"] == "failed: KeyError"

    def test_no_call_without_an_entry(
        self, federation: Federation, client: Client, queued: Queued
    ) -> None:
        """The log cannot be added to: nothing is done."""
        run_id, olga = queued(), client("olga")
        (federation.server.state / "audit.jsonl").write_text("broken\n")
        with pytest.raises(FedveilError, match="no entry"):
            olga.call("cancel", {"run": run_id})
        assert federation.queue.summary(run_id).state == "queued"
