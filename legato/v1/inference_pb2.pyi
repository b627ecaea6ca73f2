from legato.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class AnswerOptions(_message.Message):
    __slots__ = ("sampling", "stop", "n", "resume", "request_id", "adapter")
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    sampling: _common_pb2.SamplingParams
    stop: _containers.RepeatedScalarFieldContainer[str]
    n: int
    resume: _containers.RepeatedCompositeFieldContainer[TokenIds]
    request_id: str
    adapter: str
    def __init__(self, sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., stop: _Optional[_Iterable[str]] = ..., n: _Optional[int] = ..., resume: _Optional[_Iterable[_Union[TokenIds, _Mapping]]] = ..., request_id: _Optional[str] = ..., adapter: _Optional[str] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("model", "text", "token_ids", "options")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    model: str
    text: str
    token_ids: TokenIds
    options: AnswerOptions
    def __init__(self, model: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., options: _Optional[_Union[AnswerOptions, _Mapping]] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class ChatRequest(_message.Message):
    __slots__ = ("model", "messages", "options")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    model: str
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    options: AnswerOptions
    def __init__(self, model: _Optional[str] = ..., messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ..., options: _Optional[_Union[AnswerOptions, _Mapping]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "proposed_tokens", "accepted_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROPOSED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    proposed_tokens: int
    accepted_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., proposed_tokens: _Optional[int] = ..., accepted_tokens: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("started", "piece", "finished")
    class Started(_message.Message):
        __slots__ = ("request_id", "model", "prompt_token_ids", "seed")
        REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
        MODEL_FIELD_NUMBER: _ClassVar[int]
        PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
        SEED_FIELD_NUMBER: _ClassVar[int]
        request_id: str
        model: str
        prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
        seed: int
        def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., seed: _Optional[int] = ...) -> None: ...
    class Piece(_message.Message):
        __slots__ = ("choice", "first_index", "tokens", "text", "prompt_logprobs", "stages")
        CHOICE_FIELD_NUMBER: _ClassVar[int]
        FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
        TOKENS_FIELD_NUMBER: _ClassVar[int]
        TEXT_FIELD_NUMBER: _ClassVar[int]
        PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
        STAGES_FIELD_NUMBER: _ClassVar[int]
        choice: int
        first_index: int
        tokens: _containers.RepeatedCompositeFieldContainer[_common_pb2.Token]
        text: str
        prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprobs]
        stages: _common_pb2.StageTimes
        def __init__(self, choice: _Optional[int] = ..., first_index: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[_common_pb2.Token, _Mapping]]] = ..., text: _Optional[str] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_common_pb2.TokenLogprobs, _Mapping]]] = ..., stages: _Optional[_Union[_common_pb2.StageTimes, _Mapping]] = ...) -> None: ...
    class Finished(_message.Message):
        __slots__ = ("choice", "reason", "usage", "stages", "route", "text", "stop_string")
        CHOICE_FIELD_NUMBER: _ClassVar[int]
        REASON_FIELD_NUMBER: _ClassVar[int]
        USAGE_FIELD_NUMBER: _ClassVar[int]
        STAGES_FIELD_NUMBER: _ClassVar[int]
        ROUTE_FIELD_NUMBER: _ClassVar[int]
        TEXT_FIELD_NUMBER: _ClassVar[int]
        STOP_STRING_FIELD_NUMBER: _ClassVar[int]
        choice: int
        reason: _common_pb2.FinishReason
        usage: Usage
        stages: _common_pb2.StageTimes
        route: _common_pb2.Route
        text: str
        stop_string: str
        def __init__(self, choice: _Optional[int] = ..., reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., stages: _Optional[_Union[_common_pb2.StageTimes, _Mapping]] = ..., route: _Optional[_Union[_common_pb2.Route, _Mapping]] = ..., text: _Optional[str] = ..., stop_string: _Optional[str] = ...) -> None: ...
    STARTED_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    started: GenerateResponse.Started
    piece: GenerateResponse.Piece
    finished: GenerateResponse.Finished
    def __init__(self, started: _Optional[_Union[GenerateResponse.Started, _Mapping]] = ..., piece: _Optional[_Union[GenerateResponse.Piece, _Mapping]] = ..., finished: _Optional[_Union[GenerateResponse.Finished, _Mapping]] = ...) -> None: ...

class TokenizeRequest(_message.Message):
    __slots__ = ("model", "text", "messages")
    class ChatMessages(_message.Message):
        __slots__ = ("messages",)
        MESSAGES_FIELD_NUMBER: _ClassVar[int]
        messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
        def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    model: str
    text: str
    messages: TokenizeRequest.ChatMessages
    def __init__(self, model: _Optional[str] = ..., text: _Optional[str] = ..., messages: _Optional[_Union[TokenizeRequest.ChatMessages, _Mapping]] = ...) -> None: ...

class TokenizeResponse(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class DetokenizeRequest(_message.Message):
    __slots__ = ("model", "token_ids")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    model: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, model: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class DetokenizeResponse(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    class Model(_message.Message):
        __slots__ = ("id", "revision", "max_context_tokens", "vocab_size", "chat", "adapters")
        ID_FIELD_NUMBER: _ClassVar[int]
        REVISION_FIELD_NUMBER: _ClassVar[int]
        MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
        VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
        CHAT_FIELD_NUMBER: _ClassVar[int]
        ADAPTERS_FIELD_NUMBER: _ClassVar[int]
        id: str
        revision: str
        max_context_tokens: int
        vocab_size: int
        chat: bool
        adapters: _containers.RepeatedCompositeFieldContainer[_common_pb2.Adapter]
        def __init__(self, id: _Optional[str] = ..., revision: _Optional[str] = ..., max_context_tokens: _Optional[int] = ..., vocab_size: _Optional[int] = ..., chat: bool = ..., adapters: _Optional[_Iterable[_Union[_common_pb2.Adapter, _Mapping]]] = ...) -> None: ...
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ListModelsResponse.Model]
    def __init__(self, models: _Optional[_Iterable[_Union[ListModelsResponse.Model, _Mapping]]] = ...) -> None: ...

class GetClusterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetClusterResponse(_message.Message):
    __slots__ = ("router_id", "workers", "router")
    class WorkerView(_message.Message):
        __slots__ = ("worker_id", "role", "address", "state", "waiting_requests", "running_requests", "charged_tokens", "total_blocks", "free_blocks", "tokens_per_s", "transferred_bytes", "transport", "steps", "preemptions", "refused_handoffs", "pid", "moved_sequences", "quarantined_blocks")
        WORKER_ID_FIELD_NUMBER: _ClassVar[int]
        ROLE_FIELD_NUMBER: _ClassVar[int]
        ADDRESS_FIELD_NUMBER: _ClassVar[int]
        STATE_FIELD_NUMBER: _ClassVar[int]
        WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
        RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
        CHARGED_TOKENS_FIELD_NUMBER: _ClassVar[int]
        TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
        FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
        TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
        TRANSFERRED_BYTES_FIELD_NUMBER: _ClassVar[int]
        TRANSPORT_FIELD_NUMBER: _ClassVar[int]
        STEPS_FIELD_NUMBER: _ClassVar[int]
        PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
        REFUSED_HANDOFFS_FIELD_NUMBER: _ClassVar[int]
        PID_FIELD_NUMBER: _ClassVar[int]
        MOVED_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
        QUARANTINED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
        worker_id: str
        role: str
        address: str
        state: str
        waiting_requests: int
        running_requests: int
        charged_tokens: int
        total_blocks: int
        free_blocks: int
        tokens_per_s: float
        transferred_bytes: int
        transport: str
        steps: int
        preemptions: int
        refused_handoffs: int
        pid: int
        moved_sequences: int
        quarantined_blocks: int
        def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[str] = ..., address: _Optional[str] = ..., state: _Optional[str] = ..., waiting_requests: _Optional[int] = ..., running_requests: _Optional[int] = ..., charged_tokens: _Optional[int] = ..., total_blocks: _Optional[int] = ..., free_blocks: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., transferred_bytes: _Optional[int] = ..., transport: _Optional[str] = ..., steps: _Optional[int] = ..., preemptions: _Optional[int] = ..., refused_handoffs: _Optional[int] = ..., pid: _Optional[int] = ..., moved_sequences: _Optional[int] = ..., quarantined_blocks: _Optional[int] = ...) -> None: ...
    class RouterView(_message.Message):
        __slots__ = ("waiting_requests", "running_requests", "finished_requests", "failed_requests", "ttft_s", "itl_s", "registry_reachable")
        WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
        RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
        FINISHED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
        FAILED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
        TTFT_S_FIELD_NUMBER: _ClassVar[int]
        ITL_S_FIELD_NUMBER: _ClassVar[int]
        REGISTRY_REACHABLE_FIELD_NUMBER: _ClassVar[int]
        waiting_requests: int
        running_requests: int
        finished_requests: int
        failed_requests: int
        ttft_s: GetClusterResponse.Quantiles
        itl_s: GetClusterResponse.Quantiles
        registry_reachable: bool
        def __init__(self, waiting_requests: _Optional[int] = ..., running_requests: _Optional[int] = ..., finished_requests: _Optional[int] = ..., failed_requests: _Optional[int] = ..., ttft_s: _Optional[_Union[GetClusterResponse.Quantiles, _Mapping]] = ..., itl_s: _Optional[_Union[GetClusterResponse.Quantiles, _Mapping]] = ..., registry_reachable: bool = ...) -> None: ...
    class Quantiles(_message.Message):
        __slots__ = ("p50", "p90", "p99", "count")
        P50_FIELD_NUMBER: _ClassVar[int]
        P90_FIELD_NUMBER: _ClassVar[int]
        P99_FIELD_NUMBER: _ClassVar[int]
        COUNT_FIELD_NUMBER: _ClassVar[int]
        p50: float
        p90: float
        p99: float
        count: int
        def __init__(self, p50: _Optional[float] = ..., p90: _Optional[float] = ..., p99: _Optional[float] = ..., count: _Optional[int] = ...) -> None: ...
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    workers: _containers.RepeatedCompositeFieldContainer[GetClusterResponse.WorkerView]
    router: GetClusterResponse.RouterView
    def __init__(self, router_id: _Optional[str] = ..., workers: _Optional[_Iterable[_Union[GetClusterResponse.WorkerView, _Mapping]]] = ..., router: _Optional[_Union[GetClusterResponse.RouterView, _Mapping]] = ...) -> None: ...
