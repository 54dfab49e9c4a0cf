"""Draw a small data set with numbers as labels, train a score head on Tiny Mantis on the CPU, score new pictures."""

import json
from pathlib import Path

import mantis_lite
from mantis_lite.tiny import tasks

data, run = Path("runs/score-data"), Path("runs/score")
tasks.write(data, rows=1000, held_out=50, seed=1, exercise=tasks.how_many_alike, as_row=tasks.number_row)
settings = [f"data={data / 'train.jsonl'}", f"run_dir={run}", "task=classify", "head.problem=regression"]
mantis_lite.train("quickstart", [*settings, "prompt.system=null", "train.num_train_epochs=2"], from_scratch=True)

found = mantis_lite.predict(run, [f"data={data / 'held_out.jsonl'}"], metrics=True)
print({name: None if value is None else round(value, 3) for name, value in (found.metrics or {}).items()})
print(json.loads(found.file.read_text().splitlines()[0]))
