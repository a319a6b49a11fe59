"""One process of a training, started by test_distribution.py: python training_process.py JSON."""

import contextlib
import json
import sys
import time
from pathlib import Path

import numpy as np
from toys import make_batches, make_two_tower, small_config

from tfrec.config import PretrainConfig, RetrievalConfig
from tfrec.distribution import Placement, place
from tfrec.models.batches import SampledItems, TrainingBatches
from tfrec.models.keras_bridge import tf, tf_keras
from tfrec.models.losses import across_replicas
from tfrec.models.pretraining import Pretrainer
from tfrec.models.step import TaskModel
from tfrec.training import Progress, Trainer

GOALS = [0.2, 0.6, 0.4, 0.3]
EPOCHS = len(GOALS)


PRETRAINING = "pretraining"
"""In place of a loss: objectives together; vae is left out, which draws noise in the step."""


def settings(loss: str) -> RetrievalConfig:
    """Nothing random but what the host draws: comparable on one device and on many."""
    return small_config(
        loss="auto" if loss == PRETRAINING else loss,
        epochs=EPOCHS,
        validate_every=1,
        checkpoint_minutes=0.0,
        ema=0.5,
        patience=0,
        jit_compile=False,
    )


def model_of(loss: str) -> TaskModel:
    two_tower = make_two_tower(settings(loss))
    if loss != PRETRAINING:
        return two_tower
    objectives = {"masked": 1.0, "next_item": 1.0, "denoising": 0.5, "contrastive": 0.1}
    return Pretrainer(two_tower, PretrainConfig(objectives=objectives))


def batches_of(loss: str, replicas: int, model: TaskModel) -> TrainingBatches:
    if isinstance(model, Pretrainer):
        return make_batches(batch_size=8, replicas=replicas, objectives=model.objectives)
    some = SampledItems(positions=4, negatives=8, num_items=12) if loss == "sampled" else None
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
        with placement.strategy.scope():
            model = model_of(loss)
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

    if interrupt:
        with contextlib.suppress(InterruptedError):
            once(Interrupt())
    return once(Pause(pause))


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
