"""The numeric signals of a document, in the order of their columns, and the numbers in their definitions."""

from __future__ import annotations

SIGNALS = (
    "words",  # tokens with a letter or digit; in scripts without spaces characters / 2 (Han, kana), / 5 (Thai, ...)
    "mean_word_length",  # letters and digits of a word, scripts without spaces left out
    "spaceless",  # share of characters that are in scripts without spaces
    "alphanumeric",  # share of characters that are letters, digits or marks
    "hash_ratio",  # "#" for each word
    "ellipsis_ratio",  # "..." and "…" for each word
    "newline_ratio",  # line ends for each word
    "alphabetic_words",  # share of tokens with a letter
    "stop_words",  # how many of the language's stop words stand in the text; -1: no list for the language
    "sentences",  # runs of sentence-ending marks, inside words left out
    "curly",  # "{"
    "lorem_ipsum",  # lines with "lorem ipsum"
    "bullet_lines",  # shares of lines with text: that begin with a bullet
    "ellipsis_lines",  # that end with an ellipsis
    "terminal_lines",  # that end with a sentence mark or closing quote
    "short_lines",  # of at most 30 characters
    "javascript_lines",  # with the word "javascript"
    "policy_lines",  # with "privacy policy", "terms of use" and the like
    "duplicate_lines",  # share of lines that stood before in the document
    "duplicate_line_characters",  # the characters of those
    "duplicate_paragraphs",  # the same of paragraphs (parted by blank lines)
    "duplicate_paragraph_characters",
    "top_2gram",  # share of characters in the most frequent n-gram of words that occurs twice
    "top_3gram",
    "top_4gram",
    "repeated_5gram",  # share of characters in n-grams of words that stood before
    "repeated_6gram",
    "repeated_7gram",
    "repeated_8gram",
    "repeated_9gram",
    "repeated_10gram",
)
SHORT_LINE = 30
DENSE_WORD, LONG_WORD = 2, 5  # characters
