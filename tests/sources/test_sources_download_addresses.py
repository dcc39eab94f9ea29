"""A table of URLs cannot make this machine ask itself or its neighbours."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from picture_server import Server, downloaded, rows, table_of

from t2i_pipelines.downloading.addresses import is_public

real_getaddrinfo = socket.getaddrinfo


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.stop()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("1.1.1.1", True),
        ("2606:4700:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True),  # how a network of IPv6 alone names 8.8.8.8
        ("2002:808:808::1", True),
        ("0.0.0.0", False),
        ("0.1.2.3", False),
        ("127.0.0.1", False),
        ("127.255.1.2", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("100.100.100.200", False),
        ("169.254.169.254", False),
        ("192.0.0.192", False),
        ("168.63.129.16", False),
        ("198.18.0.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::127.0.0.1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:a9fe:a9fe", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b:1::1", False),
        ("2002:7f00:1::1", False),
        ("2002:a00:1::", False),
        ("fe80::1", False),
        ("fe80::1%lo", False),
        ("fec0::1", False),
        ("fd00:ec2::254", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("2001:db8::1", False),
        ("2001::1", False),
    ],
)
def test_which_addresses_are_public(address, public):
    assert is_public(address) is public


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "0.0.0.0",
        "0",
        "localhost",
        "LOCALHOST",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "user:password@127.0.0.1",
        "①②⑦.0.0.1",
    ],
)
def test_this_machine_is_not_asked_however_it_is_spelt(server, tmp_path, host):
    table = table_of(server, tmp_path, [f"http://{host}:{server.port}/ok/1"])
    report = downloaded(table, tmp_path / "out", allow_private_addresses=False)
    assert not server.calls
    assert set(report.statuses) <= {
        "private_address",
        "url",
    }  # some are no names to newer versions of aiohttp
    if host == "127.0.0.1":
        assert report.statuses == {"private_address": 1}
        (row,) = rows(tmp_path / "out")
        assert row["error_message"].startswith("private_address: Cannot connect to host 127.0.0.1")
        assert "the address is of this machine or of a private network" in row["error_message"]


def test_private_networks_are_not_asked(server, tmp_path):
    hosts = ["10.0.0.1", "192.168.0.1", "169.254.169.254", "[fe80::1]", "[fd00::1]", "100.64.0.1"]
    table = table_of(server, tmp_path, [f"http://{host}/ok/1" for host in hosts])
    report = downloaded(table, tmp_path / "out", allow_private_addresses=False, timeout_s=2)
    assert report.statuses == {"private_address": len(hosts)}


@pytest.fixture
def names(monkeypatch) -> dict[str, list[str]]:
    """What names stand for, in place of the network's answers."""
    known: dict[str, list[str]] = {}

    def getaddrinfo(host, port, *args, **kwargs):
        if host not in known:
            return real_getaddrinfo(host, port, *args, **kwargs)
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
            if ":" in address
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in known[host]
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return known


@pytest.fixture
def public(monkeypatch) -> None:
    """Makes this machine's own address 127.0.0.2 count as one of the public internet."""

    def like_public(address: str) -> bool:
        return address == "127.0.0.2" or is_public(address)

    monkeypatch.setattr("t2i_pipelines.downloading.addresses.is_public", like_public)


def test_names_are_judged_by_what_they_stand_for(server, tmp_path, names):
    names["inside.example"] = ["127.0.0.1"]
    names["both.example"] = ["::1", "127.0.0.1", "10.0.0.1"]
    paths = [f"http://{name}:{server.port}/ok/1" for name in names]
    report = downloaded(table_of(server, tmp_path, paths), tmp_path / "out", allow_private_addresses=False)
    assert report.statuses == {"private_address": 2}
    assert not server.calls


def test_of_public_and_private_addresses_only_the_public_are_asked(tmp_path, names, public):
    server = Server("127.0.0.2")
    inside = Server("127.0.0.1", server.port)
    names["mixed.example"] = ["127.0.0.1", "127.0.0.2"]
    table = table_of(server, tmp_path, [f"http://mixed.example:{server.port}/ok/1"])
    report = downloaded(table, tmp_path / "out", allow_private_addresses=False)
    assert report.statuses == {"success": 1}
    assert (server.calls, inside.calls) == ({"ok/1": 1}, {})
    server.stop()
    inside.stop()


def test_redirects_lead_to_nothing_private(tmp_path, names, public):
    server, inside = Server("127.0.0.2"), Server("127.0.0.1")
    names["inside.example"] = ["127.0.0.1"]
    targets = [f"http://{host}:{inside.port}/ok/1" for host in ("127.0.0.1", "inside.example", "[::1]")]
    far = [
        f"http://127.0.0.2:{server.port}/moved/{target}"
        for target in [*targets, "here", "file:///etc/passwd"]
    ]
    report = downloaded(table_of(server, tmp_path, far), tmp_path / "out", allow_private_addresses=False)
    assert report.statuses == {"private_address": 3, "success": 1, "url": 1}
    assert not inside.calls
    server.stop()
    inside.stop()


def test_the_command_refuses_unless_told(server, tmp_path, capsys):
    from t2i_cli.data.download import run

    table = table_of(server, tmp_path, ["ok/1"])
    run([str(table), str(tmp_path / "refused")])
    assert "Left out, private_address: 1" in capsys.readouterr().out
    assert not server.calls
    run([str(table), str(tmp_path / "out"), "--allow-private-addresses"])
    assert "1 of 1 picture packed in 1 shard" in capsys.readouterr().out


def test_it_is_said_how_private_addresses_are_fetched(server, tmp_path, capsys):
    from t2i_cli.data.download import run

    (tmp_path / "t.csv").write_text(f"url,caption\nhttp://127.0.0.1:{server.port}/ok/1,a\n")
    run([str(tmp_path / "t.csv"), str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "Left out, private_address: 1" in said
    assert "--allow-private-addresses fetches them" in said
    assert not server.calls
