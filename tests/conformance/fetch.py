"""transformers' own tests of models, configurations and image processors, from the sdist of the installed version.

They are nobody's to copy into this repository, so `make install` runs this file: it keeps them in the virtual environment.
Without a network it says so and the tests that need them are skipped.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

import transformers

FOLDER = Path(sys.prefix) / "share" / "transformers-tests" / transformers.__version__
FILES = ("test_modeling_common.py", "test_configuration_common.py", "test_image_processing_common.py")


def is_there() -> bool:
    return all((FOLDER / name).is_file() for name in FILES)


def fetch() -> None:
    """Download the sdist and keep the three files, all or none."""
    requirement = f"transformers=={transformers.__version__}"
    with tempfile.TemporaryDirectory() as folder:
        options = ["--no-deps", "--no-binary", "transformers", "--no-build-isolation", "--quiet", "--dest", folder]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)
        (sdist,) = Path(folder).glob("transformers-*.tar.gz")
        found = {}
        with tarfile.open(sdist) as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if path.parent.name == "tests" and path.name in FILES and (file := archive.extractfile(member)):
                    found[path.name] = file.read()
    missing = sorted(set(FILES) - set(found))
    if missing:
        raise ValueError(f"the sdist of {requirement} has no tests/{', tests/'.join(missing)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "__init__.py").touch()  # which one of them asks for
    for name, content in found.items():
        (FOLDER / name).write_bytes(content)


if __name__ == "__main__":
    try:
        if not is_there():
            fetch()
    except (subprocess.CalledProcessError, ValueError) as error:
        print(f"tests/conformance will be skipped: transformers' own tests could not be fetched ({error})", file=sys.stderr)
