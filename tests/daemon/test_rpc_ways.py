"""The ways to a real daemon's RPC: a unix socket, and TLS."""

import grp
import os
import re
import shutil
import signal
import stat
import sys
from pathlib import Path

import pytest
from certificates import Authority
from processes import SERFCTL, SERFD, run, toml, until

pytestmark = pytest.mark.daemon

RPC_PAGE = (Path(__file__).parents[2] / "docs" / "rpc.md").read_text(encoding="utf-8")


def asked(*argv, env=None):
    """What serfctl prints; it must go well."""
    done = run(SERFCTL, *map(str, argv), env=env)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


# The unix socket.


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rpc.sock"


@pytest.fixture
def listening(agents, path):
    """Starts a daemon on a unix socket."""

    def listening(name="alone", **config):
        agent = agents.prepare("serfd", name, config=config)
        agent.launch("127.0.0.1:0", f"unix:{path}")
        until("it answers", agent.answers)
        return agent

    return listening


def test_serfctl_asks_everything_over_a_unix_socket(listening, path):
    agent = listening()
    where = f"-rpc-addr=unix:{path}"
    assert asked("members", where).startswith("alone  127.0.0.1:")
    assert "name = alone" in asked("info", where)
    assert "dispatched!" in asked("event", where, "deploy", "v1")
    assert "Ack from 'alone'" in asked("query", where, "load")
    assert asked("members", env={"SERF_RPC_ADDR": f"unix:{path}"}).startswith("alone  ")
    assert f"RPC addr: 'unix:{path}'" in agent.log()
    accepted = rf"Accepted client: process [1-9]\d* of user {os.getuid()}\n"
    assert re.search(accepted, agent.log())


def test_its_file_is_as_configured_and_goes_with_the_daemon(listening, path):
    mine = os.getgroups() if os.geteuid() else [group.gr_gid for group in grp.getgrall()]
    group = grp.getgrgid(next((g for g in mine if g != os.getegid()), os.getegid()))
    agent = listening(rpc_socket_mode="0660", rpc_socket_group=group.gr_name)
    status = path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, group.gr_gid)
    assert asked("leave", f"-rpc-addr=unix:{path}") == "Graceful leave complete\n"
    assert agent.exit_code() == 0
    assert not path.exists()


def test_nobody_else_may_connect_if_nothing_is_said(listening, path):
    listening()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_after_a_crash_the_socket_is_replaced(listening, path):
    agent = listening()
    agent.kill()
    assert path.exists()
    agent.restart()
    assert asked("members", f"-rpc-addr=unix:{path}").startswith("alone  ")


def test_a_second_daemon_leaves_it_to_the_first(listening, path):
    listening()
    done = run(SERFD, "-bind=127.0.0.1:0", f"-rpc-addr=unix:{path}")
    assert done.returncode == 2
    assert done.stderr.endswith(
        f"serfd: cannot listen on unix:{path} (rpc_addr): Address already in use; another agent "
        "may run there\n"
    )
    assert asked("members", f"-rpc-addr=unix:{path}").startswith("alone  ")


def test_an_end_without_the_file_is_a_good_end(listening, path):
    agent = listening()
    path.unlink()
    agent.signal(signal.SIGINT)
    assert agent.exit_code() == 0
    assert "Traceback" not in agent.log()


# TLS.


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


def rpc_tls(authority, **more):
    """The table; the certificate is new."""
    certificate, key = authority.sign("server", "127.0.0.1")
    return {"certificate": str(certificate), "private_key": str(key), **more}


@pytest.fixture
def encrypted(agents):
    """Starts a daemon on a free port, and waits until it runs."""

    def encrypted(**table):
        agent = agents.prepare("serfd", "secret", config={"rpc_tls": table})
        agent.launch("127.0.0.1:0", "127.0.0.1:0")

        def told():
            assert agent.is_running, agent.log()
            return re.search(r"RPC addr: '(127\.0\.0\.1:\d+)' \(TLS\)", agent.log())

        agent.rpc_addr = until("the RPC address is told", told)[1]
        # Before that a signal would end it.
        until("it runs", lambda: "Serf agent starting" in agent.log())
        return agent

    return encrypted


def test_serfctl_asks_everything_within_tls(encrypted, authority):
    agent = encrypted(**rpc_tls(authority))
    how = (f"-rpc-addr={agent.rpc_addr}", f"-rpc-tls-ca={authority.file}")
    assert asked("members", *how).startswith("secret  127.0.0.1:")
    assert "name = secret" in asked("info", *how)
    assert "dispatched!" in asked("event", *how, "deploy", "v1")
    assert "Ack from 'secret'" in asked("query", *how, "load")
    env = {"SERF_RPC_ADDR": agent.rpc_addr, "SERFD_RPC_TLS_CA": str(authority.file)}
    assert asked("members", env=env).startswith("secret  ")
    # The reply to it is the last thing that is sent.
    assert asked("leave", *how) == "Graceful leave complete\n"
    assert agent.exit_code() == 0
    assert "cut off" not in agent.log()


def test_certificates_as_the_documentation_makes_them_do(encrypted, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    made = RPC_PAGE.partition("### Certificates\n")[2].replace("10.0.0.7", "127.0.0.1")
    commands = re.findall(r"^```sh\n(.*?)^```$", made, re.MULTILINE | re.DOTALL)
    assert len(commands) == 3
    for command in commands:
        done = run("sh", "-ec", command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    agent = encrypted(
        certificate="rpc.crt", private_key="rpc.key", client_authority="authority.crt"
    )
    options = re.search(r"^serfctl members -rpc-addr \S+ (-rpc-tls-.*)$", RPC_PAGE, re.MULTILINE)[1]
    done = run(SERFCTL, "members", f"-rpc-addr={agent.rpc_addr}", *options.split(), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("secret  ")


def test_a_client_without_tls_is_told_so(encrypted, authority):
    agent = encrypted(**rpc_tls(authority))
    done = run(SERFCTL, "members", f"-rpc-addr={agent.rpc_addr}")
    assert done.returncode == 1
    assert "If it speaks TLS: -rpc-tls-ca FILE or SERFD_RPC_TLS_CA." in done.stderr


def test_a_client_with_tls_of_a_daemon_without_is_told_so(agents, authority):
    agent = agents.start("serfd", "plain")
    done = run(SERFCTL, "members", f"-rpc-addr={agent.rpc_addr}", f"-rpc-tls-ca={authority.file}")
    assert done.returncode == 1
    assert "Does the agent have a certificate in its [rpc_tls]?" in done.stderr


def test_clients_show_certificates_if_there_is_an_authority_for_them(encrypted, authority):
    agent = encrypted(**rpc_tls(authority, client_authority=str(authority.file)))
    how = (f"-rpc-addr={agent.rpc_addr}", f"-rpc-tls-ca={authority.file}")
    done = run(SERFCTL, "members", *how)
    assert done.returncode == 1
    assert "The agent wants a certificate of yours: give it with -rpc-tls-cert" in done.stderr
    certificate, key = authority.sign("alice", client=True)
    shown = (f"-rpc-tls-cert={certificate}", f"-rpc-tls-key={key}")
    assert asked("members", *how, *shown).startswith("secret  ")
    until("the refusal is logged", lambda: "peer did not return a certificate" in agent.log())


def test_a_reload_takes_a_new_certificate_or_keeps_the_old_one(encrypted, tmp_path, authority):
    table = rpc_tls(authority)
    agent = encrypted(**table)
    Path(table["certificate"]).write_text("nonsense")
    agent.signal(signal.SIGHUP)
    until("it tells", lambda: "server.crt: it holds no PEM certificate" in agent.log())
    how = ("members", f"-rpc-addr={agent.rpc_addr}")
    assert asked(*how, f"-rpc-tls-ca={authority.file}").startswith("secret  ")
    (tmp_path / "new").mkdir()
    new = Authority(tmp_path / "new")
    for file, signed in zip(table.values(), new.sign("server", "127.0.0.1"), strict=True):
        Path(file).write_bytes(signed.read_bytes())
    agent.signal(signal.SIGHUP)
    until("it is reloaded", lambda: "Reload complete" in agent.log())
    assert asked(*how, f"-rpc-tls-ca={new.file}").startswith("secret  ")
    assert "needs a restart" not in agent.log()


def test_a_reload_cannot_switch_tls_off(encrypted, authority):
    agent = encrypted(**rpc_tls(authority))
    (agent.folder / "secret.toml").write_text("")
    agent.signal(signal.SIGHUP)
    until("it tells", lambda: "rpc_tls is switched on or off: needs a restart" in agent.log())


# What is wrong is found before a daemon is restarted with it.


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"rpc_tls": {"certificate": "none.crt", "private_key": "none.key"}},
            "rpc_tls.certificate none.crt: No such file or directory",
        ),
        (
            {"rpc_tls": {"certificate": "authority.crt", "private_key": "authority.crt"}},
            "rpc_tls.private_key authority.crt: it holds no PEM private key",
        ),
        (
            {"rpc_addr": "unix:/none/rpc.sock", "rpc_socket_group": "no-such-group"},
            "rpc_socket_group: there is no group 'no-such-group' on this machine",
        ),
        ({"rpc_addr": "unix:rpc.sock"}, "serfd.toml: rpc_addr 'unix:rpc.sock': expected a whole"),
    ],
)
def test_check_finds_what_a_start_would(tmp_path, authority, config, says):
    (tmp_path / "serfd.toml").write_text(toml({"bind": "127.0.0.1:0", **config}))
    said = []
    for options in (["--check"], []):
        done = run(SERFD, *options, "--config=serfd.toml", cwd=tmp_path)
        assert done.returncode == 2
        said.append(done.stderr)
    assert said[0].startswith(f"serfd: {says}")
    assert said[0].count("\n") == 1
    assert said[0] == said[1]


def test_a_certificate_without_the_extra_is_told_with_how_to_install_it(tmp_path, authority):
    (tmp_path / "serfd.toml").write_text(
        toml({"bind": "127.0.0.1:0", "rpc_tls": rpc_tls(authority)})
    )
    # As if it were not installed.
    code = "import sys; sys.modules['OpenSSL'] = None; from serfd.daemon import main; main()"
    for options in (["--check"], []):
        argv = [*options, "--config=serfd.toml"]
        done = run(sys.executable, "-c", code, *argv, cwd=tmp_path)
        assert done.stderr.startswith("serfd: rpc_tls needs more Python packages (")
        assert done.stderr.endswith("): pip install 'serfd[tls]'\n")


# What a daemon without TLS does not pay for.

LOADED = """
import sys
from pathlib import Path

class Plugin:
    def __init__(self, agent):
        Path("loaded").write_text(" ".join(sys.modules))
"""


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_only_a_daemon_with_tls_loads_pyopenssl(tmp_path, authority, is_encrypted):
    (tmp_path / "loaded.py").write_text(LOADED)
    config = {"bind": "127.0.0.1:0", "plugin_dirs": ["."], "plugins": {"loaded": {}}}
    if is_encrypted:
        config["rpc_tls"] = rpc_tls(authority)
    (tmp_path / "serfd.toml").write_text(toml(config))
    done = run(SERFD, "--check", "--config=serfd.toml", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    loaded = set((tmp_path / "loaded").read_text().split())
    assert "twisted.internet.tcp" in loaded
    assert {name in loaded for name in ("OpenSSL", "cryptography")} == {is_encrypted}


def test_a_plugin_can_still_use_pyopenssl(tmp_path):
    (tmp_path / "loaded.py").write_text(
        "from twisted.internet.endpoints import wrapClientTLS\n"
        "from twisted.internet.ssl import optionsForClientTLS\n" + LOADED
    )
    config = {"bind": "127.0.0.1:0", "plugin_dirs": ["."], "plugins": {"loaded": {}}}
    (tmp_path / "serfd.toml").write_text(toml(config))
    done = run(SERFD, "--check", "--config=serfd.toml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "twisted.protocols.tls" in (tmp_path / "loaded").read_text().split()
