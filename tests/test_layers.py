"""Imports go one way: flare -> site -> {nnunet, models, algorithms, privacy} -> params."""

import ast
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
PACKAGE = SOURCE / "fedcmt"
ALGORITHMS_MAY = (
    "torch", "numpy", "scipy", "sklearn", "fedcmt.params", "fedcmt.settings", "fedcmt.models", "fedcmt.algorithms",
)  # fmt: skip


def imports(source: str) -> Iterator[str]:
    """Every module a source imports, at any depth; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def within(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def importers(*modules: str, below: Path = PACKAGE) -> set[str]:
    """Files that import one of the modules, relative to the package."""
    return {
        str(path.relative_to(PACKAGE))
        for path in below.rglob("*.py")
        if any(within(name, modules) for name in imports(path.read_text()))
    }


def imported_by(*names: str) -> set[str]:
    return {module for name in names for module in imports((PACKAGE / name).read_text())}


def test_imports_are_found_wherever_they_are() -> None:
    source = "import a.b\ndef f():\n    from c import d\n    class G:\n        import e\nimport_module('h.i')\n"
    assert sorted(imports(source)) == ["a.b", "c.d", "e", "h.i"]
    assert within("nvflare.apis", ["nvflare"])
    assert not within("nvflare_other", ["nvflare"])


def test_only_flare_imports_nvflare() -> None:
    found = importers("nvflare")
    assert {file.split("/")[0] for file in found} == {"flare"}


def test_only_nnunet_imports_nnunetv2() -> None:
    found = importers("nnunetv2")
    assert {file.split("/")[0] for file in found} == {"nnunet"}


def test_only_flare_and_the_launcher_know_our_flare_code() -> None:
    outside = {file for file in importers("fedcmt.flare") if not file.startswith("flare/")}
    assert outside == {"launch.py", "run.py"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "algorithms").glob("*.py")), ids=lambda path: path.name)
def test_algorithms_are_pure(path: Path) -> None:
    names = set(imports(path.read_text()))
    foreign = {n for n in names if not within(n, ALGORITHMS_MAY) and n.split(".")[0] not in sys.stdlib_module_names}
    assert foreign == set()


def test_models_know_parameters_only() -> None:
    outward = importers("fedcmt", below=PACKAGE / "models") - importers("fedcmt.params", below=PACKAGE / "models")
    above = importers(
        *(f"fedcmt.{part}" for part in ("algorithms", "nnunet", "flare", "site", "session", "federation", "config")),
        below=PACKAGE / "models",
    )
    assert above == set()
    assert {file for file in outward if not file.startswith("models/")} == set()


def test_parameters_know_nothing_of_ours() -> None:
    assert not any(within(name, ["fedcmt"]) for name in imported_by("params.py"))


def test_the_federation_knows_neither_flare_nor_nnunet() -> None:
    names = imported_by("federation.py")
    assert names >= {"fedcmt.algorithms.base.Algorithm"}
    assert not any(within(n, ["nvflare", "nnunetv2", "fedcmt.nnunet", "fedcmt.flare"]) for n in names)


def test_what_the_federation_imports_does_not_bring_them_in_either() -> None:
    seen: set[Path] = set()
    waiting, everything = [PACKAGE / "federation.py"], set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        names = set(imports(path.read_text()))
        everything |= names
        for name in names:
            parts = SOURCE.joinpath(*name.split("."))
            waiting += [p for p in (parts.with_suffix(".py"), parts.parent.with_suffix(".py")) if p.is_file()]
    assert PACKAGE / "config.py" in seen
    assert not any(within(n, ["nvflare", "nnunetv2", "fedcmt.nnunet", "fedcmt.flare"]) for n in everything)


def test_the_site_does_not_know_what_carries_its_messages() -> None:
    names = imported_by("site.py", "session.py")
    assert not any(within(n, ["nvflare", "fedcmt.flare", "fedcmt.federation", "fedcmt.inprocess"]) for n in names)
