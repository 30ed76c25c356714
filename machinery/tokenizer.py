"""CLIP's byte-pair tokenizer, of open_clip."""
import re
from functools import lru_cache

import numpy as np

from machinery.names import visible

CONTEXT_LENGTH = 77                                 # CLIP's: tokens, start and end included
VOCABULARY = 49408                                  # tokens that it knows


@lru_cache(maxsize=None)
def tokenizer():
    from open_clip.tokenizer import SimpleTokenizer     # slow to import
    made = SimpleTokenizer()
    clean_with_clip = made.clean_fn
    made.clean_fn = lambda text: without_specials(clean_with_clip(text))
    return made


def without_specials(text):
    """A text without characters that cannot be seen, and with the names of the start and end token
    as plain words: as tokens they would end the text."""
    text = re.sub("<(start|end)_of_text>", r"\1 of text", visible(text))
    return " ".join(text.split())


def clean(caption):
    """The caption as the tokenizer sees it: repaired Unicode, HTML entities resolved, single
    spaces, lower case, `without_specials`."""
    return tokenizer().clean_fn(caption)


def tokenize(caption, context=CONTEXT_LENGTH):
    """Caption -> (context,) int64: start token, byte pairs (cut to fit), end token, zeros."""
    return tokenizer()(caption, context_length=context)[0]


def token_ids(caption):
    """The tokens of `tokenize` without the zeros, a uint16 array."""
    tokens = tokenize(caption).numpy()
    return tokens[:tokens.argmax() + 1].astype(np.uint16)       # the end token has the highest id


def forget_words():
    """Bound the memory of the tokenizer, which remembers every word; to be called now and then."""
    if len(tokenizer().cache) > 500_000:            # words; about 100 MB
        special = [tokenizer().decoder[id] for id in tokenizer().all_special_ids]
        tokenizer().cache = {token: token for token in special}
