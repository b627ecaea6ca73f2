from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]

class ErrorReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_REASON_UNSPECIFIED: _ClassVar[ErrorReason]
    INVALID_PARAMETER: _ClassVar[ErrorReason]
    CONTEXT_TOO_LONG: _ClassVar[ErrorReason]
    UNKNOWN_MODEL: _ClassVar[ErrorReason]
    UNAUTHENTICATED: _ClassVar[ErrorReason]
    CANCELLED: _ClassVar[ErrorReason]
    DEADLINE_EXCEEDED: _ClassVar[ErrorReason]
    OVERLOADED: _ClassVar[ErrorReason]
    OUT_OF_BLOCKS: _ClassVar[ErrorReason]
    WORKER_LOST: _ClassVar[ErrorReason]
    DRAINING: _ClassVar[ErrorReason]
    NO_WORKERS: _ClassVar[ErrorReason]
    INTERNAL: _ClassVar[ErrorReason]
    TICKET_REFUSED: _ClassVar[ErrorReason]
    DIGEST_MISMATCH: _ClassVar[ErrorReason]
    TRANSFER_FAILED: _ClassVar[ErrorReason]
    TRANSPORT_UNAVAILABLE: _ClassVar[ErrorReason]
    INVALID_MODEL: _ClassVar[ErrorReason]
    UNSUPPORTED_MODEL: _ClassVar[ErrorReason]
    INVALID_CONFIGURATION: _ClassVar[ErrorReason]
    WIRE_MISMATCH: _ClassVar[ErrorReason]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
ERROR_REASON_UNSPECIFIED: ErrorReason
INVALID_PARAMETER: ErrorReason
CONTEXT_TOO_LONG: ErrorReason
UNKNOWN_MODEL: ErrorReason
UNAUTHENTICATED: ErrorReason
CANCELLED: ErrorReason
DEADLINE_EXCEEDED: ErrorReason
OVERLOADED: ErrorReason
OUT_OF_BLOCKS: ErrorReason
WORKER_LOST: ErrorReason
DRAINING: ErrorReason
NO_WORKERS: ErrorReason
INTERNAL: ErrorReason
TICKET_REFUSED: ErrorReason
DIGEST_MISMATCH: ErrorReason
TRANSFER_FAILED: ErrorReason
TRANSPORT_UNAVAILABLE: ErrorReason
INVALID_MODEL: ErrorReason
UNSUPPORTED_MODEL: ErrorReason
INVALID_CONFIGURATION: ErrorReason
WIRE_MISMATCH: ErrorReason

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop_token_ids", "ignore_eos", "logprobs", "prompt_logprobs", "forced_token_ids", "speculation", "constraint")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FORCED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    CONSTRAINT_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: int
    forced_token_ids: _containers.RepeatedScalarFieldContainer[int]
    speculation: Speculation
    constraint: Constraint
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: bool = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ..., forced_token_ids: _Optional[_Iterable[int]] = ..., speculation: _Optional[_Union[Speculation, _Mapping]] = ..., constraint: _Optional[_Union[Constraint, _Mapping]] = ...) -> None: ...

class Constraint(_message.Message):
    __slots__ = ("json_schema", "regex", "choice", "grammar")
    class Choice(_message.Message):
        __slots__ = ("texts",)
        TEXTS_FIELD_NUMBER: _ClassVar[int]
        texts: _containers.RepeatedScalarFieldContainer[str]
        def __init__(self, texts: _Optional[_Iterable[str]] = ...) -> None: ...
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    json_schema: str
    regex: str
    choice: Constraint.Choice
    grammar: str
    def __init__(self, json_schema: _Optional[str] = ..., regex: _Optional[str] = ..., choice: _Optional[_Union[Constraint.Choice, _Mapping]] = ..., grammar: _Optional[str] = ...) -> None: ...

class Speculation(_message.Message):
    __slots__ = ("kind", "num_draft_tokens", "ngram")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Speculation.Kind]
        PROMPT_LOOKUP: _ClassVar[Speculation.Kind]
        DRAFT_MODEL: _ClassVar[Speculation.Kind]
    KIND_UNSPECIFIED: Speculation.Kind
    PROMPT_LOOKUP: Speculation.Kind
    DRAFT_MODEL: Speculation.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NGRAM_FIELD_NUMBER: _ClassVar[int]
    kind: Speculation.Kind
    num_draft_tokens: int
    ngram: int
    def __init__(self, kind: _Optional[_Union[Speculation.Kind, str]] = ..., num_draft_tokens: _Optional[int] = ..., ngram: _Optional[int] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "revision")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    name: str
    revision: str
    def __init__(self, name: _Optional[str] = ..., revision: _Optional[str] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("logprob", "top_token_ids", "top_logprobs")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    top_token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprob: _Optional[float] = ..., top_token_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("token_id", "logprobs")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprobs: TokenLogprobs
    def __init__(self, token_id: _Optional[int] = ..., logprobs: _Optional[_Union[TokenLogprobs, _Mapping]] = ...) -> None: ...

class StageTimes(_message.Message):
    __slots__ = ("sent_ns", "prefill_queued_ns", "prefill_started_ns", "first_token_ns", "handed_over_ns", "decode_started_ns", "second_token_ns")
    SENT_NS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_QUEUED_NS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_STARTED_NS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_NS_FIELD_NUMBER: _ClassVar[int]
    HANDED_OVER_NS_FIELD_NUMBER: _ClassVar[int]
    DECODE_STARTED_NS_FIELD_NUMBER: _ClassVar[int]
    SECOND_TOKEN_NS_FIELD_NUMBER: _ClassVar[int]
    sent_ns: int
    prefill_queued_ns: int
    prefill_started_ns: int
    first_token_ns: int
    handed_over_ns: int
    decode_started_ns: int
    second_token_ns: int
    def __init__(self, sent_ns: _Optional[int] = ..., prefill_queued_ns: _Optional[int] = ..., prefill_started_ns: _Optional[int] = ..., first_token_ns: _Optional[int] = ..., handed_over_ns: _Optional[int] = ..., decode_started_ns: _Optional[int] = ..., second_token_ns: _Optional[int] = ...) -> None: ...

class TransferStats(_message.Message):
    __slots__ = ("transport", "bytes", "pieces", "sent_tokens", "skipped_tokens", "moving_s")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    SENT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MOVING_S_FIELD_NUMBER: _ClassVar[int]
    transport: str
    bytes: int
    pieces: int
    sent_tokens: int
    skipped_tokens: int
    moving_s: float
    def __init__(self, transport: _Optional[str] = ..., bytes: _Optional[int] = ..., pieces: _Optional[int] = ..., sent_tokens: _Optional[int] = ..., skipped_tokens: _Optional[int] = ..., moving_s: _Optional[float] = ...) -> None: ...

class Route(_message.Message):
    __slots__ = ("router_id", "prefill_worker_id", "decode_worker_id", "attempts", "transfer", "prefill_cached_tokens", "moves")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    PREFILL_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    prefill_worker_id: str
    decode_worker_id: str
    attempts: int
    transfer: TransferStats
    prefill_cached_tokens: int
    moves: int
    def __init__(self, router_id: _Optional[str] = ..., prefill_worker_id: _Optional[str] = ..., decode_worker_id: _Optional[str] = ..., attempts: _Optional[int] = ..., transfer: _Optional[_Union[TransferStats, _Mapping]] = ..., prefill_cached_tokens: _Optional[int] = ..., moves: _Optional[int] = ...) -> None: ...
