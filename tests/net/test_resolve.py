"""Texts of a join to addresses, by Twisted's resolver on a reactor of its own."""

import re

import pytest
from twisted.internet.defer import Deferred

from serfd.effects import Address
from serfd.net.resolve import resolve


@pytest.fixture
def resolved(reactor, run_until):
    """Resolves a text; gives the addresses, or raises."""
    # The resolver works in threads, which a reactor starts when it runs.
    pool = reactor.getThreadPool()
    pool.start()

    def resolved(text: str, default_port: int = 7946) -> list[Address]:
        found: list[object] = []
        deferred = Deferred.fromCoroutine(resolve(reactor, text, default_port=default_port))
        deferred.addBoth(found.append)
        run_until(lambda: found)
        if isinstance(found[0], list):
            return found[0]
        raise found[0].value

    yield resolved
    pool.stop()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1", Address("127.0.0.1", 7946)),
        ("127.0.0.1:7000", Address("127.0.0.1", 7000)),
        ("::1", Address("::1", 7946)),
        ("[::1]", Address("::1", 7946)),
        ("[::1]:7000", Address("::1", 7000)),
        ("node/127.0.0.1:7000", Address("127.0.0.1", 7000)),
        ("node/127.0.0.1", Address("127.0.0.1", 7946)),
        ("node/[::1]:7000", Address("::1", 7000)),
    ],
)
def test_addresses_are_taken_as_written_and_the_name_before_a_slash_is_left_out(
    resolved, text, address
):
    assert resolved(text) == [address]


def test_the_port_that_is_not_written_is_the_one_that_is_given(resolved):
    assert resolved("127.0.0.1", 17001) == [Address("127.0.0.1", 17001)]


def test_a_name_gives_all_its_addresses_once(resolved):
    found = resolved("localhost:7000")
    assert found
    assert set(found) <= {Address("127.0.0.1", 7000), Address("::1", 7000)}
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nobody.invalid", "lookup nobody.invalid: no such host"),
        ("/127.0.0.1", "empty node name provided"),
        ("", "address '' has no host"),
        (":7946", "address ':7946' has no host"),
        ("node/", "address 'node/' has no host"),
        ("127.0.0.1:x", "'x' is not a port, expected 0 to 65535"),
        ("127.0.0.1:70000", "'70000' is not a port, expected 0 to 65535"),
        ("[::1", "address '[::1' is not an address like '[::1]:7946'"),
        ("a b", "lookup a b: no such host"),
    ],
)
def test_what_is_no_address_is_told(resolved, text, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        resolved(text)
