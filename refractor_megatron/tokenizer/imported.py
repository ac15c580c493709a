"""Tokenizers of other models: a byte-level BPE ``tokenizer.json`` of Hugging Face (GPT-2, Llama 3) as ours, id for id.

Hugging Face applies the merges that the file lists, first listed first; tiktoken, which encodes for us, joins any two
neighbours whose bytes have an id, lowest id first, and takes a whole piece that has an id as it is. With merges listed
in the order of the ids that they make, the two agree when one of these holds:

- every merge makes a higher id than its parts have, and every token, encoded by itself, gives itself. Then at the
  moment at which tiktoken joins x and y nothing of lower rank is left to join inside them or across their ends, so the
  merges applied to xy alone have come to x, y as well, and as they end in xy the merge (x, y) is listed;
- pieces that have an id are taken whole (``ignore_merges``) and every way to join two ids to a third is listed, which
  is how Llama 3 comes. Both then choose among the same joins by the same ranks. Only two overlapping joins to one and
  the same id (x y = y z) are a tie, which tiktoken, the tokenizer that Llama 3 was trained with, decides from the left.

Anything else is refused. Special tokens keep their ids; the ones that we need take the names we use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refractor_megatron.errors import DataError
from refractor_megatron.tokenizer.fileformat import FORMAT
from refractor_megatron.tokenizer.hf_files import OWN_FILE, cuts_alike
from refractor_megatron.tokenizer.tokenizer import EOD, SPECIALS, Tokenizer
from refractor_megatron.tokenizer.train import byte_alphabet

#: The split that Hugging Face's ByteLevel pre-tokenizer makes by itself (GPT-2's).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
#: Names under which other models end a document, the best known first.
_ENDS = (EOD, "<|end_of_text|>", "<|endoftext|>")
#: Text whose ids are compared at the end.
_SAMPLE = (
    "It's 1234567 o'clock, WE'LL see: naïve Ünïcode ſ 'S\t\ttabs\r\n\r\n  two  spaces   \n x = {'a': [1, 2]}  # ok!?\n"
    "Привет, мир! 你好，世界。 こんにちは 안녕 مرحبا שלום हिन्दी ๑๒๓ ½ Ⅷ 🙂👩‍👩‍👧 e\u0301 \u00a0\u2003\u200b end "
)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file or a folder: ours, or a byte-level BPE of Hugging Face (``tokenizer.json``).

    Raises:
        DataError: the file is missing or damaged, or it is a tokenizer whose ids we cannot reproduce exactly.
    """
    if (path / OWN_FILE).is_file():  # a model that we exported
        return Tokenizer.load(path / OWN_FILE)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        body = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"Cannot read the tokenizer {file} ({error.strerror}); give a tokenizer.json.") from None
    except ValueError as error:
        raise DataError(f"{file} is not an intact tokenizer file ({error}); give a tokenizer.json.") from None
    if isinstance(body, dict) and body.get("format") == FORMAT:
        return Tokenizer.load(file)
    try:
        return _imported(file, body)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{file} is not an intact tokenizer file ({error!r}); give a tokenizer.json.") from None


def _imported(file: Path, body: Mapping[str, Any]) -> Tokenizer:
    model = body["model"]
    pattern = _pattern(file, body)
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise _refused(file, "it is no byte-level BPE")
    added = {int(token["id"]): token for token in body.get("added_tokens", ())}
    if plain := [token["content"] for token in added.values() if not token["special"]]:
        raise _refused(file, f"its added token {plain[0]!r} is found in text before the merges are applied")
    ranks = _ranks(file, model["vocab"], added)
    _check_merges(file, body, model, ranks)
    tokenizer = Tokenizer(ranks, _specials(file, len(ranks), added), pattern)
    _check_pattern(file, tokenizer)
    return tokenizer


def _refused(file: Path, reason: str) -> DataError:
    return DataError(
        f"{file} cannot become a tokenizer of ours id for id: {reason}; use a byte-level BPE of the GPT-2 or Llama 3 "
        "kind, or leave the tokenizer out and train from random weights."
    )


def _pattern(file: Path, body: Mapping[str, Any]) -> str:
    """The split before the merges."""
    if body.get("normalizer") is not None:
        raise _refused(file, f"its normalizer ({body['normalizer'].get('type')}) changes the text")
    before = body.get("pre_tokenizer") or {"type": "none"}
    steps = before["pretokenizers"] if before["type"] == "Sequence" else [before]
    last = steps[-1]
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space", True):
        if len(steps) == 1 and last.get("use_regex", True):
            return GPT2_PATTERN
        split = steps[0]
        alone = len(steps) == 2 and split["type"] == "Split" and not last.get("use_regex", True)
        if alone and split["behavior"] == "Isolated" and not split["invert"] and "Regex" in split["pattern"]:
            return str(split["pattern"]["Regex"])
    raise _refused(file, "its pre-tokenizer is not one regular expression and a byte-level step without prefix space")


def _ranks(file: Path, vocab: Mapping[str, int], added: Mapping[int, Any]) -> list[bytes]:
    """Byte string of every ordinary id; special tokens must follow them."""
    alphabet = byte_alphabet()
    ordinary = sorted((int(i), token) for token, i in vocab.items() if int(i) not in added)
    if [i for i, _ in ordinary] != list(range(len(ordinary))):
        raise _refused(file, "its special tokens do not come after all ordinary ones")
    unknown = [token for _, token in ordinary if not set(token) <= alphabet.keys()]
    if unknown:
        raise _refused(file, f"its token {unknown[0]!r} is not written in the byte-level alphabet")
    ranks = [bytes(alphabet[char] for char in token) for _, token in ordinary]
    if sorted(ranks[:256]) != [bytes([b]) for b in range(256)]:
        raise _refused(file, "its first 256 ids are not the single bytes")
    return ranks


def _check_merges(file: Path, body: Mapping[str, Any], model: Mapping[str, Any], ranks: list[bytes]) -> None:
    """Refuse merges that tiktoken would not reproduce (see the top of this file)."""
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"):
        raise _refused(file, "its BPE marks word parts or drops merges at random")
    alphabet = byte_alphabet()
    ids = {token: i for i, token in enumerate(ranks)}
    listed = set()
    last, upwards = 255, True
    for merge in model["merges"]:
        left, right = (
            ids[bytes(alphabet[c] for c in part)] for part in (merge.split(" ") if isinstance(merge, str) else merge)
        )
        result = ids[ranks[left] + ranks[right]]
        if result < last:
            raise _refused(file, f"its merges are not in the order of the ids (token {result})")
        last, upwards = result, upwards and result > max(left, right)
        listed.add((left, right))
    if upwards and _each_gives_itself(body, ranks):
        return
    splits = ((token[:cut], token[cut:]) for token in ranks for cut in range(1, len(token)))
    missing = next(((a, b) for a, b in splits if a in ids and b in ids and (ids[a], ids[b]) not in listed), None)
    if missing is not None or not model.get("ignore_merges"):
        raise _refused(file, "some of its tokens cannot be reached by its own merges")


def _each_gives_itself(body: Mapping[str, Any], ranks: list[bytes]) -> bool:
    """Whether the listed merges, applied to the bytes of each token, end in that token."""
    import tokenizers

    model = {**body["model"], "ignore_merges": False, "vocab": dict(body["model"]["vocab"])}
    bare = tokenizers.Tokenizer.from_str(
        json.dumps({**body, "model": model, "added_tokens": [], "post_processor": None, "truncation": None})
    )
    written = {byte: char for char, byte in byte_alphabet().items()}
    for i, token in enumerate(ranks):
        found = bare.model.tokenize("".join(written[b] for b in token))
        if [one.id for one in found] != [i]:
            return False
    return True


def _specials(file: Path, first: int, added: Mapping[int, Any]) -> list[str]:
    """Names of the special tokens in id order, ours among them.

    A token that already bears one of our names keeps it; the end of a document is the source's own; the other names go
    to reserved tokens of the source, or to new ids after its last.
    """
    if sorted(added) != list(range(first, first + len(added))):
        raise _refused(file, "the ids of its special tokens have gaps")
    names = [str(added[i]["content"]) for i in range(first, first + len(added))]
    end = next((name for name in (*_ENDS, _eos_of(file)) if name in names), None)
    if end is None:
        raise _refused(file, "no special token of it ends a document (eos_token of tokenizer_config.json)")
    names[names.index(end)] = EOD
    spare = [i for i, name in enumerate(names) if re.search("reserved", name)]
    for name in SPECIALS:
        if name in names:
            continue
        if spare:
            names[spare.pop(0)] = name
        else:
            names.append(name)
    return names


def _eos_of(file: Path) -> str | None:
    try:
        eos = json.loads((file.parent / "tokenizer_config.json").read_bytes())["eos_token"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return eos.get("content") if isinstance(eos, dict) else eos


def _check_pattern(file: Path, tokenizer: Tokenizer) -> None:
    """Both engines must take the expression and cut alike; then a text of many scripts must get the same ids."""
    import tokenizers

    if not cuts_alike(tokenizer.pattern):
        raise _refused(file, "its regular expression cuts text otherwise in tiktoken")
    reference = tokenizers.Tokenizer.from_file(str(file))
    if tokenizer.encode(_SAMPLE) != reference.encode(_SAMPLE, add_special_tokens=False).ids:
        raise _refused(file, "it gives other ids to a text of many scripts")
