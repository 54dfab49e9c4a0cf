"""A Sample and a chat template -> the pieces of a prompt, each knowing whether it carries loss."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Literal, NamedTuple

from ..errors import RecipeError
from .sample import Image, Role, Sample, Turn, Video

NEVER = sys.maxsize
LabelRule = Literal["answer", "upstream"]


class Token(str):
    """A special token by name, as opposed to text that merely looks like one."""


class Piece(NamedTuple):
    """A stretch of a prompt: text, a special token, or a picture's place; characters from `loss_from` on carry loss."""

    content: str | Token | Image
    loss_from: int


@dataclass(frozen=True)
class Wrap:
    """What a family writes around a picture's own tokens.

    `before(j)` and `after(j)` are text about the j-th picture, counted from 1; `close` stands once after pictures that
    follow each other; `chunk` begins each stretch of text in a sample with pictures.
    """

    before: Callable[[int], str] = lambda j: ""
    after: Callable[[int], str] = lambda j: ""
    close: Token | None = None
    chunk: Token | None = None


@dataclass(frozen=True)
class Template:
    """How a conversation is written out: a header before each turn and what ends it, special tokens as `Token`.

    `gap` stands between a turn's end and the next header, whose loss it shares, and at the very end. With
    `blank_before_picture` off, a header's last blank is left out where a picture comes next. `marks` are spellings of
    what the template writes as text and no turn may hold.
    """

    name: str
    headers: Mapping[Role, tuple[str, ...]]
    ends: Mapping[Role, tuple[str, ...]]
    system: str = ""
    start: Token | None = None
    gap: str = ""
    blank_before_picture: bool = True
    marks: tuple[str, ...] = ()

    @cached_property
    def openings(self) -> dict[tuple[Role, bool], tuple[str, list[Piece], str]]:
        """Headers by role and whether they carry loss: text, finished pieces, and text that the turn goes on from."""
        return {(role, loss): self._opening(role, loss) for role in self.headers for loss in (False, True)}

    def _opening(self, role: Role, loss: bool) -> tuple[str, list[Piece], str]:
        parts = self.headers[role]
        tokens = [at for at, part in enumerate(parts) if isinstance(part, Token)]
        if not tokens:
            return "", [], "".join(parts)
        first, last = tokens[0], tokens[-1] + 1
        finished = [Piece(part, 0 if loss else NEVER) for part in parts[first:last]]
        return "".join(parts[:first]), finished, "".join(parts[last:])

    @property
    def end(self) -> Token:
        """The token that ends an answer; where its end is text, the one that starts a prompt."""
        return next(part for part in (*self.ends["assistant"], self.start) if isinstance(part, Token))

    @property
    def tokens(self) -> set[str]:
        parts = chain([self.start], *self.headers.values(), *self.ends.values())
        return {str(part) for part in parts if isinstance(part, Token)}


ROLES: tuple[Role, ...] = ("system", "user", "assistant")


def _all(*ends: str) -> dict[Role, tuple[str, ...]]:
    return dict.fromkeys(ROLES, ends)


LLAMA_3 = Template(
    name="llama_3",
    start=Token("<|begin_of_text|>"),
    headers={role: (Token("<|start_header_id|>"), role, Token("<|end_header_id|>"), "\n\n") for role in ROLES},
    ends=_all(Token("<|eot_id|>")),
    # Upstream's own words: the published weights were trained with them in front of every conversation.
    system="You are a pirate chatbot who always responds in pirate speak!",
)

MLLAVA_V1 = Template(
    name="mllava_v1",
    start=Token("<s>"),
    headers={"system": (), "user": ("USER: ",), "assistant": ("ASSISTANT: ",)},
    ends=_all(Token("</s>")),
    system="A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.",
)

# Upstream writes no blank after a role's colon, and the Mantis weights were trained so; the hub's own template does.
IDEFICS_2 = Template(
    name="idefics_2",
    start=Token("<s>"),
    headers={"system": ("System:",), "user": ("User:",), "assistant": ("Assistant:",)},
    ends=_all(Token("<end_of_utterance>")),
    gap="\n",
)

# Upstream's own text begins with this token and its tokenizer adds another; here there is one.
IDEFICS_3 = replace(IDEFICS_2, name="idefics_3", start=Token("<|begin_of_text|>"))

# As the hub's own templates write, and so for training on from the published weights instead of Mantis'.
IDEFICS_2_HUB = replace(
    IDEFICS_2,
    name="idefics_2_hub",
    headers={"system": ("System: ",), "user": ("User: ",), "assistant": ("Assistant: ",)},
    blank_before_picture=False,
)
IDEFICS_3_HUB = replace(IDEFICS_2_HUB, name="idefics_3_hub", start=IDEFICS_3.start)

SMOLVLM = replace(IDEFICS_2_HUB, name="smolvlm", start=Token("<|im_start|>"))

# The mark of an answer's beginning, <0x04>, is text: the tokenizer reads it so, and sees the two turns as one stretch.
MFUYU_V1 = Template(
    name="mfuyu_v1",
    headers={"system": (), "user": ("USER: ",), "assistant": ("ASSISTANT: ",)},
    ends={"system": ("\n",), "user": ("<0x04>",), "assistant": (Token("|ENDOFTEXT|"),)},
    system="You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language.",
    marks=("<0x04>", "\x04"),
)

QWEN2_VL = Template(
    name="qwen2_vl",
    headers={role: (Token("<|im_start|>"), f"{role}\n") for role in ROLES},
    ends=_all(Token("<|im_end|>")),
    gap="\n",
    system="You are a helpful assistant.",
)

QWEN3_VL = replace(QWEN2_VL, name="qwen3_vl", system="")

TEMPLATES = (
    *(LLAMA_3, MLLAVA_V1, IDEFICS_2, IDEFICS_3, IDEFICS_2_HUB, IDEFICS_3_HUB),
    *(SMOLVLM, MFUYU_V1, QWEN2_VL, QWEN3_VL),
)


def captions(chat: Template) -> Template:
    """How captions are written for a model whose conversations are written so: as they stand, each ended by its line.

    Upstream's PLAIN: no header and no system's words, and its tokenizer starts a prompt all the same.
    """
    return Template(name="plain", start=chat.start, headers={"assistant": ()}, ends={"assistant": ("\n",)})


def choose_template(name: str, family: Sequence[Template], vocabulary: Collection[str]) -> Template:
    """The template a recipe names, or for "auto" and "hub" the one of `family` whose special tokens the checkpoint has.

    Raises RecipeError where the checkpoint lacks the template's tokens.
    """
    if name not in ("auto", "hub"):
        template = next(t for t in TEMPLATES if t.name == name)
        if missing := sorted(template.tokens.difference(vocabulary)):
            raise RecipeError(
                f"prompt.template: {name} needs the tokens {', '.join(missing)}, which this tokenizer lacks\n"
                "  Set prompt.template=auto to choose by the tokens."
            )
        return template
    fitting = [t for t in family if t.tokens <= set(vocabulary)]
    if len(fitting) != 1:
        found = " and ".join(t.name for t in fitting) or "none"
        raise RecipeError(
            f"prompt.template: {name} needs one template whose tokens the checkpoint has, found {found}\n"
            f"  Set prompt.template to one of {', '.join(t.name for t in TEMPLATES)}."
        )
    return fitting[0]


def render(sample: Sample, template: Template, system: str | None, labels: LabelRule, wrap: Wrap) -> list[Piece]:
    """Write a sample out as pieces.

    `system` replaces the template's words ("" leaves the turn out); a row's own system turn replaces both.
    `labels` is "answer" (the answer and its end token) or "upstream" (the assistant's header as well).
    """
    return _turns(sample, template, system, labels, wrap).finished()


def prompt(sample: Sample, template: Template, system: str | None, wrap: Wrap) -> list[Piece]:
    """Write a sample's turns out, without loss, and the header of the answer that is to be generated."""
    pieces = _turns(sample, template, system, "answer", wrap)
    for part in template.headers["assistant"]:
        # As upstream: "ASSISTANT:" without its blank, which belongs to the answer's first word.
        pieces.add(part if isinstance(part, Token) else part.rstrip(" "), False)
    return [piece._replace(loss_from=NEVER) for piece in pieces.finished()]


def plain(sample: Sample, template: Template, wrap: Wrap) -> list[Piece]:
    """Write what a sample's turns hold without headers or ends, as the original writes what is to be scored."""
    pieces = _Pieces(wrap, bool(sample.images))
    if template.start:
        pieces.add(template.start, False)
    for turn in sample.turns:
        for content in turn.content:
            assert not isinstance(content, Video)
            pieces.add(content, False)
    return pieces.finished()


def _turns(sample: Sample, template: Template, system: str | None, labels: LabelRule, wrap: Wrap) -> _Pieces:
    words = template.system if system is None else system
    turns = sample.turns
    if turns[0].role != "system" and words:
        turns = (Turn("system", (words,)), *turns)
    pieces = _Pieces(wrap, bool(sample.images))
    if template.start:
        pieces.add(template.start, False)
    for number, turn in enumerate(turns):
        answer = turn.role == "assistant"
        header_loss = answer and labels == "upstream"
        lead, finished, text = template.openings[turn.role, header_loss]
        pieces.add_text(template.gap + lead if number else lead, header_loss)
        pieces.extend(finished)
        if not template.blank_before_picture and turn.content and isinstance(turn.content[0], Image):
            text = text.rstrip(" ")
        pieces.add_text(text, header_loss)
        for content in turn.content:
            assert not isinstance(content, Video)  # laid out as pictures before
            pieces.add(content, answer)
        for part in template.ends[turn.role]:
            pieces.add(part, answer)
    pieces.add_text(template.gap, False)
    return pieces


class _Pieces:
    """Collects parts, joining text with text: a tokenizer must see it whole."""

    def __init__(self, wrap: Wrap, pictures: bool) -> None:
        self.wrap = wrap
        self.pieces: list[Piece] = []
        self.images = 0
        self.text, self.loss_from = "", NEVER
        self.chunk = wrap.chunk if pictures else None
        self.begins = True  # whether a stretch of text begins here, after a picture or at the start
        self.plain = not (wrap.close or self.chunk)

    def add(self, part: str | Token | Image, loss: bool) -> None:
        if isinstance(part, Image):
            self.images += 1
            self.add_text(self.wrap.before(self.images), loss)
            self._flush()
            self.pieces.append(Piece(part, NEVER))
            self.begins = True
            self.add_text(self.wrap.after(self.images), loss)
        elif isinstance(part, Token):
            self._flush()
            self._append(part, 0 if loss else NEVER)
        else:
            self.add_text(part, loss)

    def extend(self, finished: list[Piece]) -> None:
        """Add pieces that stand between tokens, and so need no joining."""
        if finished:
            self._flush()
            if self.plain:
                self.pieces += finished
            else:
                for piece in finished:
                    self._append(*piece)

    def add_text(self, text: str, loss: bool) -> None:
        if loss and self.loss_from == NEVER:
            self.loss_from = len(self.text)
        self.text += text

    def finished(self) -> list[Piece]:
        self._flush()
        if self.wrap.close and isinstance(self.pieces[-1].content, Image):
            self.pieces.append(Piece(self.wrap.close, NEVER))
        return self.pieces

    def _flush(self) -> None:
        if self.text:
            self._append(self.text, self.loss_from)
        self.text, self.loss_from = "", NEVER

    def _append(self, content: str | Token | Image, loss_from: int) -> None:
        if self.plain:
            self.pieces.append(Piece(content, loss_from))
            return
        if self.wrap.close and self.pieces and isinstance(self.pieces[-1].content, Image):
            self.pieces.append(Piece(self.wrap.close, NEVER))
        if self.chunk and self.begins:
            self.pieces.append(Piece(self.chunk, NEVER))
        self.begins = False
        self.pieces.append(Piece(content, loss_from))
