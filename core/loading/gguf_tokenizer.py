"""tokenizer.json and tokenizer_config.json from a GGUF file's vocabulary.

Two kinds of vocabulary occur: byte-level BPE ("gpt2"), which lists its merges, and SentencePiece BPE ("llama"), whose
merges follow from the vocabulary. How text is cut before BPE is only named (tokenizer.ggml.pre); the cuts are those
of the tokenizers that the models were published with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import ModelFormatError, UnsupportedArchitecture
from .gguf_file import GgufFile

Json = dict[str, object]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPECIAL_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cut:
    """How text is cut before byte-level BPE."""

    pattern: str | None = None
    """None: GPT-2's own."""
    single_digits: bool = False
    ignore_merges: bool = False
    """A piece that is itself a token is taken as it is."""
    adds_bos: bool = False
    """Where the file does not say."""


_GPT2 = _Cut()
_DIGITS = _Cut(single_digits=True)
_CUTS: Mapping[str, _Cut] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "llama3": _Cut(pattern=_LLAMA3, ignore_merges=True, adds_bos=True),
    "llama-v3": _Cut(pattern=_LLAMA3, ignore_merges=True, adds_bos=True),
    "llama-bpe": _Cut(pattern=_LLAMA3, ignore_merges=True, adds_bos=True),
    "falcon3": _Cut(pattern=_LLAMA3, ignore_merges=True),
    "smaug-bpe": _Cut(pattern=_LLAMA3),
    "dbrx": _Cut(pattern=_LLAMA3),
    "qwen2": _Cut(pattern=_QWEN2),
    "deepseek-r1-qwen": _Cut(pattern=_QWEN2),
    "tekken": _Cut(pattern=_TEKKEN, ignore_merges=True),
    "gpt-4o": _Cut(pattern=_GPT4O),
    "llama4": _Cut(pattern=_GPT4O),
}


def tokenizer_files(file: GgufFile) -> tuple[Json, Json]:
    """tokenizer.json and tokenizer_config.json.

    Raises ModelFormatError for an inconsistent vocabulary, UnsupportedArchitecture for a kind that is not built.
    """
    tokens = file.strings("tokenizer.ggml.tokens")
    if len(set(tokens)) != len(tokens):
        raise ModelFormatError(f"{file.path}: the vocabulary holds a token twice.")
    model = file.text("tokenizer.ggml.model")
    match model:
        case "gpt2":
            cut = _cut(file)
            pieces, adds_bos = _byte_level(file, tokens, cut), cut.adds_bos
        case "llama":
            pieces, adds_bos = _sentencepiece(file, tokens), True
        case _:
            raise UnsupportedArchitecture(
                f"{file.path} holds a tokenizer of kind {model!r}; gpt2 and llama can be read."
            )
    names = _special_names(file, tokens)
    adds_bos = file.flag("tokenizer.ggml.add_bos_token", adds_bos) and "bos_token" in names
    adds_eos = file.flag("tokenizer.ggml.add_eos_token", False) and "eos_token" in names
    tokenizer: Json = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(file, tokens),
        "post_processor": _template(
            tokens,
            names["bos_token"] if adds_bos else None,
            names["eos_token"] if adds_eos else None,
        ),
    } | pieces
    config: Json = dict(names)
    config |= {
        "add_bos_token": adds_bos,
        "add_eos_token": adds_eos,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if "tokenizer.chat_template" in file.metadata:
        config["chat_template"] = file.text("tokenizer.chat_template")
    return tokenizer, config


def _cut(file: GgufFile) -> _Cut:
    name = file.text("tokenizer.ggml.pre", "default")
    if name not in _CUTS:
        raise UnsupportedArchitecture(
            f"{file.path} cuts text by {name!r}, which is not built. Known: {', '.join(_CUTS)}."
        )
    return _CUTS[name]


def _byte_level(file: GgufFile, tokens: Sequence[str], cut: _Cut) -> Json:
    merges = [merge.split(" ") for merge in file.strings("tokenizer.ggml.merges")]
    if any(len(merge) != 2 for merge in merges):
        raise ModelFormatError(f"{file.path}: a merge is no pair of tokens.")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps: list[Json] = []
    if cut.single_digits:
        steps.append({"type": "Digits", "individual_digits": True})
    if cut.pattern is not None:
        pattern = {"Regex": cut.pattern}
        steps.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
    steps.append(byte_level | {"use_regex": cut.pattern is None})
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": byte_level | {"use_regex": True},
        "model": _bpe(tokens, merges) | {"ignore_merges": cut.ignore_merges},
    }


def _sentencepiece(file: GgufFile, tokens: Sequence[str]) -> Json:
    gemma = file.text("general.architecture").startswith("gemma")
    # Gemma files spell runs of spaces as such, and keep the order of merges in the ids rather than in the scores.
    spelled = ["▁" * len(token) if token and not token.strip(" ") else token for token in tokens]
    if gemma:
        rank: Sequence[float] = range(0, -len(spelled), -1)
    else:
        rank = file.numbers("tokenizer.ggml.scores")
    if len(rank) != len(tokens) or len(set(spelled)) != len(spelled):
        raise ModelFormatError(f"{file.path}: tokens and scores do not belong together.")
    unknown = file.integer("tokenizer.ggml.unknown_token_id", 0)
    if not 0 <= unknown < len(tokens):
        raise ModelFormatError(
            f"{file.path}: the unknown token {unknown} is not in the vocabulary."
        )
    decoder: list[Json] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    normalizer: Json = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if file.flag("tokenizer.ggml.add_space_prefix", not gemma):
        prepend: Json = {"type": "Prepend", "prepend": "▁"}
        normalizer = {"type": "Sequence", "normalizers": [prepend, normalizer]}
        decoder.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    bpe = _bpe(spelled, _merges(spelled, rank))
    bpe |= {"unk_token": tokens[unknown], "fuse_unk": True, "byte_fallback": True}
    return {
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoder},
        "model": bpe,
    }


def _bpe(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": merges,
    }


def _merges(tokens: Sequence[str], rank: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best first.

    SentencePiece joins the pair whose result scores highest; BPE, the pair that is listed first.
    """
    known = set(tokens)
    found = [
        (rank[number], len(token[:cut]), len(token[cut:]), number)
        for number, token in enumerate(tokens)
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [(tokens[number][:cut], tokens[number][cut:]) for _, cut, _, number in found]


def _special_names(file: GgufFile, tokens: Sequence[str]) -> dict[str, str]:
    """bos_token and such -> text, of those that the file names."""
    names = {}
    for name, key in _SPECIAL_KEYS.items():
        full = f"tokenizer.ggml.{key}"
        if full in file.metadata:
            number = file.integer(full)
            if not 0 <= number < len(tokens):
                raise ModelFormatError(f"{file.path}: {full} is {number}, beyond the vocabulary.")
            names[name] = tokens[number]
    return names


def _added_tokens(file: GgufFile, tokens: Sequence[str]) -> list[Json]:
    """Tokens that are matched in the text before it is cut: control tokens (special) and the user's own."""
    if "tokenizer.ggml.token_type" not in file.metadata:
        return []
    kinds = file.numbers("tokenizer.ggml.token_type")
    if len(kinds) != len(tokens):
        raise ModelFormatError(f"{file.path}: tokens and their types do not belong together.")
    return [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind in (_UNKNOWN, _CONTROL),
        }
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token.strip(" ")
    ]


def _template(tokens: Sequence[str], bos: str | None, eos: str | None) -> Json | None:
    """A post-processor that puts bos before and eos behind the text."""
    if bos is None and eos is None:
        return None

    def pieces(text: str, number: int) -> list[Json]:
        named = [("SpecialToken", bos), ("Sequence", text), ("SpecialToken", eos)]
        return [{kind: {"id": name, "type_id": number}} for kind, name in named if name is not None]

    special = {
        name: {"id": name, "ids": [tokens.index(name)], "tokens": [name]}
        for name in (bos, eos)
        if name is not None
    }
    return {
        "type": "TemplateProcessing",
        "single": pieces("A", 0),
        "pair": pieces("A", 0) + pieces("B", 1),
        "special_tokens": special,
    }
