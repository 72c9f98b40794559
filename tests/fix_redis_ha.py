"""Fixtures: Redis behind TLS, under sentinels, and as a cluster."""

import contextlib
import selectors
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme

from pmqd.embedded import RedisServer
from tests.fix_daemon import free_port
from tests.fix_servers import wait_until

MASTER_NAME = "mail-queue"
NODES = 3

# --- TLS ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Papers:
    """PEM files: an authority, what it has signed, and the authority of somebody else.

    Attributes:
        ca: the authority that clients are told to trust.
        server: certificate and key for 127.0.0.1 and localhost.
        elsewhere: the same for another host.
        expired: for 127.0.0.1, until yesterday.
        client: for a client.
        stranger: an authority that has signed none of these.
    """

    ca: Path
    server: Path
    elsewhere: Path
    expired: Path
    client: Path
    stranger: Path


@pytest.fixture(scope="session")
def papers(session_folder: Path) -> Papers:
    """The certificates of this test run."""
    folder = session_folder / "papers"
    folder.mkdir()
    ca, stranger = trustme.CA(), trustme.CA()
    yesterday = datetime.now(UTC) - timedelta(days=1)
    certificates = {
        "server": ca.issue_cert("127.0.0.1", "localhost"),
        "elsewhere": ca.issue_cert("redis.example.org"),
        "expired": ca.issue_cert("127.0.0.1", not_before=yesterday - timedelta(days=9), not_after=yesterday),
        "client": ca.issue_cert("pmqd.example.org"),
    }
    for name, certificate in certificates.items():
        certificate.private_key_and_cert_chain_pem.write_to_path(str(folder / f"{name}.pem"))
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    stranger.cert_pem.write_to_path(str(folder / "stranger.pem"))
    names = ("ca", "server", "elsewhere", "expired", "client", "stranger")
    return Papers(**{name: folder / f"{name}.pem" for name in names})


class TlsDoor:
    """Ends TLS in front of a server that speaks plainly (Valkey's wheel is built without it), one thread a connection.

    Args:
        target: the server.
        certificate: the door's own certificate and key.
        clients: an authority; given, clients must show a certificate that it has signed.
    """

    def __init__(self, target: RedisServer, certificate: Path, clients: Path | None = None) -> None:
        self._upstream = str(target.socket_folder / target.socket_name)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate)
        if clients is not None:
            self._context.load_verify_locations(clients)
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.versions: set[str] = set()
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._serve, daemon=True)]
        self._threads[0].start()

    def url(self, host: str = "127.0.0.1") -> str:
        """The address of Redis through this door."""
        return f"rediss://{host}:{self.port}/0"

    def close(self) -> None:
        """No more connections, and the end of those there are."""
        self._closed.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)

    def _serve(self) -> None:
        while not self._closed.is_set():
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._pass, args=(plain,), daemon=True))
            self._threads[-1].start()

    def _pass(self, plain: socket.socket) -> None:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as server, plain:
            plain.settimeout(5)
            with self._context.wrap_socket(plain, server_side=True) as client:
                self.versions.add(str(client.version()))
                server.connect(self._upstream)
                self._pump(client, server)

    def _pump(self, client: ssl.SSLSocket, server: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ, (client, server))
            selector.register(server, selectors.EVENT_READ, (server, client))
            while not self._closed.is_set():
                for key, _ in selector.select(0.2):
                    source, sink = key.data
                    data = source.recv(65536)
                    if not data:
                        return
                    sink.sendall(data)
                    while source is client and client.pending():
                        sink.sendall(client.recv(65536))


@pytest.fixture
def tls_door() -> Iterator[Any]:
    """The function `tls_door(server, certificate, clients=None)`: a door that is closed after the test."""
    with contextlib.ExitStack() as stack:

        def make(target: RedisServer, certificate: Path, clients: Path | None = None) -> TlsDoor:
            door = TlsDoor(target, certificate, clients)
            stack.callback(door.close)
            return door

        yield make


# --- Sentinel ----------------------------------------------------------------------------------------------------


class SentinelServer(RedisServer):
    """One sentinel; it keeps what it learns in its configuration file."""

    def __init__(self, directory: Path, lines: list[str]) -> None:
        super().__init__(directory, tcp=True)
        own = [f"port {self.port}", "bind 127.0.0.1", f"dir {self.directory}"]
        own += [f"unixsocket {self.socket_folder / self.socket_name}", "unixsocketperm 700"]
        self._file = self.directory / "sentinel.conf"
        self._file.write_text("\n".join([*own, *lines]) + "\n")

    def _command(self) -> list[str]:
        return [str(self.program), str(self._file), "--sentinel"]


@dataclass
class Watched:
    """Two servers, one a replica of the other, and three sentinels that watch them."""

    nodes: list[RedisServer]
    sentinels: list[SentinelServer]

    @property
    def url(self) -> str:
        """The setting `redis.url`."""
        hosts = ",".join(f"127.0.0.1:{each.port}" for each in self.sentinels)
        return f"redis+sentinel://{hosts}/{MASTER_NAME}"

    def master(self) -> RedisServer:
        """The node that the first sentinel that answers calls the master."""
        _, port = self.ask("GET-MASTER-ADDR-BY-NAME", MASTER_NAME)
        return next(node for node in self.nodes if node.port == int(port))

    def ask(self, *words: str) -> Any:
        """A `SENTINEL ...` command to the first sentinel that runs."""
        sentinel = next(each for each in self.sentinels if each.running)
        with client(sentinel) as asked:
            return asked.execute_command("SENTINEL", *words)

    def settle(self) -> None:
        """Wait until every sentinel knows the others and the replica, so that a failover can begin."""
        wait_until(lambda: all(map(self._knows, self.sentinels)), timeout=30, what="the sentinels agree")

    def _knows(self, sentinel: SentinelServer) -> bool:
        with client(sentinel) as asked:
            seen: Any = asked.sentinel_masters()
            replicas: Any = asked.sentinel_slaves(MASTER_NAME)
        state = seen[MASTER_NAME]
        good = [each for each in replicas if each["master-link-status"] == "ok"]
        return bool(state["num-other-sentinels"] == 2 and len(good) == 1 and not state["is_sdown"])


def client(server: RedisServer, *, password: str | None = None, db: int = 0) -> redis.Redis:
    """A client of one server, over its socket."""
    path = str(server.socket_folder / server.socket_name)
    return redis.Redis(unix_socket_path=path, password=password, db=db, protocol=2)


@pytest.fixture
def watched(short_folder: Path) -> Iterator[Watched]:
    """A master, its replica and three sentinels; a silent master is down after a second."""
    with contextlib.ExitStack() as stack:
        nodes = [
            stack.enter_context(RedisServer(short_folder / f"node{n}", tcp=True, settings=_REPLICATION))
            for n in (1, 2)
        ]
        with client(nodes[1]) as replica:
            replica.replicaof("127.0.0.1", str(nodes[0].port))
        lines = [
            f"sentinel monitor {MASTER_NAME} 127.0.0.1 {nodes[0].port} 2",
            f"sentinel down-after-milliseconds {MASTER_NAME} 1000",
            f"sentinel failover-timeout {MASTER_NAME} 5000",
        ]
        sentinels = [
            stack.enter_context(SentinelServer(short_folder / f"sentinel{n}", lines)) for n in range(3)
        ]
        made = Watched(nodes, sentinels)
        made.settle()
        yield made


_REPLICATION = {"repl-diskless-sync-delay": "0", "repl-ping-replica-period": "1"}

# --- Cluster -----------------------------------------------------------------------------------------------------

SLOTS = 16384


@dataclass
class Cluster:
    """Masters of a cluster, without replicas."""

    nodes: list[RedisServer]
    make_replica: Callable[[], RedisServer] | None = None

    @property
    def url(self) -> str:
        """The setting `redis.url`: all nodes."""
        return f"redis://{','.join(f'127.0.0.1:{node.port}' for node in self.nodes)}/0"

    def id_of(self, node: RedisServer) -> str:
        """A node's name in the cluster."""
        with client(node) as asked:
            return asked.execute_command("CLUSTER MYID").decode()  # type: ignore[no-any-return]

    def owner(self, slot: int) -> RedisServer:
        """The node that has a slot, as the first one sees it."""
        found = self.seen_owner(slot)
        assert found is not None, slot
        return found

    def seen_owner(self, slot: int) -> RedisServer | None:
        """The same; None while that is no node of ours."""
        with client(self.nodes[0]) as asked:
            ranges: Any = asked.execute_command("CLUSTER SLOTS")
        found = [each["primary"][1] for span, each in _ranges(ranges) if span[0] <= slot <= span[1]]
        return next((node for node in self.nodes if node.port == found[0]), None)

    def add_replica(self, primary: RedisServer) -> RedisServer:
        """One more node, a replica of this one; it is in `nodes` when the others know it."""
        assert self.make_replica is not None
        made = self.make_replica()
        _meet(made, primary)
        wait_until(lambda: self._knows(made, primary), timeout=20, what="the replica knows its primary")
        with client(made) as asked:
            asked.execute_command("CLUSTER", "REPLICATE", self.id_of(primary))
            wait_until(lambda: _link_is_up(made), timeout=30, what="the replica is in step")
        self.nodes.append(made)
        name = self.id_of(made)
        wait_until(
            lambda: all(self._sees(node, name, "slave") for node in self.nodes),
            timeout=20,
            what="all know it",
        )
        return made

    def _knows(self, node: RedisServer, other: RedisServer) -> bool:
        return self._sees(node, self.id_of(other), "master")

    def _sees(self, node: RedisServer, name: str, role: str) -> bool:
        with client(node) as asked:
            nodes: Any = asked.execute_command("CLUSTER", "NODES")
        lines = nodes.decode().splitlines() if isinstance(nodes, bytes) else [f"{nodes}"]
        return any(line.startswith(name) and role in line and "handshake" not in line for line in lines)

    def healthy(self) -> bool:
        """Whether every node sees all slots served."""
        return all(_cluster_info(node)["cluster_state"] == "ok" for node in self.nodes)

    def set_slot(self, slot: int, target: RedisServer, state: str, named: RedisServer) -> None:
        """`CLUSTER SETSLOT` at one node, naming another."""
        with client(target) as asked:
            asked.execute_command("CLUSTER SETSLOT", slot, state, self.id_of(named))


def hand_over(source: RedisServer, target: RedisServer, slot: int) -> None:
    """Move all keys that a slot has now, as a resharding tool does between the two steps of SETSLOT."""
    with client(source) as asked:
        for key in asked.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 1000):
            asked.migrate("127.0.0.1", target.port, key, 0, 1000, replace=True)


def _meet(node: RedisServer, other: RedisServer) -> None:
    with client(node) as asked:
        asked.execute_command("CLUSTER", "MEET", "127.0.0.1", other.port, other.settings["cluster-port"])


def _link_is_up(replica: RedisServer) -> bool:
    with client(replica) as asked:
        info: Any = asked.info("replication")
    return bool(info.get("master_link_status") == "up")


def _ranges(answer: Any) -> list[tuple[tuple[int, int], dict[str, Any]]]:
    """CLUSTER SLOTS as redis-py reads it or as it comes."""
    if isinstance(answer, dict):
        return list(answer.items())
    return [((row[0], row[1]), {"primary": row[2]}) for row in answer]


def _cluster_info(node: RedisServer) -> dict[str, str]:
    with client(node) as asked:
        found: Any = asked.execute_command("CLUSTER INFO")
    if isinstance(found, dict):
        return found
    return dict(line.split(":", 1) for line in found.decode().splitlines() if ":" in line)


@pytest.fixture
def cluster(short_folder: Path) -> Iterator[Cluster]:
    """Three masters that share the slots."""
    with contextlib.ExitStack() as stack:

        def node_at(name: str) -> RedisServer:
            return stack.enter_context(_cluster_node(short_folder / name))

        made = Cluster([node_at(f"c{n}") for n in range(NODES)], lambda: node_at("replica"))
        for number, node in enumerate(made.nodes):
            with client(node) as asked:
                first, last = SLOTS * number // NODES, SLOTS * (number + 1) // NODES - 1
                asked.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
            for other in made.nodes[:number]:
                _meet(node, other)
        wait_until(made.healthy, timeout=30, what="the cluster forms")
        yield made


def _cluster_node(folder: Path) -> RedisServer:
    settings = {
        "cluster-enabled": "yes",
        "cluster-port": str(free_port()),  # without it the port and 10,000, which may be too much
        "cluster-node-timeout": "2000",
        "cluster-config-file": "nodes.conf",
    }
    return RedisServer(folder, tcp=True, settings=settings)
