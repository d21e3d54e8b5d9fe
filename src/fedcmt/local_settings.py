"""What a site keeps to itself, whatever a job says: its data, its machine and the least privacy it accepts.

A site of a provisioned network writes it in ``local/fedcmt_site.json`` of its own startup kit. Neither the server nor
a job can read or change that file; what it says wins over the job's ``site.json``.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from fedcmt.json_file import read_json
from fedcmt.privacy.terms import PROTECTS, PrivacyTerms
from fedcmt.settings import is_int, is_number, read_settings, require
from fedcmt.workspace import THREADS_VARIABLE

LOCAL_FILE = "fedcmt_site.json"
_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
_OF_SITE_JSON = ("dataset_id", "device", "num_workers", "num_processes")
_FORMAL_MODES = tuple(mode for mode, unit in PROTECTS.items() if unit is not None)


class PrivacyFloorError(ValueError):
    """A job asks for less privacy than the site accepts."""


@dataclass(frozen=True)
class PrivacyFloor:
    """The least privacy that a site accepts, for each job on its own.

    It bounds what a job may promise. It does not add up what several jobs spend on the same cases, and it does not
    cover what docs/privacy.md says no mode covers: planning statistics, case counts and test scores.

    Attributes:
      modes: Modes with a guarantee (`fedcmt.privacy.terms.PROTECTS`) that the site accepts, at least one.
      max_epsilon: The job must name a budget, at most this; above 0.
      max_delta: The job's delta is at most this, in (0, 1): an epsilon means nothing without it.
      min_noise_multiplier: The job's noise multiplier is at least this, >= 0.
      allow_metrics: Whether the job may make the site send its rounds' loss and scores, which no noise covers.
    """

    modes: list[str]
    max_epsilon: float
    max_delta: float = 1e-5
    min_noise_multiplier: float = 0.0
    allow_metrics: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Self:
        """Read and check.

        Raises:
          TypeError: If a key is unknown or missing.
          ValueError: Naming the key, what came and what was expected.
        """
        needed = {"modes", "max_epsilon"}
        require(needed <= set(values), where, "keys", sorted(values), "modes and max_epsilon among them")
        floor = read_settings(cls, values, where)
        modes_ok = isinstance(floor.modes, list) and floor.modes and all(m in _FORMAL_MODES for m in floor.modes)
        require(bool(modes_ok), where, "modes", floor.modes, f"a list of {', '.join(_FORMAL_MODES)}")
        limit, delta, noise = floor.max_epsilon, floor.max_delta, floor.min_noise_multiplier
        require(is_number(limit) and limit > 0, where, "max_epsilon", limit, "a number above 0")
        require(is_number(delta) and 0 < delta < 1, where, "max_delta", delta, "in (0, 1)")
        require(is_number(noise) and noise >= 0, where, "min_noise_multiplier", noise, "a number from 0")
        require(isinstance(floor.allow_metrics, bool), where, "allow_metrics", floor.allow_metrics, "true or false")
        return floor

    def check(self, terms: PrivacyTerms) -> None:
        """Accept a job's privacy.

        Raises:
          PrivacyFloorError: With every term that is below the floor.
        """
        if terms.mode not in self.modes:
            raise PrivacyFloorError(f"the job's privacy mode is {terms.mode!r}, this site accepts {self.modes}")
        assert terms.noise_multiplier is not None
        epsilon = terms.max_epsilon
        below = {
            f"max_epsilon {epsilon}, at most {self.max_epsilon}": epsilon is None or epsilon > self.max_epsilon,
            f"delta {terms.delta}, at most {self.max_delta}": terms.delta > self.max_delta,
            f"noise_multiplier {terms.noise_multiplier}, at least {self.min_noise_multiplier}": (
                terms.noise_multiplier < self.min_noise_multiplier
            ),
            f"noise {terms.noise!r}, 'secure'": terms.noise != "secure",
            "release_metrics true, false": terms.release_metrics and not self.allow_metrics,
        }
        if any(below.values()):
            told = "; ".join(text for text, is_below in below.items() if is_below)
            raise PrivacyFloorError(f"the job's privacy is less than this site accepts (job's, accepted): {told}")


@dataclass(frozen=True)
class LocalSettings:
    """``fedcmt_site.json``; what is left out is the job's.

    Attributes:
      dataset_id: nnU-Net dataset id of the site's data, 1 to 999.
      nnUNet_raw: nnU-Net's folder of raw data sets, absolute; null leaves it to the environment variable of this name.
      nnUNet_preprocessed: Likewise.
      nnUNet_results: Likewise.
      device: "auto", "cpu" or "cuda".
      num_workers: Processes that load and augment, >= 0.
      num_processes: Processes that preprocess images, >= 1.
      threads: CPU threads of the training process, >= 1.
      privacy_floor: Keys of `PrivacyFloor`; null accepts every job.
    """

    dataset_id: int | None = None
    nnUNet_raw: str | None = None
    nnUNet_preprocessed: str | None = None
    nnUNet_results: str | None = None
    device: Literal["auto", "cpu", "cuda"] | None = None
    num_workers: int | None = None
    num_processes: int | None = None
    threads: int | None = None
    privacy_floor: PrivacyFloor | None = None

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read and check ``fedcmt_site.json``; no file is no settings.

        Raises:
          JsonFileError: If the file holds no JSON object.
          TypeError: If a key is unknown.
          ValueError: Naming the key, what came and what was expected.
        """
        return cls.from_dict(read_json(path), str(path)) if path.exists() else cls()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Self:
        """As `from_file`, from the file's content."""
        floor = values.get("privacy_floor")
        if floor is not None:
            require(isinstance(floor, Mapping), where, "privacy_floor", floor, "null or an object")
            floor = PrivacyFloor.from_dict(floor, f"{where}: privacy_floor")
        settings = read_settings(cls, {**values, "privacy_floor": floor}, where)
        settings._check(where)
        return settings

    def _check(self, where: str) -> None:
        data = self.dataset_id
        require(data is None or (is_int(data) and 0 < data < 1000), where, "dataset_id", data, "null or 1 to 999")
        for key in _FOLDERS:
            folder = getattr(self, key)
            absolute = folder is None or (isinstance(folder, str) and Path(folder).is_absolute())
            require(absolute, where, key, folder, "null or an absolute folder")
        require(self.device in (None, "auto", "cpu", "cuda"), where, "device", self.device, "auto, cpu or cuda")
        for key, least in (("num_workers", 0), ("num_processes", 1), ("threads", 1)):
            value = getattr(self, key)
            number = value is None or (is_int(value) and value >= least)
            require(number, where, key, value, f"null or a whole number from {least}")

    def over(self, site_json: Mapping[str, Any]) -> dict[str, Any]:
        """A job's ``site.json`` as it holds at this site."""
        own = {key: getattr(self, key) for key in _OF_SITE_JSON}
        return {**site_json, **{key: value for key, value in own.items() if value is not None}}

    def apply_to_environment(self) -> None:
        """Set nnU-Net's folders and the number of threads for this process, which trains for this site alone."""
        values = {key: getattr(self, key) for key in _FOLDERS} | {THREADS_VARIABLE: self.threads}
        os.environ.update({name: str(value) for name, value in values.items() if value is not None})

    def check_privacy(self, terms: Mapping[str, Any]) -> None:
        """Accept a job's ``server.privacy``, as the server says it before it asks for anything.

        Raises:
          PrivacyFloorError: If it is below this site's floor.
        """
        if self.privacy_floor is not None:
            self.privacy_floor.check(PrivacyTerms.from_dict(terms, "the job's privacy"))
