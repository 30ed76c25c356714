"""Tests of concepts.py, machinery/training/captions.py and machinery/names.py: captions -> concepts ->
tokens."""
import io
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import spacy
import torch
from open_clip.tokenizer import SimpleTokenizer
from spacy.tokens import Doc

from concepts import (ConceptBank, annotate, clean, load_annotations, load_parser, main,
                      noun_concepts, plural, token_spans, tokenize)
from machinery.training.captions import read_captions
from machinery.names import BENCHMARK_NAMES, CLASSES, read_classes

TOKENIZER = SimpleTokenizer()
ENGLISH = spacy.blank("en")
PIPELINE = Path(__file__).parents[2] / "shared" / "data" / "en_captions_sm"
needs_pipeline = pytest.mark.skipif(not PIPELINE.is_dir(),
                                    reason=f"no spaCy pipeline in {PIPELINE}")


def parsed(text, heads, deps, pos, lemmas=None):
    """A Doc as a parser would give it; words are separated by spaces."""
    words = text.split()
    spaces = [True] * (len(words) - 1) + [False]
    return Doc(ENGLISH.vocab, words=words, spaces=spaces, heads=heads, deps=deps.split(),
               pos=pos.split(), lemmas=lemmas and lemmas.split())


BATS = parsed("two wooden baseball bats", [3, 3, 3, 3], "nummod amod compound ROOT",
              "NUM ADJ NOUN NOUN", "two wooden baseball bat")
DOGS = parsed("a dog and a dog chase a red ball", [1, 5, 1, 4, 1, 5, 8, 8, 5],
              "det nsubj cc det conj ROOT det amod dobj",
              "DET NOUN CCONJ DET NOUN VERB DET ADJ NOUN")
RUNNING = parsed("running quickly", [0, 0], "ROOT advmod", "VERB ADV", "run quickly")


class ByHand:
    """A parser that knows a few captions, in their cleaned form."""

    def __init__(self, *docs):
        self.docs = {doc.text: doc for doc in (*docs, Doc(ENGLISH.vocab))}

    def pipe(self, texts):
        return (self.docs[text] for text in texts)


def named(caption, bank, parser="match"):
    """What annotate finds in one caption: [(name, text of the tokens)]."""
    tokens = tokenize(caption)
    [found] = annotate([caption], bank, parser)
    return [(bank.names[id], TOKENIZER.decode(tokens[first:end].tolist()).strip())
            for id, first, end in found]


# --------------------------------------------------------------------------------------------------
# Noun chunks -> concepts

def test_compound_and_root():
    """The concept of "two wooden baseball bats" is "baseball bat". Its characters run from the
    compound to the end of the root."""
    assert noun_concepts(BATS) == [("baseball bat", 11, 24)]
    assert BATS.text[11:24] == "baseball bats"


def test_every_chunk_and_every_repetition():
    """Each noun chunk gives one concept, in the order of the text, also when the same concept is
    there twice."""
    assert noun_concepts(DOGS) == [("dog", 2, 5), ("dog", 12, 15), ("ball", 28, 32)]


def test_only_the_last_compound_counts():
    """Of several compounds only the last one before the root belongs to the concept."""
    doc = parsed("a steel kitchen sink", [3, 3, 3, 3], "det compound compound ROOT",
                 "DET NOUN NOUN NOUN")
    assert noun_concepts(doc) == [("kitchen sink", 8, 20)]


def test_compound_that_is_not_adjacent():
    """A word between compound and root is inside the characters but not in the concept's name."""
    doc = parsed("the kitchen steel knives", [3, 3, 3, 3], "det compound amod ROOT",
                 "DET NOUN ADJ NOUN", "the kitchen steel knife")
    assert noun_concepts(doc) == [("kitchen knife", 4, 24)]


def test_compound_of_another_word():
    """A compound that belongs to another word than the chunk's root is not used."""
    doc = parsed("tennis court owners", [1, 2, 2], "compound compound ROOT", "NOUN NOUN NOUN",
                 "tennis court owner")
    assert noun_concepts(doc) == [("court owner", 7, 19)]


def test_compound_after_the_root():
    """Only a compound before the root belongs to it: in "gate five" the concept is "gate"."""
    doc = parsed("the gate five", [1, 1, 1], "det ROOT compound", "DET NOUN NOUN")
    assert noun_concepts(doc) == [("gate", 4, 8)]


def test_no_chunks():
    """A caption without a noun has no concepts."""
    assert noun_concepts(RUNNING) == []


def test_missing_lemmas():
    """Without a lemmatizer the root's own text in lower case is used as its lemma."""
    doc = parsed("Two Baseball Bats", [2, 2, 2], "nummod compound ROOT", "NUM NOUN NOUN")
    assert noun_concepts(doc) == [("baseball bats", 4, 17)]


# --------------------------------------------------------------------------------------------------
# Text -> spans of tokens

@pytest.mark.parametrize("text, spans", [
    ("the dog's bone", [(0, 3), (4, 7), (7, 9), (10, 14)]),             # "'s" is a token of its own
    ("they'll don't", [(0, 4), (4, 7), (8, 11), (11, 13)]),
    ("a hot-dog", [(0, 1), (2, 5), (5, 6), (6, 9)]),
    ("3,500", [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),                # each digit is a token
    ("  a \n\n b\t", [(0, 1), (2, 3)]),                                 # cleaned to single spaces
    ("tea &amp; cake", [(0, 3), (4, 5), (6, 10)]),                      # "tea & cake"
    ("tea &amp;amp; cake", [(0, 3), (4, 5), (6, 10)]),                  # escaped twice
    ("Ã©clair", [(0, 1), (1, 6)]),                                      # repaired to "éclair"
    ("", []),
    ("  \n", []),
])
def test_spans_by_hand(text, spans):
    """Spans count characters of the cleaned caption."""
    assert token_spans(text) == spans


def assert_aligned(text):
    """The tokenizer's own tokens, one after another, cover the bytes of the text: each token covers
    the characters of its span."""
    cleaned = clean(text)
    tokens = TOKENIZER.encode(text)
    spans = token_spans(text)
    owner = [i for i, letter in enumerate(cleaned) if letter != " "
             for _ in letter.encode()]                                  # byte -> character
    position = 0
    assert len(spans) == len(tokens), ascii(text)
    for token, span in zip(tokens, spans):
        piece = TOKENIZER.decoder[token].removesuffix("</w>")
        covered = owner[position:position + len(piece)]
        assert span == (covered[0], covered[-1] + 1), ascii(text)
        content = bytes(TOKENIZER.byte_decoder[c] for c in piece)
        assert content in cleaned[slice(*span)].encode(), ascii(text)
        position += len(piece)
    assert position == len(owner), ascii(text)


@pytest.mark.parametrize("text", [
    "Two wooden baseball bats.", "a naïve café at Malmö's harbour",
    "Ã©clair au cafÃ© â€“ dÃ©jÃ vu", "a dog 😀 and 🐶🐶",
    "👩‍👩‍👧 🇩🇪 👍🏽 ❤️",
    "&lt;b&gt; fish &amp; chips &amp;amp; peas &#39;n&#x1F600;", "state-of-the-art hot-dog--stand",
    "dogs' and cat's, we're he'd I'M", "12 bats, 3.5 m, ½ ²", "一只狗在草地上 いぬ 개",
    "a  b\t\tc\n\nd\u00a0e\u2003f", "ﬁne ﬀ ①", "İstanbul STRASSE straße ſ", "",
    "<start_of_text> a dog <end_of_text>", "zzz\x00\x07zzz", "\ud800 lone",
    "a very long caption " * 30,
])
def test_spans_of_awkward_text(text):
    """There is one span per token of open_clip's tokenizer, and the token's bytes are those of its
    characters."""
    assert_aligned(text)


def test_spans_of_random_unicode():
    """The same holds for any text: 2,000 random mixtures of words, entities, emoji and arbitrary
    characters."""
    rng = random.Random(0)
    words = ["dog", "Dog's ", " hot-dog", "&amp;", "&#x1F436;", "é", "Ã©", "👩‍👩‍👧",
             "7", "狗", "\n", "  ", "\u200b", "\ufe0f", "İ"]

    def piece():
        if rng.random() < 0.5:
            return rng.choice(words)
        return chr(rng.randrange(rng.choice([0x3000, 0x110000])))

    for _ in range(2000):
        assert_aligned("".join(piece() for _ in range(rng.randrange(25))))


# --------------------------------------------------------------------------------------------------
# Captions -> (concept, first token, end token)

def test_positions_count_the_start_token():
    """In [start, two, wooden, baseball, bats, end] the tokens of "baseball bat" are 3 and 4."""
    bank = ConceptBank(["cat", "baseball bat"])
    assert list(annotate(["Two wooden  baseball bats"], bank, ByHand(BATS))) == [[(1, 3, 5)]]


def test_captions_stay_apart():
    """Each caption gives its own list, also one with repeated concepts, one without concepts and an
    empty one. What the bank does not have is left out."""
    captions = iter(["two wooden baseball bats", "a dog and a dog chase a red ball", "",
                     "running quickly", " "])
    found = annotate(captions, ConceptBank(["ball", "dog"]), ByHand(BATS, DOGS, RUNNING))
    assert list(found) == [[], [(1, 2, 3), (1, 5, 6), (0, 9, 10)], [], [], []]


def test_word_of_several_tokens():
    """A word that the tokenizer cuts into pieces is covered by all of them: br, two for û, l and
    ée are 2 to 6."""
    doc = parsed("a brûlée", [1, 1], "det ROOT", "DET NOUN")
    assert list(annotate(["A BRÛLÉE"], ConceptBank(["brûlée"]), ByHand(doc))) == [[(0, 2, 7)]]


def test_word_inside_a_token():
    """Where the parser cuts words into smaller parts than the tokenizer, the whole token that holds
    the concept is taken."""
    doc = Doc(ENGLISH.vocab, words=["sun", "flower"], spaces=[False, False], heads=[1, 1],
              deps=["amod", "ROOT"], pos=["ADJ", "NOUN"])
    assert token_spans("sunflower") == [(0, 9)]
    assert list(annotate(["sunflower"], ConceptBank(["flower"]), ByHand(doc))) == [[(0, 1, 2)]]


@pytest.mark.parametrize("caption", [
    "a &amp;amp; dog's café", "😀👩‍👩‍👧 a dog 🇩🇪", "the DOG-friendly place",
    "ﬁne dÃ©jÃ  vu: dog!", "3,500 dog, 12%", "狗 dog 狗", "a\n\n  dog",
    "don't we're he'll dog"])
def test_tokens_decode_to_the_word(caption):
    """With any text around it, the tokens of an occurrence decode to the word itself."""
    assert named(caption, ConceptBank(["dog"])) == [("dog", "dog")]


def test_truncation():
    """Of 80 dogs the 75 between start and end token are kept: positions 1 to 75 of the context of
    77."""
    caption = "dog " * 80
    [found] = annotate([caption], ConceptBank(["dog"]), "match")
    assert found == [(0, i, i + 1) for i in range(1, 76)]
    assert tokenize(caption)[76] == TOKENIZER.eot_token_id


@pytest.mark.parametrize("before, found", [(73, [(0, 74, 76)]), (74, []), (75, []), (200, [])])
def test_occurrence_across_the_end_of_the_context(before, found):
    """An occurrence is kept only if all its tokens fit: the last place for "hot dog" is 74 and
    75."""
    caption = "a " * before + "hot dog"
    assert list(annotate([caption], ConceptBank(["hot dog"]), "match")) == [found]


def test_bank_that_holds_a_plural():
    """A name that is itself a plural is found by the words of the text, if the lemma is not in the
    bank."""
    doc = parsed("the clouds", [1, 1], "det ROOT", "DET NOUN", "the cloud")
    assert list(annotate(["the clouds"], ConceptBank(["clouds"]), ByHand(doc))) == [[(0, 2, 3)]]


@pytest.mark.parametrize("names", [["shelf", "shelves"], ["shelves", "shelf"]])
def test_bank_that_holds_both_numbers(names):
    """Where the bank has singular and plural, the lemma decides, whatever the order of the bank."""
    doc = parsed("the shelves", [1, 1], "det ROOT", "DET NOUN", "the shelf")
    assert named("the shelves", ConceptBank(names), ByHand(doc)) == [("shelf", "shelves")]


def test_pipeline_that_finds_nothing():
    """A pipeline that neither parses nor matches is refused, with an example of one that works."""
    with pytest.raises(ValueError, match="no dependency parser; expected one like en_core_web_sm"):
        list(annotate(["a dog"], ConceptBank(["dog"]), spacy.blank("en")))


def test_processes(forked):
    """Two parser processes give the annotations of one, in the same order, also of more captions
    than a process gets at a time."""
    captions = ["a dog", "two cats", "", "a cat and a dog"]
    captions += [f"{'so ' * (i % 7)}{captions[i % 4]}" for i in range(2500)]
    bank = ConceptBank(["dog", "cat"])
    one = list(annotate(captions, bank, "match"))
    assert one[:4] == [[(0, 2, 3)], [(1, 2, 3)], [], [(1, 2, 3), (0, 5, 6)]]
    assert list(annotate(captions, bank, "match", processes=2)) == one


@needs_pipeline
def test_real_sentences():
    """A trained pipeline gives the concepts of real sentences: compounds, plurals, only what the
    bank has."""
    captions = ["Several people are sitting at a dining table with wine glasses.",
                "A traffic light hangs over the street.", "The children's kites fly above the sea.",
                "A man in a red shirt is riding a horse on the beach.", ""]
    found = [named(caption, ConceptBank.default(), str(PIPELINE)) for caption in captions]
    assert found == [[("dining table", "dining table"), ("wine glass", "wine glasses")],
                     [("traffic light", "traffic light")],
                     [("kite", "kites"), ("sea", "sea")], [("horse", "horse")], []]


# --------------------------------------------------------------------------------------------------
# The built-in matcher

@pytest.mark.parametrize("name, expected", [
    ("dog", "dogs"), ("bus", "buses"), ("fox", "foxes"), ("couch", "couches"), ("dish", "dishes"),
    ("city", "cities"), ("toy", "toys"), ("man", "men"), ("person", "people"), ("sheep", "sheep"),
    ("knife", "knives"), ("wine glass", "wine glasses"), ("giraffe", "giraffes")])
def test_plural(name, expected):
    """The plural of a name is that of its last word."""
    assert plural(name) == expected


@pytest.mark.parametrize("caption, names", [
    ("two dogs and a cat", ["dog", "cat"]),                             # plural
    ("people with children", ["person", "child"]),                      # irregular plural
    ("a sheep, two sheep", ["sheep", "sheep"]),
    ("two hot dogs", ["hot dog"]),                                      # longest match: not "dog"
    ("a DOG and a Hot Dog", ["dog", "hot dog"]),                        # case
    ("a hot-dog stand", ["hot dog"]),                                   # "-" counts as a space
    ("a bulldog in the catalogue", []),                                 # whole words only
    ("the dog's hot dogs' cat.", ["dog", "hot dog", "cat"]),
    ("nothing here", []),
])
def test_match(caption, names):
    """The matcher finds names and their plurals as whole words, the longest first."""
    bank = ConceptBank(["person", "child", "sheep", "dog", "hot dog", "cat"])
    assert [name for name, _ in named(caption, bank)] == names


def test_match_synonyms():
    """Each synonym of a concept is found and counts as the concept."""
    bank = ConceptBank(["dog", ["sofa", "couch"]])
    assert named("a couch by two sofas", bank) == [("sofa", "couch"), ("sofa", "sofas")]


def test_missing_parser():
    """The error for a parser that is not installed names it, the command that installs one, and the
    parser that needs no installation."""
    message = "'no_such_parser'.*python -m spacy download en_core_web_trf.*--parser match"
    with pytest.raises(FileNotFoundError, match=message):
        load_parser("no_such_parser", ConceptBank(["dog"]))


# --------------------------------------------------------------------------------------------------
# Names

def test_bank_synonyms():
    """All synonyms of a line are one concept, which has the name of the first."""
    bank = ConceptBank(["dog", ["sofa", "couch"]])
    assert len(bank) == 2 and bank.names == ["dog", "sofa"]
    assert [bank.find(name) for name in ("dog", "sofa", "couch", "cat")] == [0, 1, 1, -1]


def test_bank_normalises():
    """Names that differ only in case, hyphens or white space are equal."""
    bank = ConceptBank(["Traffic-Light"])
    assert bank.names == ["traffic light"]
    assert bank.find(" traffic  LIGHT") == bank.find("traffic-light") == 0


@pytest.mark.parametrize("names, merged, ids, repeated", [
    (["dog", "cat", "Dog"], ["dog", "cat"], {"dog": 0, "cat": 1}, "'Dog'"),
    ([["sofa", "couch"], "dog", ["couch"]], ["sofa", "dog"], {"sofa": 0, "couch": 0, "dog": 1},
     "'couch'"),
    ([["sofa", "couch"], ["couch", "settee"]], ["sofa"], {"sofa": 0, "couch": 0, "settee": 0},
     "'couch'"),
    (["t-shirt", "t shirt"], ["t shirt"], {"t shirt": 0}, "'t shirt'")])
def test_bank_merges_equal_names(names, merged, ids, repeated, capsys):
    """Names that are equal after normalisation count once, and so do lists of synonyms that share a
    name. One line says so and names one of them."""
    bank = ConceptBank(names)
    assert bank.names == merged and bank.ids == ids and len(bank) == len(merged)
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    for part in ("concept bank", "more than once", repeated):
        assert part in printed.err


def test_bank_without_equal_names(capsys):
    """Where no name is there twice nothing is printed, also for the default bank: its files share
    many names."""
    ConceptBank(["dog", ["sofa", "couch"]])
    ConceptBank.default()
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


@pytest.mark.parametrize("names, message", [
    (["dog", " "], "concept bank: an empty class name; every class needs a name of its own"),
    ([], "concept bank: no class names found, expected at least one"),
])
def test_bank_refuses(names, message):
    """An empty name and a bank without names are refused, and the error says what was found."""
    with pytest.raises(ValueError, match=message):
        ConceptBank(names)


def test_bank_from_file(tmp_path):
    """A bank file has one concept per line, synonyms after commas; blank lines do not count."""
    (tmp_path / "bank.txt").write_text("dog, puppy\n\n  cat\n")
    assert read_classes(tmp_path / "bank.txt") == [["dog", "puppy"], ["cat"]]
    bank = ConceptBank.from_file(tmp_path / "bank.txt")
    assert bank.names == ["dog", "cat"] and bank.ids == {"dog": 0, "puppy": 0, "cat": 1}


@pytest.mark.parametrize("names, excluded, left", [
    (["dog", "cat", "cow"], ["Cat"], ["dog", "cow"]), (["dog", "clouds"], ["cloud"], ["dog"]),
    (["dog", ["sofa", "couch"]], ["couch"], ["dog"]),
    (["dog", "dog house"], ["dog"], ["dog house"]),
    (["dog", "shelf"], ["shelves"], ["dog"])])
def test_bank_without_some_names(names, excluded, left):
    """A concept with an excluded name, or its plural or singular, is left out with all its
    synonyms. The others are numbered without gaps."""
    bank = ConceptBank(names, excluded)
    assert bank.names == left
    assert [bank.find(name) for name in left] == list(range(len(left)))
    assert [bank.find(form) for name in excluded for form in (name, plural(name))] == [-1, -1]


def test_bank_by_name(tmp_path):
    """A bank is named by a file, by nothing or by "none". A class file removes its names from it,
    with their synonyms."""
    (tmp_path / "bank.txt").write_text("dog, puppy\nsofa\n")
    (tmp_path / "gone.txt").write_text("cat, puppy\n")
    assert ConceptBank.by_name(tmp_path / "bank.txt").names == ["dog", "sofa"]
    assert ConceptBank.by_name(tmp_path / "bank.txt", tmp_path / "gone.txt").names == ["sofa"]
    assert ConceptBank.by_name().ids == ConceptBank.default().ids
    voc20 = {name for synonyms in read_classes(CLASSES / "voc20.txt") for name in synonyms}
    left = ConceptBank.by_name(None, CLASSES / "voc20.txt")
    assert set(ConceptBank.default().names) - set(left.names) == voc20
    with pytest.raises(ValueError, match="concept bank: no class names found"):
        ConceptBank.by_name(CLASSES / "voc.txt", CLASSES / "voc.txt")


def test_open_bank():
    """An open bank takes every noun phrase in the order found, repeated ones once. It takes no
    excluded names and no names that are empty when normalised."""
    dash = parsed("a dog and -", [1, 1, 1, 1], "det ROOT cc conj", "DET NOUN CCONJ NOUN")
    bank = ConceptBank(None)
    found = list(annotate([DOGS.text, BATS.text, dash.text], bank, ByHand(DOGS, BATS, dash)))
    assert bank.names == ["dog", "ball", "baseball bat"] and len(noun_concepts(dash)) == 2
    assert found == [[(0, 2, 3), (0, 5, 6), (1, 9, 10)], [(2, 3, 5)], [(0, 2, 3)]]
    for number in ("dog", "dogs"):
        bank = ConceptBank(None, excluded=[number])
        assert list(annotate([DOGS.text], bank, ByHand(DOGS))) == [[(0, 9, 10)]]
        assert bank.names == ["ball"]


def test_open_bank_needs_a_parser():
    """The matcher looks for the bank's names. With an open bank, which has none, it is an error."""
    with pytest.raises(ValueError, match="--bank none .* name a spaCy pipeline with --parser"):
        list(annotate(["a dog"], ConceptBank(None), "match"))


@needs_pipeline
def test_open_bank_and_the_cache(tmp_path, capsys):
    """The cache holds an open bank's names. With other names excluded, or with a bank of names, it
    is not used."""
    def load(bank):
        rows = lists(load_annotations(tmp_path / "c.tsv", CAPTIONS, bank, str(PIPELINE)))
        parsed_anew = capsys.readouterr().out != ""         # then it prints its speed
        return bank.names, rows, parsed_anew

    names, rows, parsed_anew = load(ConceptBank(None))
    assert set(names) >= {"dog", "cat"} and len(rows[0]) == 2 and parsed_anew
    assert load(ConceptBank(None)) == (names, rows, False)
    assert load(ConceptBank(None, ["cat"]))[2] and load(ConceptBank(["dog"]))[2]


def test_class_file_with_byte_order_mark(tmp_path):
    """The byte order mark that some editors write before a text is not part of the first name."""
    (tmp_path / "bank.txt").write_text("dog\ncat\n", encoding="utf-8-sig")
    assert read_classes(tmp_path / "bank.txt") == [["dog"], ["cat"]]


@pytest.mark.parametrize("content, message", [
    (b"", "no class names found, expected at least one"), (b"\n \n", "no class names found"),
    (b"dog\ncat,\n", "an empty class name"), (b"dog\ncat\nDOG\n", "duplicate class name 'dog'"),
    (b"caf\xe9\n", "")])
def test_bad_class_file(tmp_path, content, message):
    """The error for a class file without usable names names the file and what is wrong with it."""
    (tmp_path / "bank.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"bank.txt.*{message}"):
        read_classes(tmp_path / "bank.txt")


def test_missing_class_file(tmp_path):
    """The error for a missing class file names it and what it should hold."""
    message = "bank.txt: expected a text file with one class name per line"
    with pytest.raises(FileNotFoundError, match=message):
        read_classes(tmp_path / "bank.txt")


@pytest.mark.parametrize("benchmark, length",
                         [*zip(BENCHMARK_NAMES, [21, 20, 60, 59, 81, 171, 19, 150], strict=True)])
def test_class_files(benchmark, length):
    """The benchmarks have 21, 20, 60, 59, 81, 171, 19 and 150 classes. Those with background have
    it first."""
    classes = read_classes(CLASSES / f"{benchmark}.txt")
    assert len(classes) == length
    background = [i for i, names in enumerate(classes) if "background" in names]
    assert background == ([0] if length in (21, 60, 81) else [])


@pytest.mark.parametrize("with_background, without", [("voc", "voc20"), ("context", "context59")])
def test_class_files_that_differ_by_background(with_background, without):
    """VOC20 and Context59 are VOC21 and Context60 without background, in the same order."""
    classes = read_classes(CLASSES / f"{with_background}.txt")
    assert classes[1:] == read_classes(CLASSES / f"{without}.txt")


def test_default_bank():
    """The default bank holds every name of the eight class files once, and no other."""
    lines = [line for benchmark in BENCHMARK_NAMES
             for line in (CLASSES / f"{benchmark}.txt").read_text().splitlines()]
    names = {" ".join(name.lower().replace("-", " ").split())
             for line in lines for name in line.split(",")}
    bank = ConceptBank.default()
    assert sorted(bank.names) == sorted(names) and sorted(bank.ids) == sorted(names)


# --------------------------------------------------------------------------------------------------
# Caption files

COCO = {"images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 3, "caption": "a dog"},
                        {"image_id": 7, "caption": "Ein Café"},
                        {"image_id": 3, "caption": "two dogs"}]}
PAIRS = [("a.jpg", "a dog"), ("b.jpg", "Ein Café"), ("a.jpg", "two dogs")]
TSV = "".join(f"{image}\t{caption}\n" for image, caption in PAIRS)
JSONL = "".join(json.dumps({"image": image, "caption": caption}) + "\n"
                for image, caption in PAIRS)


@pytest.mark.parametrize("name, content", [
    ("c.json", json.dumps(COCO)), ("c.tsv", TSV), ("c.tsv", "image\tcaption\n" + TSV),
    ("c.tsv", "filepath\ttitle\n" + TSV), ("c.tsv", TSV.replace("\n", "\r\n")),
    ("c.tsv", TSV.replace("\n", "\tmore columns\n\n")), ("c.tsv", TSV + "c.jpg\t \n"),
    ("c.tsv", "\ufeffimage\tcaption\n" + TSV), ("c.tsv", "\ufeff" + TSV),
    ("c.json", "\ufeff" + json.dumps(COCO)), ("c.jsonl", JSONL),
    ("c.jsonl", JSONL.replace("\n", "\n\n")),
    ("c.jsonl", JSONL + '{"image": "c.jpg", "caption": ""}')])
def test_caption_formats(tmp_path, name, content):
    """COCO JSON, JSONL and TSV with or without a header give the same pairs. Empty captions, blank
    lines and a byte order mark do not count."""
    (tmp_path / name).write_bytes(content.encode())
    assert read_captions(tmp_path / name) == PAIRS


@pytest.mark.parametrize("name, row", [
    ("c.tsv", "a.jpg\ta dog{}here\n"),
    ("c.jsonl", '{{"image": "a.jpg", "caption": "a dog{}here"}}\n')])
@pytest.mark.parametrize("separator", ["\u2028", "\x85"])
def test_only_a_new_line_ends_a_row(tmp_path, name, row, separator):
    """Unicode's other line separators are ordinary characters of a caption."""
    (tmp_path / name).write_bytes(row.format(separator).encode())
    assert read_captions(tmp_path / name) == [("a.jpg", f"a dog{separator}here")]


@pytest.mark.parametrize("name, content, found", [
    ("c.txt", TSV, r"its name must end in \.json \(COCO\), \.jsonl or \.tsv"),
    ("c.json", "", "Expecting value"), ("c.json", json.dumps(COCO)[:-1], "JSONDecodeError"),
    ("c.json", "[]", "TypeError"),
    ("c.json", '{"images": []}', "KeyError: 'annotations'"),
    ("c.json", '{"images": [], "annotations": [{"image_id": 5, "caption": "a dog"}]}',
     "KeyError: 5"),
    ("c.json", '{"images": [{"id": 5, "file_name": "a"}], '
               '"annotations": [{"image_id": 5, "caption": 1}]}', "no text"),
    ("c.jsonl", '{"image": "a.jpg"}', "KeyError: 'caption'"),
    ("c.jsonl", '{"image": 1, "caption": "a dog"}', "that is no text"),
    ("c.jsonl", '{"image": "a.jpg", "caption": null}', "that is no text"),
    ("c.jsonl", "{", "JSONDecodeError"),
    ("c.tsv", "a.jpg\ta dog\nb.jpg a cat\n", "IndexError"),
    ("c.tsv", "a.jpg\tcaf\xe9\n".encode("latin-1"), "UnicodeDecodeError"),
])
def test_file_that_is_no_captions_file(tmp_path, name, content, found):
    """The error for a file that cannot be read as captions names it, what was found and what was
    expected."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = (f"{name} is no captions file .*{found}.* Expected COCO's JSON with 'images' and "
               "'annotations', or rows of image and caption")
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / name)


@pytest.mark.parametrize("name, content", [
    ("c.tsv", ""), ("c.tsv", "\n\n"), ("c.tsv", "image\tcaption\n"), ("c.tsv", "a.jpg\t\n"),
    ("c.jsonl", ""), ("c.json", '{"images": [], "annotations": []}')])
def test_empty_captions_file(tmp_path, name, content):
    """A captions file without a caption is refused, and the error says so."""
    (tmp_path / name).write_text(content)
    message = f"{name} holds no captions; expected at least one pair of image and caption"
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / name)


def test_missing_captions_file(tmp_path):
    """The error for a missing captions file shows COCO's folders, where to get them, and what to
    do without them."""
    with pytest.raises(FileNotFoundError) as error:
        read_captions(tmp_path / "captions_train2017.json")
    for part in ("captions_train2017.json", "data/coco/annotations/captions_train2017.json",
                 "data/coco/train2017/*.jpg", "https://cocodataset.org", "--train-data toy"):
        assert part in str(error.value)


# --------------------------------------------------------------------------------------------------
# The cache beside the captions file

CAPTIONS = ["a dog and a cat", "nothing", "two cats", "a hot dog"]
BANK = ConceptBank(["dog", "cat"])


def lists(annotations):
    """(offsets, rows) as annotate gives them: a list of tuples for each caption."""
    offsets, rows = annotations
    return [list(map(tuple, rows[start:end].tolist())) for start, end in zip(offsets, offsets[1:])]


def change_arrays(cache, **arrays):
    """Replace arrays of a cache file. The others, such as its key, stay."""
    with np.load(cache) as file:
        kept = dict(file)
    np.savez(cache, **{**kept, **{name: np.array(value) for name, value in arrays.items()}})


def tamper(cache):
    """Change a cache to TAMPERED: values that are possible but wrong."""
    change_arrays(cache, offsets=[0, 1, 1, 1, 1], rows=[[1, 8, 9]])


TAMPERED = [[(1, 8, 9)], [], [], []]


@pytest.fixture
def cached(tmp_path):
    """Path of a captions file whose cache was made and then changed to TAMPERED."""
    load_annotations(tmp_path / "c.tsv", CAPTIONS, BANK, "match")
    tamper(tmp_path / "c.tsv.concepts.npz")
    return tmp_path / "c.tsv"


def test_annotations_as_arrays(tmp_path, capsys):
    """Offsets and rows hold exactly what annotate yields, without and with the cache, which is the
    only new file."""
    annotated = list(annotate(CAPTIONS, BANK, "match"))
    assert annotated == [[(0, 2, 3), (1, 5, 6)], [], [(1, 2, 3)], [(0, 3, 4)]]
    for _ in range(2):
        assert lists(load_annotations(tmp_path / "c.tsv", CAPTIONS, BANK, "match")) == annotated
    assert [path.name for path in tmp_path.iterdir()] == ["c.tsv.concepts.npz"]
    assert capsys.readouterr().err == ""


def test_cache_is_reused(cached):
    """Nothing is parsed again while captions, bank and parser are the same: the changed values in
    the cache are used."""
    bank = ConceptBank(["dog", "cat"])
    assert lists(load_annotations(cached, CAPTIONS, bank, "match")) == TAMPERED


@pytest.mark.parametrize("captions, names", [
    (CAPTIONS[:3] + ["a dog"], ["dog", "cat"]), (CAPTIONS[::-1], ["dog", "cat"]),
    (CAPTIONS, ["cat", "dog"]), (CAPTIONS, ["dog", "cat", "hot dog"]),
    (CAPTIONS, ["dog", ["cat", "kitten"]])])
def test_cache_is_made_again(cached, captions, names):
    """For another caption, another order, another name or synonym the cache is not used but
    replaced."""
    bank = ConceptBank(names)
    annotated = list(annotate(captions, bank, "match"))
    assert lists(load_annotations(cached, captions, bank, "match")) == annotated
    tamper(f"{cached}.concepts.npz")
    assert lists(load_annotations(cached, captions, bank, "match")) == TAMPERED
    annotated = list(annotate(CAPTIONS, BANK, "match"))
    assert lists(load_annotations(cached, CAPTIONS, BANK, "match")) == annotated


def test_cache_of_another_parser(cached, tmp_path):
    """Another parser, here one in a folder that knows only cats, makes the cache again."""
    pipeline = spacy.blank("en", meta={"name": "cats"})
    ruler = pipeline.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "CONCEPT", "pattern": "cat", "id": "cat"}])
    pipeline.to_disk(tmp_path / "cats")
    found = load_annotations(cached, CAPTIONS, BANK, str(tmp_path / "cats"))
    assert lists(found) == [[(1, 5, 6)], [], [], []]


def overwrite(position, value):
    def change(content):
        place = content.index(b"PK\x01\x02") + position                 # in the archive's directory
        return content[:place] + bytes([value]) + content[place + 1:]
    return change


def numpy_array(content):
    stored = io.BytesIO()
    np.save(stored, np.zeros(3))
    return stored.getvalue()


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: b"no archive",
    lambda content: content[:len(content) // 2], lambda content: content[:-30],
    lambda content: content.replace(b"offsets", b"offsetz"),
    lambda content: content.replace(b"NUMPY", b"NUMPX"),
    overwrite(10, 99), overwrite(8, 64), numpy_array],
    ids=["empty", "text", "half", "almost whole", "name", "magic", "unknown compression",
         "encrypted", "plain array"])
def test_broken_cache(cached, damage):
    """A cache that cannot be read for any reason is made again."""
    cache = Path(f"{cached}.concepts.npz")
    cache.write_bytes(damage(cache.read_bytes()))
    annotated = list(annotate(CAPTIONS, BANK, "match"))
    assert lists(load_annotations(cached, CAPTIONS, BANK, "match")) == annotated
    tamper(cache)
    assert lists(load_annotations(cached, CAPTIONS, BANK, "match")) == TAMPERED


@pytest.mark.parametrize("arrays", [
    {"rows": [[2, 8, 9]]}, {"rows": [[-1, 8, 9]]}, {"rows": [[1, 8]]}, {"rows": [[1, 9, 9]]},
    {"rows": [[1, 0, 1]]}, {"rows": [[1, 8, 77]]}, {"rows": [[1.0, 8.0, 9.0]]},
    {"offsets": [0, 1, 1, 1]}, {"offsets": [0, 1, 1, 1, 2]}, {"offsets": [1, 1, 1, 1, 1]},
    {"offsets": [0, 1, 0, 1, 1]}],
    ids=["id above the bank", "id below 0", "two columns", "empty span", "the start token",
         "beyond the context", "no integers", "one caption less", "last offset", "first offset",
         "falling offsets"])
def test_impossible_cache(cached, arrays):
    """A cache whose arrays cannot be annotations of these captions and this bank is made again."""
    change_arrays(f"{cached}.concepts.npz", **arrays)
    annotated = list(annotate(CAPTIONS, BANK, "match"))
    assert lists(load_annotations(cached, CAPTIONS, BANK, "match")) == annotated
    tamper(f"{cached}.concepts.npz")
    assert lists(load_annotations(cached, CAPTIONS, BANK, "match")) == TAMPERED


def no_folder(folder):
    return folder / "gone" / "c.tsv"


def read_only_folder(folder):
    if os.geteuid() == 0:
        pytest.skip("root may write into read-only folders")
    (folder / "locked").mkdir(mode=0o555)
    return folder / "locked" / "c.tsv"


def taken_name(folder):
    (folder / "c.tsv.concepts.npz").mkdir()
    return folder / "c.tsv"


def no_removing_either(folder):
    """As on a read-only file system, the unfinished cache can neither be written nor removed."""
    (folder / "file").touch()
    return folder / "file" / "c.tsv"


@pytest.mark.parametrize("place", [no_folder, read_only_folder, taken_name, no_removing_either])
def test_cache_that_cannot_be_written(tmp_path, place, capsys):
    """Where no cache can be written the annotations are still returned, one line says why, and no
    unfinished file is left."""
    path = place(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    annotated = list(annotate(CAPTIONS, BANK, "match"))
    assert lists(load_annotations(path, CAPTIONS, BANK, "match")) == annotated
    assert f"the annotations were not cached, {path}.concepts.npz: " in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_no_cache(tmp_path, monkeypatch):
    """Without a path nothing is written."""
    monkeypatch.chdir(tmp_path)
    annotated = list(annotate(CAPTIONS, BANK, "match"))
    assert lists(load_annotations(None, CAPTIONS, BANK, "match")) == annotated
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------
# The command line

def test_command(tmp_path, capsys):
    """The command prints the share of captions with a concept and the most frequent concepts. It
    leaves a cache that is used the next time."""
    (tmp_path / "c.tsv").write_text("image\tcaption\n1.jpg\ttwo dogs and a cat\n2.jpg\ta dog\n"
                                    "3.jpg\tnothing\n")
    arguments = [str(tmp_path / "c.tsv"), "--parser", "match"]
    main(arguments)
    speed, first, *rest = capsys.readouterr().out.splitlines()
    assert speed.startswith("annotated 3 captions in ") and speed.endswith(" captions/s)")
    names = len(ConceptBank.default())
    assert first == f"3 captions; 66.7% have a concept, 1.00 per caption; bank of {names}"
    assert [line.split() for line in rest[:2]] == [["2", "dog"], ["1", "cat"]]
    cache = (tmp_path / "c.tsv.concepts.npz").stat()
    main(arguments)
    assert capsys.readouterr().out.splitlines() == [first, *rest]       # from the cache: no speed
    assert (tmp_path / "c.tsv.concepts.npz").stat().st_mtime_ns == cache.st_mtime_ns


def test_command_with_a_bank(tmp_path, capsys):
    """--bank replaces the bank, and at most the 20 most frequent concepts are printed."""
    words = [f"thing{'abcdefghijklmnopqrstuvwxyz'[i]}" for i in range(25)]
    (tmp_path / "bank.txt").write_text("\n".join(words))
    (tmp_path / "c.tsv").write_text(f"1.jpg\t{' '.join(words)}\n2.jpg\t{words[24]}\n")
    main([str(tmp_path / "c.tsv"), "--parser", "match", "--bank", str(tmp_path / "bank.txt"),
          "--processes", "1"])
    _, first, *table = capsys.readouterr().out.splitlines()
    assert first.endswith("100.0% have a concept, 13.00 per caption; bank of 25")
    assert table[0].split() == ["2", "thingy"]
    assert table[20].startswith("class names of the benchmarks")


@needs_pipeline
@pytest.mark.parametrize("options, counts", [
    ([], (21, 3)), (["--exclude-classes", "voc20.txt"], (1, 0)), (["--bank", "none"], (3, 3))])
def test_command_counts_the_benchmarks_names(tmp_path, monkeypatch, capsys, options, counts):
    """The command says how many of a benchmark's class names the bank holds and how many the
    captions name."""
    monkeypatch.chdir(CLASSES)
    (tmp_path / "c.tsv").write_text("1.jpg\ttwo dogs and a cat near a skyscraper\n"
                                    "2.jpg\ta dog on a sofa\n")
    main([str(tmp_path / "c.tsv"), "--parser", str(PIPELINE), *options])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed[-8:]) == len(BENCHMARK_NAMES)
    assert printed[-8].split() == ["21", *map(str, counts), "voc"]


@pytest.mark.parametrize("arguments, message", [
    (["gone.json", "--parser", "match"], "no captions file gone.json"),
    (["c.txt", "--parser", "match"], "c.txt is no captions file"),
    (["empty.tsv", "--parser", "match"], "empty.tsv holds no captions"),
    (["c.tsv", "--parser", "match", "--bank", "gone.txt"], "no class file gone.txt"),
    (["c.tsv", "--parser", "match", "--bank", "empty.tsv"], "empty.tsv: no class names found"),
    (["c.tsv", "--parser", "no_such_parser"], "python -m spacy download")])
def test_command_errors(tmp_path, monkeypatch, arguments, message):
    """A user's mistake ends the command with one line and a status that is not zero, without a
    traceback."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.tsv").write_text(TSV, encoding="utf-8")
    (tmp_path / "c.txt").write_text(TSV, encoding="utf-8")
    (tmp_path / "empty.tsv").write_text("\n")
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    text = stop.value.code                          # a text as code: it is printed, status 1
    assert text.startswith("error: ") and message in text and "\n" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_parser_on_a_gpu_that_is_not_there(tmp_path):
    """Asked for a GPU that spaCy cannot use, the command says so in one line and does not go on."""
    (tmp_path / "c.tsv").write_text("1.jpg\ta dog\n")
    with pytest.raises(SystemExit, match="^error: .*GPU") as stop:
        main([str(tmp_path / "c.tsv"), "--device", "cuda"])
    assert len(stop.value.code.splitlines()) == 1 and not (tmp_path / "c.tsv.concepts.npz").exists()
