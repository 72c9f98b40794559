"""Whom the demo's chaos kills: the process at the other end of one conversation, and no other."""

import multiprocessing
import os
import socket
from multiprocessing.connection import Connection

from penguinmails.demo.chaos import client_pid


def connected(server: socket.socket, local_port: int) -> socket.socket:
    """A client of this server, from this port of ours (0: any)."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    client.bind(("127.0.0.1", local_port))
    client.connect(server.getsockname())
    return client


def hold_one(server: socket.socket, pipe: Connection) -> None:
    """Another process: connects, tells its port, and keeps the connection until it is told to go."""
    with connected(server, 0) as client:
        pipe.send(client.getsockname()[1])
        pipe.recv()


def test_two_processes_with_the_same_port_are_told_apart_by_whom_they_talk_to() -> None:
    """A port is one process's only together with the other end: the kernel gives it out again for another server."""
    forked = multiprocessing.get_context("fork")
    with socket.create_server(("127.0.0.1", 0)) as theirs, socket.create_server(("127.0.0.1", 0)) as ours:
        near, far = forked.Pipe()
        other = forked.Process(target=hold_one, args=(theirs, far), daemon=True)
        other.start()
        try:
            port = near.recv()
            with connected(ours, port):
                assert client_pid(port, ours.getsockname()[1]) == os.getpid()
                assert client_pid(port, theirs.getsockname()[1]) == other.pid
        finally:
            near.send("go")
            other.join(10)
