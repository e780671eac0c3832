"""Addresses that carry credentials are known, whatever they look like; public ones are not taken for them."""

from __future__ import annotations

import pytest

from qlora_helpers.base.addresses import carries_credentials

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
