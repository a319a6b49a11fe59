"""The fit loop: schedule, average, early stopping, checkpoints, resume, and the watch for NaN."""

import json
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest

from tfrec.config import TrainingConfig
from tfrec.distribution import place
from tfrec.errors import ConfigError
from tfrec.models.dropout import Dropout
from tfrec.models.keras_bridge import set_precision, set_seed, tf, tf_keras
from tfrec.models.step import TaskModel
from tfrec.training import (
    Progress,
    Schedule,
    Trainer,
    TrainingDivergedError,
    discard,
    fit,
    peak_memory_mb,
    step_seconds,
)

STEPS, ROWS, WIDTH = 4, 8, 3


class Line(TaskModel):
    """Linear regression with dropout: as small as a model can be."""

    row_key = "x"

    def __init__(self, dropout: float = 0.0, scale: float = 1.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.dropout, self.scale = Dropout(dropout), scale
        self.dense = tf_keras.layers.Dense(1)
        self.dense(tf.zeros([1, WIDTH]))

    def compute_loss(self, inputs, training=False):
        found = self.dense(self.dropout(inputs["x"], training=training))[:, 0]
        errors = tf.square(tf.cast(found, tf.float32) - inputs["y"])
        return self.scale * tf.reduce_sum(errors) / inputs["denominator"][0]


class LineBatches:
    """Four batches an epoch of the same line; ``poison`` is the update whose target is NaN."""

    steps_per_epoch = STEPS

    def __init__(self, seed: int = 0, poison: int = -1) -> None:
        self.seed, self.poison = seed, poison

    def dataset(self, first_epoch: int = 0, worker: int = 0, workers: int = 1):
        def endless() -> Iterator[dict]:
            step = first_epoch * STEPS
            while True:
                rng = np.random.default_rng([self.seed, step])
                x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
                y = x @ np.array([1, -2, 3], np.float32) + (np.nan if step == self.poison else 1)
                yield {"x": x, "y": y.astype(np.float32), "denominator": np.array([ROWS], "f4")}
                step += 1

        spec = {
            "x": tf.TensorSpec([ROWS, WIDTH]),
            "y": tf.TensorSpec([ROWS]),
            "denominator": tf.TensorSpec([1]),
        }
        return tf.data.Dataset.from_generator(endless, output_signature=spec)


def config(**settings) -> TrainingConfig:
    return TrainingConfig(
        **{
            "epochs": 6,
            "batch_size": ROWS,
            "learning_rate": 0.05,
            "warmup_steps": 1,
            "ema": 0.0,
            "validate_every": 1,
            "patience": 0,
            "checkpoint_minutes": 0.0,
            "jit_compile": False,
            **settings,
        }
    )


def line(seed: int = 1, **settings) -> Line:
    set_seed(seed)
    return Line(**settings)


def trained(folder, model=None, batches=None, callbacks=(), validate=None, **settings):
    model = model or line()
    state = fit(
        model,
        batches or LineBatches(),
        config(**settings),
        placement=place("one_device"),
        work_dir=folder,
        title="line",
        validate=validate,
        callbacks=callbacks,
    )
    return model, state


def weights(model):
    return np.concatenate([v.numpy().ravel() for v in model.trainable_variables])


class Recorder(tf_keras.callbacks.Callback):
    """The model's weights after every update, and the logs of every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.after: list[np.ndarray] = []
        self.logs: list[dict] = []

    def on_train_batch_end(self, batch, logs=None):
        self.after.append(weights(self.model))

    def on_epoch_end(self, epoch, logs=None):
        self.logs.append(dict(logs))


class Goal:
    """A validation that returns given values and remembers the weights it saw."""

    def __init__(self, values) -> None:
        self.values, self.seen, self.model = list(values), [], None

    def __call__(self):
        self.seen.append(weights(self.model))
        return {"ndcg@10": self.values[len(self.seen) - 1], "hr@10": 0.5}


def validated(folder, values, **settings):
    goal = Goal(values)
    goal.model = line(**settings.pop("model", {}))
    model, state = trained(folder, goal.model, validate=goal, **settings)
    return model, state, goal


# --- the learning rate ---


def rates(shape, warmup, steps, count):
    schedule = Schedule(2.0, warmup, steps, shape)
    return [round(float(schedule(tf.constant(i))), 4) for i in range(count)]


def test_the_learning_rate_rises_by_a_line_and_stays():
    assert rates("constant", 4, 100, 6) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_the_learning_rate_falls_by_a_line_to_zero():
    assert rates("linear", 2, 6, 8) == [1.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0]


def test_the_learning_rate_falls_by_a_half_cosine_to_zero():
    fall = [2 * 0.5 * (1 + math.cos(math.pi * part)) for part in (0, 0.25, 0.5, 0.75, 1)]
    assert rates("cosine", 2, 6, 7)[2:] == [round(value, 4) for value in fall]


def test_a_warm_up_longer_than_the_training_ends_with_it():
    assert rates("constant", 100, 4, 5) == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_schedule_config_round_trip():
    schedule = Schedule(0.5, 3, 9, "cosine")
    assert Schedule.from_config(schedule.get_config()).get_config() == schedule.get_config()


# --- what a training gives ---


def test_a_training_learns_and_records_every_epoch(tmp_path):
    model, state = trained(tmp_path, epochs=30, learning_rate=0.3)
    np.testing.assert_allclose(weights(model), [1, -2, 3, 1], atol=0.1)
    assert [r["epoch"] for r in state.history] == list(range(1, 31))
    assert [r["step"] for r in state.history] == list(range(4, 121, 4))
    assert state.history[-1]["loss"] < 0.1 < state.history[0]["loss"]
    seconds = [r["seconds"] for r in state.history]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("jit", [False, True])
def test_the_same_seed_gives_the_same_losses_and_weights_and_another_gives_others(tmp_path, jit):
    runs = [
        trained(tmp_path / str(i), line(seed, dropout=0.4), jit_compile=jit)
        for i, seed in enumerate((1, 1, 2))
    ]
    losses = [[r["loss"] for r in state.history] for _, state in runs]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    np.testing.assert_array_equal(weights(runs[0][0]), weights(runs[1][0]))
    assert not np.array_equal(weights(runs[0][0]), weights(runs[2][0]))


def test_dropout_differs_from_step_to_step(tmp_path):
    # One batch again and again: with one mask for all, the loss would fall without noise.
    class Same(LineBatches):
        def dataset(self, *arguments):
            return super().dataset().take(1).repeat()

    _, state = trained(
        tmp_path, line(dropout=0.5), Same(), epochs=12, learning_rate=1e-6, jit_compile=True
    )
    losses = [r["loss"] for r in state.history]
    assert len({round(loss, 3) for loss in losses}) > 6


def test_gradients_are_clipped_to_the_global_norm(tmp_path):
    model = line(scale=1e3)
    trainer = Trainer(model, config(epochs=1, clip_norm=0.5), place("one_device"))
    one = LineBatches()
    one.steps_per_epoch = 1
    trainer.fit(one, work_dir=tmp_path, title="line")
    first_moments = [v.numpy() for v in trainer.optimizer.variables if v.name.startswith("m/")]
    norm = math.sqrt(sum(float((m**2).sum()) for m in first_moments))
    assert norm == pytest.approx(0.5 * (1 - trainer.optimizer.beta_1), rel=1e-4)


def test_a_batch_that_cannot_be_cut_into_pieces_is_refused():
    with pytest.raises(ConfigError, match=r"batch_size = 8 cannot be cut into accumulate = 3"):
        Trainer(line(), config(accumulate=3), place("one_device"))


def test_weight_decay_is_decoupled(tmp_path):
    class Flat(Line):
        def compute_loss(self, inputs, training=False):
            return 0.0 * super().compute_loss(inputs)

    set_seed(1)
    model = Flat()
    before = weights(model)
    trained(tmp_path, model, epochs=1, weight_decay=0.1, learning_rate=0.1)
    np.testing.assert_allclose(weights(model), before * (1 - 0.01) ** STEPS, rtol=1e-5)


def traces(model):
    function = getattr(model, "train_tf_function", model.train_function)
    return function.experimental_get_tracing_count()


@pytest.mark.parametrize("jit", [False, True])
def test_one_compilation_serves_all_steps_epochs_and_fits(tmp_path, jit):
    model = line()
    trainer = Trainer(model, config(jit_compile=jit), place("one_device"))
    trainer.fit(LineBatches(), work_dir=tmp_path / "a", title="a")
    function = model.train_function
    trainer.fit(LineBatches(1), work_dir=tmp_path / "b", title="b", schedule="cosine", epochs=2)
    assert model.train_function is function
    assert traces(model) == 1


def test_a_second_fit_starts_its_optimizer_and_schedule_anew(tmp_path):
    model = line()
    start = model.get_weights()
    trainer = Trainer(model, config(), place("one_device"))
    settings = {"title": "x", "epochs": 2, "schedule": "linear", "warmup": 3}
    trainer.fit(LineBatches(), work_dir=tmp_path / "a", **settings)
    first = weights(model)
    trainer.fit(LineBatches(7), work_dir=tmp_path / "b", title="y")
    model.set_weights(start)
    trainer.fit(LineBatches(), work_dir=tmp_path / "c", **settings)
    np.testing.assert_array_equal(weights(model), first)


def test_trackers_see_loss_and_metrics(tmp_path):
    recorder = Recorder()
    validated(tmp_path, [0.1, 0.2], epochs=2, callbacks=[recorder])
    assert [sorted(logs) for logs in recorder.logs] == [["hr@10", "loss", "ndcg@10"]] * 2
    assert recorder.logs[1]["ndcg@10"] == 0.2


# --- validation and early stopping ---


def test_the_weights_of_the_best_validation_are_kept(tmp_path):
    model, state, goal = validated(tmp_path, [0.1, 0.4, 0.3, 0.4, 0.2, 0.1])
    assert (state.best, state.best_epoch, state.epoch, state.stale) == (0.4, 2, 6, 4)
    np.testing.assert_array_equal(weights(model), goal.seen[1])
    assert [r["ndcg@10"] for r in state.history] == goal.values


def test_validation_every_few_epochs_and_always_at_the_end(tmp_path):
    _, state, goal = validated(tmp_path, [0.1, 0.2, 0.3], epochs=5, validate_every=2)
    assert [r["epoch"] for r in state.history if "ndcg@10" in r] == [2, 4, 5]
    assert len(goal.seen) == 3


def test_training_stops_when_validation_gets_no_better(tmp_path):
    _, state, goal = validated(tmp_path, [0.3, 0.2, 0.3, 0.9], epochs=50, patience=2)
    assert (state.epoch, state.best_epoch, len(goal.seen)) == (3, 1, 3)


@pytest.mark.parametrize("patience", [0, 2])
def test_a_finished_training_is_not_repeated(tmp_path, patience):
    values = [0.3, 0.2, 0.1, 0.1, 0.1, 0.1]
    model, state, goal = validated(tmp_path, values, patience=patience)
    again, same, other = validated(tmp_path, [], patience=patience, model={"seed": 9})
    assert other.seen == []
    assert same == state
    np.testing.assert_array_equal(weights(again), weights(model))
    np.testing.assert_array_equal(weights(again), goal.seen[0])


# --- the moving average ---


def averages(first, after, momentum):
    average, out = first, []
    for value in after:
        average = momentum * average + (1 - momentum) * value
        out.append(average)
    return out


def test_the_averaged_weights_are_validated_and_kept_and_training_goes_on_without_them(tmp_path):
    recorder, goal = Recorder(), Goal([0.1, 0.3, 0.2])
    goal.model = line()
    first = weights(goal.model)
    model, _ = trained(tmp_path, goal.model, validate=goal, callbacks=[recorder], epochs=3, ema=0.8)
    expected = averages(first, recorder.after, 0.8)
    for epoch, seen in enumerate(goal.seen):
        np.testing.assert_allclose(seen, expected[4 * epoch + 3], atol=1e-5)
    np.testing.assert_array_equal(weights(model), goal.seen[1])
    trained(tmp_path / "plain", callbacks=[other := Recorder()], epochs=3)
    np.testing.assert_allclose(recorder.after, other.after, atol=1e-6)


def test_without_validation_the_average_at_the_end_is_kept(tmp_path):
    recorder, model = Recorder(), line()
    first = weights(model)
    trained(tmp_path, model, callbacks=[recorder], epochs=2, ema=0.7)
    np.testing.assert_allclose(weights(model), averages(first, recorder.after, 0.7)[-1], atol=1e-5)
    again, _ = trained(tmp_path, line(9), epochs=2, ema=0.7)
    np.testing.assert_array_equal(weights(again), weights(model))


def test_a_fit_that_wants_no_average_keeps_the_weights_themselves(tmp_path):
    trainer = Trainer(line(), config(epochs=2, ema=0.9), place("one_device"))
    recorder = Recorder()
    trainer.fit(LineBatches(), work_dir=tmp_path, title="x", averaged=False, callbacks=[recorder])
    np.testing.assert_array_equal(weights(trainer.model), recorder.after[-1])


def test_the_average_of_a_second_fit_starts_at_the_weights_it_is_given(tmp_path):
    trainer = Trainer(line(), config(epochs=2, ema=0.9), place("one_device"))
    trainer.fit(LineBatches(), work_dir=tmp_path / "a", title="a")
    given, recorder = weights(trainer.model), Recorder()
    trainer.fit(LineBatches(5), work_dir=tmp_path / "b", title="b", callbacks=[recorder])
    expected = averages(given, recorder.after, 0.9)[-1]
    np.testing.assert_allclose(weights(trainer.model), expected, atol=1e-5)


# --- checkpoints and resume ---


class Interrupt(tf_keras.callbacks.Callback):
    """Raises after a number of batches, as a kill would come."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def comparable(state):
    records = [{k: v for k, v in r.items() if k != "seconds"} for r in state.history]
    return state.epoch, state.best, state.best_epoch, state.stale, records


@pytest.mark.parametrize(
    ("after", "precision"),
    [(1, "float32"), (5, "float32"), (24, "float32"), (10, "mixed_float16")],
)
def test_an_interrupted_training_ends_as_one_that_was_not(tmp_path, after, precision):
    settings = {
        "model": {"dropout": 0.3},
        "ema": 0.8,
        "precision": precision,
        "schedule": "cosine",
    }
    values = [0.1, 0.2, 0.5, 0.4, 0.3, 0.2]
    set_precision(precision)
    try:
        expected, whole, _ = validated(tmp_path / "whole", values, **settings)
        with pytest.raises(KeyboardInterrupt):
            validated(tmp_path / "cut", values, callbacks=[Interrupt(after)], **settings)
        found, state, _ = validated(tmp_path / "cut", values[(after - 1) // STEPS :], **settings)
    finally:
        set_precision("float32")
    assert comparable(state) == comparable(whole)
    np.testing.assert_array_equal(weights(found), weights(expected))


def test_only_the_last_and_the_best_checkpoint_stay(tmp_path):
    validated(tmp_path, [0.1, 0.9, 0.2, 0.3, 0.2, 0.2])
    names = {file.name.split(".")[0] for file in tmp_path.iterdir()}
    assert names == {"state", "epoch-6", "best-2"}


def test_an_epoch_that_was_not_validated_is_saved_only_when_it_is_due(tmp_path):
    class Seen(tf_keras.callbacks.Callback):
        epochs: list[int] = []  # noqa: RUF012

        def on_epoch_end(self, epoch, logs=None):
            state = tmp_path / "state.json"
            self.epochs.append(json.loads(state.read_text())["epoch"] if state.exists() else 0)

    validated(tmp_path, [0.1, 0.2], validate_every=3, checkpoint_minutes=60.0, callbacks=[Seen()])
    assert Seen.epochs == [0, 0, 3, 3, 3, 6]


def test_discarding_removes_the_folder(tmp_path):
    trained(tmp_path / "work")
    discard(tmp_path / "work")
    assert not (tmp_path / "work").exists()
    discard(tmp_path / "work")


# --- divergence ---


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_nan_loss_stops_the_training_and_the_last_good_checkpoint_stays(tmp_path, ema):
    with pytest.raises(
        TrainingDivergedError, match=r"line: the loss became nan or infinite in step 10; .*"
    ):
        trained(tmp_path, batches=LineBatches(poison=2 * STEPS + 1), ema=ema)
    expected, state = trained(tmp_path / "other", ema=ema)
    resumed, again = trained(tmp_path, ema=ema)
    np.testing.assert_array_equal(weights(resumed), weights(expected))
    assert comparable(again) == comparable(state)


def test_weights_that_are_not_finite_stop_it_too_though_the_loss_still_is(tmp_path):
    class Brittle(Line):
        def compute_loss(self, inputs, training=False):
            loss = super().compute_loss(inputs)
            last = tf.equal(self.optimizer.iterations, 2 * STEPS - 1)
            return loss + tf.where(last, 1.0, 0.0) * tf.sqrt(tf.reduce_sum(self.dense.bias) * 0.0)

    set_seed(1)
    with pytest.raises(TrainingDivergedError, match="epoch 2"):
        trained(tmp_path, Brittle(), clip_norm=0.0)
    assert json.loads((tmp_path / "state.json").read_text())["epoch"] == 1


# --- precision ---


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_learns(tmp_path, precision):
    set_precision(precision)
    try:
        model, state = trained(
            tmp_path, precision=precision, epochs=30, learning_rate=0.3, jit_compile=True
        )
    finally:
        set_precision("float32")
    assert {v.dtype for v in model.trainable_variables} == {tf.float32}
    np.testing.assert_allclose(weights(model), [1, -2, 3, 1], atol=0.2)
    assert state.history[-1]["loss"] < 0.3


def test_float16_skips_updates_whose_gradients_overflow(tmp_path):
    set_precision("mixed_float16")
    try:
        model, recorder = line(scale=1e4), Recorder()
        first = weights(model)
        trained(tmp_path, model, precision="mixed_float16", epochs=10, callbacks=[recorder])
    finally:
        set_precision("float32")
    assert float(model.optimizer.loss_scale) < model.optimizer.initial_scale
    np.testing.assert_array_equal(recorder.after[0], first)
    assert np.isfinite(recorder.after[-1]).all()
    assert not np.array_equal(recorder.after[-1], first)


# --- a rate for each variable ---


class Rate(NamedTuple):
    """As :class:`tfrec.models.tuning.Rate`."""

    share: float = 1.0
    wait: int = 0


def rated(folder, rates, model=None, batches=None, callbacks=(), validate=None, **settings):
    """Trains with a rate for the kernel and one for the bias."""
    trainer = Trainer(model or line(), config(**settings), place("one_device"), rates)
    trainer.fit(
        batches or LineBatches(),
        work_dir=folder,
        title="line",
        validate=validate,
        callbacks=callbacks,
    )
    return trainer


@pytest.mark.parametrize("jit", [False, True])
def test_a_share_scales_the_steps_and_the_decay_of_its_variable_alone(tmp_path, jit):
    settings = {"epochs": 1, "weight_decay": 0.1, "clip_norm": 0.0, "jit_compile": jit}
    first = weights(line())
    steps = []
    for number, rates in enumerate([(), (Rate(0.5), Rate(1.0)), (Rate(0.0), Rate(2.0))]):
        recorder = Recorder()
        rated(tmp_path / str(number), rates, callbacks=[recorder], **settings)
        steps.append(recorder.after[0] - first)
    np.testing.assert_allclose(steps[1], steps[0] * [0.5, 0.5, 0.5, 1], rtol=1e-3)
    np.testing.assert_allclose(steps[2], steps[0] * [0, 0, 0, 2], rtol=1e-3)


def test_the_decay_follows_the_share(tmp_path):
    class Flat(Line):
        def compute_loss(self, inputs, training=False):
            return 0.0 * super().compute_loss(inputs)

    set_seed(1)
    model = Flat()
    model.dense.bias.assign([2.0])
    before = weights(model)
    rates = (Rate(0.5), Rate(1.0))
    rated(tmp_path, rates, model, epochs=1, weight_decay=0.1, learning_rate=0.1)
    left = np.array([0.995, 0.995, 0.995, 0.99]) ** STEPS
    np.testing.assert_allclose(weights(model), before * left, rtol=1e-5)


@pytest.mark.parametrize(
    ("precision", "jit"), [("float32", False), ("float32", True), ("mixed_float16", False)]
)
def test_what_waits_does_not_move_to_the_bit_and_then_does_without_retracing(
    tmp_path, precision, jit
):
    set_precision(precision)
    try:
        model, recorder, goal = line(), Recorder(), Goal([0.1] * 4)
        model.dense.bias.assign([0.1])  # no power of two: an average of it could be off
        goal.model = model
        settings = {"ema": 0.9, "weight_decay": 0.1, "jit_compile": jit, "precision": precision}
        rates = (Rate(), Rate(1.0, wait=2))
        rated(tmp_path, rates, model, None, [recorder], goal, epochs=4, **settings)
    finally:
        set_precision("float32")
    biases = [after[3] for after in recorder.after]
    assert biases[: 2 * STEPS] == [np.float32(0.1)] * (2 * STEPS)
    assert [seen[3] for seen in goal.seen[:2]] == [np.float32(0.1)] * 2
    assert len(set(biases)) > STEPS
    assert goal.seen[-1][3] != np.float32(0.1)
    assert len({after[0] for after in recorder.after}) > 3 * STEPS
    assert traces(model) == 1


def test_what_waits_counts_for_nothing_in_the_norm_that_is_clipped(tmp_path):
    model = line(scale=1e3)
    one = LineBatches()
    one.steps_per_epoch = 1
    trainer = rated(tmp_path, (Rate(), Rate(1.0, 1)), model, one, epochs=1, clip_norm=0.5)
    moments = {v.name: v.numpy() for v in trainer.optimizer.variables if v.name.startswith("m/")}
    kernel, bias = (moments[name] for name in sorted(moments, key=lambda n: "bias" in n))
    assert np.linalg.norm(kernel) == pytest.approx(0.5 * (1 - trainer.optimizer.beta_1), rel=1e-4)
    assert not bias.any()


def test_epochs_of_earlier_fits_count_as_waited(tmp_path):
    model, recorder = line(), Recorder()
    trainer = Trainer(model, config(epochs=2), place("one_device"), (Rate(), Rate(1.0, 3)))
    settings = {"title": "x", "callbacks": [recorder]}
    trainer.fit(LineBatches(), work_dir=tmp_path / "a", waited=2, **settings)
    biases = [after[3] for after in recorder.after]
    assert biases[:STEPS] == [0.0] * STEPS
    assert 0.0 not in biases[STEPS:]


def test_a_training_with_rates_goes_on_after_a_kill_as_if_there_had_been_none(tmp_path):
    rates, settings = (Rate(0.5), Rate(1.0, 2)), {"ema": 0.8, "schedule": "cosine"}
    whole = rated(tmp_path / "whole", rates, **settings)
    with pytest.raises(KeyboardInterrupt):
        rated(tmp_path / "cut", rates, callbacks=[Interrupt(2 * STEPS + 1)], **settings)
    cut = rated(tmp_path / "cut", rates, line(seed=9), **settings)
    np.testing.assert_array_equal(weights(cut.model), weights(whole.model))


# --- what it costs ---


def test_the_time_of_a_step_is_the_median_without_the_first_epoch():
    seconds = [10.0, 12.0, 13.0, 99.0]
    history = [{"step": 5.0 * (i + 1), "seconds": s} for i, s in enumerate(seconds)]
    assert step_seconds(Progress(history=history)) == pytest.approx(2 / 5)
    assert step_seconds(Progress(history=history[:1])) == pytest.approx(2.0)


def test_the_memory_of_the_process_holds_what_it_holds():
    held = np.ones(40_000_000, np.uint8)
    assert held.nbytes / 1e6 < peak_memory_mb() < 1e6
