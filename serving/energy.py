"""What a request cost: CPU-seconds as measured, energy and carbon by a model that names its coefficients.

    joules = cpu_seconds * watts per busy CPU * PUE          grams = joules / 3.6e6 * grid

Cloud machines show no power meter, so the watts are a range from two published models that differ 4.5 times; the figure
between them is their geometric mean. Where the host shows RAPL, the joules of its processor packages are measured, and
a request gets its share by CPU time; the label says which it was. Software Carbon Intensity 1.1 calls this E * I; the
embodied M is left out, since it depends on who owns the machine and for how long.
"""

import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

WATTS_LOW = 1.693
"""Per vCPU at full load: Cloud Carbon Footprint for AWS Graviton (copied there from another CPU family)."""
WATTS_HIGH = 7.66
"""Per vCPU at full load: Teads' estimate for r6g.4xlarge, 122.5 W for 16, memory and all else included."""
PUE = 1.135
"""Power usage effectiveness of AWS data centres, Cloud Carbon Footprint."""
JOULES_PER_KWH = 3.6e6
RAPL = Path("/sys/class/powercap")
RAPL_SECONDS = 1.0
"""The meter is read at most this often: it counts in steps of a millisecond, and a read takes some microseconds."""


@dataclass(frozen=True, kw_only=True)
class Energy:
    """One request's."""

    cpu_seconds: float
    joules: float
    joules_low: float
    joules_high: float
    grams_co2e: float
    source: Literal["modelled", "rapl"]


class EnergyModel:
    """Energy of CPU time, on a grid of that many grams of CO2 equivalent per kWh."""

    def __init__(self, grams_per_kwh: float, rapl: Path = RAPL) -> None:
        self._grams_per_kwh = grams_per_kwh
        self._meter = RaplMeter.find(rapl)

    def of(self, cpu_seconds: float) -> Energy:
        """What that CPU time took."""
        watts = None if self._meter is None else self._meter.watts()
        low, high = (watts, watts) if watts is not None else (WATTS_LOW * PUE, WATTS_HIGH * PUE)
        joules = cpu_seconds * math.sqrt(low * high)
        return Energy(
            cpu_seconds=round(cpu_seconds, 6),
            joules=round(joules, 6),
            joules_low=round(cpu_seconds * low, 6),
            joules_high=round(cpu_seconds * high, 6),
            grams_co2e=round(joules / JOULES_PER_KWH * self._grams_per_kwh, 9),
            source="modelled" if watts is None else "rapl",
        )


class RaplMeter:
    """Watts per busy CPU, from the processor packages' energy counters and the machine's busy CPU time."""

    def __init__(self, packages: list[Path], stat: Path = Path("/proc/stat")) -> None:
        self._packages, self._stat = packages, stat
        self._ranges = [int((package / "max_energy_range_uj").read_text()) for package in packages]
        self._last = self._read()
        self._watts: float | None = None
        self._reading = threading.Lock()

    @classmethod
    def find(cls, folder: Path) -> "RaplMeter | None":
        """The meter of this host, or None if it has none that this process may read."""
        packages = sorted(folder.glob("intel-rapl:[0-9]*"))
        packages = [package for package in packages if package.name.count(":") == 1]  # others are parts of these
        try:
            return cls(packages) if packages else None
        except OSError:
            return None

    def watts(self) -> float | None:
        """Joules per CPU-second since the last reading but one; None until there is one."""
        with self._reading:
            if time.monotonic() - self._last[0] >= RAPL_SECONDS:
                now = self._read()
                used = sum(
                    (new - old) % (most + 1) for new, old, most in zip(now[2], self._last[2], self._ranges, strict=True)
                )
                busy = now[1] - self._last[1]
                self._watts = used / 1e6 / busy if busy > 0 else self._watts
                self._last = now
            return self._watts

    def _read(self) -> tuple[float, float, list[int]]:
        """When; busy CPU-seconds of the machine; microjoules of each package."""
        columns = [int(column) for column in self._stat.read_text().splitlines()[0].split()[1:]]
        busy = sum(columns[:3]) + sum(columns[5:8])  # user, nice, system; irq, softirq, steal
        energy = [int((package / "energy_uj").read_text()) for package in self._packages]
        return time.monotonic(), busy / 100, energy
