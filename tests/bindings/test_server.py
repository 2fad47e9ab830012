"""Failures caught: a setting of the Python server that does not reach the cache, whichever way it is given, a mistake
in one that ends in a traceback, chats that differ when streamed or taken up from the cache of prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
import yaml
from fastapi.testclient import TestClient
from llama_cpp.server import __main__ as server

from bench.logs import parse_sizes

SETTINGS = {"cache_type": "kvtc-k2v4", "kvtc_window": 16, "kvtc_sink": 2, "n_ctx": 512, "n_threads": 1}


@pytest.fixture
def start(model, monkeypatch) -> Callable[..., TestClient]:
    """The server's own main with these arguments, up to where it would listen."""

    def run(*arguments: object, **environment: object) -> TestClient:
        apps = []
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(sys, "argv", ["llama_cpp.server", *map(str, arguments)])
        monkeypatch.setattr(server.uvicorn, "run", lambda app, **_: apps.append(app))
        server.main()
        return TestClient(apps[0])

    return run


def options(settings: dict) -> list[object]:
    return [part for name, value in settings.items() for part in (f"--{name}", value)]


@pytest.mark.parametrize("way", ["arguments", "environment", "json", "yaml"])
def test_settings_reach_the_cache(start, model, log, tmp_path, way) -> None:
    settings = {**SETTINGS, "model": str(model)}
    if way == "arguments":
        start(*options(settings))
    elif way == "environment":
        start("--model", model, **{name.upper(): value for name, value in SETTINGS.items()})
    else:
        path = tmp_path / f"config.{way}"
        path.write_text((json.dumps if way == "json" else yaml.safe_dump)({"models": [settings]}))
        start("--config_file", path)
    sizes = parse_sizes("".join(log))
    assert (sizes.type_k, sizes.type_v, sizes.sink, sizes.window) == ("kvtc2", "kvtc4", 2, 16)


def test_prompt_caches_keep_their_setting(start, model, log, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in ("ram", "disk"):
        log.clear()
        start(*options({"model": model, "cache": "true", "cache_type": kind, "type_k": "kvtc2", "type_v": "kvtc4"}))
        sizes = parse_sizes("".join(log))
        assert (sizes.type_k, sizes.type_v) == ("kvtc2", "kvtc4")
    assert (tmp_path / ".cache" / "llama_cache").is_dir()


def test_chat_streams_and_repeats_itself_from_the_prompt_cache(start, model) -> None:
    client = start(*options({**SETTINGS, "model": model, "cache": "true"}))
    body = {"messages": [{"role": "user", "content": "How vexingly quick daft zebras jump! " * 8}], "max_tokens": 16}
    body |= {"temperature": 0}
    whole = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    lines = client.post("/v1/chat/completions", json={**body, "stream": True}).text.splitlines()
    parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    streamed = "".join(part["choices"][0]["delta"].get("content") or "" for part in parts)
    # Upstream leaves out of a stream the characters whose bytes came one by one.
    assert streamed and streamed == "".join(c for c in whole if c.isascii())


def test_mistakes_end_in_one_line(start, model) -> None:
    for more, words in (
        ({"cache_type": "kvtc-k2v9"}, "error: cache_type takes kvtc-k<a>v<b>"),
        ({"type_k": "q9"}, "error: 'q9' is no KV cache type"),
        ({"kvtc_file": "/nowhere.gguf", "cache_type": "kvtc2"}, "error: Failed to create llama_context: .*cannot open"),
    ):
        with pytest.raises(SystemExit, match=words):
            start(*options({"model": model, **more}))


def test_help_names_the_settings(start, capsys) -> None:
    with pytest.raises(SystemExit):
        start("--help")
    text = capsys.readouterr().out
    assert all(name in text for name in ("--cache_type", "kvtc-k2v4", "--kvtc_file", "--kvtc_window", "--kvtc_sink"))
