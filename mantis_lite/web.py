"""A page to chat on, for this machine's own browser: pictures, clips and answers as they come."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from .chat import MantisChat
from .data.sample import Image, Turn, Video
from .errors import MantisError, RecipeError

UPLOAD = 32 << 20
"""The largest file that is taken, in bytes."""
KEPT = 24 * 3600
"""For how long what was uploaded lies in Gradio's folder, in s."""
CLIPS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ogv")


def show_page(chat: MantisChat, port: int, show: Callable[[str], None], **settings: Any) -> None:
    """Serve the page on 127.0.0.1 until it is stopped; `show` is told where. Raises RecipeError."""
    blocks = launched(page(chat, **settings), port)
    show(blocks.local_url)
    blocks.block_thread()


def page(chat: MantisChat, **settings: Any) -> Any:
    """The page, a gradio.Blocks, every visit with a history of its own; `settings` go to the chat. Raises RecipeError.

    Answers are shown as the text that they are: a picture linked in one would be fetched by whoever reads it.
    """
    gradio = require_gradio()
    title = f"Mantis: {chat.trained.checkpoint.public_name}"
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(KEPT, KEPT)) as blocks:
        turns = gradio.State([])
        shown = gradio.Chatbot(label=title, height="75vh", render_markdown=False, feedback_options=None)
        asked = gradio.MultimodalTextbox(file_types=["image", "video"], file_count="multiple", show_label=False)
        with gradio.Row():
            undo, clear = gradio.Button("Undo"), gradio.Button("Clear")

        def ask(question: dict[str, Any], said: Sequence[Turn]) -> Iterator[tuple[Any, list[Turn], Any]]:
            """The box empty, the history and what is shown of it, again with every piece of the answer."""
            own = chat.fork(said)
            images, videos = _sorted(question["files"])
            parts = [*map(Image, map(Path, images)), *(Video(Path(clip)) for clip in videos), question["text"]]
            asking, answer = [_by("user", part) for part in parts], ""
            try:
                for piece in own.stream(question["text"], images, videos, **settings):
                    answer += piece
                    yield None, own.turns, [*_messages(own), *asking, _by("assistant", answer)]
            except MantisError as error:
                raise gradio.Error(str(error), print_exception=False) from None
            yield None, own.turns, _messages(own)

        def forget(said: Sequence[Turn]) -> tuple[list[Turn], list[dict[str, Any]]]:
            own = chat.fork(said)
            own.undo()
            return own.turns, _messages(own)

        # One answer at a time, whoever asks: concurrency_limit is 1 unless it is told otherwise.
        asked.submit(ask, [asked, turns], [asked, turns, shown], api_name="ask")
        undo.click(forget, [turns], [turns, shown], api_name="undo")
        clear.click(lambda: ([], []), None, [turns, shown], api_name="clear")
    return blocks


def launched(blocks: Any, port: int) -> Any:
    """The page on 127.0.0.1 and nowhere else, whatever the environment says. Raises RecipeError."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # Only by this machine's own names: another site's may lead here (DNS rebinding).
    own = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    where = {"server_name": "127.0.0.1", "server_port": port, "share": False, "ssr_mode": False}
    kept = {"max_file_size": UPLOAD, "app_kwargs": {"middleware": [own]}}
    try:
        blocks.launch(**where, **kept, prevent_thread_lock=True, quiet=True)
    except OSError:
        raise RecipeError(f"port: {port} is taken\n  Choose another port.") from None
    return blocks


def require_gradio() -> ModuleType:
    """Gradio, which reports nothing home. Raises RecipeError where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it is read as gradio is imported
    try:
        import gradio
    except ImportError as error:
        # No extra names it: it says that it allows no Pillow 13, and works with it.
        install = "Install it: pip install 'gradio>=6.31', and then: pip install 'pillow>=13' (docs/serving.md)."
        raise RecipeError(f"--web: {error.name} is not installed\n  {install}") from None
    return gradio


def _sorted(files: Sequence[str]) -> tuple[list[str], list[str]]:
    """Pictures and clips, by their suffixes; what is neither is opened as a picture, and so refused."""
    clips = [file for file in files if file.lower().endswith(CLIPS)]
    return [file for file in files if file not in clips], clips


def _messages(chat: MantisChat) -> list[dict[str, Any]]:
    """A conversation as Gradio shows it: a message for each text, picture and clip."""
    return [_by(turn.role, part) for turn in chat.turns for part in turn.content]


def _by(role: str, part: str | Image | Video) -> dict[str, Any]:
    return {"role": role, "content": part if isinstance(part, str) else {"path": str(part.source)}}
