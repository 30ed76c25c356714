"""Text encoders of whole sentences, for OVSegmentor (docs/ovsegmentor.md, section 4): a pretrained
BERT, which needs the optional package transformers, or a text tower from scratch.

Both have a width d_t. They turn tokens (B, T) of B sentences into hidden states (B, T, d_t), those
of padding too, and one state a sentence, (B, d_t); `sentence` picks it among states (B, T, w).
"""
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from machinery.settings import setting
from machinery.tokenizer import CONTEXT_LENGTH
from machinery.tokenizer import tokenize as clip_tokenize
from model import TextEncoder, TextSettings

MASK = "[MASK]"                                     # BERT's mask token
RARE_WORD = "jekyll"                                # stands for it in CLIP's vocabulary: one token


@dataclass
class SentenceSettings(TextSettings):
    """A text encoder. Width, heads and layers are those of one from scratch."""
    encoder: str = setting(
        "bert-base-uncased", "text encoder: a pretrained BERT by its name or folder, or scratch",
        flag="text")
    context: int = setting(
        CONTEXT_LENGTH, "tokens of a text, which is cut or padded", least=1, flag=False)

    def check(self):
        if self.encoder == "scratch" and self.context > CONTEXT_LENGTH:
            raise ValueError(f"context is {self.context}; the encoder from scratch takes at most "
                             f"{CONTEXT_LENGTH} tokens")


@lru_cache(maxsize=2 ** 14)                         # prompts and answers return often
def tokenize(text, encoder, context):
    """Text, perhaps with [MASK] -> (context,) int64. encoder, context: of `SentenceSettings`."""
    if encoder == "scratch":
        return clip_tokenize(text.replace(MASK, RARE_WORD), context)
    encoded = bert_tokenizer(encoder)(text, padding="max_length", truncation=True,
                                      max_length=context)
    return torch.tensor(encoded["input_ids"])       # [CLS], pieces of words, [SEP], padding


class ScratchText(TextEncoder):
    """CLIP's text transformer from random initial weights, without a projection. Its attention is
    causal, so a sentence's state is that of its end token."""

    def __init__(self, settings):
        super().__init__(None, settings.width, settings.heads, settings.layers)

    def forward(self, tokens):
        # The embeddings of all tokens, so that padding has its states, too
        hidden_states, _ = self.states(tokens, self.tower.token_embedding(tokens))
        return hidden_states, self.sentence(hidden_states, tokens)

    @classmethod
    def sentence(cls, x, tokens):
        return x[torch.arange(len(x), device=x.device), cls.ends(tokens)]


# --------------------------------------------------------------------------------------------------
# BERT

def transformers():
    try:
        import transformers                         # slow, and only BERT needs it
    except ImportError:
        raise ValueError("a pretrained BERT needs the package transformers: pip install "
                         "transformers, or train a text encoder from scratch with --text "
                         "scratch") from None
    return transformers


def load(maker, name, **options):
    try:
        return maker.from_pretrained(name, **options)
    except OSError as error:
        raise FileNotFoundError(f"no BERT {name!r} ({str(error).splitlines()[0]}); expected a "
                                "model of the Hugging Face Hub, which is downloaded once, or a "
                                "folder with its files") from None


@lru_cache(maxsize=1)
def bert_tokenizer(name):
    return load(transformers().BertTokenizer, name)


class Bert(nn.Module):
    """A sentence's state is that of [CLS], its first token.

    name: of the Hub, or a folder, which gives shape and vocabulary. pretrained: its weights, too;
    else they are random, to be filled from a checkpoint.
    """

    def __init__(self, name, pretrained):
        super().__init__()
        package = transformers()
        if pretrained:
            self.bert, report = load(package.BertModel, name, add_pooling_layer=False,
                                     output_loading_info=True)
            if report["missing_keys"]:
                raise ValueError(f"{name} lacks {', '.join(sorted(report['missing_keys'])[:3])}; "
                                 "it is no BERT")
        else:
            self.bert = package.BertModel(load(package.BertConfig, name), add_pooling_layer=False)
        self.width = self.bert.config.hidden_size

    def forward(self, tokens):
        is_text = tokens != self.bert.config.pad_token_id
        hidden_states = self.bert(tokens, attention_mask=is_text).last_hidden_state
        return hidden_states, self.sentence(hidden_states, tokens)

    @staticmethod
    def sentence(x, tokens):
        return x[:, 0]
