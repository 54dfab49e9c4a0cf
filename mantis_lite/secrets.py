"""Tokens and passwords, which belong neither in a recipe, saved as it is with the run, nor on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .errors import RecipeError

NAME = re.compile(r"(token|secret|passw(or)?d|passphrase|credentials?|(api|access|private)_?key)$")
"""How the key of a secret ends, in lower case and with _ for -."""

VALUE = re.compile(
    r"\b(hf|api_org)_[A-Za-z0-9]{20,}"  # the Hugging Face Hub's
    r"|\bhf_(oauth|jwt)_\w"
    r"|\b(sk-(ant|proj|svcacct)-|gh[opsur]_|github_pat_|wandb_v\d+_)[\w-]{20,}|\bsk-[a-z0-9]{20,}"
    r"|://[^\s/?#@]+@"  # https://user:password@host
    r"|[?&][\w-]*(token|key|signature|sig|password)=",  # a signed address
    re.IGNORECASE,
)
"""What looks like a secret, wherever in a text."""

WHOLE = re.compile(r"(local-)?[0-9a-f]{40}")
"""A key of Weights & Biases; a commit looks the same, and is what a `revision` is."""


def refuse_secrets(settings: Any, where: str) -> None:
    """Refuse mappings, lists and texts that hold a secret, however deep. Raises RecipeError, which repeats none."""
    for key in _secrets(settings, ""):
        raise RecipeError(
            f"{': '.join(filter(None, (where, key)))}: a token or password does not belong here, where it is saved "
            "or shown\n  Take it out: log in with `hf auth login`, or set HF_TOKEN or WANDB_API_KEY in the environment."
        )


def _secrets(value: Any, key: str) -> Iterator[str]:
    """The dotted keys of secrets; of a key that is one itself, the key it lies in."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if VALUE.search(str(name)):
                yield key
                continue
            dotted = f"{key}.{name}".lstrip(".")
            if NAME.search(str(name).lower().replace("-", "_")):
                yield dotted
            yield from _secrets(inner, dotted)
    elif isinstance(value, list | tuple):
        for at, inner in enumerate(value):
            yield from _secrets(inner, f"{key}[{at}]")
    elif isinstance(value, str) and (VALUE.search(value) or (WHOLE.fullmatch(value) and not key.endswith("revision"))):
        yield key
