"""compress: a finished run in, smaller models that learned from it out, each with its proof.

What is made smaller is again a run, which `recommend`, `evaluate` and `export` take as any other.
What each one costs and wins is measured on bundles, as they would be deployed, in the same run.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import tfrec
from tfrec import bundle
from tfrec.artifact import (
    MANIFEST,
    Artifact,
    alone,
    current,
    disk_errors,
    recipe_digest,
    write_json,
    writing,
)
from tfrec.bundle import CONTENT
from tfrec.config import CompressConfig, Config, TrainingConfig
from tfrec.data.dataset import Dataset
from tfrec.data.interactions import TEST, TRAIN, VALID
from tfrec.data.sequences import Histories, query_inputs
from tfrec.distribution import Placement, place
from tfrec.errors import ConfigError, InputError
from tfrec.models import bundling, distillation
from tfrec.models.bert import heads_of
from tfrec.models.engine import (
    APART,
    MERGED,
    WEIGHTS,
    RetrievalCard,
    TensorFlowEngine,
    cut_of,
    load_ranker,
    load_recommender,
    load_text,
    merged_config,
    read_array,
    read_json,
    recommender_of,
    restore_two_tower,
)
from tfrec.models.inputs import encoded
from tfrec.models.keras_bridge import set_seed, tf
from tfrec.models.named import kernels, named_variables, save
from tfrec.models.pruning import Pruner, Sparsity
from tfrec.models.quantising import dense_layers, learning, settle
from tfrec.models.retrieval import TwoTower
from tfrec.models.smaller import check, inputs_of, smaller, sparse
from tfrec.models.text import TextEncoder
from tfrec.models.tuning import merge
from tfrec.recommender import BLOCK, Floats, Recommender
from tfrec.report import compression as page
from tfrec.report.proof import Budget, Court, Trial, beside, dominated, nearest
from tfrec.timing import processor
from tfrec.training import RESUMES, Trainer, discard

FOLDER, KIND = "compress", "compression"
FLOAT, INT8 = "float", "int8"
_HELD_OUT, _LEAST_HELD_OUT = 0.1, 100  # of the texts, to be judged by; texts
_CANDIDATES_AS_USERS = 8  # users of the towers, in memory, are one with the ranker's candidates
_KNOBS = ("prune", "layers", "heads", "neurons", "width", "vocabulary")


def run(config: Config, folder: str | os.PathLike[str], budget: Budget | None = None) -> Artifact:
    """Makes models smaller, and measures what each costs and wins.

    Args:
      config: Its ``[compress]`` section and the seed. Where the section changes nothing of the
        model, a ladder of usual ways is tried.
      folder: The run's folder. The models come to ``compress/<name>`` in it, the report to
        ``compress/report``.
      budget: What the chosen one may cost; None: a loss of 1 %.

    Returns:
      An artifact of the kind ``compression``. Its metrics name the ``chosen`` model, and whether it
      is ``within`` the budget: if none is, it is the nearest, and :func:`missed` says by how much.

    Raises:
      ArtifactError: the run is missing or unfinished.
      ConfigError: the section asks for what the model does not have.
      InputError: there is nothing to judge by, or the BERT cannot be made smaller.
    """
    job = _Job.of(config, Path(folder))
    plans, budget = job.plans(), budget or Budget(loss=0.01)
    out = job.source / FOLDER / "report"
    with alone(job.source / FOLDER):
        models = _tried(job, plans)
    chosen, misses = nearest(models, budget)
    tree = job.tree(models, budget, chosen, misses)
    with writing(out, kind=KIND, config=job.recipe(), parents=job.parents) as draft:
        page.write(tree, draft.path)
        draft.metrics |= {"chosen": chosen, "within": not misses, **page.measured(tree)}
    return Artifact.peek(out, KIND)


def _tried(job: _Job, plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """What is told of each plan's model; the first is what the others are set beside."""
    models: list[dict[str, Any]] = []
    reference: Trial | None = None
    work = job.source / FOLDER / ".bundles"
    try:
        for plan in plans:
            made = job.make(plan)
            trial, zeros = job.judge(made, plan, work / plan.key)
            reference = reference or trial
            told = {**trial.tree, **beside(trial, reference), **zeros}
            models.append({**plan.told(made.relative_to(job.source)), **told})
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return models


def summary(artifact: Artifact) -> str:
    """The table of a finished report, and what was chosen, for the terminal."""
    return page.text(page.read(artifact.path))


def missed(artifact: Artifact) -> str:
    """By how much the nearest model misses the budget, in one line; empty: it keeps within it."""
    tree = page.read(artifact.path)
    return page.why_not(tree) if tree["misses"] else ""


@dataclass(frozen=True)
class Plan:
    """One way to make a model smaller.

    Attributes:
      config: How.
      shape: The BERT's layers, heads, neurons, width and vocabulary, by the names of the
        configuration; empty: there is none.
    """

    config: CompressConfig
    shape: Mapping[str, int]

    @property
    def trains(self) -> bool:
        """Whether weights change."""
        return bool(self.config.prune or self.config.qat or self.structure)

    @property
    def structure(self) -> dict[str, int]:
        """What stays of the BERT's shape, where that is less than there is."""
        asked = {name: int(getattr(self.config, name)) for name in self.shape}
        return {n: v for n, v in asked.items() if v and v != self.shape[n]}

    @property
    def key(self) -> str:
        """Its name, and that of its folder."""
        config, size = self.config, {**self.shape, **self.structure}
        parts = []
        if "width" in self.structure or "layers" in self.structure:
            parts.append(f"student-{size['layers']}x{size['width']}")
        parts += [
            f"{n}-{size[n]}" for n in ("heads", "neurons", "vocabulary") if n in self.structure
        ]
        if config.prune:
            pattern = {"unstructured": "", "block": "-block", "2:4": "-2of4"}[config.pattern]
            parts.append(f"pruned-{config.prune:g}{pattern}")
        parts += ["qat"] if config.qat else []
        parts += [INT8] if config.int8 else [] if parts else [FLOAT]
        return "-".join(parts)

    def told(self, path: Path) -> dict[str, Any]:
        """What the report says of it."""
        asked = {n: getattr(self.config, n) for n in (*_KNOBS, "pattern", "qat", "int8")}
        return {"key": self.key, "settings": asked, "path": path.as_posix()}


@dataclass(frozen=True)
class _Job:
    """A run that is made smaller."""

    config: Config
    source: Path
    dataset: Dataset
    parents: Mapping[str, Artifact]
    split: str

    @classmethod
    def of(cls, config: Config, source: Path) -> _Job:
        parents = {
            "dataset": Artifact.load(source / "prepare", "dataset"),
            "retrieval": Artifact.load(source / "adapt" / "retrieval", "retrieval"),
        }
        if (source / "adapt" / "ranking" / MANIFEST).is_file():
            parents["ranking"] = Artifact.load(source / "adapt" / "ranking", "ranking")
        dataset = Dataset.load(parents["dataset"])
        if not len(dataset.interactions.part(TEST)):
            raise InputError(
                f"{source} has no test events to judge smaller models by; set data.split to "
                "leave_one_out, time or item_cold, and run again"
            )
        split = parents["dataset"].config.get("data", {}).get("split", config.data.split)
        if split == "user_cold":
            raise InputError(
                f"{source} has the split user_cold: its test users have no events that the towers "
                "could be asked with; compress a run with another split"
            )
        return cls(config, source, dataset, parents, split)

    @property
    def settings(self) -> CompressConfig:
        return self.config.compress

    @property
    def retrieval(self) -> Artifact:
        return self.parents["retrieval"]

    @cached_property
    def card(self) -> RetrievalCard:
        return RetrievalCard.parse(read_json(self.retrieval.file("model.json")))

    @cached_property
    def cuts(self) -> list[str]:
        """Those that are judged and deployed: ``select`` only chose."""
        return [cut for cut in self.card.cuts if cut != "select"] or list(self.card.cuts)

    @cached_property
    def encoder(self) -> TextEncoder | None:
        """The BERT as it is."""
        return load_text(self.retrieval, self.cuts[0]) if self.card.text_width else None

    @cached_property
    def shape(self) -> dict[str, int]:
        """Of the BERT."""
        if self.encoder is None:
            return {}
        model = self.encoder.model
        return {
            "layers": int(model.num_layers),
            "heads": min(heads_of(layer)[0] for layer in model.transformer_layers),
            "neurons": int(model.intermediate_dim),
            "width": int(model.hidden_dim),
            "vocabulary": self.encoder.tokenizer.vocabulary_size,
        }

    @cached_property
    def placement(self) -> Placement:
        found = place(self.settings.distribution)
        if found.workers > 1:
            raise ConfigError(
                "compress works on one machine; take TF_CONFIG out of the environment"
            )
        return found

    @cached_property
    def judged(self) -> NDArray[np.int64]:
        """Catalog rows whose texts no smaller model learns from: of items without events before
        the test, or of a random tenth."""
        told = np.array([row for row, text in enumerate(self.dataset.catalog.texts) if text], int)
        before = self.dataset.interactions.part(TRAIN, VALID).item
        cold = told[~np.isin(told, before)]
        if len(cold) >= _LEAST_HELD_OUT:
            return np.random.default_rng(self.config.seed).permutation(cold)
        order = np.random.default_rng(self.config.seed).permutation(told)
        return order[: max(int(_HELD_OUT * len(told)), min(len(told) // 2, 2))]

    def recipe(self) -> dict[str, Any]:
        return {"seed": self.config.seed, "compress": self.settings.model_dump(mode="json")}

    def plans(self) -> list[Plan]:
        """The model as it is, in int8, and what is asked for; else a ladder.

        Raises:
          ConfigError: the section asks for what cannot be.
          InputError: the BERT cannot be made smaller.
        """
        unknown = [n for n in _KNOBS[1:] if getattr(self.settings, n) and n not in self.shape]
        if unknown:
            raise ConfigError(f"compress.{unknown[0]} is of a text encoder, and this run has none")
        mine = Plan(self.settings, self.shape)
        plain = self.settings.model_copy(update={**dict.fromkeys(_KNOBS, 0), "qat": False})
        plans = [
            Plan(plain.model_copy(update={"int8": int8}), self.shape) for int8 in (False, True)
        ]
        apart = self.retrieval.config["adapt"]["tuning"]["text"]
        if mine.trains:
            self._check(mine, apart)
            plans.append(mine)
        elif apart not in APART:
            plans += [Plan(plain.model_copy(update=step), self.shape) for step in self._ladder()]
        found = {plan.key: plan for plan in plans}
        return list(found.values())

    def _check(self, mine: Plan, apart: str) -> None:
        """Finds out before anything is measured whether what is asked for can be made."""
        config = mine.config
        _ = self.placement
        if config.prune:
            Sparsity(config.prune, config.pattern, config.prune_schedule)
        if config.qat and not config.int8:
            raise ConfigError("compress.qat learns for int8; set compress.int8 = true too")
        if self.encoder is not None:
            check(self.encoder, **{name: getattr(config, name) or None for name in self.shape})
        if apart in APART:
            raise InputError(
                f"{self.retrieval.path} holds a BERT with what adapt.tuning.text = {apart} added, "
                "which can be brought to int8 alone; tune it by lora, full or head"
            )

    def _ladder(self) -> Iterator[dict[str, Any]]:
        yield {"prune": 0.5, "int8": True}
        if self.encoder is None:
            return
        half = {name: size // 2 for name, size in self.shape.items()}
        size = heads_of(self.encoder.model.transformer_layers[0])[1]
        if half["heads"] and half["neurons"]:
            yield {"heads": half["heads"], "neurons": half["neurons"], "int8": True}
        words = self.shape["vocabulary"] // 3
        tokenizer = self.encoder.tokenizer
        fewer = {"vocabulary": words, "int8": True}
        trimmed = tokenizer.is_wordpiece and words > len(tokenizer.least)
        if trimmed:
            yield fewer
        if half["layers"]:
            yield {"layers": half["layers"], "int8": True}
            if trimmed:
                yield {"layers": half["layers"], **fewer}
            if half["width"] and half["width"] % size == 0:
                yield {"layers": half["layers"], "width": half["width"], "int8": True}

    def make(self, plan: Plan) -> Path:
        """The run that a plan gives; where no weight changes, the one there is."""
        if not plan.trains:
            return self.source
        return _Making(self, plan).run()

    def judge(self, made: Path, plan: Plan, place: Path) -> tuple[Trial, dict[str, Any]]:
        """Exports the cut that has not seen the test events, and tries that; also says how many
        zeros its kernels hold."""
        recommender = load_recommender(made, "test")
        bundling.check_finite(recommender, made)
        version = place / bundle.VERSIONS / "1"
        with writing(version, kind=bundle.KIND, config={"plan": plan.key}) as draft:
            content = bundling.write(
                recommender,
                str(self.retrieval.config["adapt"]["text"]),
                draft.path,
                int8=plan.config.int8,
                saved_models=False,
            )
            write_json(draft.path / CONTENT, content)
        bundle.publish(place, 1, 1)
        zeros = _zeros(recommender, plan.config.parts) if plan.config.prune else {"zeros": {}}
        del recommender
        found = self.court.judge(place, self.settings.seconds)
        shutil.rmtree(place)
        return found, zeros

    @cached_property
    def court(self) -> Court:
        evaluate = self.config.evaluate
        return Court(
            self.dataset,
            self.split == "item_cold",
            self.judged,
            evaluate.bootstrap,
            self.config.seed,
            evaluate.exclude_history,
        )

    def tree(
        self,
        models: Sequence[Mapping[str, Any]],
        budget: Budget,
        chosen: str,
        misses: Mapping[str, float],
    ) -> dict[str, Any]:
        """Everything that compress.json holds."""
        worse = dominated(models)
        return {
            "format": 1,
            "name": self.source.resolve().name,
            "folder": str(self.source),
            "machine": processor(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "tfrec_version": tfrec.__version__,
            "seed": self.config.seed,
            "cold": self.court.cold,
            "users": len(self.court.around.users),
            "judged": len(self.court.judged),
            "models": [{**model, "worse_than": worse.get(model["key"])} for model in models],
            "budget": dataclasses.asdict(budget),
            "chosen": chosen,
            "misses": dict(misses),
        }


class _Making:
    """One plan at work: the run that it gives is written, part after part."""

    def __init__(self, job: _Job, plan: Plan) -> None:
        self.job, self.plan, self.config = job, plan, plan.config
        self.out = job.source / FOLDER / plan.key
        how = plan.config.model_dump(mode="json", exclude={"int8", "seconds"})
        self.recipe = {"compressed": {"seed": job.config.seed, **how}}
        above = job.retrieval.parents
        # The ranker knows the retrieval beside which it was made, however often that was changed.
        self.parents = {
            **above,
            MERGED: above.get(MERGED, job.retrieval.digest),
            "source": job.retrieval.digest,
        }
        digest = recipe_digest("compress", self.recipe, job.parents)
        self.work = job.source / FOLDER / f".{plan.key}.work" / digest[:16]
        self._students: dict[str, TextEncoder] = {}

    def run(self) -> Path:
        retrieval = self.out / "adapt" / "retrieval"
        config = {**merged_config(self.job.retrieval), **self.recipe}
        if current(retrieval, kind="retrieval", config=config, parents=self.parents) is None:
            self._link()
            began = time.monotonic()
            set_seed(self.job.config.seed)
            with writing(retrieval, kind="retrieval", config=config, parents=self.parents) as draft:
                with disk_errors(retrieval, RESUMES):
                    self._retrieval(draft.path)
                draft.metrics["source"] = dict(self.job.retrieval.metrics)
                draft.metrics["seconds"] = round(time.monotonic() - began, 1)
        if "ranking" in self.job.parents:
            self._ranking(self.job.parents["ranking"], self.out / "adapt" / "ranking")
        discard(self.work.parent)
        return self.out

    def _link(self) -> None:
        """The dataset is that of the run."""
        self.out.mkdir(parents=True, exist_ok=True)
        link = self.out / "prepare"
        if not link.is_symlink():
            link.symlink_to(Path("..", "..", "prepare"))
        settings = self.job.source / "config.json"
        if settings.is_file():
            shutil.copyfile(settings, self.out / "config.json")

    # --- retrieval ---

    def _retrieval(self, folder: Path) -> None:
        job, card = self.job, self.job.card
        features = job.dataset.catalog.features
        profile = read_array(job.retrieval.file("profile.npy"))
        first = ""
        for cut in job.cuts:
            with job.placement.strategy.scope():
                two_tower, old_text = restore_two_tower(job.retrieval, cut, features)
                merge(two_tower)
                teacher = two_tower.encoder
                if card.text_width and teacher is None:
                    teacher = load_text(job.retrieval, cut)
            text = old_text
            (folder / cut).mkdir()
            if teacher is not None:
                student = self._student(teacher, cut)
                text = encoded(student, job.dataset.catalog, "passage")
                # A BERT that was tuned with the towers was not what read the users' profiles.
                tuned = two_tower.encoder or f"{cut}/text/config.json" in job.retrieval.files
                if not tuned and any(job.dataset.users.texts):
                    profile = encoded(student, job.dataset.users, "query")
                digest = student.digest()
                if digest != first:
                    where = folder / cut if first else folder
                    student.save(where / "text")
                    np.save(where / "text.npy", text)
                first = first or digest
            vectors = read_array(job.retrieval.file(f"{cut}/vectors.npy"))
            known = _with_ids(two_tower, old_text, features, vectors)
            if self._learns("towers"):
                self._teach_towers(two_tower, cut, old_text, text, profile, vectors, known)
            new = two_tower.encode_candidate(text, features, known)
            new[0] = 0
            np.save(folder / cut / "vectors.npy", new)
            inner = set()
            if two_tower.encoder is not None:
                inner = {id(v) for v in named_variables(two_tower.encoder).values()}
            weights = {n: v for n, v in named_variables(two_tower).items() if id(v) not in inner}
            save(folder / cut / WEIGHTS, weights)
        if not card.text_width:
            np.save(folder / "text.npy", text)
        np.save(folder / "profile.npy", profile)
        told = {**card.dump(), "cuts": list(job.cuts), "text_digest": ""}
        write_json(folder / "model.json", told)

    def _student(self, teacher: TextEncoder, cut: str) -> TextEncoder:
        """The smaller BERT, the same for cuts whose BERT is the same."""
        structure, prune = self.plan.structure, self.config.prune and "text" in self.config.parts
        if not structure and not prune:
            return teacher
        digest = teacher.digest()
        if digest not in self._students:
            self._students[digest] = self._taught(teacher, structure, bool(prune), cut)
        return self._students[digest]

    def _taught(
        self, teacher: TextEncoder, structure: Mapping[str, int], prune: bool, cut: str
    ) -> TextEncoder:
        job, settings = self.job, teacher.settings
        judged = {"", *(job.dataset.catalog.texts[row] for row in job.judged)}
        texts = [text for text in job.dataset.catalog.texts if text not in judged]
        prepared = [
            *settings.prepared(list(dict.fromkeys(texts)), "passage"),
            *settings.prepared(
                list(dict.fromkeys(t for t in job.dataset.users.texts if t)), "query"
            ),
        ]
        teacher.trainable = False
        with job.placement.strategy.scope():
            student = smaller(teacher, texts, **structure)
            if prune and self.config.prune_schedule == "constant":
                student = sparse(student, texts, self.config.prune, self.config.pattern)
            if structure.keys() == {"vocabulary"} and not prune:
                # It is the teacher already but for words that these texts hardly have.
                return student
            student.trainable = True
            student.model.pooled_dense.trainable = False
            losses, parts = distillation.of_texts(student, teacher)
        batches = distillation.Texts(
            list(teacher.tokenizer.ids(prepared)),
            self.config.tokens,
            job.config.seed,
            job.placement.replicas,
            teacher.tokenizer.length,
            () if "vocabulary" not in structure else teacher.tokenizer.as_in(student.tokenizer),
        )
        rising = prune and self.config.prune_schedule == "polynomial"
        sizes = inputs_of(student, texts) if rising else {}
        self._teach(student, losses, parts, batches, f"text-{cut}", "texts", prune, False, sizes)
        return student

    def _teach_towers(
        self,
        towers: TwoTower,
        cut: str,
        old_text: Floats,
        text: Floats,
        profile: Floats,
        vectors: Floats,
        known: NDArray[np.int32],
    ) -> None:
        """The towers learn, sparse or with int8 kernels, to give the vectors that they gave."""
        job = self.job
        features = job.dataset.catalog.features
        history, users = self._asked(cut)
        arrays = (profile[users], job.dataset.users.features[users])
        told = towers.encode_query(history, vectors, *arrays)
        rows, nothing = np.arange(1, len(vectors)), np.zeros_like(known)
        # Each item by its id, and as if it were new.
        candidates = {
            "text": np.tile(text[rows], (2, 1)),
            "attributes": np.tile(features[rows], (2, 1)),
            "row": np.concatenate([known[rows], nothing[rows]]),
            "told": np.concatenate(
                [vectors[rows], towers.encode_candidate(old_text, features, nothing)[rows]]
            ),
        }
        if kernels(towers.candidate_tower):
            tower = towers.candidate_tower
            losses, parts = distillation.of_vectors(
                lambda batch, training: tf.cast(
                    tower(batch["text"], batch["attributes"], batch["row"]), tf.float32
                )
            )
            batches = self._examples(candidates)
            self._teach(tower, losses, parts, batches, f"candidate-{cut}", "candidates")
        new = towers.encode_candidate(text, features, known)
        new[0] = 0
        inputs = query_inputs(history, towers.config.history, new, *arrays)
        losses, parts = distillation.of_vectors(
            lambda batch, training: towers(
                {name: batch[name] for name in batch if name != "told"}, training=False
            )
        )
        batches = self._examples({**inputs, "told": told})
        tower = towers.query_tower
        if kernels(tower):
            self._teach(tower, losses, parts, batches, f"query-{cut}", "queries")

    def _asked(self, cut: str) -> tuple[Histories, NDArray[np.int64]]:
        """Histories of users, each as it is and up to a random place, and whose they are."""
        everyone = Histories.of(cut_of(self.job.dataset.interactions, cut), self.job.card.coding)
        random = np.random.default_rng(self.job.config.seed)
        met = np.flatnonzero(everyone.lengths)
        users = np.repeat(random.permutation(met)[: self.config.users], 2)
        found = everyone.take(users)
        lengths = found.lengths
        lengths[1::2] = random.integers(1, lengths[1::2] + 1)
        return found.first(lengths), users

    # --- the ranker ---

    def _ranking(self, found: Artifact, folder: Path) -> None:
        """Leaves the ranker: that of the run, or a sparse one."""
        if not self._learns("ranker"):
            if not folder.is_symlink():
                shutil.rmtree(folder, ignore_errors=True)
                folder.symlink_to(Path("..", "..", "..", "adapt", "ranking"))
            return
        if folder.is_symlink():
            folder.unlink()
        config = {**found.config, **self.recipe}
        if current(folder, kind="ranking", config=config, parents=found.parents) is not None:
            return
        with writing(folder, kind="ranking", config=config, parents=found.parents) as draft:
            draft.metrics["source"] = dict(found.metrics)
            for name in found.files.keys() - {"history.json"}:
                (draft.path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(found.file(name), draft.path / name)
            with self.job.placement.strategy.scope():
                ranker = load_ranker(found, read_json(found.file("model.json")))
            if ranker is not None and kernels(ranker):
                with disk_errors(folder, RESUMES):
                    self._teach_ranker(ranker, found)
                save(draft.path / WEIGHTS, named_variables(ranker))

    def _teach_ranker(self, ranker: Any, found: Artifact) -> None:
        """It learns, sparse or with int8 kernels, to say of candidates what it said of them."""
        recommender = recommender_of(self.job.dataset, self.job.retrieval, found, self.job.cuts[0])
        asked = min(max(self.config.users // _CANDIDATES_AS_USERS, 1), BLOCK)
        inputs, answers = _recorded(recommender, asked, self.job.config.seed)
        tasks = list(answers)
        told = np.stack([answers[task] for task in tasks], axis=-1)
        scale = np.maximum(told.std(axis=(0, 1), keepdims=True), 1e-6)
        losses, parts = distillation.of_values(
            lambda batch, training: tf.stack(
                [ranker(batch, training=False)[task] for task in tasks], axis=-1
            )
        )
        arrays = {**inputs, "told": told, "scale": np.broadcast_to(scale, told.shape)}
        batches = self._examples(arrays, _CANDIDATES_AS_USERS)
        self._teach(ranker, losses, parts, batches, "ranker", "ranker")

    # --- teaching ---

    def _learns(self, part: str) -> bool:
        """Whether the towers or the ranker learn anything."""
        return part in self.config.parts and bool(self.config.prune or self.config.qat)

    def _examples(self, arrays: Mapping[str, Any], of: int = 1) -> distillation.Examples:
        return distillation.Examples(
            arrays,
            max(self.config.batch_size // of, 1),
            self.job.config.seed,
            self.job.placement.replicas,
        )

    def _teach(
        self,
        student: Any,
        losses: distillation.Loss,
        parts: Sequence[str],
        batches: Any,
        name: str,
        title: str,
        prune: bool = True,
        int8: bool = True,
        inputs: Mapping[int, Floats] | None = None,
    ) -> None:
        """Trains; a training that was killed goes on from its last checkpoint.

        ``prune`` and ``int8`` are false where the settings' pruning, and their learning of int8,
        are not for this part.
        """
        steps = batches.steps_per_epoch
        epochs = self.config.epochs or max(round(self.config.updates / steps), 1)
        sparsity = (
            Sparsity(self.config.prune, self.config.pattern, self.config.prune_schedule)
            if prune and self.config.prune
            else None
        )
        rounded = dense_layers(student) if int8 and self.config.qat else []
        losses = learning(rounded, losses)
        with self.job.placement.strategy.scope():
            pruner = None
            if sparsity is not None:
                pruner = Pruner(kernels(student), sparsity, epochs * steps, inputs)
            model = distillation.Distiller(student, losses, parts, pruner)
        told = self.config.model_dump(include=set(TrainingConfig.model_fields))
        told |= {"epochs": epochs, "batch_size": self.job.placement.replicas}
        # No average of the weights: it would fill the zeros again.
        one = TrainingConfig(**told, ema=0.0)
        Trainer(model, one, self.job.placement).fit(
            batches, work_dir=self.work / name, title=f"{self.plan.key}, {title}"
        )
        settle(rounded)


def _zeros(recommender: Recommender, parts: Collection[str]) -> dict[str, Any]:
    """``zeros``: the share in each kernel of the parts that are pruned; ``zeros_of_all``: in all of
    these. In int8 as many are zero, or more: what is zero stays so."""
    engine = recommender.engine
    assert isinstance(engine, TensorFlowEngine)
    models = {"towers": engine.two_tower, "ranker": engine.ranker}
    if recommender.text.shape[1]:
        models = {"text": engine.text_encoder, **models}
    found = {
        f"{part}.{name}": (float(np.mean(kernel.numpy() == 0)), int(np.prod(kernel.shape)))
        for part, model in models.items()
        if model is not None and part in parts
        for name, kernel in kernels(model).items()
    }
    weights = sum(size for _, size in found.values())
    return {
        "zeros": {name: share for name, (share, _) in found.items()},
        "zeros_of_all": sum(s * n for s, n in found.values()) / max(weights, 1),
    }


def _with_ids(
    towers: TwoTower, text: Floats, features: Floats, vectors: Floats
) -> NDArray[np.int32]:
    """int32 (n + 1,), each catalog row, or 0 where its vector was made without its id."""
    rows = np.arange(len(vectors), dtype=np.int32)
    off = [
        np.abs(towers.encode_candidate(text, features, ids) - vectors).max(axis=1)
        for ids in (rows, np.zeros_like(rows))
    ]
    return np.where(off[0] <= off[1], rows, 0).astype(np.int32)


class _Recorder:
    """An engine that keeps what its ranker was asked and answered.

    Args:
      engine: Does all.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.asked: list[Mapping[str, Floats]] = []
        self.told: list[dict[str, Floats]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def rank(self, inputs: Mapping[str, Floats]) -> dict[str, Floats]:
        """See :class:`tfrec.recommender.Engine`."""
        found: dict[str, Floats] = self._engine.rank(inputs)
        self.asked.append(inputs)
        self.told.append(found)
        return found


def _recorded(
    recommender: Recommender, users: int, seed: int
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """What a ranker is asked for some users, and what it says."""
    met = np.flatnonzero(np.diff(recommender.interactions.offsets)).astype(np.int32)
    chosen = np.sort(np.random.default_rng(seed).permutation(met)[: max(users, 1)])
    recommender.engine = engine = _Recorder(recommender.engine)
    # Asked of every candidate, also where its tasks count for nothing in the score.
    tasks = recommender.policy.tasks
    recommender.policy = dataclasses.replace(
        recommender.policy, score=dict.fromkeys(("retrieval", *tasks), 1.0)
    )
    recommender.lists(recommender.interactions, chosen, 10)

    def joined(parts: Sequence[Mapping[str, Floats]]) -> dict[str, Floats]:
        names = parts[0] if parts else ()
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    return joined(engine.asked), joined(engine.told)
