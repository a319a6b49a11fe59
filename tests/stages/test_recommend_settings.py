"""recommend: what the run was told holds, unless the request says otherwise."""

import pytest

from tfrec.artifact import write_json
from tfrec.config import Config
from tfrec.errors import ArtifactError, ConfigError
from tfrec.stages import recommend


@pytest.fixture
def asked(monkeypatch):
    """A recommender that answers nothing and remembers what it was asked."""
    asked = {}

    class Recorder:
        def recommend(self, requests, k):
            asked.update(k=k, include_seen={request.include_seen for request in requests})
            return [[] for _ in requests]

    monkeypatch.setattr(recommend, "load_recommender", lambda folder: Recorder())
    return asked


def tell(folder, *settings):
    write_json(folder / "config.json", Config.load("files", settings).dump())


def test_the_settings_of_the_run_hold_if_nothing_is_said(asked, tmp_path):
    tell(tmp_path, "recommend.k=3", "recommend.exclude_seen=false")
    recommend.run(tmp_path, user_ids=["u1", "u2"])
    assert asked == {"k": 3, "include_seen": {True}}


def test_the_request_wins_over_the_run(asked, tmp_path):
    tell(tmp_path, "recommend.k=3", "recommend.exclude_seen=false")
    recommend.run(tmp_path, user_ids=["u1"], k=5, include_seen=False)
    assert asked == {"k": 5, "include_seen": {False}}
    tell(tmp_path)
    recommend.run(tmp_path, user_ids=["u1"], include_seen=True)
    assert asked == {"k": 10, "include_seen": {True}}


def test_a_run_that_left_no_configuration_has_the_defaults(asked, tmp_path):
    recommend.run(tmp_path, user_ids=["u1"])
    assert asked == {"k": 10, "include_seen": {False}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"recommend": {"k": 0}}', "'recommend.k' = 0"),
        ('{"recommend": {"kk": 3}}', "did you mean 'k'"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_an_error(text, said, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=said):
        recommend.run(tmp_path, user_ids=["u1"])


def test_a_run_without_models_is_still_an_error(tmp_path):
    tell(tmp_path)
    with pytest.raises(ArtifactError, match="prepare"):
        recommend.run(tmp_path, user_ids=["u1"])
