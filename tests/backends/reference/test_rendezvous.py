"""The place where ranks meet is for this host alone."""

from __future__ import annotations

from urllib.parse import urlsplit

import psutil
import pytest

from chipset.backends.reference.rendezvous import connect, is_loopback, serve


def test_it_listens_on_loopback_only() -> None:
    store, address = serve(5)
    port = urlsplit(address).port
    listening = [
        place.laddr.ip
        for place in psutil.Process().net_connections()
        if place.status == psutil.CONN_LISTEN and place.laddr.port == port
    ]
    assert listening == ["127.0.0.1"]
    del store


def test_what_one_sets_another_gets() -> None:
    store, address = serve(5)
    connect(address, 5).set("key", "value")
    assert store.get("key") == b"value"


@pytest.mark.parametrize("address", ["", "127.0.0.1:80", "tcp://127.0.0.1", "http://a:1"])
def test_an_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="tcp://host:port"):
        connect(address, 1)


def test_which_addresses_stay_on_the_host() -> None:
    assert is_loopback("tcp://127.0.0.1:5")
    assert is_loopback("tcp://localhost:5")
    assert not is_loopback("tcp://10.0.0.1:5")
