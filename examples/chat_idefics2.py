"""Ask Mantis-8B-Idefics2 about three pictures, then about another one.

The name of a run, an adapter or another model behind the command asks that instead.
"""

import sys

from mantis_lite import MantisChat
from mantis_lite.tiny.tasks import drawn

chat = MantisChat(*sys.argv[1:] or ["TIGER-Lab/Mantis-8B-Idefics2"], bits=4)
exercise, pictures = drawn(1)  # PNG files as bytes; paths do as well

print(chat("<image><image><image>What do these pictures have in common?", images=(pictures * 2)[:3]))
print(chat("And which of them is most like this one?", images=pictures[:1]))
print(chat.history)
