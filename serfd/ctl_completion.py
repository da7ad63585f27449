"""Scripts that complete `serfctl`'s command lines in a shell, made from its table of commands."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Protocol

    from serfd.options import Option

    class Command(Protocol):
        """What is asked of a command: see `serfd.ctl`."""

        name: str
        summary: str
        arguments: str
        options: tuple[Option, ...]


def bash(commands: Iterable[Command]) -> str:
    """For bash 4 and later."""
    commands = list(commands)
    cases = []
    for command in commands:
        rows = [f"            -{option.name}) words='{' '.join(option.choices)}' ;;"
                for option in command.options if not option.flag]  # fmt: skip
        options = " ".join([f"-{option.name}" for option in command.options])
        arguments = _arguments(command, commands)
        rows.append(f"            *) words='{' '.join(filter(None, (options, arguments)))}' ;;")
        body = "\n".join(rows)
        cases.append(
            f'        {command.name})\n            case "$before" in\n{body}\n            esac ;;'
        )
    names = " ".join([command.name for command in commands])
    # Two dashes are as good as one. A value may also be written behind `=`, which bash splits off.
    return f"""\
# Completes serfctl in bash: serfctl completion bash > /etc/bash_completion.d/serfctl
_serfctl() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
    local words='' dashes=''
    if [[ $current == = ]]; then
        current=''
    elif [[ $before == = ]]; then
        before="${{COMP_WORDS[COMP_CWORD-2]}}"
    fi
    [[ $before == --* ]] && before="${{before#-}}"
    [[ $current == --* ]] && dashes=- && current="${{current#-}}"
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        words='{names}'
    else
        case "${{COMP_WORDS[1]}}" in
{chr(10).join(cases)}
        esac
    fi
    local word
    for word in $(compgen -W "$words" -- "$current"); do
        COMPREPLY+=("$dashes$word")
    done
}}
complete -F _serfctl serfctl
"""


def zsh(commands: Iterable[Command]) -> str:
    """For zsh: a file in a directory of `fpath`, or to be sourced."""
    commands = list(commands)
    cases = []
    for command in commands:
        specs = []
        for option in command.options:
            many = "*" if option.many else ""
            spec = f"{many}-{option.name}[{_zsh(option.help)}]"
            if not option.flag:
                choices = " ".join(option.choices)
                spec += f":{_zsh(option.value.lower())}:" + (f"({choices})" if choices else "")
            specs.append(f"'{spec}'")
        arguments = _arguments(command, commands)
        specs.append(f"'*::argument:({arguments})'" if arguments else "'*::argument:'")
        joined = " \\\n                ".join(specs)
        cases.append(
            f"        {command.name})\n            _arguments \\\n                {joined} ;;"
        )
    described = "\n".join([f"        '{c.name}:{_zsh(c.summary)}'" for c in commands])
    return f"""\
#compdef serfctl
# Completes serfctl in zsh: serfctl completion zsh > "${{fpath[1]}}/_serfctl"
_serfctl() {{
    local -a commands
    commands=(
{described}
    )
    if ((CURRENT == 2)); then
        _describe command commands
        return
    fi
    local command="$words[2]"
    shift words
    ((CURRENT--))
    case "$command" in
{chr(10).join(cases)}
    esac
}}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _serfctl "$@"
else
    compdef _serfctl serfctl
fi
"""


def fish(commands: Iterable[Command]) -> str:
    """For fish."""
    commands = list(commands)
    rows = [
        "# Completes serfctl in fish:",
        "# serfctl completion fish > ~/.config/fish/completions/serfctl.fish",
        "complete -c serfctl -f",
    ]
    for command in commands:
        summary = _fish(command.summary)
        rows.append(f"complete -c serfctl -n __fish_use_subcommand -a {command.name} -d {summary}")
        seen = f"complete -c serfctl -n '__fish_seen_subcommand_from {command.name}'"
        for option in command.options:
            row = f"{seen} -o {option.name} -d {_fish(option.help)}"
            if not option.flag:
                choices = " ".join(option.choices)
                row += " -x" + (f" -a '{choices}'" if choices else "")
            rows.append(row)
        arguments = _arguments(command, commands)
        if arguments:
            rows.append(f"{seen} -a '{arguments}'")
    return "\n".join(rows) + "\n"


SCRIPTS: dict[str, Callable[[Iterable[Command]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
"""By shell."""


def _arguments(command: Command, commands: Iterable[Command]) -> str:
    """What a command's arguments can be, as far as that is known."""
    if command.arguments == "[COMMAND]":
        return " ".join([other.name for other in commands])
    return command.arguments.replace("|", " ") if "|" in command.arguments else ""


def _zsh(text: str) -> str:
    """A description within a specification for zsh, which stands in single quotes."""
    special = "".join(["\\" + char if char in "[]:\\" else char for char in text])
    return special.replace("'", "'\\''")


def _fish(text: str) -> str:
    """A description for fish, in its single quotes."""
    escaped = "".join(["\\" + char if char in "'\\" else char for char in text])
    return f"'{escaped}'"
