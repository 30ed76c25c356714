"""Captions -> concepts -> tokens, banks and class files, captions files and what is kept beside
them (concepts.py, machinery/training/captions.py, machinery/names.py)."""
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

from concepts import (ConceptBank, Concepts, annotate, class_names, load_parser, main,
                      noun_concepts, token_spans)
from conftest import parser_of_cats
from machinery.names import (BENCHMARK_NAMES, CLASSES, name_classes, plural, read_classes,
                             read_labels)
from machinery.tokenizer import clean, token_ids, tokenize, tokenizer
from machinery.training.captions import Annotations, read_captions

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

    def pipe(self, texts, as_tuples):
        return ((self.docs[text], caption) for text, caption in texts)


BANK = ConceptBank(["dog", "cat"])


def lists(annotations):
    """`Annotations` in the form of `annotate`: a list of tuples for each caption."""
    return [list(map(tuple, annotations.of(i).tolist())) for i in range(len(annotations))]


def named(caption, bank, parser="match"):
    """What annotate finds in one caption: [(name, text of the tokens)]."""
    tokens = tokenize(caption)
    [found] = annotate([caption], bank, parser)
    return [(bank.names[id], TOKENIZER.decode(tokens[first:end].tolist()).strip())
            for id, first, end in found]


# --------------------------------------------------------------------------------------------------
# Noun chunks -> concepts

@pytest.mark.parametrize("doc, concepts", [
    (BATS, [("baseball bat", 11, 24)]),             # lemma; from the compound to the root's end
    (DOGS, [("dog", 2, 5), ("dog", 12, 15), ("ball", 28, 32)]),         # each chunk, in order
    (parsed("a steel kitchen sink", [3, 3, 3, 3], "det compound compound ROOT",
            "DET NOUN NOUN NOUN"), [("kitchen sink", 8, 20)]),          # only the last compound
    (parsed("the kitchen steel knives", [3, 3, 3, 3], "det compound amod ROOT", "DET NOUN ADJ NOUN",
            "the kitchen steel knife"), [("kitchen knife", 4, 24)]),    # a word between them
    (parsed("tennis court owners", [1, 2, 2], "compound compound ROOT", "NOUN NOUN NOUN",
            "tennis court owner"), [("court owner", 7, 19)]),           # compound of a compound
    (parsed("the gate five", [1, 1, 1], "det ROOT compound", "DET NOUN NOUN"),
     [("gate", 4, 8)]),                                                 # compound after the root
    (parsed("Two Baseball Bats", [2, 2, 2], "nummod compound ROOT", "NUM NOUN NOUN"),
     [("baseball bats", 4, 17)]),                                       # no lemmas: the text
    (RUNNING, [])], ids=lambda value: value.text if isinstance(value, Doc) else "")
def test_noun_concepts(doc, concepts):
    """Each noun chunk gives one concept: the root's lemma and the last compound before it."""
    assert noun_concepts(doc) == concepts


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
    tokens = tokenizer().encode(text)
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


@pytest.mark.parametrize("caption, plain", [
    ("dog\u200b", "dog"), ("a do\u00adg", "a dog"), ("a &#8203; dog", "a dog"),
    ("a \ufeffdog\u202e", "a dog"), ("a <end_of_text> dog", "a end of text dog"),
    ("&lt;START_of_text&gt;dog", "start of textdog"), ("<<end_of_text>end_of_text>", None)])
def test_a_caption_holds_plain_text_only(caption, plain):
    """What cannot be seen is no part of a caption, and the names of special tokens are words: a
    caption has one end token, its last."""
    tokens = tokenize(caption).tolist()
    assert plain is None or tokens == TOKENIZER(plain)[0].tolist()
    assert tokens.count(TOKENIZER.eot_token_id) == tokens.count(TOKENIZER.sot_token_id) == 1


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


@pytest.mark.parametrize("names, found", [
    (["shelf", "shelves"], "shelf"), (["shelves", "shelf"], "shelf"), (["shelves"], "shelves")])
def test_bank_that_holds_a_plural(names, found):
    """The lemma decides, whatever the order of the bank; a name that is itself a plural is found by
    the words of the text, if the lemma is not in the bank."""
    doc = parsed("the shelves", [1, 1], "det ROOT", "DET NOUN", "the shelf")
    assert named("the shelves", ConceptBank(names), ByHand(doc)) == [(found, "shelves")]


def test_pipeline_that_finds_nothing():
    """A pipeline that neither parses nor matches is refused, with an example of one that works."""
    with pytest.raises(ValueError, match="no dependency parser; expected one like en_core_web_sm"):
        list(annotate(["a dog"], ConceptBank(["dog"]), spacy.blank("en")))


def test_processes():
    """Two parser processes give the concepts of one, in the same order, also of more captions than
    a process gets at a time. They leave the random numbers of the run alone."""
    captions = ["a dog", "two cats", "", "a cat and a dog"]
    captions += [f"{'so ' * (i % 7)}{captions[i % 4]}" for i in range(2500)]
    before = torch.get_rng_state()
    one, two = (lists(Concepts(BANK, "match", processes).of_captions(captions))
                for processes in (1, 2))
    assert one[:4] == [[(0, 2, 3)], [(1, 2, 3)], [], [(1, 2, 3), (0, 5, 6)]]
    assert one == list(annotate(captions, BANK, "match")) == two
    assert torch.equal(torch.get_rng_state(), before)


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


def test_a_language_without_noun_phrases():
    """A pipeline whose language has no noun chunks in spaCy is refused in one line."""
    doc = Doc(spacy.blank("pl").vocab, words=["dog"], spaces=[False], heads=[0], deps=["ROOT"],
              pos=["NOUN"])
    with pytest.raises(ValueError, match="no noun phrases in the language 'pl'"):
        named("dog", BANK, ByHand(doc))


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


def test_bank_from_file(tmp_path):
    """A bank file has one concept per line, synonyms after commas; blank lines and a byte order
    mark do not count."""
    (tmp_path / "bank.txt").write_text("dog, puppy\n\n  cat\n", encoding="utf-8-sig")
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
    """A bank is named by a file, or by the name of one in classes/; the default has none. A class
    file removes its names from it, with their synonyms."""
    (tmp_path / "bank.txt").write_text("dog, puppy\nsofa\n")
    (tmp_path / "gone.txt").write_text("cat, puppy\n")
    assert ConceptBank.by_name(tmp_path / "bank.txt").names == ["dog", "sofa"]
    assert ConceptBank.by_name(tmp_path / "bank.txt", tmp_path / "gone.txt").names == ["sofa"]
    assert ConceptBank.by_name().ids == ConceptBank.default().ids
    entities = ConceptBank.from_file(CLASSES / "entities-ovsegmentor.txt")
    assert ConceptBank.by_name("entities-ovsegmentor").ids == entities.ids
    voc20 = {name for synonyms in read_classes(CLASSES / "voc20.txt") for name in synonyms}
    left = ConceptBank.by_name(None, "voc20")
    assert set(ConceptBank.default().names) - set(left.names) == voc20
    with pytest.raises(ValueError, match="concept bank: no class names found"):
        ConceptBank.by_name("voc", "voc")
    with pytest.raises(FileNotFoundError, match="no concept bank 'none'; expected ade20k, .* or a "
                                                "file with one per line"):
        ConceptBank.by_name("none")


@pytest.mark.parametrize("content, message", [
    (b"", "no class names found, expected at least one"), (b"\n \n", "no class names found"),
    (b"dog\ncat,\n", "an empty class name"), (b"dog\ncat\nDOG\n", "duplicate class name 'dog'"),
    (b"caf\xe9\n", ""), (b"7: road\nsky\n", "some lines begin with a label"),
    (b"cat; dog\n", "expected names with commas"), (b"a\n" * 2 ** 24, "has 33,554,432 bytes")])
def test_bad_class_file(tmp_path, content, message):
    """The error for a class file without usable names names the file and what is wrong with it."""
    (tmp_path / "bank.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"bank.txt.*{message}"):
        read_classes(tmp_path / "bank.txt")


@pytest.mark.parametrize("content, classes, ids", [
    ("7: road, street\n8: sky\n", [["road", "street"], ["sky"]], ["road", "street", "sky"]),
    ("potted_plant\n sea_lion ,seal\n", [["potted plant"], ["sea lion", "seal"]],
     ["potted plant", "sea lion", "seal"]),
    ("dog_(animal)\nmouse (computer)\n", [["dog (animal)"], ["mouse (computer)"]],
     ["dog", "mouse"]),
    ("do\u200bg\ufeff\n", [["dog"]], ["dog"])])
def test_a_names_file_means_one_thing_everywhere(tmp_path, capsys, content, classes, ids):
    """--classes, --names, --bank and --exclude-classes read the same names: without labels, "_" a
    space, nothing that cannot be seen. A bank leaves notes in parentheses out."""
    path = tmp_path / "names.txt"
    path.write_text(content)
    assert read_classes(path) == name_classes(str(path)) == read_labels(path)[1] == classes
    assert list(ConceptBank.by_name(path).ids) == ids
    assert ConceptBank([*ids, "cow"], class_names(path)).names == ["cow"]
    assert capsys.readouterr().err == ""
    ConceptBank(["cow"], class_names(path))
    assert (f"{len(ids)} of the {len(ids)} names to exclude are not in it, such as '{ids[0]}'"
            in capsys.readouterr().err)


@pytest.mark.parametrize("text, kind, words", [
    ("cat; dog", ValueError, "'cat; dog' has semicolons; expected names with commas between"),
    ("missing.csv", FileNotFoundError, "no class file missing.csv"),
    ("missing.txt", FileNotFoundError, "no class file missing.txt"),
    ("lists/missing", FileNotFoundError, "no class file lists/missing"),
    ("7: road", ValueError, "--classes '7: road' has a colon")])
def test_classes_that_are_a_mistake(tmp_path, monkeypatch, text, kind, words):
    """--classes that looks like a file and is none, or that has other signs between names, is
    refused."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=words):
        name_classes(text)


def test_classes_that_only_look_like_a_mistake():
    """Names with dots, slashes and parentheses are names."""
    text = "St. Bernard, car/truck, dog_(animal), No.1"
    assert name_classes(text) == [["St. Bernard"], ["car/truck"], ["dog (animal)"], ["No.1"]]


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
    ("c.jsonl", JSONL + '{"image": "c.jpg", "caption": ""}'),
    ("c.jsonl", JSONL + '{"image": "c.jpg", "caption": null}'),
    ("c.tsv", TSV.replace("\n", "\r")), ("c.tsv", TSV.replace("a dog", '"a dog"')),
    ("c.tsv", "filepath\ttitle\n" + TSV.replace("b.jpg", '"b.jpg"'))])
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


@pytest.mark.parametrize("rows, captions", [
    ('a\t"a ""big"" dog"\nb\t"two\nlines"\n', ['a "big" dog', "two\nlines"]),      # as pandas
    ('a\t"a tab\tin it"\nb\tcat\n', ["a tab\tin it", "cat"]),
    ('a\t"Nice" dog\nb\tcat\n', ['"Nice" dog', "cat"]),                            # plain quotes
    ('a\t"Nice dog\nb\tcat\nc\tthe "end"\n', ['"Nice dog', "cat", 'the "end"']),
    ('a\t"Nice dog\nb\tcat\nc\tend"\n', ['"Nice dog', "cat", 'end"']),
    ("a\ta dog\rhere\nb\tcat\n", ["a dog here", "cat"]),                          # a lone CR
    ("a\ta dog\there\nb\tcat\n", ["a dog here", "cat"]),                          # a tab
    ("a\ta dog\there\tx\nb\tcat\tx\n", ["a dog here", "cat"]),                   # more columns
    ("a\t" + "dog " * 250_000 + "\nb\tcat\n", ["cat"])])
def test_tsv_as_tools_write_it(tmp_path, rows, captions):
    """Quotes, line breaks and tabs are read as open_clip's tools write them; quotes that are part
    of a caption, carriage returns and tabs without quotes break no row."""
    (tmp_path / "c.tsv").write_bytes(rows.encode())
    assert [caption for _, caption in read_captions(tmp_path / "c.tsv")] == captions


def test_captions_of_no_use_are_counted(tmp_path, capsys):
    """Null, empty, endless and half captions, and those of images that are not listed, are left out
    and counted by their reason."""
    annotations = [{"image_id": 3, "caption": caption}
                   for caption in (None, " ", "d" * 10 ** 6, "\ud83d", "a dog")]
    annotations.append({"image_id": 5, "caption": "a cat"})
    content = {"images": COCO["images"], "annotations": annotations}
    (tmp_path / "c.json").write_text(json.dumps(content))
    assert read_captions(tmp_path / "c.json") == [("a.jpg", "a dog")]
    assert capsys.readouterr().err == (
        f"{tmp_path}/c.json: captions left out: no image 1, empty caption 2, long caption 1, "
        "caption not UTF-8 1\n")


@pytest.mark.parametrize("name, content, found", [
    ("c.txt", TSV, r"its name must end in \.json \(COCO\), \.jsonl or \.tsv"),
    ("c.json", "", "Expecting value"), ("c.json", json.dumps(COCO)[:-1], "JSONDecodeError"),
    ("c.json", "[]", "TypeError"), ("c.json", "null", "TypeError"),
    ("c.json", '{"images": {}}', "KeyError: 'annotations'"),
    ("c.json", '{"images": [], "annotations": 3}', "TypeError"),
    ("c.json", "[" * 100_000, "RecursionError"),
    ("c.json", '{"images": [{"id": 5, "file_name": "a"}], '
               '"annotations": [{"image_id": 5, "caption": 1}]}', "no text"),
    ("c.jsonl", '{"image": "a.jpg"}', "KeyError: 'caption'"),
    ("c.jsonl", '{"image": 1, "caption": "a dog"}', "that is no text"),
    ("c.jsonl", "{", "JSONDecodeError"),
    ("c.tsv", "a.jpg\ta dog\nb.jpg a cat\n", "in the row 'b.jpg a cat'"),
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
    ("c.jsonl", ""), ("c.json", '{"images": [], "annotations": []}'),
    ("c.json", '{"images": [], "annotations": [{"image_id": 5, "caption": "a dog"}]}')])
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
                 "data/coco/train2017/*.jpg", "https://cocodataset.org", "--recipe toy"):
        assert part in str(error.value)


# --------------------------------------------------------------------------------------------------
# The cache beside the captions file

CAPTIONS = ["a dog and a cat", "nothing", "two cats", "a hot dog"]
ANNOTATED = [[(0, 2, 3), (1, 5, 6)], [], [(1, 2, 3)], [(0, 3, 4)]]
TAMPERED = [[(1, 8, 9)], [], [], []]


def found_in(path, names=("dog", "cat"), parser="match"):
    """The concepts of a captions file, in the form of `annotate`."""
    return lists(Concepts(ConceptBank(names), parser).of_file(path, CAPTIONS))


def tamper(path, **arrays):
    """Replace arrays of a captions file's cache. The others, such as its key, stay."""
    with np.load(f"{path}.concepts.npz") as file:
        kept = dict(file)
    np.savez(f"{path}.concepts.npz", **{**kept, **arrays})


def assert_made_anew(path, names=("dog", "cat")):
    """The cache is not used but replaced: it is made, and then used."""
    assert found_in(path, names) == list(annotate(CAPTIONS, ConceptBank(names), "match"))
    tamper(path, offsets=[0, 1, 1, 1, 1], rows=[[1, 8, 9]])
    assert found_in(path, names) == TAMPERED


@pytest.fixture
def cached(tmp_path):
    """A captions file whose cache was made and then changed to TAMPERED."""
    path = tmp_path / "c.tsv"
    path.write_text("".join(f"{i}.jpg\t{caption}\n" for i, caption in enumerate(CAPTIONS)))
    assert found_in(path) == ANNOTATED == list(annotate(CAPTIONS, BANK, "match"))
    tamper(path, offsets=[0, 1, 1, 1, 1], rows=[[1, 8, 9]])
    return path


def test_cache_is_reused(cached, capsys):
    """Nothing is parsed again while file, bank and parser are the same: the changed values in the
    cache are used. It is the only new file."""
    assert found_in(cached) == TAMPERED
    assert sorted(path.name for path in cached.parent.iterdir()) == ["c.tsv", "c.tsv.concepts.npz"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("names", [
    ["cat", "dog"], ["dog", "cat", "hot dog"], ["dog", ["cat", "kitten"]]])
def test_cache_of_another_bank(cached, names):
    """Another order, name or synonym of the bank makes the cache anew."""
    assert_made_anew(cached, names)


def test_cache_of_another_parser(cached, tmp_path):
    """So does another parser, here one in a folder that knows only cats."""
    assert found_in(cached, parser=parser_of_cats(tmp_path / "cats")) == [[(1, 5, 6)], [], [], []]


@pytest.mark.parametrize("change", [
    lambda path: path.write_text(path.read_text() + "\n"), lambda path: os.utime(path, (1, 1))],
    ids=["size", "time"])
def test_cache_of_another_file(cached, change):
    """So does a file of another size or time."""
    change(cached)
    assert_made_anew(cached)


def overwrite(position, value):
    def change(content):
        place = content.index(b"PK\x01\x02") + position                 # in the archive's directory
        return content[:place] + bytes([value]) + content[place + 1:]
    return change


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: b"no archive",
    lambda content: content[:len(content) // 2], lambda content: content[:-30],
    lambda content: content.replace(b"offsets", b"offsetz"),
    lambda content: content.replace(b"NUMPY", b"NUMPX"),
    overwrite(10, 99), overwrite(8, 64)],
    ids=["empty", "text", "half", "almost whole", "name", "magic", "unknown compression",
         "encrypted"])
def test_broken_cache(cached, damage):
    """A cache that cannot be read for any reason is made anew."""
    cache = Path(f"{cached}.concepts.npz")
    cache.write_bytes(damage(cache.read_bytes()))
    assert_made_anew(cached)


class Writing:
    """What writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_cache_without_pickle(cached, tmp_path):
    """A cache that holds pickled objects is not opened but made anew."""
    tamper(cached, rows=np.array([Writing(tmp_path / "written")], object))
    assert_made_anew(cached)
    assert not (tmp_path / "written").exists()


def test_cache_that_cannot_be_written(tmp_path, capsys):
    """Where no cache can be written the concepts are still found, one line says why, and no
    unfinished file is left."""
    path = tmp_path / "c.tsv"
    path.write_text(TSV)
    Path(f"{path}.concepts.npz").mkdir()
    assert found_in(path) == ANNOTATED
    assert f"the concepts were not cached: {path}.concepts.npz could not" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 2


def test_only_some_captions():
    """Of the captions that are left concepts and tokens stay their own."""
    found = Annotations.of_lists(zip(ANNOTATED, map(token_ids, CAPTIONS)))
    found = found.only(np.array([True, False, False, True]))
    assert lists(found) == [ANNOTATED[0], ANNOTATED[3]]
    for i, caption in enumerate((CAPTIONS[0], CAPTIONS[3])):
        assert torch.equal(found.tokens_of(i), tokenize(caption))


@pytest.mark.parametrize("caption", ["a dog", "\u200b", "a dog <end_of_text> \U0001f436",
                                     "cow " * 75, "cow " * 300])
def test_stored_tokens_are_the_captions(caption):
    """Tokens are kept as they are, also of captions without words, and of those that are cut."""
    found = Annotations.of_lists([([], []), ([], token_ids(caption)), ([], [])])
    assert torch.equal(found.tokens_of(1), tokenize(caption))
    assert found.tokens_of(0).sum() == found.tokens_of(2).sum() == 0


def test_partners_share_a_concept():
    """A partner is a caption with one of the caption's concepts, and every occurrence of such a
    concept can be drawn, also after captions without any; a caption without concepts has none."""
    found = [[], [(4, 1, 2), (7, 3, 4)], [], [], [(7, 1, 2)], [(2, 1, 2)],
             [(4, 2, 3), (4, 5, 6)], []]
    annotations = Annotations.of_lists([(rows, []) for rows in found])
    rng = np.random.default_rng(0)
    for i, rows in enumerate(found):
        drawn = {annotations.partner(i, rng) for _ in range(200)}
        own = {concept for concept, _, _ in rows}
        expected = {(j, concept) for j, others in enumerate(found) for concept, _, _ in others
                    if concept in own}
        assert drawn == (expected or {None})


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


@pytest.mark.parametrize("options, known", [
    ([], (21, 3)), (["--exclude-classes", "voc20"], (1, 0)), (["--bank", "voc20"], (20, 3))])
def test_command_counts_the_benchmarks_names(tmp_path, capsys, options, known):
    """The command says how many of a benchmark's class names the bank holds and how many the
    captions name."""
    (tmp_path / "c.tsv").write_text("1.jpg\ttwo dogs and a cat near a skyscraper\n"
                                    "2.jpg\ta dog on a sofa\n")
    main([str(tmp_path / "c.tsv"), "--parser", "match", *options])
    printed = capsys.readouterr().out.splitlines()[-len(BENCHMARK_NAMES):]
    assert printed[0].split() == ["21", *map(str, known), "voc"]


def parser_of_words(folder):
    """A spaCy pipeline in a folder that takes "a WORD" for a noun chunk."""
    pipeline = spacy.blank("en")
    ruler = pipeline.add_pipe("attribute_ruler")
    ruler.add([[{"LOWER": "a"}]], {"POS": "DET", "DEP": "det"})
    ruler.add([[{"LOWER": {"NOT_IN": ["a"]}}]], {"POS": "NOUN", "DEP": "ROOT"})
    pipeline.to_disk(folder)
    return str(folder)


def test_all_nouns_are_a_bank(tmp_path, capsys):
    """--all-nouns prints what all noun chunks name, the most frequent first, and nothing else: a
    bank with which every noun chunk has a concept. It leaves no cache."""
    parser = parser_of_words(tmp_path / "words")
    captions = ["a dog", "a cat a dog", "a Dog a 3,500", "a - a cow a dog a cat"]
    path = tmp_path / "c.tsv"
    path.write_text("".join(f"{i}.jpg\t{caption}\n" for i, caption in enumerate(captions)))
    main([str(path), "--parser", parser, "--all-nouns"])
    printed = capsys.readouterr().out
    assert printed.splitlines() == ["dog", "cat", "cow"] and not list(tmp_path.glob("*.npz"))
    (tmp_path / "bank.txt").write_text(printed)
    main([str(path), "--parser", parser, "--bank", str(tmp_path / "bank.txt")])
    assert "100.0% have a concept, 1.75 per caption; bank of 3" in capsys.readouterr().out


@needs_pipeline
def test_all_nouns_of_real_captions(tmp_path, capsys):
    """A trained pipeline's noun phrases, compounds and plurals included."""
    (tmp_path / "c.tsv").write_text("1.jpg\tTwo baseball bats on a table\n2.jpg\tThe table\n")
    main([str(tmp_path / "c.tsv"), "--parser", str(PIPELINE), "--all-nouns"])
    assert capsys.readouterr().out.splitlines() == ["table", "baseball bat"]


@pytest.mark.parametrize("arguments, message", [
    (["gone.json", "--parser", "match"], "no captions file gone.json"),
    (["c.txt", "--parser", "match"], "c.txt is no captions file"),
    (["empty.tsv", "--parser", "match"], "empty.tsv holds no captions"),
    (["c.tsv", "--parser", "match", "--bank", "gone.txt"], "no concept bank 'gone.txt'"),
    (["c.tsv", "--parser", "match", "--exclude-classes", "gone"], "no class file 'gone'"),
    (["c.tsv", "--parser", "match", "--all-nouns"], "name a spaCy pipeline with --parser"),
    (["c.tsv", "--parser", "match", "--bank", "empty.tsv"], "empty.tsv: no class names found"),
    (["c.tsv", "--parser", "no_such_parser"], "python -m spacy download")])
def test_command_errors(tmp_path, monkeypatch, fails, arguments, message):
    """A user's mistake ends the command with one line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.tsv").write_text(TSV, encoding="utf-8")
    (tmp_path / "c.txt").write_text(TSV, encoding="utf-8")
    (tmp_path / "empty.tsv").write_text("\n")
    fails(main, arguments, message)


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(),
                    reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_parser_on_a_gpu_that_is_not_there(device, tmp_path, fails):
    """Asked for a GPU that spaCy cannot use, the command says so in one line and does not go on."""
    (tmp_path / "c.tsv").write_text("1.jpg\ta dog\n")
    fails(main, [tmp_path / "c.tsv", "--device", device], "GPU")
    assert not (tmp_path / "c.tsv.concepts.npz").exists()
