"""Targets of the control plane are told from those of workers."""

from __future__ import annotations

from miles.router.targets import needs_asgi


def test_only_plain_targets_of_the_data_plane_take_the_fast_path():
    plain = [b"/generate", b"/v1/chat/completions?x=%20", b"/", b"/health_generate", b"/healthy"]
    other = [b"/health", b"/workers/x", b"/a%20", b"*", b"http://a/b", b"/a#b", b"/metrics?x=1"]
    assert not any(needs_asgi(target) for target in plain)
    assert all(needs_asgi(target) for target in other)
    for number in range(3000):
        needs_asgi(b"/%d" % number)
    assert not needs_asgi(b"/generate")
