"""The verdicts of all gates as one statement about an image, to be attested on its digest.

An attestation binds a JSON predicate to a digest with a signature. Whoever pulls the image reads there, without
trusting its tag or its registry, that these weights passed these gates with these numbers.
"""

from pathlib import Path
from typing import Any

from model.artifact import MANIFEST, file_digest, manifest_digest, read_json
from pipeline.image.contents import OWN

GATES = ("quality", "replies", "latency", "cache")
REMEDY = 'run "python -m pipeline run"'


def predicate(build: Path, reports: list[Path], digest: str | None) -> tuple[dict[str, Any], list[str]]:
    """The statement, and what is wrong with it in words: a gate that failed, an image made of another build.

    `digest` is the one to be attested: reports about another are none about it.
    """
    paths = [build / f"reports/{gate}.json" for gate in GATES] + reports
    read = [(path, read_json(path, REMEDY)) for path in paths]
    engine, certificate = read_json(build / "engine" / MANIFEST), read_json(build / "certificate.json", REMEDY)
    manifest = f"sha256:{manifest_digest(build / 'engine')}"
    faults = [f"{path}: its gate failed" for path, report in read if report.get("passed") is not True]
    for path, report in read[len(GATES) :]:
        if report.get("gate") != "image" or "digest" not in report:
            faults.append(f"{path}: no report of verifying an image by its digest")
        elif digest not in (None, report["digest"]):
            faults.append(f"{path}: it is about {report['digest']}, and {digest} was to be attested")
        elif report["labels"].get(f"{OWN}.model.manifest") != manifest:
            faults.append(f"{path}: its image holds another model than {build}")
        elif report["labels"].get(f"{OWN}.certificate") != (
            certificate["seal"] if certificate["certified"] else "none"
        ):
            faults.append(f"{path}: its image holds another certificate than {build}")
    statement = {
        "model": {
            **{name: engine[name] for name in ("model_id", "licence", "source", "recipe", "cpu", "torch")},
            "manifest": manifest,
        },
        "certificate": {name: certificate[name] for name in ("certified", "confidence", "risk", "false_hits", "seal")},
        "gates": [
            {
                "gate": report["gate"],
                "passed": report["passed"],
                "checks": report["checks"],
                "report": f"sha256:{file_digest(path)}",
                **({"digest": report["digest"]} if "digest" in report else {}),
            }
            for path, report in read
        ],
    }
    return statement, faults
