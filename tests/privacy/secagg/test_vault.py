"""A site's state on its disk: whole, durable, secret, its own, and held by one at a time."""

import errno
import fcntl
import os
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedveil.privacy.secagg import vault as module
from fedveil.privacy.secagg.errors import LostStateError, StateInUseError
from fedveil.privacy.secagg.vault import Vault

KEY = bytes(range(32))
SECRET = b"a private mask key that nobody may read"
OVERHEAD = 5 + 12 + 16  # magic and version, nonce, tag

HOLD = """
import fcntl, os, sys
handle = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR, 0o600)
try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    print("refused", flush=True)
else:
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


def opened(path: Path, key: bytes = KEY, site: str = "site-0", run: str = "run-1") -> Vault:
    return Vault(path, key, site, run)


def saved(path: Path, content: bytes = SECRET) -> bytes:
    """Saves, lets go, and gives the file's bytes."""
    with opened(path) as vault:
        vault._save(content)
    return path.read_bytes()


class TestSaveAndLoad:
    @given(contents=st.lists(st.binary(max_size=200), min_size=1, max_size=3))
    @settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_gives_back_what_was_saved_last(self, path: Path, contents: list[bytes]) -> None:
        with opened(path) as vault:
            for content in contents:
                vault._save(content)
                assert vault.load() == content
        with opened(path) as vault:
            assert vault.load() == contents[-1]

    def test_nothing_was_saved_at_first(self, path: Path) -> None:
        with opened(path) as vault:
            assert vault.load() is None
            assert not path.exists()

    def test_nothing_is_something_when_it_was_saved(self, path: Path) -> None:
        saved(path, b"")
        with opened(path) as vault:
            assert vault.load() == b""

    def test_leaves_nothing_beside_the_file_and_its_lock(self, path: Path) -> None:
        saved(path)
        assert {file.name for file in path.parent.iterdir()} == {"state", "state.lock"}

    def test_two_of_the_same_content_differ(self, path: Path) -> None:
        first, second = saved(path), saved(path)
        assert len(first) == len(second) == OVERHEAD + len(SECRET)
        assert first[:5] == second[:5]
        assert first[5:17] != second[5:17]
        assert first[17:] != second[17:]


class TestSecret:
    def test_neither_content_nor_key_is_on_the_disk_at_any_time(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[bytes] = []
        sync = os.fsync

        def look(handle: int) -> None:
            seen.extend(file.read_bytes() for file in path.parent.iterdir())
            sync(handle)

        monkeypatch.setattr(os, "fsync", look)
        saved(path)
        seen.extend(file.read_bytes() for file in path.parent.iterdir())
        assert any(len(content) == OVERHEAD + len(SECRET) for content in seen)
        for content in seen:
            assert KEY not in content
            assert all(SECRET[i : i + 8] not in content for i in range(len(SECRET) - 7))

    def test_all_files_are_their_owner_s_alone(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        modes: set[int] = set()
        sync = os.fsync

        def look(handle: int) -> None:
            modes.update(stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir())
            sync(handle)

        monkeypatch.setattr(os, "fsync", look)
        before = os.umask(0)
        try:
            saved(path)
        finally:
            os.umask(before)
        assert modes == {0o600}
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    @pytest.mark.parametrize("length", [0, 16, 31, 33])
    def test_a_key_of_another_length_is_refused(self, path: Path, length: int) -> None:
        with pytest.raises(ValueError, match=f"key = {length} bytes: must be 32"):
            opened(path, bytes(length))
        assert not list(path.parent.iterdir())


def check_lost(vault: Vault) -> None:
    with pytest.raises(LostStateError, match="is not as it was saved by this site in this run"):
        vault.load()


class TestNotAsItWasSaved:
    def test_any_one_bit_changed_is_noticed(self, path: Path) -> None:
        whole = saved(path)
        with opened(path) as vault:
            for bit in range(8 * len(whole)):
                altered = bytearray(whole)
                altered[bit // 8] ^= 1 << bit % 8
                path.write_bytes(altered)
                check_lost(vault)
            path.write_bytes(whole)
            assert vault.load() == SECRET

    def test_cut_off_anywhere_is_noticed(self, path: Path) -> None:
        """An empty file, too: it is not one that never was."""
        whole = saved(path)
        with opened(path) as vault:
            for length in range(len(whole)):
                path.write_bytes(whole[:length])
                check_lost(vault)

    def test_lengthened_is_noticed(self, path: Path) -> None:
        path.write_bytes(saved(path) + b"\0")
        with opened(path) as vault:
            check_lost(vault)

    @pytest.mark.parametrize(
        ("key", "site", "run"),
        [
            (bytes(32), "site-0", "run-1"),
            (KEY, "site-1", "run-1"),
            (KEY, "site-0", "run-2"),
            (KEY, "site-0run-1", ""),
            (KEY, "run-1", "site-0"),
        ],
    )
    def test_another_key_s_site_s_or_run_s_is_noticed(
        self, path: Path, key: bytes, site: str, run: str
    ) -> None:
        saved(path)
        with opened(path, key, site, run) as vault:
            check_lost(vault)

    def test_what_cannot_be_read_is_no_fresh_start(self, path: Path) -> None:
        path.mkdir()
        with opened(path) as vault, pytest.raises(LostStateError, match="check the file"):
            vault.load()


class TestOneAtATime:
    def test_a_second_one_is_refused_until_the_first_lets_go(self, path: Path) -> None:
        with opened(path) as first:
            first._save(b"first")
            for key, run in ((KEY, "run-1"), (bytes(32), "run-2")):
                with pytest.raises(StateInUseError, match="another process holds it"):
                    opened(path, key, run=run)
            first._save(b"still first")
        with opened(path) as second:
            assert second.load() == b"still first"

    def test_a_refused_one_holds_nothing_open(self, path: Path) -> None:
        with opened(path):
            before = os.listdir("/proc/self/fd")  # noqa: PTH208
            for _ in range(3):
                with pytest.raises(StateInUseError):
                    opened(path)
            assert len(os.listdir("/proc/self/fd")) == len(before)  # noqa: PTH208

    def test_files_beside_each_other_are_held_apart(self, path: Path) -> None:
        with opened(path) as one, opened(path.with_name("other")) as other:
            one._save(b"one")
            other._save(b"other")
            assert (one.load(), other.load()) == (b"one", b"other")

    def test_another_process_is_refused_and_refuses(self, path: Path) -> None:
        """And one that is killed lets go."""
        command = [sys.executable, "-c", HOLD, f"{path}.lock"]
        with opened(path):
            refused = subprocess.run(command, capture_output=True, text=True, check=True)
        assert refused.stdout == "refused\n"
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            with pytest.raises(StateInUseError):
                opened(path)
            other.kill()
            other.wait()
        opened(path).close()


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Sets the largest file that this process may write: a disk that is full, for a while."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestDurable:
    def test_the_file_is_synced_then_named_then_its_folder_is_synced(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        saved(path, b"before")
        steps: list[tuple[str, object]] = []
        sync, rename = os.fsync, os.replace

        def synced(handle: int) -> None:
            status = os.fstat(handle)
            folder = stat.S_ISDIR(status.st_mode)
            steps.append(("folder", None) if folder else ("file", status.st_size))
            if folder:
                assert os.path.samestat(status, path.parent.stat())
            sync(handle)

        def renamed(source: Path, target: Path) -> None:
            steps.append(("replace", target))
            assert source.parent == target.parent
            rename(source, target)

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "replace", renamed)
        with opened(path) as vault:
            vault._save(SECRET)
        # The file had all its bytes when it was synced.
        assert steps == [("file", OVERHEAD + len(SECRET)), ("replace", path), ("folder", None)]

    @pytest.mark.parametrize("call", ["fsync", "replace", "open"])
    def test_a_disk_that_refuses_leaves_what_was_saved_before(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        with opened(path) as vault:
            vault._save(b"before")
            with monkeypatch.context() as patch:
                patch.setattr(os, call, refuse)
                with pytest.raises(LostStateError, match="No space left on device"):
                    vault._save(SECRET)
            assert vault.load() == b"before"
            assert {file.name for file in path.parent.iterdir()} == {"state", "state.lock"}
            vault._save(b"after")
            assert vault.load() == b"after"

    def test_a_disk_that_fills_up_in_the_middle_leaves_it_too(
        self, path: Path, small_files: Callable[[int], None]
    ) -> None:
        with opened(path) as vault:
            vault._save(b"before")
            small_files(4096)
            with pytest.raises(LostStateError, match="File too large"):
                vault._save(bytes(1 << 16))
            small_files(1 << 20)
            assert vault.load() == b"before"
            assert {file.name for file in path.parent.iterdir()} == {"state", "state.lock"}

    def test_any_refusal_of_the_replacement_is_a_lost_state(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "replace_file", refuse)
        with opened(path) as vault, pytest.raises(LostStateError, match="check the disk"):
            vault._save(SECRET)
        assert not path.exists()

    def test_a_folder_that_is_not_there_is_refused_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(LostStateError, match=r"No such file or directory; check the path"):
            opened(tmp_path / "none" / "state")

    def test_a_folder_that_goes_away_is_refused_when_it_is_saved_to(self, path: Path) -> None:
        folder = path.parent / "folder"
        folder.mkdir()
        with opened(folder / "state") as vault:
            (folder / "state.lock").unlink()
            folder.rmdir()
            with pytest.raises(LostStateError, match="No such file or directory"):
                vault._save(SECRET)

    def test_what_a_crash_left_of_a_draft_is_no_harm(self, path: Path) -> None:
        saved(path, b"before")
        path.with_name(".state.partial").write_bytes(b"half of something longer" * 100)
        with opened(path) as vault:
            assert vault.load() == b"before"
            vault._save(SECRET)
            assert vault.load() == SECRET


def test_a_closed_one_is_of_no_use_and_lets_go_once(tmp_path: Path) -> None:
    """Its lock may be another's by then: neither may it be used nor given back twice."""
    first = Vault(tmp_path / "state", KEY, "site", "run")
    first._save(b"one")
    first.close()
    with Vault(tmp_path / "state", KEY, "site", "run") as second:
        second._save(b"two")
        first.close()
        with pytest.raises(StateInUseError, match="is closed"):
            first.replace(b"one", b"three")
        with pytest.raises(StateInUseError, match="is closed"):
            first.load()
        with pytest.raises(StateInUseError, match="another process holds it"):
            Vault(tmp_path / "state", KEY, "site", "run")
        assert second.load() == b"two"


def test_a_disk_without_locks_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(LostStateError, match="its disk has no locks"):
        Vault(tmp_path / "state", KEY, "site", "run")


def test_what_another_object_has_changed_is_not_replaced(tmp_path: Path) -> None:
    with Vault(tmp_path / "state", KEY, "site", "run") as vault:
        vault.replace(None, b"one")
        with pytest.raises(StateInUseError, match="was changed since this site took it up"):
            vault.replace(None, b"two")
        vault.replace(b"one", b"two")
        assert vault.load() == b"two"


def test_of_two_at_once_one_replaces(tmp_path: Path) -> None:
    """Two objects on one vault, in step until both would compare: one answer leaves."""
    started = threading.Barrier(2, timeout=10)
    outcomes: list[str] = []

    def replace(vault: Vault, name: bytes) -> None:
        started.wait()
        try:
            vault.replace(b"one", name)
            outcomes.append("replaced")
        except StateInUseError:
            outcomes.append("refused")

    for _ in range(20):
        outcomes.clear()
        with Vault(tmp_path / "state", KEY, "site", "run") as vault:
            vault.replace(vault.load(), b"one")
            threads = [
                threading.Thread(target=replace, args=(vault, name)) for name in (b"two", b"three")
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert sorted(outcomes) == ["refused", "replaced"]


def test_a_forked_process_is_refused(tmp_path: Path) -> None:
    """It has the same lock, and would send a second vector."""
    with Vault(tmp_path / "state", KEY, "site", "run") as vault:
        vault.replace(None, b"one")
        vault._process += 1  # as in a fork
        with pytest.raises(StateInUseError, match="is of another process"):
            vault.replace(b"one", b"two")
        with pytest.raises(StateInUseError, match="is of another process"):
            vault.load()


def test_a_draft_that_a_crash_left_does_not_lend_its_permissions(tmp_path: Path) -> None:
    draft = tmp_path / ".state.partial"
    draft.write_bytes(b"left")
    draft.chmod(0o666)
    with Vault(tmp_path / "state", KEY, "site", "run") as vault:
        vault.replace(None, b"one")
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o600
