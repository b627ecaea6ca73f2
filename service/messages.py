"""Between the wire's messages (legato.v1) and the house's words (spec): one function each way."""

from __future__ import annotations

from types import MappingProxyType

from legato.v1 import common_pb2, worker_pb2
from spec.constraint import Constraint
from spec.dtype import Dtype
from spec.errors import InvalidParameter
from spec.layout import KVLayout
from spec.sampling import SamplingParams, Speculation, SpeculationKind, TokenLogprobs

_FINISH_TO_PROTO: dict[str | None, common_pb2.FinishReason] = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    "stop": common_pb2.FINISH_REASON_STOP,
    "length": common_pb2.FINISH_REASON_LENGTH,
}
_SPECULATION_KINDS: dict[int, SpeculationKind] = {
    common_pb2.Speculation.PROMPT_LOOKUP: "prompt_lookup",
    common_pb2.Speculation.DRAFT_MODEL: "draft_model",
}


def sampling_from_proto(message: common_pb2.SamplingParams) -> SamplingParams:
    """Ranges are not looked at: SamplingParams.validate() does, where the vocabulary is known. Raises InvalidParameter
    for a kind of speculation or constraint that is not known.

    An absent seed reads 0, so whoever draws one (the router) looks at `message.HasField("seed")` first.
    """
    return SamplingParams(
        max_tokens=message.max_tokens,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=MappingProxyType(dict(message.logit_bias)),
        seed=message.seed,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        forced_token_ids=tuple(message.forced_token_ids),
        speculation=_speculation(message.speculation) if message.HasField("speculation") else None,
        constraint=constraint_from_proto(message.constraint) if message.HasField("constraint") else None,
    )


def _speculation(message: common_pb2.Speculation) -> Speculation:
    if (kind := _SPECULATION_KINDS.get(message.kind)) is None:
        raise InvalidParameter(f"is of kind {message.kind}, which is not known", field="speculation")
    return Speculation(kind, message.num_draft_tokens, message.ngram)


def sampling_to_proto(params: SamplingParams) -> common_pb2.SamplingParams:
    """What sampling_from_proto() reads back; floats to the precision of the wire."""
    guessing = params.speculation
    return common_pb2.SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        seed=params.seed,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        forced_token_ids=params.forced_token_ids,
        speculation=None
        if guessing is None
        else common_pb2.Speculation(
            kind=next(number for number, kind in _SPECULATION_KINDS.items() if kind == guessing.kind),  # type: ignore[arg-type]
            num_draft_tokens=guessing.num_draft_tokens,
            ngram=guessing.ngram,
        ),
        constraint=None if params.constraint is None else constraint_to_proto(params.constraint),
    )


def constraint_from_proto(message: common_pb2.Constraint) -> Constraint:
    """Raises InvalidParameter for a kind that is not known."""
    match message.WhichOneof("kind"):
        case "json_schema":
            return Constraint("json_schema", (message.json_schema,))
        case "regex":
            return Constraint("regex", (message.regex,))
        case "choice":
            return Constraint("choice", tuple(message.choice.texts))
        case "grammar":
            return Constraint("grammar", (message.grammar,))
    raise InvalidParameter("is of no kind that is known", field="constraint")


def constraint_to_proto(constraint: Constraint) -> common_pb2.Constraint:
    if constraint.kind == "choice":
        return common_pb2.Constraint(choice=common_pb2.Constraint.Choice(texts=constraint.texts))
    return common_pb2.Constraint(**{constraint.kind: constraint.texts[0]})  # type: ignore[arg-type]


def logprobs_to_proto(logprobs: TokenLogprobs) -> common_pb2.TokenLogprobs:
    return common_pb2.TokenLogprobs(
        logprob=logprobs.logprob,
        top_token_ids=[token_id for token_id, _ in logprobs.top],
        top_logprobs=[logprob for _, logprob in logprobs.top],
    )


def logprobs_from_proto(message: common_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(message.logprob, tuple(zip(message.top_token_ids, message.top_logprobs, strict=True)))


def token_to_proto(token_id: int, logprobs: TokenLogprobs | None = None) -> common_pb2.Token:
    if logprobs is None:
        return common_pb2.Token(token_id=token_id)
    return common_pb2.Token(token_id=token_id, logprobs=logprobs_to_proto(logprobs))


def layout_to_proto(layout: KVLayout) -> worker_pb2.KVLayout:
    return worker_pb2.KVLayout(
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        block_tokens=layout.block_tokens,
        dtype=layout.dtype.value,
        planes=layout.planes,
    )


def layout_from_proto(message: worker_pb2.KVLayout) -> KVLayout:
    """Raises InvalidParameter for a size of 0, InvalidConfiguration for a dtype that is not known."""
    for field in ("num_layers", "num_kv_heads", "head_dim", "block_tokens"):
        if getattr(message, field) < 1:
            raise InvalidParameter("must be at least 1, is 0", field=f"kv_layout.{field}")
    return KVLayout(
        num_layers=message.num_layers,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        block_tokens=message.block_tokens,
        dtype=Dtype.parse(message.dtype),
        planes=message.planes or 2,
    )


def finish_to_proto(reason: str | None) -> common_pb2.FinishReason:
    """None (not finished) is FINISH_REASON_UNSPECIFIED."""
    return _FINISH_TO_PROTO[reason]


def model_identity(
    model_id: str,
    revision: str,
    compute_dtype: Dtype,
    quantisation: str = "auto",
    activations: str = "kept",
    adapter: str = "",
) -> worker_pb2.ModelIdentity:
    """What must be equal for two workers to exchange KV. Compare with ==; `revision` is ModelFiles.revision,
    `quantisation` and `activations` the engine's options, for what is rounded otherwise computes other KV, and
    `adapter` an adapter_id()."""
    computed = compute_dtype.value if quantisation == "auto" else f"{compute_dtype.value}/{quantisation}"
    computed = computed if activations == "kept" else f"{computed}/{activations} activations"
    return worker_pb2.ModelIdentity(model_id=model_id, revision=revision, adapter=adapter, compute_dtype=computed)


def adapter_id(name: str, revision: str) -> str:
    """An adapter as identities, sequences and steps name it; no name holds an @."""
    return f"{name}@{revision}"


def with_adapter(identity: worker_pb2.ModelIdentity, adapter: str) -> worker_pb2.ModelIdentity:
    """Of the same model with that adapter's id, "" for none."""
    changed = worker_pb2.ModelIdentity()
    changed.CopyFrom(identity)
    changed.adapter = adapter
    return changed


def serves(record: worker_pb2.WorkerRecord, identity: worker_pb2.ModelIdentity) -> bool:
    """Whether a worker computes exactly that: the model, its revision and dtype, and the adapter in that revision."""
    if with_adapter(record.identity, identity.adapter) != identity:
        return False
    return not identity.adapter or any(adapter_id(a.name, a.revision) == identity.adapter for a in record.adapters)


def identity_text(identity: worker_pb2.ModelIdentity) -> str:
    """For people: "smollm2@b179c952 bfloat16"."""
    adapter = f"+{identity.adapter}" if identity.adapter else ""
    return f"{identity.model_id}{adapter}@{identity.revision[:8]} {identity.compute_dtype}"
