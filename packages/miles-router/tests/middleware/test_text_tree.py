"""The tree of texts: what is found, what is forgotten, and that it never disagrees with a plain list."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from miles.router.middleware.text_tree import TextTree


def add(tree, text, before=None, ids=None, logps=None, version=None):
    start = 0 if before is None else len("".join(part.text for part in before.chain()))
    ids = ids if ids is not None else [ord(letter) for letter in text[start:]]
    return tree.add(before, text, ids, logps, version)


def ids_of(record):
    return [token for part in record.chain() for token in part.ids]


def test_longest_known_beginning_is_found():
    tree = TextTree(100)
    short = add(tree, "ab")
    long = add(tree, "abcd", short)
    assert tree.find("abcdef") == (long, 4)
    assert tree.find("abc") == (short, 2)
    assert tree.find("a") == (None, 0)
    assert tree.find("xab") == (None, 0)
    assert ids_of(long) == [97, 98, 99, 100]


def test_beginnings_that_part_in_the_middle_of_a_label_are_both_known():
    tree = TextTree(100)
    add(tree, "hello world")
    add(tree, "hello there")
    inner = add(tree, "hello")
    assert tree.find("hello you") == (inner, 5)
    assert tree.find("hello there!")[1] == 11
    assert tree.find("hello world!")[1] == 11


def test_same_tokens_again_are_held_once():
    tree = TextTree(100)
    first = add(tree, "abc")
    assert add(tree, "abc") is first
    assert (len(tree), tree.num_tokens) == (1, 3)


def test_new_tokens_for_a_text_replace_the_old_but_not_what_was_built_on_them():
    tree = TextTree(100)
    old = add(tree, "abc", ids=[1], logps=[-1.0], version="1")
    longer = add(tree, "abcd", old, ids=[2], logps=[-2.0], version="1")
    new = add(tree, "abc", ids=[3, 4], logps=[-3.0, -4.0], version="2")
    assert tree.find("abc") == (new, 3)
    assert ids_of(longer) == [1, 2]
    assert tree.find("abcd!") == (longer, 4)


def test_texts_used_least_lately_are_forgotten_ends_first():
    tree = TextTree(6)
    root = add(tree, "ab")
    add(tree, "abcd", root)
    add(tree, "abxy", root)
    tree.find("abcd")
    add(tree, "abzz", root)
    assert tree.find("abxy") == (root, 2)
    assert tree.find("abcd")[1] == 4
    assert tree.num_tokens <= 6


def test_replaced_texts_count_until_they_are_forgotten():
    tree = TextTree(4)
    for token in range(10):
        add(tree, "abc", ids=[token, token], logps=[-1.0, -1.0])
    assert tree.num_tokens <= 4
    assert ids_of(tree.find("abc")[0]) == [9, 9]


def test_replaced_texts_are_forgotten_even_when_nothing_leads_to_them():
    tree = TextTree(4)
    old = add(tree, "abc", ids=[1], logps=[-1.0])
    add(tree, "abcd", old, ids=[2])
    add(tree, "abc", ids=[3])
    tree.find("abcd")
    for letter in "xyz":
        add(tree, letter, ids=[4])
    assert tree.num_tokens <= 4
    add(tree, "w", ids=[4])
    add(tree, "v", ids=[4])
    assert tree.find("abcd") == (None, 0)


def test_old_weight_versions_are_forgotten_with_what_follows():
    tree = TextTree(100)
    prompt = add(tree, "ab")
    old = add(tree, "abc", prompt, logps=[-1.0], version="1")
    add(tree, "abcd", old, logps=[-1.0], version="7")
    kept = add(tree, "abe", prompt, logps=[-1.0], version="7")
    assert tree.versions() == {"1", "7"}
    tree.drop_versions(["1"])
    assert tree.find("abcd") == (prompt, 2)
    assert tree.find("abe") == (kept, 3)
    assert tree.versions() == {"7"}


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.text("ab", min_size=1, max_size=6), st.booleans()), max_size=40),
    st.text("ab", max_size=8),
    st.integers(4, 60),
)
def test_it_finds_what_a_plain_search_would(steps, wanted, capacity):
    tree = TextTree(capacity)
    for text, ask in steps:
        if ask:
            tree.find(text)
        else:
            before, _ = tree.find(text)
            if before is None or len("".join(part.text for part in before.chain())) < len(text):
                add(tree, text, before)
    texts = {"".join(part.text for part in record.chain()): record for record in tree._by_use}
    best = max((text for text in texts if wanted.startswith(text)), key=len, default="")
    record, end = tree.find(wanted)
    assert (record, end) == (texts.get(best), len(best))
    assert tree.num_tokens == sum(len(record.ids) for record in texts.values()) <= max(capacity, 6)
    if record is not None:
        assert ids_of(record) == [ord(letter) for letter in best]
