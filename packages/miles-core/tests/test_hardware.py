from miles.core import hardware


def test_hidden_accelerators_do_not_count(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.num_accelerators() == 0


def test_packages_are_found_without_importing_them():
    assert hardware.is_installed("json")
    assert not hardware.is_installed("no_such_package")
