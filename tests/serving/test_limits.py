"""Rate limits: what a bucket gives, and who counts as one sender."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfrec.serving.limits import Buckets, sender_of


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


class TestBuckets:
    def test_give_a_burst_and_then_say_how_long_to_wait(self, clock):
        buckets = Buckets(2.0, burst=3, clock=clock)
        assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0.5]

    def test_fill_again_with_time_up_to_the_burst(self, clock):
        buckets = Buckets(2.0, burst=3, clock=clock)
        for _ in range(3):
            buckets.take("a")
        clock.now = 0.5
        assert [buckets.take("a") for _ in range(2)] == [0, 0.5]
        clock.now = 1000
        assert sum(buckets.take("a") == 0 for _ in range(10)) == 3

    def test_are_one_for_each_sender(self, clock):
        buckets = Buckets(1.0, burst=1, clock=clock)
        assert [buckets.take(who) for who in "aab"] == [0, 1, 0]

    def test_forget_the_quietest_sender_first(self, clock):
        buckets = Buckets(1.0, burst=1, most=2, clock=clock)
        for who in ("a", "b", "a", "c"):
            buckets.take(who)
        assert len(buckets) == 2
        assert [buckets.take("a") > 0, buckets.take("b") == 0] == [True, True]

    def test_give_one_at_least_however_low_the_rate(self, clock):
        buckets = Buckets(0.01, clock=clock)
        assert [buckets.take("a") for _ in range(2)] == [0, pytest.approx(100)]

    @given(st.lists(st.floats(0, 3), max_size=50))
    def test_never_give_more_than_burst_and_rate_allow(self, pauses):
        clock = Clock()
        buckets = Buckets(3.0, burst=4, clock=clock)
        given_out = 0
        for pause in pauses:
            clock.now += pause
            given_out += buckets.take("a") == 0
            assert given_out <= 4 + 3.0 * clock.now + 1e-6


class TestSender:
    @pytest.mark.parametrize(
        ("address", "sender"),
        [
            ("10.0.0.7", "10.0.0.7"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
            ("fe80::1%eth0", "fe80::/64"),
            ("::ffff:10.0.0.7", "10.0.0.7"),
            ("", ""),
            ("a:b", "a:b"),
        ],
    )
    def test_is_an_address_of_ipv4_or_a_network_of_ipv6(self, address, sender):
        assert sender_of(address) == sender
