"""Recent: bounded, and never older than what was committed."""

import pytest

from tfrec.errors import InputError
from tfrec.serving.recent import Recent
from tfrec.serving.state import Event


def event(event_id, user_id="u"):
    return Event(event_id, user_id, "i", "like", 1.0)


class Disk:
    """Histories by user, and who was read."""

    def __init__(self, **histories):
        self.histories, self.reads = histories, []

    def read(self, user_id):
        self.reads.append(user_id)
        found = list(self.histories.get(user_id, []))
        return found, len(found)


def test_a_user_is_read_once_and_then_kept_up():
    disk, recent = Disk(u=[event("a")]), Recent(10)
    assert recent.get("u", disk.read) == [event("a")]
    recent.add([(2, event("b")), (3, event("c", "stranger"))])
    assert recent.get("u", disk.read) == [event("a"), event("b")]
    assert disk.reads == ["u"]


def test_one_without_events_is_kept_too():
    disk, recent = Disk(), Recent(10)
    assert recent.get("u", disk.read) == recent.get("u", disk.read) == []
    assert disk.reads == ["u"]


def test_a_history_that_was_read_while_its_user_acted_is_not_kept():
    disk, recent = Disk(u=[event("a")]), Recent(10)

    def read(user_id):
        found = disk.read(user_id)
        recent.add([(2, event("b"))])
        disk.histories["u"] = [event("a"), event("b")]
        return found

    assert recent.get("u", read) == [event("a")]
    assert recent.get("u", disk.read) == [event("a"), event("b")]


def test_events_that_were_on_disk_before_they_were_told_of_are_not_doubled():
    disk, recent = Disk(u=[event("a"), event("b")]), Recent(10)
    recent.get("u", disk.read)
    recent.add([(1, event("a"))])
    recent.add([(2, event("b")), (3, event("c"))])
    assert recent.get("u", disk.read) == [event("a"), event("b"), event("c")]
    assert disk.reads == ["u"]


def test_one_whose_user_was_forgotten_while_it_was_read_is_not_kept():
    disk, recent = Disk(u=[event("a")]), Recent(10)

    def read(user_id):
        recent.drop("u")
        return disk.read(user_id)

    recent.get("u", read)
    disk.histories.clear()
    assert recent.get("u", disk.read) == []


def test_those_not_asked_for_lately_go_first():
    disk, recent = Disk(a=[event("1", "a")], b=[event("2", "b")], c=[event("3", "c")]), Recent(4)
    for user in ("a", "b", "a", "c", "a", "b"):
        recent.get(user, disk.read)
    assert disk.reads == ["a", "b", "c", "b"]


def test_events_that_come_make_room_as_well():
    disk, recent = Disk(), Recent(4)
    recent.get("a", disk.read)
    recent.get("b", disk.read)
    recent.add([(number, event(str(number), "b")) for number in (1, 2, 3)])
    disk.reads.clear()
    recent.get("b", disk.read)
    assert disk.reads == []
    recent.get("a", disk.read)
    assert disk.reads == ["a"]


def test_a_history_larger_than_all_room_is_given_and_not_kept():
    disk, recent = Disk(u=[event(str(number)) for number in range(9)]), Recent(5)
    assert len(recent.get("u", disk.read)) == len(recent.get("u", disk.read)) == 9
    assert disk.reads == ["u", "u"]


def test_dropping_those_who_are_not_here_keeps_the_count_right():
    disk, recent = Disk(u=[event("a")]), Recent(2)
    for _ in range(5):
        recent.drop("nobody")
    recent.get("u", disk.read)
    recent.get("v", disk.read)
    recent.get("v", disk.read)
    recent.get("u", disk.read)
    assert disk.reads == ["u", "v", "u"]


def test_a_read_that_fails_is_tried_again():
    def broken(_):
        raise OSError

    disk, recent = Disk(u=[event("a")]), Recent(5)
    with pytest.raises(OSError):
        recent.get("u", broken)
    assert recent.get("u", disk.read) == [event("a")]


def test_a_negative_room_is_refused():
    with pytest.raises(InputError, match="0 or more"):
        Recent(-1)
