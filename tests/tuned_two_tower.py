"""A small two-tower over a tiny BERT, both tuned, for tests; and a process that trains it.

python tuned_two_tower.py JSON: the same trainings on one device and on two, whose losses and
weights it writes to a file.
"""

import json
import sys
from pathlib import Path

import numpy as np
from toys import make_batches, make_two_tower, small_config

from tfrec.config import RetrievalConfig, TuningConfig
from tfrec.distribution import Placement, place
from tfrec.models.batches import SampledItems, TrainingBatches
from tfrec.models.keras_bridge import set_precision, set_seed, tf
from tfrec.models.named import named_variables
from tfrec.models.text import TextEncoder
from tfrec.models.tuning import difference, tune
from tfrec.training import Trainer

ITEMS = 12
TEXTS = ["", *(f"the film of war {number}" for number in range(1, ITEMS + 1))]


def settings(**changed) -> RetrievalConfig:
    return small_config(**{"loss": "sampled", "epochs": 2, "checkpoint_minutes": 0.0, **changed})


def pretrained(model) -> list[str]:
    """All of the towers but the ids, as if it came from a pretrained encoder."""
    towers = ("query_tower.", "candidate_tower.text", "candidate_tower.attributes")
    return [name for name in named_variables(model) if name.startswith(towers)]


def make(bert: Path, config: RetrievalConfig, tuning: TuningConfig, seed: int = 3):
    """The model, tuned and not yet trained, and what tuning it gave."""
    set_precision(config.precision)
    set_seed(seed)
    encoder = TextEncoder.load(bert, length=16, dtype=None)
    model = make_two_tower(config, text_width=encoder.width, encoder=encoder)
    return model, tune(model, tuning, pretrained(model))


def batches_of(model, replicas: int = 1) -> TrainingBatches:
    tokens, mask = model.encoder.tokenize(TEXTS)
    some = SampledItems(positions=3, negatives=8, num_items=ITEMS, tokens=tokens, token_mask=mask)
    return make_batches(batch_size=8, replicas=replicas, sampled=some)


def train(
    bert: Path,
    folder: Path,
    config: RetrievalConfig,
    tuning: TuningConfig,
    placement: Placement | None = None,
    callbacks=(),
):
    """A model that was tuned and trained, and the training's state."""
    placement = placement or place("one_device")
    try:
        with placement.strategy.scope():
            model, tuned = make(bert, config, tuning)
        trainer = Trainer(model, config, placement, tuned.rates(model.trainable_variables))
        state = trainer.fit(
            batches_of(model, placement.replicas),
            work_dir=folder,
            title="tuned",
            callbacks=callbacks,
        )
    finally:
        set_precision("float32")
    return model, state


def values(model) -> dict[str, np.ndarray]:
    return {name: v.numpy() for name, v in named_variables(model).items()}


def main(told: dict) -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    config = settings(jit_compile=False, ema=0.5)
    out, found = Path(told["out"]), {}
    for name, tuning in told["tunings"].items():
        for where in ("one_device", "mirrored"):
            placement = place(where)
            folder, bert = out / f"{name}-{where}", Path(told["bert"])
            start = values(make(bert, config, TuningConfig(**tuning))[0])
            model, state = train(bert, folder, config, TuningConfig(**tuning), placement)
            found[f"{name}-{where}"] = {
                "replicas": placement.replicas,
                "losses": [record["loss"] for record in state.history],
                "trained": list(difference(model)),
                "start": {n: v.ravel().tolist() for n, v in start.items()},
                "weights": {n: v.ravel().tolist() for n, v in values(model).items()},
            }
    (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
