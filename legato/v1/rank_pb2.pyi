from legato.v1 import common_pb2 as _common_pb2
from legato.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RankCommand(_message.Message):
    __slots__ = ("load", "warm_up", "execute", "copy", "stop", "replicate", "compile", "measure", "place_kv", "keep_kv", "digest", "has_link", "cut_link", "request_id")
    class Load(_message.Message):
        __slots__ = ("join_address", "layer_costs", "head_cost", "adapters")
        JOIN_ADDRESS_FIELD_NUMBER: _ClassVar[int]
        LAYER_COSTS_FIELD_NUMBER: _ClassVar[int]
        HEAD_COST_FIELD_NUMBER: _ClassVar[int]
        ADAPTERS_FIELD_NUMBER: _ClassVar[int]
        join_address: str
        layer_costs: _containers.RepeatedScalarFieldContainer[float]
        head_cost: float
        adapters: _containers.RepeatedScalarFieldContainer[str]
        def __init__(self, join_address: _Optional[str] = ..., layer_costs: _Optional[_Iterable[float]] = ..., head_cost: _Optional[float] = ..., adapters: _Optional[_Iterable[str]] = ...) -> None: ...
    class Measure(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    class KeepKV(_message.Message):
        __slots__ = ("host", "region_bytes", "probe_offset")
        HOST_FIELD_NUMBER: _ClassVar[int]
        REGION_BYTES_FIELD_NUMBER: _ClassVar[int]
        PROBE_OFFSET_FIELD_NUMBER: _ClassVar[int]
        host: int
        region_bytes: int
        probe_offset: int
        def __init__(self, host: _Optional[int] = ..., region_bytes: _Optional[int] = ..., probe_offset: _Optional[int] = ...) -> None: ...
    class PlaceKV(_message.Message):
        __slots__ = ("num_blocks", "memory_path", "offset_bytes")
        NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
        MEMORY_PATH_FIELD_NUMBER: _ClassVar[int]
        OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
        num_blocks: int
        memory_path: str
        offset_bytes: int
        def __init__(self, num_blocks: _Optional[int] = ..., memory_path: _Optional[str] = ..., offset_bytes: _Optional[int] = ...) -> None: ...
    class WarmUp(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    class Replicate(_message.Message):
        __slots__ = ("copies",)
        COPIES_FIELD_NUMBER: _ClassVar[int]
        copies: int
        def __init__(self, copies: _Optional[int] = ...) -> None: ...
    class Copy(_message.Message):
        __slots__ = ("to_device", "block_ids", "first_layer", "num_layers")
        TO_DEVICE_FIELD_NUMBER: _ClassVar[int]
        BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
        FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
        NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
        to_device: bool
        block_ids: _containers.RepeatedScalarFieldContainer[int]
        first_layer: int
        num_layers: int
        def __init__(self, to_device: bool = ..., block_ids: _Optional[_Iterable[int]] = ..., first_layer: _Optional[int] = ..., num_layers: _Optional[int] = ...) -> None: ...
    class Digest(_message.Message):
        __slots__ = ("block_ids", "first_token", "num_tokens", "first_layer", "num_layers")
        BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
        FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
        NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
        FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
        NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
        block_ids: _containers.RepeatedScalarFieldContainer[int]
        first_token: int
        num_tokens: int
        first_layer: int
        num_layers: int
        def __init__(self, block_ids: _Optional[_Iterable[int]] = ..., first_token: _Optional[int] = ..., num_tokens: _Optional[int] = ..., first_layer: _Optional[int] = ..., num_layers: _Optional[int] = ...) -> None: ...
    class HasLink(_message.Message):
        __slots__ = ("transport", "link_id")
        TRANSPORT_FIELD_NUMBER: _ClassVar[int]
        LINK_ID_FIELD_NUMBER: _ClassVar[int]
        transport: str
        link_id: int
        def __init__(self, transport: _Optional[str] = ..., link_id: _Optional[int] = ...) -> None: ...
    class CutLink(_message.Message):
        __slots__ = ("transport", "link_id")
        TRANSPORT_FIELD_NUMBER: _ClassVar[int]
        LINK_ID_FIELD_NUMBER: _ClassVar[int]
        transport: str
        link_id: int
        def __init__(self, transport: _Optional[str] = ..., link_id: _Optional[int] = ...) -> None: ...
    class Stop(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    LOAD_FIELD_NUMBER: _ClassVar[int]
    WARM_UP_FIELD_NUMBER: _ClassVar[int]
    EXECUTE_FIELD_NUMBER: _ClassVar[int]
    COPY_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    REPLICATE_FIELD_NUMBER: _ClassVar[int]
    COMPILE_FIELD_NUMBER: _ClassVar[int]
    MEASURE_FIELD_NUMBER: _ClassVar[int]
    PLACE_KV_FIELD_NUMBER: _ClassVar[int]
    KEEP_KV_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    HAS_LINK_FIELD_NUMBER: _ClassVar[int]
    CUT_LINK_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    load: RankCommand.Load
    warm_up: RankCommand.WarmUp
    execute: RankPlan
    copy: RankCommand.Copy
    stop: RankCommand.Stop
    replicate: RankCommand.Replicate
    compile: _common_pb2.Constraint
    measure: RankCommand.Measure
    place_kv: RankCommand.PlaceKV
    keep_kv: RankCommand.KeepKV
    digest: RankCommand.Digest
    has_link: RankCommand.HasLink
    cut_link: RankCommand.CutLink
    request_id: int
    def __init__(self, load: _Optional[_Union[RankCommand.Load, _Mapping]] = ..., warm_up: _Optional[_Union[RankCommand.WarmUp, _Mapping]] = ..., execute: _Optional[_Union[RankPlan, _Mapping]] = ..., copy: _Optional[_Union[RankCommand.Copy, _Mapping]] = ..., stop: _Optional[_Union[RankCommand.Stop, _Mapping]] = ..., replicate: _Optional[_Union[RankCommand.Replicate, _Mapping]] = ..., compile: _Optional[_Union[_common_pb2.Constraint, _Mapping]] = ..., measure: _Optional[_Union[RankCommand.Measure, _Mapping]] = ..., place_kv: _Optional[_Union[RankCommand.PlaceKV, _Mapping]] = ..., keep_kv: _Optional[_Union[RankCommand.KeepKV, _Mapping]] = ..., digest: _Optional[_Union[RankCommand.Digest, _Mapping]] = ..., has_link: _Optional[_Union[RankCommand.HasLink, _Mapping]] = ..., cut_link: _Optional[_Union[RankCommand.CutLink, _Mapping]] = ..., request_id: _Optional[int] = ...) -> None: ...

class RankReport(_message.Message):
    __slots__ = ("hello", "progress", "ready", "result", "answered", "failed", "written", "measured", "kept")
    class Hello(_message.Message):
        __slots__ = ("rank", "pid", "host")
        RANK_FIELD_NUMBER: _ClassVar[int]
        PID_FIELD_NUMBER: _ClassVar[int]
        HOST_FIELD_NUMBER: _ClassVar[int]
        rank: int
        pid: int
        host: str
        def __init__(self, rank: _Optional[int] = ..., pid: _Optional[int] = ..., host: _Optional[str] = ...) -> None: ...
    class Measured(_message.Message):
        __slots__ = ("device", "total_bytes", "free_bytes", "weight_bytes", "activation_bytes", "host_free_bytes")
        DEVICE_FIELD_NUMBER: _ClassVar[int]
        TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
        FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
        WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
        ACTIVATION_BYTES_FIELD_NUMBER: _ClassVar[int]
        HOST_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
        device: str
        total_bytes: int
        free_bytes: int
        weight_bytes: int
        activation_bytes: int
        host_free_bytes: int
        def __init__(self, device: _Optional[str] = ..., total_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., weight_bytes: _Optional[int] = ..., activation_bytes: _Optional[int] = ..., host_free_bytes: _Optional[int] = ...) -> None: ...
    class Progress(_message.Message):
        __slots__ = ("fraction",)
        FRACTION_FIELD_NUMBER: _ClassVar[int]
        fraction: float
        def __init__(self, fraction: _Optional[float] = ...) -> None: ...
    class Ready(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    class Kept(_message.Message):
        __slots__ = ("memory_path", "endpoints")
        MEMORY_PATH_FIELD_NUMBER: _ClassVar[int]
        ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
        memory_path: str
        endpoints: _containers.RepeatedCompositeFieldContainer[_worker_pb2.TransportEndpoint]
        def __init__(self, memory_path: _Optional[str] = ..., endpoints: _Optional[_Iterable[_Union[_worker_pb2.TransportEndpoint, _Mapping]]] = ...) -> None: ...
    class Answered(_message.Message):
        __slots__ = ("request_id", "reason", "message", "sums", "has_link")
        REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
        REASON_FIELD_NUMBER: _ClassVar[int]
        MESSAGE_FIELD_NUMBER: _ClassVar[int]
        SUMS_FIELD_NUMBER: _ClassVar[int]
        HAS_LINK_FIELD_NUMBER: _ClassVar[int]
        request_id: int
        reason: _common_pb2.ErrorReason
        message: str
        sums: bytes
        has_link: bool
        def __init__(self, request_id: _Optional[int] = ..., reason: _Optional[_Union[_common_pb2.ErrorReason, str]] = ..., message: _Optional[str] = ..., sums: _Optional[bytes] = ..., has_link: bool = ...) -> None: ...
    class Written(_message.Message):
        __slots__ = ("step", "end")
        STEP_FIELD_NUMBER: _ClassVar[int]
        END_FIELD_NUMBER: _ClassVar[int]
        step: int
        end: int
        def __init__(self, step: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...
    class Failed(_message.Message):
        __slots__ = ("reason", "message")
        REASON_FIELD_NUMBER: _ClassVar[int]
        MESSAGE_FIELD_NUMBER: _ClassVar[int]
        reason: str
        message: str
        def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    hello: RankReport.Hello
    progress: RankReport.Progress
    ready: RankReport.Ready
    result: RankResult
    answered: RankReport.Answered
    failed: RankReport.Failed
    written: RankReport.Written
    measured: RankReport.Measured
    kept: RankReport.Kept
    def __init__(self, hello: _Optional[_Union[RankReport.Hello, _Mapping]] = ..., progress: _Optional[_Union[RankReport.Progress, _Mapping]] = ..., ready: _Optional[_Union[RankReport.Ready, _Mapping]] = ..., result: _Optional[_Union[RankResult, _Mapping]] = ..., answered: _Optional[_Union[RankReport.Answered, _Mapping]] = ..., failed: _Optional[_Union[RankReport.Failed, _Mapping]] = ..., written: _Optional[_Union[RankReport.Written, _Mapping]] = ..., measured: _Optional[_Union[RankReport.Measured, _Mapping]] = ..., kept: _Optional[_Union[RankReport.Kept, _Mapping]] = ...) -> None: ...

class RankPlan(_message.Message):
    __slots__ = ("step", "slices", "layer_ends")
    class Slice(_message.Message):
        __slots__ = ("sequence_id", "token_ids", "start", "block_table", "draw", "prompt_logprobs", "prompt_targets", "adapter", "guessed_token_ids")
        SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
        TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
        START_FIELD_NUMBER: _ClassVar[int]
        BLOCK_TABLE_FIELD_NUMBER: _ClassVar[int]
        DRAW_FIELD_NUMBER: _ClassVar[int]
        PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
        PROMPT_TARGETS_FIELD_NUMBER: _ClassVar[int]
        ADAPTER_FIELD_NUMBER: _ClassVar[int]
        GUESSED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
        sequence_id: str
        token_ids: _containers.RepeatedScalarFieldContainer[int]
        start: int
        block_table: _containers.RepeatedScalarFieldContainer[int]
        draw: RankPlan.Draw
        prompt_logprobs: int
        prompt_targets: _containers.RepeatedScalarFieldContainer[int]
        adapter: str
        guessed_token_ids: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, sequence_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., start: _Optional[int] = ..., block_table: _Optional[_Iterable[int]] = ..., draw: _Optional[_Union[RankPlan.Draw, _Mapping]] = ..., prompt_logprobs: _Optional[int] = ..., prompt_targets: _Optional[_Iterable[int]] = ..., adapter: _Optional[str] = ..., guessed_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...
    class Draw(_message.Message):
        __slots__ = ("params", "position", "prompt_tokens", "history")
        PARAMS_FIELD_NUMBER: _ClassVar[int]
        POSITION_FIELD_NUMBER: _ClassVar[int]
        PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
        HISTORY_FIELD_NUMBER: _ClassVar[int]
        params: bytes
        position: int
        prompt_tokens: int
        history: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, params: _Optional[bytes] = ..., position: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., history: _Optional[_Iterable[int]] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    LAYER_ENDS_FIELD_NUMBER: _ClassVar[int]
    step: int
    slices: _containers.RepeatedCompositeFieldContainer[RankPlan.Slice]
    layer_ends: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, step: _Optional[int] = ..., slices: _Optional[_Iterable[_Union[RankPlan.Slice, _Mapping]]] = ..., layer_ends: _Optional[_Iterable[int]] = ...) -> None: ...

class RankResult(_message.Message):
    __slots__ = ("step", "busy_s", "outcomes")
    class Outcome(_message.Message):
        __slots__ = ("drawn", "prompt_logprobs")
        DRAWN_FIELD_NUMBER: _ClassVar[int]
        PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
        drawn: _containers.RepeatedCompositeFieldContainer[RankResult.Drawn]
        prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprobs]
        def __init__(self, drawn: _Optional[_Iterable[_Union[RankResult.Drawn, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_common_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...
    class Drawn(_message.Message):
        __slots__ = ("token_id", "logprobs", "completes", "refusal")
        TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
        LOGPROBS_FIELD_NUMBER: _ClassVar[int]
        COMPLETES_FIELD_NUMBER: _ClassVar[int]
        REFUSAL_FIELD_NUMBER: _ClassVar[int]
        token_id: int
        logprobs: _common_pb2.TokenLogprobs
        completes: bool
        refusal: str
        def __init__(self, token_id: _Optional[int] = ..., logprobs: _Optional[_Union[_common_pb2.TokenLogprobs, _Mapping]] = ..., completes: bool = ..., refusal: _Optional[str] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    step: int
    busy_s: float
    outcomes: _containers.RepeatedCompositeFieldContainer[RankResult.Outcome]
    def __init__(self, step: _Optional[int] = ..., busy_s: _Optional[float] = ..., outcomes: _Optional[_Iterable[_Union[RankResult.Outcome, _Mapping]]] = ...) -> None: ...
