"""The types that cross the border, as logs show them."""

from serfd.effects import Address, Command


def test_addresses_are_shown_as_users_write_them() -> None:
    assert str(Address("127.0.0.1", 7946)) == "127.0.0.1:7946"
    assert str(Address("::1", 7946)) == "[::1]:7946"


def test_a_command_is_shown_by_what_was_asked_and_each_is_its_own() -> None:
    one, other = Command[int]("join x"), Command[int]("join x")
    assert repr(one) == "<Command join x>"
    assert one != other
