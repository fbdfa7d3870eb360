"""A stage, the fingerprint that decides whether it must run, and the receipt that says it did.

A stage named `quantize` is the function `run` in `pipeline/quantize.py`. It gets its configuration and the paths of
its sources, inputs and outputs, and opens nothing else. Its fingerprint is everything its outputs depend on, as a
flat mapping so that two fingerprints can be compared line by line: every configuration field, the SHA-256 of every
source and input, of every first-party file that the stage's module imports (found in its syntax tree), the versions
of the packages those files import, and the CPU family that it compiles for, or else the machine's architecture.

Outputs are written beside their place and renamed into it; the receipt is written last, atomically. So a run killed
anywhere leaves either a receipt whose outputs are whole or none at all, and the next run resumes there.

An output that is gone counts as what its receipt says of it, until a stage that must run reads it. So a build folder
can be carried from one machine to another without its gigabytes of intermediate weights: `published` says what must
come along.
"""

import ast
import fcntl
import hashlib
import importlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from model.artifact import files_below, write_json
from model.cpu import family
from model.errors import InputError
from pipeline.fingerprint import ROOT, DigestMemo, describe_changes, imports_of, package_versions
from pipeline.progress import say
from pipeline.verdict import Check
from pipeline.waiting import Cores, as_served, take_cores

REPORTS = "reports"
"""Folder of what people read of a build, and the image carries."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step: a module of that name, what it reads and what it writes."""

    name: str
    config: Any
    sources: tuple[Path, ...] = ()
    """Files and folders of the user's, which no stage writes."""
    inputs: tuple[Path, ...] = ()
    """What earlier stages write, relative to the build folder."""
    outputs: tuple[Path, ...]
    """What this stage writes, relative to the build folder."""
    resumable: bool = False
    """Whether it goes on from what a run that was cut short has written, if nothing that it depends on has changed."""
    cores: Cores = "all"
    """Which cores it computes on; "free" if its outputs are the same for any number of threads."""
    measures: bool = False
    """Whether it measures what is served: it runs in a process of its own, whose threads wait as a server's do."""

    @property
    def module_file(self) -> Path:
        return ROOT / "pipeline" / f"{self.name}.py"

    @property
    def purpose(self) -> str:
        """The first line of the module's docstring."""
        return (ast.get_docstring(ast.parse(self.module_file.read_text(encoding="utf-8"))) or "").splitlines()[0]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one stage in a run."""

    stage: str
    state: str
    """"ran", "unchanged" or "failed"."""
    seconds: float
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)


def check_table(stages: Sequence[Stage]) -> None:
    """Rejects a table in which an input is written by no earlier stage, or an output by two."""
    written: dict[Path, str] = {}
    for stage in stages:
        for path in stage.inputs:
            if path not in written:
                raise InputError(
                    f"stage {stage.name}: input {path} is written by no earlier stage; fix pipeline/stages.py"
                )
        for path in stage.outputs:
            if path in written:
                raise InputError(f"stages {written[path]} and {stage.name} both write {path}; fix pipeline/stages.py")
            written[path] = stage.name


class Build:
    """A build folder: artifacts, receipts, and the stages that make them."""

    def __init__(self, folder: Path, stages: Sequence[Stage]) -> None:
        check_table(stages)
        self.folder = folder
        self.stages = stages
        self._receipts = folder / ".receipts"
        self._digests = DigestMemo(self._receipts / "digests.json")

    def stage(self, name: str) -> Stage:
        found = {stage.name: stage for stage in self.stages}
        if name not in found:
            raise InputError(f"no stage {name!r}; the stages are {', '.join(found)}")
        return found[name]

    def needed_for(self, names: Sequence[str]) -> list[Stage]:
        """The named stages and every stage they depend on, in table order; all stages if none is named."""
        wanted = {self.stage(name).name for name in names} or {stage.name for stage in self.stages}
        for stage in reversed(self.stages):
            if stage.name in wanted:
                wanted |= self._makers(stage)
        return [stage for stage in self.stages if stage.name in wanted]

    def run(self, names: Sequence[str] = (), *, force: bool = False) -> Iterator[Outcome]:
        """Brings stages up to date in order, yielding each outcome; stops after one that failed."""
        wanted = self.needed_for(names)
        targets = set(names) or {stage.name for stage in wanted}
        with self._lock():
            present = targets | self._read_but_gone(wanted, targets, force=force)
            for done, stage in enumerate(wanted, start=1):
                kept = stage.name in present
                reasons = ["forced"] if force and stage.name in targets else self.reasons(stage, outputs_kept=kept)
                outcome = self._execute(stage, reasons) if reasons else self._unchanged(stage)
                if outcome.failed:
                    self._withdraw_dependents(stage)
                yield outcome
                if outcome.failed:
                    return
                if reasons:  # what it has written may be what it wrote before, and spare later stages
                    present = targets | self._read_but_gone(wanted[done:], targets, force=force)

    def key(self, names: Sequence[str], given: Sequence[str] = ()) -> str:
        """One digest of all that the outputs of these stages depend on; known before any of them runs.

        What `given` stages and those before them have written is there already, and enters by its content.
        """
        within = self._beyond(names, given)
        fresh = {f"input {path}" for stage in within for path in stage.outputs}
        own = {
            stage.name: {name: of for name, of in self.fingerprint(stage).items() if name not in fresh}
            for stage in within
        }
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()

    def published(self, names: Sequence[str], given: Sequence[str] = ()) -> list[Path]:
        """What to keep of these stages and all they need beyond the `given` ones: receipts, reports, and the outputs
        that other stages read.
        """
        within = self._beyond(names, given)
        read = {path for stage in self.stages if stage not in within for path in stage.inputs}
        kept = [path for stage in within for path in stage.outputs if path in read or path.parts[0] == REPORTS]
        return [*(self.folder / path for path in kept), *map(self._receipt_path, within)]

    def _beyond(self, names: Sequence[str], given: Sequence[str]) -> list[Stage]:
        """The named stages and what they need, without the given ones and what those need."""
        there = self.needed_for(given) if given else []
        return [stage for stage in self.needed_for(names) if stage not in there]

    def outdated(self, names: Sequence[str]) -> dict[str, list[str]]:
        """The stages, of these and all they need, that a run would have to run, with the reasons; runs nothing."""
        needed = self.needed_for(names)
        targets = set(names) or {stage.name for stage in needed}
        found = {stage.name: self.reasons(stage, outputs_kept=stage.name in targets) for stage in needed}
        return {name: reasons for name, reasons in found.items() if reasons}

    def reasons(self, stage: Stage, *, outputs_kept: bool = True) -> list[str]:
        """Why a stage must run, a line each; empty when its receipt stands.

        Unless `outputs_kept`, an output may be gone, but not another than the stage wrote.
        """
        receipt = self.receipt(stage)
        if receipt is None:
            return ["it has not run yet"]
        reasons = describe_changes(receipt["fingerprint"], self.fingerprint(stage))
        for path in stage.outputs:
            found = self._digest(self.folder / path)
            if found != receipt["outputs"].get(str(path)) and (outputs_kept or found is not None):
                reasons.append(f"output {path} is missing or not what this stage wrote")
        if not receipt["passed"]:
            reasons.append("its gate failed last time")
        return reasons

    def receipt(self, stage: Stage) -> dict[str, Any] | None:
        """The receipt of the stage's last complete run; None if there is none that can be read."""
        try:
            receipt: Any = json.loads(self._receipt_path(stage).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return None
        whole = isinstance(receipt, dict) and receipt.keys() >= {
            "fingerprint",
            "outputs",
            "passed",
            "seconds",
            "checks",
        }
        return receipt if whole else None

    def fingerprint(self, stage: Stage) -> dict[str, str]:
        """Everything the stage's outputs depend on, by name."""
        config = {
            f"configuration {stage.name}.{field.name}": getattr(stage.config, field.name)
            for field in fields(stage.config)
        }
        fingerprint = {name: json.dumps(value) for name, value in config.items()}
        for path in stage.sources:
            fingerprint |= {f"source {name}": digest for name, digest in self._source_digests(path).items()}
        for path in stage.inputs:
            fingerprint[f"input {path}"] = self._digest(self.folder / path) or self._recorded(path) or "not built yet"
        code, packages = imports_of(stage.module_file)
        fingerprint |= {f"code {file.relative_to(ROOT)}": self._digests.of(file) for file in code}
        fingerprint |= {f"package {name}": version for name, version in package_versions(packages).items()}
        return fingerprint | {"cpu": _compiled_for(stage) or platform.machine()}

    def _execute(self, stage: Stage, reasons: Sequence[str]) -> Outcome:
        say(f"{stage.name}: {stage.purpose}")
        say(f"  because {'; '.join(reasons[:3])}{f' (and {len(reasons) - 3} more)' if len(reasons) > 3 else ''}")
        fingerprint = self.fingerprint(stage)
        for path in stage.inputs:
            if not (self.folder / path).exists():
                raise InputError(f"{self.folder / path} is gone, and {stage.name} must read it after all: run again")
        paths = [ROOT / path for path in stage.sources] + [self.folder / path for path in stage.inputs]
        start = time.monotonic()
        with _disk_faults(self.folder):
            partial = self._partial(stage, fingerprint)
            run = importlib.import_module(f"pipeline.{stage.name}").run
            take_cores(stage.cores)
            arguments = (stage.config, *paths, *(partial / path for path in stage.outputs))
            checks: tuple[Check, ...] = tuple((as_served(run, *arguments) if stage.measures else run(*arguments)) or ())
            seconds = time.monotonic() - start
            self._publish(stage, partial)
            outputs = {str(path): self._digest(self.folder / path) for path in stage.outputs}
            passed = all(check.passed for check in checks)
            rows = [vars(check) for check in checks]
            receipt = {
                "passed": passed,
                "seconds": seconds,
                "checks": rows,
                "outputs": outputs,
                "fingerprint": fingerprint,
            }
            write_json(self._receipt_path(stage), receipt)
            self._digests.save()
        return Outcome(stage=stage.name, state="ran" if passed else "failed", seconds=seconds, checks=checks)

    def _unchanged(self, stage: Stage) -> Outcome:
        receipt = self.receipt(stage)
        assert receipt is not None, "a stage without a receipt has a reason to run"
        checks = tuple(Check(**row) for row in receipt["checks"])
        return Outcome(stage=stage.name, state="unchanged", seconds=receipt["seconds"], checks=checks)

    def _read_but_gone(self, stages: Sequence[Stage], targets: set[str], *, force: bool) -> set[str]:
        """The stages that must run again only because an output of theirs is gone and one that must run reads it."""
        stale: set[str] = set()
        for stage in stages:
            target = stage.name in targets
            if (force and target) or self._makers(stage) & stale or self.reasons(stage, outputs_kept=target):
                stale.add(stage.name)
        again: set[str] = set()
        for stage in reversed(stages):
            if stage.name in stale | again:
                gone = {path for path in stage.inputs if not (self.folder / path).exists()}
                again |= {maker.name for maker in stages if gone & set(maker.outputs)}
        return again

    def _makers(self, stage: Stage) -> set[str]:
        return {maker.name for maker in self.stages if set(maker.outputs) & set(stage.inputs)}

    def _recorded(self, path: Path) -> str | None:
        """The digest of an output that is gone, as the receipt of the stage that wrote it has it."""
        maker = next(stage for stage in self.stages if path in stage.outputs)
        receipt = self.receipt(maker)
        return receipt["outputs"].get(str(path)) if receipt and receipt["passed"] else None

    def _withdraw_dependents(self, failed: Stage) -> None:
        """Removes what an earlier build made behind this gate: a summary that says "passed" must not outlive it."""
        gone = set(failed.outputs)
        for stage in self.stages:
            if gone & set(stage.inputs):
                gone |= set(stage.outputs)
                self._receipt_path(stage).unlink(missing_ok=True)
                for path in stage.outputs:
                    _remove(self.folder / path)

    def _partial(self, stage: Stage, fingerprint: dict[str, str]) -> Path:
        """A place for the outputs, empty unless the stage can resume; from here on the old receipt no longer counts."""
        self._receipt_path(stage).unlink(missing_ok=True)
        partial = self.folder / ".partial" / stage.name
        begun = partial / "fingerprint.json"
        if stage.resumable and begun.exists() and json.loads(begun.read_text(encoding="utf-8")) == fingerprint:
            say("  going on where the last run ended")
            return partial
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_json(begun, fingerprint)
        for path in stage.outputs:
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
        return partial

    def _publish(self, stage: Stage, partial: Path) -> None:
        for path in stage.outputs:
            written, place = partial / path, self.folder / path
            assert written.exists(), f"stage {stage.name} did not write {path}"
            _sync(written)
            place.parent.mkdir(parents=True, exist_ok=True)
            _remove(place)
            written.replace(place)
        shutil.rmtree(partial)

    def _receipt_path(self, stage: Stage) -> Path:
        return self._receipts / f"{stage.name}.json"

    def _source_digests(self, path: Path) -> dict[str, str]:
        place = ROOT / path
        if place.is_file():
            return {str(path): self._digests.of(place)}
        if not place.is_dir():
            raise InputError(f"{path}: no such file or folder; check the configuration's paths")
        return {str(path / name): self._digests.of(place / name) for name in files_below(place)}

    def _digest(self, place: Path) -> str | None:
        """One digest of a file or of a whole folder; None if it does not exist."""
        if place.is_file():
            return self._digests.of(place)
        if not place.is_dir():
            return None
        lines = [f"{self._digests.of(place / name)}  {name}" for name in files_below(place)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One run at a time in a build folder."""
        with _disk_faults(self.folder):
            self._receipts.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("a+")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise InputError(
                    f"{self.folder}: another run (process {lock.read().strip() or 'unknown'}) is at work here; "
                    "wait for it or stop it"
                ) from None
            with _disk_faults(self.folder):
                os.truncate(lock.fileno(), 0)
                os.write(lock.fileno(), str(os.getpid()).encode())  # unbuffered, so that closing writes nothing
            yield


def _compiled_for(stage: Stage) -> str | None:
    """The CPU family whose programs a stage writes; None if it writes none, and its outputs serve every CPU alike."""
    cpu: str | None = getattr(stage.config, "cpu", None)
    return family() if cpu == "native" else cpu


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Forces a file, or every file of a folder, to the disk before a receipt vouches for it."""
    for file in [path] if path.is_file() else [path / name for name in files_below(path)]:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


@contextmanager
def _disk_faults(folder: Path) -> Iterator[None]:
    """Turns a full disk, however a library reports it, into one clear error."""
    try:
        yield
    except InputError:
        raise
    except Exception as fault:
        here = next(path for path in [folder, *folder.parents] if path.exists())
        free = shutil.disk_usage(here).free
        if "No space left" in str(fault) or free < 1 << 20:
            raise InputError(
                f"no space left on the disk of {here} ({free >> 20} MiB free): free some and run again; "
                "finished stages are kept"
            ) from fault
        raise
