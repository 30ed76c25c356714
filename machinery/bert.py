"""A pretrained BERT as text encoder. It needs the optional package transformers."""
import importlib.util
import json
from functools import lru_cache

import torch
from torch import nn

BASE = "bert-base-uncased"


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
