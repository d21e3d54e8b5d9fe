"""What a federation began with stays: architecture, privacy, seed and schedule."""

from pathlib import Path
from typing import Any

import pytest

from fedcmt.algorithms.base import Algorithm
from fedcmt.algorithms.fedavg import FedAvg
from fedcmt.algorithms.fedcmt import FedCMT
from fedcmt.config import ConfigError, ServerConfig
from fedcmt.fixed_settings import check_settings, fix_settings
from fedcmt.json_file import JsonFileError

BEGAN: dict[str, Any] = {
    "num_rounds": 4,
    "seed": 3,
    "planning": {"base_features": 8, "max_patch_size": [24, 32, 40], "min_cases": 4},
    "privacy": {"mode": "central_client_dp", "clip": 1.0, "noise_multiplier": 4.0, "max_epsilon": 2.0},
}


def config(**changed: Any) -> ServerConfig:
    return ServerConfig.from_dict({**BEGAN, **changed}, "server")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 4}, "server.seed is 3 since this federation began and cannot become 4"),
        ({"schedule_rounds": 5}, "server.schedule_rounds is 4 since this federation began and cannot become 5"),
        ({"planning": {**BEGAN["planning"], "base_features": 16}}, "server.planning.base_features is 8 since"),
        ({"planning": {"base_features": 8, "min_cases": 4}}, r"server.planning.max_patch_size is \[24, 32, 40\] since"),
        ({"planning": {**BEGAN["planning"], "max_stages": 3}}, "server.planning.max_stages is None since"),
        ({"privacy": {**BEGAN["privacy"], "noise_multiplier": 2.0}}, "server.privacy.noise_multiplier is 4.0 since"),
        ({"privacy": {}}, "server.privacy.mode is 'central_client_dp' since"),
    ],
)
def test_a_setting_that_cannot_change_is_refused_by_name(changed: dict, words: str, tmp_path: Path) -> None:
    fix_settings(tmp_path, config(), FedCMT(), "f0")
    with pytest.raises(ConfigError, match=words):
        check_settings(tmp_path, config(**changed), FedCMT())


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"num_rounds": 9},
        {"num_rounds": 9, "schedule_rounds": 4},
        {"planning": {**BEGAN["planning"], "min_cases": 2, "samples_per_case": 100}},
        {"privacy": {**BEGAN["privacy"], "max_epsilon": 8.0}},
        {"min_sites": 1, "round_timeout": 60, "update_dtype": "float16"},
    ],
)
def test_rounds_newcomers_the_budget_and_the_machine_may_change(changed: dict, tmp_path: Path) -> None:
    fix_settings(tmp_path, config(), FedCMT(), "f0")
    assert check_settings(tmp_path, config(**changed), FedCMT()) == "f0"


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        (FedAvg(), "algorithm is 'FedCMT' since this federation began and cannot become 'FedAvg'"),
        (FedCMT(adapters="personal"), "algorithm.scopes is .*'group'.* since this federation began and cannot"),
    ],
)
def test_another_algorithm_or_other_scopes_are_refused(algorithm: Algorithm, words: str, tmp_path: Path) -> None:
    fix_settings(tmp_path, config(), FedCMT(), "f0")
    with pytest.raises(ConfigError, match=words):
        check_settings(tmp_path, config(), algorithm)


def test_what_an_algorithm_weighs_by_may_change(tmp_path: Path) -> None:
    fix_settings(tmp_path, config(), FedCMT(), "f0")
    assert check_settings(tmp_path, config(), FedCMT(radius=0, distillation={"maximum": 0})) == "f0"


def test_a_folder_without_a_federation_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path} holds no federation that began: there is nothing to go on with"):
        check_settings(tmp_path, config(), FedCMT())


def test_settings_that_were_edited_are_refused(tmp_path: Path) -> None:
    fix_settings(tmp_path, config(), FedCMT(), "f0")
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text().replace("4.0", "0.1"))
    with pytest.raises(JsonFileError, match="damaged"):
        check_settings(tmp_path, config(), FedCMT())
