from legato.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    PREFILL: _ClassVar[Role]
    DECODE: _ClassVar[Role]
ROLE_UNSPECIFIED: Role
PREFILL: Role
DECODE: Role

class ModelIdentity(_message.Message):
    __slots__ = ("model_id", "revision", "adapter", "compute_dtype")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    revision: str
    adapter: str
    compute_dtype: str
    def __init__(self, model_id: _Optional[str] = ..., revision: _Optional[str] = ..., adapter: _Optional[str] = ..., compute_dtype: _Optional[str] = ...) -> None: ...

class KVLayout(_message.Message):
    __slots__ = ("num_layers", "num_kv_heads", "head_dim", "block_tokens", "dtype", "planes")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PLANES_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: str
    planes: int
    def __init__(self, num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., block_tokens: _Optional[int] = ..., dtype: _Optional[str] = ..., planes: _Optional[int] = ...) -> None: ...

class RankKV(_message.Message):
    __slots__ = ("first_layer", "num_layers", "first_head", "num_heads", "group", "offset_bytes", "host")
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    FIRST_HEAD_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    first_layer: int
    num_layers: int
    first_head: int
    num_heads: int
    group: int
    offset_bytes: int
    host: int
    def __init__(self, first_layer: _Optional[int] = ..., num_layers: _Optional[int] = ..., first_head: _Optional[int] = ..., num_heads: _Optional[int] = ..., group: _Optional[int] = ..., offset_bytes: _Optional[int] = ..., host: _Optional[int] = ...) -> None: ...

class TransportEndpoint(_message.Message):
    __slots__ = ("name", "address", "region", "probe_offset", "host")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    PROBE_OFFSET_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: bytes
    region: bytes
    probe_offset: int
    host: int
    def __init__(self, name: _Optional[str] = ..., address: _Optional[bytes] = ..., region: _Optional[bytes] = ..., probe_offset: _Optional[int] = ..., host: _Optional[int] = ...) -> None: ...

class WireVersions(_message.Message):
    __slots__ = ("oldest", "newest")
    OLDEST_FIELD_NUMBER: _ClassVar[int]
    NEWEST_FIELD_NUMBER: _ClassVar[int]
    oldest: int
    newest: int
    def __init__(self, oldest: _Optional[int] = ..., newest: _Optional[int] = ...) -> None: ...

class WorkerRecord(_message.Message):
    __slots__ = ("worker_id", "role", "epoch", "address", "identity", "kv_layout", "total_blocks", "max_context_tokens", "max_step_tokens", "endpoints", "model_path", "draining", "pid", "vocab_size", "eos_token_ids", "ranks", "adapters", "wire", "rdma_devices")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    KV_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    MODEL_PATH_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    WIRE_FIELD_NUMBER: _ClassVar[int]
    RDMA_DEVICES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: Role
    epoch: int
    address: str
    identity: ModelIdentity
    kv_layout: KVLayout
    total_blocks: int
    max_context_tokens: int
    max_step_tokens: int
    endpoints: _containers.RepeatedCompositeFieldContainer[TransportEndpoint]
    model_path: str
    draining: bool
    pid: int
    vocab_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ranks: _containers.RepeatedCompositeFieldContainer[RankKV]
    adapters: _containers.RepeatedCompositeFieldContainer[_common_pb2.Adapter]
    wire: WireVersions
    rdma_devices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., epoch: _Optional[int] = ..., address: _Optional[str] = ..., identity: _Optional[_Union[ModelIdentity, _Mapping]] = ..., kv_layout: _Optional[_Union[KVLayout, _Mapping]] = ..., total_blocks: _Optional[int] = ..., max_context_tokens: _Optional[int] = ..., max_step_tokens: _Optional[int] = ..., endpoints: _Optional[_Iterable[_Union[TransportEndpoint, _Mapping]]] = ..., model_path: _Optional[str] = ..., draining: bool = ..., pid: _Optional[int] = ..., vocab_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., ranks: _Optional[_Iterable[_Union[RankKV, _Mapping]]] = ..., adapters: _Optional[_Iterable[_Union[_common_pb2.Adapter, _Mapping]]] = ..., wire: _Optional[_Union[WireVersions, _Mapping]] = ..., rdma_devices: _Optional[_Iterable[str]] = ...) -> None: ...

class WorkerLoad(_message.Message):
    __slots__ = ("waiting_requests", "running_requests", "waiting_tokens", "free_blocks", "reserved_blocks", "steps", "computed_tokens", "generated_tokens", "preemptions", "transferred_bytes", "refused_handoffs", "moved_sequences", "quarantined_blocks")
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    TRANSFERRED_BYTES_FIELD_NUMBER: _ClassVar[int]
    REFUSED_HANDOFFS_FIELD_NUMBER: _ClassVar[int]
    MOVED_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    waiting_requests: int
    running_requests: int
    waiting_tokens: int
    free_blocks: int
    reserved_blocks: int
    steps: int
    computed_tokens: int
    generated_tokens: int
    preemptions: int
    transferred_bytes: int
    refused_handoffs: int
    moved_sequences: int
    quarantined_blocks: int
    def __init__(self, waiting_requests: _Optional[int] = ..., running_requests: _Optional[int] = ..., waiting_tokens: _Optional[int] = ..., free_blocks: _Optional[int] = ..., reserved_blocks: _Optional[int] = ..., steps: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., preemptions: _Optional[int] = ..., transferred_bytes: _Optional[int] = ..., refused_handoffs: _Optional[int] = ..., moved_sequences: _Optional[int] = ..., quarantined_blocks: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCountsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ConfirmQuietRequest(_message.Message):
    __slots__ = ("reservation_id", "producer_id", "producer_epoch")
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    PRODUCER_ID_FIELD_NUMBER: _ClassVar[int]
    PRODUCER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    reservation_id: str
    producer_id: str
    producer_epoch: int
    def __init__(self, reservation_id: _Optional[str] = ..., producer_id: _Optional[str] = ..., producer_epoch: _Optional[int] = ...) -> None: ...

class ConfirmQuietResponse(_message.Message):
    __slots__ = ("worker_id", "epoch")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class SendPrefixRequest(_message.Message):
    __slots__ = ("reservation", "token_ids", "adapter", "address")
    RESERVATION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    reservation: Reservation
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    adapter: str
    address: str
    def __init__(self, reservation: _Optional[_Union[Reservation, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ..., adapter: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class SendPrefixResponse(_message.Message):
    __slots__ = ("transfer",)
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    transfer: _common_pb2.TransferStats
    def __init__(self, transfer: _Optional[_Union[_common_pb2.TransferStats, _Mapping]] = ...) -> None: ...

class Counts(_message.Message):
    __slots__ = ("live", "total", "load", "links")
    class LiveEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class TotalEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    LIVE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    live: _containers.ScalarMap[str, int]
    total: _containers.ScalarMap[str, int]
    load: WorkerLoad
    links: _containers.RepeatedCompositeFieldContainer[PeerLink]
    def __init__(self, live: _Optional[_Mapping[str, int]] = ..., total: _Optional[_Mapping[str, int]] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ..., links: _Optional[_Iterable[_Union[PeerLink, _Mapping]]] = ...) -> None: ...

class PeerLink(_message.Message):
    __slots__ = ("worker_id", "transport", "runs_over", "bytes_per_s", "latency_s", "taken", "host")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    RUNS_OVER_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    transport: str
    runs_over: str
    bytes_per_s: float
    latency_s: float
    taken: bool
    host: int
    def __init__(self, worker_id: _Optional[str] = ..., transport: _Optional[str] = ..., runs_over: _Optional[str] = ..., bytes_per_s: _Optional[float] = ..., latency_s: _Optional[float] = ..., taken: bool = ..., host: _Optional[int] = ...) -> None: ...

class SequenceState(_message.Message):
    __slots__ = ("sequence_id", "prompt_token_ids", "output_token_ids", "sampling", "deadline_unix_ns", "adapter")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _common_pb2.SamplingParams
    deadline_unix_ns: int
    adapter: str
    def __init__(self, sequence_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., output_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., deadline_unix_ns: _Optional[int] = ..., adapter: _Optional[str] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("sequence", "reservation", "decode_address")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_FIELD_NUMBER: _ClassVar[int]
    DECODE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    sequence: SequenceState
    reservation: Reservation
    decode_address: str
    def __init__(self, sequence: _Optional[_Union[SequenceState, _Mapping]] = ..., reservation: _Optional[_Union[Reservation, _Mapping]] = ..., decode_address: _Optional[str] = ...) -> None: ...

class PrefillEvent(_message.Message):
    __slots__ = ("first_token", "handed_over")
    class FirstToken(_message.Message):
        __slots__ = ("token", "finish_reason", "prompt_logprobs", "queued_ns", "started_ns", "drawn_ns", "cached_tokens")
        TOKEN_FIELD_NUMBER: _ClassVar[int]
        FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
        PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
        QUEUED_NS_FIELD_NUMBER: _ClassVar[int]
        STARTED_NS_FIELD_NUMBER: _ClassVar[int]
        DRAWN_NS_FIELD_NUMBER: _ClassVar[int]
        CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
        token: _common_pb2.Token
        finish_reason: _common_pb2.FinishReason
        prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprobs]
        queued_ns: int
        started_ns: int
        drawn_ns: int
        cached_tokens: int
        def __init__(self, token: _Optional[_Union[_common_pb2.Token, _Mapping]] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_common_pb2.TokenLogprobs, _Mapping]]] = ..., queued_ns: _Optional[int] = ..., started_ns: _Optional[int] = ..., drawn_ns: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...
    class HandedOver(_message.Message):
        __slots__ = ("transfer",)
        TRANSFER_FIELD_NUMBER: _ClassVar[int]
        transfer: _common_pb2.TransferStats
        def __init__(self, transfer: _Optional[_Union[_common_pb2.TransferStats, _Mapping]] = ...) -> None: ...
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    HANDED_OVER_FIELD_NUMBER: _ClassVar[int]
    first_token: PrefillEvent.FirstToken
    handed_over: PrefillEvent.HandedOver
    def __init__(self, first_token: _Optional[_Union[PrefillEvent.FirstToken, _Mapping]] = ..., handed_over: _Optional[_Union[PrefillEvent.HandedOver, _Mapping]] = ...) -> None: ...

class MoveRequest(_message.Message):
    __slots__ = ("sequence_id", "reservation", "target_address")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_FIELD_NUMBER: _ClassVar[int]
    TARGET_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    reservation: Reservation
    target_address: str
    def __init__(self, sequence_id: _Optional[str] = ..., reservation: _Optional[_Union[Reservation, _Mapping]] = ..., target_address: _Optional[str] = ...) -> None: ...

class MoveResponse(_message.Message):
    __slots__ = ("transfer",)
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    transfer: _common_pb2.TransferStats
    def __init__(self, transfer: _Optional[_Union[_common_pb2.TransferStats, _Mapping]] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("router_id", "sequence", "identity", "producer_id", "producer_epoch")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    PRODUCER_ID_FIELD_NUMBER: _ClassVar[int]
    PRODUCER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    sequence: SequenceState
    identity: ModelIdentity
    producer_id: str
    producer_epoch: int
    def __init__(self, router_id: _Optional[str] = ..., sequence: _Optional[_Union[SequenceState, _Mapping]] = ..., identity: _Optional[_Union[ModelIdentity, _Mapping]] = ..., producer_id: _Optional[str] = ..., producer_epoch: _Optional[int] = ...) -> None: ...

class Ticket(_message.Message):
    __slots__ = ("reservation_id", "sequence_id", "prefix_digest", "num_tokens", "identity", "kv_layout_id", "producer_id", "producer_epoch", "consumer_id", "consumer_epoch", "block_ids", "block_generations", "first_token", "expires_unix_ns")
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    PREFIX_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    KV_LAYOUT_ID_FIELD_NUMBER: _ClassVar[int]
    PRODUCER_ID_FIELD_NUMBER: _ClassVar[int]
    PRODUCER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    CONSUMER_ID_FIELD_NUMBER: _ClassVar[int]
    CONSUMER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    reservation_id: str
    sequence_id: str
    prefix_digest: bytes
    num_tokens: int
    identity: ModelIdentity
    kv_layout_id: str
    producer_id: str
    producer_epoch: int
    consumer_id: str
    consumer_epoch: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    block_generations: _containers.RepeatedScalarFieldContainer[int]
    first_token: int
    expires_unix_ns: int
    def __init__(self, reservation_id: _Optional[str] = ..., sequence_id: _Optional[str] = ..., prefix_digest: _Optional[bytes] = ..., num_tokens: _Optional[int] = ..., identity: _Optional[_Union[ModelIdentity, _Mapping]] = ..., kv_layout_id: _Optional[str] = ..., producer_id: _Optional[str] = ..., producer_epoch: _Optional[int] = ..., consumer_id: _Optional[str] = ..., consumer_epoch: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., block_generations: _Optional[_Iterable[int]] = ..., first_token: _Optional[int] = ..., expires_unix_ns: _Optional[int] = ...) -> None: ...

class SignedTicket(_message.Message):
    __slots__ = ("ticket", "signature")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    signature: bytes
    def __init__(self, ticket: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Reservation(_message.Message):
    __slots__ = ("ticket", "kv_layout", "endpoints", "lease_s", "ranks", "wire", "digest_share")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    KV_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    WIRE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_SHARE_FIELD_NUMBER: _ClassVar[int]
    ticket: SignedTicket
    kv_layout: KVLayout
    endpoints: _containers.RepeatedCompositeFieldContainer[TransportEndpoint]
    lease_s: float
    ranks: _containers.RepeatedCompositeFieldContainer[RankKV]
    wire: WireVersions
    digest_share: float
    def __init__(self, ticket: _Optional[_Union[SignedTicket, _Mapping]] = ..., kv_layout: _Optional[_Union[KVLayout, _Mapping]] = ..., endpoints: _Optional[_Iterable[_Union[TransportEndpoint, _Mapping]]] = ..., lease_s: _Optional[float] = ..., ranks: _Optional[_Iterable[_Union[RankKV, _Mapping]]] = ..., wire: _Optional[_Union[WireVersions, _Mapping]] = ..., digest_share: _Optional[float] = ...) -> None: ...

class AdmitRequest(_message.Message):
    __slots__ = ("router_id", "sequence")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    sequence: SequenceState
    def __init__(self, router_id: _Optional[str] = ..., sequence: _Optional[_Union[SequenceState, _Mapping]] = ...) -> None: ...

class AdmitResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("sequence_id",)
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    def __init__(self, sequence_id: _Optional[str] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SubscribeRequest(_message.Message):
    __slots__ = ("router_id",)
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    def __init__(self, router_id: _Optional[str] = ...) -> None: ...

class StepOutput(_message.Message):
    __slots__ = ("sequences", "load")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[SequenceOutput]
    load: WorkerLoad
    def __init__(self, sequences: _Optional[_Iterable[_Union[SequenceOutput, _Mapping]]] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ...) -> None: ...

class SequenceOutput(_message.Message):
    __slots__ = ("sequence_id", "first_index", "tokens", "finish_reason", "error", "error_message", "queued_ns", "started_ns", "drawn_ns", "handed_over_ns", "cached_tokens", "prompt_logprobs", "proposed_tokens", "accepted_tokens", "moved")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    QUEUED_NS_FIELD_NUMBER: _ClassVar[int]
    STARTED_NS_FIELD_NUMBER: _ClassVar[int]
    DRAWN_NS_FIELD_NUMBER: _ClassVar[int]
    HANDED_OVER_NS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROPOSED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    first_index: int
    tokens: _containers.RepeatedCompositeFieldContainer[_common_pb2.Token]
    finish_reason: _common_pb2.FinishReason
    error: _common_pb2.ErrorReason
    error_message: str
    queued_ns: int
    started_ns: int
    drawn_ns: int
    handed_over_ns: int
    cached_tokens: int
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprobs]
    proposed_tokens: int
    accepted_tokens: int
    moved: bool
    def __init__(self, sequence_id: _Optional[str] = ..., first_index: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[_common_pb2.Token, _Mapping]]] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., error: _Optional[_Union[_common_pb2.ErrorReason, str]] = ..., error_message: _Optional[str] = ..., queued_ns: _Optional[int] = ..., started_ns: _Optional[int] = ..., drawn_ns: _Optional[int] = ..., handed_over_ns: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_common_pb2.TokenLogprobs, _Mapping]]] = ..., proposed_tokens: _Optional[int] = ..., accepted_tokens: _Optional[int] = ..., moved: bool = ...) -> None: ...

class HandoffRequest(_message.Message):
    __slots__ = ("begin", "chunk", "final", "quiet", "alive", "landed")
    class Alive(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    class Begin(_message.Message):
        __slots__ = ("ticket", "producer_address", "wire", "transport", "links")
        TICKET_FIELD_NUMBER: _ClassVar[int]
        PRODUCER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
        WIRE_FIELD_NUMBER: _ClassVar[int]
        TRANSPORT_FIELD_NUMBER: _ClassVar[int]
        LINKS_FIELD_NUMBER: _ClassVar[int]
        ticket: SignedTicket
        producer_address: str
        wire: WireVersions
        transport: str
        links: _containers.RepeatedCompositeFieldContainer[HandoffRequest.Link]
        def __init__(self, ticket: _Optional[_Union[SignedTicket, _Mapping]] = ..., producer_address: _Optional[str] = ..., wire: _Optional[_Union[WireVersions, _Mapping]] = ..., transport: _Optional[str] = ..., links: _Optional[_Iterable[_Union[HandoffRequest.Link, _Mapping]]] = ...) -> None: ...
    class Link(_message.Message):
        __slots__ = ("host", "link_id")
        HOST_FIELD_NUMBER: _ClassVar[int]
        LINK_ID_FIELD_NUMBER: _ClassVar[int]
        host: int
        link_id: int
        def __init__(self, host: _Optional[int] = ..., link_id: _Optional[int] = ...) -> None: ...
    class Landed(_message.Message):
        __slots__ = ("first_token", "num_tokens", "end_layer")
        FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
        NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
        END_LAYER_FIELD_NUMBER: _ClassVar[int]
        first_token: int
        num_tokens: int
        end_layer: int
        def __init__(self, first_token: _Optional[int] = ..., num_tokens: _Optional[int] = ..., end_layer: _Optional[int] = ...) -> None: ...
    class Chunk(_message.Message):
        __slots__ = ("first_token", "num_tokens", "digests")
        FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
        NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
        DIGESTS_FIELD_NUMBER: _ClassVar[int]
        first_token: int
        num_tokens: int
        digests: _containers.RepeatedScalarFieldContainer[bytes]
        def __init__(self, first_token: _Optional[int] = ..., num_tokens: _Optional[int] = ..., digests: _Optional[_Iterable[bytes]] = ...) -> None: ...
    class Final(_message.Message):
        __slots__ = ("sequence",)
        SEQUENCE_FIELD_NUMBER: _ClassVar[int]
        sequence: SequenceState
        def __init__(self, sequence: _Optional[_Union[SequenceState, _Mapping]] = ...) -> None: ...
    class Quiet(_message.Message):
        __slots__ = ("finished_without_handoff",)
        FINISHED_WITHOUT_HANDOFF_FIELD_NUMBER: _ClassVar[int]
        finished_without_handoff: bool
        def __init__(self, finished_without_handoff: bool = ...) -> None: ...
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    QUIET_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    LANDED_FIELD_NUMBER: _ClassVar[int]
    begin: HandoffRequest.Begin
    chunk: HandoffRequest.Chunk
    final: HandoffRequest.Final
    quiet: HandoffRequest.Quiet
    alive: HandoffRequest.Alive
    landed: HandoffRequest.Landed
    def __init__(self, begin: _Optional[_Union[HandoffRequest.Begin, _Mapping]] = ..., chunk: _Optional[_Union[HandoffRequest.Chunk, _Mapping]] = ..., final: _Optional[_Union[HandoffRequest.Final, _Mapping]] = ..., quiet: _Optional[_Union[HandoffRequest.Quiet, _Mapping]] = ..., alive: _Optional[_Union[HandoffRequest.Alive, _Mapping]] = ..., landed: _Optional[_Union[HandoffRequest.Landed, _Mapping]] = ...) -> None: ...

class HandoffReply(_message.Message):
    __slots__ = ("accepted", "admitted", "cancel")
    class Accepted(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    class Admitted(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    class Cancel(_message.Message):
        __slots__ = ("reason", "message")
        REASON_FIELD_NUMBER: _ClassVar[int]
        MESSAGE_FIELD_NUMBER: _ClassVar[int]
        reason: _common_pb2.ErrorReason
        message: str
        def __init__(self, reason: _Optional[_Union[_common_pb2.ErrorReason, str]] = ..., message: _Optional[str] = ...) -> None: ...
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    accepted: HandoffReply.Accepted
    admitted: HandoffReply.Admitted
    cancel: HandoffReply.Cancel
    def __init__(self, accepted: _Optional[_Union[HandoffReply.Accepted, _Mapping]] = ..., admitted: _Optional[_Union[HandoffReply.Admitted, _Mapping]] = ..., cancel: _Optional[_Union[HandoffReply.Cancel, _Mapping]] = ...) -> None: ...
