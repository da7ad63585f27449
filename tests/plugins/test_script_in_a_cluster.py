"""The bundled plugin `script` with real scripts, in a simulated cluster."""

import pytest


@pytest.fixture
def told(tmp_path):
    """Where the scripts write to."""
    return tmp_path / "told"


def test_a_script_hears_of_joins_failures_leaves_and_tags(serf_cluster, told):
    cluster = serf_cluster(5)
    script = f'(echo "$SERF_EVENT"; cat) >> {told}'
    cluster.load("script", handlers=[f"member-join,member-failed,member-leave={script}"])
    cluster.join("n6", tags={"role": "db"})
    cluster.fail("n3")
    cluster.leave("n4")
    assert told.read_text().splitlines() == [
        "member-join", "n6\tfd00::6\tdb\trole=db",
        "member-failed", "n3\tfd00::3\t\t",
        "member-leave", "n4\t10.0.0.4\t\t",
    ]  # fmt: skip


def test_only_its_own_user_events_come_to_a_script_in_their_order(serf_cluster, told):
    cluster = serf_cluster(3)
    cluster.update_tags("n1", role="web")
    line = '$SERF_USER_EVENT $SERF_SELF_NAME $SERF_SELF_ROLE $SERF_TAG_ROLE $(cat)"'
    cluster.load("script", handlers=[f'user:deploy=echo "{line} >> {told}'])
    for name, version in (("deploy", "1"), ("other", "2"), ("deploy", "3"), ("deploy", "4")):
        cluster.user_event(name, version)
    assert told.read_text().splitlines() == [f"deploy n1 web web {n}" for n in (1, 3, 4)]


def test_a_script_answers_queries_and_another_plugin_may_be_faster(serf_cluster):
    cluster = serf_cluster(3)
    cluster.load("script", handlers=["query:load=rev", "query:fails=echo no; exit 1"])
    assert cluster.query("load", "abc") == {"n1": b"cba\n"}
    assert cluster.query("fails") == {}
    assert cluster.query("other") == {}
    assert "Error invoking script 'echo no; exit 1': exit status 1" in cluster.log


def test_with_event_handlers_alone_it_hears_of_the_start(serf_cluster, told):
    handlers = [f"member-join=cut -f1 >> {told}"]
    cluster = serf_cluster(3, event_handlers=handlers)
    assert told.read_text().split() == ["n1", "n2", "n3"]
    cluster.restart("n1")
    assert sorted(told.read_text().split()) == sorted(["n1", "n2", "n3"] * 2)


def test_a_script_that_takes_too_long_is_ended(serf_cluster):
    cluster = serf_cluster(2)
    cluster.load("script", handlers=["user=sleep 600"], timeout="100ms")
    cluster.user_event("deploy")
    assert "Error invoking script 'sleep 600': ended after 0.1s" in cluster.log
