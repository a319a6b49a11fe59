"""Config: every key round-trips, every wrong one is named with what was meant."""

import json
import math
import re
import tomllib
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import annotated_types
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from tfrec.config import Config, Section, TrainingConfig, presets
from tfrec.errors import ConfigError


def sections(path: str = "", section: type[Section] = Config) -> Iterator[tuple[str, type]]:
    """Path -> section, for every section at any depth."""
    yield path, section
    for key, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from sections(f"{path}.{key}".strip("."), field.annotation)


def fields() -> Iterator[tuple[str, FieldInfo]]:
    """Path -> field, for every key that holds a value."""
    inner = {path for path, _ in sections()}
    for path, section in sections():
        for key, field in section.model_fields.items():
            if (full := f"{path}.{key}".strip(".")) not in inner:
                yield full, field


FIELDS = dict(fields())


def get(config: Any, path: str) -> Any:
    for key in path.split("."):
        config = config[key] if isinstance(config, dict) else getattr(config, key)
    return config


def bounds(field: FieldInfo) -> dict[str, float]:
    kinds = (annotated_types.Ge, annotated_types.Gt, annotated_types.Le, annotated_types.Lt)
    return {
        name: getattr(limit, name)
        for limit in field.metadata
        if isinstance(limit, kinds)
        for name in ("ge", "gt", "le", "lt")
        if hasattr(limit, name)
    }


def another_value(path: str, field: FieldInfo) -> Any:
    """A value that the key accepts and that is not its default."""
    special: dict[str, Any] = {
        "data.columns": {"user_id": "customer"},
        "adapt.ranking.score": {"click": 0.5},
        "adapt.ranking.tasks": ["click", "rating"],
        "adapt.ranking.task_weights": {"rating": 0.5},
        "tune.space": {"adapt.retrieval.layers": [1, 3]},
        "pretrain.objectives": {"masked": 0.5},
    }
    if path in special:
        return special[path]
    default, annotation = field.get_default(call_default_factory=True), field.annotation
    if get_origin(annotation) is Literal:
        return next(value for value in get_args(annotation) if value != default)
    if get_origin(annotation) is list:
        (inner,) = get_args(annotation)
        return [get_args(inner)[-1] if get_origin(inner) is Literal else inner(3)]
    if get_origin(annotation) is dict:
        inner = get_args(annotation)[1]
        return {"name": ["value"] if get_origin(inner) is list else inner(2)}
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1 if default < bounds(field).get("le", math.inf) else default - 1
    if isinstance(default, float):
        return (default + min(bounds(field).values(), default=0.0)) / 2 or 0.25
    return 4.5 if default is None else "another"


@pytest.mark.parametrize("path", FIELDS)
def test_every_key_says_what_it_does(path):
    section, key = dict(sections())[path.rpartition(".")[0]], path.rpartition(".")[2]
    found = [p.model_fields.get(key) for p in section.__mro__ if issubclass(p, Section)]
    assert any(field.description for field in found if field)


class TestRoundTrip:
    @pytest.mark.parametrize("name", ["files", *presets()])
    def test_a_dump_is_read_back_equal(self, name):
        config = Config.load(name)
        assert Config.parse(config.dump()) == config
        assert Config.parse(json.loads(json.dumps(config.dump()))) == config

    @pytest.mark.parametrize("path", FIELDS)
    def test_every_key_can_be_set_and_is_kept(self, path):
        value = another_value(path, FIELDS[path])
        config = Config.load("files", [f"{path}={json.dumps(value)}"])
        assert get(config, path) == value
        assert Config.parse(config.dump()) == config
        assert Config.parse(tomllib.loads(config.toml())) == config
        same = [key for key in FIELDS if get(config, key) == get(Config.load("files"), key)]
        assert sorted([*same, path]) == sorted(FIELDS)

    def test_a_toml_file_is_the_same_as_settings(self, tmp_path):
        path = tmp_path / "shop.toml"
        path.write_text('[data]\nk_core = 5\ncolumns = {user_id = "who"}\n[adapt]\nepochs = 2\n')
        settings = ["name=shop", "data.k_core=5", 'data.columns={"user_id": "who"}']
        assert Config.load(str(path)) == Config.load("files", [*settings, "adapt.epochs=2"])

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("a.csv", "a.csv"),
            ("", ""),
            ('"1e3"', "1e3"),
            ("a=b c", "a=b c"),
            ("C:\\x", "C:\\x"),
            ("größe.csv", "größe.csv"),
        ],
    )
    def test_texts_need_no_quotes(self, text, value):
        assert Config.load("files", [f"data.items={text}"]).data.items == value

    def test_a_table_may_be_written_as_in_toml(self):
        config = Config.load("files", ["data.columns={user_id = 'who', item_id = 'what'}"])
        assert config.data.columns == {"user_id": "who", "item_id": "what"}

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("[popular,ease]", ["popular", "ease"]),
            ("[popular]", ["popular"]),
            ("[ popular , ease ]", ["popular", "ease"]),
            ('["popular", "ease"]', ["popular", "ease"]),
            ("['popular', 'ease']", ["popular", "ease"]),
            ("[]", []),
        ],
    )
    def test_words_of_a_list_need_no_quotes(self, text, value):
        assert Config.load("files", [f"evaluate.baselines={text}"]).evaluate.baselines == value

    @pytest.mark.parametrize("text", ["[popular,", "[popular,'ease]", "popular,ease", "[a,[b]]"])
    def test_what_is_no_list_is_shown_as_it_was_given(self, text):
        with pytest.raises(ConfigError) as caught:
            Config.load("files", [f"evaluate.baselines={text}"])
        assert text in str(caught.value)

    def test_words_and_numbers_of_a_list_keep_their_types(self):
        config = Config.load("files", ["data.item_text=[title,plot]", "evaluate.k=[5,10,]"])
        assert (config.data.item_text, config.evaluate.k) == (["title", "plot"], [5, 10])

    @pytest.mark.parametrize("text", ["true", "True"])
    def test_true_may_be_written_as_in_python(self, text):
        assert Config.load("files", [f"adapt.retrieval.request_time={text}"]) == Config.load(
            "files", ["adapt.retrieval.request_time=true"]
        )
        assert Config.load("files", ["adapt.refit=False"]).adapt.refit is False

    def test_the_last_of_two_settings_holds(self):
        assert Config.load("files", ["seed=3", "seed=4"]).seed == 4

    def test_nothing_can_be_changed_afterwards(self):
        with pytest.raises(ValidationError, match="frozen"):
            Config().adapt.retrieval.epochs = 3


class TestSharedTrainingSettings:
    @pytest.mark.parametrize("key", TrainingConfig.model_fields)
    def test_hold_for_every_task(self, key):
        value = another_value(f"adapt.ranking.{key}", FIELDS[f"adapt.ranking.{key}"])
        config = Config.load("files", [f"adapt.{key}={json.dumps(value)}"])
        assert getattr(config.adapt.retrieval, key) == value
        assert getattr(config.adapt.ranking, key) == value

    @pytest.mark.parametrize("order", [1, -1])
    def test_give_way_to_a_task_of_its_own(self, order):
        settings = ["adapt.epochs=7", "adapt.ranking.epochs=2"][::order]
        config = Config.load("files", settings)
        assert (config.adapt.retrieval.epochs, config.adapt.ranking.epochs) == (7, 2)


class TestToml:
    @pytest.mark.parametrize("name", ["files", *presets()])
    def test_it_is_read_back_equal_and_holds_no_default(self, name, tmp_path):
        config = Config.load(name)
        path = tmp_path / "some.toml"
        path.write_text(config.toml())
        assert Config.load(str(path)) == config
        assert "feed_forward" not in path.read_text()

    @given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(1e-300, 1e300))
    def test_any_text_and_number_survives(self, text, number):
        told = {"interactions": text, "event_weights": {text: number}, "item_text": [text, "b"]}
        config = Config.parse({"data": told})
        assert Config.parse(tomllib.loads(config.toml())) == config


class TestSearchSpace:
    def space(self, told: Any, task: str = "retrieval") -> dict[str, Any]:
        return Config.parse({"tune": {"task": task, "space": told}}).tune.space

    def test_a_dotted_key_may_be_quoted_or_not(self, tmp_path):
        path = tmp_path / "shop.toml"
        for key in ("adapt.retrieval.layers", '"adapt.retrieval.layers"'):
            path.write_text(f"[tune.space]\n{key} = {{low = 1, high = 3}}\n")
            config = Config.load(str(path))
            assert config.tune.space == {"adapt.retrieval.layers": {"low": 1, "high": 3}}
        for key, choices in {
            "adapt.text": ["none", "other"],
            "adapt.text_length": [32, 64],
            "adapt.tuning.text": ["lora", "full"],
            "adapt.tuning.text_rate": [0.1, 0.25],
        }.items():
            assert Config.load("files", [f"tune.space.{key}={choices}"]).tune.space == {
                key: choices
            }

    @pytest.mark.parametrize(
        ("key", "task", "said"),
        [
            ("adapt.retrieval.layer", "retrieval", "did you mean 'layers'"),
            ("adapt.learning_rate", "ranking", "did you mean 'adapt.ranking.learning_rate'"),
            ("retrieval.dropuot", "retrieval", "did you mean 'adapt.retrieval.dropout'"),
            ("adapt.retrieval.layers", "ranking", r"changes adapt\.ranking\.\* only"),
            ("data.k_core", "retrieval", "'data.k_core', and a search for retrieval"),
            ("seed", "retrieval", "'seed', and a search"),
            ("adapt.tuning.rank", "ranking", r"changes adapt\.ranking\.\* only"),
        ],
    )
    def test_a_key_that_cannot_be_searched_gives_the_nearest(self, key, task, said):
        with pytest.raises(ConfigError, match=said):
            self.space({key: [1, 2]}, task)

    @pytest.mark.parametrize(
        ("told", "said"),
        [
            ([1, 2.5], r"'adapt\.retrieval\.layers' = 2\.5: .*valid integer"),
            ([1, 49], "less than or equal to 48"),
            ({"low": 1, "high": 49}, "less than or equal to 48"),
            ({"low": 1, "high": 4, "step": 0.5}, r"layers' = 1\.5"),
            ([], "a list of choices holds"),
            ([[1]], "a list of choices holds"),
            (3, "neither a list of choices nor"),
            ({"low": 1}, "neither a list of choices nor"),
            ({"low": 1, "high": 2, "lgo": True}, "neither a list of choices nor"),
            ({"low": 3, "high": 1}, "low is below high"),
            ({"low": 0, "high": 1, "log": True}, "above 0 with log"),
            ({"low": 1, "high": 3, "step": 0}, "a step above 0"),
            ({"low": 1, "high": 3, "step": 1, "log": True}, "without a step"),
            ({"low": True, "high": 3}, "low, high and step are numbers"),
        ],
    )
    def test_a_dimension_that_is_none_is_refused(self, told, said):
        with pytest.raises(ConfigError, match=said):
            self.space({"adapt.retrieval.layers": told})


class TestWrongKeysAndValues:
    @pytest.mark.parametrize("path", FIELDS)
    def test_a_misspelt_key_gives_the_nearest_at_any_depth(self, path):
        key = path.rsplit(".", 1)[-1]
        with pytest.raises(ConfigError, match=rf"'{path}_'; did you mean '{key}'\?"):
            Config.load("files", [f"{path}_=1"])

    @pytest.mark.parametrize("path", [path for path, _ in sections()])
    def test_a_key_like_no_other_gets_the_list(self, path):
        with pytest.raises(ConfigError, match="known here: "):
            Config.load("files", [f"{path}.xyzzyxyzzy=1".strip(".")])

    def test_a_misspelt_section_gives_the_nearest(self):
        with pytest.raises(ConfigError, match=r"'adpat'; did you mean 'adapt'\?"):
            Config.load("files", ["adpat.epochs=1"])

    @pytest.mark.parametrize("path", [path for path, field in FIELDS.items() if bounds(field)])
    def test_a_value_out_of_range_is_named_with_its_limit(self, path):
        whole = isinstance(FIELDS[path].get_default(), int)
        for name, limit in bounds(FIELDS[path]).items():
            step = {"ge": -1, "gt": 0, "le": 1, "lt": 0}[name]
            value = int(limit) + step if whole else float(limit) + step
            with pytest.raises(ConfigError, match=rf"'{path}' = .*should be .* {limit}\b"):
                Config.load("files", [f"{path}={value}"])

    @pytest.mark.parametrize("path", FIELDS)
    def test_a_value_of_another_type_is_named(self, path):
        wrong = '"text"' if FIELDS[path].annotation is not str else "[1]"
        with pytest.raises(ConfigError, match=f"'{path}"):
            Config.load("files", [f"{path}={wrong}"])

    @pytest.mark.parametrize(
        "path",
        [p for p, f in FIELDS.items() if not isinstance(f.get_default(), bool)],
    )
    @pytest.mark.parametrize("form", ["{}", "[{}]", '{{"name": {}}}'])
    def test_true_is_no_number_and_no_text(self, path, form):
        with pytest.raises(ConfigError, match=f"'{path}"):
            Config.load("files", [f"{path}={form.format('true')}"])

    @pytest.mark.parametrize("value", [0, -3])
    def test_a_list_that_is_measured_has_a_length(self, value):
        with pytest.raises(ConfigError, match=rf"'evaluate\.k' = .*: {value} is no length"):
            Config.load("files", [f"evaluate.k=[10,{value}]"])

    @pytest.mark.parametrize("value", ["nan", "inf", "-inf", "NaN", "Infinity"])
    @pytest.mark.parametrize("path", ["adapt.retrieval.dropout", "data.positive_rating"])
    def test_numbers_are_finite(self, path, value):
        with pytest.raises(ConfigError, match=f"'{path}'"):
            Config.load("files", [f"{path}={value}"])

    @pytest.mark.parametrize("setting", ["", "seed", "=3", ".seed=3", "data.=3"])
    def test_a_setting_has_a_key_and_a_value(self, setting):
        with pytest.raises(ConfigError, match=r"section\.key=value"):
            Config.load("files", [setting])

    def test_a_value_is_no_section(self):
        with pytest.raises(ConfigError, match="'name' is a value"):
            Config.load("files", ["name.x=3"])

    @pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", "a b"])
    def test_a_name_stays_in_its_folder(self, name):
        with pytest.raises(ConfigError, match="'name'"):
            Config.load("files", [f"name={json.dumps(name)}"])

    def test_every_message_is_one_line(self):
        for settings in (["adapt.ranking.score=[1,2]"], ["data.columns=3"], ["a=1"], ["k\nl=1"]):
            with pytest.raises(ConfigError) as caught:
                Config.load("files", settings)
            assert "\n" not in str(caught.value)


class TestWrongFiles:
    @pytest.mark.parametrize(
        ("content", "answer"),
        [
            (b"[data\nk_core = 5", "not valid TOML"),
            ("[data]\nitems = 'größe'".encode("latin-1"), "not UTF-8"),
            (b"[data]\nk_cor = 5", "did you mean 'k_core'"),
            (b"data = 3", "'data' = 3"),
        ],
    )
    def test_are_named_with_what_is_wrong(self, content, answer, tmp_path):
        path = tmp_path / "my.toml"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=answer):
            Config.load(str(path))

    def test_an_absent_file_is_named(self, tmp_path):
        with pytest.raises(ConfigError, match=r"my\.toml: No such file"):
            Config.load(str(tmp_path / "my.toml"))

    def test_a_preset_that_is_none_gives_the_nearest(self):
        with pytest.raises(ConfigError, match="did you mean 'movielens-1m'"):
            Config.load("movielens-1mm")


def test_a_part_of_the_score_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="'clik' is no part of the score; did you mean 'click'"):
        Config.load("files", ["adapt.ranking.score={'clik': 1.0}".replace("'", '"')])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (['tasks=["click", "buy"]'], "'click', 'like', 'rating' or 'conversion'"),
        (['tasks=["like", "like"]'], "a task comes twice"),
        (["tasks=[conversion]"], "'conversion' needs 'click'"),
        (['task_weights={"clik": 1.0}'], "'clik' is no task of the ranker; did you mean 'click'"),
        (['task_weights={"like": -1.0}'], "must not be negative"),
        (
            ['task_weights={"like": 2.0}', "task_weighting=uncertainty"],
            "drop one of the two",
        ),
        (["fusion=sum"], "'linear', 'gated' or 'mmoe'"),
    ],
)
def test_what_the_ranker_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config.load("files", [f"adapt.ranking.{setting}" for setting in settings])


@pytest.mark.parametrize(
    "setting", ["text=some", "rank=0", "layers=[0.5]", "layer_decay=0", "layer_decay=1.5"]
)
def test_a_way_of_tuning_that_cannot_be_is_refused(setting):
    key = setting.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"'adapt\.tuning\.{key}"):
        Config.load("files", [f"adapt.tuning.{setting}"])


def test_text_mode_is_no_key_any_more():
    with pytest.raises(ConfigError, match=r"unknown configuration key 'adapt\.text_mode'"):
        Config.load("files", ["adapt.text_mode=full"])
