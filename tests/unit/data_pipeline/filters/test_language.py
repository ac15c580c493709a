"""The kernel gives the library's label and probability on every text."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from py3langid.langid import LanguageIdentifier

from data_pipeline.filters import language
from data_pipeline.filters.language import HEAD, MIDDLE, UNKNOWN, classify, identify, prepared, sample

#: A sentence of documentation in each language, written for this test.
SENTENCES = {
    "en": "The command prints the names of all files in the folder, one on each line, unless told otherwise.",
    "de": "Der Befehl gibt die Namen aller Dateien im Ordner aus, einen je Zeile, sofern nichts anderes verlangt wird.",
    "fr": "La commande affiche les noms de tous les fichiers du dossier, un par ligne, sauf indication contraire.",
    "es": "La orden muestra los nombres de todos los archivos de la carpeta, uno por línea, si no se indica otra cosa.",
    "it": "Il comando mostra i nomi di tutti i file della cartella, uno per riga, se non è richiesto diversamente.",
    "pt": "O comando mostra os nomes de todos os arquivos da pasta, um por linha, a menos que se peça outra coisa.",
    "nl": "De opdracht toont de namen van alle bestanden in de map, één per regel, tenzij anders gevraagd.",
    "pl": "Polecenie wypisuje nazwy wszystkich plików w katalogu, po jednej w wierszu, chyba że zażądano inaczej.",
    "ru": "Команда выводит имена всех файлов каталога, по одному в строке, если не указано иное.",
    "uk": "Команда виводить назви всіх файлів каталогу, по одній у рядку, якщо не вказано інше.",
    "tr": "Komut, aksi belirtilmedikçe klasördeki tüm dosyaların adlarını her satıra bir tane olacak şekilde yazar.",
    "ja": "このコマンドは、特に指定がない限り、フォルダーにあるすべてのファイルの名前を一行に一つずつ表示します。",
    "zh": "除非另有说明，该命令会列出文件夹中所有文件的名称，每行一个。",
    "ko": "이 명령은 달리 지정하지 않는 한 폴더에 있는 모든 파일의 이름을 한 줄에 하나씩 출력합니다.",
    "el": "Η εντολή εμφανίζει τα ονόματα όλων των αρχείων του φακέλου, ένα σε κάθε γραμμή, εκτός αν ζητηθεί κάτι άλλο.",
    "ar": "يعرض الأمر أسماء جميع الملفات الموجودة في المجلد، اسم واحد في كل سطر، ما لم يطلب غير ذلك.",
    "hi": "यह आदेश फ़ोल्डर की सभी फ़ाइलों के नाम दिखाता है, हर पंक्ति में एक, जब तक कुछ और न कहा जाए।",
    "cs": "Příkaz vypíše jména všech souborů ve složce, jedno na každý řádek, pokud není požadováno jinak.",
    "sr": "Наредба исписује имена свих датотека у фасцикли, по једно у сваком реду, осим ако није другачије тражено.",
    "sv": "Kommandot skriver ut namnen på alla filer i mappen, ett på varje rad, om inget annat anges.",
    "fi": "Komento tulostaa kansion kaikkien tiedostojen nimet, yhden kullekin riville, ellei toisin pyydetä.",
}


@cache
def library() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file("data/model.npz.xz", norm_probs=True)


def assert_as_library(texts: list[bytes]) -> None:
    labels, scores = classify(texts)
    assert scores.dtype == np.float32 and len(labels) == len(scores) == len(texts)
    for text, label, score in zip(texts, labels, scores.tolist(), strict=True):
        ranked = library().rank(text)
        if label == UNKNOWN:  # no feature: the library spreads evenly over all its classes
            uniform = {round(probability * len(library().nb_classes)) for _, probability in ranked}
            assert score == 0 and uniform == {1, 2}
            continue
        (best, high), (second, next_high) = ranked[:2]
        # the library sums in single precision, in the order that its BLAS likes: equal up to that
        assert score == pytest.approx(high, rel=2e-4, abs=1e-6)
        assert label == best or (label == second and high - next_high < 1e-4 * high)


def test_every_sentence_has_its_language() -> None:
    texts = [text.encode() for text in SENTENCES.values()]
    labels, scores = classify(texts)
    assert labels == list(SENTENCES)
    assert (scores > 0.5).all()
    assert_as_library(texts)


def test_long_texts_as_library() -> None:
    assert_as_library([text.encode() * 40 for text in SENTENCES.values()])


_sentence = st.sampled_from(sorted(SENTENCES.values()))
_cuts = st.tuples(_sentence, st.integers(0, 60), st.integers(1, 60)).map(lambda cut: cut[0][cut[1] : cut[1] + cut[2]])
_mixed = st.lists(_cuts, min_size=1, max_size=6).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        _mixed | _mixed.map(str.upper) | st.text(st.characters(exclude_categories=("Cs",)), max_size=60), max_size=4
    )
)
@example(["", " ", "12345", "ＡＢＣ", "e\u0301te\u0301 a\u0300 la plage", "ÉTÉ À LA PLAGE", "İSTANBUL", "\u0958"])
def test_label_and_probability_as_library(texts: list[str]) -> None:
    assert_as_library([text.encode() for text in texts])


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=40) | st.tuples(_cuts, st.binary(max_size=4)).map(lambda two: two[0].encode() + two[1]))
@example("Größe".encode()[:3])
@example(b"a\xffb")
@example("日本語".encode()[:-1])
def test_bytes_that_are_no_text_as_library(data: bytes) -> None:
    assert prepared(data) == library()._encode(data)
    assert_as_library([data])


def test_label_does_not_depend_on_the_neighbours() -> None:
    texts = [text.encode() for text in SENTENCES.values()]
    labels, scores = classify(texts)
    for text, label, score in zip(texts, labels, scores.tolist(), strict=True):
        alone = classify([text])
        assert (alone[0], alone[1].tolist()) == ([label], [score])
    assert classify([])[0] == []


@given(st.text(st.sampled_from("aé日𠀀"), max_size=6000))
@settings(max_examples=60, deadline=None)
def test_sample_is_bounded_and_whole_characters(text: str) -> None:
    data = text.encode()
    part = sample(data)
    part.decode()
    if len(data) <= HEAD + MIDDLE:
        assert part == data
        return
    head, _, middle = part.partition(b"\n")
    assert HEAD - 3 <= len(head) <= HEAD and data.startswith(head)
    assert MIDDLE - 3 <= len(middle) <= MIDDLE + 3 and middle in data[len(head) :]


def test_identify_judges_the_sample() -> None:
    german, french = (SENTENCES[code].encode() for code in ("de", "fr"))
    documents = [german * 100, french, b"", german * 20 + french * 300]
    offsets = np.cumsum([0, *map(len, documents)])
    labels, scores = identify(np.frombuffer(b"".join(documents), np.uint8), offsets)
    assert labels == ["de", "fr", UNKNOWN, "de"]
    assert scores[2] == 0
    assert scores.tolist() == classify([sample(one) for one in documents])[1].tolist()


def test_model_is_loaded_once() -> None:
    assert language.load_model() is language.load_model()
