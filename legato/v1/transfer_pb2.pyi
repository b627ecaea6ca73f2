from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SocketsAddress(_message.Message):
    __slots__ = ("host_id", "unix_path", "tcp_host", "tcp_port")
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    UNIX_PATH_FIELD_NUMBER: _ClassVar[int]
    TCP_HOST_FIELD_NUMBER: _ClassVar[int]
    TCP_PORT_FIELD_NUMBER: _ClassVar[int]
    host_id: str
    unix_path: str
    tcp_host: str
    tcp_port: int
    def __init__(self, host_id: _Optional[str] = ..., unix_path: _Optional[str] = ..., tcp_host: _Optional[str] = ..., tcp_port: _Optional[int] = ...) -> None: ...

class UcxAddress(_message.Message):
    __slots__ = ("worker_address", "checksum", "version")
    WORKER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    worker_address: bytes
    checksum: bytes
    version: str
    def __init__(self, worker_address: _Optional[bytes] = ..., checksum: _Optional[bytes] = ..., version: _Optional[str] = ...) -> None: ...

class RegionDescriptor(_message.Message):
    __slots__ = ("token",)
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    def __init__(self, token: _Optional[bytes] = ...) -> None: ...

class TransferFrame(_message.Message):
    __slots__ = ("attach", "attached", "write", "written", "revoke", "detach")
    class Attach(_message.Message):
        __slots__ = ("link_id", "token", "reply_to", "mapping_lock")
        LINK_ID_FIELD_NUMBER: _ClassVar[int]
        TOKEN_FIELD_NUMBER: _ClassVar[int]
        REPLY_TO_FIELD_NUMBER: _ClassVar[int]
        MAPPING_LOCK_FIELD_NUMBER: _ClassVar[int]
        link_id: int
        token: bytes
        reply_to: UcxAddress
        mapping_lock: str
        def __init__(self, link_id: _Optional[int] = ..., token: _Optional[bytes] = ..., reply_to: _Optional[_Union[UcxAddress, _Mapping]] = ..., mapping_lock: _Optional[str] = ...) -> None: ...
    class Attached(_message.Message):
        __slots__ = ("link_id", "refused", "region_bytes", "base_address", "remote_key", "checksum")
        LINK_ID_FIELD_NUMBER: _ClassVar[int]
        REFUSED_FIELD_NUMBER: _ClassVar[int]
        REGION_BYTES_FIELD_NUMBER: _ClassVar[int]
        BASE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
        REMOTE_KEY_FIELD_NUMBER: _ClassVar[int]
        CHECKSUM_FIELD_NUMBER: _ClassVar[int]
        link_id: int
        refused: str
        region_bytes: int
        base_address: int
        remote_key: bytes
        checksum: bytes
        def __init__(self, link_id: _Optional[int] = ..., refused: _Optional[str] = ..., region_bytes: _Optional[int] = ..., base_address: _Optional[int] = ..., remote_key: _Optional[bytes] = ..., checksum: _Optional[bytes] = ...) -> None: ...
    class Write(_message.Message):
        __slots__ = ("write_id", "target_bases", "segment_bytes", "link_id", "target_units", "unit_runs", "more")
        WRITE_ID_FIELD_NUMBER: _ClassVar[int]
        TARGET_BASES_FIELD_NUMBER: _ClassVar[int]
        SEGMENT_BYTES_FIELD_NUMBER: _ClassVar[int]
        LINK_ID_FIELD_NUMBER: _ClassVar[int]
        TARGET_UNITS_FIELD_NUMBER: _ClassVar[int]
        UNIT_RUNS_FIELD_NUMBER: _ClassVar[int]
        MORE_FIELD_NUMBER: _ClassVar[int]
        write_id: int
        target_bases: _containers.RepeatedScalarFieldContainer[int]
        segment_bytes: _containers.RepeatedScalarFieldContainer[int]
        link_id: int
        target_units: _containers.RepeatedScalarFieldContainer[int]
        unit_runs: _containers.RepeatedScalarFieldContainer[int]
        more: bool
        def __init__(self, write_id: _Optional[int] = ..., target_bases: _Optional[_Iterable[int]] = ..., segment_bytes: _Optional[_Iterable[int]] = ..., link_id: _Optional[int] = ..., target_units: _Optional[_Iterable[int]] = ..., unit_runs: _Optional[_Iterable[int]] = ..., more: bool = ...) -> None: ...
    class Written(_message.Message):
        __slots__ = ("write_id", "link_id", "refused")
        WRITE_ID_FIELD_NUMBER: _ClassVar[int]
        LINK_ID_FIELD_NUMBER: _ClassVar[int]
        REFUSED_FIELD_NUMBER: _ClassVar[int]
        write_id: int
        link_id: int
        refused: str
        def __init__(self, write_id: _Optional[int] = ..., link_id: _Optional[int] = ..., refused: _Optional[str] = ...) -> None: ...
    class Revoke(_message.Message):
        __slots__ = ("link_id",)
        LINK_ID_FIELD_NUMBER: _ClassVar[int]
        link_id: int
        def __init__(self, link_id: _Optional[int] = ...) -> None: ...
    class Detach(_message.Message):
        __slots__ = ("link_id",)
        LINK_ID_FIELD_NUMBER: _ClassVar[int]
        link_id: int
        def __init__(self, link_id: _Optional[int] = ...) -> None: ...
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    WRITE_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    REVOKE_FIELD_NUMBER: _ClassVar[int]
    DETACH_FIELD_NUMBER: _ClassVar[int]
    attach: TransferFrame.Attach
    attached: TransferFrame.Attached
    write: TransferFrame.Write
    written: TransferFrame.Written
    revoke: TransferFrame.Revoke
    detach: TransferFrame.Detach
    def __init__(self, attach: _Optional[_Union[TransferFrame.Attach, _Mapping]] = ..., attached: _Optional[_Union[TransferFrame.Attached, _Mapping]] = ..., write: _Optional[_Union[TransferFrame.Write, _Mapping]] = ..., written: _Optional[_Union[TransferFrame.Written, _Mapping]] = ..., revoke: _Optional[_Union[TransferFrame.Revoke, _Mapping]] = ..., detach: _Optional[_Union[TransferFrame.Detach, _Mapping]] = ...) -> None: ...
