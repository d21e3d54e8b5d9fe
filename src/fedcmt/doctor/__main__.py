"""Look at a site before it joins a job: ``python -m fedcmt.doctor -d 1 --job jobs/brats_sdl --site client1``."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from fedcmt.config import ConfigError
from fedcmt.doctor.examine import Report, Request, examine
from fedcmt.doctor.findings import Level
from fedcmt.doctor.machine import parse_server
from fedcmt.job_folder import parse_override

_EXAMPLE = """example:
  export nnUNet_raw=/data/nnUNet_raw nnUNet_preprocessed=/data/nnUNet_preprocessed
  python -m fedcmt.doctor -d 1 --job jobs/brats_sdl --site client1 --server fl.example.org:8002

Nothing is sent and nothing is left behind. The exit code is 1 if there is a problem, else 0."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    logging.getLogger("fedcmt.doctor").setLevel(logging.INFO)
    report = examine(_request(parser, options))
    print(json.dumps(report.to_dict(), indent=2) if options.json else _text(report))
    return 1 if report.count(Level.PROBLEM) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fedcmt.doctor",
        description="Check a site's data and machine, and forecast what a job will cost it.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-d", "--dataset", type=int, metavar="ID", help="nnU-Net data set id (default: the job's for the site)")
    add("--job", type=Path, metavar="FOLDER", help="job to forecast, e.g. jobs/brats_sdl")
    add("--site", metavar="NAME", help="the site's name in the job")
    add("--set", dest="overrides", action="append", default=[], metavar="TARGET.KEY=VALUE", help="as for start_fl.sh")
    add("--server", metavar="HOST:PORT", help="see whether the FLARE server is reached")
    add("--workspace", type=Path, metavar="FOLDER", help="the run's folder, for space and rights")
    add("--quick", action="store_true", help="do not try a case and a few steps; the forecast is then without time")
    add("--json", action="store_true", help="for machines")
    return parser


def _request(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Request:
    """The options, checked; leaves with exit code 2 if they do not go together."""
    if (options.job is None) != (options.site is None):
        parser.error("--job and --site go together")
    if options.job is None and options.overrides:
        parser.error("--set is of a job; give --job and --site")
    try:
        return Request(
            dataset_id=options.dataset,
            job=options.job,
            site=options.site or "",
            overrides=tuple(parse_override(text) for text in options.overrides),
            server=parse_server(options.server) if options.server else None,
            workspace=options.workspace,
            quick=options.quick,
        )
    except (ConfigError, ValueError) as error:
        parser.error(str(error))


def _text(report: Report) -> str:
    lines: list[str] = []
    for section, findings in report.sections.items():
        lines += [section, *(f"  {finding.line()}" for finding in findings), ""]
    if report.forecast is not None:
        lines += ["The forecast is an estimate:", *(f"  - {note}" for note in report.forecast.assumptions), ""]
    return "\n".join([*lines, f"Problems: {report.count(Level.PROBLEM)}, warnings: {report.count(Level.WARNING)}"])


if __name__ == "__main__":
    sys.exit(main())
