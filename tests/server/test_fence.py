"""The fences around SuperLinks: who passes, who does not, and that a refusal is told."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from fedveil.flower.superlink import KEY_HEADER
from fedveil.server.fence import (
    Asgi,
    Receive,
    Scope,
    Send,
    bounded,
    fenced,
    for_one_process,
    for_sites,
)

KEY = "5d" * 32
HEADER = KEY_HEADER.encode()
WITH_KEY = [(b"host", b"x"), (HEADER, KEY.encode())]
NO_KEYS = [
    [], [(HEADER, b"")], [(HEADER, KEY[:-1].encode())], [(HEADER, KEY.upper().encode())],
    [(b"authorization", KEY.encode())],
]  # fmt: skip
OUTSIDE = ["192.0.2.7", "127.0.0.2", "10.0.0.1", "::ffff:127.0.0.1", "localhost", ""]


def passed(
    may_pass: Callable[[Scope], bool], scope: Scope, answer: int = 200
) -> tuple[int, list[int]]:
    """What a request gets, and the refusals that are told."""
    sent: list[Scope] = []
    told: list[int] = []

    async def app(scope: Scope, receive: object, send: Send) -> None:
        await send({"type": "http.response.start", "status": answer})

    async def receive() -> Scope:
        return {}

    async def send(message: Scope) -> None:
        sent.append(message)

    fence = fenced(app, may_pass, lambda _, status: told.append(status))
    asyncio.run(_call(fence, scope, receive, send))
    return int(sent[0]["status"]), told


async def _call(app: Asgi, *arguments: Any) -> None:  # noqa: ANN401
    await app(*arguments)


def request(
    path: str,
    headers: list[tuple[bytes, bytes]] = [],  # noqa: B006  it is only read
    client: str = "127.0.0.1",
    kind: str = "http",
) -> Scope:
    return {"type": kind, "path": path, "headers": headers, "client": (client, 4711)}


class TestForOneProcess:
    @pytest.mark.parametrize(
        "path",
        [
            "/v1/control/start-run", "/v1/control/list-runs", "/v1/fleet/pull-messages",
            "/v1/runtime/acquire-task", "/v1/runtime", "/docs", "/", "/v1/responses",
            "/V1/RUNTIME/x", "v1/runtime/x",
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("headers", NO_KEYS)
    def test_nobody_passes_without_the_key(
        self, path: str, headers: list[tuple[bytes, bytes]]
    ) -> None:
        assert passed(for_one_process(KEY), request(path, headers)) == (403, [403])

    def test_the_key_opens(self) -> None:
        for path in ("/v1/control/start-run", "/v1/runtime/acquire-task"):
            assert passed(for_one_process(KEY), request(path, WITH_KEY)) == (200, [])

    def test_a_tasks_own_requests_carry_its_token(self) -> None:
        found = passed(for_one_process(KEY), request("/v1/runtime/pull-task-input"))
        assert found == (200, [])

    def test_a_websocket_does_not_pass(self) -> None:
        asked = request("/v1/control/start-run", WITH_KEY, kind="websocket")
        assert passed(for_one_process(KEY), asked)[0] == 403


class TestForSites:
    @pytest.mark.parametrize("client", [*OUTSIDE, "127.0.0.1"])
    @pytest.mark.parametrize("path", ["/v1/fleet/pull-messages", "/health"])
    def test_anybody_reaches_the_fleet_api(self, path: str, client: str) -> None:
        assert passed(for_sites(KEY), request(path, client=client)) == (200, [])

    @pytest.mark.parametrize("client", OUTSIDE)
    @pytest.mark.parametrize("headers", [WITH_KEY, []])
    @pytest.mark.parametrize(
        "path",
        [
            "/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task",
            "/v1/runtime/pull-task-input", "/docs", "/openapi.json", "/", "/v1/responses",
            "/v1/fleet", "/V1/FLEET/x", "/v1/fleet-x", "//v1/fleet/x", "/health/", "/v1/automation",
        ],
    )  # fmt: skip
    def test_nothing_else_is_reached_from_elsewhere(
        self, path: str, headers: list[tuple[bytes, bytes]], client: str
    ) -> None:
        """Nor with the key, should it ever leak."""
        assert passed(for_sites(KEY), request(path, headers, client)) == (403, [403])

    @pytest.mark.parametrize("headers", NO_KEYS)
    @pytest.mark.parametrize("path", ["/v1/control/start-run", "/docs", "/"])
    def test_another_user_of_the_machine_has_no_key(
        self, path: str, headers: list[tuple[bytes, bytes]]
    ) -> None:
        assert passed(for_sites(KEY), request(path, headers)) == (403, [403])

    @pytest.mark.parametrize("client", ["127.0.0.1", "::1"])
    def test_the_servers_own_processes_pass(self, client: str) -> None:
        started = request("/v1/control/start-run", WITH_KEY, client)
        assert passed(for_sites(KEY), started) == (200, [])
        taken = request("/v1/runtime/acquire-task", [], client)
        assert passed(for_sites(KEY), taken) == (200, [])

    def test_a_header_does_not_make_one_local(self) -> None:
        forged = [*WITH_KEY, (b"x-forwarded-for", b"127.0.0.1"), (b"forwarded", b"for=127.0.0.1")]
        assert (
            passed(for_sites(KEY), request("/v1/control/start-run", forged, "192.0.2.7"))[0] == 403
        )

    def test_nobody_at_all_is_not_local(self) -> None:
        scope = {**request("/v1/runtime/acquire-task"), "client": None}
        assert passed(for_sites(KEY), scope)[0] == 403

    def test_a_websocket_does_not_pass(self) -> None:
        asked = request("/v1/fleet/pull-messages", kind="websocket")
        assert passed(for_sites(KEY), asked)[0] == 403

    @pytest.mark.parametrize("status", [401, 403, 404, 422])
    def test_what_flower_refuses_is_told_too(self, status: int) -> None:
        found = passed(for_sites(KEY), request("/v1/fleet/activate-node"), status)
        assert found == (status, [status])

    @pytest.mark.parametrize("status", [200, 307, 500])
    def test_other_answers_are_not(self, status: int) -> None:
        assert passed(for_sites(KEY), request("/v1/fleet/activate-node"), status) == (status, [])


class TestBounded:
    """A body of 64 MiB, in parts of 1 MiB, and how many of them are read."""

    @pytest.mark.parametrize(("longest", "status", "read"), [(64, 200, 64), (10, 413, 11)])
    def test_no_more_is_read_than_may_come(self, longest: int, status: int, read: int) -> None:
        parts = [{"type": "http.request", "body": bytes(1 << 20), "more_body": True}] * 63
        last = {"type": "http.request", "body": bytes(1 << 20), "more_body": False}
        waiting, sent = iter([*parts, last]), list[Scope]()
        taken = 0

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            while (message := await receive())["type"] != "http.disconnect":
                if not message["more_body"]:
                    await send({"type": "http.response.start", "status": 200})
                    return
            raise ConnectionError("the caller has gone")

        async def receive() -> Scope:
            nonlocal taken
            taken += 1
            return next(waiting)

        async def send(message: Scope) -> None:
            sent.append(message)

        asyncio.run(_call(bounded(app, longest << 20), request("/"), receive, send))
        assert [one["status"] for one in sent if "status" in one] == [status]
        assert taken == read

    def test_a_fault_behind_it_is_no_silence(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            asyncio.run(_call(bounded(app, 1), request("/"), None, None))
