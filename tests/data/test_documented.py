"""docs/data.md names what there is."""

from pathlib import Path

import pytest

from tfrec.config import DataConfig
from tfrec.data import sources

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")


@pytest.mark.parametrize("name", DataConfig.model_fields)
def test_every_setting_of_the_data_is_documented(name):
    assert name in TEXT


@pytest.mark.parametrize("name", sources.names())
def test_every_public_data_set_is_documented(name):
    assert f"`{name}`" in TEXT
