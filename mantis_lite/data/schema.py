"""One row of any accepted spelling -> one Sample. All checks of a row's shape happen here, once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any, cast

from ..errors import SampleError
from ..recipe import Task
from .columns import Fault, clips_of, kind_of, pictures_of, read_base64, read_clip, read_image, short
from .paths import MediaFolder
from .sample import Image, Role, Sample, Turn, Video


class Mark(Enum):
    """A place in a row's text for its next picture or clip."""

    IMAGE = "<image>"
    VIDEO = "<video>"


TURNS = ("conversation", "conversations", "messages")
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
SPEAKERS = ("from", "role")
CONTENTS = ("content", "text", "value")
ALTERNATE = ("user", "assistant")
A_TURN = '{"role": "user", "content": "..."}'


def parse(row: Mapping[str, Any], where: str, root: MediaFolder | None, task: Task = "chat") -> Sample:
    """Read one row, whose files lie in `root`; without one it may have none. Raises SampleError.

    "<image>" in a turn's text is a mark, unless the turn is a list of typed parts or the row has no picture: there it
    stays text. "<video>" is one wherever the task reads clips, and never stays text there. A row of "classify" has one
    turn, its prompt; one of "pretrain" has its first answer, a caption. "id" only names a row in messages: several may
    have the same.
    """
    root = root or MediaFolder()
    try:
        if not isinstance(row, Mapping):
            raise Fault(f"the row is {kind_of(row)}", 'Give {"images": [...], "messages": [...]}.')
        read, notices = _READERS[task](row, root)
        labels = _labels(row) if task == "classify" else None
        _refuse_half_characters(read)
    except Fault as fault:
        raise SampleError(where, fault.found, fault.remedy, _id(row)) from None
    sample = Sample(where, _id(row), read, notices, labels)
    if root.urls and root.fetches(sample):
        return replace(sample, notices=(*notices, "pictures are behind links: they were fetched, and are kept"))
    return sample


def user_turn(text: str, images: Sequence[Image] = (), videos: Sequence[Video] = ()) -> Turn:
    """What a user asks of pictures and clips: at their marks in the text, or in front of it. Raises Fault.

    A mark of what is not given is text.
    """
    given: _Media = {Mark.VIDEO: videos, Mark.IMAGE: images}
    turns: _Turns = [("user", _split(text, tuple(mark for mark in given if given[mark])))]
    (turn,) = _pair(turns, given)
    _refuse_half_characters((turn,))
    return turn


def _chat(row: Mapping[str, Any], root: MediaFolder) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    turns, notices = _turns(row, root, (Mark.IMAGE,))
    images, ignored = pictures_of(row, root)
    literal = () if images else _marks_as_text(row, turns)
    return _pair(turns, {Mark.IMAGE: images}), notices + ignored + literal


def _video(row: Mapping[str, Any], root: MediaFolder) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """As chat, with clips; pictures that no mark asks for, in a row without a clip, are one clip's frames."""
    turns, notices = _turns(row, root, tuple(Mark))
    images, ignored = pictures_of(row, root)
    videos = clips_of(row, root)
    if images and not videos and not _holds_media(turns) and not _count_of(turns, Mark.IMAGE):
        images, videos = [], [Video(tuple(images))]
    literal = () if images else _marks_for_clips(turns, videos) or _marks_as_text(row, turns)
    return _pair(turns, {Mark.VIDEO: videos, Mark.IMAGE: images}), notices + ignored + literal


def _classify(row: Mapping[str, Any], root: MediaFolder) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """The prompt with its pictures and clips; as upstream, those without a mark stand behind it, a blank after each."""
    if row.get("prompt") is None and (key := next((key for key in TURNS if row.get(key) is not None), None)):
        raise Fault(
            f'this is a chat row: it has "{key}" and no "prompt"',
            'task=classify reads "prompt" and "labels"; train on turns with task=chat.',
        )
    prompt = row.get("prompt", "")
    prompt = "" if prompt is None else prompt
    if not isinstance(prompt, str):
        raise Fault(f'"prompt" is {kind_of(prompt)}', "Give a string.")
    images, ignored = pictures_of(row, root)
    videos = clips_of(row, root)
    if not (prompt or images or videos):
        raise Fault("neither a prompt nor a picture", 'Give "prompt", "images" or "video".')
    turns: _Turns = [("user", _split(prompt, tuple(Mark)))]
    literal = () if images else _marks_for_clips(turns, videos) or _marks_as_text({}, turns)
    media: _Media = {Mark.VIDEO: videos, Mark.IMAGE: images}
    for mark, found in media.items():
        for _ in range(len(found) - _count_of(turns, mark)):
            turns[0][1].extend((mark, " "))
    return _pair(turns, media), ignored + literal


def _caption(row: Mapping[str, Any], root: MediaFolder) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """The first answer of a row of chat; as upstream, pictures without a mark in it stand in front, a blank after each.

    What was asked is not used, and neither is any turn behind.
    """
    turns, notices = _chat(row, root)
    caption = next(turn for turn in turns if turn.role == "assistant")
    elsewhere = [part for turn in turns if turn is not caption for part in turn.content if isinstance(part, Image)]
    if not elsewhere and not any(isinstance(part, Image) for part in caption.content):
        raise Fault("no picture", 'A caption is of one: give "image" or "images", or drop the row.')
    if len([turn for turn in turns if turn.role == "assistant"]) > 1:
        notices += ("turns behind the first answer were left out: it is read as the caption",)
    front = [part for image in elsewhere for part in (image, " ")]
    return (Turn("assistant", tuple(cast("list[str | Image | Video]", _merge([*front, *caption.content])))),), notices


_READERS = {"chat": _chat, "video": _video, "classify": _classify, "pretrain": _caption}


def _labels(row: Mapping[str, Any]) -> Any:
    """What the row gives as its labels, under either name; what they must be, `labels` knows."""
    several, one = row.get("labels"), row.get("label")
    if several is not None and one is not None:
        raise Fault('"label" and "labels" both say what is right', "Keep one of them.")
    return one if several is None else several


def _refuse_half_characters(turns: tuple[Turn, ...]) -> None:
    """JSON may write half of an emoji, which no tokenizer takes."""
    for turn in turns:
        for part in turn.content:
            if isinstance(part, str) and not part.isascii():
                try:
                    part.encode()
                except UnicodeEncodeError as error:
                    found = f"a turn of the {turn.role} has half a character, {part[error.start]!a}"
                    raise Fault(found, "Write its other half behind it, or take it out.") from None


_Parts = list[str | Image | Video | Mark]
_Turns = list[tuple[Role, _Parts]]
_Media = Mapping[Mark, Sequence[Image | Video]]


def _id(row: Any) -> str | None:
    found = row.get("id") if isinstance(row, Mapping) else None
    return None if found is None else str(found)


def _turns(row: Mapping[str, Any], root: MediaFolder, marks: tuple[Mark, ...]) -> tuple[_Turns, tuple[str, ...]]:
    """The turns of the row, checked to alternate from the user's; and what was dropped."""
    turns = [_turn(turn, number, root, marks) for number, turn in enumerate(_listed(row, marks), 1)]
    start = 1 if turns[0][0] == "system" else 0
    dropped = 0
    if turns[start:] and turns[start][0] == "assistant":
        del turns[start]  # as upstream, which drops one turn and no more
        dropped = 1
    for at, (role, _) in enumerate(turns[start:]):
        if role != ALTERNATE[at % 2]:
            number = at + 1 + start + dropped
            if role == "system":
                raise Fault(f"turn {number} is the system's", "Only the first turn may be.")
            found = f"turns {number - 1} and {number} are both the {role}'s"
            raise Fault(found, "Join them, or add the turn between them: user and assistant take turns.")
    if len(turns) < start + 2:
        raise Fault("no assistant turn after a user turn", "Add the assistant's answer.")
    notices = ("first turn was the assistant's and was dropped",) if dropped else ()
    return turns, notices + _ignored(row) + _blank(turns)


def _ignored(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Turns under a second name, as someone leaves who has rewritten them."""
    first, *others = [key for key in TURNS if row.get(key) is not None]
    return tuple(
        f'"{key}" was ignored, as the row has "{first}" too' for key in others if row[key] and row[key] != row[first]
    )


def _blank(turns: _Turns) -> tuple[str, ...]:
    for role, parts in turns:
        if role == "assistant" and not any(not isinstance(part, str) or part.strip() for part in parts):
            return ("an answer is blank: it trains that there is nothing to say",)
    return ()


def _listed(row: Mapping[str, Any], marks: tuple[Mark, ...]) -> Sequence[Any]:
    key = next((key for key in TURNS if row.get(key) is not None), None)
    _refuse_other_tasks(row, key is not None, Mark.VIDEO in marks)
    if key is None:
        keys = ", ".join(str(key) for key in row) or "none"
        raise Fault(
            'none of "conversation", "conversations" and "messages" has the turns',
            f"Add one of them; the row's keys are: {keys}.",
        )
    turns = row[key]
    if not isinstance(turns, list | tuple):
        raise Fault(f'"{key}" is {kind_of(turns)}', f"Give a list of turns like {A_TURN}.")
    if not turns:
        raise Fault(f'"{key}" is empty', "Give at least a user turn and an assistant turn.")
    return turns


def _refuse_other_tasks(row: Mapping[str, Any], chat: bool, clips: bool) -> None:
    for key in ("video", "videos"):
        if row.get(key) and not clips:
            raise Fault(
                f'this is a video row: it has "{key}"',
                'task=chat needs pictures: give "images" and turns, or train on clips with task=video.',
            )
    if not chat and row.get("labels") is not None and row.get("prompt") is not None:
        raise Fault(
            'this is a classification row: it has "labels" and "prompt"',
            'Turns are read here: give "messages", or train on labels with task=classify.',
        )


def _turn(turn: Any, number: int, root: MediaFolder, marks: tuple[Mark, ...]) -> tuple[Role, _Parts]:
    if not isinstance(turn, dict):
        raise Fault(f"turn {number} is {kind_of(turn)}", f"Give an object like {A_TURN}.")
    speaker = _only(turn, SPEAKERS, number)
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        found = "no role" if speaker is None else f"the unknown role {short(speaker)}"
        remedy = "Use user or human, assistant or gpt; system for the first turn only."
        raise Fault(f"turn {number} has {found}", remedy)
    content = _only(turn, CONTENTS, number)
    if isinstance(content, str):
        return role, _split(content, marks)
    if content is None:
        raise Fault(f"turn {number} has no text", 'Give "content", "text" or "value"; "" is allowed.')
    if not isinstance(content, list | tuple):
        key = next(key for key in CONTENTS if turn.get(key) is not None)
        raise Fault(f'"{key}" of turn {number} is {kind_of(content)}', "Give a string or a list of parts.")
    parts = (_typed(part, f"part {at} of turn {number}", root, marks) for at, part in enumerate(content, 1))
    return role, _merge(part for several in parts for part in several)


def _only(turn: dict[str, Any], keys: tuple[str, ...], number: int) -> Any:
    """What a turn has under one of the names, or None; under two of them it must be the same."""
    found = None
    for key in keys:
        other = turn.get(key)
        if found is None:
            first, found = key, other
        elif other is not None and other != found:
            raise Fault(f'"{first}" and "{key}" of turn {number} differ', "Keep one of them.")
    return found


def _split(text: str, marks: tuple[Mark, ...]) -> _Parts:
    if "<" not in text:
        return [text] if text else []
    parts: _Parts = [text]
    for mark in marks:
        parts = [piece for part in parts for piece in (_cut(part, mark) if isinstance(part, str) else [part])]
    return parts


def _cut(text: str, mark: Mark) -> Iterator[str | Mark]:
    """The pieces of a text and the marks between them, without empty ones."""
    for number, piece in enumerate(text.split(mark.value)):
        if number:
            yield mark
        if piece:
            yield piece


def _merge(parts: Iterable[str | Image | Video | Mark]) -> _Parts:
    """Join neighbouring strings and leave out empty ones."""
    merged: _Parts = []
    for part in parts:
        last = merged[-1] if merged else None
        if isinstance(part, str) and isinstance(last, str):
            merged[-1] = last + part
        elif part != "":
            merged.append(part)
    return merged


def _typed(part: Any, place: str, root: MediaFolder, marks: tuple[Mark, ...]) -> _Parts:
    """One part of a turn as TRL and OpenAI write them; a mark where the row's next picture or clip goes."""
    # A literal "<image>" here stays text: the pictures have parts of their own.
    in_text = tuple(mark for mark in marks if mark is not Mark.IMAGE)
    if isinstance(part, str):
        return _split(part, in_text)
    if not isinstance(part, dict):
        raise Fault(f"{place} is {kind_of(part)}", 'Give {"type": "text", "text": "..."} and the like.')
    kind = part.get("type")
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise Fault(f'"text" of {place} is {kind_of(text)}', "Give a string.")
        return _split(text, in_text)
    if kind == "image":
        found = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
        if found is None and part.get("base64") is not None:
            return [Image(read_base64(part["base64"], f'"base64" of {place}'))]
        return [Mark.IMAGE if found is None else read_image(found, place, root)]
    if kind == "image_url":
        link = part.get("image_url")
        return [read_image(link.get("url") if isinstance(link, dict) else link, place, root)]
    if Mark.VIDEO not in marks:
        raise Fault(f"{place} has the type {short(kind)}", "task=chat reads text, image and image_url.")
    if kind == "video":
        found = next((part[key] for key in ("video", "path", "url") if part.get(key) is not None), None)
        return [Mark.VIDEO if found is None else read_clip(part | {"path": found}, place, root)]
    if kind == "video_url":
        link = part.get("video_url")
        return [read_clip(part | {"path": link.get("url") if isinstance(link, dict) else link}, place, root)]
    raise Fault(f"{place} has the type {short(kind)}", "Here are read text, image, image_url, video and video_url.")


def _count_of(turns: _Turns, mark: Mark) -> int:
    return sum([parts.count(mark) for _, parts in turns])


def _marks_as_text(row: Mapping[str, Any], turns: _Turns) -> tuple[str, ...]:
    """In a row without pictures or typed parts "<image>" is what someone wrote; turns it back into text and says so."""
    if not _count_of(turns, Mark.IMAGE):
        return ()
    listed = next((row[key] for key in TURNS if row.get(key) is not None), ())
    if any(isinstance(value, list | tuple) for turn in listed for value in turn.values()):
        return ()
    for _, parts in turns:
        parts[:] = _merge(part.value if part is Mark.IMAGE else part for part in parts)
    return ('"<image>" was read as text, as the row has no picture',)


def _marks_for_clips(turns: _Turns, videos: list[Video]) -> tuple[str, ...]:
    """Data made for video models often marks a clip as "<image>": read so where the numbers agree, and said."""
    if not videos or _count_of(turns, Mark.VIDEO) or _count_of(turns, Mark.IMAGE) != len(videos):
        return ()
    for _, parts in turns:
        parts[:] = [Mark.VIDEO if part is Mark.IMAGE else part for part in parts]
    return ('"<image>" was read as the place of a clip, as the row has no picture',)


def _pair(turns: _Turns, media: _Media) -> tuple[Turn, ...]:
    """Put the row's media in the places of their marks, in reading order; missing marks go in front."""
    front: _Parts = []
    for mark, found in media.items():
        marks = _count_of(turns, mark)
        if marks != len(found):
            front += [mark] * _missing(turns, mark, marks, len(found))
    if any(media.values()):
        first = next(parts for role, parts in turns if role == "user")
        first[:0] = front
        places = {mark: iter(found) for mark, found in media.items()}
        for _, parts in turns:
            parts[:] = [next(places[part]) if isinstance(part, Mark) else part for part in parts]
    return tuple([Turn(role, tuple(cast("list[str | Image | Video]", parts))) for role, parts in turns])


def _missing(turns: _Turns, mark: Mark, marks: int, found: int) -> int:
    """How many marks a row lacks for its pictures or clips; one too many is an error, and so is a guess."""
    noun, pairing = mark.value[1:-1], f"Marks and {mark.value[1:-1]}s pair up in order."
    if marks > found:
        counts = f"{_count(found, noun)} but {_count(marks, mark.value + ' mark')} in the turns"
        what = "picture" if mark is Mark.IMAGE else "clip"
        raise Fault(counts, f"Add the {what} or remove the mark. {pairing}")
    if _holds_media(turns):
        # The turns hold pictures too: the column may list the same ones again, so do not guess.
        counts = f"{_count(found, noun)} beside the turns but {_count(marks, 'mark')} for them"
        remedy = f'Add a {{"type": "{noun}"}} part, or drop the {noun} from the row.'
        raise Fault(counts, f"{remedy} {pairing}")
    return found - marks


def _holds_media(turns: _Turns) -> bool:
    return any(isinstance(part, (Image, Video)) for _, parts in turns for part in parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
