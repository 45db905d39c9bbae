"""Rates as people and tc write them."""

import pytest

from lightning_comm.core.rates import format_rate, parse_rate


@pytest.mark.parametrize(
    ("text", "bits_per_s"),
    [
        ("100mbit", 100e6),
        ("1gbit", 1e9),
        ("1 Gbit/s", 1e9),
        ("2.5GBIT", 2.5e9),
        ("56kbit", 56e3),
        (" 800 bit ", 800),
        (".5mbit", 500e3),
        ("1e3kbit", 1e6),
        ("10Mbitps", 10e6),
    ],
)
def test_a_rate_is_read_in_decimal_bits(text, bits_per_s):
    assert parse_rate(text) == bits_per_s / 8


@pytest.mark.parametrize("bad", ["100", "100mb", "mbit", "-1mbit", "100 furlongs", "", "1,5gbit", "nanmbit", 100, None])
def test_what_is_no_rate_is_named_with_the_units(bad):
    with pytest.raises(ValueError, match="a rate must be a number") as caught:
        parse_rate(bad)
    said = str(caught.value)
    assert [word for word in (repr(bad), "kbit", "mbit", "gbit", "100mbit") if word not in said] == []


@pytest.mark.parametrize("bad", ["0mbit", "0.0gbit", "1e400gbit"])
def test_a_rate_is_more_than_nothing_and_finite(bad):
    with pytest.raises(ValueError, match="finite and > 0") as caught:
        parse_rate(bad)
    assert bad in str(caught.value)


@pytest.mark.parametrize("text", ["100 Mbit/s", "1 Gbit/s", "2.5 Gbit/s", "56 kbit/s", "800 bit/s"])
def test_a_rate_is_written_as_it_is_read(text):
    assert format_rate(parse_rate(text)) == text
