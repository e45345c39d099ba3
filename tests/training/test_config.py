"""Configs: values checked, written and read back, presets that are what SPEC and the paper say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from innerloop.methods import METHODS
from innerloop.training.config import (
    PRESETS,
    Config,
    ConfigError,
    config_from_json,
    config_to_json,
    validated,
)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_every_preset_with_every_method_survives_json(preset: str, method: str) -> None:
    config = PRESETS[preset].config(method)
    assert config_from_json(config_to_json(config)) == config


def test_omniglot_presets_are_the_papers_setting() -> None:
    config = PRESETS["omniglot-20way-1shot"].config()
    assert (config.data.ways, config.data.shots, config.data.queries, config.data.rotations) == (
        20,
        1,
        1,
        True,
    )
    assert (config.outer.meta_batch, config.outer.epochs, config.outer.iterations) == (8, 100, 500)
    assert (config.outer.outer_lr, config.outer.outer_lr_min, config.outer.clip) == (1e-3, 1e-5, 0.0)
    assert (config.method.inner_steps, config.method.inner_lr) == (5, 0.1)
    assert (config.method.msl_epochs, config.method.da_epochs) == (10, 50)
    assert (config.network.filters, config.evaluation.test_tasks, config.evaluation.ensemble) == (64, 600, 5)


def test_mini_imagenet_presets_are_the_papers_setting() -> None:
    config = PRESETS["mini-imagenet-5way-5shot"].config()
    assert (config.data.ways, config.data.shots, config.data.queries) == (5, 5, 15)
    assert (config.data.image_size, config.data.channels, config.network.filters) == (84, 3, 48)
    assert (config.outer.meta_batch, config.outer.clip) == (2, 10.0)
    assert (config.method.inner_lr, config.method.msl_epochs) == (0.01, 15)


@pytest.mark.parametrize(
    ("group", "values", "says"),
    [
        ("data", {"ways": 0}, "--ways 0"),
        ("data", {"shots": "many"}, "--shots 'many'"),
        ("outer", {"outer_lr": -1.0}, "--outer-lr -1.0"),
        ("outer", {"outer_lr": float("nan")}, "--outer-lr nan"),
        ("network", {"network": "vgg"}, "--network 'vgg'"),
        ("method", {"inner_steps": 0}, "inner_steps must be at least 1, got 0"),
        ("method", {"lslr": True, "meta_sgd": True}, "both learn the inner rates"),
        ("outer", {"momentum": 0.9}, "--momentum 0.9"),
        ("data", {"dataset": "sinusoid"}, "sinusoid and --network conv4 do not fit"),
        ("data", {"dataset": "omniglot", "channels": 3}, "grey images"),
        ("data", {"dataset": "mini-imagenet"}, "colour images"),
    ],
)
def test_bad_values_are_quoted_back(group: str, values: dict[str, object], says: str) -> None:
    record = config_to_json(Config())
    record[group] |= values
    with pytest.raises(ConfigError, match="(?i)" + says.replace("(", r"\(")):
        config_from_json(record)


def test_validated_checks_what_the_dataclasses_let_pass() -> None:
    config = Config()
    with pytest.raises(ConfigError, match="--epochs 0"):
        validated(replace(config, outer=replace(config.outer, epochs=0)))
