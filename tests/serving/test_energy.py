"""Joules and grams, against hand-made figures and a made-up power meter."""

import math
from pathlib import Path

import pytest

from serving import energy
from serving.energy import EnergyModel, RaplMeter


def test_modelled_energy_is_the_documented_formula(tmp_path: Path) -> None:
    found = EnergyModel(400.0, tmp_path).of(10.0)
    assert found.source == "modelled"
    assert found.joules_low == pytest.approx(10 * 1.693 * 1.135)
    assert found.joules_high == pytest.approx(10 * 7.66 * 1.135)
    assert found.joules == pytest.approx(math.sqrt(found.joules_low * found.joules_high), rel=1e-5)
    assert found.grams_co2e == pytest.approx(found.joules / 3.6e6 * 400, rel=1e-3)


def test_nothing_costs_nothing(tmp_path: Path) -> None:
    assert EnergyModel(400.0, tmp_path).of(0.0).joules == 0


class Host:
    """A /sys and a /proc with a power meter."""

    def __init__(self, folder: Path) -> None:
        self.package, self.stat = folder / "intel-rapl:0", folder / "stat"
        self.package.mkdir()
        (folder / "intel-rapl:0:0").mkdir()  # the cores, a part of the package
        (self.package / "max_energy_range_uj").write_text("999999999\n")
        self.show(microjoules=999_000_000, busy_ticks=100)

    def show(self, *, microjoules: int, busy_ticks: int) -> None:
        (self.package / "energy_uj").write_text(f"{microjoules}\n")
        self.stat.write_text(f"cpu  {busy_ticks} 0 0 5000 7 0 0 0 0 0\ncpu0 1 1\n")


def test_a_power_meter_is_read_across_its_overflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "RAPL_SECONDS", 0.0)
    host = Host(tmp_path)
    meter = RaplMeter([host.package], host.stat)
    assert meter.watts() is None  # no time has passed
    host.show(microjoules=5_000_000, busy_ticks=300)  # 6 J in 2 CPU-seconds
    assert meter.watts() == pytest.approx(3.0)


def test_a_meter_that_may_not_be_read_is_no_meter(tmp_path: Path) -> None:
    host = Host(tmp_path)
    assert RaplMeter.find(tmp_path) is not None
    (host.package / "energy_uj").unlink()
    assert RaplMeter.find(tmp_path) is None
    assert EnergyModel(400.0, tmp_path).of(1.0).source == "modelled"
