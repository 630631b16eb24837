"""Sessions are bounded in number, and idle ones make room."""

from __future__ import annotations

import pytest

from miles.router.sessions.store import SessionStore, TooManySessionsError


def test_sessions_are_found_until_they_are_deleted():
    store = SessionStore(2, 10.0)
    session = store.create()
    assert store.get(session.identity) is session
    store.delete(session)
    store.delete(session)
    assert store.get(session.identity) is None
    assert len(store) == 0


def test_no_more_than_there_are_places():
    store = SessionStore(2, 10.0)
    store.create()
    store.create()
    with pytest.raises(TooManySessionsError, match="2 sessions are open"):
        store.create()


def test_idle_sessions_make_room_the_one_unused_longest_first():
    store = SessionStore(2, 10.0)
    first, second = store.create(), store.create()
    store.get(first.identity)
    second.used_at -= 20
    third = store.create()
    assert store.get(second.identity) is None
    assert store.get(first.identity) is first
    assert store.get(third.identity) is third


def test_session_that_generates_is_not_idle():
    store = SessionStore(1, 10.0)
    session = store.create()
    session.used_at -= 20
    session.under_way.add(object())
    with pytest.raises(TooManySessionsError):
        store.create()
