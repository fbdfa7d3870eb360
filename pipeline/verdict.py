"""What a gate says: measured values against their limits, and whether all of them hold."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from model.artifact import write_json


@dataclass(frozen=True, kw_only=True)
class Check:
    """One measured value against its limit. A value that is not a number fails either way."""

    name: str
    value: float
    limit: float
    bound: Literal["at most", "at least"]

    @property
    def passed(self) -> bool:
        return self.value <= self.limit if self.bound == "at most" else self.value >= self.limit

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g} ({self.bound} {self.limit:.4g})"


def write_report(path: Path, gate: str, checks: Sequence[Check], **measured: Any) -> None:
    """Writes a gate's report: verdict and checks first, then everything that was measured."""
    verdict = {"gate": gate, "passed": all(check.passed for check in checks)}
    rows = [{**asdict(check), "passed": check.passed} for check in checks]
    write_json(path, {**verdict, "checks": rows, **measured})
