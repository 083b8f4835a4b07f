"""Who asks. There are no accounts: whoever has the run's key is the user whose gateway this is.

The SDK reads the caller's identity from the claims of a token it gets for its key (auth/token) and then sends in the
key's place. Ours is a JWT signed with the key itself (HMAC-SHA256), so a restarted gateway knows it again.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import pwd
from typing import Any

TOKEN_LIFETIME_S = 30 * 24 * 3600
ORGANIZATION = "tinker_hpc"
_HEADER = b'{"alg":"HS256","typ":"JWT"}'


def user_name() -> str:
    """The login name of the user whose gateway this is."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())  # a container without a passwd entry


def user_urn() -> str:
    return f"urn:tinker_hpc:user:{user_name()}"


def issue_token(api_key: str, now: float) -> str:
    """A token that stands for the key for TOKEN_LIFETIME_S."""
    claims = {
        "iss": "tinker_hpc",
        "sub": user_urn(),
        "org_id": ORGANIZATION,
        "iat": int(now),
        "exp": int(now) + TOKEN_LIFETIME_S,
    }
    signed = f"{_encode(_HEADER)}.{_encode(json.dumps(claims).encode())}"
    return f"{signed}.{_signature(signed, api_key)}"


def may_ask(api_key: str, presented: str, now: float) -> bool:
    """Whether what a request carries is the key, or a token of it that has not expired."""
    if not presented.startswith("eyJ"):
        return hmac.compare_digest(presented.encode(), api_key.encode())
    signed, _, signature = presented.rpartition(".")
    if not hmac.compare_digest(signature.encode(), _signature(signed, api_key).encode()):
        return False
    claims: dict[str, Any] = json.loads(_decode(signed.partition(".")[2]))  # ours: the signature says so
    return now < claims["exp"]


def about_key() -> dict[str, Any]:
    """What `tinker auth login` stores beside a key."""
    details = {"org_details": {"name": ORGANIZATION}, "user_details": {"email": user_name()}}
    return {
        "key_id": 0,
        "name": "tinker_hpc run",
        "note": "the key of one run, from its gateway.json",
        "details": details,
    }


def _signature(signed: str, api_key: str) -> str:
    return _encode(hmac.digest(api_key.encode(), signed.encode(), hashlib.sha256))


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
