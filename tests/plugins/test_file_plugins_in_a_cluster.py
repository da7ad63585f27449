"""The bundled plugins that write files from the members, in a simulated cluster."""

import json

SETTLED = 60.0
"""Seconds, more than any of them waits before it writes."""


def test_hosts_has_who_is_alive(serf_cluster, tmp_path):
    target = tmp_path / "hosts"
    target.write_text("127.0.0.1 localhost\n")
    cluster = serf_cluster(4)
    cluster.load("hosts", target=target)
    cluster.fail("n3")
    cluster.run(SETTLED)
    lines = target.read_text().splitlines()
    assert lines[0] == "127.0.0.1 localhost"
    named = {line.split()[1] for line in lines[1:] if not line.startswith("#")}
    assert named == {"n1", "n2", "n4"}


def test_prometheus_hears_of_new_targets_and_of_their_ports(serf_cluster, tmp_path):
    target = tmp_path / "targets.json"
    cluster = serf_cluster(2)
    cluster.load("prometheus_sd", target=target, port=9100, port_tag="metrics")
    cluster.join("n3", tags={"metrics": "9200"})
    cluster.run(SETTLED)
    found = {name for group in json.loads(target.read_text()) for name in group["targets"]}
    assert found == {"10.0.0.1:9100", "10.0.0.2:9100", "[fd00::3]:9200"}


def test_a_template_is_rendered_again_and_the_program_is_told(serf_cluster, tmp_path):
    template, target, told = (tmp_path / name for name in ("backends.j2", "backends", "told"))
    template.write_text("{% for m in members %}{{ m.name }}={{ m.address }}\n{% endfor %}")
    cluster = serf_cluster(3)
    cluster.load(
        "template", "haproxy",
        template=template, target=target, reload=["sh", "-c", f"echo again >> {told}"],
    )  # fmt: skip
    cluster.run(SETTLED)
    assert target.read_text().startswith("n1=10.0.0.1:7946\nn2=")
    cluster.leave("n2")
    cluster.run(SETTLED)
    assert [line.partition("=")[0] for line in target.read_text().splitlines()] == ["n1", "n3"]
    assert told.read_text() == "again\nagain\n"
    template.write_text("{{ members | length }}")
    cluster.run(SETTLED)
    assert target.read_text() == "2"
