"""Builds the requests of both clients. What the wire can carry the cluster judges; only what it cannot carry is refused
here, as InvalidParameter: wrong types, lone surrogates, numbers outside their field."""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import math
import operator
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar, cast

from legato.errors import InvalidParameter
from legato.types import Message
from legato.v1 import common_pb2, inference_pb2

Prompt = str | Iterable[int]
SpeculationKind = Literal["prompt_lookup", "draft_model"]
LARGEST_FLOAT = (2 - 2**-23) * 2.0**127  # a float's on the wire


class Sampling(TypedDict, total=False):
    """The keyword arguments of answer_options, for type checkers; a test holds the two together."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Iterable[int]
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    n: int
    forced_token_ids: Iterable[int]
    speculation: SpeculationKind | None
    num_draft_tokens: int
    ngram: int
    adapter: str
    json_schema: Mapping[str, Any] | bool | str | None
    regex: str | None
    choice: Iterable[str] | None
    grammar: str | None


def answer_options(
    *,
    max_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    stop_token_ids: Iterable[int] = (),
    ignore_eos: bool = False,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    n: int = 1,
    forced_token_ids: Iterable[int] = (),
    speculation: SpeculationKind | None = None,
    num_draft_tokens: int = 4,
    ngram: int = 3,
    adapter: str = "",
    json_schema: Mapping[str, Any] | bool | str | None = None,
    regex: str | None = None,
    choice: Iterable[str] | None = None,
    grammar: str | None = None,
) -> inference_pb2.AnswerOptions:
    """How an answer is drawn.

    max_tokens          tokens to generate at most, at least 1; cut to what the context leaves behind the prompt
    temperature         0 = greedy, 1 = the model's own distribution
    top_k               draw among the k likeliest; 0 = off
    top_p               draw among the likeliest that together hold this much probability; 1 = off
    min_p               drop tokens less likely than min_p × the likeliest; 0 = off
    repetition_penalty  over prompt and output (Keskar et al. 2019); 1 = off
    presence_penalty    subtracted from the logit of a token that the output holds; 0 = off
    frequency_penalty   subtracted for every time the output holds it; 0 = off
    logit_bias          token id -> addition to its logit
    seed                same seed, same tokens; None = the router draws one (answer.seed)
    stop                the answer ends before the first of these strings; they are not returned
    stop_token_ids      the answer ends with the first of these tokens
    ignore_eos          go on behind the end-of-sequence token
    logprobs            None = none, 0 = the chosen token's, k = also the k likeliest
    prompt_logprobs     the same, for the prompt's tokens from the second on
    n                   answers to draw; choice i uses seed + i
    forced_token_ids    teacher forcing: the answer begins with these, whatever the model would draw
    speculation         who guesses the next tokens, for one step to verify several; the answer stays the same:
                        "prompt_lookup" (what followed in prompt and answer the last time), "draft_model" (that of the
                        decode worker, if it has one); None = nobody
    num_draft_tokens    guesses per step at most, 1 to 32
    ngram               tokens that prompt_lookup looks up, 1 to 16
    adapter             name of a LoRA adapter that the model's workers have, as models() lists them; "" = none
    json_schema         the answer is JSON of this schema, given as JSON or as what json.dumps takes; {} = any JSON,
                        {"type": "object"} = any object
    regex               the answer matches this regular expression as a whole
    choice              the answer is one of these texts
    grammar             the answer is of this context-free grammar, in Lark's notation, from the rule `start`

    Of the last four at most one. An answer that is complete ends with "stop"; max_tokens may cut it before.
    """
    # This function is long, for its list of arguments and their help stand here once, for every method of both clients.
    sampling = common_pb2.SamplingParams(
        max_tokens=_whole("max_tokens", max_tokens, least=1),
        temperature=_real("temperature", temperature),
        top_k=_whole("top_k", top_k),
        top_p=_real("top_p", top_p),
        min_p=_real("min_p", min_p),
        repetition_penalty=_real("repetition_penalty", repetition_penalty),
        presence_penalty=_real("presence_penalty", presence_penalty),
        frequency_penalty=_real("frequency_penalty", frequency_penalty),
        stop_token_ids=_ids("stop_token_ids", stop_token_ids),
        ignore_eos=bool(ignore_eos),
        forced_token_ids=_ids("forced_token_ids", forced_token_ids),
    )
    if seed is not None:
        sampling.seed = _whole("seed", seed, bits=64)
    if logprobs is not None:
        sampling.logprobs = _whole("logprobs", logprobs)
    if prompt_logprobs is not None:
        sampling.prompt_logprobs = _whole("prompt_logprobs", prompt_logprobs)
    if speculation is not None:
        sampling.speculation.kind = _kind(speculation)
        sampling.speculation.num_draft_tokens = _whole("num_draft_tokens", num_draft_tokens, least=1)
        sampling.speculation.ngram = _whole("ngram", ngram, least=1)
    _constrain(sampling, json_schema=json_schema, regex=regex, choice=choice, grammar=grammar)
    for token_id, bias in (logit_bias or {}).items():
        sampling.logit_bias[_whole("logit_bias", token_id)] = _real("logit_bias", bias)
    stops = [stop] if isinstance(stop, str) else list(_iterable("stop", stop))
    options = inference_pb2.AnswerOptions(sampling=sampling, n=_whole("n", n), adapter=_text("adapter", adapter))
    options.stop.extend(_text("stop", one) for one in stops)
    if n < 1:
        raise _invalid("n", f"must be at least 1, is {n}")
    return options


Method = TypeVar("Method", bound=Callable[..., Any])


def takes_sampling(method: Method) -> Method:
    """Gives a method with `**sampling: Unpack[Sampling]` the explicit signature and the help of answer_options.

    An option that is none raises TypeError, which names the method that was called and the nearest option."""
    own = inspect.signature(method)
    kept = [one for one in own.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    added = list(inspect.signature(answer_options).parameters.values())
    signature = own.replace(parameters=[*kept, *added])

    def check(given: Iterable[str]) -> None:
        for name in given:
            if name not in signature.parameters:
                near = difflib.get_close_matches(name, signature.parameters, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"{method.__qualname__}() has no option {name!r}{hint}")

    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def verb(*arguments: Any, **options: Any) -> Any:
            check(options)
            return await method(*arguments, **options)
    else:

        @functools.wraps(method)
        def verb(*arguments: Any, **options: Any) -> Any:
            check(options)
            return method(*arguments, **options)

    verb.__signature__ = signature  # type: ignore[attr-defined]
    shared = (inspect.getdoc(answer_options) or "").split("\n", 1)[1]
    verb.__doc__ = f"{inspect.getdoc(method)}\n{shared}"
    return cast(Method, verb)


def generate_request(prompt: Prompt, model: str, options: inference_pb2.AnswerOptions) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(model=_text("model", model), options=options)
    if isinstance(prompt, str):
        request.text = _text("prompt", prompt)
    else:
        request.token_ids.SetInParent()  # an empty prompt is sent too: the cluster refuses it
        request.token_ids.ids.extend(_ids("prompt", prompt, "text or a list of token ids"))
    return request


def chat_request(
    messages: Iterable[Message], model: str, options: inference_pb2.AnswerOptions
) -> inference_pb2.ChatRequest:
    return inference_pb2.ChatRequest(model=_text("model", model), messages=chat_messages(messages), options=options)


def tokenize_request(text: str | Iterable[Message], model: str) -> inference_pb2.TokenizeRequest:
    request = inference_pb2.TokenizeRequest(model=_text("model", model))
    if isinstance(text, str):
        request.text = _text("text", text)
    else:
        request.messages.SetInParent()
        request.messages.messages.extend(chat_messages(_iterable("text", text, "text or a list of messages")))
    return request


def detokenize_request(token_ids: Iterable[int], model: str) -> inference_pb2.DetokenizeRequest:
    return inference_pb2.DetokenizeRequest(model=_text("model", model), token_ids=_ids("token_ids", token_ids))


def chat_messages(messages: Iterable[Message]) -> list[inference_pb2.ChatMessage]:
    built = []
    for place, message in enumerate(_iterable("messages", messages)):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            wanted = '{"role": ..., "content": ...}'
            raise _invalid("messages", f"must hold {wanted}, holds {_short(message)} at {place}")
        role, content = (_text(f"messages[{place}].{key}", message[key]) for key in ("role", "content"))
        built.append(inference_pb2.ChatMessage(role=role, content=content))
    return built


def name_request(request_id: str) -> str:
    """The caller's own name for the request, or a new one: a request that is sent again keeps its name."""
    return _text("request_id", request_id) or f"req-{uuid.uuid4().hex[:16]}"


def _invalid(field: str, message: str) -> InvalidParameter:
    return InvalidParameter(f"{field} {message}", details={"field": field})


def _short(value: object) -> str:
    try:
        shown = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        shown = f"a very large {type(value).__name__}"
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _whole(field: str, value: object, bits: int = 32, least: int = 0) -> int:
    """0 is sent where `least` is 1: the cluster refuses it."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise _invalid(field, f"must be a whole number, is {_short(value)}")
    number = operator.index(value)
    if number < 0:
        raise _invalid(field, f"must be at least {least}, is {_short(number)}")
    if number >= 1 << bits:
        raise _invalid(field, f"must be at most {(1 << bits) - 1}, is {_short(number)}")
    return number


def _kind(value: object) -> common_pb2.Speculation.Kind:
    kinds = {
        "prompt_lookup": common_pb2.Speculation.PROMPT_LOOKUP,
        "draft_model": common_pb2.Speculation.DRAFT_MODEL,
    }
    if not isinstance(value, str) or value not in kinds:
        raise _invalid("speculation", f"must be one of {', '.join(kinds)}, is {_short(value)}")
    return kinds[value]


def _constrain(sampling: common_pb2.SamplingParams, **given: Any) -> None:
    asked = {name: value for name, value in given.items() if value is not None}
    if len(asked) > 1:
        raise _invalid(list(asked)[1], f"cannot be asked for together with {next(iter(asked))}")
    for name, value in asked.items():
        if name == "choice":
            texts = [_text(name, one) for one in _iterable(name, value, "a list of texts")]
            sampling.constraint.choice.SetInParent()  # an empty list is sent too: the cluster refuses it
            sampling.constraint.choice.texts.extend(texts)
        elif name == "json_schema" and not isinstance(value, str):
            try:
                sampling.constraint.json_schema = json.dumps(value)
            except (TypeError, ValueError, RecursionError) as error:
                raise _invalid(name, f"is nothing that JSON can say: {error}") from None
        else:
            setattr(sampling.constraint, name, _text(name, value))


def _real(field: str, value: object) -> float:
    if isinstance(value, (bool, str)) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        raise _invalid(field, f"must be a number, is {_short(value)}")
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        number = sys.float_info.max if value > 0 else -sys.float_info.max  # type: ignore[operator]
    except (TypeError, ValueError):  # an array of many, say
        raise _invalid(field, f"must be a number, is {_short(value)}") from None
    if math.isfinite(number) and abs(number) > LARGEST_FLOAT:
        bound = "at most 3.4e38" if number > 0 else "at least -3.4e38"
        raise _invalid(field, f"must be {bound}, is {_short(value)}")
    return number


def _iterable(field: str, value: object, wanted: str = "a list") -> Iterable[Any]:
    if isinstance(value, (str, bytes, bytearray, Mapping)) or not isinstance(value, Iterable):
        raise _invalid(field, f"must be {wanted}, is {_short(value)}")
    return value


def _ids(field: str, value: object, wanted: str = "a list") -> list[int]:
    return [_whole(field, token_id) for token_id in _iterable(field, value, wanted)]


def _text(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise _invalid(field, f"must be text, is {_short(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _invalid(field, f"holds a lone surrogate at {error.start}, which no UTF-8 can carry") from None
    return value
