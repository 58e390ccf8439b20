"""Runs `serve_forever` with a tiny Serve application in the gateway's place: what is tested is start and stop.

Usage: python serve_standin.py CONFIG [stubborn|broken]
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from signalbox.serving.config import Config, load_config
from signalbox.serving.graph import serve_forever

MANNER = sys.argv[2] if len(sys.argv) > 2 else ""


def build_app(config: Config, store_url: str):  # type: ignore[no-untyped-def]
    import logging

    from ray import serve
    from starlette.requests import Request
    from starlette.responses import JSONResponse

    manner = MANNER
    if manner == "broken":
        raise ValueError("the graph cannot be built")

    @serve.deployment(ray_actor_options={"num_cpus": 0.01})
    class Expert:
        def __init__(self) -> None:
            if manner == "stubborn":  # it takes its time to end, and its child ignores every polite request to
                subprocess.Popen(["/bin/sh", "-c", "trap '' TERM INT HUP; sleep 1000"], start_new_session=True)

        def __del__(self) -> None:
            if manner == "stubborn":
                time.sleep(1000)

        async def pid(self) -> int:
            return os.getpid()

    @serve.deployment(ray_actor_options={"num_cpus": 0.01}, num_replicas=config.server.gateways)
    class Gateway:
        def __init__(self, expert) -> None:  # type: ignore[no-untyped-def]
            self.expert = expert

        async def __call__(self, request: Request) -> JSONResponse:
            if request.url.path == "/readyz":
                return JSONResponse({"experts": {name: {"ready": True} for name in config.experts}})
            logging.getLogger("signalbox.standin").warning("a line from a replica")
            return JSONResponse({"pid": await self.expert.pid.remote(), "store": store_url})

    return Gateway.bind(Expert.bind())


if __name__ == "__main__":
    path = Path(sys.argv[1])
    sys.exit(serve_forever(path, load_config(path), build_app=build_app))
