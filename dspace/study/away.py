"""What an error of a storage on a server says: whether the server is only away, and its text without passwords.

Judged by names and codes alone, so that neither Optuna nor a driver has to be there.
"""

from __future__ import annotations

import re


def is_away(error: BaseException) -> bool:
    """Whether an error says that the server does not answer now, as opposed to a refusal."""
    name = type(error).__name__
    if name in ("StorageInternalError", "OperationalError", "InterfaceError", "InternalError"):
        return True
    code = getattr(error, "code", None)  # of gRPC; a database that is away under the proxy comes as UNKNOWN
    if callable(code):
        return getattr(code(), "name", "") in ("UNAVAILABLE", "UNKNOWN", "DEADLINE_EXCEEDED", "INTERNAL", "CANCELLED")
    return isinstance(error, ConnectionError) or "closed channel" in str(error)


def hidden(text: str) -> str:
    """``text`` without the passwords of the URLs in it."""
    return re.sub(r"://([^:/@\s]+):[^@\s]+@", r"://\1:***@", text)
