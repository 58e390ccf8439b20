"""What every Ray worker process of the service does first (Ray's `worker_process_setup_hook`)."""

from __future__ import annotations

from signalbox.serving import logs


def setup() -> None:
    """Log to the service's terminal; keep the gRPC server of Serve's replicas on loopback.

    Ray 2.60 binds that server to `[::]:0`, whatever the node's address is. Its requests are pickled, and though
    Ray's token guards it, nothing outside this machine need reach it at all.
    """
    logs.configure()
    from ray.serve._private import replica  # every worker of ours runs Serve, which imports it anyway

    add_port = replica.add_port_to_grpc_server

    def add_loopback_port(server: object, address: str) -> int:
        return add_port(server, address.replace("[::]:", "127.0.0.1:"))

    replica.add_port_to_grpc_server = add_loopback_port
