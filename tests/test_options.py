"""The command line, as a table of words and what they mean."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serfd.options import Option, OptionError, nearest, parse, usage

OPTIONS = (
    Option("node", "NAME", "this node's name"),
    Option("rpc-addr", "HOST:PORT", "where RPC listens", default="127.0.0.1:7373"),
    Option("tag", "KEY=VALUE", "a tag", many=True),
    Option("replay", help="replay events", flag=True),
)


@pytest.mark.parametrize(
    ("words", "values", "arguments"),
    [
        ("", {}, []),
        ("-node a", {"node": "a"}, []),
        ("--node a", {"node": "a"}, []),
        ("-node=a", {"node": "a"}, []),
        ("--node=a", {"node": "a"}, []),
        ("-node=", {"node": ""}, []),
        ("-node=a=b", {"node": "a=b"}, []),
        ("-node a -node b", {"node": "b"}, []),
        ("-node -5", {"node": "-5"}, []),
        ("-node -replay", {"node": "-replay"}, []),
        ("-node --", {"node": "--"}, []),
        ("-tag a=1 --tag=b=2 -tag c", {"tag": ["a=1", "b=2", "c"]}, []),
        ("-replay", {"replay": True}, []),
        ("-replay false", {"replay": True}, ["false"]),
        ("-replay -replay=false", {"replay": False}, []),
        ("x -node a y", {"node": "a"}, ["x", "y"]),
        ("x y --rpc-addr h:1", {"rpc-addr": "h:1"}, ["x", "y"]),
        ("-replay -- -node --", {"replay": True}, ["-node", "--"]),
        ("- -5 -5.5 x", {}, ["-", "-5", "-5.5", "x"]),
    ],
)
def test_options_stand_anywhere_and_are_written_as_serfs(words, values, arguments):
    parsed = parse(words.split(), OPTIONS)
    assert parsed.values == values
    assert parsed.arguments == arguments


@pytest.mark.parametrize(
    ("words", "values", "arguments"),
    [
        ("-replay x -node a y", {"replay": True}, ["x", "-node", "a", "y"]),
        ("-node a x -x", {"node": "a"}, ["x", "-x"]),
        ("x -- -x", {}, ["x", "--", "-x"]),
        ("-- -x -y", {}, ["-x", "-y"]),
        ("- -x", {}, ["-", "-x"]),
        ("-replay", {"replay": True}, []),
    ],
)
def test_options_may_have_to_stand_first_as_serfs(words, values, arguments):
    parsed = parse(words.split(), OPTIONS, options_first=True)
    assert parsed.values == values
    assert parsed.arguments == arguments


def test_an_option_may_add_to_the_list_of_another():
    options = (Option("config", "FILE", many=True), Option("dir", "D", many=True, into="config"))
    parsed = parse(["-dir=1", "-config", "2", "-dir", "3"], options)
    assert parsed.values == {"config": ["1", "2", "3"]}


NUMBERS = (Option("n", "N"), Option("wait", "DURATION"))


@pytest.mark.parametrize(
    ("text", "number"), [("0", 0), ("-5", -5), ("+7", 7), ("255", 255), ("", 3)]
)
def test_a_number_is_read(text, number):
    assert parse([f"-n={text}"], NUMBERS).integer("n", 3) == number


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("10s", 10.0),
        ("300ms", 0.3),
        ("1.5h", 5400.0),
        ("1m30s", 90.0),
        ("2us", 2e-6),
        ("2µs", 2e-6),
        ("3ns", 3e-9),
        (".5s", 0.5),
        ("-1s", -1.0),
        ("+1s", 1.0),
        ("", 7.0),
    ],
)
def test_a_duration_is_read_as_go_writes_it(text, seconds):
    assert parse([f"-wait={text}"], NUMBERS).seconds("wait", 7.0) == pytest.approx(seconds)


def test_a_number_that_is_not_given_is_the_default():
    parsed = parse([], NUMBERS)
    assert (parsed.integer("n"), parsed.seconds("wait")) == (0, 0.0)


@pytest.mark.parametrize("text", ["x", "1.5", "1s", "--5", "-"])
def test_what_is_no_number_is_refused_in_gos_words(text):
    told = f'invalid value "{text}" for flag -n: parse error\nExpected a whole number.'
    with pytest.raises(OptionError) as caught:
        parse([f"-n={text}"], NUMBERS).integer("n")
    assert str(caught.value) == told


@pytest.mark.parametrize("text", ["x", "5", "s", "1.2.3s", "1d", "1s ", "10 s", "-", "1e3s", "s1"])
def test_what_is_no_duration_is_refused_in_gos_words(text):
    with pytest.raises(OptionError) as caught:
        parse([f"-wait={text}"], NUMBERS).seconds("wait")
    assert str(caught.value) == (
        f'invalid value "{text}" for flag -wait: parse error\n'
        "Expected a duration like 500ms, 10s or 1m30s."
    )


@pytest.mark.parametrize("text", ["true", "1", "t", "T", "TRUE", "True"])
def test_a_flag_can_be_said_to_be_true(text):
    assert parse([f"-replay={text}"], OPTIONS).flag("replay") is True


@pytest.mark.parametrize("text", ["false", "0", "f", "F", "FALSE", "False"])
def test_a_flag_can_be_said_to_be_false(text):
    assert parse([f"--replay={text}"], OPTIONS).flag("replay") is False


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("-nodes a", "flag provided but not defined: -nodes\nDid you mean -node?"),
        ("--rpcaddr=x", "flag provided but not defined: -rpcaddr\nDid you mean -rpc-addr?"),
        ("-zzz", "flag provided but not defined: -zzz"),
        ("-Node a", "flag provided but not defined: -Node\nDid you mean -node?"),
        ("x -node", "flag needs an argument: -node"),
        (
            "-replay=x",
            'invalid boolean value "x" for -replay: parse error\nExpected true or false.',
        ),
        ("-replay=", 'invalid boolean value "" for -replay: parse error\nExpected true or false.'),
        ("---node", "bad flag syntax: ---node"),
        ("-=a", "bad flag syntax: -=a"),
        ("--=a", "bad flag syntax: --=a"),
    ],
)
def test_what_is_wrong_is_named_with_the_nearest_right_name(words, text):
    with pytest.raises(OptionError) as caught:
        parse(words.split(), OPTIONS)
    assert str(caught.value) == text


def test_what_was_not_given_has_the_callers_default():
    parsed = parse([], OPTIONS)
    assert parsed.text("node", "host") == "host"
    assert parsed.text("node") == ""
    assert parsed.texts("tag") == []
    assert parsed.flag("replay") is False


def test_what_was_given_is_read_by_its_kind():
    parsed = parse(["-node", "a", "-tag", "b", "-replay"], OPTIONS)
    assert parsed.text("node", "host") == "a"
    assert parsed.texts("tag") == ["b"]
    assert parsed.flag("replay") is True


SPELLINGS = (
    lambda name, value: [f"-{name}", value],
    lambda name, value: [f"--{name}", value],
    lambda name, value: [f"-{name}={value}"],
    lambda name, value: [f"--{name}={value}"],
)
GIVEN = st.tuples(
    st.sampled_from(["node", "tag", "rpc-addr"]), st.text(), st.sampled_from(SPELLINGS)
)
ARGUMENT = st.text().filter(lambda text: not text.startswith("-"))


@given(st.lists(GIVEN | ARGUMENT))
def test_every_value_comes_back_as_it_was_given(what):
    argv, values, arguments = [], {}, []
    for item in what:
        if isinstance(item, str):
            argv.append(item)
            arguments.append(item)
        else:
            name, value, spell = item
            argv += spell(name, value)
            if name == "tag":
                values.setdefault(name, []).append(value)
            else:
                values[name] = value
    parsed = parse(argv, OPTIONS)
    assert parsed.values == values
    assert parsed.arguments == arguments


@given(st.lists(st.text(alphabet="-=a5 node")))
def test_a_command_line_is_understood_or_its_error_names_a_word_of_it(argv):
    try:
        understood, error = parse(argv, OPTIONS), ""
    except OptionError as caught:
        understood, error = None, str(caught)
    if understood is None:
        name = error.split("\n")[0].split()[-1].lstrip("-")
        assert any(name in word for word in argv)
    else:
        assert all(argument in argv for argument in understood.arguments)


def test_the_help_is_made_from_the_table():
    text = usage(
        "serfd [options]", "Runs an agent.", OPTIONS, example="serfd -node a", notes="See also."
    )
    assert text == (
        "Usage: serfd [options]\n"
        "\n"
        "Runs an agent.\n"
        "\n"
        "Example:\n"
        "  serfd -node a\n"
        "\n"
        "Options:\n"
        "  -node NAME           this node's name\n"
        "  -rpc-addr HOST:PORT  where RPC listens (default: 127.0.0.1:7373)\n"
        "  -tag KEY=VALUE       a tag (repeatable)\n"
        "  -replay              replay events\n"
        "\n"
        "See also.\n"
    )


def test_the_help_leaves_out_what_there_is_not():
    assert usage("x", "Does it.", ()) == "Usage: x\n\nDoes it.\n"


@pytest.mark.parametrize(
    ("name", "near"), [("membres", "members"), ("joni", "join"), ("zzz", ""), ("", "")]
)
def test_the_nearest_name_is_one_that_looks_alike_or_none(name, near):
    assert nearest(name, ["join", "leave", "members"]) == near


def test_a_right_command_line_is_read_without_slow_imports():
    code = (
        "import sys; from serfd.options import *; "
        "parse(['-node', 'a'], (Option('node', 'NAME'),)); "
        "print(*{'argparse', 're', 'typing', 'dataclasses', 'difflib', 'json'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "\n"
