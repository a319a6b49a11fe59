"""Config: one frozen object with a section for each stage.

Read from a preset, a TOML file or nothing, then changed by ``--set section.key=value``. Unknown
keys and values out of range are :class:`~tfrec.errors.ConfigError`. Every field's description here
is its documentation; ``tfrec run --help`` and docs/configuration.md are made from it.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tfrec.errors import ConfigError

Tracker = Literal["tensorboard", "wandb", "mlflow"]
TuningMethod = Literal["head", "full", "lora", "adapter", "prompt", "bitfit"]
BaselineName = Literal["popular", "item_knn", "ease", "als"]

RankerTask = Literal["click", "like", "rating", "conversion"]

TASKS: tuple[RankerTask, ...] = get_args(RankerTask)
"""What a ranker can predict."""

SCORE_PARTS = ("retrieval", "linear", "text", "popularity", *TASKS)
"""What the final score can be a weighted sum of."""

SEQUENCE_OBJECTIVES = (
    "masked", "denoising", "vae", "next_item", "contrastive", "text_history"
)  # fmt: skip
"""Objectives of pretraining that train the towers."""

TEXT_OBJECTIVES = ("mlm", "text_history")
"""Objectives of pretraining that cannot do without texts."""

OBJECTIVES = (*SEQUENCE_OBJECTIVES, "mlm")
"""What an encoder can be pretrained on."""

SIZES = (
    "embedding_dim",
    "layers",
    "heads",
    "feed_forward",
    "text_hidden",
    "events",
    "time_gaps",
    "request_time",
)
"""Settings of `[adapt.retrieval]` that decide about the shape of a pretrained encoder."""

FILE = "config.json"
"""What a run was told, in its folder."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_BARE_LIST = re.compile(r"""\[[^][{}"']*\]""")


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know and values of another type.

    A whole number is a number too; `true` is none.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False
    )


class DataConfig(Section):
    """Where the data comes from, how it is cleaned and how it is split."""

    source: str = Field("files", description="a name from `tfrec data list`, or `files`")
    data_dir: str = Field("", description="a folder that already holds the source's raw files")
    interactions: str = Field(
        "", description="file of events: csv, tsv, parquet, jsonl (.gz too), or a folder of them"
    )
    items: str = Field("", description="file of items, one row each")
    users: str = Field("", description="file of users, one row each (optional)")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="our column name = yours, e.g. {user_id = 'customer', timestamp = 'time'}",
    )
    item_text: list[str] = Field(
        default_factory=list,
        description="item columns the BERT reads, in order; empty: title, then every text or "
        "categorical column",
    )
    item_attributes: list[str] = Field(
        default_factory=list,
        description="item columns used as attributes; empty: every categorical or numeric column",
    )
    categorical: list[str] = Field(
        default_factory=list,
        description="columns of items and users that are categories, whatever they look like",
    )
    max_values: int = Field(
        256, ge=1, description="most frequent values of a categorical column that are features"
    )
    separator: str = Field(
        "|", min_length=1, description="splits several values in one categorical cell"
    )
    timestamp_unit: Literal["auto", "s", "ms", "us", "ns"] = Field(
        "auto", description="unit of numeric timestamps; auto: judged by their median"
    )
    unknown_items: Literal["keep", "drop", "error"] = Field(
        "keep", description="interactions whose item is not in the items file"
    )
    duplicates: Literal["all", "first", "last"] = Field(
        "all", description="which of several events of the same user with the same item to keep"
    )
    event_weights: dict[str, float] = Field(
        default_factory=dict, description="weight of each event type in training, 1 if not named"
    )
    positive_rating: float | None = Field(
        None, description="drop rated events below this; null: every event counts as positive"
    )
    max_events_per_day: int = Field(
        0, ge=0, description="users above this many events on one day are robots; 0: no limit"
    )
    min_user_events: int = Field(1, ge=1, description="users with fewer events are dropped")
    min_item_events: int = Field(1, ge=1, description="items with fewer events are dropped")
    k_core: int = Field(0, ge=0, description="drop until every user and item has so many; 0: off")
    split: Literal["leave_one_out", "time", "item_cold", "user_cold", "none"] = Field(
        "leave_one_out", description="which events validate and test; none: every event trains"
    )
    valid_fraction: float = Field(
        0.1, gt=0, lt=0.5, description="validation part of the time and cold-start splits"
    )
    test_fraction: float = Field(
        0.1, gt=0, lt=0.5, description="test part of the time and cold-start splits"
    )

    @field_validator("columns")
    @classmethod
    def _columns_are_ours(cls, columns: dict[str, str]) -> dict[str, str]:
        known = ("user_id", "item_id", "timestamp", "event", "rating", "weight", "title")
        for name in columns:
            if name not in known:
                raise ValueError(f"'{name}' is none of our columns: {', '.join(known)}")
        return columns

    @field_validator("event_weights")
    @classmethod
    def _weights_are_not_negative(cls, weights: dict[str, float]) -> dict[str, float]:
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"the weight of '{name}' is {weight}, and must not be negative")
        return weights


class TrainingConfig(Section):
    """The settings of one fit, shared by every task of `[adapt]`."""

    epochs: int = Field(60, ge=1, le=100_000, description="passes over the training events")
    batch_size: int = Field(
        64, ge=1, description="rows of a global batch; fewer on data that would not fill 8 batches"
    )
    learning_rate: float = Field(
        2e-3, gt=0, le=1, description="of Adam, from the end of the warm-up"
    )
    warmup_steps: int = Field(100, ge=0, description="steps of linear learning-rate warm-up")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="learning rate after the warm-up"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay (AdamW)")
    clip_norm: float = Field(5.0, ge=0, description="global gradient norm limit; 0: none")
    accumulate: int = Field(
        1,
        ge=1,
        description="parts in which a batch is computed, to keep less in memory; where rows are "
        "told from each other (sampled, contrastive), it is from those of their part",
    )
    ema: float = Field(0.99, ge=0, lt=1, description="moving average of the weights; 0: none")
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = Field(
        "float32", description="mixed: layers compute in 16 bits, weights stay in 32"
    )
    jit_compile: bool = Field(True, description="compile the whole step with XLA")
    validate_every: int = Field(5, ge=1, description="epochs between validations")
    patience: int = Field(
        5, ge=0, description="validations without a better NDCG@10 before stopping; 0: never"
    )
    checkpoint_minutes: float = Field(
        0.5, ge=0, description="at most so much work is lost to a kill, at an epoch's end"
    )


class RetrievalConfig(TrainingConfig):
    """The two-tower model of `adapt/retrieval`."""

    embedding_dim: int = Field(64, ge=4, le=4096, description="width of query and candidate")
    layers: int = Field(2, ge=0, le=48, description="transformer blocks of the query tower")
    heads: int = Field(2, ge=1, le=64, description="attention heads of a block")
    feed_forward: int = Field(
        4, ge=1, le=16, description="width of the blocks' feed-forward layers, in embedding_dim"
    )
    history: int = Field(100, ge=1, le=4096, description="events of a history that are read")
    dropout: float = Field(
        0.3, ge=0, lt=1, description="share of the query tower's activations left out in a step"
    )
    item_ids: bool = Field(True, description="candidates have an id embedding besides their text")
    id_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of item ids left out in a step, so that text must do"
    )
    text_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of each item text's vector left out in a step; for items without events",
    )
    text_hidden: int = Field(
        0,
        ge=0,
        le=65_536,
        description="hidden units through which a text vector makes its candidate, beside a linear "
        "map; 0: that alone; where items are told apart by their texts, 1024",
    )
    time_gaps: bool = Field(True, description="the query tower reads the time between events")
    events: bool = Field(True, description="the query tower reads event types and ratings")
    request_time: bool = Field(False, description="the time of the request is an input")
    loss: Literal["auto", "full_softmax", "sampled"] = Field(
        "auto", description="auto: full softmax up to 50,000 items, sampled above"
    )
    temperature: float = Field(1.0, gt=0, description="divides the logits of the softmax")
    positions: int = Field(16, ge=1, description="sampled loss: places of a row used in a step")
    uniform_negatives: int = Field(1024, ge=0, description="sampled loss: uniform negatives")
    hard_negatives: int = Field(0, ge=0, description="sampled loss: hardest negatives kept; 0: all")


class RankingConfig(TrainingConfig):
    """The multi-task ranker of `adapt/ranking`."""

    epochs: int = Field(10, ge=1, le=100_000)
    batch_size: int = Field(512, ge=1, description="events of a global batch")
    learning_rate: float = Field(1e-3, gt=0, le=1)
    validate_every: int = Field(1, ge=1)
    patience: int = Field(3, ge=0)
    ema: float = Field(0.0, ge=0, lt=1)
    candidates: int = Field(200, ge=1, le=10_000, description="candidates that are ranked")
    negatives: int = Field(7, ge=1, le=1000, description="exposures beside each positive event")
    examples_per_user: int = Field(
        16, ge=1, description="events of each user, drawn at random, that the ranker learns from"
    )
    history: int = Field(50, ge=1, le=4096, description="events of a history that are read")
    tasks: list[RankerTask] = Field(
        default_factory=list,
        description="what is predicted, among click, like, rating, conversion (which needs click); "
        "empty: all that the data supports",
    )
    fusion: Literal["linear", "gated", "mmoe"] = Field(
        "mmoe",
        description="how retrieval scores, behaviour, the user and the item are put together: "
        "a weighted sum of their features; an expert for each of the four, mixed by a gate a task; "
        "crossed and read by experts, mixed by a gate a task",
    )
    task_weighting: Literal["fixed", "uncertainty"] = Field(
        "fixed",
        description="how much each task counts in training: as task_weights says, or as learned "
        "(Kendall et al. 2018)",
    )
    task_weights: dict[str, float] = Field(
        default_factory=dict, description="fixed weight of each task's loss, 1 if not named"
    )
    text_width: int = Field(
        32,
        ge=0,
        le=1024,
        description="main directions of the texts of items and users that are read; 0: no text",
    )
    cross_layers: int = Field(2, ge=0, le=8, description="DCN-v2 cross layers (mmoe)")
    experts: int = Field(4, ge=1, le=64, description="experts (mmoe)")
    hidden: int = Field(64, ge=4, le=4096, description="width of an expert (gated, mmoe)")
    dropout: float = Field(
        0.1, ge=0, lt=1, description="share of the experts' inputs and outputs left out in a step"
    )
    like_rating: float = Field(4.0, description="a rating of at least this is a like")
    linear_items: int = Field(
        20_000, ge=0, description="catalogs up to this size get the linear item-item model; 0: off"
    )
    linear_of_new: bool = Field(
        False,
        description="items without events get the linear model's weights of what they read like",
    )
    score: dict[str, float] = Field(
        default_factory=dict,
        description="weight of each part of the final score (retrieval, linear, text, popularity, "
        "click, like, rating, conversion); empty: chosen on validation",
    )

    @field_validator("tasks")
    @classmethod
    def _tasks_can_be_together(cls, tasks: list[RankerTask]) -> list[RankerTask]:
        if len(set(tasks)) < len(tasks):
            raise ValueError("a task comes twice")
        if "conversion" in tasks and "click" not in tasks:
            raise ValueError("'conversion' needs 'click' beside it")
        return tasks

    @field_validator("task_weights")
    @classmethod
    def _weights_are_of_tasks_and_not_negative(cls, weights: dict[str, float]) -> dict[str, float]:
        for task, weight in weights.items():
            if task not in TASKS:
                raise ValueError(f"'{task}' is no task of the ranker" + _nearest(task, TASKS))
            if weight < 0:
                raise ValueError(f"the weight of '{task}' is {weight}, and must not be negative")
        return weights

    @model_validator(mode="after")
    def _weights_are_given_or_learned(self) -> RankingConfig:
        if self.task_weights and self.task_weighting == "uncertainty":
            raise ValueError(
                "task_weights are fixed, and task_weighting = 'uncertainty' learns them: "
                "drop one of the two"
            )
        return self

    @field_validator("score")
    @classmethod
    def _parts_are_known(cls, score: dict[str, float]) -> dict[str, float]:
        for part in score:
            if part not in SCORE_PARTS:
                raise ValueError(f"'{part}' is no part of the score" + _nearest(part, SCORE_PARTS))
        return score


class TuningConfig(Section):
    """Which pretrained weights move, and how fast. What is new is always trained."""

    text: TuningMethod = Field(
        "head",
        description="of the BERT: head: none, texts are encoded once; full: its weights; lora, "
        "adapter, prompt: few new ones; bitfit: its biases",
    )
    behaviour: TuningMethod = Field(
        "full", description="the same of what came from a pretrained behaviour encoder, if any did"
    )
    layers: list[int] = Field(
        default_factory=list,
        description="the BERT's layers that are tuned, from 0, or from -1 at the top downwards; "
        "empty: all, and the embeddings",
    )
    behaviour_layers: list[int] = Field(
        default_factory=list, description="the same of the behaviour encoder's blocks"
    )
    rank: int = Field(4, ge=1, le=256, description="lora: rank of a change")
    bottleneck: int = Field(32, ge=1, le=4096, description="adapter: width of its inner layer")
    prompts: int = Field(16, ge=1, le=512, description="prompt: learned places in every layer")
    text_rate: float | None = Field(
        None,
        gt=0,
        le=10,
        description="learning rate of what moves in the BERT, in learning_rate; null: 0.025 for "
        "full, 0.25 for the others",
    )
    behaviour_rate: float | None = Field(
        None,
        gt=0,
        le=10,
        description="the same of what came from a pretrained behaviour encoder, with `full`; "
        "null: 0.15 where the items' ids came with it, else 1",
    )
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="learning rate of a layer over that of the layer above it"
    )
    unfreeze_epochs: int = Field(
        0, ge=0, description="epochs until the next layer moves too, from the top; 0: all at once"
    )
    recompute: bool = Field(
        False, description="the BERT's layers are computed twice, to keep less in memory"
    )


class AdaptConfig(Section):
    """Training of the task models. Training settings given here hold for every task."""

    text: str = Field(
        "all-MiniLM-L6-v2",
        description="the BERT: a known name, a keras-nlp preset, a folder; `none`: no text",
    )
    text_length: int = Field(256, ge=4, le=512, description="tokens of a text that are read")
    encoder: str = Field(
        "",
        description="a pretrained encoder to start from: its folder, or `pretrain` for that of "
        "the run, which `tfrec run` then makes; empty: none",
    )
    users: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the users whose events retrieval and ranking learn from; how popular "
        "an item is, is counted over everybody's",
    )
    distribution: Literal["auto", "one_device", "mirrored", "multi_worker", "tpu"] = Field(
        "auto", description="auto: the workers of TF_CONFIG, a TPU, every GPU, or the processor"
    )
    refit: bool = Field(
        True, description="after choosing on validation, train on validation and test events too"
    )
    refit_epochs: int = Field(6, ge=1, description="epochs of each refit, from the chosen weights")
    tracking: list[Tracker] = Field(
        default=["tensorboard"], description="where losses and metrics are recorded"
    )
    tuning: TuningConfig = TuningConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    ranking: RankingConfig = RankingConfig()

    def encoder_folder(self, run: Path) -> Path:
        """Where the encoder is that `encoder` names, for a run's folder.

        A relative path counts from the current folder; what is not there is looked for from the
        folders that the run is in, so that a run is found usable from wherever it is asked.
        """
        if self.encoder == "pretrain":
            return run / "pretrain"
        places = [Path(self.encoder), *(above / self.encoder for above in run.resolve().parents)]
        return next((place for place in places if place.exists()), places[0])

    @model_validator(mode="before")
    @classmethod
    def _shared_training_settings_reach_every_task(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        shared = {k: v for k, v in data.items() if k in TrainingConfig.model_fields}
        rest = {k: v for k, v in data.items() if k not in shared}
        for task in ("retrieval", "ranking") if shared else ():
            given = rest.get(task, {})
            if isinstance(given, dict):
                rest[task] = {**shared, **given}
        return rest


class PretrainConfig(TrainingConfig):
    """Pretraining on behaviour sequences. Sizes are those of `[adapt.retrieval]`."""

    batch_size: int = Field(
        32, ge=1, description="rows of a global batch; fewer on data that would not fill 8 batches"
    )
    objectives: dict[str, float] = Field(
        default_factory=lambda: {"masked": 1.0, "next_item": 1.0, "vae": 0.5},
        description="weight of each objective, among masked, denoising, vae, next_item, "
        "contrastive, text_history, mlm",
    )
    users: Literal["all", "others"] = Field(
        "all", description="others: only the users that `adapt.users` leaves out of adaptation"
    )
    train_text: bool = Field(
        False, description="contrastive and text_history train the BERT too, as mlm always does"
    )
    text_epochs: int = Field(3, ge=1, le=10_000, description="the BERT's passes over the texts")
    text_batch_size: int = Field(32, ge=1, description="texts of a global batch of the BERT")
    text_learning_rate: float = Field(3e-5, gt=0, le=1, description="of the BERT")
    recompute: bool = Field(
        False, description="the BERT's layers are computed twice, to keep less in memory"
    )
    mask_rate: float = Field(0.3, gt=0, lt=1, description="masked: share of events hidden")
    latent: int = Field(64, ge=1, le=4096, description="vae: width of the Gaussian")
    history_texts: int = Field(
        3,
        ge=1,
        le=100,
        description="text_history: texts of each user, up to random places",
    )
    divergence: float = Field(0.2, ge=0, description="vae: weight of the divergence in the end")

    @field_validator("objectives")
    @classmethod
    def _objectives_are_known(cls, objectives: dict[str, float]) -> dict[str, float]:
        for name, weight in objectives.items():
            if name not in OBJECTIVES:
                raise ValueError(f"'{name}' is no objective" + _nearest(name, OBJECTIVES))
            if weight < 0:
                raise ValueError(f"the weight of '{name}' is {weight}, and must not be negative")
        return objectives


CompressPart = Literal["text", "towers", "ranker"]


class CompressConfig(Section):
    """Smaller models, which learn to answer as the trained ones do."""

    epochs: int = Field(
        0, ge=0, le=100_000, description="passes over the examples; 0: as many as make `updates`"
    )
    updates: int = Field(
        300, ge=1, description="updates of the weights where `epochs` is 0; one pass at least"
    )
    batch_size: int = Field(64, ge=1, description="users of a batch, for the towers and the ranker")
    tokens: int = Field(2048, ge=16, description="tokens of a batch of texts, padding included")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="peak learning rate (AdamW)")
    warmup_steps: int = Field(20, ge=0, description="steps of linear learning-rate warm-up")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "linear", description="learning rate after the warm-up"
    )
    clip_norm: float = Field(1.0, ge=0, description="global gradient norm limit; 0: none")
    jit_compile: bool = Field(False, description="compile with XLA, once for each length of texts")
    checkpoint_minutes: float = Field(
        0.5, ge=0, description="a checkpoint is written after an epoch if the last is so old"
    )
    distribution: Literal["auto", "one_device", "mirrored"] = Field(
        "auto", description="as `adapt.distribution`, on one machine"
    )
    parts: list[CompressPart] = Field(
        default_factory=lambda: list(get_args(CompressPart)),
        description="what is pruned or learns int8, among text, towers, ranker",
    )
    prune: float = Field(0.0, ge=0, lt=1, description="share of the kernels' weights made zero")
    pattern: Literal["unstructured", "block", "2:4"] = Field(
        "unstructured", description="which weights: any, four in a row, or two of every four"
    )
    prune_schedule: Literal["constant", "polynomial"] = Field(
        "constant",
        description="all zeros from the start, as 2:4 always has them, or rising over the training",
    )
    layers: int = Field(0, ge=0, description="the BERT's layers that stay; 0: all")
    heads: int = Field(0, ge=0, description="attention heads of each layer that stay; 0: all")
    neurons: int = Field(0, ge=0, description="feed-forward neurons that stay; 0: all")
    width: int = Field(0, ge=0, description="of the BERT inside; 0: as it is")
    vocabulary: int = Field(0, ge=0, description="tokens of the BERT that stay; 0: all")
    int8: bool = Field(True, description="the text encoder has int8 weights in the end")
    qat: bool = Field(False, description="towers and ranker learn to work with int8 kernels")
    users: int = Field(4096, ge=1, description="users that the towers and the ranker learn from")
    seconds: float = Field(2.0, gt=0, description="how long each of the times is measured")


class EvaluateConfig(Section):
    """What the report measures, and against whom."""

    k: list[int] = Field(
        default_factory=lambda: [1, 5, 10, 20, 50],
        min_length=1,
        description="lengths of list that are measured, each at least 1",
    )
    baselines: list[BaselineName] = Field(
        default=["popular", "item_knn", "ease", "als"],
        description="what our models are set beside, among popular, item_knn, ease, als",
    )
    bootstrap: int = Field(1000, ge=0, description="resamples behind the intervals; 0: none")
    exclude_history: bool = Field(True, description="items of the history are not recommended")
    by_events: int = Field(
        1000, ge=0, description="users, at most, of the curve by number of events; 0: no curve"
    )
    examples: int = Field(3, ge=0, description="users shown with titles in the report")

    @field_validator("k")
    @classmethod
    def _lists_are_not_empty(cls, lengths: list[int]) -> list[int]:
        for length in lengths:
            if length < 1:
                raise ValueError(f"{length} is no length of a list, which is at least 1")
        return lengths


class RecommendConfig(Section):
    """What a recommendation is by default."""

    k: int = Field(10, ge=1, le=10_000, description="items for each user")
    exclude_seen: bool = Field(True, description="items of the history are not recommended")


class TuneConfig(Section):
    """The search for better settings of `[adapt]`, by their validation NDCG@10."""

    task: Literal["retrieval", "ranking"] = Field(
        "retrieval", description="whose settings; ranking: on the retrieval of this configuration"
    )
    trials: int = Field(
        20, ge=1, le=100_000, description="trials in all, those of earlier calls counted"
    )
    timeout: float = Field(
        0.0, ge=0, description="seconds after which no further trial begins; 0: no limit"
    )
    epochs: int = Field(
        0, ge=0, description="most epochs of a trial; 0: as many as the configuration says"
    )
    pruner: Literal["median", "hyperband", "none"] = Field(
        "median", description="what ends a trial early whose validations are behind the others'"
    )
    space: dict[str, Any] = Field(
        default_factory=dict,
        description="key -> its choices as a list, or {low, high, log, step}, e.g. "
        "adapt.retrieval.layers = [1, 2]; empty: the task's own space (docs/tune.md)",
    )

    @field_validator("space", mode="before")
    @classmethod
    def _keys_are_whole(cls, space: Any) -> Any:
        """TOML reads a dotted key as tables in tables."""
        return dict(_dimensions(space)) if isinstance(space, dict) else space

    @field_validator("space")
    @classmethod
    def _dimensions_have_values(cls, space: dict[str, Any]) -> dict[str, Any]:
        for key, told in space.items():
            if problem := _wrong_with(told):
                raise ValueError(f"{key} {problem}")
        return space


def _dimensions(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value and not set(value) & _RANGE:
            yield from _dimensions(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


_RANGE = {"low", "high", "log", "step"}


def _ends(told: Mapping[str, Any]) -> list[Any]:
    """The smallest and largest value of a range, and the one beside the smallest."""
    return [told["low"], told["high"], *([told["low"] + told["step"]] if "step" in told else [])]


def _wrong_with(told: Any) -> str:
    """What keeps a dimension of the search space from being one; empty: nothing."""
    if isinstance(told, list):
        plain = all(isinstance(value, str | int | float) for value in told)
        return "" if told and plain else f"= {told}: a list of choices holds texts or numbers"
    if not isinstance(told, dict) or not {"low", "high"} <= set(told) <= _RANGE:
        return f"= {told}: neither a list of choices nor {{low, high}} with log or step"
    numbers = [told[name] for name in ("low", "high", "step") if name in told]
    if any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        return f"= {told}: low, high and step are numbers"
    log, step = told.get("log", False), told.get("step")
    if not isinstance(log, bool) or (log and step is not None):
        return f"= {told}: log is true or false, and true goes without a step"
    if (
        told["low"] >= told["high"]
        or (log and told["low"] <= 0)
        or (step is not None and step <= 0)
    ):
        return f"= {told}: low is below high, above 0 with log, and a step above 0"
    return ""


class StepsConfig(Section):
    """How a served list is made: `policy.toml` of a bundle, or the defaults."""

    sources: list[str] = Field(
        default_factory=lambda: ["behaviour", "text", "popular", "new"],
        description="what finds candidates, by name",
    )
    filters: list[str] = Field(
        default_factory=lambda: ["seen", "hidden"], description="what leaves items out, by name"
    )
    rerank: list[str] = Field(
        default_factory=lambda: ["freshness", "diversity", "caps", "exploration"],
        description="what orders the best of the ranked, by name, one after another",
    )
    plugins: list[str] = Field(
        default_factory=list,
        description="modules of yours that are imported first and register steps of their own",
    )
    retrieve: int = Field(500, ge=1, le=10_000, description="candidates that all sources give")
    rank: int = Field(200, ge=1, le=10_000, description="of them, those that the ranker reads")
    keep: int = Field(50, ge=1, le=10_000, description="of them, those that are re-ranked")
    diversity: float = Field(
        0.0,
        ge=0,
        le=1,
        description="where a request says nothing: 0 relevance alone, 1 all variety",
    )
    seen: list[str] = Field(
        default_factory=list,
        description="types of events after which an item does not come again; empty: all",
    )
    caps: dict[str, int] = Field(
        default_factory=dict, description="attribute -> most items of a list with the same value"
    )
    freshness: float = Field(
        0.0, ge=0, description="most that a new item's score gains, in spreads of the list's scores"
    )
    half_life_days: float = Field(7.0, gt=0, description="age at which half of that is left")
    exploration: float = Field(
        0.0, ge=0, le=1, description="share of places that are drawn at random among candidates"
    )
    blocked: dict[str, list[str]] = Field(
        default_factory=dict, description="attribute -> values that are never recommended"
    )


class ServeConfig(Section):
    """The server: where it listens, what it keeps, and what it refuses."""

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(8080, ge=0, le=65535, description="0: any that is free")
    hosts: list[str] = Field(
        default_factory=list,
        description="further names under which it is asked, e.g. by a proxy on this machine",
    )
    state: str = Field(
        "", description="a folder (SQLite) or redis://HOST:PORT/DB; empty: BUNDLE.state"
    )
    synchronous: Literal["full", "normal"] = Field(
        "full", description="full: an acknowledged event survives a power cut; normal: a kill"
    )
    engine: str = Field(
        "litert", description="what runs the models: `litert`, or tf-serving://HOST:PORT"
    )
    engine_timeout: float = Field(0.25, gt=0, description="seconds for an answer of that engine")
    threads: int = Field(0, ge=0, description="that compute; 0: one for each core")
    batch: int = Field(16, ge=1, le=512, description="most requests that are answered together")
    deadline: float = Field(2.0, gt=0, description="seconds after which a request is given up")
    queue: int = Field(1024, ge=1, description="requests that wait at most; more are refused")
    watch: float = Field(
        2.0, ge=0, description="seconds between looks for a new version; 0: never looks"
    )
    max_body: int = Field(1 << 20, ge=1024, description="bytes of a request, imports excepted")
    max_import: int = Field(1 << 28, ge=1024, description="bytes of an import")
    max_k: int = Field(500, ge=1, description="most items of an answer")
    max_ids: int = Field(10_000, ge=1, description="most ids in a list of a request")
    max_text: int = Field(10_000, ge=1, description="most characters of a text")
    max_bulk: int = Field(10_000, ge=1, description="most events or items of a request")
    rate: float = Field(
        0.0, ge=0, description="requests a second of one key or address; 0: 50, none on loopback"
    )
    keys: str = Field("", description="file of API keys; empty: keys.json beside the state")
    exposures: bool = Field(True, description="whether what was shown is logged")
    exposure_rows: int = Field(20_000, ge=1, description="rows of a file of that log")
    exposure_seconds: float = Field(300.0, gt=0, description="after which a file is closed")
    log_salt: str = Field("", description="mixed into hashed user ids; empty: drawn once, kept")


class Config(Section):
    """Everything a run is told, from raw files to recommendations."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="run folder")
    seed: int = Field(1, ge=0, le=2**31 - 1, description="of everything that is drawn at random")
    data: DataConfig = DataConfig()
    pretrain: PretrainConfig = PretrainConfig()
    adapt: AdaptConfig = AdaptConfig()
    compress: CompressConfig = CompressConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    recommend: RecommendConfig = RecommendConfig()
    serve: ServeConfig = ServeConfig()
    steps: StepsConfig = StepsConfig()
    tune: TuneConfig = TuneConfig()

    @model_validator(mode="after")
    def _what_is_searched_can_be_set(self) -> Config:
        for key, told in self.tune.space.items():
            if not _searched(key, self.tune.task):
                raise ConfigError(_why_not_searched(key, self.tune.task))
            for value in told if isinstance(told, list) else _ends(told):
                try:
                    self.changed({key: value})
                except ConfigError as error:
                    raise ConfigError(f"tune.space: {error}") from None
        return self

    @classmethod
    def load(cls, what: str, settings: Sequence[str] = ()) -> Config:
        """Reads a preset, a TOML file or ``files`` and applies ``section.key=value`` settings.

        Raises:
          ConfigError: the preset or file is unknown or broken, or a key or value is wrong.
        """
        tree = _read(what)
        for setting in settings:
            _apply(tree, setting)
        return cls.parse(tree)

    @classmethod
    def parse(cls, tree: Mapping[str, Any]) -> Config:
        """Checks a tree of plain values, as TOML or a manifest holds it."""
        try:
            return cls.model_validate(dict(tree))
        except ValidationError as error:
            raise ConfigError(_explain(error)) from None

    def dump(self) -> dict[str, Any]:
        """Returns plain values from which :meth:`parse` makes an equal Config."""
        return self.model_dump(mode="json")

    def changed(self, values: Mapping[str, Any]) -> Config:
        """The same with other values at some ``section.key``, and with nothing to search.

        Raises:
          ConfigError: a key is unknown or a value wrong.
        """
        tree = self.dump()
        del tree["tune"]
        for key, value in values.items():
            _put(tree, key.split("."), value)
        return Config.parse(tree)

    def toml(self) -> str:
        """What differs from the defaults, as the text of a file that :meth:`load` reads."""
        return "\n".join(_toml({"name": self.name, **_difference(self.dump(), Config().dump())}))

    def at(self, key: str) -> Any:
        """The value at ``section.key``."""
        value: Any = self.dump()
        for part in key.split("."):
            value = value[part]
        return value


def presets() -> list[str]:
    """Names of the configurations that ship with tfrec."""
    folder = resources.files("tfrec") / "presets"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name[-5:] == ".toml")


def _read(what: str) -> dict[str, Any]:
    if what == "files":
        return {"name": "files"}
    if what in presets():
        text = (resources.files("tfrec") / "presets" / f"{what}.toml").read_text("utf-8")
        return tomllib.loads(text)
    path = Path(what)
    if path.suffix != ".toml":
        raise ConfigError(
            f"'{what}' is neither a preset ({', '.join(presets())}), nor a .toml file, nor `files`"
            + _nearest(what, [*presets(), "files"])
        )
    try:
        return {"name": path.stem, **tomllib.loads(path.read_text("utf-8"))}
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the configuration {path} is not UTF-8; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the configuration {path} is not valid TOML: {error}") from None


def _apply(tree: dict[str, Any], setting: str) -> None:
    key, equals, value = setting.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set takes section.key=value, and got '{setting}'")
    _put(tree, parts, _value(value.strip()))


def _put(tree: dict[str, Any], parts: Sequence[str], value: Any) -> None:
    node = tree
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{'.'.join(parts)}: '{part}' is a value and holds no keys")
    node[parts[-1]] = value


def _difference(tree: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What of a tree is not in another of the same sections."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        default = other.get(key)
        # A table of the user's own keys replaces the default one, and does not add to it.
        if isinstance(value, dict) and isinstance(default, dict) and default:
            value = _difference(value, default)
            if value:
                found[key] = value
        elif value != default:
            found[key] = value
    return found


def _toml(tree: Mapping[str, Any], path: str = "") -> Iterator[str]:
    inner = {key: value for key, value in tree.items() if isinstance(value, dict)}
    if path and len(inner) < len(tree):
        yield f"[{path}]"
    for key, value in tree.items():
        if key not in inner:
            yield f"{_toml_key(key)} = {_toml_value(value)}"
    if len(inner) < len(tree):
        yield ""
    for key, value in inner.items():
        yield from _toml(value, f"{path}.{_toml_key(key)}" if path else _toml_key(key))


def _toml_key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    """Numbers, booleans, texts and lists of them are written as in JSON, but for one character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


_SEARCHED = {
    "retrieval": ("adapt.retrieval.*", "adapt.tuning.*", "adapt.text", "adapt.text_length"),
    "ranking": ("adapt.ranking.*",),
}


def _searched(key: str, task: str) -> bool:
    return any(fnmatch.fnmatchcase(key, known) for known in _SEARCHED[task])


def _why_not_searched(key: str, task: str) -> str:
    short = key.removeprefix("adapt.").removeprefix(f"{task}.")
    known = list((RetrievalConfig if task == "retrieval" else RankingConfig).model_fields)
    hint = f"adapt.{task}.{short}"
    if short not in known:
        close = difflib.get_close_matches(short.rpartition(".")[2], known, n=1, cutoff=0.5)
        hint = f"adapt.{task}.{close[0]}" if close else ""
    return (
        f"tune.space names '{key}', and a search for {task} changes "
        f"{', '.join(_SEARCHED[task])} only" + (f"; did you mean '{hint}'?" if hint else "")
    )


def _value(text: str) -> Any:
    if text == "":
        return ""
    for parse in (json.loads, lambda t: tomllib.loads(f"v = {t}")["v"]):
        try:
            return parse(text)
        except ValueError:
            continue
    if text in ("True", "False"):
        return text == "True"
    if _BARE_LIST.fullmatch(text):
        return [_value(word.strip()) for word in text[1:-1].split(",")]
    return text


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if isinstance(cause := first.get("ctx", {}).get("error"), ConfigError):
        return str(cause)
    if first["type"] == "extra_forbidden":
        *section, key = [str(part) for part in first["loc"]]
        known = _known_keys(section)
        return f"unknown configuration key '{path}'" + _nearest(key, known)
    given = first.get("input")
    problem = first["msg"].removeprefix("Value error, ")
    return f"configuration key '{path}' = {given!r}: {problem}"


def _known_keys(section: Sequence[str]) -> list[str]:
    model: Any = Config
    for part in section:
        model = model.model_fields[part].annotation
    keys = list(model.model_fields)
    return keys + (list(TrainingConfig.model_fields) if model is AdaptConfig else [])


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known here: {', '.join(sorted(known))}"


def recommend_section(folder: Path) -> RecommendConfig:
    """The run's ``[recommend]`` section; see :func:`of_run`."""
    return of_run(folder, ("recommend",)).recommend


def of_run(folder: Path, sections: Sequence[str], settings: Sequence[str] = ()) -> Config:
    """Sections of the configuration that a run left, and settings; all else is the default.

    Args:
      folder: The run's; the defaults count where it left no configuration.
      sections: Names of sections, and of keys outside of any.
      settings: As for :meth:`Config.load`.

    Raises:
      ConfigError: the configuration that the run left is damaged, or a setting is wrong.
    """
    path = folder / FILE
    tree: dict[str, Any] = {}
    if path.is_file():
        try:
            told = json.loads(path.read_text("utf-8"))
            tree = {name: told[name] for name in told.keys() & set(sections)}
        except (ValueError, AttributeError):
            raise ConfigError(f"{path} is damaged; `tfrec prepare` writes it anew") from None
    for setting in settings:
        _apply(tree, setting)
    return Config.parse(tree)
