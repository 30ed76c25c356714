"""Text encoders of whole sentences, for OVSegmentor (docs/ovsegmentor.md, section 4): a pretrained
BERT, which needs the optional package transformers, or a text tower from scratch.

Letters: B sentences, T tokens of each, padding included, d_t width.
"""
import importlib.util
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


def create(settings, pretrained):
    """The text encoder of `SentenceSettings`. pretrained: whether a BERT gets its weights."""
    if settings.encoder == "scratch":
        return ScratchText(settings)
    return Bert(settings.encoder, pretrained)


@lru_cache(maxsize=2 ** 14)                         # prompts and answers return often
def tokenize(text, encoder, context):
    """Text, perhaps with [MASK] -> (context,) int64. encoder, context: of `SentenceSettings`."""
    if encoder == "scratch":
        return clip_tokenize(text.replace(MASK, RARE_WORD), context)
    encoded = bert_tokenizer(encoder)(text, padding="max_length", truncation=True,
                                      max_length=context)
    return torch.tensor(encoded["input_ids"])       # [CLS], pieces of words, [SEP], padding


class ScratchText(TextEncoder):
    """CLIP's causal text transformer from random initial weights, without a projection.

    Its attention is causal, so a sentence's state is that of its end token.
    """

    def __init__(self, settings):
        super().__init__(None, settings.width, settings.heads, settings.layers)

    def forward(self, tokens):
        """tokens: (B, T). Returns hidden states (B, T, d_t), those of padding too, and of the
        sentence (B, d_t)."""
        T = tokens.shape[1]
        x = self.tower.token_embedding(tokens) + self.tower.positional_embedding[:T]
        x = self.tower.transformer(x, attn_mask=self.tower.attn_mask[:T, :T])
        hidden_states = self.tower.ln_final(x)
        return hidden_states, self.sentence(hidden_states, tokens)

    @staticmethod
    def sentence(x, tokens):
        """x (B, T, w) -> that of the end token, which has the highest id, (B, w)."""
        return x[torch.arange(len(tokens), device=tokens.device), tokens.argmax(dim=-1)]


# --------------------------------------------------------------------------------------------------
# BERT

def transformers():
    """The package. Raises ValueError with the install command where it is missing."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("a pretrained BERT needs the package transformers: pip install "
                         "transformers, or train a text encoder from scratch with --text scratch")
    import transformers                             # slow, and only BERT needs it
    return transformers


def load(maker, name, **options):
    """maker.from_pretrained(name). Raises FileNotFoundError for a name that is neither a folder nor
    to be had from the Hugging Face Hub."""
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
    """Hidden states of a BERT. A sentence's state is that of [CLS], its first token.

    name: of the Hub, or a folder; its shape and vocabulary are read there. pretrained: the weights,
    too; else they are random, to be filled from a checkpoint.
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
        self.width = self.bert.config.hidden_size                                   # d_t

    def forward(self, tokens):
        """tokens: (B, T). Returns hidden states (B, T, d_t), those of padding too, and of the
        sentence (B, d_t)."""
        is_text = tokens != self.bert.config.pad_token_id
        hidden_states = self.bert(tokens, attention_mask=is_text).last_hidden_state
        return hidden_states, self.sentence(hidden_states, tokens)

    @staticmethod
    def sentence(x, tokens):
        """x (B, T, w) -> that of [CLS] (B, w)."""
        return x[:, 0]
