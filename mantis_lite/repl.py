"""A conversation at a terminal: lines in, answers out, and words that begin with a slash."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from .chat import MantisChat
from .errors import MantisError

HELP = """/image FILE...   pictures for the next turn; <image> in its text says where, else they come first
/video FILE...   clips, the same
/undo            forget the last turn, or what was added to the next
/reset           forget everything
/save FILE       write the conversation as a row of chat data
/help, /quit"""


@dataclass
class Repl:
    """Reads lines into a chat; `show` is given each piece of text as it comes, `settings` go to the chat.

    With `as_json` an answer is one line of JSON, and nothing else is shown.
    """

    chat: MantisChat
    show: Callable[[str], None]
    settings: dict[str, Any] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    videos: list[str] = field(default_factory=list)
    as_json: bool = False

    @property
    def prompt(self) -> str:
        """What stands before the user's line."""
        counts = ((len(self.images), "picture"), (len(self.videos), "clip"))
        added = ", ".join(f"{count} {what}{'s' * (count > 1)}" for count, what in counts if count)
        return f"[{added}] > " if added else "> "

    def read(self, lines: Iterable[str]) -> None:
        """Take lines to their end, or to /quit; what is wrong with one is shown, and the next is read."""
        for line in lines:
            if line.strip() in ("/quit", "/exit"):
                return
            try:
                self.take(line.strip())
            except (MantisError, OSError) as error:
                self.show((json.dumps({"error": str(error)}) if self.as_json else str(error)) + "\n")
            except KeyboardInterrupt:  # the answer so far stands
                self.show("\n")

    def take(self, line: str) -> None:
        """Take one line: a command, or what is asked. Raises SampleError, OSError."""
        if not line.startswith("/"):
            if line or self.images or self.videos:
                self.ask(line)
            return
        try:
            command, *words = shlex.split(line)
        except ValueError as error:
            self.note(f"{line}: {error}; put names with quotes in them in quotes")
            return
        if command == "/image" and words:
            self.images += words
        elif command == "/video" and words:
            self.videos += words
        elif command == "/reset":
            self.chat.reset()
            self._forget()
        elif command == "/undo":
            if not self._forget() and not self.chat.undo():
                self.note("nothing was said yet")
        elif command == "/save" and len(words) == 1:
            self.note(f"saved {self.chat.save(words[0])}")
        else:
            self.note(HELP)

    def ask(self, text: str) -> None:
        """Show the answer to a text, with the pictures and clips that were added. Raises SampleError."""
        added = (list(self.images), list(self.videos))
        self._forget()
        pieces = self.chat.stream(text, *added, **self.settings)
        if self.as_json:
            answer = "".join(pieces)
            line = {"prompt": text, "images": added[0], "videos": added[1], "answer": answer}
            self.show(json.dumps(line, ensure_ascii=False) + "\n")
            return
        for piece in pieces:
            self.show(piece)
        self.show("\n")

    def note(self, text: str) -> None:
        """Show what is no answer."""
        if not self.as_json:
            self.show(f"{text}\n")

    def _forget(self) -> bool:
        """Take back what was added to the next turn; whether there was anything."""
        found = bool(self.images or self.videos)
        self.images.clear()
        self.videos.clear()
        return found
