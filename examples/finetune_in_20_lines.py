"""Draw a small data set, fine-tune Tiny Mantis on it on the CPU, and ask the adapter a question with plain peft."""

from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForImageTextToText

import mantis_lite
from mantis_lite.tiny import CHECKPOINT, tasks

data = Path("runs/example-data")
tasks.write(data, rows=256, held_out=8, seed=1)
settings = [f"data={data / 'train.jsonl'}", "run_dir=runs/example", "train.num_train_epochs=1"]
adapter = mantis_lite.train("quickstart", settings, from_scratch=True)

model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
model = PeftModel.from_pretrained(model, adapter)
trained, total = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n), model.num_parameters()
print(f"{adapter}: {trained:,} adapter weights beside {total - trained:,} of the model")
