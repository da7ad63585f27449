"""Command lines are completed by what the table of commands says."""

import subprocess

import pytest
from programs import require

from serfd import ctl
from serfd.ctl_completion import SCRIPTS

SHELLS = {shell: script(ctl.COMMANDS.values()) for shell, script in SCRIPTS.items()}


@pytest.fixture
def completed(tmp_path):
    """What bash offers for a command line whose last word is being typed."""
    script = tmp_path / "serfctl.bash"
    script.write_text(SHELLS["bash"])

    def completed(*words):
        code = (
            f"source {script}\n"
            'COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))\n'
            '_serfctl\nprintf "%s\\n" "${COMPREPLY[@]}"'
        )
        argv = ["bash", "--norc", "-uec", code, "bash", "serfctl", *words]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout.split()

    return completed


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ([""], list(ctl.COMMANDS)),
        (["m"], ["members", "monitor"]),
        (["members", "-na"], ["-name"]),
        (["members", "--na"], ["--name"]),
        (["members", "-format", ""], ["text", "json"]),
        (["members", "--format", "j"], ["json"]),
        (["members", "-format", "="], ["text", "json"]),
        (["members", "-format", "=", "j"], ["json"]),
        (["members", "-name", ""], []),
        (["members", "-detailed", "-st"], ["-status"]),
        (["monitor", "-log-level", "de"], ["debug"]),
        (["help", "rt"], ["rtt"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["keygen", ""], ["-format"]),
        (["nonsense", ""], []),
    ],
)
def test_bash_offers_commands_options_and_values(completed, words, offered):
    assert completed(*words) == offered


def test_bash_offers_every_option(completed):
    for name, command in ctl.COMMANDS.items():
        assert completed(name, "-") == [f"-{option.name}" for option in command.options]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_takes_its_script(shell, tmp_path):
    script = tmp_path / "script"
    script.write_text(SHELLS[shell])
    argv = [require(shell), "-n", script]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_fish_shows_descriptions_as_the_help_does(tmp_path):
    (tmp_path / "script").write_text(SHELLS["fish"])
    code = f"source {tmp_path}/script; complete -C 'serfctl info -'"
    argv = [require("fish"), "--no-config", "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    found = dict(line.split("\t") for line in done.stdout.splitlines())
    assert found == {f"-{option.name}": option.help for option in ctl.COMMANDS["info"].options}


def test_zsh_is_given_descriptions_with_their_apostrophes_and_colons(tmp_path):
    (tmp_path / "script").write_text(SHELLS["zsh"])
    code = (
        '_arguments() { print -rl -- "$@" }; compdef() {}\n'
        f"source {tmp_path}/script; words=(serfctl info ''); CURRENT=3; _serfctl"
    )
    argv = [require("zsh"), "-fc", code]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:3] == [
        r"-rpc-addr[where the agent listens, or unix\:PATH]:host\:port:",
        "-rpc-auth[the agent's rpc_auth]:token:",
    ]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_knows_every_command_and_option(shell):
    for name, command in ctl.COMMANDS.items():
        assert name in SHELLS[shell]
        for option in command.options:
            dash = "-o " if shell == "fish" else "-"
            assert f"{dash}{option.name}" in SHELLS[shell]


def test_a_script_is_printed_for_the_shell_that_is_named(capsys):
    assert ctl.main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out == SHELLS["zsh"]
