"""The hub: whether to do without it, found out once and quickly.

Idea: the hub's client asks for every file of a model anew, and waits longer each time nobody answers. So one short
question comes first. Without an answer what is in the hub cache is used, and where that is nothing the error comes at
once.

Use when: a hub id is about to be loaded; pass what comes back as `local_files_only`.
"""

from __future__ import annotations

from luthier.core.errors import MissingError

SECONDS = 4
"""How long the hub may take to answer the first question."""
FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")


def only_cached(source: str) -> bool:
    """Whether the files of the hub id `source` can come from the hub cache alone: offline is asked for, or needed.

    Raises MissingError when the hub does not answer and the cache holds nothing of `source`.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    if _answers(constants.ENDPOINT):
        return False
    if not _is_cached(source):
        raise MissingError(
            f"{source!r} is no folder here and not in the hub cache, and {constants.ENDPOINT} does not answer",
            do="check the name and the network; a folder must exist, a hub id has the form owner/name",
        )
    return True


def _answers(endpoint: str) -> bool:
    from huggingface_hub import get_session
    from huggingface_hub.errors import HfHubHTTPError

    # The HTTP library behind the client is not ours to name; its errors are what the client's own derive from.
    failures = tuple(kind for kind in (*HfHubHTTPError.__bases__, OSError) if issubclass(kind, Exception))
    try:
        get_session().head(endpoint, timeout=SECONDS)
    except failures:
        return False
    return True


def _is_cached(source: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(source, name), str) for name in FILES)
    except HFValidationError:
        return False
