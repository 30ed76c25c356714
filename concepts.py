"""From captions to concepts: the linguistic part of SimZSS (docs/method.md, section 5).

    python concepts.py captions_train2017.json          # noun phrases -> concepts, cached beside it
    python concepts.py --shards "{00000..00295}.tar"    # the same for tar shards

A caption is cleaned as the tokenizer cleans it and parsed by spaCy. Each noun chunk gives one
concept: its root's lemma with the compound before it ("two wooden baseball bats" -> "baseball
bat"). It is kept if it is in the concept bank, with the positions of its byte-pair tokens. The
command prints captions per second, the share of captions with a concept, the most frequent
concepts, and how many class names of the benchmarks are in the bank and in the captions.
"""
import argparse
import hashlib
import itertools
import json
import os
import sys
import time
from collections import Counter
from functools import lru_cache

import numpy as np
from tqdm import tqdm

from machinery.training import captions as caption_files
from machinery.training import shards
from machinery.training.captions import CONTEXT_LENGTH
from machinery.names import (BENCHMARK_NAMES, CLASSES, check_classes, merge_equal_names,
                               normalise_name, plural, read_classes, read_lines, split_names)
from machinery.errors import one_line_errors
from machinery.training.workers import process_pool

DEFAULT_PARSER = "en_core_web_trf"                  # the paper's; en_core_web_sm is the light one
CACHE_VERSION = 2                                   # raise it when annotations change


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


def matched_concepts(doc):
    """Concepts of a caption found by the built-in matcher, in the form of `noun_concepts`."""
    return [(entity.ent_id_, entity.start_char, entity.end_char) for entity in doc.ents]


def parse(captions, pipeline):
    """Find the concepts of captions and the tokens that name them, whether in a bank or not.

    Yields, caption by caption, [(concept, words as written, first token, end token)]; positions
    count the start-of-text token as 0, and the end token is not included. An occurrence that does
    not fit whole into the context is left out. pipeline: of spaCy, one that parses ("DEP"), or the
    built-in matcher, which marks entities ("ENT_IOB"). Raises ValueError when it is neither.
    """
    captions, texts = itertools.tee(captions)
    for caption, doc in zip(captions, pipeline.pipe(map(clean, texts))):
        if doc.has_annotation("DEP"):
            concepts = noun_concepts(doc)
        elif doc.has_annotation("ENT_IOB"):
            concepts = matched_concepts(doc)
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


def annotate(captions, bank, parser, processes=1, device="cpu"):
    """Find the bank's concepts in captions and the tokens that name them.

    captions: iterable of str. bank: ConceptBank; an open one grows. parser: spaCy pipeline, or name
    for `load_parser` (a name, if processes > 1). device: of the parser processes. Yields, caption
    by caption, [(bank id, first token, end token)], see `parse`.
    """
    if processes > 1:
        found = parse_in_processes(captions, bank, parser, processes, device)
    else:
        found = parse(captions, load_parser(parser, bank) if isinstance(parser, str) else parser)
    for concepts in found:
        rows = []
        for concept, as_written, first, end in concepts:
            id = bank.find(concept)
            if id < 0 and bank.open:
                id = bank.add(concept)
            elif id < 0:                            # a bank may hold a plural: "clouds"
                id = bank.find(as_written)
            if id >= 0:
                rows.append((id, first, end))
        yield rows


# --------------------------------------------------------------------------------------------------
# From words to tokens

@lru_cache(maxsize=None)
def tokenizer():
    from open_clip.tokenizer import SimpleTokenizer     # slow to import
    return SimpleTokenizer()


def clean(caption):
    """The caption as the tokenizer sees it: repaired Unicode, HTML entities resolved, single
    spaces, lower case."""
    return tokenizer().clean_fn(caption)


def tokenize(caption):
    """Caption -> (77,) int64: start token, byte pairs (cut to fit), end token, zeros."""
    return tokenizer()(caption)[0]


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


def forget_words():
    """Bound the memory of the tokenizer, which remembers every word; to be called now and then."""
    if len(tokenizer().cache) > 500_000:            # words; about 100 MB
        special = [tokenizer().decoder[id] for id in tokenizer().all_special_ids]
        tokenizer().cache = {token: token for token in special}


# --------------------------------------------------------------------------------------------------
# The bank

class ConceptBank:
    """The concepts that training knows: C names, each perhaps with synonyms of the same concept.

    names: strings, or lists of synonyms; equal names count once. None = an open bank, to which
    `annotate` adds every concept that it finds. excluded: names that stay out, with their plurals
    and all synonyms that the bank has for them. source: of the names, for errors. `names[i]` is
    concept i's first name. Raises ValueError where a name is empty or none is left.
    """

    def __init__(self, names, excluded=(), source="concept bank"):
        self.open = names is None
        self.excluded = {form for name in map(normalise_name, excluded)
                         for form in (name, plural(name))}
        lists = [[name] if isinstance(name, str) else list(name) for name in names or ()]
        lists = merge_equal_names(lists)
        if not self.open:
            check_classes(lists, source)
        lists = [synonyms for synonyms in lists if not any(map(self.excludes, synonyms))]
        if not self.open:                           # all of them may be excluded
            check_classes(lists, "concept bank")
        self.names = [normalise_name(synonyms[0]) for synonyms in lists]
        self.ids = {normalise_name(name): i for i, synonyms in enumerate(lists)
                    for name in synonyms}

    @classmethod
    def from_file(cls, path, excluded=()):
        """A file with one concept per line, synonyms after commas."""
        return cls([split_names(line) for line in read_lines(path)], excluded, path)

    @classmethod
    def default(cls, excluded=()):
        """The union of the eight benchmarks' class names, as in the paper."""
        files = [read_classes(CLASSES / f"{benchmark}.txt") for benchmark in BENCHMARK_NAMES]
        names = [name for classes in files for synonyms in classes for name in synonyms]
        return cls(dict.fromkeys(map(normalise_name, names)), excluded)

    @classmethod
    def by_name(cls, source=None, exclude=None):
        """What --bank names: a file, None = the default, "none" = an open bank. exclude: a class
        file."""
        excluded = [name for names in read_classes(exclude) for name in names] if exclude else ()
        if source == "none":
            return cls(None, excluded)
        return cls.from_file(source, excluded) if source else cls.default(excluded)

    def __len__(self):
        return len(self.names)

    def excludes(self, name):
        """Whether a name or its plural is among the excluded names."""
        name = normalise_name(name)
        return bool(name) and not self.excluded.isdisjoint((name, plural(name)))

    def find(self, name):
        """Bank id of a name, -1 if it is not in the bank."""
        return self.ids.get(normalise_name(name), -1)

    def add(self, name):
        """Take a name into an open bank. Returns its id, -1 if it is excluded."""
        name = normalise_name(name)
        if not name or self.excludes(name):
            return -1
        if name not in self.ids:
            self.ids[name] = len(self.names)
            self.names.append(name)
        return self.ids[name]


# --------------------------------------------------------------------------------------------------
# Parsers

def load_parser(name, bank):
    """spaCy pipeline by name or folder; "match" = one that finds the bank's names and plurals.

    Raises FileNotFoundError with the install command when the pipeline is not there, ValueError for
    "match" with an open bank.
    """
    import spacy                                    # slow to import, and only captions need it
    if name == "match":
        if bank.open:
            raise ValueError("--bank none makes a concept of every noun phrase, but the built-in "
                             "matcher looks for the names of a bank; name a spaCy pipeline with "
                             "--parser")
        pipeline = spacy.blank("en")
        ruler = pipeline.add_pipe("entity_ruler")   # prefers the longest match
        forms = {plural(name): name for name in bank.ids} | {name: name for name in bank.ids}
        forms |= {form.replace(" ", "-"): name for form, name in forms.items()}
        ruler.add_patterns([{"label": "CONCEPT", "pattern": form, "id": name}
                            for form, name in forms.items()])
        return pipeline
    try:
        return spacy.load(name, exclude=["ner"])
    except OSError as error:
        raise FileNotFoundError(
            f"the parser {name!r} could not be loaded ({str(error).splitlines()[0]}). Install one "
            "with 'python -m spacy download en_core_web_trf' or '... en_core_web_sm', name it or a "
            "folder with --parser, or use the built-in --parser match.") from None


# --------------------------------------------------------------------------------------------------
# Files of captions

def load_annotations(path, captions, bank, parser, processes=1, device="cpu"):
    """Annotations of all captions, from the cache beside their file if it is valid, else made anew.

    path: captions file, its cache is `<path>.concepts.npz`; None = no cache. captions: list of str.
    parser: name. Returns (offsets (captions + 1,), rows (occurrences, 3)) int32:
    rows[offsets[i]:offsets[i + 1]] are the (bank id, first token, end token) of caption i. An open
    bank holds the names afterwards; it is used for one file only.
    """
    _, pipeline = make_pipeline(bank, parser, device)
    key = annotation_key(captions, bank, pipeline)
    cache = f"{path}.concepts.npz" if path else None
    if cache:
        kept = caption_files.read_cache(cache, key, len(captions), None if bank.open else len(bank))
        if kept:
            offsets, rows, names = kept
            for name in names:
                bank.add(name)
            return offsets, rows
    start = time.time()
    annotations = annotate(captions, bank, parser if processes > 1 else pipeline, processes, device)
    offsets, rows = caption_files.as_arrays(list(tqdm(
        annotations, total=len(captions), desc="concepts", unit=" captions",
        disable=None if path else True)))           # None: shown on a terminal only
    if path:
        seconds = time.time() - start
        print(f"annotated {len(captions):,} captions in {seconds:.1f} s "
              f"({len(captions) / seconds:,.0f} captions/s)")
        try:
            caption_files.save_cache(cache, key, offsets, rows, bank.names)
        except OSError as error:
            print(f"the annotations were not cached, {cache}: {error.strerror}", file=sys.stderr)
    return offsets, rows


def annotation_key(captions, bank, pipeline):
    """A hash of what annotations depend on."""
    names = ["none", *sorted(bank.excluded)] if bank.open else sorted(bank.ids.items())
    content = [CACHE_VERSION, captions, names, pipeline.meta]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------
# Parser processes, each with a pipeline of its own

def make_pipeline(bank, parser, device):
    """(bank, pipeline) of a process. device: "auto" and "cuda" let spaCy use a GPU."""
    if device in ("auto", "cuda") and parser != "match":
        import spacy
        use_gpu = spacy.require_gpu if device == "cuda" else spacy.prefer_gpu
        use_gpu()
    return bank, load_parser(parser, bank)


def parse_batch(tool, captions):
    return list(parse(captions, tool[1]))


def parse_in_processes(captions, bank, parser, processes, device, batch=1000):
    """`parse` in several processes, in the order of the captions."""
    make_pipeline(bank, parser, device)             # a parser that is missing is told here
    captions = list(captions)
    batches = [captions[i:i + batch] for i in range(0, len(captions), batch)]
    with process_pool(processes, make_pipeline, bank, parser, device) as run:
        for found in run(parse_batch, batches):
            yield from found


def annotate_shard(tool, path):
    """`shards.annotate_shard`; spaCy and the tokenizer forget the words afterwards."""
    bank, pipeline = tool

    def annotate_all(captions):
        with pipeline.memory_zone():
            rows = list(annotate(captions, bank, pipeline))
        forget_words()
        return rows

    return shards.annotate_shard(path, annotation_key(None, bank, pipeline), len(bank),
                                 annotate_all)


# --------------------------------------------------------------------------------------------------
# The command

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Find the concepts of captions and cache them "
                                                 "beside their file.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("captions", nargs="?",
                        help="COCO captions JSON, or TSV / JSONL of (image, caption)")
    source.add_argument("--shards",
                        help='instead, tars: a folder, or a range such as '
                             '"shards/{00000..00295}.tar"; finished ones are skipped')
    add = parser.add_argument
    add("--parser", default=DEFAULT_PARSER,
        help="spaCy pipeline (name or folder), or 'match', the built-in matcher "
             "(default: %(default)s)")
    add("--bank", help="concept bank, one name per line, or 'none', which makes a concept of every "
                       "noun phrase (default: the eight benchmarks' classes)")
    add("--exclude-classes", metavar="FILE",
        help="class file; its names and synonyms are no concepts")
    add("--processes", type=int, help="parser processes (default: 1; for shards one per core)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="where the parser runs; cuda needs spaCy's cupy extra (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors("pass --device cpu"):
        bank = ConceptBank.by_name(args.bank, args.exclude_classes)
        if args.shards:
            captions, annotated, counts = annotate_shards(args, bank)
        else:
            pairs = caption_files.read_captions(args.captions)
            offsets, rows = load_annotations(args.captions, [caption for _, caption in pairs],
                                             bank, args.parser, args.processes or 1,
                                             args.device)
            captions = len(pairs)
            annotated = (np.diff(offsets) > 0).sum()
            counts = Counter(rows[:, 0].tolist())
        print_concepts(captions, annotated, counts, bank)


def annotate_shards(args, bank):
    """Annotate all tars. Returns (captions, those with a concept, Counter of concept ids)."""
    if bank.open:
        raise ValueError("--bank none grows with the captions, and the processes would not know of "
                         "each other's; name a file of concepts with --bank")
    paths = shards.find_shards(args.shards)
    make_pipeline(bank, args.parser, args.device)   # if it cannot be made: one line, now
    processes = min(args.processes or os.cpu_count(), len(paths))
    with process_pool(processes, make_pipeline, bank, args.parser, args.device) as run:
        return shards.annotate_shards(paths, run(annotate_shard, paths))


def print_concepts(captions, annotated, counts, bank):
    print(f"{captions:,} captions; {annotated / captions:.1%} have a concept, "
          f"{counts.total() / captions:.2f} per caption; bank of {len(bank)}")
    for concept, times in counts.most_common(20):
        print(f"{times:8,}  {bank.names[concept]}")
    print("class names of the benchmarks: all, in the bank, found at least once in these captions")
    for benchmark in BENCHMARK_NAMES:
        classes = read_classes(CLASSES / f"{benchmark}.txt")
        ids = [bank.find(name) for names in classes for name in names]
        known = [id for id in ids if id >= 0]
        print(f"{len(ids):8} {len(known):5} {len(set(known) & set(counts)):5}  {benchmark}")


if __name__ == "__main__":
    main()
