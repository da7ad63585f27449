"""Other people's programs that tests need."""

import os
import shutil

import pytest

PACKAGES = {"nginx": "nginx-light", "promtool": "prometheus"}
"""Where the package is not named like the program."""
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def require(program: str) -> str:
    """The path of a program; without it the test is skipped, or fails if it must run."""
    found = shutil.which(program, path=PATH)
    if found is not None:
        return found
    reason = f"needs the program `{program}`: apt-get install {PACKAGES.get(program, program)}"
    if os.environ.get("SERFD_INTEROP") == "required":
        pytest.fail(f"{reason} (SERFD_INTEROP=required)", pytrace=False)
    pytest.skip(reason)
