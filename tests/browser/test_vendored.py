"""What the page brings along is what its authors published, and says under which licence."""

import hashlib
import re

from tests.conftest import ROOT

VENDOR = ROOT / "serving/web/vendor"
ROW = re.compile(r"\| `(?P<file>\S+)` \|.*`(?P<licence>\S+\.LICENSE)` \| `(?P<digest>[0-9a-f]{64})` \|")


def test_every_vendored_file_has_its_digest_and_licence() -> None:
    rows = list(ROW.finditer((VENDOR / "README.md").read_text(encoding="utf-8")))
    told = {row["file"]: row["digest"] for row in rows}
    licences = {row["licence"] for row in rows}
    assert {file.name for file in VENDOR.iterdir()} == {"README.md", *told, *licences}
    for name, digest in told.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest, name


def test_the_page_names_no_other_place() -> None:
    """Nothing but the prose of comments and the licences has an address in it."""
    own = [file for file in VENDOR.parent.iterdir() if file.suffix in (".html", ".js", ".css")]
    assert len(own) >= 12
    for file in own:
        addresses = re.findall(r"https?://[^\s\"']+", file.read_text(encoding="utf-8"))
        assert addresses == [], file
