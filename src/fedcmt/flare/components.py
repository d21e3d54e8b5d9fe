"""What a job may name: FLARE's own list of components, and of this package its algorithms and the two ends of FLARE.

FLARE calls whatever a job names, with arguments from the job. A whole package on the list would let a job call any
function in it, such as one that writes a file.
"""

import importlib
import pkgutil

from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST

from fedcmt import algorithms
from fedcmt.algorithms.base import Algorithm

_ENDS = ("fedcmt.flare.server.FederatedRounds", "fedcmt.flare.site.SiteExecutor")


def allowed_classes() -> list[str]:
    """Full names of classes, for FLARE's ``class_allow_list``."""
    return [*DEFAULT_CLASS_ALLOW_LIST, *_ENDS, *_algorithms()]


def _algorithms() -> list[str]:
    """Every algorithm under the name of the module that defines it."""
    found = pkgutil.iter_modules(algorithms.__path__, f"{algorithms.__name__}.")
    modules = [importlib.import_module(module.name) for module in found]
    return sorted(
        f"{module.__name__}.{name}"
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, Algorithm)
        and value is not Algorithm
        and value.__module__ == module.__name__
    )
