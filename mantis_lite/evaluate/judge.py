"""A judge: any endpoint of OpenAI's chat API, which the user names and pays."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException

from ..errors import RecipeError

KEY = "MANTIS_LITE_JUDGE_KEY"
TRIES = 5
AGAIN = (408, 409, 429, 500, 502, 503, 504)
ADDRESS = re.compile(r"https://[^\s/?#]+(/[^\s?#]*)?|http://(127\.0\.0\.1|localhost|\[::1\])(:\d+)?(/[^\s?#]*)?")
"""What a key may be sent to: unencrypted to this machine alone."""


class JudgeError(ValueError):
    """Why a judge gave no answer to one question."""


@dataclass(frozen=True)
class Judge:
    """A `model` behind `url`, as https://api.openai.com/v1; its key, if it wants one, is in MANTIS_LITE_JUDGE_KEY.

    It is asked for its likeliest answer, each question by itself. `pause` is in s, and doubles with each try.
    """

    url: str
    model: str
    pause: float = 1.0
    patience: float = 120.0

    def __post_init__(self) -> None:
        if not ADDRESS.fullmatch(self.url):
            raise RecipeError(f"--judge: {self.url}\n  Give an https:// address, or one of this machine.")

    def __call__(self, prompt: str) -> str:
        """What it answers. Raises JudgeError after several tries, and RecipeError where every question would fail."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        request = self._request(json.dumps(body | {"max_tokens": 1000}).encode())
        for number in range(TRIES):
            if number:
                time.sleep(self.pause * 2 ** (number - 1))
            try:
                return self._ask(request)
            except urllib.error.HTTPError as error:
                self._refuse(error)
                found = f"status {error.code}"
                if error.code not in AGAIN:
                    said = " ".join(error.read(2000).decode("utf-8", "replace").split())
                    raise JudgeError(f"{found}: {said[:200]}" if said else found) from None
            except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
                found = f"{type(error).__name__}: {error}"
        raise JudgeError(f"no answer after {TRIES} tries: {found}")

    def _request(self, body: bytes) -> urllib.request.Request:
        url = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        key = os.environ.get(KEY, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise RecipeError(f"{KEY}: has characters that no key has\n  Set it again.")
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")  # not for where an answer leads
        return request

    def _refuse(self, error: urllib.error.HTTPError) -> None:
        if error.code in (401, 403):
            remedy = f"Set its key in the environment variable {KEY}."
            raise RecipeError(f"--judge: {self.url} refuses the key ({error.code})\n  {remedy}") from None
        if error.code == 404:
            remedy = "Check both; an address mostly ends in /v1."
            raise RecipeError(f"--judge: {self.url} has no {self.model} to chat with (404)\n  {remedy}") from None

    def _ask(self, request: urllib.request.Request) -> str:
        with urllib.request.urlopen(request, timeout=self.patience) as answer:
            said = json.load(answer)["choices"][0]["message"]["content"]
        if not isinstance(said, str):
            raise ValueError("no text in the answer")
        return said


def judge_of(url: str | None, model: str | None) -> Judge | None:
    """The judge that a command line names, if any. Raises RecipeError."""
    if url is None and model is not None:
        raise RecipeError(f"--judge-model: {model}, and no judge\n  Add --judge, its endpoint.")
    return None if url is None else Judge(url, model or "gpt-4-1106-preview")
