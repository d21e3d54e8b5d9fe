"""Plan a privacy budget: epsilon of a job, the noise an epsilon needs, or the rounds it allows.

``python -m fedcmt.privacy.budget --noise 4 --rounds 50``
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from decimal import ROUND_CEILING, Context

from fedcmt.arguments import whole_number
from fedcmt.privacy.accounting import (
    ACCOUNTANTS,
    MOST_ROUNDS,
    Release,
    epsilon,
    noise_multiplier_for,
    noise_std_on_mean,
    rounds_allowed,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _check(parser, options)
    try:
        print("\n".join(_answer(options)))
    except ValueError as error:
        parser.error(str(error))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fedcmt.privacy.budget",
        description="Give two of --noise, --epsilon and --rounds; the third is computed.",
    )
    parser.add_argument("--noise", type=_number(), metavar="Z", help="noise multiplier: noise on the sum / clip")
    parser.add_argument("--epsilon", type=_number(), metavar="E", help="the budget")
    parser.add_argument("--rounds", type=whole_number(1), metavar="N", help="rounds of the job")
    parser.add_argument("--delta", type=_number(1), default=1e-5, metavar="D", help="default 1e-5")
    parser.add_argument("--accountant", choices=ACCOUNTANTS, default="pld", help="default pld")
    instance = parser.add_argument_group("instance_dp")
    instance.add_argument(
        "--sampling-rate",
        type=_number(1),
        metavar="Q",
        help="probability with which a case takes part in a step: expected batch / training cases of the site",
    )
    instance.add_argument("--steps", type=whole_number(1), metavar="N", help="local steps per round")
    mean = parser.add_argument_group("client modes, for the noise on the mean")
    mean.add_argument("--clip", type=_number(), metavar="S", help="bound on the norm of a site's update")
    mean.add_argument("--sites", type=whole_number(1), metavar="K", help="sites of the job")
    return parser


def _number(most: float = 1e12) -> Callable[[str], float]:
    """A type for numbers above 0 and up to ``most``; argparse shows what it says of others."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (0 < value <= most and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, at most {most:g}")
        return value

    return read


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Leave with exit code 2 if the options do not go together."""
    if [options.noise, options.epsilon, options.rounds].count(None) != 1:
        parser.error("give exactly two of --noise, --epsilon and --rounds")
    if options.delta == 1:
        parser.error("--delta is 1, expected a number below 1, and below 1 / (number of protected units)")
    if (options.sampling_rate is None) != (options.steps is None):
        parser.error("--sampling-rate and --steps go together: they are of instance_dp")
    if (options.clip is None) != (options.sites is None):
        parser.error("--clip and --sites go together: they give the noise on the mean of the sites' updates")
    if options.steps is not None and options.sites is not None:
        parser.error("--clip and --sites are of the client modes, --sampling-rate and --steps of instance_dp")


def _answer(options: argparse.Namespace) -> list[str]:
    rate, steps = options.sampling_rate or 1.0, options.steps or 1
    noise, spent, rounds = options.noise, options.epsilon, options.rounds
    delta, accountant = options.delta, options.accountant
    if spent is None:
        spent = _up(epsilon([Release(noise, rate, rounds * steps)], delta, accountant))
        answer = f"epsilon {spent:g}"
    elif noise is None:
        noise = _up(noise_multiplier_for(spent, delta, rounds * steps, rate, accountant))
        answer = f"noise multiplier {noise:g}"
    else:
        rounds = rounds_allowed(spent, delta, noise, steps, rate, accountant)
        answer = f"rounds {rounds}" + (" or more" if rounds == MOST_ROUNDS else "")
    given = f"noise multiplier {noise:g}, rounds {rounds}, epsilon {spent:g}, delta {delta:g}, accountant {accountant}"
    lines = [answer, f"({given}{_sampling(options)})"]
    if options.sites is not None:
        std = noise_std_on_mean(noise, options.clip, options.sites)
        lines.append(f"noise on each weight of the mean: standard deviation {std:.4g} (clip {options.clip:g})")
    return lines


def _sampling(options: argparse.Namespace) -> str:
    if options.steps is None:
        return ", every unit in every round"
    return f", {options.steps} steps per round, sampling rate {options.sampling_rate:g}"


def _up(value: float) -> float:
    """Four significant digits, rounded up: neither an epsilon nor a noise multiplier may look better than it is."""
    return float(Context(prec=4, rounding=ROUND_CEILING).create_decimal_from_float(value))


if __name__ == "__main__":
    sys.exit(main())
