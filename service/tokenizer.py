"""Text to token ids and back, and the chat template.

As a model's tokenizer.json and tokenizer_config.json say, or its GGUF metadata. Calls are safe from any thread.

Special tokens: what tokenizer.json's post-processor adds is added, as transformers does; where it adds nothing, `bos`
comes first if the model's configuration has `add_bos_token`. Those written out in the text are taken as such.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import processors

from service.chat_template import ChatTemplate
from service.gguf_tokenizer import read_gguf
from service.text_stream import TextStream, pieces_of
from spec.errors import InvalidModel, InvalidParameter

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_tokenizer(model_path: str | Path) -> Tokenizer:
    """From a Hugging Face folder or a .gguf file. Raises InvalidModel, UnsupportedModel."""
    path = Path(model_path)
    if path.suffix == ".gguf" and path.is_file():
        return Tokenizer(*read_gguf(path))
    file = path / "tokenizer.json"
    if not file.is_file():
        raise InvalidModel(f"{path} has no tokenizer.json", file=file)
    try:
        backend = Backend.from_file(str(file))
    except BaseException as error:  # the library raises bare Exception, and panics, which is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InvalidModel(f"{file} is no tokenizer: {error}", file=file) from None
    return Tokenizer(backend, _folder_configuration(path))


class Tokenizer:
    def __init__(self, backend: Backend, configuration: Mapping[str, Any]) -> None:
        """`configuration` is the content of a tokenizer_config.json, the chat template in it."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._configuration = dict(configuration)
        self._special = {key: _content(configuration[key]) for key in _NAMED if configuration.get(key)}
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        _complete_post_processor(backend, configuration, self._special)
        definition = json.loads(self.definition)
        special = frozenset(token["id"] for token in definition["added_tokens"] if token["special"])
        self._pieces = pieces_of(definition, backend.get_vocab(with_added_tokens=True), special)
        source = _template_source(configuration)
        self._template = ChatTemplate(source, self._special) if source else None

    @property
    def vocab_size(self) -> int:
        """Added tokens included; a model's head may be wider (padded)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def definition(self) -> str:
        """As the content of a tokenizer.json."""
        text: str = self._backend.to_str()
        return text

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Raises InvalidParameter for text with unpaired surrogates."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidParameter(f"is no valid Unicode at character {error.start}", field="text") from None
        encodings = self._backend.encode_batch_fast([text], add_special_tokens=add_special)
        ids: list[int] = encodings[0].ids  # the batch call, unlike the single one, lets other threads run meanwhile
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Ids outside the vocabulary add nothing."""
        texts: list[str] = self._backend.decode_batch([list(token_ids)], skip_special_tokens=skip_special)
        return texts[0]  # as in encode()

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """For tokens that come one by one: what its push() and finish() return is, joined, decode() of them all."""
        return TextStream(self._pieces, skip_special)

    def chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """Messages are {"role": ..., "content": ...}; the answer is to follow.

        Raises InvalidParameter when the model has no chat template or the template refuses them.
        """
        text = self.chat_text(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special=False)  # the template writes its own special tokens

    def chat_text(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        if self._template is None:
            raise InvalidParameter("cannot be answered: the model has no chat template; use Generate", field="messages")
        return self._template.render(messages, add_generation_prompt=add_generation_prompt)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json as transformers' AutoTokenizer reads them."""
        target = Path(folder)
        configuration = self._configuration | {"tokenizer_class": "PreTrainedTokenizerFast"}
        configuration.setdefault("clean_up_tokenization_spaces", False)
        if self._template is not None:
            configuration["chat_template"] = self._template.source
        try:
            target.mkdir(parents=True, exist_ok=True)
            (target / "tokenizer.json").write_text(self.definition, encoding="utf-8")
            text = json.dumps(configuration, indent=2, ensure_ascii=False)
            (target / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise InvalidModel(f"the tokenizer cannot be written to {target}: {error.strerror}") from None

    def _id_of(self, name: str) -> int | None:
        token_id: int | None = self._backend.token_to_id(self._special[name]) if name in self._special else None
        return token_id


def _complete_post_processor(backend: Backend, configuration: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """`bos` and `eos` where the configuration asks for them and tokenizer.json adds nothing by itself."""
    bos = special.get("bos_token") if configuration.get("add_bos_token") else None
    eos = special.get("eos_token") if configuration.get("add_eos_token") else None
    if not (bos or eos) or backend.encode("", add_special_tokens=True).ids:
        return
    wanted = [(token, backend.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token]
    if any(token_id is None for _, token_id in wanted):
        raise InvalidModel("the bos or eos token of the tokenizer's configuration is not in its vocabulary")
    parts = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    template = processors.TemplateProcessing(single=parts, special_tokens=wanted)
    existing = backend.post_processor
    backend.post_processor = processors.Sequence([existing, template]) if existing is not None else template


def _folder_configuration(path: Path) -> dict[str, Any]:
    configuration = _read_json(path / "tokenizer_config.json")
    for key, value in _read_json(path / "special_tokens_map.json").items():
        configuration.setdefault(key, value)
    template = path / "chat_template.jinja"
    if template.is_file():
        try:
            configuration["chat_template"] = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidModel(f"{template} cannot be read: {error}", file=template) from None
    elif older := _read_json(path / "chat_template.json").get("chat_template"):
        configuration.setdefault("chat_template", older)
    return configuration


def _read_json(path: Path) -> dict[str, Any]:
    """An absent file is empty."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InvalidModel(f"{path} is no JSON: {error}", file=path) from None
    if not isinstance(content, dict):
        raise InvalidModel(f"{path} is no JSON object", file=path)
    return content


def _template_source(configuration: Mapping[str, Any]) -> str | None:
    """One template, or the one called "default" of several."""
    given = configuration.get("chat_template")
    if isinstance(given, list):
        by_name = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
        given = by_name.get("default")
    return given if isinstance(given, str) and given else None


def _content(token: Any) -> str:
    """Written as a string, or as an AddedToken's fields."""
    return str(token["content"]) if isinstance(token, dict) else str(token)
