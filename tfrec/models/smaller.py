"""Smaller: a BERT with fewer layers, heads, neurons, channels or weights, as a student begins.

What stays is what would be missed most on given texts, and what is lost is made good as far as
linear algebra can do it: kernel after kernel, in the order in which the BERT computes, is fitted by
damped least squares, so that the smaller BERT has what is nearest to what the large one has in that
place. Which neurons and heads stay follows from the same least squares, one after another going
that the others replace best (Optimal Brain Surgeon: Hassibi & Stork 1993; for whole heads and
neurons: Kurtic et al. 2023, "ZipLM", arXiv:2302.04089).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tfrec.data.tokens import padded
from tfrec.errors import ConfigError, InputError
from tfrec.models.bert import Arrays, build_backbone, config_of, heads_of, tensors
from tfrec.models.int8 import Settle, Wide, settled
from tfrec.models.keras_bridge import tf
from tfrec.models.projection import Projection
from tfrec.models.pruning import Pattern
from tfrec.models.text import TextEncoder, pool

Floats = NDArray[np.float32]
Indices = NDArray[np.integer]
_Batch = tuple[NDArray[np.int32], NDArray[np.int32]]  # token ids and padding mask

_TOKENS = 16_384  # that are read, and
_FEW = 2048  # of them to choose layers by
_BATCH = 1024  # tokens of a batch
_DAMPING = 0.03  # of the mean of the diagonal
_SHARE = 16  # neurons go in so many steps
_APART = -1e9  # added to the attention to what is no token

_TABLES = tuple(
    f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")
)
_LAYER = "encoder.layer.{}."
_PARTS = tuple(f"attention.self.{part}" for part in ("query", "key", "value"))
_ATTENDED, _INNER, _FED = "attention.output.dense", "intermediate.dense", "output.dense"


def smaller(
    encoder: TextEncoder,
    texts: Sequence[str],
    *,
    layers: int | None = None,
    heads: int | None = None,
    neurons: int | None = None,
    width: int | None = None,
    vocabulary: int | None = None,
) -> TextEncoder:
    """A smaller encoder whose vectors are near to those of the given one, before any training.

    A layer that stays also does what it can of the layers after it that go. With ``width``, the
    channels are the main directions of the large BERT's, and a linear layer after the pooling
    brings vectors back to the width of the given encoder.

    Args:
      encoder: A trained one, which stays as it is. What adapters and prompts of
        :mod:`tfrec.models.tuning` add is not taken over; low-rank changes are.
      texts: Some hundred of the kind that will be read; a part, always the same, is used.
      layers: Transformer layers that stay; None here and below: as it is.
      heads: Attention heads that stay in each layer, of the size that they have; with ``width``
        as many as fit in it, if None.
      neurons: Feed-forward neurons that stay in each layer.
      width: Channels of the BERT.
      vocabulary: Tokens that stay: special ones and single characters, then those that the texts
        have most often, then the first of the vocabulary. Other words are cut into smaller pieces,
        so there is still no text that cannot be read.

    Returns:
      One that trains, with the settings and the output width of the given one.

    Raises:
      ConfigError: a number is not possible.
      InputError: there is no text, or a weight is not finite.
    """
    check(encoder, layers, heads, neurons, width, vocabulary)
    large = _Large(encoder, texts)
    backbone = encoder.model
    kept = list(range(backbone.num_layers))
    if layers is not None and layers < len(kept):
        kept = _kept_layers(_Large(encoder, texts, _FEW), layers)
    small = _Small(large, None if width is None else large.directions(width))
    for place, number in enumerate(kept):
        end = kept[place + 1] - 1 if place + 1 < len(kept) else int(backbone.num_layers) - 1
        small.add(number, end, heads, neurons)
    size = heads_of(backbone.transformer_layers[0])[1]
    config = config_of(backbone, encoder.settings.activation or "gelu_new")
    config["num_hidden_layers"] = len(kept)
    config["intermediate_size"] = neurons or int(backbone.intermediate_dim)
    if width is not None:
        config |= {"hidden_size": width, "num_attention_heads": width // size}
    room = range(config["num_attention_heads"])
    config["pruned_heads"] = {str(i): list(room[n:]) for i, n in enumerate(small.heads)}
    tokenizer = encoder.tokenizer
    if vocabulary is not None and vocabulary < tokenizer.vocabulary_size:
        words = _kept_words(encoder, texts, vocabulary)
        small.arrays[_TABLES[0]] = small.arrays[_TABLES[0]][words]
        config["vocab_size"], tokenizer = len(words), tokenizer.trimmed(words)
    made = build_backbone(config, small.arrays, backbone.dtype_policy)
    projection = large.projection if width is None else small.projection()
    return TextEncoder(made, tokenizer, encoder.settings, projection)


def inputs_of(encoder: TextEncoder, texts: Sequence[str]) -> dict[int, Floats]:
    """How large the inputs of the kernels of a BERT's layers are.

    Args:
      encoder: Whose.
      texts: Some hundred of the kind that will be read; a part, always the same, is used.

    Returns:
      id of the kernel's tf.Variable -> float32 (in,), the root mean square of each input.

    Raises:
      InputError: there is no text, or a weight is not finite.
    """
    large = _Large(encoder, texts)
    hidden, found = large.hidden, {}
    for number, layer in enumerate(encoder.model.transformer_layers):
        told, attention = large.layer(number, hidden), layer._self_attention_layer
        read = [
            (attention.query_dense, hidden),
            (attention.key_dense, hidden),
            (attention.value_dense, hidden),
            (attention.output_dense, told.mixed),
            (layer._feedforward_intermediate_dense, told.between),
            (layer._feedforward_output_dense, told.neurons),
        ]
        for dense, values in read:
            found[id(dense.kernel.value)] = np.sqrt(np.square(values).mean(axis=0))
        hidden = told.hidden
    return found


def sparse(
    encoder: TextEncoder, texts: Sequence[str], share: float, pattern: Pattern = "unstructured"
) -> TextEncoder:
    """The same encoder with zeros in the kernels of its layers, as near as it can be without
    training: what a zero costs is made good by the weights after it (SparseGPT: Frantar & Alistarh
    2023, arXiv:2301.00774).

    Args:
      encoder: As for :func:`smaller`.
      texts: As for :func:`smaller`.
      share: Of the weights of each kernel.
      pattern: See :class:`tfrec.models.pruning.Sparsity`.

    Raises:
      InputError: there is no text, or a weight is not finite.
    """
    large = _Large(encoder, texts)
    arrays, hidden = large.arrays, large.hidden
    for number in range(int(encoder.model.num_layers)):
        name = _LAYER.format(number)

        def thin(part: str, values: Floats, name: str = name) -> None:
            kernel = arrays[f"{name}{part}.weight"].T
            arrays[f"{name}{part}.weight"] = thinned(kernel, values, share, pattern).T

        for part in _PARTS:
            thin(part, hidden)
        thin(_ATTENDED, large.layer(number, hidden).mixed)
        thin(_INNER, large.layer(number, hidden).between)
        thin(_FED, large.layer(number, hidden).neurons)
        hidden = large.layer(number, hidden).hidden
    backbone = encoder.model
    config = config_of(backbone, encoder.settings.activation or "gelu_new")
    made = build_backbone(config, arrays, backbone.dtype_policy)
    return TextEncoder(made, encoder.tokenizer, encoder.settings, large.projection)


def thinned(kernel: Floats, values: Floats, share: float, pattern: Pattern) -> Floats:
    """A kernel with zeros whose product with values changes little.

    Args:
      kernel: float32 (in, out).
      values: float32 (n, in), inputs.
      share: Of the weights, rounded down in each block of rows.
      pattern: See :func:`sparse`.
    """

    def settle(block: slice, rest: Wide, spread: Wide) -> Settle:
        kept = _kept(np.square(rest / spread), share, pattern)
        return lambda place, row: np.where(kept[place - block.start], row, 0)

    gram = values.T.astype(np.float64) @ values
    return settled(kernel, gram, settle).astype(np.float32)


def _kept(worth: Wide, share: float, pattern: Pattern) -> NDArray[np.bool_]:
    """Which weights (rows, out) of a block stay, those that are worth most."""
    rows, columns = worth.shape
    if pattern == "2:4":
        fours = np.full((-(-rows // 4) * 4, columns), -1.0)
        fours[:rows] = worth
        order = np.argsort(np.argsort(fours.reshape(-1, 4, columns), axis=1), axis=1)
        return (order >= 2).reshape(-1, columns)[:rows]
    if pattern == "block":
        padded_ = np.pad(worth, ((0, 0), (0, -columns % 4)))
        worth = padded_.reshape(rows, -1, 4).mean(axis=2)
    gone = np.argsort(worth, axis=None, kind="stable")[: int(share * worth.size)]
    kept = ~np.isin(np.arange(worth.size), gone).reshape(worth.shape)
    return np.repeat(kept, 4, axis=1)[:, :columns] if pattern == "block" else kept


def check(
    encoder: TextEncoder,
    layers: int | None,
    heads: int | None,
    neurons: int | None,
    width: int | None,
    vocabulary: int | None,
) -> None:
    """Raises ConfigError if :func:`smaller` cannot do this."""
    teacher = encoder.model
    found = [heads_of(layer) for layer in teacher.transformer_layers]
    size = found[0][1]
    most = {
        "layers": (layers, int(teacher.num_layers)),
        "heads": (heads, min(count for count, _ in found)),
        "neurons": (neurons, int(teacher.intermediate_dim)),
        "width": (width, int(teacher.hidden_dim)),
    }
    for name, (value, largest) in most.items():
        if value is not None and not 1 <= value <= largest:
            raise ConfigError(f"{name} = {value} is not possible: this BERT has 1 to {largest}")
    if vocabulary is not None:
        tokenizer = encoder.tokenizer
        smallest, largest = len(tokenizer.least), tokenizer.vocabulary_size
        if not smallest <= vocabulary <= largest:
            raise ConfigError(
                f"vocabulary = {vocabulary} is not possible: this BERT has {largest} tokens, of "
                f"which {smallest} are single characters or special ones, which stay"
            )
    if width is None:
        return
    if width % size:
        raise ConfigError(
            f"width = {width} is not a multiple of {size}, the size of this BERT's heads"
        )
    if heads is not None and heads > width // size:
        raise ConfigError(
            f"heads = {heads} of size {size} do not fit in width = {width}; "
            f"take {width // size} or fewer"
        )
    if encoder.settings.pooling == "max":
        raise ConfigError("width needs a linear layer, and none can follow max pooling")


class _Layer(NamedTuple):
    """What a layer computes of n tokens, each float32 (n, its width).

    Attributes:
      parts: Queries, keys and values.
      mixed: What attention reads, head by head.
      attended: With what was there before, before its norm.
      between: After it.
      inner: The feed-forward neurons, before their activation.
      neurons: After it.
      fed: With what was there before, before its norm.
      hidden: After it: what the layer gives.
    """

    parts: tuple[Floats, ...]
    mixed: Floats
    attended: Floats
    between: Floats
    inner: Floats
    neurons: Floats
    fed: Floats
    hidden: Floats


class _Large:
    """The large BERT over the tokens of some texts, one row each and none of padding.

    Attributes:
      arrays: Its weights, by Hugging Face's names.
      projection: Its linear layer after the pooling, or None.
      summed: float32 (n, width), words and places before their norm.
      hidden: float32 (n, width), after it.
    """

    def __init__(self, encoder: TextEncoder, texts: Sequence[str], tokens: int = _TOKENS) -> None:
        self.backbone, self.settings = encoder.model, encoder.settings
        self.arrays = tensors(encoder.model)
        if not all(np.isfinite(array).all() for array in self.arrays.values()):
            raise InputError("the text model holds weights that are not finite; train it again")
        dense = encoder.projection
        self.projection = None if dense is None else Projection(*dense.get_weights())
        self.epsilon = float(encoder.model.embeddings_layer_norm.epsilon)
        self._batches = list(_batches(encoder, texts, tokens))
        ids = np.concatenate([ids[mask > 0] for ids, mask in self._batches])
        places = np.concatenate([np.nonzero(mask)[1] for _, mask in self._batches])
        words, positions, kinds = (self.arrays[name] for name in _TABLES)
        self.summed = words[ids] + positions[places] + kinds[0]
        self.hidden = self.norm(self.summed, "embeddings.LayerNorm")

    def norm(self, values: Floats, name: str) -> Floats:
        """A layer norm."""
        scale, shift = self.arrays[f"{name}.weight"], self.arrays[f"{name}.bias"]
        return _normed(values, self.epsilon) * scale + shift

    def layer(self, number: int, hidden: Floats) -> _Layer:
        """What a layer makes of what it is given."""
        name = _LAYER.format(number)
        dense = functools.partial(_dense, self.arrays)
        parts = tuple(dense(name + part, hidden) for part in _PARTS)
        mixed = self.mixed(number, *parts)
        attended = hidden + dense(name + _ATTENDED, mixed)
        between = self.norm(attended, f"{name}attention.output.LayerNorm")
        inner = dense(name + _INNER, between)
        neurons = self.activated(number, inner)
        fed = between + dense(name + _FED, neurons)
        after = self.norm(fed, f"{name}output.LayerNorm")
        return _Layer(parts, mixed, attended, between, inner, neurons, fed, after)

    def mixed(self, number: int, query: Floats, key: Floats, value: Floats) -> Floats:
        """What the heads read, each (n, heads * size) as the queries are."""
        size = heads_of(self.backbone.transformer_layers[number])[1]
        found, start = np.empty_like(query), 0
        for _, mask in self._batches:
            stop = start + int(mask.sum())
            q, k, v = (
                tf.constant(_spread(part[start:stop], mask, size)) for part in (query, key, value)
            )
            apart = np.where(mask[:, None, None] > 0, np.float32(0), np.float32(_APART))
            scores = tf.nn.softmax(tf.matmul(q, k, transpose_b=True) * size**-0.5 + apart)
            read = tf.transpose(tf.matmul(scores, v), [0, 2, 1, 3]).numpy()
            found[start:stop] = read[mask > 0].reshape(stop - start, -1)
            start = stop
        return found

    def activated(self, number: int, inner: Floats) -> Floats:
        """The activation of the feed-forward neurons."""
        dense = self.backbone.transformer_layers[number]._feedforward_intermediate_dense
        return np.asarray(dense.activation(tf.constant(inner)), np.float32)

    def vectors(self, hidden: Floats) -> Floats:
        """float32 (texts, width) of length 1."""
        found, start = [], 0
        for _, mask in self._batches:
            stop = start + int(mask.sum())
            spread = _spread(hidden[start:stop], mask, hidden.shape[1])[:, 0]
            found.append(pool(tf.constant(spread), mask, self.settings.pooling).numpy())
            start = stop
        vectors: Floats = np.concatenate(found)
        if self.projection is not None:
            vectors = vectors @ self.projection.kernel + self.projection.bias
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def directions(self, width: int) -> Floats:
        """float32 (all channels, width): the main directions of what the layer norms read."""
        seen, hidden = np.cov(self.summed, rowvar=False), self.hidden
        for number in range(int(self.backbone.num_layers)):
            layer = self.layer(number, hidden)
            seen += np.cov(layer.attended, rowvar=False) + np.cov(layer.fed, rowvar=False)
            hidden = layer.hidden
        main: Floats = np.linalg.eigh(seen)[1][:, -width:].astype(np.float32)
        return main


class _Small:
    """The small BERT, made layer by layer beside the large one on the same tokens.

    Args:
      large: The large one.
      directions: float32 (its channels, channels): what the channels here are; None: the same.

    Attributes:
      arrays: Its weights, by Hugging Face's names.
      heads: Heads of each layer that it has.
    """

    def __init__(self, large: _Large, directions: Floats | None) -> None:
        self._large, self._directions = large, directions
        self._told, self._hidden = large.hidden, large.hidden  # of the large and of this one
        self._next = 0  # layer of the large one
        self._same = directions is None
        self.heads: list[int] = []
        self.arrays = {name: self._turned(large.arrays[name]) for name in _TABLES}
        name = "embeddings.LayerNorm"
        self._norm(name, name, self._turned(large.summed), large.hidden)
        if directions is None:
            pooler = {k: v for k, v in large.arrays.items() if k.startswith("pooler.")}
            self.arrays |= pooler

    def add(self, number: int, end: int, heads: int | None, neurons: int | None) -> None:
        """Adds a layer made of that number of the large one, to stand for those up to ``end``."""
        large, name, old = self._large, _LAYER.format(len(self.heads)), _LAYER.format(number)
        while self._next < number:  # before the first layer that stays
            self._told, self._same = large.layer(self._next, self._told).hidden, False
            self._next += 1
        told = large.layer(number, self._told)
        count, size = heads_of(large.backbone.transformer_layers[number])
        room = count if self._directions is None else self._directions.shape[1] // size
        self.heads.append(min(count, room) if heads is None else heads)
        rows = self._staying(old + _ATTENDED, told.mixed, self.heads[-1], size)
        parts = (
            self._read(name + part, old + part, values, rows)
            for part, values in zip(_PARTS, told.parts, strict=True)
        )
        mixed = large.mixed(number, *parts)
        self._same = self._same and len(rows) == told.mixed.shape[1]
        summed = self._write(name + _ATTENDED, old + _ATTENDED, mixed, rows, told.attended)
        norm = "attention.output.LayerNorm"
        self._norm(name + norm, old + norm, summed, told.between)
        count = told.neurons.shape[1]
        rows = self._staying(old + _FED, told.neurons, count if neurons is None else neurons, 1)
        inner = self._read(name + _INNER, old + _INNER, told.inner, rows)
        last, self._same = told, self._same and len(rows) == count
        for later in range(number + 1, end + 1):
            last, self._same = large.layer(later, last.hidden), False
        target = last.fed if last is told else _scaled(last.fed, told.fed)
        values = large.activated(number, inner)
        summed = self._write(name + _FED, old + _FED, values, rows, target)
        norm = "output.LayerNorm"
        self._norm(name + norm, _LAYER.format(end) + norm, summed, last.hidden)
        self._told, self._next = last.hidden, end + 1

    def projection(self) -> Projection:
        """What brings vectors back to those of the large BERT, its own projection included."""
        assert self._directions is not None
        kernel, bias = _fitted(self._hidden, self._told, self._directions.T)
        after = self._large.projection
        if after is None:
            return Projection(kernel, bias)
        return Projection(kernel @ after.kernel, bias @ after.kernel + after.bias)

    def _turned(self, values: Floats) -> Floats:
        """Channels of the large BERT, the last axis, as channels of this one."""
        return values if self._directions is None else values @ self._directions

    def _put(self, name: str, weight: Floats, bias: Floats) -> None:
        self.arrays |= {f"{name}.weight": weight, f"{name}.bias": bias}

    def _staying(self, old: str, values: Floats, count: int, size: int) -> Indices:
        """Which inputs of a kernel stay."""
        return staying(values, self._turned(self._large.arrays[f"{old}.weight"].T), count, size)

    def _read(self, name: str, old: str, told: Floats, columns: Indices) -> Floats:
        """Adds a kernel that reads all channels, and returns what it gives."""
        arrays = self._large.arrays
        kernel, bias = arrays[f"{old}.weight"].T[:, columns], arrays[f"{old}.bias"][columns]
        if self._directions is not None:
            kernel = self._directions.T @ kernel
        if not self._same:
            kernel, bias = _fitted(self._hidden, told[:, columns], kernel)
        self._put(name, kernel.T, bias)
        return self._hidden @ kernel + bias

    def _write(self, name: str, old: str, values: Floats, rows: Indices, target: Floats) -> Floats:
        """Adds a kernel that gives all channels, and returns what the next norm reads."""
        arrays = self._large.arrays
        kernel = self._turned(arrays[f"{old}.weight"].T[rows])
        bias = self._turned(arrays[f"{old}.bias"])
        if not self._same:
            kernel, bias = _fitted(values, self._turned(target) - self._hidden, kernel)
        self._put(name, kernel.T, bias)
        return self._hidden + values @ kernel + bias

    def _norm(self, name: str, old: str, summed: Floats, target: Floats) -> None:
        """Adds a layer norm."""
        arrays, values = self._large.arrays, _normed(summed, self._large.epsilon)
        scale, shift = arrays[f"{old}.weight"], arrays[f"{old}.bias"]
        if self._directions is not None:
            target = self._turned(target)
            mean = values.mean(0)
            spread = np.square(values - mean).mean(0)
            scale = ((values - mean) * target).mean(0) / np.maximum(spread, 1e-12)
            shift = target.mean(0) - mean * scale
        self._put(name, scale, shift)
        self._hidden = values * scale + shift


def staying(values: Floats, kernel: Floats, count: int, size: int = 1) -> Indices:
    """Which inputs of a kernel are missed most, if the others are fitted again without them.

    Args:
      values: float32 (n, in), inputs.
      kernel: float32 (in, out).
      count: How many groups stay.
      size: Inputs in a group, which are neighbours and stay or go together.

    Returns:
      Their places, int (count * size,), in their order.
    """
    groups = np.arange(values.shape[1]).reshape(-1, size)
    if count == len(groups):
        return groups.ravel()
    inverse = np.linalg.inv(_damped(values - values.mean(0)))
    rest = kernel.astype(np.float64)
    step = max(len(groups) // _SHARE, 1)
    while len(groups) > count:
        places = np.arange(len(inverse)).reshape(-1, size)
        own = inverse[places[:, :, None], places[:, None, :]]
        lost = (rest[places] * np.linalg.solve(own, rest[places])).sum(axis=(1, 2))
        order = np.argsort(lost, kind="stable")
        out = min(step, len(groups) - count)
        gone, kept = places[order[:out]].ravel(), places[np.sort(order[out:])].ravel()
        share = np.linalg.solve(inverse[np.ix_(gone, gone)], inverse[np.ix_(gone, kept)])
        rest = rest[kept] - share.T @ rest[gone]
        inverse = inverse[np.ix_(kept, kept)] - inverse[np.ix_(kept, gone)] @ share
        groups = groups[np.sort(order[out:])]
    return groups.ravel()


def _fitted(values: Floats, target: Floats, start: Floats) -> tuple[Floats, Floats]:
    """Kernel (in, out) and bias that bring values (n, in) nearest to a target (n, out).

    Damped least squares: in directions that the values hardly have, the kernel stays as it starts.
    """
    means = values.mean(0), target.mean(0)
    centred = values - means[0]
    left = (target - means[1]) - centred @ start
    change = np.linalg.solve(_damped(centred), (centred.T @ left).astype(np.float64))
    kernel = (start + change).astype(np.float32)
    return kernel, means[1] - means[0] @ kernel


def _damped(centred: Floats) -> NDArray[np.float64]:
    gram = (centred.T @ centred).astype(np.float64)
    return gram + max(_DAMPING * float(np.diag(gram).mean()), 1e-12) * np.eye(len(gram))


def _normed(values: Floats, epsilon: float) -> Floats:
    centred = values - values.mean(-1, keepdims=True)
    found: Floats = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + epsilon)
    return found


def _scaled(values: Floats, like: Floats) -> Floats:
    """Rows that a layer norm takes for ``values``, moved and scaled to be near to others."""
    mean = like.mean(-1, keepdims=True)
    centred = values - values.mean(-1, keepdims=True)
    scale = (centred * (like - mean)).sum(-1, keepdims=True)
    found: Floats = mean + centred * (scale / np.square(centred).sum(-1, keepdims=True))
    return found


def _dense(arrays: Arrays, name: str, values: Floats) -> Floats:
    return values @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"]


def _kept_layers(large: _Large, count: int) -> list[int]:
    """Numbers of the layers that stay: one after another goes that turns the vectors least."""

    def vectors(numbers: Sequence[int]) -> Floats:
        hidden = large.hidden
        for number in numbers:
            hidden = large.layer(number, hidden).hidden
        return large.vectors(hidden)

    kept = list(range(int(large.backbone.num_layers)))
    whole = vectors(kept)
    while len(kept) > count:
        near = [(vectors([k for k in kept if k != out]) * whole).sum(1).mean() for out in kept]
        del kept[int(np.argmax(near))]
    return kept


def _kept_words(encoder: TextEncoder, texts: Sequence[str], count: int) -> list[int]:
    """Ids of the tokens that stay, in their order."""
    tokenizer = encoder.tokenizer
    met = np.zeros(tokenizer.vocabulary_size, np.int64)
    for row in tokenizer.ids(encoder.settings.prepared(list(dict.fromkeys(texts)), "")):
        np.add.at(met, row, 1)
    met[list(tokenizer.least)] = np.iinfo(np.int64).max
    return sorted(np.argsort(-met, kind="stable")[:count].tolist())


def _batches(encoder: TextEncoder, texts: Sequence[str], tokens: int) -> Iterator[_Batch]:
    """Some of the texts, always the same, in batches of about the same length."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        raise InputError("a smaller BERT is chosen by texts, and there are none")
    chosen = np.random.default_rng(0).permutation(len(distinct))[:tokens].tolist()
    given = encoder.settings.prepared([distinct[i] for i in chosen], "")
    rows = list(encoder.tokenizer.ids(given))
    held = int(np.searchsorted(np.cumsum([len(row) for row in rows]), tokens)) + 1
    rows = sorted(rows[:held], key=len, reverse=True)
    while rows:
        count = max(_BATCH // len(rows[0]), 1)
        yield padded(rows[:count])
        rows = rows[count:]


def _spread(values: Floats, mask: NDArray[np.int32], size: int) -> Floats:
    """float32 (texts, heads, tokens, size) of the values of a batch's tokens."""
    found = np.zeros((*mask.shape, values.shape[1]), np.float32)
    found[mask > 0] = values
    return found.reshape(*mask.shape, -1, size).transpose(0, 2, 1, 3)
