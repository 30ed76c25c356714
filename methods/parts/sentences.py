"""Text encoders of whole sentences, for OVSegmentor (docs/ovsegmentor.md, section 4): a pretrained
BERT, which needs the optional package transformers, or a text tower from scratch.

Letters: B sentences, T tokens of each, d_t width.
"""
import importlib.util
import json
import math
import os
from functools import lru_cache

import torch
from torch import nn

from machinery.networks import backbones
from machinery.training.captions import CONTEXT_LENGTH
from machinery.errors import check_bounds

BASE = "bert-base-uncased"


# --------------------------------------------------------------------------------------------------
# Flags

def add_flags(parser):
    """The flags of a text encoder."""
    backbones.add_text_flags(parser)
    add = parser.add_argument_group("sentences").add_argument
    add("--text", default="auto",
        help="text encoder: a pretrained BERT by its name or folder, or scratch; auto = "
             f"{BASE} if transformers is installed, else scratch (default: %(default)s)")
    add("--context", type=int, default=CONTEXT_LENGTH,
        help="text tokens at most (default: %(default)s)")


def check_flags(args):
    """Raise ValueError for a context that cannot be; --text auto, or a folder, becomes definite."""
    if args.text == "auto":
        args.text = BASE if installed() else "scratch"
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"text encoder: {args.text} (--text)")
    most = CONTEXT_LENGTH if args.text == "scratch" else math.inf
    check_bounds(args, {"context": (1, most)})
    if args.text != "scratch" and os.path.isdir(args.text):
        args.text = os.path.abspath(args.text)      # found again from any folder


def from_flags(args):
    """The text encoder to train."""
    if args.text == "scratch":
        return ScratchText(args.text_width, args.text_heads, args.text_layers, args.context)
    return Bert(args.text, args.context)


def from_config(config):
    """The text encoder of a checkpoint, still without its tensors."""
    if config["kind"] == "scratch":
        return ScratchText(**{key: value for key, value in config.items() if key != "kind"})
    return Bert(config["kind"], config["context"], config["shape"])


# --------------------------------------------------------------------------------------------------
# From scratch

class ScratchText(nn.Module):
    """CLIP's causal text transformer from random initial weights, without a projection.

    Its attention is causal, so a sentence's state is that of its end token. width, heads: 512 and
    8 if None. context: T.
    """

    def __init__(self, width=None, heads=None, layers=12, context=CONTEXT_LENGTH):
        super().__init__()
        from open_clip.transformer import TextTransformer
        width = width or 512
        heads = heads or max(1, width // 64)
        if width % heads:
            raise ValueError(f"the text encoder's width {width} must be a multiple of its {heads} "
                             "heads")
        self.tower = TextTransformer(CONTEXT_LENGTH, width=width, heads=heads, layers=layers,
                                     output_dim=768)
        self.tower.text_projection = None           # the projector of the method does its work
        self.config = {"kind": "scratch", "width": width, "heads": heads, "layers": layers,
                       "context": context}

    def forward(self, tokens):
        """tokens: (B, T). Returns states (B, T, d_t), those of padding too, and of the sentence
        (B, d_t)."""
        T = tokens.shape[1]
        x = self.tower.token_embedding(tokens) + self.tower.positional_embedding[:T]
        x = self.tower.transformer(x, attn_mask=self.tower.attn_mask[:T, :T])
        states = self.tower.ln_final(x)
        return states, self.sentence(states, tokens)

    @staticmethod
    def sentence(states, tokens):
        """States (B, T, w) -> that of the end token, which has the highest id, (B, w)."""
        return states[torch.arange(len(tokens), device=tokens.device), tokens.argmax(dim=-1)]


# --------------------------------------------------------------------------------------------------
# BERT

def installed():
    return importlib.util.find_spec("transformers") is not None


def package():
    """transformers. Raises ValueError with the install command where it is missing."""
    if not installed():
        raise ValueError("a pretrained BERT needs the package transformers: pip install "
                         "transformers, or train a text encoder from scratch with --text scratch")
    import transformers                             # slow, and only BERT needs it
    return transformers


def load(maker, name, **options):
    """maker.from_pretrained. Raises FileNotFoundError for a name that is neither a folder nor to be
    had from the Hugging Face Hub."""
    try:
        return maker.from_pretrained(name, **options)
    except OSError as error:
        raise FileNotFoundError(f"no BERT {name!r} ({str(error).splitlines()[0]}); expected a "
                                "model of the Hugging Face Hub, which is downloaded once, or a "
                                "folder with its files") from None


@lru_cache(maxsize=1)
def tokenizer(name):
    return load(package().BertTokenizer, name)


def tokenize(text, name, context):
    """Text -> (context,) int64: [CLS], pieces of words (cut to fit), [SEP], padding. "[MASK]" in it
    becomes the mask token."""
    encoded = tokenizer(name)(text, padding="max_length", truncation=True, max_length=context)
    return torch.tensor(encoded["input_ids"])


class Bert(nn.Module):
    """Hidden states of a BERT. A sentence's state is that of [CLS], its first token.

    name: of its vocabulary and weights. context: tokens of a text. shape: its settings, of a
    checkpoint that holds the weights; None = load both by the name. In training its dropout draws
    for the process's own rows. Raises ValueError or FileNotFoundError.
    """

    def __init__(self, name=BASE, context=77, shape=None):
        super().__init__()
        library = package()
        if shape is None:
            self.bert, report = load(library.BertModel, name, add_pooling_layer=False,
                                     output_loading_info=True)
            if report["missing_keys"]:
                raise ValueError(f"{name} lacks {', '.join(sorted(report['missing_keys'])[:3])}; "
                                 "it is no BERT")
        else:
            self.bert = library.BertModel(library.BertConfig.from_dict(shape),
                                          add_pooling_layer=False)
        self.config = {"kind": name, "context": context, "width": self.bert.config.hidden_size,
                       "shape": json.loads(self.bert.config.to_json_string(use_diff=False))}

    def forward(self, tokens):
        """tokens: (B, T). Returns states (B, T, width), those of padding too, and of the sentence
        (B, width)."""
        is_text = tokens != self.bert.config.pad_token_id
        states = self.bert(tokens, attention_mask=is_text).last_hidden_state
        return states, self.sentence(states, tokens)

    @staticmethod
    def sentence(states, tokens):
        """States (B, T, w) -> that of [CLS] (B, w)."""
        return states[:, 0]
