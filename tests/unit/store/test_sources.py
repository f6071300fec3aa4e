"""The operator's list of sources: what it lets through, and that nothing gets out of a pattern's directory."""

from __future__ import annotations

import posixpath
import re
import string
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.store.sources import (
    allowed,
    check_allowed,
    check_resolved,
    is_under,
    kind,
    normalise,
    parse_patterns,
    redact,
    repository,
    split_object,
)
from shared.errors import Code, HearthError


@pytest.mark.parametrize(
    ("url", "form"),
    [
        ("/models//llama/", "/models/llama"),
        ("/", "/"),
        ("/models/with space?and#more%2e", "/models/with space?and#more%2e"),
        ("file:///models/llama/", "/models/llama"),
        ("FILE://localhost/models", "/models"),
        ("hf:meta-llama/Llama-3.2-1B", "hf:meta-llama/Llama-3.2-1B"),
        ("hf:gpt2", "hf:gpt2"),
        ("s3://bucket//a/b/", "s3://bucket/a/b"),
        ("S3://bucket", "s3://bucket"),
        ("gs://my_bucket.example.com/a", "gs://my_bucket.example.com/a"),
        ("az://container/a", "az://container/a"),
        ("https://Host.Example.:443/a%7eb%20c/", "https://host.example/a~b%20c"),
        ("http://127.0.0.1:8000/a", "http://127.0.0.1:8000/a"),
        ("http://[::1]:80/a", "http://[::1]/a"),
        ("https://host/a%c3%a9", "https://host/a%C3%A9"),
    ],
)
def test_a_url_has_one_normal_form(url: str, form: str) -> None:
    assert normalise(url) == form
    assert normalise(form) == form


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("/models/../etc", r"\. or \.\."),
        ("/models/./a", r"\. or \.\."),
        ("/a\0b", "control characters"),
        ("file://other/models", "another machine"),
        ("file:///a%2e%2e/b", "plain path"),
        ("models/llama", "neither an absolute directory nor hf:ORG/NAME"),
        ("ftp://host/a", "neither an absolute directory nor hf:ORG/NAME"),
        ("hf:../..", "hf:ORG/NAME"),
        ("hf:a/b/c", "hf:ORG/NAME"),
        ("hf:a b", "hf:ORG/NAME"),
        ("s3://Bucket/a", "bucket"),
        ("s3:///a", "bucket"),
        ("s3://bucket/../other", r"\. or \.\."),
        ("s3://bucket/a%2fb", "%"),
        ("s3://bucket/a*", r"\*"),
        ("https://user:pass@host/a", "user name or password"),
        ("https://user:pa/ss@host/a", "user name or password"),
        ("https://token@host/a", "user name or password"),
        ("https://host/a?sig=abc", "query"),
        ("https://host/a#b", "fragment"),
        ("https://host/%2e%2e/b", "hides"),
        ("https://host/%252e", "hides"),
        ("https://host/a%2Fb", "hides"),
        ("https://host/a%5cb", "hides"),
        ("https://host/a%00", "hides"),
        ("https://host/a%zz", "hides"),
        ("https://host/a%", "hides"),
        ("https://host\\@evil/a", "backslashes"),
        ("https://host/a b", "spaces"),
        ("https://host/a\u202eb", "invisible"),
        ("https://h\u212aost/a", "host"),
        ("https://host:99999/a", "host"),
        ("https://host:0/a", "host"),
        ("https:///a", "host"),
        ("http://2130706433/a", "number"),
        ("http://0x7f.1/a", "number"),
        ("http://127.1/a", "number"),
        ("http://0177.0.0.1/a", "number"),
        ("s3://" + "b" * 3000, "characters"),
    ],
)
def test_what_two_readers_could_read_differently_is_refused(url: str, words: str) -> None:
    with pytest.raises(HearthError, match=words) as refused:
        normalise(url)
    assert refused.value.failure.code is Code.INVALID_REQUEST
    for secret in ("pass", "pa/ss", "token", "sig=abc"):
        assert secret not in refused.value.failure.message.replace("password", "")


@pytest.mark.parametrize(
    ("pattern", "url", "yes"),
    [
        ("/models/*", "/models/llama", True),
        ("/models/*", "/models/a/b/c", True),
        ("/models/*", "/models", False),
        ("/models/*", "/models2/llama", False),
        ("/models/llama", "/models/llama", True),
        ("/models/llama", "/models/llama2", False),
        ("/*", "/anything", True),
        ("hf:*", "hf:a/b", True),
        ("hf:meta-llama/*", "hf:meta-llama/x", True),
        ("hf:meta-llama/*", "hf:meta-llama-evil/x", False),
        ("hf:meta-*/*", "hf:meta-llama/x", True),
        ("s3://*", "s3://any/thing", True),
        ("s3://bucket/prefix/*", "s3://bucket/prefix/a", True),
        ("s3://bucket/prefix/*", "s3://bucket/prefixed/a", False),
        ("s3://bucket/*", "s3://bucket2/a", False),
        ("s3://team-*/models/*", "s3://team-a/models/x", True),
        ("s3://team-*/models/*", "s3://team-a/y/models/x", False),
        ("https://host/*", "https://host/a/b", True),
        ("https://host/*", "https://host:8443/a", False),
        ("https://host/*", "https://host.evil/a", False),
        ("https://host/*", "http://host/a", False),
        ("https://*.example.com/*", "https://a.example.com/x", True),
        ("https://*.example.com/*", "https://evil/a.example.com/x", False),
        ("/a.b/*", "/aXb/c", False),
    ],
)
def test_patterns(pattern: str, url: str, yes: bool) -> None:
    assert normalise(url) == url
    assert allowed(url, parse_patterns(f"/elsewhere/*, {pattern}")) is yes


def test_the_default_list_leaves_out_web_servers() -> None:
    patterns = parse_patterns("/*,hf:*,s3://*,gs://*,az://*")
    assert allowed("s3://a/b", patterns)
    with pytest.raises(HearthError, match=r"https://host/a is not among the allowed sources \(HEARTH_SOURCES\)") as no:
        check_allowed("https://host/a", patterns)
    assert no.value.failure.code is Code.FORBIDDEN
    assert not allowed("/a", ()), "an empty list allows nothing"


@pytest.mark.parametrize(
    "pattern",
    ["*", "foo", "**", "/models/../*", "https://host*", "https://*/*", "S3://b/*", "https://u:p@h/*", "file:///x/*",
     "/models//*", "https://HOST/*", "https://host:443/*", "/models/", "/a\0*"],
)  # fmt: skip
def test_patterns_that_cannot_mean_what_they_say_are_refused_at_the_start(pattern: str) -> None:
    with pytest.raises(HearthError, match="HEARTH_SOURCES") as refused:
        parse_patterns(pattern)
    assert refused.value.failure.code is Code.INVALID_REQUEST
    assert ":p@" not in refused.value.failure.message


def test_a_link_out_of_an_allowed_directory_is_refused() -> None:
    patterns = parse_patterns("/models/*")
    check_resolved("/models/a", "/models/b", patterns)
    with pytest.raises(HearthError, match="leads to a directory that is not among") as refused:
        check_resolved("/models/a", "/etc", patterns)
    assert "/etc" not in refused.value.failure.message, "where a link leads is nobody's business"
    with pytest.raises(HearthError, match="is not among"):
        check_resolved("/etc", "/models/a", patterns)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:secret@host/a?sig=secret#secret", "https://…"),
        ("https://user:sec/ret@host/a", "https://host/a"),
        ("s3://key:secret@bucket/a", "s3://bucket/a"),
        ("https://host?secret@x/y", "https://…"),
        ("https://user:sec?ret@host/a", "https://…"),
        ("https://host/a?sig=secret", "https://host/a"),
        ("/models/a\nb", "/models/a\N{REPLACEMENT CHARACTER}b"),
        ("/" + "x" * 300, "/" + "x" * 199 + "…"),
        ("hf:org/name", "hf:org/name"),
    ],
)
def test_urls_are_shown_without_secrets(url: str, shown: str) -> None:
    assert redact(url) == shown


def test_parts_of_a_url() -> None:
    assert split_object("s3://bucket/a/b") == ("s3", "bucket", "a/b")
    assert split_object("https://host:1") == ("https", "host:1", "")
    assert (kind("/a"), kind("file:///a"), kind("hf:a/b"), kind("s3://b/a")) == (
        "directory",
        "directory",
        "hub",
        "object",
    )
    assert repository("hf:a/b") == "a/b"
    assert is_under("s3://b/a/c", "s3://b/a") and is_under("s3://b/a", "s3://b/a") and is_under("s3://b/a", "s3://")
    assert not is_under("s3://b/ab", "s3://b/a")


# What somebody may write who wants out of a directory: parts of attacks, put together in any order.
_PIECES = st.sampled_from(
    ["/", "//", "..", ".", "%2e", "%2E%2e", "%2f", "%5c", "\\", "@", ":", "?", "#", "*", "a", "models", "secret",
     "host", "evil", "%00", "\0", "%", "%25", " ", "\t", "\n", "\u202e", "\uff0e", "\uff0f", "file://", "s3://", "https://",
     "bucket", "prefix", "hf:", "[::1]", "0x7f.1", "~", "%7e", "\u212a", "İ"]
)  # fmt: skip
_PATTERNS = ("/models/*", "s3://bucket/prefix/*", "https://host/models/*", "https://*.host/*", "hf:a/*")
_TEXTS = st.one_of(st.lists(_PIECES, max_size=12).map("".join), st.text(max_size=40))


@settings(deadline=None)
@given(start=st.sampled_from([*(p[:-1] for p in _PATTERNS), "", "/", "s3://", "https://"]), rest=_TEXTS)
@example(start="/models/", rest="../etc")
@example(start="https://host/models/", rest="%2e%2e/secret")
@example(start="https://host/models/", rest="@evil/x")
def test_nothing_escapes_from_a_pattern(start: str, rest: str) -> None:
    url = start + rest
    try:
        form = normalise(url)
    except HearthError:
        return
    assert normalise(form) == form
    assert kind(form) == kind(url)
    assert redact(form) == form or len(form) > 200 or kind(form) == "directory"
    if form.startswith("/"):
        assert posixpath.normpath(form) == form, "an operating system reads it as it stands"
        assert allowed(form, ["/models/*"]) == (form.startswith("/models/"))
        return
    if form.startswith("hf:"):
        assert re.fullmatch(r"hf:[\w.-]+(/[\w.-]+)?", form) and ".." not in form
        return
    # Another reader of urls finds the same host, and no part of the path that goes up, however often it decodes.
    parts = urlsplit(form)
    assert f"{parts.scheme}://{parts.netloc}{parts.path}" == form
    assert parts.username is None and parts.password is None and "@" not in parts.netloc
    path = parts.path
    for _ in range(3):
        assert not {".", ".."} & set(path.split("/")) and "\\" not in path and "\0" not in path
        path = unquote(path)
    if allowed(form, ["https://host/models/*"]):
        assert parts.hostname == "host" and unquote(parts.path).startswith("/models/")
    if allowed(form, ["https://*.host/*"]):
        assert parts.hostname is not None and parts.hostname.endswith(".host") and parts.port is None
    if allowed(form, ["s3://bucket/prefix/*"]):
        assert parts.netloc == "bucket" and parts.path.startswith("/prefix/")


@settings(deadline=None)
@given(text=st.text(alphabet=string.printable + "\0é…", max_size=60))
def test_redacting_never_fails_and_never_shows_what_stands_before_an_at_sign(text: str) -> None:
    assert "s3cr3t" not in redact(f"https://user:s3cr3t-{text}@host/a")
    assert "s3cr3t" not in redact(f"https://user:{text}-s3cr3t@host/a")
    assert "s3cr3t" not in redact(f"https://host/a?{text}=s3cr3t")
    assert len(redact(text)) <= 201
    assert not re.search(r"[\x00-\x1f]", redact(text))
