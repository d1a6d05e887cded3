"""The supervisor, over real processes."""

import json
import os
import selectors
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from fedveil.deployment.supervise import Notice, Program, _Child, how_ended, supervise

STAYS = "note(os.getpid()); signal.pause()"

StartSupervisor = Callable[..., Any]
Until = Callable[..., Any]
Alive = Callable[[int], bool]


class TestRestart:
    @pytest.mark.parametrize("ending", ["sys.exit(1)", "sys.exit(0)", "os.kill(os.getpid(), 9)"])
    def test_a_program_that_ends_is_started_again(
        self, ending: str, start_supervisor: StartSupervisor, until: Until
    ) -> None:
        text = f"note(os.getpid())\nif len(notes()) < 3: {ending}\nsignal.pause()"
        up = start_supervisor(("flaky", text))
        assert len(set(up.noted(3))) == 3
        until(lambda: len(up.events("flaky")) == 5)
        assert up.events("flaky") == ["started", "ended", "started", "ended", "started"]
        assert up.stop() == 0

    def test_the_others_go_on(self, start_supervisor: StartSupervisor, until: Until) -> None:
        up = start_supervisor(("steady", STAYS), ("flaky", "note('flaky')"))
        until(lambda: up.events("flaky").count("ended") >= 3)
        assert up.events("steady") == ["started"]
        assert up.stop() == 0

    def test_a_program_that_is_not_there_is_tried_again(self) -> None:
        """It may be there again, such as after an upgrade."""
        heard: list[Notice] = []

        def hear(notice: Notice) -> None:
            heard.append(notice)
            signal.raise_signal(signal.SIGTERM)

        assert supervise([Program("none", ("/no/such/program",))], announce=hear) == 0
        (told,) = heard
        assert (told.event, told.pid, told.code) == ("ended", 0, 127)
        assert told.cause == "cannot be started (No such file or directory)"
        assert told.wait == pytest.approx(1.0)


class TestWhatNoRestartMends:
    def test_it_ends_all_with_its_error_and_code(
        self, start_supervisor: StartSupervisor, alive: Alive
    ) -> None:
        error = {
            "time": "-", "level": "CRITICAL", "process": "bad",
            "message": "server.key: cannot be read (Permission denied); check it",
        }  # fmt: skip
        bad = (
            "note('bad')\nwhile len(notes()) < 2: pass\n"
            f"print({json.dumps(error)!r}, file=sys.stderr)\nprint('farewell')\nsys.exit(2)"
        )
        up = start_supervisor(("steady", STAYS), ("bad", bad))
        assert up.process.wait(60) == 2
        (steady,) = [int(line) for line in up.noted(2) if line != "bad"]
        assert not alive(steady)
        assert error in up.lines()
        (told,) = [line for line in up.lines() if line.get("event") == "failed"]
        assert told["message"] == f"bad: {error['message']}"
        assert (told["level"], told["code"]) == ("ERROR", 2)
        assert up.events("bad") == ["started", "failed"]
        assert up.events("steady") == ["started", "stopped"]

    def test_an_error_as_the_command_line_has_it(self, start_supervisor: StartSupervisor) -> None:
        up = start_supervisor(("bad", "print('error: port = 1: is taken'); sys.exit(2)"))
        assert up.process.wait(60) == 2
        assert up.lines()[-1]["message"] == "bad: port = 1: is taken"

    def test_one_that_says_nothing(self, start_supervisor: StartSupervisor) -> None:
        up = start_supervisor(("bad", "sys.exit(2)"))
        assert up.process.wait(60) == 2
        assert up.lines()[-1]["message"] == "bad: ended with code 2"


class TestStop:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_in_reverse_order_and_with_code_0(
        self, number: int, start_supervisor: StartSupervisor
    ) -> None:
        def text(name: str) -> str:
            return (
                f"def end(*_):\n    note('{name}', 'stops'); sys.exit(0)\n"
                f"signal.signal(signal.SIGTERM, end); note('{name}'); signal.pause()"
            )

        up = start_supervisor(*((name, text(name)) for name in "abc"))
        assert sorted(up.noted(3)) == ["a", "b", "c"]
        assert up.stop(number) == 0
        assert up.noted(6)[3:] == ["c stops", "b stops", "a stops"]
        assert all(up.events(name) == ["started", "stopped"] for name in "abc")

    def test_a_program_that_does_not_listen_is_killed(
        self, start_supervisor: StartSupervisor, alive: Alive
    ) -> None:
        deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); note(os.getpid())\nwhile 1: pass"
        up = start_supervisor(("deaf", deaf))
        (pid,) = map(int, up.noted(1))
        assert up.stop() == 0
        assert not alive(pid)
        assert up.lines()[-1]["code"] == -signal.SIGKILL

    def test_one_that_waits_to_be_started_is_not(
        self, start_supervisor: StartSupervisor, until: Until
    ) -> None:
        up = start_supervisor(("flaky", "sys.exit(1)"))
        until(lambda: up.events("flaky").count("ended") >= 6)  # it waits for 0.64 s by now
        assert up.stop() == 0


GRANDCHILD = (
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); "
    "signal.pause()"
)
PARENT = (
    f"child = subprocess.Popen([sys.executable, '-c', {GRANDCHILD!r}], stdout=subprocess.PIPE)\n"
    "child.stdout.readline(); note(os.getpid(), child.pid)\n"
)


class TestWhatProgramsStart:
    def test_it_is_gone_after_a_stop(self, start_supervisor: StartSupervisor, until: Until,
                                     alive: Alive) -> None:  # fmt: skip
        up = start_supervisor(("parent", PARENT + "signal.pause()"))
        pids = [int(pid) for pid in up.noted(1)[0].split()]
        assert all(map(alive, pids))
        assert up.stop() == 0
        until(lambda: not any(map(alive, pids)))

    def test_it_is_gone_before_a_restart(self, start_supervisor: StartSupervisor, until: Until,
                                         alive: Alive) -> None:  # fmt: skip
        """Or it would sit on the ports that the next one needs."""
        text = PARENT + "if len(notes()) < 2: os._exit(1)\nsignal.pause()"
        up = start_supervisor(("parent", text))
        first, second = ([int(pid) for pid in line.split()] for line in up.noted(2))
        until(lambda: not any(map(alive, first)))
        assert all(map(alive, second))


class TestAKilledSupervisor:
    def test_it_takes_its_programs_along(
        self, start_supervisor: StartSupervisor, until: Until, alive: Alive
    ) -> None:
        deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); note(os.getpid())\n"
        up = start_supervisor(("one", STAYS), ("two", f"{deaf}signal.pause()"))
        pids = [int(pid) for pid in up.noted(2)]
        up.process.kill()
        up.process.wait()
        until(lambda: not any(map(alive, pids)))

    def test_it_has_to_be_in_the_main_thread(self) -> None:
        """The kernel kills what a thread started when that thread ends."""
        caught: list[BaseException] = []

        def run() -> None:
            try:
                supervise([])
            except ValueError as error:
                caught.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert "main thread" in str(caught[0])


class TestWhatProgramsSay:
    def said(self, up: Any, process: str) -> list[str]:  # noqa: ANN401
        return [line["message"] for line in up.lines() if line["process"] == process]

    def test_each_line_once_and_in_our_form(self, start_supervisor: StartSupervisor) -> None:
        text = (
            "print('plain'); print('{\"time\": 1}'); print(); os.write(2, b'\\xff no end'); note(1)"
        )
        up = start_supervisor(("talks", f"{text}\nsignal.pause()"))
        up.noted(1)
        assert up.stop() == 0
        assert self.said(up, "talks") == ['{"time": 1}', "plain", "\ufffd no end"] or self.said(
            up, "talks"
        ) == ["plain", '{"time": 1}', "\ufffd no end"]

    def test_what_was_in_the_pipe_when_it_ended(self, start_supervisor: StartSupervisor) -> None:
        text = "for n in range(2000): print('line', n)\nsys.stdout.flush(); note(1); signal.pause()"
        up = start_supervisor(("talks", text))
        up.noted(1)
        assert up.stop() == 0
        assert self.said(up, "talks") == [f"line {n}" for n in range(2000)]

    def test_more_than_a_pipe_usually_holds(self, start_supervisor: StartSupervisor) -> None:
        """Its last line is why it ended."""
        text = (
            "import fcntl; fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 2**20)\n"
            "os.write(1, b'line\\n' * 50_000 + b'error: no key\\n'); os._exit(2)"
        )
        up = start_supervisor(("talks", text))
        assert up.process.wait(60) == 2
        assert up.lines()[-1]["message"] == "talks: no key"

    def test_one_that_closes_its_output_is_not_asked_for_ever(self) -> None:
        closes = "import os, signal; os.close(1); os.close(2); signal.pause()"
        child = _Child(Program("closes", (sys.executable, "-c", closes)), None)
        with selectors.DefaultSelector() as selector:
            assert child.start(0.0, selector)
            ((key, _),) = selector.select(60)
            key.data()
            assert not selector.get_map()
            assert child.bury(selector) == -signal.SIGKILL

    def test_a_line_without_end_fills_no_memory(
        self, start_supervisor: StartSupervisor, until: Until
    ) -> None:
        up = start_supervisor(("talks", "os.write(1, b'x' * 300_000); note(1); signal.pause()"))
        until(lambda: sum(map(len, self.said(up, "talks"))) > 200_000)
        assert max(map(len, self.said(up, "talks"))) <= 2**17
        assert up.stop() == 0

    def test_nobody_reads_the_log_any_more(self) -> None:
        """A supervisor whose terminal is gone goes on."""
        heard: list[str] = []

        def hear(notice: Notice) -> None:
            heard.append(notice.event)
            if notice.event == "ended":
                signal.raise_signal(signal.SIGTERM)

        reading, writing = os.pipe()
        os.close(reading)
        kept, sys.stderr = sys.stderr, os.fdopen(writing, "w")
        try:
            command = sys.executable, "-c", "print('hello')"
            assert supervise([Program("talks", command)], announce=hear) == 0
        finally:
            gone, sys.stderr = sys.stderr, kept
            with pytest.raises(BrokenPipeError):
                gone.close()
        assert heard == ["started", "ended"]


def test_it_leaves_signals_as_they_were() -> None:
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD
    before = [signal.getsignal(number) for number in numbers]

    def hear(notice: Notice) -> None:
        if notice.event == "started":
            signal.raise_signal(signal.SIGTERM)

    command = sys.executable, "-c", "import signal; signal.pause()"
    assert supervise([Program("stays", command)], announce=hear) == 0
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "with code 0"), (2, "with code 2"), (-9, "by SIGKILL"), (-200, "by signal 200")],
)
def test_codes_in_words(code: int, words: str) -> None:
    assert how_ended(code) == words
