"""Tokenizers against transformers: byte-level and sentencepiece-like vocabularies trained here, and SmolLM2's own."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CORPUS, train_byte_level, train_sentencepiece_like, write_tokenizer_gguf
from tokenizers import decoders
from transformers import AutoTokenizer

from service.model_source import resolve_model
from service.tokenizer import Tokenizer, load_tokenizer
from spec.errors import InvalidModel, InvalidParameter, UnsupportedModel

TEXTS = [
    "",
    "Once upon a time",
    "   leading and trailing   ",
    "tabs\tand\n\nlines\r\n",
    "1234567890 12 3",
    "café naïve \u0061\u0301 日本語 🎉👩‍👩‍👧",
    "don't WE'LL they're",
    "<|im_start|>user\nhi<|im_end|>",
    "never seen: \u2603 \U0001f9ff ƛ",
    "<s>bos in the text</s>",
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_folder(folder: Path, backend: tokenizers.Tokenizer, **configuration: Any) -> Path:
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | configuration
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers") / "byte_level"
    return write_folder(
        folder, train_byte_level(), bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHATML
    )


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers") / "sentencepiece"
    return write_folder(folder, train_sentencepiece_like(), bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(params=["byte_level", "sentencepiece"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def test_a_folder_reads_as_transformers_reads_it(folder: Path) -> None:
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special=False) == theirs(text, add_special_tokens=False)["input_ids"]
        for skip in (True, False):
            assert ours.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_what_is_saved_transformers_loads(folder: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(folder)
    ours.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text)
    assert (theirs.bos_token, theirs.eos_token) == (
        AutoTokenizer.from_pretrained(folder).bos_token,
        AutoTokenizer.from_pretrained(folder).eos_token,
    )
    assert load_tokenizer(tmp_path / "saved").encode(TEXTS[5]) == ours.encode(TEXTS[5])


def check_stream(tokenizer: Tokenizer, ids: Sequence[int], cuts: Sequence[int], skip_special: bool) -> None:
    """Whatever the portions, what came so far is the beginning of decode() of all, and at the end it is all of it."""
    whole = tokenizer.decode(ids, skip_special=skip_special)
    stream, came, at = tokenizer.stream(skip_special=skip_special), "", 0
    for cut in [*sorted(cuts), len(ids)]:
        came += stream.push(ids[at:cut])
        at = max(at, cut)
        assert whole.startswith(came)
    assert came + stream.finish() == whole


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_stream_of_any_tokens_is_decode_of_all(byte_level: Path, sentencepiece: Path, data: st.DataObject) -> None:
    tokenizer = cached(data.draw(st.sampled_from([byte_level, sentencepiece])))
    # single bytes and special tokens are likelier than a fair draw makes them: 3 to 258 are `<0xNN>` in one of the two
    token_id = st.one_of(st.integers(0, tokenizer.vocab_size + 5), st.integers(120, 258), st.integers(0, 3))
    ids = data.draw(st.lists(token_id, max_size=24))
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=8))
    check_stream(tokenizer, ids, cuts, data.draw(st.booleans()))


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30), one_by_one=st.booleans())
def test_a_stream_of_text_holds_half_characters_back(
    byte_level: Path, sentencepiece: Path, text: str, one_by_one: bool
) -> None:
    for folder in (byte_level, sentencepiece):
        tokenizer = cached(folder)
        ids = tokenizer.encode(text)
        check_stream(tokenizer, ids, range(len(ids)) if one_by_one else [], skip_special=True)
        stream = tokenizer.stream()
        for piece in [stream.push([token_id]) for token_id in ids]:
            assert "\ufffd" not in piece or "\ufffd" in text


_CACHE: dict[Path, Tokenizer] = {}


def cached(folder: Path) -> Tokenizer:
    if folder not in _CACHE:
        _CACHE[folder] = load_tokenizer(folder)
    return _CACHE[folder]


# ---- chat ------------------------------------------------------------------------------------------------

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Häh? <b>&amp;</b> 🎉"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": ""},
]
TEMPLATES = {
    "chatml": CHATML,
    "trimming": "{% for m in messages %}\n    "
    "{% if m.role == 'user' %}\n  {{ m.content | trim }}\n  {% endif %}\n{% endfor %}\n",
    "json": "{{ messages | tojson }}{{ {'a': [1, 'é<>']} | tojson(indent=2) }}",
    "specials": "{{ bos_token }}{{ eos_token }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}",
    "loop": "{% for m in messages %}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}{% continue %}x{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "date": "{{ strftime_now('%Y') }}",
}


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_templates_render_as_in_transformers(
    byte_level: Path, tmp_path: Path, name: str, add_generation_prompt: bool
) -> None:
    eos = {"content": "<|im_end|>", "__type": "AddedToken", "special": True}
    eos |= dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    backend = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    folder = write_folder(tmp_path / "model", backend, bos_token="<|im_start|>", eos_token=eos)
    (folder / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    text = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert ours.chat_text(MESSAGES, add_generation_prompt=add_generation_prompt) == text
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=add_generation_prompt)["input_ids"]
    assert ours.chat(MESSAGES, add_generation_prompt=add_generation_prompt) == expected


def with_template(byte_level: Path, folder: Path, template: Any) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    return load_tokenizer(write_folder(folder, backend, chat_template=template))


def test_several_templates_and_none(byte_level: Path, sentencepiece: Path, tmp_path: Path) -> None:
    named = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "default {{ messages[0].role }}"},
    ]
    assert with_template(byte_level, tmp_path / "named", named).chat_text(MESSAGES) == "default system"
    bare = load_tokenizer(sentencepiece)
    assert not bare.has_chat_template
    with pytest.raises(InvalidParameter, match="messages cannot be answered: the model has no chat template"):
        bare.chat(MESSAGES)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].content + 'x' }}", "messages"),
        ("{{ messages[0].content + 1 }}", "messages"),
        ("{{ 1 // 0 }}", "messages"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append({}) }}", "messages"),
    ],
)
def test_a_template_that_refuses(byte_level: Path, tmp_path: Path, template: str, words: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        with_template(byte_level, tmp_path / "model", template).chat(MESSAGES)
    assert words in str(caught.value)


def test_a_template_that_is_none(byte_level: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="chat template"):
        with_template(byte_level, tmp_path / "model", "{% for %}")


def test_a_template_file_that_is_no_text(byte_level: Path, tmp_path: Path) -> None:
    shutil.copytree(byte_level, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_bytes(b"\xff\xfe{{ messages }}")
    with pytest.raises(InvalidModel, match=r"chat_template\.jinja cannot be read"):
        load_tokenizer(tmp_path / "model")


# ---- what is broken --------------------------------------------------------------------------------------


def test_what_is_no_tokenizer(tmp_path: Path, byte_level: Path) -> None:
    with pytest.raises(InvalidModel, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InvalidModel, match=r"tokenizer\.json is no tokenizer"):
        load_tokenizer(tmp_path)
    panics = json.loads((byte_level / "tokenizer.json").read_text())
    panics["model"]["merges"] = [["t", "z"], ["tz", "t"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(panics))
    with pytest.raises(InvalidModel, match=r"tokenizer\.json is no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text((byte_level / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InvalidModel, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_a_decoder_that_is_not_known(tmp_path: Path) -> None:
    backend = train_byte_level()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedModel, match="WordPiece"):
        load_tokenizer(write_folder(tmp_path / "model", backend))


def test_unpaired_surrogates(byte_level: Path) -> None:
    with pytest.raises(InvalidParameter, match="text is no valid Unicode at character 3"):
        load_tokenizer(byte_level).encode("abc\ud800")


# ---- GGUF ------------------------------------------------------------------------------------------------


def test_a_byte_level_gguf_is_the_tokenizer_it_was_made_from(byte_level: Path, tmp_path: Path) -> None:
    path = write_tokenizer_gguf(
        tmp_path / "model.gguf", train_byte_level(), "gpt2",
        tokenizer_pre="smollm", bos_token_id=1, eos_token_id=2, add_bos_token=False, chat_template=CHATML,
    )  # fmt: skip
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(byte_level)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)
    assert ours.chat_text(MESSAGES) == theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    ours.save(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (saved.bos_token, saved.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert saved(TEXTS[5])["input_ids"] == theirs(TEXTS[5])["input_ids"]


def by_score(text: str, ids: dict[str, int], scores: dict[str, float]) -> list[int]:
    """sentencepiece's BPE (Kudo & Richardson 2018): join the neighbours whose whole scores best, leftmost first."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [
            (-scores[left + right], at)
            for at, (left, right) in enumerate(itertools.pairwise(symbols))
            if left + right in scores
        ]
        if not joined:
            break
        at = min(joined)[1]
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    pieces: list[int] = []
    for symbol in symbols:
        pieces += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return pieces


def test_a_sentencepiece_gguf_joins_by_score(tmp_path: Path) -> None:
    backend = train_sentencepiece_like()
    path = write_tokenizer_gguf(
        tmp_path / "model.gguf", backend, "llama", bos_token_id=1, eos_token_id=2, unk_token_id=0
    )
    ours = load_tokenizer(path)
    ids = backend.get_vocab()
    merged = ["".join(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    scores = {token: -1.0 - rank for rank, token in reversed(list(enumerate(merged)))}
    for text in TEXTS[1:7] + TEXTS[8:9] + CORPUS[:4]:
        assert ours.encode(text) == [1, *by_score(text, ids, scores)]  # llama models take a bos where nothing is said
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize(
    ("kind", "more", "error", "words"),
    [
        ("gpt2", {"tokenizer_pre": "klingon"}, UnsupportedModel, "klingon"),
        ("rwkv", {}, UnsupportedModel, "rwkv"),
        ("gpt2", {"token_merges": ["ab"]}, InvalidModel, '"ab" is no pair'),
        ("gpt2", {"token_merges": ["not there"]}, InvalidModel, "not of known tokens"),
        ("gpt2", {"add_bos_token": True, "token_merges": []}, InvalidModel, "merges"),
    ],
)
def test_a_gguf_that_cannot_be_read(
    tmp_path: Path, kind: str, more: dict[str, Any], error: type[Exception], words: str
) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(["a", "b", "ab"])
    merges = more.pop("token_merges", ["a b"]) if "token_merges" in more else ["a b"]
    if merges:
        writer.add_token_merges(merges)
    for key, value in more.items():
        getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(error) as caught:
        load_tokenizer(path)
    assert words in str(caught.value)


# ---- the real one ----------------------------------------------------------------------------------------

# ids that transformers 5.23 gives with AutoTokenizer.from_pretrained(folder, gguf_file=...), which takes 12 s each time
SMOLLM2_IDS = {
    "Hello 1234 world 🎉 don't": [19556, 216, 33, 34, 35, 36, 905, 15107, 232, 227, 1326, 982],
    "<|im_start|>user\nhi<|im_end|>": [1, 4093, 198, 6004, 2],
    "   lead": [256, 1022],
    "a\u0301 é": [81, 151, 219, 26411],
}


def test_smollm2() -> None:
    tokenizer = load_tokenizer(resolve_model("smollm2"))
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_id) == (49152, 1, 2)
    for text, ids in SMOLLM2_IDS.items():
        assert tokenizer.encode(text) == ids
        check_stream(tokenizer, ids, range(len(ids)), skip_special=False)
    ids = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    assert tokenizer.decode(ids, skip_special=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
