"""`mantis-lite check` names every bad row and file of a corpus with its reason, no other, and not only the first."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import corpus
import corpus_rows
import pytest
from helpers import SHARED
from ruamel.yaml import YAML

from mantis_lite.recipe_file import load_recipe
from mantis_lite.report.check import check

EXAMPLES = SHARED / "data/mantis-examples"


@dataclass
class Corpus:
    """A recipe whose data is all of the corpus; what is bad, by its place; and the places that only decoding finds."""

    recipe: Path
    bad: dict[str, str]
    late: set[str]
    rows: int


def write_recipe(file: Path, model: Path, sources: list[Path], **settings) -> Path:
    own = {"model": str(model), "task": "video", "method": "lora", "run_dir": "run", "media": {"num_frames": 4}}
    own |= {"packing": {"max_length": 100_000}, "data": [str(source) for source in sources]}
    YAML().dump(own | settings, file)
    return file


@pytest.fixture(scope="module")
def written(tmp_path_factory, folder_of) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    cases, lines = corpus.write(folder), [*corpus_rows.sound(), *corpus_rows.bad()]
    lines = lines[::2] + lines[1::2]
    corpus.write_rows(cases, folder / "media.json")
    corpus_rows.write_lines(lines, folder / "rows.jsonl")
    files = corpus_rows.write_bad_files(folder)
    bad = {f"media.json:{at}": case.expected for at, case in enumerate(cases, 1) if case.expected}
    bad |= {f"rows.jsonl:{2 * at + 1}": line.expected for at, line in enumerate(lines) if line.expected}
    bad |= {file.path.name: file.expected for file in files}
    late = {f"media.json:{at}" for at, case in enumerate(cases, 1) if case.late}
    sources = [folder / "rows.jsonl", *(file.path for file in files), folder / "media.json"]
    recipe = write_recipe(folder / "recipe.yaml", folder_of("idefics2"), sources)
    return Corpus(recipe, bad, late, len(cases) + len(lines))


def same(said: dict[str, str], expected: dict[str, str]) -> None:
    found = {Path(where).name: words for where, words in said.items()}
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for where, words in expected.items():
        assert words in found[where], where


def test_check_names_all_that_is_bad_and_nothing_else(written, tmp_path):
    command = [sys.executable, "-m", "mantis_lite", "check", str(written.recipe), "--output=rejects.jsonl"]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, timeout=280)
    said = done.stdout.decode()
    assert (done.returncode, done.stderr) == (3, b"")
    lines = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [*lines[0]] == ["where", "id", "found", "remedy"] and all(line["remedy"] for line in lines)
    same({line["where"]: line["found"] for line in lines}, written.bad)
    assert len(lines) == len(written.bad)
    sound = written.rows - sum(":" in place for place in written.bad)
    assert f"{written.rows} rows read, {sound} to train on, {len(written.bad)} rejected" in said
    assert said.count("\nrejected ") == 20 and f"\nand {len(written.bad) - 20} more; --output=rejects.jsonl" in said
    assert "an answer is blank" in said and "\x1b" not in said
    assert list(tmp_path.iterdir()) == [tmp_path / "rejects.jsonl"]
    again = subprocess.run(command, capture_output=True, cwd=tmp_path, text=True)
    assert (again.returncode, again.stderr) == (
        2,
        "RecipeError: --output: rejects.jsonl exists already\n  Name another file.\n",
    )


def test_quick_reads_headers_alone(written):
    found = check(load_recipe(written.recipe), decode=False)
    early = {where: words for where, words in written.bad.items() if where not in written.late}
    same({reject.where: reject.found for reject in found.prepared.rejects}, early)


def test_without_a_sound_row_there_is_nothing_to_show(tmp_path, folder_of):
    corpus_rows.write_lines(corpus_rows.bad()[:3], tmp_path / "rows.jsonl")
    recipe = write_recipe(tmp_path / "recipe.yaml", folder_of("idefics2"), [tmp_path / "rows.jsonl"])
    found = check(load_recipe(recipe))
    assert found.outlook is None and len(found.prepared.rejects) == 3


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the shared data is not beside this checkout")
@pytest.mark.parametrize(
    ("name", "settings", "bad"),
    [
        ("chat", {"task": "chat", "media": {}}, 0),
        ("chat_video", {}, 1),
        ("classification", {"task": "classify", "media": {}, "head": {"problem": "regression"}}, 0),
    ],
)
def test_the_examples_lack_one_clip(tmp_path, folder_of, name, settings, bad):
    recipe = write_recipe(tmp_path / "a.yaml", folder_of("idefics2"), [EXAMPLES / name / "train.json"], **settings)
    found = check(load_recipe(recipe)).prepared
    assert [reject.found.partition(":")[0] for reject in found.rejects] == ["no such file"] * bad
    assert len(found.train) == found.rows_read - bad > 0
