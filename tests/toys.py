"""Small data and small two-towers for the tests of training."""

import numpy as np

from tfrec.config import RetrievalConfig
from tfrec.data.interactions import Interactions
from tfrec.data.sequences import EventCoding, Histories, PackedSequences


def make_interactions(
    lengths: list[int], items: int = 12, seed: int = 0, names: tuple[str, ...] = ("view", "buy")
) -> Interactions:
    """Random events of users with the given history lengths; timestamps rise by 0 to 9 days."""
    rng = np.random.default_rng(seed)
    count = sum(lengths)
    user = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return Interactions(
        user=user,
        item=rng.integers(1, items + 1, count).astype(np.int32),
        timestamp=1_600_000_000 + np.cumsum(rng.integers(0, 10 * 86_400, count)).astype(np.int64),
        event=rng.integers(0, len(names), count).astype(np.int8),
        rating=np.where(rng.random(count) < 0.8, rng.integers(1, 6, count), np.nan).astype("f4"),
        weight=rng.choice(np.array([0.5, 1.0, 2.0], np.float32), count),
        split=np.zeros(count, np.int8),
        num_users=len(lengths),
        event_names=names,
    )


def make_histories(lengths: list[int], items: int = 12, seed: int = 0) -> Histories:
    events = make_interactions(lengths, items, seed)
    return Histories.of(events, EventCoding.of(events))


def make_packed(
    lengths: list[int], length: int = 8, items: int = 12, seed: int = 0
) -> PackedSequences:
    events = make_interactions(lengths, items, seed)
    return PackedSequences(Histories.of(events, EventCoding.of(events)), events.weight, length, 5)


LENGTHS = [9, 3, 0, 1, 14, 5, 7, 2, 30, 4, 6, 8] * 3


def make_batches(batch_size=8, replicas=1, sampled=None, lengths=None, profile_width=0, **settings):
    """TrainingBatches over 36 users and 12 items, rows of 8 places, users of two attributes."""
    from tfrec.models.batches import TrainingBatches

    lengths = LENGTHS if lengths is None else lengths
    rng = np.random.default_rng(1)
    return TrainingBatches(
        make_packed(lengths),
        batch_size,
        profile=np.zeros((len(lengths), profile_width), np.float32),
        attributes=rng.normal(size=(len(lengths), 2)).astype(np.float32),
        sampled=sampled,
        replicas=replicas,
        **settings,
    )


def small_config(**settings) -> RetrievalConfig:
    """8 wide, one block, everything random off; settings replace any of it."""
    return RetrievalConfig(
        **{
            "embedding_dim": 8,
            "layers": 1,
            "heads": 2,
            "history": 8,
            "dropout": 0.0,
            "id_dropout": 0.0,
            "batch_size": 8,
            "ema": 0.0,
            "warmup_steps": 1,
            "learning_rate": 0.01,
            **settings,
        }
    )


def make_two_tower(
    config: RetrievalConfig | None = None,
    items: int = 12,
    seed: int = 3,
    text_width: int = 5,
    **more,
):
    """A TwoTower over random texts and attributes (2 wide), equal for equal seeds."""
    from tfrec.models.keras_bridge import set_seed
    from tfrec.models.retrieval import TwoTower

    set_seed(seed)
    rng = np.random.default_rng(2)
    text = rng.normal(size=(items + 1, text_width)).astype(np.float32)
    attributes = rng.normal(size=(items + 1, 2)).astype(np.float32)
    text[0] = attributes[0] = 0
    return TwoTower(
        config or small_config(),
        text,
        attributes,
        EventCoding(("view", "buy"), 1.0, 5.0),
        user_attributes_width=2,
        **more,
    )
