"""An SFTP server on the loopback that serves one folder: paramiko's own server side, a thread a connection."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import paramiko
from paramiko import SFTP_OK, SFTPAttributes, SFTPHandle, SFTPServer

USER, PASSWORD = "somebody", "a-password-nobody-should-see"


class _Door(paramiko.ServerInterface):
    def check_auth_password(self, username: str, password: str) -> int:
        good = (username, password) == (USER, PASSWORD)
        return paramiko.AUTH_SUCCESSFUL if good else paramiko.AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:
        return "password"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED if kind == "session" else paramiko.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED


def _told(call: Callable[..., Any], *args: Any) -> Any:
    try:
        found = call(*args)
    except OSError as e:
        return SFTPServer.convert_errno(e.errno or 5)
    return SFTP_OK if found is None else found


class _Handle(SFTPHandle):
    def stat(self) -> Any:
        return SFTPAttributes.from_stat(os.fstat(self.readfile.fileno()))


class _Files(paramiko.SFTPServerInterface):
    root = "/"

    def _at(self, path: str) -> str:
        return self.root + self.canonicalize(path)

    def list_folder(self, path: str) -> Any:
        def found() -> list[SFTPAttributes]:
            at = self._at(path)
            return [SFTPAttributes.from_stat(os.lstat(f"{at}/{name}"), name) for name in os.listdir(at)]

        return _told(found)

    def stat(self, path: str) -> Any:
        return _told(lambda: SFTPAttributes.from_stat(os.stat(self._at(path))))

    lstat = stat

    def open(self, path: str, flags: int, attr: Any) -> Any:
        def opened() -> SFTPHandle:
            fd = os.open(self._at(path), flags, 0o600)
            handle = _Handle(flags)
            write = flags & (os.O_WRONLY | os.O_RDWR)
            handle.readfile = handle.writefile = os.fdopen(
                fd, ("r+b" if flags & os.O_RDWR else "wb") if write else "rb"
            )
            return handle

        return _told(opened)

    def remove(self, path: str) -> Any:
        return _told(os.remove, self._at(path))

    def mkdir(self, path: str, attr: Any) -> Any:
        return _told(os.mkdir, self._at(path))

    def rmdir(self, path: str) -> Any:
        return _told(os.rmdir, self._at(path))


@contextmanager
def served(folder: Path) -> Iterator[int]:
    """The port of a server of a folder."""
    files = type("Files", (_Files,), {"root": str(folder)})
    key, listener = paramiko.RSAKey.generate(2048), socket.create_server(("127.0.0.1", 0))
    transports: list[paramiko.Transport] = []

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            transport = paramiko.Transport(sock)
            transport.add_server_key(key)
            transport.set_subsystem_handler("sftp", SFTPServer, files)
            transports.append(transport)
            with suppress(paramiko.SSHException, EOFError):
                transport.start_server(server=_Door())

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for transport in transports:
            transport.close()
