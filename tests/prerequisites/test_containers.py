"""The image files and the conda environment: nothing can be built here, so what they name is checked."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "prerequisites"
DOCKERFILE, APPTAINER = (HERE / "Dockerfile").read_text(), (HERE / "apptainer.def").read_text()
CONDA = yaml.safe_load((HERE / "environment.yml").read_text())


def instructions(name: str) -> list[str]:
    """The arguments of a Dockerfile instruction, continued lines joined."""
    code = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE)
    return re.findall(rf"^{name} (.*)$", re.sub(r"\\\n\s*", "", code), re.MULTILINE)


def copied() -> list[str]:
    return [word for line in instructions("COPY") for word in line.split()[:-1]]


def test_all_name_the_same_python_and_it_is_new_enough():
    [image] = instructions("FROM")
    python = re.fullmatch(r"python:(3\.\d+)-slim-\w+", image)[1]
    assert f"\nFrom: {image}\n" in APPTAINER
    assert f"python={python}" in CONDA["dependencies"]
    needed = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert int(python.split(".")[1]) >= int(needed)


def test_what_is_copied_exists_and_is_installed():
    files = re.search(r"^%files\n((?:    .*\n)+)", APPTAINER, re.MULTILINE)[1]
    for sources in (copied(), [line.split()[0] for line in files.splitlines()]):
        assert sorted(sources) == ["requirements-lesson.txt", "requirements.txt"]
        assert all((ROOT / name).is_file() for name in sources)
    install = "--requirement /opt/requirements/requirements.txt"
    assert any(install in line for line in instructions("RUN")) and install in APPTAINER


def test_the_image_leaves_out_what_needs_the_checkout():
    """The images delete lines beginning with `-e `; what is left must need no file that is not copied."""
    assert all("sed -i '/^-e /d'" in text for text in (DOCKERFILE, APPTAINER))
    for name in copied():
        left = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("-e ")]
        referred = [line.split()[1] for line in left if line.startswith("-")]
        assert set(referred) <= set(copied())


def test_the_image_is_not_run_by_root():
    assert instructions("USER") == ["1000"]


def test_conda_points_to_files_that_exist_from_its_own_folder():
    [pip] = [entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict)]
    assert "pip" in CONDA["dependencies"]
    for line in pip:
        flag, path = line.split()
        target = (HERE / path).resolve()
        assert (flag, target) in {("-r", ROOT / "requirements-lesson.txt"), ("-e", ROOT)}
        assert target.is_file() or (target / "pyproject.toml").is_file()
        if flag == "-r":  # conda's pip runs here: a relative path in that list would point to this folder
            assert not re.search(r"^-", target.read_text(), re.MULTILINE)


def test_common_is_found_in_the_images():
    """They do not install the project: PYTHONPATH has to lead to the checkout."""
    assert "PYTHONPATH=/tutorial" in instructions("ENV")[0] and instructions("WORKDIR") == ["/tutorial"]
    assert 'export PYTHONPATH="$PWD"' in APPTAINER
