"""What a federation keeps from its first start on, whatever the jobs that go on with it say."""

import secrets
from pathlib import Path
from typing import Any

from fedcmt.algorithms.base import Algorithm
from fedcmt.config import ConfigError, ServerConfig
from fedcmt.json_file import read_state, write_state

_FILE = "settings.json"
_SCHEDULE = "server.schedule_rounds"
_FEDERATION = "federation"
_OF_NEWCOMERS = ("samples_per_case", "min_cases")
"""Planning options that only say how a site describes its data."""


def new_federation() -> str:
    """An id that no other federation has; state files carry it."""
    return secrets.token_hex(8)


def fix_settings(folder: Path, config: ServerConfig, algorithm: Algorithm, federation: str) -> None:
    """Keep the id and the settings of a federation that begins, in the server's folder."""
    schedule = {_SCHEDULE: config.schedule_rounds or config.num_rounds}
    write_state(folder / _FILE, {**_fixed(config, algorithm), **schedule, _FEDERATION: federation})


def check_settings(folder: Path, config: ServerConfig, algorithm: Algorithm) -> str:
    """Refuse to go on with another architecture, algorithm, privacy, seed or schedule, or with other scopes.

    Returns:
      The federation's id.

    Raises:
      ConfigError: If there is nothing to go on with, or naming the setting, its value since the first start and the
        one that came.
      JsonFileError: If the settings in ``folder`` are damaged.
    """
    if not (folder / _FILE).exists():
        raise ConfigError(f"{folder} holds no federation that began: there is nothing to go on with")
    old, new = read_state(folder / _FILE, needs=[_FEDERATION]), _fixed(config, algorithm)
    federation = old.pop(_FEDERATION)
    new[_SCHEDULE] = config.schedule_rounds or old[_SCHEDULE]
    if changed := sorted(key for key in old | new if old.get(key) != new.get(key)):
        key = changed[0]
        raise ConfigError(
            f"{key} is {old.get(key)!r} since this federation began and cannot become {new.get(key)!r}; leave "
            "it as it was, or begin a new federation"
        )
    return federation


def _fixed(config: ServerConfig, algorithm: Algorithm) -> dict[str, Any]:
    planning = {f"planning.{key}": v for key, v in config.planning.items() if key not in _OF_NEWCOMERS}
    # The budget is the first line of the ledgers' to guard, where it may be raised by hand: docs/privacy.md.
    privacy = {f"privacy.{key}": v for key, v in config.privacy.to_dict().items() if key != "max_epsilon"}
    server = {f"server.{key}": v for key, v in {**planning, **privacy, "seed": config.seed}.items()}
    # What is personal is in the sites' files and not in the server's, so neither has it under other scopes.
    scopes = {pattern: str(scope) for pattern, scope in algorithm.scopes.rules}
    return {**server, "algorithm": type(algorithm).__name__, "algorithm.scopes": scopes}
