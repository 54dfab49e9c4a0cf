"""Ask Qwen2.5-VL about pictures, with answers drawn at a temperature and the same for a seed.

The name of a run, an adapter or another model behind the command asks that instead.
"""

import sys

from mantis_lite import MantisChat
from mantis_lite.tiny.tasks import drawn

chat = MantisChat(*sys.argv[1:] or ["Qwen/Qwen2.5-VL-3B-Instruct"])
exercise, pictures = drawn(1)  # PNG files as bytes; paths do as well

print(chat("What do they show?", images=pictures, temperature=0.7, top_p=0.9, seed=1))
chat.undo()
print(chat("What do they show?", images=pictures, temperature=0.7, top_p=0.9, seed=2))
