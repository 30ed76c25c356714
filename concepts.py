"""From captions to concepts: the linguistic part of SimZSS (method, section 5).

    python concepts.py captions_train2017.json          # noun phrases -> concepts, cached beside the input
    python concepts.py --shards "{00000..00295}.tar"    # the same for tar shards, a process per core

A caption is cleaned as the tokenizer cleans it and parsed by spaCy. Each noun chunk gives one concept, its root's lemma
with the compound before it ("two wooden baseball bats" -> "baseball bat"), kept if it is in the concept bank, with the
positions of its byte-pair tokens. The command prints captions per second, the share of captions with a concept, the
most frequent concepts, and how many of the benchmarks' class names are in the bank and in the captions.
"""
import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
import tarfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from machinery.captions import as_arrays, read_captions, save_arrays
from machinery.classes import BENCHMARKS, CLASSES, check_classes, normalise_name, read_classes
from machinery.shards import BAD, bad_line, find_shards, read_caption, read_samples, read_sidecar, sidecar_key

DEFAULT_PARSER = "en_core_web_trf"                  # the paper's; en_core_web_sm is the light one
CACHE_VERSION = 2                                   # raise it when annotations of the same input change


# ---------------------------------------------------------------------------------------------------------------------
# Names


class ConceptBank:
    """The concepts that training knows: C names, each perhaps with synonyms that count as the same concept.

    names: strings or lists of synonyms; None = an open bank, to which `annotate` adds every concept that it finds.
    excluded: names that are to stay out, with their plurals and all synonyms that the bank has for them.
    `names[i]` is concept i's first name. Raises ValueError for duplicates and where nothing is left.
    """

    def __init__(self, names, excluded=()):
        self.open = names is None
        self.excluded = {form for name in map(normalise_name, excluded) for form in (name, plural(name))}
        classes = [[name] if isinstance(name, str) else list(name) for name in names or ()]
        classes = [synonyms for synonyms in classes if not any(map(self.excludes, synonyms))]
        if not self.open:
            check_classes(classes, "concept bank")
        self.names = [normalise_name(synonyms[0]) for synonyms in classes]
        self.ids = {normalise_name(name): i for i, synonyms in enumerate(classes) for name in synonyms}

    @classmethod
    def from_file(cls, path, excluded=()):
        return cls(read_classes(path), excluded)

    @classmethod
    def default(cls, excluded=()):
        """The union of the eight benchmarks' class names, as in the paper."""
        names = [name for b in BENCHMARKS for names in read_classes(CLASSES / f"{b}.txt") for name in names]
        return cls(dict.fromkeys(map(normalise_name, names)), excluded)

    @classmethod
    def by_name(cls, source=None, exclude=None):
        """The bank that --bank names: a file, None = the default, "none" = an open one. exclude: class file."""
        excluded = [name for names in read_classes(exclude) for name in names] if exclude else ()
        if source == "none":
            return cls(None, excluded)
        return cls.from_file(source, excluded) if source else cls.default(excluded)

    def __len__(self):
        return len(self.names)

    def excludes(self, name):
        """Whether a name is to stay out, as it is or as the singular of a name that is."""
        name = normalise_name(name)
        return bool(name) and not self.excluded.isdisjoint((name, plural(name)))

    def find(self, name):
        """Bank id of a name, -1 if it is not in the bank."""
        return self.ids.get(normalise_name(name), -1)

    def add(self, name):
        """Take a new name into an open bank. Returns its id, -1 if it is excluded."""
        name = normalise_name(name)
        if not name or self.excludes(name):
            return -1
        self.names.append(name)
        self.ids[name] = len(self.ids)
        return self.ids[name]


# ---------------------------------------------------------------------------------------------------------------------
# From words to tokens

@lru_cache(maxsize=None)
def _tokenizer():
    from open_clip.tokenizer import SimpleTokenizer     # slow to import
    return SimpleTokenizer()


def clean(caption):
    """The caption as the tokenizer sees it: repaired Unicode, HTML entities resolved, single spaces, lower case."""
    return _tokenizer().clean_fn(caption)


def forget_words():
    """Keep the tokenizer, which remembers every word, from filling the memory; to be called now and then."""
    tokenizer = _tokenizer()
    if len(tokenizer.cache) > 500_000:              # words; about 100 MB
        tokenizer.cache = {tokenizer.decoder[id]: tokenizer.decoder[id] for id in tokenizer.all_special_ids}


def tokenize(caption):
    """Caption -> (77,) int64: start token, byte pairs (cut at the context), end token, zeros."""
    return _tokenizer()(caption)[0]


def token_spans(text):
    """Characters of each byte-pair token of a caption, in `clean(text)`: [(start_char, end_char)].

    One span per token that the tokenizer gives, without the start and end tokens and without truncation. Tokens that
    share a character, as the bytes of an emoji do, have overlapping spans.
    """
    tokenizer, spans = _tokenizer(), []
    for match in tokenizer.pat.finditer(clean(text)):
        word = match.group()
        character = [match.start() + i for i, letter in enumerate(word) for _ in letter.encode()]  # byte -> character
        first = 0                                                                                   # in bytes
        for piece in tokenizer.bpe("".join(tokenizer.byte_encoder[b] for b in word.encode())).split(" "):
            last = first + len(piece.removesuffix("</w>")) - 1
            spans.append((character[first], character[last] + 1))
            first = last + 1
    return spans


# ---------------------------------------------------------------------------------------------------------------------
# From captions to concepts

def noun_concepts(doc):
    """Concepts of a parsed caption: [(concept, start_char, end_char)], one per noun chunk.

    doc: a spaCy `Doc` with heads and dependencies. A concept is the lemma of the chunk's root, after the root's last
    `compound` child if it has one; the characters run from the compound to the end of the root.
    """
    concepts = []
    for chunk in doc.noun_chunks:
        root = chunk.root
        compound = [child for child in root.lefts if child.dep_ == "compound"][-1:]
        words = [word.lower_ for word in compound] + [(root.lemma_ or root.text).lower()]
        concepts.append((" ".join(words), (compound or [root])[0].idx, root.idx + len(root)))
    return concepts


def matched_concepts(doc):
    """Concepts of a caption seen by the built-in matcher, in the form of `noun_concepts`."""
    return [(entity.ent_id_, entity.start_char, entity.end_char) for entity in doc.ents]


IRREGULAR = {"person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice", "sheep": "sheep",
             "knife": "knives", "shelf": "shelves", "leaf": "leaves", "foot": "feet", "goose": "geese"}


def plural(name):
    """English plural of a name's last word."""
    *before, word = name.split()
    if word in IRREGULAR:
        word = IRREGULAR[word]
    elif word.endswith("y") and word[-2:-1] not in "aeiou":
        word = word[:-1] + "ies"
    else:
        word += "es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s"
    return " ".join([*before, word])


def load_parser(name, bank):
    """spaCy pipeline by name or folder; "match" = a blank one that finds the bank's names and their plurals.

    Raises FileNotFoundError with the install command when the pipeline is not there, ValueError for "match" with an
    open bank.
    """
    import spacy                                    # slow to import, and only captions need it
    if name == "match":
        if bank.open:
            raise ValueError("--bank none makes a concept of every noun phrase, but the built-in matcher looks for "
                             "the names of a bank; name a spaCy pipeline with --parser")
        pipeline = spacy.blank("en")
        ruler = pipeline.add_pipe("entity_ruler")   # prefers the longest match
        forms = {plural(known): known for known in bank.ids} | {known: known for known in bank.ids}
        forms |= {form.replace(" ", "-"): known for form, known in forms.items()}
        ruler.add_patterns([{"label": "CONCEPT", "pattern": form, "id": known} for form, known in forms.items()])
        return pipeline
    try:
        return spacy.load(name, exclude=["ner"])
    except OSError as error:
        raise FileNotFoundError(
            f"the parser {name!r} could not be loaded ({str(error).splitlines()[0]}). Install one with 'python -m spacy "
            "download en_core_web_trf' or '... en_core_web_sm', name it or a folder with --parser, or use the built-in "
            "--parser match.") from None


def use_device(device, parser):
    """Let spaCy use the GPU if there is one, or if it has to. Raises ValueError."""
    if device in ("auto", "cuda") and parser != "match":
        import spacy
        (spacy.require_gpu if device == "cuda" else spacy.prefer_gpu)()


def annotate(captions, bank, parser, processes=1):
    """Find the bank's concepts in captions and the tokens that name them.

    captions: iterable of str. bank: ConceptBank; an open one grows. parser: spaCy pipeline or name for `load_parser`.
    processes: parser processes. Yields, caption by caption, [(concept_id, first_token, end_token)]; positions count the
    start-of-text token as 0. An occurrence that does not fit whole into the context is left out.
    Raises ValueError when the pipeline neither parses nor matches.
    """
    parser = load_parser(parser, bank) if isinstance(parser, str) else parser
    captions, texts = itertools.tee(captions)
    options = {"n_process": processes} if processes > 1 else {}
    for caption, doc in zip(captions, parser.pipe(map(clean, texts), **options)):
        if doc.has_annotation("DEP"):
            concepts = noun_concepts(doc)
        elif doc.has_annotation("ENT_IOB"):
            concepts = matched_concepts(doc)
        else:
            raise ValueError("the spaCy pipeline has no dependency parser; expected one like en_core_web_sm")
        found = []
        tokens = token_spans(caption) if concepts else ()
        for concept, start, end in concepts:
            id = bank.find(concept)
            if id < 0:                                                      # a bank may hold a plural: "clouds"
                id = bank.add(concept) if bank.open else bank.find(doc.text[start:end])
            positions = [i for i, (s, e) in enumerate(tokens, start=1) if s < end and e > start]
            if id >= 0 and positions and positions[-1] < _tokenizer().context_length - 1:
                found.append((id, positions[0], positions[-1] + 1))
        yield found


# ---------------------------------------------------------------------------------------------------------------------
# Caption files and the annotation cache


def load_annotations(path, captions, bank, parser, processes=1):
    """Annotations of all captions, from the cache beside their file if it is still true, else made and cached.

    path: captions file, its cache is `<path>.concepts.npz`; None = no cache. captions: list of str. parser: name.
    Returns (offsets (K + 1,), rows (occurrences, 3)) int32: rows[offsets[i]:offsets[i + 1]] are the (concept id,
    first token, end token) of caption i. An open bank holds the names afterwards; it serves one list of captions.
    """
    pipeline = load_parser(parser, bank)
    key = annotation_key(captions, bank, pipeline)
    cache = path and Path(f"{path}.concepts.npz")
    if cache and cache.exists():
        try:
            with np.load(cache) as file:
                if str(file["key"]) == key:
                    offsets, rows, names = file["offsets"], file["rows"], file["names"] if bank.open else ()
                    for name in names:
                        bank.add(str(name))
                    return offsets, rows
        except Exception:                           # a broken file raises almost anything; it is made again below
            pass
    start = time.time()
    annotations = annotate(captions, bank, pipeline, processes)
    found = list(tqdm(annotations, total=len(captions), desc="concepts", unit=" captions", disable=None if path else True))
    if path:
        seconds = time.time() - start
        print(f"annotated {len(captions):,} captions in {seconds:.1f} s ({len(captions) / seconds:,.0f} captions/s)")
    offsets, rows = as_arrays(found)
    if cache:
        try:
            save_arrays(cache, key=key, offsets=offsets, rows=rows, names=np.array(bank.names, dtype=str))
        except OSError as error:
            print(f"the annotations were not cached, {cache}: {error.strerror}", file=sys.stderr)
    return offsets, rows


def annotation_key(captions, bank, pipeline):
    """A text that changes with what annotations depend on."""
    names = ["none", *sorted(bank.excluded)] if bank.open else sorted(bank.ids.items())
    return hashlib.sha256(json.dumps([CACHE_VERSION, captions, names, pipeline.meta],
                                     sort_keys=True, default=str).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Tar shards in img2dataset's layout: the files of a sample share their stem and follow one another


def annotate_shard(path, bank, pipeline):
    """Write the concepts file of a tar, unless it is there and true.

    Returns (captions annotated now, captions in all, those with a concept, Counter of concept ids, bad (len(BAD),)).
    """
    annotator, now = annotation_key(None, bank, pipeline), 0
    try:
        made = read_sidecar(path, annotator)
    except ValueError:
        made = None
    if not made:
        key, captions, bad = sidecar_key(path, annotator), [], np.zeros(len(BAD), np.int64)
        try:
            with tarfile.open(path, "r:") as tar:
                for _, members in read_samples(tar):
                    caption, reason = read_caption(tar, members)
                    captions.append(caption)
                    bad[BAD.index(reason) if reason else []] += 1
        except tarfile.TarError:
            captions.append(None)                   # stands for what was cut
            bad[BAD.index("cut tar")] += 1
        with pipeline.memory_zone():                # forgets the words afterwards
            found = iter(list(annotate([caption for caption in captions if caption], bank, pipeline)))
        made = (*as_arrays([next(found) if caption else [] for caption in captions]), bad)
        save_arrays(path.with_suffix(".concepts.npz"), key=key, **dict(zip(("offsets", "rows", "bad"), made)))
        forget_words()
        now = len(captions) - bad.sum()
    offsets, rows, bad = made
    return now, len(offsets) - 1 - bad.sum(), (np.diff(offsets) > 0).sum(), Counter(rows[:, 0].tolist()), bad


def _start_process(bank, parser, device):
    """What a process needs for `_annotate_shard`; it is to end when the one that started it does."""
    global _bank, _pipeline
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    use_device(device, parser)
    _bank, _pipeline = bank, load_parser(parser, bank)


def _annotate_shard(path):
    return annotate_shard(path, _bank, _pipeline)


def annotate_shards(paths, processes, bank, parser, device):
    """`annotate_shard` for all tars, in processes. Returns (captions, those with a concept, Counter of concept ids)."""
    if bank.open:
        raise ValueError("--bank none grows with the captions, and the processes would not know of each other's; name a "
                         "file of concepts with --bank")
    os.environ.setdefault("OMP_NUM_THREADS", "1")   # a process per core, not a thread per core in each
    new = captions = annotated = 0
    counts, bad, start = Counter(), np.zeros(len(BAD), np.int64), time.time()
    pool = ProcessPoolExecutor(min(processes, len(paths)), multiprocessing.get_context("spawn"), _start_process,
                               (bank, parser, device))
    try:
        with pool:
            bar = tqdm(total=len(paths), desc="concepts", unit=" shards", disable=None)
            for numbers in pool.map(_annotate_shard, paths):
                new, captions, annotated = np.add((new, captions, annotated), numbers[:3])
                counts.update(numbers[3])
                bad += numbers[4]
                bar.set_postfix_str(f"{new / (time.time() - start):,.0f} captions/s", refresh=False)
                bar.update()
            bar.close()
    except BrokenProcessPool:
        raise ChildProcessError("a parser process died, perhaps for want of memory; run the command again, with fewer "
                                "--processes. Finished shards are kept") from None
    seconds = time.time() - start
    if new:
        print(f"annotated {new:,} captions in {seconds:.1f} s ({new / seconds:,.0f} captions/s)")
    print(f"{len(paths):,} shards; skipped samples: {bad_line(bad)}")
    if not captions:
        raise ValueError(f"no captions in {paths[0]} and the other shards; expected a .txt or .json beside every image")
    return captions, annotated, counts


# ---------------------------------------------------------------------------------------------------------------------
# The command

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Find the concepts of captions and cache them beside their file.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("captions", nargs="?", help="COCO captions JSON, or TSV / JSONL of (image, caption)")
    source.add_argument("--shards", help='instead, tars: a folder, or a range such as "shards/{00000..00295}.tar"; '
                                         "finished ones are skipped")
    parser.add_argument("--parser", default=DEFAULT_PARSER,
                        help="spaCy pipeline (name or folder), or 'match', the built-in matcher (default: %(default)s)")
    parser.add_argument("--bank", help="concept bank, one name per line, or 'none', which makes a concept of every "
                                       "noun phrase (default: the eight benchmarks' classes)")
    parser.add_argument("--exclude-classes", metavar="FILE", help="class file; its names and synonyms are no concepts")
    parser.add_argument("--processes", type=int, help="parser processes (default: 1; for shards one per core)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
                        help="where the parser runs; cuda needs spaCy's cupy extra (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="as in every script; nothing here is random")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        bank = ConceptBank.by_name(args.bank, args.exclude_classes)
        paths = find_shards(args.shards) if args.shards else None
        captions = None if paths else [caption for _, caption in read_captions(args.captions)]
        use_device(args.device, args.parser)
        if paths:
            load_parser(args.parser, bank)          # if it is missing the processes could not say so
            captions, annotated, counts = annotate_shards(paths, args.processes or os.cpu_count(), bank, args.parser,
                                                          args.device)
        else:
            offsets, rows = load_annotations(args.captions, captions, bank, args.parser, args.processes or 1)
            captions, annotated, counts = len(captions), (np.diff(offsets) > 0).sum(), Counter(rows[:, 0].tolist())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{captions:,} captions; {annotated / captions:.1%} have a concept, {counts.total() / captions:.2f} per "
          f"caption; bank of {len(bank)}")
    for concept, times in counts.most_common(20):
        print(f"{times:8,}  {bank.names[concept]}")
    print("class names of the benchmarks: all, in the bank, found at least once in these captions")
    for benchmark in BENCHMARKS:
        ids = [bank.find(name) for names in read_classes(CLASSES / f"{benchmark}.txt") for name in names]
        known = [id for id in ids if id >= 0]
        print(f"{len(ids):8} {len(known):5} {len(set(known) & set(counts)):5}  {benchmark}")


if __name__ == "__main__":
    main()
