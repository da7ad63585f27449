"""What a person reads of a run."""

import pytest
from clusters import make

from serfd.sim.__main__ import main
from serfd.sim.process import MET, Happening
from serfd.sim.story import Story


def story(*happenings: tuple[float, str, str, str]) -> Story:
    return Story.of([Happening(0.0, "all", MET, ""), *(Happening(*one) for one in happenings)])


def test_what_many_see_is_one_line() -> None:
    read = story(
        (1.0, "n1", "crashed", ""),
        (5.0, "n2", "member-failed", "n1"),
        (5.2, "n3", "member-failed", "n1"),
        (5.4, "n4", "member-failed", "n1"),
    )
    assert [line for _, line in read.lines] == [
        "all list all",
        "n1 crashed",
        "n1 has failed, says n2; 3 say so by 5.400 (n1 crashed)",
    ]
    assert read.accusations == {"failure": 1}
    assert read.wrong == {}


def test_the_same_much_later_is_another_line() -> None:
    read = story((1.0, "n2", "suspects", "n1"), (9.0, "n3", "suspects", "n1"))
    assert read.accusations == {"suspicion": 2}


@pytest.mark.parametrize(
    ("before", "why"),
    [
        ([], "(WRONGLY)"),
        ([(0.5, "n1", "is paused", "for 3.0 s")], "(n1 is paused)"),
        ([(0.5, "n2", "is paused", "for 3.0 s")], "(n2 is paused)"),
        ([(0.1, "n1", "is paused", ""), (0.5, "n1", "goes on", "")], "(n1 is paused before)"),
        ([(0.5, "", "packets are lost", "")], "(network packets are lost)"),
        ([(0.5, "n1 n3", "are cut off", "")], "(n1 are cut off)"),
        ([(0.5, "n3", "is paused", "")], "(WRONGLY)"),
    ],
)
def test_an_accusation_has_its_reason_or_is_wrong(
    before: list[tuple[float, str, str, str]], why: str
) -> None:
    read = story(*before, (1.0, "n2", "suspects", "n1"))
    assert read.lines[-1][1].endswith(why)
    assert read.wrong == ({"suspicion": 1} if why == "(WRONGLY)" else {})


def test_what_a_newcomer_learns_is_not_worth_a_line_each() -> None:
    read = story(
        (1.0, "n1", "starts again", "at 10.0.0.9:7946"),
        (1.1, "n1", "member-join", "n2"),
        (1.2, "n2", "member-join", "n1"),
        (9.0, "n1", "member-join", "n3"),
    )
    assert [line for _, line in read.lines][1:] == [
        "n1 starts again at 10.0.0.9:7946",
        "n1 is alive, says n2",
        "n3 is alive, says n1",
    ]


def test_a_cluster_tells_its_story() -> None:
    cluster = make(5, 1)
    cluster.run(seconds=2)
    cluster.kill("n1")
    cluster.run_until(lambda: cluster.happened("member-failed"), limit=30)
    lines = [line for _, line in Story.of(cluster.history).lines]
    assert any(line.startswith("n1 is suspected, says") for line in lines)
    assert any(line.startswith("n1 has failed, says") for line in lines)


# The command


def test_the_command_tells_one_run_and_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--nodes", "5", "--seed", "2", "--seconds", "20"]) == 0
    told = capsys.readouterr().out
    for part in ("all list all", "packets", "node-seconds in", "suspicion:", "all checks hold"):
        assert part in told


def test_the_command_runs_many_seeds_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--nodes", "4", "--seeds", "4-6", "--seconds", "15"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == ["seed 4", "seed 5", "seed 6"]
    assert lines[-1].startswith("3 seeds, 0 failed")


def test_a_failing_seed_prints_what_replays_it_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serfd.gossip.memberlist.RELAYS_MAX", -1)
    arguments = ["--nodes", "3", "--seconds", "15", "--loss", "0.1", "--profile", "local"]
    assert main([*arguments, "--seeds", "1"]) == 1
    assert (
        "again: python -m serfd.sim --nodes 3 --seed 1 --seconds 15 --loss 0.1 --profile local"
        in capsys.readouterr().out
    )
    assert main([*arguments, "--seed", "1"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seeds", "x"],
        ["--seeds", "9-3"],
        ["--nodes", "1"],
        ["--nodes", "x"],
        ["--seconds", "-1"],
        ["--seconds", "long"],
        ["--loss", "0.9"],
        ["--loss", "x"],
        ["--seed", "1", "--seeds", "2"],
        ["--profile", "moon"],
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "python -m serfd.sim: error:" in capsys.readouterr().err
