"""Ask Mantis-8B-siglip-llama3 about two pictures, in two turns.

The name of a run, an adapter or another model behind the command asks that instead.
"""

import sys

from mantis_lite import MantisChat
from mantis_lite.tiny.tasks import drawn

chat = MantisChat(*sys.argv[1:] or ["TIGER-Lab/Mantis-8B-siglip-llama3"], bits=4)
exercise, pictures = drawn(1)  # PNG files as bytes; paths do as well

print(chat("Describe the difference of <image> and <image> as much as you can.", images=pictures[:2]))
for piece in chat.stream("How many objects are in image 1 and in image 2?"):
    print(piece, end="", flush=True)
print()
