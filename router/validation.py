"""What a client may ask for. Every refusal names the field and is raised before a worker hears of the request."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Sequence

from legato.v1 import common_pb2, inference_pb2
from router.registry import Model
from service.messages import sampling_from_proto
from spec.errors import ContextTooLong, InvalidParameter
from spec.sampling import MAX_LOGIT_BIAS, MAX_STOP_TOKENS, SamplingParams, check_token_ids

MAX_CHOICES = 64
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_REQUEST_ID_CHARACTERS = 128
MAX_ADAPTER_CHARACTERS = 64  # service/config.py takes no longer name
SEEDS = 1 << 64


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """One request, checked. `sampling.seed` is set, `sampling.max_tokens` fits into the context."""

    prompt_token_ids: list[int]
    sampling: common_pb2.SamplingParams
    stops: tuple[str, ...]
    choices: int
    resume: tuple[list[int], ...]  # one per choice

    def sampling_of(self, choice: int) -> common_pb2.SamplingParams:
        sampling = common_pb2.SamplingParams()
        sampling.CopyFrom(self.sampling)
        sampling.seed = (self.sampling.seed + choice) % SEEDS
        if choice:
            sampling.ClearField("prompt_logprobs")  # they go out once
        return sampling


def check_options(options: inference_pb2.AnswerOptions, model: Model, context_tokens: int) -> SamplingParams:
    """Raises InvalidParameter. Needs no prompt: what is wrong here is refused before anything is tokenised."""
    _check_lengths(options, context_tokens)
    params = sampling_from_proto(options.sampling)
    params.validate(model.vocab_size)
    if options.n > MAX_CHOICES:
        raise InvalidParameter(f"must be at most {MAX_CHOICES}, is {options.n}", field="n")
    if len(options.stop) > MAX_STOP_STRINGS:
        raise InvalidParameter(f"holds {len(options.stop)} strings, at most {MAX_STOP_STRINGS} are taken", field="stop")
    for stop in options.stop:
        if not stop:
            raise InvalidParameter("holds an empty string, which would end every answer at once", field="stop")
        if len(stop) > MAX_STOP_CHARACTERS:
            raise InvalidParameter(
                f"holds a string of {len(stop)} characters, at most {MAX_STOP_CHARACTERS} are taken", field="stop"
            )
    if len(options.resume) > max(1, options.n):
        raise InvalidParameter(
            f"holds tokens of {len(options.resume)} answers, {max(1, options.n)} asked for", field="resume"
        )
    for tokens in options.resume:
        check_token_ids(tokens.ids, model.vocab_size, field="resume")
    if len(options.request_id) > MAX_REQUEST_ID_CHARACTERS or not options.request_id.isprintable():
        raise InvalidParameter(f"must be at most {MAX_REQUEST_ID_CHARACTERS} printable characters", field="request_id")
    return params


def check_adapter(name: str) -> str:
    """Raises InvalidParameter for what no adapter's name can be: one that is longer would swell the refusal."""
    if len(name) > MAX_ADAPTER_CHARACTERS:
        raise InvalidParameter(f"must be at most {MAX_ADAPTER_CHARACTERS} characters, has {len(name)}", field="adapter")
    return name


def _check_lengths(options: inference_pb2.AnswerOptions, context_tokens: int) -> None:
    """Of what is read id by id later: a list of millions is refused unread, for reading it would hold everyone up."""
    sampling = options.sampling
    counted = [
        ("stop_token_ids", len(sampling.stop_token_ids), MAX_STOP_TOKENS),
        ("logit_bias", len(sampling.logit_bias), MAX_LOGIT_BIAS),
    ]
    for field, ids, most in counted:
        if ids > most:
            raise InvalidParameter(f"holds {ids} ids, at most {most} are taken", field=field)
    given = [("forced_token_ids", len(sampling.forced_token_ids))]
    given += [("resume", len(tokens.ids)) for tokens in options.resume[:MAX_CHOICES]]
    for field, tokens in given:
        if tokens > context_tokens:
            raise ContextTooLong(
                f"holds {tokens} tokens; the context holds {context_tokens}", field=field, context_tokens=context_tokens
            )


def most_text_bytes(model: Model, context_tokens: int) -> int:
    """Of a text that can fit: no token stands for more than `longest_token_bytes` of it."""
    return context_tokens * model.longest_token_bytes


def check_messages(messages: Sequence[inference_pb2.ChatMessage], context_tokens: int) -> None:
    """A message takes a token at least: more than the context holds are refused unread."""
    if not messages:
        raise InvalidParameter("must hold at least one message, is empty", field="messages")
    if len(messages) > context_tokens:
        raise ContextTooLong(
            f"holds {len(messages)} messages; the context holds {context_tokens} tokens",
            field="messages",
            context_tokens=context_tokens,
        )


def check_text_size(texts: Iterable[str], model: Model, context_tokens: int) -> int:
    """Characters in all. Refuses, before it is tokenised, what cannot fit."""
    texts, most_bytes = list(texts), most_text_bytes(model, context_tokens)
    characters = size_bytes = sum(len(text) for text in texts)  # never more than bytes, and counted at once
    if size_bytes <= most_bytes:
        size_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    if size_bytes > most_bytes:
        raise ContextTooLong(
            f"has {size_bytes} bytes; the context of {context_tokens} tokens holds at most {most_bytes}",
            field="prompt",
            context_tokens=context_tokens,
        )
    return characters


def check_ids_size(token_ids: Sequence[int], model: Model, context_tokens: int) -> None:
    """Of ids to make a text of: as many as the longest text that is taken may have, so that it can be given back."""
    most = most_text_bytes(model, context_tokens)
    if len(token_ids) > most:
        raise InvalidParameter(f"holds {len(token_ids)} ids, at most {most} are taken", field="token_ids")


def check_prompt(token_ids: Sequence[int], model: Model, context_tokens: int) -> None:
    """Raises InvalidParameter for an empty prompt and ids out of range, ContextTooLong where no answer fits behind."""
    if not token_ids:
        raise InvalidParameter("must hold at least one token, is empty", field="prompt")
    if len(token_ids) >= context_tokens:
        raise ContextTooLong(
            f"has {len(token_ids)} tokens; the context holds {context_tokens}, the answer's first token included",
            field="prompt",
            prompt_tokens=len(token_ids),
            context_tokens=context_tokens,
        )
    check_token_ids(token_ids, model.vocab_size, field="prompt")


def asked(options: inference_pb2.AnswerOptions, prompt_token_ids: list[int], context_tokens: int) -> Asked:
    """Draws the seed where none is given, and cuts max_tokens to what the context has room for behind the prompt."""
    sampling = common_pb2.SamplingParams()
    sampling.CopyFrom(options.sampling)
    room_tokens = context_tokens - len(prompt_token_ids)
    longest = max([len(sampling.forced_token_ids), *(len(tokens.ids) for tokens in options.resume)])
    if longest > room_tokens:
        raise ContextTooLong(
            f"has {len(prompt_token_ids)} tokens and the answer is given {longest}; the context holds {context_tokens}",
            field="prompt",
            context_tokens=context_tokens,
        )
    sampling.max_tokens = min(sampling.max_tokens, room_tokens)
    if not sampling.HasField("seed"):
        sampling.seed = secrets.randbits(64)
    choices = max(1, options.n)
    given = [list(tokens.ids) for tokens in options.resume]
    return Asked(
        prompt_token_ids=prompt_token_ids,
        sampling=sampling,
        stops=tuple(dict.fromkeys(options.stop)),
        choices=choices,
        resume=tuple(given + [[]] * (choices - len(given))),
    )
