"""Wan's transformer in numpy and float64, written from its description, layer by layer."""

import numpy as np


def velocity(model, latents, timestep, text, text_mask):
    """As `DiT.__call__` with the plain feed-forward network; timestep is b, s."""
    config, embedder = model.config, model.condition_embedder
    (pt, ph, pw), head_dim = config.patch_size, config.head_dim
    b, t, h, w, c = latents.shape
    places = [(i, j, k) for i in range(t // pt) for j in range(h // ph) for k in range(w // pw)]
    windows = [
        np.s_[:, i * pt : (i + 1) * pt, j * ph : (j + 1) * ph, k * pw : (k + 1) * pw] for i, j, k in places
    ]
    x = np.stack([latents[window].reshape(b, -1) for window in windows], axis=1).astype(np.float64)
    x = linear(model.patch_embedding, x)
    rotation = rotations(places, head_dim, config.rope_theta)

    embedded = linear(embedder.time_2, silu(linear(embedder.time_1, sinusoid(timestep, config.freq_dim))))
    modulation = linear(embedder.time_proj, silu(embedded)).reshape(b, -1, 6, config.model_dim)
    text = linear(embedder.text_2, gelu(linear(embedder.text_1, text.astype(np.float64))))
    for index in range(config.num_layers):
        x = block(model.blocks, index, x, modulation, rotation, text, text_mask, config)

    table = value(model.head.scale_shift_table)
    shift, scale = embedded + table[0], embedded + table[1]
    x = linear(model.head.proj, standardised(x, config.eps) * (1 + scale) + shift)
    out = np.empty(latents.shape)
    for token, window in enumerate(windows):
        out[window] = x[:, token].reshape(b, pt, ph, pw, c)
    return out


def block(blocks, index, x, modulation, rotation, text, text_mask, config):
    shift1, scale1, gate1, shift2, scale2, gate2 = np.moveaxis(
        modulation + value(blocks.scale_shift_table, index), 2, 0
    )
    y = standardised(x, config.eps) * (1 + scale1) + shift1
    x = x + gate1 * attention(blocks.self_attention, index, y, y, config, rotation=rotation)
    norm = blocks.cross_norm
    y = standardised(x, config.eps) * value(norm.scale, index) + value(norm.bias, index)
    x = x + attention(blocks.cross_attention, index, y, text, config, key_mask=text_mask)
    y = standardised(x, config.eps) * (1 + scale2) + shift2
    return x + gate2 * linear(blocks.ffn.down, gelu(linear(blocks.ffn.up, y, index)), index)


def attention(module, index, x, context, config, *, rotation=None, key_mask=None):
    query = rms(module.query_norm, index, linear(module.query, x, index), config.eps)
    key = rms(module.key_norm, index, linear(module.key, context, index), config.eps)
    vectors = linear(module.value, context, index)
    outputs, d = [], config.head_dim
    for head in range(config.num_heads):
        part = np.s_[..., head * d : (head + 1) * d]
        q, k = query[part], key[part]
        if rotation is not None:
            q, k = (np.einsum("sij,bsj->bsi", rotation, z) for z in (q, k))
        scores = q @ k.swapaxes(1, 2) / np.sqrt(d)
        if key_mask is not None:
            scores = np.where(key_mask[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        outputs.append(weights / weights.sum(-1, keepdims=True) @ vectors[part])
    return linear(module.out, np.concatenate(outputs, -1), index)


def rotations(places, head_dim, theta):
    """One orthogonal matrix per token."""
    space = head_dim // 6
    counts = (head_dim // 2 - 2 * space, space, space)
    matrices = np.zeros((len(places), head_dim, head_dim))
    for token, place in enumerate(places):
        angles = [p * theta ** (-i / n) for p, n in zip(place, counts, strict=True) for i in range(n)]
        for pair, angle in enumerate(angles):
            rows = np.s_[2 * pair : 2 * pair + 2]
            matrices[token, rows, rows] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return matrices


def sinusoid(timestep, dim):
    angles = 1000.0 * timestep[..., None].astype(np.float64) * 10_000.0 ** (-np.arange(dim // 2) / (dim // 2))
    return np.concatenate([np.cos(angles), np.sin(angles)], -1)


def linear(module, x, index=...):
    return x @ value(module.kernel, index) + value(module.bias, index)


def rms(module, index, x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * value(module.scale, index)


def standardised(x, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def value(variable, index=...):
    return np.asarray(variable[...], np.float64)[index]
