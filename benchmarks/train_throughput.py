"""Training throughput beside RecTools (PyTorch) in one run: the two-tower and SASRec, or, with
--masked, pretraining by masked events and BERT4Rec.

    python benchmarks/train_throughput.py [--masked] [--peer-python PATH] [--raw DIR]

Both sides train on the same events (the training part of leave-one-out, each user's last ones), on
the item ids alone, with the same width, blocks, heads, width of the feed-forward layers, length,
exact softmax over the catalog and number of threads, each in a process of its own and in its own
training loop (Keras' `fit`, Lightning's `Trainer`, data loading included). The two take turns, and
medians are compared. A sequence is a user's last events, of which both learn at most `--length`
targets. RecTools pads every sequence to that length; we pack several into a row, and take as many
rows as hold a batch of the same number of sequences.

What is not the same: we average the weights, and compile the step with XLA. Our own default is
feed-forward layers four times as wide as the model (--feed-forward 4), where RecTools has them as
wide as it. RecTools runs with those settings of the C library's allocator (MALLOC_*) that double
its speed.

Without --peer-python an environment with RecTools is made in the cache folder (about 1.5 GB).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import numpy as np

RECTOOLS, TORCH = "0.19.0", "2.13.0"
WIDTH, BLOCKS, HEADS, DROPOUT = 64, 2, 2, 0.2
MASKED = 0.15  # share of the events that are hidden, the default of RecTools
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


# --- the two sides; each runs in a process of its own ---


class Turns:
    """Measures a number of updates whenever the parent asks for them."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def serve(self, run: Any) -> None:
        """``run(steps)`` trains, calls :meth:`end` after each update, returns sequences of one."""
        for line in sys.stdin:
            self.ends = []
            sequences = run(int(line))
            # From the end of the first update: what starts a loop is not measured.
            seconds = self.ends[-1] - self.ends[0]
            rate = sequences * (len(self.ends) - 1) / seconds
            print("RATE", rate, flush=True)

    def end(self) -> None:
        self.ends.append(time.perf_counter())


def ours(events: Path, batch: int, length: int, feed_forward: int, masked: int) -> None:
    from tfrec.config import PretrainConfig, RetrievalConfig
    from tfrec.data.sequences import EventCoding, Histories, PackedSequences
    from tfrec.distribution import place
    from tfrec.models.batches import TrainingBatches
    from tfrec.models.keras_bridge import set_seed, tf_keras
    from tfrec.models.pretraining import Pretrainer
    from tfrec.models.retrieval import TwoTower
    from tfrec.training import Trainer

    offsets, item, items = read(events)
    flat = np.zeros(len(item), np.int32)
    histories = Histories(offsets, item, flat + 2, flat, flat.astype(np.int64)).last(length)
    ones = np.ones(len(histories.item), np.float32)
    sequences = PackedSequences(histories, ones, length, 1)
    users, rows = len(histories), len(sequences.epoch(0)["item"])
    config = RetrievalConfig(
        embedding_dim=WIDTH, layers=BLOCKS, heads=HEADS, feed_forward=feed_forward,
        history=length, dropout=DROPOUT,
        id_dropout=0.0, time_gaps=False, events=False, loss="full_softmax",
        batch_size=max(round(batch * rows / users), 1),
    )  # fmt: skip
    set_seed(1)
    nothing, nobody = np.zeros((items + 1, 0), np.float32), np.zeros((users, 0), np.float32)
    model = TwoTower(config, nothing, nothing, EventCoding())
    objectives: Any = {}
    if masked:
        hides = PretrainConfig(
            objectives={"masked": 1.0}, mask_rate=MASKED, batch_size=config.batch_size
        )
        model = Pretrainer(model, hides)
        objectives = model.objectives
    Trainer(model, hides if masked else config, place("one_device"))
    batches = TrainingBatches(sequences, config.batch_size, nobody, nobody, objectives=objectives)
    turns = Turns()

    class Clock(tf_keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            turns.end()

    def run(steps: int) -> float:
        model.fit(batches.dataset(), steps_per_epoch=steps, verbose=0, callbacks=[Clock()])
        return config.batch_size * users / rows

    turns.serve(run)


def peer(events: Path, batch: int, length: int, feed_forward: int, masked: int) -> None:
    import logging
    import warnings

    import pandas as pd
    import torch
    from pytorch_lightning import Callback, Trainer
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import BERT4RecModel, SASRecModel
    from rectools.models.nn.item_net import IdEmbeddingsItemNet

    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(1)
    offsets, item, _ = read(events)
    frame = pd.DataFrame(
        {
            Columns.User: np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)),
            Columns.Item: item,
            Columns.Weight: 1,
            Columns.Datetime: pd.Timestamp("2000-01-01") + pd.to_timedelta(range(len(item)), "s"),
        }
    )
    made = BERT4RecModel if masked else SASRecModel
    # The layers of SASRec are as wide inside as outside; those of BERT4Rec four times, unless told.
    of_masked = {
        "mask_prob": MASKED, "transformer_layers_kwargs": {"ff_factors_multiplier": feed_forward}
    }  # fmt: skip
    model = made(
        n_blocks=BLOCKS, n_heads=HEADS, n_factors=WIDTH, session_max_len=length,
        dropout_rate=DROPOUT, loss="softmax", batch_size=batch,
        item_net_block_types=(IdEmbeddingsItemNet,), **(of_masked if masked else {}),
    )  # fmt: skip
    model._build_model_from_dataset(Dataset.construct(frame))
    loader = model.data_preparator.get_dataloader_train()
    turns = Turns()

    class Clock(Callback):
        sequences = 0

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, i: int):
            turns.end()
            if len(turns.ends) > 1:
                self.sequences += len(batch["x"])

    def run(steps: int) -> float:
        clock = Clock()
        trainer = Trainer(
            max_steps=steps, max_epochs=-1, devices=1, accelerator="cpu", callbacks=[clock],
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            logger=False,
        )  # fmt: skip
        trainer.fit(model.lightning_model, loader)
        return clock.sequences / max(steps - 1, 1)

    turns.serve(run)


def read(events: Path) -> tuple[np.ndarray, np.ndarray, int]:
    with np.load(events, allow_pickle=False) as stored:
        return stored["offsets"], stored["item"], int(stored["items"])


# --- the parent ---


class Side:
    """A process that trains when it is told to."""

    def __init__(self, name: str, python: str, events: Path, env: dict, *sizes: int):
        command = [python, __file__, "--side", name, str(events), *map(str, sizes)]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        self.process = subprocess.Popen(
            command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log,
        )  # fmt: skip

    def rate(self, steps: int) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("RATE"):
                return float(line.split()[1])
        self.log.seek(0)
        raise SystemExit(f"a side failed:\n{self.log.read()[-3000:]}")

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def prepared(name: str, raw: str, folder: Path, length: int) -> Path:
    """The events both sides train on, as offsets, item and items in one .npz."""
    from tfrec.config import Config
    from tfrec.data.dataset import Dataset
    from tfrec.data.interactions import TRAIN
    from tfrec.data.sequences import EventCoding, Histories
    from tfrec.stages import prepare

    settings = [f"data.data_dir={Path(raw) / name.replace('movielens', 'ml')}"]
    dataset = Dataset.load(prepare.run(Config.load(name, settings if raw else []), folder / name))
    train = dataset.interactions.part(TRAIN)
    # One more than the length: RecTools makes `length` pairs of an event and the next one of them.
    histories = Histories.of(train, EventCoding.of(train)).last(length + 1)
    path = folder / f"{name}.npz"
    np.savez(
        path,
        offsets=histories.offsets,
        item=histories.item,
        items=np.int64(dataset.catalog.num_items),
    )
    return path


def peer_python() -> str:
    """Makes an environment with RecTools, unless it is there."""
    from tfrec.data.sources import cache_folder

    folder = cache_folder() / f"rectools-{RECTOOLS}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"making an environment with RecTools {RECTOOLS} in {folder} ...", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        wanted = [f"torch=={TORCH}", f"rectools[torch]=={RECTOOLS}"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)
        (folder / "ready").touch()
    return str(python)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def compare(events: Path, batch: int, python: str, told: argparse.Namespace) -> dict[str, Any]:
    threads = str(told.threads)
    env = {**os.environ, "TF_NUM_INTRAOP_THREADS": threads, "TF_NUM_INTEROP_THREADS": threads}
    theirs = {**os.environ, **MALLOC, "OMP_NUM_THREADS": threads}
    sizes = (batch, told.length, told.feed_forward, int(told.masked))
    sides = {
        "ours": Side("ours", sys.executable, events, env, *sizes),
        "rectools": Side("peer", python, events, theirs, *sizes),
    }
    steps = max(told.sequences // batch, 3)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for name, side in sides.items():
        side.rate(3)  # compiles, and warms up
        print(f"  {name} is ready", file=sys.stderr)
    for turn in range(told.turns):
        for name, side in sides.items():
            rates[name].append(side.rate(steps))
            print(f"  turn {turn + 1}: {name} {rates[name][-1]:.0f} sequences/s", file=sys.stderr)
    for side in sides.values():
        side.end()
    medians = {name: statistics.median(found) for name, found in rates.items()}
    return {
        "data": events.stem,
        "batch": batch,
        "masked": told.masked,
        "feed_forward": told.feed_forward,
        "steps": steps,
        "rates": rates,
        **medians,
        "ratio": medians["ours"] / medians["rectools"],
    }


def main() -> None:
    if sys.argv[1:2] == ["--side"]:
        side = {"ours": ours, "peer": peer}[sys.argv[2]]
        side(Path(sys.argv[3]), *map(int, sys.argv[4:8]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", default="", help=f"a Python with RecTools {RECTOOLS}")
    parser.add_argument(
        "--raw", default="", help="folder that holds ml-100k and ml-1m, else fetched"
    )
    parser.add_argument("--data", nargs="+", default=["movielens-100k", "movielens-1m"])
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 32], help="sequences")
    parser.add_argument(
        "--masked", action="store_true", help="pretraining by masked events, beside BERT4Rec"
    )
    parser.add_argument("--length", type=int, default=100)
    parser.add_argument("--feed-forward", type=int, default=1, help="of ours, in widths")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5, help="measurements of each side")
    parser.add_argument("--sequences", type=int, default=4096, help="in a measurement")
    told = parser.parse_args()
    from tfrec.errors import SetupError

    python = told.peer_python or peer_python()
    load = os.getloadavg()[0]
    print(f"{processor()}, {told.threads} threads; load {load:.1f} when it began", flush=True)
    print(f"{'data':>16} {'batch':>6} {'ours':>8} {'RecTools':>9} {'ratio':>6}   sequences/s")
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in told.data:
            try:
                events = prepared(name, told.raw, Path(scratch), told.length)
            except SetupError as missing:
                print(f"{name:>16} left out: {missing}", flush=True)
                continue
            for batch in told.batches:
                one = compare(events, batch, python, told)
                found.append(one)
                print(
                    f"{name:>16} {batch:>6} {one['ours']:>8.0f} {one['rectools']:>9.0f} "
                    f"{one['ratio']:>6.2f}",
                    flush=True,
                )
    print(json.dumps({"processor": processor(), "threads": told.threads, "results": found}))


if __name__ == "__main__":
    main()
