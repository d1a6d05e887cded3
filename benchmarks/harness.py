"""What every benchmark shares: its options, fair timing, one table or one JSON object."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata


@dataclass
class Report:
    """Figures by flat name, printed as they come or as JSON at the end."""

    as_json: bool
    quick: bool
    figures: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: float, unit: str = "") -> None:
        """Records a figure."""
        self.figures[name] = round(value, 6)
        if not self.as_json:
            print(f"{name:44} {value:12.4f} {unit}", flush=True)

    def finish(self) -> None:
        """Prints the JSON object, or the machine under the table."""
        if self.as_json:
            print(json.dumps({"machine": machine(), "quick": self.quick, "figures": self.figures}))
        else:
            print("; ".join(f"{key} {value}" for key, value in machine().items()))


def start(description: str) -> Report:
    """Reads `--json` and `--quick`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--quick", action="store_true", help="end within a minute on 2 cores")
    options = parser.parse_args()
    return Report(options.json, options.quick)


def machine() -> dict[str, str]:
    """Processor, cores and the versions that figures depend on."""
    versions = {name: metadata.version(name) for name in ("torch", "numpy", "opacus", "flwr")}
    return {
        "cpu": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        "command": f"python {' '.join(sys.argv)}",
        **versions,
    }


def interleaved(contestants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each contestant; they take turns, so that drift is fair."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()  # a warm-up that is not counted
    for _ in range(repeats):
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in times.items()}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
            return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
