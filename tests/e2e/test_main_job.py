"""The main job from its command to its results, in both engines, and what a user does with them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from fedcmt.params import load_tensors
from tests.e2e.conftest import REPOSITORY, SMALLEST, Finished, environment, launch, two_small_datasets

SITES = ("client1", "client2")


def checkpoint(run: Finished, site: str) -> dict[str, torch.Tensor]:
    folder = Path(run.results["sites"][site]["model_folder"])
    return torch.load(folder / "fold_all" / "checkpoint_final.pth", weights_only=True)["network_weights"]


def ledger(run: Finished, site: str) -> list[dict]:
    return [json.loads(line) for line in (run.workspace / "sites" / site / "egress.jsonl").read_text().splitlines()]


def test_first_line_announces_the_demo_profile(simulated: Finished) -> None:
    assert simulated.output.startswith("Demo profile jobs/brats_sdl/demo.json (nnUNet_raw is not set)")


def test_results_hold_what_the_table_shows(simulated: Finished) -> None:
    results = simulated.results
    assert {"job", "engine", "seed", "rounds", "seconds", "sites"} <= set(results)
    for site in SITES:
        row = results["sites"][site]
        assert row["task"] == "segmentation"
        assert {"cases", "mean_dice", "dice", "iou", "sensitivity", "ppv", "specificity", "hd95"} <= set(row["test"])
        assert f"{row['test']['mean_dice']:.4f}" in simulated.output


def test_both_engines_give_the_same_weights_and_the_same_table(simulated: Finished, in_process: Finished) -> None:
    for site in SITES:
        ours, theirs = checkpoint(in_process, site), checkpoint(simulated, site)
        assert max(float((ours[n] - theirs[n]).abs().max()) for n in theirs) <= 1e-6
        tables = [run.results["sites"][site]["test"] for run in (in_process, simulated)]
        assert tables[0]["dice"] == pytest.approx(tables[1]["dice"], abs=1e-3)
        assert tables[0]["mean_dice"] == pytest.approx(tables[1]["mean_dice"], abs=1e-3)
    server, other = (load_tensors(run.workspace / "server" / "state.safetensors")[0] for run in (simulated, in_process))
    assert max(float((server[n] - other[n]).abs().max()) for n in server) <= 1e-6


def test_decoders_of_two_sites_differ(simulated: Finished) -> None:
    one, two = (load_tensors(simulated.workspace / "sites" / s / "last.safetensors")[0] for s in SITES)
    decoder = [n for n in one if n.startswith("network/decoder.stages.") and n.endswith("conv.weight")]
    assert decoder
    assert not any(torch.equal(one[n], two[n]) for n in decoder)


def test_messages_hold_only_shared_and_group_tensors_of_four_bytes(simulated: Finished) -> None:
    for site in SITES:
        rounds = [row for row in ledger(simulated, site) if row["task"] == "train"]
        assert len(rounds) == 2
        for row in rounds:
            assert not any(name.startswith("decoder.") for name in row["tensors"])
            numbers = sum(int(np.prod(t["shape"])) for t in row["tensors"].values())
            assert 4 * numbers <= row["bytes"] <= 4 * numbers * 1.02
        state = torch.load(
            Path(simulated.results["sites"][site]["model_folder"]) / "fold_all" / "checkpoint_final.pth",
            weights_only=True,
        )["network_weights"]
        assert sum(t.numel() * 4 for t in state.values()) > 2.5 * rounds[0]["bytes"]


def test_each_message_is_in_the_ledger(simulated: Finished) -> None:
    assert [row["task"] for row in ledger(simulated, "client1")] == [
        "fingerprint",
        "prepare",
        "train",
        "train",
        "finish",
    ]


def test_no_case_name_leaves_a_site(simulated: Finished) -> None:
    log = (simulated.workspace / "server" / "results.json").read_text()
    assert "DemoBrain" in log  # the data set's name is told
    assert "DemoBrainA_0" not in log


def test_curves_are_streamed_to_the_server(simulated: Finished) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for site in SITES:
        (folder,) = {p.parent for p in simulated.workspace.rglob("*tfevents*") if p.parent.name == site}
        events = EventAccumulator(str(folder)).Reload()
        assert {"loss", "learning_rate", "val_dice_trained"} <= set(events.Tags()["scalars"])
        assert len(events.Scalars("loss")) == 2


def test_a_run_of_one_round_resumed_for_a_second_ends_with_the_same_bits(tmp_path: Path) -> None:
    two_small_datasets(tmp_path / "raw")
    variables = {"nnUNet_raw": str(tmp_path / "raw"), "nnUNet_preprocessed": str(tmp_path / "preprocessed")}

    def run(workspace: str, *options: str) -> Finished:
        settings = [*SMALLEST, "--set", "server.schedule_rounds=2", "--engine", "inprocess", *options]
        done = launch(tmp_path / workspace, "brats_sdl", *settings, extra=variables)
        assert done.code == 0, done.output
        return done

    through = run("through", "--rounds", "2")
    run("stopped", "--rounds", "1")
    resumed = run("stopped", "--rounds", "2", "--resume")
    for site in SITES:
        ours, theirs = checkpoint(resumed, site), checkpoint(through, site)
        assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_inference_keeps_geometry_and_equals_stock_nnunet(simulated: Finished, tmp_path: Path) -> None:
    folder = Path(simulated.results["sites"]["client1"]["model_folder"])
    images = simulated.workspace / "nnUNet_raw" / simulated.results["sites"]["client1"]["dataset"] / "imagesTs"
    line = [sys.executable, str(REPOSITORY / "Inference.py"), "--workspace", str(simulated.workspace)]
    line += ["--clients", "app_client1", "--gpu_ids", "0"]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CPU" in done.stdout + done.stderr or torch.cuda.is_available()
    ours = folder / "predictions" / "imagesTs"
    assert (ours / "metrics.json").exists()
    assert (ours / "metrics.csv").exists()
    stock = _stock_prediction(images, folder, tmp_path)
    for reference in sorted(images.glob("*_0000.nii.gz")):
        name = reference.name.replace("_0000", "")
        mine, image = sitk.ReadImage(str(ours / name)), sitk.ReadImage(str(reference))
        for geometry in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert np.allclose(getattr(mine, geometry)(), getattr(image, geometry)())
        theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(stock / name)))
        assert np.array_equal(sitk.GetArrayFromImage(mine), theirs)


def _stock_prediction(images: Path, model: Path, output: Path) -> Path:
    """nnU-Net's own command where our package cannot be imported."""
    own = {n: v for n, v in environment({"nnUNet_def_n_proc": "1"}).items() if n != "PYTHONPATH"}
    binary = Path(sys.executable).with_name("nnUNetv2_predict_from_modelfolder")
    line = [str(binary), "-i", str(images), "-o", str(output), "-m", str(model), "-f", "all", "-device", "cpu"]
    done = subprocess.run(
        [*line, "-npp", "1", "-nps", "1", "--disable_progress_bar"],
        cwd=os.sep,
        env=own,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output


@pytest.mark.parametrize("name", ["client1", "client2"])
def test_models_load_without_unpickling(simulated: Finished, name: str) -> None:
    assert checkpoint(simulated, name)
