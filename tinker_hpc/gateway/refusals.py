"""Answers that are not a result: an HTTP status and one clear sentence."""

from __future__ import annotations


class Refusal(Exception):
    """Ends an HTTP request with `status` and `message`.

    Which status decides what the stock SDK does while it submits (tinker 0.38, internal_client_holder.py):
    408, 409, 429 and 5xx are sent again for 300 s, every other 4xx is raised at once.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def bad_request(message: str) -> Refusal:
    return Refusal(400, message)


def unknown(message: str) -> Refusal:
    return Refusal(404, message)


def conflicting(message: str) -> Refusal:
    """422 and not 409: the SDK would send a 409 again for five minutes before it showed the words."""
    return Refusal(422, message)


def try_again(message: str) -> Refusal:
    """503: nothing was accepted, the SDK sends the same request again for 300 s."""
    return Refusal(503, message)
