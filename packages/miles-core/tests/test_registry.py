from pathlib import Path

import pytest

from miles.core import plugins
from miles.core.errors import PluginError
from miles.core.registry import Registry, is_dotted, load_object


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a distribution with entry points on the path, as pip would."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def put(distribution: str, entry_points: str, **modules: str) -> None:
        info = site / f"{distribution.replace('-', '_')}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(entry_points)
        for name, source in modules.items():
            (site / f"{name}.py").write_text(source)

    return put


def test_names_are_listed_without_importing(install):
    install("acme", "[miles.things]\nbroken = acme_broken:thing\n", acme_broken="raise SystemExit('imported')")
    assert Registry("miles.things").names() == ["broken"]


def test_an_object_is_found_by_name(install):
    install("acme", "[miles.things]\nanswer = acme_answer:ANSWER\n", acme_answer="ANSWER = 42")
    assert Registry("miles.things").get("answer") == 42
    assert "answer" in Registry("miles.things")


def test_a_distribution_that_is_installed_later_is_found(install):
    assert Registry("miles.things").names() == []
    install("acme", "[miles.things]\nanswer = acme_later:ANSWER\n", acme_later="ANSWER = 42")
    assert Registry("miles.things").names() == ["answer"]


def test_two_distributions_with_one_name_are_refused_and_named(install):
    install("acme", "[miles.things]\nanswer = acme:A\n")
    install("rival", "[miles.things]\nanswer = rival:A\n")
    with pytest.raises(PluginError, match=r"registered twice, by acme 1.5 \(acme:A\) and rival 1.5 \(rival:A\)"):
        Registry("miles.things").get("answer")


def test_a_missing_name_is_answered_with_the_nearest(install):
    install("acme", "[miles.things]\nanswer = acme:A\n")
    with pytest.raises(PluginError, match=r"no 'anwser'.*Did you mean 'answer'\?"):
        Registry("miles.things").get("anwser")


def test_a_well_known_name_tells_what_to_install(monkeypatch):
    monkeypatch.setitem(plugins.WELL_KNOWN, "miles.things", {"fancy": "miles-fancy"})
    with pytest.raises(PluginError, match="pip install 'miles-fancy'"):
        Registry("miles.things").get("fancy")


def test_a_failing_import_says_who_failed_and_why(install):
    install("acme", "[miles.things]\nthing = acme_needs:thing\n", acme_needs="import no_such_library")
    with pytest.raises(PluginError, match=r"of acme 1.5 cannot be loaded: .* needs 'no_such_library'"):
        Registry("miles.things").get("thing")


def test_an_error_while_importing_is_told(install):
    install("acme", "[miles.things]\nthing = acme_raises:thing\n", acme_raises="raise RuntimeError('too old')")
    with pytest.raises(PluginError, match="failed with RuntimeError: too old"):
        Registry("miles.things").get("thing")


def test_only_our_own_packages_without_plugins(install, monkeypatch):
    install("acme", "[miles.things]\nanswer = acme:A\n")
    monkeypatch.setenv("MILES_DISABLE_PLUGINS", "1")
    assert Registry("miles.things").names() == []
    monkeypatch.setenv("MILES_DISABLE_PLUGINS", "0")
    assert Registry("miles.things").names() == ["answer"]


def test_a_dotted_path_is_accepted_in_both_forms():
    assert Registry("miles.things").get("miles.core.errors.PluginError") is PluginError
    assert Registry("miles.things").get("miles.core.errors:PluginError") is PluginError
    assert load_object("miles.core.errors:PluginError.__name__") == "PluginError"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_package.thing", "no module 'no_such_package'"),
        ("miles.core.no_such_module.thing", "no module 'miles.core.no_such_module'"),
        ("miles.core.errors.PlugnError", "has no 'PlugnError'; did you mean 'PluginError'"),
        ("nothing", "not a dotted path"),
    ],
)
def test_a_path_that_leads_nowhere_says_where_it_ends(path, message):
    with pytest.raises(PluginError, match=message):
        load_object(path)


@pytest.mark.parametrize(
    ("text", "dotted"), [("a.b", True), ("a:b", True), ("a.b:c.d", True), ("math", False), ("a..b", False)]
)
def test_dotted_paths_are_recognized(text, dotted):
    assert is_dotted(text) is dotted
