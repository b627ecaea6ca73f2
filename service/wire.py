"""Versions of what workers say to each other: records, tickets, reservations and the Handoff stream.

Each side says the oldest and the newest version that it speaks; two speak the newest that both do, and are not paired
where there is none. Within a version messages may gain fields, and streams events, that whoever does not know them may
pass over; what may not be passed over, or means something else than before, is a new version. A worker that says none
speaks version 1 alone.

    1    the first
    2    Begin names the link by which is written; who answers ConfirmQuiet says who that is
    3    digests are sums over rows
    4    ranks of a worker are on several hosts, and Begin names a link to each
"""

from __future__ import annotations

from legato.v1 import worker_pb2
from spec.errors import WireMismatch

OLDEST, NEWEST = 4, 4
_UNSAID = worker_pb2.WireVersions(oldest=1, newest=1)


def spoken() -> worker_pb2.WireVersions:
    return worker_pb2.WireVersions(oldest=OLDEST, newest=NEWEST)


def agreed(ours: worker_pb2.WireVersions, theirs: worker_pb2.WireVersions, their_id: str) -> int:
    """The version that the two speak. Raises WireMismatch naming what each side speaks."""
    ours, theirs = (each if each.newest else _UNSAID for each in (ours, theirs))
    newest = min(ours.newest, theirs.newest)
    if newest < max(ours.oldest, theirs.oldest):
        raise WireMismatch(
            f"{their_id} speaks versions {_said(theirs)} of the wire between workers, this one {_said(ours)}",
            ours=_said(ours),
            theirs=_said(theirs),
        )
    return newest


def _said(versions: worker_pb2.WireVersions) -> str:
    return f"{versions.oldest} to {versions.newest}"
