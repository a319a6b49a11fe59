"""Distillation: what is shown to a student, and that it learns from it."""

import numpy as np
import pytest
from tiny_bert import write_tiny_bert

from tfrec.config import TrainingConfig
from tfrec.distribution import place
from tfrec.errors import InputError
from tfrec.models import distillation
from tfrec.models.distillation import Distiller, Examples, Texts, directions
from tfrec.models.keras_bridge import set_seed, tf, tf_keras
from tfrec.models.named import kernels
from tfrec.models.pruning import Pruner, Sparsity, zeros_of
from tfrec.models.smaller import smaller
from tfrec.models.text import TextEncoder
from tfrec.training import Trainer

ROWS = [[2, *range(10, 10 + n), 3] for n in (1, 3, 5, 20, 30, 60, 0)]
TEXTS = ("the war of space", "love story film", "space ship 1999", "the film of love", "war story")


def batches_of(texts, count, **settings):
    return list(texts.dataset(**settings).take(count).as_numpy_iterator())


class TestTexts:
    def test_an_epoch_shows_each_text_whole_and_a_piece_of_it(self):
        texts = Texts(ROWS, tokens=64, seed=1)
        shown = [
            tuple(ids[: mask.sum()])
            for batch in batches_of(texts, texts.steps_per_epoch)
            for ids, mask in zip(batch["token_ids"], batch["padding_mask"], strict=True)
        ]
        for row in ROWS:
            assert tuple(row) in shown
        inner = [set(row[1:-1]) for row in ROWS]
        for text in shown:
            assert (text[0], text[-1]) == (2, 3)
            assert any(set(text[1:-1]) <= of for of in inner)

    def test_the_same_seed_shows_the_same(self):
        one, two, other = (Texts(ROWS, 64, seed) for seed in (1, 1, 2))
        for mine, its in zip(batches_of(one, 9), batches_of(two, 9), strict=True):
            np.testing.assert_array_equal(mine["token_ids"], its["token_ids"])
        assert any(
            mine["token_ids"].shape != its["token_ids"].shape
            or (mine["token_ids"] != its["token_ids"]).any()
            for mine, its in zip(batches_of(one, 9), batches_of(other, 9), strict=True)
        )

    def test_a_later_epoch_begins_where_it_would_have(self):
        texts = Texts(ROWS, 64, 1)
        steps = texts.steps_per_epoch
        late = batches_of(texts, steps, first_epoch=1)
        for mine, its in zip(batches_of(texts, 2 * steps)[steps:], late, strict=True):
            np.testing.assert_array_equal(mine["token_ids"], its["token_ids"])

    def test_nothing_is_padded_beyond_what_the_model_reads(self):
        texts = Texts([row[:40] for row in ROWS], 64, 1, length=40)
        widths = {b["token_ids"].shape[1] for b in batches_of(texts, texts.steps_per_epoch)}
        assert widths == {16, 32, 40}

    def test_shapes_are_few(self):
        texts = Texts(ROWS, 64, 1)
        shapes = {b["token_ids"].shape for b in batches_of(texts, 3 * texts.steps_per_epoch)}
        assert shapes == {(4, 16), (2, 32), (2, 64)}

    def test_replicas_share_a_batch(self):
        whole = batches_of(Texts(ROWS, 256, 1, replicas=2), 4)
        parts = [
            batches_of(Texts(ROWS, 256, 1, replicas=2), 2, worker=w, workers=2) for w in (0, 1)
        ]
        for place_, batch in enumerate(whole):
            mine = parts[place_ % 2][place_ // 2]
            np.testing.assert_array_equal(batch["token_ids"], mine["token_ids"])

    def test_a_student_with_other_tokens_reads_the_same_texts(self):
        own = [[token] for token in range(100)]
        own[10] = [50, 51, 52]
        texts = Texts(ROWS, 64, 1, own=own)
        for batch in batches_of(texts, texts.steps_per_epoch):
            assert batch["own_token_ids"].shape == batch["token_ids"].shape
            for number, row in enumerate(batch["token_ids"]):
                row = row[: batch["padding_mask"][number].sum()]
                read = [piece for token in row for piece in own[token]]
                mine = batch["own_padding_mask"][number].sum()
                *inner, last = batch["own_token_ids"][number, :mine].tolist()
                assert (inner, last) == (read[: mine - 1], 3)
                assert mine == min(len(read), batch["token_ids"].shape[1])
                assert batch["alike"][number] == (10 not in row)

    def test_without_a_text(self):
        with pytest.raises(InputError, match="no text to learn from"):
            Texts([], 64, 1)


class TestExamples:
    def test_an_epoch_shows_every_row(self):
        examples = Examples({"x": np.arange(10)}, batch_size=4, seed=1)
        shown = np.concatenate([b["x"] for b in batches_of(examples, examples.steps_per_epoch)])
        assert set(shown) == set(range(10))
        assert len(shown) == 12

    def test_fewer_rows_than_a_batch(self):
        examples = Examples({"x": np.arange(3)}, batch_size=256, seed=1)
        assert examples.steps_per_epoch == 1
        assert len(batches_of(examples, 1)[0]["x"]) == 3

    def test_without_a_row(self):
        with pytest.raises(InputError, match="no example to learn from"):
            Examples({"x": np.zeros(0)}, 4, 1)


class TestDirections:
    def test_the_same_directions_lose_nothing(self):
        vectors = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
        for scale in (1.0, 3.0):
            near, order = directions(tf.constant(vectors * scale), tf.constant(vectors))
            assert float(near) == pytest.approx(0, abs=1e-6)
            assert float(order) == pytest.approx(0, abs=1e-5)

    def test_others_do(self):
        random = np.random.default_rng(0)
        one, other = (tf.constant(random.normal(size=(6, 8)), tf.float32) for _ in range(2))
        near, order = directions(one, other)
        assert float(near) > 0.5
        assert float(order) > 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_bert(tmp_path_factory.mktemp("bert"))


def taught(folder, work, epochs, share=0.5, stop=None):
    """A pruned student of the BERT in a folder after so many epochs, or until ``stop``."""
    set_seed(1)
    teacher = TextEncoder.load(folder, length=16, trainable=False)
    student = TextEncoder.load(folder, length=16)
    student.model.pooled_dense.trainable = False
    batches = Texts(list(teacher.tokenizer.ids(TEXTS)), 64, 1)
    losses, parts = distillation.of_texts(student, teacher)
    pruner = Pruner(kernels(student), Sparsity(share), epochs * batches.steps_per_epoch)
    model = Distiller(student, losses, parts, pruner)
    config = TrainingConfig(
        epochs=epochs,
        batch_size=1,
        learning_rate=0.01,
        warmup_steps=1,
        schedule="linear",
        ema=0,
        jit_compile=False,
        checkpoint_minutes=0,
    )
    state = Trainer(model, config, place("one_device")).fit(
        batches, work_dir=work, title="texts", callbacks=[stop] if stop else []
    )
    return teacher, student, state


def cosine(teacher, student):
    one, other = teacher.encode(TEXTS), student.encode(TEXTS)
    one, other = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (one, other))
    return float((one * other).sum(axis=1).mean())


def test_a_student_with_fewer_words_learns_to_read_the_others_by_letters(folder, tmp_path):
    teacher = TextEncoder.load(folder, length=16, trainable=False)
    student = smaller(teacher, ["film of war"], vocabulary=83)
    before = cosine(teacher, student)
    rows = list(teacher.tokenizer.ids(TEXTS))
    own = teacher.tokenizer.as_in(student.tokenizer)
    losses, parts = distillation.of_texts(student, teacher)
    config = TrainingConfig(
        epochs=60, batch_size=1, learning_rate=0.005, warmup_steps=1, ema=0, jit_compile=False
    )
    Trainer(Distiller(student, losses, parts, None), config, place("one_device")).fit(
        Texts(rows, 64, 1, length=16, own=own), work_dir=tmp_path, title="texts"
    )
    assert 1 - cosine(teacher, student) < 0.5 * (1 - before)


def test_a_pruned_student_learns_to_answer_as_its_teacher(folder, tmp_path):
    teacher, pruned, state = taught(folder, tmp_path / "a", 60)
    assert all(share == pytest.approx(0.5, abs=0.01) for share in zeros_of(pruned).values())
    untaught = TextEncoder.load(folder, length=16)
    for variable in kernels(untaught).values():
        small = np.abs(variable.numpy()) < np.median(np.abs(variable.numpy()))
        variable.assign(np.where(small, 0, variable.numpy()))
    assert 1 - cosine(teacher, pruned) < (1 - cosine(teacher, untaught)) / 4
    assert state.history[-1]["loss"] < state.history[len(state.history) // 2]["loss"]


class Stop(tf_keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


def test_a_killed_one_goes_on_to_the_same_weights(folder, tmp_path):
    _, whole, _ = taught(folder, tmp_path / "whole", 6)
    with pytest.raises(KeyboardInterrupt):
        taught(folder, tmp_path / "killed", 6, stop=Stop())
    _, resumed, state = taught(folder, tmp_path / "killed", 6)
    assert state.epoch == 6
    for name, kernel in kernels(whole).items():
        np.testing.assert_array_equal(kernel.numpy(), kernels(resumed)[name].numpy())


def test_values_are_learned_in_units_of_their_spread():
    layer = tf_keras.layers.Dense(1)
    layer(tf.zeros([1, 2]))
    losses, parts = distillation.of_values(lambda batch, training: layer(batch["x"]))
    batch = {"x": tf.zeros([4, 2]), "told": tf.fill([4, 1], 10.0), "scale": tf.fill([4, 1], 5.0)}
    assert parts == ("values",)
    assert float(losses(batch, False)["values"]) == pytest.approx(4.0)
