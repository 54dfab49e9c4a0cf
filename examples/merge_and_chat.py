"""Fine-tune Tiny Mantis on the CPU, merge the adapter into it, and ask the merged model."""

import shutil
from pathlib import Path

import mantis_lite
from mantis_lite.merge import merge
from mantis_lite.tiny import tasks

data, run = Path("runs/merge-data"), Path("runs/merge")
tasks.write(data, rows=256, held_out=8, seed=1)
settings = [f"data={data / 'train.jsonl'}", f"data.eval={data / 'held_out.jsonl'}", f"run_dir={run}"]
mantis_lite.train("quickstart", [*settings, "train.num_train_epochs=1"], from_scratch=True)

shutil.rmtree("runs/merged", ignore_errors=True)
merged = merge(run, "runs/merged")
print(f"{merged.folder}: agrees with the adapter at {merged.agreement.share:.1%} of positions")

exercise, pictures = tasks.drawn(1)
for model in (run, merged.folder):
    print(model, "says", mantis_lite.MantisChat(model)(exercise.question, images=pictures, max_new_tokens=20))
