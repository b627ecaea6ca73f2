"""By what a worker of libucp and its regions are known to peers, as bytes that say when they are damaged."""

from __future__ import annotations

import hashlib
import hmac

from google.protobuf.message import DecodeError

from legato.v1.transfer_pb2 import RegionDescriptor, UcxAddress
from spec.errors import TransferFailed

TOKEN_BYTES = 16  # by which a region is named


def sealed(worker_address: bytes, version: str) -> UcxAddress:
    checksum = hashlib.blake2b(worker_address, digest_size=16).digest()
    return UcxAddress(worker_address=worker_address, checksum=checksum, version=version)


def opened(address: bytes, version: str) -> UcxAddress:
    """Raises TransferFailed for what is no address (libucp would parse any bytes), or of a libucp unlike `version`."""
    try:
        theirs = UcxAddress.FromString(address)
    except DecodeError:
        raise TransferFailed("not an address of ucx", address=address.hex()[:32]) from None
    if not hmac.compare_digest(sealed(theirs.worker_address, "").checksum, theirs.checksum):
        raise TransferFailed("not an address of ucx, or a damaged one", address=address.hex()[:32])
    if theirs.version.split(".")[:2] != version.split(".")[:2]:
        raise TransferFailed(f"the peer's libucp is {theirs.version}, this one's is {version}")
    return theirs


def token_of(descriptor: bytes) -> bytes:
    """Raises TransferFailed for what no owner says: what is longer would not fit into a message."""
    try:
        token = RegionDescriptor.FromString(descriptor).token
    except DecodeError:
        token = b""
    if len(token) != TOKEN_BYTES:
        raise TransferFailed("not a descriptor of ucx", descriptor=descriptor[:64].hex())
    return token


def short(address: UcxAddress) -> str:
    return address.checksum.hex()[:12]
