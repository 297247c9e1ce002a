"""A handshake of all processes over TCP before JAX connects them.

JAX aborts a process whose peers do not come, from C++: Python cannot catch that. It does not notice a wrong number of
processes at all. The handshake makes a wrong address, a wrong count or a missing process an ordinary error.
"""

import contextlib
import socket
import struct
import time

from jem_jax.common.errors import UserError

_HELLO = struct.Struct("!8sII")
_MARK = b"jem_jax1"
_GO = b"go"
_PAUSE = 0.1
_HELLO_SECONDS = 2.0


def meet(address: str, num_processes: int, process_id: int, seconds: float) -> None:
    """Returns once all processes have called the address. Its port is free again then.

    Args:
      address: host:port of process 0.
      num_processes: how many there are.
      process_id: this one's number, from 0.
      seconds: how long to wait for the others.

    Raises:
      UserError: they did not all come, or not with the same count and a number of their own.
    """
    host, port = _split(address)
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(port)) if process_id == 0 else None
        call = stack.enter_context(_call(host, port, deadline))
        call.sendall(_HELLO.pack(_MARK, process_id, num_processes))
        if server is not None:
            _receive(server, num_processes, deadline)
        # Process 0 answers at most `seconds` after it began to listen.
        call.settimeout(seconds + 1)
        _await_go(call, address)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator_address must be HOST:PORT, such as 10.0.0.1:1234, not {address!r}")
    return host.strip("[]"), int(port)


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise UserError(f"process 0 cannot listen at port {port} ({error.strerror}); name another port") from error


def _call(host: str, port: int, deadline: float) -> socket.socket:
    while True:
        try:
            return socket.create_connection((host, port), timeout=_left(deadline))
        except OSError as error:
            if time.monotonic() > deadline - _PAUSE:
                raise UserError(
                    f"no process of this run answers at --coordinator_address={host}:{port} "
                    f"({error.strerror or error}); it must name the machine of process 0, which must be running"
                ) from error
            time.sleep(_PAUSE)


def _receive(server: socket.socket, num_processes: int, deadline: float) -> None:
    """Takes a call from every process, this one too, and then answers all."""
    with contextlib.ExitStack() as stack:
        calls: dict[int, socket.socket] = {}
        while len(calls) < num_processes:
            server.settimeout(_left(deadline))
            try:
                call = stack.enter_context(server.accept()[0])
            except TimeoutError as error:
                missing = ", ".join(str(number) for number in range(num_processes) if number not in calls)
                raise UserError(
                    f"of {num_processes} processes these did not come in time: {missing}; all must be started with "
                    "the same --coordinator_address, each with its own --process_id"
                ) from error
            except OSError:
                continue
            try:
                # Our processes send their number at once. Other callers must not delay them.
                call.settimeout(_HELLO_SECONDS)
                mark, number, count = _HELLO.unpack(call.recv(_HELLO.size, socket.MSG_WAITALL))
            except (OSError, struct.error):
                continue
            if mark != _MARK:
                continue
            if count != num_processes:
                raise UserError(
                    f"process {number} was started with --num_processes={count}, process 0 with {num_processes}"
                )
            if number in calls:
                raise UserError(f"two processes were started with --process_id={number}; each needs its own")
            calls[number] = call
        for call in calls.values():
            with contextlib.suppress(OSError):
                call.sendall(_GO)


def _await_go(call: socket.socket, address: str) -> None:
    try:
        answer = call.recv(len(_GO), socket.MSG_WAITALL)
    except OSError:
        answer = b""
    if answer != _GO:
        raise UserError(f"the processes did not all meet at --coordinator_address={address}; process 0 says why")


def _left(deadline: float) -> float:
    return max(_PAUSE, deadline - time.monotonic())
