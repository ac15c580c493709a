"""The tokenizer as Hugging Face files, with the same ids: ``tokenizer.json``, its settings and the chat template.

Why the ids are the same. Our encoder (tiktoken) merges, of all neighbours whose joint bytes are in the table, those of
the lowest id, leftmost first; Hugging Face merges only pairs that ``merges`` lists. While two parts p and q wait to
become token T, no merge has crossed the ends of T, so what happened between them is what happens to T alone: T has one
pair that can ever occur, and :func:`merge_pair` finds it. Listing these pairs in the order of their tokens gives both
encoders the same next merge at every step, for any table. A word that is a token as a whole is taken as such by both
(``ignore_merges``). Text is cut into pieces first, by the same rule as ``pieces.bounded``, written as an expression;
the expression that then splits words is shown to mean the same to both engines (:func:`cuts_alike`) or refused.

Where Hugging Face differs. Text must be valid Unicode: bytes that are not UTF-8 and lone surrogates cannot reach it.
And the name of a special token in plain text becomes that token, as with every Hugging Face tokenizer, unless the
caller says ``split_special_tokens=True`` (per call or in ``from_pretrained``). That cannot be the saved setting:
``apply_chat_template`` renders to a string and encodes it under the same setting, so its role tokens would silently
fall apart into bytes, and so would those of servers that do the same. The chat template refuses such names in content.
"""

from __future__ import annotations

import functools
import itertools
import json
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refractor_megatron.errors import DataError, OutputError
from refractor_megatron.tokenizer.pieces import LINE_END_REACH, PIECE_CHARS
from refractor_megatron.tokenizer.tokenizer import END, EOD, PAD, Tokenizer
from refractor_megatron.tokenizer.train import byte_alphabet

if TYPE_CHECKING:
    import tokenizers

OWN_FILE, BACKEND_FILE = "refractor_tokenizer.json", "tokenizer.json"
SETTINGS_FILE, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"

#: ``pieces.bounded`` as an expression: while more than a piece is left, up to the last line end in reach or a full one.
CUT_PATTERN = (
    rf"(?=[\s\S]{{{PIECE_CHARS + 1}}})"
    rf"(?:[\s\S]{{{PIECE_CHARS - LINE_END_REACH},{PIECE_CHARS - 1}}}\n|[\s\S]{{{PIECE_CHARS}}})"
    r"|[\s\S]+"
)

#: Characters that a split expression may treat each in its own way, and those of them whose runs matter most.
_PROBE_CHARS, _PROBE_RUNS = "aZéſ\u212a日1٣ \n\r\t\u3000'!\u0301s", "a1' \n!s"

#: What the template cannot say goes through our own command, which builds token records from the structure.
_OWN_WAY = "use refractor generate --messages"

_TEMPLATE = """\
{#- A message is its role token, its content and $end. Special tokens come from structure, never from content. -#}
{%- set roles = $roles -%}
{%- set specials = $specials -%}
{%- if tools -%}
  {{- raise_exception("This template has no place for tools; $own_way.") -}}
{%- endif -%}
{%- if documents -%}
  {{- raise_exception("This template has no place for documents; $own_way.") -}}
{%- endif -%}
{%- for message in messages -%}
  {%- set at = "Message " ~ loop.index ~ ": " -%}
  {%- for field, value in message.items() -%}
    {%- if field == "protocol_tags" and value -%}
      {{- raise_exception(at ~ "protocol_tags set scopes that text cannot carry; $own_way.") -}}
    {%- elif field not in ["id", "role", "content", "protocol_tags", "metadata"] and value is not none -%}
      {{- raise_exception(at ~ "this template does not know the field '" ~ field ~ "'; $own_way.") -}}
    {%- endif -%}
  {%- endfor -%}
  {%- if message.role not in roles -%}
    {{- raise_exception(at ~ "unknown role '" ~ message.role ~ "'; the roles are " ~ roles | join(", ") ~ ".") -}}
  {%- endif -%}
  {%- if message.content is not string -%}
    {{- raise_exception(at ~ "content must be a string; for base64 $own_way.") -}}
  {%- endif -%}
  {%- for special in specials -%}
    {%- if special in message.content -%}
      {{- raise_exception(at ~ "content names the special token " ~ special ~ "; remove it or $own_way.") -}}
    {%- endif -%}
  {%- endfor -%}
  {{- "<|" ~ message.role ~ "|>" ~ message.content ~ "$end" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- "<|assistant|>" -}}
{%- endif -%}
"""


def write_hf_tokenizer(tokenizer: Tokenizer, folder: Path, context_max: int) -> list[str]:
    """Writes the tokenizer into ``folder`` for transformers 5 and returns the names of the files.

    context_max: the most tokens the model was built for, ``model_max_length``. Errors: ``DataError`` for a tokenizer
    that Hugging Face cannot run with the same ids, ``OutputError`` if a file cannot be written.
    """
    assert context_max > 0, "a model has a context"
    backend = hf_backend(tokenizer)
    settings = _settings(_specials(tokenizer), context_max)
    texts = {
        BACKEND_FILE: backend.to_str(pretty=True) + "\n",
        SETTINGS_FILE: json.dumps(settings, indent=2) + "\n",
        TEMPLATE_FILE: chat_template(tokenizer),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder / OWN_FILE)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or "input/output error"
        raise OutputError(
            f"Cannot write the tokenizer to {folder} ({reason}); choose another output folder."
        ) from error
    return [OWN_FILE, *texts]


def read_hf_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that ``write_hf_tokenizer`` put into ``folder``.

    Raises ``DataError`` if a file is missing or damaged, or if ``tokenizer.json`` is no longer the same tokenizer;
    padding and truncation, which transformers keeps there too, may differ.
    """
    import tokenizers

    tokenizer = Tokenizer.load(folder / OWN_FILE)
    path = folder / BACKEND_FILE
    try:
        found = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or "input/output error"
        raise DataError(f"Cannot read {path} ({reason}); export the model again.") from error
    except Exception as error:  # the library raises bare Exception for whatever its parser dislikes
        raise DataError(f"{path} is not an intact tokenizer file ({error}); export the model again.") from error
    difference = _difference(json.loads(hf_backend(tokenizer).to_str()), json.loads(found.to_str()))
    if difference:
        raise DataError(f"{path} and {OWN_FILE} differ in {difference}; export the model again.")
    return tokenizer


def hf_backend(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The ``tokenizers`` object with the ids of ``tokenizer``. Raises ``DataError`` if there cannot be one."""
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

    specials = _specials(tokenizer)
    if not cuts_alike(tokenizer.pattern):
        raise DataError(
            f"The tokenizer splits text by {tokenizer.pattern!a}, which Hugging Face's expression engine reads "
            "otherwise than tiktoken, so ids would differ; export without the tokenizer."
        )
    visible = {byte: char for char, byte in byte_alphabet().items()}
    vocabulary = {"".join(visible[byte] for byte in token): i for i, token in enumerate(tokenizer.ranks)}
    _refuse_ambiguous(specials, vocabulary)
    merges = [
        ("".join(visible[byte] for byte in left), "".join(visible[byte] for byte in right))
        for left, right in _merge_pairs(tokenizer.ranks)
    ]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CUT_PATTERN), behavior="isolated"),
            pre_tokenizers.Split(Regex(tokenizer.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    assert all(backend.token_to_id(name) == i for name, i in specials.items()), "special tokens follow the byte strings"
    return backend


@functools.cache
def cuts_alike(pattern: str) -> bool:
    """Whether tiktoken and Hugging Face cut text by ``pattern`` at the same places.

    Compared on every string of up to three probe characters and of up to five of the runs; the engines' classes of
    characters are equal for all of Unicode. Syntax is what differs: ``{1,3}+`` is possessive in one of them only.
    """
    import tiktoken
    from tokenizers import Regex, pre_tokenizers

    kinds = [(_PROBE_CHARS, n) for n in (1, 2, 3)] + [(_PROBE_RUNS, n) for n in (4, 5)]
    texts = ["".join(chars) for alphabet, n in kinds for chars in itertools.product(alphabet, repeat=n)]
    # Every substring has an id, and tiktoken gives a piece that has one as that id: one id a piece.
    table = [bytes([i]) for i in range(256)] + [text.encode() for text in texts if len(text.encode()) > 1]
    ranks = {token: i for i, token in enumerate(table)}
    try:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    except Exception:  # the library's bare Exception: its engine does not take the expression at all
        return False
    pieces = tiktoken.Encoding("probe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return all(
        [table[i].decode() for i in pieces.encode_ordinary(text)]
        == [piece for piece, _ in split.pre_tokenize_str(text)]
        for text in texts
    )


def merge_pair(token: bytes, ids: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The last two parts of ``token`` when the encoder merges its bytes alone; None if it never becomes one.

    ``ids``: id, which is also the merge priority, of every byte string.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [(ids.get(a + b, len(ids)), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))]
        lowest, i = min(joined)
        if lowest == len(ids):
            return None
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _merge_pairs(ranks: tuple[bytes, ...]) -> Iterator[tuple[bytes, bytes]]:
    """In id order; a token that no merge makes has none, and is met only where it is a whole word."""
    ids = {token: i for i, token in enumerate(ranks)}
    for token in ranks:
        pair = merge_pair(token, ids) if len(token) > 1 else None
        if pair:
            yield pair


def _specials(tokenizer: Tokenizer) -> dict[str, int]:
    """Name -> id of the special tokens, in id order."""
    names = {tokenizer.special_name(i): i for i in range(len(tokenizer.ranks), tokenizer.vocab_size)}
    return {name: i for name, i in names.items() if name is not None}


def _refuse_ambiguous(specials: Mapping[str, int], vocabulary: Mapping[str, int]) -> None:
    """Hugging Face finds special tokens in a string, so their names must not touch each other or ordinary tokens."""
    for name in specials:
        if name in vocabulary:
            raise DataError(
                f"The special token {name!r} is also an ordinary token of this tokenizer; rename one of them."
            )
        for other in specials:
            overlap = any(name.endswith(other[:n]) for n in range(1, min(len(name), len(other))))
            if overlap or (name != other and name in other):
                raise DataError(
                    f"The names of the special tokens {name!r} and {other!r} overlap, so a chat template could not "
                    "keep them apart from text; rename one of them."
                )


def _settings(specials: Mapping[str, int], context_max: int) -> dict[str, Any]:
    """Content of ``tokenizer_config.json``."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_max,
        "model_input_names": ["input_ids", "attention_mask"],
        "eos_token": EOD,
        "pad_token": PAD,
        "extra_special_tokens": [name for name in specials if name not in (EOD, PAD)],
        "padding_side": "left",  # a batch is continued at its right end
        "split_special_tokens": False,  # see the head of this module
        "clean_up_tokenization_spaces": False,
    }


def chat_template(tokenizer: Tokenizer) -> str:
    """The Jinja template that frames messages as ``encode_document`` does, without the closing end-of-document.

    It raises for whatever would change the tokens or their records but cannot be written as text: unknown roles and
    fields, protocol tags, tools, documents, content that is no string or names a special token.
    """
    return string.Template(_TEMPLATE).substitute(
        roles=json.dumps(list(tokenizer.role_ids)),
        specials=json.dumps(list(_specials(tokenizer)), ensure_ascii=False),
        end=END,
        own_way=_OWN_WAY,
    )


def _difference(expected: dict[str, Any], found: dict[str, Any]) -> str | None:
    """The first part of the two serialized tokenizers that differs and touches ids or text."""
    for part in ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if expected.get(part) != found.get(part):
            return part
    for part in sorted(expected["model"].keys() | found["model"].keys()):
        if expected["model"].get(part) != found["model"].get(part):
            return f"model.{part}"
    return None
