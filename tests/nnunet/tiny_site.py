"""One small generated data set, planned and preprocessed as a site has it."""

from pathlib import Path

from fedcmt.data.phantoms import make_brain_mr
from fedcmt.json_file import read_json
from fedcmt.nnunet.fingerprint import bin_policy
from fedcmt.nnunet.planning_options import PlanningOptions
from fedcmt.nnunet.plans import plan_federation
from fedcmt.nnunet.site_data import own_fingerprint, prepare_data

OPTIONS = PlanningOptions(
    mode="architecture", base_features=4, max_features=8, max_stages=3, max_patch_size=(16, 16, 24), batch_size=2
)


def make_site(root: Path) -> tuple[Path, dict, dict]:
    """nnU-Net's folders below ``root``, installed plans and dataset.json of five cases with regions."""
    dataset = make_brain_mr(
        root / "raw" / "Dataset702_Tiny",
        num_train=5,
        num_test=0,
        seed=3,
        style="site_a",
        channels=("FLAIR",),
        shape_vox=(24, 28, 20),
    )
    fingerprint = own_fingerprint(dataset, OPTIONS)
    plans = plan_federation({"s": fingerprint.coarsened(bin_policy("architecture"))}, OPTIONS)["s"]
    own = prepare_data(plans, fingerprint, dataset, root / "preprocessed", OPTIONS, site="s", job="j")
    return root, own, read_json(dataset / "dataset.json")
