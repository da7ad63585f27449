"""What is told of a life, in the words that users of real agents look for in their logs."""

import base64
import signal

import pytest
from processes import until

pytestmark = pytest.mark.interop

KINDS = pytest.mark.parametrize("kind", ["serf", "serfd"])

LIFE = [
    "[INFO] agent: Restored 1 tag(s) from tags\n",
    "[INFO] agent: Restored keyring with 1 keys from keyring\n",
    "[INFO] agent: Serf agent starting\n",
    "[INFO] serf: EventMemberJoin: told 127.0.0.1\n",
    "[INFO] agent: Joining cluster...(replay: false)\n",
    "[INFO] agent: joining: [127.0.0.1:1] replay: false\n",
    "[WARN] agent: error joining: ",
    "[WARN] agent: Join failed: 1 error occurred:",
    ", retrying in 1s\n",
    "[INFO] agent.ipc: Accepted client: 127.0.0.1:",
    "[INFO] agent: joining: [127.0.0.1:PORT] replay: false\n",
    "[INFO] serf: EventMemberJoin: friend 127.0.0.1\n",
    "[INFO] agent: joined: 1 nodes\n",
    "[INFO] agent: Received event: member-join\n",
    "[INFO] agent: Received event: query: load\n",
    "[INFO] agent: Received event: user-event: deploy\n",
    "[INFO] serf: EventMemberUpdate: told\n",
    "[INFO] agent: Received event: member-update\n",
    "[INFO] memberlist: Suspect friend has failed, no acks received\n",
    "[INFO] memberlist: Marking friend as failed, suspect timeout reached (0 peer confirmations)\n",
    "[INFO] serf: EventMemberFailed: friend 127.0.0.1\n",
    "[INFO] agent: Received event: member-failed\n",
    "[INFO] agent.ipc: Graceful leave triggered\n",
    "[INFO] agent: requesting graceful leave from Serf\n",
    "[INFO] serf: EventMemberLeave: told 127.0.0.1\n",
    "[INFO] agent: requesting serf shutdown\n",
    "[INFO] agent: shutdown complete\n",
]


@KINDS
def test_both_kinds_tell_of_a_life_in_the_same_words(agents, tmp_path, kind):
    key = base64.b64encode(bytes(32)).decode()
    (tmp_path / "tags").write_text('{"dc": "east"}')
    (tmp_path / "keyring").write_text(f'["{key}"]')
    friend = agents.start("serfd", "friend", f"-encrypt={key}")
    agent = agents.start(
        kind, "told", "-profile=local", "-tags-file=tags", "-keyring-file=keyring",
        "-retry-join=127.0.0.1:1", "-retry-interval=1s",
    )  # fmt: skip

    def says(line: str) -> None:
        until(f"it says {line!r}", lambda: line.replace("PORT", str(friend.port)) in agent.log())

    with agent.client() as client:
        assert client.join([friend.bind]) == 1
        list(client.query("load", timeout=1))
        client.event("deploy")
        client.tags({"dc": "west"})
        says("Received event: user-event: deploy\n")
        says("Received event: member-update\n")
        friend.kill()
        says("Received event: member-failed\n")
        client.leave()
    assert agent.exit_code() == 0
    for line in LIFE:
        says(line)


@KINDS
def test_both_kinds_tell_of_an_end_without_a_leave(agents, kind):
    agent = agents.start(kind, "told")
    agent.signal(signal.SIGTERM)
    assert agent.exit_code() == 1
    for line in ("Caught signal: terminated\n", "[WARN] serf: Shutdown without a Leave\n"):
        assert line in agent.log()


@KINDS
@pytest.mark.parametrize(
    ("options", "warned"),
    [
        (["-retry-interval=-1s"], "'RetryInterval' is too low. Setting to 1s\n"),
        (["-broadcast-timeout=999ms"], "'BroadcastTimeout' is too low. Setting to 1s\n"),
        (["-rejoin"], "'RejoinAfterLeave' enabled without snapshot file\n"),
        (["-rejoin", "-snapshot=file", "-retry-interval=1s", "-retry-max=-1"], ""),
    ],
)
def test_both_kinds_warn_of_the_same_settings(agents, kind, options, warned):
    agent = agents.start(kind, "told", *options)
    until("it has started", lambda: "Serf agent starting\n" in agent.log())
    agent.signal(signal.SIGTERM)
    assert agent.exit_code() == 1
    if warned:
        assert warned in agent.log()
    else:
        assert "Warning" not in agent.log()
        assert "too low" not in agent.log()
