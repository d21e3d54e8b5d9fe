"""The budget command, by what it prints."""

import subprocess
import sys
from pathlib import Path

import pytest

from fedcmt.privacy.budget import main


def printed(capsys: pytest.CaptureFixture[str], command: str) -> list[str]:
    assert main(command.split()) == 0
    return capsys.readouterr().out.splitlines()


def test_epsilon_of_noise_and_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--noise 4 --rounds 50 --delta 1e-5") == [
        "epsilon 8.596",
        "(noise multiplier 4, rounds 50, epsilon 8.596, delta 1e-05, accountant pld, every unit in every round)",
    ]


def test_another_accountant(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--noise 4 --rounds 50 --accountant rdp")[0] == "epsilon 9.235"


def test_noise_for_epsilon_and_rounds_is_rounded_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--epsilon 8 --rounds 50")[0] == "noise multiplier 4.245"


@pytest.mark.parametrize(("epsilon", "rounds"), [("8", "44"), ("0.1", "0"), ("1e9", "1000000 or more")])
def test_rounds_for_epsilon_and_noise(capsys: pytest.CaptureFixture[str], epsilon: str, rounds: str) -> None:
    assert printed(capsys, f"--epsilon {epsilon} --noise 4")[0] == f"rounds {rounds}"


def test_steps_of_a_site(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = printed(capsys, "--noise 1 --rounds 50 --delta 1e-3 --sampling-rate 0.032 --steps 50")
    assert first == "epsilon 8.172"
    assert second.endswith("accountant pld, 50 steps per round, sampling rate 0.032)")


def test_noise_on_the_mean(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--epsilon 8 --rounds 50 --clip 2 --sites 4")[2] == (
        "noise on each weight of the mean: standard deviation 2.123 (clip 2)"
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "give exactly two of --noise, --epsilon and --rounds"),
        ("--noise 4", "give exactly two of"),
        ("--noise 4 --epsilon 8 --rounds 50", "give exactly two of"),
        ("--noise 0 --rounds 50", "argument --noise: '0' is not a number above 0"),
        ("--noise nan --rounds 50", "argument --noise: 'nan' is not a number above 0"),
        ("--noise inf --rounds 50", "argument --noise: 'inf' is not a number above 0"),
        ("--noise 4 --rounds 0", "argument --rounds: '0' is not a whole number from 1"),
        ("--noise 4 --rounds 5 --delta 2", "argument --delta: '2' is not a number above 0, at most 1"),
        ("--noise 4 --rounds 5 --delta 1", "--delta is 1, expected a number below 1"),
        ("--noise 4 --rounds 5 --sampling-rate 0.1", "--sampling-rate and --steps go together"),
        ("--noise 4 --rounds 5 --clip 1", "--clip and --sites go together"),
        ("--noise 4 --rounds 5 --clip 1 --sites 2 --steps 3 --sampling-rate 0.1", "are of the client modes"),
        ("--noise 1e-20 --rounds 5", "noise_multiplier is 1e-20, expected a number from 1e-12"),
        ("--epsilon 0.01 --delta 1e-30 --rounds 1 --accountant rdp", "accountant 'rdp' finds no noise"),
    ],
)
def test_wrong_use_is_told_and_ends_with_code_2(capsys: pytest.CaptureFixture[str], command: str, message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


def test_it_is_a_command() -> None:
    command = [sys.executable, "-m", "fedcmt.privacy.budget", "--epsilon", "1", "--rounds", "1"]
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("noise multiplier 3.731\n")
