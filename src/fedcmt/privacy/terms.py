"""What a job promises about privacy: ``server.privacy``, known to the server and to every site before anything is sent.

Modes after the four of docs/privacy.md; the published Fed-MUnet is ``compat_noise`` (arXiv 2409.01020, as its released
code does it).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from fedcmt.privacy.accounting import LEAST_NOISE, MOST_NOISE, require_delta
from fedcmt.settings import is_int, is_number, read_settings, require

Mode = Literal["none", "compat_noise", "central_client_dp", "distributed_client_dp", "instance_dp"]

PROTECTS: dict[str, str | None] = {
    "none": None,
    "compat_noise": None,
    "central_client_dp": "whole site, against all but the server",
    "distributed_client_dp": "whole site, if the server sees sums of updates only",
    "instance_dp": "training case",
}
"""Mode to the unit it protects; None where there is no formal guarantee."""


@dataclass(frozen=True)
class PrivacyTerms:
    """The privacy of a job; the defaults send updates as they are.

    Attributes:
      mode: One of `PROTECTS`.
      clip: S > 0. Largest 2-norm, over all tensors jointly, of a site's update; of one case's gradient in
        ``instance_dp``.
      noise_multiplier: z, 1e-12 to 1e15. Standard deviation of the noise on the clipped sum, in units of ``clip``; all
        modes but ``compat_noise``.
      sigma: ``compat_noise`` only: standard deviation of the noise on each weight of the mean, >= 0.
      delta: Of (epsilon, delta), from 1e-100 and below 1; below 1 / (number of protected units), which sites and the
        server see to under ``instance_dp``.
      max_epsilon: A round that would exceed it is refused before it begins; None for no limit.
      accountant: "pld" (tight) or "rdp" (an upper bound).
      expected_batch: ``instance_dp`` only: expected cases of a step, >= 1.
      noise: "secure" draws from the operating system's generator; "seeded" repeats a simulation and protects nothing
        from whoever knows the seed.
      release_metrics: Whether sites send their rounds' loss and validation scores, which no noise covers.
    """

    mode: Mode = "none"
    clip: float = 1.0
    noise_multiplier: float | None = None
    sigma: float | None = None
    delta: float = 1e-5
    max_epsilon: float | None = None
    accountant: Literal["pld", "rdp"] = "pld"
    expected_batch: int | None = None
    noise: Literal["secure", "seeded"] = "secure"
    release_metrics: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Self:
        """Read and check.

        Raises:
          TypeError: If a key is unknown.
          ValueError: Naming the key, what came and what was expected.
        """
        terms = read_settings(cls, values, where)
        terms._check(where)
        return terms

    def _check(self, where: str) -> None:
        require(isinstance(self.mode, str) and self.mode in PROTECTS, where, "mode", self.mode, ", ".join(PROTECTS))
        require(is_number(self.clip) and self.clip > 0, where, "clip", self.clip, "a number above 0")
        require_delta(where, self.delta)
        limit = self.max_epsilon
        require(limit is None or (is_number(limit) and limit > 0), where, "max_epsilon", limit, "null or above 0")
        require(self.accountant in ("pld", "rdp"), where, "accountant", self.accountant, "pld or rdp")
        require(self.noise in ("secure", "seeded"), where, "noise", self.noise, "secure or seeded")
        require(isinstance(self.release_metrics, bool), where, "release_metrics", self.release_metrics, "true or false")
        z, sigma, batch = self.noise_multiplier, self.sigma, self.expected_batch
        if self.formal:
            least = f"a number from {LEAST_NOISE:g} for {self.mode}"
            require(is_number(z) and LEAST_NOISE <= z <= MOST_NOISE, where, "noise_multiplier", z, least)
        else:
            require(z is None, where, "noise_multiplier", z, f"null for {self.mode}")
            require(limit is None, where, "max_epsilon", limit, f"null for {self.mode}, which has no epsilon")
        if self.mode == "compat_noise":
            require(is_number(sigma) and sigma >= 0, where, "sigma", sigma, "a number from 0 for compat_noise")
        else:
            require(sigma is None, where, "sigma", sigma, f"null for {self.mode}")
        if self.mode == "instance_dp":
            require(is_int(batch) and batch >= 1, where, "expected_batch", batch, "a whole number from 1")
        else:
            require(batch is None, where, "expected_batch", batch, f"null for {self.mode}")

    @property
    def formal(self) -> bool:
        """Whether the mode has an epsilon."""
        return PROTECTS[self.mode] is not None

    @property
    def clips_updates(self) -> bool:
        """Whether a site's whole update is bounded once, after its training."""
        return self.mode in ("central_client_dp", "distributed_client_dp")

    @property
    def shares_metrics(self) -> bool:
        """Whether a site may send its rounds' loss and validation scores."""
        return self.release_metrics or not self.formal

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `from_dict`."""
        return asdict(self)
