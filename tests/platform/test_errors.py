"""What is shown of addresses: never the passwords in them, whatever characters they hold and whoever reads them."""

import contextlib
import string
from urllib.parse import quote, urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from segadapt.platform.errors import UsageError, check_address, check_no_password, holds_password, redacted

MARK = "hunter2"

ANY = st.text(st.sampled_from(string.ascii_letters + string.digits + "/@:?&;#%=+!$'\"<>()[]{}|\\~^*,._-é"), max_size=8)

SCHEMES = st.sampled_from(["http", "https", "postgresql+psycopg", "s3", "shards:s3", "gs"])

TEXT_AROUND = st.sampled_from(["", "could not reach ", "('", "x="])


@given(SCHEMES, ANY, ANY, ANY, st.booleans(), st.sampled_from(["", "/db", "/a/b?region=eu", "/x@y", "?q=a@b&c"]))
@example("postgresql+psycopg", "me", "pa/", "", False, "/db")
@example("s3", "KEY", "/+", "=", False, "/bucket")
@example("http", "me", "?password=", "&x", False, "/db")
def test_no_part_of_a_login_is_shown(scheme: str, user: str, before: str, after: str, quoted: bool, path: str) -> None:
    password = before + MARK + after
    address = f"{scheme}://{user}:{quote(password, safe='') if quoted else password}@host:5432{path}"
    assert MARK not in redacted(address)
    assert holds_password(address)


@given(
    SCHEMES,
    st.sampled_from(
        ["password", "PASSWORD", "passwd", "pwd", "secret_key", "access_token", "sslpassword", "p%61ssword"]
    ),
    ANY.filter(lambda text: "&" not in text),
    ANY,
    st.sampled_from(["host/db", "me@host:5432/db", "/db", "me:other@host"]),
    st.sampled_from(["?", "?region=eu&", "?a=b;c&"]),
)
@example("postgresql", "password", "a@b;c#", "", "me@host", "?")
@example("http", "password", "@", "", "me@host:5432/db", "?")
def test_no_secret_among_the_parameters_is_shown(
    scheme: str, name: str, before: str, after: str, host: str, begin: str
) -> None:
    value = f"{before}{MARK}{after.replace('&', '')}"
    for given_value in (value, quote(value, safe="")):
        address = f"{scheme}://{host}{begin}{name}={given_value}&connect_timeout=3"
        assert MARK not in redacted(address)
        assert holds_password(address)


@given(TEXT_AROUND, SCHEMES, ANY, ANY, ANY, TEXT_AROUND)
def test_what_sqlalchemy_or_the_standard_library_takes_for_a_password_is_one(
    head: str, scheme: str, login: str, host: str, rest: str, tail: str
) -> None:
    address = f"{scheme.rpartition(':')[2]}://{login}@{host}/db?{rest}password={rest}"
    passwords: list[str | None] = []
    with contextlib.suppress(ArgumentError, ValueError):
        url = make_url(address)
        passwords += [str(url.password or ""), str(url.query.get("password", ""))]
    with contextlib.suppress(ValueError):
        passwords.append(urlsplit(address).password)
    if any(passwords):
        assert holds_password(f"{head}{address} {tail}")


@given(st.sampled_from(["http://127.0.0.1:5000", "postgresql+psycopg://host:5432/db", "sqlite:////a%2Fb/x.db"]), ANY)
def test_an_address_without_secrets_is_shown_as_it_is(address: str, rest: str) -> None:
    path = "".join(sign for sign in rest if sign not in "@?&;#")
    text = f"{address}/{path}?connect_timeout=3&region=eu is there, mail me@host"
    assert redacted(text) == text
    assert not holds_password(text)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://me:secret@host:5000/x", "http://host:5000/x"),
        ("postgresql+psycopg://mlflow@/db", "postgresql+psycopg:///db"),
        ("postgresql://h/db?user=me&password=s", "postgresql://h/db?user=me&password=***"),
        ("data.source=shards:s3://KEY:SE/CRET@bucket/x?region=eu", "data.source=shards:s3://bucket/x?region=eu"),
        ("s3://bucket/key=1/data@2", "s3://bucket/key=1/data@2"),
    ],
)
def test_the_rest_of_an_address_stays(address: str, shown: str) -> None:
    assert redacted(address) == shown


@pytest.mark.parametrize("address", ["", "http://me:pass word@host", "http://host\n"])
def test_addresses_that_are_no_word_are_refused_unseen(address: str) -> None:
    with pytest.raises(UsageError, match=r"--tracking-uri must be an address") as refused:
        check_address("--tracking-uri", address)
    assert "pass" not in str(refused.value)


def test_a_password_in_what_is_kept_is_refused_unseen() -> None:
    check_no_password("data.source", "shards:s3://bucket/x?region=eu")
    check_no_password("trainer.steps", 4)
    with pytest.raises(UsageError, match=r"data\.source must hold no password .* in shards:s3://bucket/x\.") as refused:
        check_no_password("data.source", "shards:s3://KEY:hunter2@bucket/x")
    assert "hunter2" not in str(refused.value)


def test_no_message_for_users_shows_a_password() -> None:
    assert str(UsageError("--address must be HOST:PORT, but got 'ray://me:hunter2@head'")) == (
        "--address must be HOST:PORT, but got 'ray://head'"
    )
