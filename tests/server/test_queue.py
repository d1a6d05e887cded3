"""The queue: states, order, and what a crash or a second process leaves."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings, stateful
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from fedveil.config import ConfigError, FedveilError, RunConfig
from fedveil.data_prep import run_schema
from fedveil.privacy.secagg.pins import read_identities
from fedveil.server import store
from fedveil.server.queue import Queue, RunState

IDENTITIES = {"north": bytes(range(32)), "east": bytes(32)}
HELD = """
import sys
from pathlib import Path
from fedveil.server.queue import Queue
Queue(Path(sys.argv[1])).begun(sys.argv[2])
print("has it", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue(tmp_path)


@pytest.fixture
def submit(queue: Queue, make_config: Callable[..., RunConfig]) -> Callable[..., str]:
    config = make_config(federation={"name": "trial"}).resolved()
    schema = run_schema(config)
    return lambda by="olga": queue.submit(config, schema, by, IDENTITIES)


def tell(folder: Path, *events: dict[str, Any]) -> None:
    with (folder / "events.jsonl").open("a") as opened:
        opened.writelines(json.dumps(event) + "\n" for event in events)


def finish(folder: Path) -> None:
    metrics = {
        "run_id": folder.name, "family": "vae", "rounds": 2, "quality": {}, "privacy": {
            "mechanism": "central", "unit": "record", "against": "everyone but the server",
            "epsilon": 7.5, "target_epsilon": 8.0, "delta": 1e-5, "rounds": 2},
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics))


def end(queue: Queue, run_id: str, how: str) -> None:
    """Runs a run to an end, as an executor does."""
    queue.begun(run_id)
    if how == "finished":
        finish(queue.path(run_id))
    elif how == "failed":
        tell(queue.path(run_id), {"event": "failed", "round": 0, "cause": "no site answers"})
    queue.ended(run_id)


def state(queue: Queue, run_id: str) -> RunState:
    return queue.summary(run_id).state


class TestSubmit:
    def test_a_run_folder_that_is_whole(self, queue: Queue, submit: Callable[..., str]) -> None:
        folder = queue.path(submit())
        assert read_identities(folder / "identities.toml") == IDENTITIES
        assert json.loads((folder / "submitted.json").read_text())["by"] == "olga"
        assert {"config.toml", "schema.json", "environment.json"} <= {
            file.name for file in folder.iterdir()
        }
        with store.RunFolder(folder).locked(resume=True):  # as the executor opens it
            pass

    def test_its_number_is_one_of_flowers(self, submit: Callable[..., str]) -> None:
        numbers = {submit() for _ in range(20)}
        assert len(numbers) == 20
        assert all(len(one) == 16 and 0 <= int(one, 16) < 1 << 62 for one in numbers)

    def test_a_summary(self, queue: Queue, submit: Callable[..., str]) -> None:
        found = queue.summary(submit())
        assert (found.state, found.name, found.by, found.rounds) == ("queued", "trial", "olga", 2)
        assert (found.epsilon, found.mechanism, found.cause) == (None, "central", "")

    @pytest.mark.parametrize("place", range(4))
    def test_whole_or_not_at_all(
        self, queue: Queue, submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch, place: int
    ) -> None:
        """The disk refuses in the middle: nothing is listed, and nothing is left for long."""
        real, left = store.RunFolder.write, [place]

        def write(self: store.RunFolder, name: str, content: bytes) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise FedveilError("disk full")
            real(self, name, content)

        monkeypatch.setattr(store.RunFolder, "write", write)
        with pytest.raises(FedveilError, match="disk full"):
            submit()
        assert queue.listed() == []
        assert queue.next() is None
        monkeypatch.undo()
        submit()
        assert [path.name for path in queue.path(queue.listed()[0].run_id).parent.iterdir()] == [
            queue.listed()[0].run_id
        ]

    def test_a_crash_before_it_is_queued(
        self, queue: Queue, submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            Queue, "_enqueue", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
        )
        with pytest.raises(FedveilError, match="full"):
            submit()
        monkeypatch.undo()
        (found,) = queue.listed()
        assert found.state == "interrupted"
        queue.resume(found.run_id, "olga")
        assert queue.next() == found.run_id


class TestOrder:
    def test_the_oldest_first_whatever_the_clock(
        self, queue: Queue, submit: Callable[..., str]
    ) -> None:
        runs = [submit() for _ in range(5)]
        for place, run_id in enumerate(runs, start=1):
            assert (queue.next(), queue.position(run_id)) == (run_id, 1)
            assert queue.position(runs[-1]) == 5 - place + 1
            end(queue, run_id, "finished")
        assert queue.next() is None

    def test_a_resumed_one_goes_last(self, queue: Queue, submit: Callable[..., str]) -> None:
        first, second = submit(), submit()
        queue.cancel(first, "otto")
        queue.resume(first, "otto")
        assert (queue.position(second), queue.position(first)) == (1, 2)

    def test_a_damaged_note_goes_last_and_blocks_nobody(
        self, queue: Queue, submit: Callable[..., str], tmp_path: Path
    ) -> None:
        first, second = submit(), submit()
        (tmp_path / "queue" / f"{first}.json").write_text("{")
        assert (queue.next(), queue.position(first)) == (second, 2)


class TestStates:
    @pytest.mark.parametrize("how", ["finished", "failed", "interrupted"])
    def test_how_it_ended(self, queue: Queue, submit: Callable[..., str], how: str) -> None:
        run_id = submit()
        end(queue, run_id, how)
        assert state(queue, run_id) == how
        assert queue.active() == {}

    def test_a_failure_says_why(self, queue: Queue, submit: Callable[..., str]) -> None:
        run_id = submit()
        end(queue, run_id, "failed")
        assert queue.summary(run_id).cause == "no site answers"

    def test_running_until_it_is_let_go(self, queue: Queue, submit: Callable[..., str]) -> None:
        """Its samples and report come after `metrics.json`."""
        run_id = submit()
        queue.begun(run_id)
        (queue.path(run_id) / "metrics.json").write_text("{}")
        assert state(queue, run_id) == "running"
        assert queue.active() == {run_id: "running"}

    def test_cancelled_in_the_queue(self, queue: Queue, submit: Callable[..., str]) -> None:
        run_id = submit()
        queue.cancel(run_id, "otto")
        assert (state(queue, run_id), queue.next(), queue.position(run_id)) == (
            "cancelled", None, None,
        )  # fmt: skip

    def test_cancelled_while_it_runs(self, queue: Queue, submit: Callable[..., str]) -> None:
        run_id = submit()
        queue.begun(run_id)
        assert not queue.cancelled(run_id)
        queue.cancel(run_id, "otto")
        assert (queue.cancelled(run_id), state(queue, run_id)) == (True, "running")
        tell(queue.path(run_id), {"event": "failed", "round": 0, "cause": "cancelled"})
        queue.ended(run_id)
        assert state(queue, run_id) == "cancelled"

    def test_one_that_finished_all_the_same(self, queue: Queue, submit: Callable[..., str]) -> None:
        run_id = submit()
        queue.begun(run_id)
        queue.cancel(run_id, "otto")
        finish(queue.path(run_id))
        queue.ended(run_id)
        found = queue.summary(run_id)
        assert (found.state, found.epsilon, found.round) == ("finished", 7.5, 2)

    def test_damaged(self, queue: Queue, submit: Callable[..., str]) -> None:
        run_id = submit()
        end(queue, run_id, "interrupted")
        (queue.path(run_id) / "config.toml").write_text("=")
        found = queue.summary(run_id)
        assert found.state == "failed"
        assert "config.toml" in found.cause


class TestResume:
    @pytest.mark.parametrize("how", ["failed", "interrupted", "cancelled"])
    def test_what_stopped(self, queue: Queue, submit: Callable[..., str], how: str) -> None:
        run_id = submit()
        if how == "cancelled":
            queue.cancel(run_id, "olga")
        else:
            end(queue, run_id, how)
        queue.resume(run_id, "otto")
        assert (state(queue, run_id), queue.next()) == ("queued", run_id)
        assert not queue.cancelled(run_id)
        assert queue.summary(run_id).by == "olga"

    def test_not_what_waits_runs_or_is_done(self, queue: Queue, submit: Callable[..., str]) -> None:
        run_id = submit()
        with pytest.raises(ConfigError, match="is queued"):
            queue.resume(run_id, "olga")
        queue.begun(run_id)
        with pytest.raises(ConfigError, match="is running"):
            queue.resume(run_id, "olga")
        queue.ended(run_id)
        queue.resume(run_id, "olga")
        end(queue, run_id, "finished")
        with pytest.raises(ConfigError, match="is finished"):
            queue.resume(run_id, "olga")
        with pytest.raises(ConfigError, match="nothing to cancel"):
            queue.cancel(run_id, "olga")

    @pytest.mark.parametrize(
        "run_id", ["0" * 16, "../" + "a" * 13, "", "A" * 16, "a" * 15, "..", "a" * 16 + "\n"]
    )
    def test_nobodys(self, queue: Queue, run_id: str) -> None:
        for act in (
            queue.path, queue.summary, queue.begun,
            lambda one: queue.cancel(one, "olga"), lambda one: queue.resume(one, "olga"),
        ):  # fmt: skip
            with pytest.raises(ConfigError):
                act(run_id)


class TestTwoProcesses:
    @pytest.fixture
    def holder(
        self, submit: Callable[..., str], tmp_path: Path
    ) -> Iterator[tuple[str, subprocess.Popen[str]]]:
        """Another process has a run."""
        run_id = submit()
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", HELD, str(tmp_path), run_id],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "has it\n"
        yield run_id, process
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()

    def test_both_see_it(
        self, queue: Queue, holder: tuple[str, subprocess.Popen[str]], tmp_path: Path
    ) -> None:
        run_id, process = holder
        assert state(queue, run_id) == "running"
        marker = tmp_path / "queue" / f"{run_id}.running"
        assert int(marker.read_text()) == process.pid
        with pytest.raises(ConfigError, match="not queued"):
            queue.begun(run_id)

    def test_a_killed_one_frees_it(
        self, queue: Queue, holder: tuple[str, subprocess.Popen[str]]
    ) -> None:
        run_id, process = holder
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert state(queue, run_id) == "interrupted"
        queue.resume(run_id, "olga")
        queue.begun(run_id)
        assert state(queue, run_id) == "running"

    def test_one_takes_it(self, queue: Queue, submit: Callable[..., str], tmp_path: Path) -> None:
        run_id = submit()
        other = Queue(tmp_path)
        queue.begun(run_id)
        # Even where a crash left it in the queue.
        (tmp_path / "queue" / f"{run_id}.json").write_text('{"number": 1}')
        with pytest.raises(FedveilError, match="another process"):
            other.begun(run_id)
        assert state(other, run_id) == "running"


class Life(RuleBasedStateMachine):
    """Any order of calls leaves each run where a plain model says."""

    make: Callable[[], Queue]
    submit_to: Callable[[Queue], str]

    @initialize()
    def begin(self) -> None:
        self.queue = self.make()
        self.model: dict[str, str] = {}
        self.line: list[str] = []
        self.asked: set[str] = set()

    def pick(self, number: int) -> str:
        return sorted(self.model)[number % len(self.model)]

    def agree(self) -> None:
        assert {one.run_id: one.state for one in self.queue.listed()} == self.model
        assert self.queue.next() == (self.line[0] if self.line else None)

    @rule()
    def submit(self) -> None:
        run_id = self.submit_to(self.queue)
        self.model[run_id] = "queued"
        self.line.append(run_id)
        self.agree()

    @precondition(lambda self: self.model)
    @rule(number=st.integers(0, 20))
    def cancel(self, number: int) -> None:
        run_id = self.pick(number)
        if self.model[run_id] in {"queued", "running"}:
            self.queue.cancel(run_id, "otto")
            self.asked.add(run_id)
            if self.model[run_id] == "queued":
                self.model[run_id] = "cancelled"
                self.line.remove(run_id)
        else:
            with pytest.raises(ConfigError):
                self.queue.cancel(run_id, "otto")
        self.agree()

    @precondition(lambda self: self.model)
    @rule(number=st.integers(0, 20))
    def resume(self, number: int) -> None:
        run_id = self.pick(number)
        if self.model[run_id] in {"failed", "cancelled", "interrupted"}:
            self.queue.resume(run_id, "otto")
            self.model[run_id] = "queued"
            self.line.append(run_id)
            self.asked.discard(run_id)
        else:
            with pytest.raises(ConfigError):
                self.queue.resume(run_id, "otto")
        self.agree()

    @precondition(lambda self: self.line)
    @rule(how=st.sampled_from(["finished", "failed", "interrupted", "runs on"]))
    def run_next(self, how: str) -> None:
        run_id = self.line.pop(0)
        if how == "runs on":
            self.queue.begun(run_id)
            self.model[run_id] = "running"
        else:
            (self.queue.path(run_id) / "events.jsonl").unlink(missing_ok=True)
            end(self.queue, run_id, how)
            self.model[run_id] = how
        self.agree()

    @precondition(lambda self: "running" in self.model.values())
    @rule()
    def stop(self) -> None:
        run_id = next(one for one, state in sorted(self.model.items()) if state == "running")
        (self.queue.path(run_id) / "events.jsonl").unlink(missing_ok=True)
        self.queue.ended(run_id)
        self.model[run_id] = "cancelled" if run_id in self.asked else "interrupted"
        self.agree()


def test_any_order_of_calls(
    tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., RunConfig]
) -> None:
    config = make_config().resolved()
    schema = run_schema(config)

    class Machine(Life):
        make = staticmethod(lambda: Queue(tmp_path_factory.mktemp("queue")))
        submit_to = staticmethod(lambda queue: queue.submit(config, schema, "olga", IDENTITIES))

    stateful.run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=15, stateful_step_count=12, deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
