"""Keyring files in a cluster of real Serf agents and ours."""

import base64
import json

import pytest
from processes import SERFCTL, run

pytestmark = pytest.mark.interop

OLD, NEW, THIRD = (base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2, 3))


@pytest.mark.parametrize(("tool", "through"), [("serf", "d1"), (SERFCTL, "s1")])
def test_a_rotation_leaves_the_same_file_with_all_and_ours_for_its_owner_only(
    agents, tmp_path, tool, through
):
    files = {name: tmp_path / f"{name}.keys" for name in ("d1", "s1", "d2")}
    for file in files.values():
        file.write_text(json.dumps([OLD]))
        file.chmod(0o644)
    three = agents.cluster(
        {"d1": "serfd", "s1": "serf", "d2": "serfd"},
        own={name: [f"-keyring-file={file}"] for name, file in files.items()},
    )

    def keys(action: str, key: str) -> None:
        asked = run(tool, "keys", f"-rpc-addr={three[through].rpc_addr}", f"-{action}", key)
        # All have answered, and each only when its file was written.
        assert asked.returncode == 0, asked.stdout + asked.stderr

    keys("install", NEW)
    keys("install", THIRD)
    keys("use", NEW)
    keys("remove", OLD)
    written = {name: file.read_text() for name, file in files.items()}
    assert json.loads(written["s1"]) == [NEW, THIRD]
    assert written["d1"] == written["d2"] == written["s1"]
    assert [files[name].stat().st_mode & 0o777 for name in ("d1", "d2")] == [0o600] * 2
    for name in files:
        three[name].kill()
        three[name].restart()
    assert three["d1"].join(three["s1"]) == 1
    assert three["d2"].join(three["s1"]) == 1
