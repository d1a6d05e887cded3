"""Watching and fetching over real gRPC: every event once, every file whole, nothing else."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import pytest

import fedveil
from fedveil.config import ConfigError, FedveilError
from fedveil.deployment import watching
from fedveil.deployment.control import ControlClient, UnreachableError
from fedveil.deployment.fetching import receive
from fedveil.server import calls
from fedveil.server.control import Serving, serve

Client = Callable[..., ControlClient]
Federation = Any
"""As in conftest.py, which cannot be imported."""
Message = dict[str, Any]
Queued = Callable[[], str]
Running = Callable[[str], AbstractContextManager[Path]]


def tell(folder: Path, *events: Message) -> None:
    with (folder / "events.jsonl").open("a") as opened:
        opened.writelines(json.dumps(event) + "\n" for event in events)


def rounds(*numbers: int) -> list[Message]:
    return [{"event": "round", "round": number, "seconds": {}} for number in numbers]


def kept(messages: list[Message], kind: str) -> list[Any]:
    return [message[kind] for message in messages if kind in message]


@pytest.fixture
def ended(federation: Federation, queued: Queued, running: Running) -> str:
    """A run that failed after three rounds."""
    run_id = queued()
    with running(run_id) as folder:
        tell(folder, *rounds(1, 2, 3), {"event": "failed", "cause": "no site answers"})
    return run_id


class TestWatch:
    def test_to_its_end(self, client: Client, ended: str) -> None:
        found = list(client("ada").stream("watch", {"run": ended}))
        assert found[0]["state"]["state"] == "failed"
        assert [event["event"] for event in kept(found, "event")] == 3 * ["round"] + ["failed"]
        assert found[-1]["end"]["state"] == "failed"
        assert found[-1]["end"]["cause"] == "no site answers"

    def test_from_each_offset(self, client: Client, ended: str) -> None:
        olga = client("olga")
        found = list(olga.stream("watch", {"run": ended}))
        offsets, events = kept(found, "offset"), kept(found, "event")
        for place, offset in enumerate(offsets, start=1):
            again = list(olga.stream("watch", {"run": ended, "offset": offset}))
            assert kept(again, "event") == events[place:]

    @pytest.mark.parametrize("offset", [1, 10**9, -1, 1.5, "0", True])
    def test_where_no_event_begins(self, client: Client, ended: str, offset: object) -> None:
        with pytest.raises(ConfigError, match="offset"):
            list(client("olga").stream("watch", {"run": ended, "offset": offset}))

    def test_as_it_happens(
        self, federation: Federation, client: Client, queued: Queued, running: Running
    ) -> None:
        """Each message is waited for before the next thing happens."""
        run_id = queued()
        stream = client("ada").stream("watch", {"run": run_id})
        said = (one for one in stream if "alive" not in one)
        first = next(said)["state"]
        assert (first["state"], first["position"]) == ("queued", 1)
        with running(run_id) as folder:
            assert next(said)["state"]["state"] == "running"
            for event in rounds(1, 2):
                tell(folder, event)
                assert next(said)["event"] == event
            with (folder / "events.jsonl").open("a") as opened:
                opened.write('{"event": "round", "rou')  # not whole yet
            assert "alive" in next(stream)
            with (folder / "events.jsonl").open("a") as opened:
                opened.write('nd": 3, "seconds": {}}\n')
            assert [next(said)["event"]] == rounds(3)
            federation.queue.cancel(run_id, "otto")
            tell(folder, {"event": "failed", "cause": "cancelled"})
        rest = list(said)
        assert [one["event"] for one in kept(rest, "event")] == ["failed"]
        assert rest[-1]["end"]["state"] == "cancelled"

    def test_silence_is_broken(self, client: Client, queued: Queued) -> None:
        stream = client("ada").stream("watch", {"run": queued()})
        assert [[*next(stream)] for _ in range(3)] == [["state"], ["alive"], ["alive"]]

    def test_an_interrupted_one_is_waited_for_then_ends(
        self, client: Client, queued: Queued, running: Running
    ) -> None:
        run_id = queued()
        with running(run_id):
            pass
        found = list(client("ada").stream("watch", {"run": run_id}))
        assert found[-1]["end"]["state"] == "interrupted"

    def test_an_interrupted_one_that_is_taken_up_again(
        self, federation: Federation, queued: Queued, running: Running
    ) -> None:
        run_id, queue = queued(), federation.queue
        with running(run_id):
            pass
        stream = calls.Stream(lambda _: False, lambda: None, poll=0, patience=3600)
        said = (one for one in calls.watch(queue, run_id, 0, stream) if "state" in one)
        assert next(said)["state"]["state"] == "interrupted"
        queue.resume(run_id, "olga")
        assert next(said)["state"]["state"] == "queued"

    def test_a_damaged_line(self, client: Client, federation: Federation, ended: str) -> None:
        (federation.queue.path(ended) / "events.jsonl").write_text("[]\n")
        with pytest.raises(FedveilError, match="line of it is damaged"):
            list(client("ada").stream("watch", {"run": ended}))

    def test_one_member_cannot_take_all_streams(self, client: Client, queued: Queued) -> None:
        run_id, olga = queued(), client("olga")
        streams = [olga.stream("watch", {"run": run_id}) for _ in range(8)]
        for stream in streams:
            next(stream)
        with pytest.raises(ConfigError, match="too many streams"):
            next(olga.stream("watch", {"run": run_id}))
        assert "state" in next(client("ada").stream("watch", {"run": run_id}))

    def test_a_server_that_goes_silent(self, federation: Federation, queued: Queued) -> None:
        mute = calls.Stream(lambda _: False, lambda: None, heartbeat=3600)
        serving = serve(federation.server, "127.0.0.1:0", mute)
        federation.port = serving.port
        end = threading.Timer(30, serving.stop)  # if nobody notices
        end.start()
        with ControlClient(federation.kit("ada")) as client:
            stream = client.stream("watch", {"run": queued()}, silence=0.2)
            next(stream)
            with pytest.raises(UnreachableError, match="sent nothing for"):
                next(stream)
        end.cancel()
        serving.stop(0)


class TestWatchingAcrossLostConnections:
    @pytest.fixture
    def flaky(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Message]]:
        """A server of whose streams each ends as it is told to; what was asked for is noted."""

        def make(*streams: list[Message] | FedveilError) -> list[Message]:
            asked: list[Message] = []
            left = list(streams)

            class Flaky:
                def __init__(self, kit: object) -> None:
                    pass

                def __enter__(self) -> Self:
                    return self

                def __exit__(self, *error: object) -> None:
                    pass

                def stream(self, method: str, request: Message) -> Iterator[Message]:
                    assert method == "watch"
                    asked.append(request)
                    now = left.pop(0)
                    if isinstance(now, FedveilError):
                        raise now
                    yield from now
                    if "end" not in now[-1]:
                        raise UnreachableError("gone")

            monkeypatch.setattr(watching, "ControlClient", Flaky)
            return asked

        return make

    def test_each_event_once(
        self, flaky: Callable[..., list[Message]], federation: Federation
    ) -> None:
        one, two = {"event": 1, "offset": 7}, {"event": 2, "offset": 9}
        end: Message = {"end": {}}
        gone = UnreachableError("gone")
        asked = flaky([one], gone, gone, [{"alive": True}, two], [end])
        pauses: list[float] = []
        found = list(watching.watch(federation.server, "r", lambda _: None, pauses.append))
        assert found == [one, two, end]
        assert [request["offset"] for request in asked] == [0, 7, 7, 7, 9]
        assert pauses == [1, 2, 4, 1]

    def test_never_reached(
        self, flaky: Callable[..., list[Message]], federation: Federation
    ) -> None:
        flaky(UnreachableError("no such host"))
        with pytest.raises(UnreachableError, match="no such host"):
            list(watching.watch(federation.server, "r", lambda _: None))

    def test_away_for_long(
        self, flaky: Callable[..., list[Message]], federation: Federation
    ) -> None:
        flaky([{"event": 1, "offset": 7}], *(UnreachableError("gone") for _ in range(99)))
        pauses: list[float] = []
        with pytest.raises(UnreachableError, match="gone"):
            list(watching.watch(federation.server, "r", lambda _: None, pauses.append))
        assert 600 <= sum(pauses) <= 660

    def test_a_refusal_is_final(
        self, flaky: Callable[..., list[Message]], federation: Federation
    ) -> None:
        flaky([{"event": 1, "offset": 7}], ConfigError("revoked"))
        with pytest.raises(ConfigError, match="revoked"):
            list(watching.watch(federation.server, "r", lambda _: None, lambda _: None))

    def test_over_a_server_that_is_restarted(
        self, federation: Federation, serving: Serving, queued: Queued, running: Running
    ) -> None:
        run_id = queued()
        kit = federation.kit("ada")
        again: list[Serving] = []

        def restart(_: float) -> None:
            if not again:
                again.append(serve(federation.server, f"127.0.0.1:{serving.port}"))

        with running(run_id) as folder:
            tell(folder, *rounds(1))
            said = watching.watch(kit, run_id, lambda _: None, restart)
            assert [*next(said)] == ["state"]
            assert next(said)["event"]["round"] == 1
            serving.stop(0)
            tell(folder, *rounds(2), {"event": "failed", "cause": "x"})
        rest = list(said)
        again[0].stop(0)
        assert [one.get("round") for one in kept(rest, "event")] == [2, None]
        assert rest[-1]["end"]["state"] == "failed"


class TestFetch:
    @pytest.fixture
    def done(self, queued: Queued, running: Running, finished_run: fedveil.Run) -> str:
        """A finished run, with what never leaves the server in its folder too."""
        run_id = queued()
        with running(run_id) as folder:
            submitted = (folder / "submitted.json").read_bytes()
            shutil.copytree(finished_run.path, folder, dirs_exist_ok=True)
            (folder / "submitted.json").write_bytes(submitted)
            for name in ("coordinator.key", ".lock", "server.log", "link.key"):
                (folder / name).write_text("secret")
        return run_id

    def test_whole(self, client: Client, done: str, tmp_path: Path, federation: Federation) -> None:
        out, folder = tmp_path / "new" / "out", federation.queue.path(done)
        summary = receive(client("otto").stream("fetch", {"run": done}), out)
        assert (summary["state"], summary["run_id"]) == ("finished", done)
        names = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
        assert names == {
            "config.toml", "schema.json", "environment.json", "identities.toml", "submitted.json",
            "events.jsonl", "metrics.json", "model.safetensors", "samples.png", "report.html",
        }  # fmt: skip
        assert all((out / name).read_bytes() == (folder / name).read_bytes() for name in names)
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        run = fedveil.load(out)
        assert len(run.sample(3)) == 3
        assert run.report(tmp_path / "report.html").exists()

    @pytest.mark.parametrize(("name", "more"), [("olga", 1), ("otto", 0), ("ada", 0)])
    def test_the_checkpoint_is_for_whoever_submitted_it(
        self, client: Client, done: str, tmp_path: Path, name: str, more: int
    ) -> None:
        receive(client(name).stream("fetch", {"run": done}), tmp_path / "out")
        assert len(list(tmp_path.glob("out/checkpoint/*"))) == more

    def test_one_that_failed(self, client: Client, ended: str, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()  # an empty one will do
        receive(client("ada").stream("fetch", {"run": ended}), out)
        with pytest.raises(FedveilError):
            _ = fedveil.load(out).metrics
        assert not (out / "model.safetensors").exists()

    def test_not_while_it_waits_or_runs(
        self, client: Client, queued: Queued, running: Running
    ) -> None:
        run_id = queued()
        with pytest.raises(ConfigError, match="is queued; fetch it when"):
            list(client("ada").stream("fetch", {"run": run_id}))
        with running(run_id), pytest.raises(ConfigError, match="is running; fetch it when"):
            list(client("ada").stream("fetch", {"run": run_id}))

    def test_nothing_outside_the_folder(
        self, client: Client, done: str, federation: Federation, tmp_path: Path
    ) -> None:
        folder = federation.queue.path(done)
        key = federation.server.keys / "server.key"
        (folder / "samples.csv").symlink_to(key)
        (folder / "transcript.bin").symlink_to(folder / "coordinator.key")
        shutil.rmtree(folder / "checkpoint")
        (tmp_path / "others").mkdir()
        (tmp_path / "others" / "000001.safetensors").write_text("another run's")
        (folder / "checkpoint").symlink_to(tmp_path / "others")
        names = kept(list(client("olga").stream("fetch", {"run": done})), "file")
        assert "model.safetensors" in names
        assert not {"samples.csv", "transcript.bin", "checkpoint/000001.safetensors"} & {*names}

    def test_a_large_file_in_parts(
        self, client: Client, done: str, federation: Federation, tmp_path: Path
    ) -> None:
        data = bytes(range(256)) * 10_000
        (federation.queue.path(done) / "samples.csv").write_bytes(data)
        receive(client("ada").stream("fetch", {"run": done}), tmp_path / "out")
        assert (tmp_path / "out" / "samples.csv").read_bytes() == data

    def test_revoked_on_the_way(self, client: Client, done: str, federation: Federation) -> None:
        (federation.queue.path(done) / "samples.csv").write_bytes(bytes(40 << 20))
        stream = client("ada").stream("fetch", {"run": done})
        next(stream)
        federation.write_roster(2, gone=("ada",))
        with pytest.raises(ConfigError, match="not in the roster"):
            list(stream)

    def test_a_folder_that_is_taken(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()
        with pytest.raises(ConfigError, match="is there already"):
            receive(iter([]), tmp_path / "out")


def test_many_watchers_leave_no_thread_behind(
    federation: Federation, serving: Serving, queued: Queued
) -> None:
    run_id = queued()
    for _ in range(12):  # more than one member may have at a time
        with ControlClient(federation.kit("olga")) as client:
            stream = client.stream("watch", {"run": run_id})
            assert "state" in next(stream)
            stream.close()  # type: ignore[attr-defined]
        free = threading.Event()
        for _ in range(500):
            if not serving.plane.open_streams("olga") or free.wait(0.01):
                break
    assert serving.plane.open_streams("olga") == 0
