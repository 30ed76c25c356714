"""Captions encoded in buckets of similar length, and exact gradients with little memory.

Within a bucket almost no padding is computed. All results are those of the whole batch, up to
rounding.
"""
import torch

BUCKET = 16                                         # captions encoded together
GPU_BUCKET = 256                                    # a GPU needs more to be busy


def buckets(tokens, size):
    """Row numbers of tokens (B, 77) in groups of up to size captions of similar length."""
    return tokens.argmax(dim=-1).argsort(stable=True).split(size)


def encode_in_buckets(encode, embed, tokens, spans, size):
    """encode(tokens, spans, embedded), a tuple of tensors with a row per caption, in buckets.

    embed: tokens (B, 77) -> their embeddings (B, 77, width). spans: (B, M, 2).
    """
    if size >= len(tokens):
        return encode(tokens, spans)
    groups = buckets(tokens, size)
    # Looked up once: the gradient of the embedding table is as large as the vocabulary.
    embedded = embed(tokens)                                                # (B, 77, width)
    parts = [encode(tokens[rows], spans[rows], embedded[rows]) for rows in groups]
    order = torch.cat(groups).argsort()
    return tuple(torch.cat(part)[order] for part in zip(*parts))


def backward_in_buckets(encode, embed, tokens, spans, losses_of, scale, autocast, chunk=None):
    """Leave the gradients of scale(losses["loss"]) in the parameters; returns the losses.

    encode, embed, tokens, spans: see `encode_in_buckets`. losses_of: from what `encode` gives to a
    dict of scalars. autocast: context in which captions are encoded.

    chunk, smaller than the batch, means gradient caching: (1) encode all captions without gradient;
    (2) compute the loss, and its gradient with respect to their embeddings; (3) encode the captions
    again, bucket by bucket, and pass that gradient on. Memory then holds the activations of one
    bucket of at most chunk captions.
    """
    twice = chunk is not None and chunk < len(tokens)
    size = GPU_BUCKET if tokens.is_cuda else BUCKET
    if twice:
        size = min(size, chunk)
    with autocast(), torch.set_grad_enabled(not twice):
        encoded = encode_in_buckets(encode, embed, tokens, spans, size)
    if twice:
        encoded = [embeddings.requires_grad_() for embeddings in encoded]
    losses = losses_of(*encoded)
    scale(losses["loss"]).backward()
    if twice:
        for rows in buckets(tokens, size):
            # A new autocast context: the first one keeps casts that were made without gradient.
            with autocast():
                again = encode(tokens[rows], spans[rows])
            torch.autograd.backward(again, [embeddings.grad[rows] for embeddings in encoded])
    return losses
