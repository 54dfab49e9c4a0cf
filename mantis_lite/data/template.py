"""A Sample and a chat template -> the pieces of a prompt, each knowing whether it carries loss."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from ..errors import RecipeError
from .schema import Image, Role, Sample, Turn

NEVER = sys.maxsize
LabelRule = Literal["answer", "upstream"]
Wrap = Callable[[int], tuple[str, str]]


class Token(str):
    """A special token by name, as opposed to text that merely looks like one."""


class Piece(NamedTuple):
    """A stretch of a prompt: text, a special token, or a picture's place; characters from `loss_from` on carry loss."""

    content: str | Token | Image
    loss_from: int


@dataclass(frozen=True)
class Template:
    """How a conversation is written out: a header before and a token after each turn."""

    name: str
    start: Token
    headers: Mapping[Role, tuple[str, ...]]
    end: Token
    system: str

    @cached_property
    def openings(self) -> dict[tuple[Role, bool], tuple[list[Piece], str]]:
        """A turn's header by role and whether it carries loss: finished pieces, and the text the turn goes on from."""
        return {(role, loss): self._opening(role, loss) for role in self.headers for loss in (False, True)}

    def _opening(self, role: Role, loss: bool) -> tuple[list[Piece], str]:
        parts = list(self.headers[role])
        text = parts.pop() if parts and not isinstance(parts[-1], Token) else ""
        return [Piece(part, 0 if loss else NEVER) for part in parts], text

    @property
    def tokens(self) -> set[str]:
        parts = [self.start, self.end, *(part for header in self.headers.values() for part in header)]
        return {str(part) for part in parts if isinstance(part, Token)}


def _llama_3_header(role: Role) -> tuple[str, ...]:
    return Token("<|start_header_id|>"), role, Token("<|end_header_id|>"), "\n\n"


LLAMA_3 = Template(
    name="llama_3",
    start=Token("<|begin_of_text|>"),
    headers={role: _llama_3_header(role) for role in ("system", "user", "assistant")},
    end=Token("<|eot_id|>"),
    # Upstream's own words: the published weights were trained with them in front of every conversation.
    system="You are a pirate chatbot who always responds in pirate speak!",
)

MLLAVA_V1 = Template(
    name="mllava_v1",
    start=Token("<s>"),
    headers={"system": (), "user": ("USER: ",), "assistant": ("ASSISTANT: ",)},
    end=Token("</s>"),
    system="A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.",
)


def choose_template(name: str, vocabulary: Collection[str]) -> Template:
    """The template a recipe names, or for "auto" the one whose special tokens the checkpoint has.

    Raises RecipeError where the checkpoint lacks the template's tokens.
    """
    templates = (LLAMA_3, MLLAVA_V1)
    if name != "auto":
        template = next(t for t in templates if t.name == name)
        if missing := sorted(template.tokens.difference(vocabulary)):
            raise RecipeError(
                f"prompt.template: {name} needs the tokens {', '.join(missing)}, which this tokenizer lacks\n"
                "  Set prompt.template=auto to choose by the tokens."
            )
        return template
    fitting = [t for t in templates if t.tokens <= set(vocabulary)]
    if len(fitting) != 1:
        found = " and ".join(t.name for t in fitting) or "none"
        raise RecipeError(
            f"prompt.template: auto needs one template whose tokens the checkpoint has, found {found}\n"
            f"  Set prompt.template to one of {', '.join(t.name for t in templates)}."
        )
    return fitting[0]


def render(sample: Sample, template: Template, system: str | None, labels: LabelRule, wrap: Wrap) -> list[Piece]:
    """Write a sample out as pieces.

    `system` replaces the template's words ("" leaves the turn out); a row's own system turn replaces both.
    `labels` is "answer" (the answer and its end token) or "upstream" (the assistant's header as well). `wrap(j)` gives
    the text before and after the j-th picture, counted from 1.
    """
    pieces = _Pieces(wrap)
    pieces.end(template.start, False)
    words = template.system if system is None else system
    if sample.turns[0].role != "system" and words:
        _add_turn(pieces, Turn("system", (words,)), template, labels)
    for turn in sample.turns:
        _add_turn(pieces, turn, template, labels)
    return pieces.pieces


def prompt(sample: Sample, template: Template, system: str | None, wrap: Wrap) -> list[Piece]:
    """Write a sample's turns out, without loss, and the header of the answer that is to be generated."""
    pieces = [piece._replace(loss_from=NEVER) for piece in render(sample, template, system, "answer", wrap)]
    for part in template.headers["assistant"]:
        # As upstream: "ASSISTANT:" without its blank, which belongs to the answer's first word.
        pieces.append(Piece(part if isinstance(part, Token) else part.rstrip(" "), NEVER))
    return pieces


def _add_turn(pieces: _Pieces, turn: Turn, template: Template, labels: LabelRule) -> None:
    answer = turn.role == "assistant"
    finished, text = template.openings[turn.role, answer and labels == "upstream"]
    pieces.pieces += finished
    pieces.add(text, answer and labels == "upstream")
    for part in turn.content:
        pieces.add(part, answer)
    pieces.end(template.end, answer)


class _Pieces:
    """Collects parts, joining text with text: a tokenizer must see it whole."""

    def __init__(self, wrap: Wrap) -> None:
        self.wrap = wrap
        self.pieces: list[Piece] = []
        self.images = 0
        self.text, self.loss_from = "", NEVER

    def add(self, part: str | Image, loss: bool) -> None:
        if isinstance(part, Image):
            self.images += 1
            before, after = self.wrap(self.images)
            self._add_text(before, loss)
            self._flush()
            self.pieces.append(Piece(part, NEVER))
            self._add_text(after, loss)
        else:
            self._add_text(part, loss)

    def end(self, token: Token, loss: bool) -> None:
        """Close a stretch of text with a special token; every turn ends with one."""
        self._flush()
        self.pieces.append(Piece(token, 0 if loss else NEVER))

    def _add_text(self, text: str, loss: bool) -> None:
        if loss and self.loss_from == NEVER:
            self.loss_from = len(self.text)
        self.text += text

    def _flush(self) -> None:
        if self.text:
            self.pieces.append(Piece(self.text, self.loss_from))
        self.text, self.loss_from = "", NEVER
