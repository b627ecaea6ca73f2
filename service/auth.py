"""Who may call: our processes prove that they know the cluster's key; clients show an API key where one is asked for.

Both travel as `authorization: Bearer ...`. The cluster's key itself never travels: the token is derived from it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence

from pydantic import SecretStr

from spec.errors import Unauthenticated

HEADER = "authorization"
_PURPOSE = b"legato internal services, version 1"


def internal_token(cluster_key: SecretStr | str) -> str:
    """HMAC-SHA256 of a fixed purpose under the cluster's key: tickets are signed with the key for another purpose."""
    return hmac.new(_plain(cluster_key).encode(), _PURPOSE, hashlib.sha256).hexdigest()


class Authenticator:
    """Compares in constant time, so that an answer's delay tells nothing of a key."""

    def __init__(self, cluster_key: SecretStr | str | None, api_keys: Sequence[SecretStr | str] = ()) -> None:
        self._internal = internal_token(cluster_key).encode() if cluster_key is not None else None
        self._api_keys = [_plain(key).encode() for key in api_keys]

    def check(self, metadata: Iterable[tuple[str, str | bytes]], *, internal: bool) -> None:
        """Raises Unauthenticated. A public service without API keys is open."""
        if not internal and not self._api_keys:
            return
        shown = _bearer(metadata)
        if internal:
            if self._internal is None or not hmac.compare_digest(shown, self._internal):
                raise Unauthenticated(
                    "this service is internal: the caller's token does not come from the cluster's key"
                )
        elif not sum(hmac.compare_digest(shown, key) for key in self._api_keys):  # all are compared: no early end
            raise Unauthenticated(
                "the API key is not known here" if shown else "an API key is required: authorization: Bearer KEY"
            )


def _bearer(metadata: Iterable[tuple[str, str | bytes]]) -> bytes:
    for key, value in metadata:
        if key == HEADER:
            text = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
            scheme, _, token = text.partition(b" ")
            return token.strip() if scheme.lower() == b"bearer" else b""
    return b""


def _plain(secret: SecretStr | str) -> str:
    return secret.get_secret_value() if isinstance(secret, SecretStr) else secret
