"""What `make test-versions` installs is what pyproject.toml promises."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = ROOT / "pyproject.toml"


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text().splitlines()
    return {n: Version(v) for n, equals, v in (line.partition("==") for line in lines) if equals}


@pytest.mark.skipif(not PROJECT.is_file(), reason="runs in a checkout")
def test_the_floor_and_the_newest_are_what_is_promised():
    floor, latest, suite = pins("constraints-floor.txt"), pins("constraints-latest.txt"), pins("constraints.txt")
    needed = [Requirement(line) for line in tomllib.loads(PROJECT.read_text())["project"]["dependencies"]]
    assert {need.name for need in needed} == floor.keys() == latest.keys()
    for need in needed:
        [least] = [Version(clause.version) for clause in need.specifier if clause.operator == ">="]
        assert floor[need.name] == least or need.name == "torch", need.name
        assert need.specifier.contains(latest[need.name]) and latest[need.name] >= suite[need.name], need.name
