"""Ask SmolVLM, an Idefics3 that fits any card, several things at once in one batch.

The name of a run, an adapter or another model behind the command asks that instead.
"""

import sys

from mantis_lite import MantisChat
from mantis_lite.tiny.tasks import drawn

chat = MantisChat(*sys.argv[1:] or ["HuggingFaceTB/SmolVLM-500M-Instruct"])
exercise, pictures = drawn(1)  # PNG files as bytes; paths do as well

asked = [{"text": "What is in <image>?", "images": [picture]} for picture in pictures]
for answer in chat.generate([*asked, {"text": "Which of these is odd?", "images": pictures}], max_new_tokens=64):
    print(answer)
