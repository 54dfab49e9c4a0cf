"""A judge: any endpoint of OpenAI's chat API, which the user names and pays."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

from ..errors import RecipeError

KEY = "MANTIS_LITE_JUDGE_KEY"
TRIES = 5
AGAIN = (408, 409, 429, 500, 502, 503, 504)


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
        if not self.url.startswith(("https://", "http://127.0.0.1", "http://localhost")):
            raise RecipeError(f"--judge: {self.url}\n  Give an https:// address, or one of this machine.")

    def __call__(self, prompt: str) -> str:
        """What it answers. Raises JudgeError after several tries, and RecipeError where it refuses the key."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        for number in range(TRIES):
            if number:
                time.sleep(self.pause * 2 ** (number - 1))
            try:
                return self._ask(json.dumps(body | {"max_tokens": 1000}).encode())
            except urllib.error.HTTPError as error:
                if error.code in (401, 403):
                    remedy = f"Set its key in the environment variable {KEY}."
                    raise RecipeError(f"--judge: {self.url} refuses the key ({error.code})\n  {remedy}") from None
                if error.code not in AGAIN:
                    raise JudgeError(f"status {error.code}") from None
                found = f"status {error.code}"
            except (OSError, ValueError, LookupError, TypeError) as error:
                found = f"{type(error).__name__}: {error}"
        raise JudgeError(f"no answer after {TRIES} tries: {found}")

    def _ask(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=self.patience) as answer:
            said = json.load(answer)["choices"][0]["message"]["content"]
        if not isinstance(said, str):
            raise ValueError("no text in the answer")
        return said
