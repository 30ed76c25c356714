"""From captions to concepts: the linguistic part of SimZSS (docs/method.md, section 5).

    python concepts.py captions_train2017.json          # noun phrases -> concepts, cached beside it
    python concepts.py "shards/{00000..00295}.tar"      # the same for tars
    python concepts.py captions_train2017.json --all-nouns > bank.txt      # a bank of its own words

A caption is cleaned as the tokenizer cleans it and parsed by spaCy. Each noun chunk gives one
concept: its root's lemma with the compound before it ("two wooden baseball bats" -> "baseball
bat"). It is kept if it is in the concept bank, with the positions of its byte-pair tokens. The
command prints captions per second, the part of the captions that have a concept, the most frequent
concepts, and how many class names of the benchmarks are in the bank and in the captions.
"""
import hashlib
import json
import os
import re
import sys
import time
from collections import Counter
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from machinery.errors import CommandLine, one_line_errors
from machinery.names import (BENCHMARK_NAMES, CLASSES, check_classes, merge_equal_names, named_file,
                             normalise_name, plural, read_classes, read_labels)
from machinery.parallel import progress
from machinery.tokenizer import CONTEXT_LENGTH, clean, forget_words, token_ids, tokenizer
from machinery.training.captions import (Annotations, read_annotations, read_captions,
                                         save_annotations)
from machinery.training.shards import bad_line, captions_of_tar, count_bad, find_tars, is_tars
from machinery.training.workers import start_data_worker

DEFAULT_PARSER = "en_core_web_trf"                  # the paper's; en_core_web_sm is the light one
CACHE_VERSION = 5                                   # raise it when annotations change
PIECE = 1000                                        # captions that a process parses at a time


# --------------------------------------------------------------------------------------------------
# From captions to concepts

def noun_concepts(doc):
    """Concepts of a parsed caption: [(concept, start_char, end_char)], one per noun chunk.

    "two wooden baseball bats" -> [("baseball bat", 11, 24)]. A concept is the root's lemma, with
    the root's last `compound` child before it if there is one; adjectives and articles are dropped.
    Its characters run from the compound to the end of the root. doc: a spaCy `Doc` with heads and
    dependencies.
    """
    concepts = []
    for chunk in doc.noun_chunks:
        root = chunk.root
        compounds = [child for child in root.lefts if child.dep_ == "compound"]
        compound = compounds[-1:]                   # the last one, or none
        words = [word.lower_ for word in compound] + [(root.lemma_ or root.text).lower()]
        first = (compound or [root])[0]
        concepts.append((" ".join(words), first.idx, root.idx + len(root)))
    return concepts


def parse(captions, pipeline):
    """Find the concepts of captions and the tokens that name them, whether in a bank or not.

    captions: iterable of str.
    pipeline: of spaCy, one that parses ("DEP"), or the built-in matcher, which marks entities
        ("ENT_IOB").
    Yields, caption by caption, [(concept, words as written, first token, end token)]; positions
    count the start-of-text token as 0, and the end token is not included. An occurrence that does
    not fit whole into the context is left out.
    """
    cleaned = ((clean(caption), caption) for caption in captions)
    for doc, caption in pipeline.pipe(cleaned, as_tuples=True):
        if doc.has_annotation("DEP"):
            try:
                concepts = noun_concepts(doc)
            except NotImplementedError:
                raise ValueError(f"spaCy finds no noun phrases in the language {doc.lang_!r} of "
                                 "the pipeline; expected one like en_core_web_sm") from None
        elif doc.has_annotation("ENT_IOB"):
            concepts = [(found.ent_id_, found.start_char, found.end_char) for found in doc.ents]
        else:
            raise ValueError("the spaCy pipeline has no dependency parser; expected one like "
                             "en_core_web_sm")
        tokens = token_spans(caption) if concepts else ()
        found = []
        for concept, start, end in concepts:
            positions = [i for i, (s, e) in enumerate(tokens, start=1) if s < end and e > start]
            if positions and positions[-1] < CONTEXT_LENGTH - 1:
                found.append((concept, doc.text[start:end], positions[0], positions[-1] + 1))
        yield found


def annotate(captions, bank, parser):
    """Find the bank's concepts in captions and the tokens that name them.

    captions: iterable of str. bank: ConceptBank. parser: spaCy pipeline, or name for `load_parser`.
    Yields, caption by caption, [(bank id, first token, end token)], see `parse`.
    """
    pipeline = load_parser(parser, bank) if isinstance(parser, str) else parser
    for concepts in parse(captions, pipeline):
        rows = []
        for concept, as_written, first, end in concepts:
            id = bank.find(concept)
            if id < 0:                              # a bank may hold a plural: "clouds"
                id = bank.find(as_written)
            if id >= 0:
                rows.append((id, first, end))
        yield rows


def token_spans(text):
    """Characters of each byte-pair token of a caption, in `clean(text)`: [(start, end)].

    "a surfboarder" -> [(0, 1), (2, 6), (6, 13)]. One span per token, without start and end tokens
    and without truncation. Tokens that share a character, as the bytes of an emoji do, have
    overlapping spans.
    """
    spans = []
    for match in tokenizer().pat.finditer(clean(text)):
        word = match.group()
        character = [match.start() + i for i, letter in enumerate(word)
                     for _ in letter.encode()]                              # byte -> character
        letters = "".join(tokenizer().byte_encoder[byte] for byte in word.encode())
        first = 0                                                           # in bytes
        for token in tokenizer().bpe(letters).split(" "):
            last = first + len(token.removesuffix("</w>")) - 1
            spans.append((character[first], character[last] + 1))
            first = last + 1
    return spans


# --------------------------------------------------------------------------------------------------
# The bank

class ConceptBank:
    """The concepts that training knows: C names, each perhaps with synonyms of the same concept.

    names: strings, or lists of synonyms; equal names count once.
    excluded: names that stay out, with their plurals and all synonyms that the bank has for them.
        Those that the bank does not have are counted in one line.
    source: of the names, for errors.
    A note in a name, as in "bat (animal)", is left out: no caption has it.
    `names[i]` is concept i's first name, `ids` has the id of every name. Raises ValueError where a
    name is empty or none is left.
    """

    def __init__(self, names, excluded=(), source="concept bank"):
        lists = [[name] if isinstance(name, str) else list(name) for name in names]
        lists = [list(map(without_note, synonyms)) for synonyms in lists]
        lists = [list(map(normalise_name, synonyms))
                 for synonyms in check_classes(merge_equal_names(lists), source)]
        excluded = [normalise_name(without_note(name)) for name in excluded]
        known = {form for synonyms in lists for name in synonyms for form in (name, plural(name))}
        unknown = [name for name in excluded if known.isdisjoint((name, plural(name)))]
        if unknown:
            print(f"concept bank: {len(unknown)} of the {len(excluded)} names to exclude are not "
                  f"in it, such as {unknown[0]!r}", file=sys.stderr)
        excluded = {form for name in excluded for form in (name, plural(name))}
        lists = [synonyms for synonyms in lists
                 if excluded.isdisjoint([*synonyms, *map(plural, synonyms)])]
        check_classes(lists, "concept bank")        # all of them may be excluded
        self.names = [synonyms[0] for synonyms in lists]
        self.ids = {name: i for i, synonyms in enumerate(lists) for name in synonyms}

    @classmethod
    def from_file(cls, path, excluded=()):
        """A class file: one concept per line, synonyms after commas."""
        return cls(read_labels(path)[1], excluded, path)

    @classmethod
    def default(cls, excluded=()):
        """The union of the eight benchmarks' class names, as in the paper."""
        names = [normalise_name(name) for benchmark in BENCHMARK_NAMES
                 for name in class_names(CLASSES / f"{benchmark}.txt")]
        return cls(dict.fromkeys(names), excluded)

    @classmethod
    def by_name(cls, source=None, exclude=None):
        """What --bank and --exclude-classes name: files, or the names of those in classes/. source:
        None = the default bank."""
        excluded = class_names(named_file(exclude, CLASSES, "class file")) if exclude else ()
        if source is None:
            return cls.default(excluded)
        return cls.from_file(named_file(source, CLASSES, "concept bank"), excluded)

    def __len__(self):
        return len(self.names)

    def find(self, name):
        """Bank id of a name, -1 if it is not in the bank."""
        return self.ids.get(normalise_name(name), -1)


def without_note(name):
    """"bat (animal)" -> "bat"."""
    return re.sub(r"\s*\(.*?\)", "", name)


def class_names(path):
    """All names of a class file, synonyms included."""
    return [name for synonyms in read_classes(path) for name in synonyms]


# --------------------------------------------------------------------------------------------------
# Parsers

def load_parser(name, bank):
    """spaCy pipeline by name or folder; "match" = one that finds the bank's names and plurals.

    Raises FileNotFoundError with the install command when the pipeline is not there.
    """
    import spacy                                    # slow to import, and only captions need it
    if name == "match":
        pipeline = spacy.blank("en")
        ruler = pipeline.add_pipe("entity_ruler")   # prefers the longest match
        names = {plural(name): name for name in bank.ids} | {name: name for name in bank.ids}
        names |= {form.replace(" ", "-"): name for form, name in names.items()}
        ruler.add_patterns([{"label": "CONCEPT", "pattern": form, "id": name}
                            for form, name in names.items()])
        return pipeline
    try:
        return spacy.load(name, exclude=["ner"])
    except OSError as error:
        raise FileNotFoundError(
            f"the parser {name!r} could not be loaded ({str(error).splitlines()[0]}). Install one "
            "with 'python -m spacy download en_core_web_trf' or '... en_core_web_sm', name it or a "
            "folder with --parser, or use the built-in --parser match.") from None


# --------------------------------------------------------------------------------------------------
# The concepts of a source

class Concepts:
    """Finds the concepts of a source's captions, and keeps them in SOURCE.concepts.npz beside it.

    bank: `ConceptBank`.
    parser: name for `load_parser`.
    processes: that parse, each with a pipeline of its own.
    device: where they do: "cpu", "cuda", "mps", or "auto", which takes a GPU if spaCy can use one.
    """

    def __init__(self, bank, parser, processes=1, device="cpu"):
        self.bank = bank
        self.parser = parser
        self.processes = processes
        self.device = device
        self.on_gpu = False

    @cached_property
    def pipeline(self):
        if self.device != "cpu" and self.parser != "match":
            import spacy
            use_gpu = spacy.prefer_gpu if self.device == "auto" else spacy.require_gpu
            self.on_gpu = use_gpu()
        return load_parser(self.parser, self.bank)

    def __getstate__(self):                         # a new process loads a pipeline of its own
        return {name: value for name, value in vars(self).items() if name != "pipeline"}

    @cached_property
    def version(self):
        """Hash of bank and parser."""
        content = [CACHE_VERSION, sorted(self.bank.ids.items()), self.pipeline.meta]
        return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()

    def key(self, source):
        """What the cache of a file was made of: bank, parser, and the file's size and time."""
        status = Path(source).stat()
        return f"{self.version} {status.st_size} {status.st_mtime_ns}"

    def in_captions(self, captions):
        """Rows of (bank id, first token, end token) of each caption, see `annotate`."""
        return self.without_memory(annotate(captions, self.bank, self.pipeline))

    def with_tokens(self, captions):
        """(rows of `in_captions`, token ids) of each caption."""
        return list(zip(self.in_captions(captions), map(token_ids, captions)))

    def nouns(self, piece):
        """Counter of what every noun chunk of a piece names, in a bank or not. piece: captions, or
        the path of a tar."""
        if not isinstance(piece, list):
            piece = [caption for caption in captions_of_tar(piece) if isinstance(caption, str)]
        found = self.without_memory(parse(piece, self.pipeline))
        return Counter(normalise_name(concept) for one in found for concept, *_ in one)

    def without_memory(self, found):
        """List of what a parser finds. It forgets new words afterwards: memory does not grow."""
        with self.pipeline.memory_zone():
            found = list(found)
        forget_words()
        return found

    def of_captions(self, captions):
        """`Annotations` of captions in memory."""
        pieces = in_pieces(captions)
        found = progress(self.in_processes(self.with_tokens, pieces), desc="concepts",
                         total=len(pieces), unit=f" x {PIECE} captions")
        return Annotations.of_lists([one for piece in found for one in piece])

    def of_file(self, path, captions):
        """`Annotations` of the captions of a file, from its cache if that is valid."""
        key = self.key(path)
        cached = read_annotations(path, key)
        if cached:
            return cached[0]
        start = time.time()
        annotations = self.of_captions(captions)
        print_speed(len(captions), time.time() - start)
        try:
            save_annotations(path, key, annotations, count_bad([]))
        except OSError as error:
            print(f"the concepts were not cached: {error}", file=sys.stderr)
        return annotations

    def of_tar(self, path):
        """(`Annotations`, bad samples by reason) from the cache of a tar, None without one. Samples
        without a caption, and what was cut off, have annotations, too: no rows."""
        try:
            return read_annotations(path, self.key(path))
        except OSError:                             # the tar is gone
            return None

    def cache_tar(self, path):
        """Write the cache of a tar if there is no valid one. Returns (`Annotations`, bad samples by
        reason, how many captions were parsed)."""
        found = self.of_tar(path)
        if found:
            return *found, 0
        key = self.key(path)
        captions = list(captions_of_tar(path))
        usable = [caption for caption in captions if isinstance(caption, str)]
        found = iter(self.with_tokens(usable))
        annotations = Annotations.of_lists([next(found) if isinstance(caption, str) else ([], [])
                                            for caption in captions])
        bad = count_bad([caption for caption in captions if not isinstance(caption, str)])
        save_annotations(path, key, annotations, bad)
        return annotations, bad, len(usable)

    def check_tars(self, paths, source):
        """Raise FileNotFoundError if tars have no concepts yet. The built-in matcher needs none: it
        is quick enough to look for them in training."""
        without = [path for path in paths if self.parser != "match" and self.of_tar(path) is None]
        if without:
            raise FileNotFoundError(
                f"{len(without):,} of the {len(paths):,} tars have no concepts yet, or those of "
                f"another bank, parser or state of the tar; the first is {without[0]}. Run: "
                f'python concepts.py "{source}" --parser {self.parser} (and --bank, if training '
                "has one), or train with --parser match")

    def in_processes(self, function, pieces):
        """Results of a function for each piece, in order. Raises ChildProcessError if a process
        dies."""
        self.pipeline                               # if it cannot be loaded: one error, now
        processes = min(self.processes, len(pieces))
        loader = DataLoader(pieces, batch_size=None, collate_fn=function,   # called in the workers
                            num_workers=processes if processes > 1 else 0,
                            worker_init_fn=start_data_worker,
                            multiprocessing_context="spawn" if self.on_gpu else None,
                            generator=torch.Generator())    # not the one of training
        try:
            yield from loader
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ChildProcessError("a parser process died, perhaps because memory was full; run "
                                    "the command again, with fewer --processes. Finished tars are "
                                    "kept") from None


def in_pieces(captions):
    """Captions in lists of PIECE."""
    return [captions[i:i + PIECE] for i in range(0, len(captions), PIECE)]


def print_speed(captions, seconds):
    print(f"annotated {captions:,} captions in {seconds:.1f} s "
          f"({captions / seconds:,.0f} captions/s)")


# --------------------------------------------------------------------------------------------------
# The command

def parse_args(argv=None):
    parser = CommandLine(description="Find the concepts of captions and cache them "
                                                 "beside their source.")
    add = parser.add_argument
    add("source", help="COCO captions JSON, TSV / JSONL of (image, caption), or tars: a folder, or "
                       'a range such as "shards/{00000..00295}.tar"; finished ones are skipped')
    add("--parser", default=DEFAULT_PARSER,
        help="spaCy pipeline (name or folder), or 'match', the built-in matcher "
             "(default: %(default)s)")
    add("--bank", metavar="NAME",
        help="concept bank: a file with one name per line, synonyms after commas, or the name of "
             "one in classes/ (default: the eight benchmarks' classes)")
    add("--exclude-classes", metavar="NAME",
        help="class file; its names and synonyms are no concepts")
    add("--all-nouns", action="store_true",
        help="print what all noun phrases name, the most frequent first, one a line: a bank")
    add("--processes", type=int,
        help="parser processes (default: 1 for a captions file, one per core for tars)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="where the parser runs; cuda needs spaCy's cupy extra (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors("pass --device cpu"):
        bank = ConceptBank.by_name(args.bank, args.exclude_classes)
        tars = find_tars(args.source) if is_tars(args.source) else None
        concepts = Concepts(bank, args.parser, device=args.device,
                            processes=args.processes or (os.cpu_count() if tars else 1))
        captions = None if tars else [caption for _, caption in read_captions(args.source)]
        if args.all_nouns:
            print_nouns(tars or in_pieces(captions), concepts)
        elif tars:
            print_concepts(cache_tars(tars, concepts), bank)
        else:
            print_concepts([(concepts.of_file(args.source, captions), count_bad([]))], bank)


def cache_tars(paths, concepts):
    """Write the caches of all tars. Yields (`Annotations`, bad samples by reason) of each."""
    captions = 0
    new = 0
    bad = count_bad([])
    start = time.time()
    for annotations, bad_here, parsed in progress(
            concepts.in_processes(concepts.cache_tar, paths), desc="concepts", total=len(paths),
            unit=" tars"):
        yield annotations, bad_here
        captions += len(annotations) - bad_here.sum()
        new += parsed
        bad += bad_here
    if new:
        print_speed(new, time.time() - start)
    print(f"{len(paths):,} tars; skipped samples: {bad_line(bad)}")
    if not captions:
        raise ValueError(f"no captions in {paths[0]} and the other tars; expected a .txt or .json "
                         "beside every image")


def print_concepts(found, bank):
    """found: (`Annotations`, bad samples by reason) of each part of the source."""
    captions = 0
    with_concept = 0
    occurrences = np.zeros(len(bank), np.int64)
    for annotations, bad in found:
        captions += len(annotations) - bad.sum()    # bad samples have annotations, too: no rows
        with_concept += (np.diff(annotations.offsets) > 0).sum()
        occurrences += np.bincount(annotations.rows[:, 0], minlength=len(bank))
    print(f"{captions:,} captions; {with_concept / captions:.1%} have a concept, "
          f"{occurrences.sum() / captions:.2f} per caption; bank of {len(bank)}")
    for id in np.argsort(-occurrences, kind="stable")[:20]:
        if occurrences[id]:
            print(f"{occurrences[id]:8,}  {bank.names[id]}")
    print("class names of the benchmarks: all, in the bank, found at least once in these captions")
    for benchmark in BENCHMARK_NAMES:
        classes = read_classes(CLASSES / f"{benchmark}.txt")
        ids = [bank.find(name) for names in classes for name in names]
        known = [id for id in ids if id >= 0]
        there = len({id for id in known if occurrences[id]})
        print(f"{len(ids):8} {len(known):5} {there:5}  {benchmark}")


def print_nouns(pieces, concepts):
    """The concepts of all noun phrases, in the form of a bank. pieces: see `Concepts.nouns`."""
    if concepts.parser == "match":
        raise ValueError("--all-nouns: the built-in matcher looks for the names of a bank; name a "
                         "spaCy pipeline with --parser")
    total = Counter()
    for found in progress(concepts.in_processes(concepts.nouns, pieces), desc="nouns",
                          total=len(pieces), unit=" pieces"):
        total.update(found)
    for name, _ in total.most_common():
        if name and not set(name) & set(",:;(_"):   # these mean something in a bank
            print(name)


if __name__ == "__main__":
    main()
