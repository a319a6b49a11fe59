"""Config: one frozen object with a section for each stage.

Read from a preset, a TOML file or nothing, then changed by ``--set section.key=value``. Unknown
keys and values out of range are :class:`~tfrec.errors.ConfigError`. Every field's description here
is its documentation; ``tfrec run --help`` and docs/configuration.md are made from it.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tfrec.errors import ConfigError

Tracker = Literal["tensorboard", "wandb", "mlflow"]
BaselineName = Literal["popular", "item_knn", "ease", "als"]

TASKS = ("click", "like", "rating", "conversion")
"""What a ranker can predict."""

SCORE_PARTS = ("retrieval", "linear", "text", "popularity", *TASKS)
"""What the final score can be a weighted sum of."""

FILE = "config.json"
"""What a run was told, in its folder."""

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
    interactions: str = Field("", description="file of events: csv, tsv, parquet, jsonl (.gz too)")
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
    accumulate: int = Field(1, ge=1, description="steps whose gradients make one update")
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
    cross_layers: int = Field(2, ge=0, le=8, description="DCN-v2 cross layers")
    experts: int = Field(4, ge=1, le=64, description="MMoE experts")
    hidden: int = Field(64, ge=4, le=4096, description="width of an expert")
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

    @field_validator("score")
    @classmethod
    def _parts_are_known(cls, score: dict[str, float]) -> dict[str, float]:
        for part in score:
            if part not in SCORE_PARTS:
                raise ValueError(f"'{part}' is no part of the score" + _nearest(part, SCORE_PARTS))
        return score


class AdaptConfig(Section):
    """Training of the task models. Training settings given here hold for every task."""

    text: str = Field(
        "all-MiniLM-L6-v2",
        description="the BERT: a known name, a keras-nlp preset, a folder; `none`: no text",
    )
    text_mode: Literal["frozen", "full"] = Field(
        "frozen", description="frozen: texts are encoded once; full: the BERT is trained too"
    )
    text_length: int = Field(256, ge=4, le=512, description="tokens of a text that are read")
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
    retrieval: RetrievalConfig = RetrievalConfig()
    ranking: RankingConfig = RankingConfig()

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


class Config(Section):
    """Everything a run is told, from raw files to recommendations."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="run folder")
    seed: int = Field(1, ge=0, le=2**31 - 1, description="of everything that is drawn at random")
    data: DataConfig = DataConfig()
    adapt: AdaptConfig = AdaptConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    recommend: RecommendConfig = RecommendConfig()

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
    node = tree
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {setting}: '{part}' is a value and holds no keys")
    node[parts[-1]] = _value(value.strip())


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
