"""A file of rows is prepared without being held in memory."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import picture

SIZE = 96 << 20
MOST = 32 << 20
"""Bytes of memory that reading it may take besides what the libraries take."""

IN_A_PROCESS = """
import resource, sys
from helpers import by_size, recipe
from mantis_lite.data.prepare import prepare

def held():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

found = recipe(data=sys.argv[1], packing={"max_length": 10_000})
encoder, before = by_size(), held()
prepared = prepare(found.data, found.packing, encoder)
print(len(prepared.train), held() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in other units elsewhere")
@pytest.mark.parametrize("name", ["rows.jsonl", pytest.param("rows.json", marks=pytest.mark.slow)])
def test_96_mb_are_prepared_in_32_mib(tmp_path, name):
    """A third of it; rows of 24 KB, most of them a picture."""
    uri = "data:image/png;base64," + base64.b64encode(picture(1, 80, 75)).decode()
    rows = SIZE // len(uri) + 1
    with (tmp_path / name).open("w") as file:
        for at in range(rows):
            turns = [{"role": "user", "content": f"<image> {at}"}, {"role": "assistant", "content": "ho"}]
            row = json.dumps({"id": at, "images": [uri], "messages": turns})
            file.write(row + "\n" if name.endswith("l") else f"{',' if at else '['}\n{row}")
        file.write("" if name.endswith("l") else "\n]\n")
    assert os.path.getsize(tmp_path / name) > SIZE
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    command = [sys.executable, "-c", IN_A_PROCESS, str(tmp_path / name)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, taken = map(int, done.stdout.split()[-2:])
    assert count == rows and taken < MOST, taken
