"""The wheel holds exactly the tree: no module or data file is lost or added on the way."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = {"graphopt": "graphopt", "passes": "graphopt/passes", "kernels": "graphopt/kernels"}


def test_wheel_contents_equal_the_tree(tmp_path: Path) -> None:
    # A copy, because setuptools leaves its build folder in the tree and would read it again.
    copy = tmp_path / "tree"
    for folder in FOLDERS:
        shutil.copytree(
            ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    expected = {
        f"{target}/{path.relative_to(copy / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (copy / folder).rglob("*")
        if path.is_file()
    }
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(tmp_path), str(copy)],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert names == expected
    assert len(licences) == 1
    assert wheel.name.endswith("-py3-none-any.whl")
