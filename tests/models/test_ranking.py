from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from tfrec.config import TASKS, RankingConfig
from tfrec.data.interactions import Interactions
from tfrec.data.sequences import EventCoding, Histories
from tfrec.errors import ConfigError, InputError
from tfrec.models import keras_bridge
from tfrec.models.exposures import ranking_batches
from tfrec.models.keras_bridge import tf, tf_keras
from tfrec.models.named import named_variables
from tfrec.models.ranking import (
    GatedExperts,
    GatedFusion,
    Ranker,
    TargetAttention,
    product_cross_entropy,
)

CONFIG = RankingConfig(batch_size=32, negatives=3, history=5, hidden=8, experts=2, dropout=0.0)
WIDTHS = {
    "embedding_dim": 6,
    "attributes_width": 2,
    "user_attributes_width": 1,
    "num_scalars": 2,
    "text_width": 3,
    "profile_width": 3,
}


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    tf_keras.utils.set_random_seed(3)


def ranker(tasks: tuple[str, ...] = TASKS, **changes: Any) -> Ranker:
    arguments = WIDTHS | {"rating_mean": 3.5, "rating_std": 1.2} | changes
    config = arguments.pop("config", CONFIG)
    return Ranker(config, tasks=tasks, **arguments)


def inputs(rows: int = 4, columns: int = 3, seed: int = 0, **widths: int) -> dict[str, Any]:
    """Random inputs and labels of the given numbers of users and candidates."""
    w = WIDTHS | widths
    generator = np.random.default_rng(seed)
    shapes = {
        "query": (rows, w["embedding_dim"]),
        "history": (rows, CONFIG.history, w["embedding_dim"]),
        "candidates": (rows, columns, w["embedding_dim"]),
        "attributes": (rows, columns, w["attributes_width"]),
        "user_attributes": (rows, w["user_attributes_width"]),
        "text": (rows, columns, w["text_width"]),
        "profile": (rows, w["profile_width"]),
        "scalars": (rows, columns, w["num_scalars"]),
    }
    out = {name: generator.normal(size=shape) for name, shape in shapes.items()}
    out["history_mask"] = np.arange(CONFIG.history) >= generator.integers(0, 5, (rows, 1))
    for task in TASKS:
        out[f"label_{task}"] = generator.integers(0, 2, (rows, columns))
    for task in ("like", "rating"):
        out[f"mask_{task}"] = generator.integers(0, 2, (rows, columns))
    out["weight"], out["denominator"] = np.ones(rows), np.array([rows])
    return {name: tf.constant(value, tf.float32) for name, value in out.items()}


def fused(fusion: str = "mmoe", **changes: Any) -> RankingConfig:
    return RankingConfig.model_validate(CONFIG.model_dump() | {"fusion": fusion} | changes)


FUSIONS = ("linear", "gated", "mmoe")


def off_zero(model: Ranker) -> None:
    """Gives a linear fusion, which starts from zero, weights."""
    if model.config.fusion == "linear":
        kernel = model.fusion.logits.kernel
        kernel.assign(tf.random.normal(kernel.shape))


def outputs(model: Ranker, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {task: values.numpy() for task, values in model(given).items()}


def assert_same(one: Mapping[str, Any], other: Mapping[str, Any], tolerance: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_allclose(values, other[name], rtol=tolerance, atol=tolerance)


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of pairs of a positive and a negative in which the positive scores higher."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    return float((positive[:, None] > negative[None]).mean())


def by_topic(users: int, seed: int) -> Interactions:
    """Each user takes items of one topic only (row modulo 3) and gives even rows 5, odd ones 2."""
    generator = np.random.default_rng(seed)
    topic = generator.integers(0, 3, users)
    item = np.concatenate([1 + t + 3 * generator.permutation(20)[:8] for t in topic])
    n = len(item)
    return Interactions(
        user=np.repeat(np.arange(users), 8).astype(np.int32),
        item=item.astype(np.int32),
        timestamp=np.zeros(n, np.int64),
        event=generator.integers(0, 2, n).astype(np.int8),
        rating=np.where(item % 2 == 0, 5, 2).astype(np.float32),
        weight=np.ones(n, np.float32),
        split=np.zeros(n, np.int8),
        num_users=users,
        event_names=("view", "purchase"),
    )


def batches_by_topic(users: int, seed: int) -> Any:
    """Candidates show their topic and parity; queries and scalars say nothing of use."""
    events = by_topic(users, seed)
    rows = np.arange(61)
    vectors = np.eye(6, dtype=np.float32)[(rows - 1) % 3]
    vectors += np.random.default_rng(0).normal(0, 0.3, vectors.shape).astype(np.float32)
    return ranking_batches(
        CONFIG,
        histories=Histories.of(events, EventCoding.of(events)),
        interactions=events,
        vectors=vectors,
        query_vectors_of=lambda users, histories, times: np.zeros((len(users), 6), np.float32),
        hard=None,
        attributes=np.stack([rows % 2, rows * 0], axis=1).astype(np.float32),
        user_attributes=np.zeros((users, 1), np.float32),
        text=np.zeros((61, 3), np.float32),
        profile=np.zeros((users, 3), np.float32),
        scalars_of=lambda users, query, histories, rows: np.ones((*rows.shape, 2), np.float32),
        seed=seed,
        tasks=TASKS,
    )


def test_a_rule_is_learned_and_holds_for_unseen_users():
    training = batches_by_topic(users=120, seed=1)
    model = ranker()
    model.adapt_scalars(training.sample_scalars())
    model.compile(optimizer=tf_keras.optimizers.Adam(0.01, jit_compile=False))
    steps = training.steps_per_epoch
    losses = model.fit(training.dataset(), epochs=4, steps_per_epoch=steps, verbose=0).history
    assert losses["loss"][-1] < 0.7 * losses["loss"][0]

    clicks, likes, ratings = [], [], []
    for batch in batches_by_topic(users=60, seed=2).dataset().take(8):
        found = outputs(model, batch)
        label = {name: values.numpy() for name, values in batch.items()}
        clicks.append((found["click"].ravel(), label["label_click"].ravel()))
        likes.append((found["like"][:, 0], label["label_like"][:, 0]))
        ratings.append(found["rating"][:, 0] - label["label_rating"][:, 0])
    # Half of a user's topic he has not seen: a third of the negatives look like positives.
    assert auc(*map(np.concatenate, zip(*clicks, strict=True))) > 0.8
    assert auc(*map(np.concatenate, zip(*likes, strict=True))) > 0.97
    assert np.sqrt(np.mean(np.concatenate(ratings) ** 2)) < 0.5


def test_a_compiled_training_step_does_what_eager_execution_says():
    model, batch = ranker(), inputs()
    before = model.get_weights()
    with tf.GradientTape() as tape:
        loss = model.compute_loss(batch, training=True)
    gradients = tape.gradient(loss, model.trainable_variables)
    rate = 0.1
    model.compile(optimizer=tf_keras.optimizers.SGD(rate, jit_compile=False), jit_compile=True)
    logs = model.fit(tf.data.Dataset.from_tensors(batch), verbose=0).history
    np.testing.assert_allclose(logs["loss"], [loss], rtol=1e-5)
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        place = next(i for i, v in enumerate(model.weights) if v is variable)
        expected = before[place] - rate * tf.convert_to_tensor(gradient).numpy()
        np.testing.assert_allclose(variable, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("weighting", ["fixed", "uncertainty"])
def test_every_weight_is_there_from_the_start_and_learns(fusion, weighting):
    model = ranker(config=fused(fusion, task_weighting=weighting))
    off_zero(model)
    names = len(model.variables)
    with tf.GradientTape() as tape:
        loss = model.compute_loss(inputs(rows=16), training=True)
    gradients = tape.gradient(loss, model.trainable_variables)
    assert len(model.variables) == names
    still = [
        v.name
        for v, g in zip(model.trainable_variables, gradients, strict=True)
        if g is None or not np.any(tf.convert_to_tensor(g))
    ]
    assert still == []


def test_outputs_are_probabilities_and_stars_of_each_candidate():
    found = outputs(ranker(), inputs(rows=5, columns=7))
    assert {task: (a.shape, str(a.dtype)) for task, a in found.items()} == dict.fromkeys(
        TASKS, ((5, 7), "float32")
    )
    for task in ("click", "like", "conversion"):
        assert ((found[task] > 0) & (found[task] < 1)).all()


def test_conversion_is_the_probability_of_a_click_times_that_of_a_conversion_after_it():
    model, batch = ranker(), inputs()
    logits = {task: v.numpy().astype(float) for task, v in model._logits(batch, False).items()}
    click, after = (1 / (1 + np.exp(-logits[task])) for task in ("click", "conversion"))
    np.testing.assert_allclose(outputs(model, batch)["conversion"], click * after, rtol=1e-5)


def test_the_conversion_loss_is_the_cross_entropy_of_the_product():
    first, second = np.meshgrid(np.linspace(-4, 4, 9), np.linspace(-4, 4, 9))
    p = 1 / (1 + np.exp(-first)) / (1 + np.exp(-second))
    for label, expected in ((1.0, -np.log(p)), (0.0, -np.log(1 - p))):
        found = product_cross_entropy(
            label, tf.constant(first, tf.float32), tf.constant(second, tf.float32)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_the_conversion_loss_is_finite_for_extreme_logits(label):
    first, second = (tf.constant(v, tf.float32) for v in ([90, 90, -90, -90], [90, -90, 90, -90]))
    with tf.GradientTape() as tape:
        tape.watch([first, second])
        loss = product_cross_entropy(label, first, second)
    assert np.isfinite(loss).all()
    assert np.isfinite(tape.gradient(loss, [first, second])).all()


def test_a_label_behind_a_mask_does_not_matter():
    model, batch = ranker(), inputs()
    loss = model.compute_loss(batch)
    for task in ("like", "rating"):
        known = batch[f"mask_{task}"]
        label = batch[f"label_{task}"]
        behind = batch | {f"label_{task}": label + 50 * (1 - known)}
        before = batch | {f"label_{task}": label + 50 * known}
        assert model.compute_loss(behind) == loss
        assert model.compute_loss(before) != loss


def test_the_loss_is_a_mean_over_examples_of_sums_over_exposures():
    model, batch = ranker(("click", "rating")), inputs(rows=2)
    found = outputs(model, batch)
    label = {name: a.numpy() for name, a in batch.items()}
    click = np.where(label["label_click"] == 1, -np.log(found["click"]), -np.log1p(-found["click"]))
    rating = ((found["rating"] - label["label_rating"]) / 1.2) ** 2 * label["mask_rating"]
    np.testing.assert_allclose(model.compute_loss(batch), (click + rating).sum() / 2, rtol=1e-5)


def test_the_losses_of_replicas_add_up_to_that_of_the_batch():
    model, batch = ranker(), inputs(rows=6)
    parts = [
        {n: v if n == "denominator" else v[start : start + 2] for n, v in batch.items()}
        for start in (0, 2, 4)
    ]
    total = sum(model.compute_loss(part) for part in parts)
    np.testing.assert_allclose(total, model.compute_loss(batch), rtol=1e-5)


def test_a_row_without_weight_does_not_matter():
    model, batch = ranker(), inputs(rows=3)
    batch["weight"], batch["denominator"] = tf.constant([1.0, 1.0, 0.0]), tf.constant([2.0])
    two = {name: a if name == "denominator" else a[:2] for name, a in batch.items()}
    np.testing.assert_allclose(model.compute_loss(batch), model.compute_loss(two), rtol=1e-5)


def test_gradients_gathered_in_pieces_are_those_of_the_whole_batch():
    model, batch = ranker(), inputs(rows=6)
    model.compile(optimizer=tf_keras.optimizers.SGD())
    loss, whole = model._gradients(batch)
    model.accumulate = 3
    in_pieces, pieces = model._gradients(batch)
    np.testing.assert_allclose(loss, in_pieces, rtol=1e-5)
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_padding_of_the_history_does_not_matter():
    model, batch = ranker(), inputs()
    noise = 100 * (1 - batch["history_mask"])[:, :, None]
    assert_same(
        outputs(model, batch), outputs(model, batch | {"history": batch["history"] + noise})
    )


def test_padding_after_the_events_is_the_same_as_before_them():
    layer = TargetAttention(5)
    candidates, events = tf.random.normal([1, 2, 6]), tf.random.normal([1, 3, 6])
    padding = tf.zeros([1, 2, 6])
    before = layer(candidates, tf.concat([padding, events], 1), tf.constant([[0.0, 0, 1, 1, 1]]))
    layer.recency.assign([0.5, -1.0, 0.3, 9.0, 9.0])
    after = layer(candidates, tf.concat([events, padding], 1), tf.constant([[1.0, 1, 1, 0, 0]]))
    again = layer(candidates, tf.concat([padding, events], 1), tf.constant([[0.0, 0, 1, 1, 1]]))
    np.testing.assert_allclose(after, again, rtol=1e-5)
    assert (np.abs(before - again) > 1e-4).any()


def test_an_empty_history_is_attended_to_as_zeros():
    layer = TargetAttention(4)
    candidates, history = tf.random.normal([2, 3, 6]), tf.random.normal([2, 4, 6])
    mask = tf.constant([[0.0, 0, 0, 0], [0.0, 1, 0, 0]])
    attended = layer(candidates, history, mask).numpy()
    assert not attended[0].any()
    # With a single event there is nothing to choose from.
    np.testing.assert_allclose(attended[1], np.tile(history[1, 1], (3, 1)), rtol=1e-6)

    model, batch = ranker(), inputs()
    batch["history_mask"] = tf.zeros_like(batch["history_mask"])
    assert all(np.isfinite(values).all() for values in outputs(model, batch).values())
    assert np.isfinite(model.compute_loss(batch))


def test_a_gate_mixes_the_experts_by_its_weights():
    layer = GatedExperts(experts=2, hidden=1, tasks=2)
    layer(tf.zeros([1, 3]))
    layer.expand.set_weights([np.zeros((3, 2)), np.array([4.0, 8.0])])
    layer.gates.set_weights([np.zeros((3, 4)), np.array([0, 0, 0, np.log(3)])])
    # Gates (1/2, 1/2) and (1/4, 3/4) of experts that say 4 and 8.
    mixed = layer(tf.ones([5, 3]))
    np.testing.assert_allclose([task[4, 0] for task in mixed], [6.0, 7.0], rtol=1e-6)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_batch_gives_what_its_rows_and_columns_give_alone(fusion):
    model, batch = ranker(config=fused(fusion)), inputs(rows=4, columns=3)
    whole = outputs(model, batch)
    per_candidate = ("candidates", "attributes", "text", "scalars")
    alone = {n: v[2:3, 1:2] if n in per_candidate else v[2:3] for n, v in batch.items()}
    assert_same(
        {task: values[2:3, 1:2] for task, values in whole.items()}, outputs(model, alone), 1e-5
    )


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(
    "absent",
    [{name} for name in WIDTHS if name != "embedding_dim"]
    + [set(WIDTHS) - {"embedding_dim"}, {"text_width", "attributes_width"}],
)
def test_what_a_catalog_does_not_have_may_be_of_width_0(absent, fusion):
    nothing = dict.fromkeys(absent, 0)
    model = ranker(config=fused(fusion), **nothing)
    assert np.isfinite(model.compute_loss(inputs(**nothing)))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(
    "source", ["query", "candidates", "attributes", "user_attributes", "text", "profile", "scalars"]
)
def test_every_source_reaches_every_task(fusion, source):
    model, batch = ranker(config=fused(fusion)), inputs()
    off_zero(model)
    before = outputs(model, batch)
    after = outputs(model, batch | {source: batch[source] + 3 * np.sin(batch[source] * 99)})
    for task in TASKS:
        assert np.abs(after[task] - before[task]).max() > 1e-5


def test_linear_fusion_is_a_weighted_sum_of_the_features():
    model, batch = ranker(config=fused("linear")), inputs()
    features = np.concatenate([part for group in model._sources(batch) for part in group], axis=-1)
    off_zero(model)
    kernel, bias = model.fusion.get_weights()
    found = model._logits(batch, False)
    for i, task in enumerate(TASKS):
        np.testing.assert_allclose(
            found[task], features @ kernel[:, i] + bias[i], rtol=1e-4, atol=1e-5
        )


def test_gated_fusion_mixes_an_expert_of_each_source_by_the_gate_of_each_task():
    layer = GatedFusion(fused("gated", hidden=4), tasks=2)
    sources = [[tf.ones([1, 1, 2])], [tf.ones([1, 1, 1]), tf.ones([1, 1, 2])]]
    layer(sources)
    for value, expert in zip((4.0, 8.0), layer.experts, strict=True):
        kernel, bias = expert.get_weights()
        expert.set_weights([kernel * 0, bias + value])
    layer.gates.set_weights([np.zeros((5, 4)), np.array([0, 0, 0, np.log(3)])])
    for tower in layer.towers:
        tower.narrow.set_weights([np.full((4, 2), 1 / 8), np.zeros(2)])
        tower.logit.set_weights([np.ones((2, 1)), np.zeros(1)])
    mixed = layer(sources)[0]
    # Gates (1/2, 1/2) and (1/4, 3/4) of experts that say 4 and 8.
    np.testing.assert_allclose(mixed, [6.0, 7.0], rtol=1e-6)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_learns_what_scalars_say(fusion):
    drawn = [inputs(rows=64, columns=8, seed=seed) for seed in range(21)]
    for one in drawn:
        one["label_click"] = tf.cast(one["scalars"][:, :, 0] > 0, tf.float32)
    fresh, *training = drawn
    stacked = {name: tf.stack([one[name] for one in training]) for name in fresh}
    model = ranker(("click",), config=fused(fusion))
    model.compile(optimizer=tf_keras.optimizers.Adam(0.01, jit_compile=False))
    model.fit(tf.data.Dataset.from_tensor_slices(stacked), epochs=3, verbose=0)
    clicks = outputs(model, fresh)["click"].ravel()
    assert auc(clicks, fresh["label_click"].numpy().ravel()) > 0.85


def test_fixed_weights_multiply_the_losses_of_their_tasks():
    batch = inputs()
    alone = {}
    weights = {"click": 2.0, "rating": 0.5, "like": 0.0}
    for task in ("click", "like", "rating"):
        only = dict.fromkeys(("click", "like", "rating"), 0.0) | {task: 1.0}
        tf_keras.utils.set_random_seed(3)
        model = ranker(("click", "like", "rating"), config=fused(task_weights=only))
        alone[task] = float(model.compute_loss(batch))
    tf_keras.utils.set_random_seed(3)
    model = ranker(("click", "like", "rating"), config=fused(task_weights=weights))
    expected = sum(weights[task] * loss for task, loss in alone.items())
    assert min(alone.values()) > 0
    np.testing.assert_allclose(model.compute_loss(batch), expected, rtol=1e-5)
    assert model.task_weights == weights


class TestUncertainty:
    def model(self, tasks=("click", "rating")) -> Ranker:
        return ranker(tasks, config=fused(task_weighting="uncertainty"))

    def test_it_is_the_likelihood_of_the_known_labels(self):
        model, batch = self.model(), inputs(rows=2)
        found = outputs(model, batch)
        label = {name: a.numpy() for name, a in batch.items()}
        click = -np.where(
            label["label_click"] == 1, np.log(found["click"]), np.log1p(-found["click"])
        )
        error = ((found["rating"] - label["label_rating"]) / 1.2) ** 2
        for s in ([0.0, 0.0], [0.7, -1.2]):
            model.log_variance.assign(np.array(s) / 10)
            rating = (np.exp(-s[1]) * error / 2 + s[1] / 2) * label["mask_rating"]
            expected = (np.exp(-s[0]) * click + s[0] / 2 + rating).sum() / 2
            np.testing.assert_allclose(model.compute_loss(batch), expected, rtol=1e-5)
            weights = list(model.task_weights.values())
            np.testing.assert_allclose(weights, np.exp(-np.array(s)), rtol=1e-5)

    def test_a_task_with_a_smaller_error_gets_more_weight(self):
        model, batch = self.model(), inputs(rows=32)
        # Ratings all but known, clicks a coin's toss.
        batch |= {"label_rating": outputs(model, batch)["rating"] + 0.05}
        model.compile(optimizer=tf_keras.optimizers.Adam(0.01, jit_compile=False))
        model.fit(tf.data.Dataset.from_tensors(batch).repeat(15), verbose=0)
        weights = model.task_weights
        assert weights["rating"] > 1.5
        assert weights["rating"] > 1.5 * weights["click"]

    def test_it_is_part_of_the_weights(self):
        variables = named_variables(self.model())
        assert variables["log_variance"].trainable
        assert "log_variance" not in named_variables(ranker())


def test_without_cross_layers_there_is_still_a_ranker():
    model = ranker(config=CONFIG.model_copy(update={"cross_layers": 0}))
    assert np.isfinite(model.compute_loss(inputs()))


def test_scalars_are_normalised_by_what_was_learned_of_them():
    model = ranker()
    sample = np.array([[1.0, 5.0], [3.0, 5.0]], np.float32)
    model.adapt_scalars(sample)
    z = model._normalised(tf.constant([[[1.0, 5.0], [4.0, 6.0], [999.0, -999.0]]]))
    np.testing.assert_allclose(z[0], [[-1, 0], [2, 1], [10, -10]])
    assert {"scalar_mean:0", "scalar_std:0"} <= {v.name for v in model.non_trainable_variables}


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (np.ones((3, 5), np.float32), r"are \(n, 2\)"),
        (np.ones((0, 2), np.float32), "n above 0"),
        (np.full((3, 2), np.inf, np.float32), "not finite"),
    ],
)
def test_a_sample_of_scalars_that_cannot_be_learned_from_is_refused(sample, message):
    with pytest.raises(InputError, match=message):
        ranker().adapt_scalars(sample)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (("click", "buy"), "'buy' is not one of click, like, rating, conversion"),
        ((), "at least one"),
        (("like", "like"), "distinct"),
        (("conversion",), "needs 'click'"),
    ],
)
def test_tasks_that_cannot_be_are_named(tasks, message):
    with pytest.raises(ConfigError, match=message):
        ranker(tasks)


def test_a_checkpoint_brings_everything_back(tmp_path):
    model, batch = ranker(), inputs()
    model.adapt_scalars(np.random.default_rng(0).normal(5, 3, (50, 2)).astype(np.float32))
    tf.train.Checkpoint(model=model).write(str(tmp_path / "weights"))
    tf_keras.utils.set_random_seed(99)
    again = ranker()
    assert np.abs(outputs(again, batch)["click"] - outputs(model, batch)["click"]).max() > 1e-3
    read = tf.train.Checkpoint(model=again).read(str(tmp_path / "weights"))
    read.assert_existing_objects_matched()
    assert_same(outputs(again, batch), outputs(model, batch), tolerance=0)


def test_a_traced_model_takes_any_number_of_users_and_candidates():
    model = ranker(("click", "rating"))
    whole = inputs(rows=3, columns=9)
    per_candidate = ("candidates", "attributes", "text", "scalars")
    names = (*per_candidate, "query", "history", "history_mask", "user_attributes", "profile")
    given = {name: whole[name] for name in names}
    free = {
        name: tf.TensorSpec([None] * (1 + (name in per_candidate)) + a.shape[1:][-1:], tf.float32)
        if name in (*per_candidate, "query", "user_attributes", "profile")
        else tf.TensorSpec([None, *a.shape[1:]], tf.float32)
        for name, a in given.items()
    }
    rank = tf.function(lambda values: model(values), input_signature=[free])
    one = {n: a[:1, :1] if n in per_candidate else a[:1] for n, a in given.items()}
    for batch in (given, one):
        found = {task: values.numpy() for task, values in rank(batch).items()}
        assert_same(found, outputs(model, batch), 1e-5)


def test_mixed_precision_still_answers_in_float32():
    batch = inputs()
    keras_bridge.set_precision("mixed_bfloat16")
    try:
        model = ranker()
        assert model.attention.compute_dtype == "bfloat16"
        found = outputs(model, batch)
        assert np.isfinite(model.compute_loss(batch, training=True))
    finally:
        keras_bridge.set_precision("float32")
    assert {str(values.dtype) for values in found.values()} == {"float32"}
    exact = ranker()
    exact.set_weights(model.get_weights())
    assert_same(found, outputs(exact, batch), tolerance=0.1)
