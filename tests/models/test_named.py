"""named: weights by name."""

from __future__ import annotations

import numpy as np
import pytest

from tfrec.config import RankingConfig, RetrievalConfig
from tfrec.errors import ArtifactError
from tfrec.models.named import assign, named_variables, read, save
from tfrec.models.ranking import Ranker
from tfrec.models.retrieval import TwoTower


def _model() -> TwoTower:
    return TwoTower(
        RetrievalConfig(embedding_dim=8, history=4, layers=1),
        np.ones((5, 6), np.float32),
        np.zeros((5, 3), np.float32),
    )


def test_every_trainable_weight_has_one_name_and_nothing_else_has() -> None:
    model = _model()
    named = named_variables(model)
    assert {id(v) for v in named.values()} == {id(v) for v in model.trainable_variables}
    assert "query_tower.encoder.blocks.0.qkv.kernel" in named
    assert list(named) == list(named_variables(_model()))


def test_inner_layers_that_others_keep_private_are_weights_too() -> None:
    """Such as those of the cross layers of TensorFlow Recommenders."""
    ranker = Ranker(
        RankingConfig(hidden=4, experts=2),
        embedding_dim=4,
        attributes_width=2,
        user_attributes_width=1,
        num_scalars=3,
    )
    named = named_variables(ranker)
    assert {id(v) for v in ranker.trainable_variables} <= {id(v) for v in named.values()}
    assert any("cross" in name for name in named)


def test_weights_come_back_to_the_bit(tmp_path) -> None:
    model, other = _model(), _model()
    save(tmp_path / "w.safetensors", named_variables(model))
    assign(named_variables(other), read(tmp_path / "w.safetensors"), "the file")
    for name, variable in named_variables(other).items():
        np.testing.assert_array_equal(variable.numpy(), named_variables(model)[name].numpy())


def test_a_name_or_shape_that_does_not_fit_changes_nothing() -> None:
    named = named_variables(_model())
    before = {name: v.numpy() for name, v in named.items()}
    good = {"candidate_tower.ids": np.ones((5, 8), np.float32)}
    with pytest.raises(ArtifactError, match="the file has a weight 'nothing'"):
        assign(named, {**good, "nothing": np.zeros(3, np.float32)}, "the file")
    with pytest.raises(ArtifactError, match=r"'candidate_tower.text.kernel' is \(3,\)"):
        assign(named, {**good, "candidate_tower.text.kernel": np.zeros(3)}, "the file")
    for name, variable in named.items():
        np.testing.assert_array_equal(variable.numpy(), before[name])


def test_a_damaged_file_is_named(tmp_path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(ArtifactError, match=r"w\.safetensors cannot be read"):
        read(tmp_path / "w.safetensors")
