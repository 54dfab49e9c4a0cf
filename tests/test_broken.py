"""Pictures that break in a run's workers are counted once each, whoever comes upon them, up to 1% of the rows."""

import json

import pytest
from helpers import by_size, chat, recipe, write_rows
from torch.utils.data import DataLoader

from mantis_lite.data.dataset import pack_dataset
from mantis_lite.data.packs import Packs
from mantis_lite.data.prepare import prepare, write_rejects
from mantis_lite.errors import SampleError
from mantis_lite.training.broken import Broken

ROWS = 400


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """400 rows with a picture, of which every 50th is cut short behind its header; one in 100 may be skipped."""
    folder = tmp_path_factory.mktemp("rows")
    path = write_rows(folder / "rows.jsonl", [chat("<image>", str(at), images=(at % 50,)) for at in range(ROWS)])
    for at in range(0, ROWS, 50):
        file = folder / f"rows-{at}-0.png"
        file.write_bytes(file.read_bytes()[:-600])
    made = recipe(data={"sources": path, "on_bad_row": "skip"}, packing={"max_length": 10_000})
    return prepare(made.data, made.packing, by_size())


def went_through(prepared, run_dir, packs: list[list[int]], workers: int) -> list[str]:
    """Encode packs in workers; the places in rejects.jsonl."""
    made = recipe(data={"sources": "unused.jsonl", "on_bad_row": "skip"}, run_dir=str(run_dir))
    write_rejects([], run_dir / "rejects.jsonl")
    dataset = pack_dataset(Packs.of(packs), prepared.train, by_size(), Broken(made, prepared))
    for _ in DataLoader(dataset, 1, num_workers=workers, collate_fn=len):
        pass
    return [json.loads(line)["where"] for line in (run_dir / "rejects.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_row_is_counted_once(prepared, tmp_path, workers):
    packs = [[at] for at in (0, 0, 50, 50, 0, 0, 100, 100, 150, 150)] * 8  # neighbours go to different workers
    found = went_through(prepared, tmp_path, packs, workers)
    assert sorted(found) == [f"rows.jsonl:{at + 1}" for at in (0, 100, 150, 50)]


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_1_percent_stop_the_run(prepared, tmp_path, workers):
    said = r"^rows\.jsonl:201: one of more than 4 rows .*, see .*rejects\.jsonl\n  The last: .* cannot be read"
    with pytest.raises(SampleError, match=said):
        went_through(prepared, tmp_path, [[at] for at in range(ROWS)], workers)
    found = [json.loads(line)["where"] for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert len(found) == len(set(found)) == 5
