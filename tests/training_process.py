"""One process of a training, started by test_distribution.py: python training_process.py JSON."""

import contextlib
import json
import sys
import time
from pathlib import Path

import numpy as np
from tiny_bert import write_tiny_bert
from toys import make_batches, make_two_tower, small_config

from tfrec.config import PretrainConfig, RetrievalConfig
from tfrec.distribution import Placement, place
from tfrec.models.batches import SampledItems
from tfrec.models.keras_bridge import set_precision, tf, tf_keras
from tfrec.models.losses import across_replicas
from tfrec.models.pretraining import Pretrainer
from tfrec.models.step import TaskModel
from tfrec.models.text import TextEncoder
from tfrec.models.text_pretraining import TextBatches, TextPretrainer
from tfrec.training import Batches, Progress, Trainer

GOALS = [0.2, 0.6, 0.4, 0.3]
EPOCHS = len(GOALS)


PRETRAINING, TEXTS = "pretraining", "texts"
"""In place of a loss: objectives together; vae is left out, which draws noise in the step."""
PIECES, HALF = "pieces", "half"
VARIANTS = {
    PRETRAINING: {"loss": "auto"},
    TEXTS: {"accumulate": 2, "batch_size": 12},
    PIECES: {"loss": "full_softmax", "accumulate": 2},
    HALF: {"loss": "sampled", "precision": "mixed_bfloat16"},
}


def settings(loss: str) -> RetrievalConfig:
    """Nothing random but what the host draws: comparable on one device and on many."""
    return small_config(
        **VARIANTS.get(loss, {"loss": loss}),
        epochs=EPOCHS,
        validate_every=1,
        checkpoint_minutes=0.0,
        ema=0.5,
        patience=0,
        jit_compile=False,
    )


def text_model(folder: Path) -> TextPretrainer:
    bert = write_tiny_bert(
        folder / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    config = PretrainConfig(objectives={"mlm": 1.0}, accumulate=2)
    return TextPretrainer(TextEncoder.load(bert, length=16, dtype=None), config, ())


def text_batches(replicas: int, model: TextPretrainer) -> TextBatches:
    read = model.encoder.tokenizer
    texts = model.encoder.tokenize([f"the love story of film {number}" for number in range(36)])
    mask = read.mask_token
    return TextBatches(
        texts, 12, ("mlm",), {}, read.vocabulary_size, mask, read.special_tokens, 4,
        replicas=replicas,
    )  # fmt: skip


def model_of(loss: str, folder: Path) -> TaskModel:
    if loss == TEXTS:
        return text_model(folder)
    two_tower = make_two_tower(settings(loss))
    if loss != PRETRAINING:
        return two_tower
    objectives = {"masked": 1.0, "next_item": 1.0, "denoising": 0.5, "contrastive": 0.1}
    return Pretrainer(two_tower, PretrainConfig(objectives=objectives))


def batches_of(loss: str, replicas: int, model: TaskModel) -> Batches:
    if isinstance(model, TextPretrainer):
        return text_batches(replicas, model)
    if isinstance(model, Pretrainer):
        return make_batches(batch_size=8, replicas=replicas, objectives=model.objectives)
    sampled = settings(loss).loss == "sampled"
    some = SampledItems(positions=4, negatives=8, num_items=12) if sampled else None
    return make_batches(batch_size=8, replicas=replicas, sampled=some)


class Interrupt(tf_keras.callbacks.Callback):
    """Stops a training in the middle of its third epoch, as a kill would."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == 2 and batch == 1:
            raise InterruptedError


class Pause(tf_keras.callbacks.Callback):
    """Waits in an epoch for the kill that is to come."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            time.sleep(600)


def train(
    placement: Placement, loss: str, folder: Path, interrupt: bool = False, pause: int = -1
) -> tuple:
    """Trains a small two-tower; ``interrupt``: up to its third epoch, then again to the end."""

    def once(callback: tf_keras.callbacks.Callback) -> tuple:
        set_precision(settings(loss).precision)
        with placement.strategy.scope():
            model = model_of(loss, folder)
        batches = batches_of(loss, placement.replicas, model)
        steps = batches.steps_per_epoch
        trainer = Trainer(model, settings(loss), placement)

        def validate() -> dict[str, float]:
            assert placement.chief
            return {"ndcg@10": GOALS[int(trainer.optimizer.iterations.numpy()) // steps - 1]}

        state = trainer.fit(
            batches, work_dir=folder, title=loss, validate=validate, callbacks=[callback]
        )
        return model, state

    try:
        if interrupt:
            with contextlib.suppress(InterruptedError):
                once(Interrupt())
        return once(Pause(pause))
    finally:
        set_precision("float32")


def report(model, state: Progress) -> dict[str, list]:
    return {
        "losses": [record["loss"] for record in state.history],
        "best_epoch": state.best_epoch,
        "weights": np.concatenate([v.numpy().ravel() for v in model.trainable_variables]).tolist(),
    }


def gathered(placement: Placement) -> list[dict]:
    """What each of two replicas gathers, and the gradient that comes back to it."""

    def run():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        values = 10 * tf.cast(replica, tf.float32) + tf.constant([[1.0], [2.0]])
        with tf.GradientTape() as tape:
            tape.watch(values)
            everyone = across_replicas(values)
            factor = tf.constant([[1.0], [10.0], [100.0], [1000.0]])
            loss = tf.reduce_sum(everyone * factor) * tf.cast(replica + 1, tf.float32)
        return everyone, tape.gradient(loss, values)

    outs = placement.strategy.run(tf.function(run))
    parts = [placement.strategy.experimental_local_results(out) for out in outs]
    names = ("values", "gradient")
    return [
        {n: v.numpy().ravel().tolist() for n, v in zip(names, pair, strict=True)}
        for pair in zip(*parts, strict=True)
    ]


def main(told: dict) -> None:
    if told["distribution"] == "mirrored":
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * 2
        )
    placement = place(told["distribution"])
    out = Path(told["out"])
    found = {"replicas": placement.replicas}
    if placement.replicas > 1:
        found["gathered"] = gathered(placement)
    for loss in told["losses"]:
        interrupt, pause = loss == told.get("interrupted"), told.get("pause", -1)
        found[loss] = report(*train(placement, loss, out / loss, interrupt, pause))
    if placement.workers > 1:
        found["told"] = placement.from_chief({"worker": placement.worker, "n": [1.5, "é", None]})
    (out / f"worker-{placement.worker}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
