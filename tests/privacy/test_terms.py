"""What a job may promise."""

from typing import Any

import pytest

from fedcmt.privacy.terms import PrivacyTerms

CENTRAL = {"mode": "central_client_dp", "noise_multiplier": 4}
INSTANCE = {"mode": "instance_dp", "noise_multiplier": 1.5, "expected_batch": 3}
COMPAT = {"mode": "compat_noise", "clip": 1000, "sigma": 1e-5}


@pytest.mark.parametrize("values", [{}, CENTRAL, INSTANCE, COMPAT])
def test_terms_go_to_a_site_and_come_back_equal(values: dict[str, Any]) -> None:
    terms = PrivacyTerms.from_dict(values, "here")
    assert PrivacyTerms.from_dict(terms.to_dict(), "there") == terms


@pytest.mark.parametrize(
    ("values", "key", "expected"),
    [
        ({"mode": "dp"}, "mode", "none, compat_noise"),
        ({"mode": ["dp"]}, "mode", "none, compat_noise"),
        ({**CENTRAL, "noise_multiplier": 1e-15}, "noise_multiplier", "from 1e-12"),
        ({"clip": 0}, "clip", "above 0"),
        ({"mode": "central_client_dp"}, "noise_multiplier", "from 1e-12 for central_client_dp"),
        ({"noise_multiplier": 1}, "noise_multiplier", "null for none"),
        ({**COMPAT, "noise_multiplier": 1}, "noise_multiplier", "null for compat_noise"),
        ({**COMPAT, "max_epsilon": 8}, "max_epsilon", "which has no epsilon"),
        ({"mode": "compat_noise"}, "sigma", "for compat_noise"),
        ({**CENTRAL, "sigma": 0.1}, "sigma", "null for central_client_dp"),
        ({**CENTRAL, "expected_batch": 2}, "expected_batch", "null for central_client_dp"),
        ({**INSTANCE, "expected_batch": 0}, "expected_batch", "a whole number from 1"),
        ({**CENTRAL, "delta": 1}, "delta", "from 1e-100, below 1"),
        ({**CENTRAL, "delta": 1e-300}, "delta", "from 1e-100, below 1"),
        ({**CENTRAL, "max_epsilon": -1}, "max_epsilon", "null or above 0"),
        ({**CENTRAL, "accountant": "gdp"}, "accountant", "pld or rdp"),
        ({**CENTRAL, "noise": "none"}, "noise", "secure or seeded"),
        ({**CENTRAL, "release_metrics": 1}, "release_metrics", "true or false"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, Any], key: str, expected: str) -> None:
    with pytest.raises(ValueError, match=key) as refused:
        PrivacyTerms.from_dict(values, "job.json: privacy")
    assert expected in str(refused.value)
    assert str(refused.value).startswith("job.json: privacy")


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(TypeError, match="epsilom"):
        PrivacyTerms.from_dict({"epsilom": 8}, "job.json: privacy")


def test_only_modes_with_an_epsilon_keep_metrics_at_the_site() -> None:
    assert PrivacyTerms.from_dict({}, "").shares_metrics
    assert PrivacyTerms.from_dict(COMPAT, "").shares_metrics
    assert not PrivacyTerms.from_dict(CENTRAL, "").shares_metrics
    assert PrivacyTerms.from_dict({**CENTRAL, "release_metrics": True}, "").shares_metrics
