"""requirements-lock.txt has every package of requirements.txt at the same version, and a hash for each of its files."""

import re
from importlib.metadata import distribution
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def locked() -> dict[str, list[tuple[str, str, list[str]]]]:
    """Return version, marker and hashes of each entry, by the package's name."""
    text = re.sub(r"^#.*\n", "", (ROOT / "requirements-lock.txt").read_text(), flags=re.MULTILINE)
    packages: dict[str, list[tuple[str, str, list[str]]]] = {}
    for entry in re.split(r"\n(?! )", text.strip()):
        head, *hashes = (part.strip() for part in entry.split("\\\n"))
        found = re.fullmatch(r"([a-z0-9-]+)==([^ ;]+)(?: ; (.+))?", head)
        assert found, head
        assert hashes, head
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), head
        packages.setdefault(found[1], []).append((found[2], found[3] or "", hashes))
    return packages


def for_here(entries):
    return [version for version, marker, _ in entries if not marker or Marker(marker).evaluate()]


def test_every_pinned_requirement_is_locked_at_its_version():
    packages = locked()
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, pin = line.partition("==")
            assert for_here(packages[name]) == [pin], name


def test_everything_that_they_need_is_locked_too():
    packages, waiting, seen = locked(), ["torch", "snakemake", "diffusers", "transformers", "wandb", "peft"], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        assert for_here(packages[name]), name
        needed = [Requirement(text) for text in distribution(name).requires or []]
        waiting += [
            canonicalize_name(one.name) for one in needed if not one.marker or one.marker.evaluate({"extra": ""})
        ]
    assert len(seen) > 50


def test_the_lock_names_no_index_and_no_machine():
    assert not re.search(r"https?://|file:|@ |--index|--find-links", (ROOT / "requirements-lock.txt").read_text())
