"""What is installed, what is missing, what would fail; each with the mend.

Every check looks at one thing and says what it found; none raises, none leaves anything behind,
none asks the network. What only a try can tell (whether the program loads, whether the disk locks,
links and syncs) is tried, in processes and in a folder of its own.
"""

import os
import re
import resource
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .machine import (
    TRIALS,
    answer,
    child,
    clock_state,
    cores_allowed,
    file_system,
    is_network,
    memory_available,
    read,
)

if TYPE_CHECKING:
    from packaging.requirements import Requirement

State = Literal["ok", "missing", "warning"]

_GIB = 2**30
_SHARED = "/dev/shm"  # noqa: S108  where Ray keeps what its processes share
_FILES_AT_REST, _FILES_A_SITE = 64, 3  # measured: a ledger is a database, its journal, its index
_NO_PROMISE = ("tmpfs", "ramfs", "overlay")
_CLOSED = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
_LOADS = (
    "import json, os; from fedveil import api; from fedveil.server import simulation; import torch;"
    "cuda = torch.cuda.is_available(); "
    "devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] "
    "if cuda else []; "
    "print(json.dumps({'cuda': torch.version.cuda, "
    "'devices': [[d.name, d.total_memory] for d in devices], "
    f"'environment': {{n: os.environ.get(n) for n in {tuple(_CLOSED)!r}}}}}))"
)
_LOADS_RAY = "import json, ray; print(json.dumps({'version': ray.__version__}))"


@dataclass(frozen=True)
class Check:
    """What was found of one thing.

    Attributes:
        name: The thing.
        state: `missing` is what a simulation needs and has not; `warning` what may trouble one.
        found: What it is, in words.
        mend: What to do about it; empty where nothing is to be done.
    """

    name: str
    state: State
    found: str
    mend: str = ""


def examine(out: Path) -> list[Check]:
    """All checks.

    Args:
        out: The folder where runs go; it need not exist, and is not made.
    """
    with child(_LOADS) as program, child(_LOADS_RAY) as ray:
        looks: dict[str, Callable[[], list[Check]]] = {
            "packages": packages,
            "cores": lambda: [cores(len(os.sched_getaffinity(0)), cores_allowed())],
            "memory": lambda: [memory(memory_available())],
            "disk": lambda: [disk(out, shutil.disk_usage(_nearest(out)).free)],
            "run folder": lambda: folder("run folder", out),
            "temporary folder": temporary,
            "clock": lambda: [clock(datetime.now(UTC), _installed_at())],
            "time server": lambda: [time_server(clock_state())],
            "open files": lambda: [open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])],
            "entropy": lambda: [entropy()],
            # The processes load while the others look.
            "program": lambda: loaded(answer(program)),
            "ray": lambda: [optional_ray(answer(ray), shutil.disk_usage(_SHARED).free)],
        }
        return [check for name, look in looks.items() for check in _guarded(name, look)]


def whole(checks: list[Check]) -> bool:
    """Whether nothing is missing that a simulation needs."""
    return all(check.state != "missing" for check in checks)


def _guarded(name: str, look: Callable[[], list[Check]]) -> list[Check]:
    try:
        return look()
    except Exception as error:  # noqa: BLE001  a machine that cannot be looked at is an answer too
        why = " ".join(f"{type(error).__name__}: {error}".split())
        return [Check(name, "warning", f"could not be looked at ({why})")]


# What is installed


def packages() -> list[Check]:
    """Python and every package that Fedveil's own metadata asks for, each held against that."""
    try:
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return [Check("packaging", "missing", "not installed", "pip install packaging")]
    try:
        facts = metadata.metadata("fedveil")
    except metadata.PackageNotFoundError:
        mend = "pip install --editable . in its folder"
        return [Check("fedveil", "missing", "is not installed as a package", mend)]
    running = ".".join(map(str, sys.version_info[:3]))
    wanted = SpecifierSet(facts["Requires-Python"])
    requirements = map(Requirement, metadata.requires("fedveil") or [])
    plain = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [
        in_range("python", running, str(wanted), fits=wanted.contains(running)),
        *(package(requirement, _version(requirement.name)) for requirement in plain),
    ]


def package(requirement: "Requirement", version: str | None) -> Check:
    """One package, held against what is asked of it."""
    name, wanted = requirement.name, requirement.specifier
    if version is None:
        return Check(name, "missing", "not installed", f'pip install "{requirement}"')
    return in_range(name, version, str(wanted), fits=wanted.contains(version, prereleases=True))


def in_range(name: str, version: str, wanted: str, *, fits: bool) -> Check:
    """A version, and whether it is one that Fedveil is made for."""
    if fits:
        return Check(name, "ok", version)
    how = "make .venv anew with such a one" if name == "python" else f'pip install "{name}{wanted}"'
    return Check(name, "missing", f"{version}, outside {wanted}", how)


def loaded(told: dict[str, Any] | str) -> list[Check]:
    """Whether all that a simulation imports loads, what GPU it sees, and that it calls nobody."""
    if isinstance(told, str):
        mend = (
            'python -c "import fedveil.server.simulation" shows where; install anew what it names'
        )
        return [Check("program", "missing", f"does not load: {told}", mend)]
    driver = read("/proc/driver/nvidia/version")
    return [
        Check("program", "ok", "all that a simulation imports loads"),
        gpu(told["cuda"], told["devices"], driver),
        telemetry(os.environ, told["environment"]),
    ]


def gpu(cuda: str | None, devices: list[tuple[str, int]], driver: str) -> Check:
    """What GPU torch sees; none is no fault.

    Args:
        cuda: The CUDA version that torch was built for.
        devices: Name and memory in bytes of each.
        driver: What the driver says of itself; empty where there is none.
    """
    number = re.search(r"\d+\.\d+(\.\d+)?", driver)
    said = f"driver {number[0]}" if number else "no driver"
    if devices:
        seen = ", ".join(f"{name} with {memory / _GIB:.0f} GiB" for name, memory in devices)
        return Check("gpu", "ok", f"{seen}, {said}, CUDA {cuda}")
    if number:
        found = f"torch sees none ({'CUDA ' + cuda if cuda else 'CPU build'}), but there is {said}"
        mend = "for its use install a CUDA build of torch that this driver serves"
        return Check("gpu", "warning", found, mend)
    return Check("gpu", "ok", "none; everything runs on the CPU")


def telemetry(environment: Mapping[str, str], within: Mapping[str, str | None]) -> Check:
    """That Fedveil's processes send nobody anything, and that no variable asks for it.

    Args:
        environment: This process's.
        within: The variables, as they are in a process of Fedveil's.
    """
    if broken := [name for name, off in _CLOSED.items() if within.get(name) != off]:
        mend = f"export {' '.join(f'{name}={_CLOSED[name]}' for name in broken)}"
        return Check("telemetry", "warning", f"{broken[0]} is not off in Fedveil", mend)
    if asked := [name for name, off in _CLOSED.items() if environment.get(name, off) != off]:
        found = f"off in Fedveil, but {asked[0]} turns it on for Flower's and Ray's own commands"
        return Check("telemetry", "warning", found, f"unset {' '.join(asked)}")
    return Check("telemetry", "ok", "off")


def optional_ray(told: dict[str, Any] | str, shared: int) -> Check:
    """Ray, which only an engine of its own will need, and the shared memory it needs, in bytes."""
    install = 'pip install "fedveil[ray]"'
    if _version("ray") is None:
        return Check("ray", "ok", "not installed; it is optional", f"{install}, for its engine")
    if isinstance(told, str):
        return Check("ray", "warning", f"does not load: {told}", f"{install} anew")
    wanted = _wanted_of_ray()
    if not wanted.specifier.contains(told["version"]):
        found = f"{told['version']}, outside {wanted.specifier}"
        return Check("ray", "warning", found, f'pip install "{wanted.name}{wanted.specifier}"')
    if shared < _GIB:
        mend = "give it more: docker run --shm-size=2g"
        return Check("ray", "warning", f"{_SHARED} has {_size(shared)} free; too little", mend)
    return Check("ray", "ok", f"{told['version']}, /dev/shm has {_size(shared)} free")


# The machine


def cores(usable: int, allowed: float | None) -> Check:
    """The cores that this process may run on, and how many a container lets it use."""
    if allowed is not None and allowed < usable:
        found = f"{usable} usable, but the container is held to {allowed:g}"
        mend = "the engine starts a thread a core: give it whole ones (docker run --cpuset-cpus)"
        return Check("cores", "warning", found, mend)
    return Check("cores", "ok", f"{usable}; the local engine runs so many sites at a time")


def memory(available: int) -> Check:
    """Free memory in bytes; a small simulation takes 0.6 GiB."""
    if available < _GIB:
        mend = "close other programs, or raise the container's limit; 2 GiB are enough to start"
        return Check("memory", "missing", f"{_size(available)} free; a run needs 1 GiB", mend)
    if available < 2 * _GIB:
        mend = "lower training.micro_batch and evaluation.samples where it is not enough"
        return Check("memory", "warning", f"{_size(available)} free", mend)
    return Check("memory", "ok", f"{_size(available)} free")


def disk(out: Path, free: int) -> Check:
    """Free bytes where runs go; a small run takes 2 MiB."""
    said, mend = f"{_size(free)} free for {out}", "make room, or choose another disk with --out"
    if free < _GIB // 10:
        return Check("disk", "missing", f"{said}; a run needs 100 MiB", mend)
    return Check("disk", "ok", said) if free >= _GIB else Check("disk", "warning", said, mend)


def clock(now: datetime, installed: datetime) -> Check:
    """The time, which cannot be before the packages were installed."""
    said = f"{now:%Y-%m-%d %H:%M:%S} UTC"
    if now < installed - timedelta(minutes=5):
        found = f"{said}, but packages were installed at {installed:%Y-%m-%d %H:%M} UTC"
        return Check("clock", "warning", found, "set it: a ledger refuses a clock that went back")
    return Check("clock", "ok", said)


def time_server(state: int | None) -> Check:
    """Whether a time server keeps the clock; the kernel's answer, 5 for no."""
    if state is None or state < 0:
        return Check("time server", "ok", "not known here")
    if state == 5:
        mend = "timedatectl set-ntp true, or chrony: a ledger refuses a clock that went back"
        return Check("time server", "warning", "none is known to keep the clock", mend)
    return Check("time server", "ok", "keeps the clock")


def open_files(limit: int) -> Check:
    """The limit of open files, as the number of simulated sites that it is enough for."""
    if limit == resource.RLIM_INFINITY:
        return Check("open files", "ok", "no limit")
    sites = max(0, limit - _FILES_AT_REST) // _FILES_A_SITE
    said = f"{limit}, enough for {sites} sites"
    if sites < 10:
        return Check("open files", "missing", said, "ulimit -n 4096")
    return Check("open files", "ok", said, "" if sites >= 1000 else "for more: ulimit -n 4096")


def entropy() -> Check:
    """Whether the system's secure generator answers at once, and with something else each time."""
    try:
        first, second = (os.getrandom(32, os.GRND_NONBLOCK) for _ in range(2))
    except BlockingIOError:
        mend = "wait for the machine to finish starting, or give it a source (virtio-rng)"
        return Check("entropy", "missing", "the system's generator is not seeded yet", mend)
    if first == second or len(first) != 32:
        return Check("entropy", "missing", "the system's generator repeats itself", "do not use it")
    return Check("entropy", "ok", "the system's secure generator answers")


# The disk


def folder(name: str, path: Path) -> list[Check]:
    """Really tries in a folder what ledgers and run folders rest on.

    Returns:
        Whether it can be written, first of all; then syncing, links, locks, SQLite's journal.
    """
    try:
        place = _nearest(path)
        with tempfile.TemporaryDirectory(prefix=".fedveil-doctor-", dir=place) as made:
            tried = [_tried(trial, what, Path(made)) for trial, what in TRIALS.items()]
    except OSError as error:
        mend = "make it writable, or choose another" + (
            " with --out" if name == "run folder" else ""
        )
        return [Check(name, "missing", f"{path}: cannot be written ({error.strerror})", mend)]
    kind = file_system(place, read("/proc/self/mountinfo"))
    return [Check(name, "ok", f"{path}: can be written"), *tried, durability(kind, os.environ)]


def temporary() -> list[Check]:
    """Whether the temporary folder can be written."""
    try:
        return folder("temporary folder", Path(tempfile.gettempdir()))[:1]
    except OSError as error:
        mend = "make /tmp writable, or export TMPDIR=FOLDER"
        return [Check("temporary folder", "missing", f"there is none ({error.strerror})", mend)]


def durability(kind: str, environment: Mapping[str, str]) -> Check:
    """Whether what was synced outlives a power cut, as far as the kind of disk tells."""
    if "eatmydata" in environment.get("LD_PRELOAD", ""):
        return Check("durability", "warning", "LD_PRELOAD takes fsync away", "unset LD_PRELOAD")
    if kind in _NO_PROMISE:
        found = f"{kind}: what is written may be gone with the machine or the container"
        return Check("durability", "warning", found, "put ledgers and runs on a disk or a volume")
    if is_network(kind):
        found = f"{kind}: a network disk, whose locks may not hold between machines"
        return Check("durability", "warning", found, "put ledgers on a local disk")
    return Check("durability", "ok", kind or "not known here")


def _tried(name: str, trial: Callable[[Path], None], place: Path) -> Check:
    try:
        trial(place)
    except (OSError, sqlite3.Error) as error:
        mend = "use a local disk, such as ext4 or xfs, with --out"
        return Check(name, "missing", f"does not work in {place.parent} ({error})", mend)
    return Check(name, "ok", "works")


def _nearest(path: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _installed_at() -> datetime:
    """When the newest package was installed, or one last removed."""
    place = Path(str(metadata.distribution("fedveil").locate_file("")))
    return datetime.fromtimestamp(place.stat().st_mtime, UTC)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _wanted_of_ray() -> "Requirement":
    """The Ray that Flower asks for: its extra, which ours stands for."""
    from packaging.requirements import Requirement

    asked = map(Requirement, metadata.requires("flwr") or [])
    of_extra = (r for r in asked if r.marker and r.marker.evaluate({"extra": "simulation"}))
    return next((r for r in of_extra if r.name == "ray"), Requirement("ray"))


def _size(count: float) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / 2**20:.0f} MiB"
