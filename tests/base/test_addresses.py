"""Addresses that carry credentials are known, whatever they look like; public ones are not taken for them."""

from __future__ import annotations

import pytest

from qlora_helpers.base.addresses import carries_credentials, redacted

SIGNED = (
    "https://bucket.s3.amazonaws.com/corpus.7z?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA&X-Amz-Signature=c"
)


@pytest.mark.parametrize(
    "address",
    [
        SIGNED,
        SIGNED.lower(),
        "https://user:s3cr3t@host/corpus.7z",
        "https://s3cr3t@host/corpus.7z",
        "HTTPS://u:p@h/c.7z",
        "https://user:s3/cr3t@host/corpus.7z",
        "https://user:s3#cr3t@host/c.7z",
        "https://user%3As3cr3t%40host/corpus.7z",
        "s3://AKIA:s3cr3t@bucket/prefix",
        "https://u:p@[::1]:8080/c.7z",
        "https://h/c.7z?AWSAccessKeyId=A&Expires=1&Signature=s",
        "https://h/c.7z?sv=2024&sig=s3cr3t",
        "https://h/c.7z?token=s",
        "https://h/c.7z?download=1&access_token=s",
        "https://h/c.7z?X-Goog-Signature=s",
        "https://h/c.7z?api_key=s",
        "https://h/c.7z?Key=s",
        "https://h/c.7z#password=s",
        "https://h/c.7z?X%2DAmz%2DSecurity%2DToken=s",
        "https://h/c.7z?pass=s",
        "https://h/c.7z?code=s",
        "https://h/c.7z?sas=s&sid=1",
        "https://h/c.7z?x=1&sid=s",
        "https://h/hf_abcdefghijklmnopqrst/c.7z",
        "hf_abcdefghijklmnopqrst",
        "owner/AKIAIOSFODNN7EXAMPLE",
        "https://proxy/?url=https%3A%2F%2Fuser%3Ap%40host%2Fc.7z",
        "https://proxy/?url=https%3A%2F%2Fhost%2Fc.7z%3Ftoken%3Ds",
    ],
)
def test_addresses_with_credentials(address):
    assert carries_credentials(address)


@pytest.mark.parametrize(
    "text",
    [
        "embedded",
        "knkarthick/samsum",
        "random:falcon-40b",
        "data/mine.jsonl",
        "/home/me@work/token=1/mine.jsonl",
        "a?token=b",
        "https://host/corpus.7z",
        "https://host:8443/corpus.7z?download=1",
        "https://[::1]:8080/corpus.7z",
        "https://",
        "https://host/@scope/corpus.7z?versionId=3&author=me",
        "s3://bucket/prefix",
        "https://host/tokens/key/corpus.7z",
    ],
)
def test_addresses_without_credentials(text):
    assert not carries_credentials(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"403 Forbidden for url: {SIGNED}", "for url: https://bucket.s3.amazonaws.com/corpus.7z?[removed]"),
        ("got https://h/c.7z?download=1.", "got https://h/c.7z?[removed]"),
        ("<a href='https://u:s3/cr3t@h:80/c?x=s3cr3t'>", "<a href='https://[removed]@h:80/c?[removed]'>"),
        ("https://h/page#section and https://h/c#token=s3cr3t", "https://h/page#section and https://h/c#[removed]"),
        ("s3://AKIA:s3cr3t@bucket/prefix", "s3://[removed]@bucket/prefix"),
        ("aws_secret_access_key = s3cr3ts3cr3t here", "aws_secret_access_key = [removed] here"),
        ('{"api_key": "s3cr3ts3cr3t", "n": 1}', '{"api_key": "[removed]", "n": 1}'),
        ("Authorization: Bearer s3cr3ts3cr3t", "Authorization: Bearer [removed]"),
        ("the token hf_s3cr3ts3cr3ts3cr3t is wrong", "the token [removed] is wrong"),
        ("AKIAIOSFODNN7EXAMPLE may not do that", "[removed] may not do that"),
    ],
)
def test_texts_from_elsewhere_are_written_without_credentials(text, expected):
    assert expected in redacted(text) and "s3cr3t" not in redacted(text)
    assert redacted(redacted(text)) == redacted(text)


@pytest.mark.parametrize(
    "text",
    [
        "expected s3://bucket/prefix; got 's3://bucket'",
        "see https://huggingface.co/docs/bitsandbytes/main/fsdp_qlora",
        "end token 2, tokens: 12, key=1",
        "data/mine.jsonl:3: expected a row",
        "tokenizer: corpus",
    ],
)
def test_other_texts_stay_as_they_are(text):
    assert redacted(text) == text


def test_long_texts_are_redacted_in_one_pass():
    """A hostile message must not hold the trainer up: no part of a pattern repeats another."""
    for text in ("a://" * 20_000, "token" * 20_000, "x-" * 40_000, "?" * 80_000, "eyJ" * 30_000, "token =" * 10_000):
        assert len(redacted(text)) <= len(text) + 20
    assert "secret" not in redacted("x" * 80_000 + " token=secret")
