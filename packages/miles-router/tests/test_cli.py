"""The command line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from miles.core.errors import ConfigError
from miles.router.cli import authority, build_parser, main, parse_settings
from miles.router.server import RouterServer
from miles.router.settings import Settings


def test_every_setting_has_a_flag_with_help():
    options = {option for action in build_parser()._actions for option in action.option_strings}
    for name, field in Settings.model_fields.items():
        assert "--" + name.replace("_", "-") in options
        assert field.description


def test_values_are_parsed_by_type():
    workers = "--worker http://a:1 http://b:1 --worker http://c:1=2"
    settings = parse_settings(f"{workers} --port 0 --policy sticky --queue-timeout-s 1.5 --hot-path off".split())
    assert settings.worker == ("http://a:1", "http://b:1", "http://c:1=2")
    assert (settings.port, settings.policy, settings.queue_timeout_s, settings.hot_path) == (0, "sticky", 1.5, "off")
    assert settings.host == "127.0.0.1"


def test_a_run_may_use_its_own_spellings():
    requests = "--miles-router-timeout 7 --miles-router-max-connections 64"
    health = "--miles-router-health-check-failure-threshold 5 --rollout-health-check-interval 9"
    settings = parse_settings(f"{requests} {health}".split())
    assert (settings.request_timeout_s, settings.max_connections) == (7.0, 64)
    assert (settings.health_check_failure_threshold, settings.health_check_interval_s) == (5, 9.0)


def test_all_mistakes_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        parse_settings(["--port", "x", "--queue-size", "-1", "--tls-key", "k"])
    assert [problem.split(" ")[0] for problem in caught.value.problems] == ["--port", "--queue-size"]
    with pytest.raises(ConfigError, match="--tls-certificate and --tls-key"):
        parse_settings(["--tls-key", "k"])


@pytest.mark.parametrize("flag", ["--workers-file", "--control-token-file"])
def test_a_file_that_is_no_text_is_named(tmp_path, capsys, flag):
    path = tmp_path / "binary"
    path.write_bytes(b"\xff\xfe")
    assert main(["--port", "0", flag, str(path)]) == 2
    assert f"{flag} {path}: expected UTF-8 text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--wrker", "x"], "unrecognized arguments: --wrker x"),
        (["--hot-path", "maybe"], "argument --hot-path: invalid choice: 'maybe'"),
    ],
)
def test_a_wrong_flag_is_named_in_two_lines(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert said in lines[0]
    assert lines[1] == "miles-router --help lists all flags"


@pytest.mark.parametrize(
    "arguments", [["--health-check-path", "health"], ["--session-header", "a b"], ["--health-check-path", "/a b"]]
)
def test_what_cannot_stand_in_a_request_is_refused(capsys, arguments):
    assert main(arguments) == 2
    assert f"{arguments[0]} '{arguments[1]}'" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "said"), [(None, "No such file"), ("no certificate", "PEM")])
def test_a_certificate_that_cannot_be_used_is_refused(capsys, tmp_path, content, said):
    paths = [tmp_path / "certificate", tmp_path / "key"]
    for path in paths if content else ():
        path.write_text(content)
    assert main(["--tls-certificate", str(paths[0]), "--tls-key", str(paths[1])]) == 2
    error = capsys.readouterr().err
    assert f"--tls-certificate {paths[0]} --tls-key {paths[1]}: expected a PEM" in error
    assert said in error


def test_an_address_is_printed_as_it_stands_in_a_url():
    assert authority("127.0.0.1", 80) == "127.0.0.1:80"
    assert authority("::1", 80) == "[::1]:80"


def test_a_router_that_was_told_to_end_ends_well(monkeypatch, capsys):
    async def serve(self, listener, on_start):
        assert listener.getsockname()[1] > 0
        on_start()

    monkeypatch.setattr(RouterServer, "serve", serve)
    assert main(["--port", "0"]) == 0
    assert "on http://127.0.0.1:" in capsys.readouterr().out


def test_json_switches_and_lists_are_parsed():
    line = ["--sessions", "--session-template-kwargs", '{"enable_thinking": false}', "--middleware", "a", "b"]
    settings = parse_settings(line)
    assert (settings.sessions, settings.session_routed_experts) == (True, False)
    assert settings.session_template_kwargs == {"enable_thinking": False}
    assert settings.middleware == ("a", "b")
    assert parse_settings(["--miles-router-middleware-paths", "c"]).middleware == ("c",)
    assert Settings(session_template_kwargs={"a": 1}).session_template_kwargs == {"a": 1}
    with pytest.raises(ConfigError, match=r"--session-template-kwargs .*expected a JSON object"):
        parse_settings(["--session-template-kwargs", "{"])


def test_sessions_without_a_tokenizer_are_refused(capsys):
    assert main(["--sessions"]) == 2
    assert "--sessions needs --tokenizer DIR" in capsys.readouterr().err


@pytest.mark.parametrize(("missing", "own"), [("tokenizers", "tokenizer"), ("jinja2", "sessions.template")])
def test_an_extra_that_is_not_installed_is_named(monkeypatch, checkpoint, capsys, missing, own):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"miles.router.{own}", raising=False)
    monkeypatch.delitem(sys.modules, "miles.router.sessions.service", raising=False)
    assert main(["--sessions", "--tokenizer", str(checkpoint("chatml"))]) == 2
    assert f"needs {missing}, which is not installed: pip install 'miles-router[sessions]'" in capsys.readouterr().err


def test_a_template_that_sessions_cannot_use_is_refused(checkpoint, tmp_path, capsys):
    template = tmp_path / "template.jinja"
    template.write_text("{{ raise_exception('no chat') }}")
    given = ["--tokenizer", str(checkpoint("chatml")), "--session-chat-template", str(template)]
    assert main(["--sessions", *given]) == 2
    assert "cannot be used for sessions: the chat template refuses the messages: no chat" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--middleware", "radix_cache"], "a middleware needs --tokenizer DIR"),
        (["--worker", "nonsense"], "worker 'nonsense': expected http://host:port"),
        (["--worker", "http://a:1=0"], "worker http://a:1: weight 0.0 must be a finite number above 0"),
        (["--policy", "least_loadd"], "--policy least_loadd: no 'least_loadd'"),
        (["--host", "203.0.113.1"], "--host 203.0.113.1 --port 0: cannot listen there"),
    ],
)
def test_a_router_that_cannot_start_says_why_and_announces_nothing(capsys, arguments, said):
    assert main(["--port", "0", *arguments]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.out == ""


def test_help_is_quick_and_the_package_is_light():
    code = (
        "import sys; from miles.router import cli\n"
        "heavy = {'torch', 'transformers', 'ray', 'numpy', 'aiohttp', 'httpx', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    done = subprocess.run([sys.executable, "-m", "miles.router", "--help"], capture_output=True, text=True, timeout=60)
    assert "--worker" in done.stdout
