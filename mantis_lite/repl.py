"""A conversation at a terminal: lines in, answers out, and words that begin with a slash."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from .chat import MantisChat
from .errors import MantisError, RecipeError, did_you_mean

HELP = """/image FILE...   pictures for the next turn; <image> in its text says where, else they come first
/video FILE...   clips, the same
/undo            forget the last turn, or what was added to the next
/reset           forget everything
/save FILE       write the conversation as a row of chat data
/help, /quit"""

COMMANDS = ("/image", "/video", "/undo", "/reset", "/save", "/help", "/quit", "/exit")


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

    def read(self, lines: Iterable[str]) -> int:
        """Take lines to their end, or to /quit; what is wrong with one is shown, and the next is read.

        The exit code of the first that something was wrong with, else 0.
        """
        code = 0
        for line in lines:
            if line.strip() in ("/quit", "/exit"):
                break
            try:
                self.take(line.strip())
            except (MantisError, OSError) as error:
                self.show((json.dumps({"error": str(error)}) if self.as_json else str(error)) + "\n")
                code = code or getattr(error, "exit_code", MantisError.exit_code)
            except KeyboardInterrupt:  # the answer so far stands
                self.show("\n")
        return code

    def take(self, line: str) -> None:
        """Take one line: a command, or what is asked. Raises RecipeError, SampleError, OSError."""
        if not line.startswith("/"):
            if line or self.images or self.videos:
                self.ask(line)
            return
        match _words(line):
            case ["/image", _, *_] as words:
                self.images += words[1:]
            case ["/video", _, *_] as words:
                self.videos += words[1:]
            case ["/reset"]:
                self.chat.reset()
                self._forget()
            case ["/undo"]:
                if not self._forget() and not self.chat.undo():
                    self.note("nothing was said yet")
            case ["/save", file]:
                self.note(f"saved {self.chat.save(file)}")
            case ["/help"]:
                self.note(HELP)
            case [command, *words]:
                wrong = f"cannot be given {len(words)} names" if command in COMMANDS else "no such command"
                near = "" if command in COMMANDS else did_you_mean(command, COMMANDS)
                raise RecipeError(f"{command}: {wrong}{near}\n  /help lists what can be typed.")

    def ask(self, text: str) -> None:
        """Show the answer to a text, with the pictures and clips that were added. Raises RecipeError, SampleError.

        What was added stays where there is no answer, as another line would be asked without it.
        """
        images, videos = added = self.images, self.videos
        self.images, self.videos = [], []
        pieces = self.chat.stream(text, images, videos, **self.settings)
        try:
            first = next(pieces, "")
        except (MantisError, OSError):
            self.images, self.videos = added
            raise
        answer = chain([first], pieces)
        if self.as_json:
            line = {"prompt": text, "images": images, "videos": videos, "answer": "".join(answer)}
            # A name that is no UTF-8 has halves of characters for its bytes, which are JSON as escapes alone.
            self.show(json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace").decode() + "\n")
            return
        for piece in answer:
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


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise RecipeError(f"{line}: {error}\n  Put names with quotes in them in quotes.") from None
